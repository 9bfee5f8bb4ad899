"""GSM8K's path from a real file through `evaluation=gsm8k`: interrupted, continued, the same results."""

from __future__ import annotations

import json
import os
import shutil
import signal

import pytest

from laddpo.errors import EXIT_STOPPED


@pytest.fixture
def questions(shared_folder):
    return shared_folder / "data" / "gsm8k_test_first1000.jsonl"


def settings(stages, questions, name):
    lengths = ["evaluation.gen_length=8", "evaluation.block_length=8", "evaluation.batch_size=2"]
    where = [f"evaluation.dataset_name={questions}", f"output_dir={stages.folder / name}", "data.max_length=2048"]
    return ["evaluation=gsm8k", *where, *lengths, "evaluation.limit=8", "evaluation.confidence_threshold=0.9"]


def test_an_interrupted_gsm8k_evaluation_continues_to_the_same_results(stages, questions, monkeypatch, capsys):
    assert stages.run("evaluate", *settings(stages, questions, "whole")) == 0
    shutil.rmtree(stages.folder / "data" / "answers")  # the second one asks again

    from laddpo.evaluation import answering

    plain, calls = answering.generate, []

    def interrupted(*args, **kwargs):
        calls.append(len(args[1]))
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(*args, **kwargs)

    monkeypatch.setattr(answering, "generate", interrupted)
    assert stages.run("evaluate", *settings(stages, questions, "parts")) == EXIT_STOPPED
    parts = stages.folder / "parts"
    assert len((parts / "items.jsonl").read_text().splitlines()) == 4 and not (parts / "results.json").exists()
    assert stages.run("evaluate", *settings(stages, questions, "parts"), "resume=true") == 0
    assert calls == [2, 2, 2, 2], "no question was answered twice"
    for name in ("results.json", "items.jsonl"):
        assert (parts / name).read_bytes() == (stages.folder / "whole" / name).read_bytes()
    result = json.loads((parts / "results.json").read_text())["exact_match"]
    assert (result["items"], result["task"]["name"]) == (8, "gsm8k")
    assert "4 of 8 items are already in" in capsys.readouterr().out


def test_an_own_file_is_a_task(stages, tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"prompt": "07+15=", "answer": "22"}\n{"prompt": "01+01=", "answer": "2"}\n', encoding="utf-8")
    own = ["evaluation=file", f"evaluation.dataset_name={path}", "evaluation.gen_length=8", "evaluation.block_length=8"]
    assert stages.run("evaluate", *own, "evaluation.steps=8", f"output_dir={tmp_path / 'out'}") == 0
    assert json.loads((tmp_path / "out" / "results.json").read_text())["exact_match"]["items"] == 2
