"""A store of values of rows: a folder of safetensors shards and a manifest that names them with their sha256 and, in
plain text, every field the values depend on.

Values are addressed by row id and a digest of the row's token ids, so other rows or another order neither spoil nor
repeat anything: a store only grows. A shard is at most a few thousand rows, appended whole; a killed pass loses at most
the shard it was filling. A shard's name is the beginning of its sha256: one that the manifest lacks is taken in. A pass
that was killed leaves such shards, and so do two processes on a file system without locks.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from laddpo.errors import UserError
from laddpo.storage import atomic, locks, manifests
from laddpo.storage.folders import WORDS, refuse_others

FORMAT = 1
NOTHING_STORED = "nothing is stored yet"


def token_digest(*token_ids: np.ndarray) -> str:
    """32 hex digits of the token ids of prompt, chosen and rejected: what the values belong to."""
    digest = hashlib.blake2b(digest_size=16, person=b"laddpo-tokens-v1")
    for ids in token_ids:
        encoded = np.ascontiguousarray(ids, dtype="<i4").tobytes()
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return digest.hexdigest()


@dataclass(frozen=True)
class StoredPair:
    """The address of a pair's values."""

    id: str
    digest: str

    @property
    def key(self) -> bytes:
        """16 bytes that stand for both: a store of a million pairs holds these, and no objects."""
        return hashlib.blake2b(f"{self.id} {self.digest}".encode(), digest_size=16).digest()


