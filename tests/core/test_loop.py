"""The training loop: stopped, killed and resumed runs write the bytes of one that was not; faults stop before harm."""

import json
import math
import os
import signal

import numpy as np
import pytest
import torch

from laddpo.core.draws import ElboEstimator
from laddpo.core.gradient import score_items
from laddpo.core.noise import step_items
from laddpo.core.tasks import SftTask
from laddpo.errors import Stopped, UserError
from laddpo.inputs.reference_values import visited_windows
from laddpo.preference.encoding.encode import EncodedExample
from laddpo.processes.signals import stop_on_signal
from laddpo.storage.atomic import write_json
from laddpo.storage.checkpoint import MODEL, OPTIMIZER, STATE, step_folders, step_of
from laddpo.storage.manifests import write_manifest
from tests.core.helpers import random_ids
from tests.core.loop_helpers import BUDGET, PAIRS, PER_STEP, STEPS, Crash, Run, crash_at


@pytest.fixture(scope="module", params=["adamw", "adamw_8bit"])
def uninterrupted(request, tmp_path_factory):
    """(optimizer, files of a run that was never stopped)"""
    if request.param != "adamw":
        pytest.importorskip("bitsandbytes")
    run = Run(tmp_path_factory.mktemp("whole") / "run", request.param)
    run.train()
    return request.param, run.files()


# Resume


@pytest.mark.parametrize("step", range(STEPS - 1))
def test_a_run_stopped_by_a_signal_at_any_step_ends_with_the_same_bytes(folder, uninterrupted, step):
    optimizer, whole = uninterrupted
    first = Run(folder, optimizer)
    with pytest.raises(Stopped, match=rf"SIGTERM after step {step + 1} of {STEPS}, checkpoint saved.*resume="):
        first.train(before_step=first.stop_at(step), save_steps=0)
    assert not (folder / "last.json").exists()
    second = Run(folder, optimizer)
    second.train(resume=True)
    assert second.files() == whole


@pytest.mark.parametrize("save_steps", [1, 2, 3])
@pytest.mark.parametrize("step", range(STEPS))
def test_a_run_killed_at_any_step_ends_with_the_same_bytes(folder, uninterrupted, step, save_steps):
    """Steps after the last checkpoint were logged already; they are taken back and done again."""
    optimizer, whole = uninterrupted
    with pytest.raises(Crash):
        Run(folder, optimizer).train(before_step=crash_at(step), save_steps=save_steps)
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as log:
        log.write('{"step": 99, "lo')  # a torn line, as a kill leaves it
    second = Run(folder, optimizer)
    second.train(resume=True, save_steps=save_steps)
    assert second.files() == whole


def test_a_resumed_run_can_be_resumed_again_and_again(folder, uninterrupted):
    optimizer, whole = uninterrupted
    run = Run(folder, optimizer)
    for _ in range(STEPS - 1):
        with pytest.raises(Stopped):
            run.train(resume=True, before_step=run.stop_at(0))
        run = Run(folder, optimizer)
    run.train(resume=True)
    assert run.files() == whole


def test_a_run_killed_before_its_first_checkpoint_starts_over(folder, uninterrupted, capsys):
    optimizer, whole = uninterrupted
    with pytest.raises(Crash):
        Run(folder, optimizer).train(before_step=crash_at(2), save_steps=0)
    second = Run(folder, optimizer)
    second.train(resume=True)
    assert "no checkpoint yet; starting at step 0" in capsys.readouterr().out
    assert second.files() == whole


def test_a_run_killed_after_its_last_checkpoint_only_writes_what_is_missing(folder, uninterrupted):
    optimizer, whole = uninterrupted
    Run(folder, optimizer).train()
    (folder / "last.json").unlink()
    second = Run(folder, optimizer)
    second.train(resume=True, before_step=crash_at(0))
    assert second.files() == whole
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step_0000006", "step_0000007"]


