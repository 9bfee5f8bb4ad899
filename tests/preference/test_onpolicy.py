"""Pairs of a model's own answers: right over wrong, few for each question, and length tells nothing."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from laddpo.errors import UserError
from laddpo.preference.onpolicy import balanced_pairs, matched_pairs, read_questions, sampled_pairs
from laddpo.preference.reading.files import ReadLog
from laddpo.preference.reading.pairs import RowIds, pair_of, user_prompt
from laddpo.preference.reading.rows import RowRules
from laddpo.preference.sources import Request, open_source
from laddpo.problems.grading import FunctionGrader

GRADER = FunctionGrader("ends with the answer", lambda text, answer: text.endswith(answer))


def rows(*questions: tuple[str, str, list[str]]):
    return [
        (f"file:{i}", {"question": question, "answer": answer, "answers": answers})
        for i, (question, answer, answers) in enumerate(questions, 1)
    ]


def make(*questions, limit=4, seed=0, **options):
    log = ReadLog()
    return list(sampled_pairs(rows(*questions), GRADER, limit, seed, log, **options)), log.facts["sampling"]


def test_right_answers_are_preferred_over_wrong_ones_of_the_same_question():
    pairs, facts = make(("a?", "1", ["=1", "=1", "=2", "=3"]), ("b?", "7", ["=7"] * 4), ("c?", "5", ["=6"] * 4))
    assert {(p.chosen, p.rejected) for p in pairs} == {("=1", "=2"), ("=1", "=3")}
    assert {p.answer for p in pairs} == {"1"} and {p.prompt[0].content for p in pairs} == {"a?"}
    # 2 + 4 of 12 answers are right; a and b are solved by some answer
    assert facts["pass@1"] == 6 / 12 and facts["pass@k"] == pytest.approx(2 / 3)
    assert (facts["always_right"], facts["never_right"], facts["pairs"]) == (1, 1, 2)


def test_pairs_of_a_question_are_limited_and_use_different_answers_first():
    right, wrong = [f"{i}=1" for i in range(6)], [f"{i}=2" for i in range(6)]
    pairs, facts = make(("a?", "1", right + wrong), limit=6)
    for side in ("chosen", "rejected"):
        assert set(Counter(getattr(p, side) for p in pairs).values()) == {1}
    assert facts["left_out"]["more_than_pairs_per_question"] == 30


def test_the_pair_nearest_in_length_is_taken():
    assert matched_pairs(["aaaa", "a"], ["bb", "bbbbb"], 2, "salt") == [("aaaa", "bbbbb"), ("a", "bb")]


def test_the_same_pairs_come_from_answers_in_another_order():
    answers = ["x=1", "y=1", "zz=1", "x=2", "yy=2", "z=3"]
    one, _ = make(("a?", "1", answers), limit=2)
    other, _ = make(("a?", "1", answers[::-1]), limit=2)
    assert [p.id for p in one] == [p.id for p in other]


def test_the_chosen_answer_is_as_often_the_longer_as_the_shorter_one():
    ids = RowIds()
    lengths = [(9, 2), (5, 4), (3, 2), (2, 3), (4, 4)]
    pairs = [pair_of(ids, user_prompt("q"), "c" * a, "r" * b, "") for a, b in lengths]
    kept = balanced_pairs(pairs)
    # three are longer and one is shorter: the two of the largest difference go
    left = sorted((len(p.chosen), len(p.rejected)) for p in kept)
    assert left in ([(2, 3), (3, 2), (4, 4)], [(2, 3), (4, 4), (5, 4)])
    questions = [(f"{i}?", "1", ["long answer =1", "=2"]) for i in range(4)]
    with pytest.raises(UserError, match="4 pairs were left out for their length"):
        make(*questions)
    pairs, facts = make(*questions, is_balanced=False)
    assert len(pairs) == 4 and facts["chosen_longer"] == 4


def test_an_answer_that_is_no_text_is_counted_and_in_no_pair():
    pairs, facts = make(("a?", "1", ["=1", "=2", "", "  ", "broken \ufffd", "\ufffd=1", "\x00=1"]))
    assert [(pair.chosen, pair.rejected) for pair in pairs] == [("=1", "=2")]
    assert facts["pass@1"] == 3 / 7


def test_questions_that_give_no_pair_say_why():
    with pytest.raises(UserError, match="2 questions gave no pair: 1 were always answered right, 1 never"):
        make(("a?", "1", ["=1"]), ("b?", "1", ["=2"]))


def test_questions_are_asked_once_with_their_instruction_and_short_answer():
    found = read_questions(
        [("f:1", {"q": "2+2?", "answer": "two and two\n#### 4"}), ("f:2", {"q": "2+2?", "answer": "4"})],
        RowRules({"prompt": "q"}),
        " Think.",
        ReadLog(),
    )
    assert [(question.text, question.answer) for question in found] == [("2+2? Think.", "4")]


def test_a_question_without_an_answer_is_named_with_its_line():
    with pytest.raises(UserError, match=r"f:2: answer: field missing"):
        read_questions([("f:1", {"prompt": "a", "answer": "1"}), ("f:2", {"prompt": "b"})], RowRules(), "", ReadLog())


def test_what_pairs_depend_on_is_the_samples_and_how_pairs_are_chosen(tmp_path):
    path = tmp_path / "samples.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for _, row in rows(("a?", "1", ["=1", "=2"]))))
    source = open_source("onpolicy")
    asked = {"dataset_name": str(path), "grader": GRADER}
    fields = source.identity(Request(**asked))
    assert fields != source.identity(Request(**asked, pairs_per_question=2))
    assert fields != source.identity(Request(**asked, balance_lengths=False))
    assert [p.chosen for p in source.read(Request(**asked), ReadLog())] == ["=1"]
    path.write_text(path.read_text().replace("=2", "=3"))
    assert fields != source.identity(Request(**asked))