class ShardStore:
    """Reads and grows one store. `fields` are what the values depend on; the folder's name carries their fingerprint.

    A kind of store says its `kind` (of its manifest), the `prefix` of its shards' names, what they hold in `noun`, and
    in `facts` the tensors of which the manifest repeats the first number. Raises `UserError` when a shard is damaged or
    the folder holds values of other fields.
    """

    kind, prefix, noun = "", "", ""
    facts: tuple[str, ...] = ()

    def __init__(self, folder: Path, fields: Mapping[str, Any]):
        self.folder = folder
        self.fields = dict(fields)
        self._places: dict[bytes, int] = {}  # by a pair's key, the place of its values in the order of their coming
        self._ids: set[int] = set()  # hashes of the pairs' ids
        self._shards: dict[str, dict] = {}
        self._known: set[str] = set()  # shards whose values are here
        self._seen: tuple[int, ...] = ()  # size and times of the manifest that was read last
        self._is_filling = False
        self._refuse_others()
        self.refresh()

    @classmethod
    def open(cls, stores: Path, fields: Mapping[str, Any]):
        """The store for `fields` inside the folder of stores; empty when nothing was computed yet."""
        return cls(stores / manifests.fingerprint(dict(fields, format=FORMAT)), fields)

    def _add(self, pairs: Sequence[StoredPair], tensors: Mapping[str, np.ndarray]) -> None:
        """Take the values of a shard into memory."""
        raise NotImplementedError

    def lacks(self, pair: StoredPair, draws: Sequence[int]) -> bool:
        """Whether something of a pair has to be computed."""
        return pair not in self

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, pair: StoredPair) -> bool:
        return pair.key in self._places

    def _place(self, pair: StoredPair) -> int:
        """Where the values of a pair are, or will be."""
        self._ids.add(hash(pair.id))
        return self._places.setdefault(pair.key, len(self._places))

    def reason(self, pair: StoredPair) -> str:
        """How a pair that has to be computed differs from those that are stored."""
        if pair in self:
            return "with more draws than are stored"
        if hash(pair.id) in self._ids:
            return "with other tokens than are stored (data.max_length)"
        return "new to this store"

    def why_missing(self, reasons: Counter[str]) -> str:
        """Why so many pairs have to be computed for each `reason`: which settings, or which pairs, differ from what is
        stored."""
        if not len(self):
            return self._differs_from_nearest()
        return "; ".join(f"{count} {reason}" for reason, count in reasons.items())

    def _differs_from_nearest(self) -> str:
        """The fields in which the most similar of the other stores differs."""
        candidates = []
        for manifest in sorted(self.folder.parent.glob(f"*/{manifests.MANIFEST}")):
            with contextlib.suppress(UserError, KeyError, TypeError, AttributeError):
                fields = manifests.unsealed(manifest)["fields"]
                candidates.append((manifests.differing_fields(fields, self.fields), manifest.parent.name))
        if not candidates:
            return NOTHING_STORED
        differences, name = min(candidates, key=lambda candidate: len(candidate[0]))
        return f"a new store; the nearest, {name}, was made with other settings: {'; '.join(differences)}"

    def refresh(self) -> None:
        """Read what other processes have added since."""
        self._read_manifest()
        self._read_listed()
        if not self._shards:
            return
        listed = len(self._shards)
        for path in sorted(self.folder.glob(self._shard_name("*"))):
            if path.name not in self._shards:
                self._take_in(path)
        if len(self._shards) > listed:
            self._list_taken_in()

    @contextlib.contextmanager
    def _growing(self) -> Iterator[None]:
        """Hold the folder to write in it, with its manifest as it is now."""
        with locks.locked(self.folder, check=self._refuse_others):
            self._read_manifest()
            yield

    @contextlib.contextmanager
    def filling(self) -> Iterator[None]:
        """Within the block new shards are not listed one by one, which takes longer the more there are: the manifest
        is written with the first shard of a store, and at the end, whatever ends it. A killed process leaves shards
        that the next one takes in."""
        before, self._is_filling = set(self._shards), True
        try:
            yield
        finally:
            self._is_filling = False
            if self._shards.keys() - before:
                with self._growing():
                    self._write_manifest()

    def _write_shard(self, pairs: Sequence[StoredPair], tensors: Mapping[str, np.ndarray]) -> None:
        """Write one more shard and name it in the manifest; within `_growing`."""
        content = save_tensors(
            {
                "ids": np.stack([np.frombuffer(pair.id.encode().ljust(64), dtype=np.uint8) for pair in pairs]),
                "digests": np.stack([np.frombuffer(bytes.fromhex(pair.digest), dtype=np.uint8) for pair in pairs]),
                **tensors,
            }
        )
        digest = hashlib.sha256(content).hexdigest()
        name = self._shard_name(digest)
        atomic.write_bytes(self.folder / name, content)
        self._shards[name] = self._entry(digest, pairs, tensors)
        if not self._is_filling or not self._seen:
            self._write_manifest()
        self._known.add(name)
        self._add(pairs, tensors)

    def _entry(self, digest: str, pairs: Sequence[StoredPair], tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
        return {"sha256": digest, "pairs": len(pairs), **{name: int(tensors[name][0]) for name in self.facts}}

    def _shard_name(self, digest: str) -> str:
        return f"{self.prefix}-{digest[:24]}.safetensors"

    def _refuse_others(self) -> None:
        refuse_others(self.folder, (self.kind,), True, WORDS[self.kind].replace("a ", "the ", 1))

    def _read_manifest(self) -> None:
        path = self.folder / manifests.MANIFEST
        if not path.exists():
            return
        found = _state(path)
        if found == self._seen:
            return
        manifest = manifests.unsealed(path)
        try:
            differences = manifests.differing_fields(manifest["fields"], self.fields)
            shards = {
                name: {key: entry[key] for key in ("sha256", "pairs", *self.facts)}
                for name, entry in manifest["shards"].items()
            }
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: is damaged ({error!r}). {self._remove}") from error
        if differences:
            raise UserError(f"{self.folder}: holds {self.noun} of other settings:", *differences)
        taken_in = {name: entry for name, entry in self._shards.items() if (self.folder / name).exists()}
        self._shards, self._seen = taken_in | shards, found

    @property
    def _remove(self) -> str:
        return f"Remove {self.folder} and run again to compute its values."

    def _read_listed(self) -> None:
        for name in self._shards:
            if name not in self._known:
                self._read_shard(name)

    def _read_shard(self, name: str) -> None:
        if Path(name).name != name:
            raise UserError(f"{self.folder / manifests.MANIFEST}: names {name!r}, which is no shard of this folder.")
        path = self.folder / name
        content = path.read_bytes() if path.exists() else b""
        if hashlib.sha256(content).hexdigest() != self._shards[name]["sha256"]:
            raise UserError(
                f"{path}: differs from what {manifests.MANIFEST} sealed (missing, truncated or changed). {self._remove}"
            )
        tensors = load_tensors(content)
        self._add(_addresses(tensors), tensors)
        self._known.add(name)

    def _take_in(self, path: Path) -> None:
        """A whole shard that the manifest lacks; one that is not whole is left alone."""
        content = path.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        if path.name == self._shard_name(digest):
            tensors = load_tensors(content)
            self._shards[path.name] = self._entry(digest, _addresses(tensors), tensors)
            self._read_shard(path.name)

    def _list_taken_in(self) -> None:
        """Name in the manifest what was taken in, so that it is sealed. A read-only folder stays as it is."""
        with contextlib.suppress(UserError, OSError), self._growing():
            self._write_manifest()

    def _write_manifest(self) -> None:
        content = {
            "kind": self.kind,
            "fingerprint": manifests.fingerprint(dict(self.fields, format=FORMAT)),
            "fields": self.fields,
            "shards": self._shards,
            "provenance": manifests.provenance(),
        }
        path = self.folder / manifests.MANIFEST
        atomic.write_json(path, manifests.with_seal(content))
        self._seen = _state(path)


def _addresses(tensors: Mapping[str, np.ndarray]) -> list[StoredPair]:
    return [
        StoredPair(bytes(identifier).decode().rstrip(), bytes(digest).hex())
        for identifier, digest in zip(tensors["ids"], tensors["digests"], strict=True)
    ]


def _state(path: Path) -> tuple[int, ...]:
    """What tells one writing of a file from another without reading it: each makes a new file."""
    facts = path.stat()
    return facts.st_ino, facts.st_size, facts.st_mtime_ns
