"""From text to token ids: the chat template on the prompt alone, then the response and one scored terminator.

Text of rows that looks like a special token is encoded as plain text, never as the token. A row that is too long is
treated by a rule with a name; responses are never cut. Needs a fast tokenizer, no torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from laddpo.errors import UserError, choose
from laddpo.preference.encoding.shorten import shorten_prompt
from laddpo.preference.encoding.special_text import PlainTokenizer
from laddpo.preference.encoding.templates import NONE_GIVEN, ChatTemplate, GivenTemplate
from laddpo.preference.reading.bad_rows import RowError
from laddpo.preference.reading.pairs import (
    Example,
    Message,
    PreferencePair,
    Prompt,
    UnpairedRow,
    plain_prompt,
    split_row_values,
    with_row_values,
)
from laddpo.preference.reading.tools import called_message

MIN_BYTE_LIMIT = 2**20  # a text below it is always tokenised; above it only if it might fit max_length
MAX_BYTES_PER_TOKEN = 256


@dataclass(frozen=True)
class EncodedPair:
    """Token ids of a pair, int32 [L] each; the responses include their terminator. `favoured`: of each response the
    positions that surprise the reference, once they are known and masks favour them. # int64"""

    id: str
    prompt_ids: np.ndarray
    chosen_ids: np.ndarray
    rejected_ids: np.ndarray
    group: str
    weight: float = 1.0
    margin: float = 0.0
    favoured: tuple[np.ndarray, np.ndarray] | None = None


@dataclass(frozen=True)
class EncodedCompletion:
    """Token ids of an unpaired row, int32 [L] each; the completion includes its terminator. `label`: desirable.
    `favoured`: as of a pair."""

    id: str
    prompt_ids: np.ndarray
    completion_ids: np.ndarray
    label: bool
    group: str
    weight: float = 1.0
    favoured: tuple[np.ndarray] | None = None


@dataclass(frozen=True)
class EncodedExample:
    """Token ids of an SFT example, int32 [L] each; the response includes its terminator."""

    id: str
    prompt_ids: np.ndarray
    response_ids: np.ndarray


@dataclass(frozen=True)
class EncodedRow:
    """One prompt with its responses, and what was done to it.

    `prompt` is what was encoded (shorter than the row's when `cut_tokens` > 0), `special_text` names the special tokens
    whose text occurred in the row. `responses` are the texts that were encoded: of one that calls tools what the
    template made of it.
    """

    prompt: Prompt
    prompt_ids: np.ndarray
    response_ids: tuple[np.ndarray, ...]
    cut_tokens: int
    special_text: tuple[str, ...]
    responses: tuple[str, ...]


