"""Rows in, token ids out: reads preference data, checks every row, applies the chat template, reports what it did.

    python -m laddpo.prepare                                                     the embedded arithmetic pairs
    python -m laddpo.prepare data=jsonl data.dataset_name=my_pairs.jsonl         prompt, chosen, rejected a line
    python -m laddpo.prepare model=llada_8b data=hh_rlhf                         Anthropic/hh-rlhf for LLaDA-8B
    python -m laddpo.prepare data=onpolicy                                       from the model's own graded answers

Writes data/prepared/<name>-<key>/: pairs.jsonl, tokens.safetensors, report.json, report.png, manifest.json.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from laddpo.cli.app import run_stage
from laddpo.settings.schema import RunConfig

if TYPE_CHECKING:
    pass
from laddpo.training.pairs import prepare


def main(config: RunConfig, run_folder: Path) -> None:
    """Prepare the configured data, or find it prepared."""
    import signal

    # the folder in the making is removed on the way out; nothing else is at stake
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    from laddpo.training.on_policy import with_run

    print(prepare(with_run(config)).folder)


if __name__ == "__main__":
    run_stage("prepare", main)
