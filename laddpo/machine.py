"""What this machine will do with a run: device, arithmetic, micro-step size. Settings say `auto`; this decides.

A hardware profile changes memory and speed, never the quantity being optimised.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from laddpo.settings import HardwareSettings

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CPU_TOKEN_BUDGET = 4096  # long matrix products, and activations that stay within a laptop's cache and memory
GPU_TOKEN_BUDGET = 2048


@dataclass(frozen=True)
class Machine:
    """`precision` is the arithmetic's (fp32, bf16, fp16); `token_budget` the tokens of one micro-step."""

    device: torch.device
    precision: str
    token_budget: int
    attention: str
    gradient_checkpointing: bool

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.precision]

    def __str__(self) -> str:
        name = torch.cuda.get_device_name() if self.device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
        checkpointing = ", gradient checkpointing" if self.gradient_checkpointing else ""
        return f"{name}, {self.precision}, {self.token_budget} tokens per micro-step{checkpointing}"


def find_machine(hardware: HardwareSettings) -> Machine:
    """Decide what `auto` and null leave open. `check_machine` has refused what this machine cannot do."""
    if hardware.threads:
        torch.set_num_threads(hardware.threads)
    has_cuda = torch.cuda.is_available()
    device = torch.device(hardware.device if hardware.device != "auto" else "cuda" if has_cuda else "cpu")
    precision = hardware.precision
    if precision == "auto":
        precision = "fp32" if device.type == "cpu" else "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    default_budget = GPU_TOKEN_BUDGET if device.type == "cuda" else CPU_TOKEN_BUDGET
    return Machine(
        device=device,
        precision=precision,
        token_budget=hardware.token_budget or default_budget,
        attention=hardware.attention,
        gradient_checkpointing=bool(hardware.gradient_checkpointing),
    )
