"""What this machine will do with a run: device, arithmetic, micro-step size. Where settings say `auto`, this decides.

A hardware profile changes memory and speed, never the quantity being optimised.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, replace

import torch

from laddpo.core.budget import SHARED_PASS, TokenBudget, answer_budget
from laddpo.errors import UserError
from laddpo.hardware.memory import GIB, explain, gib, predict_memory
from laddpo.hardware.planning import (
    CONTEXT_BYTES,
    Choice,
    Lengths,
    assumed_lengths,
    choose_plan,
    free_ram_bytes,
    usable,
)
from laddpo.models.bitsandbytes_import import import_bitsandbytes
from laddpo.models.quantization import DTYPES
from laddpo.processes import ranks as processes
from laddpo.settings.hardware_checks import needs_cuda, unshardable
from laddpo.settings.schema import HardwareSettings, RunConfig


@dataclass(frozen=True)
class Machine:
    """`precision` is the arithmetic's (fp32, bf16, fp16); `token_budget` the tokens of one micro-step, shared by all
    passes and halved when memory runs out, `answer_budget` that of answers; `choice` the memory plan behind it."""

    device: torch.device
    precision: str
    token_budget: TokenBudget
    attention: str
    gradient_checkpointing: bool
    offload_activations: bool
    embeddings_on_cpu: bool
    compile: bool
    choice: Choice
    answer_budget: TokenBudget
    ranks: processes.Ranks = processes.ALONE
    is_sharded: bool = False

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.precision]

    @property
    def name(self) -> str:
        """The GPU's name, or the number of CPU threads."""
        return torch.cuda.get_device_name() if self.device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"

    def __str__(self) -> str:
        options = ("gradient_checkpointing", "offload_activations", "embeddings_on_cpu", "compile", "is_sharded")
        chosen = [option.removeprefix("is_").replace("_", " ") for option in options if getattr(self, option)]
        tokens = f"{self.token_budget.tokens} tokens per micro-step"
        memory = f"predicted peak {gib(self.choice.memory.peak)} of {gib(self.choice.available)} available"
        together = [f"{self.ranks.world} processes, each on"] if self.ranks.world > 1 else []
        return " ".join([*together, ", ".join([self.name, self.precision, tokens, *chosen, memory])])


def find_machine(config: RunConfig, lengths: Lengths | None = None) -> Machine:
    """Decide what `auto` and null leave open. `check_machine` has refused what this machine cannot do.

    `lengths` of the prepared data make the plan exact; without them it assumes data.length_quantiles. Says so when the
    longest sequence is predicted not to fit; it is tried all the same.
    """
    hardware = config.hardware
    if hardware.threads:
        torch.set_num_threads(hardware.threads)
    device, ranks = find_device(hardware), processes.here()
    precision = hardware.precision
    if precision == "auto":
        precision = "fp32" if device.type == "cpu" else "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    available = available_bytes(hardware, device)
    lengths = lengths or assumed_lengths(config)
    config = settled_sharding(config, ranks, device, precision, lengths)
    choice = choose_plan(config, device.type, precision, available, lengths, ranks.world)
    if not choice.fits:
        what = f"a micro-step of {choice.memory.load.tokens} tokens"
        print(f"warning: {explain(choice.memory, usable(available), what)}")

    is_sharded = config.hardware.sharding == "fsdp"

    def too_long(tokens: int) -> str:
        memory = predict_memory(choice.setup, replace(choice.memory.load, tokens=tokens, rows=None))
        why = explain(memory, available_bytes(hardware, device), f"one sequence of {tokens} tokens")
        return f"out of memory: {why}"

    def once(start: str) -> str:
        """A pass of sharded weights that failed midway would leave the other processes waiting inside it."""
        return SHARED_PASS.format(start) if is_sharded else ""

    return Machine(
        device=device,
        precision=precision,
        token_budget=TokenBudget(choice.token_budget, too_long, why_once=once("hardware.token_budget={half}")),
        attention=hardware.attention,
        gradient_checkpointing=choice.setup.checkpointing,
        offload_activations=hardware.offload_activations,
        embeddings_on_cpu=hardware.embeddings_on_cpu,
        compile=hardware.compile,
        choice=choice,
        answer_budget=answer_budget(once("a smaller evaluation.batch_size")),
        ranks=ranks,
        is_sharded=is_sharded,
    )


