"""Supervised fine-tuning in the steps of laddpo/training/run.py: what is of rows, and not of pairs."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from laddpo.core.draws import ElboEstimator
from laddpo.core.tasks import SftTask
from laddpo.errors import UserError
from laddpo.evaluation import base_and_tuned
from laddpo.evaluation.base_and_tuned import EXAMPLES
from laddpo.evaluation.heldout import measured_rows
from laddpo.evaluation.winrate import with_prompts
from laddpo.hardware.planning import Lengths, block_length_of, prepared_lengths
from laddpo.inputs import pins, policy
from laddpo.inputs.data import difficulty_of, encoder_for
from laddpo.models.loading import load_tokenizer
from laddpo.preference.embedded import rubric
from laddpo.preference.embedded.arithmetic import corpus, keyed_integers
from laddpo.preference.embedded.word_problems import word_corpus
from laddpo.preference.prepared import chosen_examples
from laddpo.settings.data_checks import sft_examples
from laddpo.settings.schema import RunConfig
from laddpo.training.lengths import warmup_note
from laddpo.training.pairs import open_examples, open_prepared
from laddpo.training.run import (
    Ended,
    Run,
    RunData,
    Training,
    evaluate_at_end,
    loop_settings,
    optimizer_of,
    plot_run,
    seal,
    validation_of,
)
from laddpo.training.tracking import Trackers

if TYPE_CHECKING:
    from laddpo.preference.encoding.encode import EncodedExample


def open_rows(config: RunConfig) -> RunData:
    """The rows to learn from, encoded and padded, and the test tasks; refuses what cannot work before minutes go by."""
    is_new, kind = config.sft.from_scratch, sft_examples(config)
    policy.check_before_loading(config, hash_again=not is_new)
    tasks = base_and_tuned.open_tasks(config) if is_evaluated(config) else []
    tokenizer = load_tokenizer(policy.model_path(config.model), config.model.revision)

    prepared, held_out = None, []
    if kind == "corpus":
        examples = corpus_examples(config, tokenizer)
    elif kind == "chosen":
        prepared = open_prepared(config, takes_both=True)
        examples = chosen_examples(prepared.train)
    else:
        prepared = open_examples(config)
        examples, held_out = prepared.train, list(prepared.validation)[: config.evaluation.num_pairs]
        check_held_out(config, prepared)
    if prepared:
        tasks = with_prompts(tasks, prepared, config.evaluation)
    content = prepared.content if prepared else pins.examples_pin(examples)

    if config.sft.pad_to:
        examples = padded(examples, config.sft.pad_to, config.data.max_length, tokenizer.eos_token_id, config.seed)
    return RunData(examples, content, example_lengths(config, examples), prepared, tasks, held_out, is_new)


def is_evaluated(config: RunConfig) -> bool:
    """Whether the run ends by evaluating base and tuned: a corpus has no pairs, random weights are no base."""
    return sft_examples(config) != "corpus" and config.evaluation.at_end and not config.sft.from_scratch


def build_task(run: Run) -> Training:
    """The likelihood of the run's rows, with what its loop takes."""
    config, examples, machine = run.config, run.data.items, run.machine
    parameters = policy.make_trainable(config, run.loaded)
    # every epoch sees new masks: nothing is stored that would tie them
    block_length = run.loaded.block_length
    estimator = ElboEstimator(
        *("count", "low_discrepancy", draws_of(config), config.seed),
        mask_rounds=sys.maxsize,
        block_length=block_length,
    )
    backward = machine.choice.setup.backward
    task = SftTask(run.loaded.denoiser, parameters, examples, estimator, machine.token_budget, backward, run.ranks)

    rows = []
    if held_out := run.data.held_out:
        rows = measured_rows(held_out, config.evaluation.diffusion_samples, config.seed, block_length)
    validation = validation_of(run, rows=rows)

    metric, is_new = validation.best_metric, run.data.from_scratch
    settings = loop_settings(config, len(examples), metric, has_pairs=False, from_scratch=is_new)
    warmup_note(config.optim, settings)
    masks = "mask" if draws_of(config) == 1 else "masks"
    per_step = f"{settings.items_per_step} rows from {len(examples)}, {draws_of(config)} {masks} each"
    print(f"SFT on {source_of(config)}: {settings.total_steps} steps of {per_step}")
    return Training(task, parameters, optimizer_of(config, parameters), settings, validation, unit="rows")