def test_a_damaged_newest_checkpoint_costs_steps_and_changes_nothing(folder, uninterrupted):
    optimizer, whole = uninterrupted
    with pytest.raises(Crash):
        Run(folder, optimizer).train(before_step=crash_at(4))
    newest = step_folders(folder / "checkpoints")[0]
    (newest / "optimizer.safetensors").write_bytes(b"")
    second = Run(folder, optimizer)
    second.train(resume=True)
    assert second.files() == whole


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: state.pop("metrics"), r"has the keys 'loop'.*also metrics\.bytes, metrics\.sha256; an older"),
        (lambda state: state["metrics"].pop("sha256"), r"expected also metrics\.sha256; an older"),
        (lambda state: state.pop("optimizer"), r"expected also optimizer; an older"),
        (lambda state: state.update(loop=[]), r"expected also loop\.step; an older"),
        (lambda state: state["loop"].update(mood=1), r"has mood in loop, expected what this version knows; a newer"),
    ],
)
def test_a_checkpoint_of_another_version_is_refused_and_changes_nothing(folder, change, said):
    """The first as versions wrote it that did not seal the log yet."""
    with pytest.raises(Crash):
        Run(folder, "adamw").train(before_step=crash_at(4))
    logged = (folder / "metrics.jsonl").read_bytes()
    for checkpoint in step_folders(folder / "checkpoints"):
        state = json.loads((checkpoint / "state.json").read_text())
        change(state)
        write_json(checkpoint / "state.json", state)
        write_manifest(checkpoint, "checkpoint", {"step": step_of(checkpoint)}, [MODEL, OPTIMIZER, STATE])
    second = Run(folder, "adamw")
    weights = second.weights()
    with pytest.raises(UserError, match=rf"step_0000004.state\.json: .*{said} version of laddpo wrote it\. Finish"):
        second.train(resume=True)
    assert second.weights() == weights and len(step_folders(folder / "checkpoints")) == 2
    assert (folder / "metrics.jsonl").read_bytes() == logged


def test_a_new_run_in_an_old_folder_keeps_no_old_records(folder, uninterrupted):
    optimizer, whole = uninterrupted
    with pytest.raises(Crash):
        Run(folder, optimizer).train(before_step=crash_at(3), save_steps=0)
    second = Run(folder, optimizer)
    second.train(resume=False)
    assert second.files() == whole


def test_a_real_sigterm_ends_the_run_after_the_step_with_a_checkpoint(folder):
    run = Run(folder)
    with stop_on_signal() as run.stop, pytest.raises(Stopped, match="SIGTERM after step 3"):
        run.train(before_step=lambda call: call == 2 and os.kill(os.getpid(), signal.SIGTERM), save_steps=0)
    assert [path.name for path in step_folders(folder / "checkpoints")] == ["step_0000003"]
    assert Stopped.exit_code == 75


def test_an_older_checkpoint_that_a_crash_left_beyond_the_limit_goes(folder, uninterrupted):
    optimizer, _ = uninterrupted
    Run(folder, optimizer).train(save_total_limit=3)
    assert len(step_folders(folder / "checkpoints")) == 3
    Run(folder, optimizer).train(resume=True, save_total_limit=2)
    assert [found.name for found in step_folders(folder / "checkpoints")] == ["step_0000007", "step_0000006"]


def test_a_stop_during_the_last_evaluation_leaves_the_checkpoint_of_a_run_that_was_not_stopped(folder, uninterrupted):
    optimizer, whole = uninterrupted
    first = Run(folder, optimizer)

    def stopped_at_the_end(step: int) -> dict[str, float]:
        if step == STEPS:
            first.stop.name = "SIGTERM"
            raise Stopped("in the middle of it:", "again")
        return first.validate(step)

    with pytest.raises(Stopped, match=f"after step {STEPS} of {STEPS}"):
        first.train(validate=stopped_at_the_end)
    second = Run(folder, optimizer)
    assert second.train(resume=True).evaluated_step == STEPS
    assert second.files() == whole
    state = json.loads((folder / "checkpoints" / f"step_{STEPS:07d}" / "state.json").read_text())
    assert state["loop"]["evaluated_step"] == STEPS
    assert not list((folder / "checkpoints").glob(".corrupt-*")), "a good one is no damaged one"


def test_a_signal_in_the_last_step_lets_the_run_finish(folder, uninterrupted):
    optimizer, whole = uninterrupted
    run = Run(folder, optimizer)
    run.train(before_step=run.stop_at(STEPS - 1))
    assert run.files() == whole


def test_a_finished_run_leaves_only_whole_checkpoints(folder):
    """The last save must not meet, and set aside as damaged, the good checkpoint of the same step."""
    Run(folder).train(save_total_limit=2)
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert names == ["step_0000006", "step_0000007"]


def test_checkpoints_by_the_clock_are_like_those_by_steps(folder, uninterrupted):
    optimizer, whole = uninterrupted
    with pytest.raises(Crash):
        Run(folder, optimizer).train(before_step=crash_at(3), save_steps=0, save_minutes=1e-9)
    assert step_folders(folder / "checkpoints")[0].name == "step_0000003"
    second = Run(folder, optimizer)
    second.train(resume=True, save_steps=0, save_minutes=60)
    assert second.files() == whole


# Order of the data


