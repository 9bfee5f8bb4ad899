"""Pairs from graded candidate solutions: right over wrong, limited per question, the same in any order."""

import json
from collections import Counter

import pytest

from laddpo.errors import UserError
from laddpo.preference.reading.bad_rows import BadRow
from laddpo.preference.reading.files import ReadLog
from laddpo.preference.sources import Request, open_source
from laddpo.problems.grading import FunctionGrader, math_grader, same_final_number

GRADER = FunctionGrader("final number", same_final_number)
QUESTIONS = [
    {"question": "6*7?", "answer": "six times seven\n#### 42", "candidates": ["so 42", "it is 42.0", "so 41", "no"]},
    {"question": "1+1?", "answer": "#### 2", "candidates": ["2", "= 2"]},
    {"question": "2+2?", "answer": "#### 4", "candidates": ["5"]},
]
COLUMNS = {"prompt": "question"}


def read(path, rows, grader=GRADER, **asked):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    log = ReadLog()
    request = Request(dataset_name=str(path), grader=grader, **{"columns": COLUMNS, **asked})
    return list(open_source("graded_candidates").read(request, log)), log


def test_right_candidates_are_preferred_over_wrong_ones(tmp_path):
    pairs, log = read(tmp_path / "a.jsonl", QUESTIONS)
    assert {(pair.chosen, pair.rejected) for pair in pairs} == {
        (right, wrong) for right in ("so 42", "it is 42.0") for wrong in ("so 41", "no")
    }
    assert {pair.answer for pair in pairs} == {"42"}
    assert log.warnings == {
        "questions with no wrong candidate, which give no pair": 1,
        "questions with no right candidate, which give no pair": 1,
    }


def test_pairs_of_a_question_are_limited_and_use_different_candidates_first(tmp_path):
    candidates = [f"{i}: 42" for i in range(6)] + [f"{i}: 41" for i in range(6)]
    row = {"question": "6*7?", "answer": "42", "candidates": candidates}
    pairs, log = read(tmp_path / "a.jsonl", [row], pairs_per_question=6)
    assert len(pairs) == 6
    for side in ("chosen", "rejected"):
        assert set(Counter(getattr(pair, side) for pair in pairs).values()) == {1}
    assert log.warnings["pairs left out because their question has more than data.pairs_per_question"] == 30
    turned = {**row, "candidates": candidates[::-1]}
    assert {p.id for p in read(tmp_path / "b.jsonl", [turned], pairs_per_question=6)[0]} == {p.id for p in pairs}
    assert {p.id for p in read(tmp_path / "b.jsonl", [row], pairs_per_question=6, seed=1)[0]} != {p.id for p in pairs}


def test_candidates_in_files_of_their_own_are_joined_by_question(tmp_path):
    beside, _ = read(tmp_path / "a.jsonl", QUESTIONS)
    outputs = [{"question": row["question"], "candidate": text} for row in QUESTIONS for text in row["candidates"]]
    outputs.append({"question": "unknown?", "candidate": "1"})
    (tmp_path / "outputs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in outputs))
    questions = [{"question": row["question"], "answer": row["answer"]} for row in QUESTIONS]
    joined, log = read(tmp_path / "q.jsonl", questions, candidates_name=str(tmp_path / "outputs.jsonl"))
    assert {pair.id for pair in joined} == {pair.id for pair in beside}
    assert log.warnings["candidates whose question is not among the questions"] == 1


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"question": "q", "answer": "1"}, "candidates: field missing"),
        ({"question": "q", "candidates": ["1"]}, "answer: field missing"),
        ({"question": "q", "answer": "1", "candidates": "1"}, "candidates: is not a list of texts"),
        ({"question": "q", "answer": "1", "candidates": ["1", ""]}, "candidates[1]: is empty"),
        ({"question": "q", "answer": 1, "candidates": ["1"]}, "answer: is an int (1)"),
    ],
)
def test_rows_that_cannot_be_graded_are_bad_rows(row, words, tmp_path):
    (bad,), _ = read(tmp_path / "a.jsonl", [row])
    assert isinstance(bad, BadRow) and words in str(bad)


def test_a_grader_is_needed_and_stands_in_the_identity(tmp_path):
    with pytest.raises(UserError, match="a grader"):
        read(tmp_path / "a.jsonl", QUESTIONS, grader=None)
    with pytest.raises(UserError, match=r"data\.pairs_per_question is 0"):
        read(tmp_path / "a.jsonl", QUESTIONS, pairs_per_question=0)
    source = open_source("graded_candidates")
    named = source.identity(Request(dataset_name=str(tmp_path / "a.jsonl"), grader=GRADER))
    assert named["grader"] == "final number"


def test_math_verify_grades_what_a_plain_comparison_cannot(tmp_path):
    pytest.importorskip("math_verify")
    grader = math_grader()
    row = {"question": "half?", "answer": "$\\frac{1}{2}$", "candidates": ["$0.5$", "$\\frac{1}{3}$"]}
    try:
        pairs, _ = read(tmp_path / "a.jsonl", [row], grader=grader)
    finally:
        grader.close()
    assert [(pair.chosen, pair.rejected) for pair in pairs] == [("$0.5$", "$\\frac{1}{3}$")]


def test_real_solutions_make_the_pairs_that_they_came_from(shared_folder, tmp_path):
    data = shared_folder / "data"
    rows = [json.loads(line) for line in (data / "gsm8k_preferences.jsonl").read_bytes().splitlines()]
    gold = {}
    for line in (data / "gsm8k_test_first1000.jsonl").read_bytes().splitlines():
        row = json.loads(line)
        gold[row["question"]] = row["answer"]
    solutions: dict[str, dict[str, None]] = {}
    for row in rows[:300]:
        solutions.setdefault(row["prompt"], {}).update({row["chosen"]: None, row["rejected"]: None})
    questions = [{"question": q, "answer": gold[q], "candidates": list(texts)} for q, texts in solutions.items()]
    pairs, _ = read(tmp_path / "a.jsonl", questions, pairs_per_question=100)
    built = {(pair.prompt[0].content, pair.chosen, pair.rejected) for pair in pairs}
    wanted = {(row["prompt"], row["chosen"], row["rejected"]) for row in rows[:300]}
    assert len(wanted - built) <= 3  # a few solutions state their answer in a way that only a person reads
