"""A run that is stopped, killed or misdirected: what is continued, to the bit, and what is refused."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from laddpo.training.outputs import resume_step
from tests.pipeline.conftest import Stages


def start(stages, *more: str, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "laddpo.train", *stages.overrides(*more)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for_step(run, step: int, process: subprocess.Popen) -> None:
    """Until there is a checkpoint of this step or a later one: of the early ones only the last few stay."""
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline:
        if resume_step(run) >= step:
            return
        if process.poll() is not None:
            pytest.fail(f"ended early with {process.returncode}:\n{process.stdout.read()}")
        time.sleep(0.005)
    pytest.fail("no checkpoint within ten minutes")


LONGER = ["optim.max_train_steps=60", "evaluation.every_steps=20", "evaluation.at_end=false"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_model) -> Path:
    """The longer run, never stopped."""
    stages = Stages(tmp_path_factory.mktemp("whole"), tiny_model)
    process = start(stages, *LONGER, f"output_dir={stages.folder / 'run'}")
    shown, _ = process.communicate(timeout=600)
    assert process.returncode == 0, shown
    return stages.folder / "run"


@pytest.mark.parametrize(("by", "exit_code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 75)])
def test_a_stopped_run_resumes_to_the_same_bytes(stages, whole, by, exit_code):
    stopped = stages.folder / "stopped"
    process = start(stages, *LONGER, f"output_dir={stopped}")
    wait_for_step(stopped, 4, process)
    process.send_signal(by)
    process.communicate(timeout=600)
    assert process.returncode == exit_code
    assert not (stopped / "manifest.json").exists()
    process = start(stages, *LONGER, f"output_dir={stopped}", "resume=true")
    shown, _ = process.communicate(timeout=600)
    assert process.returncode == 0, shown
    assert (stopped / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    for name in ("adapter", "adapter_last"):
        file = f"{name}/adapter_model.safetensors"
        assert (stopped / file).read_bytes() == (whole / file).read_bytes(), name


@pytest.fixture(scope="module")
def once(tmp_path_factory, tiny_model) -> Path:
    """The folder of a run that is finished and not evaluated, and of its data."""
    stages = Stages(tmp_path_factory.mktemp("once"), tiny_model)
    assert stages.run("train", f"output_dir={stages.folder / 'run'}", "evaluation.at_end=false") == 0
    return stages.folder


@pytest.fixture
def finished(stages, once) -> Path:
    """A copy of that run for one test."""
    shutil.copytree(once, stages.folder, dirs_exist_ok=True)
    return stages.folder / "run"


def test_resume_of_a_finished_run_changes_nothing(stages, finished, capsys):
    run = finished
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert stages.run("train", f"output_dir={run}", "evaluation.at_end=false", "resume=true") == 0
    assert "finished" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    # a completion marker that is torn says nothing
    (run / "manifest.json").write_bytes(b"")
    assert stages.run("train", f"output_dir={run}", "evaluation.at_end=false", "resume=true") == 2
    shown = capsys.readouterr()
    assert "manifest.json: cannot be read" in shown.err and "finished" not in shown.out


@pytest.mark.parametrize(
    ("stage", "settings", "start"),
    [
        ("train", [], "adapter.path={run}/adapter."),
        ("train", ["adapter=full"], "model.model_name_or_path={run}/model."),
        ("sft", ["sft.num_examples=8"], "adapter.path={run}/adapter."),
    ],
    ids=["train", "train, all weights", "sft"],
)
def test_more_steps_of_a_finished_run_are_a_new_run_from_its_weights(stages, capsys, stage, settings, start):
    run = stages.folder / "run"
    command = [*settings, "evaluation.at_end=false", "evaluation.every_steps=null", f"output_dir={run}"]
    assert stages.run(stage, *command, "optim.max_train_steps=1") == 0
    assert stages.run(stage, *command, "optim.max_train_steps=1", "resume=true") == 0
    assert stages.run(stage, *command, "optim.max_train_steps=2", "resume=true") == 2
    shown = capsys.readouterr().err
    assert "is finished with optim.max_train_steps=1, and 2 was asked for" in shown
    assert f"Start a new run from its weights: {start.format(run=run)}" in shown


def test_resume_into_a_run_of_other_settings_lists_them(stages, finished, capsys):
    run = finished
    assert stages.run("train", f"output_dir={run}", "evaluation.at_end=false", "resume=true", "dpo.beta=9") == 2
    shown = capsys.readouterr().err
    assert "dpo.beta: stored 2.0, now 9.0" in shown and "Traceback" not in shown
    # a value that others take theirs from is no second difference
    assert (
        stages.run("train", f"output_dir={run}", "evaluation.at_end=false", "resume=true", "model.recommended.beta=9")
        == 2
    )
    listed = [line for line in capsys.readouterr().err.splitlines() if ": stored " in line]
    assert [line.strip() for line in listed] == ["dpo.beta: stored 2.0, now 9.0"]


def test_resume_in_an_empty_folder_starts_and_says_so(stages, capsys):
    run = stages.folder / "new"
    assert stages.run("train", f"output_dir={run}", "resume=true", "evaluation.at_end=false") == 0
    assert "starting a new one" in capsys.readouterr().out


def test_resume_true_finds_the_newest_unfinished_run_of_equal_settings(stages, capsys):
    assert stages.run("train", "evaluation.at_end=false") == 0
    (run,) = (stages.folder / "outputs" / "train").iterdir()
    (run / "manifest.json").unlink()
    assert stages.run("train", "evaluation.at_end=false", "resume=true") == 0
    assert f"going on with {run}" in capsys.readouterr().out
    assert (run / "manifest.json").exists()
    # one of another version beside it is passed over
    (run / "manifest.json").unlink()
    other = run.parent / "zzz" / "config.yaml"
    other.parent.mkdir()
    other.write_text("seed: 1\nlearned: {by: heart}\n")
    assert stages.run("train", "evaluation.at_end=false", "resume=true") == 0
    shown = capsys.readouterr().out
    assert f"passing over an unfinished run. {other}: is not a configuration" in shown and f"with {run}" in shown


@pytest.fixture(scope="module")
def begun(tmp_path_factory, tiny_model) -> Stages:
    """A run of steps of 4 x 1 x 2 pairs, as two processes have them, interrupted after its sixth step of eight."""
    stages = Stages(tmp_path_factory.mktemp("begun"), tiny_model)
    run = stages.folder / "outputs" / "train" / "run"
    assert stages.run("train", "evaluation.at_end=false", f"output_dir={run}", "hardware.processes=2") == 0
    (run / "manifest.json").unlink()
    shutil.rmtree(run / "checkpoints" / "step_0000008")
    return stages


@pytest.fixture
def interrupted(begun, stages) -> Path:
    """The run's folder in a copy of its own."""
    shutil.copytree(begun.folder, stages.folder, dirs_exist_ok=True)
    return stages.folder / "outputs" / "train" / "run"


