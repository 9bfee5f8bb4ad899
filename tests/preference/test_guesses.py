"""Columns of real preference sets under their own names: taken if one thing can be meant, else refused."""

from __future__ import annotations

import csv
import json

import pytest

from laddpo.cli.app import cli
from laddpo.errors import UserError
from laddpo.preference.reading.files import ReadLog
from laddpo.preference.sources import Request, open_corpus, open_source

PAIR = ("p", "c", "r")
TAKEN = {  # the columns of a row, and what each is taken for
    "orca": (("question", "chosen", "rejected"), "question as prompt"),
    "stack exchange": (("question", "response_j", "response_k"), "response_j as chosen, response_k as rejected"),
    "prompt is there": (("prompt", "response_j", "response_k"), "response_j as chosen, response_k as rejected"),
    "responses": (("instruction", "chosen_response", "rejected_response"), "chosen_response as chosen"),
    "capitals": (("Prompt", "Chosen Answer", "Rejected Answer"), "Prompt as prompt, Chosen Answer as chosen"),
    "papers": (("query", "y_w", "y_l"), "query as prompt, y_w as chosen, y_l as rejected"),
}


def file_of(tmp_path, kind, rows):
    path = tmp_path / f"a.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "csv":
        with path.open("w", newline="") as out:
            table = csv.DictWriter(out, rows[0])
            table.writeheader()
            table.writerows(rows)
    else:
        pytest.importorskip("pyarrow.parquet").write_table(pytest.importorskip("pyarrow").Table.from_pylist(rows), path)
    return path


def read(tmp_path, rows, kind="jsonl", source=open_source, **asked):
    log = ReadLog()
    request = Request(dataset_name=str(file_of(tmp_path, kind, rows)), **asked)
    return list(source("jsonl").read(request, log)), log


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("case", TAKEN)
def test_columns_are_taken_by_their_names_and_the_report_says_so_in_one_line(case, kind, tmp_path):
    columns, words = TAKEN[case]
    ((pair,), log) = read(tmp_path, [dict(zip(columns, PAIR, strict=True)) | {"score": "1"}], kind)
    assert (pair.prompt[0].content, pair.chosen, pair.rejected) == PAIR
    (said,) = [text for text in log.warnings if text.startswith("columns taken by their names: ")]
    assert words in said and "set data.columns." in said


def test_a_tsv_is_separated_by_tabs_whatever_its_texts_hold(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text("question, asked\tchosen\trejected\nIs 1, 2 or 3 even?\t2, only\t1;3\n")
    log = ReadLog()
    request = Request(dataset_name=str(path), columns={"prompt": "question, asked"})
    (pair,) = open_source("jsonl").read(request, log)
    assert (pair.prompt[0].content, pair.chosen, pair.rejected) == ("Is 1, 2 or 3 even?", "2, only", "1;3")
    assert not log.warnings


def test_a_wrong_ending_is_refused_though_the_same_bytes_were_prepared(tmp_path, capsys):
    rows = [{"prompt": f"p{i}", "chosen": "c", "rejected": "r"} for i in range(5)]
    right = file_of(tmp_path, "jsonl", rows)
    wrong = tmp_path / "a.txt"
    wrong.write_bytes(right.read_bytes())
    places = [f"paths.data_dir={tmp_path / 'data'}", f"paths.outputs_dir={tmp_path / 'outputs'}"]
    assert cli("prepare", [*places, f"data={right}"]) == 0
    capsys.readouterr()
    assert cli("prepare", [*places, f"data={wrong}"]) == 2
    said = capsys.readouterr()
    assert "a.txt: has no known kind of name" in said.err and "already prepared" not in said.out


def test_instruction_and_input_are_one_prompt(tmp_path):
    rows = [{"instruction": "Add.", "input": "1 and 2", "output": "3", "rejected": "4"}]
    ((pair,), log) = read(tmp_path, rows)
    assert (pair.prompt[0].content, pair.chosen) == ("Add.\n\n1 and 2", "3")
    (said,) = [text for text in log.warnings if text.startswith("columns taken")]
    assert "instruction as prompt, output as chosen, input as input" in said


def test_a_name_that_the_settings_give_is_never_overruled_and_ours_come_first(tmp_path):
    row = {"question": "q", "text": "t", "chosen": "c", "better": "b", "rejected": "r"}
    ((pair,), log) = read(tmp_path, [row], columns={"prompt": "text"})
    assert (pair.prompt[0].content, pair.chosen) == ("t", "c")
    assert not any(text.startswith("columns taken") for text in log.warnings)


def test_a_column_that_a_later_row_has_is_not_guessed(tmp_path):
    rows = [{"context": "x", "chosen": "c", "rejected": "r"}, {"prompt": "p", "chosen": "c", "rejected": "r"}]
    (found, log) = read(tmp_path, rows)
    assert "field missing" in str(found[0]) and found[1].prompt[0].content == "p"
    assert not any(text.startswith("columns taken") for text in log.warnings)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_what_may_mean_two_things_is_refused_with_all_columns_and_a_line_that_maps_them(kind, tmp_path):
    rows = [{"question": "q", "problem": "p", "good": "c", "bad": "r", "n": "1"}]
    with pytest.raises(UserError) as caught:
        read(tmp_path, rows, kind)
    said = str(caught.value)
    assert "question and problem may each be the prompt" in said and "[question, problem, good, bad, n]" in said
    assert "data.columns.prompt=question data.columns.chosen=good data.columns.rejected=bad" in said
    ((pair,), _) = read(tmp_path, rows, kind, columns={"prompt": "problem"})
    assert (pair.prompt[0].content, pair.chosen) == ("p", "c")


def test_conversations_that_hold_their_prompt_need_no_other_column(tmp_path):
    turns = [[{"role": "user", "content": "u"}, {"role": "assistant", "content": text}] for text in "cr"]
    ((pair,), log) = read(tmp_path, [{"context": "elsewhere", "chosen": turns[0], "rejected": turns[1]}])
    assert pair.prompt[0].content == "u" and not any("taken" in text for text in log.warnings)


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        ({"question": "p", "answer": "a"}, ("p", "a")),
        ({"instruction": "p", "input": "q", "output": "a"}, ("p\n\nq", "a")),
        ({"prompt": "p", "completion": "a"}, ("p", "a")),
        ({"question": "p", "response_j": "a", "response_k": "b"}, ("p", "a")),
        ({"prompt": "p", "answer": "x", "chosen": "a", "rejected": "b"}, ("p", "a")),
    ],
)
def test_sft_takes_the_names_of_question_and_answer(row, wanted, tmp_path):
    ((example,), log) = read(tmp_path, [row], source=open_corpus)
    assert (example.prompt[0].content, example.response) == wanted
    assert any(text.startswith("columns taken") for text in log.warnings) == ("chosen" not in row)
