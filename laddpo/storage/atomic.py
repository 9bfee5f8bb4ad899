"""Files that are written whole or not at all, and survive a power cut; JSON as we write and read it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from laddpo.errors import Damaged, UserError
from laddpo.storage.locks import disk_message
from laddpo.storage.temporaries import make_folder, move_to, open_file, temporary_beside

RESTORE = "Restore it from a copy, or make its folder again."  # where a file of ours is damaged


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text. NaN and infinity are refused."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes, read in bounded memory."""
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` durable, where the file system can (some network ones cannot)."""
    with contextlib.suppress(OSError):
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def sync_file(path: Path) -> None:
    """Make the content of a file that a library wrote durable."""
    with path.open("rb+") as f:
        os.fsync(f.fileno())


@contextlib.contextmanager
def atomic_file(path: Path, mode: str = "wb") -> Iterator[IO]:
    """Write `path` whole or not at all: the name appears only after the content is on disk."""
    kwargs = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary_beside(path) as temporary:
            with open_file(temporary, mode, **kwargs) as f:
                yield f
                f.flush()
                os.fsync(f.fileno())
            os.replace(temporary, path)
    sync_folder(path.parent)


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """An `OSError` inside the block becomes a `UserError` that names `path`, the free space there and the cure."""
    try:
        yield
    except BrokenPipeError:  # of something printed: no word about the disk
        raise
    except OSError as error:
        raise UserError(disk_message(path, error)) from error


def write_bytes(path: Path, content: bytes) -> None:
    """Atomic write of bytes."""
    with atomic_file(path) as f:
        f.write(content)


def write_text(path: Path, content: str) -> None:
    """Atomic write of UTF-8 text with `\\n` line ends on every platform. Half a character is written as in JSON."""
    write_bytes(path, content.encode("utf-8", "backslashreplace"))


def write_json(path: Path, value: Any) -> None:
    """Atomic write of readable JSON with sorted keys. NaN and infinity are refused."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """JSON of a file that we wrote; `UserError` names the file when it is missing or damaged."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise Damaged(f"{path}: cannot be read ({error}).", RESTORE) from error


@contextlib.contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """Fill a temporary folder that takes the place of `folder` as a whole when the block ends well.

    A crash leaves the old folder or the new one, never a mixture; or, for one instant, the old one under its `.old`
    name, which `temporaries.remove_orphans` gives back.
    """
    with explained(folder), temporary_beside(folder) as temporary, temporary_beside(folder, "old") as old:
        make_folder(temporary)
        yield temporary
        try:
            if os.path.lexists(folder):
                move_to(folder, old)
            os.replace(temporary, folder)
            sync_folder(folder.parent)
        finally:
            if old.exists() and not folder.exists():
                os.replace(old, folder)
