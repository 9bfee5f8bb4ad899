"""Models of random weights and made pairs, as the benchmark's parts use them."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from laddpo.settings.schema import QuantizationSettings, RunConfig, StepSetting, keywords

if TYPE_CHECKING:
    pass


STORAGE = {"none": {}, "nf4": {"load_in_4bit": True}, "int8": {"load_in_8bit": True}}


def random_policy(config: RunConfig, machine, quantization: QuantizationSettings, prepare=None):
    """Random weights in the benchmark's shape under a fresh adapter; `prepare` changes the base before it is put on."""
    from laddpo.benchmarking.workload import random_model
    from laddpo.inputs import policy

    shape, stored = keywords(config.benchmark.shape), policy.storage_of(quantization)
    model = random_model(shape, config.seed, machine.device, machine.dtype, stored)
    if prepare is not None:
        prepare(model)
    policy.attach_adapter(config, model)
    return model


def quantization_of(name: str) -> QuantizationSettings:
    """The config group of that name."""
    return QuantizationSettings(**STORAGE[name])


def setup_of(config: RunConfig, machine, setting: StepSetting):
    """The memory plan's view of a setting."""
    from laddpo.hardware.planning import memory_setup

    taken = ("gradient_checkpointing", "offload_activations", "embeddings_on_cpu")
    changed = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, shape=config.benchmark.shape),
        quantization=quantization_of(setting.quantization),
        hardware=dataclasses.replace(config.hardware, **{name: getattr(setting, name) for name in taken}),
        optim=dataclasses.replace(config.optim, optimizer=setting.optimizer),
    )
    return memory_setup(changed, machine.device.type, machine.precision)


def dialogue_pairs(config: RunConfig, count: int, seed: int, vocab_size: int) -> list:
    """Pairs of random tokens, mask and padding not among them, as long as the benchmark's settings say."""
    from laddpo.benchmarking.workload import random_pairs

    wanted = config.benchmark
    lengths = (wanted.mean, wanted.p99, wanted.prompt_mean, wanted.max_length)
    return random_pairs(count, vocab_size - 2, *lengths, config.seed + seed)
