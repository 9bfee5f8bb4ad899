"""Memory that runs out: the work is done again in smaller micro-steps, exactly, counted, and stops where nothing helps.

CUDA's error is injected: into forward or backward passes above so many tokens, so that a smaller budget cures it.
"""

import logging

import numpy as np
import pytest
import torch

from laddpo.core.budget import SHARED_PASS, TokenBudget, is_out_of_memory
from laddpo.core.draws import ElboEstimator
from laddpo.core.gradient import accumulate_gradient, score_items
from laddpo.core.losses import LossOptions
from laddpo.core.objectives import DpoObjective
from laddpo.core.tasks import DpoTask
from laddpo.errors import RunFault
from laddpo.inputs.margins import score_preferences
from laddpo.inputs.reference_values import fill_reference
from laddpo.processes.signals import StopFlag
from laddpo.storage.reference_store import ReferenceStore
from tests.core.helpers import ANY_BUDGET, LinearDenoiser, random_pair, referenced_items

MESSAGE = "CUDA out of memory. Tried to allocate 2.00 GiB.\nmore lines"
OBJECTIVE = DpoObjective("apo_zero", LossOptions(beta=0.3, sft_weight=0.2))


class Cramped(LinearDenoiser):
    """Memory runs out in passes of more than `room` tokens: in the forward or in the backward pass."""

    def __init__(self, where: str = "forward", room: int = ANY_BUDGET):
        super().__init__()
        self.where, self.room, self.failures = where, room, 0

    def token_logps(self, packed):
        logps = super().token_logps(packed)
        if sum(packed.lengths) > self.room:
            if self.where == "forward":
                self.fail()
            elif logps.requires_grad:
                logps.register_hook(lambda grad: self.fail())
        return logps

    def fail(self):
        self.failures += 1
        raise torch.OutOfMemoryError(MESSAGE)


def items_of(denoiser, count: int = 5, draws: int = 4):
    rng = np.random.default_rng(4)
    pairs = [random_pair(rng, f"{i}") for i in range(count)]
    return referenced_items(denoiser, pairs, ElboEstimator(diffusion_samples=draws), spread=1.0)


def gradient(denoiser, items, budget, mode: str):
    denoiser.zero_grad()
    values = accumulate_gradient(denoiser, list(denoiser.parameters()), items, OBJECTIVE, 0.2, budget, mode)
    return [p.grad.clone() for p in denoiser.parameters()], values


@pytest.mark.parametrize("mode", ["stream", "two_pass"])
@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("room", [10, 30, 100])
def test_a_step_redone_after_memory_ran_out_has_the_gradient_of_one_that_fitted(where, mode, room):
    denoiser = Cramped(where)
    items = items_of(denoiser)
    expected, values = gradient(denoiser, items, ANY_BUDGET, "joint")
    denoiser.room, budget = room, TokenBudget(400)
    found, again = gradient(denoiser, items, budget, mode)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(again.losses, values.losses, rtol=1e-12, atol=1e-12)
    assert denoiser.failures == budget.retries > 0
    assert budget.tokens <= room, "the smaller budget is kept: the next step does not run out again"
    gradient(denoiser, items, budget, mode)
    assert denoiser.failures == budget.retries


def test_the_same_packing_without_a_failure_gives_the_same_bits():
    """What is done again is the whole step, not a repair of half of it."""
    denoiser = Cramped("backward", room=60)
    items = items_of(denoiser)
    budget = TokenBudget(200)
    found, _ = gradient(denoiser, items, budget, "stream")
    denoiser.room = ANY_BUDGET
    plain, _ = gradient(denoiser, items, budget.tokens, "stream")
    assert budget.retries and all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))


