"""What killed processes left is removed, what living ones make is not, and what was being replaced comes back."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from laddpo.temporaries import HOST, remove_orphans, temporary_beside


@pytest.fixture(scope="module")
def dead() -> int:
    """The number of a process that is no more."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def orphan(folder: Path, process: int, name: str, host: str = HOST, mark: str = "tmp") -> Path:
    path = folder / f".{mark}-{process}.{host}-{name}"
    path.mkdir(parents=True)
    (path / "half").write_bytes(b"half")
    return path


def test_files_and_folders_of_dead_processes_are_removed_at_any_depth(tmp_path, dead):
    orphan(tmp_path, dead, "adapter")
    orphan(tmp_path / "checkpoints", dead, "step_0000003")
    (tmp_path / f".tmp-{dead}.{HOST}-results.json").write_bytes(b"half")
    (tmp_path / "kept.json").write_bytes(b"whole")
    (tmp_path / ".corrupt-step_0000001-0").mkdir()
    remove_orphans(tmp_path)
    assert sorted(path.name for path in tmp_path.rglob("*")) == [".corrupt-step_0000001-0", "checkpoints", "kept.json"]


def test_those_of_living_processes_and_other_machines_stay(tmp_path, dead):
    kept = [orphan(tmp_path, os.getppid(), "a"), orphan(tmp_path, dead, "b", host="0" * 8)]
    with temporary_beside(tmp_path / "c") as own:
        own.touch()
        remove_orphans(tmp_path)
        assert own.exists() and all(path.exists() for path in kept)
    assert not own.exists()


def test_an_earlier_process_of_our_number_is_a_dead_one(tmp_path):
    """A container gives the same number to the same command every time."""
    orphan(tmp_path, os.getpid(), "adapter")
    remove_orphans(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_was_being_replaced_comes_back_unless_its_successor_is_there(tmp_path, dead):
    orphan(tmp_path, dead, "adapter", mark="old")
    remove_orphans(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    orphan(tmp_path, dead, "adapter", mark="old")
    remove_orphans(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_folder_that_is_not_there_holds_no_orphans(tmp_path):
    remove_orphans(tmp_path / "nothing")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may remove anything")
def test_what_cannot_be_removed_stays_and_stops_nothing(tmp_path, dead):
    path = orphan(tmp_path, dead, "adapter")
    tmp_path.chmod(0o500)
    remove_orphans(tmp_path)
    tmp_path.chmod(0o700)
    assert path.exists()
