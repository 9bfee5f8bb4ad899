"""One run done twice, in processes of their own: what the device or the packing changes, and nothing else differs."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from laddpo.benchmarking.workload import Workbench
from laddpo.errors import RunFault
from laddpo.models.adapters import ADAPTER_FILES
from laddpo.storage.json_lines import JsonLines
from laddpo.storage.seals import sealed_file

SAME = (  # of both runs: the steps, and nothing that would be looked at on the way
    "hardware.precision=fp32",
    "data.max_length=128",
    "evaluation.at_end=false",
    "evaluation.every_steps=null",
    "evaluation.num_pairs=1",
    "stopping.patience=null",
    "best_metric=none",
    "logger=none",
)


@dataclass(frozen=True)
class Trained:
    """Losses by step, and the adapter at the end, flat. # float32 [parameters]"""

    losses: list[float]
    adapter: Tensor


def train_nano(overrides: Sequence[str], folder: Path, data: Path) -> None:
    """`python -m laddpo.train` on the embedded pairs in float32, without validation or evaluation."""
    where = [f"paths.data_dir={data}", f"output_dir={folder}"]
    command = [sys.executable, "-m", "laddpo.train", "model=llada_nano", *SAME, *where, *overrides]
    environment = {**os.environ, "TQDM_DISABLE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()[-5:]
        raise RunFault("training llada_nano, with which devices are compared, failed: " + " ".join(said))


def trained(folder: Path) -> Trained:
    """What such a run left."""
    rows = JsonLines(sealed_file(folder, "metrics.jsonl")).read()
    losses = [row["loss"] for row in rows if "loss" in row]
    adapter = load_file(sealed_file(folder / "adapter_last", ADAPTER_FILES[1]))
    return Trained(losses, torch.cat([adapter[name].flatten() for name in sorted(adapter)]))


def nano_part(bench: Workbench) -> tuple[str, dict]:
    """The embedded model trained twice from the same seed: on the CPU, and on this device (or packed otherwise)."""
    steps = bench.settings.nano_steps
    ways = {"CPU": ["hardware.device=cpu", "hardware.token_budget=4096"]}
    if bench.machine.device.type == "cuda":
        ways["this GPU"] = ["hardware.device=cuda", "hardware.token_budget=4096"]
    else:
        ways["CPU, smaller micro-steps"] = ["hardware.device=cpu", "hardware.token_budget=512"]
    with tempfile.TemporaryDirectory(prefix="laddpo-") as scratch:
        folders = {name: Path(scratch) / str(number) for number, name in enumerate(ways)}
        for name, overrides in ways.items():
            data = folders[name].with_suffix(".data")  # each computes its own reference
            train_nano([*overrides, f"optim.max_train_steps={steps}"], folders[name], data)
        text, record = nano_section({name: trained(folder) for name, folder in folders.items()})
    return f"{steps} steps of llada_nano on the embedded pairs, float32, same seed.\n\n{text}", record


def nano_section(found: Mapping[str, Trained]) -> tuple[str, dict[str, Any]]:
    """Two runs that differ by rounding alone: their losses step by step, and where they end."""
    (name, first), (other, second) = found.items()
    steps = min(len(first.losses), len(second.losses))
    gaps = np.abs(np.subtract(first.losses[:steps], second.losses[:steps]))
    apart = float((first.adapter - second.adapter).norm() / first.adapter.norm())
    record = {
        "compared": [name, other],
        "steps": steps,
        "first_loss_difference": float(gaps[0]),
        "largest_loss_difference": float(gaps.max()),
        "last_losses": [first.losses[-1], second.losses[-1]],
        "adapter_relative": apart,
        "losses": {name: first.losses, other: second.losses},
    }
    text = (
        f"{name} against {other}: losses differ by {gaps[0]:.1e} in the first step and by {gaps.max():.1e} at most; "
        f"the last are {first.losses[-1]:.6f} and {second.losses[-1]:.6f}. The adapters end {apart:.1e} apart, "
        "relative to their size."
    )
    return text, record
