"""Temporary files and folders beside what they will become: names that say whose they are, and what to do with orphans.

`.tmp-<process>.<host>-<name>` is being made, `.old-…` is being replaced. A killed process leaves them behind; the next
stage that works in the folder removes those of processes that are gone, never those of living ones, of other machines,
or of this process.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

HOST = hashlib.sha256(platform.node().encode()).hexdigest()[:8]
NAME = re.compile(r"\.(?P<mark>tmp|old)-(?P<process>\d+)\.(?P<host>[0-9a-f]{8})-(?P<name>.+)")

_in_use: set[Path] = set()


@contextlib.contextmanager
def temporary_beside(path: Path, mark: str = "tmp") -> Iterator[Path]:
    """A name in the folder of `path` for this process; whatever has it when the block ends is removed."""
    temporary = path.with_name(f".{mark}-{os.getpid()}.{HOST}-{path.name}")
    remove(temporary)  # of an earlier process with the same number, as containers have them
    _in_use.add(temporary)
    try:
        yield temporary
    finally:
        _in_use.discard(temporary)
        remove(temporary)


def remove_orphans(folder: Path) -> None:
    """Remove below `folder` what killed processes left; what was being replaced takes its name back where it is free.

    Other files are not looked at. What cannot be removed stays: it is in nobody's way.
    """
    if not folder.is_dir():
        return
    for path in sorted(folder.rglob(".*-*"), key=lambda path: -len(path.parts)):
        found = NAME.fullmatch(path.name)
        if found is None or not _is_orphan(path, found):
            continue
        if found["mark"] == "old" and not (target := path.with_name(found["name"])).exists():
            with contextlib.suppress(OSError):
                os.replace(path, target)
        else:
            remove(path)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there and can be removed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    elif os.path.lexists(path):
        with contextlib.suppress(OSError):
            path.unlink()


def _is_orphan(path: Path, found: re.Match) -> bool:
    if found["host"] != HOST:
        return False
    process = int(found["process"])
    return path not in _in_use if process == os.getpid() else not is_running(process)


def is_running(process: int) -> bool:
    """Whether a process of this number exists on this machine."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return True
