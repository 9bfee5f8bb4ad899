"""Answers from a mask predictor: block by block, the most confident positions first (LLaDA, 2502.09992, algorithm 5).

In: prompts as token ids and `SamplerSettings`. Out: one array of `gen_length` ids per prompt. Prompts of any lengths
are packed end to end: there is no padding, and an answer does not depend on its batch, beyond rounding.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from laddpo.core.budget import TokenBudget, answer_budget
from laddpo.errors import UserError
from laddpo.evaluation.orders import REMASKING, draw
from laddpo.evaluation.passes import passes_for
from laddpo.settings.decoding_checks import decoding_problems, sampler_problems


@dataclass(frozen=True)
class SamplerSettings:
    """How answers are decoded. The first seven are the public sampler's, to the token at temperature 0.

    `steps` over all blocks: fewer commits more tokens at once. `temperature` 0 takes the most likely token; above 0 the
    draws of an item come from `seed` and its key alone. `cfg_scale` above 0 guides away from the answer without prompt.
    `suppress_eos`: "no" (or false); "confidence" (or true) commits stop tokens after everything else; "logits" never
    emits the end of text, while an end of turn stays possible, as with the public sampler's switches. Both hold at any
    temperature. `confidence_threshold` ignores `steps` and commits every token whose probability exceeds it, at least
    one a step: faster, not the same tokens; 1 commits one token a step. `stop_early` ends an answer whose tokens up to
    a stop token are all there: the same answer up to it, the rest is filled with the stop token. `block_cache` "prefix"
    or "dual" keeps keys and values within a block (laddpo/models/block_cache.py): faster, and the same tokens only
    where every block takes one step.
    `remasking` decides what a step commits: the most probable tokens ("low_confidence": above temperature 0 an unlikely
    draw is drawn again, so answers vary little), the positions that the model is surest of, whatever token was drawn
    there ("certainty"), or "random" ones. "maskgit_plus", "entropy" and "topk_margin" are Dream's: they rank by the
    probability of the token, the entropy and the margin between the two best, draw among the 50 most probable tokens,
    and commit the share of the open tokens that Dream's times from 1 to 0.001 say, the last step all. "sequential"
    commits the leftmost open tokens.
    """

    gen_length: int = 32
    steps: int = 32
    block_length: int = 32
    temperature: float = 0.0
    cfg_scale: float = 0.0
    remasking: str = "low_confidence"
    suppress_eos: bool | str = "no"
    confidence_threshold: float | None = None
    stop_early: bool = True
    block_cache: str = "none"
    batch_size: int = 64
    seed: int = 0
    is_on_grid: ClassVar[bool] = False

    def __post_init__(self):
        if problems := sampler_problems(self):
            raise UserError(*problems)

    @property
    def suppression(self) -> str:
        """The row of SUPPRESSION that `suppress_eos` means."""
        return {False: "no", True: "confidence"}.get(self.suppress_eos, self.suppress_eos)

    @property
    def text(self) -> str:
        """In words, for a table: how much is committed at once, and what differs from plain decoding."""
        threshold = self.confidence_threshold
        pace = f"{self.steps} steps" if threshold is None else f"all tokens above probability {threshold:g} at once"
        if threshold is not None and self.is_on_grid:
            pace += f", at least as many as {self.steps} steps take"
        parts = [f"{self.gen_length} tokens", pace, f"temperature {self.temperature:g}"]
        if self.block_length < self.gen_length:
            parts.insert(1, f"blocks of {self.block_length}")
        others = {name: getattr(self, name) for name in ("remasking", "cfg_scale", "block_cache")}
        others["suppress_eos"] = self.suppression
        plain = {field.name: field.default for field in dataclasses.fields(SamplerSettings)}
        parts += [f"{name}={value}" for name, value in others.items() if value != plain[name]]
        return ", ".join(parts)

    def commits_per_step(self) -> list[int]:
        """How many tokens each step of one block commits, with a threshold at least. Steps without any are left out."""
        if self.confidence_threshold is not None and not self.is_on_grid:
            return [1] * self.block_length
        steps = -(-self.steps * self.block_length // self.gen_length)
        return REMASKING[self.remasking].commits(self.block_length, steps)


class GridSettings(SamplerSettings):
    """Of a block model, whose own blocks `block_length` repeats. They lie on a grid that begins at the first token of
    the prompt, so a block may hold the end of the prompt, and the last one is cut off after `gen_length` tokens: these
    need not be whole blocks. `steps` for `gen_length` tokens means steps * block_length / gen_length a block; with a
    threshold a step commits at least as many tokens as without. Keys and values of finished blocks are kept exactly.
    """

    is_on_grid = True


def settings_for(model_block: int | None, **values: Any) -> SamplerSettings:
    """The settings for a model with blocks of `model_block` positions, or for a bidirectional one. Raises `UserError`
    where they name other blocks."""
    if model_block is None:
        return SamplerSettings(**values)
    settings = GridSettings(**values)
    if settings.block_length != model_block:
        raise UserError(*decoding_problems(settings, "evaluation", model_block))
    return settings


@torch.no_grad()
def generate(
    model,
    prompts: Sequence[np.ndarray],
    settings: SamplerSettings,
    mask_token_id: int,
    stop_token_ids: Sequence[int] = (),
    keys: Sequence[str] | None = None,
    autocast: torch.dtype | None = None,
    eos_token_id: int | None = None,
    budget: TokenBudget | None = None,
) -> list[np.ndarray]:
    """One answer per prompt. # int64 [gen_length] each, stop tokens included

    `keys` name the items for random draws (their place in the list by default): the same key, seed and prompt give the
    same draws in any batch. `eos_token_id` ends a text (the model's own by default). `model` takes `lengths` and `rows`
    (laddpo/models/llada.py). A batch that does not fit the memory is answered in parts; `budget` keeps for later calls
    how many tokens of prompts and answers do. Raises `UserError` before the first answer when a prompt leaves no room
    for one, and `RunFault` when the memory does not hold one prompt alone.
    """
    stops = sorted(set(stop_token_ids), key=list(stop_token_ids).index)
    eos = [eos_token_id if eos_token_id is not None else model.config.eos_token_id]
    suppression = SUPPRESSION[settings.suppression]
    if (suppression.committed_last and not stops) or (suppression.eos_is_never_emitted and eos == [None]):
        raise UserError(
            f"evaluation.suppress_eos is {settings.suppress_eos!r} but the model has no stop token; expected "
            "eos_token_id in config.json or the tokenizer. Name it there, or set suppress_eos=false."
        )
    forbidden = eos if suppression.eos_is_never_emitted else []
    settings = settings_for(model.block_length, **dataclasses.asdict(settings))
    keys = [str(i) for i in range(len(prompts))] if keys is None else list(keys)
    require_room([len(p) for p in prompts], settings.gen_length, model.config.max_sequence_length, keys)
    device = next(model.parameters()).device
    lengths = [len(prompt) + settings.gen_length for prompt in prompts]
    budget = budget or answer_budget()

    def answer(items: Sequence[int]) -> list[np.ndarray]:
        tensors = [torch.as_tensor(np.array(prompts[i]), dtype=torch.long, device=device) for i in items]
        generators = [_generator(settings.seed, keys[i], device) for i in items]
        with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
            batch = _Batch(model, tensors, generators, settings, mask_token_id, stops, forbidden)
            while batch.active:
                batch.step()
        return list(batch.answers.cpu().numpy())

    answers: list[np.ndarray] = []
    while len(answers) < len(prompts):
        done = len(answers)
        batch = range(done, min(done - done % settings.batch_size + settings.batch_size, len(prompts)))
        answers += budget.run(
            lambda tokens, batch=batch: answer(batch[: _fitting(lengths[batch.start : batch.stop], tokens)]),
            longest=lengths[done],
            total=sum(lengths[batch.start : batch.stop]),
        )
    return answers


def _fitting(lengths: Sequence[int], tokens: int) -> int:
    """How many of the first items have at most so many tokens together; at least one."""
    return max(1, int(np.searchsorted(np.cumsum(lengths), tokens, side="right")))


def require_room(lengths: Sequence[int], gen_length: int, positions: int, names: Sequence[str]) -> None:
    """`UserError` unless every prompt and its answer fit the model's positions. Callers ask before the first answer."""
    long = [(length, name) for length, name in zip(lengths, names, strict=True) if length + gen_length > positions]
    if long:
        length, name = max(long)
        raise UserError(
            f"{len(long)} of {len(lengths)} prompts are too long: {name[:100]} has {length:,} tokens, gen_length adds "
            f"{gen_length:,}, and the model knows {positions:,} positions (max_sequence_length). Shorten or remove "
            "these prompts, show fewer examples (evaluation.shots), or lower gen_length."
        )


def until_stop(answer: np.ndarray, stop_token_ids: Sequence[int]) -> np.ndarray:
    """The answer up to, and without, its first stop token."""
    at = np.flatnonzero(np.isin(answer, list(stop_token_ids)))
    return answer[: at[0]] if len(at) else answer


class _Batch:
    """Answers in the making. Every item is at its own block and step; finished ones leave the forward pass.

    The canvas of an item is the blocks that hold its answer. In a block model its first `head` columns are the end of
    the prompt, and its last ones may lie behind the answer.
    """

    def __init__(
        self, model, prompts, generators, settings: SamplerSettings, mask: int, stops: list[int], forbidden: list[int]
    ):
        self.generators, self.settings, self.mask = generators, settings, mask
        device, size = prompts[0].device, settings.block_length
        self.stops, self.forbidden, self.never = (
            torch.tensor(ids, dtype=torch.long, device=device) for ids in (stops, forbidden, never_emitted(model, mask))
        )
        heads = [len(p) % size if settings.is_on_grid else 0 for p in prompts]
        self.last = [-(-(head + settings.gen_length) // size) - 1 for head in heads]  # the last block of each item
        width = (max(self.last) + 1) * size
        self.canvas = torch.full((len(prompts), width), mask, device=device)  # [items, W]
        for row, prompt, head in zip(self.canvas, prompts, heads, strict=True):
            row[:head] = prompt[len(prompt) - head :]
        self.heads = torch.tensor(heads, device=device)[:, None]
        self.block = [0] * len(prompts)
        self.taken = [0] * len(prompts)  # steps taken in the current block
        self.commits = settings.commits_per_step()
        self.passes = passes_for(model, prompts, width, settings, mask)
        self._enter(list(range(len(prompts))))

    @property
    def answers(self) -> Tensor:
        """What the items hold now. # [items, G]"""
        return self.canvas.gather(1, self._answer_columns(list(range(len(self.canvas)))))

    def _answer_columns(self, items: list[int]) -> Tensor:
        return self.heads[items] + torch.arange(self.settings.gen_length, device=self.canvas.device)

    def _enter(self, active: list[int]) -> None:
        self.active = active
        if active:
            self.passes.enter(active)

    def step(self) -> None:
        """One forward pass; every active item commits some tokens of its block."""
        canvas, size = self.canvas[self.active], self.settings.block_length  # [A, W]
        starts = torch.tensor([self.block[i] * size for i in self.active], device=canvas.device)
        columns = starts[:, None] + torch.arange(size, device=canvas.device)  # [A, s]
        block = canvas.gather(1, columns)
        is_open = (block == self.mask) & (columns >= self.heads[self.active])
        is_first = [self.taken[i] == 0 for i in self.active]
        logits = self._guided(self.passes.logits(canvas, columns, is_first, is_open))
        tokens, confidence = self._candidates(logits, is_open.sum(1).tolist())
        ranks = torch.full(block.shape, -torch.inf, dtype=confidence.dtype, device=block.device)
        ranks[is_open] = confidence.clamp(min=torch.finfo(confidence.dtype).min)  # demoted, yet before the filled ones
        order = ranks.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        chosen = is_open & (order < self._counts(ranks)[:, None])
        proposed = block.clone()
        proposed[is_open] = tokens
        canvas.scatter_(1, columns, torch.where(chosen, proposed, block))
        self.canvas[self.active] = canvas
        self._advance((is_open == chosen).all(1).tolist())

    def _guided(self, logits: Tensor) -> Tensor:
        """float32 or wider; of two passes, moved away from the one that does not see the prompt."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.settings.cfg_scale > 0:
            conditional, free = logits.chunk(2)
            logits = free + (self.settings.cfg_scale + 1) * (conditional - free)
        return logits

    def _candidates(self, logits: Tensor, rows_per_item: list[int]) -> tuple[Tensor, Tensor]:
        """A token for every open position, and how sure it is (a log-probability, or a random number). # [R], [R]

        Writes over `logits`: copies of [R, V] would be most of the memory.
        """
        suppression = SUPPRESSION[self.settings.suppression]
        logits.index_fill_(1, self.forbidden, -torch.inf)
        order = REMASKING[self.settings.remasking]
        if order.top_k is not None:
            least = logits.topk(min(order.top_k, logits.shape[1])).values[:, -1:]
            logits.masked_fill_(logits < least, -torch.inf)
        kept = logits[:, self.never]  # these ids cannot be chosen, yet count in the probabilities of the others
        logits.index_fill_(1, self.never, -torch.inf)
        generators = [self.generators[i] for i in self.active]
        tokens = draw(logits, self.settings.temperature, generators, rows_per_item)
        logits[:, self.never] = kept
        if suppression.committed_last:
            logits.index_fill_(1, self.stops, -torch.inf)
        confidence = order.confidence(logits, tokens, generators, rows_per_item)
        if suppression.committed_last:
            confidence = confidence.masked_fill(torch.isin(tokens, self.stops), -torch.inf)
        return tokens, confidence

    def _counts(self, ranks: Tensor) -> Tensor:
        """How many tokens every active item commits now. # [A]"""
        counts = torch.tensor([self.commits[self.taken[i]] for i in self.active], device=ranks.device)
        if self.settings.confidence_threshold is not None:
            limit = float(np.log(self.settings.confidence_threshold))
            counts = (ranks > limit).sum(1).maximum(counts)
        return counts

    def _advance(self, is_full: list[bool]) -> None:
        """Move items whose block is full to the next, and let finished ones go."""
        finished = self._finished() if self.settings.stop_early and len(self.stops) else [False] * len(self.active)
        remaining = []
        for item, full, stopped in zip(self.active, is_full, finished, strict=True):
            self.taken[item] += 1
            if full:
                self.block[item] += 1
                self.taken[item] = 0
            if not stopped and self.block[item] <= self.last[item]:
                remaining.append(item)
        if len(remaining) < len(self.active):
            self._enter(remaining)

    def _finished(self) -> list[bool]:
        """Which active items have a stop token with nothing open before it; what follows it is filled with it."""
        canvas, columns = self.canvas[self.active], self._answer_columns(self.active)
        answers = canvas.gather(1, columns)  # [A, G]
        is_stop, is_open = torch.isin(answers, self.stops), answers == self.mask
        before = (is_stop | is_open).int().argmax(1, keepdim=True)  # the first position that is either
        finished = is_stop.gather(1, before)
        after = torch.arange(answers.shape[1], device=answers.device) > before
        stop = answers.gather(1, before)
        self.canvas[self.active] = canvas.scatter(1, columns, torch.where(finished & after, stop, answers))
        return finished[:, 0].tolist()


def never_emitted(model, mask: int) -> list[int]:
    """Ids that are no answer: the mask token, and embedding rows beyond the vocabulary."""
    config = model.config
    return sorted({mask, *range(config.vocab_size, config.embedding_size)})


def _generator(seed: int, key: str, device: torch.device) -> torch.Generator:
    digest = hashlib.sha256(f"sampling/{seed}/{key}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)


@dataclass(frozen=True)
class Suppression:
    """What happens to stop tokens: that at the end of a text is never emitted; or all are emitted, but committed after
    everything else in the block."""

    eos_is_never_emitted: bool = False
    committed_last: bool = False


SUPPRESSION = {
    "no": Suppression(),
    "confidence": Suppression(committed_last=True),
    "logits": Suppression(eos_is_never_emitted=True),
}
