"""Completions with labels: the loss against a baseline, its streamed gradient, the rows that make the baseline."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from laddpo.core.completions import BATCH_MEAN, MISMATCHED, CompletionObjective, Mismatched, completion_metrics
from laddpo.core.draws import ElboEstimator
from laddpo.core.gradient import Item, accumulate_gradient, score_items
from laddpo.core.losses import LossOptions
from laddpo.core.tasks import CompletionTask, pair_item, stored_pair
from laddpo.errors import UserError
from laddpo.inputs.reference_values import fill_reference
from laddpo.preference.encoding.encode import EncodedCompletion
from laddpo.processes.signals import StopFlag
from laddpo.storage.reference_store import ReferenceStore
from tests.core.helpers import ANY_BUDGET, parameters_of, random_ids, tiny_denoiser

ESTIMATOR = ElboEstimator(diffusion_samples=4)
OPTIONS = LossOptions(beta=0.7, desirable_weight=1.5, undesirable_weight=0.5)


def rows_of(count: int, prompts: int = 4) -> list[EncodedCompletion]:
    rng = np.random.default_rng(5)
    asked = [random_ids(rng, 3 + i) for i in range(prompts)]
    return [
        EncodedCompletion(
            f"row-{i}", asked[i % prompts], random_ids(rng, 2 + i % 5), i % 3 == 0, f"prompt-{i % prompts}"
        )
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def denoiser():
    return tiny_denoiser()


@pytest.fixture(scope="module")
def items(denoiser) -> list[Item]:
    """Under reference values a little off the policy's, so that no ratio is 0."""
    found = [pair_item(row, ESTIMATOR, range(4)) for row in rows_of(7)]
    values = score_items(denoiser, found, ANY_BUDGET).numpy()
    values = values + 0.5 * np.random.default_rng(1).standard_normal(values.shape)
    return [replace(item, reference=value) for item, value in zip(found, values, strict=True)]


def test_at_the_reference_each_completion_costs_a_half_of_its_weight(denoiser, items):
    draws = score_items(denoiser, items, ANY_BUDGET)
    equal = [replace(item, reference=value.numpy()) for item, value in zip(items, draws, strict=True)]
    for loss in ("kto", "apo_zero_unpaired"):
        losses = CompletionObjective(loss, replace(OPTIONS, desirable_weight=1, undesirable_weight=1)).losses(
            equal, draws
        )
        assert losses.tolist() == [0.5] * len(items)
        weighted = CompletionObjective(loss, OPTIONS).losses(equal, draws)
        assert weighted.tolist() == [0.75 if item.label else 0.25 for item in items]


