"""Prepares rows for training: reads, samples, splits, encodes and reports, into one folder that is whole or absent.

`prepare_pairs`, `prepare_unpaired`, and `prepare_examples` for an SFT corpus. Rows are streamed: they are read once
into a temporary file beside the result, and what stays in memory is a few dozen bytes a row. Every decision (sample,
split, order) is by the content of rows and the seed, so the same rows in another order or in other files give the same
pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from laddpo.errors import Damaged, UserError, choose, visible
from laddpo.preference.balance import conflicting, require_both_labels
from laddpo.preference.encoding.encode import TextEncoder
from laddpo.preference.held_out import (
    check_held_out,
    leave_out_trained,
    none_held_out,
    own_test_rows,
    require_test_split,
)
from laddpo.preference.leaks import EvaluationPrompts, count_leaks, refuse_leaks
from laddpo.preference.prepared import (
    PLAIN,
    REJECTED,
    SPLITS,
    Prepared,
    PreparedExamples,
    PreparedPairs,
    PreparedUnpaired,
    PreparedWriter,
    whole_folder,
)
from laddpo.preference.reading.bad_rows import BadRow, BadRows, RowError
from laddpo.preference.reading.files import ReadLog
from laddpo.preference.reading.pairs import prompt_rows
from laddpo.preference.reading.ranked import refuse_unused
from laddpo.preference.report import ReportBuilder, leak_lines, note_lines, report_figure, report_table
from laddpo.preference.selection import choose_rows, choose_splits
from laddpo.preference.sources import Request, Source, open_corpus, open_source, open_unpaired
from laddpo.preference.spool import Spool
from laddpo.processes.progress import Progress
from laddpo.storage.atomic import atomic_file
from laddpo.storage.manifests import MANIFEST, differing_fields, fingerprint, read_manifest

BATCH_ROWS = 256


@dataclass(frozen=True)
class Part:
    """One source of rows. In a mixture the parts appear in proportion to their weights."""

    source: str
    request: Request
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 < self.weight < float("inf"):
            raise UserError(f"The weight of the source {self.source} is {self.weight}; expected a number above 0.")


@dataclass(frozen=True)
class Rules:
    """What happens to rows between reading and training.

    `random_sample_size` rows (None: all) are taken before anything else; prompts with a share of `validation_fraction`
    are kept for validation, and a share of `test_fraction` for the test. `needs_test`: the test must hold some.
    `needs_test_split`: the data must have their own split for it. `on_bad_row` is error or skip, and skip stops above
    `max_bad_fraction`; `duplicates` is keep or drop; `fail_on_leak` stops when a prompt is also in an evaluation set.
    """

    seed: int = 0
    random_sample_size: int | None = None
    validation_fraction: float = 0.0
    test_fraction: float = 0.0
    needs_test: bool = False
    needs_test_split: bool = False
    on_bad_row: str = "error"
    max_bad_fraction: float = 1.0
    duplicates: str = "keep"
    fail_on_leak: bool = False

    def __post_init__(self) -> None:
        choose({"error": 0, "skip": 0}, self.on_bad_row, "data.on_bad_row", "laddpo/preference/preparation.py")
        choose({"keep": 0, "drop": 0}, self.duplicates, "data.duplicates", "laddpo/preference/preparation.py")
        if self.random_sample_size is not None and self.random_sample_size < 1:
            raise UserError(f"data.random_sample_size is {self.random_sample_size}; expected at least 1, or null.")
        if not 0.0 <= self.validation_fraction < 1.0:
            raise UserError(f"data.validation_fraction is {self.validation_fraction}; expected 0 up to (not with) 1.")
        if not 0.0 <= self.test_fraction < 1.0:
            raise UserError(f"data.test_fraction is {self.test_fraction}; expected 0 up to (not with) 1.")


@dataclass(frozen=True)
class _Job:
    prepared: type[Prepared]
    parts: Sequence[Part]
    sources: Sequence[Source]
    encoder: TextEncoder
    rules: Rules
    evaluation_prompts: EvaluationPrompts
    progress: bool


def _prepare(
    kind: type[Prepared],
    prepared_dir: Path,
    name: str,
    parts: Sequence[Part],
    encoder: TextEncoder,
    rules: Rules,
    evaluation_prompts: EvaluationPrompts | None = None,
    show: Callable[[str], None] = print,
    progress: bool = True,
) -> Any:
    """The prepared folder of these rows: found, or made.

    `evaluation_prompts`: the sets of problems that a model will be tested on, for the report of leaks. Raises UserError
    when rows stop the run; then nothing is left behind.
    """
    sources = [FIND_SOURCE[kind](part.source) for part in parts]
    for part in parts if rules.needs_test_split else ():
        require_test_split(part.request)
    job = _Job(kind, parts, sources, encoder, rules, evaluation_prompts or {}, progress)
    fields = prepared_fields(parts, sources, encoder, rules)
    folder = prepared_folder(prepared_dir, name, fields)
    if (folder / MANIFEST).exists():
        return _found(job, folder, fields, show)
    with whole_folder(folder) as building:
        show(visible(report_table(_make(job, building, fields))))
    return kind.load(folder)


FIND_SOURCE: dict[type[Prepared], Callable[[str], Source]] = {
    PreparedPairs: open_source,
    PreparedUnpaired: open_unpaired,
    PreparedExamples: open_corpus,
}
prepare_pairs = partial(_prepare, PreparedPairs)
prepare_unpaired = partial(_prepare, PreparedUnpaired)
prepare_examples = partial(_prepare, PreparedExamples)  # an SFT corpus


def find_prepared(
    prepared_dir: Path,
    name: str,
    parts: Sequence[Part],
    encoder: TextEncoder,
    rules: Rules,
    find_source: Callable[[str], Source] = open_source,
) -> Path | None:
    """The finished folder of these rows, or None when they are still to be prepared. `find_source`: open_source for
    preference pairs, open_corpus for SFT examples."""
    fields = prepared_fields(parts, [find_source(part.source) for part in parts], encoder, rules)
    folder = prepared_folder(prepared_dir, name, fields)
    try:
        manifest = read_manifest(folder, *(kind.kind for kind in FIND_SOURCE), verify=False)
    except Damaged:
        raise
    except UserError as error:  # by its name the folder holds these rows, whatever is in it
        found = f"{folder / MANIFEST}: is no manifest of prepared rows."
        raise Damaged(found, f"Remove the folder {folder} and run again.") from error
    if manifest is None:
        return None
    _refuse_other_fields(folder, manifest, fields)
    return folder


def prepared_fields(
    parts: Sequence[Part], sources: Sequence[Source], encoder: TextEncoder, rules: Rules
) -> dict[str, Any]:
    """What a prepared folder depends on; its name carries the fingerprint of these."""
    return {
        "sources": [
            {"source": part.source, **source.identity(part.request), **({"weight": part.weight} if parts[1:] else {})}
            for part, source in zip(parts, sources, strict=True)
        ],
        "encoding": encoder.fields(),
        "max_length": encoder.max_length,
        "seed": rules.seed,
        "random_sample_size": rules.random_sample_size,
        "validation_fraction": rules.validation_fraction,
        **({"test_fraction": rules.test_fraction} if rules.test_fraction else {}),
        "on_bad_row": rules.on_bad_row,
        "duplicates": rules.duplicates,
    }


def prepared_folder(prepared_dir: Path, name: str, fields: Mapping[str, Any]) -> Path:
    """Where rows with these fields lie."""
    return Path(prepared_dir) / f"{name}-{fingerprint(fields)}"


def _found(job: _Job, folder: Path, fields: Mapping[str, Any], show: Callable[[str], None]) -> Any:
    """A folder that was prepared before, with the notes of its report, once it may be used."""
    found = job.prepared.load(folder)
    _refuse_other_fields(folder, found.manifest, fields)
    test = f", {len(found.test):,} for the test" if len(found.test) else ""
    show(
        f"{folder}: already prepared, {len(found.train):,} rows for training, {len(found.validation):,} held out{test}"
    )
    for line in note_lines(found.report()):
        show(line)
    if _wants_validation(job) and not len(found.validation):
        show("  note            0  pairs are held out for validation: prepared by an earlier version")
    if job.rules.needs_test and not len(found.test):
        raise none_held_out("test", job.rules.test_fraction, len(found), found.report()["prompts"], found.noun)
    _refuse_too_many_bad(job, found)
    _look_for_leaks(job, found, show)
    return found


def _refuse_other_fields(folder: Path, manifest: Mapping[str, Any], fields: Mapping[str, Any]) -> None:
    """A folder that was renamed, or filled by hand, holds other rows than its name says."""
    stored = {name: value for name, value in manifest["fields"].items() if name in fields}
    if differing := differing_fields(stored, fields):
        raise Damaged(
            f"{folder / MANIFEST}: is that of rows with other settings: {'; '.join(differing)}.",
            f"Remove the folder {folder} and run again.",
        )


def _refuse_too_many_bad(job: _Job, found: Prepared) -> None:
    """The limit is no part of the folder's key, so a stricter one is held against the rows it left out."""
    rows = found.report()["rows"]
    if rows["bad"] > job.rules.max_bad_fraction * rows["read"]:
        raise UserError(
            f"{found.folder}: {rows['bad']:,} of {rows['read']:,} rows were bad when it was prepared, more than "
            f"data.max_bad_fraction={job.rules.max_bad_fraction:g} allows. Mend the rows, or raise it."
        )


