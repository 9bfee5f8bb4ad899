"""The reference pass: just what is lacking is computed, in the packing of training, and a stop loses nothing."""

import numpy as np
import pytest
import torch

from laddpo.core.draws import ElboEstimator
from laddpo.core.gradient import score_items
from laddpo.core.losses import LossOptions
from laddpo.core.objectives import DpoObjective, reference_draws
from laddpo.core.tasks import DpoTask, pair_item, stored_pair
from laddpo.errors import Stopped
from laddpo.inputs.reference_values import fill_reference
from laddpo.processes.signals import StopFlag
from laddpo.storage.reference_store import ReferenceStore
from tests.core.helpers import LinearDenoiser, random_pair

BUDGET = 30


@pytest.fixture
def denoiser():
    return LinearDenoiser(dtype=torch.float32)


@pytest.fixture
def pairs():
    rng = np.random.default_rng(0)
    return [random_pair(rng, f"pair-{i}") for i in range(6)]


@pytest.fixture
def store(tmp_path):
    return ReferenceStore.open(tmp_path, {"weights": "w"})


def fill(denoiser, store, windows, n=2, stop=None, pairs_per_shard=100, advance=lambda pairs: None) -> int:
    e = ElboEstimator(diffusion_samples=n)
    return fill_reference(
        denoiser, store, windows, e, BUDGET, StopFlag() if stop is None else stop, pairs_per_shard, advance
    )


def test_only_what_is_lacking_is_computed(denoiser, pairs, store):
    assert fill(denoiser, store, [(pairs[:4], range(2))]) == 4 * 2 * 2
    assert fill(denoiser, store, [(pairs[:4], range(2))]) == 0
    assert fill(denoiser, store, [(pairs[2:], range(2))], n=4) == 2 * 2 * 2, "two new pairs"
    assert fill(denoiser, store, [(pairs[:3], range(4))], n=4) == 3 * 2 * 2, "two more draws of each"
    assert len(store) == 6


@pytest.mark.parametrize("killed_after", range(1, 6))
def test_a_killed_pass_loses_at_most_the_shard_that_it_was_filling(denoiser, pairs, store, killed_after):
    windows = [([pair], range(2)) for pair in pairs]
    done = iter(range(1, 100))

    def die(count: int) -> None:
        if next(done) == killed_after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fill(denoiser, store, windows, pairs_per_shard=2, advance=die)
    again = ReferenceStore(store.folder, store.fields)
    kept = killed_after // 2 * 2
    assert len(again) == kept
    assert fill(denoiser, again, windows) == (6 - kept) * 2 * 2
    whole = ReferenceStore.open(store.folder.parent / "whole", store.fields)
    fill(denoiser, whole, windows)
    for pair in pairs:
        assert np.array_equal(again.values(stored_pair(pair), range(2)), whole.values(stored_pair(pair), range(2)))


def test_gaps_between_draws_are_filled(denoiser, pairs, store):
    fill(denoiser, store, [(pairs[:1], range(2, 4))])
    assert fill(denoiser, store, [(pairs[:1], range(6))]) == 2 * (2 + 2)
    item = pair_item(pairs[0], ElboEstimator(diffusion_samples=6), range(6))
    together = score_items(denoiser, [item], BUDGET)[0].numpy()
    np.testing.assert_allclose(store.values(stored_pair(pairs[0]), range(6)), together, rtol=1e-6)


def test_the_reference_has_the_bits_of_the_policys_first_pass(denoiser, pairs, store):
    fill(denoiser, store, [(pairs[:4], range(2)), (pairs[4:], range(2))], n=2)
    task = DpoTask(
        denoiser,
        dict(denoiser.named_parameters()),
        pairs,
        store,
        ElboEstimator(diffusion_samples=2),
        DpoObjective("ipo", LossOptions(1.0)),
        BUDGET,
    )
    for indices in ([0, 1, 2, 3], [4, 5]):
        items = task.items(indices, epoch=0)
        assert torch.equal(score_items(denoiser, items, BUDGET), reference_draws(items, denoiser.device))


