"""Nothing of a row is dropped in silence: each key and column is used, refused or counted in the report."""

import json
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

import laddpo
from laddpo.cli.app import cli
from laddpo.errors import UserError
from laddpo.preference.encoding.encode import TextEncoder
from laddpo.preference.preparation import Part, Rules, prepare_pairs
from laddpo.preference.prepared import SPLITS, PreparedPairs
from laddpo.preference.reading.bad_rows import CODES, BadRow
from laddpo.preference.reading.files import ReadLog
from laddpo.preference.sources import Request, open_corpus, open_source

NANO = Path(__file__).resolve().parents[2] / "data" / "llada_nano"
TEXTS = {"prompt": "p", "chosen": "c", "rejected": "r"}


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


TALK = {
    "prompt": [turn("user", "p")],
    "chosen": [turn("assistant", "c")],
    "rejected": [turn("assistant", "r")],
}
WHOLE = {name: [turn("user", "p"), turn("assistant", name)] for name in ("chosen", "rejected")}
HH = {name: f"\n\nHuman: p\n\nAssistant: {name}" for name in ("chosen", "rejected")}
CALL = [{"function": {"name": "weather"}}]


def read(folder, rows, source="jsonl", corpus=False, **asked):
    path = folder / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    log = ReadLog()
    opened = open_corpus(source) if corpus else open_source(source)
    return list(opened.read(Request(dataset_name=str(path), **asked), log)), log.warnings


def with_key(row, side, **more):
    return {**row, side: [{**row[side][0], **more}, *row[side][1:]]}


