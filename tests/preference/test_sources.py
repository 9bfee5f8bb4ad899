"""What each source makes of its rows: real files, every shape, columns by other names, the hub's edge mocked."""

import json
from collections import Counter
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from laddpo.errors import UserError
from laddpo.preference.encoding.encode import TextEncoder
from laddpo.preference.preparation import Part, Rules, prepare_pairs
from laddpo.preference.reading.bad_rows import BadRow
from laddpo.preference.reading.files import ReadLog
from laddpo.preference.reading.pairs import Message
from laddpo.preference.reading.rows import read_dialogue
from laddpo.preference.sources import SOURCES, Request, open_corpus, open_source
from laddpo.problems.grading import FunctionGrader

SHIPPED = Path(__file__).resolve().parents[2] / "data" / "llada_nano"


def read(source, path, rows=None, corpus=False, **asked):
    if rows is not None:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    opened = open_corpus(source) if corpus else open_source(source)
    return list(opened.read(Request(dataset_name=str(path) if path else None, **asked), ReadLog()))


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "s"}


def test_all_800_real_dialogues_are_accounted_for_and_whole(shared_folder, tmp_path):
    path = shared_folder / "data" / "hh_rlhf_harmless_test_first800.jsonl"
    encoder = TextEncoder(AutoTokenizer.from_pretrained(SHIPPED), max_length=4096)
    part = Part("hh_rlhf", Request(dataset_name=str(path)))
    rules = Rules(validation_fraction=0.1, on_bad_row="skip")
    prepared = prepare_pairs(tmp_path, "hh", [part], encoder, rules, show=str, progress=False)
    report = prepared.report()
    assert report["rows"]["read"] == 800
    assert {code: entry["count"] for code, entry in report["bad"].items()} == {"DATA-07": 2}
    assert report["rows"]["kept"] == report["rows"]["train"] + report["rows"]["validation"] == 798
    raw = [json.loads(line) for line in path.read_bytes().split(b"\n") if line]
    dialogues = {(row["chosen"], row["rejected"]) for row in raw}

    def written_again(record, response):
        names = {"user": "Human", "assistant": "Assistant"}
        turns = [*record["prompt"], assistant(response)]
        return "".join(f"\n\n{names[turn['role']]}: {turn['content']}" for turn in turns)

    def spaced(text):
        return " ".join(text.split())

    known = {tuple(map(spaced, pair)) for pair in dialogues}
    records = [*prepared.texts("train"), *prepared.texts("validation")]
    for record in records:
        both = written_again(record, record["chosen"]), written_again(record, record["rejected"])
        assert tuple(map(spaced, both)) in known
        assert record["prompt"][-1]["role"] == "user"
    turns = Counter(len(record["prompt"]) for record in records)
    assert turns[1] == 243 and max(turns) == 23  # multi-turn prompts are whole
    with pytest.raises(UserError) as caught:
        prepare_pairs(tmp_path, "hh", [part], encoder, Rules(), show=str, progress=False)
    assert f"  2 rows, at {path}:87, :517: chosen: empty after strip" in str(caught.value)


def test_real_gsm8k_pairs_are_split_by_question(shared_folder, tmp_path):
    path = shared_folder / "data" / "gsm8k_preferences.jsonl"
    encoder = TextEncoder(AutoTokenizer.from_pretrained(SHIPPED), max_length=4096)
    part = Part("jsonl", Request(dataset_name=str(path)))
    prepared = prepare_pairs(
        tmp_path, "gsm8k", [part], encoder, Rules(validation_fraction=0.2), show=str, progress=False
    )
    assert len(prepared) == 1863
    sides = [{record["prompt"][0]["content"] for record in prepared.texts(side)} for side in ("train", "validation")]
    assert not sides[0] & sides[1]
    assert len(sides[0] | sides[1]) == 561
    assert 0.1 < len(prepared.validation) / 1863 < 0.3


def test_a_wrong_column_is_answered_with_the_one_that_has_the_name(tmp_path):
    row = {"question": "q", "prompt": "p", "chosen": "c", "rejected": "r"}
    with pytest.raises(UserError, match=r"data\.columns\.prompt is 'nope'.*DATA-104.*data\.columns\.prompt=prompt"):
        read("jsonl", tmp_path / "a.jsonl", [row], columns={"prompt": "nope"})
    rows = [{**row, "nope": "p"}, row]
    _, bad = read("jsonl", tmp_path / "a.jsonl", rows, columns={"prompt": "nope"})
    assert bad.code == "DATA-01" and bad.advice == "Set data.columns.prompt=prompt."