class TextEncoder:
    """Encodes prompts and responses for one tokenizer.

    `template`: auto (the tokenizer's chat template if it has one), chat (fail without one), plain (prompt text, then
    response). `truncation`: a key of TRUNCATIONS, what happens to a row longer than `max_length` tokens. `given`: what
    the settings say of the template.
    """

    def __init__(
        self,
        tokenizer: Any,
        template: str = "auto",
        max_length: int = 1024,
        truncation: str = "error",
        given: GivenTemplate = NONE_GIVEN,
    ):
        choose(TRUNCATIONS, truncation, "data.truncation", "laddpo/preference/encoding/encode.py")
        if max_length < 2:
            raise UserError(f"data.max_length is {max_length}; a row needs at least a prompt and a response token.")
        self.max_length, self.truncation = max_length, truncation
        choose(TEMPLATES, template, "data.template", "laddpo/preference/encoding/encode.py")
        self.chat: ChatTemplate | None = TEMPLATES[template](tokenizer, given)
        self.variables = dict(given.variables)
        self.bos_id: int | None = tokenizer.bos_token_id
        role_markers = self.chat.markers if self.chat else ()
        self.tokens = PlainTokenizer(tokenizer, role_markers)
        terminator = self.chat.terminator if self.chat and self.chat.terminator else tokenizer.eos_token
        if terminator is None:
            raise UserError("The tokenizer has neither an end-of-turn nor an eos token, so no response could end.")
        self.terminator = terminator
        self.terminator_id: int = self.tokens.special_ids[terminator]
        self.eos_id: int | None = tokenizer.eos_token_id
        self.stop_ids = sorted({self.terminator_id, self.eos_id} - {None})

    def fields(self) -> dict[str, Any]:
        """What token ids depend on, for fingerprints. Not `max_length`: it decides which rows are left, not their ids
        (a prompt that `truncation` cut is told apart by its ids)."""
        template = self.chat.source if self.chat else None
        return {
            "tokenizer": self.tokens.fingerprint,
            "template": hashlib.sha256(template.encode()).hexdigest()[:16] if template else "plain",
            "terminator": self.terminator,
            "truncation": self.truncation,
            **({"template_kwargs": self.variables} if self.variables else {}),
        }

    def encode_prompt(self, messages: Sequence[Message]) -> np.ndarray:
        """int32 [L]: the tokens before the response, in training and in generation alike."""
        (ids,) = self.encode_prompts([tuple(messages)])
        if isinstance(ids, RowError):
            raise ids
        return ids

    def encode_prompts(self, prompts: list[Prompt]) -> list[np.ndarray | RowError]:
        """What `encode_prompt` gives, of many at once; a RowError in the place of each that cannot be used."""
        if self.chat is None:
            return self._encode_all(self._encode_plain_prompts, prompts)
        outcomes: list = self.chat.render(prompts, self.tokens)
        kinds: dict[PlainTokenizer, list[int]] = {}
        for index, (prompt, outcome) in enumerate(zip(prompts, outcomes, strict=True)):
            if isinstance(outcome, tuple):
                kinds.setdefault(self.chat.tokens_of(prompt, self.tokens), []).append(index)
        for tokens, places in kinds.items():
            encoded = self._encode_all(tokens.encode_rendered, [outcomes[index] for index in places])
            for index, ids in zip(places, encoded, strict=True):
                outcomes[index] = ids
        return outcomes

    def encode_response(self, text: str) -> np.ndarray:
        """int32 [L]: the response and its terminator."""
        return self._encode_responses([text])[0]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids, special tokens shown."""
        return self.tokens.decode(ids)

    def decode_response(self, ids: Iterable[int]) -> str:
        """Text of a generated response: up to the first terminator or eos."""
        kept: list[int] = []
        for token in ids:
            if int(token) in self.stop_ids:
                break
            kept.append(int(token))
        return self.tokens.decode(kept)

    def encode_pair(self, pair: PreferencePair) -> EncodedPair:
        """One pair; RowError when it cannot be used. Many pairs are faster through `encode_rows`."""
        row = self._encode_row(pair.prompt, pair.chosen, pair.rejected)
        return EncodedPair(pair.id, row.prompt_ids, *row.response_ids, pair.group, pair.weight, pair.margin)

    def encode_completion(self, row: UnpairedRow) -> EncodedCompletion:
        """One unpaired row; RowError when it cannot be used."""
        found = self._encode_row(row.prompt, row.completion)
        return EncodedCompletion(row.id, found.prompt_ids, *found.response_ids, row.label, row.group, row.weight)

    def encode_example(self, example: Example) -> EncodedExample:
        """One example; RowError when it cannot be used."""
        row = self._encode_row(example.prompt, example.response)
        return EncodedExample(example.id, row.prompt_ids, *row.response_ids)

    def _encode_row(self, prompt: Prompt, *responses: str) -> EncodedRow:
        (row,) = self.encode_rows([(prompt, responses)])
        if isinstance(row, RowError):
            raise row
        return row

    def encode_rows(self, rows: Sequence[tuple[Prompt, tuple[str, ...]]]) -> list[EncodedRow | RowError]:
        """Each prompt with its responses, in one batch; a RowError in the place of each row that cannot be used."""
        outcomes: list[EncodedRow | RowError | None] = [self._refused_by_size(*row) for row in rows]
        written = self._write_calls(rows, outcomes)
        usable = [index for index, outcome in enumerate(outcomes) if outcome is None]
        prompts = self.encode_prompts([rows[index][0] for index in usable])
        flat = self._encode_responses([text for index in usable for text in written.get(index, rows[index][1])])
        taken = 0
        for index, prompt_ids in zip(usable, prompts, strict=True):
            prompt, responses = rows[index][0], written.get(index, rows[index][1])
            response_ids = tuple(flat[taken : taken + len(responses)])
            taken += len(responses)
            try:
                if isinstance(prompt_ids, RowError):
                    raise prompt_ids
                outcomes[index] = self._fit(prompt, prompt_ids, responses, response_ids)
            except RowError as error:
                outcomes[index] = error
        assert None not in outcomes, "a row without an outcome"
        return outcomes

    def _write_calls(
        self, rows: Sequence[tuple[Prompt, tuple[str, ...]]], outcomes: list[EncodedRow | RowError | None]
    ) -> dict[int, tuple[str, ...]]:
        """By place of a row with responses that call tools, the texts of its responses. One that cannot be written gets
        its RowError into `outcomes`."""
        calls = {
            (index, side): turn
            for index, (_, responses) in enumerate(rows)
            for side, response in enumerate(responses)
            if outcomes[index] is None and (turn := called_message(response))
        }
        if not calls:
            return {}
        if self.chat is None:
            found = [RowError("DATA-130", "", "calls tools, which only a chat template writes", NO_TEMPLATE)] * len(
                calls
            )
        else:
            found = self.chat.write_calls([(rows[index][0], turn) for (index, _), turn in calls.items()], self.tokens)
        written = {index: list(rows[index][1]) for index, _ in calls}
        for (index, side), text in zip(calls, found, strict=True):
            if isinstance(text, RowError):
                outcomes[index] = _at_side(text, _sides(rows[index][1])[side], len(rows[index][0]))
            else:
                written[index][side] = Written(text)
        return {index: tuple(texts) for index, texts in written.items()}

    def _fit(
        self, prompt: Prompt, prompt_ids: np.ndarray, responses: tuple[str, ...], response_ids: tuple[np.ndarray, ...]
    ) -> EncodedRow:
        opening = self.chat.opening_of(prompt) if self.chat else None
        for side, ids, text in zip(_sides(responses), response_ids, responses, strict=True):
            self.tokens.refuse_special(ids[:-1].tolist(), side)
            if opening and text.lstrip().startswith(opening):
                problem = f"begins with {opening}, which the chat template also writes: it would be there twice"
                raise RowError("DATA-106", side, problem, f"Remove {opening} from the start of the responses.")
        if len(response_ids) == 2 and np.array_equal(*response_ids):
            problem = "has the same tokens as chosen: they differ only in what the template trims"
            raise RowError("DATA-10", "rejected", problem, "Remove the row.")
        texts = [text for message in prompt for text in (message.content, message.extra)] + list(responses)
        special_text = self.tokens.special_text(texts)
        room = self.max_length - max(map(len, response_ids))
        kept, kept_ids = prompt, prompt_ids
        if len(prompt_ids) > room:
            kept, kept_ids = TRUNCATIONS[self.truncation](self, prompt, prompt_ids, room)
        return EncodedRow(kept, kept_ids, response_ids, len(prompt_ids) - len(kept_ids), special_text, responses)

    def _refused_by_size(self, prompt: Prompt, responses: tuple[str, ...]) -> RowError | None:
        """Texts so long that they cannot fit are refused before they could stall the tokenizer."""
        limit = max(MIN_BYTE_LIMIT, MAX_BYTES_PER_TOKEN * self.max_length)
        texts = [text for message in prompt for text in (message.content, message.extra)]
        longest = max(map(len, [*texts, *responses]))
        if longest <= limit:
            return None
        problem = f"has a text of {longest:,} characters, far more than data.max_length={self.max_length} tokens"
        return RowError("DATA-79", "", problem, "Remove the row, or set data.truncation=drop.")

    def _encode_all(self, encode: Callable[[list], list], given: list) -> list[np.ndarray | RowError]:
        """Each one's ids. When one of a batch is refused, they are encoded one by one to find out which."""
        try:
            return [np.array(ids, dtype=np.int32) for ids in encode(given)]
        except RowError as error:
            if len(given) == 1:
                return [error]
            return [outcome for one in given for outcome in self._encode_all(encode, [one])]

    def _encode_plain_prompts(self, prompts: list[Prompt]) -> list[list[int]]:
        for prompt in prompts:
            if any(message.extra for message in prompt):
                problem = "has tools, calls of tools or variables for a template, which plain text does not hold"
                raise RowError("DATA-130", "prompt", problem, NO_TEMPLATE)
        bos = [] if self.bos_id is None else [self.bos_id]
        bodies = self.tokens.encode_plain([plain_prompt(prompt) for prompt in prompts])
        for body in bodies:
            self.tokens.refuse_special(body, "prompt")
        return [bos + body for body in bodies]

    def _encode_responses(self, texts: list[str]) -> list[np.ndarray]:
        trims = self.chat is not None and self.chat.trims_responses
        trimmed = [text.strip() if trims and not isinstance(text, Written) else str(text) for text in texts]
        bodies = self.tokens.encode_plain(trimmed)
        return [np.array([*body, self.terminator_id], dtype=np.int32) for body in bodies]


