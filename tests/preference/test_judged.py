"""Pairs of a model's own answers as ratings order them: which answers make a pair, ties, and what has no rating."""

from __future__ import annotations

import json

import pytest

from laddpo.errors import UserError
from laddpo.preference.judged import chosen_over, judged_lines, judged_pairs
from laddpo.preference.onpolicy import read_questions
from laddpo.preference.reading.files import ReadLog
from laddpo.preference.reading.rows import RowRules
from laddpo.preference.sources import Request, open_source
from laddpo.problems.grading import FunctionGrader

GRADER = FunctionGrader("ends with the answer", lambda text, answer: text.endswith(answer))
RATED = [("a", 3.0), ("b", 1.0), ("c", 2.0), ("d", 2.0), ("e", 3.0)]


class ByNumber:
    """Rates a text by the number in it; "?" has no rating."""

    tie = 0.0

    def __init__(self, name: str = "number"):
        self.name, self.asked = name, 0

    def fields(self):
        return {"judge": "rule", "rule": self.name}

    def rate(self, prompt, texts, gold):
        self.asked += len(texts)
        return [None if "?" in text else float(text.strip("x")) for text in texts]

    def finish(self):
        pass

    close = finish


def make(*questions: list[str], rater=None, by="best_worst", limit=4, **options):
    rows = [
        (f"file:{i}", {"question": f"q{i}", "answer": None, "answers": texts}) for i, texts in enumerate(questions, 1)
    ]
    log = ReadLog()
    pairs = list(judged_pairs(rows, rater or ByNumber(), by, limit, 0, log, options.pop("balanced", False)))
    return [(pair.chosen, pair.rejected) for pair in pairs], log.facts["sampling"]


@pytest.mark.parametrize(
    ("by", "limit", "tie", "expected", "ties"),
    [
        ("best_worst", 4, 0.0, [3.0, 1.0, 3.0, 2.0], 0),
        ("best_worst", 1, 0.0, [3.0, 1.0], 0),
        ("best_worst", 4, 1.0, [3.0, 1.0], 1),
        ("best_random", 4, 0.0, [3.0, None] * 3, 1),
        ("best_first", 1, 0.0, [3.0, 1.0], 1),
        ("best_first", 4, 1.5, [3.0, 1.0], 3),
    ],
)
def test_which_answers_make_a_pair(by, limit, tie, expected, ties):
    made, found = chosen_over(RATED, by, limit, tie, "salt")
    ratings = [dict(RATED)[text] for pair in made for text in pair]
    assert found == ties and len(ratings) == len(expected)
    assert all(want in (None, rating) for want, rating in zip(expected, ratings, strict=True))
    if by != "best_worst":
        assert len({chosen for chosen, _ in made}) == 1


def test_a_random_order_is_the_seeds_and_no_others():
    rated = [(str(i), float(i)) for i in range(9)]
    first = chosen_over(rated, "best_random", 3, 0.0, "1\x00q")
    assert first == chosen_over(rated[::-1], "best_random", 3, 0.0, "1\x00q")
    assert first != chosen_over(rated, "best_random", 3, 0.0, "2\x00q")


def test_what_became_of_the_answers_is_counted():
    pairs, facts = make(["1", "2", "2", "?", ""], ["5", "5x"], ["7"])
    assert pairs == [("2", "1")]
    assert (facts["questions"], facts["samples"], facts["without_pair"]) == (3, 8, 2)
    assert facts["left_out"] == {"ties": 1, "unrated": 1, "for_length": 0}
    assert facts["mean_best"] == pytest.approx((2 + 5 + 7) / 3)
    assert "1 ties and 1 answers" in judged_lines(facts)[1]
    with pytest.raises(UserError, match="1 questions gave no pair: 1 were ties"):
        make(["5", "5x"])


def test_lengths_may_be_balanced_as_without_a_judge():
    pairs, facts = make(["1xx", "2"], ["1", "2xx"], ["1", "3xx"], balanced=True)
    assert len(pairs) == 2 and facts["left_out"]["for_length"] == 1
    assert (facts["chosen_longer"], facts["chosen_shorter"]) == (1, 1)


def test_the_judge_and_the_pairing_are_part_of_what_pairs_depend_on_and_a_grader_is_as_before(tmp_path):
    path = tmp_path / "samples.jsonl"
    path.write_text(json.dumps({"question": "a?", "answer": None, "answers": ["1", "2"]}) + "\n")
    source, asked = open_source("onpolicy"), {"dataset_name": str(path), "balance_lengths": False}
    fields = source.identity(Request(**asked, rater=ByNumber()))
    assert fields != source.identity(Request(**asked, rater=ByNumber("other")))
    assert fields != source.identity(Request(**asked, rater=ByNumber(), pair_by="best_first"))
    assert source.identity(Request(**asked, grader=GRADER)).keys() == {
        *("samples", "grader", "pairs_per_question", "balance_lengths", "seed")
    }
    assert [p.chosen for p in source.read(Request(**asked, rater=ByNumber()), ReadLog())] == ["2"]


def test_questions_need_an_answer_only_where_answers_are_graded():
    rows = [("f:1", {"prompt": "a"}), ("f:2", {"prompt": "b", "answer": "x #### 2"})]
    found = read_questions(rows, RowRules(), "", ReadLog(), needs_answer=False)
    assert [question.answer for question in found] == [None, None]
    with pytest.raises(UserError, match="f:1: answer: field missing"):
        read_questions(rows, RowRules(), "", ReadLog())
