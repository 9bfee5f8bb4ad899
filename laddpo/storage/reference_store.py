"""The store of reference log-likelihoods: one float64 per (pair, side, draw), computed once, read by every run.

A folder of safetensors shards and a manifest that names them with their sha256 and, in plain text, every field the
values depend on. Values are addressed by pair id and a digest of the pair's token ids, so other rows, another order or
more draws neither spoil nor repeat anything: a store only grows. A shard is at most a few thousand pairs, appended
whole; a killed precompute loses at most the shard it was filling. A shard's name is the beginning of its sha256: one
that the manifest lacks, because two processes wrote it on a file system without locks, is taken in.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from laddpo.errors import UserError
from laddpo.storage import atomic, locks, manifests
from laddpo.storage.folders import refuse_others

SIDES = ("chosen", "rejected")
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


def _shard_name(digest: str) -> str:
    return f"shard-{digest[:24]}.safetensors"


class ReferenceStore:
    """Reads and grows one store. `fields` are what the values depend on; the folder's name carries their fingerprint.

    Raises `UserError` when a shard is damaged or the folder holds values of other fields.
    """

    def __init__(self, folder: Path, fields: Mapping[str, Any]):
        self.folder = folder
        self.fields = dict(fields)
        self._values: dict[StoredPair, np.ndarray] = {}
        self._shards: dict[str, dict] = {}
        self._known: set[str] = set()  # shards whose values are here
        self._refuse_others()
        self.refresh()

    @classmethod
    def open(cls, stores: Path, fields: Mapping[str, Any]) -> ReferenceStore:
        """The store for `fields` inside the folder of stores; empty when nothing was computed yet."""
        return cls(stores / manifests.fingerprint(dict(fields, format=FORMAT)), fields)

    def missing(self, pair: StoredPair, draws: Iterable[int]) -> list[int]:
        """The draws of this pair that the store lacks."""
        values = self._values.get(pair)
        if values is None:
            return list(draws)
        return [draw for draw in draws if draw >= values.shape[1] or np.isnan(values[:, draw]).any()]

    def values(self, pair: StoredPair, draws: Iterable[int]) -> np.ndarray:
        """The reference's value of each draw. # float64 [sides, draws]. Raises `UserError` when one is absent."""
        draws = list(draws)
        absent = self.missing(pair, draws)
        if absent:
            raise UserError(
                f"{self.folder}: has no reference value for pair {pair.id}, draws {absent}. "
                "Run python -m laddpo.precompute with the same settings, or leave auto=true."
            )
        return self._values[pair][:, draws]

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

    def __len__(self) -> int:
        return len(self._values)

    def append(self, pairs: list[StoredPair], first_draw: int, values: np.ndarray) -> None:
        """Add a shard. # values float64 [pairs, sides, draws], for the draws first_draw, first_draw + 1, …

        A bound on a log-probability is never positive and never NaN: such values stop here, naming the pair.
        """
        wrong = ~np.isfinite(values) | (values > 0)
        if wrong.any():
            index = int(np.argwhere(wrong)[0][0])
            raise UserError(
                f"reference log-likelihood of pair {pairs[index].id} is {values[wrong][0]}, expected a finite number "
                "<= 0. The model's weights or the compute precision are broken for this text; check "
                "hardware.precision and model.model_name_or_path."
            )
        content = save_tensors(
            {
                "ids": np.stack([np.frombuffer(pair.id.encode().ljust(64), dtype=np.uint8) for pair in pairs]),
                "digests": np.stack([np.frombuffer(bytes.fromhex(pair.digest), dtype=np.uint8) for pair in pairs]),
                "values": np.ascontiguousarray(values, dtype=np.float64),
                "first_draw": np.array([first_draw], dtype=np.int64),
            }
        )
        digest = hashlib.sha256(content).hexdigest()
        name = _shard_name(digest)
        with locks.locked(self.folder, check=self._refuse_others):
            self._read_manifest()
            atomic.write_bytes(self.folder / name, content)
            self._shards[name] = {"sha256": digest, "pairs": len(pairs), "first_draw": first_draw}
            self._write_manifest()
        self._known.add(name)
        self._add(pairs, first_draw, values)

    def _refuse_others(self) -> None:
        refuse_others(self.folder, ("reference",), True, "the reference store")

    def refresh(self) -> None:
        """Read what other processes have added since."""
        self._read_manifest()
        for name in self._shards:
            if name not in self._known:
                self._read_shard(name)
        if not self._shards:
            return
        listed = len(self._shards)
        for path in sorted(self.folder.glob(_shard_name("*"))):
            if path.name not in self._shards:
                self._take_in(path)
        if len(self._shards) > listed:
            self._list_taken_in()

    def _add(self, pairs: list[StoredPair], first_draw: int, values: np.ndarray) -> None:
        end = first_draw + values.shape[2]
        for pair, row in zip(pairs, values, strict=True):
            known = self._values.get(pair)
            if known is None or known.shape[1] < end:
                grown = np.full((len(row), end), np.nan)
                if known is not None:
                    grown[:, : known.shape[1]] = known
                self._values[pair] = known = grown
            known[:, first_draw:end] = row

    def _read_manifest(self) -> None:
        path = self.folder / manifests.MANIFEST
        if not path.exists():
            return
        manifest = manifests.unsealed(path)
        try:
            differences = manifests.differing_fields(manifest["fields"], self.fields)
            shards = {
                name: {key: entry[key] for key in ("sha256", "pairs", "first_draw")}
                for name, entry in manifest["shards"].items()
            }
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path}: is damaged ({error!r}). Remove {self.folder} and run again to compute its values."
            ) from error
        if differences:
            raise UserError(f"{self.folder}: holds reference values of other settings:", *differences)
        taken_in = {name: entry for name, entry in self._shards.items() if (self.folder / name).exists()}
        self._shards = taken_in | shards

    def _read_shard(self, name: str) -> None:
        if Path(name).name != name:
            raise UserError(f"{self.folder / manifests.MANIFEST}: names {name!r}, which is no shard of this folder.")
        path = self.folder / name
        content = path.read_bytes() if path.exists() else b""
        if hashlib.sha256(content).hexdigest() != self._shards[name]["sha256"]:
            raise UserError(
                f"{path}: differs from what {manifests.MANIFEST} sealed (missing, truncated or changed). "
                f"Remove {self.folder} and run again to compute its values."
            )
        tensors = load_tensors(content)
        pairs = [
            StoredPair(bytes(identifier).decode().rstrip(), bytes(digest).hex())
            for identifier, digest in zip(tensors["ids"], tensors["digests"], strict=True)
        ]
        self._add(pairs, int(tensors["first_draw"][0]), tensors["values"])
        self._known.add(name)

    def _take_in(self, path: Path) -> None:
        """A whole shard that the manifest lacks; one that is not whole is left alone."""
        content = path.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        if path.name == _shard_name(digest):
            tensors = load_tensors(content)
            entry = {"sha256": digest, "pairs": len(tensors["ids"]), "first_draw": int(tensors["first_draw"][0])}
            self._shards[path.name] = entry
            self._read_shard(path.name)

    def _list_taken_in(self) -> None:
        """Name in the manifest what was taken in, so that it is sealed. A read-only folder stays as it is."""
        with contextlib.suppress(UserError, OSError), locks.locked(self.folder, check=self._refuse_others):
            self._read_manifest()
            self._write_manifest()

    def _write_manifest(self) -> None:
        content = {
            "kind": "reference",
            "fingerprint": manifests.fingerprint(dict(self.fields, format=FORMAT)),
            "fields": self.fields,
            "shards": self._shards,
            "provenance": manifests.provenance(),
        }
        atomic.write_json(self.folder / manifests.MANIFEST, manifests.with_seal(content))
