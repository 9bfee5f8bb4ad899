"""What is printed, drawn or interrupted never costs a run: other terminals, closed pipes, broken fonts, signals."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys

import pytest

from laddpo.cli.app import cli
from laddpo.settings.read_settings import stage_reads
from tests.tiny import REPOSITORY

QUICK = ["optim.max_train_steps=2", "evaluation.limit=2", "evaluation.every_steps=null", "evaluation.num_pairs=2"]
QUICK += ["evaluation.samples=1", "data.num_pairs=12", "data.validation_fraction=0.5"]

CHILD = """
import json, sys
from laddpo.cli.app import cli, start_again_with_utf8

start_again_with_utf8()
from laddpo.evaluation import answering
from laddpo.evaluation.run_task import Answer
from laddpo.results import plots
from tests.composing import compose_once

compose_once()
plots.training_plot = plots.evaluation_plot = lambda *arguments, **named: None  # the report draws
answer = Answer("é 日本 \\U0001f600", 2, True)
answering.Answerer.answers = lambda self, encoded, keys: [answer for _ in encoded]
with open(sys.argv[1], encoding="utf-8") as commands:
    codes = [cli(stage, arguments) for stage, *arguments in json.load(commands)]
with open(sys.argv[2], "w", encoding="utf-8") as out:
    json.dump(codes, out)