def test_a_dialogue_is_split_at_its_last_assistant_turn_not_at_the_first_difference(tmp_path):
    talk = "\n\nHuman: Hi\n\nAssistant: Hello there\n\nHuman: And?\n\nAssistant:"
    (pair,) = read("hh_rlhf", tmp_path / "a.jsonl", [{"chosen": talk + " Well, yes", "rejected": talk + " Well, no"}])
    assert pair.prompt == (Message("user", "Hi"), Message("assistant", "Hello there"), Message("user", "And?"))
    assert (pair.chosen, pair.rejected) == ("Well, yes", "Well, no")


@pytest.mark.parametrize(
    ("chosen", "rejected", "code", "words"),
    [
        (
            "\n\nHuman: Hi\n\nAssistant: A\n\nHuman: so\n\nAssistant: c",
            "\n\nHuman: Hi\n\nAssistant: B\n\nHuman: so\n\nAssistant: r",
            "DATA-66",
            "differ at message 2, before the last assistant turn",
        ),
        (
            "\n\nHuman: Hi\n\nAssistant: A\n\nHuman: so\n\nAssistant: c",
            "\n\nHuman: Hi\n\nAssistant: A",
            "DATA-66",
            "differ at message 2",
        ),
        (
            "\n\nHuman: Hi\n\nAssistant: A\n\nHuman: so",
            "\n\nHuman: Hi\n\nAssistant: A",
            "DATA-65",
            "ends with a user turn",
        ),
        ("Hi\n\nAssistant: A", "\n\nHuman: Hi\n\nAssistant: A", "DATA-64", "starts with 'Hi"),
        ("\n\nHuman: Hi\n\nAssistant: A", "\n\nHuman: Hi\n\nAssistant:  ", "DATA-07", "has no text"),
        ("\n\nHuman: Hi\n\nAssistant: A", "\n\nHuman: Hi\n\nAssistant: A", "DATA-09", "no preference"),
    ],
)
def test_dialogues_that_are_no_pair_are_reported(chosen, rejected, code, words, tmp_path):
    (bad,) = read("hh_rlhf", tmp_path / "a.jsonl", [{"chosen": chosen, "rejected": rejected}])
    assert isinstance(bad, BadRow)
    assert bad.code == code and words in str(bad)


def test_speakers_named_inside_a_sentence_do_not_split_it():
    (first, second) = read_dialogue("\n\nHuman: Say Human: loud\n\nAssistant: The Assistant: word\n\nmore", "chosen")
    assert first.content == "Say Human: loud"
    assert second.content == "The Assistant: word\n\nmore"


CONVERSATIONS = {
    "system turns": ([SYSTEM, user("p")], [assistant("c")], [assistant("r")]),
    "whole conversations": ([user("p")], [user("p"), assistant("c")], [user("p"), assistant("r")]),
    "whole conversations without the system turn": (
        [SYSTEM, user("p")],
        [user("p"), assistant("c")],
        [SYSTEM, user("p"), assistant("r")],
    ),
    "several turns": ([user("p"), assistant("q"), user("s")], [assistant("c")], [assistant("r")]),
}


@pytest.mark.parametrize("case", CONVERSATIONS)
def test_conversations_keep_their_turns(case, tmp_path):
    prompt, chosen, rejected = CONVERSATIONS[case]
    (pair,) = read("jsonl", tmp_path / "a.jsonl", [{"prompt": prompt, "chosen": chosen, "rejected": rejected}])
    assert [(message.role, message.content) for message in pair.prompt] == [(m["role"], m["content"]) for m in prompt]
    assert (pair.chosen, pair.rejected) == ("c", "r")


def test_an_implicit_prompt_is_what_both_conversations_share_up_to_the_last_turn(tmp_path):
    rows = [
        {"chosen": [user("p"), assistant("yes, a")], "rejected": [user("p"), assistant("yes, b")]},
        {"chosen": [user("p"), assistant("c")], "rejected": [user("q"), assistant("r")]},
        {"chosen": [user("p")], "rejected": [user("p"), assistant("r")]},
        {"chosen": "text", "rejected": "text"},
    ]
    found = read("jsonl", tmp_path / "a.jsonl", rows, format="implicit")
    assert (found[0].prompt, found[0].chosen) == ((Message("user", "p"),), "yes, a")
    assert [bad.code for bad in found[1:]] == ["DATA-66", "DATA-65", "DATA-67"]
    assert [getattr(row, "code", row) for row in read("jsonl", tmp_path / "a.jsonl", rows)] == [
        found[0],
        "DATA-01",  # no turn in common
        "DATA-65",
        "DATA-01",
    ]


