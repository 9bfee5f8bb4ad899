"""Learning rates by hand; every optimizer steps, decays matrices alone, and keeps its state under parameter names."""

import math

import pytest
import torch

from laddpo.core.checkpoint import optimizer_state_by_name
from laddpo.core.optim import OPTIMIZERS, SCHEDULES, build_optimizer, learning_rate

ON_CPU = ["adamw", "adamw_8bit"]  # paged memory is CUDA's
EIGHT_BIT_FROM = 4096  # elements; bitsandbytes keeps smaller tensors in 32 bits


def parameters(seed: int = 0) -> dict[str, torch.nn.Parameter]:
    draw = torch.Generator().manual_seed(seed)
    shapes = {"large": (64, 64), "small": (3, 5), "vector": (7,)}
    return {name: torch.nn.Parameter(torch.randn(shape, generator=draw)) for name, shape in shapes.items()}


def optimizer_of(name: str, named, weight_decay: float = 0.0) -> torch.optim.Optimizer:
    if name != "adamw":
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


def test_every_optimizer_of_the_table_is_built_by_its_name():
    assert set(OPTIMIZERS) == {"adamw", "adamw_8bit", "paged_adamw_8bit"}
