"""Which settings of `data` its source reads, and what those of data=onpolicy contradict; part of the checks of
laddpo/config.py, without torch."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from laddpo.ranges import EMBEDDED_TASKS, leaves
from laddpo.settings import DataSettings, RunConfig


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
            of_parts = data.source == "mixture" and name in OF_EACH_PART
            advice = "give it to the parts in data.mixture" if of_parts else READ_BY[name][1]
            yield (
                f"{key} is {value!r} and data.source is {data.source!r}, which does not read it; {advice}, or leave "
                f"{key} out."
            )


def is_read(key: str, config: RunConfig) -> bool:
    """Whether the data's source reads a setting, as far as READ_BY says anything of it."""
    if (name := reader_row(key)) is None:
        return True
    data = config.data
    sources = {part.source for part in data.mixture} if data.source == "mixture" else {data.source}
    if data.source == "mixture" and name in OF_EACH_PART:
        sources &= {"onpolicy"}  # whose questions `data` names
    return bool(sources & set(READ_BY[name][0]))


def reader_row(key: str) -> str | None:
    """The row of READ_BY that a setting belongs to, if only some sources read it."""
    return next((name for name in READ_BY if f"{key}.".startswith(f"data.{name}.")), None)


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
    if sampling.confidence_threshold is not None and sampling.remasking == "random":
        yield (
            f"data.sampling.confidence_threshold is {sampling.confidence_threshold:g} and data.sampling.remasking is "
            "'random', which ranks by no confidence; set data.sampling.confidence_threshold=null, or another remasking."
        )
    if min(sampling.gen_length, sampling.block_length) < 1 or sampling.gen_length % sampling.block_length:
        yield (
            f"data.sampling.block_length is {sampling.block_length} and data.sampling.gen_length is "
            f"{sampling.gen_length}; an answer is made of whole blocks; change one of them."
        )
    if data.dataset_name is not None and set(EMBEDDED_TASKS) & set(config.evaluation.tasks):
        yield (
            f"data.questions (data.dataset_name) is {data.dataset_name!r} and evaluation.tasks has embedded problems; "
            "name the task of these questions, as evaluation=gsm8k, or data.tasks=[]."
        )


# Those of files or of the hub.
ROWS = ("jsonl", "hh_rlhf", "ultrafeedback", "orca_dpo_pairs", "laddpo_public", "graded_candidates", "onpolicy")
OF_EACH_PART = ("dataset_name", "dataset_split", "revision", "columns", "format")
OWN_ROWS = "write data=jsonl to read rows of your own"
OWN_ANSWERS = "write data=onpolicy to make pairs of the model's own answers"
CANDIDATES = "write data=gsm8k_candidates to make pairs of candidates"
# By setting or group of settings, the most special first: the sources that read it, and what was probably wanted. What
# is not here concerns every source, or is read elsewhere too: evaluation and sft pose problems of operand_max.
READ_BY: dict[str, tuple[tuple[str, ...], str]] = {
    "dataset_name": (ROWS, OWN_ROWS),
    "dataset_split": (ROWS, OWN_ROWS),
    "revision": (ROWS, OWN_ROWS),
    "columns.candidates": (("graded_candidates",), CANDIDATES),
    "columns.candidate": (("graded_candidates",), CANDIDATES),
    "columns": (ROWS, OWN_ROWS),
    "format": (tuple(name for name in ROWS if name not in ("laddpo_public", "onpolicy")), OWN_ROWS),
    "max_line_bytes": (ROWS, OWN_ROWS),
    "follow_symlinks": (ROWS, OWN_ROWS),
    "allow_empty_prompt": (ROWS, OWN_ROWS),
    "allow_nul": (ROWS, OWN_ROWS),
    "candidates_name": (("graded_candidates",), CANDIDATES),
    "pairs_per_question": (("graded_candidates", "onpolicy"), OWN_ANSWERS),
    "questions": (("onpolicy",), OWN_ANSWERS),
    "sampling": (("onpolicy",), OWN_ANSWERS),
    "grader": (("onpolicy",), OWN_ANSWERS),
    "balance_lengths": (("onpolicy",), OWN_ANSWERS),
    "num_pairs": (("arithmetic",), "write data.random_sample_size to take so many rows"),
}
