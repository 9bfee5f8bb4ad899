"""Time and memory of a training step: ours in every mode, and what users would otherwise run, on the same pairs.

    python -m laddpo.benchmark                                            random weights, a few minutes on two cores
    python -m laddpo.benchmark benchmark.parts=[memory,flat]              peaks alone
    python -m laddpo.benchmark model=llada_8b hardware=h200 benchmark.weights=model
    python -m laddpo.benchmark experiment=gpu_proof                       LLaDA-8B's shape on a GPU, as on smaller cards
    python -m laddpo.benchmark experiment=gpu_proof_small                 the same in a small shape, without a GPU

Writes benchmark.md and benchmark.json. Steps are gradients without the optimizer, which is the same for all.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING

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
    with owned(run_folder, "benchmark", config.resume != "false"):
        seconds = run_parts(bench, run_folder)
    print(f"\n{seconds:.0f} s; tables: {run_folder / 'benchmark.md'}")
    print(run_folder)


def run_parts(bench: Workbench, run_folder: Path) -> float:
    """Measure part by part; the seconds that all took."""
    from laddpo.benchmarking.parts import PARTS, about
    from laddpo.core.budget import release_memory
    from laddpo.storage import atomic, manifests

    started = time.perf_counter()
    sections = [f"# Benchmark\n\n{about(bench)}\n"]
    record = {"settings": dataclasses.asdict(bench.settings), "machine": bench.machine.name}
    record["provenance"] = manifests.provenance()
    for name in bench.settings.parts:
        part_started = time.perf_counter()
        release_memory()
        title, measure = PARTS[name]
        text, record[name] = measure(bench)
        record[name]["seconds_taken"] = time.perf_counter() - part_started
        record["seconds"] = time.perf_counter() - started
        sections.append(f"## {title}\n\n{text}\n")
        # after every part: what comes may fail, and took minutes to get to
        atomic.write_text(run_folder / "benchmark.md", "\n".join(sections))
        atomic.write_json(run_folder / "benchmark.json", record)
        if name == bench.settings.parts[-1]:
            manifests.write_manifest(
                run_folder, "benchmark", {}, ["benchmark.md", "benchmark.json"], **manifests.provenance()
            )
        print(f"\n{text}", flush=True)
    return record["seconds"]


if __name__ == "__main__":
    run_stage("benchmark", main)
