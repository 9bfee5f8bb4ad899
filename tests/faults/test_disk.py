"""A file system that fills up or may not be written, a limit on the size of files, a reader that went away."""

from __future__ import annotations

import os
import re
import resource
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.faults.bench import STAGES, Bench, differences, snapshot

SHARES = (0.02, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # of the space that an undisturbed run takes


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a tmpfs of some KiB, or changes its size; skipped where only root may and we are not."""
    place = tmp_path / "disk"
    place.mkdir()
    is_mounted = False

    def make(kib: int) -> Path:
        nonlocal is_mounted
        option = f"{'remount,' if is_mounted else ''}size={kib}k"
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", option, "tmpfs", str(place)], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")
        is_mounted = True
        return place

    if shutil.which("mount") is None or os.geteuid() != 0:
        pytest.skip("only root may mount a tmpfs")
    yield make
    if is_mounted:
        subprocess.run(["umount", str(place)], check=True)


def space_taken(folder: Path) -> int:
    """KiB of pages, as a tmpfs counts them."""
    return sum(4 * -(-path.stat().st_size // 4096) if path.is_file() else 4 for path in folder.rglob("*"))


def fill_and_grow(bench: Bench, line, disk: Path, small: int, make) -> None:
    """A whole job on a disk that is too small; then it grows and the same command goes on."""
    make(small)
    outcome = bench.run("train", disk)
    where = f"{small} KiB"
    if outcome.status != 0:
        line.faults += 1
        if outcome.status != 2 or "No space left" not in outcome.log or "Traceback" in outcome.log:
            line.silent.append(f"{where}: exit code {outcome.status}: {outcome.log[-1500:]}")
        line.silent += [f"{where}: left {path.name}" for path in disk.rglob(".tmp-*")]
    make(64 * 1024)
    again = bench.run("train", disk)
    if again.status != 0:
        line.silent.append(f"{where}: not continued: {again.log[-1500:]}")
    line.runs += 1
    line.differences += [f"{where}: {name}" for name in differences(snapshot(disk), bench.after["train"])]
    for path in list(disk.iterdir()):
        shutil.rmtree(path)


@pytest.mark.faults
def test_a_small_tmpfs_that_fills_up_anywhere_is_said_and_continued(bench, tally, small_disk):
    line = tally("a small tmpfs fills up", "all")
    disk, needed = small_disk(64), space_taken(bench.done)
    for share in SHARES:
        fill_and_grow(bench, line, disk, max(16, int(share * needed)), small_disk)


def test_a_small_tmpfs_that_fills_up_is_said_and_continued(bench, tally, small_disk):
    disk, needed = small_disk(64), space_taken(bench.done)
    fill_and_grow(bench, tally("a small tmpfs fills up", "all"), disk, needed // 2, small_disk)


def test_a_limit_on_the_size_of_files_is_said_and_continued(bench, tally):
    """What a quota does, without a mount: writing beyond it fails with EFBIG."""
    line = tally("a limit on file sizes", "train")
    folder = bench.start("train")
    outcome = bench.run("train", folder, limits=[[resource.RLIMIT_FSIZE, 8192]])
    line.faults += 1
    if outcome.status != 2 or "File too large" not in outcome.log or "Traceback" in outcome.log:
        line.silent.append(f"exit code {outcome.status}: {outcome.log[-1500:]}")
    bench.finish("train", folder, "after a limit on file sizes", line)


@pytest.mark.parametrize("stage", STAGES)
def test_a_disk_that_may_only_be_read_is_said(bench, tally, stage, small_disk):
    line = tally("a read-only disk", stage)
    disk = small_disk(64 * 1024)
    shutil.copytree(bench.before[stage], disk, dirs_exist_ok=True)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    outcome = bench.run(stage, disk)
    subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    line.faults += 1
    if outcome.status != 2 or "Traceback" in outcome.log or not re.search("cannot be written|Read-only", outcome.log):
        line.silent.append(f"exit code {outcome.status}: {outcome.log[-1500:]}")
    again = bench.run(stage, disk)
    line.runs += 1
    line.differences += differences(snapshot(disk), bench.after[stage]) if again.status == 0 else [again.log[-1500:]]


@pytest.mark.parametrize("stage", STAGES)
def test_a_reader_of_the_output_that_went_away_is_said_and_costs_nothing(bench, tally, stage):
    """As in `python -m laddpo.train | head -1`."""
    line = tally("the output's reader went away", stage)
    folder = bench.start(stage)
    outcome = bench.run(stage, folder, reader_gone=True)
    line.faults += 1
    if outcome.status != 1 or "output went away" not in outcome.log or "Traceback" in outcome.log:
        line.silent.append(f"exit code {outcome.status}: {outcome.log[-1500:]}")
    bench.finish(stage, folder, f"{stage} after its reader went away", line)
