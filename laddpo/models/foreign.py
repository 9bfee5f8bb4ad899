"""Settings files that come with a checkpoint or an adapter: only known fields are taken, each of its kind and range.

`read_settings(path)` reads a file as one JSON object, in bounded size. `checked(path, content, table)` gives the fields
of the table that the file has, or one `UserError` that names every field of another kind. Fields that are not in the
table go nowhere: they may name code, kernels or files to load.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from laddpo.errors import UserError

MOST_BYTES = 64 * 2**20  # of a file: tokenizer.json has tens of MB, the others a few kB
MOST_LETTERS = 2**16  # of a text, and entries of a list
MOST_ID = 2**31 - 1


@dataclass(frozen=True)
class Kind:
    """What a field may hold: in words, and as a test."""

    words: str
    holds: Callable[[Any], bool]


def whole(low: int, high: int) -> Kind:
    return Kind(f"a whole number from {low:,} to {high:,}", lambda value: type(value) is int and low <= value <= high)


def number(low: float, high: float) -> Kind:
    """Above `low`, and at most `high`."""
    return Kind(f"a number above {low:g} and at most {high:g}", lambda value: _is_number(value) and low < value <= high)


def text(letters: int = MOST_LETTERS) -> Kind:
    return Kind(f"text of at most {letters:,} letters", lambda value: isinstance(value, str) and len(value) <= letters)


def only(*allowed: Any) -> Kind:
    """One of these values; 0 and 0.0 are equal, and no number is a boolean."""
    words = "one of " if len(allowed) > 1 else ""
    return Kind(
        words + ", ".join(json.dumps(value) for value in allowed),
        lambda value: any(
            isinstance(value, bool) == isinstance(a, bool) and _is_plain(value) and value == a for a in allowed
        ),
    )


def optional(kind: Kind) -> Kind:
    return Kind(f"{kind.words}, or null", lambda value: value is None or kind.holds(value))


def either(*kinds: Kind) -> Kind:
    return Kind(" or ".join(kind.words for kind in kinds), lambda value: any(kind.holds(value) for kind in kinds))


def listed(kind: Kind) -> Kind:
    return Kind(
        f"a list, each {kind.words}",
        lambda value: isinstance(value, list) and len(value) <= MOST_LETTERS and all(map(kind.holds, value)),
    )


def mapped(kind: Kind, key: Kind | None = None) -> Kind:
    """An object whose values are of one kind, and its keys too."""
    return Kind(
        f"an object, each value {kind.words}" + (f" under {key.words}" if key else ""),
        lambda value: (
            isinstance(value, dict)
            and all(map(kind.holds, value.values()))
            and (key is None or all(map(key.holds, value)))
        ),
    )


def fields(required: Mapping[str, Kind], more: Mapping[str, Kind]) -> Kind:
    """An object with these fields, and no others."""
    known = {**required, **more}
    return Kind(
        f"an object with {', '.join(known)}",
        lambda value: (
            isinstance(value, dict)
            and required.keys() <= value.keys() <= known.keys()
            and all(known[name].holds(inner) for name, inner in value.items())
        ),
    )


FLAG = Kind("true or false", lambda value: isinstance(value, bool))


def read_settings(path: Path) -> dict[str, Any]:
    """The file's JSON object, whatever its fields hold. Raises `UserError` for anything else."""
    cure = "Get the file again from where the checkpoint came from."
    try:
        size = path.stat().st_size
        if size > MOST_BYTES:
            raise UserError(f"{path}: has {size:,} bytes; expected at most {MOST_BYTES:,}. {cure}")
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({type(error).__name__}: {error}). {cure}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds {shown(content)}; expected a JSON object. {cure}")
    return content


def tensor_shapes(file: Path, cure: str) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor, from the head of a safetensors file. Raises `UserError` when the file is not whole."""
    from safetensors import safe_open

    try:
        with safe_open(str(file), "np") as content:
            return {name: tuple(content.get_slice(name).get_shape()) for name in sorted(content.keys())}
    except Exception as error:
        raise UserError(f"{file}: is no whole safetensors file ({error}). {cure}") from error


def checked(path: Path, content: Mapping[str, Any], table: Mapping[str, Kind]) -> dict[str, Any]:
    """The fields that both have. Raises `UserError` with every field of another kind."""
    found = {name: value for name, value in content.items() if name in table}
    problems = [
        f"{path}: {name} is {shown(value)}; expected {table[name].words}. Correct it, or get the file again."
        for name, value in found.items()
        if not table[name].holds(value)
    ]
    if problems:
        raise UserError(*problems)
    return found


def shown(value: Any) -> str:
    """A value as JSON, cut to what a message has room for."""
    try:
        words = json.dumps(value)
    except (RecursionError, ValueError):
        words = f"a {type(value).__name__}"
    return words if len(words) <= 60 else f"{words[:60]}…"


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str))


def _is_number(value: Any) -> bool:
    """A number of any size: a whole number may be too large for a float and can still be compared with one."""
    return type(value) is int or (isinstance(value, float) and math.isfinite(value))