REFUSED = {  # case: row, settings, code, field, words of the advice
    "calls by the user": (
        with_key(TALK, "prompt", tool_calls=CALL),
        {},
        "DATA-101",
        "prompt[0].tool_calls",
        "assistant",
    ),
    "the older function_call": (with_key(TALK, "chosen", function_call=CALL[0]), {}, "DATA-101", "", "tool_calls"),
    "reasoning": (with_key(TALK, "chosen", reasoning_content="x"), {}, "DATA-101", "", "<think>"),
    "name": (with_key(TALK, "prompt", name="Ann"), {}, "DATA-101", "prompt[0].name", "remove the key"),
    "any other key": (with_key(TALK, "rejected", weight=0), {}, "DATA-101", "rejected[0].weight", "remove the key"),
    "a key of a whole conversation": (with_key(WHOLE, "chosen", name="A"), {}, "DATA-101", "chosen[0].name", ""),
    "a key of a part": (
        with_key(TALK, "prompt", content=[{"type": "text", "text": "p", "image_url": "x"}]),
        {},
        "DATA-101",
        "prompt[0].content.image_url",
        "",
    ),
    "a turn of a tool": (
        {**TALK, "prompt": [turn("user", "p"), turn("tool", "5")]},
        {},
        "DATA-64",
        "prompt[1]",
        "tool_calls",
    ),
    "two systems": (
        {**TALK, "prompt": [turn("system", "s"), turn("user", "p")], "who": "t"},
        {"columns": {"system": "who"}},
        "DATA-103",
        "who",
        "data.columns.system=null",
    ),
    "two systems, implicit": (
        {name: [turn("system", "s"), *turns] for name, turns in WHOLE.items()} | {"who": "t"},
        {"columns": {"system": "who"}},
        "DATA-103",
        "who",
        "data.columns.system=null",
    ),
    "a system that is no text": ({**TEXTS, "who": 5}, {"columns": {"system": "who"}}, "DATA-12", "who", ""),
    "an answer that is no text": ({**TEXTS, "gold": 42}, {"columns": {"answer": "gold"}}, "DATA-12", "gold", ""),
    "messages as Python text": ({**TEXTS, "chosen": str(WHOLE["chosen"])}, {}, "DATA-102", "chosen", "literal_eval"),
    "messages as JSON text": ({**TEXTS, "prompt": json.dumps(TALK["prompt"])}, {}, "DATA-102", "prompt", "json.loads"),
    "a message as text": ({**TEXTS, "chosen": "{'content': 'c', 'role': 'assistant'}"}, {}, "DATA-102", "chosen", ""),
    "an array as text": ({**TEXTS, "chosen": f"array({TALK['chosen']})"}, {}, "DATA-102", "chosen", ""),
    "from and value as text": ({**TEXTS, "chosen": "[{'from': 'gpt', 'value': 'c'}]"}, {}, "DATA-102", "chosen", ""),
    "input beside messages": (
        {**TALK, "input": "q"},
        {"columns": {"input": "input"}},
        "DATA-58",
        "input",
        "data.columns.input=null",
    ),
    "input beside conversations": ({**WHOLE, "input": "q"}, {"columns": {"input": "input"}}, "DATA-58", "input", ""),
    "text and conversations": ({**WHOLE, "prompt": "p"}, {}, "DATA-58", "", "data.format=conversation"),
    "an unpaired row": ({"prompt": "p", "completion": "c", "label": True}, {}, "DATA-105", "", "data.format=unpaired"),
    "several chosen answers": ({**TEXTS, "chosen": ["c", "d"]}, {}, "DATA-12", "chosen", "Only rejected"),
    "no prompt": ({"chosen": "c", "rejected": "r"}, {}, "DATA-01", "prompt", "data.allow_empty_prompt=true"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_be_lost_refuses_the_row_with_its_name_and_a_cure(case, tmp_path):
    row, asked, code, field, words = REFUSED[case]
    ((bad,), _) = read(tmp_path, [row], **asked)
    assert isinstance(bad, BadRow) and bad.code == code in CODES
    assert field in bad.field and words in bad.advice


@pytest.mark.parametrize("text", ["[1, 2]", '{"role": "admin"}', "[{'role': 'user', 'content': 'p'}] is Python", "[{"])
def test_texts_that_only_look_a_little_like_messages_are_texts(text, tmp_path):
    ((pair,), _) = read(tmp_path, [{**TEXTS, "chosen": text}])
    assert pair.chosen == text


WRONG_COLUMNS = {  # case: rows, source, settings, words
    "system": ([TEXTS | {"system": "s"}], "jsonl", {"system": "sytem"}, "data.columns.system=system"),
    "system of conversations": ([WHOLE], "jsonl", {"system": "sys"}, "data.columns.system is 'sys'"),
    "answer": ([TEXTS | {"gold": "s"}], "jsonl", {"answer": "golt"}, "data.columns.answer=gold"),
    "input": ([TEXTS], "jsonl", {"input": "context"}, "data.columns.input is 'context'"),
    "prompt": ([TEXTS], "jsonl", {"prompt": "promt"}, "data.columns.prompt=prompt"),
    "chosen": ([TEXTS], "jsonl", {"chosen": "good"}, "data.columns.chosen=chosen"),
    "a column of dialogues": ([HH], "hh_rlhf", {"prompt": "question"}, "hh_rlhf does not read"),
    "an input of dialogues": ([HH | {"input": "x"}], "hh_rlhf", {"input": "input"}, "hh_rlhf does not read"),
    "candidates of pairs": ([TEXTS], "jsonl", {"candidates": "solutions"}, "data.columns.candidates is 'solutions'"),
    "scores of pairs": ([TEXTS], "jsonl", {"scores": "score"}, "no row is a list of answers"),
    "system of questions": ([TEXTS], "graded_candidates", {"system": "s"}, "does not read"),
}


@pytest.mark.parametrize("case", WRONG_COLUMNS)
def test_a_column_that_is_named_and_not_there_or_not_read_is_an_error(case, tmp_path):
    rows, source, columns, words = WRONG_COLUMNS[case]
    with pytest.raises(UserError, match=re.escape(words)):
        read(tmp_path, rows, source, columns=columns)


def test_the_corpus_of_sft_names_its_columns_too(tmp_path):
    row = {"prompt": "p", "response": "r", "odd": 1}
    ((example,), warnings) = read(tmp_path, [row], corpus=True)
    assert example.response == "r" and warnings == {"column 'odd' is not used": 1}
    with pytest.raises(UserError, match=r"data\.columns\.system is 'sys'.*DATA-104"):
        read(tmp_path, [row], corpus=True, columns={"system": "sys"})


def test_a_mapped_column_that_some_rows_lack_is_counted(tmp_path):
    rows = [TEXTS | {"who": text, "gold": "1"} for text in ("be brief", "", None)] + [TEXTS]
    pairs, warnings = read(tmp_path, rows, columns={"system": "who", "answer": "gold"})
    assert [len(pair.prompt) for pair in pairs] == [2, 1, 1, 1]
    assert warnings == {
        "rows without a text in 'who' (data.columns.system)": 3,
        "rows without a text in 'gold' (data.columns.answer)": 1,
    }


@pytest.mark.parametrize(("row", "source"), [(TEXTS, "jsonl"), (WHOLE, "jsonl"), (HH, "hh_rlhf"), (TALK, "jsonl")])
def test_a_system_column_goes_in_front_in_every_shape(row, source, tmp_path):
    ((pair,), _) = read(tmp_path, [{**row, "who": "s"}], source, columns={"system": "who"})
    assert [message.role for message in pair.prompt] == ["system", "user"]


def test_every_rejected_answer_makes_a_pair_of_its_prompt(tmp_path):
    rows = [{**TEXTS, "prompt": f"p{i}", "rejected": ["r", "c", "s"]} for i in range(3)]
    rows += [{**TALK, "rejected": [TALK["rejected"], [turn("assistant", "s")]]}, {**TEXTS, "rejected": []}]
    found, warnings = read(tmp_path, rows)
    assert warnings == {"rows with a list of rejected answers, each of which makes a pair": 4}
    pairs, bad = ([one for one in found if isinstance(one, BadRow) is kind] for kind in (False, True))
    assert [pair.rejected for pair in pairs] == ["r", "s"] * 4
    assert [one.code for one in bad] == ["DATA-09"] * 3 + ["DATA-12"]  # "c" is the chosen one; an empty list
    ((null,), _) = read(tmp_path, [{**TEXTS, "rejected": ["b", None]}])
    assert str(null).endswith("rejected[1]: is null (DATA-04). Fix the row or set data.on_bad_row=skip.")
    alone, _ = read(tmp_path, [{**TEXTS, "prompt": "p1", "rejected": "s"}])
    assert alone[0].id in {pair.id for pair in pairs} and len({pair.id for pair in pairs}) == 8
    parts = [Part("jsonl", Request(dataset_name=str(tmp_path / "b.jsonl")))]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({**row, "rejected": ["r", "s"]}) + "\n" for row in rows[:3]))
    encoder = TextEncoder(AutoTokenizer.from_pretrained(NANO))
    rules = Rules(validation_fraction=0.3)
    prepared = prepare_pairs(tmp_path / "out", "x", parts, encoder, rules, show=str, progress=False)
    groups = [set(side.column("group")) for side in (prepared.train, prepared.validation)]
    assert len(prepared) == 6 and not groups[0] & groups[1]
    assert "rows with a list of rejected answers, each of which makes a pair" in prepared.report()["warnings"]


