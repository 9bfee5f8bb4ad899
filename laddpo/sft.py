"""Supervised fine-tuning by the diffusion likelihood: the negative ELBO per token as loss, the same loop as DPO.

    python -m laddpo.sft data=jsonl data.dataset_name=rows.jsonl    trains on the rows of a file: prompt and response
    python -m laddpo.sft experiment=make_llada_nano    makes llada_nano from random weights, minutes on a CPU
    python -m laddpo.sft sft=control                   the control beside every DPO run: the chosen responses alone

`sft.examples=auto` takes the generated corpus where the data are generated, and the rows of the data elsewhere: a
response, a conversation, or the chosen side of a pair. `corpus` is generated arithmetic with a share of mistaken
solutions, `chosen` the chosen side of the prepared pairs. Rows and chosen sides end by evaluating base and tuned model.
DPO starts from the result by adapter.path=<run>/adapter, or model.model_name_or_path=<run>/model.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from laddpo.cli.app import run_stage
from laddpo.errors import UserError
from laddpo.settings.data_checks import sft_examples
from laddpo.settings.read_settings import given_overrides
from laddpo.settings.schema import RunConfig

if TYPE_CHECKING:
    from laddpo.hardware.planning import Lengths
    from laddpo.preference.encoding.encode import EncodedExample


def main(config: RunConfig, run_folder: Path) -> None:
    """Train one SFT run in `run_folder`, or in the run that `resume` names."""
    from laddpo.processes.signals import stop_on_signal
    from laddpo.training.resuming import check_finished, find_run, held, step_processes, told_to_resume

    if config.dry_run:  # of a yaml file; of the command line laddpo/settings/read_settings.py refuses it
        raise UserError("dry_run is true, which only python -m laddpo.train knows; expected false. Leave it out.")
    if config.data.rounds > 1:
        raise UserError(f"rounds is {config.data.rounds}, which only python -m laddpo.train knows; expected 1.")
    measured = ("auto", "none", "exact_match", *(["loss"] if sft_examples(config) == "rows" else []))
    if config.best_metric not in measured:
        raise UserError(
            f"best_metric is {config.best_metric!r}, which is measured on preference pairs, and sft has none; expected "
            f"one of {', '.join(measured)}."
        )
    place = find_run(config, run_folder)
    if place.is_finished:
        check_finished(config, place.folder, "sft")
    else:
        with held(place.folder, "sft", place.is_resumed), told_to_resume(place.folder), stop_on_signal() as stop:
            train(step_processes(config, place), place.folder, place.is_resumed, stop)
    print(place.folder)


def train(config: RunConfig, folder: Path, is_resumed: bool, stop) -> None:
    """Everything between the settings and the finished run folder."""
    from laddpo.core.draws import ElboEstimator
    from laddpo.core.loop import train_loop
    from laddpo.core.optim import build_optimizer
    from laddpo.core.tasks import SftTask
    from laddpo.evaluation.base_and_tuned import EXAMPLES, evaluate_run, open_tasks
    from laddpo.evaluation.heldout import measured_rows
    from laddpo.hardware.machine import find_machine
    from laddpo.inputs import pins, policy
    from laddpo.inputs.tuned import tuned_weights
    from laddpo.models.loading import load_tokenizer
    from laddpo.preference.prepared import chosen_examples
    from laddpo.results.plots import training_plot
    from laddpo.settings.compose import write_config
    from laddpo.settings.of_a_run import write_command
    from laddpo.storage import manifests
    from laddpo.training.faults import fault_reports
    from laddpo.training.pairs import open_examples, open_prepared
    from laddpo.training.run import (
        SEALED,
        check_weights,
        gradient_scaler,
        loop_settings,
        resume_step,
        run_outputs,
        stop_if_asked,
        warmup_note,
    )
    from laddpo.training.validation import Validation, validation_tasks

    policy.check_before_loading(config, hash_again=not config.sft.from_scratch)
    kind = sft_examples(config)
    # random weights are no base to compare with
    is_evaluated = kind != "corpus" and config.evaluation.at_end and not config.sft.from_scratch
    test_tasks = open_tasks(config) if is_evaluated else []
    tokenizer = load_tokenizer(policy.model_path(config), config.model.revision)
    prepared, held_out = None, []
    if kind == "corpus":
        examples = corpus_examples(config, tokenizer)
    elif kind == "chosen":
        prepared = open_prepared(config)
        examples = chosen_examples(prepared.train)
    else:
        prepared = open_examples(config)
        examples, held_out = prepared.train, list(prepared.validation)[: config.evaluation.num_pairs]
        check_held_out(config, prepared)
    data = prepared.content if prepared else pins.examples_pin(examples)
    pinned = pins.make(config, data, config.sft.from_scratch)
    pins.require_like_siblings(folder, pinned, config)
    if is_resumed:
        pins.require_resumable(folder, pinned, config)
    if config.sft.pad_to:
        examples = padded(examples, config.sft.pad_to, config.data.max_length, tokenizer.eos_token_id, config.seed)
    machine = find_machine(config, example_lengths(config, examples))
    print(f"machine: {machine}")
    loaded = policy.new_model(config, machine) if config.sft.from_scratch else policy.load(config, machine)
    ranks = machine.ranks
    if ranks.is_main:
        write_config(config, folder)
        if not is_resumed:
            write_command(folder, given_overrides.get())
    stop_if_asked(folder, stop, ranks)
    parameters = policy.make_trainable(config, loaded)
    # every epoch sees new masks: nothing is stored that would tie them
    estimator = ElboEstimator("count", "low_discrepancy", draws_of(config), config.seed, mask_rounds=sys.maxsize)
    backward = machine.choice.setup.backward
    task = SftTask(loaded.denoiser, parameters, examples, estimator, machine.token_budget, backward, ranks)
    rows = measured_rows(held_out, config.evaluation.diffusion_samples, config.seed) if held_out else []
    validation = Validation(config, loaded, [], 1, validation_tasks(config), stop=stop, rows=rows)
    is_new, metric = config.sft.from_scratch, validation.best_metric
    settings = loop_settings(config, len(examples), metric, has_pairs=False, from_scratch=is_new)
    warmup_note(config, settings)
    masks = "mask" if draws_of(config) == 1 else "masks"
    per_step = f"{settings.items_per_step} rows from {len(examples)}, {draws_of(config)} {masks} each"
    print(f"SFT on {source_of(config)}: {settings.total_steps} steps of {per_step}")
    optim = config.optim
    at_step = resume_step(folder) if is_resumed else None
    of_weights = {EXAMPLES: kind} if kind == "rows" else {}
    with (
        run_outputs(config, folder, loaded, at_step, validation, pinned, of_weights) as outputs,
        fault_reports(folder, parameters, config.seed, ranks),
    ):
        state = train_loop(
            task,
            parameters,
            build_optimizer(optim.optimizer, parameters, tuple(optim.betas), optim.eps, optim.weight_decay),
            settings,
            outputs,
            validation.measure if validation.is_wanted else None,
            stop,
            resume=is_resumed,
            scaler=gradient_scaler(machine),
            unit="rows",
            ranks=ranks,
        )
    if ranks.is_main:
        training_plot(
            outputs.metrics.read(),
            folder / "plots" / "training.png",
            timing=outputs.timing.read(),
            title=f"{config.model.name}: SFT on {source_of(config)}",
            best_step=state.best_step if settings.best_metric else None,
        )
    shown: list[str] = []  # for people, once nothing of the run can be lost
    if is_evaluated:
        tuned, place = tuned_weights(config, folder), folder / "evaluation"
        evaluate_run(config, tuned, place, prepared, loaded, stop, test_tasks, shown.append)
    if not ranks.is_main:
        return
    check_weights(config, folder)
    fields = {
        "step": state.step,
        "best_step": state.best_step,
        "best_value": state.best_value,
        "data": prepared.manifest["fingerprint"] if prepared else "corpus",
        "start": loaded.weights,
        "pins": pinned,
    }
    if kind == "rows":
        fields[EXAMPLES] = kind
    manifests.write_manifest(folder, "sft", fields, manifests.present(folder, SEALED), **manifests.provenance())
    if shown:
        print("\n".join(shown))


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
    from laddpo.inputs.data import difficulty_of, encoder_for
    from laddpo.preference.embedded.arithmetic import corpus
    from laddpo.preference.embedded.word_problems import word_corpus

    encoder, count, share = encoder_for(config, tokenizer), config.sft.num_examples, config.sft.mistake_share
    if config.data.problems == "word_problems":
        rows = word_corpus(count, share, config.seed, config.data.habit, config.sft.drill_share)
    else:
        rows = corpus(count, share, config.seed, difficulty_of(config), config.data.habit)
    return [encoder.encode_example(row) for row in rows]


def padded(
    examples: Sequence[EncodedExample], pad_to: int, max_length: int, eos_token_id: int, seed: int
) -> list[EncodedExample]:
    """Each response with 0 to `pad_to` - L eos tokens behind it, a function of (seed, id); a row stays within
    `max_length`.

    Source: Nie et al. 2025 (arXiv 2502.09992), section 2.3, which pads to the longest response of a batch.
    """
    import numpy as np

    from laddpo.preference.embedded.arithmetic import keyed_integers

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
    import numpy as np

    from laddpo.hardware.planning import prepared_lengths

    lengths = np.array([(len(example.prompt_ids), len(example.response_ids)) for example in examples])
    return prepared_lengths(lengths, draws_of(config), source_of(config))


if __name__ == "__main__":
    run_stage("sft", main)
