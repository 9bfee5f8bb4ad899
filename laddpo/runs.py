"""Folders that other programs may rely on: atomic files, manifests written last, fingerprints of listed fields.

Every file of a run, a store or a prepared folder is written through this module: temporary name in the same folder,
fsync, rename, fsync of the folder. A folder without a manifest is unfinished and is never read as if it were whole.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import platform
import time
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import IO, Any

from laddpo.errors import Damaged, UserError
from laddpo.locks import disk_message, open_own
from laddpo.locks import locked as locked  # one of the things that folders are written by
from laddpo.temporaries import make_folder, move_to, open_file, temporary_beside

MANIFEST = "manifest.json"
SEAL = "seal"


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text. NaN and infinity are refused."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def fingerprint(fields: Mapping[str, Any]) -> str:
    """16 hex digits that change when any listed field changes."""
    return hashlib.sha256(canonical_json(fields).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def differing_fields(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """One line per field whose value differs: `field: stored <a>, now <b>`. Nested fields are named with dots."""

    def flatten(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
        if isinstance(value, Mapping):
            for key in value:
                yield from flatten(f"{prefix}{key}.", value[key])
        else:
            yield prefix[:-1], list(value) if isinstance(value, tuple) else value  # as JSON gives it back

    a, b = dict(flatten("", stored)), dict(flatten("", wanted))
    absent = "(absent)"
    return [
        f"{key}: stored {a.get(key, absent)!r}, now {b.get(key, absent)!r}"
        for key in sorted(a.keys() | b.keys())
        if a.get(key, absent) != b.get(key, absent)
    ]


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes, read in bounded memory."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(f)


def _digest(f: IO[bytes]) -> str:  # Python 3.10 has no hashlib.file_digest
    digest = hashlib.sha256()
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
        raise Damaged(
            f"{path}: cannot be read ({error}).", "It may be damaged; remove its folder and run again."
        ) from error


class JsonLines:
    """An append-only log of one JSON object per line, in which a torn last line can only come from a crash.

    `seal()` makes what is there durable and describes it; a run that goes on from a checkpoint gives that back to
    `cut`, which drops every later record and refuses a file whose earlier ones are no longer the same bytes.
    """

    def __init__(self, path: Path):
        self.path = path

    def line(self, record: Mapping[str, Any]) -> str:
        """The record as the log has it."""
        return json.dumps(record, allow_nan=False) + "\n"

    def append(self, record: Mapping[str, Any]) -> None:
        line = self.line(record)
        with explained(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            fd = open_own(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            with open(fd, "a", encoding="utf-8", newline="\n") as f:
                f.write(line)

    def read(self) -> list[dict]:
        """All records before the first line that is none."""
        if not self.path.exists():
            return []
        records = []
        for line in self.path.read_bytes().split(b"\n"):
            if line:
                try:
                    records.append(json.loads(line))
                except ValueError:
                    break
        return records

    def rewind(self, keep) -> None:
        """Drop a torn last line and every record for which `keep(record)` is false."""
        records = [record for record in self.read() if keep(record)]
        write_text(self.path, "".join(self.line(record) for record in records))

    def sync(self) -> None:
        """Make what was appended durable: a power cut takes no record that others rely on."""
        if self.path.exists():
            with explained(self.path):
                sync_file(self.path)

    def seal(self) -> dict[str, Any]:
        """Size and sha256 of the log as it is now, and on disk."""
        if not self.path.exists():
            return {"bytes": 0, "sha256": hashlib.sha256(b"").hexdigest()}
        self.sync()
        return {"bytes": self.path.stat().st_size, "sha256": file_sha256(self.path)}

    def cut(self, sealed: Mapping[str, Any]) -> None:
        """Back to what `seal` described. A log that is gone is said to be gone; a changed one raises `UserError`."""
        size = sealed["bytes"]
        if size and not self.path.exists():
            print(f"{self.path}: is missing; going on without the records of the steps before.")
            return
        write_bytes(self.path, self.require(sealed))

    def require(self, sealed: Mapping[str, Any]) -> bytes:
        """The bytes that `seal` described; `UserError` when the log no longer begins with them."""
        content = self.path.read_bytes()[: sealed["bytes"]] if sealed["bytes"] else b""
        if hashlib.sha256(content).hexdigest() != sealed["sha256"]:
            raise UserError(
                f"{self.path}: differs from what the checkpoint sealed (truncated or changed). Restore it, or remove "
                "it to go on without the records of the steps before."
            )
        return content


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


def write_manifest(folder: Path, kind: str, fields: Mapping[str, Any], files: list[str], **provenance: Any) -> None:
    """Seal `folder`: called last, after every file in `files` is on disk.

    `fields` are what the folder's values depend on (its fingerprint is taken over them); `provenance` is for people
    (how it was made) and may differ between equal folders.
    """
    sealed = {name: {"bytes": (folder / name).stat().st_size, "sha256": file_sha256(folder / name)} for name in files}
    content = {"kind": kind, "fingerprint": fingerprint(fields), "fields": dict(fields), "files": sealed}
    write_json(folder / MANIFEST, with_seal({**content, "provenance": provenance}))


def with_seal(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest with a hash over all of it, by which a change of the manifest itself is noticed."""
    return {**manifest, SEAL: hashlib.sha256(canonical_json(manifest).encode()).hexdigest()}