def test_a_prompt_is_looked_for_in_the_messages_only_where_none_is_named(tmp_path):
    row = {"chosen": [user("p"), assistant("c")], "rejected": [user("p"), assistant("r")]}
    late = {
        "chosen": [user("p"), assistant("a"), user("q"), assistant("c")],
        "rejected": [user("p"), assistant("b"), user("q"), assistant("r")],
    }
    answers = {"chosen": [assistant("c")], "rejected": [assistant("c")]}
    pair, *bad = read("jsonl", tmp_path / "a.jsonl", [row, late, answers])
    assert (pair.prompt, pair.chosen, pair.rejected) == ((Message("user", "p"),), "c", "r")
    assert [one.code for one in bad] == ["DATA-66", "DATA-01"]
    with pytest.raises(UserError, match="DATA-104"):
        read("jsonl", tmp_path / "a.jsonl", [row], columns={"prompt": "question"})
    (explicit,) = read("jsonl", tmp_path / "a.jsonl", [row], format="explicit")
    assert explicit.code == "DATA-01" and "set data.format=implicit" in explicit.advice


def test_texts_without_a_prompt_are_told_to_name_it_and_only_dialogues_to_use_hh_rlhf(tmp_path):
    texts = {"chosen": "Is it? Yes.", "rejected": "Is it? No."}
    turns = {name: f"\n\nHuman: Is it?\n\nAssistant: {name}" for name in texts}
    for format in ("auto", "implicit"):
        plain, dialogue = read("jsonl", tmp_path / "a.jsonl", [texts, turns], format=format)
        assert "move it there: text does not show where it ends" in plain.advice and "hh_rlhf" not in plain.advice
        assert dialogue.advice == "These are dialogues of Anthropic/hh-rlhf: use data=hh_rlhf."


def test_columns_by_other_names_are_mapped(tmp_path):
    rows = [{"question": "p", "good": "c", "bad": "r", "gold": "42"}]
    columns = {"prompt": "question", "chosen": "good", "rejected": "bad", "answer": "gold"}
    (pair,) = read("jsonl", tmp_path / "a.jsonl", rows, columns=columns)
    assert (pair.prompt[0].content, pair.chosen, pair.rejected, pair.answer) == ("p", "c", "r", "42")


def test_columns_of_our_own_names_are_honoured_where_they_are_set_and_named_where_they_are_not(tmp_path):
    rows = [{"system": "s", "prompt": "p", "chosen": "c", "rejected": "r", "answer": "42"}]
    log = ReadLog()
    path = tmp_path / "a.jsonl"
    for source, columns in (("jsonl", {}), ("orca_dpo_pairs", {"prompt": "prompt", "system": None})):
        (pair,) = read(source, path, rows, columns=columns)
        assert ([message.role for message in pair.prompt], pair.answer) == (["user"], None)
    list(open_source("jsonl").read(Request(dataset_name=str(path)), log))
    assert log.warnings == {"column 'system' is not used": 1, "column 'answer' is not used": 1}
    columns = {"prompt": "prompt", "system": "system", "answer": "answer"}
    for source in ("jsonl", "orca_dpo_pairs", "ultrafeedback"):
        (pair,) = read(source, path, rows, columns=columns)
        assert ([message.content for message in pair.prompt], pair.answer) == (["s", "p"], "42")


def test_known_datasets_have_ready_shapes(tmp_path):
    (pair,) = read(
        "ultrafeedback",
        tmp_path / "u.jsonl",
        [{"prompt": "p", "chosen": [user("p"), assistant("c")], "rejected": [user("p"), assistant("r")], "score": 1.5}],
    )
    assert (pair.prompt, pair.chosen) == ((Message("user", "p"),), "c")
    rows = [{"system": text, "question": "p", "chosen": "c", "rejected": "r"} for text in ("You are brief.", "")]
    with_system, without = read("orca_dpo_pairs", tmp_path / "o.jsonl", rows)
    assert [message.role for message in with_system.prompt] == ["system", "user"]
    assert [message.role for message in without.prompt] == ["user"]
    array = tmp_path / "synthetic.jsonl"  # an array in a file named .jsonl
    array.write_text(
        '[{"prompt": "p", "chosen": " c", "rejected": " r"},\n {"prompt": "q", "chosen": "c", "rejected": "r"}]'
    )
    assert [pair.prompt[0].content for pair in read("laddpo_public", array)] == ["p", "q"]


