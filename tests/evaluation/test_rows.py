"""Tasks read from rows: MATH-500, ARC and a user's own file; what is asked, how it is graded, what is refused."""

import json
from importlib.machinery import ModuleSpec

import pytest

from laddpo.errors import UserError
from laddpo.problems.grading import contains_text, same_choice, same_text, text_grader
from laddpo.problems.tasks import TaskOptions, load_task

MATH = {"problem": "What is $1+1$?", "answer": "2"}
ARC = {"question": "Which flies?", "choices": {"text": ["a bird", "a stone"], "label": ["A", "B"]}, "answerKey": "A"}


def load(tmp_path, name, rows, **options):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return load_task(name, TaskOptions(dataset_name=str(path), **options))


def test_math_problems_ask_for_a_boxed_answer(tmp_path):
    task = load(tmp_path, "math500", [MATH, {**MATH, "answer": "3"}], limit=1)
    (item,) = task.items
    assert item.prompt[-1].content.startswith("What is $1+1$?") and "\\boxed{}" in item.prompt[-1].content
    assert task.grade("It is \\boxed{2}.", item.answer) and not task.grade("It is \\boxed{3}.", item.answer)
    task.grader.close()


def test_formulas_without_math_verify_are_refused_and_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert load(tmp_path, "math500", [MATH]).items
    with pytest.raises(UserError, match=r"pip install 'laddpo\[eval\]'"):
        load(tmp_path, "math500", [MATH, {**MATH, "answer": "\\frac{1}{4}"}])
    with pytest.raises(UserError, match=r"evaluation\.grader=exact"):
        load(tmp_path, "file", [{"prompt": "x", "answer": "\\frac{1}{4}"}])


def test_choices_are_listed_with_their_letters(tmp_path):
    task = load(tmp_path, "arc_c", [ARC])
    assert "A. a bird\nB. a stone" in task.items[0].prompt[-1].content
    assert task.grade("A", "A") and not task.grade("B", "A")


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        ("B", "B"),
        ("(B)", "B"),
        ("The answer is B.", "B"),
        ("B. a stone", "B"),
        ("2", "2"),
        ("B is correct.", "B"),
        ("The answer is B because a stone falls", "B"),
        ("C because it flies", "C"),
        ("2 since it falls", "2"),
        ("A bird flies, so C", "C"),
        ("A is right", "A"),
        ("The answer is A because it flies", "A"),
        ("A. a bird", "A"),
    ],
)
def test_the_letter_that_stands_alone_is_the_choice(text, choice):
    assert same_choice(text, choice)
    assert not same_choice(text, "D")


def test_no_letter_is_no_choice():
    assert not same_choice("a bird", "A") and not same_choice("", "A")


def test_own_rows_may_say_prompt_or_question_and_hold_numbers(tmp_path):
    task = load(
        tmp_path, "file", [{"prompt": "2+2=", "answer": 4}, {"question": "3+3=", "answer": "6"}], grader="number"
    )
    assert [item.prompt[-1].content for item in task.items] == ["2+2=", "3+3="]
    assert task.grade("that makes 4.0", task.items[0].answer)


@pytest.mark.parametrize(
    ("answers", "name"),
    [(["4", "-1,000.5"], "math"), (["\\frac{1}{2}"], "math"), (["Paris", "4"], "equal text"), (["blue"], "equal text")],
)
def test_auto_takes_mathematics_only_where_all_answers_are(answers, name, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: ModuleSpec(name, None))
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.9")
    grader = text_grader("auto", answers)
    assert (name == "equal text") == (grader.name == "equal text")


def test_texts_are_compared_without_case_and_spaces():
    assert same_text(" paris\n", "Paris") and same_text("thinking\n#### Paris", "Paris")
    assert not same_text("Paris, France", "Paris")
    assert contains_text("It is PARIS, France", "Paris") and not contains_text("Parisian", "Paris")


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("math500", {"problem": "x"}, "rows.jsonl:1: field 'answer' is 'None', expected a number or formula"),
        ("arc_c", {**ARC, "choices": {"text": ["a"], "label": []}}, "field 'choices'"),
        ("file", {"prompt": "x"}, "field 'answer'"),
        ("file", {"prompt": " ", "answer": "x"}, "row 1 has no prompt"),
        ("file", {"prompt": "a\ud800b", "answer": "x"}, "rows.jsonl:1: field 'prompt' has half of a surrogate pair"),
        ("arc_c", {**ARC, "choices": {"text": ["\udfff"], "label": ["A"]}}, "field 'choices' has half of a surrogate"),
    ],
)
def test_a_bad_row_is_named_by_line_and_field(tmp_path, name, row, message):
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        load(tmp_path, name, [row])


def test_worked_examples_are_refused_where_there_are_none(tmp_path):
    with pytest.raises(UserError, match="has no worked examples"):
        load(tmp_path, "file", [{"prompt": "x", "answer": "y"}], shots=2)
