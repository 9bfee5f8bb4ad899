"""Unpaired rows: a completion and its label, from the file to the prepared folder."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from laddpo.errors import UserError
from laddpo.preference.balance import balance_note, balanced_weights
from laddpo.preference.encoding.encode import EncodedPair, TextEncoder
from laddpo.preference.kinds import kind_of_rows
from laddpo.preference.preparation import Part, Rules, prepare_examples, prepare_pairs, prepare_unpaired
from laddpo.preference.prepared import SPLITS, PreparedPairs, PreparedUnpaired, chosen_examples, split_in_two
from laddpo.preference.reading.bad_rows import RowError
from laddpo.preference.reading.files import ReadLog
from laddpo.preference.reading.labels import LabelReader
from laddpo.preference.reading.pairs import RowIds, unpaired_of, user_prompt
from laddpo.preference.selection import choose_splits
from laddpo.preference.sources import Request, open_corpus, open_source, open_unpaired
from tests.tiny import REPOSITORY


@pytest.fixture(scope="module")
def encoder():
    return TextEncoder(AutoTokenizer.from_pretrained(REPOSITORY / "data" / "llada_nano"))


def test_a_pair_split_in_two_is_a_desirable_and_an_undesirable_completion():
    ids = [np.arange(n, dtype=np.int32) for n in (3, 2, 4)]
    chosen, rejected = split_in_two([EncodedPair("a-0", *ids, "g")])
    assert (chosen.id, chosen.label, chosen.group) == ("a-0-chosen", True, "g")
    assert (rejected.id, rejected.label, rejected.weight) == ("a-0-rejected", False, 1.0)
    assert [len(part) for part in (chosen.prompt_ids, chosen.completion_ids, rejected.completion_ids)] == [3, 2, 4]
    (example,) = chosen_examples([rejected, chosen])
    assert example.id == "a-0-chosen" and example.response_ids is chosen.completion_ids


def test_the_label_is_part_of_a_rows_identity(encoder):
    rows = [unpaired_of(RowIds(), user_prompt("Hi?"), "Hello.", label, "a:1") for label in (True, False)]
    assert rows[0].id != rows[1].id and rows[0].group == rows[1].group
    encoded = encoder.encode_completion(rows[0])
    assert encoder.decode_response(encoded.completion_ids) == "Hello." and encoded.label is True


@pytest.mark.parametrize(
    "labels, shares",
    [
        ("1" * 40 + "0" * 2, (0.1, 0.1)),
        ("1" * 40 + "0" * 3, (0.1, 0.1)),
        ("0" * 30 + "1" * 3, (0.5, 0.3)),
        ("10", (0.5, 0)),
    ],
)
@pytest.mark.parametrize("seed", range(4))
def test_each_split_has_both_labels_where_there_are_prompts_enough(labels, shares, seed):
    labels = np.array([int(label) for label in labels], dtype=np.int8)
    spool, log = SimpleNamespace(groups=np.arange(len(labels), dtype=np.uint64), labels=labels), ReadLog()
    split = choose_splits(spool, np.arange(len(labels)), seed, *shares, log)
    found = {name: set(labels[split == index].tolist()) for index, name in enumerate(SPLITS)}
    rare = min((labels == label).sum() for label in (0, 1))
    assert found["train"] == {0, 1}
    assert (found["validation"] == {0, 1}) == (rare > 1)
    if shares[1]:
        assert (found["test"] == {0, 1}) == (rare > 2)
    assert len(log.warnings) == (0 if rare > 2 else 1 if rare == 2 else 2)


YES = (True, 1, 1.0, "true", "True", "1", "1.0", "+1", "up", "thumbs_up", "Thumbs up", "👍", "good", "yes", "desirable")
NO = (False, 0, 0.0, "false", "FALSE", "0", "0.0", "down", "thumbs-down", "👎", "bad", "no", "undesirable")


@pytest.mark.parametrize("no", [NO, (-1, -1.0, "-1", False, "no")], ids=["zero", "minus one"])
def test_labels_are_read_in_their_usual_spellings(no):
    reader = LabelReader("label")
    assert [reader.read(value, "a:1") for value in (*YES, *no)] == [True] * len(YES) + [False] * len(no)


@given(st.one_of(st.none(), st.text(max_size=9), st.floats(), st.integers(), st.lists(st.booleans(), max_size=2)))
def test_what_is_no_label_is_refused_with_field_value_and_cure(value):
    try:
        assert LabelReader("vote").read(value, "a.jsonl:7") in (True, False)
    except RowError as error:
        assert error.field == "vote" and error.advice and (value is None or "is " in error.problem)
    except UserError as error:  # of numbers that make the others doubtful
        assert str(error).startswith("a.jsonl:7: vote: is ") and "data.label_threshold" in str(error)


def test_a_vote_of_0_beside_minus_1_stops_the_reading():
    reader = LabelReader("label")
    reader.read(-1, "a:1")
    with pytest.raises(UserError, match=r"a:2: label: is '0', and a:1 has -1.*DATA-121"):
        reader.read("0", "a:2")


def test_ratings_are_labels_by_a_threshold():
    reader = LabelReader("stars", threshold=4)
    assert [reader.read(value, "") for value in (5, "4", 4.5, 3, "1.0")] == [True, True, True, False, False]
    with pytest.raises(RowError, match=r"data\.label_threshold=4 wants a number"):
        reader.read("good", "")


def talk(*texts):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def file_of(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


SHAPES = {  # two rows of one question, in the shapes that public sets have
    "trl": {"prompt": "q", "completion": "a", "label": True},
    "trl messages": {"prompt": talk("q"), "completion": [{"role": "assistant", "content": "a"}], "label": True},
    "a conversation": {"completion": talk("q", "a"), "label": 1},
    "messages": {"messages": talk("q", "a"), "label": "true"},
    "llama factory": {"instruction": "q", "output": "a", "kto_tag": "True"},
    "thumbs": {"Question": "q", "Response": "a", "Thumbs": "up"},
    "other columns beside": {"prompt": "q", "completion": "a", "label": True, "rating": 3, "answer": "x"},
}


@pytest.mark.parametrize("case", SHAPES)
def test_unpaired_rows_are_found_and_read_in_every_usual_shape(case, tmp_path):
    request, log = Request(dataset_name=file_of(tmp_path / "a.jsonl", [SHAPES[case]])), ReadLog()
    assert open_source("jsonl").is_unpaired(request)
    (row,) = open_unpaired("jsonl").read(request, log)
    assert (row.prompt, row.completion, row.label) == (user_prompt("q"), "a", True)
    assert any("taken by their names" in text for text in log.warnings) == (case in ("llama factory", "thumbs"))
    (example,) = open_corpus("jsonl").read(request, ReadLog())
    assert (example.prompt, example.response) == (user_prompt("q"), "a")


@pytest.mark.parametrize(
    "rows",
    [
        [{"prompt": "q", "chosen": "a", "rejected": "b", "label": True}],
        [{"question": "q", "response_j": "a", "response_k": "b", "score": 1}],
        [{"prompt": "q", "response": "a"}],
    ],
)
def test_rows_with_pairs_or_without_labels_are_not_unpaired(rows, tmp_path):
    assert not open_source("jsonl").is_unpaired(Request(dataset_name=file_of(tmp_path / "a.jsonl", rows)))


def test_sft_takes_a_column_label_that_is_none_for_what_it_is(tmp_path):
    request = Request(dataset_name=file_of(tmp_path / "a.jsonl", [{"prompt": "q", "response": "a", "label": "sports"}]))
    assert [example.response for example in open_corpus("jsonl").read(request, ReadLog())] == ["a"]


ROWS = [{"prompt": f"q{i}", "completion": f"a{i}", "label": i % 4 == 0} for i in range(40)]


def prepare(folder, encoder, parts, make=None, **rules):
    """(the prepared folder, what was said) of parts of rows, of the kind that they are found to be."""
    said, arguments = [], (folder, "test", parts, encoder, Rules(**rules))
    kind = kind_of_rows(*arguments)
    make = make or {PreparedPairs: prepare_pairs, PreparedUnpaired: prepare_unpaired}[kind]
    found = make(*arguments, show=said.append, progress=False)
    assert make is prepare_examples or kind_of_rows(*arguments) is kind is type(found)
    return found, "\n".join(said)


def test_a_prepared_folder_of_unpaired_rows_holds_what_was_read(tmp_path, encoder):
    part = Part("jsonl", Request(dataset_name=file_of(tmp_path / "a.jsonl", ROWS)))
    prepared, said = prepare(tmp_path / "out", encoder, [part], validation_fraction=0.2, test_fraction=0.2)
    found = {}
    for split in SPLITS:
        rows = getattr(prepared, split)
        assert len(rows) and set(rows.column("label")) == {True, False} == {row.label for row in rows}
        for row, record in zip(rows, prepared.texts(split), strict=True):
            found[record["prompt"][0]["content"]] = (encoder.decode_response(row.completion_ids), row.label)
            assert row.id == record["id"] and row.group == record["group"] and row.weight == 1.0
        assert rows.lengths().tolist() == [[len(row.prompt_ids), len(row.completion_ids)] for row in rows]
    assert found == {row["prompt"]: (row["completion"], row["label"]) for row in ROWS}
    report = prepared.report()
    train = report["labels"]["train"]
    assert f"  labels   train: {train['desirable']} desirable, {train['undesirable']} undesirable" in said
    assert (
        f"set dpo.desirable_weight={balanced_weights(**train)['desirable_weight']:g} dpo.undesirable_weight=1" in said
    )
    sft, _ = prepare(tmp_path / "out", encoder, [part], prepare_examples)
    assert len(sft) == 10 and sft.report()["warnings"]["undesirable completions, which are not learned"] == 30


def test_a_mixture_of_pairs_and_unpaired_rows_splits_the_pairs(tmp_path, encoder):
    pairs = [{"prompt": f"p{i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(10)]
    names = [file_of(tmp_path / f"{name}.jsonl", rows) for name, rows in (("a", ROWS[:20]), ("b", pairs))]
    prepared, _ = prepare(tmp_path / "out", encoder, [Part("jsonl", Request(dataset_name=name)) for name in names])
    texts = {record["completion"]: record["label"] for record in prepared.texts("train")}
    assert len(prepared) == 40 and texts["good 3"] is True and texts["bad 3"] is False and texts["a4"] is True


def test_a_completion_with_both_labels_is_refused_or_left_out(tmp_path, encoder):
    part = Part("jsonl", Request(dataset_name=file_of(tmp_path / "a.jsonl", [*ROWS, {**ROWS[3], "label": True}])))
    with pytest.raises(UserError, match=r"a\.jsonl:4: label: is false, and .*a\.jsonl:41 has the same.*DATA-122"):
        prepare(tmp_path / "out", encoder, [part])
    prepared, _ = prepare(tmp_path / "out", encoder, [part], on_bad_row="skip")
    assert len(prepared) == 39 and prepared.report()["bad"]["DATA-122"]["count"] == 2


@pytest.mark.parametrize("label, cure", [(True, "python -m laddpo.sft"), (False, "Add desirable rows")])
def test_rows_of_one_label_alone_are_refused(label, cure, tmp_path, encoder):
    rows = [row for row in ROWS if row["label"] is label]
    part = Part("jsonl", Request(dataset_name=file_of(tmp_path / "a.jsonl", rows)))
    with pytest.raises(UserError, match=rf"DATA-123.*{cure}"):
        prepare(tmp_path / "out", encoder, [part])


@pytest.mark.parametrize(
    "desirable, undesirable", [(1, 1), (4, 3), (100, 10), (10, 100), (7, 8), (334, 250), (1, 1000)]
)
def test_the_suggested_weights_bring_the_labels_into_the_range_of_the_paper(desirable, undesirable):
    weights = {"desirable_weight": 1.0, "undesirable_weight": 1.0, **balanced_weights(desirable, undesirable)}
    assert 1 <= weights["desirable_weight"] * desirable / (weights["undesirable_weight"] * undesirable) <= 4 / 3
    assert balance_note(desirable, undesirable, **weights) is None
    assert (balance_note(desirable, undesirable, 1.0, 1.0) is None) == (1 <= desirable / undesirable <= 4 / 3)


def test_a_threshold_beside_pairs_is_refused(tmp_path, encoder):
    rows = [{"prompt": "p", "chosen": "a", "rejected": "b"}]
    part = Part("jsonl", Request(dataset_name=file_of(tmp_path / "a.jsonl", rows), label_threshold=3.0))
    with pytest.raises(UserError, match=r"data\.label_threshold is 3, and the rows of .* have no label"):
        prepare(tmp_path / "out", encoder, [part])


def test_a_weight_column_weighs_rows_and_a_margin_is_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"{i}?", "completion": "a", "label": i % 2 == 0, "w": i + 1} for i in range(3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def read(**columns):
        return list(open_unpaired("jsonl").read(Request(dataset_name=str(path), columns=columns), ReadLog()))

    assert [row.weight for row in read(weight="w")] == [1.0, 2.0, 3.0]
    assert [row.weight for row in read()] == [1.0, 1.0, 1.0]
    with pytest.raises(UserError, match=r"data\.columns\.margin is 'w', which data\.format=unpaired does not read"):
        read(margin="w")