def test_names_are_looked_up_in_the_folder_for_preference_data(tmp_path, monkeypatch):
    folder = tmp_path / "preference_data"
    folder.mkdir()
    (folder / "mine.jsonl").write_text('{"prompt": "p", "chosen": "c", "rejected": "r"}\n')
    monkeypatch.chdir(tmp_path)
    request = Request(dataset_name="mine.jsonl", preference_dir=folder)
    assert len(list(open_source("jsonl").read(request, ReadLog()))) == 1
    with pytest.raises(UserError, match=r"Did you mean .*mine\.jsonl"):
        list(open_source("jsonl").read(Request(dataset_name="mime.jsonl", preference_dir=folder), ReadLog()))


def test_a_pattern_or_a_folder_means_all_of_its_files(tmp_path):
    for name in ("b.jsonl", "a.jsonl"):
        (tmp_path / name).write_text(json.dumps({"prompt": name, "chosen": "c", "rejected": "r"}))
    (tmp_path / "README.md").write_text("not rows")
    log = ReadLog()
    pairs = list(open_source("jsonl").read(Request(dataset_name=str(tmp_path)), log))
    assert [pair.prompt[0].content for pair in pairs] == ["a.jsonl", "b.jsonl"]
    assert any("README.md" in message for message in log.warnings)
    assert len(read("jsonl", tmp_path / "*.jsonl")) == 2


