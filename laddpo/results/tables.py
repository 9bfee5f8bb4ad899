"""Tables for the terminal and for Markdown: base against tuned, a sweep sorted by its metric, answers side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from laddpo.errors import visible
from laddpo.processes import terminal
from laddpo.results.sweeps import SweepCell, SweepTable, number_text

Record = Mapping[str, Any]

WIN_RATE = "win_rate"  # name of the result of a judge
FEW_PAIRS = 30  # below which the figures of a table say little
MARKS = {True: "✓", False: "✗", None: " "}  # None: nobody knows whether the answer is right
EXAMPLE_CHARACTERS = 600  # of one text in the side-by-side examples


def before_after_table(results: Mapping[str, Any]) -> str:
    """The table printed after an evaluation, one line per entry of results.json that has base and tuned.

    Shares between 0 and 1 are printed in percent and their difference in points. An interval that holds 0 says so, as
    does one that is not known (None).
    """
    return aligned(*before_after_rows(results))


def before_after_rows(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of that table, for other forms of it."""
    rows = [_before_after_row(name, entry) for name, entry in results.items() if _is_comparison(entry)]
    header = ["", "base", "tuned", "difference", "95% interval", "items", ""]
    if not any(row[-1] for row in rows):
        header, rows = header[:-1], [row[:-1] for row in rows]
    return header, rows


def notes_of(results: Mapping[str, Any]) -> list[str]:
    """What stands below that table: how both models answered, what the pairs are, who judged."""
    return [note for note in (answers_note(results), held_out_note(results), judged_note(results)) if note]


def answers_note(results: Mapping[str, Any]) -> str:
    """How answers were made, the same way for both models; empty if none were, or results.json does not say."""
    tasks = [entry["task"] for entry in results.values() if isinstance(entry, Mapping) and "task" in entry]
    ways = dict.fromkeys(visible(task["decoding"]) for task in tasks if "decoding" in task)
    return f"Both models answered with {'; with '.join(ways)}." if ways else ""


def held_out_note(results: Mapping[str, Any]) -> str:
    """What the pairs of a result are, in a sentence or two; empty if results.json does not say."""
    facts = results.get("held_out")
    if not facts:
        return ""
    unit = facts.get("unit", "pair")
    pairs = f"{facts['pairs']:,} {facts['split']} {unit}{'s' * (facts['pairs'] != 1)}"
    prompts = f"{facts['prompts']:,} prompt{'s' * (facts['prompts'] != 1)}"
    said = f"Measured on {pairs} of {prompts}. Neither training nor the choice of the checkpoint saw them."
    if facts["chose_checkpoint"]:
        said = f"Measured on {pairs} of {prompts}, which chose the checkpoint: on new {unit}s expect less. "
        said += f"Hold {unit}s out for a test with data.test_fraction=0.1."
    if facts["ties"]:
        said += f" {facts['ties']:,} of them tie with the base: a tie is no win and counts half."
    return said + (f" So few {unit}s give coarse figures." if facts["pairs"] < FEW_PAIRS else "")


def judged_note(results: Mapping[str, Any]) -> str:
    """How the tuned model's answers fared against the base's, in a sentence or two; empty if nobody judged them."""
    facts = results.get(WIN_RATE)
    if not facts:
        return ""
    said = f"The tuned model won {facts['wins']:,}, tied {facts['ties']:,} and lost {facts['losses']:,} prompts"
    said += f" ({judge_text(facts['judge'])})."
    if unjudged := sum(facts["unjudged"].values()):
        why = ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in facts["unjudged"].items() if count)
        said += f" {unjudged:,} have no verdict and do not count ({why})."
    if facts["longer_won"] is not None:
        lengths = facts["mean_characters"]
        said += f" The longer answer won {facts['longer_won']:.0%} of the decided prompts; answers have "
        said += f"{lengths['base']:.0f} (base) and {lengths['tuned']:.0f} (tuned) characters on average."
    return said


def judge_text(judge: Mapping[str, Any]) -> str:
    """A judge in a few words, from what results.json says of it."""
    name = judge.get("rule") or judge.get("model", "")
    return f"judge: {judge['judge'].replace('_', ' ')} {visible(str(name))}".strip()


def is_share(name: str, entry: Mapping[str, Any]) -> bool:
    """Whether an entry of results.json is a share of items (shown in percent) rather than a number of another kind."""
    is_inside = all(0 <= entry.get(key, -1) <= 1 for key in ("base", "tuned"))
    return is_inside and any(word in name for word in ("match", "accuracy", "accuracies", "rate", "share"))


def is_tied(name: str, results: Mapping[str, Any]) -> bool:
    """Whether the base's reward accuracy is ties alone: as its own reference it has margin 0 on every pair, which
    counts one half. Nor can it win against itself. That is no measured result."""
    entry = results[name]
    if name == WIN_RATE:
        return True
    if not name.startswith("reward_accuracy") or entry.get("base") != 0.5:
        return False
    margin = results.get("reward_margin")
    return entry.get("base_interval") == [0.5, 0.5] or (isinstance(margin, Mapping) and margin.get("base") == 0)


