"""The bound of block-diffusion models against enumeration, and the row that shares clean contexts against draws alone.

The oracle scores every mask of every block by one plain forward of the model over [clean blocks before | this block]
and sums with the definition's weights (BD3-LM, arXiv 2503.09573). It shares no code with estimators or packing.
"""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch

from laddpo.core.draws import ESTIMATORS, ElboEstimator, MaskLaw, block_spans, exact_draws
from laddpo.core.elbo import draw_logps, pack_sequences
from laddpo.core.gradient import BACKWARD_MODES, Item, accumulate_gradient, pack_sequence_runs, score_items
from laddpo.core.losses import LossOptions
from laddpo.core.noise import COUNT_SCHEDULES
from laddpo.core.objectives import DpoObjective
from laddpo.core.sequences import MaskedDraw, MaskedSequence, full_tokens, row_tokens, tokens_of
from laddpo.core.tasks import pair_item
from laddpo.models.denoiser import TransformerDenoiser
from laddpo.models.llama import A2DQwen3LMHeadModel
from laddpo.models.llama_config import A2DQwen3Config
from laddpo.preference.encoding.encode import EncodedPair
from tests.core.helpers import ANY_BUDGET, MASK_ID, VOCABULARY, parameters_of, random_ids
from tests.core.oracle import nonempty_masks

EXACT = 1e-12
PROMPTS = (0, 3, 8, 10)  # with blocks of 4: nothing, less than a block, whole blocks, a tail


def block_denoiser(block_length: int = 4, dtype: torch.dtype = torch.float64) -> TransformerDenoiser:
    """A random Qwen3-like network of two layers that attends causally over blocks."""
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 24}
    config = A2DQwen3Config(**shape, head_dim=8, vocab_size=VOCABULARY, mask_token_id=MASK_ID, initializer_range=0.3)
    config.block_length = block_length
    return TransformerDenoiser(A2DQwen3LMHeadModel(config).to(dtype), MASK_ID)


@pytest.fixture(scope="module")
def denoiser():
    return block_denoiser()


def block_sums(denoiser, prompt, response, size: int) -> list[dict[tuple[int, ...], torch.Tensor]]:
    """For every block, for every mask of its response tokens: the sum of log p of the masked ones."""
    clean, found = [*prompt.tolist(), *response.tolist()], []
    for start, end in block_spans(len(prompt), len(response), size):
        first, sums = len(prompt) + start, {(): torch.zeros((), dtype=torch.float64)}
        for mask in nonempty_masks(end - start):
            seen = clean[: len(prompt) + end]
            for i in mask:
                seen[first + i] = MASK_ID
            logps = denoiser.model(torch.tensor([seen])).logits[0].log_softmax(-1)
            sums[mask] = sum(logps[first + i, clean[first + i]] for i in mask)
        found.append(sums)
    return found


def bound(sums) -> torch.Tensor:
    """B: for every block the sum over masks M of S(M) / (l C(n, l))."""
    return sum(
        value / (len(mask) * math.comb(len(max(block, key=len)), len(mask)))
        for block in sums
        for mask, value in block.items()
        if mask
    )


def estimate(draw: MaskedDraw, sums, spans) -> float:
    """The value of a draw, from the table of block sums."""
    total = 0.0
    for block, (start, end), (_, weight) in zip(sums, spans, draw.parts, strict=True):
        mask = tuple(int(i) - start for i in draw.masked if start <= i < end)
        total += weight * float(block[mask])
    return total


@pytest.fixture(scope="module")
def case(denoiser):
    """A prompt of 6 and a response of 9 under blocks of 4: parts of 2, 4 and 3 tokens. Its sums and its bound."""
    rng = np.random.default_rng(4)
    prompt, response = random_ids(rng, 6), random_ids(rng, 9)
    with torch.no_grad():
        sums = block_sums(denoiser, prompt, response, 4)
    return prompt, response, sums, float(bound(sums)), block_spans(6, 9, 4)


