"""A benchmark in one short table, for documents: what stands in benchmark.json in the fewest figures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from laddpo.benchmarking.cards import describe, gib_text, median_seconds
from laddpo.results.tables import markdown

Lines = Iterator[tuple[str, str]]  # what, figure


def summary_table(record: Mapping[str, Any]) -> str:
    """The lines of all parts that have some; empty where none has."""
    lines = [line for name, lines_of in LINES.items() if name in record for line in lines_of(record[name])]
    return markdown(["measured", "figure"], lines) if lines else ""


def _cards(part: Mapping[str, Any]) -> Lines:
    for row in part.get("rows", ()):
        setting = row["setting"]
        cap = "without a cap" if setting["gib"] is None else f"under {setting['gib']:g} GiB"
        figure = row["problem"] or (
            f"{gib_text(row['allocated'])} GiB"
            + (f" ({gib_text(row['predicted'])} predicted)" if row["predicted"] else "")
            + f", {row['tokens'] / median_seconds(row):,.0f} tokens/s"
        )
        yield f"optimizer step {cap}, n = {setting['draws']}: {describe(setting)}", figure


def _rates(part: Mapping[str, Any]) -> Lines:
    products = part.get("matmul_flops_per_s") or {}
    if not products:
        return
    ceiling = max(products.values())
    yield "fastest matrix product", f"{ceiling / 1e12:.3g} TFLOP/s"
    for row in part["rows"]:
        if not row["problem"]:
            work = "reference pass" if row["setting"]["work"] == "reference" else "training"
            speed = f"{row['tokens'] / median_seconds(row):,.0f} tokens/s"
            yield f"{work}: {describe(row['setting'])}", f"{row['flops_per_s'] / ceiling:.0%} of it, {speed}"


def _speed(part: Mapping[str, Any]) -> Lines:
    for both, ratio in part["alike"].items():
        yield f"time of {ratio['rival']} over ours ({both})", _interval(ratio)
    for name in ("public_laddpo", "trl_like (full logits)"):
        if name in part["time_ratios"]:
            yield f"time of {name} over ours with a stored reference", _interval(part["time_ratios"][name])


def _long(part: Mapping[str, Any]) -> Lines:
    for length, found in part["lengths"].items():
        for both, ratio in found.items():
            yield f"answers of {length} tokens: time of {ratio['rival']} over ours ({both})", _interval(ratio)


def _sft(part: Mapping[str, Any]) -> Lines:
    yield "fine-tuning: time of a row at a time over ours", _interval(part["time_ratio"])


def _plan(part: Mapping[str, Any]) -> Lines:
    yield f"largest error of the memory plan in {len(part['rows'])} settings", f"{part['worst']:.1%}"


def _agreement(part: Mapping[str, Any]) -> Lines:
    for name, found in part["differences"].items():
        figure = f"{found['nats_per_token_rms']:.2g} nats a token, gradient off by {found['gradient_relative']:.1%}"
        yield f"4 bits, {name}", figure


def _nano(part: Mapping[str, Any]) -> Lines:
    what = f"{part['steps']} steps of llada_nano, {' against '.join(part['compared'])}: largest difference of a loss"
    yield what, f"{part['largest_loss_difference']:.1e}"


def _sampler(part: Mapping[str, Any]) -> Lines:
    for name, way in part["ways"].items():
        if name != part["compared_with"]:
            yield f"answering, {name}: speed over {part['compared_with']}", _interval(way["speedup"])


def _block(part: Mapping[str, Any]) -> Lines:
    for draws, layouts in part["draws"].items():
        for name, found in layouts.items():
            yield f"block diffusion, n = {draws}, {name}: time over ours", _interval(found["time_over_shared"])


def _interval(ratio: Mapping[str, float]) -> str:
    return f"{ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]"


LINES: dict[str, Callable[[Mapping[str, Any]], Lines]] = {
    "cards": _cards,
    "rates": _rates,
    "speed": _speed,
    "long": _long,
    "sft": _sft,
    "plan": _plan,
    "agreement": _agreement,
    "nano": _nano,
    "sampler": _sampler,
    "block": _block,
}
