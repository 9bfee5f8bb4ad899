"""The training loop: stopped, killed and resumed runs write the bytes of one that was not; faults stop before harm."""

import itertools
import json
import math
import os
import signal

import numpy as np
import pytest
import torch

from laddpo.core.checkpoint import step_folders
from laddpo.core.elbo import ElboEstimator
from laddpo.core.gradient import score_items
from laddpo.core.loop import LoopSettings, RunOutputs, step_items, train_loop
from laddpo.core.objectives import DpoObjective, pair_scores
from laddpo.core.optim import build_optimizer
from laddpo.core.reference import ReferenceStore
from laddpo.core.tasks import DpoTask, SftTask, fill_reference, pair_item, visited_windows
from laddpo.errors import RunFault, Stopped, UserError
from laddpo.preference.encode import EncodedExample
from laddpo.runs import write_json
from laddpo.signals import StopFlag, stop_on_signal
from tests.core.helpers import LinearDenoiser, random_ids, random_pair, referenced_items

PAIRS, PER_STEP, STEPS = 5, 2, 7  # epochs of 3 steps, the last of them short
ESTIMATOR = ElboEstimator(diffusion_samples=2, mask_rounds=2)
BUDGET = 25


def settings(**changes) -> LoopSettings:
    base = {"seed": 3, "total_steps": STEPS, "items_per_step": PER_STEP, "learning_rate": 0.02, "num_warmup_steps": 2}
    return LoopSettings(**{**base, "save_steps": 1, "eval_steps": 2, **changes})


class Crash(Exception):
    """Stands for a kill: nothing of the loop runs after it."""


class Run:
    """A DPO run in `folder`, made anew in every process as far as the loop can tell."""

    def __init__(self, folder, optimizer: str = "adamw"):
        self.folder = folder
        rng = np.random.default_rng(0)
        self.pairs = [random_pair(rng, f"pair-{i}") for i in range(PAIRS)]
        self.held_out = [random_pair(rng, f"held-out-{i}") for i in range(3)]
        self.denoiser = LinearDenoiser(width=64, vocabulary=64, dtype=torch.float32)  # large enough for 8-bit moments
        self.validation = referenced_items(self.denoiser, self.held_out, ElboEstimator(diffusion_samples=2))
        store = ReferenceStore.open(folder.parent / "reference", {"weights": "start"})
        windows = [
            ([self.pairs[i] for i in indices], ESTIMATOR.draw_indices(epoch))
            for epoch, indices in visited_windows(3, STEPS, PAIRS, PER_STEP, ESTIMATOR.mask_rounds)
        ]
        fill_reference(self.denoiser, store, windows, ESTIMATOR, BUDGET, StopFlag(), 100, lambda pairs: None)
        self.parameters = dict(self.denoiser.named_parameters())
        self.optimizer = build_optimizer(optimizer, self.parameters, (0.9, 0.95), 1e-8, 0.1)
        self.objective = DpoObjective("sigmoid", beta=0.5)
        self.task = DpoTask(self.denoiser, self.parameters, self.pairs, store, ESTIMATOR, self.objective, BUDGET)
        self.stop = StopFlag()
        self.tracked: list[tuple[int, dict]] = []

    def weights(self) -> dict:
        return {name: p.detach().tolist() for name, p in self.parameters.items()}

    def validate(self, step: int) -> dict[str, float]:
        draws = score_items(self.denoiser, self.validation, BUDGET)
        losses = self.objective.losses(self.validation, draws)
        ratio = pair_scores(self.validation, draws).chosen_ratio.mean()
        return {"validation/loss": float(losses.mean()), "validation/chosen_fall": -float(ratio)}

    def outputs(self) -> RunOutputs:
        return RunOutputs(
            self.folder,
            save_best=lambda step: write_json(self.folder / "best.json", [step, self.weights()]),
            save_last=lambda step: write_json(self.folder / "last.json", [step, self.weights()]),
            track=lambda metrics, step: self.tracked.append((step, dict(metrics))),
        )

    def train(self, resume: bool = False, before_step=None, task=None, **changes):
        """`before_step(task call number from 0)` runs before each step of this process."""
        task, validate = task or self.task, changes.pop("validate", self.validate)
        scaler = changes.pop("scaler", None)
        calls = iter(range(10**6))
        accumulate = task.accumulate

        class Watched:
            item_count, names = task.item_count, staticmethod(task.names)

            @staticmethod
            def accumulate(indices, epoch, loss_scale):
                if before_step:
                    before_step(next(calls))
                return accumulate(indices, epoch, loss_scale)

        goal = {"best_metric": "validation/loss", "higher_is_better": False} if validate else {}
        return train_loop(
            Watched(),
            self.parameters,
            self.optimizer,
            settings(**{**goal, **changes}),
            self.outputs(),
            validate,
            self.stop,
            resume,
            scaler,
        )

    def stop_at(self, step: int):
        def before_step(call: int) -> None:
            if call == step:
                self.stop.name = "SIGTERM"

        return before_step

    def records(self) -> list[dict]:
        return self.outputs().metrics.read()

    def files(self) -> dict[str, bytes]:
        """What must not depend on how often the run was stopped."""
        return {name: (self.folder / name).read_bytes() for name in ("metrics.jsonl", "best.json", "last.json")}