def _look_for_leaks(job: _Job, found: Prepared, show: Callable[[str], None]) -> None:
    """The leaks of rows prepared before: as their report says, or counted where it does not know an evaluation set."""
    counts = {name: n for name, n in found.report()["leaks"].items() if name in job.evaluation_prompts}
    rest = {name: prompts for name, prompts in job.evaluation_prompts.items() if name not in counts}
    groups = np.array([int(group, 16) for group in found.columns["group"]] if rest else [], dtype=np.uint64)
    counted, unknown = count_leaks(groups, rest)
    for line in leak_lines(counts | counted, unknown):
        show(visible(line))
    if job.rules.fail_on_leak:
        refuse_leaks(counts | counted)


def _make(job: _Job, folder: Path, fields: Mapping[str, Any]) -> dict:
    """Write all files of the folder; returns the report."""
    log = ReadLog()
    rejected = folder / REJECTED
    with (
        closing(Spool(folder, job.prepared.sides)) as spool,
        PreparedWriter(folder, job.prepared.rows_file) as writer,
    ):
        with atomic_file(rejected, "w") as out:
            bad = BadRows(out)
            report = ReportBuilder(job.prepared.sides, job.encoder, log, bad)
            _read_rows(job, spool, report, log)
            _encode_rows(job, spool, report, writer, log)
        if not bad.total:
            rejected.unlink()
        content = report.finish()
        fields = {**fields, "commits": log.commits} if log.commits else fields
        writer.finish(job.prepared.kind, fields, content, report_figure(content), [REJECTED] if bad.total else [])
    return content