def test_blocks_lie_on_a_grid_that_starts_with_the_prompt():
    for prompt, length, size in itertools.product(range(9), range(1, 10), (1, 2, 3, 4, 8)):
        spans = block_spans(prompt, length, size)
        assert [start for start, _ in spans[1:]] == [end for _, end in spans[:-1]]
        assert spans[0][0] == 0 and spans[-1][1] == length
        assert all((prompt + start) // size == (prompt + end - 1) // size for start, end in spans)
        assert all((prompt + start) % size == 0 for start, _ in spans[1:])


@pytest.mark.parametrize("prompt_length", PROMPTS)
def test_the_draws_of_exact_are_the_bound_and_so_are_their_gradients(denoiser, prompt_length):
    rng = np.random.default_rng(prompt_length)
    prompt, response = random_ids(rng, prompt_length), random_ids(rng, 7)
    e = ElboEstimator("exact", diffusion_samples=exact_draws(4), seed=1, block_length=4)
    sequences = e.sequences("pair", "chosen", prompt, response, e.draw_indices(0))
    parameters = parameters_of(denoiser)
    value, wanted = draw_logps(denoiser, sequences).mean(), bound(block_sums(denoiser, prompt, response, 4))
    torch.testing.assert_close(value, wanted, rtol=EXACT, atol=EXACT)
    found, expected = (torch.autograd.grad(v, parameters) for v in (value, wanted))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=EXACT)


@pytest.mark.parametrize("schedule", COUNT_SCHEDULES)
@pytest.mark.parametrize("estimator", ["count", "complement", "balanced", "exact", "complement+focus"])
def test_every_draw_has_the_bound_as_its_mean(estimator, schedule, case):
    """Each draw by itself, over many pairs, within four standard errors."""
    _, _, sums, exact, spans = case
    name, focus = estimator.split("+")[0], 0.7 if "+" in estimator else 0.0
    e = ElboEstimator(name, schedule, 4, seed=5, difference_focus=focus, block_length=4)
    values = np.array(
        [
            [estimate(e.draw(f"{i}", "chosen", 9, k, np.array([1, 4]), 6), sums, spans) for k in range(4)]
            for i in range(700)
        ]
    )
    errors = values.std(axis=0, ddof=1) / math.sqrt(len(values))
    assert (abs(values.mean(axis=0) - exact) < 4 * errors).all()


def _divided_by_length(e, response, index) -> MaskedDraw:
    draw = ESTIMATORS["count"].draw(e, response, index)
    return MaskedDraw(index, draw.masked, draw.weight / response.length)


def _one_weight(e, response, index) -> MaskedDraw:
    """The weight of the whole response, L / l, in every block."""
    draw = ESTIMATORS["count"].draw(e, response, index)
    return MaskedDraw(index, draw.masked, 9 / len(draw.masked))


@pytest.mark.parametrize("wrong", [_divided_by_length, _one_weight])
def test_wrong_weights_fail_that_check(wrong, case, monkeypatch):
    monkeypatch.setitem(ESTIMATORS, "wrong", MaskLaw(wrong))
    with pytest.raises(AssertionError):
        test_every_draw_has_the_bound_as_its_mean("wrong", "iid", case)


def test_a_noisy_context_is_another_number(denoiser, case):
    """All blocks masked at once and read in one pass, as if the model saw noise before a block: not the bound."""
    prompt, response, _, exact, _ = case
    e = ElboEstimator("exact", diffusion_samples=exact_draws(4), block_length=4)
    total = 0.0
    for sequence in e.sequences("pair", "chosen", prompt, response, range(15)):
        ids = torch.tensor([[*prompt.tolist(), *response.tolist()]])
        ids[0, 6 + sequence.draw.masked] = MASK_ID
        logps = denoiser.model(ids).logits[0].log_softmax(-1)
        at = iter(sequence.draw.masked.tolist())
        total += sum(
            w * sum(logps[6 + i, response[i]].item() for i in itertools.islice(at, n)) for n, w in sequence.draw.parts
        )
    assert abs(total / 15 - exact) > 1e-3 * abs(exact)


def test_masks_redrawn_for_the_reference_leave_noise_where_there_is_no_difference(denoiser, case):
    """The policy is the reference: under common masks each margin is exactly 0, under masks of its own it is not."""
    prompt, response, _, _, _ = case
    ours = ElboEstimator("complement", diffusion_samples=4, block_length=4)
    values = []
    for e in (ours, ours, dataclasses.replace(ours, stream="/reference")):
        with torch.no_grad():
            values.append(draw_logps(denoiser, e.sequences("p", "chosen", prompt, response, range(4))))
    assert torch.equal(values[0], values[1])
    assert abs(float((values[0] - values[2]).mean())) > 0.1


