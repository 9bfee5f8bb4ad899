"""The part of the benchmark about many pairs: what stages take as the data grow, and how much faster than the data.

Each stage is a process of its own, as a user starts it. Its time and its largest memory are those that the system
reports. Rows are random letters with the lengths of real dialogues; a letter is a token of llada_nano.
"""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from laddpo.benchmarking.limits import Rows
from laddpo.benchmarking.process_cost import process_cost
from laddpo.benchmarking.workload import Workbench, pair_lengths
from laddpo.errors import UserError
from laddpo.results.tables import markdown
from laddpo.storage.atomic import atomic_file, read_json, write_json
from laddpo.storage.checkpoint import step_folder, step_folders, step_of
from laddpo.storage.reference_store import ReferenceStore
from laddpo.storage.shards import StoredPair

SHARD, DRAWS, LOOKED_UP = 8192, 4, 10_000  # pairs of a shard, draws of a pair, pairs that are looked up
FEW = 20  # pairs for which a process does little beside starting
BRIEF = (
    "model=llada_nano", "data=jsonl", "data.truncation=drop", "data.max_length=4000", "dpo.diffusion_samples=1",
    "optim.per_device_train_batch_size=2", "evaluation=preference", "evaluation.at_end=false",
    "evaluation.every_steps=null", "evaluation.num_pairs=8", "best_metric=none", "stopping.patience=null",
    "logger=none", "hardware.device=cpu", "hardware.threads=1", "optim.num_warmup_steps=0",
)  # fmt: skip
COLUMNS = ("prepare", "first steps", "resumed", "store opened")


def many_part(bench: Workbench, kept: Rows) -> tuple[str, dict]:
    """Seconds of processor time and GiB at their largest, of each stage on each number of pairs. `kept`: rows of an
    earlier call."""
    if not hasattr(os, "wait4"):
        raise UserError(
            "benchmark.parts has many, which asks the system for a process's memory; Windows has no such call."
        )

    def row_of(count: int) -> dict[str, Any]:
        with tempfile.TemporaryDirectory(prefix="laddpo_many_", ignore_cleanup_errors=True) as folder:
            return _measure(Path(folder), count, bench)

    return many_section(kept.measured((FEW, *bench.settings.many_pairs), row_of))


def many_section(rows: Sequence[dict[str, Any]]) -> tuple[str, dict[str, Any]]:
    """The table. `rows`: {"setting": pairs, "lookup_us"} with {"seconds", "gib"} of each column; first the row of few
    pairs, whose time is that of the start."""
    counts = [row["setting"] for row in rows]
    growth = {
        name: growth_exponent(counts[1:], [row[name]["seconds"] - rows[0][name]["seconds"] for row in rows[1:]])
        for name in COLUMNS
    }
    cells = [
        [
            f"{r['setting']:,}",
            *[f"{r[n]['seconds']:.1f} s, {r[n]['gib']:.2f} GiB" for n in COLUMNS],
            f"{r['lookup_us']:.1f} us",
        ]
        for r in rows
    ]
    slopes = ["" if growth[name] is None else f"{growth[name]:.2f}" for name in COLUMNS]
    cells.append(["growth of time", *slopes, ""])
    text = markdown(["pairs", *COLUMNS, "one look-up"], cells)
    said = (
        "Processor time and largest memory of whole processes. The store is opened, and 10,000 of its pairs are looked "
        f"up. Growth: the slope of log time over log pairs, without the time of {FEW} pairs, which is that of the "
        "start; 1 is as fast as the data."
    )
    return f"{said}\n\n{text}", {"rows": list(rows), "growth": growth}


def growth_exponent(counts: Sequence[int], seconds: Sequence[float]) -> float | None:
    """The slope of log seconds over log counts, by least squares, without the times that are not above 0. None of fewer
    than two counts."""
    known = [(count, second) for count, second in zip(counts, seconds, strict=True) if second > 0]
    if len({count for count, _ in known}) < 2:
        return None
    return float(np.polyfit(*np.log(known).T, 1)[0])


def _measure(folder: Path, count: int, bench: Workbench) -> dict[str, Any]:
    rows, run, store, told = (folder / name for name in ("rows.jsonl", "run", "store", "told.json"))
    write_rows(rows, count, bench)
    where = (f"data.dataset_name={rows}", f"paths.data_dir={folder / 'data'}", f"paths.outputs_dir={folder}")
    prepare = [text for text in (*BRIEF, *where) if text.startswith(("model=", "data", "paths.data"))]
    # more steps than it comes to: a finished run cannot be resumed
    long = ("save_steps=1", "save_total_limit=1000", "optim.max_train_steps=500")
    train = [*stage_command("train"), *BRIEF, *where, *long, f"output_dir={run}"]
    checkpoints = run / "checkpoints"
    found: dict[str, Any] = {
        "prepare": process_cost([*stage_command("prepare"), *prepare]),
        "first steps": process_cost(train, step_folder(checkpoints, 2)),
    }
    reached = step_of(step_folders(checkpoints)[0])
    found["resumed"] = process_cost([*train, "resume=true"], step_folder(checkpoints, reached + 2))
    write_store(store, count)
    code = "import sys; from laddpo.benchmarking.many import open_store; open_store(*sys.argv[1:])"
    found["store opened"] = process_cost([sys.executable, "-c", code, str(store), str(count), str(told)])
    return {**found, **read_json(told)}


def stage_command(stage: str) -> list[str]:
    """The beginning of a command line."""
    return [sys.executable, "-m", f"laddpo.{stage}"]


def write_rows(path: Path, count: int, bench: Workbench) -> None:
    """Pairs of random letters, a JSON object on each line."""
    rng, wanted = np.random.default_rng(bench.seed), bench.settings
    letters = rng.choice(list("abcdefghijklmnopqrstuvwxyz    "), 1_000_000)
    pool = "".join(letters)
    with atomic_file(path) as out:
        for number in range(count):
            lengths = pair_lengths(rng, wanted.mean, wanted.p99, wanted.prompt_mean, wanted.max_length)
            starts = rng.integers(0, len(pool) - wanted.max_length, 3)
            texts = [pool[start : start + length] for start, length in zip(starts, lengths, strict=True)]
            prompt, chosen, rejected = (f"{text}{end}" for text, end in zip(texts, (number, "y", "n"), strict=True))
            row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
            out.write((json.dumps(row) + "\n").encode())


def stored_pair_of(number: int) -> StoredPair:
    """The pair of this number in a store that `write_store` fills."""
    return StoredPair(f"pair-{number}", f"{number:032x}")


def write_store(folder: Path, count: int) -> None:
    """A reference store of made values."""
    store = ReferenceStore.open(folder, {"made": "for the benchmark"})
    with store.filling():
        for start in range(0, count, SHARD):
            pairs = [stored_pair_of(number) for number in range(start, min(start + SHARD, count))]
            store.append(pairs, 0, np.full((len(pairs), 2, DRAWS), -1.0))


def open_store(folder: str, count: str, told: str) -> None:
    """Open that store of `count` pairs and look up some of them; writes microseconds of a look-up to `told`."""
    (place,) = Path(folder).iterdir()
    store = ReferenceStore(place, {"made": "for the benchmark"})
    numbers = np.random.default_rng(0).integers(0, int(count), LOOKED_UP)
    pairs = [stored_pair_of(int(number)) for number in numbers]
    started = time.perf_counter()
    for pair in pairs:
        assert math.isclose(store.values(pair, range(DRAWS)).sum(), -2 * DRAWS)
    write_json(Path(told), {"lookup_us": 1e6 * (time.perf_counter() - started) / LOOKED_UP})
