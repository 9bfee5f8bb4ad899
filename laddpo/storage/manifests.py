"""Folders that other programs may rely on: atomic files, manifests written last, fingerprints of listed fields.

Every file of a run, a store or a prepared folder is written through this module: temporary name in the same folder,
fsync, rename, fsync of the folder. A folder without a manifest is unfinished and is never read as if it were whole.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import platform
import time
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from laddpo.errors import Damaged, UserError
from laddpo.storage.atomic import (
    RESTORE,
    canonical_json,
    file_sha256,
    read_json,
    write_json,
)

MANIFEST = "manifest.json"
SEAL = "seal"


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
        raise Damaged(f"{path}: is damaged (its seal does not hold).", RESTORE)
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
    cure = CURES.get(kinds[0], f"Remove the folder {folder} and run again to make it.")
    try:
        manifest = unsealed(path)
    except Damaged as error:
        raise Damaged(error.found, cure) from error
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
        raise Damaged(f"{path}: is damaged ({error!r}).", cure) from error
    require_keys(
        path, manifest["fields"], FIELDS.get(manifest["kind"], ()), f"Use that version, or make {folder} again."
    )
    if verify:
        for name, (size, digest) in sealed.items():
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise UserError(f"{path}: names {name!r}, outside of its folder. It was not made by this program.")
            file = folder / name
            if not file.exists() or file.stat().st_size != size or file_sha256(file) != digest:
                raise Damaged(
                    f"{file}: differs from what {MANIFEST} sealed (missing, truncated or changed).",
                    cure,
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
CURES = {  # by kind of manifest: of folders that no stage makes again
    "weights": "Restore it from a copy.",
    "train": "Restore it from a copy. The run's weights lie in folders with seals of their own.",
    "sft": "Restore it from a copy. The run's weights lie in folders with seals of their own.",
}