def test_a_stop_stores_everything_computed_so_far(denoiser, pairs, store):
    stop, done = StopFlag(), []

    def advance(count: int) -> None:
        done.append(count)
        if len(done) == 1:
            stop.name = "SIGTERM"

    windows = [(pairs[i : i + 2], range(2)) for i in (0, 2, 4)]
    with pytest.raises(Stopped, match=r"stopped by SIGTERM; \d pairs are stored"):
        fill(denoiser, store, windows, stop=stop, advance=advance)
    again = ReferenceStore(store.folder, store.fields)
    assert len(again) == sum(done)
    assert fill(denoiser, again, windows) == (6 - sum(done)) * 2 * 2


def test_a_stop_inside_a_window_is_answered_before_the_next_micro_step_and_keeps_the_windows_before(
    denoiser, pairs, store, monkeypatch
):
    from laddpo.core import gradient

    stop, draw_values, scored = StopFlag(), gradient._draw_values, []

    def counted(denoiser, items):
        scored.append([item.id for item in items])
        stop.name = "SIGTERM" if len(scored) == 3 else None
        return draw_values(denoiser, items)

    monkeypatch.setattr(gradient, "_draw_values", counted)
    monkeypatch.setattr(gradient, "pack_items", lambda items, budget: [[i] for i in range(len(items))])
    windows = [(pairs[:2], range(2)), (pairs[2:], range(2))]
    with pytest.raises(Stopped, match="stopped by SIGTERM; 2 pairs are stored"):
        fill(denoiser, store, windows, stop=stop)
    assert scored == [["pair-0"], ["pair-1"], ["pair-2"]]
    assert len(ReferenceStore(store.folder, store.fields)) == 2


def test_a_stop_ends_the_scoring_of_held_out_pairs_before_the_next_micro_step(denoiser, pairs, monkeypatch):
    from laddpo.core import gradient
    from laddpo.inputs.margins import score_preferences

    stop, scored = StopFlag(), []
    estimator, objective = ElboEstimator(diffusion_samples=2), DpoObjective("sigmoid", LossOptions(0.1))
    items = [pair_item(pair, estimator, range(2), np.zeros((2, 2))) for pair in pairs]

    def counted(denoiser, members):
        scored.append(1)
        stop.name = "SIGTERM"
        return torch.zeros(len(members), 2, 2, dtype=torch.float64)

    monkeypatch.setattr(gradient, "_draw_values", counted)
    monkeypatch.setattr(gradient, "pack_items", lambda items, budget: [[i] for i in range(len(items))])
    with pytest.raises(Stopped, match="stopped by SIGTERM"):
        score_preferences(denoiser, items, objective, 1, BUDGET, stop=stop)
    assert scored == [1]
    stop.name = None
    assert score_items(denoiser, items, BUDGET).shape == (6, 2, 2), "outside, a signal ends no scoring"


@pytest.mark.parametrize("pairs_per_shard", [1, 3, 100])
def test_the_size_of_shards_changes_no_value(denoiser, pairs, store, pairs_per_shard):
    fill(denoiser, store, [([pair], range(2)) for pair in pairs], pairs_per_shard=pairs_per_shard)
    shards = list(store.folder.glob("shard-*"))
    assert len(shards) == -(-len(pairs) // pairs_per_shard)
    reopened = ReferenceStore(store.folder, store.fields)
    for pair in pairs:
        alone = score_items(denoiser, [pair_item(pair, ElboEstimator(diffusion_samples=2), range(2))], BUDGET)[0]
        assert np.array_equal(reopened.values(stored_pair(pair), range(2)), alone.numpy())


def test_independent_masks_give_the_policy_other_draws_than_the_reference(denoiser, pairs, store):
    """dpo.common_random_numbers=false: the store is filled by an estimator of another stream."""
    policy, reference = ElboEstimator(diffusion_samples=2), ElboEstimator(diffusion_samples=2, stream="reference")
    fill_reference(denoiser, store, [(pairs, range(2))], reference, BUDGET, StopFlag(), 100, lambda pairs: None)
    task = DpoTask(denoiser, {}, pairs, store, policy, DpoObjective("sigmoid", LossOptions(1.0)), BUDGET)
    items = task.items(range(6), epoch=0)
    own = score_items(denoiser, items, BUDGET)
    assert (own != reference_draws(items, denoiser.device)).any(dim=2).any(dim=1).all()
