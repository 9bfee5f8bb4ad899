"""What may hold of a stage and its settings: the conditions on which others are read (laddpo/settings/needs.py)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from laddpo.core.losses import LOSSES, PreferenceLoss
from laddpo.problems.tasks import JUDGED, TASKS, embedded
from laddpo.settings.data_checks import sft_examples
from laddpo.settings.judge_schema import JudgeSettings, fields_read
from laddpo.settings.ranges import CONF_DIR
from laddpo.settings.schema import EvaluationSettings, RunConfig, SamplingSettings


def has_local_model(config: RunConfig) -> bool:
    given = config.model.model_name_or_path
    return Path(given).expanduser().is_dir() or (CONF_DIR.parent / given).is_dir()


def has_local_data(config: RunConfig) -> bool:
    name = config.data.dataset_name or ""
    places = (Path(name), Path(config.paths.data_dir) / "preference_data" / name)
    is_file = Path(name).suffix in (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".gz")
    return name.count("/") != 1 or is_file or any(place.exists() for place in places)


def sources_of(config: RunConfig) -> set[str]:
    return {config.data.source, *(part.source for part in config.data.mixture)}


def loss_is(fact: Callable[[PreferenceLoss], bool], config: RunConfig) -> bool:
    row = LOSSES.get(config.dpo.loss)  # an unknown name is refused elsewhere
    return row is None or fact(row)


def is_corpus(stage: str, config: RunConfig) -> bool:
    return stage == "sft" and sft_examples(config) == "corpus"


def learns_rows(stage: str, config: RunConfig) -> bool:
    return stage == "sft" and sft_examples(config) == "rows"


def asks(stage: str, config: RunConfig, fact: str | None = None) -> bool:
    """Whether a stage opens tasks that this program answers itself: one whose row in TASKS has `fact`, or any that has
    rows in a file."""
    tasks = config.evaluation.tasks
    if stage != "prepare" and config.evaluation.harness != "none":
        return False
    if fact is None:
        return len(embedded(tasks)) < len(tasks)
    return any(getattr(TASKS[name], fact) for name in tasks if name in TASKS)


def generates(stage: str, config: RunConfig) -> bool:
    """Whether problems of two-step arithmetic are made: as pairs, as questions, as a corpus or as a test."""
    data = config.data
    own_questions = "onpolicy" in sources_of(config) and data.dataset_name is None and data.problems == "arithmetic"
    if is_corpus(stage, config):
        return data.problems == "arithmetic" or asks(stage, config, "has_difficulty")
    has_pairs = stage not in ("evaluate", "generate", "chat", "export")
    return (has_pairs and ("arithmetic" in sources_of(config) or own_questions)) or asks(
        stage, config, "has_difficulty"
    )


def lists_pairs(stage: str, config: RunConfig) -> bool:
    return stage == "variance" and config.variance.write_pairs is not None


def has_hub_judge(judge: JudgeSettings) -> bool:
    return "revision" in fields_read(judge, False) and not Path(judge.model or "").expanduser().is_dir()


def is_judged(config: RunConfig) -> bool:
    return config.evaluation.harness == "none" and JUDGED in config.evaluation.tasks


def takes_steps(decoding: EvaluationSettings | SamplingSettings, config: RunConfig) -> bool:
    """Whether `steps` decides anything: without a confidence threshold, or in a block model."""
    return decoding.confidence_threshold is None or config.model.known_block_length is not None
