"""A LLaDA for lm-evaluation-harness: answers from our sampler, log-likelihoods from our ELBO. Needs the extra `eval`.

Decoding is that of `SamplerSettings` for every task: lengths and temperatures that a task asks for are not followed, so
that models are compared under one decoding; its stop texts are. A continuation of one token is scored exactly.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from tqdm import tqdm

from laddpo.core.elbo import Denoiser, ElboEstimator, MaskedSequence, draw_logps
from laddpo.evaluation.sampling import SamplerSettings, generate, until_stop


@register_model("laddpo")
class HarnessModel(LM):
    """`draws`: of each likelihood; `token_budget`: tokens of one forward pass; `batch_size`: answers made together."""

    def __init__(
        self,
        model,
        tokenizer,
        denoiser: Denoiser,
        settings: SamplerSettings,
        stop_token_ids: Sequence[int],
        draws: int = 128,
        token_budget: int = 4096,
        batch_size: int = 8,
        autocast: torch.dtype | None = None,
    ):
        super().__init__()
        self.model, self.tokenizer, self.denoiser, self.settings = model, tokenizer, denoiser, settings
        self.stops, self.token_budget, self.per_batch, self.autocast = (
            list(stop_token_ids),
            token_budget,
            batch_size,
            autocast,
        )
        self.estimator = ElboEstimator("complement", "low_discrepancy", max(2, draws + draws % 2), settings.seed)

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str:
        return (self.tokenizer.chat_template or "") if chat_template else ""

    def apply_chat_template(self, chat_history, add_generation_prompt: bool = True) -> str:
        return self.tokenizer.apply_chat_template(
            chat_history, tokenize=False, add_generation_prompt=add_generation_prompt
        )

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """A text for every request, cut before the first of its stop texts."""
        texts: list[str] = []
        for start in tqdm(range(0, len(requests), self.per_batch), desc="answers", disable=disable_tqdm):
            batch = [request.args for request in requests[start : start + self.per_batch]]
            prompts = [np.array(self._ids(context), dtype=np.int64) for context, _ in batch]
            answers = generate(
                self.model,
                prompts,
                self.settings,
                self.denoiser.mask_token_id,
                self.stops,
                keys=[context for context, _ in batch],
                autocast=self.autocast,
            )
            for (context, options), answer in zip(batch, answers, strict=True):
                text = self.tokenizer.decode(until_stop(answer, self.stops), skip_special_tokens=True)
                text = cut_before(text, options.get("until") or [])
                self.cache_hook.add_partial("generate_until", (context, options), text)
                texts.append(text)
        return texts

    def loglikelihood(self, requests, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(ELBO of the continuation, whether greedy decoding writes exactly it) for every request."""
        found = []
        for request in tqdm(requests, desc="likelihoods", disable=disable_tqdm):
            prompt, response = self._pair(*request.args)
            value = (self.elbo(prompt, response), self.is_greedy(prompt, response))
            self.cache_hook.add_partial("loglikelihood", request.args, value)
            found.append(value)
        return found

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """ELBO of whole texts, in windows of the model's length, each without what came before."""
        window = self.model.config.max_sequence_length - 1
        found = []
        for request in tqdm(requests, desc="texts", disable=disable_tqdm):
            ids = np.array(self._ids(request.args[0]), dtype=np.int32)
            start = np.array(self._ids(self.tokenizer.bos_token or ""), dtype=np.int32)
            value = sum(self.elbo(start, ids[at : at + window]) for at in range(0, len(ids), window))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, value)
            found.append(value)
        return found

    @torch.no_grad()
    def elbo(self, prompt: np.ndarray, response: np.ndarray) -> float:
        """The mean over the draws; a single token is scored by one pair of draws, which is exact."""
        if not len(response):
            return 0.0
        draws = range(2 if len(response) == 1 else self.estimator.diffusion_samples)
        name = f"{prompt.tobytes().hex()}/{response.tobytes().hex()}"
        sequences = self.estimator.sequences(name, "chosen", prompt, response, draws)
        values = [draw_logps(self.denoiser, part) for part in _parts(sequences, self.token_budget)]
        return float(torch.cat(values).mean())

    @torch.no_grad()
    def is_greedy(self, prompt: np.ndarray, response: np.ndarray) -> bool:
        """Whether one most confident token a step, as long as the response, gives the response; ends at the first
        token that differs."""
        device, mask = self.denoiser.device, self.denoiser.mask_token_id
        wanted = torch.as_tensor(response.astype(np.int64), device=device)
        ids = torch.cat([torch.as_tensor(prompt.astype(np.int64), device=device), torch.full_like(wanted, mask)])
        is_open = torch.ones_like(wanted, dtype=torch.bool)
        while is_open.any():
            at = is_open.nonzero()[:, 0]
            with torch.autocast(device.type, dtype=self.autocast, enabled=self.autocast is not None):
                logits = self.model(input_ids=ids[None], rows=len(prompt) + at).logits.float()
            probability = logits.softmax(-1)
            logits[:, mask] = -torch.inf
            tokens = logits.argmax(-1)
            surest = probability.gather(1, tokens[:, None])[:, 0].argmax()
            if tokens[surest] != wanted[at[surest]]:
                return False
            ids[len(prompt) + at[surest]] = tokens[surest]
            is_open[at[surest]] = False
        return True

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _pair(self, context: str, continuation: str) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of both, split where the context's own tokens end; spaces at the seam belong to the continuation."""
        stripped = context.rstrip()
        continuation = context[len(stripped) :] + continuation
        whole, before = self._ids(stripped + continuation), self._ids(stripped)
        ids = np.array(whole, dtype=np.int32)
        return ids[: len(before)], ids[len(before) :]


def cut_before(text: str, stops: Sequence[str]) -> str:
    """The text up to the first place where any of the stop texts begins."""
    stops = [stops] if isinstance(stops, str) else stops
    return text[: min((at for stop in stops if stop and (at := text.find(stop)) >= 0), default=len(text))]


def _parts(sequences: Sequence[MaskedSequence], token_budget: int) -> list[list[MaskedSequence]]:
    """Runs of sequences that fit the budget together; a longer one goes alone."""
    parts: list[list[MaskedSequence]] = [[]]
    for sequence in sequences:
        if parts[-1] and sum(s.tokens for s in parts[-1]) + sequence.tokens > token_budget:
            parts.append([])
        parts[-1].append(sequence)
    return parts