def _read_rows(job: _Job, spool: Spool, report: ReportBuilder, log: ReadLog) -> None:
    """Every row into the spool or among the bad ones; a part without a row that can be used is refused by name."""
    parts, needs = list(zip(job.sources, job.parts, strict=True)), job.rules.needs_test_split
    usable, bad = [0] * (len(parts) + 1), [BadRows() for _ in (*parts, "test rows")]
    rows = chain(
        ((part, row) for part, (source, asked) in enumerate(parts) for row in source.read(asked.request, log)),
        ((len(parts), row) for source, asked in parts for row in own_test_rows(source, asked.request, log, needs)),
    )
    for part, row in Progress(rows, desc="reading", unit=" rows", disable=not job.progress, mininterval=0.5):
        report.rows["read"] += 1
        if isinstance(row, BadRow):
            report.bad.add(row)
            bad[part].add(row)
        else:
            spool.add(row, part)
            usable[part] += 1
    report.bad.stop_if_too_many(job.rules.on_bad_row, job.rules.max_bad_fraction, report.rows["read"])
    refuse_unused(log)
    empty = [part for part, rows_of_it in enumerate(usable[:-1]) if not rows_of_it]
    if empty:
        others = log.pairs.left_out() or list(log.warnings)
        raise UserError(*(_no_row(job, part, bad[part].lines() or others) for part in empty))


def _no_row(job: _Job, part: int, why: list[str]) -> str:
    asked, is_mixed = job.parts[part], len(job.parts) > 1
    where = f"data.mixture[{part}]" if is_mixed else "data.source"
    name = f"{asked.source} of {asked.request.dataset_name}" if asked.request.dataset_name else asked.source
    advice = "Mend its rows, or leave it out of the mixture." if is_mixed else "Give it other rows."
    head = f"{where}, {name}, gives no row that can be used (DATA-40){':' if why else '.'}"
    return "\n".join([head, *(f"  {line}" for line in why), advice])


