"""How much of the device's matrix speed is reached, in floating-point operations that had to be done.

Operations are counted on the tokens given (hardware/speed.py): recomputed activations, padding and unpacked weights are
overhead. The speed of matrix products is measured in the same run, on the model's own shapes.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from laddpo.benchmarking.cards import TIMES, Shelf, contender_of, describe, gib_text, median_seconds
from laddpo.benchmarking.limits import Rows
from laddpo.benchmarking.measure import Measured, measure, timed
from laddpo.benchmarking.workload import Workbench
from laddpo.core.gradient import Item, pack_items, pack_sequence_runs
from laddpo.hardware.memory import Shape
from laddpo.hardware.speed import Device, Work, forward_flops, predicted_tokens_per_s, training_passes
from laddpo.results.tables import markdown
from laddpo.settings.schema import StepSetting

MICRO_STEPS = 3  # that a step fills
PRODUCT_SECONDS = 0.5  # of repeated products, after a warm-up
TF = 1e12
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


def rates_part(bench: Workbench, kept: Rows) -> tuple[str, dict]:
    """Packed micro-steps of dialogue lengths: operations per second against matrix products, and kernels by kind."""
    wanted, shelf = bench.settings, Shelf()
    budgets = sorted({setting.token_budget for setting in wanted.rates})
    machine, shape = bench.machine, bench.setup_of(StepSetting()).shape
    products = {tokens: matmul_rate(machine.device, machine.dtype, tokens, shape) for tokens in budgets}
    ceiling = max(products.values())
    rows = kept.measured(wanted.rates, lambda setting: rate_of(bench, shelf, setting))
    text, record = rates_section(rows, products, ceiling)
    about = (
        f"Pairs of dialogue lengths, packed; {MICRO_STEPS} micro-steps or more, gradients without the optimizer. "
        "Counted are the operations that had to be done: no recomputation, no padding, no unpacking of weights."
    )
    predicted, record["predictions"] = _predictions(bench, rows, ceiling)
    return f"{about}\n\n{text}{predicted}", record


def rate_of(bench: Workbench, shelf: Shelf, setting: StepSetting) -> dict:
    """One setting's time, operations per second, peak, and kernels by kind."""
    model, is_training = shelf.get(bench, setting), setting.work == "train"
    ours = contender_of(bench.settings, model, setting)
    pairs = _pairs_of_tokens(bench, MICRO_STEPS * setting.token_budget, setting.draws)
    items = ours.items(pairs, setting.draws)
    ours.stored[ours.key(pairs, setting.draws)] = np.zeros((len(pairs), 2, setting.draws))

    def work() -> None:
        if not is_training:
            ours.reference(items)
            return
        ours.step(pairs, setting.draws)
        model.zero_grad(set_to_none=True)

    counted = work_of(items)
    found = _unless_uncompiled(lambda: measure(work, model, bench.machine.device, TIMES, setting.gib), setting)
    flops = forward_flops(bench.setup_of(setting), counted) * (2 if is_training else 1)
    row = dataclasses.asdict(found)
    row |= {"tokens": counted.tokens, "useful_flops": flops}
    row["micro_steps"] = micro_steps(items, setting.token_budget)
    if not found.problem:
        row["flops_per_s"] = flops / found.median
        row["seconds_profiled"], row["kinds"] = where_time_goes(work, bench.machine.device)
    return row


def rates_section(
    rows: Sequence[Mapping[str, Any]], products: Mapping[int, float], ceiling: float
) -> tuple[str, dict[str, Any]]:
    """Operations per second against the fastest matrix product; then the share of time by kind of kernel."""
    cells, kinds = [], {}
    for row in rows:
        setting = row["setting"]
        name = f"{describe(setting)}, {'reference pass' if setting['work'] == 'reference' else 'training'}"
        if row["problem"]:
            cells.append([name, "", "", row["problem"], "", ""])
            continue
        speed = row["flops_per_s"]
        cells.append(
            [
                name,
                f"{row['tokens'] / row['micro_steps']:,.0f}",
                f"{row['tokens'] / median_seconds(row):,.0f}",
                f"{speed / TF:.3g}",
                f"{speed / ceiling:.0%}",
                gib_text(row["allocated"]),
            ]
        )
        kinds[name] = row
    header = ["", "tokens a micro-step", "tokens/s", "TFLOP/s", "of matrix products", "allocated GiB"]
    measured = ", ".join(f"{rate / TF:.3g} TFLOP/s at {rows} rows" for rows, rate in products.items())
    text = f"Matrix products alone: {measured}.\n\n{markdown(header, cells)}\n\n{_kinds_table(kinds)}"
    record = {"rows": list(rows), "matmul_flops_per_s": {str(n): rate for n, rate in products.items()}}
    return text, record


