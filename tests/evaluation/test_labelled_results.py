"""How well rewards tell good rows from bad ones: the share of ordered couples, and intervals that hold."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from laddpo.evaluation.labelled import labelled_results, mean_difference, ordered_share


def scores_of(rewards, labels):
    """What a run's evaluation gives: rewards by row, at beta 1 against a reference of 0."""
    draws = torch.tensor(rewards, dtype=torch.float64)[:, None, None]
    items = [SimpleNamespace(reference=np.zeros((1, 1)), sides=((None,),), response_tokens=(3,)) for _ in rewards]
    return SimpleNamespace(items=items, draws=draws, labels=np.array(labels), rewards=np.array(rewards, dtype=float))


def rows_of(labels, groups=None):
    groups = groups or [f"prompt {i}" for i in range(len(labels))]
    return [
        SimpleNamespace(id=str(i), label=bool(own), group=g)
        for i, (own, g) in enumerate(zip(labels, groups, strict=True))
    ]


def found(rewards, labels, groups=None):
    return labelled_results(scores_of(rewards, labels), rows_of(labels, groups), seed=0)[0]


def test_the_share_is_that_of_all_couples_with_ties_as_halves():
    rewards, good = np.array([3.0, 1, 1, 0, 1, 2]), np.array([True, True, True, False, False, False])
    wanted = np.mean([(a > b) + (a == b) / 2 for a in rewards[good] for b in rewards[~good]])
    assert ordered_share(rewards, good, list("abcdef"))[0] == pytest.approx(wanted)
    assert mean_difference(rewards, good, list("abcdef"))[0] == pytest.approx(5 / 3 - 1)


@pytest.mark.parametrize("of_prompt", [1, 4])  # rows of a prompt that move together
def test_intervals_hold_the_true_value(of_prompt):
    rng, labels, covered = np.random.default_rng(3), [True] * 40 + [False] * 40, np.zeros(2)
    groups = [f"prompt {i // of_prompt}" for i in range(80)]
    for _ in range(400):
        shared = np.repeat(rng.normal(0, 0.7, 80 // of_prompt), of_prompt)
        rewards = shared + rng.normal(0, 0.7, 80) + 0.7 * np.array(labels)
        results = found(list(rewards), labels, groups)
        # normal rewards of variance 0.98: the good one is higher with probability Phi(0.7 / sqrt(1.96)) = Phi(0.5)
        truth = {"reward_accuracy": 0.6915, "reward_margin": 0.7}
        for place, (name, value) in enumerate(truth.items()):
            low, high = results[name]["tuned_interval"]
            covered[place] += low <= value <= high
    assert (covered >= 0.91 * 400).all() and (covered <= 0.985 * 400).all(), covered


def test_rows_told_apart_perfectly_are_no_certainty_and_one_prompt_of_a_label_tells_nothing():
    accuracy = found([3, 4, 5, 1, 2, 0], [True] * 3 + [False] * 3)["reward_accuracy"]
    assert accuracy["tuned"] == 1.0 and accuracy["interval"][0] < 0.1 and accuracy["tuned_interval"][1] == 1.0
    assert found([3, 4, 5, 1], [True] * 3 + [False])["reward_accuracy"]["interval"] is None
    assert found([3, 4, 5, 1], [True] * 3 + [False])["reward_margin"]["interval"] is None
    assert found([0, 0, 0, 0], [True, True, False, False])["reward_accuracy"]["interval"] is None  # nothing but ties
    assert "reward_accuracy" not in found([3, 4], [True, True])
