"""Rows with scores, ranks, several answers, weights and margins: which pairs they make, and what is refused."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from laddpo.errors import UserError
from laddpo.preference.encoding.encode import TextEncoder
from laddpo.preference.preparation import Part, Rules, prepare_pairs
from laddpo.preference.reading.bad_rows import BadRow
from laddpo.preference.reading.files import ReadLog
from laddpo.preference.reading.pair_counts import ranked_lines
from laddpo.preference.reading.ranked import PairRule
from laddpo.preference.sources import Request, read_pairs

SHIPPED = Path(__file__).resolve().parents[2] / "data" / "llada_nano"
LIST = {"prompt": "q", "completions": ["bad", "best", "good", "same"], "scores": [1, 3, 2, 2]}
ULTRAFEEDBACK = {
    "instruction": "q",
    "models": ["a", "b"],
    "completions": [
        {"response": text, "overall_score": score, "fine-grained_score": 1.0, "model": "a"}
        for text, score in (("good", 8.5), ("bad", 3.0))
    ],
}
NECTAR = {
    "prompt": "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: q\n\nAssistant: ",
    "answers": [{"answer": "bad", "rank": 2.0, "model": "a"}, {"answer": "good", "rank": 1.0, "model": "b"}],
}
SCORED = {"prompt": "q", "chosen": "good", "rejected": "bad", "score_chosen": 8.0, "score_rejected": 6.5}
STRENGTHS = {"chosen": "response_1", "rejected": "response_2", "preference": "preference_strength"}


def read(tmp_path, rows, columns=None, **rule):
    """(pairs, bad rows, log) of rows in a file."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    log = ReadLog()
    found = list(read_pairs(Request(dataset_name=str(path), columns=columns or {}, pair_rule=PairRule(**rule)), log))
    return [row for row in found if not isinstance(row, BadRow)], [row for row in found if isinstance(row, BadRow)], log


@pytest.mark.parametrize(
    ("rule", "wanted"),
    [
        ({}, {"best>good", "best>same", "best>bad", "good>bad", "same>bad"}),
        ({"pairs_from": "best_rest"}, {"best>good", "best>same", "best>bad"}),
        ({"pairs_from": "best_worst"}, {"best>bad"}),
        ({"min_gap": 1.5}, {"best>bad"}),
    ],
    ids=["all", "best_rest", "best_worst", "min_gap"],
)
def test_a_list_of_answers_makes_pairs_by_the_rule(tmp_path, rule, wanted):
    pairs, bad, log = read(tmp_path, [LIST], **rule)
    assert {f"{pair.chosen}>{pair.rejected}" for pair in pairs} == wanted and len(pairs) == len(wanted) and not bad
    ranked = log.pairs.facts()["ranked"]
    counted = {"lists": 1, "answers": 4, "pairs": len(wanted)}
    more = {"ties": 1} if rule.get("pairs_from") is None else {}
    more |= {"below_gap": 4} if "min_gap" in rule else {}
    assert ranked["counts"] == counted | more
    assert ranked["gap"]["max"] == 2.0
    assert any("min_gap" in line for line in ranked_lines(ranked)) == ("min_gap" in rule)


@pytest.mark.parametrize(
    ("row", "columns", "gap"),
    [
        (ULTRAFEEDBACK, {}, 5.5),
        (NECTAR, {"ranks": "rank"}, 1.0),
        (SCORED, {}, 1.5),
        ({"prompt": "q", "chosen": "good", "rejected": "bad", "chosen-rating": "5", "rejected-rating": "4"}, {}, 1.0),
        ({"prompt": "q", "response_1": "good", "response_2": "bad", "preference_strength": -2}, STRENGTHS, 2.0),
        ({"prompt": "q", "response_1": "bad", "response_2": "good", "preference_strength": 3}, STRENGTHS, 3.0),
    ],
    ids=["UltraFeedback", "Nectar", "UltraFeedback binarized", "ratings as text", "HelpSteer2", "HelpSteer2, second"],
)
def test_public_forms_are_read(tmp_path, row, columns, gap):
    (pair,), bad, log = read(tmp_path, [row], columns, margin_per_gap=0.5)
    assert (pair.chosen, pair.rejected, pair.margin, bad) == ("good", "bad", gap / 2, [])
    assert [message.content for message in pair.prompt] == (["hi", "hello", "q"] if row is NECTAR else ["q"])
    guessed = next((warning for warning in log.warnings if "taken by their names" in warning), "")
    assert bool(guessed) == (columns is not STRENGTHS and "score_chosen" not in row)


