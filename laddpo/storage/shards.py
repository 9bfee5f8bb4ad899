"""A store of values of rows: a folder of safetensors shards and a manifest that names them with their sha256 and, in
plain text, every field the values depend on.

Values are addressed by row id and a digest of the row's token ids, so other rows or another order neither spoil nor
repeat anything: a store only grows. A shard is at most a few thousand rows, appended whole; a killed pass loses at most
the shard it was filling. A shard's name is the beginning of its sha256: one that the manifest lacks, because two
processes wrote it on a file system without locks, is taken in.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
        self._values: dict[StoredPair, Any] = {}
        self._shards: dict[str, dict] = {}
        self._known: set[str] = set()  # shards whose values are here
        self._refuse_others()
        self.refresh()

    @classmethod
    def open(cls, stores: Path, fields: Mapping[str, Any]):
        """The store for `fields` inside the folder of stores; empty when nothing was computed yet."""
        return cls(stores / manifests.fingerprint(dict(fields, format=FORMAT)), fields)

    def _add(self, pairs: Sequence[StoredPair], tensors: Mapping[str, np.ndarray]) -> None:
        """Take the values of a shard into `_values`."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self._values)

    def why_missing(self, lacking: Iterable[StoredPair]) -> str:
        """Why these pairs have to be computed: which settings, or which pairs, differ from what is stored."""
        if not self._values:
            return self._differs_from_nearest()
        ids = {pair.id for pair in self._values}
        reasons = Counter(
            "with more draws than are stored"
            if pair in self._values
            else "with other tokens than are stored (data.max_length)"
            if pair.id in ids
            else "new to this store"
            for pair in lacking
        )
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
        self._shards = taken_in | shards

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
        atomic.write_json(self.folder / manifests.MANIFEST, manifests.with_seal(content))


def _addresses(tensors: Mapping[str, np.ndarray]) -> list[StoredPair]:
    return [
        StoredPair(bytes(identifier).decode().rstrip(), bytes(digest).hex())
        for identifier, digest in zip(tensors["ids"], tensors["digests"], strict=True)
    ]
