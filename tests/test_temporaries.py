"""What killed processes left is removed, what living ones make is not, and what was being replaced comes back."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from laddpo.storage import temporaries
from laddpo.storage.temporaries import (
    HOST,
    make_folder,
    move_to,
    open_file,
    process_space,
    remove_orphans,
    temporary_beside,
)

REPOSITORY = Path(__file__).resolve().parents[1]


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


# Containers: one host name, the same process numbers, another boot or process namespace

ELSEWHERE = """
import sys
from pathlib import Path
from laddpo.storage import temporaries
temporaries.process_space = lambda: "c0ffee00"
temporaries.start_of = lambda process: 1
place = Path(sys.argv[1])
(place / "replaced").mkdir()
with temporaries.temporary_beside(place / "made") as made, temporaries.temporary_beside(place / "file") as file:
    with temporaries.temporary_beside(place / "replaced", "old") as old:
        temporaries.make_folder(made)
        with temporaries.open_file(file, "w") as stream:
            temporaries.move_to(place / "replaced", old)
            stream.write("half")
            stream.flush()
            print("made", flush=True)
            sys.stdin.readline()
"""


@pytest.mark.skipif(temporaries.fcntl is None, reason="this platform has no such locks")
def test_what_another_container_is_making_stays_until_that_is_gone(tmp_path):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", ELSEWHERE, str(tmp_path)], cwd=REPOSITORY, **pipes)
    try:
        assert process.stdout.readline() == "made\n"
        made = sorted(path.name for path in tmp_path.iterdir())
        assert len(made) == 3 and all(f".{HOST}.c0ffee00.1-" in name for name in made)
        remove_orphans(tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir()) == made
    finally:
        process.kill()
        process.communicate()
    remove_orphans(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["replaced"], "what was being replaced is back"


def named(folder: Path, process: int, space: str, start: int) -> Path:
    path = folder / f".tmp-{process}.{HOST}.{space}.{start}-a"
    path.mkdir()
    return path


def test_a_process_number_says_nothing_without_boot_namespace_and_start(tmp_path, monkeypatch):
    here, parent = process_space(), os.getppid()
    alive = named(tmp_path, parent, here, temporaries.start_of(parent))
    reused = named(tmp_path, parent, here, temporaries.start_of(parent) + 1)
    remove_orphans(tmp_path)
    assert alive.exists() and not reused.exists()
    elsewhere = named(tmp_path, parent, "c0ffee00", 1)
    with monkeypatch.context() as patched:
        patched.setattr(temporaries, "fcntl", None)  # without locks nothing tells whether its maker lives
        remove_orphans(tmp_path)
        assert elsewhere.exists()
    remove_orphans(tmp_path)
    assert not elsewhere.exists() and alive.exists()


def test_temporaries_are_made_again_when_they_were_taken_for_orphans_before_they_were_locked(tmp_path, monkeypatch):
    hold, tries = temporaries._hold, []

    def removed_first(path, *arguments, **named):
        if not tries:
            temporaries.remove(path)
        tries.append(path)
        return hold(path, *arguments, **named)

    monkeypatch.setattr(temporaries, "_hold", removed_first)
    with temporary_beside(tmp_path / "a") as folder:
        make_folder(folder)
        assert folder.is_dir() and len(tries) == 2
    tries.clear()
    with temporary_beside(tmp_path / "a") as file, open_file(file, "wb") as stream:
        stream.write(b"whole")
        stream.flush()
        assert file.read_bytes() == b"whole" and len(tries) == 2
    (tmp_path / "a").mkdir()
    with temporary_beside(tmp_path / "a", "old") as old:
        move_to(tmp_path / "a", old)
        assert old.is_dir()
    assert list(tmp_path.iterdir()) == []
