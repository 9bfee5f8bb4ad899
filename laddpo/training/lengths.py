"""How many steps a run has."""

from __future__ import annotations

import math
import sys

from laddpo.core.loop import LoopSettings
from laddpo.hardware.planning import pairs_per_step
from laddpo.processes.ranks import here
from laddpo.settings.schema import HardwareSettings, OptimSettings


def total_steps(optim: OptimSettings, hardware: HardwareSettings, item_count: int) -> int:
    """Optimizer steps of a run over `item_count` rows."""
    if optim.max_train_steps is not None:
        return optim.max_train_steps
    return math.ceil(optim.num_train_epochs * math.ceil(item_count / pairs_per_step(optim, hardware)))


def warmup_note(optim: OptimSettings, settings: LoopSettings) -> None:
    """Say that the run ends within its warm-up. How many steps its epochs are is known only once the rows are counted;
    laddpo/settings/checks.py says it of a given number of steps."""
    from_epochs = optim.max_train_steps is None
    if from_epochs and settings.total_steps < settings.num_warmup_steps and here().is_main:
        print(
            f"note: optim.num_train_epochs={optim.num_train_epochs:g} are {settings.total_steps} steps on these "
            f"rows, which end within the warm-up of optim.num_warmup_steps={settings.num_warmup_steps}: the learning "
            "rate never reaches its value. Lower optim.num_warmup_steps, or train longer.",
            file=sys.stderr,
        )
