"""docs/quickstart.ipynb: every cell runs, in order, in one process, and the model learns what the text says."""

from __future__ import annotations

import json
import re
import subprocess
import sys

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


def test_every_cell_runs_and_the_habit_is_mended(tmp_path):
    sources = json.dumps(["".join(cell["source"]) for cell in CODE])
    command = [sys.executable, "-c", RUN]
    done = subprocess.run(command, input=sources, capture_output=True, text=True, cwd=tmp_path, timeout=900)
    assert done.returncode == 0, done.stderr
    assert re.findall(r"cell (\d+) ran", done.stdout) == [str(number) for number in range(len(CODE))]
    before, after, asked = map(int, re.search(r"before and after: (\d+) (\d+) (\d+)", done.stdout).groups())
    assert f"base {before}, tuned {after} of {asked}" in done.stdout
    assert asked == 40 and before < 25 and after > before + 10, (before, after)
    assert list((tmp_path / "outputs" / "train").glob("*/manifest.json"))


def test_the_notebook_is_kept_without_outputs_and_its_cells_are_python():
    assert (NOTEBOOK["nbformat"], NOTEBOOK["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in NOTEBOOK["cells"]}) == len(NOTEBOOK["cells"])
    for cell in CODE:
        assert (cell["outputs"], cell["execution_count"]) == ([], None), cell["id"]
        compile("".join(cell["source"]), cell["id"], "exec")
