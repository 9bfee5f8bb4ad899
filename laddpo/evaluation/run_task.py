"""Prompts of a task go to a generate function, its texts are graded, and one record per item is kept.

`run_task` appends each item's record to items.jsonl at once and continues an interrupted run: an item whose record
has the same fingerprint (prompt, answer, model, sampler) is not generated again, unless its line is damaged.
`CheckedLines.finish` ends the file. Models are not imported here; `generate` is any callable from a list of prompts to
a list of texts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from laddpo.preference.reading.pairs import Prompt, prompt_rows
from laddpo.problems.tasks import Item, Task
from laddpo.processes.progress import Progress
from laddpo.processes.ranks import ALONE, Ranks
from laddpo.storage.json_lines import JsonLines
from laddpo.storage.manifests import fingerprint
from laddpo.storage.run_outputs import SilentLines
from laddpo.storage.seals import CheckedLines


@dataclass(frozen=True)
class Answer:
    """A generated text; `tokens` before its stop token, and whether it has one (None: not known)."""

    text: str
    tokens: int | None = None
    stopped: bool | None = None


Generate = Callable[[list[Prompt]], "list[str] | list[Answer]"]


class SharedAnswers(Protocol):
    """Answers to all items by one model, which several runs use. `prints`: a fingerprint of each item, by its id."""

    @property
    def may_keep(self) -> bool:
        """Whether what this process answered may be stored for others."""

    def read(self, prints: Mapping[str, str]) -> dict[str, Answer]:
        """The stored answers, by item id."""

    def keep(self, prints: Mapping[str, str], answers: Mapping[str, Answer]) -> None:
        """Store the answers to all items."""


def run_task(
    generate: Generate,
    task: Task,
    *,
    batch_size: int,
    items_path: Path | None,
    fields: Mapping[str, Any],
    labels: Mapping[str, str] | None = None,
    show_progress: bool | None = None,
    say: Callable[[str], None] = print,
    ranks: Ranks = ALONE,
    kept: SharedAnswers | None = None,
) -> list[dict[str, Any]]:
    """One record per item, in the order of `task.items`; those already in `items_path` are taken from there. None:
    nothing is written, and all are generated. Answers that `kept` has are graded and taken, too. It gets all answers at
    the end if this run made them and every rank may keep its own.

    `fields` are what a text depends on beside its prompt (weights, adapter, sampler settings). `labels` (for example
    {"model": "tuned"}) are written into each record and let several runs share one file: only records with the same
    task and labels are looked at, and of these the ones with another fingerprint are dropped, with a line saying so.

    Several ranks take one batch each at a time; rank 0 grades and writes, in the order of one process, and all return
    all records. `generate` is then called by every rank every time, without prompts where no batch is left.

    Batches are the same whatever was done before: one with a missing item is generated whole, so an interrupted run
    gives the texts of an uninterrupted one even where a text depends slightly on its batch, unless memory runs out and
    a batch is answered in parts. `show_progress` None shows the bar on a terminal only.
    """
    labels = {"task": task.name, **(labels or {})}
    prints = {item.id: fingerprint(_item_fields(item, fields)) for item in task.items}
    assert len(prints) == len(task.items), f"task {task.name}: {len(task.items) - len(prints)} items share an id"
    log = CheckedLines(items_path, say) if items_path else SilentLines()
    done, stale = _take_finished(log, labels, prints) if ranks.is_main else ({}, 0)
    if stale:
        say(f"{items_path}: {stale} items of {labels} are of other settings or another model and are generated again")
    if done:
        say(f"{task.name}: {len(done)} of {len(task.items)} items are already in {items_path}")
    had_records, kept_before = bool(done), {}
    try:
        regrade = [record for record in done.values() if record["grader"] != task.grader.name]
        verdicts = task.grader.grade_all([r["text"] for r in regrade], [r["answer"] for r in regrade])
        for record, is_correct in zip(regrade, verdicts, strict=True):
            record.update(correct=is_correct, grader=task.grader.name)
        if regrade:
            log.rewrite(lambda record: done[record["id"]] if _is_of(record, labels, prints) else record)
        if kept and ranks.is_main and len(done) < len(task.items):
            kept_before = kept.read(prints)
            _take_kept(kept_before, task, log, labels, prints, done, say)
        done, is_shown = ranks.broadcast(done), show_progress if ranks.is_main else False
        _run_batches(generate, task, batch_size, log, labels, prints, done, is_shown, ranks)
        records = [done[item.id] for item in task.items]
        may_keep = kept is not None and not ranks.any(not kept.may_keep)
        if ranks.is_main:
            log.sync()
            # records of an earlier part of this evaluation may come from another machine
            if may_keep and not had_records and len(kept_before) < len(records):
                kept.keep(prints, {record["id"]: _answer_of(record) for record in records})
    finally:
        task.grader.close()
    return records


def _run_batches(generate, task, batch_size, log, labels, prints, done, show_progress, ranks) -> None:
    """Generate and grade every batch with a missing item, one on each rank at a time; adds to `done` and to the log."""
    batches = [task.items[start : start + batch_size] for start in range(0, len(task.items), batch_size)]
    batches = [batch for batch in batches if any(item.id not in done for item in batch)]
    bar = Progress(
        total=len(task.items), initial=len(done), desc=_title(labels), unit="item", disable=_hidden(show_progress)
    )
    with bar:
        for start in range(0, len(batches), ranks.world):
            together = batches[start : start + ranks.world]
            own = together[ranks.rank] if ranks.rank < len(together) else []
            given = ranks.gather([asdict(as_answer(answer)) for answer in generate([item.prompt for item in own])])
            records: list[dict[str, Any]] = []
            if ranks.is_main:
                for batch, answers in zip(together, given, strict=False):  # ranks without a batch gave nothing
                    records += _graded(task, batch, [Answer(**a) for a in answers], labels, prints, done)
                for record in records:
                    log.append(record)
            records = ranks.broadcast(records)
            done.update((record["id"], record) for record in records)
            bar.update(len(records))
            if graded := [record["correct"] for record in done.values() if record["correct"] is not None]:
                bar.set_postfix_str(f"right {sum(graded) / len(graded):.1%}")


def _take_kept(found, task, log, labels, prints, done, say) -> None:
    """Grade the answers `found` to items that have no record yet; adds to `done` and to the log."""
    items = [item for item in task.items if item.id in found and item.id not in done]
    for record in _graded(task, items, [found[item.id] for item in items], labels, prints, done):
        log.append(record)
        done[record["id"]] = record
    if items:
        say(f"{task.name}: {len(items)} of {len(task.items)} answers are those of an earlier run of the same model")


def _answer_of(record: Mapping[str, Any]) -> Answer:
    return Answer(record["text"], record.get("tokens"), record.get("stopped"))


def as_answer(given: str | Answer) -> Answer:
    """What a generate function gave, as an Answer."""
    return Answer(given) if isinstance(given, str) else given


def _graded(task, batch, answers, labels, prints, done) -> list[dict[str, Any]]:
    """A record of every item of the batch that has none yet."""
    assert len(answers) == len(batch), f"generate gave {len(answers)} texts for {len(batch)} prompts"
    missing = [i for i, item in enumerate(batch) if item.id not in done]
    verdicts = task.grader.grade_all([answers[i].text for i in missing], [batch[i].answer for i in missing])
    return [
        {
            **labels,
            "id": batch[i].id,
            "prompt": batch[i].prompt[-1].content,  # without the shots, which are the same for every item
            "answer": batch[i].answer,
            "text": answers[i].text,
            "correct": is_correct,
            "grader": task.grader.name,
            "fingerprint": prints[batch[i].id],
            **_length(answers[i]),
            **({"marks": task.marks(answers[i].text, batch[i].answer)} if task.marks else {}),
        }
        for i, is_correct in zip(missing, verdicts, strict=True)
    ]


def _length(answer: Answer) -> dict[str, Any]:
    return {} if answer.tokens is None else {"tokens": answer.tokens, "stopped": answer.stopped}


def _take_finished(log: JsonLines, labels: Mapping, prints: Mapping) -> tuple[dict[str, dict], int]:
    """Finished records by item id and the number of stale ones; leaves the log without torn or stale lines.

    Records under the same labels for items that are not asked for now (a smaller `limit`) stay in the file.
    """
    done: dict[str, dict] = {}
    stale = 0

    def keep(record: dict) -> bool:
        nonlocal stale
        if not _is_of(record, labels, prints):
            return True
        if record["fingerprint"] != prints[record["id"]]:
            stale += 1
            return False
        done[record["id"]] = record
        return True

    log.rewind(keep)
    return done, stale


def _is_of(record: Mapping[str, Any], labels: Mapping[str, str], prints: Mapping[str, str]) -> bool:
    """Whether the record has these labels and answers one of these items."""
    return all(record.get(key) == value for key, value in labels.items()) and record["id"] in prints


def _item_fields(item: Item, fields: Mapping[str, Any]) -> dict[str, Any]:
    return {"fields": dict(fields), "prompt": prompt_rows(item.prompt), "answer": item.answer}


def _title(labels: Mapping[str, str]) -> str:
    return " ".join(labels.values())


def _hidden(show_progress: bool | None) -> bool | None:
    return None if show_progress is None else not show_progress  # tqdm's None: hidden unless on a terminal
