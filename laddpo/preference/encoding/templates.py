"""What a tokenizer's chat template does, found out by rendering it once: role markers, terminator, trimming.

Templates are rendered in jinja's sandbox, in a process with limits of time, length and memory. The result is checked
for text of the messages that got lost and for special tokens that template and text only spell together.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from laddpo.errors import UserError
from laddpo.preference.encoding.rendering import Failure, render_jobs
from laddpo.preference.encoding.special_text import PlainTokenizer
from laddpo.preference.reading.bad_rows import RowError
from laddpo.preference.reading.pairs import Message, Prompt, prompt_rows

PROBE = "probe"
KNOWN_ROLES = 1024  # orders of roles whose special tokens are remembered
ROWS_OVER = 3  # rows that may reach a limit before the template is given up
OPENING_TAG = re.compile(r"<[^<>\s]{1,40}>\s*\Z")
CURE = "Repair it (chat_template.jinja or tokenizer_config.json beside the model), or set data.template=plain."

Rendered = tuple[str, dict[str, str]]  # the text, and the stand-ins in it


class ChatTemplate:
    """`markers` are the added tokens written around messages, `terminator` the one right after an assistant's text
    (None: the template writes none), `trims_responses` whether white space around an assistant's text is removed,
    `opening` a tag such as <think> that it leaves open before the response (None: it leaves none)."""

    def __init__(self, tokenizer: Any):
        self._name, self._variables = tokenizer.name_or_path, tokenizer.special_tokens_map
        self.source = template_source(tokenizer)
        conversation = [Message("user", PROBE), Message("assistant", f" {PROBE} "), Message("user", PROBE)]
        answered = self.text(prompt_rows(conversation))
        asked, closed = (self.text(prompt_rows(conversation[:1]), opens_turn) for opens_turn in (True, False))
        if answered.count(PROBE) != 3 or asked.count(PROBE) != 1:
            raise self._unusable("it does not write every message once.")
        _, before, after, _ = answered.split(PROBE)
        last = asked.split(PROBE)[1]
        if asked == closed and before.strip() and last.strip() != before.strip():
            raise self._unusable(
                f"it writes {before.strip()!r} before an assistant's text, but not where the answer begins: it does "
                "not follow add_generation_prompt."
            )
        self.trims_responses = not after.startswith(" ")
        added = [token.content for token in tokenizer.added_tokens_decoder.values()]
        self.markers = tuple(token for token in added if token in answered)
        follows = after.lstrip()
        self.terminator = next(
            (token for token in sorted(self.markers, key=len, reverse=True) if follows.startswith(token)), None
        )
        opening = OPENING_TAG.search(last)
        self.opening = opening.group().strip() if opening else None
        self._specials: dict[tuple[str, ...], Counter[str] | RowError] = {}
        self._rows_over = 0

    def text(self, messages: list[dict[str, Any]], opens_turn: bool = True) -> str:
        """The template's text of messages, which must be good; `opens_turn`: with an open assistant turn at its end."""
        (found,) = render_jobs(self.source, self._variables, [(messages, opens_turn)])
        if isinstance(found, Failure):
            raise self._unusable(f"{self._place(found)}{found.problem}.")
        return found

    def render(self, prompts: Sequence[Prompt], tokens: PlainTokenizer) -> list[Rendered | RowError]:
        """The text of each prompt, ending with an open assistant turn, and the stand-ins in it.

        Where messages contain the text of special tokens, each such text is replaced by a stand-in that does not occur
        in them, so that special tokens in the result are the template's own.
        """
        safe = [hide_specials(prompt, tokens) for prompt in prompts]
        texts = self._render([messages for messages, _ in safe])
        self._count_specials({roles_of(prompt) for prompt in prompts}, tokens)
        return [
            self._checked(messages, hidden, text, tokens) for (messages, hidden), text in zip(safe, texts, strict=True)
        ]

    def _checked(
        self, messages: Prompt, hidden: dict[str, str], text: str | RowError, tokens: PlainTokenizer
    ) -> Rendered | RowError:
        if isinstance(text, RowError):
            return text
        for index, message in enumerate(messages):
            if message.content.strip() not in text:
                advice = "Use another template or remove the row."
                if "</think>" in message.content:
                    advice = "Templates drop the reasoning of earlier answers. Remove it from this turn, with </think>."
                return RowError("DATA-95", f"prompt[{index}]", "the chat template lost text of the message", advice)
        expected = self._specials[roles_of(messages)]
        if isinstance(expected, RowError):
            return expected
        if Counter(tokens.pattern.findall(text)) != expected:
            problem = "text and template together spell a special token"
            return RowError("DATA-74", "prompt", problem, "Remove the row.")
        return text, hidden

    def _count_specials(self, wanted: set[tuple[str, ...]], tokens: PlainTokenizer) -> None:
        """Learn which special tokens the template writes around messages of these roles."""
        if len(self._specials) > KNOWN_ROLES:
            self._specials.clear()
        unknown = sorted(wanted - self._specials.keys())
        texts = self._render([tuple(Message(role, PROBE) for role in roles) for roles in unknown])
        for roles, text in zip(unknown, texts, strict=True):
            is_text = isinstance(text, str)
            self._specials[roles] = Counter(tokens.pattern.findall(text)) if is_text else text

    def _render(self, prompts: Sequence[Prompt]) -> list[str | RowError]:
        found = render_jobs(self.source, self._variables, [(prompt_rows(prompt), True) for prompt in prompts])
        return [
            self._refusal(prompt, outcome) if isinstance(outcome, Failure) else outcome
            for prompt, outcome in zip(prompts, found, strict=True)
        ]

    def _refusal(self, prompt: Prompt, failure: Failure) -> RowError:
        what = f"{self._place(failure)}{failure.problem}"
        if not failure.is_over:
            problem = f"the chat template refuses messages of {', '.join(roles_of(prompt))}: {what}"
            return RowError("DATA-95", "prompt", problem, "Use messages that the model's template knows.")
        self._rows_over += 1
        if self._rows_over > ROWS_OVER:
            raise self._unusable(f"{what}, for more than {ROWS_OVER} rows.")
        return RowError("DATA-95", "prompt", f"the chat template is stopped: {what}", CURE)

    def _place(self, failure: Failure) -> str:
        lines = self.source.splitlines()
        if failure.line is None or not 0 < failure.line <= len(lines):
            return ""
        return f"line {failure.line}, `{lines[failure.line - 1].strip()[:100]}`: "

    def _unusable(self, why: str) -> UserError:
        return UserError(f"{self._name}: its chat template cannot be used: {why} {CURE}")


