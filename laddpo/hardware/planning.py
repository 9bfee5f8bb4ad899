"""From settings to a memory plan: what a run needs, the micro-step that fits, whether to recompute activations.

Plain numbers out of the settings, no torch: `plan` prints them before any weight is there, and the stages that run the
model take their token budget from the same prediction (laddpo/hardware/machine.py).
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from laddpo.core.losses import LOSSES, gradient_buffers
from laddpo.core.sequences import tokens_of
from laddpo.hardware.memory import (
    BUDGET_STEP,
    GIB,
    MOST_TOKENS,
    Load,
    MemoryPlan,
    Setup,
    Shape,
    largest_token_budget,
    predict_memory,
)
from laddpo.hardware.speed import Device, Work, predicted_seconds
from laddpo.models.families import FAMILIES
from laddpo.models.linears import match_linears
from laddpo.processes.ranks import launched
from laddpo.settings.schema import AdapterSettings, HardwareSettings, ModelSettings, OptimSettings, RunConfig, keywords
from laddpo.storage.atomic import read_json

CONTEXT_BYTES = int(0.5 * GIB)  # what CUDA and its libraries take beside every tensor
USABLE = 0.95  # of what is available: the allocator rounds and leaves holes
CPU_TOKEN_BUDGET = 4096  # long matrix products whose activations stay within a laptop's memory
STEADY_STEP = 256  # tokens: about half a GiB of an 8B's activations
USUAL_GPU = Device(tflops=100.0)  # where only the comparison of two plans counts


@dataclass(frozen=True)
class Lengths:
    """What a plan must know of the data, in tokens. `longest`: one sequence; `longest_pair`: both responses under all
    draws, of SFT rows the one; `mean` and `response`: a mean sequence, and the response in it. `source`: where that was
    read. `sides`: responses that a loss value depends on, two of a pair, one of an SFT row. For a block model a
    sequence counts with its share of the context that draws have in common; `keys` and `seen` as in Load, the most that
    any row has."""

    longest: int
    longest_pair: int
    mean: float
    response: float
    source: str
    sides: int = 2
    keys: float = 0.0
    seen: float = 0.0


@dataclass(frozen=True)
class Choice:
    """The plan of a run, with what the settings left open decided.

    `largest`: tokens of the largest micro-step that fits, without and with checkpointing; `available` in bytes;
    `reason`: why its backward mode.
    """

    memory: MemoryPlan
    token_budget: int
    available: int
    largest: dict[bool, int]
    reason: str

    @property
    def setup(self) -> Setup:
        return self.memory.setup

    @property
    def fits(self) -> bool:
        return self.memory.peak <= usable(self.available)


def memory_setup(config: RunConfig, device: str, precision: str, sides: int = 2, world: int | None = None) -> Setup:
    """The settings as the memory plan's plain numbers. `device`: cuda or cpu; `precision`: fp32, bf16 or fp16; `sides`
    as in Lengths; `world`: processes that share the work, None for those that the settings count."""
    hardware, quantization, adapter = config.hardware, config.quantization, held_adapter(config)
    is_sharded = hardware.sharding == "fsdp"
    backward = "two_pass" if is_sharded else "stream"
    stored = "none"
    if quantization.load_in_4bit:
        stored = "4bit_double" if quantization.bnb_4bit_use_double_quant else "4bit"
    elif quantization.load_in_8bit:
        stored = "int8"
    return Setup(
        shape=model_shape(config.model),
        device=device,
        precision=precision,
        quantization=stored,
        rank=None if adapter.kind == "full" else adapter.r,
        targets=adapter_targets(config),
        optimizer=config.optim.optimizer,
        checkpointing=bool(hardware.gradient_checkpointing),
        offload=hardware.offload_activations and device == "cuda",
        embeddings_on_cpu=hardware.embeddings_on_cpu and device == "cuda",
        backward=hardware.backward if hardware.backward != "auto" else backward,
        gradient_groups=gradient_groups(config, sides),
        shards=(world or processes(config.hardware)) if is_sharded else 1,
    )


def model_shape(model: ModelSettings) -> Shape:
    """The sizes of the configured model, with what its family adds to them."""
    sizes, family = keywords(model.shape), FAMILIES[model.architecture]
    del sizes["max_sequence_length"]
    parts = {name: getattr(family, name) for name in ("has_qkv_bias", "has_head_norms", "has_fused_qkv")}
    return Shape(**sizes, **parts)


def model_linears(model: ModelSettings) -> list[str]:
    """Full names of the linear layers that an adapter may be on."""
    return FAMILIES[model.architecture].layout.names(model.shape)


def gradient_groups(config: RunConfig, sides: int = 2) -> int:
    """Buffers of a pair larger than a micro-step: one for each set of draws with a derivative of its own. An SFT row's
    draws share theirs."""
    return 1 if sides == 1 else gradient_buffers(config.dpo.loss, config.dpo.sft_weight)


def held_adapter(config: RunConfig) -> AdapterSettings:
    """The adapter's settings as they hold: those of the adapter at `adapter.path`, else the configured ones."""
    path = config.adapter.path
    return stored_adapter(Path(path).expanduser(), path) if path else config.adapter


