"""The typed schema of every configuration group: what a yaml file or the command line may contain.

One dataclass per group of conf/, composed into `RunConfig`. Hydra merges yaml files and overrides into these types, so
an unknown key or a wrong type is refused with its full name. What a value costs (memory, time, bias) is written beside
the key in conf/; the ranges and contradictions are checked in laddpo/settings/checks.py. No torch, so that reading a
configuration is instant.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from omegaconf import MISSING

from laddpo.settings.judge_schema import JudgeSettings, RatingSettings
from laddpo.settings.model_schema import ModelSettings, Sizes
from laddpo.settings.stage_schema import (
    CardSpeed,
    ChatSettings,
    ExportSettings,
    ReportSettings,
    StepSetting,
    StudySettings,
    VarianceSettings,
)


@dataclass
class AdapterSettings:
    kind: str = "lora"
    path: str | None = None
    r: int = 16
    lora_alpha: float = 32
    lora_dropout: float = 0.0
    target_modules: str = "all-linear"
    use_rslora: bool = False
    use_dora: bool = False


@dataclass
class QuantizationSettings:
    load_in_4bit: bool = False
    load_in_8bit: bool = False
    bnb_4bit_quant_type: str = "nf4"
    bnb_4bit_use_double_quant: bool = True
    bnb_4bit_compute_dtype: str | None = None
    llm_int8_threshold: float = 6.0


@dataclass
class Columns:
    """Names of the row fields that hold the texts. `input` is written behind the prompt, `candidates` is a list
    of answers, `candidate` the text of one, `response` the one text that sft learns, `completion` the one answer of an
    unpaired row and `label` whether it is desirable. The rest hold numbers."""

    prompt: str | None = "prompt"
    input: str | None = None
    chosen: str | None = "chosen"
    rejected: str | None = "rejected"
    system: str | None = None
    answer: str | None = None
    candidates: str | None = "candidates"
    candidate: str | None = "candidate"
    response: str | None = "response"
    completion: str | None = "completion"
    label: str | None = "label"
    scores: str | None = None
    ranks: str | None = None
    score_chosen: str | None = None
    score_rejected: str | None = None
    preference: str | None = None
    margin: str | None = None
    weight: str | None = None


def unnamed_columns() -> Columns:
    """Columns that nobody named: those that the source knows."""
    return Columns(**dict.fromkeys(item.name for item in fields(Columns)))


@dataclass
class MixturePart:
    """One source of a mixture. Everything else about its rows is as `data` says for all parts."""

    source: str = "jsonl"
    dataset_name: str | None = None
    dataset_split: str | None = None
    revision: str | None = None
    columns: Columns = field(default_factory=unnamed_columns)
    format: str = "auto"
    weight: float = 1.0
    dataset_config: str | None = None
    test_split: str | None = None


@dataclass
class LengthQuantiles:
    """Tokens of prompt + response, over all sequences: what `plan` assumes as long as nothing is prepared."""

    mean: float | None = None
    p50: int | None = None
    p90: int | None = None
    p99: int | None = None
    prompt_mean: float | None = None


@dataclass
class SamplingSettings:
    """Only read by data=onpolicy: how the model is asked for the answers that pairs are made of."""

    num_questions: int | None = None
    first_question: int = 0
    unseen_steps: float = 0.0
    samples: int = 8
    temperature: float = 1.0
    remasking: str = "certainty"
    confidence_threshold: float | None = 0.9
    gen_length: int = 256
    steps: int = 256
    block_length: int = 32
    suppress_eos: bool | str = False
    block_cache: str = "none"
    instruction: str = ""


@dataclass
class DataSettings:
    source: str = MISSING
    dataset_name: str | None = None
    dataset_split: str | None = None
    dataset_config: str | None = None
    revision: str | None = None
    columns: Columns = field(default_factory=Columns)
    mixture: list[MixturePart] = field(default_factory=list)
    candidates_name: str | None = None
    pairs_per_question: int = 4
    pairs_from: str = "all"
    min_gap: float | None = 0.0
    margin_per_gap: float = 0.0
    questions: str | None = None
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    grader: str = "auto"
    judge: RatingSettings = field(default_factory=RatingSettings)
    pair_by: str = "best_worst"
    balance_lengths: bool = True
    rounds: int = 1
    format: str = "auto"
    label_threshold: float | None = None
    template: str = "auto"
    chat_template: str | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    max_length: int = 1024
    truncation: str = "error"
    random_sample_size: int | None = None
    validation_fraction: float = 0.05
    test_fraction: float = 0.0
    test_split: str | None = None
    on_bad_row: str = "error"
    max_bad_fraction: float = 1.0
    duplicates: str = "keep"
    fail_on_leak: bool = False
    max_line_bytes: int = 16 * 2**20
    follow_symlinks: bool = False
    allow_empty_prompt: bool = False
    allow_nul: bool = False
    problems: str = "arithmetic"
    num_pairs: int = 2048
    operand_max: int = 20
    tasks: list[str] = field(default_factory=list)
    terms: int = 3
    width: int = 2
    habit: str = "drop_carry"
    length_quantiles: LengthQuantiles = field(default_factory=LengthQuantiles)


@dataclass
class DpoSettings:
    loss: str = "sigmoid"
    beta: float = MISSING
    diffusion_samples: int = 4
    estimator: str = "balanced"
    schedule: str = "low_discrepancy"
    focus: str = "difference"
    difference_focus: float = 0.5
    surprise_focus: float = 0.5
    surprise_share: float = 0.2
    surprise_draws: int = 8
    count_tilt: float = 0.0
    mask_rounds: int = 1
    common_random_numbers: bool = True
    shared_counts: bool = True
    shared_masks: bool = False
    sft_weight: float = 0.0
    label_smoothing: float = 0.0
    simpo_gamma: float = 0.5
    cpo_alpha: float = 1.0
    dpop_lambda: float = 50.0
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    kl_baseline: str = "mismatched"


@dataclass
class OptimSettings:
    optimizer: str = "adamw"
    learning_rate: float = MISSING
    round_decay: float = 0.25
    weight_decay: float = 0.01
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-8
    max_grad_norm: float | None = 1.0
    lr_scheduler_type: str = "cosine"
    num_warmup_steps: int = 0
    per_device_train_batch_size: int = 1
    gradient_accumulation_steps: int = 1
    num_train_epochs: float = 1.0
    max_train_steps: int | None = None
    skip_nonfinite: int = 0


@dataclass
class HardwareSettings:
    device: str = "auto"
    precision: str = "auto"
    attention: str = "auto"
    token_budget: int | None = None
    backward: str = "auto"
    gradient_checkpointing: bool | None = None
    offload_activations: bool = False
    embeddings_on_cpu: bool = False
    vram_gib: float | None = None
    tflops: float | None = None
    memory_gb_per_s: float | None = None
    compile: bool = False
    threads: int | None = None
    processes: int | None = None
    sharding: str = "auto"


@dataclass
class EvaluationSettings:
    at_end: bool = True
    tasks: list[str] = field(default_factory=list)
    dataset_name: str | None = None
    dataset_split: str | None = None
    shots: int = 0
    shots_from: str | None = None
    limit: int | None = None
    every_steps: int | None = None
    num_pairs: int | None = 128
    diffusion_samples: int = 32
    gen_length: int = 256
    steps: int = 256
    block_length: int = 32
    temperature: float = 0.0
    temperatures: list[float] = field(default_factory=list)
    cfg_scale: float = 0.0
    remasking: str = "low_confidence"
    suppress_eos: bool | str = False
    confidence_threshold: float | None = None
    stop_early: bool = True
    block_cache: str = "none"
    batch_size: int = 8
    samples: int = 4
    grader: str = "auto"
    harness: str = "none"
    elbo_draws: int = 128
    harness_dir: str | None = None
    judge: JudgeSettings = field(default_factory=JudgeSettings)


@dataclass
class LoggerSettings:
    tensorboard: bool = True
    wandb: bool = False
    trackers: list[str] = field(default_factory=list)
    project: str = "laddpo"
    name: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)
    wandb_project: str | None = None
    wandb_name: str | None = None
    wandb_group: str | None = None
    wandb_tags: list[str] = field(default_factory=list)
    wandb_mode: str = "online"


@dataclass
class SftSettings:
    examples: str = "auto"
    num_examples: int = 20000
    mistake_share: float = 0.6
    fault_rate: float = 0.8
    drill_share: float = 0.0
    diffusion_samples: int | None = 1
    from_scratch: bool = False
    pad_to: int | None = None


@dataclass
class BenchmarkSettings:
    """Only read by `python -m laddpo.benchmark`. `shape` is that of random weights; lengths are in tokens."""

    weights: str = "random"
    shape: Sizes = field(default_factory=lambda: Sizes(256, 4, 4, 4, 768, 32000, 4096))
    mean: float = 157
    p99: float = 646
    prompt_mean: float = 90
    max_length: int = 1024
    token_budget: int = 2048
    pairs: int = 1
    rounds: int = 8
    draws: int = 4
    memory_draws: list[int] = field(default_factory=lambda: [1, 8])
    flat_draws: int = 64
    plan_ranks: list[int] = field(default_factory=lambda: [8, 64])
    plan_tokens: list[int] = field(default_factory=lambda: [256, 1024, 4096])
    sampler_items: int = 384
    sampler_batch: int = 32
    cards: list[StepSetting] = field(default_factory=list)
    card_tokens: int = 1024
    rates: list[StepSetting] = field(default_factory=list)
    predicted: list[CardSpeed] = field(default_factory=list)
    agreement_pairs: int = 8
    nano_steps: int = 200
    block_length: int = 4
    block_answer: int = 200
    block_draws: list[int] = field(default_factory=lambda: [4, 8])
    long_answers: list[int] = field(default_factory=lambda: [256, 1024])
    sft_rows: int = 8
    many_pairs: list[int] = field(default_factory=lambda: [10_000, 100_000])
    parts: list[str] = field(default_factory=lambda: ["memory", "flat", "plan", "speed", "long", "sft", "sampler"])
    minutes: float | None = None


@dataclass
class PathSettings:
    data_dir: str = "data"
    outputs_dir: str = "outputs"


@dataclass
class StoppingSettings:
    patience: int | None = None
    max_chosen_fall: float | None = None


@dataclass
class RunConfig:
    """A whole run: what every stage's `main(config, run_folder)` receives."""

    model: ModelSettings = field(default_factory=ModelSettings)
    adapter: AdapterSettings = field(default_factory=AdapterSettings)
    quantization: QuantizationSettings = field(default_factory=QuantizationSettings)
    data: DataSettings = field(default_factory=DataSettings)
    dpo: DpoSettings = field(default_factory=DpoSettings)
    optim: OptimSettings = field(default_factory=OptimSettings)
    hardware: HardwareSettings = field(default_factory=HardwareSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    logger: LoggerSettings = field(default_factory=LoggerSettings)
    sft: SftSettings = field(default_factory=SftSettings)
    benchmark: BenchmarkSettings = field(default_factory=BenchmarkSettings)
    export: ExportSettings = field(default_factory=ExportSettings)
    report: ReportSettings = field(default_factory=ReportSettings)
    chat: ChatSettings = field(default_factory=ChatSettings)
    variance: VarianceSettings = field(default_factory=VarianceSettings)
    study: StudySettings = field(default_factory=StudySettings)
    seed: int = 42
    output_dir: str | None = None
    resume: str = "false"
    auto: bool = True
    dry_run: bool = False
    save_steps: int | None = 500
    save_minutes: float | None = None
    save_total_limit: int | None = 2
    logging_steps: int = 10
    best_metric: str = "auto"
    verify: bool = False
    rounds: int = 1
    run: str | None = None
    runs: list[str] = field(default_factory=list)
    prompt: str | None = None
    prompts: str | None = None
    base: bool = False
    paths: PathSettings = field(default_factory=PathSettings)
    stopping: StoppingSettings = field(default_factory=StoppingSettings)


def keywords(group: Any) -> dict[str, Any]:
    """The settings of a group as keyword arguments, for code that reads each of them. A copy is dataclasses.asdict."""
    return {item.name: getattr(group, item.name) for item in fields(group)}
