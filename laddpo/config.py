"""The whole configuration: its type, where its yaml files lie, and every check that needs no torch and no weights.

`find_problems(config)` returns all contradictions together, each naming the key, the value found, what was expected and
what to do; `unlikely_settings(config)` returns what runs correctly but probably not as wished. `check_machine(config)`
looks at the machine (it imports torch) and is called only by stages that run the model.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from laddpo.errors import UserError, nearest
from laddpo.settings import RunConfig


def _find_conf_dir() -> Path:
    """conf/ of the repository (an editable install or a checkout), else the copy inside the installed package."""
    package = Path(__file__).resolve().parent
    for folder in (package.parent / "conf", package / "conf"):
        if (folder / "config.yaml").is_file():
            return folder
    return package / "conf"


CONF_DIR = _find_conf_dir()


def find_problems(config: RunConfig) -> list[str]:
    """Every contradiction in the settings, one sentence or two each; an empty list when there is none."""
    problems = [
        *_nonfinite(config),
        *_unknown_choices(config),
        *_out_of_range(config),
        *_quantization_problems(config),
        *_length_problems(config),
        *_dpo_problems(config),
        *_schedule_problems(config),
        *_data_problems(config),
        *_evaluation_problems(config),
    ]
    return list(dict.fromkeys(problems))


def check(config: RunConfig) -> RunConfig:
    """The same configuration, or `UserError` with all its problems."""
    problems = find_problems(config)
    if problems:
        raise UserError(*problems)
    return config


def leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every setting of a dataclass tree."""
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{prefix}{item.name}.")
        else:
            yield f"{prefix}{item.name}", value


def _nonfinite(config: RunConfig) -> Iterator[str]:
    for key, value in leaves(config):
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, float) and not math.isfinite(number):
                yield f"{key} is {number}; expected a finite number; write one, or null where the key allows it."


def _unknown_choices(config: RunConfig) -> Iterator[str]:
    values = dict(leaves(config))
    for key, known in CHOICES.items():
        value = values[key]
        if value is not None and value not in known:
            guess = nearest(value, known)
            hint = f"did you mean {guess}?" if guess else "choose one of these."
            yield f"{key} is {value!r}; known: {', '.join(known)}; {hint}"


def _out_of_range(config: RunConfig) -> Iterator[str]:
    values = dict(leaves(config))
    for key, (low, high, inclusive, advice) in RANGES.items():
        value = values[key]
        if value is None or isinstance(value, bool) or not math.isfinite(value):
            continue
        below = low is not None and (value < low if inclusive else value <= low)
        above = high is not None and value > high
        if below or above:
            bounds = f"{'>=' if inclusive else '>'} {low:g}" if low is not None else ""
            if high is not None:
                bounds += f"{' and ' if bounds else ''}<= {high:g}"
            yield f"{key} is {value}; it must be {bounds}; {advice}."


def _quantization_problems(config: RunConfig) -> Iterator[str]:
    quantization, adapter = config.quantization, config.adapter
    if quantization.load_in_4bit and quantization.load_in_8bit:
        yield (
            "quantization.load_in_4bit and quantization.load_in_8bit are both true; a weight is stored in one way; "
            "choose one: quantization=nf4 (smallest) or quantization=int8."
        )
    if (quantization.load_in_4bit or quantization.load_in_8bit) and adapter.kind == "full":
        bits = "4bit" if quantization.load_in_4bit else "8bit"
        yield (
            f"adapter.kind is 'full' and quantization.load_in_{bits} is true; quantized weights cannot be trained; "
            "use adapter=lora, or quantization=none."
        )
    if adapter.kind == "full" and adapter.path is not None:
        yield (
            f"adapter.path is {adapter.path!r} and adapter.kind is 'full'; an adapter is loaded only into adapter=lora; "
            "use adapter=lora, or merge it first with python -m laddpo.export and name the result as model.model_name_or_path."
        )
    if adapter.kind == "lora" and adapter.lora_dropout != 0 and 0 < adapter.lora_dropout <= 1:
        yield (
            f"adapter.lora_dropout is {adapter.lora_dropout:g}; expected 0: the gradient of a pair is summed over several "
            "passes, which must see the same network; regularise by optim.weight_decay or fewer steps instead."
        )


