"""What is benchmarked on: a model with random weights, and pairs whose lengths are drawn like those of real dialogues.

Token ids are random: time and memory depend on lengths alone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from laddpo.benchmarking.contenders import build_contenders
from laddpo.hardware.machine import Machine
from laddpo.hardware.memory import Setup
from laddpo.hardware.planning import memory_setup
from laddpo.inputs import policy
from laddpo.models.families import FAMILIES
from laddpo.models.llada_config import LLaDAConfig
from laddpo.models.quantization import quantization_config, quantized_linear, settle_quantized
from laddpo.preference.encoding.encode import EncodedPair
from laddpo.settings.schema import (
    BenchmarkSettings,
    QuantizationSettings,
    RunConfig,
    Sizes,
    StepSetting,
    keywords,
)

Z99 = 2.3263478740408408  # the 99th percentile of the standard normal
SHORTEST = 8  # tokens of prompt and of response
ARCHITECTURE = "LLaDAModelLM"
RESPONSE_SPREAD = 0.4  # standard deviation of log(rejected / chosen length)
STORAGE = {"none": {}, "nf4": {"load_in_4bit": True}, "int8": {"load_in_8bit": True}}


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
    pairs = []
    for number in range(count):
        lengths = pair_lengths(rng, mean, p99, prompt_mean, max_length)
        ids = (rng.integers(0, vocabulary, size).astype(np.int32) for size in lengths)
        pairs.append(EncodedPair(f"random-{seed}-{number}", *ids, group=str(number)))
    return pairs


def pair_lengths(
    rng: np.random.Generator, mean: float, p99: float, prompt_mean: float, max_length: int
) -> tuple[int, int, int]:
    """Tokens of the prompt, the chosen and the rejected response of one more pair, as random_pairs says."""
    mu, sigma = length_parameters(mean, p99)
    total = int(np.clip(rng.lognormal(mu, sigma), 2 * SHORTEST, max_length))
    share = np.clip(prompt_mean / mean + rng.uniform(-0.25, 0.25), 0.05, 0.9)
    prompt = int(np.clip(total * share, SHORTEST, total - SHORTEST))
    chosen = total - prompt
    factor = math.exp(RESPONSE_SPREAD * rng.standard_normal())
    return prompt, chosen, int(np.clip(chosen * factor, SHORTEST, max_length - prompt))


def pair_of_tokens(tokens: int, vocabulary: int, seed: int, prompt_share: float = 0.5) -> EncodedPair:
    """A pair whose sequences both have `tokens` tokens."""
    rng = np.random.default_rng(seed)
    prompt = int(prompt_share * tokens)
    response = tokens - prompt
    ids = (rng.integers(0, vocabulary, size).astype(np.int32) for size in (prompt, response, response))
    return EncodedPair(f"pair-{tokens}-{seed}", *ids, group="0")


def pairs_of_answers(tokens: int, count: int, vocabulary: int, seed: int, prompt: int = 64) -> list[EncodedPair]:
    """Pairs whose chosen response has `tokens` tokens, the rejected one as many up to a log-normal factor."""
    rng = np.random.default_rng([seed, tokens])
    pairs = []
    for number in range(count):
        rejected = max(SHORTEST, int(tokens * math.exp(RESPONSE_SPREAD * rng.standard_normal())))
        ids = (rng.integers(0, vocabulary - 2, size).astype(np.int32) for size in (prompt, tokens, rejected))
        pairs.append(EncodedPair(f"answers-{tokens}-{seed}-{number}", *ids, group=str(number)))
    return pairs


def random_model(
    shape: dict, seed: int, device: torch.device, dtype: torch.dtype, quantization: dict[str, Any] | None = None
):
    """A LLaDA of this shape with random weights, frozen if quantised; its last token id is the mask.

    Layers are made, and quantised, on the device one after the other: no more is ever held than what stays.
    `quantization`: the config group's fields, as for `load_model`.
    """
    config, family = LLaDAConfig(**shape, mask_token_id=shape["vocab_size"] - 1), FAMILIES[ARCHITECTURE]
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
            if quantizer is not None and isinstance(module, nn.Linear) and re.match(family.layout.block, name):
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


def quantization_of(name: str) -> QuantizationSettings:
    """The config group of that name."""
    return QuantizationSettings(**STORAGE[name])


@dataclass(frozen=True)
class Bench:
    """The policy with its adapter, and everything that is measured around it, by name."""

    model: object
    contenders: dict


@dataclass(frozen=True)
class Workbench:
    """What the parts of the benchmark work on: models and pairs by the settings of a run, on this machine."""

    run: RunConfig
    machine: Machine

    @property
    def settings(self) -> BenchmarkSettings:
        return self.run.benchmark

    @property
    def seed(self) -> int:
        return self.run.seed

    @property
    def shape(self) -> Sizes:
        """The sizes of the measured model: of random weights the benchmark's, else the configured model's."""
        return self.settings.shape if self.settings.weights == "random" else self.run.model.shape

    def random_policy(self, quantization: QuantizationSettings, prepare: Callable[[Any], None] | None = None):
        """Random weights in the benchmark's shape under a fresh adapter; `prepare` changes the base before that."""
        shape, stored = keywords(self.settings.shape), policy.storage_of(quantization)
        model = random_model(shape, self.seed, self.machine.device, self.machine.dtype, stored)
        if prepare is not None:
            prepare(model)
        policy.attach_adapter(self.run, model)
        return model

    def open(self) -> Bench:
        """A fresh model with a fresh adapter: parts do not see one another's settings."""
        if self.settings.weights == "model":
            loaded = self.load()
            policy.make_trainable(self.run, loaded)
            model, mask, pad = loaded.model, loaded.denoiser.mask_token_id, loaded.tokenizer.pad_token_id
        else:
            model = self.random_policy(self.run.quantization)
            mask, pad = self.shape.vocab_size - 1, self.shape.vocab_size - 2
        return Bench(model, build_contenders(model, mask, pad, self.settings.max_length, self.settings.token_budget))

    def load(self) -> policy.Loaded:
        """The configured model."""
        return policy.load(self.run, self.machine)

    def of_rank(self, rank: int) -> Workbench:
        """The same with adapters of another rank."""
        return replace(self, run=replace(self.run, adapter=replace(self.run.adapter, r=rank)))

    def planned(self) -> Setup:
        """The memory plan's view of the measured model."""
        is_random = self.settings.weights == "random"
        network = {"architecture": ARCHITECTURE} if is_random else {}
        model = replace(self.run.model, shape=self.shape, **network)
        return memory_setup(replace(self.run, model=model), *self._arithmetic)

    def setup_of(self, setting: StepSetting) -> Setup:
        """The memory plan's view of a setting, in the benchmark's shape."""
        taken = ("gradient_checkpointing", "offload_activations", "embeddings_on_cpu")
        changed = replace(
            self.run,
            model=replace(self.run.model, shape=self.settings.shape, architecture=ARCHITECTURE),
            quantization=quantization_of(setting.quantization),
            hardware=replace(self.run.hardware, **{name: getattr(setting, name) for name in taken}),
            optim=replace(self.run.optim, optimizer=setting.optimizer),
        )
        return memory_setup(changed, *self._arithmetic)

    @property
    def _arithmetic(self) -> tuple[str, str]:
        return self.machine.device.type, self.machine.precision

    def dialogues(self, count: int, seed: int, vocab_size: int) -> list[EncodedPair]:
        """Pairs of random tokens, mask and padding not among them, as long as the benchmark's settings say."""
        wanted = self.settings
        lengths = (wanted.mean, wanted.p99, wanted.prompt_mean, wanted.max_length)
        return random_pairs(count, vocab_size - 2, *lengths, self.seed + seed)

    def pairs(self, seed: int = 0) -> list[EncodedPair]:
        """The pairs of one step."""
        return self.dialogues(self.settings.pairs, seed, self.shape.vocab_size)
