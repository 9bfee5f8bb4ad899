"""Faults stop before harm, early stops keep the right weights, and float16's loss scaler changes nothing."""

import itertools
import json
import math

import numpy as np
import pytest
import torch

from laddpo.core.draws import ElboEstimator
from laddpo.core.noise import step_items
from laddpo.core.tasks import DpoTask, pair_item
from laddpo.errors import NonFiniteStep, RunFault, Stopped, UserError
from laddpo.inputs.reference_values import fill_reference
from laddpo.processes.signals import StopFlag
from laddpo.storage.reference_store import ReferenceStore
from tests.core.helpers import random_pair
from tests.core.loop_helpers import (
    BUDGET,
    PAIRS,
    PER_STEP,
    STEPS,
    Run,
    crash_at,
    overflowing,
    spoiled,
)

# Faults


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


def test_a_tie_may_keep_other_weights_and_patience_counts_it_all_the_same(folder):
    """The loss goes on falling while the score stands still: the last of the equal steps is kept, and the run stops."""
    scores, losses = [0.1, 0.5, 0.5, 0.5, 0.9], [0.9, 0.8, 0.7, 0.6, 0.5]

    def validate(step: int) -> dict[str, float]:
        return {"validation/score": scores[step], "validation/loss": losses[step]}

    state = Run(folder).train(validate=validate, patience=2, **SCORE)
    assert (state.step, kept(folder)) == (3, 3)
    assert state.stopped_early == "validation/score has not improved for 2 evaluations"


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


def test_an_overflow_halves_the_scale_and_skips_the_step_without_counting_as_a_fault(folder):
    run, scale = Run(folder), scaler(2.0**12)
    weights = []
    state = run.train(
        scaler=scale, task=overflowing(run, {1, 3}), before_step=lambda call: weights.append(run.weights())
    )
    assert state.skipped == 0 and state.step == STEPS
    assert [a == b for a, b in itertools.pairwise(weights)] == [False, True, False, True, False, False]
    assert scale.get_scale() == 2.0**10


def test_where_no_scale_helps_the_run_stops_with_the_weights_as_before(folder):
    run, scale = Run(folder), scaler(2.0**12)
    before = run.weights()
    always = overflowing(run, set(range(100)))
    with pytest.raises(
        NonFiniteStep, match=r"overflowed in 25 steps one after the other.*scale fell to 0\.00012"
    ) as fault:
        run.train(scaler=scale, task=always, total_steps=40, validate=None, save_steps=0)
    assert run.weights() == before and fault.value.facts["step"] == 25
    assert fault.value.facts["rows"] == run.task.names(step_items(3, 24, PAIRS, PER_STEP)[1])


def test_overflows_are_counted_across_a_resume_and_a_good_step_forgets_them(folder):
    run = Run(folder)
    with pytest.raises(Stopped):
        run.train(
            scaler=scaler(2.0**12), task=overflowing(run, set(range(3))), before_step=run.stop_at(2), validate=None
        )
    resumed = Run(folder)
    with pytest.raises(NonFiniteStep, match="overflowed in 25 steps") as fault:
        always = overflowing(resumed, set(range(100)))
        resumed.train(scaler=scaler(1.0), task=always, resume=True, total_steps=40, validate=None)
    assert fault.value.facts["step"] == 25
    good = Run(folder.parent / "good")
    broken = overflowing(good, set(range(24)) | set(range(25, 40)))
    assert good.train(scaler=scaler(2.0**20), task=broken, total_steps=40, validate=None).overflows == 15


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
