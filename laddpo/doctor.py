"""doctor: is this machine ready? Driver, torch, quantization, hub cache, disk, versions: one table, with a fix each.

    python -m laddpo.doctor                                   this machine
    python -m laddpo.doctor model=llada_8b hardware=rtx4080   this machine, for that job

Every line is ok, warn (it will run, perhaps not as wished) or fail (it will not run; exit code 1). Nothing is changed
and nothing is sent; a few bytes are written and removed to see whether folders can be written to.
"""

from __future__ import annotations

from pathlib import Path

from laddpo.cli.app import run_stage
from laddpo.cli.machine_checks import FAIL, examine, table
from laddpo.errors import EXIT_FAULT
from laddpo.settings.redaction import redact
from laddpo.settings.schema import RunConfig


def main(config: RunConfig, run_folder: Path) -> None:
    """Print the table; exit code 1 when a line says fail."""
    findings = examine(config.hardware, config.quantization, config.model, config.paths, config.logger)
    print(redact(table(findings)))
    if any(finding.status == FAIL for finding in findings):
        raise SystemExit(EXIT_FAULT)


if __name__ == "__main__":
    run_stage("doctor", main)
