"""What sft learns from a row: by shape of the row, and from every source that prepare reads."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from laddpo.errors import UserError
from laddpo.preference.reading.bad_rows import BadRow
from laddpo.preference.reading.files import ReadLog
from laddpo.preference.sources import SOURCES, Request, open_corpus


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def learned(source, folder, rows, **asked):
    """(prompt, response) of every example, or the bad row as text; and what the log counts."""
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    log = ReadLog()
    found = list(open_corpus(source).read(Request(dataset_name=str(path), **asked), log))
    shown = [
        str(row) if isinstance(row, BadRow) else (" / ".join(m.content for m in row.prompt), row.response)
        for row in found
    ]
    return shown, log


PAIR = {"prompt": "p", "chosen": "c", "rejected": "r"}
SHAPES = [
    ({"prompt": "p", "response": "a"}, {}, ("p", "a")),
    ({"prompt": [user("p")], "response": [assistant("a")]}, {}, ("p", "a")),
    ({"prompt": [user("p"), assistant("q"), user("s")], "response": "a"}, {}, ("p / q / s", "a")),
    ({"question": "p", "output": "a"}, {"columns": {"prompt": "question", "response": "output"}}, ("p", "a")),
    ({"about": "s", "prompt": "p", "response": "a"}, {"columns": {"system": "about"}}, ("s / p", "a")),
    ({"messages": [user("p"), assistant("a")]}, {}, ("p", "a")),
    ({"messages": [user("p"), assistant("q"), user("s"), assistant("a")]}, {}, ("p / q / s", "a")),
    (PAIR, {}, ("p", "c")),
    ({**PAIR, "response": "a"}, {}, ("p", "a")),
    ({**PAIR, "response": None}, {}, ("p", "c")),
    ({**PAIR, "messages": [user("p")]}, {}, ("p", "c")),
    ({"prompt": "p", "chosen": "c"}, {}, ("p", "c")),
    ({"chosen": [user("p"), assistant("c")], "rejected": [user("p"), assistant("r")]}, {}, ("p", "c")),
    ({"chosen": [user("p"), assistant("c")]}, {}, ("p", "c")),
]


@pytest.mark.parametrize(("row", "asked", "wanted"), SHAPES)
def test_a_row_of_any_shape_gives_its_response(tmp_path, row, asked, wanted):
    (found,), log = learned("jsonl", tmp_path, [row], **asked)
    assert found == wanted
    by_chosen = log.warnings.get("rows without a response, of which the chosen side is learned", 0)
    assert by_chosen == (wanted[1] == "c")


BAD = [
    ({"prompt": "p"}, {}, ("response", "DATA-01", "data.columns.response")),
    ({"prompt": "p", "response": ""}, {}, ("response", "DATA-07")),
    ({"prompt": "p", "response": 3}, {}, ("response", "DATA-12")),
    ({"response": "a"}, {}, ("prompt", "DATA-01")),
    ({"messages": [user("p")]}, {}, ("messages", "DATA-65")),
    ({"messages": "p"}, {}, ("messages", "DATA-12")),
    ({"messages": [user("p"), {"role": "robot", "content": "a"}]}, {}, ("messages[1].role", "DATA-63")),
]


@pytest.mark.parametrize(("row", "asked", "words"), BAD)
def test_a_row_without_a_response_is_named(tmp_path, row, asked, words):
    (found,), _ = learned("jsonl", tmp_path, [row], **asked)
    assert isinstance(found, str) and all(word in found for word in (":1:", *words)), found


@pytest.mark.parametrize("row", [PAIR, {"messages": [user("p"), assistant("a")]}])
def test_a_column_of_responses_that_no_row_has_is_never_passed_over(tmp_path, row):
    with pytest.raises(UserError, match=r"data\.columns\.response is 'output'.*DATA-104"):
        learned("jsonl", tmp_path, [row], columns={"response": "output"})


def test_every_source_of_pairs_has_examples_and_each_learns_the_chosen_side(tmp_path):
    dialogue = "\n\nHuman: p\n\nAssistant: {}"
    grader = SimpleNamespace(name="same", grade_all=lambda texts, golds: [t == g for t, g in zip(texts, golds)])  # noqa: B905
    messages = {"prompt": "p", "chosen": [user("p"), assistant("c")], "rejected": [user("p"), assistant("r")]}
    cases = {
        "jsonl": (PAIR, {}),
        "laddpo_public": (None, {}),
        "hh_rlhf": ({"chosen": dialogue.format("c"), "rejected": dialogue.format("r")}, {}),
        "ultrafeedback": (messages, {}),
        "orca_dpo_pairs": ({"system": "s", "question": "p", "chosen": "c", "rejected": "r"}, {}),
        "graded_candidates": ({"prompt": "p", "answer": "c", "candidates": ["c", "r"]}, {"grader": grader}),
        "onpolicy": ({"question": "p", "answer": "c", "answers": ["c", "r"]}, {"grader": grader}),
    }
    assert [name for name in SOURCES if name not in cases] == [name for name, row in SOURCES.items() if row.corpus]
    for source, (row, asked) in cases.items():
        if row is None:  # one array, by format=json
            (tmp_path / "rows.json").write_text(json.dumps([PAIR]))
            found = list(open_corpus(source).read(Request(dataset_name=str(tmp_path / "rows.json")), ReadLog()))
            assert [(e.prompt[0].content, e.response) for e in found] == [("p", "c")]
            continue
        shown, _ = learned(source, tmp_path, [row], **asked)
        assert shown == [("s / p" if source == "orca_dpo_pairs" else "p", "c")], source


def test_other_columns_for_the_response_leave_the_keys_of_pairs_as_they_are(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(PAIR) + "\n")
    plain, mapped = (Request(dataset_name=str(path), columns={"response": name}) for name in (None, "output"))
    for name in ("jsonl", "graded_candidates"):
        assert SOURCES[name].identity(plain) == SOURCES[name].identity(mapped)
    assert open_corpus("jsonl").identity(plain) != open_corpus("jsonl").identity(mapped)