def test_ranks_are_never_guessed(tmp_path):
    pairs, (bad,), _ = read(tmp_path, [NECTAR])
    assert not pairs and bad.code == "DATA-111" and "data.columns.ranks=rank" in bad.advice


@pytest.mark.parametrize(
    ("row", "columns", "code", "field"),
    [
        ({**SCORED, "score_chosen": 1.0}, {}, "DATA-109", "score_chosen"),
        ({**SCORED, "score_chosen": "high"}, {}, "DATA-110", "score_chosen"),
        ({**LIST, "scores": [1, 2]}, {}, "DATA-110", "scores"),
        ({**LIST, "scores": [1, 2, None, 3]}, {}, "DATA-110", "scores[2]"),
        ({**SCORED, "weight": 0}, {"weight": "weight"}, "DATA-110", "weight"),
        ({**SCORED, "margin": -1}, {"margin": "margin"}, "DATA-110", "margin"),
        ({**SCORED, "rejected": ["a", "b"], "score_rejected": [1]}, {}, "DATA-110", "score_rejected"),
    ],
    ids=["lower", "text", "too few", "null", "weight 0", "negative margin", "a list too short"],
)
def test_a_number_that_cannot_be_meant_refuses_its_row(tmp_path, row, columns, code, field):
    more = [{**SCORED, "weight": 2, "margin": 0}] * 2 if "chosen" in row else []
    pairs, (bad,), _ = read(tmp_path, [row, *more], columns)
    assert (bad.code, bad.field) == (code, field) and all(pair.chosen == "good" for pair in pairs)


def test_swapped_columns_are_one_message(tmp_path):
    swapped = {**SCORED, "score_chosen": 1.0}
    with pytest.raises(UserError, match=r"In 2 of 3 pairs score_chosen is below score_rejected .* probably swapped"):
        read(tmp_path, [swapped, SCORED, swapped])
    pairs, bad, log = read(tmp_path, [swapped, SCORED, swapped], min_gap=None)
    assert len(pairs) == 3 and not bad and log.pairs.facts() == {}


def test_each_rejected_answer_has_its_own_score_and_the_worst_can_be_taken(tmp_path):
    row = {**SCORED, "rejected": ["bad", "worse"], "score_rejected": [6, 1]}
    pairs, _, _ = read(tmp_path, [row], margin_per_gap=1.0)
    assert [(pair.rejected, pair.margin) for pair in pairs] == [("bad", 2.0), ("worse", 7.0)]
    pairs, _, _ = read(tmp_path, [row], pairs_from="best_worst")
    assert [pair.rejected for pair in pairs] == ["worse"]


def prepared(tmp_path, rows, name, columns=None, **rule):
    path = tmp_path / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    part = Part("jsonl", Request(dataset_name=str(path), columns=columns or {}, pair_rule=PairRule(**rule)))
    return prepare_pairs(
        tmp_path / name,
        "data",
        [part],
        TextEncoder(AutoTokenizer.from_pretrained(SHIPPED)),
        Rules(),
        show=lambda _: None,
    )


def test_weights_and_margins_reach_the_encoded_pairs_and_plain_rows_are_written_as_before(tmp_path):
    plain = [{"prompt": f"q{i}", "chosen": "a", "rejected": "b"} for i in range(4)]
    rows = [{**row, "weight": 1 + i % 2, "margin": i % 3 / 2} for i, row in enumerate(plain)]
    columns = {"weight": "weight", "margin": "margin"}
    made, twin = prepared(tmp_path, rows, "made", columns), prepared(tmp_path, rows[::-1], "twin", columns)
    found = {pair.id: (pair.weight, pair.margin) for pair in made.train}
    assert sorted(found.values()) == [(1.0, 0.0), (1.0, 1.0), (2.0, 0.0), (2.0, 0.5)]
    assert made.content == twin.content, "the order of rows decides nothing"
    texts = list(made.texts("train"))
    assert {name: sum(name in text for text in texts) for name in columns} == {"weight": 2, "margin": 2}
    old = prepared(tmp_path, plain, "old")
    assert not any({"weight", "margin"} & set(text) for text in old.texts("train")) and "ranked" not in old.report()
    assert {(pair.weight, pair.margin) for pair in old.train} == {(1.0, 0.0)}


@pytest.mark.parametrize("rule", [{"min_gap": 1.0}, {"margin_per_gap": 1.0}, {"pairs_from": "best_worst"}], ids=str)
def test_a_rule_that_no_row_can_use_is_refused(tmp_path, rule):
    with pytest.raises(UserError, match=f"data.{next(iter(rule))} is .*and no"):
        prepared(tmp_path, [{"prompt": "q", "chosen": "a", "rejected": "b"}], "rows", **rule)
