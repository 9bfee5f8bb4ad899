"""What users would otherwise run, rewritten from its description to measure time and memory. Not for training.

- `PublicLaddpo`: the public LaDDPO project's training script: an independent copy of the model as reference, the graphs
  of all n draws of both responses alive until one backward pass, rows padded to max_length, logits of every position.
  Its statistics are its own too: prompt and padding are masked and scored, reference masks are drawn afresh.
- `TrlLike`: the way of TRL's DPOTrainer carried over to masked diffusion: the 2n rows of a pair in one padded batch,
  the reference by switching the adapter off, the head on every position (`full`, before TRL 1.14) or on the scored ones
  in tiles that the backward pass computes again (`chunked`, as in TRL 1.16). Options of its DPOConfig: `stored`
  (precompute_ref_log_probs), `unpadded` (padding_free) and `checkpointing` (gradient_checkpointing, on unless it is
  switched off). Stored and unpadded is its best arrangement.
- `PlainSft`: fine-tuning a row at a time, with the logits of every position.

All take one pair or row at a time, as small-memory settings do, and add to the gradients of the adapter.
"""

from __future__ import annotations

import contextlib
import copy
import zlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from laddpo.hardware.measuring import resident_bytes
from laddpo.models.adapters import adapter_disabled
from laddpo.models.blocks import checkpoint_blocks
from laddpo.preference.encoding.encode import EncodedPair

FLOOR = 1e-3  # p_mask = (1 - FLOOR) t + FLOOR
TILE_ROWS, TILE_COLUMNS = 4096, 8192  # of TRL's head: positions and vocabulary entries projected at a time


class Rival:
    """One pair after the other, as with a device batch of one and gradient accumulation."""

    name: str
    beta: float
    extra_bytes = 0  # beside the policy, all the time

    def prepare(self, pairs: Sequence[EncodedPair], draws: int) -> None:
        """Rivals store nothing."""

    def step(self, pairs: Sequence[EncodedPair], draws: int) -> float:
        """Add the gradient of the pairs' mean loss; the loss."""
        total = 0.0
        for pair in pairs:
            loss = -logsigmoid(self.beta * self.margin(pair, draws))
            (1 / len(pairs) * loss).backward()
            total += float(loss.detach()) / len(pairs)
        return total

    def margin(self, pair: EncodedPair, draws: int) -> Tensor:
        raise NotImplementedError


class PublicLaddpo(Rival):
    """One pair's step: 4n forward passes of one row of `max_length` tokens, 2n of them kept for one backward pass."""

    name = "public_laddpo"

    def __init__(self, model, mask_token_id: int, pad_token_id: int, max_length: int, beta: float):
        self.model, self.mask_token_id, self.pad_token_id = model, mask_token_id, pad_token_id
        self.max_length, self.beta = max_length, beta
        self.reference = copy.deepcopy(model).requires_grad_(False)
        for module in self.reference.modules():  # a copied 4-bit layer would hold the scales of its weight twice
            if getattr(module, "quant_state", None) is not None:
                module.quant_state = module.weight.quant_state
        self.extra_bytes = resident_bytes(self.reference)
        self.generator = torch.Generator().manual_seed(0)

    def margin(self, pair: EncodedPair, draws: int) -> Tensor:
        margin = 0.0
        for sign, response in ((1.0, pair.chosen_ids), (-1.0, pair.rejected_ids)):
            row = self._padded(pair.prompt_ids, response)
            policy = torch.stack([self._estimate(self.model, row) for _ in range(draws)]).mean()
            with torch.no_grad():
                reference = torch.stack([self._estimate(self.reference, row) for _ in range(draws)]).mean()
            margin = margin + sign * (policy - reference)
        return margin

    def _padded(self, *parts) -> Tensor:
        """Prompt and response, filled up with padding. # int64 [1, max_length]"""
        ids = torch.cat([torch.as_tensor(part, dtype=torch.int64) for part in parts])[: self.max_length]
        row = torch.full((1, self.max_length), self.pad_token_id, dtype=torch.int64)
        row[0, : len(ids)] = ids
        return row.to(_device(self.model))

    def _estimate(self, model, row: Tensor) -> Tensor:
        """Mean over all positions of log p / p_mask where a position is masked; prompt and padding take part."""
        p = (1 - FLOOR) * torch.rand((), generator=self.generator) + FLOOR
        masked = (torch.rand(row.shape, generator=self.generator) < p).to(row.device)
        logits = model(input_ids=row.masked_fill(masked, self.mask_token_id)).logits
        logps = logits.float().log_softmax(-1).gather(-1, row[..., None])[..., 0]
        return (logps * masked / p.to(row.device)).sum() / row.numel()