def _encode_rows(job: _Job, spool: Spool, report: ReportBuilder, writer: PreparedWriter, log: ReadLog) -> None:
    """Sample, split, encode and write what the spool holds."""
    spool.sort()
    chosen = choose_rows(spool, [part.weight for part in job.parts], job.rules.seed, job.rules.random_sample_size, log)
    own_test = np.flatnonzero(spool.parts == len(job.parts))
    test = leave_out_trained(spool, chosen, own_test, report)
    shares = (job.rules.validation_fraction, 0.0 if len(test) else job.rules.test_fraction)
    split = np.zeros(len(spool), dtype=np.int8)
    split[chosen] = choose_splits(spool, chosen, job.rules.seed, *shares, log)
    split[test] = SPLITS.index("test")
    report.rows["not_sampled"] = len(spool) - len(chosen) - len(own_test)
    chosen = np.union1d(chosen, test)
    repeats = spool.repeats(chosen)
    leaks, unknown = count_leaks(spool.groups[chosen], job.evaluation_prompts)
    report.facts = {
        "prompts": len(np.unique(spool.groups[chosen])),
        "duplicates": int(repeats.sum()),
        "contradictions": 0 if job.prepared is PreparedUnpaired else spool.contradictions(chosen),
        "leaks": leaks,
        "leaks_unknown": unknown,
        "commits": log.commits,
    }
    if job.rules.fail_on_leak:
        refuse_leaks(leaks)
    is_repeat = np.zeros(len(spool), dtype=bool)
    is_repeat[chosen] = repeats
    opposites = np.full(len(spool), -1)
    if job.prepared is PreparedUnpaired:
        opposites[chosen] = spool.opposites(chosen)
    rows = spool.read(chosen)
    with Progress(total=len(chosen), desc="encoding", unit=" rows", disable=not job.progress, mininterval=0.5) as bar:
        while batch := list(islice(rows, BATCH_ROWS)):
            _encode_batch(job, spool, batch, split, is_repeat, opposites, report, writer)
            bar.update(len(batch))
    report.bad.stop_if_too_many(job.rules.on_bad_row, job.rules.max_bad_fraction, report.rows["read"])
    if not report.rows["kept"]:
        raise UserError("No row is left to train on:", *report.dropped_examples(), *report.bad.lines())
    if job.prepared is PreparedUnpaired:
        require_both_labels(report.labels)
    if _wants_validation(job):
        check_held_out("validation", job.rules.validation_fraction, report, log, is_needed=True)
    if job.rules.test_fraction or len(own_test):
        check_held_out("test", job.rules.test_fraction, report, log, is_needed=job.rules.needs_test)


def _wants_validation(job: _Job) -> bool:
    """Whether pairs shall be held out: an SFT corpus is not validated on its rows."""
    return job.prepared is not PreparedExamples and job.rules.validation_fraction > 0


def _encode_batch(
    job: _Job,
    spool: Spool,
    batch: list,
    splits: np.ndarray,
    is_repeat: np.ndarray,
    opposites: np.ndarray,
    report: ReportBuilder,
    writer: PreparedWriter,
) -> None:
    outcomes = job.encoder.encode_rows([(row.prompt, row.responses) for row in batch])
    for row, outcome in zip(batch, outcomes, strict=True):
        if isinstance(outcome, RowError):
            is_too_long = outcome.code in ("DATA-75", "DATA-79")
            leave_out = report.drop if is_too_long and job.encoder.truncation == "drop" else report.bad.add
            leave_out(outcome.at(row.place))
        elif (other := opposites[row.index]) >= 0:
            report.bad.add(conflicting(row.place, row.label, spool.place(other)))
        elif job.rules.duplicates == "drop" and is_repeat[row.index]:
            report.drop(BadRow(row.place, "DATA-83", "", "repeats another row", "Set data.duplicates=keep to keep it."))
        else:
            place_by_source = job.sources[min(spool.parts[row.index], len(job.sources) - 1)].split_of
            split = place_by_source(row.prompt) if place_by_source else SPLITS[int(splits[row.index])]
            row_id = spool.row_id(row.index)
            texts = dict(zip(job.prepared.sides, outcome.responses, strict=True))
            record = {"id": row_id, "prompt": prompt_rows(outcome.prompt), **texts, "split": split, "group": row.group}
            if row.label is not None:
                record["label"] = row.label
            if row.answer is not None:
                record["answer"] = row.answer
            record |= {name: getattr(row, name) for name, plain in PLAIN.items() if getattr(row, name) != plain}
            if outcome.cut_tokens:
                record["cut_tokens"] = outcome.cut_tokens
            writer.add(record, (outcome.prompt_ids, *outcome.response_ids))
            report.keep(row_id, row.place, split, outcome, row.label)
