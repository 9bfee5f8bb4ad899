"""What a tokenizer's chat template does, found out by rendering it once: role markers, terminator, trimming.

Templates are rendered by transformers in its sandbox; the result is checked for text of the messages that got lost and
for special tokens that template and text only spell together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from laddpo.errors import UserError
from laddpo.preference.badrows import RowError
from laddpo.preference.pairs import Message, prompt_rows
from laddpo.preference.special_text import PlainTokenizer

PROBE = "probe"


class ChatTemplate:
    """`markers` are the added tokens written around messages, `terminator` the one right after an assistant's text
    (None: the template writes none), `trims_responses` whether white space around an assistant's text is removed."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self.source: str = tokenizer.get_chat_template()
        answered = self._render([Message("user", PROBE), Message("assistant", f" {PROBE} "), Message("user", PROBE)])
        after = answered.split(PROBE)[2]
        self.trims_responses = not after.startswith(" ")
        added = [token.content for token in tokenizer.added_tokens_decoder.values()]
        self.markers = tuple(token for token in added if token in answered)
        follows = after.lstrip()
        self.terminator = next(
            (token for token in sorted(self.markers, key=len, reverse=True) if follows.startswith(token)), None
        )
        if PROBE not in answered or len(answered.split(PROBE)) != 4:
            raise UserError(
                "The chat template does not write every message once (data.template). Use data.template=plain, or "
                "repair the template in tokenizer_config.json."
            )
        self._expected = lru_cache(maxsize=1024)(self._count_specials)

    def render(self, messages: Sequence[Message], tokens: PlainTokenizer) -> tuple[str, dict[str, str]]:
        """The prompt's text, ending with an open assistant turn, and the stand-ins in it.

        Where messages contain the text of special tokens, each such text is replaced by a stand-in that does not occur
        in them, so that special tokens in the result are the template's own.
        """
        hidden: dict[str, str] = {}
        contents = [message.content for message in messages]
        found = tokens.special_text(contents)
        if found:
            mark = _unused_character(contents)
            hidden = {f"{mark}{rank}{mark}": text for rank, text in enumerate(found)}
            back = {text: stand_in for stand_in, text in hidden.items()}
            messages = [
                Message(message.role, tokens.pattern.sub(lambda match: back[match.group()], message.content))
                for message in messages
            ]
        text = self._render(messages)
        for index, message in enumerate(messages):
            if message.content.strip() not in text:
                problem = "the chat template lost text of the message"
                raise RowError("DATA-95", f"prompt[{index}]", problem, "Use another template or remove the row.")
        roles = tuple(message.role for message in messages)
        if Counter(tokens.pattern.findall(text)) != self._expected(roles, tokens):
            problem = "text and template together spell a special token"
            raise RowError("DATA-74", "prompt", problem, "Remove the row.")
        return text, hidden

    def _count_specials(self, roles: tuple[str, ...], tokens: PlainTokenizer) -> Counter[str]:
        return Counter(tokens.pattern.findall(self._render([Message(role, PROBE) for role in roles])))

    def _render(self, messages: Sequence[Message]) -> str:
        from jinja2 import TemplateError

        try:
            return self._tokenizer.apply_chat_template(
                prompt_rows(messages), tokenize=False, add_generation_prompt=True, chat_template=self.source
            )
        except TemplateError as error:
            roles = ", ".join(message.role for message in messages)
            problem = f"the chat template refuses messages of {roles}: {error}"
            raise RowError("DATA-95", "prompt", problem, "Use messages that the model's template knows.") from error


def _unused_character(texts: Sequence[str]) -> str:
    """A private-use character that none of the texts contains."""
    used = set().union(*texts)
    return next(chr(code) for code in range(0xE000, 0xF8FF) if chr(code) not in used)