@pytest.mark.parametrize(
    "changed",
    [
        pytest.param([], id="left as they were"),
        pytest.param(["optim.gradient_accumulation_steps=2"], id="one process in place of two"),
        pytest.param(
            ["optim.per_device_train_batch_size=2", "optim.gradient_accumulation_steps=2"], id="split otherwise"
        ),
        pytest.param(["optim.per_device_train_batch_size=1", "hardware.processes=8"], id="counted for eight"),
    ],
)
def test_other_factors_of_the_same_pairs_per_step_go_on_to_the_same_bytes(stages, interrupted, changed):
    names = ("metrics.jsonl", "adapter_last/adapter_model.safetensors")
    before = [(interrupted / name).read_bytes() for name in names]
    shutil.rmtree(interrupted / "adapter_last")
    for _ in range(2):  # the second time it is finished, and the same command still names it
        place = f"output_dir={interrupted}"
        assert stages.run("train", "evaluation.at_end=false", place, "resume=true", *changed) == 0
    assert [(interrupted / name).read_bytes() for name in names] == before
    assert (interrupted / "manifest.json").exists()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (["optim.gradient_accumulation_steps=3"], "stored 8 = 4 x 1 x 2, now 12 = 4 x 3 x 1 (optim.per_device"),
        (["optim.per_device_train_batch_size=2"], "stored 8 = 4 x 1 x 2, now 2 = 2 x 1 x 1 (optim.per_device"),
        (["hardware.processes=3"], "stored 8 = 4 x 1 x 2, now 12 = 4 x 1 x 3 (optim.per_device"),
    ],
)
def test_another_number_of_pairs_per_step_is_another_run(stages, interrupted, changed, said, capsys):
    before = (interrupted / "metrics.jsonl").read_bytes()
    place = f"resume={interrupted}"
    assert stages.run("train", "evaluation.at_end=false", place, *changed) == 2
    shown = capsys.readouterr().err
    assert f"pairs per step: {said}" in shown and shown.count(": stored ") == 1
    assert (interrupted / "metrics.jsonl").read_bytes() == before


def test_the_newest_run_is_found_by_its_pairs_per_step_and_not_by_their_factors(stages, interrupted, capsys):
    split = ["evaluation.at_end=false", "resume=true", "optim.gradient_accumulation_steps=2"]
    assert stages.run("train", *split) == 0
    assert f"going on with {interrupted}" in capsys.readouterr().out


def test_a_run_of_the_other_stage_is_not_gone_on_with(stages, interrupted, capsys):
    before = (interrupted / "metrics.jsonl").read_bytes()
    assert stages.run("sft", "evaluation.at_end=false", f"resume={interrupted}") == 2
    shown = capsys.readouterr().err
    assert "which holds a run of train (unfinished)" in shown and "Traceback" not in shown
    assert (interrupted / "metrics.jsonl").read_bytes() == before


