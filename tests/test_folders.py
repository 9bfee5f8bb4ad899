"""Every writing stage keeps to folders of its own: whatever else lies there stays as it is, byte for byte."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from laddpo.cli.app import run_folder
from laddpo.errors import UserError
from laddpo.settings.compose import compose, write_config
from laddpo.storage import atomic, json_lines, locks, manifests
from laddpo.storage.folders import MARK, WORDS, owned, what_is

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def config():
    return compose()


# What may lie in a folder. Every function makes one kind; those of earlier versions have no mark.


def files(*names: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        for name in names:
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            text = "content\n" if not name.endswith(".json") else '{"overrides": []}'
            path.write_text(SETTINGS if name == "config.yaml" else text, encoding="utf-8")

    return make


def sealed(kind: str, *names: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        files(*names)(folder)
        manifests.write_manifest(folder, kind, {"encoding": 1, "step": 3, "base": {"base": "a"}}, list(names))

    return make


def text(name: str, content: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content, encoding="utf-8")

    return make


def link(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results").symlink_to("somewhere/else")


SETTINGS = "dpo:\n  beta: 2.0\nquantization:\n  load_in_4bit: false\n"
KINDS: dict[str, Callable[[Path], None]] = {
    "model": files("config.json", "model.safetensors", "tokenizer.json"),
    "adapter": files("adapter_config.json", "adapter_model.safetensors"),
    "train": sealed("train", "config.yaml", "metrics.jsonl"),
    "sft": sealed("sft", "config.yaml", "metrics.jsonl"),
    "evaluation": sealed("evaluation", "config.yaml", "results.json", "items.jsonl"),
    "export": sealed("export", "config.json", "model.safetensors", "README.md"),
    "prepared": sealed("prepared", "pairs.jsonl", "tokens.safetensors"),
    "reference": sealed("reference", "shard-0123.safetensors"),
    "benchmark": sealed("benchmark", "benchmark.md", "benchmark.json"),
    "weights": sealed("weights", "adapter_config.json", "adapter_model.safetensors"),
    "checkpoint": sealed("checkpoint", "model.safetensors"),
    "sweep": files("sweep.json", "0/job.json"),
    "study": files("config.yaml", "study.json", "a-1/job.json"),
    "report": files("report.html", "plots/a.png"),
    "variance": files("config.yaml", "variance.json"),
    "generations": files("generations.jsonl"),
    "unfinished run": files("config.yaml", "metrics.jsonl"),
    "notes": files("notes.txt", "deep/er/notes.txt"),
    "notes in a subfolder": files("deep/er/notes.txt"),
    "git checkout": files(".git/HEAD", "train.py"),
    "a config.yaml of another program": text("config.yaml", "model: bert\n"),
    "a manifest of another program": text("manifest.json", '{"name": "site"}\n'),
    "link": link,
}


def content(folder: Path) -> dict[str, bytes | str | None]:
    return {
        str(path.relative_to(folder)): os.readlink(path)
        if path.is_symlink()
        else path.read_bytes()
        if path.is_file()
        else None
        for path in sorted(folder.rglob("*"))
    }


# The stages, each by its own main function; what they would do with models is left out


@pytest.fixture
def stages(config, monkeypatch, tmp_path) -> dict[str, Callable[[Path], None]]:
    from laddpo import benchmark, evaluate, export, generate, report, sft, study, train, variance
    from laddpo.hardware import machine
    from laddpo.inputs import policy
    from laddpo.jobs import sweep
    from laddpo.results import runs

    for owner, name, value in [
        (policy, "check_before_loading", lambda config: None),
        (evaluate, "open_tasks", lambda config: []),
        (variance, "weights_of_run", lambda config: (tmp_path, 1)),
        (machine, "find_machine", lambda *arguments: None),
        (runs, "find_runs", lambda folders: []),
        (sweep, "planned_jobs", lambda *arguments: []),
        (sweep, "check_jobs", lambda *arguments: None),
    ]:
        monkeypatch.setattr(owner, name, value)
    of_a_run = dataclasses.replace(config, run=str(tmp_path / "run"))
    with_tasks = dataclasses.replace(config, evaluation=dataclasses.replace(config.evaluation, tasks=["arithmetic"]))
    of_a_study = dataclasses.replace(config, study=dataclasses.replace(config.study, name="a", arms=[ARM]))
    tree = SimpleNamespace(paths=config.paths)

    def run_sweep(folder: Path) -> None:
        monkeypatch.setattr(sweep, "split_overrides", lambda hydra, overrides: ({"output_dir": str(folder)}, []))
        sweep.run_sweep(None, "train", "config", None, [], tree)

    return {
        "train": lambda folder: train.main(config, folder),
        "train dry_run=true": lambda folder: train.main(dataclasses.replace(config, dry_run=True), folder.parent),
        "sft": lambda folder: sft.main(config, folder),
        "evaluate": lambda folder: evaluate.main(with_tasks, folder),
        "generate": lambda folder: generate.main(dataclasses.replace(config, prompt="1+1="), folder),
        "variance": lambda folder: variance.main(of_a_run, folder),
        "export": lambda folder: export.main(dataclasses.replace(config, adapter=WITH_PATH), folder),
        "report": lambda folder: report.main(of_a_run, folder),
        "study": lambda folder: study.main(of_a_study, folder),
        "benchmark": lambda folder: benchmark.main(config, folder),
        "sweep": run_sweep,
        "reference": append_to_store,
        "samples": sample_into,
    }


def append_to_store(folder: Path) -> None:
    import numpy as np

    from laddpo.storage.reference_store import ReferenceStore
    from laddpo.storage.shards import StoredPair

    ReferenceStore(folder, {"a": 1}).append([StoredPair("p", "00" * 16)], 0, -np.ones((1, 2, 1)))


def sample_into(folder: Path) -> None:
    from laddpo.evaluation.samples import collect_samples
    from laddpo.preference.onpolicy import Question
    from laddpo.processes.signals import StopFlag

    collect_samples(lambda prompts, keys: ["2"], [Question("1+1=", "2")], 1, folder, {"a": 1}, 1, StopFlag())


ARM = SimpleNamespace(name="default", stage="train", overrides=[], against="default")
WITH_PATH = SimpleNamespace(path="some/adapter", kind="lora")
OWN = {("report", "report"), ("reference", "reference")}  # written again by every further command
STAGES = [
    *("train", "train dry_run=true", "sft", "evaluate", "generate", "variance", "export", "report", "study"),
    *("benchmark", "sweep", "reference", "samples"),
]


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_refuses_every_kind_that_is_not_its_own_whenever_it_appears(stage, stages, tmp_path, monkeypatch):
    """Before the stage looks, and between its look and its lock."""
    locked = locks.locked
    name = "dry_run" if "dry_run" in stage else "place"
    for kind, make in KINDS.items():
        if (stage, kind) in OWN:
            continue
        early, late = tmp_path / kind / "early" / name, tmp_path / kind / "late" / name
        make(early)
        before = content(early.parent)
        with pytest.raises(UserError) as refused:
            stages[stage](early)
        assert str(early) in str(refused.value), (stage, kind)
        assert content(early.parent) == before, (stage, kind)

        def lock_late(folder, *args, made=late, make=make, **kwargs):
            make(made)
            return locked(folder, *args, **kwargs)

        with monkeypatch.context() as patched, pytest.raises(UserError) as refused:
            patched.setattr(locks, "locked", lock_late)
            stages[stage](late)
        make(expected := tmp_path / kind / "expected" / name)
        assert str(late) in str(refused.value), (stage, kind)
        found = {path: value for path, value in content(late).items() if path != "parts"}  # an empty folder
        assert found == content(expected), (stage, kind)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "prepared"])
def test_prepared_pairs_take_the_name_of_nothing_else(kind, tmp_path):
    from laddpo.preference.prepared import PreparedPairs, whole_folder

    KINDS[kind](folder := tmp_path / "arithmetic-0123")
    before = content(folder)
    with pytest.raises(UserError):
        with whole_folder(folder) as building:
            (building / "pairs.jsonl").write_text("new")
            (building / manifests.MANIFEST).write_text("new")
        PreparedPairs.load(folder)  # what has a manifest is taken for the same pairs, unless it is of another kind
    assert content(folder) == before and list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("stage", ["train", "sft", "evaluate", "generate", "variance", "export", "report", "prepare"])
@pytest.mark.parametrize("resume", ["true", "false"])
def test_the_door_refuses_a_folder_before_anything_loads(stage, resume, config, tmp_path):
    (tmp_path / "here").mkdir()
    for kind, make in KINDS.items():
        make(folder := tmp_path / "here" / kind)
        if kind in ("train", "sft", "evaluation", "variance", "report", "generations", "unfinished run"):
            continue  # somebody's own
        with pytest.raises(UserError, match="output_dir is "):
            run_folder(stage, dataclasses.replace(config, output_dir=str(folder), resume=resume))


# What is free, and whose own it is


@pytest.mark.parametrize(
    "names",
    [
        [],
        [".lock", ".gitkeep", ".DS_Store", "Thumbs.db"],
        [".hydra/config.yaml", "multirun.yaml"],
        [".laddpo", "command.json"],  # killed before config.yaml was written
        ["plots/.gitkeep", "empty/er/.DS_Store"],
        [f".tmp-1.{'0' * 8}-results.json", MARK],
        ["job.json", "log.txt"],
    ],
)
def test_a_folder_with_nothing_that_anyone_would_miss_is_free(tmp_path, names):
    for name in names:
        atomic.write_text(tmp_path / "a" / name, '{"overrides": []}')
    (tmp_path / "a" / "nothing").mkdir(parents=True)
    assert what_is(tmp_path / "a").is_free
    with owned(tmp_path / "a", "train") as found:
        assert found.is_free


def test_a_folder_knows_whose_it_is_from_its_first_file_on(tmp_path):
    with owned(tmp_path / "a", "export"):
        atomic.write_text(tmp_path / "a" / "model.safetensors", "half")
    assert what_is(tmp_path / "a").kinds == ("export",)
    with owned(tmp_path / "a", "export") as found:  # half an export is made again
        assert not found.is_free
    with pytest.raises(UserError, match=r"holds an export \(unfinished\)"), owned(tmp_path / "a", "train", True):
        pass


def test_a_stage_that_wrote_nothing_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), owned(tmp_path / "a", "train"):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").mkdir()
    with contextlib.suppress(RuntimeError), owned(tmp_path / "mine", "train"):
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["mine"] and list((tmp_path / "mine").iterdir()) == []


@pytest.mark.parametrize("kind", ["train", "sft", "evaluation", "variance", "unfinished run"])
def test_own_folders_go_on_with_resume_alone(kind, tmp_path):
    KINDS[kind](folder := tmp_path / "a")
    own = "train" if kind == "unfinished run" else kind
    with pytest.raises(UserError, match="nothing is overwritten; add resume=true"), owned(folder, own):
        pass
    with owned(folder, own, resume=True) as found:
        assert own in found.kinds and found.is_finished == (folder / "manifest.json").exists()


def test_a_sweep_or_study_names_its_own_way_on(tmp_path):
    KINDS["study"](tmp_path / "a")
    with pytest.raises(UserError, match="holds an earlier run"), owned(tmp_path / "a", "study"):
        pass
    with pytest.raises(UserError, match="repeat its own command"), owned(tmp_path / "a", "train", True):
        pass


def test_every_kind_of_manifest_is_known():
    written = {
        match
        for path in (REPOSITORY / "laddpo").rglob("*.py")
        for match in __import__("re").findall(r'write_manifest\(\s*[\w.]+,\s*"(\w+)"', path.read_text())
    }
    assert written and written <= WORDS.keys()


def test_a_run_that_another_process_finished_meanwhile_is_not_replaced(tmp_path):
    """Two real processes: both found the folder free; the slower one takes the lock when the other has finished."""
    slow = (
        "import sys\nfrom pathlib import Path\nfrom laddpo.errors import UserError\n"
        "from laddpo.storage import atomic, locks\nfrom laddpo.storage.folders import owned\n"
        "locked = locks.locked\n"
        "def late(*args, **kwargs):\n    print('looked', flush=True); sys.stdin.readline()\n"
        "    return locked(*args, **kwargs)\n"
        "locks.locked = late\n"
        "try:\n    with owned(Path(sys.argv[1]), 'train'): atomic.write_text(Path(sys.argv[1]) / 'a', 'replaced')\n"
        "except UserError as error: print(error); sys.exit(error.exit_code)\n"
    )
    folder = tmp_path / "run"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": REPOSITORY}
    process = subprocess.Popen([sys.executable, "-c", slow, str(folder)], **pipes)
    assert process.stdout.readline() == "looked\n"
    with owned(folder, "train"):
        KINDS["train"](folder)
    before = content(folder)
    said, _ = process.communicate("go\n", timeout=60)
    assert process.returncode == 2 and "holds an earlier run" in said
    assert content(folder) == before


# Nothing is written through a link


def test_a_lock_that_is_a_link_or_no_file_is_refused_and_what_it_points_to_stays(tmp_path):
    target = tmp_path / "target"
    target.write_text("precious")
    for make in (lambda path: path.symlink_to(target), lambda path: path.symlink_to(tmp_path / "absent"), os.mkfifo):
        folder = tmp_path / "a"
        folder.mkdir()
        make(folder / ".lock")
        with pytest.raises(UserError, match=r"\.lock: is not a regular file"), locks.locked(folder, wait=False):
            pass
        (folder / ".lock").unlink()
        folder.rmdir()
    assert target.read_text() == "precious" and not (tmp_path / "absent").exists()


def test_a_lock_file_of_another_program_keeps_its_content(tmp_path):
    (tmp_path / ".lock").write_text("42\n")
    os.link(tmp_path / ".lock", tmp_path / "second name")
    with locks.locked(tmp_path):
        assert (tmp_path / ".lock").read_text() == "42\n"
    (tmp_path / ".lock").unlink()
    (tmp_path / "target").write_text("")
    os.link(tmp_path / "target", tmp_path / ".lock")
    with locks.locked(tmp_path):
        assert (tmp_path / "target").read_text() == ""


def test_logs_and_settings_are_not_written_through_links(tmp_path, config):
    from laddpo.jobs.runner import run_child

    target = tmp_path / "target"
    target.write_text("precious")
    for name in ("metrics.jsonl", "log.txt", "config.yaml"):
        (tmp_path / name).symlink_to(target)
    with pytest.raises(UserError, match=r"metrics\.jsonl: could not be written"):
        json_lines.JsonLines(tmp_path / "metrics.jsonl").append({"step": 1})
    with pytest.raises(OSError):
        run_child([sys.executable, "-c", "print(1)"], tmp_path, log=tmp_path / "log.txt")
    write_config(config, tmp_path)
    assert target.read_text() == "precious" and not (tmp_path / "config.yaml").is_symlink()


def test_a_lock_waits_for_a_file_that_its_holder_removes(tmp_path):
    """The waiting process must not end up with the lock of a file that is gone."""
    code = (
        "import sys\nfrom pathlib import Path\nfrom laddpo.storage import locks\nprint('waiting', flush=True)\n"
        "with locks.locked(Path(sys.argv[1])): print(Path(sys.argv[1], '.lock').exists())\n"
    )
    folder = tmp_path / "a"
    with locks.locked(folder):
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True, cwd=REPOSITORY
        )
        assert process.stdout.readline() == "waiting\n"
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.3)
    assert process.communicate(timeout=60)[0] == "True\n"