def template_source(tokenizer: Any) -> str:
    """The text of the tokenizer's template; of several with names, the one named default."""
    found = tokenizer.chat_template
    if isinstance(found, dict):
        if "default" not in found:
            raise UserError(
                f"{tokenizer.name_or_path}: its chat templates are {', '.join(map(repr, sorted(found)))}, and none is "
                "named 'default'. Name the one to use so in tokenizer_config.json, or set data.template=plain."
            )
        found = found["default"]
    if not isinstance(found, str) or not found.strip():
        kind = "is empty" if isinstance(found, str) else f"is of the type {type(found).__name__}, want text"
        raise UserError(f"{tokenizer.name_or_path}: its chat template {kind}. {CURE}")
    return found


def hide_specials(prompt: Prompt, tokens: PlainTokenizer) -> tuple[Prompt, dict[str, str]]:
    """The prompt with a stand-in for each text of a special token, and which text each stands for."""
    contents = [message.content for message in prompt]
    found = tokens.special_text(contents)
    if not found:
        return prompt, {}
    mark = _unused_character(contents)
    hidden = {f"{mark}{rank}{mark}": text for rank, text in enumerate(found)}
    back = {text: stand_in for stand_in, text in hidden.items()}
    return tuple(
        Message(message.role, tokens.pattern.sub(lambda match: back[match.group()], message.content))
        for message in prompt
    ), hidden


def roles_of(messages: Sequence[Message]) -> tuple[str, ...]:
    return tuple(message.role for message in messages)


def _unused_character(texts: Sequence[str]) -> str:
    """A private-use character that none of the texts contains."""
    used = set().union(*texts)
    return next(chr(code) for code in range(0xE000, 0xF8FF) if chr(code) not in used)