def crash_at(step: int):
    def before_step(call: int) -> None:
        if call == step:
            raise Crash

    return before_step


@pytest.fixture(scope="module", params=["adamw", "adamw_8bit"])
def uninterrupted(request, tmp_path_factory):
    """(optimizer, files of a run that was never stopped)"""
    if request.param != "adamw":
        pytest.importorskip("bitsandbytes")
    run = Run(tmp_path_factory.mktemp("whole") / "run", request.param)
    run.train()
    return request.param, run.files()


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run"


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


# Faults


def spoiled(run: Run, steps: set[int]):
    """The task with a NaN weight in the denoiser during some of its steps, as an overflow would have it."""
    calls = iter(range(10**6))

    class Spoiled:
        item_count, names = run.task.item_count, staticmethod(run.task.names)

        @staticmethod
        def accumulate(indices, epoch, loss_scale):
            is_spoiled = next(calls) in steps
            kept = run.denoiser.bias.detach().clone()
            if is_spoiled:
                run.denoiser.bias.data.fill_(math.nan)
            metrics = run.task.accumulate(indices, epoch, loss_scale)
            run.denoiser.bias.data.copy_(kept)
            return metrics

    return Spoiled


def test_a_non_finite_loss_stops_before_the_step_and_names_the_pairs(folder):
    run = Run(folder)
    before = []
    with pytest.raises(RunFault) as caught:
        run.train(task=spoiled(run, {2}), before_step=lambda call: before.append(run.weights()))
    assert run.weights() == before[2], "the weights must be those before the step"
    names = run.task.names(step_items(3, 2, PAIRS, PER_STEP)[1])
    assert "step 3: the loss is nan" in str(caught.value) and all(name in str(caught.value) for name in names)
    assert "optim.skip_nonfinite" in str(caught.value) and caught.value.exit_code == 1
    assert [record["step"] for record in run.records() if "loss" in record] == [1, 2]


def test_a_non_finite_gradient_of_a_finite_loss_stops_too(folder):
    run = Run(folder)
    before = run.weights()
    with pytest.raises(RunFault, match="the gradient norm inf"):
        run.train(task=overflowing(run, {0}))
    assert run.weights() == before