def kept_with_weights(config: RunConfig) -> dict[str, str]:
    """What the manifests of the weights say of the rows: that they were the data's, where they were."""
    return {EXAMPLES: "rows"} if sft_examples(config) == "rows" else {}


def finish(run: Run, training: Training, ended: Ended, trackers: Trackers) -> None:
    """Plot the run, evaluate base against tuned where there is a base, and seal the run."""
    config, state = run.config, ended.state
    plot_run(run, training, ended, f"{config.model.name}: SFT on {source_of(config)}")
    said: list[str] = []
    if is_evaluated(config):
        evaluate_at_end(run, trackers, said.append)

    fields = {"step": state.step, "best_step": state.best_step, "best_value": state.best_value}
    seal(run, "sft", {**fields, **kept_with_weights(config)})
    if said and run.ranks.is_main:  # for people, once nothing of the run can be lost
        print("\n".join(said))


def source_of(config: RunConfig) -> str:
    """What this run trains on, in a few words."""
    name = config.data.dataset_name or config.data.source
    return {"corpus": "the generated corpus", "chosen": "chosen responses", "rows": f"the rows of {name}"}[
        sft_examples(config)
    ]


def check_held_out(config: RunConfig, prepared) -> None:
    """Refuse a run whose best checkpoint is chosen by held-out rows that are not there."""
    if config.best_metric == "loss" and not len(prepared.validation):
        raise UserError(
            f"{prepared.folder}: holds no validation row and best_metric is 'loss', which is measured on them "
            f"(DATA-88). Raise data.validation_fraction (it is {config.data.validation_fraction:g}; the split is by "
            "prompt), or set best_metric=auto."
        )


def draws_of(config: RunConfig) -> int:
    """Masks for each row of a step; null: as many forwards as DPO's policy takes for the pair, chosen and rejected."""
    return config.sft.diffusion_samples or 2 * config.dpo.diffusion_samples


def corpus_examples(config: RunConfig, tokenizer) -> list:
    """The encoded rows of the generated corpus."""
    encoder, count, share = encoder_for(config.data, tokenizer), config.sft.num_examples, config.sft.mistake_share
    if config.data.problems == "word_problems":
        rows = word_corpus(count, share, config.seed, config.data.habit, config.sft.drill_share)
    elif config.data.problems == "rubric":
        rows = rubric.corpus(count, share, config.sft.fault_rate, config.seed, config.data.habit)
    else:
        rows = corpus(count, share, config.seed, difficulty_of(config.data), config.data.habit)
    return [encoder.encode_example(row) for row in rows]


def padded(
    examples: Sequence[EncodedExample], pad_to: int, max_length: int, eos_token_id: int, seed: int
) -> list[EncodedExample]:
    """Each response with 0 to `pad_to` - L eos tokens behind it, a function of (seed, id); a row stays within
    `max_length`.

    Source: Nie et al. 2025 (arXiv 2502.09992), section 2.3, which pads to the longest response of a batch.
    """

    rows = []
    for example in examples:
        longest = min(pad_to, max_length - len(example.prompt_ids))
        room = max(0, longest - len(example.response_ids))
        (draw,) = keyed_integers(f"sft padding/{seed}/{example.id}", 1)
        count = draw * (room + 1) >> 64
        tail = np.full(count, eos_token_id, example.response_ids.dtype)
        rows.append(dataclasses.replace(example, response_ids=np.concatenate([example.response_ids, tail])))
    return rows


def example_lengths(config: RunConfig, examples: Sequence[EncodedExample]) -> Lengths:
    """What the memory plan must know of these rows, padding included."""

    lengths = np.array([(len(example.prompt_ids), len(example.response_ids)) for example in examples])
    return prepared_lengths(lengths, draws_of(config), source_of(config), block_length_of(config.model))
