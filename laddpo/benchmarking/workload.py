"""What is benchmarked on: a model with random weights, and pairs whose lengths are drawn like those of real dialogues.

Token ids are random: time and memory depend on lengths alone.
"""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import torch
from torch import nn

from laddpo.models.families import find_family
from laddpo.models.llada_config import LLaDAConfig
from laddpo.models.quantization import quantization_config, quantized_linear, settle_quantized
from laddpo.preference.encoding.encode import EncodedPair

Z99 = 2.3263478740408408  # the 99th percentile of the standard normal
SHORTEST = 8  # tokens of prompt and of response
ARCHITECTURE = {"architectures": ["LLaDAModelLM"]}
RESPONSE_SPREAD = 0.4  # standard deviation of log(rejected / chosen length)


def length_parameters(mean: float, p99: float) -> tuple[float, float]:
    """mu and sigma of the log-normal with this mean and 99th percentile.

    exp(mu + sigma^2 / 2) = mean and exp(mu + Z99 sigma) = p99, so sigma^2 / 2 - Z99 sigma + log(p99 / mean) = 0.
    """
    ratio = math.log(p99 / mean)
    assert 0 < ratio < Z99**2 / 2, f"no log-normal has mean {mean} and 99th percentile {p99}"
    sigma = Z99 - math.sqrt(Z99**2 - 2 * ratio)
    return math.log(mean) - sigma**2 / 2, sigma


def random_pairs(
    count: int, vocabulary: int, mean: float, p99: float, prompt_mean: float, max_length: int, seed: int
) -> list[EncodedPair]:
    """Pairs of random tokens below `vocabulary`. Prompt + chosen is log-normal; the prompt's share varies around its
    mean; the rejected response is as long as the chosen one up to a log-normal factor. None exceeds `max_length`."""
    rng = np.random.default_rng([seed, count])
    mu, sigma = length_parameters(mean, p99)
    pairs = []
    for number in range(count):
        total = int(np.clip(rng.lognormal(mu, sigma), 2 * SHORTEST, max_length))
        share = np.clip(prompt_mean / mean + rng.uniform(-0.25, 0.25), 0.05, 0.9)
        prompt = int(np.clip(total * share, SHORTEST, total - SHORTEST))
        chosen = total - prompt
        factor = math.exp(RESPONSE_SPREAD * rng.standard_normal())
        rejected = int(np.clip(chosen * factor, SHORTEST, max_length - prompt))
        ids = (rng.integers(0, vocabulary, size).astype(np.int32) for size in (prompt, chosen, rejected))
        pairs.append(EncodedPair(f"random-{seed}-{number}", *ids, group=str(number)))
    return pairs


def pair_of_tokens(tokens: int, vocabulary: int, seed: int, prompt_share: float = 0.5) -> EncodedPair:
    """A pair whose sequences both have `tokens` tokens."""
    rng = np.random.default_rng(seed)
    prompt = int(prompt_share * tokens)
    response = tokens - prompt
    ids = (rng.integers(0, vocabulary, size).astype(np.int32) for size in (prompt, response, response))
    return EncodedPair(f"pair-{tokens}-{seed}", *ids, group="0")


def random_model(
    shape: dict, seed: int, device: torch.device, dtype: torch.dtype, quantization: dict[str, Any] | None = None
):
    """A LLaDA of this shape with random weights, frozen if quantised; its last token id is the mask.

    Layers are made, and quantised, on the device one after the other: no more is ever held than what stays.
    `quantization`: the config group's fields, as for `load_model`.
    """
    config, family = LLaDAConfig(**shape, mask_token_id=shape["vocab_size"] - 1), find_family(ARCHITECTURE, "benchmark")
    quantizer = quantization_config(quantization, family, dtype)
    with torch.device("meta"):
        model = family.model_class(config)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for name, module in list(model.named_modules()):
            own = dict(module.named_parameters(recurse=False))
            for key, parameter in own.items():
                setattr(module, key, nn.Parameter(torch.empty_like(parameter, device=device, dtype=torch.float32)))
            model._init_weights(module)
            for key in own:  # drawn in float32, so that every dtype rounds the same numbers
                setattr(module, key, nn.Parameter(getattr(module, key).detach().to(dtype)))
            if quantizer is not None and isinstance(module, nn.Linear) and re.match(family.block, name):
                parent, _, last = name.rpartition(".")
                setattr(model.get_submodule(parent), last, quantized_linear(module, quantizer))
                module.weight = None  # which the list of modules would hold until the end
    if quantizer is not None:
        model.is_loaded_in_4bit, model.is_loaded_in_8bit = quantizer.load_in_4bit, quantizer.load_in_8bit  # for peft
        settle_quantized(model, family)
    return model.eval()


def longest_sequence(pairs: list[EncodedPair]) -> int:
    """Tokens of the longest prompt + response."""
    return max(len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids)) for pair in pairs)