"""


def quoted(override: str) -> str:
    key, _, value = override.partition("=")
    return override if value.isascii() else f"{key}='{value}'"


def is_read(stage: str, text: str) -> bool:
    """Whether a stage reads an override of these commands, which are made for all stages."""
    measured = ("dpo.diffusion_samples", "evaluation.diffusion_samples", "evaluation.num_pairs")
    return stage_reads(stage, text) and not (stage in ("sft", "evaluate") and text.startswith(measured))


def test_every_stage_finishes_on_a_terminal_that_cannot_show_what_it_prints(tmp_path, stages):
    home = tmp_path / "données"
    run, base = home / "run", type(stages)(home, stages.model).overrides(*QUICK)
    of_run = [text for text in base if text.startswith(("paths.", "hardware."))] + [f"run={run}"]
    few = ["variance.pairs=2", "variance.gradient_pairs=2", "variance.evaluations=3", "variance.draws=[2]"]
    commands = [
        ["plan", *base],
        ["prepare", *base],
        ["precompute", *base],
        ["train", *base, f"output_dir={run}", "best_metric=none"],
        ["sft", *base, f"output_dir={home / 'sft'}", "sft.examples=chosen"],
        ["evaluate", *of_run, f"output_dir={home / 'evaluation'}"],
        ["evaluate", *base, f"output_dir={home / 'base'}"],
        ["generate", *of_run, f"output_dir={home / 'generated'}", "prompt=où 日本?"],
        ["variance", *of_run, f"output_dir={home / 'variance'}", *few, "variance.settings=[vrpo_paper]"],
        ["export", *of_run, f"output_dir={home / 'export'}"],
        ["report", f"run={run}", f"output_dir={home / 'report'}"],
        ["train", *base, f"output_dir={run}", "best_metric=none", "resume=true"],
        ["evaluate", f"run={home / 'nowhere'}"],
    ]
    script, asked, codes = tmp_path / "child.py", tmp_path / "commands.json", tmp_path / "codes.json"
    script.write_text(CHILD, encoding="utf-8")
    commands = [[stage, *(text for text in rest if is_read(stage, text))] for stage, *rest in commands]
    asked.write_text(json.dumps([[stage, *map(quoted, rest)] for stage, *rest in commands]), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "LC_ALL": "C", "PYTHONUTF8": "0"}
    done = subprocess.run(
        [sys.executable, str(script), str(asked), str(codes)], env=environment, capture_output=True, check=False
    )
    shown, said = done.stdout.decode("ascii"), done.stderr.decode("ascii")
    assert done.returncode == 0 and "Traceback" not in said, said
    assert json.loads(codes.read_text()) == [0] * (len(commands) - 1) + [2], said
    assert "donn\\xe9es" in shown and "o\\xf9 \\u65e5\\u672c?" in shown and "\\xe9 \\u65e5\\u672c \\U0001f600" in shown
    for name in ("run", "sft", "evaluation", "base", "export"):
        assert (home / name / "manifest.json").is_file(), name
    assert "é 日本" in (home / "generated" / "generations.jsonl").read_text(encoding="utf-8")
    assert (home / "report" / "report.html").is_file() and (home / "variance" / "variance.json").is_file()


class ClosedAt(io.StringIO):
    """Output whose reader goes away at the first of these words."""

    def __init__(self, *words: str):
        super().__init__()
        self.words = words

    def write(self, text: str) -> int:
        if any(word in text for word in self.words):
            raise BrokenPipeError
        return super().write(text)


def test_what_is_printed_or_drawn_after_the_work_loses_no_run(stages, monkeypatch, capsys, with_pictures):
    from laddpo.results import plots

    def no_font(*arguments):
        raise RuntimeError("no font")

    run = stages.folder / "run"
    monkeypatch.setattr(plots, "save_png", no_font)
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", ClosedAt("kept step", "results, answers", "adapter, metrics"))
        assert stages.run("train", f"output_dir={run}", *QUICK, "best_metric=none") == 1
    shown = capsys.readouterr().err
    assert "training.png: was not drawn (RuntimeError: no font)" in shown and "Traceback" not in shown
    assert (run / "manifest.json").exists() and (run / "evaluation" / "results.json").exists()
    commands = [
        ("evaluate", "results, answers", "manifest.json"),
        ("generate", "1+1=", "generations.jsonl"),
        ("export", "loaded again", "manifest.json"),
    ]
    for stage, words, written in commands:
        folder = stages.folder / stage
        asked = ["prompt='1+1='"] if stage == "generate" else []
        with monkeypatch.context() as patched:
            patched.setattr(sys, "stdout", ClosedAt(words))
            assert stages.run(stage, f"run={run}", f"output_dir={folder}", *asked) == 1, stage
        assert (folder / written).exists(), stage
    assert cli("report", [f"run={run}", f"output_dir={stages.folder / 'report'}"]) == 0
    assert (stages.folder / "report" / "report.html").exists(), "a page without its pictures"


@pytest.mark.skipif(os.name != "posix", reason="signals are sent as POSIX has them")
def test_a_signal_during_validation_is_answered_before_the_next_micro_step(stages, monkeypatch, capsys):
    from laddpo.core import gradient
    from laddpo.training.validation import Validation

    measure, draw_values, scored = Validation.measure, gradient._draw_values, []

    def watched(self, step):
        if step == 2:
            scored.append("begun")
        return measure(self, step)

    def counted(*arguments):
        if scored:
            scored.append("micro-step")
        if len(scored) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return draw_values(*arguments)

    run = stages.folder / "run"
    settings = [*QUICK, f"output_dir={run}", "evaluation.at_end=false", "evaluation.tasks=[]", "best_metric=loss"]
    settings += ["evaluation.every_steps=2", "evaluation.num_pairs=6", "data.max_length=160"]
    settings += ["hardware.token_budget=160"]
    with monkeypatch.context() as patched:
        patched.setattr(Validation, "measure", watched)
        patched.setattr(gradient, "_draw_values", counted)
        assert stages.run("train", *settings) == 75
    assert scored == ["begun", "micro-step"], "another micro-step was begun"
    assert "stopped by SIGTERM after step 2 of 2, checkpoint saved. Continue with" in capsys.readouterr().err
    assert not list(run.rglob(".tmp-*"))
    assert stages.run("train", *settings, "resume=true") == 0
    assert (run / "manifest.json").exists()