def test_a_run_folder_in_use_is_refused(stages, capsys):
    from laddpo.storage.locks import locked

    run = stages.folder / "run"
    with locked(run):
        assert stages.run("train", f"output_dir={run}") == 2
    assert "in use by process" in capsys.readouterr().err


def test_an_evaluation_asked_to_stop_keeps_its_answers_and_says_so(stages, capsys, monkeypatch):
    import contextlib

    from laddpo.processes import signals

    run, evaluation = stages.folder / "run", stages.folder / "evaluation"
    assert stages.run("train", f"output_dir={run}") == 0  # evaluates, so that all reference values are there
    shutil.rmtree(stages.folder / "data" / "answers")  # the base answers again
    flag = signals.StopFlag()
    flag.name = "SIGTERM"
    with monkeypatch.context() as patched:
        patched.setattr(signals, "stop_on_signal", lambda: contextlib.nullcontext(flag))
        assert stages.run("evaluate", f"run={run}", f"output_dir={evaluation}") == 75
    shown = capsys.readouterr().err
    assert "the answers so far are kept" in shown and "Traceback" not in shown
    assert not (evaluation / "results.json").exists()
    assert stages.run("evaluate", f"run={run}", f"output_dir={evaluation}", "resume=true") == 0
    assert (evaluation / "results.json").exists()


def test_a_checkpoint_of_an_older_version_ends_resume_in_one_message(stages, finished, capsys):
    import json

    from laddpo.storage import atomic, manifests

    run = finished
    (run / "manifest.json").unlink()
    for checkpoint in (run / "checkpoints").iterdir():
        manifest, state = (json.loads((checkpoint / name).read_text()) for name in (manifests.MANIFEST, "state.json"))
        del state["metrics"]
        atomic.write_json(checkpoint / "state.json", state)
        manifests.write_manifest(checkpoint, "checkpoint", manifest["fields"], list(manifest["files"]))
    capsys.readouterr()
    assert stages.run("train", f"output_dir={run}", "evaluation.at_end=false", "resume=true") == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(said) == 1 and "state.json: has the keys 'loop'," in said[0] and "expected also metrics" in said[0]
    assert "Finish the run with that version" in said[0]


def test_resume_to_fewer_steps_than_done_is_refused(stages, finished, capsys):
    run = finished
    (run / "manifest.json").unlink()
    assert stages.run("train", f"output_dir={run}", "resume=true", "optim.max_train_steps=4") == 2
    assert "its checkpoint is at step 8" in capsys.readouterr().err


def test_more_steps_of_a_finished_run_are_refused_with_the_way_on(stages, finished, capsys):
    run = finished
    assert stages.run("train", f"output_dir={run}", "resume=true", "optim.max_train_steps=9") == 2
    assert f"adapter.path={run / 'adapter'}" in capsys.readouterr().err


def test_resume_does_not_change_the_arithmetic(stages, finished, capsys):
    run = finished
    (run / "manifest.json").unlink()
    assert stages.run("train", f"output_dir={run}", "resume=true", "hardware.precision=bf16") == 2
    assert "hardware.precision" in capsys.readouterr().err


@pytest.mark.parametrize("how", ["adapter file", "adapter folder"])
def test_lost_weights_of_a_finished_run_are_told_by_every_command_and_what_is_said_helps(stages, finished, how, capsys):
    lost = finished / "adapter"
    (shutil.rmtree if how == "adapter folder" else lambda folder: (folder / "adapter_model.safetensors").unlink())(lost)
    commands = [
        ("train", "evaluation.at_end=false", f"resume={finished}"),
        ("evaluate", f"run={finished}", f"output_dir={stages.folder / 'e'}"),
        ("export", f"run={finished}", f"output_dir={stages.folder / 'x'}"),
    ]
    for stage, *more in commands:
        assert stages.run(stage, *more) == 2, stage
        shown = capsys.readouterr()
        assert "Still there: adapter_last, checkpoints/step_0000008, checkpoints/step_0000006." in shown.err
        assert "run again to make it" not in shown.err and "nothing was changed" not in shown.out
    _, advised = shown.err.strip().split("in their place: ")
    subprocess.run(advised, shell=True, check=True)
    for stage, *more in commands:
        assert stages.run(stage, *more) == 0, stage