def test_table_files_read_together_must_have_the_same_columns(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,chosen,rejected\np,c,r\n")
    (tmp_path / "b.csv").write_text("question,chosen,rejected\np,c,r\n")
    with pytest.raises(UserError, match=r"b\.csv: has the columns .*question.*a\.csv.*DATA-56"):
        read("jsonl", tmp_path)


def test_parquet_columns_of_the_wrong_type_are_refused(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    binary = pa.table({"prompt": pa.array([b"p"], pa.binary()), "chosen": ["c"], "rejected": ["r"]})
    pq.write_table(binary, tmp_path / "binary.parquet")
    with pytest.raises(UserError, match=r"column prompt: is binary.*DATA-55"):
        read("jsonl", tmp_path / "binary.parquet")
    pq.write_table(pa.table({"prompt": ["p"], "chosen": [1], "rejected": ["r"]}), tmp_path / "number.parquet")
    with pytest.raises(UserError, match=r"column chosen: is int64, want string .*DATA-53"):
        read("jsonl", tmp_path / "number.parquet")
    names = pa.array(["c"]).dictionary_encode()
    pq.write_table(pa.table({"prompt": ["p"], "chosen": names, "rejected": ["r"]}), tmp_path / "names.parquet")
    assert len(read("jsonl", tmp_path / "names.parquet")) == 1


ODD_COLUMNS = {
    "date": lambda pa: pa.array([2**31 - 1], pa.int32()).cast(pa.date32()),
    "time": lambda pa: pa.array([2**55], pa.timestamp("ms")),
    "zone": lambda pa: pa.array([1], pa.timestamp("s", tz="Mars/Base")),
    "text": lambda pa: pa.array([b"\xff"], pa.binary()).view(pa.string()),
    "bytes": lambda pa: pa.array([b"\xff"], pa.binary()),
    "nested": lambda pa: pa.array([[{"day": 2**31 - 1}]], pa.list_(pa.struct([("day", pa.date32())]))),
}


@pytest.mark.parametrize("kind", ODD_COLUMNS)
def test_a_parquet_column_that_python_cannot_hold_matters_only_where_it_is_used(kind, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = {"prompt": ["p"], "chosen": ["c"], "rejected": ["r"]}
    path, odd = tmp_path / "a.parquet", ODD_COLUMNS[kind](pa)
    pq.write_table(pa.table({"odd": odd, **texts, "answer": odd, "response": odd}), path)
    log = ReadLog()
    (pair,) = open_source("jsonl").read(Request(dataset_name=str(path)), log)
    assert (pair.prompt[0].content, pair.chosen, pair.rejected) == ("p", "c", "r")
    assert log.warnings == {f"column {name!r} is not used": 1 for name in ("odd", "answer", "response")}
    with pytest.raises(UserError, match=r"column odd: is .*\((DATA-53|DATA-55)\)\. Save the column as text\."):
        read("jsonl", path, columns={"answer": "odd"})
    pq.write_table(pa.table({"odd": odd, "chosen": ["c"]}), path)
    (bad,) = read("jsonl", path)
    assert "prompt: field missing; found the fields [odd, chosen]" in str(bad)
    pq.write_table(pa.table({"odd": odd}), path)
    (bad,) = read("jsonl", path)
    assert "prompt: field missing; found the fields [odd]" in str(bad)


def test_a_repeated_parquet_column_is_refused(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = ["prompt", "chosen", "rejected", "chosen"]
    pq.write_table(pa.Table.from_arrays([pa.array(["a"])] * 4, names), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"has a repeated column among .*'chosen'.* \(DATA-17\)"):
        read("jsonl", tmp_path / "a.parquet")


def test_candidates_and_columns_with_a_point_are_read_from_parquet(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    grader = FunctionGrader("same", lambda text, answer: text == answer)
    rows = {"q": ["1+1?"], "answer": ["2"], "candidates": [["2", "3"]]}
    pq.write_table(pa.table(rows), tmp_path / "a.parquet")
    (pair,) = read("graded_candidates", tmp_path / "a.parquet", columns={"prompt": "q"}, grader=grader)
    assert (pair.chosen, pair.rejected) == ("2", "3")
    rows = {"a": [{"b": "x"}], "a.b": [[user("p")]], "chosen": [[assistant("c")]], "rejected": [[assistant("r")]]}
    pq.write_table(pa.table(rows), tmp_path / "b.parquet")
    (pair,) = read("jsonl", tmp_path / "b.parquet", columns={"prompt": "a.b"})
    assert (pair.prompt, pair.chosen) == ((Message("user", "p"),), "c")


def test_rows_of_the_hub_come_with_their_place_and_a_warning_without_revision(monkeypatch):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([{"prompt": "p", "chosen": "c", "rejected": "r"}, {"prompt": "p"}])
    asked = {}

    def load_dataset(name, **options):
        asked.update(options, name=name)
        return rows

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    log = ReadLog()
    request = Request(dataset_name="org/pairs", dataset_split="test", revision=None)
    pair, bad = open_source("jsonl").read(request, log)
    assert asked == {"name": "org/pairs", "split": "test", "revision": None}
    assert pair.source == "org/pairs[test]:1" and str(bad).startswith("org/pairs[test]:2: chosen: is null")
    assert any("without data.revision" in message for message in log.warnings)
    assert log.files == {"org/pairs[test]": 2}


@pytest.mark.parametrize(
    ("failure", "words"),
    [
        (ValueError("Unknown split \"tran\". Should be one of ['train', 'test']."), "Did you mean train?"),
        (RuntimeError("Dataset scripts are no longer supported, but found x.py"), "never run"),
        (ConnectionError("offline"), "set data.dataset_name to their local path"),
    ],
)
def test_a_dataset_that_cannot_be_had_is_one_message(failure, words, monkeypatch):
    datasets = pytest.importorskip("datasets")

    def load_dataset(*_, **__):
        raise failure

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError) as caught:
        list(open_source("jsonl").read(Request(dataset_name="org/pairs", dataset_split="tran"), ReadLog()))
    assert words in str(caught.value) and "org/pairs" in str(caught.value)


def test_an_sft_corpus_needs_prompt_and_response(tmp_path):
    rows = [{"prompt": "p", "response": "r"}, {"prompt": [user("p")], "response": [assistant("r")]}, {"prompt": "p"}]
    text, messages, bad = read("jsonl", tmp_path / "a.jsonl", rows, corpus=True)
    assert (text.prompt, text.response) == (messages.prompt, messages.response)
    assert "response: field missing" in str(bad)


def test_every_source_says_what_its_rows_depend_on(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "p", "chosen": "c", "rejected": "r"}\n')
    moved = tmp_path / "elsewhere.jsonl"
    moved.write_bytes(path.read_bytes())
    for find in (open_source, open_corpus):
        for source in map(find, SOURCES):
            name = str(path)
            fields = source.identity(Request(dataset_name=name))
            json.dumps(fields)
            assert source.identity(Request(dataset_name=str(moved))) == fields  # content, not place
    assert open_source("arithmetic").identity(Request(seed=1)) != open_source("arithmetic").identity(Request(seed=2))
    with pytest.raises(UserError, match="did you mean hh_rlhf"):
        open_source("hh_rlfh")
