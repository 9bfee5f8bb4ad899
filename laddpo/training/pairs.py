"""The pairs or rows that a run learns from: opened where they are prepared, made where they may be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from laddpo.settings.data_checks import is_read
from laddpo.settings.read_settings import command_of, given_overrides
from laddpo.settings.schema import MixturePart, RunConfig

if TYPE_CHECKING:
    from laddpo.preference.candidates import Grader
    from laddpo.preference.judged import Rater
    from laddpo.preference.prepared import PreparedPairs, PreparedUnpaired


def open_prepared(config: RunConfig, *, takes_both: bool = False) -> PreparedPairs | PreparedUnpaired:
    """The prepared pairs or unpaired rows of this configuration: found, or made now with auto=true.

    Unpaired rows are refused before they are prepared where dpo.loss needs pairs, unless the caller `takes_both`.
    """
    from laddpo.preference.preparation import find_prepared

    arguments = _arguments(config)
    if not config.auto and find_prepared(*arguments) is None:
        _close_graders(arguments)
        raise _not_prepared(config, f"Run {command_of('prepare')}, or set auto=true.")
    return _prepared_as_they_are(config, arguments, takes_both)


def open_examples(config: RunConfig):
    """The prepared SFT examples of this configuration: found, or made now with auto=true."""
    from laddpo.preference.preparation import find_prepared, prepare_examples
    from laddpo.preference.sources import open_corpus

    folder, source, *rest = arguments = _arguments(config)
    examples = (folder, f"{source}-examples", *rest)  # pairs of the same rows have a folder of their own
    if not config.auto and find_prepared(*examples, open_corpus) is None:
        _close_graders(arguments)
        raise _not_prepared(config, "Run this once with auto=true.")
    return _prepared(config, prepare_examples, examples)


def prepare(config: RunConfig) -> PreparedPairs | PreparedUnpaired:
    """The finished folder of the rows, pairs or unpaired."""
    return _prepared_as_they_are(config, _arguments(config), takes_both=True)


def _prepared_as_they_are(config: RunConfig, arguments: tuple, takes_both: bool):
    """Pairs or unpaired rows, as the data are."""
    from laddpo.preference.kinds import kind_of_rows
    from laddpo.preference.preparation import prepare_pairs, prepare_unpaired
    from laddpo.preference.prepared import PreparedUnpaired

    try:
        is_unpaired = kind_of_rows(*arguments) is PreparedUnpaired
        if is_unpaired and not takes_both:
            _refuse_unpaired(config.dpo.loss)
    except BaseException:
        _close_graders(arguments)
        raise
    return _prepared(config, prepare_unpaired if is_unpaired else prepare_pairs, arguments)


def _refuse_unpaired(loss: str) -> None:
    """Refuse unpaired rows for a loss that needs pairs."""
    from laddpo.core.losses import LOSSES
    from laddpo.errors import UserError

    takers = [name for name, row in LOSSES.items() if not row.takes_pairs]
    if loss not in takers:
        raise UserError(
            f"dpo.loss is {loss!r}, which compares the two answers of a pair, and the rows have labels and no pairs. "
            f"Set dpo.loss to {' or '.join(takers)}, or name data with pairs."
        )


def _prepared(config: RunConfig, make: Callable, arguments: tuple):
    """What `make` prepares: on rank 0 first, whose folder the other processes find."""
    from laddpo.errors import UserError
    from laddpo.processes.ranks import here

    try:
        with here().main_first():
            prepared = make(*arguments, evaluation_prompts(config))
    finally:
        _close_graders(arguments)
    if not len(prepared.train):
        raise UserError(f"{prepared.folder}: holds no row for training; its report.json says what became of the rows.")
    return prepared


def _close_graders(arguments: tuple) -> None:
    for part in arguments[2]:
        for opened in (part.request.grader, part.request.rater):
            if opened is not None:
                opened.close()


def _not_prepared(config: RunConfig, cure: str):
    from laddpo.errors import UserError

    return UserError(
        f"{Path(config.paths.data_dir) / 'prepared'}: these data are not prepared yet and auto is false. {cure}"
    )


def check_enough(config: RunConfig, prepared) -> None:
    """Before training: refuse a run whose measure needs held-out pairs that are not there; say when data are short.

    Validation needs no pairs where tasks with problems of their own choose the best step.
    """
    import sys

    from laddpo.errors import UserError
    from laddpo.hardware.planning import pairs_per_step
    from laddpo.inputs.data import row_lengths
    from laddpo.problems.tasks import BY_ANSWERS, embedded
    from laddpo.processes.ranks import here

    needs_pairs = config.best_metric not in ("auto", "none", *BY_ANSWERS) or (
        config.evaluation.every_steps is not None and not embedded(config.evaluation.tasks)
    )
    if needs_pairs and not config.dry_run and not len(prepared.validation):
        why = (
            f"best_metric is {config.best_metric!r}"
            if config.best_metric != "auto"
            else f"evaluation.every_steps is {config.evaluation.every_steps}"
        )
        raise UserError(
            f"{prepared.folder}: holds no validation {prepared.noun[:-1]} and {why}, which is measured on them "
            f"(DATA-88). Raise data.validation_fraction (it is {config.data.validation_fraction:g}; the split is by "
            "prompt), or set evaluation.every_steps=null and best_metric=auto."
        )
    count, batch = len(row_lengths(prepared, config.dpo)), pairs_per_step(config.optim, config.hardware)
    is_accumulated = config.optim.gradient_accumulation_steps > 1
    larger = "gradient_accumulation_steps" if is_accumulated else "per_device_train_batch_size"
    if count < batch and here().is_main:
        print(
            f"note: {count:,} training {prepared.noun} are fewer than the {batch:,} of a step: each step is a whole "
            f"epoch. Lower optim.{larger}, or give more {prepared.noun}.",
            file=sys.stderr,
        )


def check_margins(loss: str, prepared) -> None:
    """Refuse pairs with a margin if the loss does not read it."""
    from laddpo.core.losses import LOSSES
    from laddpo.errors import UserError

    ids, margins = prepared.columns["id"], prepared.columns.get("margin", ())
    row = next((row for row, margin in enumerate(margins) if margin), None)
    if row is None or LOSSES[loss].takes_margin:
        return
    readers = ", ".join(name for name, of_loss in LOSSES.items() if of_loss.takes_margin)
    raise UserError(
        f"{prepared.folder}: pair {ids[row]} has the margin {margins[row]:g} and dpo.loss is {loss!r}, which does not "
        f"read margins; those that do: {readers}. Choose one, or leave the margins out of the data."
    )


def say_what_is_measured(config: RunConfig, prepared) -> None:
    """One line for data whose answers no task grades: what the table at the end is measured on."""
    from laddpo.processes.ranks import here

    if config.evaluation.tasks or not config.evaluation.at_end or not here().is_main or config.dry_run:
        return
    count = len(prepared.result_rows(config.evaluation.num_pairs))
    print(
        f"result: {count:,} {prepared.result_split} {prepared.noun}, base against tuned. No task grades answers to "
        "these prompts; evaluation=gsm8k, for instance, would add one."
    )


LOOKED_AT = 512  # training pairs, spread evenly
LIKE = 0.5  # share of differing tokens up to which a focus on them can do something


def say_what_pairs_are_like(config: RunConfig, prepared) -> None:
    """One line on how long the answers are and in how many of their tokens those of a pair differ, and what follows.

    Measured what it means: docs/variance.md and the tables that it names.
    """
    from laddpo.core.losses import LOSSES
    from laddpo.core.tasks import differing_share, responses_of
    from laddpo.processes.ranks import here

    rows = prepared.train
    if not LOSSES[config.dpo.loss].takes_pairs or not here().is_main or not len(rows):
        return
    looked_at = [rows[i] for i in range(0, len(rows), max(1, len(rows) // LOOKED_AT))]
    tokens = sum(len(ids) for row in looked_at for ids in responses_of(row)) / (2 * len(looked_at))
    share = differing_share(looked_at)
    said = f"pairs: answers of {tokens:.0f} tokens on average; the two of a pair differ in {share:.0%} of them"
    if share > LIKE and config.dpo.focus == "difference" and config.dpo.difference_focus:
        said += ", so dpo.focus=difference changes little. python -m laddpo.variance says what lowers the noise"
    print(f"{said}.")


def _arguments(config: RunConfig) -> tuple:
    """What the settings mean to laddpo/preference: folder, name, parts, encoder, rules."""
    from laddpo.inputs.data import encoder_for, request_of
    from laddpo.inputs.policy import model_path
    from laddpo.models.loading import load_tokenizer
    from laddpo.preference.preparation import Part, Rules

    data = config.data
    rules = Rules(
        seed=config.seed,
        random_sample_size=data.random_sample_size,
        validation_fraction=data.validation_fraction,
        test_fraction=(share := data.test_fraction if is_read("data.test_fraction", config) else 0.0),
        needs_test=share > 0 and _is_given("data.test_fraction"),
        needs_test_split=_is_given("data.test_split"),
        on_bad_row=data.on_bad_row,
        max_bad_fraction=data.max_bad_fraction,
        duplicates=data.duplicates,
        fail_on_leak=data.fail_on_leak,
    )
    parts = [
        Part(
            part.source,
            request_of(config.data, part, config.sft, config.paths.data_dir, config.seed, grader, rater),
            part.weight,
        )
        for part, grader, rater in _graded_mixture(config)
    ]
    encoder = encoder_for(config.data, load_tokenizer(model_path(config.model), config.model.revision))
    return Path(config.paths.data_dir) / "prepared", data.source, parts, encoder, rules


def _is_given(key: str) -> bool:
    return any(text.startswith(f"{key}=") for text in given_overrides.get())


def _graded_mixture(config: RunConfig) -> list[tuple[MixturePart, Grader | None, Rater | None]]:
    """The parts of data.mixture, or the one source as a mixture of one; each with what grades or rates its answers, if
    it has any."""
    from laddpo.training.on_policy import graded_or_rated, open_questions, sampled_file

    data, mixture = config.data, config.data.mixture
    if data.source == "onpolicy":
        questions = open_questions(config)
        sampled = sampled_file(config, questions)
        return [(MixturePart(data.source, str(sampled)), *graded_or_rated(config, questions))]
    return [(part, *_graded_or_rated(config, part.source)) for part in mixture or [_only_part(config)]]


def _only_part(config: RunConfig) -> MixturePart:
    data = config.data
    return MixturePart(
        data.source,
        data.dataset_name,
        data.dataset_split,
        data.revision,
        data.columns,
        data.format,
        dataset_config=data.dataset_config,
        test_split=data.test_split,
    )


def _graded_or_rated(config: RunConfig, source: str) -> tuple[Grader | None, Rater | None]:
    """What tells right from wrong, or better from worse, where pairs are made of answers; None elsewhere."""
    if source == "onpolicy":  # samples that a mixture names
        from laddpo.training.on_policy import graded_or_rated, open_questions

        return graded_or_rated(config, open_questions(config))
    from laddpo.preference.sources import open_source
    from laddpo.problems.grading import math_grader

    return math_grader() if open_source(source).needs_grader else None, None


def evaluation_prompts(config: RunConfig) -> dict[str, Callable[[], set[str]]]:
    """By the name of each configured task, what gives the keys of its test problems; loaded only when asked."""

    def keys_of(task: str) -> Callable[[], set[str]]:
        def keys() -> set[str]:
            from laddpo.evaluation.answering import tested_questions
            from laddpo.preference.reading.pairs import prompt_group, user_prompt

            settings = (config.evaluation, config.data, config.seed, config.paths.data_dir)
            return {prompt_group(user_prompt(text)) for text in tested_questions(task, *settings)}

        return keys

    from laddpo.problems.tasks import embedded

    tasks = config.evaluation.tasks
    made_here = embedded(tasks)
    files = {task: config.evaluation.dataset_name for task in tasks if task not in made_here}
    return {
        f"the test problems of {task}" + (f" ({files[task]})" if files.get(task) else ""): keys_of(task)
        for task in tasks
    }
