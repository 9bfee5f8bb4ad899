"""The gradient of one optimizer step in flat memory: exact, whatever the number of draws.

The loss sees the policy only through per-draw ELBO values, so a step never needs more than one micro-step's graph: run
forward and backward of some draws at a time on their unscaled sums, and scale by dL/dB at the end. Items go in (a pair
with its masked sequences, or one response of an SFT row), gradients accumulate into `parameter.grad`, values come out.

Three ways behind one interface:
- stream: one pass. Items that fit the token budget whole are packed together and the loss itself is differentiated; a
  larger item keeps its unscaled gradient in buffers of its own until its coefficients are known.
- two_pass: scores without a graph, then one weighted backward packed over any items: no buffers, a third more FLOPs.
- joint: one graph for everything, the autograd reference of the tests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from laddpo.core.budget import TokenBudget
from laddpo.core.elbo import Denoiser, draw_logps
from laddpo.core.sequences import MaskedSequence, full_tokens, row_tokens

BACKWARD_MODES = ("stream", "two_pass", "joint")


@dataclass(frozen=True)
class Item:
    """What one loss value depends on: `sides` of one or two responses, each under the same number of draws.

    A preference pair has the sides chosen and rejected; an SFT row and a labelled completion have one. `reference`
    holds the reference model's value of every draw. # float64 [sides, draws]
    `label`: whether a completion is desirable; None of pairs and SFT rows. `weight` multiplies the item's loss.
    `margin` is by how much the score of a pair should exceed 0.
    """

    id: str
    sides: tuple[tuple[MaskedSequence, ...], ...]
    reference: np.ndarray | None = None
    label: bool | None = None
    weight: float = 1.0
    margin: float = 0.0

    @property
    def response_tokens(self) -> tuple[int, ...]:
        """L of every side."""
        return tuple(len(side[0].response_ids) for side in self.sides)

    @property
    def sequences(self) -> list[MaskedSequence]:
        """All sides' sequences, one side after the other."""
        return [sequence for side in self.sides for sequence in side]

    @property
    def tokens(self) -> int:
        """Tokens of all draws of all sides in one row."""
        return row_tokens(self.sequences)

    @property
    def full_tokens(self) -> int:
        """The same as if every draw masked something: what can be known of an item without its masks."""
        return full_tokens([side[0] for side in self.sides], len(self.sides[0]))


class Objective(Protocol):
    """A loss over per-draw values.

    `losses` maps [items, sides, draws] (float64, differentiable) to the loss per item [items]. `coefficient_groups`
    names the draws whose derivative is equal up to sign: two arrays [sides, draws], labels from 0 and signs +1 or -1.
    """

    def losses(self, items: Sequence[Item], draws: Tensor) -> Tensor: ...

    def coefficient_groups(self, sides: int, draws: int) -> tuple[np.ndarray, np.ndarray]: ...


@dataclass(frozen=True)
class StepValues:
    """What a step saw, detached. `draws` float64 [items, sides, draws]; `losses` float64 [items]."""

    draws: Tensor
    losses: Tensor


def accumulate_gradient(
    denoiser: Denoiser,
    parameters: Sequence[Tensor],
    items: Sequence[Item],
    objective: Objective,
    scale: float,
    token_budget: int | TokenBudget,
    mode: str = "stream",
) -> StepValues:
    """Add the gradient of `scale * sum of the items' losses` to every `parameter.grad`.

    `scale` is 1 / (items in the global step), times the loss scaler's factor in fp16. Peak memory is that of one
    micro-step of at most `token_budget` tokens (or of one longer sequence), plus buffers for items that exceed it. When
    memory runs out, all of it is done again in smaller micro-steps (core/budget.py).
    """
    assert mode in BACKWARD_MODES, f"backward mode {mode!r}"
    if mode == "joint":
        return _one_pass(denoiser, parameters, items, objective, scale, None)
    earlier = [parameter.grad for parameter in parameters]

    def attempt(tokens: int) -> StepValues:
        for parameter in parameters:
            parameter.grad = None
        if mode == "two_pass":
            return _two_pass(denoiser, items, objective, scale, tokens)
        return _one_pass(denoiser, parameters, items, objective, scale, tokens)

    values = TokenBudget.of(token_budget).run(attempt, longest_sequence(items))
    for parameter, gradient in zip(parameters, earlier, strict=True):
        if gradient is not None:
            parameter.grad = gradient if parameter.grad is None else gradient.add_(parameter.grad)
    return values