def sweep_markdown(table: SweepTable) -> str:
    """A sweep as a Markdown table of what is ranked, best first; then a tie of the best, and the jobs that are not
    ranked."""
    header, rows = sweep_rows(table)
    blocks = [markdown(header, rows) if rows else f"No finished job has {table.metric}."]
    if table.tie_text:
        blocks.append(f"{table.tie_text}.")
    if table.unranked:
        blocks += ["Not ranked:", markdown(*unranked_rows(table))]
    return "\n\n".join(blocks)


def examples_text(base: Sequence[Mapping[str, Any]], tuned: Sequence[Mapping[str, Any]], count: int = 8) -> str:
    """Answers of base and tuned to the same items, those on which they differ in rightness first.

    Both take the records of `run_task`; items that only one of them has are left out.
    """
    blocks = []
    for before, after in example_pairs(base, tuned, count):
        lines = [f"prompt  {shortened(before['prompt'])}"]
        if before["correct"] is not None:
            lines.append(f"gold    {visible(str(before['answer']))}")
        for name, record in (("base ", before), ("tuned", after)):
            lines.append(f"{name} {MARKS[record['correct']]} {shortened(record['text'])}")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def example_pairs(base: Sequence[Record], tuned: Sequence[Record], count: int) -> list[tuple[Record, Record]]:
    """Records of base and tuned for the same items, those that differ in rightness first, else in the items' order."""
    tuned_by_id = {record["id"]: record for record in tuned}
    both = [(record, tuned_by_id[record["id"]]) for record in base if record["id"] in tuned_by_id]
    return sorted(both, key=lambda pair: pair[0]["correct"] == pair[1]["correct"])[:count]


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns of text, the first to the left and the others to the right, under a ruled header. A terminal that is too
    narrow for them gets each row in lines of its own."""
    table = [[visible(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[column]) for row in table) for column in range(len(header))]

    def line(row: Sequence[str]) -> str:
        first, *others = zip(row, widths, strict=True)
        cells = [first[0].ljust(first[1]), *[cell.rjust(width) for cell, width in others]]
        return "  ".join(cells).rstrip()

    rule = "─" * (sum(widths) + 2 * (len(widths) - 1))
    shown = "\n".join([line(table[0]), rule, *map(line, table[1:])])
    return shown if terminal.fits(shown) else terminal.stacked(table[0], table[1:])


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The same as a Markdown table; what would end a cell, or be HTML, is escaped."""

    def line(cells: Sequence[str]) -> str:
        plain = (visible(" ".join(cell.splitlines())).replace("|", "\\|").replace("<", "&lt;") for cell in cells)
        return "| " + " | ".join(plain) + " |"

    marks = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join([line(header), "|" + "|".join(marks) + "|", *[line(row) for row in rows]])


def points_text(difference: float, low: float, high: float) -> str:
    """A difference of shares with its interval, in points. Example: +1.7 [+0.3, +3.0]"""
    return f"{100 * difference:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


def _is_comparison(entry: Any) -> bool:
    return isinstance(entry, Mapping) and "base" in entry and "tuned" in entry


def _before_after_row(name: str, entry: Mapping[str, Any]) -> list[str]:
    base, tuned = entry["base"], entry["tuned"]
    if is_share(name, entry):
        show, signed, unit = "{:.1%}".format, lambda value: f"{100 * value:+.1f}", " points"
    else:
        show, signed, unit = "{:.3f}".format, "{:+.3f}".format, ""
    difference = entry.get("difference", tuned - base)
    interval, note = "", ""
    if "interval" in entry and entry["interval"] is None:
        interval, note = "–", "interval unknown"
    elif "interval" in entry:
        low, high = entry["interval"]
        interval = f"[{signed(low)}, {signed(high)}]"
        note = "interval holds 0" if low <= 0 <= high else ""
    items = str(entry["items"]) if "items" in entry else ""
    return [name.replace("_", " "), show(base), show(tuned), signed(difference) + unit, interval, items, note]


def sweep_rows(table: SweepTable) -> tuple[list[str], list[list[str]]]:
    """Header and rows of what is ranked in a sweep, best first."""
    header = [*(table.keys or ("job",)), table.metric, "interval", "runs"]
    return header, [_sweep_row(cell) for cell in table.sorted_cells() if cell.mean is not None]


def unranked_rows(table: SweepTable) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the jobs that are not ranked: how they ended, and what they measured during training."""
    header = ["job", *table.keys, "state", "measured so far"]
    rows = []
    for job in table.unranked:
        settings = (str(job.overrides.get(key, "default")) for key in table.keys)
        rows.append([job.folder or "-", *settings, job.state or "no value", job.measured or "-"])
    return header, rows


def _sweep_row(cell: SweepCell) -> list[str]:
    ranked = [job for job in cell.jobs if job.is_ranked]
    interval = "–" if cell.interval is None else "[{}, {}]".format(*map(number_text, cell.interval))
    runs = f"{len(ranked)}" if len(ranked) == len(cell.jobs) else f"{len(ranked)} of {len(cell.jobs)}"
    return [*(map(number_text, cell.values) if cell.values else ["default"]), number_text(cell.mean), interval, runs]


def shortened(text: str) -> str:
    """One paragraph, cut at EXAMPLE_CHARACTERS; line breaks are indented under the label, control characters shown."""
    cut = text if len(text) <= EXAMPLE_CHARACTERS else text[:EXAMPLE_CHARACTERS] + f" … ({len(text)} characters)"
    return visible(cut.strip()).replace("\n", "\n        ")
