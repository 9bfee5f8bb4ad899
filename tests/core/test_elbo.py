"""Every estimator and schedule against the exact bound of a real small LLaDA, in float64; wrong ones fail the same way.

The exact tests run the production code on every outcome of its random words (tests/core/oracle.py), so they see a bias
of any size; the statistical ones run it on its real generator.
"""

import itertools
import math

import numpy as np
import pytest
import torch

from laddpo.core.draws import BERNOULLI_FLOOR, ESTIMATORS, ElboEstimator, MaskedDraw, MaskedSequence, MaskLaw
from laddpo.core.elbo import draw_logps, pack_sequences
from laddpo.core.noise import COUNT_SCHEDULES, FULL, random_order
from tests.core import oracle
from tests.core.helpers import MASK_ID, parameters_of, random_ids, tiny_denoiser

EXACT = 1e-12  # relative, float64
PROMPT = np.array([1, 4, 2], dtype=np.int32)


@pytest.fixture(scope="module")
def denoiser():
    return tiny_denoiser()


@pytest.fixture(scope="module")
def responses():
    """A response of every length from 1 to 5."""
    rng = np.random.default_rng(3)
    return {length: random_ids(rng, length) for length in range(1, 6)}


@pytest.fixture(scope="module")
def bounds(denoiser, responses):
    """The exact bound of every response."""
    with torch.no_grad():
        return {length: oracle.exact_bound(denoiser, PROMPT, y).item() for length, y in responses.items()}


@pytest.fixture
def script(monkeypatch):
    return oracle.ScriptedWords(monkeypatch)


@torch.no_grad()
def relative_bias(denoiser, response, bound, outcomes) -> float:
    """(exact mean of the estimator - B) / |B|: the one check that right and wrong estimators meet alike."""
    return (oracle.exact_mean(denoiser, PROMPT, response, outcomes).item() - bound) / abs(bound)


# The bound itself


@torch.no_grad()
def test_the_bound_is_the_mean_over_all_generation_orders(denoiser, responses, bounds):
    """E over orders of sum_k log p(y_k-th | the tokens before it in the order): the any-order autoregressive likelihood
    (Hoogeboom et al. 2110.02037), which knows neither counts nor weights."""
    response, total = responses[4], 0.0
    for order in itertools.permutations(range(4)):
        for k, position in enumerate(order):
            seen = [MASK_ID if i in order[k:] else int(token) for i, token in enumerate(response)]
            logits = denoiser.model(input_ids=torch.tensor([[*PROMPT.tolist(), *seen]])).logits[0]
            total += logits[len(PROMPT) + position].log_softmax(-1)[int(response[position])].item() / math.factorial(4)
    assert total == pytest.approx(bounds[4], rel=EXACT)


def test_the_exact_bounds_are_far_from_those_of_a_uniform_model(bounds):
    """Otherwise every mask would score alike and a wrong weight could pass."""
    assert all(abs(bound / length + math.log(8)) > 0.05 for length, bound in bounds.items())


# Unbiased, exactly


@pytest.mark.parametrize("schedule", COUNT_SCHEDULES)
@pytest.mark.parametrize("estimator", ["count", "complement"])
@pytest.mark.parametrize("length", range(1, 6))
def test_every_single_draw_has_exactly_the_bound_as_its_mean(
    estimator, schedule, length, denoiser, responses, bounds, script
):
    # two cells of a grid; the draws after the first n are of the second round of masks
    n = 2 * ElboEstimator(estimator).block
    e = ElboEstimator(estimator, schedule, diffusion_samples=n)
    for index in (*range(n), n + 1):
        outcomes = oracle.count_outcomes(script, e, length, index)
        bias = relative_bias(denoiser, responses[length], bounds[length], outcomes)
        assert abs(bias) < EXACT, f"draw {index}: relative bias {bias:.3g}"


