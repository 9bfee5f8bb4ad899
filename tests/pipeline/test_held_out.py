"""Own pairs from a file to a table of results on test pairs that neither training nor the checkpoint saw."""

from __future__ import annotations

import csv
import json
from itertools import combinations

import pytest

from laddpo.cli.app import cli
from laddpo.evaluation.own_pairs import held_out_facts
from laddpo.preference.prepared import SPLITS, PreparedPairs
from laddpo.results.tables import held_out_note
from laddpo.storage.atomic import read_json


def rows_of(count, prompt="prompt", chosen="chosen", rejected="rejected"):
    return [{prompt: f"{i} plus {i} is", chosen: f"{i + i}", rejected: f"{i + i + 1}"} for i in range(count)]


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def prepared(tmp_path, *settings):
    """(exit code, groups of each split): prepare with a data folder of its own."""
    places = [f"paths.data_dir={tmp_path / 'data'}", f"paths.outputs_dir={tmp_path / 'outputs'}"]
    code = cli("prepare", ["data=jsonl", *places, *settings])
    manifests = sorted((tmp_path / "data").glob("prepared/*/manifest.json"), key=lambda p: p.stat().st_mtime_ns)
    found = PreparedPairs.load(manifests[-1].parent) if manifests else None
    return code, found and {split: getattr(found, split).column("group") for split in SPLITS}


def test_prompts_are_held_out_for_a_test_that_shares_none_with_training_or_validation(tmp_path):
    rows = rows_of(60) + [{**row, "rejected": "-1"} for row in rows_of(60)]  # two pairs a prompt
    first, again = (prepared(tmp_path / name, f"data.dataset_name={write(tmp_path / f'{name}.jsonl', order)}")
                    for name, order in (("a", rows), ("b", rows[::-1])))  # fmt: skip
    assert first[0] == 0 and first[1] == again[1], "the order of the rows decides nothing"
    sides = first[1]
    assert not any(set(a) & set(b) for a, b in combinations(sides.values(), 2))
    assert 4 <= len(sides["test"]) <= 24 and sides["validation"]
    other = prepared(tmp_path / "c", f"data.dataset_name={tmp_path / 'a.jsonl'}", "seed=7")[1]
    assert other["test"] != sides["test"]


def test_a_prompt_stays_in_validation_whatever_share_the_test_gets(tmp_path):
    file = f"data.dataset_name={write(tmp_path / 'a.jsonl', rows_of(60))}"
    found = [prepared(tmp_path / str(share), file, f"data.test_fraction={share}")[1] for share in (0, 0.1, 0.3)]
    assert found[0]["validation"] == found[1]["validation"] == found[2]["validation"]
    assert not found[0]["test"] and set(found[1]["test"]) < set(found[2]["test"])


def test_a_neutral_share_is_no_part_of_the_key(tmp_path):
    file = f"data.dataset_name={write(tmp_path / 'a.jsonl', rows_of(20))}"
    for share in ("0", "0.1"):
        assert prepared(tmp_path, file, f"data.test_fraction={share}")[0] == 0
    fields = [read_json(path)["fields"] for path in (tmp_path / "data").glob("prepared/*/manifest.json")]
    assert sorted(entry.get("test_fraction", 0) for entry in fields) == [0, 0.1]


def test_two_prompts_train_without_a_test_and_a_test_that_was_asked_for_is_refused(tmp_path, capsys):
    file = f"data.dataset_name={write(tmp_path / 'a.jsonl', rows_of(2))}"
    code, sides = prepared(tmp_path, file)
    assert code == 0 and [len(sides[split]) for split in SPLITS] == [1, 1, 0]
    assert "2  pairs, of so few prompts that none is held out for the test" in capsys.readouterr().out
    for share in ("0.1", "0.3"):  # prepared already, and not yet
        assert prepared(tmp_path, file, f"data.test_fraction={share}")[0] == 2
        said = capsys.readouterr().err
        assert "DATA-88" in said and "Set data.test_fraction=0" in said
    assert prepared(tmp_path, file, "data.test_fraction=0.3", "data.validation_fraction=0.8")[0] == 2
    assert "data.test_fraction is 0.3 and data.validation_fraction is 0.8" in capsys.readouterr().err


