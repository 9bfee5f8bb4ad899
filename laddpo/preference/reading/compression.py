"""Opens a possibly packed file as a stream of plain bytes, deciding by its first bytes and not by its name.

gzip (also of several members), zstandard, xz and bzip2. Memory stays bounded whatever the file claims: a stream that
unpacks to more than RATIO_LIMIT times its size is refused, and so is one that ends early or fails its checksum.
"""

from __future__ import annotations

import gzip
import importlib
import io
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from laddpo.preference.reading.bad_rows import file_error

RATIO_LIMIT = 200
RATIO_FREE_BYTES = 64 * 2**20  # small outputs of repetitive rows may exceed the ratio


def open_plain(path: Path, raw: BinaryIO, warn: Callable[[str], None]) -> BinaryIO:
    """`raw` itself when it is not packed, else a stream of its unpacked bytes."""
    head = raw.read(8)
    raw.seek(0)
    if head.startswith(ARCHIVE_MAGIC):
        raise file_error(path, "DATA-48", "is an archive of files", "Unpack it first and give the folder.")
    packing = next((name for name, magic in MAGIC.items() if head.startswith(magic)), None)
    named = SUFFIXES.get(path.suffix.lower())
    if packing != named:
        warn(
            f"{path}: its name says {named or 'not packed'}, its content {packing or 'not packed'}; the content decides"
        )
    if packing is None:
        return raw
    return io.BufferedReader(_Guarded(path, raw, OPENERS[packing](path, raw)), buffer_size=1 << 20)


class _Guarded(io.RawIOBase):
    """Unpacked bytes, with errors that name the file and a limit on how many there may be."""

    def __init__(self, path: Path, raw: BinaryIO, unpacked: BinaryIO):
        self._path, self._raw, self._unpacked = path, raw, unpacked
        self._packed_bytes = path.stat().st_size
        self._bytes_out = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        try:
            block = self._unpacked.read(len(buffer))
        except (EOFError, OSError, ValueError, zlib.error, *_LZMA_ERRORS) as error:
            words = " ".join(str(error).split())[:120]
            if isinstance(error, EOFError) or "runcated" in words:
                problem = f"ends early: the packed data stops after {self._bytes_out:,} unpacked bytes"
                raise file_error(self._path, "DATA-45", problem, "Copy the file again.") from error
            problem = f"is damaged after {self._bytes_out:,} unpacked bytes ({words})"
            raise file_error(self._path, "DATA-46", problem, "Copy the file again.") from error
        self._bytes_out += len(block)
        if self._bytes_out > max(RATIO_FREE_BYTES, RATIO_LIMIT * self._packed_bytes):
            problem = f"unpacks to more than {RATIO_LIMIT} times its {self._packed_bytes:,} bytes"
            raise file_error(self._path, "DATA-49", problem, "Unpack it yourself if that is right.")
        buffer[: len(block)] = block
        return len(block)


def _open_zstd(path: Path, raw: BinaryIO) -> BinaryIO:
    pa = _module("pyarrow", path, "zstandard")
    return pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), "zstd")


def _open_xz(path: Path, raw: BinaryIO) -> BinaryIO:
    return _module("lzma", path, "xz").LZMAFile(raw)


def _open_bzip2(path: Path, raw: BinaryIO) -> BinaryIO:
    return _module("bz2", path, "bzip2").BZ2File(raw)


def _module(name: str, path: Path, packing: str) -> Any:
    """A module that some installations lack: pyarrow, or parts of the standard library in a bare build of Python."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        problem = f"is packed with {packing}, and this Python has no module {name}"
        raise file_error(path, "DATA-51", problem, "Install it, or unpack the file yourself.") from error


try:
    from lzma import LZMAError

    _LZMA_ERRORS: tuple[type[Exception], ...] = (LZMAError,)
except ImportError:
    _LZMA_ERRORS = ()
MAGIC = {"gzip": b"\x1f\x8b", "zstd": b"\x28\xb5\x2f\xfd", "xz": b"\xfd7zXZ\x00", "bzip2": b"BZh"}
ARCHIVE_MAGIC = (b"PK\x03\x04", b"PK\x05\x06", b"7z\xbc\xaf\x27\x1c", b"Rar!")
SUFFIXES = {".gz": "gzip", ".zst": "zstd", ".xz": "xz", ".bz2": "bzip2"}
OPENERS: dict[str, Callable[[Path, BinaryIO], BinaryIO]] = {
    "gzip": lambda _, raw: gzip.GzipFile(fileobj=raw),
    "zstd": _open_zstd,
    "xz": _open_xz,
    "bzip2": _open_bzip2,
}