def test_a_single_draw_is_unbiased_when_n_is_one(denoiser, responses, bounds, script):
    """For `complement` that is a mask without its inverse."""
    for estimator, schedule in itertools.product(("count", "complement"), COUNT_SCHEDULES):
        e = ElboEstimator(estimator, schedule, diffusion_samples=1)
        outcomes = oracle.count_outcomes(script, e, 4, 0)
        assert abs(relative_bias(denoiser, responses[4], bounds[4], outcomes)) < EXACT, (estimator, schedule)


@pytest.mark.parametrize("estimator", ["count", "complement"])
def test_the_gradient_of_the_estimate_has_exactly_the_bounds_gradient_as_its_mean(estimator, responses, script):
    outcomes = oracle.count_outcomes(script, ElboEstimator(estimator), 3, 1)
    denoiser = tiny_denoiser()
    parameters = parameters_of(denoiser)
    mean = torch.autograd.grad(oracle.exact_mean(denoiser, PROMPT, responses[3], outcomes), parameters)
    exact = torch.autograd.grad(oracle.exact_bound(denoiser, PROMPT, responses[3]), parameters)
    error = sum(((a - b) ** 2).sum() for a, b in zip(mean, exact, strict=True)).sqrt()
    assert error < EXACT * sum((b**2).sum() for b in exact).sqrt()


@pytest.mark.parametrize("length", range(1, 6))
def test_bernoulli_has_its_own_exact_mean_and_not_the_bound(length, denoiser, responses, bounds, script):
    outcomes = oracle.bernoulli_outcomes(script, ElboEstimator("bernoulli", "iid"), length)
    with torch.no_grad():
        own = oracle.exact_bernoulli_mean(denoiser, PROMPT, responses[length])
    assert abs(relative_bias(denoiser, responses[length], own, outcomes)) < 1e-11
    bias = relative_bias(denoiser, responses[length], bounds[length], outcomes)
    print(f"bernoulli, {length} tokens: relative bias of the floor {bias:+.2e}")
    # without the floor the one-token masks would add, for every p below it, what the average mask adds
    assert pytest.approx(bias, abs=2 * length * BERNOULLI_FLOOR) == 0
    assert length == 1 or abs(bias) > 1e-5


# Unbiased, on the real generator


@pytest.fixture(scope="module")
def log_sums(denoiser, responses):
    """The log-sum of every mask of the response of 5 tokens, the empty one included."""
    with torch.no_grad():
        sums = {m: oracle.log_sum(denoiser, PROMPT, responses[5], m).item() for m in oracle.nonempty_masks(5)}
    return {(): 0.0, **sums}


@pytest.mark.parametrize("schedule", COUNT_SCHEDULES)
@pytest.mark.parametrize("estimator", [name for name, law in ESTIMATORS.items() if not law.is_exact])
def test_means_over_many_pairs_lie_within_four_standard_errors(
    estimator, schedule, log_sums, denoiser, responses, bounds
):
    e = ElboEstimator(estimator, schedule, diffusion_samples=4, seed=11)
    estimates = np.array(
        [
            np.mean([d.weight * log_sums[tuple(d.masked)] for d in (e.draw(f"{i}", "chosen", 5, k) for k in range(4))])
            for i in range(1500)
        ]
    )
    with torch.no_grad():
        own = oracle.exact_bernoulli_mean(denoiser, PROMPT, responses[5])
    expected = own if estimator == "bernoulli" else bounds[5]
    assert abs(estimates.mean() - expected) < 4 * estimates.std(ddof=1) / math.sqrt(len(estimates))


# Deliberately wrong estimators: the checks above can fail