def _length_problems(config: RunConfig) -> Iterator[str]:
    longest, limit = config.data.max_length, config.model.shape.max_sequence_length
    if longest > limit:
        yield (
            f"data.max_length is {longest} and {config.model.name} knows {limit} positions "
            f"(model.shape.max_sequence_length); expected at most {limit}; set data.max_length={limit} or lower."
        )
    if longest < SHORTEST_PAIR:
        yield (
            f"data.max_length is {longest}; a chat template alone takes about {SHORTEST_PAIR - 8} tokens, so no response "
            f"would be left; expected at least {SHORTEST_PAIR}; set data.max_length={config.model.recommended.max_length}."
        )
    budget = config.hardware.token_budget
    if budget is not None and 0 < budget < longest and longest <= limit:
        yield (
            f"hardware.token_budget is {budget} and data.max_length is {longest}; a micro-step must hold the longest "
            f"sequence; raise hardware.token_budget to {longest} or more, or lower data.max_length."
        )
    evaluation = config.evaluation
    if evaluation.tasks and evaluation.gen_length > limit:
        yield (
            f"evaluation.gen_length is {evaluation.gen_length} and {config.model.name} knows {limit} positions; "
            f"expected less; lower evaluation.gen_length."
        )


def _dpo_problems(config: RunConfig) -> Iterator[str]:
    dpo = config.dpo
    if dpo.label_smoothing > 0 and dpo.loss not in TAKES_LABEL_SMOOTHING:
        yield (
            f"dpo.label_smoothing is {dpo.label_smoothing:g} and dpo.loss is {dpo.loss!r}, which has no such term; "
            f"expected 0; set dpo.label_smoothing=0 or dpo.loss={TAKES_LABEL_SMOOTHING[0]}."
        )
    if dpo.loss == "robust" and dpo.label_smoothing >= 0.5:
        yield (
            f"dpo.label_smoothing is {dpo.label_smoothing:g} with dpo.loss=robust, which divides by 1 - 2 x it; "
            "expected less than 0.5; 0.1 is usual."
        )
    if dpo.estimator == "complement" and dpo.diffusion_samples > 1 and dpo.diffusion_samples % 2:
        n = dpo.diffusion_samples
        yield (
            f"dpo.diffusion_samples is {n} with dpo.estimator=complement, whose draws come in pairs (a mask and its "
            f"inverse); expected 1 or an even number; set dpo.diffusion_samples={n - 1} or {n + 1}."
        )


def _schedule_problems(config: RunConfig) -> Iterator[str]:
    optim = config.optim
    if len(optim.betas) != 2 or not all(0 <= b < 1 for b in optim.betas):
        yield f"optim.betas is {optim.betas}; expected two numbers from 0 to below 1; [0.9,0.95] is usual."
    if optim.max_train_steps is not None and 0 < optim.max_train_steps < optim.num_warmup_steps:
        yield (
            f"optim.num_warmup_steps is {optim.num_warmup_steps} and optim.max_train_steps is {optim.max_train_steps}; the "
            "learning rate would never reach its value; lower the warm-up or train longer."
        )
    if config.stopping.patience is not None and config.evaluation.every_steps is None:
        yield (
            f"stopping.patience is {config.stopping.patience} and evaluation.every_steps is null; early stopping looks at "
            "evaluations during training; set evaluation.every_steps, or stopping.patience=null."
        )
    every, last = config.evaluation.every_steps, optim.max_train_steps
    if config.stopping.patience is not None and every is not None and last is not None and 0 < last < every:
        yield (
            f"evaluation.every_steps is {every} and optim.max_train_steps is {last}; no evaluation would happen before the "
            f"end, so stopping.patience could never act; set evaluation.every_steps={max(1, last // 4)} or lower."
        )
    paged = optim.optimizer == "paged_adamw_8bit"
    if paged and config.hardware.device == "cpu":
        yield (
            "optim.optimizer is 'paged_adamw_8bit' and hardware.device is 'cpu'; paging needs a CUDA device; "
            "use optim.optimizer=adamw_8bit or adamw."
        )
    if config.hardware.device == "cpu" and config.hardware.precision == "fp16":
        yield (
            "hardware.precision is 'fp16' and hardware.device is 'cpu', where float16 arithmetic is missing or slow; "
            "use hardware.precision=fp32 or bf16."
        )


