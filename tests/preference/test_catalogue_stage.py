"""Cases that only a whole prepare meets, through the command line: message, exit code, nothing left behind."""

import json
import re
from pathlib import Path

import pytest

from laddpo.cli.app import cli
from laddpo.preference.prepared import PreparedPairs
from laddpo.storage.atomic import read_json

GOOD = {"prompt": "p", "chosen": "c", "rejected": "r"}
PAGE = Path(__file__).resolve().parents[2] / "data" / "preference_data" / "README.md"


def lines(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def table(path, columns):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.table(columns), path)
    return path


def two_tables(folder):
    (folder / "many").mkdir()
    (folder / "many" / "a.csv").write_text("prompt,chosen,rejected\np,c,r\n")
    (folder / "many" / "b.csv").write_text("prompt,chosen,other\np,c,r\n")
    return folder / "many"


def link_out(folder):
    lines(folder / "outside.jsonl", GOOD)
    (folder / "inside").mkdir()
    (folder / "inside" / "a.jsonl").symlink_to(folder / "outside.jsonl")
    return folder / "inside"


def talk(*turns):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]


CASES = {
    "equal once tokenised": (
        lambda f: lines(f / "a.jsonl", {**GOOD, "rejected": "c\n"}),
        [],
        "DATA-10",
        "the same tokens as chosen",
    ),
    "prompt too long": (
        lambda f: lines(f / "a.jsonl", {**GOOD, "prompt": "long " * 50}),
        ["data.max_length=100"],
        "DATA-75",
        "Raise data.max_length",
    ),
    "text that would stall the tokenizer": (
        lambda f: lines(f / "a.jsonl", {**GOOD, "chosen": "x" * (2**20 + 1)}),
        [],
        "DATA-79",
        "1,048,577 characters",
    ),
    "no row can be used": (
        lambda f: lines(f / "a.jsonl", {**GOOD, "chosen": ""}),
        ["data.on_bad_row=skip"],
        "DATA-40",
        "None of the 1 rows",
    ),
    "every row too long": (
        lambda f: lines(f / "a.jsonl", {**GOOD, "prompt": "long " * 50}),
        ["data.max_length=100", "data.truncation=drop"],
        "DATA-75",
        "No row is left",
    ),
    "more bad rows than allowed": (
        lambda f: lines(f / "a.jsonl", GOOD, {**GOOD, "chosen": ""}),
        ["data.on_bad_row=skip", "data.max_bad_fraction=0.1"],
        "DATA-07",
        "more than data.max_bad_fraction=0.1",
    ),
    "kinds mixed in a file": (
        lambda f: lines(
            f / "a.jsonl", GOOD, {"prompt": talk("p"), "chosen": talk("p", "c"), "rejected": talk("p", "r")}
        ),
        ["data.format=explicit"],
        "DATA-59",
        "set data.format=auto",
    ),
    "implicit prompt in text": (
        lambda f: lines(f / "a.jsonl", {"chosen": "a b", "rejected": "a c"}),
        ["data.format=implicit"],
        "DATA-67",
        "a list of messages is expected",
    ),
    "dialogues that differ early": (
        lambda f: lines(f / "a.jsonl", {"chosen": talk("p", "c"), "rejected": talk("q", "r")}),
        ["data.format=implicit"],
        "DATA-66",
        "differ at message 1",
    ),
    "tables with other columns": (two_tables, [], "DATA-56", "b.csv: has the columns"),
    "parquet number": (
        lambda f: table(f / "a.parquet", {"prompt": ["p"], "chosen": [1], "rejected": ["r"]}),
        [],
        "DATA-53",
        "column chosen: is int64",
    ),
    "parquet bytes": (
        lambda f: table(f / "a.parquet", {"prompt": [b"p"], "chosen": ["c"], "rejected": ["r"]}),
        [],
        "DATA-55",
        "Save the column as text",
    ),
    "a link out of the folder": (link_out, [], "DATA-44", "is a link out of the folder"),
    "an address": (lambda f: "file:///etc/passwd", [], "DATA-91", "addresses are not read"),
    "a home": (lambda f: "~/a.jsonl", [], "DATA-91", "~ is not expanded"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_case_of_the_catalogue_ends_with_exit_code_2_and_leaves_nothing(case, tmp_path, capsys):
    make, settings, code, words = CASES[case]
    made = tmp_path / "data"
    asked = ["data=jsonl", f"data.dataset_name='{make(tmp_path)}'", f"paths.data_dir={made}", *settings]
    assert cli("prepare", [*asked, f"paths.outputs_dir={tmp_path / 'outputs'}"]) == 2
    said = capsys.readouterr().err
    assert f"({code})" in said and words in said and "Traceback" not in said
    assert not list(made.glob("prepared/*"))


def test_a_hub_dataset_that_cannot_be_had_leaves_nothing(tmp_path, monkeypatch, capsys):
    datasets = pytest.importorskip("datasets")

    def load_dataset(*_, **__):
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    made = tmp_path / "data"
    asked = ["data=hh_rlhf", "data.revision=v1", f"paths.data_dir={made}", f"paths.outputs_dir={tmp_path / 'o'}"]
    assert cli("prepare", asked) == 2
    assert "Anthropic/hh-rlhf@v1, split train could not be had" in capsys.readouterr().err
    assert not list(made.glob("prepared/*"))


def readme_rows():
    return re.findall(r"```json\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


DOCUMENTED = [["data=jsonl"], ["data=jsonl"], ["data=jsonl", "data.format=implicit"], ["data=hh_rlhf"]]


@pytest.mark.parametrize("number", range(5))
def test_the_documented_shapes_of_rows_are_read(number, tmp_path):
    settings = [*DOCUMENTED, ["data=gsm8k_candidates"]][number]
    blocks = readme_rows()
    assert len(blocks) == 5
    path = tmp_path / "rows.jsonl"
    path.write_text(blocks[number], encoding="utf-8")
    made = tmp_path / "data"
    asked = [*settings, f"data.dataset_name={path}", f"paths.data_dir={made}", f"paths.outputs_dir={tmp_path / 'o'}"]
    assert cli("prepare", asked) == 0
    (folder,) = made.glob("prepared/*")
    assert len(PreparedPairs.load(folder)) == (3 if number == 4 else 2)
    assert read_json(folder / "report.json")["rows"]["bad"] == 0