def test_skip_nonfinite_lets_that_many_steps_pass_without_an_update(folder):
    run = Run(folder)
    weights = []
    state = run.train(
        task=spoiled(run, {2, 4}),
        before_step=lambda call: weights.append(run.weights()),
        skip_nonfinite=2,
        validate=None,
    )
    assert state.skipped == 2 and state.step == STEPS
    assert weights[3] == weights[2] and weights[5] == weights[4] and weights[4] != weights[3]
    records = run.records()
    assert [record["loss"] is None for record in records] == [False, False, True, False, True, False, False]
    assert records[2]["grad_norm"] is None


def test_one_more_than_skip_nonfinite_stops_also_across_a_resume(folder):
    run = Run(folder)
    with pytest.raises(Stopped):
        run.train(task=spoiled(run, {1}), before_step=run.stop_at(2), skip_nonfinite=1)
    second = Run(folder)
    with pytest.raises(RunFault, match="step 5"):
        second.train(task=spoiled(second, {1}), resume=True, skip_nonfinite=1)


# Early stops and what is kept


def scripted_validation(values: list[float], name: str = "validation/score"):
    """A validation that gives these values in turn."""
    remaining = iter(values)
    return lambda step: {name: next(remaining)}


SCORE = {"best_metric": "validation/score", "higher_is_better": True, "eval_steps": 1}


def kept(folder, name: str = "best.json") -> int:
    return json.loads((folder / name).read_text())[0]


def test_the_best_weights_are_kept_and_the_last_beside_them(folder):
    run = Run(folder)
    weights = {}
    run.train(validate=scripted_validation([0.1, 0.3, 0.7, 0.7, 0.2, 0.5, 0.6, 0.1]), **SCORE)
    assert kept(folder) == 2, "the first of equal values"
    assert kept(folder, "last.json") == STEPS
    twin = Run(folder.parent / "twin")
    twin.train(validate=None, before_step=lambda call: weights.update({call: twin.weights()}), best_metric=None)
    assert json.loads((folder / "best.json").read_text())[1] == weights[2]


def test_the_untrained_weights_are_kept_when_nothing_beats_them(folder):
    Run(folder).train(validate=scripted_validation([0.9, *[0.5] * STEPS]), **SCORE)
    assert kept(folder) == 0


def test_lower_is_better_for_a_loss(folder):
    Run(folder).train(validate=scripted_validation([0.9, 0.5, 0.4, *[0.6] * 5]), **{**SCORE, "higher_is_better": False})
    assert kept(folder) == 2


def test_without_validation_the_last_weights_are_the_best(folder):
    Run(folder).train(validate=None)
    assert kept(folder) == kept(folder, "last.json") == STEPS


def test_without_a_best_metric_the_last_weights_are_the_best(folder):
    Run(folder).train(best_metric=None)
    assert kept(folder) == STEPS


def test_patience_stops_after_that_many_evaluations_without_a_better_one(folder):
    run = Run(folder)
    state = run.train(validate=scripted_validation([0.1, 0.2, 0.15, 0.2, 0.9]), patience=2, **SCORE)
    assert state.step == 3 and kept(folder) == 1
    assert state.stopped_early == "validation/score has not improved for 2 evaluations"
    assert kept(folder, "last.json") == 3


def test_a_fall_of_the_chosen_likelihood_stops(folder):
    falls = scripted_validation([0.0, 0.05, 0.2], "validation/chosen_fall")
    state = Run(folder).train(validate=falls, max_chosen_fall=0.1, eval_steps=1, best_metric=None)
    assert state.step == 2 and "chosen responses fell" in state.stopped_early


def test_a_run_that_stopped_early_and_was_killed_stays_stopped(folder):
    run = Run(folder)
    run.train(validate=scripted_validation([0.1, 0.05, 0.05]), patience=2, **SCORE)
    (folder / "last.json").unlink()
    second = Run(folder)
    state = second.train(resume=True, before_step=crash_at(0), patience=2, **SCORE)
    assert state.step == 2 and kept(folder, "last.json") == 2


