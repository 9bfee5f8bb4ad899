"""Which settings each stage reads. A setting that the command line names and the stage does not read is refused.

READS lists what a stage reads in any of its variants, as groups and names; a name after "-" is left out of its group.
NEEDS lists what is read only together with other settings. tests/test_read_settings.py runs every stage and compares
both with what its code really asked for: a new setting that nothing reads fails there, and so does a wrong row here.
A new setting of a group that stands here needs no row, if every stage that lists the group reads it.

Groups chosen as a whole (model=, data=, experiment=) and yaml files set much at once and name nothing.
"""

from __future__ import annotations

import contextvars
import re
import shlex
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from laddpo.problems.tasks import TASKS, embedded
from laddpo.settings.data_checks import is_read, sft_examples
from laddpo.settings.ranges import CONF_DIR, as_written, leaves
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
    "model.shape.": "describes the model; it is compared with the weights wherever these are loaded",
}
LENGTH = (
    *("optim.max_train_steps", "optim.num_train_epochs"),
    *("optim.per_device_train_batch_size", "optim.gradient_accumulation_steps"),
)
STEPS = ("optim.", "stopping.", "save_", "logging_steps", "best_metric", "logger.")
ANSWERS = (
    *("evaluation.gen_length", "evaluation.steps", "evaluation.block_length", "evaluation.temperature"),
    *("evaluation.cfg_scale", "evaluation.remasking", "evaluation.suppress_eos", "evaluation.confidence_threshold"),
    *("evaluation.stop_early", "evaluation.block_cache", "evaluation.batch_size"),
)
GRADED = ("evaluation.tasks", "evaluation.dataset_name", "evaluation.grader")
ENCODING = ("data.template", "data.max_length", "data.truncation")
DIFFICULTY = ("data.operand_max", "data.terms", "data.width")
MODEL = ("model.model_name_or_path", "model.revision")
LOADED = (*MODEL, "adapter.kind", "adapter.path", "quantization.")
NEW_ADAPTER = (
    *("adapter.r", "adapter.lora_alpha", "adapter.lora_dropout", "adapter.target_modules"),
    *("adapter.use_rslora", "adapter.use_dora"),
)
ROWS = (*LOADED, "data.", "-data.rounds", "-data.length_quantiles.", "-data.columns.response")
PREPARED = (*ROWS, *GRADED, "evaluation.batch_size")
HELD_OUT = ("evaluation.num_pairs", "evaluation.diffusion_samples")
MEASURED = (
    *("dpo.loss", "dpo.beta", "dpo.label_smoothing", "dpo.sft_weight"),
    *HELD_OUT,
    "evaluation.at_end",
)
DRAWS = (
    *("dpo.diffusion_samples", "dpo.estimator", "dpo.schedule", "dpo.difference_focus", "dpo.count_tilt"),
    *("dpo.mask_rounds", "dpo.common_random_numbers", "dpo.shared_counts", "dpo.shared_masks"),
)

PLANNED = ("dpo.diffusion_samples", "dpo.loss", "dpo.sft_weight", "optim.optimizer")

# By stage, what it reads in any of its variants.
READS: dict[str, tuple[str, ...]] = {
    "prepare": (*PREPARED, "run", "verify"),
    "precompute": (*PREPARED, *DRAWS, *HELD_OUT, "evaluation.at_end", *LENGTH, "verify"),
    "train": (*PREPARED, "adapter.", "dpo.", *STEPS, "evaluation.", "data.rounds", "dry_run"),
    "sft": (*PREPARED, "data.columns.response", "adapter.", "dpo.diffusion_samples", *MEASURED, *STEPS,
            "-stopping.max_chosen_fall", "evaluation.", "sft."),
    "evaluate": (*LOADED, *ENCODING, *DIFFICULTY, "evaluation.", "-evaluation.at_end", "-evaluation.every_steps",
                 "-evaluation.samples", "run", "verify"),
    "generate": (*LOADED, *ENCODING, *ANSWERS, "run", "verify", "prompt", "prompts"),
    "variance": (*ROWS, "variance.", "evaluation.tasks", "run", "verify"),
    "export": (*MODEL, "adapter.path", *ENCODING, "export.", "run"),
    "report": ("report.", "run", "runs"),
    "plan": (*ROWS, "adapter.r", "adapter.target_modules", *PLANNED, "dpo.mask_rounds", *LENGTH,
             "data.length_quantiles.mean", "data.length_quantiles.p99", "data.length_quantiles.prompt_mean"),
    "benchmark": (*LOADED, "adapter.", *ENCODING, *DIFFICULTY, *PLANNED, "optim.betas",
                  "optim.eps", "benchmark.", *ANSWERS),
    "doctor": ("model.model_name_or_path", "quantization.load_in_4bit", "quantization.load_in_8bit", "logger.wandb",
               "logger.wandb_mode"),
    "study": ("study.",),
}  # fmt: skip


@dataclass(frozen=True)
class Need:
    """Settings that are read only where `holds(stage, config)` is true; `why` says so to the user."""

    keys: tuple[str, ...]
    holds: Callable[[str, RunConfig], bool]
    why: str


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
            problems[name] = found[-1]
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
        return None  # what else a study is given goes to its arms
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


