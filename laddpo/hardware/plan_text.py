"""A memory plan in words: memory by part, the largest micro-step that fits, hours."""

from __future__ import annotations

import dataclasses

from laddpo.core.losses import LOSSES
from laddpo.errors import UserError
from laddpo.hardware.memory import GIB, explain, gib
from laddpo.hardware.planning import (
    CONTEXT_BYTES,
    Choice,
    Lengths,
    choose_plan,
    device_speed,
    free_ram_bytes,
    measured_cpu_speed,
    pairs_per_step,
    processes,
    usable,
    work_of,
)
from laddpo.hardware.speed import duration, exchange_seconds, predicted_seconds
from laddpo.processes.terminal import hanging
from laddpo.settings.schema import RunConfig


def plan_text(config: RunConfig, lengths: Lengths, pairs: int | None) -> str:
    """Everything that `plan` says. `pairs`: their number, None if it is not known."""
    device, precision, available, where = find_memory(config)
    choice = choose_plan(config, device, precision, available, lengths)
    setup, load = choice.setup, choice.memory.load
    title, data_line = _run_line(config, device, precision, setup.trained), _data_line(lengths, pairs)
    lines = [title, data_line, "", f"one micro-step of {load.tokens:,} tokens, by part"]
    parts = [(name, size) for name, size in choice.memory.parts.items() if size]
    parts += [("predicted peak", choice.memory.peak), ("usable", usable(available))]
    width = max(len(name) for name, _ in parts)
    for name, size in parts:
        note = f"of {gib(available)} {where}" if name == "usable" else _note(name, choice)
        lines.append(hanging(f"  {name:<{width}}  {size / GIB:9.3f} GiB{'  ' if note else ''}", note or ""))
    if device == "cuda":
        lines.append(f"  not counted: {gib(CONTEXT_BYTES)} that CUDA itself takes on the card")
    lines += ["", *_budget_lines(config, choice, lengths)]
    lines.append(f"backward: {choice.setup.backward} ({choice.reason})")
    if not LOSSES[config.dpo.loss].needs_reference:
        lines.append(f"reference: none (dpo.loss={config.dpo.loss} compares with no reference)")
    if choice.fits:
        lines.append(_hours_line(config, choice, lengths, pairs, device))
    else:
        lines += ["", explain(choice.memory, usable(available), f"A micro-step of {load.tokens:,} tokens")]
    if device == "cuda":
        lines.append("Predicted by arithmetic; a run prints predicted against measured after its second step.")
    return "\n".join(lines)


def find_memory(config: RunConfig) -> tuple[str, str, int, str]:
    """Device, precision, available bytes and where that number is from. Asks torch only when the settings leave it."""
    hardware = config.hardware
    device = "cuda" if hardware.device == "auto" and hardware.vram_gib is not None else hardware.device
    free = None
    if device == "auto" or (device == "cuda" and hardware.vram_gib is None):
        import torch

        if torch.cuda.is_available():
            device, free = "cuda", torch.cuda.mem_get_info()[0]
        elif device == "auto":
            device = "cpu"
    precision = hardware.precision
    if precision == "auto":
        precision = "fp32" if device == "cpu" else "bf16"
    if device == "cpu":
        return device, precision, free_ram_bytes(), "free memory"
    stated = None if hardware.vram_gib is None else int(hardware.vram_gib * GIB) - CONTEXT_BYTES
    if free is None and stated is None:
        raise UserError(
            "hardware.vram_gib is not set and no GPU was found to ask; expected the GPU's memory. "
            "Add hardware.vram_gib=16, or name a profile such as hardware=rtx4080."
        )
    if stated is None or (free is not None and free < stated):
        return device, precision, free, "free on the GPU"
    return device, precision, stated, f"(hardware.vram_gib={hardware.vram_gib:g} less CUDA's own)"


def _run_line(config: RunConfig, device: str, precision: str, trained: int) -> str:
    quantization, adapter = config.quantization, config.adapter
    stored = f", {quantization.bnb_4bit_quant_type} weights" if quantization.load_in_4bit else ""
    stored += ", int8 weights" if quantization.load_in_8bit else ""
    what = "all weights" if adapter.kind == "full" else f"LoRA r={adapter.r}"
    trains = f"{what}, {trained:,} trained by {config.optim.optimizer}"
    return f"{config.model.name} on {device} in {precision}{stored}; {trains}"


