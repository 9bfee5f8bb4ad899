"""How long a run is and what its loop is told: steps, rates, when to save and to measure."""

from __future__ import annotations

import math
import sys

from laddpo.core.loop import LoopSettings
from laddpo.hardware.planning import pairs_per_step
from laddpo.processes.ranks import here
from laddpo.settings.schema import RunConfig
from laddpo.training.validation import LOSS


def total_steps(config: RunConfig, item_count: int) -> int:
    """Optimizer steps of a run over `item_count` rows."""
    optim = config.optim
    if optim.max_train_steps is not None:
        return optim.max_train_steps
    return math.ceil(optim.num_train_epochs * math.ceil(item_count / pairs_per_step(config)))


def loop_settings(
    config: RunConfig,
    item_count: int,
    best_metric: str | None,
    *,
    has_pairs: bool = True,
    from_scratch: bool = False,
) -> LoopSettings:
    """The loop's settings for a run over `item_count` rows: pairs, which have a chosen side to watch, or SFT rows."""
    optim, stopping = config.optim, config.stopping
    is_watched = config.evaluation.every_steps is not None and config.best_metric != "none"
    return LoopSettings(
        seed=config.seed,
        total_steps=min(total_steps(config, item_count), 2 if config.dry_run else sys.maxsize),
        items_per_step=pairs_per_step(config),
        learning_rate=optim.learning_rate,
        lr_scheduler_type=optim.lr_scheduler_type,
        num_warmup_steps=optim.num_warmup_steps,
        max_grad_norm=optim.max_grad_norm or 0.0,
        save_steps=config.save_steps or 0,
        save_minutes=config.save_minutes or 0.0,
        save_total_limit=config.save_total_limit or 0,
        logging_steps=config.logging_steps,
        eval_steps=config.evaluation.every_steps or 0,
        eval_at_start=not from_scratch,  # random weights answer nothing, and at full length
        best_metric=best_metric,
        higher_is_better=best_metric != LOSS,
        patience=(stopping.patience or 0) if is_watched else 0,
        max_chosen_fall=(stopping.max_chosen_fall or 0.0) if has_pairs else 0.0,
        skip_nonfinite=optim.skip_nonfinite,
    )


def warmup_note(config: RunConfig, settings: LoopSettings) -> None:
    """Say that the run ends within its warm-up. How many steps its epochs are is known only once the rows are counted;
    laddpo/settings/checks.py says it of a given number of steps."""
    from_epochs = config.optim.max_train_steps is None and not config.dry_run
    if from_epochs and settings.total_steps < settings.num_warmup_steps and here().is_main:
        print(
            f"note: optim.num_train_epochs={config.optim.num_train_epochs:g} are {settings.total_steps} steps on these "
            f"rows, which end within the warm-up of optim.num_warmup_steps={settings.num_warmup_steps}: the learning "
            "rate never reaches its value. Lower optim.num_warmup_steps, or train longer.",
            file=sys.stderr,
        )
