"""The harness's likelihoods on llada_nano agree with an independent estimate and choose the model's own answers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from laddpo.core.budget import TokenBudget
from laddpo.evaluation.likelihoods import Likelihoods
from laddpo.evaluation.requests import RequestEncoder
from laddpo.evaluation.sampling import SamplerSettings, generate, until_stop
from laddpo.models.denoiser import TransformerDenoiser
from laddpo.models.llada import LLaDAConfig
from laddpo.models.loading import load_model, load_tokenizer, new_model
from laddpo.preference.embedded.arithmetic import Difficulty, problems
from laddpo.preference.encoding.encode import TextEncoder
from laddpo.preference.reading.pairs import prompt_rows, user_prompt

SHIPPED = str(Path(__file__).resolve().parents[2] / "data" / "llada_nano")


@pytest.fixture(scope="module")
def nano():
    model = load_model(SHIPPED)
    encoder = TextEncoder(load_tokenizer(SHIPPED))
    denoiser = TransformerDenoiser(model, model.config.mask_token_id)
    return model, encoder, Likelihoods(model, denoiser, draws=32, seed=0, token_budget=2000)


@pytest.fixture(scope="module")
def answered(nano):
    """(question, the model's own greedy answer) of twelve problems."""
    model, encoder, _ = nano
    questions = [problem.text for problem in problems("test", 12, 5, Difficulty(20, 3, 2))]
    settings = SamplerSettings(gen_length=24, steps=24, block_length=24)
    prompts = [encoder.encode_prompt(user_prompt(question)) for question in questions]
    answers = generate(model, prompts, settings, model.config.mask_token_id, encoder.stop_ids)
    texts = [encoder.decode(until_stop(answer, encoder.stop_ids)) for answer in answers]
    return list(zip(questions, texts, strict=True))


def other_digit(text):
    """The text with its last digit one higher: as long, and wrong."""
    return text[:-1] + str((int(text[-1]) + 1) % 10)


def test_the_models_own_answers_are_chosen(nano, answered):
    _, encoder, likelihoods = nano
    requests = RequestEncoder(encoder)
    right = 0
    for question, answer in answered:
        context = requests.chat_text(prompt_rows(user_prompt(question)))
        own, other = (
            likelihoods.elbo(requests.prompt_ids(context), requests.answer_ids(context, text))
            for text in (answer, other_digit(answer))
        )
        right += own > other
    assert right >= 11, f"{right} of 12"


def monte_carlo(model, prompt, answer, draws, seed):
    """ELBO of an answer and its standard error: L / l times the log-probabilities of l random masked tokens."""
    rng, length = np.random.default_rng(seed), len(answer)
    counts = rng.integers(1, length + 1, size=draws)
    masked = np.stack([rng.permutation(length) < count for count in counts])  # [draws, length]
    noisy = np.where(masked, model.config.mask_token_id, answer)
    rows = np.concatenate([np.tile(prompt, (draws, 1)), noisy], axis=1)
    with torch.no_grad():
        logps = model(input_ids=torch.as_tensor(rows)).logits[:, len(prompt) :].log_softmax(-1).double().numpy()
    of_answer = logps[:, np.arange(length), answer]
    values = length / counts * (of_answer * masked).sum(1)
    return values.mean(), values.std(ddof=1) / np.sqrt(draws)


@pytest.mark.parametrize("is_chat", [True, False])
def test_likelihoods_agree_with_an_independent_estimate(nano, answered, is_chat):
    model, encoder, likelihoods = nano
    requests = RequestEncoder(encoder)
    question, answer = answered[0]
    context = requests.chat_text(prompt_rows(user_prompt(question))) if is_chat else question
    wanted, error = monte_carlo(model, *ids_by_hand(question, other_digit(answer), is_chat), 300, 1)
    found = likelihoods.elbo(requests.prompt_ids(context), requests.answer_ids(context, other_digit(answer)))
    assert abs(found - wanted) < 4 * error < 0.5 * abs(wanted), (found, wanted, error)


def test_a_likelihood_is_the_same_when_memory_runs_out_on_the_way(nano, answered, monkeypatch):
    model, _, likelihoods = nano
    prompt, answer = (ids.astype(np.int64) for ids in ids_by_hand(*answered[0], True))
    expected, budget = likelihoods.elbo(prompt, answer), TokenBudget(4096)
    denoiser = TransformerDenoiser(model, model.config.mask_token_id)
    score, tried = denoiser.token_logps, []

    def cramped(packed):
        tried.append(sum(packed.lengths))
        if tried[-1] > 300:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return score(packed)

    monkeypatch.setattr(denoiser, "token_logps", cramped)
    found = Likelihoods(model, denoiser, draws=32, seed=0, token_budget=budget).elbo(prompt, answer)
    assert found == pytest.approx(expected, rel=1e-5)
    assert budget.retries and tried[1] <= tried[0] / 2, "half of what was in use"


def ids_by_hand(question, answer, is_chat):
    """What stands before the answer, and the answer: the tokenizer's own rendering, split by hand."""
    tokenizer = load_tokenizer(SHIPPED)
    if is_chat:
        head = tokenizer.apply_chat_template([{"role": "user", "content": question}], tokenize=False)
    else:
        head = tokenizer.bos_token + question
    return [np.array(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in (head, answer)]


def test_greedy_is_what_the_sampler_writes_and_never_a_row_beyond_the_vocabulary():
    config = LLaDAConfig(
        d_model=32, n_heads=2, n_layers=1, mlp_hidden_size=32, vocab_size=20, embedding_size=24, mask_token_id=19
    )
    model = new_model(config, seed=2)
    with torch.no_grad():
        model.model["transformer"]["ff_out"].weight[20:] *= 20  # what is no token would win most positions
    prompt = np.array([1, 2, 3], dtype=np.int32)
    settings = SamplerSettings(gen_length=6, steps=6, block_length=6, stop_early=False)
    (written,) = generate(model, [prompt], settings, mask_token_id=19)
    likelihoods = Likelihoods(model, TransformerDenoiser(model, 19), 2, 0, 100)
    assert likelihoods.is_greedy(prompt, written)
    other = written.copy()
    other[2] = (other[2] + 1) % 19
    assert not likelihoods.is_greedy(prompt, other)
    with torch.no_grad():
        assert model(input_ids=torch.tensor([[*prompt, *[19] * 6]])).logits[0, 3:].argmax(-1).max() >= 20
