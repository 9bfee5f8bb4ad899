"""SFT examples out of rows: a prompt with a response, a whole conversation, or the chosen side of a pair.

`read_example(row, rules, warn, to_pair)` looks at one row. A response column wins over the chosen side, and that over a
conversation. `chosen_sides(pairs)` makes examples of pairs that a source has put together itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from laddpo.preference.reading.bad_rows import BadRow
from laddpo.preference.reading.pairs import Example, PreferencePair, Prompt, RowIds, example_of
from laddpo.preference.reading.rows import (
    RowRules,
    Warn,
    check_text,
    explicit_example,
    get_field,
    last_answer,
    one_pair_each,
    read_messages,
    with_system,
)

ToPair = Callable[[dict, RowRules, Warn], tuple[Prompt, str, str]]
MESSAGES = "messages"  # the column of a whole conversation that ends with the response
COLUMNS = ("prompt", "response", "chosen", "rejected", MESSAGES)  # our names of the columns that are looked at


def read_example(row: dict, rules: RowRules, warn: Warn, to_pair: ToPair) -> tuple[Prompt, str]:
    """The prompt and the response to learn. `to_pair` reads rows that hold a pair. Raises RowError."""
    if row.get(rules.column("response")) is not None:
        return explicit_example(row, rules, warn)
    chosen, is_named = rules.column("chosen"), rules.columns.get("response") not in (None, "response")
    if row.get(chosen) is None and row.get(MESSAGES) is not None and not is_named:
        prompt, response = conversation(row[MESSAGES], MESSAGES, rules, warn)
        return with_system(row, prompt, rules, warn), response
    if row.get(chosen) is None or is_named:
        get_field(row, "response", rules)  # raises: says what is missing, and which field may be meant
    warn("rows without a response, of which the chosen side is learned")
    if row.get(rules.column("rejected")) is not None:
        return to_pair(one_pair_each(row, rules, lambda *_: None)[0], rules, warn)[:2]
    if isinstance(row[chosen], list) and rules.column("prompt") not in row:
        prompt, response = conversation(row[chosen], chosen, rules, warn)
        return with_system(row, prompt, rules, warn), response
    return explicit_example(row, RowRules({**rules.columns, "response": chosen}, *_flags(rules)), warn)


def chosen_sides(rows: Iterable[PreferencePair | BadRow]) -> Iterator[Example | BadRow]:
    """The chosen side of every pair."""
    for row in rows:
        if isinstance(row, BadRow):
            yield row
        else:
            yield example_of(RowIds(), row.prompt, row.chosen, row.source)


def _flags(rules: RowRules) -> tuple[bool, bool]:
    return rules.allow_empty_prompt, rules.allow_nul


def conversation(value: object, name: str, rules: RowRules, warn: Warn) -> tuple[Prompt, str]:
    """A list of messages whose last turn, the assistant's, is the response."""
    messages = read_messages(value, name, rules, warn)
    response = last_answer(messages, name)
    if not messages[-1].extra:
        check_text(response, name, rules, warn)
    return messages[:-1], response
