"""Temporary files and folders beside what they will become: names that say whose they are, and what to do with orphans.

`.tmp-<process>.<host>.<space>.<start>-<name>` is being made, `.old-…` is being replaced. Its maker holds a lock on it.
A killed process leaves it behind, and the kernel drops the lock. The next stage that works in the folder removes what
belongs to a process that is gone. It removes nothing whose process may be alive: host names and process numbers repeat
between containers. So <space> (boot and process namespace) and <start> (of the process) are compared too, and the lock
decides about another space.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

HOST = hashlib.sha256(platform.node().encode()).hexdigest()[:8]
NAME = re.compile(
    r"\.(?P<mark>tmp|old)-(?P<process>\d+)\.(?P<host>[0-9a-f]{8})"
    r"(?:\.(?P<space>[0-9a-f]{8})\.(?P<start>\d+))?-(?P<name>.+)"  # an earlier version wrote no space and no start
)

_in_use: dict[Path, list[int]] = {}  # what this process makes, with the descriptors that hold its locks


@functools.cache
def process_space() -> str:
    """Where process numbers of this process mean the same: this boot of this machine, in this process namespace."""
    known = []
    with contextlib.suppress(OSError):
        known.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii"))
    with contextlib.suppress(OSError):
        known.append(os.readlink("/proc/self/ns/pid"))
    return hashlib.sha256("".join(known).encode()).hexdigest()[:8]


def start_of(process: int) -> int:
    """When a process of this space started, in ticks since boot; 0 if this system does not tell."""
    try:
        fields = Path(f"/proc/{process}/stat").read_bytes().rpartition(b")")[2].split()
        return int(fields[19])
    except (OSError, ValueError, IndexError):
        return 0


@contextlib.contextmanager
def temporary_beside(path: Path, mark: str = "tmp") -> Iterator[Path]:
    """A name in the folder of `path` for this process; whatever has it when the block ends is removed.

    Make what gets the name by `make_folder`, `open_file` or `move_to`: these lock it.
    """
    process = os.getpid()
    temporary = path.with_name(f".{mark}-{process}.{HOST}.{process_space()}.{start_of(process)}-{path.name}")
    remove(temporary)  # left by this process, or by an earlier one of its number where no start is known
    _in_use[temporary] = []
    try:
        yield temporary
    finally:
        remove(temporary)
        for fd in _in_use.pop(temporary, []):
            os.close(fd)


def make_folder(temporary: Path) -> None:
    """Make the folder of this name and hold its lock until its block of `temporary_beside` ends."""
    temporary.parent.mkdir(parents=True, exist_ok=True)
    while True:
        temporary.mkdir()
        if _hold(temporary):
            return


def open_file(temporary: Path, mode: str, **kwargs: Any) -> IO:
    """A new file of this name, open for writing. Its lock is held until its block of `temporary_beside` ends."""
    while True:
        stream = temporary.open(mode.replace("w", "x"), **kwargs)
        if _hold(temporary):
            return stream
        stream.close()


def move_to(path: Path, temporary: Path) -> None:
    """Rename a file or folder to this name. It is locked first, so that it is nobody's orphan for an instant."""
    _hold(path, temporary, waits=False)
    os.replace(path, temporary)


def _hold(path: Path, temporary: Path | None = None, waits: bool = True) -> bool:
    """Lock what lies at `path`. False if another process took it for an orphan and removed it before it was locked."""
    if fcntl is None:
        return True
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False
    except OSError:  # a link, or a file without the right to read: no lock, and the process number decides
        return True
    with contextlib.suppress(OSError):  # a file system without locks
        fcntl.flock(fd, fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB))
    _in_use.setdefault(temporary or path, []).append(fd)
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(fd), os.lstat(path))
    return False


def remove_orphans(folder: Path) -> None:
    """Remove below `folder` what killed processes left; what was being replaced takes its name back where it is free.

    Other files are not looked at. What cannot be removed stays: it is in nobody's way.
    """
    if not folder.is_dir():
        return
    for path in sorted(folder.rglob(".*-*"), key=lambda path: -len(path.parts)):
        found = NAME.fullmatch(path.name)
        if found is None or path in _in_use or found["host"] != HOST:
            continue
        with _lock_of(path) as is_free:
            if not _is_orphan(found, is_free):
                continue
            if found["mark"] == "old" and not os.path.lexists(target := path.with_name(found["name"])):
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


def _is_orphan(found: re.Match, is_free: bool | None) -> bool:
    """Whether nobody can be making this any more. `is_free`: its lock was free; None where there are no locks."""
    if is_free is False:
        return False
    process = int(found["process"])
    if found["space"] is None:  # of an earlier version, which held no locks
        return process == os.getpid() or not is_running(process)
    if found["space"] != process_space():
        return is_free is True
    return process == os.getpid() or not is_running(process) or start_of(process) != int(found["start"])


@contextlib.contextmanager
def _lock_of(path: Path) -> Iterator[bool | None]:
    """Hold the lock of a temporary, if it is free: True. False if its maker holds it, None where there are no locks."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK) if fcntl else None
    except OSError:
        fd = None
    if fd is None:
        yield None
        return
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            is_free = False
        except OSError:
            is_free = None
        else:
            is_free = True
        yield is_free
    finally:
        os.close(fd)


def is_running(process: int) -> bool:
    """Whether a process of this number exists on this machine."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return True