def stored_adapter(folder: Path, path: str | None = None) -> AdapterSettings:
    """The settings of an adapter in PEFT's layout, from its own file; `path` is stated as where it was started from."""
    stored = read_json(folder / "adapter_config.json")
    known = {item.name for item in dataclasses.fields(AdapterSettings)}
    found = {name: value for name, value in stored.items() if name in known and value is not None}
    if isinstance(targets := found.get("target_modules"), list):  # names of layers, by their ends
        found["target_modules"] = "|".join(map(re.escape, targets))
    return AdapterSettings(**{**found, "kind": "lora", "path": path})


def adapter_targets(config: RunConfig) -> tuple[str, ...]:
    """The kinds of linear layers that carry an adapter. A pattern that picks single blocks counts for all of them."""
    adapter, linears = held_adapter(config), model_linears(config.model)
    matched = [] if adapter.kind == "full" else match_linears(adapter.target_modules, linears)
    layout = FAMILIES[config.model.architecture].layout
    roles = set(map(layout.role, matched))
    return tuple(role for role in layout.roles if role in roles) or layout.roles


def choose_plan(
    config: RunConfig, device: str, precision: str, available: int, lengths: Lengths, world: int | None = None
) -> Choice:
    """The memory plan of these settings; of what they leave open, the choice with the shortest forecast that fits.

    `world`: the processes that there are; None for those that the settings count a step's pairs for.
    """
    hardware, given = config.hardware, memory_setup(config, device, precision, lengths.sides, world)
    wanted = hardware.gradient_checkpointing
    most = CPU_TOKEN_BUDGET if device == "cpu" else MOST_TOKENS
    options = {on: dataclasses.replace(given, checkpointing=on) for on in (False, True)}
    own_pairs = most_pairs(config.optim, config.hardware, world)
    empty = Load(0, alone=own_pairs == 1, keys=lengths.keys, seen=lengths.seen)
    largest = {on: largest_token_budget(option, usable(available), empty, most) for on, option in options.items()}

    def plan(option: Setup) -> Choice:
        tokens = hardware.token_budget or max(BUDGET_STEP, steady(largest[option.checkpointing]))
        mode, why = choose_backward(config, lengths, tokens, world)
        micro_step = max(lengths.longest, min(tokens, own_pairs * lengths.longest_pair))
        load = dataclasses.replace(empty, tokens=micro_step, exceeds=lengths.longest_pair > tokens)
        memory = predict_memory(dataclasses.replace(option, backward=mode), load)
        return Choice(memory, tokens, available, largest, why)

    def cost(choice: Choice) -> tuple[bool, float]:
        if not choice.fits:  # the one that lacks least
            return True, choice.memory.peak
        speed, some_work = device_speed(config) or USUAL_GPU, Work(1e6, 3e5, lengths.mean)
        return False, predicted_seconds(choice.setup, some_work, choice.token_budget, speed)[1]

    return min((plan(options[on]) for on in options if wanted in (None, on)), key=cost)


