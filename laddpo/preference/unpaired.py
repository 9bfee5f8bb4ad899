"""Unpaired rows: a completion with a label that says whether it is desirable, as thumbs up and down are.

`read_unpaired(request, log)` reads them; `split_pairs(rows)` makes two of each pair; `desirable(rows, log)` gives what
sft learns of them. `are_unpaired(request)` looks at the first rows to find out which kind the data are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from laddpo.errors import UserError
from laddpo.preference.examples import MESSAGES, conversation
from laddpo.preference.reading.bad_rows import BadRow, RowError, made_of
from laddpo.preference.reading.files import ReadLog
from laddpo.preference.reading.guesses import guess_unpaired, seen_kind, taken_text
from laddpo.preference.reading.labels import LabelReader, is_label
from laddpo.preference.reading.pairs import (
    Example,
    PreferencePair,
    Prompt,
    RowIds,
    UnpairedRow,
    example_of,
    unpaired_of,
)
from laddpo.preference.reading.ranked import own_weight
from laddpo.preference.reading.rows import (
    RowRules,
    Warn,
    as_prompt,
    as_response,
    get_field,
    mapped_text,
    refuse_input,
    with_system,
)
from laddpo.preference.reading.unread import accounted, is_mapped, refuse_unread_columns
from laddpo.preference.requested import first_values, raw_rows

if TYPE_CHECKING:
    from laddpo.preference.sources import Request

UNPAIRED_COLUMNS = ("prompt", "completion", "label")
NAMED = ("system", "input", "answer", "weight")  # read only where a setting names their column


def are_unpaired(request: Request) -> bool:
    """Whether the rows of files or of the hub are unpaired: as data.format says, or as their first ones look."""
    if request.format not in ("auto", "json"):
        return request.format == "unpaired"
    return seen_kind(first_values(request), request.columns) == "unpaired"


def have_labels_for_sft(request: Request) -> bool:
    """As are_unpaired, and their labels say yes or no: in rows for sft a column `label` may be about other things."""
    if request.format == "unpaired" or any(is_mapped(n, request.columns.get(n)) for n in ("completion", "label")):
        return True
    if request.format not in ("auto", "json"):
        return False
    seen = first_values(request)
    if seen_kind(seen, request.columns) != "unpaired":
        return False
    label = guess_unpaired(seen, request.columns, request.dataset_name).get("label", "label")
    return request.label_threshold is not None or is_label(first_values(request, [label])[label])


def refuse_threshold(request: Request) -> None:
    """Raise UserError for a threshold of labels beside rows without labels."""
    if request.label_threshold is not None:
        raise UserError(
            f"data.label_threshold is {request.label_threshold:g}, and the rows of {request.dataset_name} have no "
            "label. Name the column of the ratings by data.columns.label, or leave data.label_threshold out."
        )


def read_unpaired(
    request: Request, log: ReadLog, rows: Iterable[tuple[str, dict] | BadRow] | None = None
) -> Iterator[UnpairedRow | BadRow]:
    """Unpaired rows of local files or of the hub, or of `rows`."""
    if rows is None:
        guessed = guess_unpaired(first_values(request), request.columns, request.dataset_name)
        if said := taken_text(guessed):
            log.warn(said)
        if guessed:
            request = replace(request, columns={**request.columns, **guessed})
    rules = RowRules(request.columns, request.allow_empty_prompt, request.allow_nul)
    refuse_unread_columns(rules.columns, (*UNPAIRED_COLUMNS, *NAMED), "data.format=unpaired")
    labels = LabelReader(rules.column("label"), request.label_threshold)

    def read(place: str, fields: dict) -> Iterator[UnpairedRow]:
        prompt, completion = read_completion(fields, rules, log.warn)
        label = labels.read(_label_of(fields, rules), place)
        answer = mapped_text(fields, "answer", rules, log.warn)
        weight = own_weight(fields, rules)
        log.pairs.add(None, weight, 0.0)
        yield replace(unpaired_of(RowIds(), prompt, completion, label, place, answer), weight=weight)

    names = [*UNPAIRED_COLUMNS, MESSAGES, *(name for name in NAMED if rules.columns.get(name))]
    if rows is None:
        return made_of(raw_rows(request, log, names), read)
    return made_of(accounted(rows, names, request.columns, "the rows", log.warn), read)


def read_completion(row: dict, rules: RowRules, warn: Warn) -> tuple[Prompt, str]:
    """The prompt and the completion of a row: of its columns, or of a whole conversation in the column completion or
    messages. Raises RowError."""
    name = "completion"
    if row.get(rules.column(name)) is None and row.get(MESSAGES) is not None:
        name = MESSAGES
    elif rules.column(name) not in row and {"chosen", "rejected"} <= row.keys():
        advice = "Keep pairs and rows with a label in files of their own, and read both by data=mixture."
        raise RowError("DATA-01", rules.column(name), "field missing: the row is a pair among unpaired rows", advice)
    value = row[MESSAGES] if name == MESSAGES else get_field(row, name, rules)
    if isinstance(value, list) and row.get(rules.column("prompt")) is None:
        if mapped_text(row, "input", rules, warn) is not None:
            refuse_input(rules, f"{name} holds the prompt")
        prompt, completion = conversation(value, name, rules, warn)
        return with_system(row, prompt, rules, warn), completion
    prompt = as_prompt(row, get_field(row, "prompt", rules), rules, warn)
    return prompt, as_response(value, name, prompt, rules, warn)


def _label_of(row: dict, rules: RowRules) -> object:
    """The label as it is in the row; RowError, with the hint of any column that lacks, where there is none."""
    column = rules.column("label")
    return row[column] if column in row else get_field(row, "label", rules)


def split_pairs(rows: Iterable[PreferencePair | BadRow], log: ReadLog) -> Iterator[UnpairedRow | BadRow]:
    """Each pair as its chosen side, desirable, and its rejected side, undesirable."""
    for row in rows:
        if isinstance(row, BadRow):
            yield row
            continue
        if row.margin:
            raise UserError(
                f"{row.source}: the pair has the margin {row.margin:g}, and pairs beside unpaired rows are split in "
                "two, which have none. Leave data.columns.margin and data.margin_per_gap out, or train on the pairs "
                "alone."
            )
        log.warn("pairs beside unpaired rows, each made a desirable and an undesirable completion")
        for completion, label in ((row.chosen, True), (row.rejected, False)):
            made = unpaired_of(RowIds(), row.prompt, completion, label, row.source, row.answer)
            yield replace(made, weight=row.weight)


def desirable(rows: Iterable[UnpairedRow | BadRow], log: ReadLog) -> Iterator[Example | BadRow]:
    """The desirable completions as SFT examples. The others are counted."""
    for row in rows:
        if isinstance(row, BadRow):
            yield row
        elif row.label:
            yield example_of(RowIds(), row.prompt, row.completion, row.source)
        else:
            log.warn("undesirable completions, which are not learned")