@pytest.mark.parametrize("loss", ["kto", "apo_zero_unpaired"])
@pytest.mark.parametrize(("mode", "budget"), [("stream", 12), ("stream", 60), ("two_pass", 30)])
def test_the_gradient_in_parts_is_that_of_one_graph(denoiser, items, loss, mode, budget):
    objective, parameters = CompletionObjective(loss, OPTIONS, baseline=0.3), parameters_of(denoiser)

    def gradient(mode: str, budget: int) -> list[torch.Tensor]:
        denoiser.model.zero_grad()
        accumulate_gradient(denoiser, parameters, items, objective, 1 / len(items), budget, mode)
        return [parameter.grad.clone() for parameter in parameters]

    for found, wanted in zip(gradient(mode, budget), gradient("joint", ANY_BUDGET), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


def test_a_pair_is_a_good_and_a_bad_completion(denoiser, items):
    good, bad = items[0], items[1]
    pair = Item("pair", (good.sides[0], bad.sides[0]), np.concatenate([good.reference, bad.reference]))
    objective = CompletionObjective("kto", OPTIONS, baseline=0.2)
    draws = score_items(denoiser, [good, bad], ANY_BUDGET)
    single = objective.losses([replace(good, label=True), replace(bad, label=False)], draws)
    assert float(objective.losses([pair], draws.reshape(1, 2, -1))) == pytest.approx(float(single.mean()), rel=1e-12)


def test_the_baseline_is_a_mean_of_ratios_and_a_kl_is_never_negative(denoiser, items):
    draws = score_items(denoiser, items, ANY_BUDGET)
    ratios = np.mean([(d.numpy() - item.reference).mean() for d, item in zip(draws, items, strict=True)])
    for sign in (1, -1):
        shifted = [replace(item, reference=item.reference - sign * 3) for item in items]
        mean = ratios + sign * 3
        for kind, wanted in ((BATCH_MEAN, mean), (MISMATCHED, max(0.0, mean))):
            found = CompletionObjective("kto", OPTIONS, kind).at_baseline_of(shifted, draws)
            assert found.baseline == pytest.approx(wanted, rel=1e-12)


def test_metrics_keep_the_labels_apart(denoiser, items):
    draws, objective = score_items(denoiser, items, ANY_BUDGET), CompletionObjective("kto", OPTIONS, baseline=0.1)
    metrics = completion_metrics(items, draws, objective.losses(items, draws), objective)
    rewards = [OPTIONS.beta * (d.numpy() - item.reference).mean() for d, item in zip(draws, items, strict=True)]
    good = [reward for reward, item in zip(rewards, items, strict=True) if item.label]
    bad = [reward for reward, item in zip(rewards, items, strict=True) if not item.label]
    assert metrics["rewards/chosen"] == pytest.approx(np.mean(good))
    assert metrics["rewards/margins"] == pytest.approx(np.mean(good) - np.mean(bad))
    assert metrics["rewards/accuracies"] == pytest.approx(np.mean([g > b for g in good for b in bad]))
    assert metrics["kl/baseline"] == pytest.approx(0.1)
    alone = completion_metrics(items[:1], draws[:1], objective.losses(items[:1], draws[:1]), objective)
    assert np.isnan(alone["rewards/rejected"]) and np.isnan(alone["rewards/accuracies"])


def test_a_mismatched_row_has_the_completion_of_another_prompt_and_fits():
    rows = rows_of(23)
    found, again = Mismatched(rows), Mismatched(rows[::-1])
    longest = max(len(row.prompt_ids) + len(row.completion_ids) for row in rows)
    others = {row.completion_ids.tobytes(): row.group for row in rows}
    for i, (row, other) in enumerate(zip(rows, found, strict=True)):
        assert other.prompt_ids is row.prompt_ids
        assert others[other.completion_ids.tobytes()] != row.group
        assert len(other.prompt_ids) + len(other.completion_ids) <= longest
        same = again[len(rows) - 1 - i]  # whatever the order of the rows
        assert same.id == other.id and np.array_equal(same.completion_ids, other.completion_ids)
    assert len({other.id for other in found}) == len(rows) and max(len(other.id) for other in found) <= 64


def test_a_completion_that_fits_nowhere_is_cut_to_its_end():
    prompts = [np.arange(6, dtype=np.int32), np.arange(2, dtype=np.int32)]
    rows = [
        EncodedCompletion("a", prompts[0], np.arange(2, dtype=np.int32), True, "a"),
        EncodedCompletion("b", prompts[1], np.arange(5, dtype=np.int32), False, "b"),
    ]
    assert Mismatched(rows)[0].completion_ids.tolist() == [3, 4]


def test_one_prompt_has_no_mismatched_rows():
    with pytest.raises(UserError, match="the training rows have 1 prompt"):
        Mismatched(rows_of(3, prompts=1))


@pytest.mark.parametrize("kl_baseline", [MISMATCHED, BATCH_MEAN])
def test_a_step_takes_one_baseline_for_all_its_rows(denoiser, tmp_path, kl_baseline):
    rows = rows_of(6)
    mismatched = Mismatched(rows) if kl_baseline == MISMATCHED else None
    store = ReferenceStore.open(tmp_path, {"weights": "w"})
    visited = [(0, [0, 1, 2]), (0, [3, 4, 5])]
    windows = [([kind[i] for i in step], range(4)) for kind in (rows, mismatched) if kind for _, step in visited]
    fill_reference(denoiser, store, windows, ESTIMATOR, 40, StopFlag(), 100, lambda count: None)
    objective = CompletionObjective("kto", OPTIONS, kl_baseline)
    parameters = dict(denoiser.model.named_parameters())
    task = CompletionTask(denoiser, parameters, rows, store, ESTIMATOR, objective, 40, mismatched=mismatched)
    metrics = task.accumulate([0, 1, 2], 0, 1.0)
    assert metrics["kl/baseline"] == 0.0 and metrics["kl"] == 0.0  # the policy is the reference still
    assert metrics["tokens"] == sum(item.tokens for item in task.items([0, 1, 2], 0)) + sum(
        pair_item(row, ESTIMATOR, range(4)).tokens for row in list(mismatched or rows)[:3]
    )
    shift = 1.5  # a reference that finds the compared rows less likely moves the baseline, and all losses with it
    compared = list(mismatched or rows)
    moved = ReferenceStore.open(tmp_path / "moved", {"weights": "w"})
    for row in {row.id: row for row in [*rows, *compared]}.values():
        values = store.values(stored_pair(row), range(4)) - (shift if row in compared else 0.0)
        moved.append([stored_pair(row)], 0, values[None])
    found = replace(task, store=moved).accumulate([0, 1, 2], 0, 1.0)
    assert found["kl/baseline"] == pytest.approx(shift)