def steady(tokens: int) -> int:
    """A chosen budget, a little below the largest: free memory differs by some MiB from start to start, and another
    budget is another packing, which moves values by rounding."""
    return tokens // STEADY_STEP * STEADY_STEP if tokens >= 4 * STEADY_STEP else tokens


def choose_backward(
    config: RunConfig, lengths: Lengths, token_budget: int, world: int | None = None
) -> tuple[str, str]:
    """The backward mode and why. `auto`: stream, unless that takes a buffer of the model's size. `world` as in
    choose_plan."""
    if config.hardware.backward != "auto":
        return config.hardware.backward, "as set in hardware.backward"
    unit = "pair" if lengths.sides == 2 else "row"
    pairs = f"the largest {unit} takes {lengths.longest_pair} tokens, a micro-step {token_budget}"
    if config.hardware.sharding == "fsdp":
        return "two_pass", "weights are sharded, so that every rank must know a pair's weight before its backward pass"
    if lengths.longest_pair <= token_budget:
        return "stream", f"whole {unit}s fit a micro-step, so it needs no buffer: {pairs}"
    if most_pairs(config.optim, config.hardware, world) == gradient_groups(config, lengths.sides) == 1:
        return "stream", f"one pass, and a step of one {unit} needs no buffer: {pairs}"
    if config.adapter.kind == "full":
        return "two_pass", f"a gradient buffer would be as large as the model: {pairs}"
    return "stream", f"one pass, and a gradient buffer of the adapter's size is small: {pairs}"


def work_of(config: RunConfig, lengths: Lengths, pairs: int | None) -> Work | None:
    """The sequences of the whole run; None while neither the rows nor the steps are counted."""
    optim, dpo = config.optim, config.dpo
    if optim.max_train_steps is not None:
        visited = optim.max_train_steps * pairs_per_step(config.optim, config.hardware)
    elif pairs is not None:
        visited = optim.num_train_epochs * pairs
    else:
        return None
    sequences, loss = lengths.sides * visited * dpo.diffusion_samples, LOSSES[dpo.loss]
    reference = min(1.0, dpo.mask_rounds * pairs / visited) if pairs else 1.0
    before = reference * loss.needs_reference
    if dpo.focus == "surprise":  # once for every row, however many rounds of masks there are
        before += min(1.0, pairs / visited if pairs else 1.0) * dpo.surprise_draws / dpo.diffusion_samples
    forwards = before
    if loss.has_baseline:  # of the policy in every step; mismatched rows have reference values of their own
        forwards += 1 + before * (dpo.kl_baseline == "mismatched")
    return Work(sequences * lengths.mean, sequences * lengths.response / 2, lengths.mean, forwards)


def pairs_per_step(optim: OptimSettings, hardware: HardwareSettings) -> int:
    """Pairs of one optimizer step, over all processes."""
    return pairs_per_process(optim) * processes(hardware)


def pairs_per_process(optim: OptimSettings) -> int:
    """Pairs of one optimizer step, for each process that it is counted for."""
    return optim.per_device_train_batch_size * optim.gradient_accumulation_steps


def most_pairs(optim: OptimSettings, hardware: HardwareSettings, world: int | None = None) -> int:
    """The most pairs of one optimizer step that one process may have. `world` as in choose_plan."""
    return math.ceil(pairs_per_step(optim, hardware) / (world or processes(hardware)))


def processes(hardware: HardwareSettings) -> int:
    """The processes that a step's pairs are counted for: those launched, unless the settings say otherwise."""
    return hardware.processes or launched().world


