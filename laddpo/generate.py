"""generate: not built yet."""

from __future__ import annotations

from pathlib import Path

from laddpo.app import run_stage
from laddpo.errors import UserError
from laddpo.settings import RunConfig


def main(config: RunConfig, run_folder: Path) -> None:
    raise UserError("not built yet.")


if __name__ == "__main__":
    run_stage("generate", main)