def refuse_long(encoder: TextEncoder, prompt: Prompt, prompt_ids: np.ndarray, room: int) -> tuple[Prompt, np.ndarray]:
    """error and drop: the row is not used. `drop` counts it as dropped, `error` as a bad row."""
    problem = (
        f"has {len(prompt_ids):,} prompt and {encoder.max_length - room:,} response tokens, "
        f"data.max_length is {encoder.max_length:,}"
    )
    advice = "Raise data.max_length, or set data.truncation=drop, keep_start or keep_end."
    raise RowError("DATA-75", "", problem, advice, fits=len(prompt_ids) + encoder.max_length - room)


def cut_prompt(keep: str, encoder: TextEncoder, prompt: Prompt, _: np.ndarray, room: int) -> tuple[Prompt, np.ndarray]:
    """keep_start and keep_end: cut the end of the prompt's text, or its start (oldest turns first). The template around
    it stays whole, and so do tools."""
    turns, values = split_row_values(prompt)

    def encode(kept: Prompt) -> np.ndarray:
        return encoder.encode_prompt(with_row_values(kept, values))

    kept, ids = shorten_prompt(turns, room, keep, encode, encoder.tokens)
    return with_row_values(kept, values), ids


class Written(str):
    """A response as the template wrote it: nothing of it is trimmed."""


