"""How much of the device's matrix speed is reached, in floating-point operations that had to be done.

Operations are counted on the tokens given (hardware/speed.py): recomputed activations, padding and unpacked weights are
overhead. The speed of matrix products is measured in the same run, on the model's own shapes.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from laddpo.benchmarking.steps import timed, wait
from laddpo.core.gradient import Item, pack_items, pack_sequence_runs
from laddpo.hardware.memory import Shape
from laddpo.hardware.speed import Work

PRODUCT_SECONDS = 0.5  # of repeated products, after a warm-up


def matmul_rate(device: torch.device, dtype: torch.dtype, rows: int, shape: Shape) -> float:
    """FLOP/s of products of `rows` hidden states with an MLP's weight, on random numbers."""
    left = torch.randn(rows, shape.d_model, device=device, dtype=dtype)
    right = torch.randn(shape.mlp_hidden_size, shape.d_model, device=device, dtype=dtype).t()  # as weights are stored
    out = torch.empty(rows, shape.mlp_hidden_size, device=device, dtype=dtype)
    once = timed(lambda: torch.mm(left, right, out=out), device)
    once = min(once, timed(lambda: torch.mm(left, right, out=out), device))
    times = max(3, round(PRODUCT_SECONDS / max(once, 1e-6)))
    wait(device)
    started = time.perf_counter()
    for _ in range(times):
        torch.mm(left, right, out=out)
    wait(device)
    return 2 * rows * shape.d_model * shape.mlp_hidden_size * times / (time.perf_counter() - started)


def work_of(items: Sequence[Item]) -> Work:
    """Tokens, masked tokens, and the length that attention costs are counted with: sum L^2 / sum L."""
    sequences = [sequence for item in items for sequence in item.sequences if len(sequence.draw.masked)]
    lengths = [sequence.tokens for sequence in sequences]
    masked = sum(len(sequence.draw.masked) for sequence in sequences)
    return Work(sum(lengths), masked, sum(n * n for n in lengths) / sum(lengths))


def micro_steps(items: Sequence[Item], token_budget: int) -> int:
    """How many forward passes `stream` makes of these items."""
    passes = 0
    for group in pack_items(items, token_budget):
        largest = items[group[0]]
        fits = largest.tokens <= token_budget
        passes += 1 if fits else sum(len(pack_sequence_runs(side, token_budget)) for side in largest.sides)
    return passes


def where_time_goes(work: Callable[[], object], device: torch.device) -> tuple[float, dict[str, float]]:
    """Seconds of one time, and the seconds of its kernels (on the CPU: operators) by kind."""
    kinds = [ProfilerActivity.CUDA] if device.type == "cuda" else [ProfilerActivity.CPU]
    with profile(activities=kinds, acc_events=True) as record:
        seconds = timed(work, device)
    found: dict[str, float] = {}
    own = DeviceType.CUDA if device.type == "cuda" else DeviceType.CPU
    for event in record.key_averages():
        if event.device_type != own:
            continue
        spent = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        kind = kernel_kind(event.key)
        found[kind] = found.get(kind, 0.0) + spent / 1e6
    return seconds, dict(sorted(found.items(), key=lambda entry: -entry[1]))


def kernel_kind(name: str, kinds: Mapping[str, str] | None = None) -> str:
    """What a kernel's or operator's name says that it does; "other" where no pattern knows it."""
    return next((kind for kind, pattern in (kinds or KINDS).items() if re.search(pattern, name)), OTHER)


OTHER = "other"
KINDS = {  # the first that matches counts
    "fused by the compiler": r"^triton_",
    "unpacking 4 bits": r"(?i)dequant|gemv_4bit|gemm_4bit",
    "attention": r"(?i)flash|fmha|attention|attn|softmax_warp",
    "matrix products": r"(?i)gemm|cutlass|nvjet|xmma|cublas|gemv|dot_kernel|::(mm|addmm|bmm|linear|matmul)\b|splitK",
    "norms": r"(?i)norm",
    "copies and casts": r"(?i)memcpy|memset|copy|cat_|::cat\b|CatArray|::to\b|convert",
    "lookups": r"(?i)index|gather|scatter|embedding",
    "element-wise and sums": r"(?i)elementwise|reduce_(kernel|forward|backward)|foreach|::(add|mul|sub|div|exp|silu)",
}
