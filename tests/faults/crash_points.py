"""Every call by which a stage changes what is on disk, as a place to die, to lose power or to run out of space.

`install(root, plan)` runs in a child process before its stage. From then on each writing call on a path below `root`
has a number: open for writing, write, flush and close of such a file, fsync, truncate, mkdir, rename, unlink, rmdir,
and safetensors' own writer. At call `plan["call"]` the process dies `before` it, `half` through it (half of the bytes
are on disk) or `after` it, each by a real SIGKILL; with `power` it dies before it and everything that was never synced
is gone; with `full` that call and every later one that needs space fails with ENOSPC.
"""

from __future__ import annotations

import builtins
import errno
import io
import json
import os
import signal
from pathlib import Path

NEEDS_SPACE = ("open", "write", "flush", "fsync", "mkdir", "save_file")
WHENS = ("before", "half", "after", "power", "full")
CAN_BE_HALF = ("write", "save_file")


class CrashPoints:
    """The numbered calls of this process, and what shall happen at one of them."""

    def __init__(self, root: Path, plan: dict | None):
        self.root = str(root)
        self.plan = plan or {"call": -1, "when": "none"}
        self.calls: list[tuple[str, str]] = []
        self.synced: dict[str, int] = {}  # bytes of each written file that a power cut leaves

    def around(self, name: str, path, action, half=None):
        """Do `action`, the call `name` on `path`, unless the plan says otherwise."""
        where = self.place(path)
        if where is None:
            return action()
        number, when = len(self.calls), self.plan["when"]
        self.calls.append((name, os.path.relpath(where, self.root)))
        if when == "full" and number >= self.plan["call"] and name in NEEDS_SPACE:
            if half:
                half()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), where)
        is_planned = number == self.plan["call"]
        if is_planned and when in ("before", "half", "power"):
            if when == "half" and half:
                half()
            self.die()
        result = action()
        if is_planned and when == "after":
            self.die()
        return result

    def place(self, path) -> str | None:
        """The absolute path when it lies below the root, else None."""
        if isinstance(path, int):
            try:
                path = REAL["readlink"](f"/proc/self/fd/{path}")
            except OSError:
                return None
        try:
            text = os.path.abspath(os.fspath(path))
        except TypeError:
            return None
        return text if text.startswith(self.root + os.sep) else None

    def die(self) -> None:
        if self.plan["when"] == "power":
            for path, size in self.synced.items():
                if os.path.exists(path) and os.path.getsize(path) > size:
                    REAL["truncate"](path, size)
        os.kill(os.getpid(), signal.SIGKILL)

    def write_calls(self, path: Path) -> None:
        """The numbered calls, for whoever plans the next crash."""
        with REAL["open"](path, "w") as f:
            json.dump(self.calls, f)


class WatchedFile:
    """A file opened for writing, whose writes are calls of their own."""

    def __init__(self, file, path: str, points: CrashPoints):
        self._file, self._path, self._points = file, path, points

    def write(self, data):
        def half():
            self._file.write(data[: len(data) // 2])
            self._file.flush()

        return self._points.around("write", self._path, lambda: self._file.write(data), half)

    def flush(self):
        return self._points.around("flush", self._path, self._file.flush)

    def close(self):
        if not self._file.closed:
            self._points.around("close", self._path, self._file.close)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def __iter__(self):
        return iter(self._file)

    def __getattr__(self, name):
        return getattr(self._file, name)


REAL = {
    "open": io.open,
    "os.open": os.open,
    "fsync": os.fsync,
    "truncate": os.truncate,
    "mkdir": os.mkdir,
    "rename": os.rename,
    "replace": os.replace,
    "unlink": os.unlink,
    "rmdir": os.rmdir,
    "write": os.write,
    "readlink": os.readlink,
}


def install(root: Path, plan: dict | None) -> CrashPoints:
    """Watch this process's calls from now on."""
    points = CrashPoints(root, plan)
    _watch_files(points)
    _watch_folders(points)
    _watch_safetensors(points)
    return points


def _watch_files(points: CrashPoints) -> None:
    def opened(file, mode="r", *args, **kwargs):
        is_written = any(letter in mode for letter in "wax+")
        path = points.place(file) if is_written else None
        if path is None:
            return REAL["open"](file, mode, *args, **kwargs)
        result = points.around("open", path, lambda: REAL["open"](file, mode, *args, **kwargs))
        if os.path.isfile(path):
            size = os.path.getsize(path)
            points.synced[path] = min(size, points.synced.get(path, size)) if "w" not in mode else 0
        return WatchedFile(result, path, points)

    def os_open(path, flags, *args, **kwargs):
        def action():
            return REAL["os.open"](path, flags, *args, **kwargs)

        is_written = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and kwargs.get("dir_fd") is None
        return points.around("open", path, action) if is_written else action()

    def fsync(fd):
        number = fd if isinstance(fd, int) else fd.fileno()
        result = points.around("fsync", number, lambda: REAL["fsync"](number))
        path = points.place(number)
        if path in points.synced:
            points.synced[path] = os.path.getsize(path)
        return result

    def os_write(fd, data):
        return points.around(
            "write", fd, lambda: REAL["write"](fd, data), lambda: REAL["write"](fd, data[: len(data) // 2])
        )

    builtins.open = io.open = opened
    os.open, os.fsync, os.write = os_open, fsync, os_write
    os.truncate = lambda path, size: points.around("truncate", path, lambda: REAL["truncate"](path, size))


def _watch_folders(points: CrashPoints) -> None:
    def one_path(name):
        def call(path, *args, dir_fd=None, **kwargs):
            where = path
            if dir_fd is not None:
                kwargs["dir_fd"] = dir_fd
                where = os.path.join(REAL["readlink"](f"/proc/self/fd/{dir_fd}"), os.fspath(path))
            return points.around(name, where, lambda: REAL[name](path, *args, **kwargs))

        return call

    def moved(name):
        def call(source, target, **kwargs):
            result = points.around("rename", target, lambda: REAL[name](source, target, **kwargs))
            source, target = os.path.abspath(source), os.path.abspath(target)
            for path in [path for path in points.synced if path == source or path.startswith(source + os.sep)]:
                points.synced[target + path[len(source) :]] = points.synced.pop(path)
            return result

        return call

    for name in ("mkdir", "unlink", "rmdir"):
        setattr(os, name, one_path(name))
    os.remove = os.unlink
    os.rename, os.replace = moved("rename"), moved("replace")


def _watch_safetensors(points: CrashPoints) -> None:
    """Its writer is compiled code: half-way through it half of the file is there."""
    from safetensors import SafetensorError
    from safetensors.torch import save

    from laddpo.storage import checkpoint

    real = checkpoint.save_file

    def save_file(tensors, path, *args, **kwargs):
        def half():
            content = save(tensors)
            with REAL["open"](path, "wb") as f:
                f.write(content[: len(content) // 2])

        def action():
            real(tensors, path, *args, **kwargs)
            points.synced[os.path.abspath(path)] = 0

        try:
            return points.around("save_file", path, action, half)
        except OSError as error:
            raise SafetensorError(f"Error while serializing: I/O error: {error.strerror} (os error 28)") from None

    checkpoint.save_file = save_file
