"""A LLaDA for lm-evaluation-harness: answers from our sampler, log-likelihoods from our ELBO. Needs the extra `eval`.

Decoding is that of `SamplerSettings` for every task: lengths and temperatures that a task asks for are not followed, so
that models are compared under one decoding; its stop texts are. A continuation of one token is scored exactly. Token
ids are those of the run's `TextEncoder` (laddpo/evaluation/requests.py). What does not fit the model's positions is
refused before the first request is answered.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

from laddpo.evaluation.answering import Answerer
from laddpo.evaluation.likelihoods import Likelihoods
from laddpo.evaluation.requests import RequestEncoder
from laddpo.evaluation.sampling import require_room, until_stop
from laddpo.processes.progress import Progress


@register_model("laddpo")
class HarnessModel(LM):
    """`draws`: of each likelihood."""

    def __init__(self, answers: Answerer, draws: int = 128):
        super().__init__()
        loaded = answers.loaded
        self.answers, self.tokenizer = answers, loaded.tokenizer
        self.requests = RequestEncoder(answers.encoder)
        self.positions = loaded.model.config.max_sequence_length
        seed, budget = answers.sampler.seed, loaded.machine.token_budget
        self.likelihoods = Likelihoods(loaded.model, loaded.denoiser, draws, seed, budget)

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str:
        chat = self.answers.encoder.chat
        return chat.source if chat_template and chat else ""

    def apply_chat_template(self, chat_history, add_generation_prompt: bool = True) -> str:
        """The messages as one text, which the other methods read again; the template is applied when they do."""
        return self.requests.chat_text(chat_history, add_generation_prompt)

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """A text for every request, cut before the first of its stop texts."""
        texts: list[str] = []
        prompts = [self.requests.prompt_ids(request.args[0]).astype(np.int64) for request in requests]
        gen_length, size = self.answers.sampler.gen_length, self.answers.sampler.batch_size
        require_room([len(ids) for ids in prompts], gen_length, self.positions, _names(requests))
        stops = self.answers.encoder.stop_ids
        for start in Progress(range(0, len(requests), size), desc="answers", disable=disable_tqdm):
            batch = [request.args for request in requests[start : start + size]]
            responses = self.answers.responses(prompts[start : start + size], [context for context, _ in batch])
            for (context, options), response in zip(batch, responses, strict=True):
                text = self.tokenizer.decode(until_stop(response, stops), skip_special_tokens=True)
                text = cut_before(text, options.get("until") or [])
                self.cache_hook.add_partial("generate_until", (context, options), text)
                texts.append(text)
        return texts

    def loglikelihood(self, requests, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(ELBO of the continuation, whether greedy decoding writes exactly it) for every request."""
        pairs = [(self.requests.prompt_ids(context), self.requests.answer_ids(context, answer))
                 for context, answer in (request.args for request in requests)]  # fmt: skip
        require_room([len(prompt) + len(answer) for prompt, answer in pairs], 0, self.positions, _names(requests))
        found = []
        for request, pair in zip(Progress(requests, desc="likelihoods", disable=disable_tqdm), pairs, strict=True):
            value = (self.likelihoods.elbo(*pair), self.likelihoods.is_greedy(*pair))
            self.cache_hook.add_partial("loglikelihood", request.args, value)
            found.append(value)
        return found

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """ELBO of whole texts, in windows of the model's length, each without what came before."""
        found = []
        for request in Progress(requests, desc="texts", disable=disable_tqdm):
            start, ids = self.requests.text_ids(request.args[0])
            window = self.positions - len(start)
            value = sum(self.likelihoods.elbo(start, ids[at : at + window]) for at in range(0, len(ids), window))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, value)
            found.append(value)
        return found


def cut_before(text: str, stops: Sequence[str]) -> str:
    """The text up to the first place where any of the stop texts begins."""
    stops = [stops] if isinstance(stops, str) else stops
    return text[: min((at for stop in stops if stop and (at := text.find(stop)) >= 0), default=len(text))]


def _names(requests) -> list[str]:
    """How a message names the requests: by task and item."""
    return [f"item {request.doc_id} of {request.task_name}" for request in requests]
