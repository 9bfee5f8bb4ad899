"""Test rows that the data bring themselves, and the check that something is held out where that was asked for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from laddpo.errors import UserError
from laddpo.preference.reading.bad_rows import BadRow
from laddpo.preference.reading.files import ReadLog
from laddpo.preference.reading.hub import NoSuchSplit
from laddpo.preference.reading.pairs import Example, PreferencePair, UnpairedRow
from laddpo.preference.report import ReportBuilder
from laddpo.preference.sources import Request, Source
from laddpo.preference.spool import Spool

FEW_HELD_OUT = 30  # pairs below which figures of them say little


def own_test_rows(
    source: Source, request: Request, log: ReadLog, is_needed: bool
) -> Iterator[PreferencePair | UnpairedRow | Example | BadRow]:
    """The rows of the split `request.test_split`; none if the data have no such split."""
    if "test_split" not in source.reads or not request.has_test_split:
        return
    unread = dict(log.unread)
    try:
        yield from source.read(replace(request, dataset_split=request.test_split), log)
        log.unread = {path: split for path, split in unread.items() if path not in log.files}
    except NoSuchSplit as error:  # of the hub, which is only known when it was asked
        if is_needed:
            raise UserError(str(error).replace("data.dataset_split", "data.test_split")) from error


def require_test_split(request: Request) -> None:
    """Refuse a test split that was asked for by name where files have none."""
    if request.test_split and not request.has_test_split:
        raise UserError(
            f"data.test_split is {request.test_split!r}, and {request.dataset_name} has no such split beside "
            f"{request.dataset_split or 'train'} (DATA-70). Leave data.test_split out and set data.test_fraction."
        )


def leave_out_trained(spool: Spool, rows: np.ndarray, test: np.ndarray, report: ReportBuilder) -> np.ndarray:
    """The indices `test` without the rows whose prompt is also among `rows`; the report counts those."""
    is_trained = np.isin(spool.groups[test], spool.groups[rows])
    for row in spool.read(test[is_trained]):
        cure = "Remove the prompt from the rows for training to test on it."
        report.drop(BadRow(row.place, "DATA-107", "", "is a test row whose prompt is also among the others", cure))
    return test[~is_trained]


def check_held_out(split: str, fraction: float, report: ReportBuilder, log: ReadLog, *, is_needed: bool) -> None:
    """Refuse a split that is needed and has no pair; count the pairs of a small one."""
    found, noun = report.rows[split], "pairs" if len(report.sides) == 2 else "rows"
    if not found and is_needed:
        raise none_held_out(split, fraction, report.rows["kept"], report.facts["prompts"], noun)
    if not found:
        log.warn(f"{noun}, of so few prompts that none is held out for the test", report.rows["kept"])
    elif found < FEW_HELD_OUT:
        log.warn(
            f"{noun} held out for {NAMES[split]}, fewer than {FEW_HELD_OUT}: figures of them are coarse; raise "
            f"data.{split}_fraction or give more {noun}",
            found,
        )


def none_held_out(split: str, fraction: float, kept: int, prompts: int, noun: str = "pairs") -> UserError:
    """Why a split that was asked for has no pair, or no row that is unpaired."""
    same = " All of them have one prompt, and the split is by prompt." if prompts == 1 else ""
    return UserError(
        f"data.{split}_fraction is {fraction:g}, and of the {kept:,} {noun} kept none is held out for {NAMES[split]} "
        f"(DATA-88).{same} Set data.{split}_fraction=0 to train without {split}, raise it, or give {noun} of more "
        "prompts."
    )


NAMES = {"validation": "validation", "test": "the test"}