def test_a_prompt_tail_that_is_forgotten_is_another_number(denoiser, case):
    """The tail of the prompt stands in the first response block, where attention runs both ways."""
    prompt, response, _, exact, _ = case
    e = ElboEstimator("exact", diffusion_samples=exact_draws(4), block_length=4)
    cut = e.sequences("pair", "chosen", prompt[:4], response, range(15))
    with torch.no_grad():
        assert abs(float(draw_logps(denoiser, cut).mean()) - exact) > 1e-3 * abs(exact)


def spread_of(e: ElboEstimator, case) -> float:
    """Variance over pairs of the mean over the draws."""
    _, _, sums, _, spans = case
    draws = e.draw_indices(0)
    means = [
        np.mean([estimate(e.draw(f"{i}", "chosen", 9, k, prompt_length=6), sums, spans) for k in draws])
        for i in range(600)
    ]
    return float(np.var(means, ddof=1))


def test_one_count_for_all_blocks_is_right_in_mean_and_noisier():
    """Tokens that are harder the more are masked: all noise is that of the counts. One masked fraction for all blocks
    (`single`, unbiased: tested above) has more of it than fractions of their own, and those more than spread ones."""
    spans = block_spans(8, 32, 4)
    sums = [{mask: -float(len(mask) ** 2) for mask in [(), *nonempty_masks(4)]} for _ in spans]

    def spread_of(estimator: str, schedule: str, n: int) -> float:
        e, values = ElboEstimator(estimator, schedule, n, block_length=4), []
        for pair in range(300):
            draws = (e.draw(f"{pair}", "chosen", 32, k, prompt_length=8) for k in range(n))
            values.append(np.mean([estimate(draw, sums, spans) for draw in draws]))
        return float(np.var(values, ddof=1))

    one, own, spread = (spread_of("count", name, 4) for name in ("single", "iid", "low_discrepancy"))
    assert one > 10 * own > 100 * spread
    assert spread_of("exact", "iid", 15) < 1e-20


