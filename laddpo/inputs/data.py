"""What the data settings name, as objects: the encoder, the request for a source, the lengths of prepared pairs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from laddpo.core.losses import LOSSES
from laddpo.errors import UserError
from laddpo.hardware.planning import Lengths, block_length_of, prepared_lengths
from laddpo.preference.embedded.arithmetic import Difficulty
from laddpo.preference.encoding.encode import TextEncoder
from laddpo.preference.encoding.templates import GivenTemplate
from laddpo.preference.prepared import Prepared, PreparedUnpaired, split_in_two
from laddpo.preference.reading.ranked import PairRule
from laddpo.preference.sources import Request
from laddpo.settings.schema import DataSettings, DpoSettings, MixturePart, ModelSettings, SftSettings, keywords

if TYPE_CHECKING:
    from laddpo.core.completions import Mismatched


def training_rows(prepared: Prepared, dpo: DpoSettings) -> Sequence[Any]:
    """What a step takes: pairs; or completions with labels where the loss is of those, pairs split in two."""
    is_split = not LOSSES[dpo.loss].takes_pairs and not isinstance(prepared, PreparedUnpaired)
    return split_in_two(prepared.train) if is_split else prepared.train


def mismatched_rows(rows: Sequence[Any], dpo: DpoSettings) -> Mismatched | None:
    """The rows that the loss estimates its baseline from, where it does."""
    from laddpo.core.completions import MISMATCHED, Mismatched  # brings torch, which plan does without

    return Mismatched(rows) if LOSSES[dpo.loss].has_baseline and dpo.kl_baseline == MISMATCHED else None


def row_lengths(prepared: Prepared, dpo: DpoSettings) -> np.ndarray:
    """Tokens of the prompt and of each response of training_rows. # int64 [rows, 1 + sides]"""
    lengths = prepared.train.lengths()
    if LOSSES[dpo.loss].takes_pairs:
        return lengths
    return np.stack([lengths[:, [0, side]] for side in range(1, lengths.shape[1])], axis=1).reshape(-1, 2)


def data_lengths(prepared: Prepared, dpo: DpoSettings, model: ModelSettings) -> Lengths:
    """What the memory plan must know of these rows, as a step takes them."""
    draws, block_length = dpo.diffusion_samples, block_length_of(model)
    return prepared_lengths(row_lengths(prepared, dpo), draws, str(prepared.folder), block_length)


def encoder_for(data: DataSettings, tokenizer) -> TextEncoder:
    """How this run's texts become tokens."""
    return TextEncoder(tokenizer, data.template, data.max_length, data.truncation, given_template(data))


def given_template(data: DataSettings) -> GivenTemplate:
    """What the settings say of the chat template. `UserError` for a file that cannot be read as one."""
    if not data.chat_template:
        return GivenTemplate(variables=data.template_kwargs)
    place = f"data.chat_template is {data.chat_template!r}"
    try:
        with open(data.chat_template, "rb") as file:
            content = file.read(TEMPLATE_BYTES + 1)
        source = content.decode("utf-8").replace("\r\n", "\n")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UserError(f"{place}: cannot be read: {why}; expected a jinja file. {COPY_OF_RUN}") from error
    if len(content) > TEMPLATE_BYTES or not source.strip():
        found = f"has more than {TEMPLATE_BYTES:,} bytes" if source.strip() else "is empty"
        raise UserError(
            f"{place}: {found}; expected a jinja file, as chat_template.jinja of a model. Correct the path."
        )
    return GivenTemplate(source, data.chat_template, data.template_kwargs)


TEMPLATE_BYTES = 2**20
COPY_OF_RUN = "Correct the path. A run keeps a copy beside its weights, as chat_template.jinja."


def difficulty_of(data: DataSettings) -> Difficulty:
    """How hard the generated problems are: one answer for training pairs, the corpus and the test."""
    return Difficulty(operand_max=data.operand_max, terms=data.terms, width=data.width)


def request_of(
    data: DataSettings, part: MixturePart, sft: SftSettings, data_dir: str, seed: int, grader=None, rater=None
) -> Request:
    """What is asked of one source of rows; `grader` tells right from wrong, or `rater` better from worse, where pairs
    are made of answers."""
    return Request(
        dataset_name=part.dataset_name,
        dataset_split=part.dataset_split,
        dataset_config=part.dataset_config,
        test_split=part.test_split,
        revision=part.revision,
        columns=keywords(part.columns),
        format=part.format,
        label_threshold=data.label_threshold,
        preference_dir=Path(data_dir) / "preference_data",
        max_line_bytes=data.max_line_bytes,
        follow_symlinks=data.follow_symlinks,
        allow_empty_prompt=data.allow_empty_prompt,
        allow_nul=data.allow_nul,
        num_pairs=data.num_pairs,
        difficulty=difficulty_of(data),
        habit=data.habit,
        seed=seed,
        validation_fraction=data.validation_fraction,
        candidates_name=data.candidates_name,
        pairs_per_question=data.pairs_per_question,
        grader=grader,
        balance_lengths=data.balance_lengths,
        rater=rater,
        pair_by=data.pair_by,
        pair_rule=PairRule(data.pairs_from, data.min_gap, data.margin_per_gap),
        num_examples=sft.num_examples,
        mistake_share=sft.mistake_share,
    )
