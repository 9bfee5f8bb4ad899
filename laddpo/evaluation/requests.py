"""Token ids of what lm-evaluation-harness asks for: the ids that `TextEncoder` gives the same prompt and answer.

The harness passes a prompt on as one text. In a rendered chat template nobody can tell the template's special tokens
from data that spell them. So `chat_text` writes the messages themselves into that text, and `prompt_ids` reads them.
A text without messages is a plain prompt: BOS, then the text. Needs neither torch nor lm-eval.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence

import numpy as np

from laddpo.errors import UserError
from laddpo.preference.encoding.encode import TextEncoder
from laddpo.preference.reading.bad_rows import RowError
from laddpo.preference.reading.pairs import Message, Prompt, prompt_rows

START, END = "\ue000", "\ue001"  # private-use characters, which ASCII JSON between them cannot contain
CHAT = re.compile(f"{START}([^{END}]*){END}")


class RequestEncoder:
    """Encodes the harness's prompts and answers with the encoder of the run. Answers have no terminator."""

    def __init__(self, encoder: TextEncoder):
        self.encoder = encoder
        self._prompt = functools.lru_cache(maxsize=1024)(self._encode_prompt)  # the choices of an item share it

    def chat_text(self, history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """A text instead of these messages; without a generation prompt the last one is the answer's beginning."""
        messages = prompt_rows(Message(turn["role"], turn["content"]) for turn in history)
        is_begun = bool(messages) and not add_generation_prompt and messages[-1]["role"] == "assistant"
        return f"{START}{json.dumps([messages, is_begun])}{END}"

    def prompt_ids(self, context: str) -> np.ndarray:
        """int32 [L]: the tokens before the answer."""
        return self._prompt(context)

    def answer_ids(self, context: str, answer: str) -> np.ndarray:
        """int32 [L]: the answer to that prompt, trimmed where the chat template trims answers."""
        messages, begun = self._read(context)
        if messages is not None and self.encoder.chat.trims_responses:
            answer = (begun + answer).strip()[len(begun.lstrip()) :]
        return np.array(self._plain(answer, "answer"), dtype=np.int32)

    def text_ids(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """BOS where the tokenizer has one, and the ids of a whole text. # int32 [0 or 1], int32 [L]"""
        return np.array(self._bos(), dtype=np.int32), np.array(self._plain(text, "text"), dtype=np.int32)

    def _encode_prompt(self, context: str) -> np.ndarray:
        messages, begun = self._read(context)
        if messages is None:
            return np.array(self._bos() + self._plain(context, "prompt"), dtype=np.int32)
        try:
            ids = self.encoder.encode_prompt(messages)
        except RowError as error:
            raise _refusal(messages[-1].content if messages else "", error) from error
        if self.encoder.chat.trims_responses:
            begun = begun.lstrip()
        return np.concatenate([ids, np.array(self._plain(begun, "prompt"), dtype=np.int32)])

    def _read(self, context: str) -> tuple[Prompt | None, str]:
        """The messages of a prompt and the answer's beginning; (None, "") for a plain text.

        Chats that the harness joined are one conversation. Text behind a chat begins the answer.
        """
        if self.encoder.chat is None or START not in context:
            return None, ""
        before, *rest = CHAT.split(context)
        chats, between = [json.loads(text) for text in rest[::2]], rest[1::2]
        if not chats or before or any(between[:-1]):
            raise UserError(
                "evaluation.tasks: the harness puts text before or between chats, which no chat template writes. Leave "
                "that task out, or set data.template=plain."
            )
        messages = [Message(turn["role"], turn["content"]) for turns, _ in chats for turn in turns]
        begun = messages.pop().content if chats[-1][1] else ""
        return tuple(messages), begun + between[-1]

    def _bos(self) -> list[int]:
        return [] if self.encoder.bos_id is None else [self.encoder.bos_id]

    def _plain(self, text: str, field: str) -> list[int]:
        (ids,) = self.encoder.tokens.encode_plain([text])
        try:
            self.encoder.tokens.refuse_special(ids, field)
        except RowError as error:
            raise _refusal(text, error) from error
        return ids


def _refusal(text: str, error: RowError) -> UserError:
    return UserError(
        f"evaluation.tasks: the harness gives {text[:60]!r}, which {error.problem} ({error.code}). Leave its task out."
    )