def _sides(responses: Sequence[str]) -> tuple[str, ...]:
    return ("chosen", "rejected") if len(responses) == 2 else ("response",)


def _at_side(error: RowError, side: str, turns: int) -> RowError:
    """The error of a response that was looked at as the turn behind a prompt of so many."""
    field = error.field.replace(f"prompt[{turns}]", side) or side
    return RowError(error.code, field, error.problem, error.advice, error.fits)


def need_chat_template(tokenizer: Any, given: GivenTemplate) -> ChatTemplate:
    if tokenizer.chat_template is None and given.source is None:
        raise UserError(
            "data.template is 'chat', but the tokenizer has no chat template. Set data.template=plain, or use a model "
            "whose tokenizer_config.json has one."
        )
    return ChatTemplate(tokenizer, given)


def find_chat_template(tokenizer: Any, given: GivenTemplate) -> ChatTemplate | None:
    has_one = tokenizer.chat_template is not None or given.source is not None
    if not has_one and given.variables:
        raise UserError(
            f"data.template_kwargs is {dict(given.variables)}, and the tokenizer has no chat template that reads it. "
            "Set data.chat_template to a file, or leave data.template_kwargs out."
        )
    return ChatTemplate(tokenizer, given) if has_one else None


NO_TEMPLATE = "Use a model with a chat template, or set data.chat_template to a file."
TEMPLATES = {
    "auto": find_chat_template,
    "chat": need_chat_template,
    "plain": lambda tokenizer, given: None,
}
TRUNCATIONS = {
    "error": refuse_long,
    "drop": refuse_long,
    "keep_start": partial(cut_prompt, "start"),
    "keep_end": partial(cut_prompt, "end"),
}
