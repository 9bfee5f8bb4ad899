"""Which pairs a measurement looks at: the first that training visits, or a list that was written beforehand.

A list is a JSON array of pair ids. An id follows from the content of its row, so a list holds for the same rows
wherever they are prepared.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from laddpo.core.noise import step_items
from laddpo.errors import UserError
from laddpo.storage.atomic import write_text

if TYPE_CHECKING:
    from laddpo.preference.encoding.encode import EncodedPair
    from laddpo.preference.prepared import PreparedPairs

CURE = "A list is made by python -m laddpo.variance variance.write_pairs=FILE, with the settings of the data."


def first_visited(prepared: PreparedPairs, count: int, seed: int) -> list[EncodedPair]:
    """The first `count` training pairs that a run of this seed visits, or all if there are fewer."""
    pairs = prepared.train
    _, indices = step_items(seed, 0, len(pairs), min(count, len(pairs)))
    return [pairs[i] for i in indices]


def write_list(path: Path, pairs: list[EncodedPair]) -> None:
    """Write the ids. A file that exists is refused: a list is fixed before anything is measured on it."""
    where = f"variance.write_pairs is {str(path)!r}"
    if path.exists():
        raise UserError(f"{where}, which exists; expected a new file. Choose another name.")
    if not path.parent.is_dir():
        raise UserError(f"{where}, and there is no folder {path.parent}. Make it first.")
    write_text(path, json.dumps([pair.id for pair in pairs], indent=1) + "\n")


def listed(prepared: PreparedPairs, path: Path) -> list[EncodedPair]:
    """The pairs that the file names, in its order, whatever their split. `UserError` says which it does not find."""
    where = f"variance.pairs_file is {str(path)!r}"
    try:
        ids = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{where}: cannot be read: {error.strerror}. Correct the path. {CURE}") from error
    except ValueError as error:  # no JSON, or no UTF-8
        raise UserError(f"{where}: is no JSON ({error}); expected a list of pair ids. {CURE}") from error
    if not isinstance(ids, list) or len(ids) < 2:
        found = f"a list of {len(ids)}" if isinstance(ids, list) else f"{type(ids).__name__}"
        raise UserError(f"{where}: holds {found}; expected a list of two or more pair ids. {CURE}")
    rows = {name: row for row, name in enumerate(prepared.columns["id"])}
    seen = set()
    for place, name in enumerate(ids):
        problem = None
        if not isinstance(name, str):
            problem = "expected the id of a pair, a text"
        elif name in seen:
            problem = "it stands there twice; remove one"
        elif name not in rows:
            problem = f"no pair of {prepared.folder} has this id. Check that the data settings are those of the list"
        if problem:
            raise UserError(f"{where}: element {place} is {name!r}: {problem}. {CURE}")
        seen.add(name)
    return [prepared.row(rows[name]) for name in ids]
