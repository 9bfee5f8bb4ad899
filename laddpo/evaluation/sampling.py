"""Answers from a mask predictor: block by block, the most confident positions first (LLaDA, 2502.09992, algorithm 5).

In: prompts as token ids and `SamplerSettings`. Out: one array of `gen_length` ids per prompt. Prompts of any lengths
are packed end to end: there is no padding, and an answer does not depend on its batch, beyond rounding.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from laddpo.errors import UserError
from laddpo.models.block_cache import BlockCache
from laddpo.settings.decoding_checks import sampler_problems


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
    and commit the share of the open tokens that Dream's times from 1 to 0.001 say, the last step all.
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

    def __post_init__(self):
        if problems := sampler_problems(self):
            raise UserError(*problems)

    @property
    def suppression(self) -> str:
        """The row of SUPPRESSION that `suppress_eos` means."""
        return {False: "no", True: "confidence"}.get(self.suppress_eos, self.suppress_eos)

    def commits_per_step(self) -> list[int]:
        """How many tokens each step of one block commits; steps without any are left out.

        As equal as possible, the earlier steps one more; or by Dream's times.
        """
        steps = self.steps // (self.gen_length // self.block_length)
        if REMASKING[self.remasking].is_timed:
            return timed_commits(self.block_length, steps)
        base, more = divmod(self.block_length, steps)
        return [count for step in range(steps) if (count := base + (step < more))]


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
) -> list[np.ndarray]:
    """One answer per prompt. # int64 [gen_length] each, stop tokens included

    `keys` name the items for random draws (their place in the list by default): the same key, seed and prompt give the
    same draws in any batch. `eos_token_id` ends a text (the model's own by default). `model` takes `lengths` and `rows`
    (laddpo/models/llada.py). Raises `UserError` before the first answer when a prompt leaves no room for one.
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
    keys = [str(i) for i in range(len(prompts))] if keys is None else list(keys)
    require_room([len(p) for p in prompts], settings.gen_length, model.config.max_sequence_length, keys)
    device = next(model.parameters()).device
    answers: list[np.ndarray] = []
    for start in range(0, len(prompts), settings.batch_size):
        part = slice(start, start + settings.batch_size)
        tensors = [torch.as_tensor(np.array(p), dtype=torch.long, device=device) for p in prompts[part]]
        generators = [_generator(settings.seed, key, device) for key in keys[part]]
        with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
            batch = _Batch(model, tensors, generators, settings, mask_token_id, stops, forbidden)
            while batch.active:
                batch.step()
        answers += list(batch.answers.cpu().numpy())
    return answers


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
    """Answers in the making. Every item is at its own block and step; finished ones leave the forward pass."""

    def __init__(
        self, model, prompts, generators, settings: SamplerSettings, mask: int, stops: list[int], forbidden: list[int]
    ):
        self.model, self.prompts, self.generators, self.settings = model, prompts, generators, settings
        self.mask = mask
        self.stops, self.forbidden, self.never = (
            torch.tensor(ids, dtype=torch.long, device=prompts[0].device)
            for ids in (stops, forbidden, never_emitted(model, mask))
        )
        self.answers = torch.full((len(prompts), settings.gen_length), mask, device=prompts[0].device)  # [items, G]
        self.block = [0] * len(prompts)
        self.taken = [0] * len(prompts)  # steps taken in the current block
        self.commits = settings.commits_per_step() if settings.confidence_threshold is None else []
        self.caches = []
        if settings.block_cache != "none":
            free = [[torch.full_like(p, mask) for p in prompts]] if settings.cfg_scale > 0 else []
            shape = (settings.gen_length, settings.block_length, settings.block_cache)
            self.caches = [BlockCache(model, group, *shape) for group in ([*prompts], *free)]
        self._enter(list(range(len(prompts))))

    def _enter(self, active: list[int]) -> None:
        """Lay out the packed input of the items that are still being written."""
        self.active = active
        if not active:
            return
        device, length = self.answers.device, self.settings.gen_length
        prompts = [self.prompts[i] for i in active]
        passes = [prompts]
        if self.settings.cfg_scale > 0:  # a second copy that does not see the prompt
            passes.append([torch.full_like(p, self.mask) for p in prompts])
        self.passes = passes
        self.lengths = [len(p) + length for group in passes for p in group]
        self.positions = torch.cat([torch.arange(n) for n in self.lengths])[None].to(device)
        ends = torch.tensor(self.lengths[: len(active)]).cumsum(0)
        self.first = (ends - length)[:, None].to(device)  # where each answer begins in the packed row [A, 1]
        self.tokens_per_pass = int(ends[-1])

    def step(self) -> None:
        """One forward pass; every active item commits some tokens of its block."""
        settings = self.settings
        answers = self.answers[self.active]  # [A, G]
        starts = torch.tensor([self.block[i] * settings.block_length for i in self.active], device=answers.device)
        columns = starts[:, None] + torch.arange(settings.block_length, device=answers.device)  # [A, block]
        block = answers.gather(1, columns)
        is_open = block == self.mask
        if self.caches:
            logits = self._cached_logits(answers, starts, is_open)
        else:
            logits = self._logits(answers, (self.first + columns)[is_open])
        tokens, confidence = self._candidates(logits, is_open.sum(1).tolist())
        ranks = torch.full(block.shape, -torch.inf, dtype=confidence.dtype, device=block.device)
        ranks[is_open] = confidence.clamp(min=torch.finfo(confidence.dtype).min)  # demoted, yet before the filled ones
        order = ranks.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        chosen = is_open & (order < self._counts(ranks)[:, None])
        proposed = block.clone()
        proposed[is_open] = tokens
        block = torch.where(chosen, proposed, block)
        answers.scatter_(1, columns, block)
        self.answers[self.active] = answers
        self._advance(answers, block)

    def _logits(self, answers: Tensor, rows: Tensor) -> Tensor:
        """Logits at the open positions of the current blocks, guided when asked for. # [R, V], float32 or wider"""
        ids = torch.cat([part for group in self.passes for pair in zip(group, answers, strict=True) for part in pair])
        if self.settings.cfg_scale > 0:
            rows = torch.cat([rows, rows + self.tokens_per_pass])
        packed = {"input_ids": ids[None], "position_ids": self.positions, "lengths": self.lengths}
        return self._guided(self.model(**packed, rows=rows).logits)

    def _cached_logits(self, answers: Tensor, starts: Tensor, is_open: Tensor) -> Tensor:
        """The same from kept keys and values, renewed by the first step of every block. # [R, V]"""
        items = torch.tensor(self.active, device=answers.device)
        is_first = torch.tensor([self.taken[i] == 0 for i in self.active], device=answers.device)
        hidden = [cache.hidden(items, answers, starts, is_first)[is_open] for cache in self.caches]
        return self._guided(self.caches[0].logits(torch.cat(hidden)))

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
        tokens = _draw(logits, self.settings.temperature, generators, rows_per_item)
        logits[:, self.never] = kept
        if suppression.committed_last:
            logits.index_fill_(1, self.stops, -torch.inf)
        confidence = order.confidence(logits, tokens, generators, rows_per_item)
        if suppression.committed_last:
            confidence = confidence.masked_fill(torch.isin(tokens, self.stops), -torch.inf)
        return tokens, confidence

    def _counts(self, ranks: Tensor) -> Tensor:
        """How many tokens every active item commits now. # [A]"""
        if self.settings.confidence_threshold is not None:
            limit = float(np.log(self.settings.confidence_threshold))
            return (ranks > limit).sum(1).clamp(min=1)
        return torch.tensor([self.commits[self.taken[i]] for i in self.active], device=ranks.device)

    def _advance(self, answers: Tensor, block: Tensor) -> None:
        """Move items whose block is full to the next, and let finished ones go."""
        settings = self.settings
        if settings.confidence_threshold is not None:
            is_full = (block != self.mask).all(1).tolist()
        else:
            is_full = [self.taken[i] + 1 == len(self.commits) for i in self.active]
        finished = self._finished(answers) if settings.stop_early and len(self.stops) else [False] * len(self.active)
        remaining = []
        for item, full, stopped in zip(self.active, is_full, finished, strict=True):
            self.taken[item] += 1
            if full:
                self.block[item] += 1
                self.taken[item] = 0
            if not stopped and self.block[item] * settings.block_length < settings.gen_length:
                remaining.append(item)
        if len(remaining) < len(self.active):
            self._enter(remaining)

    def _finished(self, answers: Tensor) -> list[bool]:
        """Which active items have a stop token with nothing open before it; what follows it is filled with it."""
        is_stop, is_open = torch.isin(answers, self.stops), answers == self.mask
        before = (is_stop | is_open).int().argmax(1, keepdim=True)  # the first position that is either
        finished = is_stop.gather(1, before)
        after = torch.arange(answers.shape[1], device=answers.device) > before
        stop = answers.gather(1, before)
        self.answers[self.active] = torch.where(finished & after, stop, answers)
        return finished[:, 0].tolist()


def _draw(scores: Tensor, temperature: float, generators, rows_per_item: list[int]) -> Tensor:
    """argmax of scores + temperature * Gumbel noise, in float64: float32 noise thins out the tails (2409.02908)."""
    if temperature == 0:
        return scores.argmax(-1)
    tokens = []
    for part, generator in zip(scores.split(rows_per_item), generators, strict=True):
        uniform = torch.rand(part.shape, generator=generator, dtype=torch.float64, device=part.device)
        tokens.append((part.double() - temperature * (-uniform.log()).log()).argmax(-1))
    return torch.cat(tokens)


def _low_confidence(logits: Tensor, tokens: Tensor, generators, rows_per_item: list[int]) -> Tensor:
    """log p(token), without noise."""
    return logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(-1)


def _certainty(logits: Tensor, tokens: Tensor, generators, rows_per_item: list[int]) -> Tensor:
    """log p of the most likely token, whatever was drawn."""
    return logits.amax(-1) - logits.logsumexp(-1)


def _negative_entropy(logits: Tensor, tokens: Tensor, generators, rows_per_item: list[int]) -> Tensor:
    probabilities = logits.softmax(-1)
    return (probabilities * (probabilities + 1e-10).log()).sum(-1)


def _margin(logits: Tensor, tokens: Tensor, generators, rows_per_item: list[int]) -> Tensor:
    """Between the probabilities of the two best tokens."""
    first, second = logits.softmax(-1).topk(2).values.unbind(-1)
    return first - second


def _random(logits: Tensor, tokens: Tensor, generators, rows_per_item: list[int]) -> Tensor:
    return torch.cat(
        [
            torch.rand(rows, generator=generator, device=logits.device)
            for rows, generator in zip(rows_per_item, generators, strict=True)
        ]
    )


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


@dataclass(frozen=True)
class Order:
    """Which open positions are committed first: those of the highest `confidence`. `top_k`: tokens that are drawn from
    and count in it, None for all. `is_timed`: how many a step commits follows Dream's times."""

    confidence: Callable[[Tensor, Tensor, list[torch.Generator], list[int]], Tensor]
    top_k: int | None = None
    is_timed: bool = False


def timed_commits(block_length: int, steps: int) -> list[int]:
    """Of the tokens that are open at time t, the share 1 - s / t by the next time s; all at the last step. Times go
    evenly from 1 to 0.001 (Dream's generation)."""
    times = np.linspace(1, 1e-3, steps + 1, dtype=np.float32)
    commits, left = [], block_length
    for step in range(steps):
        count = left if step == steps - 1 else int(left * (1 - times[step + 1] / times[step]))
        commits.append(count)
        left -= count
    return [count for count in commits if count]


DREAM = {"top_k": 50, "is_timed": True}  # what Dream's generation does where nothing is said
REMASKING = {
    "low_confidence": Order(_low_confidence),
    "certainty": Order(_certainty),
    "random": Order(_random),
    "maskgit_plus": Order(_low_confidence, **DREAM),
    "entropy": Order(_negative_entropy, **DREAM),
    "topk_margin": Order(_margin, **DREAM),
}
