"""Finished runs as one page: what was trained, how it went, what came out; a sweep as a heat map and a sorted table.

    python -m laddpo.report run=outputs/train/<run>                  one run
    python -m laddpo.report runs=[outputs/train/a,outputs/train/b]   several beside each other
    python -m laddpo.report run=outputs/sweep/<sweep>                 all jobs of a sweep

Writes report.html, which holds its pictures and needs no network, and the pictures as plots/*.png.
"""

from __future__ import annotations

from pathlib import Path

from laddpo.cli.app import run_stage
from laddpo.errors import UserError
from laddpo.settings.schema import RunConfig


def main(config: RunConfig, run_folder: Path) -> None:
    """Report on the folders that `run` and `runs` name."""
    from laddpo.results.run_pages import report_page
    from laddpo.results.runs import find_runs
    from laddpo.storage import atomic
    from laddpo.storage.folders import owned

    folders = [Path(text) for text in (*([config.run] if config.run else []), *config.runs)]
    if not folders:
        raise UserError(
            "neither run nor runs is set; expected folders of runs or of a sweep: run=outputs/train/<run>, or "
            "runs=[outputs/train/a,outputs/train/b]."
        )
    found = find_runs(folders)
    with owned(run_folder, "report"):
        atomic.write_text(run_folder / "report.html", report_page(found, config.report, run_folder / "plots"))
    print(f"page: {run_folder / 'report.html'}")
    print(run_folder)


if __name__ == "__main__":
    run_stage("report", main)
