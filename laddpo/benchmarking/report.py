"""The benchmark as a table for people (Markdown) and a record for programs (JSON)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from laddpo.benchmarking.decoding import Decoded
from laddpo.benchmarking.measure import Peak, Ratio, median_ratio
from laddpo.results.stats import compare
from laddpo.results.tables import markdown

MIB = 2**20


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
        "peaks": [asdict(peak) for peak in peaks],
        "compared_with": ours,
        "ratios": {name: found[draws[-1]].above / least.above for name, found in by_name.items() if draws[-1] in found},
    }
    return markdown(header, rows), record


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


def speed_section(
    rates: Mapping[str, float], ratios: Mapping[str, Ratio], processor: Mapping[str, Ratio], ours: str
) -> tuple[str, dict[str, Any]]:
    """Pairs per second, and the time of each contender over ours on the same pairs."""
    rows = [
        [name, f"{rate:.3g}", _ratio(ratios.get(name)), _ratio(processor.get(name))] for name, rate in rates.items()
    ]
    header = ["", "pairs/s", f"time over {ours}", "processor time over it"]
    record = {
        "pairs_per_s": dict(rates),
        "compared_with": ours,
        "time_ratios": {name: asdict(ratio) for name, ratio in ratios.items()},
        "processor_time_ratios": {name: asdict(ratio) for name, ratio in processor.items()},
    }
    return markdown(header, rows), record


def causes_section(seconds: Mapping[str, np.ndarray], rng: np.random.Generator) -> tuple[str, dict[str, Any]]:
    """How much faster every step of the way from the public project to ours is, from rounds of the same pairs."""
    lines, record = [], {}
    for slower, faster, what in CAUSES:
        if slower in seconds and faster in seconds:
            ratio = median_ratio(seconds[slower], seconds[faster], rng)
            record[what] = {"slower": slower, "faster": faster, **asdict(ratio)}
            lines.append([what, slower, faster, _ratio(ratio)])
    return markdown(["by what ours is faster", "from", "to", "times"], lines), record


def sampler_section(
    found: Mapping[str, Decoded], plain: str, grade: Callable | None, rng: np.random.Generator
) -> tuple[str, dict[str, Any]]:
    """Answers per second and, with `grade`, how many are right: against the plain way, on the same questions."""
    header = ["", "answers/s", "tokens/s", f"times {plain}", "exact match", f"difference to {plain}"]
    rows, record = [], {}
    right = {name: grade(decoded.answers) for name, decoded in found.items()} if grade else {}
    for name, decoded in found.items():
        total = float(decoded.seconds.sum())
        speedup = median_ratio(found[plain].seconds, decoded.seconds, rng)
        entry: dict[str, Any] = {
            "answers_per_s": len(decoded.answers) / total,
            "tokens_per_s": decoded.tokens / total,
            "speedup": asdict(speedup),
        }
        if right:
            entry["exact_match"] = compare(right[plain], right[name], rng, is_share=True)
        record[name] = entry
        rows.append(
            [
                name,
                f"{entry['answers_per_s']:.3g}",
                f"{entry['tokens_per_s']:.3g}",
                _ratio(None if name == plain else speedup),
                *_exact_match(entry.get("exact_match"), name == plain),
            ]
        )
    columns = len(header) if right else len(header) - 2
    return markdown(header[:columns], [row[:columns] for row in rows]), {"compared_with": plain, "ways": record}


def _exact_match(entry: Mapping[str, Any] | None, is_plain: bool) -> tuple[str, str]:
    if entry is None:
        return "", ""
    low, high = (f"{100 * bound:+.1f}" for bound in entry["interval"])
    return f"{entry['tuned']:.1%}", "" if is_plain else f"{100 * entry['difference']:+.1f} points [{low}, {high}]"


def _ratio(ratio: Ratio | None) -> str:
    return "1" if ratio is None else f"{ratio.median:.2f}x [{ratio.low:.2f}, {ratio.high:.2f}]"


def _mib(size: float) -> str:
    return f"{size / MIB:.1f}"


CAUSES = (  # slower, faster, what the second does that the first does not
    ("public_laddpo", "trl_like (full logits)", "rows in one batch, padded to the pair's longest alone"),
    ("trl_like (full logits)", "trl_like (chunked logits)", "the head on scored rows alone"),
    ("trl_like (chunked logits)", "stream with reference pass", "packing without padding, streamed"),
    ("stream with reference pass", "stream", "the reference from the store"),
    ("stream, checkpointing", "stream", "no recomputation"),
    ("stream, one sequence at a time", "stream", "many sequences in a micro-step"),
)