def settled_sharding(
    config: RunConfig, ranks: processes.Ranks, device: torch.device, precision: str, lengths: Lengths
) -> RunConfig:
    """`auto` decided: shards where several GPUs are used, and one of them, empty, would not hold the plan.

    By the card's size and not by what is free, so that equal cards decide alike.
    """
    wanted = config.hardware.sharding
    if wanted == "fsdp" and ranks.world == 1:
        raise UserError(
            "hardware.sharding is 'fsdp' and this is one process; expected several to divide the weights among. "
            "Start it by torchrun --nproc_per_node=<GPUs> -m laddpo.train, or set hardware.sharding=none."
        )
    if wanted == "auto":
        wanted = "none"
        if ranks.world > 1 and device.type == "cuda" and not any(unshardable(config)):
            size = torch.cuda.get_device_properties(device).total_memory - CONTEXT_BYTES
            whole = dataclasses.replace(config, hardware=dataclasses.replace(config.hardware, sharding="none"))
            wanted = "none" if choose_plan(whole, device.type, precision, size, lengths, ranks.world).fits else "fsdp"
    return dataclasses.replace(config, hardware=dataclasses.replace(config.hardware, sharding=wanted))


def find_device(hardware: HardwareSettings) -> torch.device:
    """The device of the settings; `auto` takes the GPU if there is one, of several processes each its own."""
    kind = hardware.device
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    ranks = processes.launched()
    return torch.device(kind, ranks.local_rank) if kind == "cuda" and ranks.world > 1 else torch.device(kind)


def available_bytes(hardware: HardwareSettings, device: torch.device) -> int:
    """What is free for tensors now, this process's own included: never what the datasheet says."""
    if device.type == "cpu":
        return free_ram_bytes() // processes.here().local_world
    free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
    if hardware.vram_gib is None:
        return free
    return min(free, int(hardware.vram_gib * GIB) - CONTEXT_BYTES)


def check_machine(config: RunConfig) -> None:
    """Refuse what this machine cannot do: no GPU, no bf16, no quantization kernels. Imports torch; needs no weights."""
    import torch

    hardware, quantization = config.hardware, config.quantization
    has_cuda = torch.cuda.is_available()
    is_cuda = hardware.device == "cuda" or (hardware.device == "auto" and has_cuda)
    problems = []
    if is_cuda and not has_cuda:
        problems.append(
            "hardware.device is 'cuda' and torch finds no CUDA device; expected an NVIDIA driver and a CUDA build of "
            "torch; run python -m laddpo.doctor, or use hardware=cpu."
        )
    elif is_cuda and "bf16" in (hardware.precision, quantization.bnb_4bit_compute_dtype):
        major, minor = torch.cuda.get_device_capability()
        if major < 8:
            problems.append(
                f"bf16 needs compute capability 8.0 and {torch.cuda.get_device_name()} has {major}.{minor}; "
                "use hardware.precision=fp16."
            )
    if not is_cuda and hardware.device == "auto" and hardware.precision == "fp16":
        problems.append(
            "hardware.precision is 'fp16' and no CUDA device was found; float16 arithmetic is missing or slow on the "
            "CPU; use hardware.precision=auto."
        )
    if not is_cuda and hardware.device == "auto":
        problems += [f"no CUDA device was found, and {problem}" for problem in needs_cuda(config)]
    if quantization.load_in_4bit or quantization.load_in_8bit:
        import_bitsandbytes()
        try:
            import bitsandbytes  # noqa: F401
        except Exception as error:  # a broken install raises anything
            problems.append(
                f"quantization needs bitsandbytes, which cannot be imported ({type(error).__name__}: {error}); "
                "install it again, or use quantization=none."
            )
    if problems:
        raise UserError(*problems)