def _data_problems(config: RunConfig) -> Iterator[str]:
    data = config.data
    if data.source in NEEDS_A_FILE and not data.dataset_name:
        yield (
            f"data.dataset_name is not set and data.source is {data.source!r}; expected a local file or a hub id; "
            "add data.dataset_name=path/to/pairs.jsonl."
        )
    if config.quantization.load_in_4bit is False and config.quantization.bnb_4bit_compute_dtype is not None:
        yield (
            f"quantization.bnb_4bit_compute_dtype is {config.quantization.bnb_4bit_compute_dtype!r} but nothing is loaded in "
            "4 bits; set quantization=nf4, or quantization.bnb_4bit_compute_dtype=null."
        )


def _evaluation_problems(config: RunConfig) -> Iterator[str]:
    evaluation = config.evaluation
    gen, block, steps = evaluation.gen_length, evaluation.block_length, evaluation.steps
    if min(gen, block, steps) < 1:
        return
    if gen % block:
        fitting = max(b for b in range(1, min(block, gen) + 1) if gen % b == 0)
        yield (
            f"evaluation.gen_length is {gen} and evaluation.block_length is {block}; an answer is made of whole blocks; "
            f"set evaluation.block_length={fitting} or evaluation.gen_length={(gen // block + 1) * block}."
        )
    elif steps % (gen // block):
        blocks = gen // block
        yield (
            f"evaluation.steps is {steps} over {blocks} blocks; each block takes the same number of steps; "
            f"set evaluation.steps={max(1, steps // blocks) * blocks} or {(steps // blocks + 1) * blocks}."
        )


def unlikely_settings(config: RunConfig) -> list[str]:
    """What runs, but probably not as wished: one sentence for each setting, by name. Never an error."""
    notes = []
    recommended, dpo, optim = config.model.recommended, config.dpo, config.optim
    lora = config.adapter.kind == "lora"
    rate = recommended.learning_rate.lora if lora else recommended.learning_rate.full
    kind = "LoRA" if lora else "full fine-tuning"
    if not recommended.beta / 5 <= dpo.beta <= recommended.beta * 5:
        notes.append(
            f"dpo.beta={dpo.beta:g} is far from what suits {config.model.name} ({recommended.beta:g}); too small a beta lets "
            "the policy leave the reference, too large a one holds it still."
        )
    if not rate / 10 <= optim.learning_rate <= rate * 10:
        notes.append(
            f"optim.learning_rate={optim.learning_rate:g} is far from what suits {config.model.name} with {kind} ({rate:g})."
        )
    if config.data.source == "arithmetic" and config.model.shape.n_layers >= 16:
        notes.append(
            f"data.source=arithmetic is the small embedded task; {config.model.name} learns nothing useful from it; "
            "name real pairs, for instance data=hh_rlhf."
        )
    if config.data.source == "arithmetic" and dpo.beta < 0.3:
        notes.append(
            f"dpo.beta={dpo.beta:g} with data.source=arithmetic: on answers this short a log-likelihood is a few nats, and a "
            "beta below 0.3 made a small model collapse; near 1 suits them."
        )
    if dpo.estimator == "bernoulli":
        notes.append("dpo.estimator=bernoulli is biased and of large variance; it exists for parity with older code.")
    if not dpo.common_random_numbers:
        notes.append(
            "dpo.common_random_numbers=false makes the score about a thousand times noisier; for comparison only."
        )
    if optim.num_train_epochs > dpo.mask_rounds and optim.max_train_steps is None:
        notes.append(
            f"optim.num_train_epochs={optim.num_train_epochs:g} with dpo.mask_rounds={dpo.mask_rounds}: later epochs see the "
            "masks of earlier ones again, so the run may fit their noise; raise dpo.mask_rounds (each costs one reference pass)."
        )
    if dpo.loss in PER_TOKEN_LOSSES and dpo.beta == recommended.beta:
        notes.append(
            f"dpo.loss={dpo.loss} scores per token, where beta is usually larger by the response length; "
            f"dpo.beta={dpo.beta:g} was chosen for a loss on sums."
        )
    return notes


def check_machine(config: RunConfig) -> None:
    """Refuse what this machine cannot do: a missing GPU, bf16 or 4-bit kernels. Imports torch; needs no weights."""
    import torch

    problems = []
    hardware, quantization = config.hardware, config.quantization
    has_cuda = torch.cuda.is_available()
    device = hardware.device if hardware.device != "auto" else ("cuda" if has_cuda else "cpu")
    if device == "cuda" and not has_cuda:
        problems.append(
            "hardware.device is 'cuda' and torch finds no CUDA device; expected a working NVIDIA driver and a CUDA build of "
            "torch; run python -m laddpo.doctor, or use hardware=cpu."
        )
    if device == "cuda" and has_cuda and "bf16" in (hardware.precision, quantization.bnb_4bit_compute_dtype):
        major, minor = torch.cuda.get_device_capability()
        if major < 8:
            problems.append(
                f"bf16 needs compute capability 8.0 and {torch.cuda.get_device_name()} has {major}.{minor}; "
                "use hardware.precision=fp16."
            )
    if device == "cpu" and hardware.precision == "fp16":
        problems.append(
            "hardware.precision is 'fp16' and this run uses the CPU (no CUDA device found); "
            "use hardware.precision=fp32 or hardware=cpu."
        )
    if device == "cpu" and config.optim.optimizer == "paged_adamw_8bit":
        problems.append("optim.optimizer is 'paged_adamw_8bit' and no CUDA device was found; use adamw_8bit or adamw.")
    if quantization.load_in_4bit or quantization.load_in_8bit:
        try:
            import bitsandbytes  # noqa: F401
        except Exception as error:  # a broken install raises anything
            problems.append(
                f"quantization needs bitsandbytes, which cannot be imported ({type(error).__name__}: {error}); "
                "reinstall it, or use quantization=none."
            )
    if problems:
        raise UserError(*problems)


SHORTEST_PAIR = 24  # tokens: template of one turn, one prompt token, one response token and its terminator, with room
TAKES_LABEL_SMOOTHING = ("sigmoid", "robust", "sigmoid_norm")
PER_TOKEN_LOSSES = ("ipo", "sigmoid_norm")
NEEDS_A_FILE = ("jsonl",)

# Names that torch-using tables hold as rows; tests/test_config.py keeps them equal.
CHOICES: dict[str, tuple[str, ...]] = {
    "adapter.kind": ("lora", "full"),
    "quantization.bnb_4bit_quant_type": ("nf4", "fp4"),
    "quantization.bnb_4bit_compute_dtype": ("bf16", "fp16", "fp32"),
    "data.template": ("auto", "chat", "plain"),
    "data.truncation": ("error", "drop", "keep_start", "keep_end"),
    "data.on_bad_row": ("error", "skip"),
    "dpo.loss": ("sigmoid", "robust", "hinge", "ipo", "apo_zero", "apo_down", "sigmoid_norm"),
    "dpo.estimator": ("count", "complement", "bernoulli"),
    "dpo.schedule": ("iid", "low_discrepancy", "stratified", "systematic"),
    "optim.optimizer": ("adamw", "adamw_8bit", "paged_adamw_8bit"),
    "optim.lr_scheduler_type": ("cosine", "linear", "constant"),
    "hardware.device": ("auto", "cpu", "cuda"),
    "hardware.precision": ("auto", "fp32", "bf16", "fp16"),
    "hardware.attention": ("auto", "sdpa", "eager", "flash_attention_2", "flex_attention"),
    "hardware.backward": ("auto", "stream", "two_pass", "joint"),
    "evaluation.remasking": ("low_confidence", "random"),
    "logger.wandb_mode": ("online", "offline", "disabled"),
    "sft.examples": ("corpus", "chosen"),
}

# key: (low, high, whether low itself is allowed, what is usual)
RANGES: dict[str, tuple[float | None, float | None, bool, str]] = {
    "seed": (0, 2**63 - 1, True, "any whole number such as 42"),
    "save_steps": (1, None, True, "null turns saving by steps off"),
    "save_minutes": (0, None, False, "null turns saving by time off"),
    "save_total_limit": (1, None, True, "2 keeps the newest and the one before it"),
    "logging_steps": (1, None, True, "1 logs every step"),
    "rounds": (1, None, True, "1 trains once"),
    "adapter.r": (1, None, True, "8 to 64 is usual"),
    "adapter.lora_alpha": (0, None, False, "twice adapter.r is usual"),
    "adapter.lora_dropout": (0, 1, True, "use 0"),
    "quantization.llm_int8_threshold": (0, None, True, "6 is usual, 0 keeps values independent of packing"),
    "data.max_length": (1, None, True, "1024 is usual"),
    "data.random_sample_size": (1, None, True, "null takes every row"),
    "data.validation_fraction": (0, 0.9, True, "0.05 is usual"),
    "data.max_bad_fraction": (0, 1, True, "1 never stops because of skipped rows"),
    "data.max_line_bytes": (1024, None, True, "16777216 is usual"),
    "data.num_pairs": (1, None, True, "2048 is usual"),
    "data.operand_max": (2, 99, True, "20 is what llada_nano was trained on"),
    "dpo.beta": (0, None, False, "0.05 to 0.5 is usual for long answers, near 1 for short ones"),
    "dpo.diffusion_samples": (1, None, True, "4 is the default, 8 the paper's value"),
    "dpo.mask_rounds": (1, None, True, "1 uses the same masks in every epoch"),
    "dpo.sft_weight": (0, None, True, "0 turns the SFT term off, 0.05 is the paper's value"),
    "dpo.label_smoothing": (0, 0.5, True, "0 trusts every label"),
    "optim.learning_rate": (0, 1, False, "5e-7 (full) to 1e-4 (LoRA) is usual"),
    "optim.weight_decay": (0, None, True, "0.01 is usual"),
    "optim.eps": (0, None, False, "1e-8 is usual"),
    "optim.max_grad_norm": (0, None, False, "1.0 is usual, null turns clipping off"),
    "optim.num_warmup_steps": (0, None, True, "0 starts at the full learning rate"),
    "optim.per_device_train_batch_size": (1, None, True, "1 is usual; it does not change memory"),
    "optim.gradient_accumulation_steps": (1, None, True, "pairs per step = this x the batch size x processes"),
    "optim.num_train_epochs": (0, None, False, "1 is usual"),
    "optim.max_train_steps": (1, None, True, "null trains num_train_epochs"),
    "optim.skip_nonfinite": (0, None, True, "0 stops at the first non-finite step"),
    "hardware.token_budget": (1, None, True, "null lets the memory plan choose"),
    "hardware.vram_gib": (0, None, False, "null asks the device"),
    "hardware.threads": (1, None, True, "null leaves torch's own choice"),
    "evaluation.limit": (1, None, True, "null takes every item"),
    "evaluation.every_steps": (1, None, True, "null evaluates only at the end"),
    "evaluation.num_pairs": (1, None, True, "null takes every validation pair"),
    "evaluation.diffusion_samples": (1, None, True, "32 gives small errors"),
    "evaluation.gen_length": (1, None, True, "256 is usual for GSM8K"),
    "evaluation.steps": (1, None, True, "as many as gen_length is the slow, exact choice"),
    "evaluation.block_length": (1, None, True, "16 to 32 is usual"),
    "evaluation.temperature": (0, None, True, "0 takes the most likely token"),
    "evaluation.cfg_scale": (0, None, True, "0 turns guidance off"),
    "evaluation.batch_size": (1, None, True, "8 is usual"),
    "stopping.patience": (1, None, True, "null never stops early"),
    "stopping.max_chosen_fall": (0, None, False, "null never stops for it"),
    "sft.num_examples": (1, None, True, "20000 is usual"),
    "sft.mistake_share": (0, 1, True, "0 makes every solution correct"),
    "sft.learning_rate": (0, 1, False, "1e-3 is usual for a small model from scratch"),
    "sft.max_train_steps": (1, None, True, "1800 made llada_nano"),
    "sft.batch_size": (1, None, True, "192 made llada_nano"),
}
