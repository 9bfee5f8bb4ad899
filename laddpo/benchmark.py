"""Time and memory of a training step: ours in every mode, and what users would otherwise run, on the same pairs.

    python -m laddpo.benchmark                                            random weights, about 20 minutes of a core
    python -m laddpo.benchmark benchmark.parts=[memory,flat]              peaks alone
    python -m laddpo.benchmark model=llada_8b hardware=h200 benchmark.weights=model
    python -m laddpo.benchmark experiment=gpu_proof                       LLaDA-8B's shape on a GPU, as on smaller cards
    python -m laddpo.benchmark experiment=gpu_proof benchmark.minutes=8   what is worth most of it
    python -m laddpo.benchmark experiment=gpu_proof_small                 the same in a small shape, without a GPU

Writes benchmark.md and benchmark.json. Steps are gradients without the optimizer, which is the same for all.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from laddpo.cli.app import run_stage
from laddpo.settings.schema import RunConfig

if TYPE_CHECKING:
    from laddpo.benchmarking.workload import Workbench


def main(config: RunConfig, run_folder: Path) -> None:
    """Run the parts that `benchmark.parts` names."""
    from laddpo.errors import UserError
    from laddpo.hardware.machine import check_machine, find_machine
    from laddpo.storage.folders import owned

    try:
        check_machine(config)
    except UserError as error:
        if config.hardware.device != "cuda" or not config.benchmark.cards:
            raise
        *others, last = error.problems
        hint = "Without a GPU the same parts run in a small shape: experiment=gpu_proof_small."
        raise UserError(*others, f"{last} {hint}") from error
    from laddpo.benchmarking.workload import Workbench

    bench = Workbench(config, find_machine(config))
    is_resumed = config.resume != "false"
    with owned(run_folder, "benchmark", is_resumed):
        record = earlier_record(bench, run_folder) if is_resumed else new_record(bench)
        left = run_parts(bench, run_folder, record)
    from laddpo.benchmarking.summary import summary_table

    print(f"\n{summary_table(record)}\n\n{record['seconds']:.0f} s; tables: {run_folder / 'benchmark.md'}")
    if left:
        print(
            f"{bench.settings.minutes:g} minutes are over; not measured: {', '.join(left)}. What is missing: "
            f"resume=true output_dir={run_folder}"
        )
    print(run_folder)


def new_record(bench: Workbench) -> dict[str, Any]:
    """What benchmark.json says before any part."""
    from laddpo.benchmarking.parts import about
    from laddpo.storage import manifests

    of_this = {"settings": dataclasses.asdict(bench.settings), "machine": bench.machine.name, "seed": bench.seed}
    return {**of_this, "seconds": 0.0, "about": about(bench), "provenance": manifests.provenance()}


def earlier_record(bench: Workbench, run_folder: Path) -> dict[str, Any]:
    """What an earlier call measured with these settings on this machine; `UserError` where either differs."""
    from laddpo.errors import UserError
    from laddpo.storage import atomic, manifests

    path, new = run_folder / "benchmark.json", new_record(bench)
    if not path.exists():
        return new
    manifests.read_manifest(run_folder, "benchmark")  # compares the seals of a finished one
    record = atomic.read_json(path)
    free = ("parts", "minutes")
    before, now = (
        {
            **{name: r[name] for name in ("machine", "seed")},
            **{name: value for name, value in r["settings"].items() if name not in free},
        }
        for r in (record, new)
    )
    if differences := manifests.differing_fields(before, now):
        raise UserError(f"{path}: was measured otherwise; take another output_dir:", *differences)
    return {**record, "settings": new["settings"]}


def run_parts(bench: Workbench, run_folder: Path, record: dict[str, Any]) -> list[str]:
    """Measure part by part into `record`, until all is there or the time is over; the parts that are not whole.

    Written after every part and every row: what comes may fail, and took minutes to get to.
    """
    from laddpo.benchmarking.limits import Clock, Rows, TimeUp
    from laddpo.benchmarking.parts import OF_ROWS, PARTS
    from laddpo.core.budget import release_memory
    from laddpo.storage import manifests

    clock, before = Clock(bench.settings.minutes), record["seconds"]
    for name in bench.settings.parts:
        part, started = record.get(name, {}), time.perf_counter()
        if part.get("is_whole") or clock.is_over:
            continue
        release_memory()

        def save(rows: list[dict], name: str = name, part: dict = part) -> None:
            record[name] = {**part, "rows": rows, "is_whole": False}
            write_tables(record, run_folder)

        rows = Rows(part.get("rows", ()), save)
        _, measure = PARTS[name]
        with contextlib.suppress(TimeUp), clock.watched():
            text, found = measure(bench, rows) if name in OF_ROWS else measure(bench)
            taken = part.get("seconds_taken", 0.0) + time.perf_counter() - started
            record[name] = {**found, "text": text, "is_whole": not rows.is_cut, "seconds_taken": taken}
            print(f"\n{text}")
        record["seconds"] = before + time.monotonic() - clock.started
        write_tables(record, run_folder)
    left = [name for name in bench.settings.parts if not record.get(name, {}).get("is_whole")]
    if not left:
        files = ["benchmark.md", "benchmark.json"]
        manifests.write_manifest(run_folder, "benchmark", {}, files, **manifests.provenance())
    return left


def write_tables(record: dict[str, Any], run_folder: Path) -> None:
    """benchmark.json, and benchmark.md: in short, then part by part."""
    from laddpo.benchmarking.parts import PARTS
    from laddpo.benchmarking.summary import summary_table
    from laddpo.storage import atomic

    sections, parts = (
        [f"# Benchmark\n\n{record['about']}\n"],
        [name for name in PARTS if "text" in record.get(name, {})],
    )
    if len(parts) > 1 and (short := summary_table(record)):
        sections.append(f"## In short\n\n{short}\n")
    for name in parts:
        cut = "" if record[name]["is_whole"] else "The time was over before all rows were measured.\n\n"
        sections.append(f"## {PARTS[name][0]}\n\n{cut}{record[name]['text']}\n")
    atomic.write_text(run_folder / "benchmark.md", "\n".join(sections))
    atomic.write_json(run_folder / "benchmark.json", record)


if __name__ == "__main__":
    run_stage("benchmark", main)
