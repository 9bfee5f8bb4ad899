"""What each single setting may be: names out of a list, numbers within bounds, lists that hold something.

`single_problems(config)` checks every setting by itself, and what a setting may be because of another one that is read
with it alone; laddpo/settings/checks.py checks settings against each other. The names are those of tables in modules
that import torch, which a configuration must not; a test keeps both equal.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from laddpo.core.draws import ESTIMATORS
from laddpo.core.losses import LOSSES
from laddpo.core.noise import COUNT_SCHEDULES
from laddpo.core.optim import OPTIMIZERS, SCHEDULES
from laddpo.errors import nearest
from laddpo.models.families import FAMILIES
from laddpo.preference.embedded.arithmetic import HABITS
from laddpo.preference.reading.ranked import PAIRS_FROM
from laddpo.preference.reading.rows import SHAPES
from laddpo.preference.sources import SOURCES
from laddpo.problems.grading import GRADERS
from laddpo.problems.tasks import BY_ANSWERS, TASKS, embedded
from laddpo.settings.benchmark_ranges import BENCHMARK_CHOICES, BENCHMARK_LISTS, BENCHMARK_RANGES
from laddpo.settings.bounds import Range, at_least, more_than
from laddpo.settings.judge_ranges import JUDGE_CHOICES, JUDGE_RANGES


def single_problems(config: Any) -> Iterator[str]:
    """A sentence for each setting of a dataclass tree whose value cannot be meant."""
    for key, value in leaves(config):
        found = list(setting_problems(key, value))
        yield from found or _depending(key, value, config)


def setting_problems(key: str, value: Any) -> Iterator[str]:
    """What is wrong with one setting by itself."""
    if isinstance(value, bool) and key in YES_OR_NAME:
        return
    values = value if isinstance(value, list) else [value]
    if not all(math.isfinite(x) for x in values if isinstance(x, float)):
        yield f"{key} is {value}; expected a finite number; write one, or null where the key allows it."
    elif value == "" and key in PATHS:
        yield f"{key} is empty; expected a path; name one, or leave {key}= out."
    elif value == [] and key in LISTS:
        yield f"{key} is empty; expected a list such as {LISTS[key]}; write one, or leave {key}= out."
    elif key in LISTS and len(set(values)) < len(values):
        yield f"{key} is {value}, which names {_first_repeated(values)} twice; each is measured once; write it once."
    elif value is not None and key in CHOICES:
        known = (*(("true", "false") if key in YES_OR_NAME else ()), *CHOICES[key])
        yield from (unknown_name(key, name, known) for name in values if name not in CHOICES[key])
    elif value is not None and key in RANGES:
        for number in values:
            yield from _outside(key, number, RANGES[key])


def _first_repeated(values: list) -> Any:
    return next(value for place, value in enumerate(values) if value in values[:place])


def _depending(key: str, value: Any, config: Any) -> Iterator[str]:
    """What a setting may be because of one that is read with it alone."""
    evaluation, benchmark = config.evaluation, config.benchmark
    if key == "best_metric" and value == "exact_match":
        graded = evaluation.tasks if evaluation.harness == "none" else []
        if not embedded(graded):
            yield (
                f"best_metric is 'exact_match' and evaluation.tasks is {evaluation.tasks} (harness "
                f"{evaluation.harness}), which has no problems to choose a checkpoint by; those of "
                f"{', '.join(embedded(TASKS))} have; add one, or use best_metric=auto."
            )
    elif key == "best_metric" and value == "mean_marks":
        graded = evaluation.tasks if evaluation.harness == "none" else []
        if not any(TASKS[name].has_marks for name in graded if name in TASKS):
            yield (
                f"best_metric is 'mean_marks' and evaluation.tasks is {evaluation.tasks}, whose answers have no marks; "
                "use evaluation=rubric, or best_metric=auto."
            )
    elif key == "evaluation.temperatures" and len({*value, evaluation.temperature}) <= len(value):
        yield (
            f"{key} is {value} beside evaluation.temperature={evaluation.temperature:g}, which names one twice; "
            "problems are answered once at each; write each once."
        )
    elif key == "benchmark.parts":
        for part in ("cards", "rates"):
            if part in value and not getattr(benchmark, part):
                yield (
                    f"benchmark.parts has {part} and benchmark.{part} is empty; expected settings to measure; use "
                    f"experiment=gpu_proof_small or gpu_proof, or leave {part} out of benchmark.parts."
                )
    elif key == "benchmark.mean" and not value < benchmark.p99 < P99_OVER_MEAN * value:
        if any(setting_problems("benchmark.p99", benchmark.p99)):
            return
        yield (
            f"benchmark.mean is {value:g} and benchmark.p99 is {benchmark.p99:g}; lengths are log-normal, whose 99th "
            f"percentile lies above the mean and below {P99_OVER_MEAN:g} times it; {RANGES[key].usual} (157 and 646)."
        )


def as_written(value: Any) -> str:
    """A value as the command line takes it."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every setting of a dataclass tree."""
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{prefix}{item.name}.")
        else:
            yield f"{prefix}{item.name}", value


