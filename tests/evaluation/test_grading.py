"""Grading of whole texts, and workers that hang, die or cannot start."""

import os
import time
from decimal import Decimal

import pytest

from laddpo.errors import UserError
from laddpo.problems.grading import (
    READY,
    WorkerGrader,
    answer_part,
    final_number,
    math_grader,
    same_final_number,
    text_grader,
)


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


@pytest.mark.parametrize("answer", ["\\frac{1}{4}", "1/2", "p - q", "1,-2", "(5,\\infty)", "x^2+1"])
def test_a_formula_is_not_graded_by_its_last_number(monkeypatch, answer):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for grade in (
        lambda: math_grader([answer]),
        lambda: text_grader("math", ["18", answer]),
        lambda: math_grader().grade_all(["so 4"], [answer]),
    ):
        with pytest.raises(UserError, match=r"is not one plain number, and math-verify.*pip install 'laddpo\[eval\]'"):
            grade()


def test_numbers_with_what_they_count_are_graded_without_math_verify(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    answers = ["18", "$1,080.50", "$7$", "-5", "50%", "5 apples", "so\n#### 42"]
    assert all(math_grader(answers).grade_all(["18", "1080.5", "7", "= -5", "50%", "5", "42"], answers))


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("so \\boxed{\\frac{1}{2}}, as said", "\\frac{1}{2}"),
        ("first \\boxed{3}, then \\boxed {4}", "4"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("\\boxed{3} and \\boxed{4", "3"),
        ("\\boxed{4", "\\boxed{4"),
        ("\\boxed{4}\n#### 5", "5"),
    ],
)
def test_the_last_closed_box_states_the_answer(text, part):
    assert answer_part(text) == part


@pytest.fixture(scope="module")
def math_verify():
    pytest.importorskip("math_verify", reason="math-verify (extra `eval`) is not installed")
    grader = math_grader()
    yield grader
    grader.close()


def test_math_verify_grades_what_a_numeric_comparison_cannot(math_verify):
    texts = ["so \\boxed{\\frac{1}{2}}", "#### $1,080.00", "the answer is 19", "no idea", "\\boxed{9^{9^{9^{9}}}}"]
    assert math_verify.grade_all(texts, ["0.5", "1080", "18", "18", "3"]) == [True, True, False, False, False]
    assert math_verify.name.startswith("math-verify ")


GOLDS = [  # gold answer, one that is right, one that is wrong
    ("x^2+1", "\\boxed{x^2+1}", "\\boxed{x^2+2}"),
    ("2\\sqrt{13}", "\\boxed{\\sqrt{52}}", "\\boxed{2}"),
    ("p - q", "\\boxed{p - q}", "\\boxed{q - p}"),
    ("(5,\\infty)", "\\boxed{(5, \\infty)}", "\\boxed{[5, \\infty)}"),
    ("\\left( 3, \\frac{\\pi}{2} \\right)", "\\boxed{(3, \\frac{\\pi}{2})}", "\\boxed{3}"),
    ("\\text{Evelyn}", "\\boxed{\\text{Evelyn}}", "\\boxed{\\text{Evan}}"),
    ("0.5", "\\boxed{\\frac12}", "\\boxed{2}"),
    ("\\frac{3}{4}", "so $x = \\frac{3}{4}$", "\\boxed{\\frac{1}{4}}"),
    ("6 - 5i", "\\boxed{6 - 5i}", "\\boxed{5}"),
    ("1,-2", "\\boxed{-2, 1}", "\\boxed{1}"),
    ("10,\\!000", "\\boxed{10000}", "\\boxed{10}"),
    ("10\\%", "\\boxed{10\\%}", "\\boxed{11\\%}"),
    ("50%", "\\boxed{50\\%}", "\\boxed{5\\%}"),
    ("\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", "\\boxed{\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}}", "\\boxed{2}"),
    ("$\\frac{1}{2}$", "\\boxed{$0.5$}", "#### 2"),
    ("$1,080", "#### 1080 dollars", "#### 80"),
    ("70,000", "first \\boxed{3}, then \\boxed{70000}", "first \\boxed{70000}, then \\boxed{3}"),
]


@pytest.mark.parametrize(("gold", "right", "wrong"), GOLDS)
def test_formulas_are_compared_by_value_whole(math_verify, gold, right, wrong):
    assert math_verify.grade_all([right, wrong], [gold, gold]) == [True, False]


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
    grader = WorkerGrader("moody", serve_moody, answer_s=20)
    try:
        assert grader.grade_all(["1", "die", "1", "2"], ["1"] * 4) == [True, False, True, False]
        grader._answer_s, started = 0.5, time.monotonic()
        assert grader.grade_all(["hang"], ["1"]) == [False]
        assert time.monotonic() - started < 50
        grader._answer_s = 20
        assert grader.grade_all(["1", "2"], ["1"] * 2) == [True, False]
    finally:
        grader.close()


def test_a_worker_that_cannot_start_is_an_error_not_a_row_of_wrong_answers():
    grader = WorkerGrader("broken", serve_nothing)
    with pytest.raises(UserError, match="broken: the worker process could not start"):
        grader.grade_all(["1"], ["1"])
