"""What a person types without reading: each word gets an answer that leads on, and never a traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

import laddpo.__main__ as top
from laddpo.cli.app import cli
from laddpo.cli.machine_checks import OK, WARN, check_start
from laddpo.processes import terminal
from laddpo.results.of_jobs import jobs_table
from laddpo.results.tables import before_after_table
from tests.tiny import REPOSITORY

RESULT = {"base": 0.585, "tuned": 0.8875, "difference": 0.3025, "interval": [0.2525, 0.355], "items": 400}


@pytest.mark.parametrize(
    ("words", "code", "answer"),
    [
        ([], 0, "usage: laddpo <stage>"),
        (["-h"], 0, "usage: laddpo <stage>"),
        (["help"], 0, "usage: laddpo <stage>"),
        (["version"], 0, "laddpo "),
        (["-V"], 0, "laddpo "),
        (["trian"], 2, "did you mean laddpo train?"),
        (["data=my.jsonl"], 2, "write laddpo train data=my.jsonl"),
    ],
)
def test_the_first_word(words, code, answer, capsys):
    assert top.main(words) == code
    shown = capsys.readouterr()
    assert answer in (shown.err if code else shown.out)


@pytest.mark.parametrize(
    ("stage", "words", "answer"),
    [
        ("train", ["resume"], "write resume=true"),
        ("train", ["help"], "write --help"),
        ("train", ["beta=0.5"], "did you mean dpo.beta?"),
        ("train", ["modell=llada_8b"], "did you mean model?"),
        ("train", ["model=gpt2"], "model=org/name"),
        ("train", ["model=lada_8b"], "did you mean model=llada_8b?"),
        ("train", ["data=nothing"], "data=my_pairs.jsonl"),
        ("train", ["--config-file"], "--config-file x.yaml"),
        ("train", ["--betta", "1"], "did you mean --beta?"),
        ("generate", ["hello"], "prompt='a text'"),
        ("generate", [], "prompt="),
        ("report", [], "run=outputs/train/<run>"),
        ("export", [], "run=outputs/train/<run>"),
    ],
)
def test_words_of_a_stage_that_cannot_be_done_name_what_to_write(stage, words, answer, capsys):
    assert cli(stage, words) == 2
    shown = capsys.readouterr().err
    assert answer in shown and shown.startswith("error: ") and "Traceback" not in shown


def test_a_file_is_no_output_folder(tmp_path, capsys):
    (tmp_path / "a file").write_text("mine")
    assert cli("train", [f"output_dir={tmp_path / 'a file'}"]) == 2
    assert "output_dir" in capsys.readouterr().err and (tmp_path / "a file").read_text() == "mine"


@pytest.mark.parametrize("words", [[], ["--version"], ["train", "--help"], ["train", "--cfg", "job"], ["plan"]])
def test_a_reader_that_goes_away_ends_it_quietly(words):
    command = '"$@" | true; exit ${PIPESTATUS[0]}'
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        ["bash", "-c", command, "bash", sys.executable, "-m", "laddpo", *words],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr


@pytest.mark.parametrize("width", [60, 40])
def test_narrow_terminals_get_every_word_in_lines_that_fit(width, monkeypatch, capsys):
    results = {"exact_match": RESULT, "reward_accuracy_on_training_pairs": RESULT}
    record = {"job": 0, "overrides": ["dpo.beta=0.5"], "exit_code": 0, "results": {"exact_match": RESULT}}
    jobs = [record, {**record, "job": 1, "overrides": ["dpo.beta=1"]}]

    def all_shown() -> list[str]:
        shown = [before_after_table(results), jobs_table(jobs), top.usage()]
        assert cli("train", ["--help"]) == 0
        return [*shown, capsys.readouterr().out]

    monkeypatch.setenv("COLUMNS", "400")
    wide = all_shown()
    monkeypatch.setenv("COLUMNS", str(width))
    narrow = all_shown()
    for before, after in zip(wide, narrow, strict=True):
        missing = set(before.replace("─", "").replace(",", " ").split()) - set(after.replace(",", " ").split())
        assert not missing, "nothing is lost"
    assert all(len(line) <= width for text in narrow[:2] for line in text.splitlines())


def test_a_file_or_a_pipe_has_no_width(monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    assert terminal.hanging("a  ", "one two three four five") == "a  one two three\n   four five"
    monkeypatch.delenv("COLUMNS")
    monkeypatch.setattr(os, "get_terminal_size", lambda *fd: (_ for _ in ()).throw(OSError()))
    assert terminal.columns() is None and terminal.hanging("a  ", "b " * 200) == "a  " + "b " * 200


@pytest.mark.parametrize(("load", "status"), [(9.0, OK), (0.0, WARN)])
def test_doctor_blames_a_slow_start_on_the_machine_only_if_it_is_not_busy(load, status, monkeypatch):
    monkeypatch.setattr("laddpo.cli.machine_checks.SLOW_START_S", 0.0)
    monkeypatch.setattr(os, "getloadavg", lambda: (load, load, load), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    (finding,) = check_start()
    assert finding.status == status and ("machine is busy: 9 processes" in finding.found) == (status == OK)


def test_a_hub_download_writes_lines_into_a_log(tmp_path, monkeypatch):
    import huggingface_hub

    from laddpo.models.checkpoint_files import checkpoint_folder
    from laddpo.processes.progress import Progress

    asked = {}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **named: asked.update(named) or tmp_path)
    checkpoint_folder("org/name")
    assert asked["tqdm_class"] is Progress
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    checkpoint_folder("org/name")
    assert asked["tqdm_class"] is None, "the hub's own bar on a terminal"


def test_paths_with_blanks_and_an_ascii_locale_do_no_harm(tmp_path):
    pair = {"prompt": "1+1=", "chosen": "2", "rejected": "3"}
    rows = tmp_path / "my pairs.jsonl"
    rows.write_text("".join(json.dumps({**pair, "prompt": f"{n}+1="}) + "\n" for n in range(4)))
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "LC_ALL": "C"}
    words = ["prepare", f"data={rows}", "data.validation_fraction=0", f"paths.data_dir={tmp_path / 'a b'}"]
    done = subprocess.run(
        [sys.executable, "-m", "laddpo", *words], env=environment, capture_output=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert b"4 rows read = 4 kept" in done.stdout and list((tmp_path / "a b" / "prepared").iterdir())
