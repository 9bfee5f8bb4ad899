"""What preparation did to every row: counts with reasons and examples, lengths, doubtful rows, decoded samples.

`ReportBuilder` collects while rows pass; `report_table` is the text for the terminal and `report_figure` the PNG.
Every row read is accounted for: read = bad + not sampled + dropped + kept (of which some were cut).
"""

from __future__ import annotations

import io
import sys
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from laddpo.preference.balance import label_lines
from laddpo.preference.encoding.encode import EncodedRow, TextEncoder
from laddpo.preference.judged import judged_lines
from laddpo.preference.onpolicy import sampling_lines
from laddpo.preference.reading.bad_rows import CODES, EXAMPLES, BadRow, BadRows
from laddpo.preference.reading.files import ReadLog
from laddpo.preference.reading.pair_counts import ranked_lines
from laddpo.preference.reading.splits import NO_SPLIT
from laddpo.processes import terminal

QUANTILES = {"min": 0.0, "p10": 0.1, "p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
SAMPLES = 3
SAMPLE_CHARACTERS = 1200
SCORED = ("⟦", "⟧")  # the text between them is scored: the response and its terminator
HISTOGRAM_BINS = 40
IMBALANCE = 20  # one response this many times longer than the other is worth a warning


class ReportBuilder:
    """Collects what report.json says."""

    def __init__(self, sides: Sequence[str], encoder: TextEncoder, log: ReadLog, bad: BadRows):
        self.sides, self._encoder, self._log, self.bad = tuple(sides), encoder, log, bad
        self.rows: Counter[str] = Counter(read=0, bad=0, not_sampled=0, dropped=0, cut=0, kept=0, train=0, validation=0)
        self.facts: dict[str, Any] = {}
        self._lengths = {name: array("i") for name in ("prompt", *self.sides)}
        self._dropped: dict[str, dict] = {}
        self._special_text: Counter[str] = Counter()
        self._cut: dict[str, Any] = {"rows": 0, "tokens": 0, "examples": []}
        self._samples: list[dict] = []
        self.labels: dict[str, dict[str, int]] = {}

    def drop(self, row: BadRow) -> None:
        """A usable row that a setting leaves out."""
        self.rows["dropped"] += 1
        entry = self._dropped.setdefault(row.code, {"count": 0, "meaning": CODES[row.code], "examples": []})
        entry["count"] += 1
        if len(entry["examples"]) < EXAMPLES:
            entry["examples"].append(str(row))

    def keep(self, row_id: str, place: str, split: str, row: EncodedRow, label: bool | None = None) -> None:
        """A row that is written; `label` of an unpaired one."""
        if label is not None:
            counts = self.labels.setdefault(split, {"desirable": 0, "undesirable": 0})
            counts["desirable" if label else "undesirable"] += 1
        self.rows["kept"] += 1
        self.rows[split] += 1
        for name, ids in zip(self._lengths, (row.prompt_ids, *row.response_ids), strict=True):
            self._lengths[name].append(len(ids))
        self._special_text.update(row.special_text)
        if row.cut_tokens:
            self.rows["cut"] += 1
            self._cut["tokens"] += row.cut_tokens
            if len(self._cut["examples"]) < EXAMPLES:
                self._cut["examples"].append(f"{place}: prompt cut by {row.cut_tokens:,} tokens")
        lengths = [len(ids) for ids in row.response_ids]
        if max(lengths) > IMBALANCE * min(lengths):
            self._log.warn(f"pairs with one response more than {IMBALANCE} times longer than the other")
        if len(self._samples) < SAMPLES:
            self._samples.append({"id": row_id, "place": place, **self.sample(row)})

    def dropped_examples(self) -> list[str]:
        """One example for each reason for which rows were dropped."""
        return [entry["examples"][0] for entry in self._dropped.values()]

    def sample(self, row: EncodedRow) -> dict[str, str]:
        """Each sequence decoded from its ids, the scored region between ⟦ and ⟧."""
        prompt = _shortened(self._encoder.decode(row.prompt_ids))
        return {
            side: prompt + SCORED[0] + _shortened(self._encoder.decode(ids)) + SCORED[1]
            for side, ids in zip(self.sides, row.response_ids, strict=True)
        }

    def finish(self) -> dict:
        """The content of report.json."""
        self.rows["bad"] = self.bad.total
        rows = dict(self.rows)
        accounted = rows["bad"] + rows["not_sampled"] + rows["dropped"] + rows["kept"]
        assert rows["read"] == accounted, f"{rows['read']} rows read, {accounted} accounted for"
        lengths = {name: np.frombuffer(values, dtype=np.int32) for name, values in self._lengths.items()}
        totals = [lengths["prompt"] + lengths[side] for side in self.sides]
        lengths["prompt + response"] = np.concatenate(totals)
        self._cut["rows"] = rows["cut"]
        return {
            "rows": rows,
            "bad": {
                code: {"count": count, "meaning": CODES[code], "examples": self.bad.examples[code]}
                for code, count in sorted(self.bad.counts.items())
            },
            "dropped": dict(sorted(self._dropped.items())),
            "cut": self._cut,
            "lengths": {name: _quantiles(values) for name, values in lengths.items()},
            "histograms": _histograms(lengths),
            "max_length": self._encoder.max_length,
            "special_token_text": dict(sorted(self._special_text.items())),
            "warnings": dict(sorted(self._log.warnings.items())),
            "files": self._log.files,
            "files_not_read": self._log.unread,
            "samples": self._samples,
            **({"labels": self.labels} if self.labels else {}),
            **self._log.facts,
            **self._log.pairs.facts(),
            **self.facts,
        }


def report_table(report: Mapping[str, Any]) -> str:
    """The report as a few lines for the terminal."""
    rows = report["rows"]
    lines = [
        f"{rows['read']:,} rows read = {rows['kept']:,} kept + {rows['bad']:,} bad + {rows['dropped']:,} dropped + "
        f"{rows['not_sampled']:,} not sampled; {rows['cut']:,} of the kept were cut",
        f"{rows['train']:,} for training, {rows['validation']:,} for validation, "
        + (f"{rows['test']:,} for the test, " if rows.get("test") else "")
        + f"from {report['prompts']:,} prompts",
    ]
    if "sampling" in report:
        facts = report["sampling"]
        lines += judged_lines(facts) if "judge" in facts else sampling_lines(facts)
    if "ranked" in report:
        lines += ranked_lines(report["ranked"])
    for title in ("bad", "dropped"):
        for code, entry in report[title].items():
            lines.append(f"  {title:8} {entry['count']:>8,}  {code} {entry['meaning']}; e.g. {entry['examples'][0]}")
    if rows["cut"]:
        cut = report["cut"]
        lines.append(f"  cut      {cut['rows']:>8,}  {cut['tokens']:,} prompt tokens in all; e.g. {cut['examples'][0]}")
    names = list(QUANTILES)
    header = ["  tokens of", "mean", *names]
    shown = [
        [f"  {name}", f"{values['mean']:.1f}", *(f"{values[quantile]:,}" for quantile in names)]
        for name, values in report["lengths"].items()
        if values
    ]
    wide = "\n".join(f"{first:<21}" + "".join(f"{cell:>8}" for cell in rest) for first, *rest in (header, *shown))
    narrow = [[f"  tokens of {first.strip()}", *rest] for first, *rest in shown]
    lines.append(wide if terminal.fits(wide) else terminal.stacked(header, narrow))
    lines += label_lines(report["labels"]) if "labels" in report else []
    facts = [
        ("duplicates", "rows that repeat another row"),
        ("contradictions", "rows whose preference another row reverses"),
    ]
    lines += [f"  note     {report[key]:>8,}  {meaning}" for key, meaning in facts if report.get(key)]
    lines += leak_lines(report.get("leaks", {}), report.get("leaks_unknown", {}))
    for token, count in report["special_token_text"].items():
        lines.append(f"  note     {count:>8,}  rows with the text {token}, encoded as plain text")
    return "\n".join(lines + note_lines(report))


def note_lines(report: Mapping[str, Any]) -> list[str]:
    """The counts of what reading and encoding found doubtful, and the files that were left alone."""
    notes = [f"  note     {count:>8,}  {message}" for message, count in report["warnings"].items()]
    return notes + unread_lines(report.get("files_not_read", {}))


def unread_lines(unread: Mapping[str, str]) -> list[str]:
    """One line for each split whose files were left alone, with their number and the first names."""
    by_split: dict[str, list[str]] = {}
    for path, split in unread.items():
        by_split.setdefault(split, []).append(path)
    return [
        f"  not read {len(paths):>8,}  files of {'split ' * (split != NO_SPLIT)}{split}: {', '.join(paths[:3])}"
        + (" …" if paths[3:] else "")
        for split, paths in by_split.items()
    ]


def leak_lines(counts: Mapping[str, int], unknown: Mapping[str, str]) -> list[str]:
    """A line for each evaluation set that shares prompts with the rows; none for the others."""
    lines = [
        f"  note     {count:>8,}  rows whose prompt is in {name}: do not report that score of a model trained on them"
        for name, count in counts.items()
        if count
    ]
    return lines + [f"  note            ?  rows whose prompt is in {name}: {why}" for name, why in unknown.items()]


def report_figure(report: Mapping[str, Any]) -> bytes:
    """The picture of a report as a PNG; without a byte, and with a note, where it cannot be drawn."""
    try:
        return _figure(report)
    except Exception as error:  # a broken font, say: the rows matter, not their picture
        print(f"note: the report has no picture ({type(error).__name__}: {error}).", file=sys.stderr)
        return b""


def _figure(report: Mapping[str, Any]) -> bytes:
    """One PNG: what became of the rows, and the lengths in tokens."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.6))
    names = ["kept", "cut", "dropped", "bad", "not_sampled"]
    counts = {**report["rows"], "kept": report["rows"]["kept"] - report["rows"]["cut"]}
    values = [counts[name] for name in names]
    labels = ["kept whole", "kept, prompt cut", "dropped", "bad", "not sampled"]
    bars = left.barh(labels[::-1], values[::-1], color=COLOURS[: len(names)][::-1])
    left.bar_label(bars, [f"{value:,}" for value in values[::-1]], padding=3)
    left.set_xlim(0, max(1, *values) * 1.25)
    left.xaxis.set_visible(False)  # the bars carry their numbers
    left.set_title(f"{report['rows']['read']:,} rows read")
    left.spines[["top", "right", "bottom"]].set_visible(False)
    left.tick_params(left=False)
    for name, (colour, dashes) in SERIES.items():
        histogram = report["histograms"].get(name, {"counts": []})
        if any(histogram["counts"]):
            style = {"color": colour, "linestyle": dashes, "linewidth": 1.6}
            right.stairs(histogram["counts"], histogram["edges"], label=name, **style)
    longest = report["histograms"]["prompt + response"]["edges"][-1]
    if report["max_length"] <= 1.3 * longest:
        right.axvline(report["max_length"], color="0.5", linestyle="--", linewidth=1, label="data.max_length")
    for axis in (right.xaxis, right.yaxis):
        axis.set_major_formatter("{x:,.0f}")
        axis.get_major_locator().set_params(integer=True)
    right.set_ylim(bottom=0)
    right.set_xlabel("tokens")
    right.set_ylabel("sequences")
    right.set_title(f"lengths of the kept rows; data.max_length is {report['max_length']:,}")
    right.spines[["top", "right"]].set_visible(False)
    if any(any(histogram["counts"]) for histogram in report["histograms"].values()):
        right.legend(frameon=False)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=110, metadata={"Software": None})
    return png.getvalue()


def _quantiles(values: np.ndarray) -> dict[str, float]:
    if not len(values):
        return {}
    found = np.quantile(values, list(QUANTILES.values()), method="inverted_cdf")
    return {"mean": round(float(values.mean()), 3), **{name: int(q) for name, q in zip(QUANTILES, found, strict=True)}}


def _histograms(lengths: Mapping[str, np.ndarray]) -> dict[str, dict[str, list]]:
    """Counts of every length over the same 40 or so bins, so that the series can be compared."""
    top = max((int(values.max()) for values in lengths.values() if len(values)), default=0) + 1
    width = -(-top // HISTOGRAM_BINS)
    edges = np.arange(0, top + width, width)
    counts = {name: np.histogram(values, bins=edges)[0].tolist() for name, values in lengths.items()}
    return {name: {"edges": edges.tolist(), "counts": values} for name, values in counts.items()}


def _shortened(text: str) -> str:
    if len(text) <= SAMPLE_CHARACTERS:
        return text
    half = SAMPLE_CHARACTERS // 2
    return f"{text[:half]} […{len(text) - 2 * half:,} characters…] {text[-half:]}"


SERIES = {  # dashed, so that equal lengths of chosen and rejected are both seen
    "prompt": ("#2a6f97", "-"),
    "chosen": ("#588157", "-"),
    "response": ("#588157", "-"),
    "completion": ("#588157", "-"),
    "rejected": ("#c1121f", "--"),
    "prompt + response": ("#8d99ae", "-"),
}
COLOURS = ("#2a6f97", "#e09f3e", "#8d99ae", "#c1121f", "#588157")