def _has_local_model(config: RunConfig) -> bool:
    given = config.model.model_name_or_path
    return Path(given).expanduser().is_dir() or (CONF_DIR.parent / given).is_dir()


def _has_local_data(config: RunConfig) -> bool:
    name = config.data.dataset_name or ""
    places = (Path(name), Path(config.paths.data_dir) / "preference_data" / name)
    is_file = Path(name).suffix in (".jsonl", ".json", ".csv", ".parquet", ".gz")
    return name.count("/") != 1 or is_file or any(place.exists() for place in places)


def _sources(config: RunConfig) -> set[str]:
    return {config.data.source, *(part.source for part in config.data.mixture)}


def _is_corpus(stage: str, config: RunConfig) -> bool:
    return stage == "sft" and sft_examples(config) == "corpus"


def _learns_rows(stage: str, config: RunConfig) -> bool:
    return stage == "sft" and sft_examples(config) == "rows"


def _asks(stage: str, config: RunConfig, fact: str | None = None) -> bool:
    """Whether a stage opens tasks that this program answers itself: one whose row in TASKS has `fact`, or any that has
    rows in a file."""
    tasks = config.evaluation.tasks
    if config.evaluation.harness != "none" and stage != "prepare":
        return False
    if fact is None:
        return len(embedded(tasks)) < len(tasks)
    return any(getattr(TASKS[name], fact) for name in tasks if name in TASKS)


def _generates(stage: str, config: RunConfig) -> bool:
    """Whether problems of two-step arithmetic are made: as pairs, as questions, as a corpus or as a test."""
    data = config.data
    own_questions = "onpolicy" in _sources(config) and data.dataset_name is None and data.problems == "arithmetic"
    if _is_corpus(stage, config):
        return data.problems == "arithmetic" or _asks(stage, config, "has_difficulty")
    has_pairs = stage not in ("evaluate", "generate", "export")
    return (has_pairs and ("arithmetic" in _sources(config) or own_questions)) or _asks(stage, config, "has_difficulty")