def score_items(denoiser: Denoiser, items: Sequence[Item], token_budget: int | TokenBudget) -> Tensor:
    """Per-draw values without a graph, in the same packing as `stream`. # float64 [items, sides, draws]"""
    budget = TokenBudget.of(token_budget)
    return budget.run(lambda tokens: _score(denoiser, items, tokens, budget.between), longest_sequence(items))


def longest_sequence(items: Sequence[Item]) -> int:
    """Tokens of the longest sequence: what a micro-step holds at least."""
    return max((sequence.tokens for item in items for sequence in item.sequences), default=0)


def pack_items(items: Sequence[Item], token_budget: int | None) -> list[list[int]]:
    """Indices of items that run as one micro-step, filled in the order of length up to the budget.

    Equal lengths end up side by side, which the padding-free attention turns into batches; an item over the budget is
    alone. None: all together.
    """
    if token_budget is None:
        return [list(range(len(items)))] if items else []
    groups: list[list[int]] = []
    filled = token_budget + 1
    for i in sorted(range(len(items)), key=lambda i: (items[i].tokens, i)):
        if filled + items[i].tokens > token_budget:
            groups.append([])
            filled = 0
        groups[-1].append(i)
        filled += items[i].tokens
    return groups


def pack_sequence_runs(sequences: Sequence[MaskedSequence], token_budget: int) -> list[list[MaskedSequence]]:
    """Consecutive runs of sequences that fit the budget; a longer sequence is alone."""
    runs: list[list[MaskedSequence]] = []
    for sequence in sequences:
        if not runs or row_tokens([*runs[-1], sequence]) > token_budget:
            runs.append([])
        runs[-1].append(sequence)
    return runs


def _one_pass(
    denoiser: Denoiser,
    parameters: Sequence[Tensor],
    items: Sequence[Item],
    objective: Objective,
    scale: float,
    token_budget: int | None,
) -> StepValues:
    """`stream`; without a budget `joint`."""
    draws, losses = [None] * len(items), [None] * len(items)
    with lockstep(denoiser, with_gradients=True):
        for group in pack_items(items, token_budget):
            members = [items[i] for i in group]
            if token_budget is not None and members[0].tokens > token_budget:
                values, loss = _stream_large_item(denoiser, parameters, members[0], objective, scale, token_budget)
            else:
                values, loss = _backward_whole_items(denoiser, members, objective, scale)
            for position, i in enumerate(group):
                draws[i], losses[i] = values[position], loss[position]
    return StepValues(torch.stack(draws), torch.stack(losses))


@torch.no_grad()
def _score(
    denoiser: Denoiser, items: Sequence[Item], token_budget: int, between: Callable[[], None] = lambda: None
) -> Tensor:
    values: list[Tensor | None] = [None] * len(items)
    for group in pack_items(items, token_budget):
        between()
        members = [items[i] for i in group]
        if members[0].tokens > token_budget:
            parts = [
                draw_logps(denoiser, part)
                for side in members[0].sides
                for part in pack_sequence_runs(side, token_budget)
            ]
            scored = torch.cat(parts).view(1, len(members[0].sides), -1)
        else:
            scored = _draw_values(denoiser, members)
        for position, i in enumerate(group):
            values[i] = scored[position]
    return torch.stack(values)


def _draw_values(denoiser: Denoiser, items: Sequence[Item]) -> Tensor:
    """Per-draw values of items in one forward. # float64 [items, sides, draws]"""
    sequences = [sequence for item in items for sequence in item.sequences]
    return draw_logps(denoiser, sequences).view(len(items), len(items[0].sides), -1)


def _backward_whole_items(
    denoiser: Denoiser, items: Sequence[Item], objective: Objective, scale: float
) -> tuple[Tensor, Tensor]:
    values = _draw_values(denoiser, items)
    losses = objective.losses(items, values)
    if losses.requires_grad:  # draws that all mask nothing have no gradient
        (scale * losses.sum()).backward()
    return values.detach(), losses.detach()


