"""Grading of whole texts, and workers that hang, die or cannot start."""

import os
import time
from decimal import Decimal

import pytest

from laddpo.errors import UserError
from laddpo.evaluation.grading import READY, WorkerGrader, final_number, math_grader, same_final_number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("16 - 3 - 4 = 9 eggs.\n9 * 2 = $18 a day\n#### 18", "18"),
        ("A: 18", "18"),
        ("she pays $1,080.50.", "1080.5"),
        ("between 3 and 1,2345", "2345"),  # no thousands separator: two numbers
        ("10-5", "5"),
        ("x = -5", "-5"),
        ("a loss of $-5", "-5"),
        ("-$7", "-7"),
        ("18.0", "18"),
        (".5", "0.5"),
        ("so \\boxed{42}, as 6 * 7 says", "42"),
        ("#### 18 apples\nNow another question: 99", "18"),
        ("#### 70,000", "70000"),
    ],
)
def test_the_final_number_of_a_text_is_found(text, number):
    assert final_number(text) == Decimal(number)


@pytest.mark.parametrize("text", ["", "no number at all", "####", "#### \n", "5 apples #### none", "-$-5"])
def test_a_text_without_a_final_number_is_wrong_not_an_error(text):
    assert not same_final_number(text, "5")


def test_the_grader_says_which_it_is(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    grader = math_grader()
    assert grader.name == "numeric comparison of the final number (math-verify is not installed)"
    assert grader.grade_all(["#### 18", "#### 19"], ["18", "18"]) == [True, False]


def test_math_verify_grades_what_a_numeric_comparison_cannot():
    pytest.importorskip("math_verify", reason="math-verify (extra `eval`) is not installed")
    grader = math_grader()
    try:
        texts = ["so \\boxed{\\frac{1}{2}}", "#### $1,080.00", "the answer is 19", "no idea", "\\boxed{9^{9^{9^{9}}}}"]
        assert grader.grade_all(texts, ["0.5", "1080", "18", "18", "3"]) == [True, True, False, False, False]
        assert grader.name.startswith("math-verify ")
    finally:
        grader.close()


def serve_moody(pipe):
    """Grades by equality, but hangs on "hang" and dies on "die"."""
    pipe.send(READY)
    while True:
        text, answer = pipe.recv()
        if text == "hang":
            time.sleep(60)
        if text == "die":
            os._exit(3)
        pipe.send(text == answer)


def serve_nothing(pipe):
    os._exit(1)


def test_a_text_that_hangs_or_kills_the_worker_is_wrong_and_the_next_is_graded():
    grader = WorkerGrader("moody", serve_moody, answer_s=0.5)
    started = time.monotonic()
    try:
        assert grader.grade_all(["1", "hang", "1", "die", "1", "2"], ["1"] * 6) == [
            True,
            False,
            True,
            False,
            True,
            False,
        ]
    finally:
        grader.close()
    assert time.monotonic() - started < 50


def test_a_worker_that_cannot_start_is_an_error_not_a_row_of_wrong_answers():
    grader = WorkerGrader("broken", serve_nothing)
    with pytest.raises(UserError, match="broken: the worker process could not start"):
        grader.grade_all(["1"], ["1"])