def test_instruction_and_input_are_joined_from_the_command_line(tmp_path, capsys):
    rows = [
        {"instruction": f"Add {i}.", "input": text, "chosen": "c", "rejected": "r", "n": i}
        for i, text in enumerate(["to 1", "", "to 3"])
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = ["data=jsonl", f"data.dataset_name={path}", "data.columns.prompt=instruction", "data.columns.input=input"]
    paths = [f"paths.data_dir={tmp_path / 'data'}", f"paths.outputs_dir={tmp_path / 'outputs'}"]
    assert cli("prepare", [*asked, *paths]) == 0
    (folder,) = (tmp_path / "data" / "prepared").iterdir()
    prepared = PreparedPairs.load(folder)
    said = [record["prompt"][0]["content"] for split in SPLITS for record in prepared.texts(split)]
    assert sorted(said) == ["Add 0.\n\nto 1", "Add 1.", "Add 2.\n\nto 3"]
    warnings, shown = prepared.report()["warnings"], capsys.readouterr().out
    assert warnings["column 'n' is not used"] == 3
    assert warnings["rows without a text in 'input' (data.columns.input)"] == 1
    assert all(message in shown for message in warnings)


def test_columns_with_a_name_of_their_own_in_each_row_are_counted_together(tmp_path):
    _, warnings = read(tmp_path, [{**TEXTS, f"key {i}": i} for i in range(80)])
    assert len(warnings) == 51 and warnings["further columns that are not used"] == 30


EMPTY = st.sampled_from([None, "", " \n", [], {}, [None], {"a": ""}])
FULL = st.sampled_from(["MARK", ["MARK"], {"a": {"b": "MARK"}}, 0, False, 1.5])
NAMES = st.sampled_from(["tool_calls", "name", "reasoning_content", "weight", "Role", "x y", "é", "refusal", "prefix"])
SHAPES = {"texts": (TEXTS, "jsonl"), "talk": (TALK, "jsonl"), "whole": (WHOLE, "jsonl"), "hh": (HH, "hh_rlhf")}


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), shape=st.sampled_from(sorted(SHAPES)))
def test_every_key_and_column_of_a_row_is_used_refused_or_counted(data, shape, tmp_path):
    """Real rows with further columns and further keys in their messages, full and empty, through the real reader."""
    row, source = SHAPES[shape]
    row, keys = dict(row), {}
    for side in row:
        if isinstance(row[side], list):
            place = data.draw(st.integers(0, len(row[side]) - 1))
            more = data.draw(st.dictionaries(NAMES, st.one_of(EMPTY, FULL), max_size=2))
            row[side] = [{**one, **more} if index == place else one for index, one in enumerate(row[side])]
            keys.update({f"{side}[{place}].{key}": value for key, value in more.items()})
    columns = data.draw(st.dictionaries(NAMES, st.one_of(EMPTY, FULL), max_size=3))
    mapped = {name: data.draw(st.sampled_from(sorted(columns))) for name in ("system", "answer") if columns}
    mapped = {name: column for name, column in mapped.items() if data.draw(st.booleans())}
    ((found,), warnings) = read(tmp_path, [{**row, **columns}], source, columns=mapped)
    full = [place for place, value in keys.items() if value in ("MARK", ["MARK"], {"a": {"b": "MARK"}}, 0, False, 1.5)]
    wrong = {column for column in mapped.values() if not isinstance(columns[column], (str, type(None)))}
    if isinstance(found, BadRow):
        assert found.field.removesuffix("[0]") in full or found.field in wrong  # [0]: of a list of calls
    else:
        assert not full and not wrong
        for key in {place.rpartition(".")[2] for place in keys}:
            assert any(repr(key) in message for message in warnings)
        said = [message.content for message in found.prompt]
        for name, column in mapped.items():
            is_used = columns[column] == "MARK" and ("MARK" in said if name == "system" else found.answer == "MARK")
            assert is_used or any(f"data.columns.{name})" in message for message in warnings)
    assert {f"column {name!r} is not used" for name in columns.keys() - set(mapped.values())} <= warnings.keys()


def test_every_code_that_is_printed_is_explained():
    printed = {
        code
        for path in Path(laddpo.__file__).parent.rglob("*.py")
        for code in re.findall(r"DATA-\d+", path.read_text(encoding="utf-8"))
    }
    assert len(printed) > 50 and printed <= CODES.keys()
    elsewhere = "".join(
        path.read_text(encoding="utf-8")
        for path in Path(laddpo.__file__).parent.rglob("*.py")
        if path.name != "bad_rows.py"
    )
    assert {code for code in CODES if code not in elsewhere} <= {"DATA-40"}  # no code without a message
