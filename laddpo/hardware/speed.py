"""How long a run will take, from plain numbers: multiplications per token, weights to unpack, launches. No torch.

A forecast, not a measurement: the share of the device's matrix speed that training reaches is taken from published
4-bit LoRA runs of models this size. After its first steps a run knows better and says so.
"""

from __future__ import annotations

from dataclasses import dataclass

from laddpo.hardware.memory import ELEMENT_BYTES, Setup

# Shares of the datasheet's dense matrix speed. Published 4-bit LoRA runs of an 8B reach 66% of an RTX 4090 (torchtune)
# and 47% of an A100 (Unsloth) on full sequences of one length; packed short ones reach less.
REACHED = (0.40, 0.55)
LAUNCH_SECONDS = {"cuda": 1e-3, "cpu": 2e-4}  # per block and micro-step: some 150 kernels forward and backward
GB_PER_S_PER_TFLOP = 7.0  # of a usual GPU, when the bandwidth is not given
# What a GPU exchanges with others: up to 8 taken as one machine with NVLink, more as machines with 200 Gb/s a GPU.
ONE_MACHINE, LINK_GB_PER_S = 8, (150.0, 25.0)
UNPACKED_BYTES = 2.5  # moved per weight when 4-bit blocks are multiplied: half a byte read, two written


@dataclass(frozen=True)
class Device:
    """`tflops`: dense matrix speed in the compute precision; `gb_per_s`: memory bandwidth."""

    tflops: float
    gb_per_s: float | None = None


@dataclass(frozen=True)
class Work:
    """All training sequences of a run, each draw counted: how many `tokens`, of which `masked`, of mean `length`.

    `other_forwards`: passes over them beside those of training: 1 for a reference in the first epoch, 1 for a baseline.
    """

    tokens: float
    masked: float
    length: float
    other_forwards: float = 1.0


def forward_flops(setup: Setup, work: Work) -> float:
    """FLOPs of one forward pass over all of `work`: blocks, attention and, on masked rows, the head."""
    shape = setup.shape
    blocks = 2 * shape.active_parameters
    if not setup.is_full:
        blocks += 2 * setup.active_trained
    attention = 4 * shape.n_layers * shape.query_width * work.length
    return work.tokens * (blocks + attention) + work.masked * 2 * shape.vocab_size * shape.d_model


def training_passes(setup: Setup) -> float:
    """Forward passes that one forward and backward cost: 2 with frozen weights, 3 without, one more to recompute."""
    passes = 3 if setup.is_full else 2
    return passes + setup.checkpointing + (setup.backward == "two_pass")


def predicted_seconds(setup: Setup, work: Work, token_budget: int, device: Device) -> tuple[float, float]:
    """The shorter and the longer forecast for training on `work`, its share of the reference included."""
    passes = training_passes(setup) + work.other_forwards
    multiply = forward_flops(setup, work) * passes / (device.tflops * 1e12)
    micro_steps = max(1.0, work.tokens / max(1, min(token_budget, work.tokens)))
    fixed = micro_steps * setup.shape.n_layers * LAUNCH_SECONDS[setup.device]
    fixed += micro_steps * _unpacking_seconds(setup, passes, device)
    return multiply / REACHED[1] + fixed, multiply / REACHED[0] + fixed


def predicted_tokens_per_s(setup: Setup, flops_per_token: float, tokens: int, device: Device) -> float:
    """Of training in micro-steps of `tokens`, whose forward pass takes `flops_per_token`: matrix products at the whole
    of `device.tflops` (give what is reached), and unpacking."""
    passes = training_passes(setup)
    multiply = tokens * flops_per_token * passes / (device.tflops * 1e12)
    return tokens / (multiply + _unpacking_seconds(setup, passes, device))


def _unpacking_seconds(setup: Setup, passes: float, device: Device) -> float:
    """Bytes of one micro-step's quantised weights: each pass unpacks them again."""
    if setup.quantization == "none":
        return 0.0
    unpacked = setup.shape.linear_parameters * UNPACKED_BYTES * passes
    return unpacked / ((device.gb_per_s or GB_PER_S_PER_TFLOP * device.tflops) * 1e9)


def exchange_seconds(setup: Setup, work: Work, token_budget: int, processes: int, steps: float) -> float:
    """What several processes spend on exchanging: the adapter's gradient once per step; of sharded weights, every
    micro-step's weights for each pass, and a gradient in return."""
    if processes == 1:
        return 0.0
    if setup.shards == 1:
        moved = 2 * 4 * setup.trained * steps
    else:
        element = 4 if setup.is_full else ELEMENT_BYTES[setup.precision]
        micro_steps = max(1.0, work.tokens / processes / max(1, token_budget))
        gathers = 3 + work.other_forwards + setup.checkpointing  # score, forward, backward, reference
        moved = micro_steps * (gathers * element * setup.shape.parameters + 4 * setup.trained)
    speed = LINK_GB_PER_S[processes > ONE_MACHINE]
    return moved * (processes - 1) / processes / (speed * 1e9)


def duration(seconds: float) -> str:
    """40 s, 12 min, 7.5 h, 3.2 days."""
    for size, unit in ((86400.0, "days"), (3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * size:
            value = seconds / size
            return f"{value:.1f} {unit}" if value < 10 else f"{value:.0f} {unit}"
    return f"{seconds:.0f} s"
