"""The rows that everything else is about: a preference pair and an SFT example, with ids that depend on content alone.

A row's id is a hash of what it says plus an occurrence number, so it is the same whatever file, order, format or
machine the row came through; noise, the reference store and the train/validation split are all keyed by it.
No torch here: the settings and the readers are checked before anything heavy is imported.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from laddpo.storage.atomic import canonical_json

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Message:
    """One turn of a conversation; `role` is one of ROLES."""

    role: str
    content: str


Prompt = tuple[Message, ...]  # all turns before the response, oldest first


@dataclass(frozen=True)
class PreferencePair:
    """A prompt with a preferred and a dispreferred response.

    `source` says where the row was read ("file:line"), `group` is the key of the prompt (rows of one prompt never lie
    on both sides of the train/validation split), `answer` the gold answer where the data has a grader.
    """

    id: str
    prompt: Prompt
    chosen: str
    rejected: str
    source: str
    group: str
    answer: str | None = None


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
    """The prompt as JSON-ready message objects, which is also what chat templates take."""
    return [{"role": message.role, "content": message.content} for message in prompt]


def prompt_group(prompt: Iterable[Message]) -> str:
    """The key of a prompt: 16 hex digits. Prompts that differ only in case, spacing or normal form share one."""
    return _digest([[message.role, fold(message.content).casefold()] for message in prompt])[:16]


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
    ids: RowIds, prompt: Prompt, chosen: str, rejected: str, source: str, answer: str | None = None
) -> PreferencePair:
    """A PreferencePair with its id and group filled in."""
    row_id = ids.next_id(content_digest(prompt, chosen, rejected))
    return PreferencePair(row_id, prompt, chosen, rejected, source, prompt_group(prompt), answer)


def unpaired_of(
    ids: RowIds, prompt: Prompt, completion: str, label: bool, source: str, answer: str | None = None
) -> UnpairedRow:
    """An UnpairedRow with its id and group filled in."""
    row_id = ids.next_id(labelled_digest(prompt, completion, label))
    return UnpairedRow(row_id, prompt, completion, label, source, prompt_group(prompt), answer)


def example_of(ids: RowIds, prompt: Prompt, response: str, source: str) -> Example:
    """An Example with its id filled in."""
    return Example(ids.next_id(content_digest(prompt, response)), prompt, response, source)
