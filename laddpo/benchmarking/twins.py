"""One run done twice, in processes of their own: what the device or the packing changes, and nothing else differs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

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
