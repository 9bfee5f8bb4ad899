"""Everything that is compared, behind one method: `step(pairs, draws)` adds the gradient of the pairs' mean loss.

Ours in each backward mode, with the reference read from a store (later epochs) or computed in the step (first epoch);
the rivals as laddpo/benchmarking/rivals.py writes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from laddpo.benchmarking.rivals import PublicLaddpo, Rival, TrlLike, checkpointed
from laddpo.core.budget import TokenBudget
from laddpo.core.draws import ElboEstimator
from laddpo.core.gradient import Item, accumulate_gradient, score_items
from laddpo.core.losses import LossOptions
from laddpo.core.objectives import DpoObjective, SftObjective
from laddpo.core.tasks import example_item, pair_item
from laddpo.models.adapters import adapter_disabled, trainable_parameters
from laddpo.models.denoiser import TransformerDenoiser
from laddpo.preference.encoding.encode import EncodedExample, EncodedPair

BETA = 0.1
OUT_OF_MEMORY = "out of memory"
MEASURED = "What is measured is done once. Lower benchmark.token_budget or benchmark.sampler_batch."


@dataclass
class Ours:
    """`mode` of core/gradient.py at `token_budget` tokens. With `with_reference` the step computes the reference too,
    otherwise it is taken as stored: those values are computed once per pair and number of draws, untimed. With
    `checkpointing` its blocks are recomputed, whatever the model does at other times."""

    model: torch.nn.Module
    denoiser: TransformerDenoiser
    mode: str
    token_budget: int | TokenBudget
    with_reference: bool = False
    checkpointing: bool = False
    label: str = ""
    extra_bytes: int = 0
    stored: dict = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.label or self.mode + (" with reference pass" if self.with_reference else "")

    def prepare(self, pairs: Sequence[EncodedPair], draws: int) -> None:
        """Fill the store."""
        if not self.with_reference:
            self.stored[self.key(pairs, draws)] = self.reference(self.items(pairs, draws))

    def step(self, pairs: Sequence[EncodedPair], draws: int) -> None:
        items = self.items(pairs, draws)
        values = self.reference(items) if self.with_reference else self.stored[self.key(pairs, draws)]
        items = [replace(item, reference=value) for item, value in zip(items, values, strict=True)]
        parameters = list(trainable_parameters(self.model).values())
        objective, scale = DpoObjective("sigmoid", LossOptions(BETA)), 1 / len(items)
        with checkpointed(self.model, self.checkpointing):
            accumulate_gradient(self.denoiser, parameters, items, objective, scale, self.token_budget, self.mode)

    def items(self, pairs: Sequence[EncodedPair], draws: int) -> list[Item]:
        """The pairs under `draws` draws each."""
        estimator = ElboEstimator(diffusion_samples=draws)
        return [pair_item(pair, estimator, range(draws)) for pair in pairs]

    def reference(self, items: Sequence[Item]):
        """The reference's value of every draw. # float64 [pairs, 2, draws]"""
        with adapter_disabled(self.model):
            return score_items(self.denoiser, items, self.token_budget).cpu().numpy()

    @staticmethod
    def key(pairs: Sequence[EncodedPair], draws: int) -> tuple:
        """Under which `stored` holds these pairs' values."""
        return tuple(pair.id for pair in pairs), draws


@dataclass
class OurSft:
    """Fine-tuning on the chosen responses, packed, as `python -m laddpo.sft` does it."""

    model: torch.nn.Module
    denoiser: TransformerDenoiser
    token_budget: int
    name: str = "ours, packed"
    extra_bytes: int = 0

    def prepare(self, pairs: Sequence[EncodedPair], draws: int) -> None:
        """There is no reference."""

    def step(self, pairs: Sequence[EncodedPair], draws: int) -> None:
        rows = [EncodedExample(pair.id, pair.prompt_ids, pair.chosen_ids) for pair in pairs]
        items = [example_item(row, ElboEstimator(diffusion_samples=draws), range(draws)) for row in rows]
        parameters = list(trainable_parameters(self.model).values())
        accumulate_gradient(self.denoiser, parameters, items, SftObjective(), 1 / len(items), self.token_budget)


Contender = Ours | OurSft | Rival


def fixed_budget(tokens: int) -> TokenBudget:
    """A budget that is not made smaller when memory runs out: what ran is what was asked for."""
    return TokenBudget(tokens, explain=lambda longest: OUT_OF_MEMORY, why_once=MEASURED)


def build_rivals(model, mask_token_id: int, pad_token_id: int, max_length: int) -> list[Rival]:
    """The public project, and TRL's way from its old head to its best arrangement, which is also checkpointed."""
    trl, best = (model, mask_token_id, pad_token_id, BETA), {"stored": True, "unpadded": True}
    return [
        PublicLaddpo(model, mask_token_id, pad_token_id, max_length, BETA),
        TrlLike(*trl, "full"),
        TrlLike(*trl, "chunked"),
        TrlLike(*trl, "chunked", checkpointing=True),
        TrlLike(*trl, "chunked", **best),
        TrlLike(*trl, "chunked", **best, checkpointing=True),
    ]


def build_contenders(
    model, mask_token_id: int, pad_token_id: int, max_length: int, token_budget: int
) -> dict[str, Contender]:
    """All of them around one model that carries an adapter, by name."""
    denoiser, budget = TransformerDenoiser(model, mask_token_id), fixed_budget(token_budget)
    ours = [
        Ours(model, denoiser, "stream", budget),
        Ours(model, denoiser, "stream", budget, with_reference=True),
        Ours(model, denoiser, "two_pass", budget),
        Ours(model, denoiser, "joint", budget),
    ]
    rivals = build_rivals(model, mask_token_id, pad_token_id, max_length)
    return {contender.name: contender for contender in [*ours, *rivals]}
