"""The problems with five marks: what has which mark, the corpus that breaks them, the judge that counts them."""

from __future__ import annotations

import numpy as np
import pytest
from transformers import AutoTokenizer

from laddpo.errors import UserError
from laddpo.preference.embedded import arithmetic
from laddpo.preference.embedded.rubric import DIFFICULTY, MARKS, corpus, count_marks, grade, marks, with_faults
from laddpo.problems.tasks import TaskOptions, load_task
from laddpo.settings.compose import compose
from laddpo.settings.ranges import CONF_DIR
from laddpo.training.on_policy import graded_or_rated, open_questions

RIGHT = "07+15=22;22-04=18#18"


@pytest.mark.parametrize(
    ("text", "missing"),
    [
        (RIGHT, set()),
        (f" {RIGHT}\n", set()),
        ("07+15=22;22-04=28#28", {"carry"}),
        ("07+15~22;22-04=18#18", {"equals_1"}),
        ("07+15=22,22-04=18#18", {"semicolon"}),
        ("07+15=22;22-04~18#18", {"equals_2"}),
        ("07+15=22;22-04=18:18", {"hash"}),
        ("07+15~22,22-04~28:28", set(MARKS)),
        ("07+15=22#22", set(MARKS)),
        ("", set(MARKS)),
    ],
)
def test_each_mark_is_right_or_wrong_by_itself(text, missing):
    assert {name for name, has in marks(text, "18").items() if not has} == missing
    assert count_marks(text, "18") == 5 - len(missing) and grade(text, "18") is (not missing)


def test_the_corpus_breaks_each_mark_in_its_share_and_independently():
    rows = list(corpus(2000, 1.0, 0.8, 7, "drop_carry"))
    drawn = [arithmetic.problem("train", index, 7, DIFFICULTY) for index in range(2000)]
    found = np.array([list(marks(row.response, one.answer).values()) for row, one in zip(rows, drawn, strict=True)])
    assert found[:, 1:].mean(axis=0) == pytest.approx([0.2] * 4, abs=0.03)
    shows = np.array([arithmetic.mistaken_solution(one) is not None for one in drawn])
    assert not found[shows, 0].any() and found[~shows, 0].all(), "the habit shows where there is a carry"
    assert np.abs(np.corrcoef(found[:, 1:].T) - np.eye(4)).max() < 0.1
    assert grade(next(corpus(1, 0.0, 0.0, 7, "drop_carry")).response, drawn[0].answer)


def test_a_broken_answer_has_as_many_tokens_as_a_right_one():
    tokenizer = AutoTokenizer.from_pretrained(CONF_DIR.parent / "data" / "llada_nano")
    broken = with_faults(RIGHT, [True] * 4)
    assert broken == "07+15~22,22-04~18:18" and len(tokenizer.encode(broken)) == len(tokenizer.encode(RIGHT)) == 20


def test_the_task_says_which_marks_an_answer_has():
    task = load_task("rubric", TaskOptions(limit=3, seed=1))
    assert task.grade("07+15=22;22-04=18#18", "18") and task.marks(RIGHT, "18")["hash"]
    assert task.fields["marks"] == list(MARKS) and len(task.items) == 3


def test_the_judge_counts_marks(tmp_path):
    config = compose(["data=rubric", "data.sampling.num_questions=2", f"paths.data_dir={tmp_path}"])
    questions = open_questions(config)
    grader, rater = graded_or_rated(config, questions)
    assert grader is None and len(questions) == 2
    assert rater.rate(questions[0].text, [RIGHT, "07+15~22;22-04=18#18", "?"], "18") == [5.0, 4.0, 0.0]
    assert rater.fields() == {"judge": "rule", "rule": "marks", "grader": "number of marks of rubric", "tie": 0.0}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["data=onpolicy", "data.judge.kind=rule", "data.judge.rule=marks"],
            "ones with marks; write data=rubric",
        ),
        (
            ["evaluation=winrate", "evaluation.judge.kind=rule", "evaluation.judge.rule=marks"],
            "which only data.judge has; write evaluation=rubric",
        ),
        (["data=rubric", "evaluation.temperatures=[-1]"], "evaluation.temperatures is -1"),
        (["best_metric=mean_marks"], "whose answers have no marks; use evaluation=rubric"),
        (["evaluation.temperatures=[0]"], "names one twice"),
        (["data=rubric", "sft.fault_rate=2"], "sft.fault_rate is 2.0"),
    ],
)
def test_marks_are_counted_where_there_are_some(settings, message):
    with pytest.raises(UserError, match=message):
        compose(settings)