def assumed_lengths(config: RunConfig) -> Lengths:
    """From data.length_quantiles, the longest sequence taken as twice the 99th percentile; or from data.max_length."""
    data, quantiles = config.data, config.data.length_quantiles
    mean = quantiles.mean or data.max_length / 2
    prompt = quantiles.prompt_mean if quantiles.prompt_mean is not None else mean / 2
    source = "data.length_quantiles" if quantiles.mean else "data.max_length alone"
    longest = min(data.max_length, 2 * quantiles.p99) if quantiles.p99 else data.max_length
    source = f"{source} (nothing is prepared yet)"
    draws, block_length = config.dpo.diffusion_samples, block_length_of(config.model)
    sides = 2 if LOSSES[config.dpo.loss].takes_pairs else 1
    if not block_length:
        return Lengths(longest, sides * draws * longest, mean, mean - prompt, source, sides)
    of_longest = round(longest * prompt / mean)  # the longest pair has a prompt of the mean share
    rows = np.array([[of_longest, *sides * [longest - of_longest]], [round(prompt), *sides * [round(mean - prompt)]]])
    long, usual = (prepared_lengths(row[None], draws, source, block_length) for row in rows)
    most = {name: max(getattr(long, name), getattr(usual, name)) for name in ("keys", "seen")}
    return dataclasses.replace(usual, longest=long.longest, longest_pair=long.longest_pair, **most)


def prepared_lengths(lengths: np.ndarray, draws: int, source: str, block_length: int = 0) -> Lengths:
    """From prepared rows. # lengths [rows, 1 + sides]: prompt, then chosen and rejected, or an SFT row's response"""
    prompt, responses = lengths[:, 0], list(lengths.T[1:])
    longest = max(int(tokens_of(prompt, [response], 1, block_length).max()) for response in responses)
    pairs, sides = tokens_of(prompt, responses, draws, block_length), len(responses)
    mean = float(pairs.mean()) / (draws * sides)
    found = Lengths(longest, int(pairs.max()), mean, float(lengths[:, 1:].mean()), source, sides)
    if not block_length:
        return found
    # of the prompt, of each clean response beside it, and of each draw, which sees both and its own tokens
    keys = prompt + sum(prompt + response + draws * (prompt + 2 * response) for response in responses)
    seen = prompt**2 + sum(response * (prompt + response + draws * (prompt + 2 * response)) for response in responses)
    most = {name: float((copied / pairs).max()) for name, copied in (("keys", keys), ("seen", seen))}
    return dataclasses.replace(found, **most)


def block_length_of(model: ModelSettings) -> int:
    """Tokens of the model's blocks; 0 for a bidirectional model."""
    return model.known_block_length or 0


def measured_cpu_speed(shape: Shape, lengths: Lengths) -> Device:
    """Matrix speed of this CPU on products of the model's size, timed for a tenth of a second."""
    rng = np.random.default_rng(0)
    tokens = rng.standard_normal((max(64, round(8 * lengths.mean)), shape.d_model), dtype=np.float32)
    weight = rng.standard_normal((shape.d_model, shape.mlp_hidden_size), dtype=np.float32)
    tokens @ weight
    products, start = 0, time.perf_counter()
    while time.perf_counter() - start < 0.1:
        tokens @ weight
        products += 1
    seconds = (time.perf_counter() - start) / products
    return Device(2 * tokens.size * weight.shape[1] / seconds / 1e12)


def usable(available: int) -> int:
    """What tensors may take of the available bytes."""
    return int(USABLE * available)


def device_speed(config: RunConfig) -> Device | None:
    """The speeds that the hardware profile states."""
    hardware = config.hardware
    return Device(hardware.tflops, hardware.memory_gb_per_s) if hardware.tflops else None


def free_ram_bytes() -> int:
    """Memory that programs can still get, from the kernel's own estimate; all of it if there is no estimate."""
    estimate = Path("/proc/meminfo")
    if estimate.exists():
        for line in estimate.read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    known = getattr(os, "sysconf_names", {})  # absent on Windows
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if "SC_PHYS_PAGES" in known else 8 * GIB