def unsealed(path: Path) -> Any:
    """The content of a manifest file, its seal verified. `UserError` names the file when it is damaged."""
    content = read_json(path)
    if not isinstance(content, dict) or not {"kind", "fields"} <= content.keys():
        return content
    bare = {name: value for name, value in content.items() if name != SEAL}
    is_older = bare.keys() <= {"kind", "fingerprint", "fields", "files", "shards", "provenance"} and SEAL not in content
    if with_seal(bare) != content and not is_older:
        raise Damaged(
            f"{path}: is damaged (its seal does not hold).", f"Remove the folder {path.parent} and run again."
        )
    return bare


def require_keys(path: Path, content: Any, names: Iterable[str], cure: str) -> None:
    """What we wrote into `path` must have these keys, nested ones named with dots; `cure` says what to do if not.

    Raises `UserError` naming the keys that are absent: its checksums held, so another version left them out.
    """
    lacking = [name for name in names if not _has(content, name.split("."))]
    if lacking:
        keys = list(content) if isinstance(content, Mapping) else []
        found = f"the keys {', '.join(map(repr, keys))}" if keys else "no keys"
        raise UserError(
            f"{path}: has {found}, expected also {', '.join(lacking)}; an older version of laddpo wrote it. {cure}"
        )


def _has(content: Any, keys: Iterable[str]) -> bool:
    for key in keys:
        if not isinstance(content, Mapping) or key not in content:
            return False
        content = content[key]
    return True


def present(folder: Path, names: Iterable[str]) -> list[str]:
    """Those of the names that are files of the folder."""
    return [name for name in names if (folder / name).exists()]


def read_manifest(folder: Path, *kinds: str, verify: bool = True) -> dict | None:
    """The manifest of a finished folder of one of these kinds, or None when the folder is absent or unfinished.

    Its fields are at least those of FIELDS. With `verify`, a file whose bytes differ from the sealed ones raises
    `Damaged` naming it.
    """
    path = folder / MANIFEST
    if not path.exists():
        return None
    manifest = unsealed(path)
    if not isinstance(manifest, dict) or manifest.get("kind") not in kinds:
        found = manifest.get("kind") if isinstance(manifest, dict) else type(manifest).__name__
        expected = " or ".join(map(repr, kinds))
        raise UserError(
            f"{path}: is a manifest of {found!r}, expected {expected}. "
            f"Point the setting at a {' or '.join(kinds)} folder."
        )
    try:
        sealed = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
        manifest["fields"].items(), manifest["fingerprint"]
    except (KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"{path}: is damaged ({error!r}).", f"Remove the folder {folder} and run again.") from error
    cure = f"Use that version, or make {folder} anew."
    require_keys(path, manifest["fields"], FIELDS.get(manifest["kind"], ()), cure)
    if verify:
        for name, (size, digest) in sealed.items():
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise UserError(f"{path}: names {name!r}, outside of its folder. It was not made by this program.")
            file = folder / name
            if not file.exists() or file.stat().st_size != size or file_sha256(file) != digest:
                raise Damaged(
                    f"{file}: differs from what {MANIFEST} sealed (missing, truncated or changed).",
                    CURES.get(manifest["kind"], f"Remove the folder {folder} and run again; it will be made anew."),
                )
    return manifest


def provenance() -> dict[str, Any]:
    """Versions and platform, for manifests; not part of any fingerprint."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": dict(_versions()),
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


@functools.cache
def _versions() -> tuple[tuple[str, str], ...]:
    names = ["laddpo", "torch", "transformers", "peft", "bitsandbytes", "hydra-core", "numpy", "safetensors"]
    versions = []
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions.append((name, metadata.version(name)))
    return tuple(versions)


FIELDS = {  # by kind of manifest: those that are read without asking whether they are there
    "prepared": ("encoding",),
    "weights": ("step", "base.base"),
}
CURES = {  # by kind of manifest: of folders that no stage makes anew
    "weights": "Restore it from a copy.",
    "train": "Restore it from a copy. The run's weights lie in folders with seals of their own.",
    "sft": "Restore it from a copy. The run's weights lie in folders with seals of their own.",
}
