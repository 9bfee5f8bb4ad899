"""What a row holds that no reader reads: keys of messages, columns, messages kept as text.

Nothing of it is dropped in silence. A key with a value refuses its row, an empty one is counted, and so is a column. A
column that the settings name and no row has is an error.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

from laddpo.errors import UserError, nearest
from laddpo.preference.reading.bad_rows import BadRow, RowError

Warn = Callable[..., None]
COLUMNS_NAMED = 50  # columns that are not used and named in the report; further ones are counted together


def refuse_unread_keys(
    value: Mapping[str, Any], read: Collection[str], place: str, warn: Callable[[str], None]
) -> None:
    """Count the empty keys of a message, or of a part of one, that are not among `read`. Raise RowError for others."""
    for key in value.keys() - read:
        if not is_empty(value[key]):
            problem = f"has a value, and of a message only {' and '.join(read)} are read: it would be lost"
            raise RowError("DATA-101", f"{place}.{key}", problem, KEY_CURES.get(str(key), KEY_CURES[None]))
        warn(f"messages with the key {str(key)[:60]!r}, which is empty and not read")


def is_empty(value: Any) -> bool:
    """Whether a value says nothing: null, blank text, or a list or an object of nothing else."""
    if isinstance(value, str):
        return not value.strip()
    if isinstance(value, (list, tuple)):
        return all(map(is_empty, value))
    if isinstance(value, dict):
        return all(map(is_empty, value.values()))
    return value is None


def refuse_stored_messages(text: str, column: str) -> None:
    """Raise RowError when a text is a list of messages that was written as JSON or as Python writes it."""
    if not STORED.match(text) or not text.rstrip().endswith(("]", "}", ")")) or not all(p.search(text) for p in KEYS):
        return
    is_json = STORED.match(text).group(1) == '"'
    kind, parse = ("JSON", "json.loads") if is_json else ("Python", "ast.literal_eval")
    raise RowError(
        "DATA-102",
        column,
        f"is a text that looks like messages in {kind}, want a list of messages",
        f"Convert it in every row, row[{column!r}] = {parse}(row[{column!r}]), and save the rows as .jsonl or .parquet "
        "(a cell of a .csv holds no list).",
    )


def accounted(
    rows: Iterable[tuple[str, dict] | BadRow],
    names: Iterable[str],
    columns: Mapping[str, str | None],
    dataset_name: str | None,
    warn: Warn,
) -> Iterator[tuple[str, dict] | BadRow]:
    """The rows as they are. Counts their columns that are not used, and refuses settings that name none of them.

    `names` are our names of the columns that are used, `columns` maps them to the data's where a setting names some.
    """
    names = list(names)
    used = {columns.get(name) or name for name in names}
    inside = OF_ANSWERS if "candidates" in names else ()  # columns, or keys of each answer
    absent = {name: column for name in names if name not in inside and is_mapped(name, column := columns.get(name))}
    unused: Counter[str] = Counter()
    found: dict[str, None] = {}
    for row in rows:
        if not isinstance(row, BadRow):
            keys = row[1].keys()
            for extra in keys - used:
                unused[extra if extra in unused or len(unused) < COLUMNS_NAMED else FURTHER] += 1
            absent = {name: column for name, column in absent.items() if column not in keys} if absent else absent
            if absent and len(found) < COLUMNS_NAMED:
                found.update(dict.fromkeys(map(str, keys)))
        yield row
    for extra, count in unused.items():
        warn(FURTHER if extra == FURTHER else f"column {extra!r} is not used", count)
        if extra in OFFERED and not (extra == "margin" and "label" in names):  # a row with a label has no margin
            warn(f"rows to which data.columns.{extra}={extra} would give a {extra} of their own in the loss", count)
    if absent and found:
        raise UserError(*(_no_such_column(name, column, found, dataset_name) for name, column in absent.items()))


def refuse_unread_columns(columns: Mapping[str, str | None], names: Collection[str], what: str) -> None:
    """Raise UserError for each column that a setting names and `what`, which reads the columns `names`, does not."""
    if unread := {name: column for name, column in columns.items() if is_mapped(name, column) and name not in names}:
        raise UserError(
            *(
                f"data.columns.{name} is {column!r}, which {what} does not read: it reads {', '.join(names)}. Leave "
                "the setting out."
                for name, column in unread.items()
            )
        )


def is_mapped(name: str, column: str | None) -> bool:
    """Whether a setting asks for a column that is not read by itself."""
    return bool(column) and (column != name or name in OPTIONAL)


def _no_such_column(name: str, column: str, found: Collection[str], dataset_name: str | None) -> str:
    guess = name if name in found else nearest(column, found)
    hint = f"Did you mean data.columns.{name}={guess}?" if guess else "Correct the name, or leave the setting out."
    names = ", ".join(list(found)[:20]).encode("utf-8", "backslashreplace").decode("utf-8")
    return (
        f"data.columns.{name} is {column!r}, and no row of {dataset_name} has such a field; found the fields "
        f"[{names[:200]}] (DATA-104). {hint}"
    )


FURTHER = "further columns that are not used"
OF_ANSWERS = ("candidate", "scores", "ranks")
OF_SCORES = ("scores", "ranks", "score_chosen", "score_rejected", "preference", "margin", "weight")
OPTIONAL = ("system", "input", "answer", *OF_SCORES)  # read only where a setting names their column
OFFERED = ("margin", "weight")  # change the loss, so a setting must name them
STORED = re.compile(r"""\s*(?:array\(\s*)?\[?\s*\{\s*(["'])(?:role|content|from|value)\1\s*:""")
KEYS = (re.compile(r"""["'](?:role|from)["']\s*:"""), re.compile(r"""["'](?:content|value)["']\s*:"""))
CALL = "Only a turn of the assistant calls tools. Move it there, or remove it."
FUNCTION_CALL = "Write it as tool_calls, or into content as the model shall write it."
REASONING = "Write it into content, as <think>…</think> before the answer, if it shall be learned; else remove the key."
KEY_CURES: dict[str | None, str] = {
    "tool_calls": CALL,
    "function_call": FUNCTION_CALL,
    "reasoning_content": REASONING,
    "reasoning": REASONING,
    "thinking": REASONING,
    None: "Write it into content if it shall be learned; else remove the key from the messages.",
}