def _kinds_table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Share of the time by kind of kernel; what is left of it on a GPU is waiting for launches."""
    kinds = list(dict.fromkeys(kind for row in found.values() for kind in row["kinds"] if kind != OTHER))
    rows = []
    for name, row in found.items():
        whole = row["seconds_profiled"]
        shares = [row["kinds"].get(kind, 0.0) / whole for kind in [*kinds, OTHER]]
        rows.append([name, *[f"{share:.0%}" for share in shares], f"{max(0.0, 1 - sum(shares)):.0%}"])
    return markdown(["where the time goes", *kinds, OTHER, "nothing runs"], rows)


def _pairs_of_tokens(bench: Workbench, tokens: int, draws: int) -> list:
    """The first random pairs that have so many tokens under all draws, and no fewer than two."""
    pairs, total = [], 0
    for pair in bench.dialogues(max(2, 2 * tokens // 64), 7, bench.settings.shape.vocab_size):
        pairs.append(pair)
        total += draws * (2 * len(pair.prompt_ids) + len(pair.chosen_ids) + len(pair.rejected_ids))
        if total >= tokens and len(pairs) >= 2:
            break
    return pairs


def _predictions(bench: Workbench, rows: Sequence[dict], ceiling: float) -> tuple[str, list[dict]]:
    """Tokens per second on other cards, from the share of the matrix speed that training reached on this one."""
    training = [row for row in rows if row["setting"]["work"] == "train" and not row["problem"]]
    plain = [row for row in training if row["setting"]["quantization"] == "none"]
    if not (plain and bench.settings.predicted):
        return "", []
    found = []
    for card in bench.settings.predicted:
        for row in training:
            setting = StepSetting(**row["setting"])
            if setting.quantization == "none":
                continue
            alike = [other for other in plain if other["setting"]["compile"] == setting.compile]
            if not alike:
                continue
            near = min(alike, key=lambda other: _distance(other["setting"], row["setting"]))
            passes = training_passes(bench.setup_of(StepSetting(**near["setting"])))
            share = near["flops_per_s"] / ceiling * passes / 2  # of operations done, recomputed ones too
            setup = bench.setup_of(setting)
            speed = predicted_tokens_per_s(
                setup,
                row["useful_flops"] / 2 / row["tokens"],
                row["tokens"] / row["micro_steps"],
                Device(card.tflops * share, card.memory_gb_per_s),
            )
            found.append({"card": card.name, "setting": row["setting"], "share": share, "tokens_per_s": speed})
    return predictions_section(found, [dataclasses.asdict(card) for card in bench.settings.predicted]), found


def predictions_section(found: Sequence[Mapping[str, Any]], cards: Sequence[Mapping[str, Any]]) -> str:
    """Tokens per second on cards that were not there, and how that was reckoned."""
    rows = [
        [entry["card"], describe(entry["setting"]), f"{entry['share']:.0%}", f"{entry['tokens_per_s']:,.0f}"]
        for entry in found
    ]
    sheets = "; ".join(f"{c['name']} {c['tflops']:g} TFLOP/s and {c['memory_gb_per_s']:g} GB/s" for c in cards)
    table = markdown(["predicted, not measured", "step", "share of matrix speed taken over", "tokens/s"], rows)
    return (
        f"\n\n{table}\n\nReckoned, for a micro-step: its operations, recomputed ones too, at the share of the "
        "datasheet's matrix speed that unquantised weights reached here with the nearest micro-step; and 2.5 bytes a "
        f"weight and pass at the datasheet's bandwidth, for unpacking. Datasheets: {sheets}."
    )


def _distance(other: dict, setting: dict) -> tuple[bool, int]:
    """How unlike two settings are: the nearest measured one is used for a prediction."""
    name = "gradient_checkpointing"
    return other[name] != setting[name], abs(other["token_budget"] - setting["token_budget"])


def _unless_uncompiled(work: Callable[[], Measured], setting: StepSetting) -> Measured:
    """What the work gives; where the compiler fails (it needs a C compiler, say), its reason as the problem."""
    try:
        return work()
    except RuntimeError as error:
        if not setting.compile:
            raise
        return Measured(problem=f"not compiled: {str(error).strip().partition(chr(10))[0]}")


def matmul_rate(device: torch.device, dtype: torch.dtype, rows: int, shape: Shape) -> float:
    """FLOP/s of products of `rows` hidden states with an MLP's weight, on random numbers."""
    left = torch.randn(rows, shape.d_model, device=device, dtype=dtype)
    right = torch.randn(shape.mlp_hidden_size, shape.d_model, device=device, dtype=dtype).t()  # as weights are stored
    out = torch.empty(rows, shape.mlp_hidden_size, device=device, dtype=dtype)

    def multiply(times: int) -> float:
        return timed(lambda: [torch.mm(left, right, out=out) for _ in range(times)], device)[0]

    once = min(multiply(1), multiply(1))
    times = max(3, round(PRODUCT_SECONDS / max(once, 1e-6)))
    return 2 * rows * shape.d_model * shape.mlp_hidden_size * times / multiply(times)


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
        seconds, _ = timed(work, device)
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
