"""Opens a possibly packed file as a stream of plain bytes, deciding by its first bytes and not by its name.

gzip (also of several members), zstandard, xz and bzip2. Memory stays bounded whatever the file claims: a stream that
unpacks to more than RATIO_LIMIT times its size is refused, and so is one that ends early or fails its checksum.
"""

from __future__ import annotations

import importlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

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
    return io.BufferedReader(_Guarded(path, raw, _unpacked(packing, path, raw)), buffer_size=1 << 20)


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
        except MemoryError:
            raise
        except Exception as error:  # each module has its own
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


def _unpacked(packing: str, path: Path, raw: BinaryIO) -> BinaryIO:
    """The stream of its unpacked bytes, by a module that some installations lack: a bare build of Python has few."""
    try:
        module = importlib.import_module(MODULES[packing])
    except ImportError as error:
        problem = f"is packed with {packing}, and this Python has no module {MODULES[packing]}"
        raise file_error(path, "DATA-51", problem, "Install it, or unpack the file yourself.") from error
    if packing == "zstandard":
        return module.CompressedInputStream(module.PythonFile(raw, mode="r"), "zstd")
    return module.open(raw)


MAGIC = {"gzip": b"\x1f\x8b", "zstandard": b"\x28\xb5\x2f\xfd", "xz": b"\xfd7zXZ\x00", "bzip2": b"BZh"}
ARCHIVE_MAGIC = (b"PK\x03\x04", b"PK\x05\x06", b"7z\xbc\xaf\x27\x1c", b"Rar!")
SUFFIXES = {".gz": "gzip", ".zst": "zstandard", ".xz": "xz", ".bz2": "bzip2"}
MODULES = {"gzip": "gzip", "zstandard": "pyarrow", "xz": "lzma", "bzip2": "bz2"}
