"""docs/quickstart.ipynb: every cell runs, in order, in one process, and the model learns what the text says."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import REPOSITORY

NOTEBOOK = json.loads((REPOSITORY / "docs" / "quickstart.ipynb").read_text(encoding="utf-8"))
CODE = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
RUN = """
import json, sys
names = {"__name__": "__main__"}
for number, source in enumerate(json.load(sys.stdin)):
    exec(compile(source, f"cell {number}", "exec"), names)
    print(f"cell {number} ran", flush=True)
print("before and after:", names["before"], names["after"], len(names["fresh"]))
"""


FEWER = {  # pairs, questions, scores, steps
    "[:48], list(rows.values())[48:88]": "[:12], list(rows.values())[48:51]",
    "fresh[:8]": "fresh[:2]",
    "max_steps=10": "max_steps=2",
    "batch_size=12": "batch_size=4",
}


def run_cells(folder: Path, sources: list[str]) -> tuple[int, int, int]:
    """How many fresh stories are right before and after, and how many there are."""
    command = [sys.executable, "-c", RUN]
    done = subprocess.run(command, input=json.dumps(sources), capture_output=True, text=True, cwd=folder, timeout=900)
    assert done.returncode == 0, done.stderr
    assert re.findall(r"cell (\d+) ran", done.stdout) == [str(number) for number in range(len(CODE))]
    before, after, asked = map(int, re.search(r"before and after: (\d+) (\d+) (\d+)", done.stdout).groups())
    assert f"base {before}, tuned {after} of {asked}" in done.stdout
    assert list((folder / "outputs" / "train").glob("*/manifest.json"))
    return before, after, asked


def test_every_cell_runs(tmp_path):
    sources = ["".join(cell["source"]) for cell in CODE]
    for long, short in FEWER.items():
        assert sum(long in source for source in sources) == 1, long
        sources = [source.replace(long, short) for source in sources]
    assert run_cells(tmp_path, sources)[2] == 3


@pytest.mark.long
def test_the_habit_is_mended(tmp_path):
    before, after, asked = run_cells(tmp_path, ["".join(cell["source"]) for cell in CODE])
    assert asked == 40 and before < 25 and after > before + 10, (before, after)


def test_the_notebook_is_kept_without_outputs_and_its_cells_are_python():
    assert (NOTEBOOK["nbformat"], NOTEBOOK["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in NOTEBOOK["cells"]}) == len(NOTEBOOK["cells"])
    for cell in CODE:
        assert (cell["outputs"], cell["execution_count"]) == ([], None), cell["id"]
        compile("".join(cell["source"]), cell["id"], "exec")