def test_the_datas_own_test_rows_are_the_test_but_for_prompts_that_are_trained_on(tmp_path, capsys):
    write(tmp_path / "set" / "train.jsonl", rows_of(12))
    own = [{**row, "prompt": f"new {row['prompt']}"} for row in rows_of(5)]
    write(tmp_path / "set" / "test.jsonl", [*own, rows_of(3)[2]])
    code, sides = prepared(tmp_path, f"data.dataset_name={tmp_path / 'set'}")
    said = capsys.readouterr().out
    assert code == 0 and len(sides["test"]) == 5
    assert len(sides["train"]) + len(sides["validation"]) == 12, "no row for training is held out for the test"
    assert "DATA-107" in said and "not read" not in said
    assert prepared(tmp_path, f"data.dataset_name={tmp_path / 'set'}", "data.test_split=tset")[0] == 2
    assert "data.test_split is 'tset'" in capsys.readouterr().err
    changed = [{**row, "rejected": "-1"} for row in own]
    write(tmp_path / "set" / "test.jsonl", changed)
    assert len(prepared(tmp_path, f"data.dataset_name={tmp_path / 'set'}")[1]["test"]) == 5
    assert len(list((tmp_path / "data" / "prepared").iterdir())) == 2, "other test rows are other data"


def test_arithmetic_has_test_problems_and_refuses_a_share_of_its_pairs(tmp_path, capsys):
    assert cli("prepare", ["data.test_fraction=0.1", f"paths.data_dir={tmp_path}"]) == 2
    assert "data.test_fraction is 0.1" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_file_becomes_a_table_on_test_pairs_in_one_command(kind, stages, capsys):
    rows, file = rows_of(60, "question", "response_j", "response_k"), stages.folder / f"mine.{kind}"
    if kind == "csv":
        with file.open("w", newline="") as out:
            table = csv.DictWriter(out, rows[0])
            table.writeheader()
            table.writerows(rows)
    else:
        pytest.importorskip("pyarrow.parquet").write_table(pytest.importorskip("pyarrow").Table.from_pylist(rows), file)
    run = stages.folder / "run"
    assert stages.run("train", "data=jsonl", f"data.dataset_name={file}", f"output_dir={run}") == 0
    shown = capsys.readouterr().out
    results = read_json(run / "evaluation" / "results.json")
    facts = results["held_out"]
    assert facts["split"] == "test" and not facts["chose_checkpoint"] and "exact_match" not in results
    for name in ("reward_accuracy", "reward_margin", "likelihood_accuracy", "logps_chosen", "logps_rejected"):
        assert results[name]["items"] == facts["pairs"], name
        assert name.replace("_", " ") in shown
    assert "result: " in shown and "Neither training nor the choice of the checkpoint saw them" in shown
    assert "question as prompt" in shown
    (said,) = [line for line in shown.splitlines() if line.startswith("pairs: answers of ")]
    assert "the two of a pair differ in " in said
    ids = {json.loads(line)["id"] for line in (run / "evaluation" / "pairs.jsonl").read_text().splitlines()}
    (folder,) = (stages.folder / "data" / "prepared").iterdir()
    assert ids <= set(PreparedPairs.load(folder).test.column("id"))
    assert (run / "evaluation" / "plots" / "evaluation.png").is_file()

    note = held_out_note(results)
    assert cli("report", [f"run={run}", f"output_dir={stages.folder / 'page'}"]) == 0
    assert note in (stages.folder / "page" / "report.html").read_text()
    assert stages.run("export", f"run={run}", f"output_dir={stages.folder / 'out'}", "export.adapter_only=true") == 0
    assert note in (stages.folder / "out" / "README.md").read_text()


def test_validation_pairs_that_chose_the_checkpoint_say_so():
    facts = held_out_facts("validation", ["a", "a", "b"], "auto", [], ties=1)
    assert facts == {"split": "validation", "pairs": 3, "prompts": 2, "chose_checkpoint": True, "ties": 1}
    note = held_out_note({"held_out": facts})
    assert "chose the checkpoint" in note and "data.test_fraction=0.1" in note and "1 of them tie" in note
    assert "coarse" in note and held_out_note({}) == ""
    assert held_out_facts("validation", ["a"], "auto", ["arithmetic"]) is None
    assert held_out_facts("validation", ["a"], "none", []) is None
    assert held_out_facts("test", ["a"], "auto", ["arithmetic"])["chose_checkpoint"] is False