OFF = (None, False, [])
OFF_IS_HARMLESS = ("evaluation.at_end",)  # true by default
ADVICE = {
    "verify": "train, sft and export always hash the base weights again; ",
    "stopping.max_chosen_fall": "it is measured on pairs, which sft has none of; ",
    "run": "write adapter.path=<run>/adapter to go on from it, prepare data=onpolicy for pairs of its answers, or ",
    "dry_run": "set optim.max_train_steps=2 for a run of two steps, or ",
    "data.rounds": "write data.sampling.num_questions and optim.max_train_steps for the work of several rounds, or ",
}
CORPUS = (*ENCODING, *DIFFICULTY, "data.problems", "data.habit")
OF_QUESTIONS = (
    *(
        "data.dataset_split",
        "data.dataset_config",
        "data.columns.",
        "data.follow_symlinks",
        "data.allow_empty_prompt",
        "data.allow_nul",
    ),
    "data.sampling.instruction",
)
OF_PARTS = {
    "memory": ("memory_draws",),
    "flat": ("flat_draws",),
    "plan": ("plan_ranks", "plan_tokens"),
    "sampler": ("sampler_items", "sampler_batch"),
    "cards": ("cards", "card_tokens"),
    "rates": ("rates", "predicted"),
    "agreement": ("agreement_pairs",),
    "nano": ("nano_steps",),
}
NEEDS = (
    Need(
        NEW_ADAPTER,
        lambda stage, config: config.adapter.kind == "lora" and config.adapter.path is None,
        "only a new LoRA adapter reads it; adapter.path brings an adapter with its own rank, scale and layers, and "
        "adapter=full has none",
    ),
    Need(
        ("quantization.bnb_4bit_",),
        lambda stage, config: config.quantization.load_in_4bit,
        "it is read only where weights are stored in 4 bits (quantization=nf4)",
    ),
    Need(
        ("quantization.llm_int8_threshold",),
        lambda stage, config: config.quantization.load_in_8bit,
        "it is read only where weights are stored in 8 bits (quantization=int8)",
    ),
    Need(
        ("logger.wandb_",),
        lambda stage, config: config.logger.wandb,
        "it is read only with logger.wandb=true (logger=wandb or logger=both)",
    ),
    Need(
        ("run", "verify", "quantization.", "adapter."),
        lambda stage, config: stage != "prepare" or "onpolicy" in _sources(config),
        "prepare reads it only where the model answers questions (data=onpolicy)",
    ),
    Need(
        ("evaluation.batch_size",),
        lambda stage, config: stage not in ("prepare", "precompute") or "onpolicy" in _sources(config),
        "it is read only where the model answers questions (data=onpolicy)",
    ),
    Need(
        OF_QUESTIONS,
        lambda stage, config: config.data.source != "onpolicy" or config.data.dataset_name is not None,
        "it is read only for questions of a file or of the hub (data.questions)",
    ),
    Need(
        ("data.revision",),
        lambda stage, config: not _has_local_data(config),
        "only a dataset of the hub has revisions, and data.dataset_name is a local one",
    ),
    Need(
        ("model.revision",),
        lambda stage, config: not _has_local_model(config),
        "only a model of the hub has revisions, and model.model_name_or_path is a local folder",
    ),
    Need(
        ("optim.round_decay",),
        lambda stage, config: stage == "train" and config.data.rounds > 1,
        "it is read only by train with several rounds (data=onpolicy rounds=3)",
    ),
    Need(
        ("optim.num_train_epochs",),
        lambda stage, config: config.optim.max_train_steps is None,
        "optim.max_train_steps decides when the run ends",
    ),
    Need(
        ("stopping.patience",),
        lambda stage, config: config.evaluation.every_steps is not None and config.best_metric != "none",
        "early stopping looks at best_metric at evaluations during training; set evaluation.every_steps, and not "
        "best_metric=none",
    ),
    Need(
        ("sft.num_examples", "sft.mistake_share"),
        lambda stage, config: (
            _is_corpus(stage, config) or (_learns_rows(stage, config) and "arithmetic" in _sources(config))
        ),
        "it is read only where sft trains on a generated corpus; data.random_sample_size takes a number of rows",
    ),
    Need(
        ("sft.drill_share",),
        lambda stage, config: _is_corpus(stage, config) and config.data.problems == "word_problems",
        "it is read only where sft trains on generated word problems (data=word_problems)",
    ),
    Need(
        ("data.", *(f"-{key}" for key in CORPUS)),
        lambda stage, config: not _is_corpus(stage, config),
        "a generated corpus does not read it (sft.examples=corpus)",
    ),
    Need(
        MEASURED,
        lambda stage, config: not _is_corpus(stage, config),
        "a run on a generated corpus ends without an evaluation on pairs (sft.examples=corpus)",
    ),
    Need(
        (*MEASURED, "-evaluation.at_end"),
        lambda stage, config: stage != "sft" or config.evaluation.at_end or _learns_rows(stage, config),
        "sft measures pairs only at its end (evaluation.at_end=true)",
    ),
    Need(
        tuple(name for name in MEASURED if name.startswith("dpo.")),
        lambda stage, config: not _learns_rows(stage, config),
        "sft on rows measures their likelihood and no preference",
    ),
    Need(
        ("dpo.diffusion_samples",),
        lambda stage, config: stage != "sft" or config.sft.diffusion_samples is None,
        "sft reads it only with sft.diffusion_samples=null; write sft.diffusion_samples",
    ),
    Need(
        DIFFICULTY,
        _generates,
        "it is the difficulty of generated arithmetic, and none is generated here",
    ),
    Need(
        ("data.habit",),
        lambda stage, config: "arithmetic" in _sources(config) or _is_corpus(stage, config),
        "it is read only for generated pairs and corpora (data=arithmetic, sft.examples=corpus)",
    ),
    Need(
        ("data.problems",),
        lambda stage, config: (
            _is_corpus(stage, config) or ("onpolicy" in _sources(config) and config.data.dataset_name is None)
        ),
        "it is read only for embedded questions and corpora (data=onpolicy, sft.examples=corpus)",
    ),
    Need(
        ("evaluation.dataset_name",),
        _asks,
        "it names the rows of a task, and evaluation.tasks has none that reads a file",
    ),
    Need(
        ("evaluation.shots_from",),
        lambda stage, config: bool(config.evaluation.shots) and _asks(stage, config),
        "it is read only with evaluation.shots and a task that reads a file",
    ),
    Need(
        ("evaluation.shots",),
        lambda stage, config: bool(config.evaluation.tasks),
        "evaluation.tasks names no task",
    ),
    Need(
        ("evaluation.grader",),
        lambda stage, config: _asks(stage, config, "takes_grader"),
        "it is read only by the task file (evaluation=file)",
    ),
    Need(
        ("evaluation.elbo_draws", "evaluation.harness_dir"),
        lambda stage, config: config.evaluation.harness != "none",
        "it is read only by lm-evaluation-harness (evaluation.harness=lm_eval)",
    ),
    Need(
        HELD_OUT,
        lambda stage, config: stage != "evaluate" or config.run is not None,
        "pairs are measured only of a run (run=)",
    ),
    Need(
        ("export.dtype", "export.shard_gib", *ENCODING),
        lambda stage, config: stage != "export" or not config.export.adapter_only,
        "an adapter alone is copied as it is (export.adapter_only=true)",
    ),
    Need(
        ("export.private",),
        lambda stage, config: config.export.push_to_hub is not None,
        "it is read only with export.push_to_hub",
    ),
    Need(
        ("optim.betas", "optim.eps"),
        lambda stage, config: stage != "benchmark" or bool({"cards", "rates"} & set(config.benchmark.parts)),
        "it is read only by the parts cards and rates of benchmark.parts",
    ),
    *(
        Need(
            tuple(f"benchmark.{name}" for name in names),
            lambda stage, config, part=part: part in config.benchmark.parts,
            f"it is read only by the part {part} of benchmark.parts",
        )
        for part, names in OF_PARTS.items()
    ),
)
