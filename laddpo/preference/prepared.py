"""The folder of prepared rows: written whole or not at all, read without pyarrow, datasets or torch.

    pairs.jsonl          one object per row: id, prompt (messages), chosen, rejected, split, group, answer?,
                         weight?, margin?
    tokens.safetensors   "ids" int32, all tokens one after the other; "offsets" int64 [rows * sequences + 1], in the
                         order prompt, chosen, rejected (examples: prompt, response)
    report.json  report.png  rejected.jsonl (with on_bad_row=skip)  manifest.json (last)

An SFT corpus is the same with examples.jsonl and two sequences a row. So are unpaired rows, with completions.jsonl,
whose objects have a completion and a label. Token ids are read through a memory map.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from laddpo.errors import UserError
from laddpo.preference.encoding.encode import EncodedCompletion, EncodedExample, EncodedPair
from laddpo.storage.atomic import (
    atomic_file,
    canonical_json,
    explained,
    read_json,
    sync_folder,
    write_bytes,
    write_json,
)
from laddpo.storage.manifests import MANIFEST, provenance, read_manifest, write_manifest
from laddpo.storage.temporaries import make_folder, remove_orphans, temporary_beside

TOKENS, REPORT, FIGURE, REJECTED = "tokens.safetensors", "report.json", "report.png", "rejected.jsonl"
SPLITS = ("train", "validation", "test")
PLAIN = {"weight": 1.0, "margin": 0.0}  # of rows that say nothing else, which are written without them


class PairRows(Sequence):
    """Rows of one split as EncodedPair, read from disk when asked for."""

    def __init__(self, prepared: Prepared, rows: np.ndarray):
        self._prepared, self.indices = prepared, rows

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self._prepared.row(int(row)) for row in self.indices[index]]
        return self._prepared.row(int(self.indices[index]))

    def lengths(self) -> np.ndarray:
        """int64 [rows, sequences]: tokens of prompt and of each response, without reading the tokens."""
        return self._prepared.lengths()[self.indices]

    def column(self, name: str) -> list:
        """`id`, `group` or `answer` of every row; of unpaired rows also `label`."""
        return [self._prepared.columns[name][row] for row in self.indices]


class Prepared:
    """A finished folder. `train`, `validation` and `test` behave like lists of encoded rows."""

    kind, rows_file, sides = "", "", ()
    noun = "rows"
    read_columns: tuple[str, ...] = ("id", "group", "answer", "split", "weight", "margin")

    def __init__(self, folder: Path, manifest: dict):
        self.folder, self.manifest = folder, manifest
        self.columns: dict[str, list] = {name: [] for name in self.read_columns}
        with (folder / self.rows_file).open("rb") as lines:
            for line in lines:
                record = json.loads(line)
                record["split"] = SPLITS[SPLITS.index(record["split"])]  # one string for all rows, not one for each
                for name, values in self.columns.items():
                    values.append(record.get(name, PLAIN.get(name)))
        ids, self._offsets = map_tokens(folder / TOKENS)
        self._ids = ids.view(np.ndarray)  # a memory map still, without the cost of its class at every slice
        split = np.array([SPLITS.index(name) for name in self.columns["split"]])
        sides = (PairRows(self, np.flatnonzero(split == side)) for side in range(len(SPLITS)))
        self.train, self.validation, self.test = sides

    @classmethod
    def load(cls, folder: Path, verify: bool = True):
        """The folder's rows; UserError when it is unfinished or its files are not those that were sealed."""
        folder = Path(folder)
        manifest = read_manifest(folder, cls.kind, verify=verify)
        if manifest is None:
            raise UserError(
                f"{folder} has no {MANIFEST}, so it is not a finished folder of prepared rows. Run prepare."
            )
        return cls(folder, manifest)

    def __len__(self) -> int:
        return len(self.columns["id"])

    @property
    def result_split(self) -> str:
        """The split that the table of results is measured on: test, or validation if no row is held out for a test."""
        return "test" if len(self.test) else "validation"

    def result_rows(self, count: int | None) -> PairRows:
        """The rows of `result_split`, at most `count` of them."""
        return PairRows(self, getattr(self, self.result_split).indices[:count])

    @property
    def content(self) -> str:
        """Hash of the rows and their tokens: equal for equal data, whatever files it came from."""
        return self.manifest["fields"]["content"]

    def report(self) -> dict:
        """What report.json says."""
        return read_json(self.folder / REPORT)

    def sequences(self, row: int) -> list[np.ndarray]:
        """int32 [L] of prompt and responses of a row."""
        width = 1 + len(self.sides)
        edges = self._offsets[row * width : (row + 1) * width + 1]
        return [self._ids[start:end] for start, end in pairwise(edges)]

    def lengths(self) -> np.ndarray:
        """int64 [rows, sequences]."""
        return np.diff(self._offsets).reshape(-1, 1 + len(self.sides))

    def texts(self, split: str) -> Iterator[dict]:
        """The records of a split, read one by one."""
        with (self.folder / self.rows_file).open("rb") as lines:
            for line in lines:
                record = json.loads(line)
                if record["split"] == split:
                    yield record

    def row(self, row: int):
        raise NotImplementedError


