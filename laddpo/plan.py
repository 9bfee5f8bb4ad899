"""What a run of train will need, before anything is loaded: memory by part, the largest micro-step that fits, hours.

    python -m laddpo.plan model=llada_8b hardware=rtx4080
    python -m laddpo.plan model=llada_8b hardware=rtx4080 hardware.vram_gib=8       what would fit there
    python -m laddpo.plan model=llada_8b hardware=h100 hardware.processes=8         eight of them
    python -m laddpo.plan                                                           the embedded model on this machine

Needs no weights and no network. Lengths come from prepared data if there are any, else from data.length_quantiles.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING

from laddpo.cli.app import run_stage
from laddpo.errors import Damaged, UserError
from laddpo.settings.schema import RunConfig

if TYPE_CHECKING:
    from laddpo.hardware.planning import Lengths


def main(config: RunConfig, run_folder: Path) -> None:
    """Print the plan."""
    from laddpo.hardware.plan_text import plan_text

    print(plan_text(config, *find_lengths(config)))


def find_lengths(config: RunConfig) -> tuple[Lengths, int | None]:
    """Lengths of the prepared pairs and their number; assumed ones, and the number if the settings give one."""
    from laddpo.hardware.planning import assumed_lengths
    from laddpo.inputs.data import data_lengths, row_lengths

    prepared = _prepared(config)
    if prepared is not None:
        return data_lengths(prepared, config.dpo, config.model), len(row_lengths(prepared, config.dpo))
    data = config.data
    pairs = data.random_sample_size or (data.num_pairs if data.source == "arithmetic" else None)
    return assumed_lengths(config), pairs


def _prepared(config: RunConfig):
    """The prepared pairs of this configuration, if they are there: their key needs the tokenizer, a local one."""
    if not any((Path(config.paths.data_dir) / "prepared").glob(f"{config.data.source}-*/manifest.json")):
        return None
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from laddpo.preference.preparation import find_prepared
    from laddpo.preference.prepared import kind_of_folder
    from laddpo.training.pairs import _arguments

    try:
        # auto: nothing is sampled to find out
        folder = find_prepared(*_arguments(dataclasses.replace(config, auto=False)))
        return kind_of_folder(folder).load(folder) if folder else None
    except Damaged:
        raise
    except UserError:
        return None


if __name__ == "__main__":
    run_stage("plan", main)