def unknown_name(key: str, name: str, known: Collection[str]) -> str:
    guess, shown = nearest(name, known), ", ".join(repr(each) if "," in each else each for each in known)
    return f"{key} is {name!r}; known: {shown}; {f'did you mean {guess}?' if guess else 'choose one of them.'}"


def _outside(key: str, value: float, bounds: Range) -> Iterator[str]:
    too_low = value <= bounds.low if bounds.above else value < bounds.low
    if too_low or (bounds.high is not None and value > bounds.high):
        lower = f"{'>' if bounds.above else '>='} {_plain(bounds.low)}"
        upper = f" and at most {_plain(bounds.high)}" if bounds.high is not None else ""
        yield f"{key} is {value}; it must be {lower}{upper}; {bounds.usual}."


def _plain(number: float) -> str:
    return str(number) if isinstance(number, int) else f"{number:g}"


P99_OVER_MEAN = 14.9  # exp(z^2 / 2) with z of the 99th percentile is 14.97: no log-normal has more
PATHS = ("output_dir", "resume", "paths.data_dir", "paths.outputs_dir", "adapter.path", "model.model_name_or_path")
# what is measured for each of several: at least one, and none of them twice; with an example
LISTS = {
    **BENCHMARK_LISTS,
    "variance.draws": "[1,2,4,8]",
}
YES_OR_NAME = ("evaluation.suppress_eos", "data.sampling.suppress_eos")  # true and false, too
# Names by setting: a table of options itself, where it can be read without torch, else its names. evaluation.tasks is
# not here: the harness knows thousands more, so laddpo/settings/checks.py looks at evaluation.harness first.
REMASKING_NAMES = ("low_confidence", "certainty", "random", "sequential", "maskgit_plus", "entropy", "topk_margin")
CHOICES: dict[str, Collection[str]] = {
    **JUDGE_CHOICES,
    **BENCHMARK_CHOICES,
    "model.architecture": FAMILIES,
    "model.attention": ("bidirectional", "block"),
    # validation numbers of which more is better, and the loss
    "best_metric": (
        "auto",
        "none",
        *BY_ANSWERS,
        "loss",
        "rewards/accuracies",
        "rewards/margins",
        "rewards/chosen",
        "logps/chosen",
    ),
    "adapter.kind": ("lora", "full"),
    "quantization.bnb_4bit_quant_type": ("nf4", "fp4"),
    "quantization.bnb_4bit_compute_dtype": ("bf16", "fp16", "fp32"),
    "data.source": (*SOURCES, "mixture"),
    "data.format": (*SHAPES, "unpaired", "json"),
    "data.pairs_from": PAIRS_FROM,
    "data.problems": ("arithmetic", "word_problems", "rubric"),
    "data.habit": HABITS,
    "data.template": ("auto", "chat", "plain"),
    "data.truncation": ("error", "drop", "keep_start", "keep_end"),
    "data.on_bad_row": ("error", "skip"),
    "data.grader": GRADERS,
    "data.duplicates": ("keep", "drop"),
    "dpo.loss": LOSSES,
    "dpo.estimator": ESTIMATORS,
    "dpo.schedule": COUNT_SCHEDULES,
    "dpo.focus": ("difference", "surprise", "none"),
    "dpo.kl_baseline": ("mismatched", "batch_mean"),
    "optim.optimizer": OPTIMIZERS,
    "optim.lr_scheduler_type": SCHEDULES,
    "hardware.device": ("auto", "cpu", "cuda"),
    "hardware.precision": ("auto", "fp32", "bf16", "fp16"),
    "hardware.attention": ("auto", "sdpa", "eager", "flash_attention_2", "flex_attention"),
    "hardware.backward": ("auto", "stream", "two_pass", "joint"),
    "hardware.sharding": ("auto", "none", "fsdp"),
    "evaluation.suppress_eos": ("no", "confidence", "logits"),
    "data.sampling.suppress_eos": ("no", "confidence", "logits"),
    "evaluation.remasking": REMASKING_NAMES,
    "data.sampling.remasking": REMASKING_NAMES,
    "data.sampling.block_cache": ("none", "prefix", "dual"),
    "evaluation.block_cache": ("none", "prefix", "dual"),
    "evaluation.harness": ("none", "lm_eval"),
    "evaluation.grader": GRADERS,
    "export.dtype": ("fp32", "bf16", "fp16"),
    "logger.trackers": ("tensorboard", "wandb", "trackio", "mlflow", "swanlab", "comet"),
    "logger.wandb_mode": ("online", "offline", "disabled"),
    "sft.examples": ("auto", "corpus", "chosen"),
    "variance.settings": (
        "own",
        "naive",
        "one time, many masks",
        "one time a draw for all blocks",
        "vrpo_paper",
        "+ stratified",
        "+ systematic",
        "+ low discrepancy",
        "+ shared counts",
        "+ shared counts and masks",
        "+ complement",
        "+ focus",
        "complement, low discrepancy",
        "complement, low discrepancy, shared counts",
        "complement, low discrepancy, focus",
        "balanced, low discrepancy",
        "balanced, low discrepancy, focus",
        "balanced, low discrepancy, surprise",
        "balanced, low discrepancy, surprise, tilt 0.5",
        "default",
        "default, tilt 0.2",
        "default, tilt 0.5",
        "default, focus 0.75",
        "default, shared masks",
    ),
}

