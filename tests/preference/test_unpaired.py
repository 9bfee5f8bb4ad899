"""Unpaired rows: a completion and its label, from the file to the prepared folder."""

from types import SimpleNamespace

import numpy as np
import pytest
from transformers import AutoTokenizer

from laddpo.preference.encoding.encode import EncodedPair, TextEncoder
from laddpo.preference.prepared import SPLITS, chosen_examples, split_in_two
from laddpo.preference.reading.files import ReadLog
from laddpo.preference.reading.pairs import RowIds, unpaired_of, user_prompt
from laddpo.preference.selection import choose_splits
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