def test_a_run_that_has_nothing_but_checkpoints_can_be_finished_again(stages, finished, capsys):
    shutil.rmtree(finished / "adapter")
    shutil.move(finished / "adapter_last", stages.folder / "before")
    command = ("train", "evaluation.at_end=false", f"resume={finished}")
    assert stages.run(*command) == 2
    shown = capsys.readouterr().err
    assert f"Remove {finished / 'manifest.json'} and give the command of the run again with resume={finished}" in shown
    (finished / "manifest.json").unlink()
    assert stages.run(*command) == 2  # the best weights are not those of the last step
    advised = capsys.readouterr().err.strip().split("in their place: ")[1]
    subprocess.run(advised, shell=True, check=True)
    assert stages.run(*command) == 0
    for folder in (finished / "adapter", finished / "adapter_last"):
        name = "adapter_model.safetensors"
        assert (folder / name).read_bytes() == (stages.folder / "before" / name).read_bytes()


def test_a_changed_log_of_a_finished_run_is_no_reason_to_remove_the_run(stages, finished, capsys):
    (finished / "metrics.jsonl").write_text("")
    assert stages.run("train", "evaluation.at_end=false", f"resume={finished}") == 2
    shown = capsys.readouterr().err
    assert "metrics.jsonl: differs from what manifest.json sealed" in shown and "Restore it from a copy" in shown
    assert "Remove the folder" not in shown


def test_a_damaged_manifest_of_a_finished_run_is_no_reason_to_remove_the_run(stages, finished, capsys):
    path = finished / "manifest.json"
    path.write_bytes(path.read_bytes()[:-15])
    assert stages.run("evaluate", f"run={finished}") == 2
    shown = capsys.readouterr().err
    assert f"{path}: cannot be read" in shown and "Restore it from a copy" in shown
    assert "emove" not in shown


@pytest.fixture
def stop_at(monkeypatch):
    """`stop_at(owner, name)`: the signal arrives as that function is called."""
    import contextlib

    from laddpo.processes import signals

    def arrange(owner, name: str) -> None:
        flag, whole = signals.StopFlag(), getattr(owner, name)

        def asked(*args, **kwargs):
            flag.name = "SIGINT"
            return whole(*args, **kwargs)

        monkeypatch.setattr(owner, name, asked)
        monkeypatch.setattr(signals, "stop_on_signal", lambda: contextlib.nullcontext(flag))

    return arrange


def moment(name: str):
    from laddpo.evaluation import base_and_tuned
    from laddpo.inputs import policy
    from laddpo.training import validation

    return {
        "loading": (policy, "load"),
        "first validation": (validation.Validation, "measure"),
        "last evaluation": (base_and_tuned, "use_weights"),
    }[name]


AT_ZERO = "It has no checkpoint yet and starts at step 0 again."


@pytest.mark.parametrize(
    ("when", "said", "is_at_zero"),
    [
        ("loading", "stopped by SIGINT; no step was under way.", True),
        ("first validation", "validation of arithmetic: stopped by SIGINT; its answers are not kept.", True),
        ("last evaluation", "stopped by SIGINT.", False),
    ],
)
def test_a_run_that_is_stopped_says_how_it_goes_on_and_does(
    stages, stop_at, monkeypatch, capsys, when, said, is_at_zero
):
    run = stages.folder / "run"
    stop_at(*moment(when))
    assert stages.run("train", f"output_dir={run}") == 75
    shown = capsys.readouterr()
    (told,) = [line for line in shown.err.splitlines() if line.startswith("error:")]
    assert said in told and f"Continue with the same command and resume={run}." in told
    assert (AT_ZERO in told) == is_at_zero and "Give the command again" not in told
    if when == "loading":
        assert "reference, training pairs" not in shown.out
    monkeypatch.undo()
    assert stages.run("train", f"resume={run}") == 0
    assert (run / "evaluation" / "results.json").exists() and (run / "manifest.json").exists()


def test_sft_that_is_stopped_while_loading_trains_no_step(stages, stop_at, capsys):
    run = stages.folder / "run"
    stop_at(*moment("loading"))
    assert stages.run("sft", "sft.examples=chosen", f"output_dir={run}") == 75
    assert f"Continue with the same command and resume={run}. {AT_ZERO}" in capsys.readouterr().err
    assert not (run / "metrics.jsonl").exists()


def test_a_stopped_evaluation_names_the_folder_that_keeps_its_answers(stages, finished, stop_at, capsys):
    stop_at(*moment("loading"))
    assert stages.run("evaluate", f"run={finished}") == 75
    (folder,) = (stages.folder / "outputs" / "evaluate").iterdir()
    assert f"Continue with the same command and output_dir={folder} resume=true." in capsys.readouterr().err


def test_a_stopped_dry_run_is_nothing_to_go_on_with(stages, stop_at, capsys):
    stop_at(*moment("loading"))
    assert stages.run("train", "dry_run=true", f"output_dir={stages.folder / 'run'}") == 75
    shown = capsys.readouterr().err
    assert "nothing of it is kept. Give the command again." in shown and "resume=" not in shown
    assert not (stages.folder / "run").exists()