def test_fractions_spread_over_the_blocks_of_one_draw():
    """Sixteen blocks of one draw lie in every eighth of [0, 1); independent ones do not."""
    for schedule, is_spread in (("low_discrepancy", True), ("stratified", True), ("iid", False)):
        e = ElboEstimator("count", schedule, 4, block_length=64)
        filled = []
        for pair in range(20):
            draw = e.draw(f"{pair}", "chosen", 64 * 16, 0)
            filled.append(len({(count - 1) // 8 for count, _ in draw.parts}))
        assert (min(filled) == 8) == is_spread, (schedule, filled)


def test_noise_of_a_block_belongs_to_the_pair_the_draw_and_the_block_alone():
    e = ElboEstimator("complement", "low_discrepancy", 2, block_length=4)
    few, many = (e.draw("p", "chosen", n, 1, prompt_length=6) for n in (9, 30))
    assert few.masked[few.masked < 6].tolist() == many.masked[many.masked < 6].tolist()  # two whole blocks
    more = dataclasses.replace(e, diffusion_samples=8).draw("p", "chosen", 9, 1, prompt_length=6)
    assert more.masked.tolist() == few.masked.tolist() and more.parts == few.parts
    orders = {tuple(e.draw("p", "chosen", 40, 0).masked[4 * b : 4 * b + 4] % 4) for b in range(10)}
    assert len(orders) > 1


def test_the_key_of_a_store_knows_blocks_and_only_where_there_are_some():
    plain, block = ElboEstimator(), ElboEstimator(block_length=4)
    assert block.store_fields() == {**plain.store_fields(), "block_length": 4}


# One row for all draws of a pair


def drawn_pair(
    prompt: int,
    draws: int,
    estimator: str = "count",
    lengths: tuple[int, int] = (9, 13),
    size: int = 4,
    name: str = "p",
) -> Item:
    rng = np.random.default_rng([prompt, *name.encode()])
    pair = EncodedPair(name, random_ids(rng, prompt), *(random_ids(rng, n) for n in lengths), group="p")
    return pair_item(pair, ElboEstimator(estimator, diffusion_samples=draws, block_length=size), range(draws))


def alone(item: Item) -> list[MaskedSequence]:
    """The same sequences, each with arrays of its own: nothing is shared."""
    return [
        dataclasses.replace(s, prompt_ids=s.prompt_ids.copy(), response_ids=s.response_ids.copy())
        for s in item.sequences
    ]


@pytest.mark.parametrize(
    ("prompt", "draws", "size"), [*itertools.product(PROMPTS, (1, 4), (4,)), (10, 8, 4), (7, 4, 8)]
)
def test_draws_over_one_context_are_those_alone_with_their_gradients(prompt, draws, size):
    denoiser = block_denoiser(size)
    item, parameters = drawn_pair(prompt, draws, "complement", size=size), parameters_of(denoiser)
    weights = torch.linspace(-1, 2, len(item.sequences), dtype=torch.float64)
    values = [draw_logps(denoiser, sequences) for sequences in (item.sequences, alone(item))]
    torch.testing.assert_close(*values, rtol=EXACT, atol=EXACT)
    found, wanted = (torch.autograd.grad((weights * value).sum(), parameters) for value in values)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=EXACT)


def test_float32_agrees_to_its_rounding():
    denoiser, item = block_denoiser(dtype=torch.float32), drawn_pair(10, 4)
    values = [draw_logps(denoiser, sequences) for sequences in (item.sequences, alone(item))]
    torch.testing.assert_close(*values, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_every_attention_gives_the_same(denoiser, implementation):
    item, other = drawn_pair(10, 4), block_denoiser()
    other.model.set_attn_implementation(implementation)
    with torch.no_grad():
        torch.testing.assert_close(
            draw_logps(other, item.sequences), draw_logps(denoiser, item.sequences), rtol=1e-9, atol=EXACT
        )


@pytest.mark.parametrize("mode", BACKWARD_MODES)
def test_a_step_is_the_same_under_every_budget_and_mode(denoiser, mode):
    parameters, objective = parameters_of(denoiser), DpoObjective("sigmoid", LossOptions(0.3))
    # two prompts of one shape, which run as a batch, around one of another
    drawn = [drawn_pair(10, 4), drawn_pair(3, 4, lengths=(5, 2), name="q"), drawn_pair(10, 4, name="r")]
    reference = score_items(denoiser, drawn, ANY_BUDGET).numpy() + np.random.default_rng(0).normal(size=(3, 2, 4))
    items = [Item(f"{i}", item.sides, values) for i, (item, values) in enumerate(zip(drawn, reference, strict=True))]
    losses = objective.losses(items, torch.stack([draw_logps(denoiser, alone(item)).view(2, 4) for item in items]))
    wanted = torch.autograd.grad(losses.sum(), parameters)
    for budget in (1, 40, 90, ANY_BUDGET):
        for parameter in parameters:
            parameter.grad = None
        found = accumulate_gradient(denoiser, parameters, items, objective, 1.0, budget, mode)
        torch.testing.assert_close(found.losses, losses.detach(), rtol=1e-10, atol=EXACT)
        for parameter, slope in zip(parameters, wanted, strict=True):
            torch.testing.assert_close(parameter.grad, slope, rtol=1e-9, atol=1e-11)
    for parameter in parameters:
        parameter.grad = None


@pytest.mark.parametrize("prompt", PROMPTS)
def test_tokens_are_counted_as_they_are_laid_out(prompt):
    """What budgets and plans count with is the length of the row; no more than P - r + (n + 1)(L_w + L_l + 2 r)."""
    item = drawn_pair(prompt, 4)
    masked = [s for s in item.sequences if len(s.draw.masked)]
    assert item.tokens == row_tokens(item.sequences) == len(pack_sequences(masked, MASK_ID).input_ids)
    tail = prompt % 4
    assert item.tokens <= item.full_tokens <= prompt - tail + 5 * (9 + 13 + 2 * tail)
    whole = ElboEstimator("count", diffusion_samples=4, block_length=4)
    hidden = [
        MaskedSequence(s.prompt_ids, s.response_ids, MaskedDraw(0, np.arange(len(s.response_ids))), 4)
        for s in item.sequences
    ]
    assert row_tokens(hidden) == full_tokens([side[0] for side in item.sides], whole.diffusion_samples)
    assert item.full_tokens == tokens_of(prompt, [9, 13], 4, 4)


def test_runs_within_a_budget_count_the_context_of_each():
    item = drawn_pair(10, 6)
    for budget in (1, 40, 70, 1000):
        runs = pack_sequence_runs(item.sides[0], budget)
        assert [s for run in runs for s in run] == list(item.sides[0])
        assert all(row_tokens(run) <= budget or len(run) == 1 for run in runs)
    assert len(runs) == 1
