"""What settings of the hardware group contradict one another or the rest. No torch: the machine itself is not asked."""

from __future__ import annotations

from collections.abc import Iterator

from laddpo.core.optim import OPTIMIZERS
from laddpo.settings.ranges import unknown_name
from laddpo.settings.schema import RunConfig


def device_problems(config: RunConfig) -> Iterator[str]:
    hardware = config.hardware
    if hardware.device == "cpu":
        yield from (f"hardware.device is 'cpu' and {problem}" for problem in needs_cuda(config))
    if hardware.device == "cpu" and hardware.precision == "fp16":
        yield (
            "hardware.precision is 'fp16' and hardware.device is 'cpu', where float16 arithmetic is missing or slow; "
            "use hardware.precision=fp32 or bf16."
        )
    if config.model.known_block_length and hardware.attention not in BLOCK_ATTENTION:
        yield (
            f"hardware.attention is {hardware.attention!r} and {config.model.name} attends in blocks, under masks "
            f"of its own; use hardware.attention={' or '.join(BLOCK_ATTENTION)}."
        )
    if hardware.sharding == "fsdp":
        yield from (f"hardware.sharding is 'fsdp' and {problem}" for problem in unshardable(config))
    if hardware.embeddings_on_cpu and config.adapter.kind == "full":
        yield (
            "hardware.embeddings_on_cpu is true and adapter.kind is 'full'; the embedding is then trained and must be "
            "where the other weights are; use adapter=lora, or hardware.embeddings_on_cpu=false."
        )
    if hardware.embeddings_on_cpu and config.model.shape.is_tied:
        yield (
            f"hardware.embeddings_on_cpu is true and {config.model.name} has a tied head (model.shape.is_tied): the "
            "embedding is needed on the device as the head; use hardware.embeddings_on_cpu=false."
        )


def needs_cuda(config: RunConfig) -> Iterator[str]:
    """The rest of a sentence if the optimizer cannot run on a CPU."""
    name = config.optim.optimizer
    if name in OPTIMIZERS and OPTIMIZERS[name].needs_cuda:
        others = ", ".join(other for other, kind in OPTIMIZERS.items() if not kind.needs_cuda)
        yield f"optim.optimizer is {name!r}, which needs a CUDA device; use optim.optimizer={others}."


def unshardable(config: RunConfig) -> Iterator[str]:
    """What cannot be done with weights that are divided among processes."""
    hardware, quantization = config.hardware, config.quantization
    if quantization.load_in_4bit or quantization.load_in_8bit:
        yield "weights are quantized, which FSDP2 cannot divide; use quantization=none, or hardware.sharding=none."
    optimizer = config.optim.optimizer
    if optimizer in OPTIMIZERS and not OPTIMIZERS[optimizer].shards:
        able = " or ".join(name for name, kind in OPTIMIZERS.items() if kind.shards)
        yield f"optim.optimizer is {optimizer!r}, which holds no sharded state; use optim.optimizer={able}."
    if hardware.precision == "fp16":
        yield "hardware.precision is 'fp16', whose loss scale ranks would not agree on; use bf16."
    if hardware.backward not in ("auto", "two_pass"):
        yield f"hardware.backward is {hardware.backward!r}; ranks differ in what fits whole; use auto or two_pass."
    for name in ("embeddings_on_cpu", "offload_activations", "compile"):
        if getattr(hardware, name):
            yield f"hardware.{name} is true; no rank has the whole model to do that with; use hardware.{name}=false."
    if config.evaluation.block_cache != "none":
        yield "evaluation.block_cache reaches into single blocks; use evaluation.block_cache=none."
    if config.data.source == "onpolicy":
        yield "data=onpolicy samples with whole weights; sample first: python -m laddpo.prepare hardware.sharding=none."


def step_problems(config: RunConfig) -> Iterator[str]:
    """What is wrong with the single steps that the benchmark is to measure."""
    known = {**STEP_CHOICES, "optimizer": OPTIMIZERS}
    for part in ("cards", "rates"):
        for number, setting in enumerate(getattr(config.benchmark, part)):
            key = f"benchmark.{part}[{number}]"
            for field, names in known.items():
                if getattr(setting, field) not in names:
                    yield unknown_name(f"{key}.{field}", getattr(setting, field), names)
            for field, usual in (("draws", "4 draws"), ("token_budget", "2048 tokens")):
                if getattr(setting, field) < 1:
                    yield f"{key}.{field} is {getattr(setting, field)}; expected 1 or more; {usual} are usual."
            if setting.gib is not None and not setting.gib > 0:
                yield f"{key}.gib is {setting.gib:g}; expected a card's memory in GiB, such as 15; null is no cap."


BLOCK_ATTENTION = ("auto", "sdpa", "eager")
STEP_CHOICES = {
    "who": ("ours", "public_laddpo", "trl_like_full", "trl_like_chunked"),
    "work": ("train", "reference"),
    "quantization": ("none", "nf4", "int8"),
}