class PreparedPairs(Prepared):
    """Prepared preference pairs."""

    kind, rows_file, sides = "prepared", "pairs.jsonl", ("chosen", "rejected")
    noun = "pairs"

    def row(self, row: int) -> EncodedPair:
        names = ("group", "weight", "margin")
        return EncodedPair(self.columns["id"][row], *self.sequences(row), *(self.columns[name][row] for name in names))


class PreparedUnpaired(Prepared):
    """Prepared unpaired rows: a completion and its label each."""

    kind, rows_file, sides = "unpaired rows", "completions.jsonl", ("completion",)
    read_columns = (*Prepared.read_columns, "label")

    def row(self, row: int) -> EncodedCompletion:
        names = ("label", "group", "weight")
        known = (self.columns[name][row] for name in names)
        return EncodedCompletion(self.columns["id"][row], *self.sequences(row), *known)


class PreparedExamples(Prepared):
    """A prepared SFT corpus."""

    kind, rows_file, sides = "prepared_examples", "examples.jsonl", ("response",)

    def row(self, row: int) -> EncodedExample:
        return EncodedExample(self.columns["id"][row], *self.sequences(row))


def kind_of_folder(folder: Path) -> type[PreparedPairs] | type[PreparedUnpaired]:
    """What a folder of preference data holds, pairs or unpaired rows, as its manifest says."""
    manifest = read_manifest(Path(folder), PreparedPairs.kind, PreparedUnpaired.kind, verify=False)
    is_unpaired = manifest is not None and manifest["kind"] == PreparedUnpaired.kind
    return PreparedUnpaired if is_unpaired else PreparedPairs


def split_in_two(pairs: Iterable[EncodedPair]) -> list[EncodedCompletion]:
    """The chosen side of each pair as a desirable completion, then its rejected side as an undesirable one."""
    return [
        EncodedCompletion(f"{pair.id}-{side}", pair.prompt_ids, ids, label, pair.group, pair.weight)
        for pair in pairs
        for side, ids, label in (("chosen", pair.chosen_ids, True), ("rejected", pair.rejected_ids, False))
    ]


def chosen_examples(rows: Iterable[EncodedPair | EncodedCompletion]) -> list[EncodedExample]:
    """The chosen side of pairs, or the desirable completions, as SFT examples."""
    sides = ((row, row.completion_ids if isinstance(row, EncodedCompletion) else row.chosen_ids) for row in rows)
    return [EncodedExample(row.id, row.prompt_ids, ids) for row, ids in sides if getattr(row, "label", True)]


