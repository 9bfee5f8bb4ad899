"""Learning rates by hand; every optimizer steps, decays matrices alone, and keeps its state under parameter names."""

import math

import pytest
import torch

from laddpo.core.optim import OPTIMIZERS, SCHEDULES, build_optimizer, learning_rate
from laddpo.storage.checkpoint import optimizer_state_by_name

ON_CPU = [name for name, kind in OPTIMIZERS.items() if not kind.needs_cuda]
EIGHT_BIT_FROM = 4096  # elements; bitsandbytes keeps smaller tensors in 32 bits


def parameters(seed: int = 0) -> dict[str, torch.nn.Parameter]:
    draw = torch.Generator().manual_seed(seed)
    shapes = {"large": (64, 64), "small": (3, 5), "vector": (7,)}
    return {name: torch.nn.Parameter(torch.randn(shape, generator=draw)) for name, shape in shapes.items()}


def optimizer_of(name: str, named, weight_decay: float = 0.0) -> torch.optim.Optimizer:
    if "8bit" in name:
        pytest.importorskip("bitsandbytes")
    return build_optimizer(name, named, betas=(0.9, 0.95), eps=1e-8, weight_decay=weight_decay)


def step(optimizer: torch.optim.Optimizer, named, rate: float, seed: int = 0) -> None:
    draw = torch.Generator().manual_seed(seed)
    for parameter in named.values():
        parameter.grad = torch.randn(parameter.shape, generator=draw)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()


# Schedules


def test_the_warm_up_rises_linearly_and_starts_above_zero():
    rates = [learning_rate("constant", s, 1.0, warmup_steps=4, total_steps=10) for s in range(7)]
    assert rates == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1, 1])


def test_linear_falls_to_zero_after_the_last_step():
    rates = [learning_rate("linear", s, 2.0, warmup_steps=0, total_steps=4) for s in range(5)]
    assert rates == pytest.approx([2, 1.5, 1, 0.5, 0])


def test_cosine_falls_along_half_a_wave():
    rates = [learning_rate("cosine", s, 1.0, warmup_steps=2, total_steps=6) for s in range(7)]
    half = math.sqrt(0.5) / 2
    assert rates == pytest.approx([1 / 3, 2 / 3, 1, 0.5 + half, 0.5, 0.5 - half, 0])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_rates_stay_between_zero_and_the_peak(schedule):
    """Also where the warm-up is as long as the run, and beyond its end."""
    for warmup, total in ((0, 1), (3, 3), (5, 3), (1, 9)):
        rates = [learning_rate(schedule, s, 3e-4, warmup, total) for s in range(total + 3)]
        assert all(0 <= rate <= 3e-4 for rate in rates)
        assert all(rate > 0 for rate in rates[:total]), "a step of the run would be lost"


# Optimizers


@pytest.mark.parametrize("name", ON_CPU)
def test_a_first_step_moves_every_weight_by_the_rate_against_its_gradient(name):
    named = parameters()
    before = {key: p.detach().clone() for key, p in named.items()}
    step(optimizer_of(name, named), named, rate=0.01)
    for key, parameter in named.items():
        # Adam's first step is rate * g / |g|; 8-bit moments round it
        moved = (parameter.detach() - before[key]) * -parameter.grad.sign()
        large = parameter.grad.abs() > 0.1
        torch.testing.assert_close(moved[large], torch.full_like(moved[large], 0.01), rtol=0.02, atol=0)