def test_gradients_that_were_there_survive_the_failed_attempt():
    denoiser = Cramped("backward")
    items = items_of(denoiser)
    once, _ = gradient(denoiser, items, ANY_BUDGET, "stream")
    denoiser.room = 40
    accumulate_gradient(denoiser, list(denoiser.parameters()), items, OBJECTIVE, 0.2, TokenBudget(300), "stream")
    twice = [p.grad for p in denoiser.parameters()]
    torch.testing.assert_close(twice, [2 * g for g in once], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_one_sequence_that_does_not_fit_alone_stops_the_run_and_explains(where):
    denoiser = Cramped(where)
    items = items_of(denoiser)
    longest = max(sequence.tokens for item in items for sequence in item.sequences)
    denoiser.room = longest - 1
    budget = TokenBudget(400, explain=lambda tokens: f"{tokens} tokens need more than there is.")
    with pytest.raises(RunFault, match=rf"^{longest} tokens need more than there is. \(CUDA out of memory") as fault:
        gradient(denoiser, items, budget, "stream")
    assert fault.value.exit_code == 1
    assert budget.tokens <= longest, "one sequence at a time was tried"


def test_where_no_process_may_repeat_alone_the_first_time_is_the_last():
    denoiser = Cramped()
    items = items_of(denoiser)
    denoiser.room, budget = 50, TokenBudget(400, why_once=SHARED_PASS.format("hardware.token_budget={half}"))
    with pytest.raises(RunFault, match=r"Several processes .* Start with hardware.token_budget=200"):
        score_items(denoiser, items, budget)
    assert denoiser.failures == 1 and budget.tokens == 400


def test_work_smaller_than_the_budget_is_halved_at_once():
    """Half of the budget would be the same work a second time."""
    tried, budget = [], TokenBudget(10_000)

    def work(tokens: int) -> int:
        tried.append(tokens)
        if tokens > 30:
            raise torch.OutOfMemoryError(MESSAGE)
        return tokens

    assert budget.run(work, longest=20, total=60) == 30 and tried == [10_000, 30]


def test_scores_reference_and_validation_passes_are_redone_likewise(tmp_path):
    denoiser = Cramped()
    rng = np.random.default_rng(4)
    estimator = ElboEstimator()
    pairs = [random_pair(rng, f"{i}") for i in range(5)]
    items = referenced_items(denoiser, pairs, estimator)
    expected = score_items(denoiser, items, ANY_BUDGET)
    store = ReferenceStore.open(tmp_path, {"weights": "these"})
    denoiser.room, budget = 50, TokenBudget(400)
    torch.testing.assert_close(score_items(denoiser, items, budget), expected, rtol=1e-12, atol=1e-12)
    windows = [(pairs, estimator.draw_indices(0))]
    fill_reference(denoiser, store, windows, estimator, TokenBudget(400), StopFlag(), 100, lambda pairs: None)
    task = DpoTask(denoiser, dict(denoiser.named_parameters()), pairs, store, estimator, OBJECTIVE, budget)
    stored = np.stack([item.reference for item in task.items(range(5), 0)])
    np.testing.assert_allclose(stored, expected.numpy(), rtol=1e-12)
    scores = score_preferences(denoiser, items, OBJECTIVE, 2, TokenBudget(400))
    torch.testing.assert_close(scores.draws, expected, rtol=1e-12, atol=1e-12)
    failures = denoiser.failures
    task.accumulate(range(5), 0, 1.0)
    assert denoiser.failures == failures, "the task's budget was halved by the earlier pass already"


def test_each_halving_is_logged_with_the_reason(caplog):
    denoiser = Cramped()
    items = items_of(denoiser)
    denoiser.room = 120
    with caplog.at_level(logging.WARNING):
        score_items(denoiser, items, TokenBudget(400))
    lines = [record.getMessage() for record in caplog.records]
    first = "out of memory with 400 tokens in a pass; doing the work again with 200 (CUDA out of memory."
    assert lines[0].startswith(first) and "more lines" not in lines[0]
    assert len(lines) == 2 and "with 200 tokens" in lines[1]


def test_nothing_of_a_failed_attempt_stays_alive():
    """The traceback would hold the tensors of the attempt; a retry beside them would run out again."""
    import weakref

    class Owner:
        pass

    alive = []

    def work(tokens: int) -> int:
        big = Owner()
        alive.append(weakref.ref(big))
        if tokens > 50:
            raise torch.OutOfMemoryError(MESSAGE)
        return sum(ref() is not None for ref in alive)

    assert TokenBudget(100).run(work, longest=10) == 1


def test_other_errors_are_not_taken_for_memory():
    def work(tokens: int):
        raise RuntimeError("expected scalar type Half")

    with pytest.raises(RuntimeError, match="Half"):
        TokenBudget(100).run(work, longest=1)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("any text"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
            True,
        ),
        (RuntimeError("shape mismatch"), False),
        (MemoryError(), False),
    ],
)
def test_what_counts_as_out_of_memory(error, expected):
    assert is_out_of_memory(error) == expected
