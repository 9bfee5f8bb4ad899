"""Which settings of `data` its source reads, and what files and data=onpolicy contradict; part of the checks of
laddpo/settings/checks.py, without torch."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from laddpo.preference.reading.splits import contradicted_split, has_file_name
from laddpo.preference.reading.unread import OF_SCORES
from laddpo.preference.sources import SOURCES
from laddpo.problems.tasks import embedded
from laddpo.settings.decoding_checks import decoding_problems, room_problems
from laddpo.settings.ranges import leaves
from laddpo.settings.schema import DataSettings, RunConfig


def unread_settings(config: RunConfig, given: Collection[str]) -> Iterator[str]:
    """A sentence for each setting that the user gave (`given`: its key or a group around it) and no source reads.

    What a yaml file sets beside its source is no mistake of the command line, and a study's settings are for its arms.
    """
    if config.study.arms:
        return
    data = config.data
    defaults = dict(leaves(DataSettings(), "data."))
    for key, value in leaves(data, "data."):
        name = reader_row(key)
        is_given = any(f"{key}.".startswith(f"{group}.") for group in given)
        if name is None or not is_given or value == defaults[key]:
            continue
        if not is_read(key, config):
            of_parts = data.source == "mixture" and name.partition(".")[0] in OF_EACH_PART
            advice = "give it to the parts in data.mixture" if of_parts else WANTED[name]
            yield (
                f"{key} is {value!r} and data.source is {data.source!r}, which does not read it; {advice}, or leave "
                f"{key} out."
            )


def sft_examples(config: RunConfig) -> str:
    """What sft trains on: `corpus` (generated), `rows` (of the data) or `chosen` (the chosen side of pairs)."""
    if config.sft.examples != "auto":
        return config.sft.examples
    return "corpus" if has_corpus(config) else "rows"


def has_corpus(config: RunConfig) -> bool:
    """Whether the data are generated here: data=arithmetic, or word_problems or rubric without a file of questions."""
    data = config.data
    has_own = data.source == "onpolicy" and data.problems in ("word_problems", "rubric") and data.dataset_name is None
    return data.source == "arithmetic" or has_own


def sft_problems(config: RunConfig) -> Iterator[str]:
    """The problem, if it is one, that a generated corpus is asked for beside rows of one's own."""
    if sft_examples(config) == "corpus" and not has_corpus(config):
        yield (
            f"sft.examples is 'corpus' and data.source is {config.data.source!r}: the generated corpus would be "
            "trained on, and no row of the data. Leave sft.examples out to train on the rows, or write data=arithmetic "
            "for the corpus."
        )


def is_read(key: str, config: RunConfig) -> bool:
    """Whether the data's source reads a setting that only some sources read."""
    if (name := reader_row(key)) is None:
        return True
    data = config.data
    sources = {part.source for part in data.mixture} if data.source == "mixture" else {data.source}
    if data.source == "mixture" and name.partition(".")[0] in OF_EACH_PART:
        sources &= {"onpolicy"}  # whose questions `data` names
    return any(name in SOURCES[source].reads for source in sources & SOURCES.keys())


def reader_row(key: str) -> str | None:
    """The row of WANTED that a setting belongs to, if only some sources read it."""
    return next((name for name in WANTED if f"{key}.".startswith(f"data.{name}.")), None)


def onpolicy_problems(config: RunConfig) -> Iterator[str]:
    """A sentence or two for each contradiction."""
    data, sampling = config.data, config.data.sampling
    if data.source != "onpolicy":
        if (rounds := max(data.rounds, config.rounds)) > 1:
            yield (
                f"rounds is {rounds} and data.source is {data.source!r}, whose pairs are the same in every round; use "
                "data=onpolicy, or rounds=1."
            )
        return
    if data.rounds > 1 and config.adapter.kind == "full":
        yield (
            f"rounds is {data.rounds} and adapter.kind is 'full'; a round starts from the adapter of the one before; "
            "use adapter=lora, or rounds=1."
        )
    yield from decoding_problems(sampling, "data.sampling", config.model.known_block_length)
    yield from room_problems(sampling, "data.sampling", config.model.shape.max_sequence_length, config.model.name)
    if data.dataset_name is not None and embedded(config.evaluation.tasks):
        yield (
            f"data.questions (data.dataset_name) is {data.dataset_name!r} and evaluation.tasks has embedded problems; "
            "name the task of these questions, as evaluation=gsm8k, or data.tasks=[]."
        )


def file_problems(config: RunConfig, given: Collection[str]) -> Iterator[str]:
    """A sentence for each split or configuration that the user gave beside a single file which contradicts it."""
    data = config.data
    parts = {"data": data, **{f"data.mixture[{i}]": part for i, part in enumerate(data.mixture)}}
    for key, part in parts.items():
        name = part.dataset_name or ""
        if not has_file_name(name) or set("*?[") & set(name):
            continue
        split, configuration = (
            getattr(part, field) if part is not data or f"data.{field}" in given else None
            for field in ("dataset_split", "dataset_config")
        )
        if split and (problem := contradicted_split(name, split)):
            yield (
                f"{key}.dataset_split is {split!r} and {key}.dataset_name is the file {name!r}: {problem}; leave "
                f"{key}.dataset_split out, or name another file."
            )
        if configuration:
            yield (
                f"{key}.dataset_config is {configuration!r} and {key}.dataset_name is the file {name!r}, which has no "
                f"configurations; leave {key}.dataset_config out."
            )


OF_EACH_PART = ("dataset_name", "dataset_split", "dataset_config", "test_split", "revision", "columns", "format")
OWN_ROWS = "write data=jsonl to read rows of your own"
OWN_ANSWERS = "write data=onpolicy to make pairs of the model's own answers"
CANDIDATES = "write data=gsm8k_candidates to make pairs of candidates"
OF_OWN_ANSWERS = ("pairs_per_question", "questions", "sampling", "grader", "judge", "pair_by", "balance_lengths")
# By setting or group of settings that only some rows of SOURCES read, the most special first: what was probably wanted.
# What is not here concerns every source, or is read elsewhere too: evaluation and sft pose problems of operand_max.
WANTED = {
    **dict.fromkeys(("dataset_name", "dataset_split", "dataset_config", "test_split", "revision"), OWN_ROWS),
    "test_fraction": OWN_ROWS,
    **dict.fromkeys(("columns.candidates", "columns.candidate"), CANDIDATES),
    **dict.fromkeys(
        [f"columns.{name}" for name in ("chosen", "rejected", "system", "input", "completion", "label")], OWN_ROWS
    ),
    **dict.fromkeys(("columns", "format", "label_threshold", "max_line_bytes", "follow_symlinks"), OWN_ROWS),
    **dict.fromkeys((*(f"columns.{name}" for name in OF_SCORES), "pairs_from", "min_gap", "margin_per_gap"), OWN_ROWS),
    **dict.fromkeys(("allow_empty_prompt", "allow_nul"), OWN_ROWS),
    "candidates_name": CANDIDATES,
    **dict.fromkeys(OF_OWN_ANSWERS, OWN_ANSWERS),
    "num_pairs": "write data.random_sample_size to take so many rows",
}