@pytest.mark.parametrize("name", ON_CPU)
def test_weight_decay_shrinks_matrices_and_not_vectors(name):
    decayed, plain = parameters(), parameters()
    step(optimizer_of(name, decayed, weight_decay=0.1), decayed, rate=0.01)
    step(optimizer_of(name, plain), plain, rate=0.01)
    start = parameters()
    assert torch.equal(decayed["vector"], plain["vector"])
    for key in ("large", "small"):
        shrunk = plain[key].detach() - decayed[key].detach()
        torch.testing.assert_close(shrunk, 0.01 * 0.1 * start[key].detach(), rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("name", ON_CPU)
def test_a_rate_of_zero_changes_nothing(name):
    named = parameters()
    step(optimizer_of(name, named, weight_decay=0.1), named, rate=0.0)
    assert all(torch.equal(p, q) for p, q in zip(named.values(), parameters().values(), strict=True))


def test_models_without_vectors_need_no_second_group():
    named = {"a": torch.nn.Parameter(torch.zeros(2, 2))}
    assert len(optimizer_of("adamw", named).param_groups) == 1


def test_eight_bit_moments_are_bytes_for_large_tensors():
    named = parameters()
    optimizer = optimizer_of("adamw_8bit", named)
    step(optimizer, named, 0.01)
    arrays, numbers = optimizer_state_by_name(optimizer, named)
    assert named["large"].numel() >= EIGHT_BIT_FROM
    assert arrays["large/state1"].dtype == torch.uint8 and arrays["small/state1"].dtype == torch.float32
    assert numbers == {name: {"step": 1} for name in named}


@pytest.mark.parametrize("name", ON_CPU)
def test_all_state_is_listed_by_parameter_name(name):
    named = parameters()
    optimizer = optimizer_of(name, named)
    step(optimizer, named, 0.01)
    arrays, numbers = optimizer_state_by_name(optimizer, named)
    for key, parameter in named.items():
        fields = {field for field in optimizer.state[parameter]}
        listed = {entry.split("/")[1] for entry in arrays if entry.startswith(f"{key}/")} | set(numbers.get(key, {}))
        assert listed == fields and "step" in fields


@pytest.mark.parametrize("name", ON_CPU)
def test_the_state_is_what_the_row_tells_the_memory_plan(name):
    """One matrix in a block, of 64 x 64 and so in 8 bits where the row says so."""
    named = {"blocks.0.q_proj.weight": torch.nn.Parameter(torch.randn(64, 64))}
    optimizer = optimizer_of(name, named)
    step(optimizer, named, 0.01)
    arrays, _ = optimizer_state_by_name(optimizer, named)
    moments = [array for array in arrays.values() if array.shape == (64, 64)]
    kind = OPTIMIZERS[name]
    assert len(moments) == kind.matrix_moments
    assert all(array.element_size() == (1 if kind.is_8bit else 4) for array in moments)


# Muon

IN_BLOCKS = ("blocks.0.q_proj.weight", "blocks.0.up_proj.weight")


def blocks_and_ends(seed: int = 0) -> dict[str, torch.nn.Parameter]:
    draw = torch.Generator().manual_seed(seed)
    shapes = dict(zip(IN_BLOCKS, [(16, 16), (48, 16)], strict=True))
    shapes |= {"wte.weight": (40, 16), "blocks.0.norm.weight": (16,), "ff_out.weight": (40, 16)}
    return {name: torch.nn.Parameter(torch.randn(shape, generator=draw)) for name, shape in shapes.items()}


def test_muon_moves_matrices_of_blocks_in_all_directions_alike_and_as_far_as_adamw():
    """The singular values of its update are nearly equal; its root mean square is 0.2 of the rate, as AdamW's usually
    is (arXiv 2502.16982, equation 4)."""
    named, start = blocks_and_ends(), blocks_and_ends()
    step(optimizer_of("muon", named), named, rate=0.01)
    for name in IN_BLOCKS:
        update = (named[name] - start[name]).detach()
        sizes = torch.linalg.svdvals(update)
        of_gradient = torch.linalg.svdvals(named[name].grad)
        assert sizes.max() / sizes.min() < 2.5 < of_gradient.max() / of_gradient.min()
        assert float(update.square().mean().sqrt()) == pytest.approx(0.2 * 0.01, rel=0.3)


def test_muon_leaves_embedding_head_and_vectors_to_adamw():
    by_muon, by_adamw = blocks_and_ends(), blocks_and_ends()
    for named, name in ((by_muon, "muon"), (by_adamw, "adamw")):
        optimizer = optimizer_of(name, named, weight_decay=0.1)
        for seed in range(3):
            step(optimizer, named, 0.01, seed)
    for name, parameter in by_muon.items():
        assert torch.equal(parameter, by_adamw[name]) == (name not in IN_BLOCKS)


def test_muon_keeps_one_moment_of_a_matrix_in_a_block():
    named = blocks_and_ends()
    optimizer = optimizer_of("muon", named)
    step(optimizer, named, 0.01)
    assert set(optimizer.state[named["blocks.0.q_proj.weight"]]) == {"momentum_buffer"}
    assert set(optimizer.state[named["wte.weight"]]) == {"step", "exp_avg", "exp_avg_sq"}
