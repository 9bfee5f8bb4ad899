"""How likely a model finds an answer: its ELBO, and whether greedy decoding writes it. For lm-evaluation-harness."""

from __future__ import annotations

import numpy as np
import torch

from laddpo.core.budget import TokenBudget
from laddpo.core.elbo import draw_logps
from laddpo.core.gradient import pack_sequence_runs
from laddpo.core.sequences import row_tokens
from laddpo.evaluation.sampling import never_emitted
from laddpo.inputs.margins import evaluation_estimator
from laddpo.models.denoiser import TransformerDenoiser


class Likelihoods:
    """`draws`: of each likelihood; `token_budget`: tokens of one forward pass."""

    def __init__(self, model, denoiser: TransformerDenoiser, draws: int, seed: int, token_budget: int | TokenBudget):
        self.model, self.denoiser = model, denoiser
        self.budget = TokenBudget.of(token_budget)
        self.estimator = evaluation_estimator(max(2, draws + draws % 2), seed, denoiser.block_length)

    @torch.no_grad()
    def elbo(self, prompt: np.ndarray, response: np.ndarray) -> float:
        """The mean over the draws; a single token is scored by one pair of draws, which is exact."""
        if not len(response):
            return 0.0
        draws = range(2 if len(response) == 1 else self.estimator.diffusion_samples)
        name = f"{prompt.tobytes().hex()}/{response.tobytes().hex()}"
        sequences = self.estimator.sequences(name, "chosen", prompt, response, draws)
        values = self.budget.run(
            lambda tokens: [draw_logps(self.denoiser, run) for run in pack_sequence_runs(sequences, tokens)],
            longest=max(sequence.tokens for sequence in sequences),
            total=row_tokens(sequences),
        )
        return float(torch.cat(values).mean())

    @torch.no_grad()
    def is_greedy(self, prompt: np.ndarray, response: np.ndarray) -> bool:
        """Whether one most confident token a step, as long as the response, gives the response; ends at the first
        token that differs. A block model fills one block of its grid after the other."""
        device, mask, autocast = self.denoiser.device, self.denoiser.mask_token_id, self.denoiser.autocast
        never = never_emitted(self.model, mask)
        wanted = torch.as_tensor(response.astype(np.int64), device=device)
        ids = torch.cat([torch.as_tensor(prompt.astype(np.int64), device=device), torch.full_like(wanted, mask)])
        is_open = torch.ones_like(wanted, dtype=torch.bool)
        size, end = self.model.block_length, len(ids)
        while is_open.any():
            at = is_open.nonzero()[:, 0]
            if size:  # nothing behind the block is seen
                end = min((len(prompt) + int(at[0])) // size * size + size, len(ids))
                at = at[at < end - len(prompt)]
            with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
                logits = self.model(input_ids=ids[None, :end], rows=len(prompt) + at).logits.float()
            probability = logits.softmax(-1)
            logits[:, never] = -torch.inf
            tokens = logits.argmax(-1)
            surest = probability.gather(1, tokens[:, None])[:, 0].argmax()
            if tokens[surest] != wanted[at[surest]]:
                return False
            ids[len(prompt) + at[surest]] = tokens[surest]
            is_open[at[surest]] = False
        return True