class PreparedWriter:
    """Writes the files of one folder row by row; nothing has its name before `finish`, and the manifest is last."""

    def __init__(self, folder: Path, rows_file: str):
        self._folder, self._rows_file = folder, rows_file
        self._stack = ExitStack()
        folder.mkdir(parents=True, exist_ok=True)
        self._rows = self._stack.enter_context(atomic_file(folder / rows_file))
        self._ids = self._stack.enter_context(tempfile.TemporaryFile(dir=folder))  # noqa: SIM115
        self._offsets = array("q", [0])
        self._digest = hashlib.sha256()

    def add(self, record: Mapping[str, Any], sequences: Iterable[np.ndarray]) -> None:
        """One row: what its line in the rows file says, and its token ids in order."""
        line = canonical_json(record).encode("utf-8") + b"\n"
        self._rows.write(line)
        self._digest.update(line)
        for ids in sequences:
            block = np.ascontiguousarray(ids, dtype="<i4").tobytes()
            self._ids.write(block)
            self._digest.update(block)
            self._offsets.append(self._offsets[-1] + len(ids))

    def finish(
        self, kind: str, fields: Mapping[str, Any], report: dict, figure: bytes, more: Sequence[str] = ()
    ) -> None:
        """Write the tokens, the report and the manifest; `more` names other files already in the folder."""
        with atomic_file(self._folder / TOKENS) as out:
            write_tokens(out, self._ids, np.frombuffer(self._offsets, dtype=np.int64))
        self._stack.close()
        write_json(self._folder / REPORT, report)
        write_bytes(self._folder / FIGURE, figure)
        sealed = {**fields, "content": self._digest.hexdigest()}
        files = [self._rows_file, TOKENS, REPORT, FIGURE, *more]
        write_manifest(self._folder, kind, sealed, files, **provenance())

    def __enter__(self) -> PreparedWriter:
        return self

    def __exit__(self, *exception) -> bool | None:
        """Without `finish` there is no manifest, and the folder is nothing."""
        return self._stack.__exit__(*exception)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder` that takes its name when the block ends well, and vanishes otherwise.

    When another process finished the same folder meanwhile, its folder stays: equal names mean equal content.
    """
    remove_orphans(folder.parent)
    with explained(folder), temporary_beside(folder) as building:
        make_folder(building)
        yield building
        try:
            os.rename(building, folder)
        except OSError as error:
            if folder.exists() and not (folder / MANIFEST).exists():
                raise UserError(
                    f"{folder} is in the way: it exists and is unfinished. Remove it and run again."
                ) from error
            if not folder.exists():
                raise
        sync_folder(folder.parent)


def write_tokens(out, ids_file, offsets: np.ndarray) -> None:
    """A safetensors file of "ids" and "offsets", the ids copied from a file: they never are in memory at once."""
    ids_bytes, offsets_bytes = int(offsets[-1]) * 4, len(offsets) * 8
    header = {
        "offsets": {"dtype": "I64", "shape": [len(offsets)], "data_offsets": [0, offsets_bytes]},
        "ids": {
            "dtype": "I32",
            "shape": [int(offsets[-1])],
            "data_offsets": [offsets_bytes, offsets_bytes + ids_bytes],
        },
    }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    out.write(len(text).to_bytes(8, "little") + text)
    out.write(offsets.astype("<i8").tobytes())
    ids_file.flush()
    ids_file.seek(0)
    shutil.copyfileobj(ids_file, out, 1 << 20)


def map_tokens(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """ "ids" as a memory map and "offsets" of a tokens file."""
    with path.open("rb") as f:
        header_bytes = int.from_bytes(f.read(8), "little")
        header = json.loads(f.read(header_bytes))
    start = 8 + header_bytes
    offsets_at, ids_at = (start + header[name]["data_offsets"][0] for name in ("offsets", "ids"))
    offsets = np.fromfile(path, dtype="<i8", count=header["offsets"]["shape"][0], offset=offsets_at)
    count = header["ids"]["shape"][0]
    ids = np.memmap(path, dtype="<i4", mode="r", offset=ids_at, shape=(count,)) if count else np.zeros(0, "<i4")
    return ids, offsets
