"""Folders that commit cf5343a made: every later version goes on with them, evaluates, exports and reports them.

tests/old_folders/cf5343a.tar.xz holds model/ (random weights), data/ (prepared pairs, two reference stores) and in
outputs/ a finished run, the same run stopped after its fourth step of six, and a sweep of two jobs.
"""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from laddpo.cli.app import cli

OLD = Path(__file__).resolve().parents[1] / "old_folders" / "cf5343a.tar.xz"
FINISHED, UNFINISHED = "outputs/train/finished", "outputs/train/unfinished"


@pytest.fixture
def old(tmp_path, monkeypatch) -> Path:
    """The folders in a working directory of their own."""
    with tarfile.open(OLD) as content:
        content.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def lines(path: str) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def numbers(tree, prefix: str = "") -> dict[str, float]:
    """All numbers of a JSON value by their place."""
    if isinstance(tree, dict | list):
        parts = tree.items() if isinstance(tree, dict) else enumerate(tree)
        return {place: value for key, inner in parts for place, value in numbers(inner, f"{prefix}/{key}").items()}
    return {prefix: float(tree)} if isinstance(tree, int | float) else {}


def test_no_place_of_a_machine_is_in_the_old_folders(old):
    found = [path for path in old.rglob("*") if path.is_file() and b"/home/" in path.read_bytes()]
    assert not found and OLD.stat().st_size < 200_000


def test_an_unfinished_run_goes_on_to_what_it_would_have_been(old, capsys):
    from safetensors.numpy import load_file

    assert cli("train", ["resume=true", f"output_dir={UNFINISHED}", "model.model_name_or_path=model", "seed=42"]) == 0
    shown = capsys.readouterr().out
    assert "resuming at step 4" in shown and shown.count("kept no fingerprint of") == 1
    assert "already prepared" in shown, "the key of prepared pairs is as it was"
    assert "pairs are in data/reference" in shown and "computing" not in shown, "and that of the reference"
    assert len(list(Path("data/prepared").iterdir())) == 1 and len(list(Path("data/reference").iterdir())) == 2
    again, once = (lines(f"{run}/metrics.jsonl") for run in (UNFINISHED, FINISHED))
    assert numbers(again) == pytest.approx(numbers(once), rel=1e-4, abs=1e-6)
    weights = [load_file(f"{run}/adapter_last/adapter_model.safetensors") for run in (UNFINISHED, FINISHED)]
    for name, tensor in weights[1].items():
        np.testing.assert_allclose(weights[0][name], tensor, rtol=1e-3, atol=1e-6)


def test_a_finished_run_is_evaluated_exported_and_reported(old, capsys):
    assert cli("evaluate", [f"run={FINISHED}", "output_dir=e"]) == 0
    again, once = (json.loads(Path(path, "results.json").read_text()) for path in ("e", f"{FINISHED}/evaluation"))
    assert numbers(again) == pytest.approx(numbers(once), rel=1e-4, abs=1e-5)
    assert capsys.readouterr().out.count("kept no fingerprint of") == 1
    assert cli("export", [f"run={FINISHED}", "output_dir=x"]) == 0
    assert cli("generate", ["run=outputs/sweep/two/1", "prompt=hello", "output_dir=g"]) == 0
    assert cli("report", [f"runs=[{FINISHED},e]", "output_dir=r"]) == 0
    assert cli("report", ["run=outputs/sweep/two", "output_dir=s"]) == 0
    assert "dpo.beta" in Path("s/report.html").read_text()
    assert cli("train", [f"resume={FINISHED}"]) == 0
    assert "this run is finished" in capsys.readouterr().out
