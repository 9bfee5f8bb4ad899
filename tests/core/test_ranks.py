"""Several processes compute what one does: gradients, training, reference values, answers; and they stop together.

What the processes do is in rank_worker.py, which is started once with two and once with three of them.
"""

from __future__ import annotations

import json

import numpy as np
import pytest

from laddpo.core.draws import ElboEstimator
from laddpo.core.tasks import stored_pair
from laddpo.errors import RunFault, UserError
from laddpo.inputs.filling import own_pairs
from laddpo.inputs.reference_values import fill_reference
from laddpo.processes.ranks import ALONE, Ranks, launched, share_out
from laddpo.processes.signals import StopFlag
from laddpo.storage.reference_store import ReferenceStore
from laddpo.storage.shards import StoredPair
from tests.core.helpers import LinearDenoiser, random_pair
from tests.launching import REPOSITORY, launch

KINDS = ("ddp lora", "fsdp full", "fsdp lora")


@pytest.fixture(scope="module", params=[2, 3], ids=["two processes", "three processes"])
def figures(request, tmp_path_factory) -> list[dict]:
    """For each rank, a figure by the name of the check."""
    folder = tmp_path_factory.mktemp("ranks")
    done = launch(request.param, str(REPOSITORY / "tests" / "core" / "rank_worker.py"), str(folder))
    assert done.returncode == 0, done.stdout
    found = json.loads((folder / "figures.json").read_text(encoding="utf-8"))
    assert len(found) == request.param
    return found


@pytest.mark.parametrize(("bits", "allowed"), [("float32", 1e-5), ("float64", 1e-12)])
def test_gradients_on_every_rank_equal_those_of_one_process(figures, bits, allowed):
    names = [name for name in figures[0] if name.endswith(bits)]
    kinds = {name.split(" two_pass")[0].split(" stream")[0] for name in names}
    families = {"fsdp tied", "fsdp experts"} if len(figures) == 2 else set()
    assert kinds == {*KINDS, *families} and len(names) == 3 * (1 + len(kinds))
    for of_rank in figures:
        for name in names:  # the norm before clipping and every item's loss are among them
            assert of_rank[name] < allowed, name


@pytest.fixture(params=KINDS)
def kind(request, figures) -> str:
    if request.param == "fsdp lora" and len(figures) == 3:
        pytest.skip("trained with two processes only, for the time it takes")
    return request.param


def test_six_steps_of_adam_over_uneven_batches_end_at_the_weights_of_one_process(figures, kind):
    assert all(of_rank[f"{kind}: 6 steps"] < 1e-4 for of_rank in figures)


def test_metrics_are_those_of_the_whole_step(figures, kind):
    assert figures[0][f"{kind}: metrics"] < 1e-3  # sums of tens of nats in float32


def test_a_run_goes_on_in_another_number_of_processes(figures, kind):
    assert figures[0][f"{kind}: continued alone"] < 1e-4
    assert all(of_rank[f"{kind}: continued by all"] < 1e-4 for of_rank in figures)


def test_a_signal_to_one_rank_stops_all_after_the_same_step(figures, kind):
    assert {of_rank[f"{kind}: stop"] for of_rank in figures} == {"stopped by SIGTERM after step 4 of 6"}


def test_a_value_that_is_not_finite_on_one_rank_stops_all_at_the_same_step(figures):
    assert {of_rank["not finite on one rank"] for of_rank in figures} == {"step 3"}


def test_reference_values_stored_by_several_ranks_are_those_of_one(figures, kind):
    assert all(of_rank[f"{kind}: stored reference"] < 1e-6 for of_rank in figures)


def test_sharded_weights_score_and_answer_as_whole_ones_also_where_ranks_have_unequal_shares(figures):
    for of_rank in figures:
        assert of_rank["answers that differ"] == 0
        assert of_rank["scores"] < 1e-12
        assert of_rank["weights left together"] == 0  # they would go stale when others are loaded


def test_a_run_that_went_well_ends_well_on_every_rank():
    done = launch(3, str(REPOSITORY / "tests" / "core" / "leaving_worker.py"))
    assert done.returncode == 0, done.stdout
    assert all(f"rank {rank} ends" in done.stdout for rank in range(3))  # exit functions were called


def test_items_are_shared_out_by_size():
    assert share_out([5, 3, 3, 1], 2) == [[0, 3], [1, 2]]
    assert share_out([4], 3) == [[0], [], []]
    sizes = list(range(1, 40))
    shares = share_out(sizes, 4)
    assert sorted(i for share in shares for i in share) == list(range(39))
    loads = [sum(sizes[i] for i in share) for share in shares]
    assert max(loads) - min(loads) <= 1


def test_alone_nothing_is_exchanged():
    assert ALONE.gather(3) == [3] and ALONE.broadcast("x") == "x" and ALONE.any(True) and not ALONE.any(False)
    assert ALONE.control is None


def test_the_launcher_says_who_a_process_is(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert launched() == ALONE
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert launched() == Ranks(5, 8, 1, 4)
    monkeypatch.setenv("RANK", "8")
    with pytest.raises(UserError, match="expected a rank below it"):
        launched()


def test_a_rank_that_loses_another_keeps_the_reference_values_it_has(tmp_path):
    class Left(Ranks):
        """Of two ranks the first; the other one is gone when they would agree."""

        def agree_to_stop(self, stop):
            raise RunFault("another process ended")

    rng = np.random.default_rng(0)
    pairs = [random_pair(rng, f"pair-{i}") for i in range(6)]
    estimator, denoiser = ElboEstimator(diffusion_samples=2), LinearDenoiser()
    store = ReferenceStore.open(tmp_path, {"weights": "start"})
    ranks = Left(rank=0, world=2)
    own = own_pairs(pairs, ranks)
    with pytest.raises(RunFault):
        fill_reference(denoiser, store, [(pairs, range(2))], estimator, 25, StopFlag(), 100, len, ranks)
    again = ReferenceStore.open(tmp_path, {"weights": "start"})
    assert 0 < len(own) < len(pairs)
    assert [p.id for p in pairs if not again.missing(stored_pair(p), range(2))] == [p.id for p in own]


def test_a_store_sees_what_others_added_after_its_own_last_shard(tmp_path):
    one, other = (ReferenceStore.open(tmp_path, {"weights": "start"}) for _ in range(2))
    other.append([StoredPair("a", "00" * 16)], 0, -np.ones((1, 2, 2)))
    one.append([StoredPair("b", "11" * 16)], 0, -np.ones((1, 2, 2)))
    assert one.missing(StoredPair("a", "00" * 16), range(2)) == [0, 1]
    one.refresh()
    assert len(one) == 2 and one.missing(StoredPair("a", "00" * 16), range(2)) == []
