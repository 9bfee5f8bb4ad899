"""The lock of a folder, and the files that more than one process or a link could reach.

A folder is written by who holds the flock on its `.lock`. That file is a regular one of our own: a link there is
refused, since writing through it would change a file somewhere else.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import platform
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from laddpo.errors import UserError
from laddpo.storage.temporaries import remove_orphans

LOCK = ".lock"
ATTEMPTS = 100  # to lock a file that others remove meanwhile


@contextlib.contextmanager
def locked(folder: Path, wait: bool = True, check: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Hold the folder's lock (flock on `.lock`); while another process has it, wait, or with `wait=False` refuse.

    `check` is called under the lock before anything is written; if it raises, the folder is not changed. Then what
    killed processes left in the folder is removed. On a platform or file system without flock, no lock is taken: two
    writers are then the user's to avoid.
    """
    is_new_folder, is_accepted = not folder.exists(), False
    fd, is_new_lock = _locked_file(folder, wait)
    try:
        check()
        is_accepted = True
        _write_holder(fd)
        remove_orphans(folder)
        yield
    finally:
        with contextlib.suppress(OSError):
            if is_new_lock and (not is_accepted or os.listdir(folder) == [LOCK]):  # nothing was done here
                os.unlink(folder / LOCK)
                if is_new_folder:
                    os.rmdir(folder)
        os.close(fd)


def open_own(path: Path, flags: int) -> int:
    """A descriptor of a regular file. A link is refused: writing through it would change a file somewhere else."""
    fd = os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0), 0o644)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "is not a regular file", str(path))
    return fd


def _locked_file(folder: Path, wait: bool) -> tuple[int, bool]:
    """A descriptor of the folder's `.lock` with the lock on it, and whether this made the file."""
    path = folder / LOCK
    for attempt in itertools.count():
        is_new = False
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileExistsError):
                os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644))
                is_new = True
            fd = open_own(path, os.O_RDWR)
        except OSError as error:
            if isinstance(error, FileNotFoundError) and attempt < ATTEMPTS:
                continue  # its last holder had nothing to keep here and removed it
            if os.path.lexists(path) and not stat.S_ISREG(path.lstat().st_mode):
                raise UserError(
                    f"{path}: is not a regular file; expected the lock that laddpo keeps there, or nothing; remove it "
                    "or choose another folder."
                ) from error
            raise UserError(disk_message(folder, error)) from error
        try:
            _flock(fd, folder, wait)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(fd), os.lstat(path)):
                    return fd, is_new
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)  # of a file that its last holder removed while this process waited
    raise AssertionError("unreachable")


def _write_holder(fd: int) -> None:
    """Who holds the lock, for people. A file with other content, or one with several names, is left as it is."""
    with contextlib.suppress(OSError):  # a full disk is for what matters to say
        if os.fstat(fd).st_nlink == 1 and os.read(fd, 8) in (b"", b"process "):
            holder = f"process {os.getpid()} on {platform.node()} since {time.strftime('%Y-%m-%d %H:%M:%S')}"
            os.ftruncate(fd, 0)
            os.lseek(fd, 0, os.SEEK_SET)
            os.write(fd, holder.encode(errors="replace"))


def _flock(fd: int, folder: Path, wait: bool) -> None:
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError as error:
        holder = os.pread(fd, 200, 0).decode(errors="replace")
        raise UserError(
            f"{folder}: is in use by {holder or 'another process'}. Wait for it, or choose another output_dir."
        ) from error
    except OSError:  # a network file system without locks
        return


def disk_message(path: Path, error: OSError) -> str:
    """The message for a file or folder that could not be written."""
    free = ""
    with contextlib.suppress(OSError):
        free = f" ({shutil.disk_usage(_existing(path)).free / 2**20:.0f} MiB free there)"
    reason = error.strerror or error
    return f"{path}: could not be written: {reason}{free}. Free space or choose another folder, then run again."


def _existing(path: Path) -> Path:
    return next((folder for folder in path.parents if folder.is_dir()), Path("."))