class TrlLike(Rival):
    """One pair's step: one batch of 2n padded rows for the policy, the same without the adapter for the reference."""

    def __init__(
        self,
        model,
        mask_token_id: int,
        pad_token_id: int,
        beta: float,
        head: str = "full",
        *,
        stored: bool = False,
        unpadded: bool = False,
        checkpointing: bool = False,
    ):
        self.model, self.mask_token_id, self.pad_token_id = model, mask_token_id, pad_token_id
        self.beta, self.head = beta, head
        self.unpadded, self.checkpointing = unpadded, checkpointing
        self.stored: dict[tuple, Tensor] | None = {} if stored else None
        options = {"stored reference": stored, "unpadded": unpadded, "checkpointing": checkpointing}
        self.name = ", ".join([f"trl_like ({head} logits)", *(name for name, is_on in options.items() if is_on)])

    def prepare(self, pairs: Sequence[EncodedPair], draws: int) -> None:
        """Fill the store, if there is one."""
        for pair in pairs:
            if self.stored is not None and (pair.id, draws) not in self.stored:
                self.stored[pair.id, draws] = self._reference(*self._batch(pair, draws))

    def step(self, pairs: Sequence[EncodedPair], draws: int) -> float:
        with checkpointed(self.model, self.checkpointing):
            return super().step(pairs, draws)

    def margin(self, pair: EncodedPair, draws: int) -> Tensor:
        batch = self._batch(pair, draws)
        policy = self._row_logps(*batch)
        reference = self._reference(*batch) if self.stored is None else self.stored[pair.id, draws]
        chosen, rejected = (policy - reference).chunk(2)
        return chosen.mean() - rejected.mean()

    def _reference(self, *batch: Tensor) -> Tensor:
        with torch.no_grad(), adapter_disabled(self.model):
            return self._row_logps(*batch)

    def _batch(self, pair: EncodedPair, draws: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Token ids, which of them are real, which are masked [2n, longest], and the weight of each row [2n]."""
        responses: Sequence = [pair.chosen_ids] * draws + [pair.rejected_ids] * draws
        longest = len(pair.prompt_ids) + max(len(response) for response in responses)
        rows = torch.full((2 * draws, longest), self.pad_token_id, dtype=torch.int64)
        present, scored = (torch.zeros_like(rows, dtype=torch.bool) for _ in range(2))
        weights = torch.empty(2 * draws)
        generator = torch.Generator().manual_seed(zlib.crc32(pair.id.encode()))  # a stored value belongs to its masks
        start = len(pair.prompt_ids)
        for i, response in enumerate(responses):
            length = len(response)
            rows[i, : start + length] = torch.cat(
                [torch.as_tensor(ids, dtype=torch.int64) for ids in (pair.prompt_ids, response)]
            )
            present[i, : start + length] = True
            count = int(torch.randint(1, length + 1, (), generator=generator))
            scored[i, start + torch.randperm(length, generator=generator)[:count]] = True
            weights[i] = length / count
        device = _device(self.model)
        return rows.to(device), present.to(device), scored.to(device), weights.to(device)

    def _row_logps(self, rows: Tensor, present: Tensor, scored: Tensor, weights: Tensor) -> Tensor:
        """The weighted log-likelihood of every row's masked tokens. # [2n]"""
        noisy = rows.masked_fill(scored, self.mask_token_id)
        if self.head == "full":
            logits = self.model(input_ids=noisy, attention_mask=present.long()).logits
            chosen = logits.gather(-1, rows[..., None])[..., 0]
            logps = chosen - torch.stack([row.logsumexp(-1) for row in logits])  # a row at a time, as TRL does
            return (logps * scored).sum(-1) * weights
        head = self.model.get_output_embeddings()
        if self.unpadded:  # the rows end to end, as a padding-free collator lays them
            lengths = present.sum(-1).tolist()
            positions = torch.cat([torch.arange(length, device=rows.device) for length in lengths])
            hidden = self.model.packed_hidden_states(noisy[present], positions, lengths)[scored[present]]
        else:
            hidden = self._hidden_states(noisy, present)[scored]
        logps = _TiledLogps.apply(hidden, head.weight, rows[scored])
        return torch.zeros(len(rows), device=rows.device).index_add(0, scored.nonzero()[:, 0], logps) * weights

    def _hidden_states(self, rows: Tensor, present: Tensor) -> Tensor:
        """The input of the head at every position; the head itself sees one. # [2n, longest, width]"""
        seen = []
        last_norm = self.model.last_norm
        handle = last_norm.register_forward_hook(lambda module, inputs, output: seen.append(output))
        try:
            one = torch.zeros(1, dtype=torch.int64, device=rows.device)
            self.model(input_ids=rows, attention_mask=present.long(), rows=one)
        finally:
            handle.remove()
        return seen.pop()


class PlainSft(Rival):
    """A row at a time: one masked forward with the logits of all positions, cross-entropy of the masked ones."""

    name = "plain, a row at a time"

    def __init__(self, model, mask_token_id: int):
        self.model, self.mask_token_id = model, mask_token_id

    def step(self, pairs: Sequence[EncodedPair], draws: int) -> float:
        """Fine-tuning on the chosen responses."""
        total, device = 0.0, _device(self.model)
        for pair in pairs:
            for draw in range(draws):
                generator = torch.Generator().manual_seed(zlib.crc32(f"{pair.id}/{draw}".encode()))
                length, start = len(pair.chosen_ids), len(pair.prompt_ids)
                count = int(torch.randint(1, length + 1, (), generator=generator))
                masked = start + torch.randperm(length, generator=generator)[:count].to(device)
                row = torch.cat([torch.as_tensor(ids, dtype=torch.int64) for ids in (pair.prompt_ids, pair.chosen_ids)])
                row = row.to(device)
                noisy = row.clone().index_fill_(0, masked, self.mask_token_id)
                logits = self.model(input_ids=noisy[None]).logits[0]
                loss = torch.nn.functional.cross_entropy(logits[masked].float(), row[masked], reduction="sum")
                (loss / count / draws / len(pairs)).backward()
                total += float(loss.detach()) / count / draws / len(pairs)
        return total


@contextlib.contextmanager
def checkpointed(model, is_on: bool) -> Iterator[None]:
    """Inside the block the model's blocks are recomputed in the backward pass, if wanted."""
    if is_on:
        checkpoint_blocks(model)
    try:
        yield
    finally:
        if is_on:
            checkpoint_blocks(model, False)


class _TiledLogps(torch.autograd.Function):
    """log p of the targets by a running logsumexp over tiles of the vocabulary; the backward pass makes them again."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        top = torch.full((len(hidden),), -torch.inf, device=hidden.device)
        total, chosen = torch.zeros_like(top), torch.zeros_like(top)
        for columns in _tiles(len(weight), TILE_COLUMNS):
            for rows in _tiles(len(hidden), TILE_ROWS):
                logits = (hidden[rows] @ weight[columns].t()).float()
                new = torch.maximum(top[rows], logits.amax(-1))
                total[rows] = total[rows] * (top[rows] - new).exp() + (logits - new[:, None]).exp().sum(-1)
                top[rows] = new
                local = targets[rows] - columns.start
                inside = (local >= 0) & (local < logits.shape[1])
                picked = logits.gather(1, local.clamp(0, logits.shape[1] - 1)[:, None])[:, 0]
                chosen[rows] = torch.where(inside, picked, chosen[rows])
        normaliser = top + total.log()
        ctx.save_for_backward(hidden, weight, targets, normaliser)
        return chosen - normaliser

    @staticmethod
    def backward(ctx, grad: Tensor):
        hidden, weight, targets, normaliser = ctx.saved_tensors
        grad_hidden = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
        for columns in _tiles(len(weight), TILE_COLUMNS):
            for rows in _tiles(len(hidden), TILE_ROWS):
                logits = (hidden[rows] @ weight[columns].t()).float()
                softmax = (logits - normaliser[rows, None]).exp()
                index = torch.arange(columns.start, columns.stop, device=hidden.device)
                is_target = (index == targets[rows, None]).float()
                slope = grad[rows, None] * (is_target - softmax)
                grad_hidden[rows] += slope @ weight[columns].float()
        return grad_hidden.to(hidden.dtype), None, None


def _tiles(size: int, tile: int) -> list[slice]:
    return [slice(start, min(start + tile, size)) for start in range(0, size, tile)]


def _device(model) -> torch.device:
    return model.head_weight.device
