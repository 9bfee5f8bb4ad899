"""The rows that everything else is about: a preference pair and an SFT example, with ids that depend on content alone.

A row's id is a hash of what it says plus an occurrence number, so it is the same whatever file, order, format or
machine the row came through; noise, the reference store and the train/validation split are all keyed by it.
No torch here: the settings and the readers are checked before anything heavy is imported.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from laddpo.storage.atomic import canonical_json

ROLES = ("system", "developer", "user", "assistant", "tool")
FIRST_ROLES = ("system", "developer")  # of which one may be the first turn
OF_ROW = ("tools", "chat_template_kwargs")  # what a template is given beside the messages


@dataclass(frozen=True)
class Message:
    """One turn of a conversation; `role` is one of ROLES.

    `extra` is the JSON of an object with what a template reads beside role and content: `tool_calls`, `tool_call_id`
    and `name` of the turn, and on the first turn of a prompt the OF_ROW of its row. "" where there is nothing. It is
    text because the order of its keys counts: templates write them in that order.
    """

    role: str
    content: str
    extra: str = ""


Prompt = tuple[Message, ...]  # all turns before the response, oldest first


@dataclass(frozen=True)
class PreferencePair:
    """A prompt with a preferred and a dispreferred response.

    `source` says where the row was read ("file:line"), `group` is the key of the prompt (rows of one prompt never lie
    on both sides of the train/validation split), `answer` the gold answer where the data has a grader.
    `weight` and `margin` are the row's own in the loss.
    """

    id: str
    prompt: Prompt
    chosen: str
    rejected: str
    source: str
    group: str
    answer: str | None = None
    weight: float = 1.0
    margin: float = 0.0


@dataclass(frozen=True)
class UnpairedRow:
    """A prompt with one completion and whether it is desirable (`label`). The other fields are those of a pair."""

    id: str
    prompt: Prompt
    completion: str
    label: bool
    source: str
    group: str
    answer: str | None = None
    weight: float = 1.0


@dataclass(frozen=True)
class Example:
    """One row of an SFT corpus: a prompt and the response to learn."""

    id: str
    prompt: Prompt
    response: str
    source: str


def plain_prompt(prompt: Prompt) -> str:
    """The prompt as text for bases without a chat template.

    One user message is given unchanged. Several turns are labelled and end with an open assistant turn:
    a user's "Hi", an assistant's "Hello" and a user's "Bye" become
    "user: Hi\\n\\nassistant: Hello\\n\\nuser: Bye\\n\\nassistant: ".
    """
    if len(prompt) == 1 and prompt[0].role == "user":
        return prompt[0].content
    turns = [f"{message.role}: {message.content}" for message in prompt]
    return "\n\n".join([*turns, "assistant: "])


def user_prompt(text: str) -> Prompt:
    """A prompt of one user message."""
    return (Message("user", text),)


def prompt_rows(prompt: Iterable[Message]) -> list[dict[str, str]]:
    """The prompt as JSON-ready objects with role, content and, where there is one, extra."""
    return [
        {"role": message.role, "content": message.content, **({"extra": message.extra} if message.extra else {})}
        for message in prompt
    ]


def prompt_of(rows: Iterable[dict[str, str]]) -> Prompt:
    """The prompt of the objects that `prompt_rows` made."""
    return tuple(Message(**row) for row in rows)


def extra_of(values: dict[str, Any]) -> str:
    """The `extra` of a message with these values."""
    return json.dumps(values, ensure_ascii=False, separators=(",", ":")) if values else ""


def with_row_values(prompt: Prompt, values: dict[str, Any]) -> Prompt:
    """The prompt with the OF_ROW of its row: a template is given them beside the messages."""
    if not values or not prompt:
        return prompt
    own = json.loads(prompt[0].extra or "{}")
    return (replace(prompt[0], extra=extra_of({**own, **values})), *prompt[1:])


def split_row_values(prompt: Prompt) -> tuple[Prompt, dict[str, Any]]:
    """The prompt without the values that `with_row_values` put into it, and these values."""
    if not prompt or not prompt[0].extra:
        return prompt, {}
    own = json.loads(prompt[0].extra)
    values = {name: own.pop(name) for name in OF_ROW if name in own}
    return (replace(prompt[0], extra=extra_of(own)), *prompt[1:]), values


def prompt_group(prompt: Iterable[Message]) -> str:
    """The key of a prompt: 16 hex digits. Prompts that differ only in case, spacing or normal form share one."""
    return _digest(
        [[turn.role, fold(turn.content).casefold(), *([turn.extra] if turn.extra else [])] for turn in prompt]
    )[:16]


def fold(text: str) -> str:
    """Text with runs of white space as one space and in normal form C: what a reader would call the same."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def content_digest(prompt: Iterable[Message], *responses: str) -> str:
    """24 hex digits that depend on a row's content and on nothing else."""
    return _digest([prompt_rows(prompt), *responses])[:24]


def labelled_digest(prompt: Iterable[Message], completion: str, label: bool) -> str:
    """As content_digest, of a completion with its label: the two labels of one completion give two rows."""
    return _digest([prompt_rows(prompt), completion, label])[:24]


def _digest(value: object) -> str:
    # surrogatepass: a lone surrogate is refused by the readers, with its line, not here with a traceback
    return hashlib.sha256(canonical_json(value).encode("utf-8", "surrogatepass")).hexdigest()


class RowIds:
    """Gives equal rows different ids: `<content digest>-<occurrence>`, the first occurrence being 0.

    Which of two equal rows gets which number cannot matter, since their content is the same.
    """

    def __init__(self) -> None:
        self._seen: Counter[str] = Counter()

    def next_id(self, digest: str) -> str:
        occurrence = self._seen[digest]
        self._seen[digest] += 1
        return f"{digest}-{occurrence}"


def pair_of(
    ids: RowIds,
    prompt: Prompt,
    chosen: str,
    rejected: str,
    source: str,
    answer: str | None = None,
    weight: float = 1.0,
    margin: float = 0.0,
) -> PreferencePair:
    """A PreferencePair with its id and group filled in."""
    row_id = ids.next_id(content_digest(prompt, chosen, rejected))
    return PreferencePair(row_id, prompt, chosen, rejected, source, prompt_group(prompt), answer, weight, margin)


def unpaired_of(
    ids: RowIds, prompt: Prompt, completion: str, label: bool, source: str, answer: str | None = None
) -> UnpairedRow:
    """An UnpairedRow with its id and group filled in."""
    row_id = ids.next_id(labelled_digest(prompt, completion, label))
    return UnpairedRow(row_id, prompt, completion, label, source, prompt_group(prompt), answer)


def example_of(ids: RowIds, prompt: Prompt, response: str, source: str) -> Example:
    """An Example with its id filled in."""
    return Example(ids.next_id(content_digest(prompt, response)), prompt, response, source)
