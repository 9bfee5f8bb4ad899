"""Surprising tokens: which they are, that favouring them keeps every draw exactly unbiased, and that a set stays."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from laddpo.core.draws import ElboEstimator
from laddpo.core.surprise import surprise_estimator, surprising_positions, token_surprise, with_surprising
from laddpo.core.tasks import pair_item, stored_pair
from laddpo.errors import UserError
from laddpo.inputs.surprise_sets import RowsWithSets, fill_sets
from laddpo.processes.signals import StopFlag
from laddpo.storage.surprise_store import Surprise, SurpriseStore
from tests.core import oracle
from tests.core.helpers import ANY_BUDGET, LinearDenoiser, random_ids, random_pair, tiny_denoiser
from tests.core.test_balanced import EXACT, PROMPT, Words, outcomes

FAVOURING = ElboEstimator("balanced", surprise_focus=0.5, shared_counts=False, seed=5)


@pytest.mark.parametrize("budget", [1, 40, ANY_BUDGET])
def test_surprise_is_the_sum_over_the_draws_that_hide_a_token_and_none_is_unseen(budget):
    denoiser, rng = tiny_denoiser(), np.random.default_rng(1)
    pairs = [random_pair(rng, f"{i}") for i in range(3)]
    telling = surprise_estimator(FAVOURING)
    items = [pair_item(pair, telling, range(8)) for pair in pairs]
    for item, sides in zip(items, token_surprise(denoiser, items, budget), strict=True):
        for draws, (sums, counts) in zip(item.sides, sides, strict=True):
            wanted, response = np.zeros(len(sums)), draws[0].response_ids
            for draw in (sequence.draw for sequence in draws):
                for i in draw.masked:
                    seen = [7 if j in draw.masked else int(token) for j, token in enumerate(response)]
                    ids = torch.tensor([[*draws[0].prompt_ids.tolist(), *seen]])
                    logps = denoiser.model(input_ids=ids).logits[0].log_softmax(-1)
                    wanted[i] -= logps[len(draws[0].prompt_ids) + i, response[i]].item()
            assert counts.tolist() == [4] * len(sums), "each of the four pairs of draws hides it once"
            assert sums.dtype == np.float32
            np.testing.assert_allclose(sums, wanted, rtol=1e-6)


def test_in_a_block_model_no_token_is_unseen_either():
    telling = surprise_estimator(replace(FAVOURING, block_length=4))
    for i in range(50):
        masks = [telling.draw(f"{i}", "chosen", 11, k, prompt_length=6).masked for k in range(8)]
        assert (np.bincount(np.concatenate(masks), minlength=11) >= 4).all()


def test_the_set_has_the_largest_means_at_least_one_and_of_equals_the_first():
    ones = np.ones(5, dtype=np.int32)
    assert surprising_positions(np.float32([1, 8, 3, 4]), np.int32([1, 4, 1, 1]), 0.5).tolist() == [2, 3]
    assert surprising_positions(np.float32([2, 2, 2, 2, 2]), ones, 0.4).tolist() == [0, 1]
    assert surprising_positions(np.float32([0, 0, 9, 0, 0]), ones, 0.01).tolist() == [2]
    assert len(surprising_positions(np.ones(30, np.float32), np.ones(30, np.int32), 0.1)) == 3
    assert len(surprising_positions(np.ones(31, np.float32), np.ones(31, np.int32), 0.1)) == 4


def test_the_set_depends_on_the_seed_and_its_own_stream_and_on_nothing_else_of_the_draws():
    changes = {"estimator": "count", "schedule": "iid", "diffusion_samples": 2, "count_tilt": 0.5, "mask_rounds": 3}
    assert surprise_estimator(replace(FAVOURING, **changes, surprise_focus=0.9)) == surprise_estimator(FAVOURING)
    keys = {surprise_estimator(FAVOURING).stream, FAVOURING.stream, "/reference"}
    assert len(keys) == 3, "no draw of policy or reference shares its noise"


@pytest.mark.parametrize("block_length", [0, 4])
@pytest.mark.parametrize(("estimator", "tilt"), [("count", 0.0), ("complement", 0.0), ("balanced", 0.5)])
def test_every_draw_that_favours_surprising_tokens_has_exactly_the_bound_as_its_mean(
    estimator, tilt, block_length, monkeypatch
):
    denoiser, response = tiny_denoiser(), random_ids(np.random.default_rng(3), 3)
    pair = replace(random_pair(np.random.default_rng(0), "p"), prompt_ids=PROMPT, chosen_ids=response)
    favoured = with_surprising(denoiser, [pair], FAVOURING, ANY_BUDGET)[0].favoured[0]
    e = ElboEstimator(estimator, diffusion_samples=8, surprise_focus=0.6, count_tilt=tilt, block_length=block_length)
    assert len(favoured) == 1 and e.focus == 0.6
    with torch.no_grad():
        sums = {mask: oracle.log_sum(denoiser, PROMPT, response, mask).item() for mask in oracle.nonempty_masks(3)}
    bound = sum(value / (len(mask) * math.comb(3, len(mask))) for mask, value in sums.items())
    weights = set()
    for index, law in enumerate(outcomes(Words(monkeypatch), e, 3, favoured)):
        mean = 0.0
        for share, draw in law:
            ((count, weight),) = draw.parts
            mean += share * weight * sums[tuple(draw.masked.tolist())]
            weights.add((count, round(weight, 9)))
        assert abs(mean - bound) < EXACT * abs(bound), f"draw {index}"
    assert len({weight for count, weight in weights if count == 1}) == 2, "the favoured token weighs less"


# The store


@pytest.fixture
def pairs():
    rng = np.random.default_rng(0)
    return [random_pair(rng, f"pair-{i}") for i in range(5)]


def fill(store, pairs) -> None:
    windows = [(pairs[i : i + 2], range(8)) for i in range(0, len(pairs), 2)]
    fill_sets(LinearDenoiser(), store, windows, FAVOURING, 40, StopFlag(), 2, lambda count: None)


def test_sets_come_back_as_they_were_found_and_rows_carry_them(pairs, tmp_path):
    store = SurpriseStore.open(tmp_path, {"weights": "w"})
    fill(store, pairs)
    found = with_surprising(LinearDenoiser(), pairs, FAVOURING, ANY_BUDGET)
    again = SurpriseStore.open(tmp_path, {"weights": "w"})
    for row, expected in zip(RowsWithSets(pairs, again), found, strict=True):
        for side, stored, wanted in zip(again.of(stored_pair(pairs[0])), row.favoured, expected.favoured, strict=True):
            assert side.sums.dtype == np.float32 and side.counts.sum() > 0
            assert stored.tolist() == wanted.tolist() and stored.dtype == np.int64
        assert stored_pair(row) != stored_pair(replace(row, favoured=None)), "reference values belong to the set"
    shards = sorted(path.name for path in again.folder.glob("set-*"))
    fill(again, pairs)
    assert shards == sorted(path.name for path in again.folder.glob("set-*")), "nothing is found twice"


def test_of_two_processes_that_found_a_set_the_first_to_store_it_counts(pairs, tmp_path):
    ours, theirs = (SurpriseStore.open(tmp_path, {"weights": "w"}) for _ in range(2))
    address = stored_pair(pairs[0])

    def sides(position: int) -> list[Surprise]:
        return [Surprise(np.ones(3, np.float32), np.ones(3, np.int32), np.array([position])) for _ in range(2)]

    theirs.append({address: sides(2)})
    ours.append({address: sides(0), stored_pair(pairs[1]): sides(1)})
    for store in (ours, SurpriseStore.open(tmp_path, {"weights": "w"})):
        assert [side.tolist() for side in store.positions(address)] == [[2], [2]] and len(store) == 2


def test_what_no_likelihood_has_and_what_is_not_stored_are_refused_by_name(pairs, tmp_path):
    store = SurpriseStore.open(tmp_path, {"weights": "w"})
    broken = Surprise(np.float32([1, np.nan]), np.int32([1, 1]), np.array([0]))
    with pytest.raises(UserError, match="a token of pair pair-0 is nan, expected a finite number >= 0"):
        store.append({stored_pair(pairs[0]): [broken, broken]})
    with pytest.raises(UserError, match="no surprising tokens of pair pair-3"):
        RowsWithSets(pairs, store)[3]
    assert not store.folder.exists()


def test_a_favoured_token_is_hidden_more_often(pairs):
    row = with_surprising(LinearDenoiser(), pairs, FAVOURING, ANY_BUDGET)[0]
    item = pair_item(row, replace(FAVOURING, surprise_focus=0.9), range(64))
    for side, favoured in zip(item.sides, row.favoured, strict=True):
        hidden = np.bincount(np.concatenate([s.draw.masked for s in side]), minlength=item.response_tokens[0])
        others = np.setdiff1d(np.arange(len(side[0].response_ids)), favoured)
        assert all(hidden[a] > hidden[b] for a, b in itertools.product(favoured, others))