RANGES: dict[str, Range] = {
    "seed": at_least(0, "any whole number such as 42", 2**63 - 1),
    "save_steps": at_least(1, "null turns saving by steps off"),
    "save_minutes": more_than(0, "null turns saving by time off"),
    "save_total_limit": at_least(1, "2 keeps the newest and the one before it"),
    "logging_steps": at_least(1, "1 logs every step"),
    "rounds": at_least(1, "1 trains once"),
    "chat.turns": at_least(0, "0 answers each message alone, null keeps all that fits"),
    "stopping.patience": at_least(1, "null never stops early"),
    "stopping.max_chosen_fall": more_than(0, "null never stops for it"),
    **{
        f"{part}.shape.{size}": at_least(1, advice)
        for part, advice in (("model", "see the model's config.json"), ("benchmark", "see conf/benchmark/default.yaml"))
        for size in (
            "d_model",
            "n_layers",
            "n_heads",
            "n_kv_heads",
            "mlp_hidden_size",
            "vocab_size",
            "max_sequence_length",
        )
    },
    "model.shape.head_dim": at_least(1, "null is model.shape.d_model / model.shape.n_heads"),
    **{
        f"model.shape.{size}": at_least(0, f"0 is a model without {what}")
        for size, what in {
            **dict.fromkeys(("n_experts", "experts_chosen", "shared_experts"), "experts"),
            **dict.fromkeys(("dense_layers", "dense_mlp_size"), "blocks that lack experts"),
        }.items()
    },
    "model.block_length": at_least(1, "null takes what the checkpoint says", 2**16),
    "adapter.r": at_least(1, "8 to 64 is usual"),
    "adapter.lora_alpha": more_than(0, "twice adapter.r is usual"),
    "adapter.lora_dropout": at_least(0, "use 0", 1),
    "quantization.llm_int8_threshold": at_least(0, "6 is usual, 0 keeps values independent of packing"),
    "data.max_length": at_least(1, "1024 is usual"),
    "data.random_sample_size": at_least(1, "null takes every row"),
    "data.validation_fraction": at_least(0, "0.05 is usual", 0.9),
    "data.test_fraction": at_least(0, "0.1 is usual, 0 holds nothing out for a test", 0.9),
    "data.label_threshold": at_least(-math.inf, "null reads labels that say yes or no"),
    "data.max_bad_fraction": at_least(0, "1 never stops because of skipped rows", 1),
    "data.max_line_bytes": at_least(1024, "16777216 is usual"),
    "data.pairs_per_question": at_least(1, "4 is usual; more weigh questions with many candidates more"),
    "data.min_gap": at_least(0, "0 leaves no pair out, null does not look at scores"),
    "data.margin_per_gap": at_least(0, "0 gives no margin"),
    "data.rounds": at_least(1, "1 trains once; rounds sets it too"),
    "data.sampling.num_questions": at_least(1, "null takes all of a file, 1500 of the embedded problems"),
    "data.sampling.first_question": at_least(0, "0 begins with the first"),
    "data.sampling.unseen_steps": at_least(0, "0 asks every step", 0.9),
    "data.sampling.samples": at_least(2, "8 is usual; a pair needs a right and a wrong one of the same question"),
    "data.sampling.temperature": more_than(0, "1.0 is usual; 0 would give the same answer every time"),
    "data.sampling.gen_length": at_least(1, "as long as the answers that are tested"),
    "data.sampling.steps": at_least(1, "as many as gen_length is the slow, exact choice"),
    "data.sampling.block_length": at_least(1, "16 to 32 is usual"),
    "data.sampling.confidence_threshold": more_than(
        0, "0.9 is usual, 1 is one token a step, null takes `steps` steps", 1
    ),
    "data.num_pairs": at_least(1, "2048 is usual"),
    "data.operand_max": at_least(1, "20 is what llada_nano was trained on"),
    "data.terms": at_least(2, "3 is what llada_nano was trained on", 16),
    "data.width": at_least(1, "2 is what llada_nano was trained on", 9),
    **{
        f"data.length_quantiles.{name}": more_than(0, "null where nobody counted, and plan assumes data.max_length")
        for name in ("mean", "p50", "p90", "p99")
    },
    "data.length_quantiles.prompt_mean": at_least(0, "null takes half of data.length_quantiles.mean"),
    # above 1000 a margin of a hundredth of a nat saturates the loss: its gradient is all or nothing
    "dpo.beta": more_than(0, "0.05 to 0.5 is usual for long answers, near 1 for short ones", 1000),
    "dpo.diffusion_samples": at_least(1, "4 is the default, 8 the paper's value"),
    "dpo.difference_focus": at_least(0, "0.5 is the default, 0 treats all tokens alike", 0.95),
    "dpo.surprise_focus": more_than(0, "0.5 is the default; dpo.focus=none treats all tokens alike", 0.95),
    "dpo.surprise_share": more_than(0, "0.2 is the default", 1),
    "dpo.surprise_draws": at_least(2, "8 is the default; an even number"),
    "dpo.count_tilt": at_least(0, "0 makes all counts equally likely, 0.5 suits answers of hundreds of tokens", 1),
    "dpo.mask_rounds": at_least(1, "1 uses the same masks in every epoch"),
    "dpo.sft_weight": at_least(0, "0 turns the SFT term off, 0.05 is the paper's value"),
    "dpo.label_smoothing": at_least(0, "0 trusts every label", 0.5),
    "dpo.simpo_gamma": at_least(0, "0.5 is TRL's default, 0 asks for no margin"),
    "dpo.cpo_alpha": at_least(0, "1 is usual, 0 turns the term off"),
    "dpo.dpop_lambda": at_least(0, "50 is the paper's value, 0 is plain DPO"),
    "dpo.desirable_weight": more_than(0, "1 is usual; raise it where desirable rows are fewer"),
    "dpo.undesirable_weight": more_than(0, "1 is usual; raise it where undesirable rows are fewer"),
    "optim.learning_rate": more_than(0, "5e-7 (full) to 1e-4 (LoRA) is usual", 1),
    "optim.weight_decay": at_least(0, "0.01 is usual"),
    "optim.eps": more_than(0, "1e-8 is usual"),
    "optim.round_decay": more_than(0, "1 keeps the rate in every round", 1),
    "optim.max_grad_norm": more_than(0, "1.0 is usual, null turns clipping off"),
    "optim.num_warmup_steps": at_least(0, "0 starts at the full learning rate"),
    "optim.per_device_train_batch_size": at_least(1, "1 is usual; it does not change memory"),
    "optim.gradient_accumulation_steps": at_least(1, "pairs per step = this x the batch size x processes"),
    "optim.num_train_epochs": more_than(0, "1 is usual"),
    "optim.max_train_steps": at_least(1, "null trains num_train_epochs"),
    "optim.skip_nonfinite": at_least(0, "0 stops at the first non-finite step"),
    "hardware.token_budget": at_least(1, "null lets the memory plan choose"),
    "hardware.vram_gib": more_than(0, "null asks the device"),
    "hardware.tflops": more_than(0, "97.5 for an RTX 4080; null leaves plan without hours on a GPU"),
    "hardware.memory_gb_per_s": more_than(0, "717 for an RTX 4080; null assumes a usual ratio to tflops"),
    "hardware.threads": at_least(1, "null leaves torch's own choice"),
    "hardware.processes": at_least(1, "null takes as many as are launched"),
    "evaluation.limit": at_least(1, "null takes every item"),
    "evaluation.shots": at_least(0, "0 shows no worked examples"),
    "evaluation.every_steps": at_least(1, "null evaluates only at the end"),
    "evaluation.num_pairs": at_least(1, "null takes every validation pair"),
    "evaluation.diffusion_samples": at_least(1, "32 gives small errors"),
    "evaluation.gen_length": at_least(1, "256 is usual for GSM8K"),
    "evaluation.steps": at_least(1, "as many as gen_length is the slow, exact choice"),
    "evaluation.block_length": at_least(1, "16 to 32 is usual"),
    "evaluation.temperature": at_least(0, "0 takes the most likely token"),
    "evaluation.temperatures": at_least(0, "[1] shows what varied answers are worth, [] answers once"),
    "evaluation.cfg_scale": at_least(0, "0 turns guidance off"),
    "evaluation.batch_size": at_least(1, "8 is usual"),
    "evaluation.confidence_threshold": more_than(0, "0.9 is usual, 1 is one token a step, null takes `steps` steps", 1),
    "evaluation.samples": at_least(0, "0 shows none"),
    "evaluation.elbo_draws": at_least(1, "128 is LLaDA's own"),
    **JUDGE_RANGES,
    **BENCHMARK_RANGES,
    "export.shard_gib": more_than(0, "4 is usual"),
    "report.examples": at_least(0, "0 shows none"),
    "variance.draws": at_least(1, "1, 2, 4 and 8 are usual"),
    "variance.pairs": at_least(2, "32 takes minutes, 128 is VRPO's"),
    "variance.gradient_pairs": at_least(2, "32 takes minutes, 64 is usual"),
    "variance.evaluations": at_least(3, "4 takes minutes, 8 is VRPO's"),
    "variance.token_pairs": at_least(0, "4 is usual, 0 measures no tokens"),
    "study.seeds": at_least(0, "[42,43,44] is usual", 2**63 - 1),
    "sft.num_examples": at_least(1, "20000 is usual"),
    "sft.mistake_share": at_least(0, "0 makes every solution correct", 1),
    "sft.fault_rate": at_least(0, "0.8 is what study=rubric has, 0 breaks no mark", 1),
    "sft.drill_share": at_least(0, "0 leaves drills out, 0.5 is what made llada_mini", 1),
    "sft.pad_to": at_least(1, "evaluation.gen_length is usual, null pads nothing"),
    "sft.diffusion_samples": at_least(1, "1 is usual; more batches of other rows teach more than more masks of one"),
}


def _find_conf_dir() -> Path:
    """conf/ of the repository (an editable install or a checkout), else the copy inside the installed package."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "conf"
    return inside if (inside / "config.yaml").is_file() else package.parent / "conf"


CONF_DIR = _find_conf_dir()
