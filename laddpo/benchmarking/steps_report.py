"""The parts of a real size as tables for people (Markdown) and records for programs (JSON)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from laddpo.benchmarking.rates import OTHER
from laddpo.benchmarking.twins import Trained
from laddpo.hardware.memory import GIB
from laddpo.results.tables import markdown

WHO = {
    "ours": "ours",
    "public_laddpo": "public_laddpo",
    "trl_like_full": "trl_like (full logits)",
    "trl_like_chunked": "trl_like (chunked logits)",
}
OPTIONS = {
    "gradient_checkpointing": "checkpointing",
    "offload_activations": "offload",
    "embeddings_on_cpu": "embeddings on the CPU",
    "compile": "compiled",
}
TF = 1e12


def cards_section(rows: Sequence[Mapping[str, Any]]) -> tuple[str, dict[str, Any]]:
    """Peak memory and speed of whole steps by card; and how far our peak moves with the number of draws."""
    cells = []
    for row in rows:
        setting = row["setting"]
        ran = not row["problem"]
        speed = f"{row['tokens'] / _median(row):,.0f}" if ran else ""
        peaks = [_gib(row[name]) for name in ("allocated", "reserved", "predicted")]
        cells.append(
            [_card(setting), describe(setting), str(setting["draws"]), *peaks, speed, "yes" if ran else row["problem"]]
        )
    header = ["tensors at most", "step", "n", "allocated GiB", "reserved GiB", "predicted GiB", "tokens/s", "ran"]
    growth = _growth(rows)
    lines = [
        f"- {name}: {most / least - 1:+.1%} from n = {fewest} to n = {largest} ({kind})"
        for name, kind, fewest, largest, least, most in growth
    ]
    said = "\n\nPeak over the number of draws:\n\n" + "\n".join(lines) if lines else ""
    names = ("setting", "kind", "fewest", "most", "bytes_fewest", "bytes_most")
    record = {"rows": list(rows), "growth": [dict(zip(names, entry, strict=True)) for entry in growth]}
    return markdown(header, cells) + said, record


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
                f"{row['tokens'] / _median(row):,.0f}",
                f"{speed / TF:.3g}",
                f"{speed / ceiling:.0%}",
                _gib(row["allocated"]),
            ]
        )
        kinds[name] = row
    header = ["", "tokens a micro-step", "tokens/s", "TFLOP/s", "of matrix products", "allocated GiB"]
    measured = ", ".join(f"{rate / TF:.3g} TFLOP/s at {rows} rows" for rows, rate in products.items())
    text = f"Matrix products alone: {measured}.\n\n{markdown(header, cells)}\n\n{_kinds_table(kinds)}"
    record = {"rows": list(rows), "matmul_flops_per_s": {str(n): rate for n, rate in products.items()}}
    return text, record


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


def agreement_section(
    differences: Mapping[str, Mapping[str, float]], at_start: Mapping[str, float]
) -> tuple[str, dict[str, Any]]:
    """Errors of scores, margins and gradients, and the largest margin of an untrained policy."""
    header = ["against", "nats a token, rms", "largest", "nats of a margin, rms", "gradient, relative"]
    names = ("nats_per_token_rms", "nats_per_token_largest", "margin_rms", "gradient_relative")
    rows = [[what, *[f"{found[name]:.2g}" for name in names]] for what, found in differences.items()]
    start = ", ".join(f"{name} {value:g}" for name, value in at_start.items())
    text = f"{markdown(header, rows)}\n\nLargest |policy - reference| of a draw before training: {start}."
    return text, {"differences": dict(differences), "margin_at_start": dict(at_start)}


def nano_section(found: Mapping[str, Trained]) -> tuple[str, dict[str, Any]]:
    """Two runs that differ by rounding alone: their losses step by step, and where they end."""
    (name, first), (other, second) = found.items()
    steps = min(len(first.losses), len(second.losses))
    gaps = np.abs(np.subtract(first.losses[:steps], second.losses[:steps]))
    apart = float((first.adapter - second.adapter).norm() / first.adapter.norm())
    record = {
        "compared": [name, other],
        "steps": steps,
        "first_loss_difference": float(gaps[0]),
        "largest_loss_difference": float(gaps.max()),
        "last_losses": [first.losses[-1], second.losses[-1]],
        "adapter_relative": apart,
        "losses": {name: first.losses, other: second.losses},
    }
    text = (
        f"{name} against {other}: losses differ by {gaps[0]:.1e} in the first step and by {gaps.max():.1e} at most; "
        f"the last are {first.losses[-1]:.6f} and {second.losses[-1]:.6f}. The adapters end {apart:.1e} apart, "
        "relative to their size."
    )
    return text, record


def describe(setting: Mapping[str, Any]) -> str:
    """A setting in words. Example: ours, nf4, 2,048 tokens, checkpointing"""
    parts = [WHO[setting["who"]], {"none": "unquantised"}.get(setting["quantization"], setting["quantization"])]
    parts += [f"{setting['token_budget']:,} tokens"] if setting["who"] == "ours" else []
    parts += [text for name, text in OPTIONS.items() if setting[name]]
    parts += [setting["optimizer"]] if setting["optimizer"] != "adamw" else []
    return ", ".join(parts)


def _growth(rows: Sequence[Mapping[str, Any]]) -> list[tuple]:
    """Settings of ours that were run with several numbers of draws: their least and most."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["setting"]["who"] == "ours" and not row["problem"]:
            groups.setdefault(f"{describe(row['setting'])}, {_card(row['setting'])}", []).append(row)
    found = []
    for name, members in groups.items():
        ordered = sorted(members, key=lambda row: row["setting"]["draws"])
        first, last = ordered[0], ordered[-1]
        if first["setting"]["draws"] == last["setting"]["draws"]:
            continue
        for kind in ("allocated", "reserved"):
            if first[kind]:
                draws = (first["setting"]["draws"], last["setting"]["draws"])
                found.append((name, kind, *draws, first[kind], last[kind]))
    return found


def _kinds_table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Share of the time by kind of kernel; what is left of it on a GPU is waiting for launches."""
    kinds = list(dict.fromkeys(kind for row in found.values() for kind in row["kinds"] if kind != OTHER))
    rows = []
    for name, row in found.items():
        whole = row["seconds_profiled"]
        shares = [row["kinds"].get(kind, 0.0) / whole for kind in [*kinds, OTHER]]
        rows.append([name, *[f"{share:.0%}" for share in shares], f"{max(0.0, 1 - sum(shares)):.0%}"])
    return markdown(["where the time goes", *kinds, OTHER, "nothing runs"], rows)


def _card(setting: Mapping[str, Any]) -> str:
    return "no cap" if setting["gib"] is None else f"{setting['gib']:g} GiB"


def _median(row: Mapping[str, Any]) -> float:
    return float(np.median(row["seconds"]))


def _gib(size: float | None) -> str:
    return "" if size is None else f"{size / GIB:.2f}" if size >= 0.01 * GIB else f"{size / GIB:.4f}"