def test_every_epoch_visits_every_item_once_and_its_last_step_may_be_short():
    steps = [step_items(3, step, PAIRS, PER_STEP) for step in range(6)]
    assert [epoch for epoch, _ in steps] == [0, 0, 0, 1, 1, 1]
    assert [len(indices) for _, indices in steps] == [2, 2, 1, 2, 2, 1]
    for epoch in (0, 1):
        assert sorted(i for e, indices in steps if e == epoch for i in indices) == list(range(PAIRS))
    assert [i for e, indices in steps if e == 0 for i in indices] != [
        i for e, indices in steps if e == 1 for i in indices
    ]


def test_a_short_step_is_the_mean_over_its_own_items(folder):
    run = Run(folder)
    seen = []

    def watch(call: int) -> None:
        _, indices = step_items(3, call, PAIRS, PER_STEP)
        items = run.task.items(indices, 0)
        seen.append(float(run.objective.losses(items, score_items(run.denoiser, items, BUDGET)).mean()))

    run.train(before_step=watch, total_steps=3, validate=None)
    assert [record["loss"] for record in run.records()] == pytest.approx(seen, rel=1e-6)


def test_a_short_step_has_the_gradient_of_its_mean(folder):
    run = Run(folder)
    run.task.accumulate([0], 0, 1.0)
    alone = run.parameters["head"].grad.clone()
    run.denoiser.zero_grad()
    run.task.accumulate([0, 0], 0, 1.0)
    torch.testing.assert_close(run.parameters["head"].grad, alone)


def test_the_reference_is_computed_for_just_the_windows_that_are_visited():
    windows = visited_windows(3, STEPS, PAIRS, PER_STEP, mask_rounds=2)
    assert [epoch for epoch, _ in windows] == [0, 0, 0, 1, 1, 1]  # step 6 is of epoch 2, round 0 again
    assert windows == [step_items(3, step, PAIRS, PER_STEP) for step in range(6)]
    assert visited_windows(3, 2, PAIRS, PER_STEP, 1) == [step_items(3, step, PAIRS, PER_STEP) for step in range(2)]


def test_the_first_margin_is_exactly_zero(folder):
    run = Run(folder)
    run.train(total_steps=1)
    first = run.records()[1]
    assert first["rewards/margins"] == 0.0 and first["rewards/accuracies"] == 0.5
    assert first["loss"] == pytest.approx(math.log(2), rel=1e-15)


# What is logged


def test_metrics_are_logged_every_logging_steps_and_at_the_end(folder):
    run = Run(folder)
    run.train(logging_steps=3, validate=None)
    assert [record["step"] for record in run.records()] == [3, 6, 7]
    assert [step for step, _ in run.tracked] == [3, 6, 7]


def test_clocks_stay_out_of_the_metrics(folder):
    run = Run(folder)
    run.train()
    names = {name for record in run.records() for name in record}
    assert not [name for name in names if "second" in name or name.startswith(("speed", "memory"))]
    timing = run.outputs().timing.read()
    assert any("speed/tokens_per_s" in record for record in timing)
    assert any("evaluation_seconds" in record for record in timing)


def test_the_rate_and_the_gradient_norm_before_clipping_are_logged(folder):
    run = Run(folder)
    run.train(max_grad_norm=1e-3, lr_scheduler_type="constant", validate=None)
    records = run.records()
    assert [record["learning_rate"] for record in records] == pytest.approx([0.02 / 3, 0.04 / 3] + [0.02] * 5)
    assert all(record["grad_norm"] > 1e-3 for record in records)


def test_clipping_can_be_off(folder):
    """max_grad_norm 0: the same weights as with a bound that is never reached."""
    runs = Run(folder / "a"), Run(folder / "b")
    for run, bound in zip(runs, (0.0, 1e9), strict=True):
        run.train(max_grad_norm=bound, validate=None)
    assert runs[0].weights() == runs[1].weights()


# SFT through the same loop


def test_supervised_training_lowers_the_negative_bound(folder):
    run = Run(folder)
    rng = np.random.default_rng(0)
    rows = [EncodedExample(f"row-{i}", random_ids(rng, 2), random_ids(rng, 4)) for i in range(4)]
    task = SftTask(run.denoiser, run.parameters, rows, ElboEstimator(diffusion_samples=4, mask_rounds=50), BUDGET)
    run.train(task=task, total_steps=40, items_per_step=4, validate=None, learning_rate=0.05)
    losses = [record["loss"] for record in run.records()]
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])
    assert {"step", "loss", "learning_rate", "grad_norm", "epoch"} == set(run.records()[0])