def test_a_validation_that_is_not_a_number_is_logged_and_never_the_best(folder):
    run = Run(folder)
    values = [math.nan, 0.2, math.nan, 0.1, math.inf, -math.inf, math.nan, 0.15]
    state = run.train(validate=scripted_validation(values), **SCORE)
    assert state.best_step == 1 and state.best_value == 0.2
    logged = [record["validation/score"] for record in run.records() if "validation/score" in record]
    assert logged == [None, 0.2, None, 0.1, None, None, None, 0.15]


def test_a_best_metric_that_nothing_measures_is_refused_before_training(folder):
    with pytest.raises(
        UserError, match=r"best_metric is 'validation/acc'.*known: validation/chosen_fall, validation/loss"
    ):
        Run(folder).train(before_step=crash_at(0), best_metric="validation/acc")


def test_weights_are_kept_even_when_no_validation_was_a_number(folder):
    Run(folder).train(validate=scripted_validation([math.nan] * (STEPS + 1)), **SCORE)
    assert kept(folder) == STEPS


# Float16's loss scaler, with its arithmetic done in float32


def scaler(initial: float) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=initial, growth_interval=10**6)


def test_a_loss_scale_changes_no_weight(folder):
    plain, scaled = Run(folder / "a"), Run(folder / "b")
    plain.train()
    scaled.train(scaler=scaler(2.0**12))
    for name, weight in plain.parameters.items():
        torch.testing.assert_close(scaled.parameters[name], weight, rtol=1e-5, atol=1e-6)


def overflowing(run: Run, steps: set[int]):
    """The task with an infinite gradient in some of its steps, as float16 has one when the scale is too large."""
    calls = iter(range(10**6))

    class Overflowing:
        item_count, names = run.task.item_count, staticmethod(run.task.names)

        @staticmethod
        def accumulate(indices, epoch, loss_scale):
            metrics = run.task.accumulate(indices, epoch, loss_scale)
            if next(calls) in steps:
                run.denoiser.head.grad[0, 0] = math.inf
            return metrics

    return Overflowing


def test_an_overflow_halves_the_scale_and_skips_the_step_without_counting_as_a_fault(folder):
    run, scale = Run(folder), scaler(2.0**12)
    weights = []
    state = run.train(
        scaler=scale, task=overflowing(run, {1, 3}), before_step=lambda call: weights.append(run.weights())
    )
    assert state.skipped == 0 and state.step == STEPS
    assert [a == b for a, b in itertools.pairwise(weights)] == [False, True, False, True, False, False]
    assert scale.get_scale() == 2.0**10


def test_the_loss_scale_is_resumed(folder):
    whole, stopped = Run(folder / "a"), Run(folder / "b")
    whole.train(scaler=scaler(2.0**12), task=overflowing(whole, {1}))
    with pytest.raises(Stopped):
        stopped.train(scaler=scaler(2.0**12), task=overflowing(stopped, {1}), before_step=stopped.stop_at(3))
    resumed, scale = Run(folder / "b"), scaler(1.0)
    resumed.train(scaler=scale, resume=True)
    assert scale.get_scale() == 2.0**11
    assert resumed.files() == whole.files()


@pytest.mark.parametrize("scale", [None, 2.0**12])
def test_a_step_in_which_nothing_is_masked_passes(folder, scale):
    run = Run(folder)
    e = ElboEstimator("complement", diffusion_samples=1)
    rng = np.random.default_rng(0)
    pairs = [random_pair(rng, f"{i}", longest=1) for i in range(20)]
    pairs = [pair for pair in pairs if not pair_item(pair, e, [0]).tokens]
    store = ReferenceStore.open(folder, {})
    fill_reference(run.denoiser, store, [(pairs, range(1))], e, BUDGET, StopFlag(), 100, lambda pairs: None)
    task = DpoTask(run.denoiser, run.parameters, pairs, store, e, run.objective, BUDGET)
    before = run.weights()
    run.train(task=task, validate=None, scaler=scale and scaler(scale))
    assert run.weights() == before


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