def _coefficients(objective: Objective, items: Sequence[Item], values: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """dL/d(every draw) and the losses. # float64 [items, sides, draws], [items]"""
    leaf = values.detach().requires_grad_()
    losses = objective.losses(items, leaf)
    (coefficients,) = torch.autograd.grad(scale * losses.sum(), leaf)
    return coefficients, losses.detach()


def _stream_large_item(
    denoiser: Denoiser, parameters: Sequence[Tensor], item: Item, objective: Objective, scale: float, token_budget: int
) -> tuple[Tensor, Tensor]:
    """One item in several micro-steps: one buffer per group of draws with a common coefficient."""
    sides, draws = len(item.sides), len(item.sides[0])
    labels, signs = objective.coefficient_groups(sides, draws)
    values = torch.zeros(sides, draws, dtype=torch.float64, device=denoiser.device)
    step_gradients = [parameter.grad for parameter in parameters]
    buffers: dict[int, list[Tensor | None]] = {}
    for label in np.unique(labels):
        for parameter in parameters:
            parameter.grad = None
        for side in range(sides):
            chosen = np.flatnonzero(labels[side] == label)
            start = 0
            for run in pack_sequence_runs([item.sides[side][k] for k in chosen], token_budget):
                indices = torch.as_tensor(chosen[start : start + len(run)], device=denoiser.device)
                start += len(run)
                scored = draw_logps(denoiser, run)
                values[side, indices] = scored.detach()
                sign = torch.as_tensor(signs[side], dtype=torch.float64, device=denoiser.device)[indices]
                if scored.requires_grad:
                    (sign * scored).sum().backward()
        buffers[int(label)] = [parameter.grad for parameter in parameters]
    coefficients, losses = _coefficients(objective, [item], values[None], scale)
    for parameter, gradient in zip(parameters, step_gradients, strict=True):
        parameter.grad = gradient
    for label, buffer in buffers.items():
        side, draw = np.argwhere(labels == label)[0]
        factor = coefficients[0, side, draw] * float(signs[side, draw])
        for parameter, gradient in zip(parameters, buffer, strict=True):
            if gradient is not None:
                gradient.mul_(factor.to(gradient.dtype))
                parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
    return values[None], losses


def _two_pass(
    denoiser: Denoiser, items: Sequence[Item], objective: Objective, scale: float, token_budget: int
) -> StepValues:
    with lockstep(denoiser):
        values = _score(denoiser, items, token_budget)
    coefficients, losses = _coefficients(objective, items, values, scale)
    sequences = [sequence for item in items for sequence in item.sequences]
    flat = coefficients.flatten()
    sizes = [_sorted_by(item, sequence) for item in items for sequence in item.sequences]
    by_length = sorted(range(len(sequences)), key=lambda i: (sizes[i], i))
    start = 0
    with lockstep(denoiser, with_gradients=True):
        for run in pack_sequence_runs([sequences[i] for i in by_length], token_budget):
            indices = torch.as_tensor(by_length[start : start + len(run)], device=flat.device)
            start += len(run)
            scored = draw_logps(denoiser, run)
            if scored.requires_grad:
                (flat[indices] * scored).sum().backward()
    return StepValues(values, losses)


def _sorted_by(item: Item, sequence: MaskedSequence) -> int:
    """Equal lengths run side by side; sequences of a block model beside those with which they share a context."""
    return item.full_tokens if sequence.block_length else sequence.tokens


def take_part(denoiser: Denoiser, mode: str) -> None:
    """What a rank without items does in a step of several: nothing, but in step with the others."""
    if mode == "two_pass":
        with lockstep(denoiser):
            pass
    with lockstep(denoiser, with_gradients=True):
        pass


def lockstep(denoiser: Denoiser, with_gradients: bool = False) -> AbstractContextManager[None]:
    """Around a rank's forwards (and their backwards): where weights are sharded, every rank then does equally many.

    Only a denoiser whose weights are sharded has a `lockstep` (laddpo/models/sharding.py).
    """
    own = getattr(denoiser, "lockstep", None)
    return own(with_gradients) if own else nullcontext()
