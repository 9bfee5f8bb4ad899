"""The parts of the benchmark, and those about memory: peaks of a step, growth with the draws, plan against measured."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from laddpo.benchmarking import agreement, alike, block, cards, many, rates, speed, twins
from laddpo.benchmarking.contenders import Ours
from laddpo.benchmarking.measure import Peak, pass_peaks, predicted_and_measured, step_peak
from laddpo.benchmarking.speed import ONE_SEQUENCE
from laddpo.benchmarking.workload import Workbench, longest_sequence, pair_of_tokens
from laddpo.core.draws import ElboEstimator
from laddpo.core.tasks import pair_item
from laddpo.models.blocks import checkpoint_blocks
from laddpo.results.tables import markdown
from laddpo.settings.schema import QuantizationSettings

MIB = 2**20


def about(bench: Workbench) -> str:
    """What was measured on what."""
    wanted, shape, run, machine = bench.settings, bench.shape, bench.run, bench.machine
    weights = "random weights" if wanted.weights == "random" else f"weights of {run.model.name}"
    return " ".join(
        [
            f"{time.strftime('%Y-%m-%d')}, {machine.name}, {machine.precision}, torch {torch.__version__}.",
            f"Model: {weights}{_stored(run.quantization)}, width {shape.d_model}, {shape.n_layers} blocks,",
            f"MLP {shape.mlp_hidden_size}, vocabulary {shape.vocab_size};",
            f"LoRA r={run.adapter.r} on {run.adapter.target_modules}.",
            f"Pairs: random tokens; prompt + response log-normal with mean {wanted.mean:g} and 99th percentile",
            f"{wanted.p99:g}, prompt {wanted.prompt_mean:g}, at most {wanted.max_length}; {wanted.pairs} pairs a step.",
            "A step is forward and backward, without the optimizer unless stated. Peaks are counted on",
            "allocations.",
            "public_laddpo and trl_like are rewritten from their descriptions (laddpo/benchmarking/rivals.py).",
        ]
    )


def memory_part(bench: Workbench) -> tuple[str, dict]:
    """Peaks of all contenders on the longest of four pairs; ours also one sequence at a time, and checkpointed."""
    drawn = [bench.pairs(seed)[0] for seed in range(4)]
    opened, pairs = bench.open(), [max(drawn, key=lambda pair: longest_sequence([pair]))]
    one, small = longest_sequence(pairs), f"stream, {ONE_SEQUENCE}"
    stream = opened.contenders["stream"]
    lean = Ours(opened.model, stream.denoiser, "stream", one, label=small)
    peaks = [
        step_peak(contender, opened.model, pairs, draws)
        for contender in [lean, *opened.contenders.values()]
        for draws in bench.settings.memory_draws
    ]
    leaner = dataclasses.replace(lean, checkpointing=True, label=f"{small}, checkpointing")
    peaks += [step_peak(leaner, opened.model, pairs, draws) for draws in bench.settings.memory_draws]
    text, record = memory_section(peaks, small)
    return f"One pair, {_lengths_text(pairs[0])}.\n\n{text}", record


def memory_section(peaks: Sequence[Peak], ours: str) -> tuple[str, dict[str, Any]]:
    """Peaks by contender and number of draws, and how many times ours the others take at the most draws."""
    draws = sorted({peak.draws for peak in peaks})
    by_name: dict[str, dict[int, Peak]] = {}
    for peak in peaks:
        by_name.setdefault(peak.contender, {})[peak.draws] = peak
    least = by_name[ours][draws[-1]]
    rows = []
    for name, found in by_name.items():
        cells = [_mib(found[n].above) + f" ({_mib(found[n].total)})" if n in found else "" for n in draws]
        most = found.get(draws[-1])
        rows.append([name, *cells, f"{most.above / least.above:.1f}x" if most else ""])
    header = [
        "peak MiB above the policy's weights (total)",
        *[f"n = {n}" for n in draws],
        f"of ours at n = {draws[-1]}",
    ]
    record = {
        "peaks": [dataclasses.asdict(peak) for peak in peaks],
        "compared_with": ours,
        "ratios": {name: found[draws[-1]].above / least.above for name, found in by_name.items() if draws[-1] in found},
    }
    return markdown(header, rows), record


def flat_part(bench: Workbench) -> tuple[str, dict]:
    """Peaks of our passes from few to many draws, at a budget of one longest sequence and at the configured one."""
    wanted, opened = bench.settings, bench.open()
    denoiser = opened.contenders["stream"].denoiser
    tokens = max(16, wanted.token_budget // 8)  # so that 8 draws fill the configured budget
    pairs = [_pair_with_full_first_draw(tokens, bench.shape.vocab_size - 2)]
    budgets = {ONE_SEQUENCE: (tokens, 1), f"{wanted.token_budget} tokens": (wanted.token_budget, 8)}
    found = {
        name: {
            draws: pass_peaks(Ours(opened.model, denoiser, "stream", budget), pairs, draws)
            for draws in sorted({fewest, wanted.flat_draws})
        }
        for name, (budget, fewest) in budgets.items()
    }
    text, record = flat_section(found)
    about = f"One pair, {_lengths_text(pairs[0])}, whose first draw masks at least half of the response, so that the"
    return f"{about} head works on whole chunks of rows for every n.\n\n{text}", record


def flat_section(found: Mapping[str, Mapping[int, Mapping[str, int]]]) -> tuple[str, dict[str, Any]]:
    """Peaks of our passes over the number of draws, by token budget: {budget: {draws: {pass: bytes}}}."""
    rows, growth = [], {}
    draws = sorted({n for by_draws in found.values() for n in by_draws})
    for budget, by_draws in found.items():
        smallest = min(by_draws)
        for name in by_draws[smallest]:
            ratio = by_draws[draws[-1]][name] / by_draws[smallest][name]
            growth[f"{budget}, {name}"] = {"from": smallest, "to": draws[-1], "ratio": ratio}
            cells = [_mib(by_draws[n][name]) if n in by_draws else "" for n in draws]
            rows.append([f"{name}, {budget}", *cells, f"{ratio:.3f}x of n = {smallest}"])
    header = ["peak MiB of our passes", *[f"n = {n}" for n in draws], "growth"]
    return markdown(header, rows), {
        "peaks": {k: {str(n): v for n, v in d.items()} for k, d in found.items()},
        "growth": growth,
    }


def plan_part(bench: Workbench) -> tuple[str, dict]:
    """The memory plan against measured peaks, over rank, tokens and checkpointing."""
    rows = []
    for rank in bench.settings.plan_ranks:
        of_rank = bench.of_rank(rank)
        opened = of_rank.open()
        for checkpointing in (False, True):
            checkpoint_blocks(opened.model, checkpointing)
            setup = dataclasses.replace(of_rank.planned(), checkpointing=checkpointing)
            for tokens in bench.settings.plan_tokens:
                draws = max(1, tokens // 256)
                pair = pair_of_tokens(tokens // (2 * draws), bench.shape.vocab_size - 2, seed=tokens)
                found = predicted_and_measured(opened.contenders["stream"], setup, pair, draws)
                names = ("tokens", "predicted", "measured")
                rows.append({"rank": rank, "checkpointing": checkpointing, **dict(zip(names, found, strict=True))})
    return plan_section(rows)


def plan_section(rows: Sequence[Mapping[str, Any]]) -> tuple[str, dict[str, Any]]:
    """The plan against measured peaks."""
    cells = [
        [
            f"rank {row['rank']}, {row['tokens']} tokens{', checkpointing' if row['checkpointing'] else ''}",
            _mib(row["predicted"]),
            _mib(row["measured"]),
            f"{row['predicted'] / row['measured'] - 1:+.1%}",
        ]
        for row in rows
    ]
    worst = max(abs(row["predicted"] / row["measured"] - 1) for row in rows)
    return markdown(["one micro-step", "predicted MiB", "measured MiB", "error"], cells), {
        "rows": list(rows),
        "worst": worst,
    }


def _stored(stored: QuantizationSettings) -> str:
    kind = f"{stored.bnb_4bit_quant_type} " * stored.load_in_4bit or "int8 " * stored.load_in_8bit
    return f" stored in {kind.strip()} unless stated otherwise" if kind else ""


def _pair_with_full_first_draw(tokens: int, vocabulary: int):
    """A pair for which one draw is as much work as any of many: its first one masks half of the response or more."""
    for seed in range(1000):
        pair = pair_of_tokens(tokens, vocabulary, seed, prompt_share=0.1)
        item = pair_item(pair, ElboEstimator(diffusion_samples=1), range(1))
        if all(2 * len(side[0].draw.masked) >= len(side[0].response_ids) for side in item.sides):
            return pair
    raise AssertionError("half of all seeds have such a draw")


def _lengths_text(pair) -> str:
    lengths = [len(ids) for ids in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)]
    return "prompt {}, chosen {}, rejected {} tokens".format(*lengths)


def _mib(size: float) -> str:
    return f"{size / MIB:.1f}"


OF_ROWS = ("cards", "rates", "many")  # take limits.Rows too: one setting after the other
PARTS = {  # by name: its title, and what measures it
    "cards": ("What fits, and at what speed", cards.cards_part),
    "rates": ("Share of the matrix speed, and where the time goes", rates.rates_part),
    "agreement": ("What 4-bit weights change", agreement.agreement_part),
    "nano": ("Training on this device and on the CPU", twins.nano_part),
    "memory": ("Peak memory of one step", memory_part),
    "flat": ("Memory over the number of draws", flat_part),
    "plan": ("Predicted and measured memory", plan_part),
    "speed": ("Speed", speed.speed_part),
    "long": ("Speed on long answers", alike.long_part),
    "sft": ("Speed of fine-tuning", alike.sft_part),
    "sampler": ("Speed of answering", speed.sampler_part),
    "block": ("Block diffusion: one clean context for all draws", block.block_part),
    "many": ("Many pairs", many.many_part),
}