def inverse_without_the_empty_mask(e, response, index) -> MaskedDraw:
    """A mask with l ~ U{1..L}, weight L/l, and its inverse with weight L/(L-l)."""
    length = response.length
    size = 1 + (e.count_fraction(response, index // 2, 2) * length >> 64)
    order = random_order(e.key(response, index // 2), length)
    masked = order[size:] if index % 2 else order[:size]
    return MaskedDraw(index, np.sort(masked), length / len(masked) if len(masked) else 0.0)


def count_off_by_one(e, response, index) -> MaskedDraw:
    """l ~ U{0..L-1}, weight L/l."""
    length = response.length
    size = e.count_fraction(response, index, 4) * length >> 64
    masked = random_order(e.key(response, index), length)[:size]
    return MaskedDraw(index, np.sort(masked), length / size if size else 0.0)


def count_without_weight(e, response, index) -> MaskedDraw:
    draw = ESTIMATORS["count"].draw(e, response, index)
    return MaskedDraw(index, draw.masked, 1.0)


def mean_over_masked(e, response, index) -> MaskedDraw:
    draw = ESTIMATORS["count"].draw(e, response, index)
    return MaskedDraw(index, draw.masked, 1 / len(draw.masked))


def mean_over_padding(e, response, index) -> MaskedDraw:
    """The token mean over a length padded to 8, brought back to a sum by the true length: what padding spoils."""
    draw = ESTIMATORS["count"].draw(e, response, index)
    return MaskedDraw(index, draw.masked, draw.weight / 8 * response.length)


def first_tokens(e, response, index) -> MaskedDraw:
    """The right count and weight, but not a random mask."""
    draw = ESTIMATORS["count"].draw(e, response, index)
    return MaskedDraw(index, np.arange(len(draw.masked)), draw.weight)


WRONG = [
    inverse_without_the_empty_mask,
    count_off_by_one,
    count_without_weight,
    mean_over_masked,
    mean_over_padding,
    first_tokens,
]


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.__name__)
def test_a_wrong_estimator_fails_the_exact_check(wrong, denoiser, responses, bounds, script, monkeypatch):
    monkeypatch.setitem(ESTIMATORS, "wrong", MaskLaw(wrong))
    e = ElboEstimator("wrong", "iid", diffusion_samples=2)
    biases = [
        relative_bias(denoiser, responses[5], bounds[5], oracle.count_outcomes(script, e, 5, index)) for index in (0, 1)
    ]
    print(f"{wrong.__name__}: relative biases {biases}")
    assert max(map(abs, biases)) > 1e-3


def test_a_grid_without_shuffled_cells_fails_the_exact_check(denoiser, responses, bounds, script, monkeypatch):
    """Draw k always in the k-th cell: unbiased as a mean over all n, but not draw by draw."""
    fixed = type(COUNT_SCHEDULES["systematic"])(
        lambda key, index, draws: (index % draws * FULL + int(key.words("count", 1)[0])) // draws, False
    )
    monkeypatch.setitem(COUNT_SCHEDULES, "fixed", fixed)
    outcomes = oracle.count_outcomes(script, ElboEstimator("count", "fixed", 2), 5, 0)
    assert abs(relative_bias(denoiser, responses[5], bounds[5], outcomes)) > 1e-3


def test_bernoulli_divided_by_the_unclamped_probability_fails_the_exact_check(
    denoiser, responses, bounds, script, monkeypatch
):
    """p_mask = (1 - floor) t + floor, but divided by t: infinite mean, of which the nodes see a part."""

    def divided_by_t(e, response, index):
        draw = ESTIMATORS["bernoulli"].draw(e, response, index)
        t = (1 / draw.weight - BERNOULLI_FLOOR) / (1 - BERNOULLI_FLOOR)
        return MaskedDraw(index, draw.masked, 1 / t)

    with torch.no_grad():
        own = oracle.exact_bernoulli_mean(denoiser, PROMPT, responses[5])
    monkeypatch.setitem(ESTIMATORS, "wrong", MaskLaw(divided_by_t))
    outcomes = oracle.bernoulli_outcomes(script, ElboEstimator("wrong", "iid"), 5)
    assert abs(relative_bias(denoiser, responses[5], own, outcomes)) > 1e-3
    assert abs(relative_bias(denoiser, responses[5], bounds[5], outcomes)) > 1e-3


# Packing and scoring


def test_packing_lays_sequences_end_to_end_and_masks_only_the_response():
    one = MaskedSequence(np.int32([5]), np.int32([3, 2]), MaskedDraw(0, np.array([1]), 2.0))
    two = MaskedSequence(np.int32([4, 6]), np.int32([1, 0, 1]), MaskedDraw(0, np.array([0, 2]), 1.5))
    packed = pack_sequences([one, two], MASK_ID)
    assert packed.input_ids.tolist() == [5, 3, MASK_ID, 4, 6, MASK_ID, 0, MASK_ID]
    assert packed.position_ids.tolist() == [0, 1, 2, 0, 1, 2, 3, 4]
    assert packed.lengths == [3, 5]
    assert packed.rows.tolist() == [2, 5, 7]
    assert packed.targets.tolist() == [2, 1, 1]
    assert one.response_ids.tolist() == [3, 2], "packing must not write into the caller's arrays"


@torch.no_grad()
def test_scores_are_weight_times_log_sum_wherever_a_sequence_is_packed(denoiser, responses):
    sequences, expected = [], []
    for length, response in responses.items():
        for i, mask in enumerate([(), *oracle.nonempty_masks(length)]):
            weight = 1.0 + i
            sequences.append(MaskedSequence(PROMPT[: length % 3], response, MaskedDraw(i, np.array(mask, int), weight)))
            log_sum = oracle.log_sum(denoiser, PROMPT[: length % 3], response, mask) if mask else 0.0
            expected.append(weight * float(log_sum))
    expected = torch.tensor(expected, dtype=torch.float64)
    order = np.random.default_rng(0).permutation(len(sequences))
    scored = draw_logps(denoiser, [sequences[i] for i in order])
    torch.testing.assert_close(scored, expected[order], rtol=EXACT, atol=EXACT)
    torch.testing.assert_close(
        torch.cat([draw_logps(denoiser, [s]) for s in sequences]), expected, rtol=EXACT, atol=EXACT
    )


def test_draws_that_mask_nothing_cost_nothing_and_score_zero():
    class NeverCalled:
        mask_token_id, device = MASK_ID, torch.device("cpu")

        def token_logps(self, packed):
            raise AssertionError("an empty mask needs no forward")

    empty = MaskedSequence(PROMPT, np.int32([1, 2]), MaskedDraw(0, np.array([], dtype=int), 0.0))
    assert empty.tokens == 0
    assert draw_logps(NeverCalled(), [empty, empty]).tolist() == [0.0, 0.0]


def test_the_prompt_is_never_masked_and_never_scored(denoiser, responses):
    """Only its place in the input moves: with another prompt of the same length the rows stay the same."""
    e = ElboEstimator("complement", diffusion_samples=8)
    packed = pack_sequences(
        [s for s in e.sequences("pair", "chosen", PROMPT, responses[5], range(8)) if s.tokens], MASK_ID
    )
    starts = np.cumsum([0, *packed.lengths[:-1]])
    for start in starts:
        assert packed.input_ids[start : start + len(PROMPT)].tolist() == PROMPT.tolist()
    within = packed.rows.numpy() - starts[np.searchsorted(starts, packed.rows.numpy(), side="right") - 1]
    assert (within >= len(PROMPT)).all()


def test_scores_add_in_float64():
    """A float32 sum of these token scores would lose the small ones."""

    class Fixed:
        mask_token_id, device = MASK_ID, torch.device("cpu")

        def token_logps(self, packed):
            return torch.tensor([-16777216.0, -1.0, -1.0, -1.0], dtype=torch.float32)

    sequence = MaskedSequence(PROMPT, np.int32([1, 2, 3, 4]), MaskedDraw(0, np.arange(4), 1.0))
    assert draw_logps(Fixed(), [sequence]).tolist() == [-16777219.0]
