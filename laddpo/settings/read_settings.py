"""Which settings each stage reads. A setting that the command line names and the stage does not read is refused.

READS lists what a stage reads in any of its variants, as groups and names; a name after "-" is left out of its group.
NEEDS lists what is read only together with other settings. tests/test_read_settings.py runs every stage and compares
both with what its code really asked for: a new setting that nothing reads fails there, and so does a wrong row here.
A new setting of a group that is listed here needs no row, if every stage that lists the group reads it.

Groups chosen as a whole (model=, data=, experiment=) and yaml files set much at once and name nothing.
"""

from __future__ import annotations

import contextvars
import re
import shlex
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from laddpo.settings.data_checks import is_read
from laddpo.settings.needs import DIFFICULTY, ENCODING, HELD_OUT, MEASURED, NEEDS
from laddpo.settings.ranges import as_written, leaves
from laddpo.settings.schema import RunConfig

# what this command line set, for stages that take the rest from an earlier run or name another command
given_overrides: contextvars.ContextVar[tuple[str, ...]] = contextvars.ContextVar("given_overrides", default=())
# Accepted by every stage, also by one that does not read them, each for its reason.
EVERYWHERE = {
    "seed": "decides every random choice that a stage makes, if it makes any",
    "output_dir": "the folder of what a stage writes, if it writes anything",
    "resume": "looked at before a stage begins",
    "auto": "whether a missing input is made; some stages have all that they need",
    "hardware.": "describes the machine, which is the same for all stages",
    "paths.": "where everything lies, the same for all stages",
    "model.name": "names folders and appears in messages",
    "model.architecture": "says what network it is; it is compared with the weights wherever these are loaded",
    "model.attention": "says how the network attends, wherever it is loaded",
    "model.block_length": "says how the network attends, wherever it is loaded",
    "model.shape.": "describes the model; it is compared with the weights wherever these are loaded",
}
PER_STEP = ("optim.per_device_train_batch_size", "optim.gradient_accumulation_steps")
LENGTH = ("optim.max_train_steps", "optim.num_train_epochs", *PER_STEP)
STEPS = ("optim.", "stopping.", "save_", "logging_steps", "best_metric", "logger.")
ANSWERS = (
    *("evaluation.gen_length", "evaluation.steps", "evaluation.block_length", "evaluation.temperature"),
    *("evaluation.cfg_scale", "evaluation.remasking", "evaluation.suppress_eos", "evaluation.confidence_threshold"),
    *("evaluation.stop_early", "evaluation.block_cache", "evaluation.batch_size"),
)
GRADED = ("evaluation.tasks", "evaluation.dataset_name", "evaluation.dataset_split", "evaluation.grader")
MODEL = ("model.model_name_or_path", "model.revision")
LOADED = (*MODEL, "adapter.kind", "adapter.path", "quantization.")
ROWS = (*LOADED, "data.", "-data.rounds", "-data.length_quantiles.", "-data.columns.response")
PREPARED = (*ROWS, *GRADED, "evaluation.batch_size")
DRAWS = (
    *("dpo.diffusion_samples", "dpo.estimator", "dpo.schedule", "dpo.focus", "dpo.difference_focus"),
    *("dpo.surprise_focus", "dpo.surprise_share", "dpo.surprise_draws", "dpo.count_tilt"),
    *("dpo.mask_rounds", "dpo.common_random_numbers", "dpo.shared_counts", "dpo.shared_masks"),
)

PLANNED = ("dpo.diffusion_samples", "dpo.loss", "dpo.sft_weight", "optim.optimizer")

# By stage, what it reads in any of its variants.
READS: dict[str, tuple[str, ...]] = {
    "prepare": (*PREPARED, "run", "verify"),
    "precompute": (*PREPARED, "dpo.loss", *DRAWS, *HELD_OUT, "evaluation.at_end", *LENGTH, "verify"),
    "train": (*PREPARED, "adapter.", "dpo.", *STEPS, "evaluation.", "data.rounds", "dry_run"),
    "sft": (*PREPARED, "data.columns.response", "adapter.", "dpo.diffusion_samples", *MEASURED, *STEPS,
            "-stopping.max_chosen_fall", "evaluation.", "sft."),
    "evaluate": (*LOADED, *ENCODING, *DIFFICULTY, "evaluation.", "-evaluation.at_end", "-evaluation.every_steps",
                 "-evaluation.samples", "run", "verify"),
    "generate": (*LOADED, *ENCODING, *ANSWERS, "run", "verify", "prompt", "prompts"),
    "chat": (*LOADED, *ENCODING, *ANSWERS, "run", "verify", "base", "chat."),
    "variance": (*PREPARED, "adapter.", "dpo.", "-dpo.mask_rounds", "-dpo.kl_baseline", *PER_STEP, "variance.",
                 "run", "verify"),
    "export": (*MODEL, "adapter.path", *ENCODING, "export.", "run"),
    "report": ("report.", "run", "runs"),
    "plan": (*ROWS, "adapter.r", "adapter.target_modules", *PLANNED, *LENGTH,
             "dpo.mask_rounds", "dpo.focus", "dpo.surprise_draws",
             "data.length_quantiles.mean", "data.length_quantiles.p99", "data.length_quantiles.prompt_mean"),
    "benchmark": (*LOADED, "adapter.", *ENCODING, *DIFFICULTY, *PLANNED, "optim.betas",
                  "optim.eps", "benchmark.", *ANSWERS),
    "doctor": ("model.model_name_or_path", "quantization.load_in_4bit", "quantization.load_in_8bit",
               "logger.tensorboard", "logger.wandb", "logger.trackers", "logger.wandb_mode"),
    "study": ("study.",),
}  # fmt: skip


