"""The typed settings of stages that no other stage reads; part of laddpo/settings/schema.py, as whose groups they
appear."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING


@dataclass
class ExportSettings:
    """Only read by `python -m laddpo.export`."""

    adapter_only: bool = False
    dtype: str | None = None
    shard_gib: float = 4.0
    license: str | None = None
    push_to_hub: str | None = None
    private: bool = True


@dataclass
class ChatSettings:
    """Only read by `python -m laddpo.chat`."""

    system: str | None = None
    turns: int | None = None


@dataclass
class ReportSettings:
    """Only read by `python -m laddpo.report`."""

    metric: str | None = None
    examples: int = 6


@dataclass
class VarianceSettings:
    """Only read by `python -m laddpo.variance`."""

    settings: list[str] = field(default_factory=lambda: ["own"])
    draws: list[int] = field(default_factory=lambda: [1, 2, 4, 8])
    pairs: int = 32
    gradient_pairs: int = 32
    evaluations: int = 4
    token_pairs: int = 4
    techniques: bool = False
    pairs_file: str | None = None
    write_pairs: str | None = None


@dataclass
class StudyArm:
    """One arm of a study: a run of `stage` with these settings; `factor` is its section of the page."""

    name: str = MISSING
    factor: str = "Arms"
    stage: str = "train"
    overrides: list[str] = field(default_factory=list)
    against: str = "default"


@dataclass
class StudyRun:
    """A run that comes before the arms of each seed. {name} in the settings of a later run is its folder."""

    name: str = MISSING
    stage: str = "sft"
    overrides: list[str] = field(default_factory=list)


@dataclass
class StudyClaim:
    """What is to be decided: `arm` better than `against`, or not worse by more than `margin` points."""

    arm: str = MISSING
    against: str = "default"
    margin: float | None = None


@dataclass
class StudySettings:
    """Only read by `python -m laddpo.study`."""

    name: str = "none"
    seeds: list[int] = field(default_factory=lambda: [42, 43, 44])
    settings: list[str] = field(default_factory=list)
    first: list[StudyRun] = field(default_factory=list)
    arms: list[StudyArm] = field(default_factory=list)
    claims: list[StudyClaim] = field(default_factory=list)
    only: list[str] = field(default_factory=list)


@dataclass
class StepSetting:
    """One way to run a step, of those that `python -m laddpo.benchmark` measures; `gib` is the card it is to fit.

    `who`: ours or a rival's name. `work`: train, or reference for the pass without gradients.
    """

    gib: float | None = None
    who: str = "ours"
    work: str = "train"
    quantization: str = "nf4"
    draws: int = 4
    token_budget: int = 2048
    gradient_checkpointing: bool = False
    offload_activations: bool = False
    embeddings_on_cpu: bool = False
    compile: bool = False
    optimizer: str = "adamw"


@dataclass
class CardSpeed:
    """A card's datasheet, for predictions: dense matrix speed in the compute precision, and memory bandwidth."""

    name: str = MISSING
    tflops: float = MISSING
    memory_gb_per_s: float = MISSING
