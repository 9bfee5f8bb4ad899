"""What a tokenizer's chat template does, found out by rendering it once: role markers, terminator, trimming.

Templates are rendered in jinja's sandbox, in a process with limits of time, length and memory. The result is checked
for text of the messages that got lost and for special tokens that template and text only spell together.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from laddpo.errors import UserError, nearest
from laddpo.preference.encoding.rendering import Failure, read_variables, render_jobs
from laddpo.preference.encoding.special_text import PlainTokenizer
from laddpo.preference.encoding.structured import (
    PROBE,
    TOOL_PROMPTS,
    is_structured,
    job_of,
    plain_probe,
    same_calls,
    structure_probe,
    variables_of,
    with_texts,
)
from laddpo.preference.reading.bad_rows import RowError
from laddpo.preference.reading.pairs import Message, Prompt, extra_of, with_row_values
from laddpo.preference.reading.tools import GIVEN

ANSWER = f"{PROBE} of an answer"
KNOWN_PROBES = 1024  # prompts whose special tokens are remembered
ROWS_OVER = 3  # rows that may reach a limit before the template is given up
OPENING_TAG = re.compile(r"(<([^<>\s]{1,40})>)\s*(?:</\2>\s*)?\Z")
CURE = "Repair it (chat_template.jinja or tokenizer_config.json beside the model), or set data.template=plain."
OTHER = "Use a template that writes it (data.chat_template=FILE), or remove the row."

Rendered = tuple[str, dict[str, str]]  # the text, and the stand-ins in it


@dataclass(frozen=True)
class GivenTemplate:
    """What the settings say of the template: its text and the file that holds it (None: the tokenizer's own), and
    variables for it."""

    source: str | None = None
    place: str = ""
    variables: Mapping[str, Any] = field(default_factory=dict)


NONE_GIVEN = GivenTemplate()


class ChatTemplate:
    """`markers` are the added tokens written around messages, `terminator` the one right after an assistant's text
    (None: the template writes none), `trims_responses` whether white space around an assistant's text is removed,
    `opening` a tag such as <think> that it writes last before the response, and perhaps closes (None: it writes none).
    """

    def __init__(self, tokenizer: Any, given: GivenTemplate = NONE_GIVEN):
        self._name, self._cure = (
            given.place or tokenizer.name_or_path,
            f"Repair {given.place}." if given.place else CURE,
        )
        self.source = template_source(tokenizer) if given.source is None else given.source
        self._variables = {**tokenizer.special_tokens_map, **given.variables}
        self._tokenizer, self._reads, self._tool_tokens = tokenizer, None, None
        if unread := self.unread(given.variables):
            raise UserError(*(f"data.template_kwargs.{name}: {' '.join(why)}" for name, why in unread.items()))
        conversation = [Message("user", PROBE), Message("assistant", f" {PROBE} "), Message("user", PROBE)]
        answered = self.text(conversation)
        asked, closed = (self.text(conversation[:1], opens_turn) for opens_turn in (True, False))
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
        self.opening = opening[1] if opening else None
        self._specials: dict[Prompt, Counter[str] | RowError] = {}
        self._knows: dict[tuple[Prompt, bool], RowError | None] = {}
        self._openings: dict[str, str | None] = {}
        self._rows_over = 0

    def text(self, prompt: Sequence[Message], opens_turn: bool = True) -> str:
        """The template's text of messages, which must be good; `opens_turn`: with an open assistant turn at its end."""
        (found,) = render_jobs(self.source, self._variables, [job_of(tuple(prompt), opens_turn)])
        if isinstance(found, Failure):
            raise self._unusable(f"{self._place(found)}{found.problem}.")
        return found

    def unread(self, variables: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
        """By name of a variable that the template does not read: what is wrong, and what to do."""
        if not variables:
            return {}
        if self._reads is None:
            found = read_variables(self.source)
            if isinstance(found, Failure):
                raise self._unusable(f"{self._place(found)}{found.problem}.")
            self._reads = [name for name in found if name not in (*GIVEN, *self._tokenizer.special_tokens_map)]
        known = f"it reads {', '.join(self._reads)}" if self._reads else "it reads nothing of the kind"
        guesses = {name: nearest(name, self._reads) for name in variables if name not in self._reads}
        problem = f"the chat template does not read it; {known}."
        return {name: (problem, f"Did you mean {near}?" if near else "Remove it.") for name, near in guesses.items()}

    def opening_of(self, prompt: Prompt) -> str | None:
        """`opening`, as the variables of the prompt's row make it."""
        if not (variables := variables_of(prompt)):
            return self.opening
        key = extra_of(variables)
        if key not in self._openings:
            probe = with_row_values(plain_probe(("user",)), {"chat_template_kwargs": variables})
            found = OPENING_TAG.search(self.text(probe).split(PROBE)[-1])
            self._openings[key] = found[1] if found else None
        return self._openings[key]

    def tool_tokens(self, tokens: PlainTokenizer) -> PlainTokenizer:
        """`tokens` that also keep apart what the template writes around tools, calls and answers of tools.

        Such added tokens are no special ones, so a text may hold them. In a result of a tool they must stay text.
        """
        if self._tool_tokens is None:
            texts = render_jobs(self.source, self._variables, [job_of(prompt) for prompt in TOOL_PROMPTS])
            written = "".join(text for text in texts if isinstance(text, str))
            added = [token.content for token in self._tokenizer.added_tokens_decoder.values()]
            markers = {token for token in added if token in written and token not in tokens.special_ids}
            self._tool_tokens = PlainTokenizer(self._tokenizer, {*self.markers, *markers}) if markers else tokens
        return self._tool_tokens

    def tokens_of(self, prompt: Prompt, tokens: PlainTokenizer) -> PlainTokenizer:
        """What tells text from tokens in the rendering of a prompt."""
        return self.tool_tokens(tokens) if any(message.extra for message in prompt) else tokens

    def render(self, prompts: Sequence[Prompt], tokens: PlainTokenizer) -> list[Rendered | RowError]:
        """The text of each prompt, ending with an open assistant turn, and the stand-ins in it.

        Where messages contain the text of special tokens, each such text is replaced by a stand-in that does not occur
        in them, so that special tokens in the result are the template's own.
        """
        safe = [self.hide_specials(prompt, tokens) for prompt in prompts]
        texts = self._render([messages for messages, _ in safe])
        probes = [self._probe(messages, tokens) for messages, _ in safe]
        self._count_specials(set(probes), tokens)
        return [
            self._checked(messages, hidden, text, self._specials[probe], tokens)
            for (messages, hidden), text, probe in zip(safe, texts, probes, strict=True)
        ]

    def _checked(
        self,
        messages: Prompt,
        hidden: dict[str, str],
        text: str | RowError,
        expected: Counter[str] | RowError,
        tokens: PlainTokenizer,
    ) -> Rendered | RowError:
        if isinstance(text, RowError):
            return text
        for index, message in enumerate(messages):
            if message.content.strip() not in text:
                advice = "Use another template or remove the row."
                if "</think>" in message.content:
                    advice = "Templates drop the reasoning of earlier answers. Remove it from this turn, with </think>."
                return RowError("DATA-95", f"prompt[{index}]", "the chat template lost text of the message", advice)
        if is_structured(messages):
            if problem := self._structure_problem(messages):
                return problem
            if any(stand_in not in text for stand_in in hidden):
                return RowError("DATA-95", "prompt", "the chat template changes texts of tools or calls", OTHER)
        if isinstance(expected, RowError):
            return expected
        pattern = self.tokens_of(messages, tokens).pattern
        found = Counter(pattern.findall(text))
        if pattern is not tokens.pattern:  # the turns of user and assistant may spell what is kept apart for tools
            found -= Counter(pattern.findall("\n".join(turn.content for turn in messages if turn.role != "tool")))
        if found != expected:
            problem = "text and template together spell a special token"
            return RowError("DATA-74", "prompt", problem, "Remove the row.")
        return text, hidden

    def _structure_problem(self, prompt: Prompt, opens_turn: bool = True) -> RowError | None:
        """What of the prompt's structure the template does not write, or variables that it does not read."""
        for name, (problem, advice) in self.unread(variables_of(prompt)).items():
            return RowError("DATA-131", f"chat_template_kwargs.{name}", problem.rstrip("."), advice)
        probe, words = structure_probe(prompt)
        if (probe, opens_turn) not in self._knows:
            if len(self._knows) > KNOWN_PROBES:
                self._knows.clear()
            (text,) = self._render([probe], opens_turn)
            problem = text if isinstance(text, RowError) else None
            for word, place in words.items() if problem is None else ():
                if word not in text:
                    problem = RowError("DATA-95", place, "the chat template does not write it: it would be lost", OTHER)
                    break
            self._knows[probe, opens_turn] = problem
        return self._knows[probe, opens_turn]

    def write_calls(self, rows: Sequence[tuple[Prompt, Message]], tokens: PlainTokenizer) -> list[str | RowError]:
        """The text of each turn that calls tools: what the template writes where another turn has its text."""
        safe = [self.hide_specials((*prompt, turn), tokens) for prompt, turn in rows]
        called = self._render([messages for messages, _ in safe], opens_turn=False)
        plain = self._render([(*messages[:-1], Message("assistant", ANSWER)) for messages, _ in safe], opens_turn=False)
        return [
            next((text for text in texts if isinstance(text, RowError)), None)
            or self._structure_problem(messages, opens_turn=False)
            or self._written_call(*texts, hidden, tokens)
            for (messages, hidden), *texts in zip(safe, called, plain, strict=True)
        ]

    def _written_call(self, text: str, plain: str, hidden: dict[str, str], tokens: PlainTokenizer) -> str | RowError:
        before, found, after = plain.rpartition(ANSWER)
        written = text[len(before) : len(text) - len(after)]
        if not found or text != f"{before}{written}{after}" or not written.strip():
            problem = "calls tools, and the chat template begins or ends such a turn otherwise than one with a text"
            return RowError("DATA-95", "", problem, OTHER)
        kept_apart = [
            text for stand_in, text in hidden.items() if stand_in in written and text not in tokens.special_ids
        ]
        if kept_apart or (special := tokens.pattern.search(written)):
            what = kept_apart[0] if kept_apart else special.group()
            problem = f"calls tools with {what}, a token that the text of a response cannot hold"
            return RowError("DATA-74", "", problem, OTHER)
        for stand_in, original in hidden.items():
            written = written.replace(stand_in, original)
        return written

    def _probe(self, prompt: Prompt, tokens: PlainTokenizer) -> Prompt:
        """A prompt around whose texts the template writes the same special tokens."""
        if not any(message.extra for message in prompt):
            return plain_probe(roles_of(prompt))
        strings = [text for turn in prompt for text in (turn.content, turn.extra)]
        return same_calls(prompt, self.tool_tokens(tokens).may_join, _unused_character(strings))

    def _count_specials(self, wanted: set[Prompt], tokens: PlainTokenizer) -> None:
        """Learn which special tokens the template writes around the texts of these probes."""
        if len(self._specials) > KNOWN_PROBES:
            self._specials.clear()
        unknown = sorted(wanted - self._specials.keys(), key=roles_of)
        for probe, text in zip(unknown, self._render(unknown), strict=True):
            pattern = self.tokens_of(probe, tokens).pattern
            self._specials[probe] = Counter(pattern.findall(text)) if isinstance(text, str) else text

    def hide_specials(self, prompt: Prompt, tokens: PlainTokenizer) -> Rendered:
        """The prompt with a stand-in for each text of a special token, and which text each stands for."""
        texts = [message.content for message in prompt]
        tools = [message.extra for message in prompt if message.extra]
        of_tools = self.tokens_of(prompt, tokens)
        answers = [message.content for message in prompt if tools and message.role == "tool"]
        found = dict.fromkeys([*tokens.special_text(texts), *of_tools.special_text([*tools, *answers])])
        if not found:
            return prompt, {}
        mark = _unused_character([*texts, *tools])
        hidden = {f"{mark}{rank}{mark}": text for rank, text in enumerate(found)}
        back = {text: stand_in for stand_in, text in hidden.items()}
        of_turn, of_tool = (partial(each.pattern.sub, lambda match: back[match.group()]) for each in (tokens, of_tools))
        return with_texts(prompt, of_turn, of_tool), hidden

    def _render(self, prompts: Sequence[Prompt], opens_turn: bool = True) -> list[str | RowError]:
        found = render_jobs(self.source, self._variables, [job_of(prompt, opens_turn) for prompt in prompts])
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
        return RowError("DATA-95", "prompt", f"the chat template is stopped: {what}", self._cure)

    def _place(self, failure: Failure) -> str:
        lines = self.source.splitlines()
        if failure.line is None or not 0 < failure.line <= len(lines):
            return ""
        return f"line {failure.line}, `{lines[failure.line - 1].strip()[:100]}`: "

    def _unusable(self, why: str) -> UserError:
        return UserError(f"{self._name}: its chat template cannot be used: {why} {self._cure}")


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


def roles_of(messages: Sequence[Message]) -> tuple[str, ...]:
    return tuple(message.role for message in messages)


def _unused_character(texts: Sequence[str]) -> str:
    """A private-use character that none of the texts contains."""
    used = set().union(*texts)
    return next(chr(code) for code in range(0xE000, 0xF8FF) if chr(code) not in used)