def unread_problems(
    stage: str, config: RunConfig, given: Collection[str], references: Mapping[str, Collection[str]]
) -> list[str]:
    """A sentence for each setting that the command line names and the stage does not read.

    `references` gives for a setting those that take their value from it (`rounds`: data.rounds): it is read where one
    of them is. A value that says of something that it is off, as it is by default, asks for nothing.
    """
    values, defaults = dict(leaves(config)), dict(leaves(RunConfig()))
    problems = {}
    for name in given:
        inside = [key for key in values if f"{key}.".startswith(f"{name}.")]
        if not inside or all(_is_off(key, values[key], defaults[key]) for key in inside):
            continue
        followed = [key for found in inside for key in (found, *references.get(found, ()))]
        found = [unread(stage, key, config) for key in followed]
        if all(found):
            problems[name] = found[0 if matches(followed[0], READS[stage]) else -1]
    shared: dict[str, list[str]] = {}
    for name, why in problems.items():
        shared.setdefault(why, []).append(f"{name}={as_written(values[name])}" if name in values else name)
    return [f"{', '.join(sorted(names))}: {why}" for why, names in shared.items()]


def _is_off(key: str, value: Any, default: Any) -> bool:
    """Whether a value says that something is off, which is so anyway or harmless to say."""
    return value in OFF and (value == default or key in OFF_IS_HARMLESS)


def unread(stage: str, key: str, config: RunConfig) -> str | None:
    """Why a stage does not read a setting, and what to do; None where it does, or where any stage may be given it."""
    if matches(key, tuple(EVERYWHERE)) or stage not in READS or (stage == "study" and not key.startswith("study.")):
        return None  # everything else that a study is given is for its arms
    if not matches(key, READS[stage]):
        readers = [name for name, patterns in READS.items() if matches(key, patterns)]
        others = f"{', '.join(readers)} {'do' if readers[1:] else 'does'}; " if readers else ""
        advice = next((text for pattern, text in ADVICE.items() if matches(key, (pattern,))), "")
        return f"{stage} does not read it; {others}{advice}leave it out."
    if not is_read(key, config):
        return f"data.source is {config.data.source!r}, which does not read it; leave it out."
    why = next((need.why for need in NEEDS if matches(key, need.keys) and not need.holds(stage, config)), None)
    return None if why is None else f"{why}; leave it out."


def stage_reads(stage: str, override: str) -> bool:
    """Whether an override concerns a stage in any of its variants. One that chooses a group concerns all."""
    key = re.split(r"[=\[]", override.lstrip("+~"))[0]
    key = "data.rounds" if key == "rounds" else key
    lists = {name for name, patterns in READS.items() if matches(key, patterns)}
    return not lists or stage in lists or matches(key, tuple(EVERYWHERE))


def command_of(stage: str) -> str:
    """The command of another stage for what this command line works on, without the settings that it would refuse."""
    own = ("output_dir", "resume", "auto")
    kept = [text for text in given_overrides.get() if stage_reads(stage, text) and text.split("=")[0] not in own]
    return shlex.join(["python", "-m", f"laddpo.{stage}", *kept])


def matches(key: str, patterns: Sequence[str]) -> bool:
    """Whether the last of the patterns that names the setting or its group ("dpo.", "save_") takes it in; one that
    begins with "-" leaves it out."""
    plain = [(text.removeprefix("-"), text[0] != "-") for text in patterns]
    named = [taken for text, taken in plain if key == text or (text[-1] in "._" and key.startswith(text))]
    return bool(named) and named[-1]


OFF = (None, False, [])
OFF_IS_HARMLESS = ("evaluation.at_end",)  # true by default
ADVICE = {
    "verify": "train, sft and export always hash the base weights again; ",
    "stopping.max_chosen_fall": "it is measured on pairs, which sft has none of; ",
    "run": "write adapter.path=<run>/adapter to start from it, prepare data=onpolicy for pairs of its answers, or ",
    "dry_run": "set optim.max_train_steps=2 for a run of two steps, or ",
    "data.rounds": "write data.sampling.num_questions and optim.max_train_steps for the work of several rounds, or ",
}
