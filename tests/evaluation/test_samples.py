"""Sampling of answers on disk: stopped and continued, split over processes, and the same texts in every case."""

from __future__ import annotations

import json
import threading

import pytest

from laddpo.errors import Stopped, UserError
from laddpo.evaluation.samples import collect_samples, is_finished
from laddpo.preference.onpolicy import Question
from laddpo.processes.signals import StopFlag
from laddpo.storage import manifests

QUESTIONS = [Question(f"{i}?", str(i)) for i in range(7)]
FIELDS = {"seed": 1}


class Model:
    """Answers with its prompt and key; stops, as by a signal, after so many batches."""

    def __init__(self, stop: StopFlag | None = None, stop_after: int = 0):
        self.batches: list[list[str]] = []
        self.stop, self.stop_after = stop, stop_after

    def __call__(self, prompts, keys):
        self.batches.append(keys)
        if self.stop is not None and len(self.batches) == self.stop_after:
            self.stop.name = "SIGTERM"
        return [f"{prompt[0].content} {key}" for prompt, key in zip(prompts, keys, strict=True)]


def collect(folder, model, stop=None, **options):
    options = {
        "count": 2,
        "batch_size": 4,
        "stop": StopFlag() if stop is None else stop,
        "say": lambda text: None,
        **options,
    }
    return collect_samples(model, QUESTIONS, options.pop("count"), folder, FIELDS, options.pop("batch_size"), **options)


def test_every_question_is_answered_as_often_as_asked(tmp_path):
    path = collect(tmp_path / "a", Model())
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["question"] for row in rows] == [question.text for question in QUESTIONS]
    assert rows[3] == {"question": "3?", "answer": "3", "answers": ["3? 3?/sample 0", "3? 3?/sample 1"]}
    assert is_finished(tmp_path / "a") and not (tmp_path / "a" / "parts").exists()


def test_a_stopped_run_goes_on_with_the_same_batches_and_ends_with_the_same_file(tmp_path):
    whole = Model()
    expected = collect(tmp_path / "whole", whole).read_bytes()
    stop = StopFlag()
    first = Model(stop, stop_after=2)
    with pytest.raises(Stopped, match="the answers so far are kept"):
        collect(tmp_path / "cut", first, stop)
    assert not is_finished(tmp_path / "cut")
    second = Model()
    assert collect(tmp_path / "cut", second).read_bytes() == expected
    assert first.batches + second.batches == whole.batches


def test_a_torn_last_line_is_answered_again(tmp_path):
    stop = StopFlag()
    with pytest.raises(Stopped):
        collect(tmp_path / "a", Model(stop, stop_after=1), stop)
    log = tmp_path / "a" / "parts" / "0-of-1" / "answers.jsonl"
    log.write_text(log.read_text()[:-9])
    assert collect(tmp_path / "a", Model()).read_bytes() == collect(tmp_path / "b", Model()).read_bytes()


def test_finished_samples_are_not_sampled_again(tmp_path):
    collect(tmp_path / "a", Model())
    again = Model()
    collect(tmp_path / "a", again)
    assert again.batches == []


def test_processes_share_the_questions_and_the_first_gathers_them(tmp_path):
    models = [Model(), Model(), Model()]
    threads = [
        threading.Thread(target=collect, args=(tmp_path / "a", models[rank]), kwargs={"rank": rank, "world": 3})
        for rank in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    assert (tmp_path / "a" / "samples.jsonl").read_bytes() == collect(tmp_path / "b", Model()).read_bytes()
    asked = [{key.split("/")[0] for batch in model.batches for key in batch} for model in models]
    assert asked == [{"0?", "3?", "6?"}, {"1?", "4?"}, {"2?", "5?"}]


def test_what_another_number_of_processes_answered_is_reused(tmp_path):
    stop = StopFlag()
    with pytest.raises(Stopped):
        collect(tmp_path / "a", Model(stop, stop_after=1), stop, rank=1, world=2, batch_size=2)
    alone = Model()
    collect(tmp_path / "a", alone, batch_size=2)
    assert "1?/sample 0" not in {key for batch in alone.batches for key in batch}
    assert len(alone.batches) == len(QUESTIONS) - 1


def test_a_changed_file_of_samples_is_named(tmp_path):
    path = collect(tmp_path / "a", Model())
    path.write_text(path.read_text().replace("3?", "4?"))
    with pytest.raises(UserError, match=r"samples\.jsonl: differs from what manifest\.json sealed"):
        is_finished(tmp_path / "a")
    assert manifests.MANIFEST in {p.name for p in (tmp_path / "a").iterdir()}