def _data_line(lengths: Lengths, pairs: int | None) -> str:
    unit = "pairs" if lengths.sides == 2 else "rows"
    count = f"{unit} not counted" if pairs is None else f"{pairs:,} {unit}"
    counted = " (with its share of the context that draws have in common)" if lengths.keys else ""
    longest = f"longest {lengths.longest}{counted}"
    return f"{count}, mean sequence {lengths.mean:.0f} tokens, {longest}; from {lengths.source}"


def _note(name: str, choice: Choice) -> str:
    setup = choice.setup
    notes = {
        "weights": "embedding on the CPU" if setup.embeddings_on_cpu else "",
        "gradient buffers": "for pairs larger than a micro-step",
        "activations": "block inputs alone, the rest recomputed" if setup.checkpointing else "",
        "logits": "one chunk",
    }
    return notes.get(name, "")


def _budget_lines(config: RunConfig, choice: Choice, lengths: Lengths) -> list[str]:
    def text(tokens: int) -> str:
        if tokens < lengths.longest:
            return f"{tokens:,} tokens (less than the longest sequence)" if tokens else "none"
        return f"{tokens:,} tokens"

    hardware, on = config.hardware, "on" if choice.setup.checkpointing else "off"
    fitting = choice.largest[choice.setup.checkpointing]
    origin = "as set" if hardware.token_budget else "chosen" if fitting else "the smallest; none fits"
    lines = [
        f"largest micro-step that fits: {text(choice.largest[False])}; with gradient checkpointing "
        f"{text(choice.largest[True])}",
        f"token budget: {choice.token_budget:,} ({origin})",
    ]
    if max(choice.largest.values()) < lengths.longest:
        lines.append(f"gradient checkpointing: {on}; the longest sequence fits neither with nor without")
    elif hardware.gradient_checkpointing is not None:
        needed = "needed" if choice.largest[False] < max(choice.token_budget, lengths.longest) else "not needed"
        lines.append(f"gradient checkpointing: {on} (as set); {needed} for this budget")
    elif choice.setup.checkpointing:
        is_needed = choice.largest[False] < lengths.longest
        why = "needed" if is_needed else "not needed, but the larger micro-step is faster"
        lines.append(f"gradient checkpointing: on ({why})")
    else:
        lines.append("gradient checkpointing: off, not needed")
    return lines


def _hours_line(config: RunConfig, choice: Choice, lengths: Lengths, pairs: int | None, device: str) -> str:
    speed = device_speed(config) or (measured_cpu_speed(choice.setup.shape, lengths) if device == "cpu" else None)
    if speed is None:
        return "time: unknown without hardware.tflops; dry_run=true measures it"
    what = "reference and training" if LOSSES[config.dpo.loss].needs_reference else "training"
    if config.dpo.focus == "surprise":
        what = f"surprising tokens, {what}"
    work, unit = work_of(config, lengths, pairs), what
    if work is None:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, random_sample_size=10_000))
        work, unit = work_of(config, lengths, 10_000), f"10,000 pairs of {what}"
    count, per_step = processes(config.hardware), pairs_per_step(config.optim, config.hardware)
    share = dataclasses.replace(work, tokens=work.tokens / count, masked=work.masked / count)
    steps = work.tokens / (lengths.sides * config.dpo.diffusion_samples * work.length * per_step)
    exchange = exchange_seconds(choice.setup, work, choice.token_budget, count, steps)
    low, high = (s + exchange for s in predicted_seconds(choice.setup, share, choice.token_budget, speed))
    line = (
        f"time: {duration(low)} to {duration(high)} for {unit} ({work.tokens:,.0f} tokens under all draws; "
        f"{speed.tflops:.3g} TFLOPS, of which runs reach about half); evaluation comes on top"
    )
    if count > 1:
        line += (
            f"\non {count} processes in steps of {per_step:,} pairs: {count * low / 3600:,.0f} to "
            f"{count * high / 3600:,.0f} GPU hours, of which {exchange / low:.1%} or less for exchanges between them"
        )
    return line
