"""The whole of prepare: rows accounted for, decisions by content, a folder that is whole or absent."""

import errno
import gzip
import json
import os
import random
import re
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from transformers import AutoTokenizer

from laddpo.errors import UserError
from laddpo.preference import preparation
from laddpo.preference.encoding.encode import TextEncoder
from laddpo.preference.preparation import Part, Rules, find_prepared, prepare_examples, prepare_pairs
from laddpo.preference.prepared import PreparedPairs, chosen_examples, whole_folder
from laddpo.preference.reading.pairs import prompt_group, user_prompt
from laddpo.preference.reading.ranked import PairRule
from laddpo.preference.sources import Request
from laddpo.problems.grading import FunctionGrader
from laddpo.storage.temporaries import NAME

SHIPPED = Path(__file__).resolve().parents[2] / "data" / "llada_nano"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(SHIPPED)


def make_rows(count, pairs_per_prompt=2):
    return [
        {"prompt": f"question {i // pairs_per_prompt}?", "chosen": f"right {i}", "rejected": f"wrong {i}"}
        for i in range(count)
    ]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def prepare(folder, path, tokenizer, source="jsonl", max_length=4096, truncation="error", template="auto", **asked):
    """prepare_pairs of one source; words of Rules and of Request are told apart by name."""
    names = Rules.__dataclass_fields__
    rules = Rules(**{name: value for name, value in asked.items() if name in names})
    request = Request(
        dataset_name=str(path) if path else None,
        **{name: value for name, value in asked.items() if name in Request.__dataclass_fields__},
    )
    encoder = TextEncoder(tokenizer, template=template, max_length=max_length, truncation=truncation)
    lines = []
    prepared = prepare_pairs(folder, "test", [Part(source, request)], encoder, rules, show=lines.append, progress=False)
    prepared.said = "\n".join(lines)
    return prepared


def everything(prepared):
    return (prepared.folder / "pairs.jsonl").read_bytes(), (prepared.folder / "tokens.safetensors").read_bytes()


def test_the_folder_holds_what_its_description_says(tmp_path, tokenizer, with_pictures):
    rows = make_rows(40)
    prepared = prepare(tmp_path / "out", write_rows(tmp_path / "a.jsonl", rows), tokenizer, validation_fraction=0.3)
    folder = prepared.folder
    assert {path.name for path in folder.iterdir()} == {
        "pairs.jsonl", "tokens.safetensors", "report.json", "report.png", "manifest.json",
    }  # fmt: skip
    records = [json.loads(line) for line in (folder / "pairs.jsonl").read_text("utf-8").splitlines()]
    assert sorted((r["prompt"][0]["content"], r["chosen"], r["rejected"]) for r in records) == sorted(
        (row["prompt"], row["chosen"], row["rejected"]) for row in rows
    )
    tokens = load_file(folder / "tokens.safetensors")
    assert tokens["ids"].dtype == np.int32 and tokens["offsets"].dtype == np.int64
    assert tokens["offsets"].shape == (40 * 3 + 1,) and tokens["offsets"][-1] == len(tokens["ids"])
    first = records[0]
    texts = [
        tokenizer.decode(tokens["ids"][a:b]) for a, b in zip(tokens["offsets"], tokens["offsets"][1:4], strict=False)
    ]
    assert first["prompt"][0]["content"] in texts[0]
    assert texts[1:] == [first["chosen"] + "<|eot_id|>", first["rejected"] + "<|eot_id|>"]
    assert (folder / "report.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "report.png").stat().st_size > 5000


def test_loading_gives_back_every_pair_on_its_side(tmp_path, tokenizer):
    made = prepare(
        tmp_path / "out", write_rows(tmp_path / "a.jsonl", make_rows(40)), tokenizer, validation_fraction=0.3
    )
    prepared = PreparedPairs.load(made.folder)
    assert len(prepared.train) + len(prepared.validation) == len(prepared) == 40
    assert 0 < len(prepared.validation) < 40
    encoder = TextEncoder(tokenizer)
    for side, rows in (("train", prepared.train), ("validation", prepared.validation)):
        records = list(prepared.texts(side))
        assert [pair.id for pair in rows] == [record["id"] for record in records] == rows.column("id")
        for pair, record in zip(rows, records, strict=True):
            assert (
                pair.prompt_ids.tolist() == encoder.encode_prompt(user_prompt(record["prompt"][0]["content"])).tolist()
            )
            assert encoder.decode_response(pair.chosen_ids) == record["chosen"]
            assert encoder.decode_response(pair.rejected_ids) == record["rejected"]
        assert rows.lengths().tolist() == [[len(p.prompt_ids), len(p.chosen_ids), len(p.rejected_ids)] for p in rows]
    assert [pair.id for pair in prepared.train[2:5]] == [prepared.train[i].id for i in (2, 3, 4)]
    assert prepared.train[-1].id == prepared.train[len(prepared.train) - 1].id
    example = chosen_examples(prepared.train[:1])[0]
    assert example.response_ids.tolist() == prepared.train[0].chosen_ids.tolist()


def test_the_same_rows_in_any_order_and_packing_give_the_same_pairs(tmp_path, tokenizer):
    rows = make_rows(60) + make_rows(3)  # with three repeated rows
    shuffled = random.Random(1).sample(rows, len(rows))
    asked = {"validation_fraction": 0.25, "random_sample_size": 40, "seed": 5}
    write_rows(tmp_path / "a.jsonl", rows)
    write_rows(tmp_path / "b.jsonl", shuffled)
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress((tmp_path / "b.jsonl").read_bytes()))
    two = tmp_path / "two"
    two.mkdir()
    write_rows(two / "1.jsonl", shuffled[:25])
    (two / "2.json").write_text(json.dumps(shuffled[25:]), encoding="utf-8")
    prepared = [
        prepare(tmp_path / f"out{i}", path, tokenizer, **asked)
        for i, path in enumerate((tmp_path / "a.jsonl", tmp_path / "b.jsonl", tmp_path / "c.jsonl.gz", two))
    ]
    assert len({everything(each) for each in prepared}) == 1
    assert len({each.content for each in prepared}) == 1
    other_seed = prepare(tmp_path / "out5", tmp_path / "a.jsonl", tokenizer, **{**asked, "seed": 6})
    assert other_seed.content != prepared[0].content


def test_tables_give_the_same_pairs_as_lines(tmp_path, tokenizer):
    import csv

    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = make_rows(20)
    rows[3]["chosen"] = 'two\nlines, "quoted"'
    write_rows(tmp_path / "a.jsonl", rows)
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, ["prompt", "chosen", "rejected"])
        writer.writeheader()
        writer.writerows(rows)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    with pa.CompressedOutputStream(str(tmp_path / "z.jsonl.zst"), "zstd") as out:
        out.write((tmp_path / "a.jsonl").read_bytes())
    contents = {
        prepare(tmp_path / f"out-{name}", tmp_path / name, tokenizer).content
        for name in ("a.jsonl", "a.csv", "a.parquet", "z.jsonl.zst")
    }
    assert len(contents) == 1


def test_every_row_is_accounted_for_with_reason_and_example(tmp_path, tokenizer):
    rows = make_rows(20)
    rows[4]["chosen"] = ""
    rows[7]["rejected"] = rows[7]["chosen"]
    rows[9]["prompt"] = "long " * 100
    rows.append(rows[0])
    rows.append({**rows[2], "chosen": rows[2]["rejected"], "rejected": rows[2]["chosen"]})
    rows[11]["chosen"] = "a <|mdm_mask|> b"
    path = write_rows(tmp_path / "a.jsonl", rows)
    prepared = prepare(tmp_path / "out", path, tokenizer, on_bad_row="skip", truncation="drop", max_length=120)
    report = prepared.report()
    assert report["rows"] == {
        "read": 22, "bad": 2, "not_sampled": 0, "dropped": 1, "cut": 0, "kept": 19, "train": 19, "validation": 0,
    }  # fmt: skip
    assert {code: entry["count"] for code, entry in report["bad"].items()} == {"DATA-07": 1, "DATA-09": 1}
    assert report["bad"]["DATA-07"]["examples"][0].startswith(f"{path}:5: chosen: is empty")
    assert report["dropped"]["DATA-75"]["examples"][0].startswith(f"{path}:10: ")
    assert report["duplicates"] == 1
    assert report["contradictions"] == 2
    assert report["special_token_text"] == {"<|mdm_mask|>": 1}
    rejected = [json.loads(line) for line in (prepared.folder / "rejected.jsonl").read_text("utf-8").splitlines()]
    assert [(each["place"], each["code"]) for each in rejected] == [(f"{path}:5", "DATA-07"), (f"{path}:8", "DATA-09")]
    for words in ("22 rows read = 19 kept + 2 bad + 1 dropped", "DATA-07", "<|mdm_mask|>", "reverses", "repeat"):
        assert words in prepared.said
    prompt, scored = report["samples"][0]["chosen"].split("⟦")
    assert prompt.startswith("<|startoftext|>") and scored.endswith("<|eot_id|>⟧")


def test_length_quantiles_are_those_of_the_tokens(tmp_path, tokenizer):
    rows = [{"prompt": "p", "chosen": "c" * i, "rejected": "r"} for i in range(1, 101)]
    report = prepare(tmp_path / "out", write_rows(tmp_path / "a.jsonl", rows), tokenizer).report()
    found = report["lengths"]["chosen"]
    assert (found["min"], found["p50"], found["p90"], found["max"]) == (2, 51, 91, 101)  # one terminator each
    assert found["mean"] == pytest.approx(51.5)
    assert sum(report["histograms"]["chosen"]["counts"]) == 100


def test_bad_rows_stop_the_run_with_equal_problems_in_one_line(tmp_path, tokenizer):
    rows = make_rows(60)
    for row in rows[10:40]:
        row["chosen"] = ""
    rows[5]["rejected"] = ""
    path = write_rows(tmp_path / "a.jsonl", rows)
    with pytest.raises(UserError) as caught:
        prepare(tmp_path / "out", path, tokenizer)
    head, *lines, advice = str(caught.value).splitlines()
    assert head == "31 of 60 rows cannot be used:" and "data.on_bad_row=skip" in advice
    assert lines[0].startswith(f"  {path}:6: rejected: is empty (DATA-07)")
    assert lines[1].startswith(f"  30 rows, first at {path}:11, :12, :13, :14, :15: chosen: is empty (DATA-07)")
    assert len(lines) == 2
    assert not list((tmp_path / "out").iterdir())


HALF = "\\ud800"  # as JSON writes it
BROKEN = {
    "a key": (f'{{"{HALF}": 1, "prompt": "p", "chosen": "c"}}', "rejected: field missing; found the fields [\\ud800, "),
    "a key twice": (f'{{"{HALF}": 1, "{HALF}": 2}}', "\\ud800: has the key '\\ud800' twice (DATA-17)"),
    "a role": (
        f'{{"prompt": [{{"role": "{HALF}", "content": "p"}}], "chosen": [], "rejected": []}}',
        "prompt[0].role: is '\\ud800', want one of",
    ),
    "a gold answer": (
        f'{{"prompt": "p", "chosen": "c", "rejected": "r", "gold": "{HALF}"}}',
        "answer: has half of a surrogate pair",
    ),
}


@pytest.mark.parametrize("where", BROKEN)
def test_half_a_surrogate_pair_anywhere_makes_a_bad_row_that_can_be_written_and_printed(where, tmp_path, tokenizer):
    path = write_rows(tmp_path / "a.jsonl", [{**row, "gold": "1"} for row in make_rows(4)])
    path.write_text(path.read_text() + BROKEN[where][0] + "\n")
    asked = {"columns": {"answer": "gold"}}
    prepared = prepare(tmp_path / "out", path, tokenizer, **asked, on_bad_row="skip")
    (rejected,) = map(json.loads, (prepared.folder / "rejected.jsonl").read_text("utf-8").splitlines())
    assert rejected["place"] == f"{path}:5"
    with pytest.raises(UserError, match=re.escape(f"{path}:5: {BROKEN[where][1]}")) as caught:
        prepare(tmp_path / "out", path, tokenizer, **asked)
    (prepared.said + str(caught.value)).encode("utf-8")


def test_the_places_of_equal_problems_name_each_file_once(tmp_path, tokenizer):
    rows = make_rows(30)
    for row in (rows[4], rows[7], rows[21]):
        row["chosen"] = ""
    files = [write_rows(tmp_path / name, part) for name, part in (("a.jsonl", rows[:20]), ("b.jsonl", rows[20:]))]
    with pytest.raises(UserError, match=re.escape(f"  3 rows, at {files[0]}:5, :8, {files[1]}:2: chosen: is empty")):
        prepare(tmp_path / "out", tmp_path / "?.jsonl", tokenizer)


def test_problems_are_listed_by_file_and_line_the_first_twenty_of_them(tmp_path, tokenizer):
    """The fields, and so the problems, all differ."""
    path = write_rows(tmp_path / "a.jsonl", [{f"p{i}": "p", "chosen": "c", "rejected": "r"} for i in range(30)])
    with pytest.raises(UserError) as caught:
        prepare(tmp_path / "out", path, tokenizer)
    _, *lines, more, _ = str(caught.value).splitlines()
    assert [int(line.split(f"{path}:")[1].split(":")[0]) for line in lines] == list(range(1, 21))
    assert more == "  … and 10 more."


def test_rows_that_are_too_long_are_one_line_with_the_length_that_fits_them(tmp_path, tokenizer):
    rows = [{"prompt": "p" * (100 + i), "chosen": "c" * (i + 1), "rejected": "r"} for i in range(30)]
    path = write_rows(tmp_path / "a.jsonl", rows)
    with pytest.raises(UserError) as caught:
        prepare(tmp_path / "out", path, tokenizer, max_length=64)
    _, line, _ = str(caught.value).splitlines()
    assert line.startswith(f"  30 rows, first at {path}:1, :2, :3, :4, :5: has ") and "(DATA-75)" in line
    (fits,) = re.findall(r"data\.max_length=(\d+) would fit all 30", line)
    with pytest.raises(UserError, match=r"data\.max_length=\d+ would fit it"):
        prepare(tmp_path / "out", path, tokenizer, max_length=int(fits) - 1)
    assert len(prepare(tmp_path / "out", path, tokenizer, max_length=int(fits))) == 30


def test_all_columns_that_a_file_names_otherwise_are_told_at_once(tmp_path, tokenizer):
    path = write_rows(tmp_path / "a.jsonl", [{"question": "p", "response_j": "c", "response_k": "r", "input": "i"}])
    with pytest.raises(
        UserError, match=r"question and input may each be the prompt; found the columns .* \(DATA-108\)"
    ):
        prepare(tmp_path / "out", path, tokenizer)


def test_more_bad_rows_than_allowed_stop_the_run_even_when_skipping(tmp_path, tokenizer):
    rows = make_rows(10)
    rows[0]["chosen"] = rows[1]["chosen"] = ""
    path = write_rows(tmp_path / "a.jsonl", rows)
    with pytest.raises(UserError, match=r"20\.0%.*data\.max_bad_fraction=0\.1"):
        prepare(tmp_path / "out", path, tokenizer, on_bad_row="skip", max_bad_fraction=0.1)
    assert len(prepare(tmp_path / "out", path, tokenizer, on_bad_row="skip", max_bad_fraction=0.2)) == 8
    for row in rows:
        row["chosen"] = ""
    with pytest.raises(UserError, match="DATA-40"):
        prepare(tmp_path / "out2", write_rows(tmp_path / "b.jsonl", rows), tokenizer, on_bad_row="skip")


def test_no_row_left_says_which_setting_dropped_them(tmp_path, tokenizer):
    path = write_rows(tmp_path / "a.jsonl", make_rows(5))
    with pytest.raises(UserError, match=r"No row is left"):
        prepare(tmp_path / "out", path, tokenizer, truncation="drop", max_length=10)


def test_a_sample_is_drawn_by_content_and_grows_without_changing(tmp_path, tokenizer):
    path = write_rows(tmp_path / "a.jsonl", make_rows(100))
    ids = [
        set(prepare(tmp_path / f"out{size}", path, tokenizer, random_sample_size=size, seed=3).columns["id"])
        for size in (10, 50, 100, 1000)
    ]
    assert [len(each) for each in ids] == [10, 50, 100, 100]
    assert ids[0] < ids[1] < ids[2] == ids[3]


def test_a_prompt_is_never_on_both_sides_and_keeps_its_side_when_rows_are_added(tmp_path, tokenizer):
    rows = make_rows(400, pairs_per_prompt=4)
    rows[1]["prompt"] = "  QUESTION   0? "  # the same question as row 0 to a reader
    sides = defaultdict(set)
    few = prepare(tmp_path / "few", write_rows(tmp_path / "a.jsonl", rows[:200]), tokenizer, validation_fraction=0.3)
    many = prepare(tmp_path / "many", write_rows(tmp_path / "b.jsonl", rows), tokenizer, validation_fraction=0.3)
    for prepared in (few, many):
        for side in ("train", "validation"):
            for record in prepared.texts(side):
                sides[prompt_group(user_prompt(record["prompt"][0]["content"]))].add(side)
    assert all(len(where) == 1 for where in sides.values())
    assert len(sides) == 100
    assert 0.2 < len(many.validation) / 400 < 0.4


def test_a_small_validation_share_of_few_prompts_is_not_empty(tmp_path, tokenizer):
    path = write_rows(tmp_path / "a.jsonl", make_rows(6))
    for seed in range(5):
        prepared = prepare(tmp_path / "out", path, tokenizer, validation_fraction=0.01, seed=seed)
        assert len(prepared.validation) == 2  # one prompt with its two pairs
    assert {count for message, count in prepared.report()["warnings"].items() if "fewer than 30" in message} == {2}
    assert "fewer than 30" in prepared.said


@pytest.mark.parametrize("rows", [make_rows(2), [*make_rows(2), {**make_rows(3)[2], "chosen": "long " * 100}]])
def test_a_validation_split_without_a_pair_is_refused_unless_it_is_asked_for(rows, tmp_path, tokenizer):
    """All rows have one prompt; or the prompt that is held out has rows that are too long."""
    path = write_rows(tmp_path / "a.jsonl", rows)
    asked = {"truncation": "drop", "max_length": 120, "seed": 0}
    with pytest.raises(UserError, match=r"none is held out .*DATA-88.*Set data\.validation_fraction=0"):
        for seed in range(9):  # one of them holds the long row's prompt out
            prepare(tmp_path / "out", path, tokenizer, **{**asked, "seed": seed}, validation_fraction=0.5)
    prepared = prepare(tmp_path / "out", path, tokenizer, **asked, validation_fraction=0.0)
    assert (len(prepared.train), len(prepared.validation)) == (2, 0)
    assert not any("held out" in message for message in prepared.report()["warnings"])


def test_few_generated_pairs_have_one_for_validation_and_notes_are_shown_again(tmp_path, tokenizer):
    first, again = (
        prepare(tmp_path, None, tokenizer, "arithmetic", num_pairs=4, validation_fraction=0.05) for _ in "ab"
    )
    assert (len(first.train), len(first.validation)) == (3, 1)
    assert "already prepared" in again.said and "fewer than 30" in again.said


def test_prompts_of_an_evaluation_set_are_counted(tmp_path, tokenizer):
    path = write_rows(tmp_path / "a.jsonl", make_rows(10))
    encoder = TextEncoder(tokenizer)
    tested = {"test set": lambda: [prompt_group(user_prompt("Question 3?")), "0" * 16]}
    parts = [Part("jsonl", Request(dataset_name=str(path)))]
    prepared = prepare_pairs(tmp_path / "out", "x", parts, encoder, Rules(), tested, show=str, progress=False)
    assert prepared.report()["leaks"] == {"test set": 2}


def test_repeated_rows_are_kept_apart_or_dropped(tmp_path, tokenizer):
    path = write_rows(tmp_path / "a.jsonl", make_rows(4) * 3)
    kept = prepare(tmp_path / "out", path, tokenizer)
    assert len(set(kept.columns["id"])) == len(kept) == 12
    assert Counter(row_id.split("-")[1] for row_id in kept.columns["id"]) == {"0": 4, "1": 4, "2": 4}
    dropped = prepare(tmp_path / "out", path, tokenizer, duplicates="drop")
    assert len(dropped) == 4
    assert dropped.report()["dropped"]["DATA-83"]["count"] == 8


@pytest.mark.parametrize("seed", range(3))
def test_a_row_repeats_another_only_where_both_were_sampled(tmp_path, tokenizer, seed):
    path = write_rows(tmp_path / "a.jsonl", make_rows(20) * 3)
    asked = {"random_sample_size": 15, "seed": seed}
    kept, dropped = (prepare(tmp_path / "out", path, tokenizer, **asked, duplicates=rule) for rule in ("keep", "drop"))
    unique = {row["chosen"] for row in kept.texts("train")}
    assert sorted(row["chosen"] for row in dropped.texts("train")) == sorted(unique)
    assert kept.report()["duplicates"] == dropped.report()["duplicates"] == 15 - len(unique)


def test_cut_prompts_are_counted_and_written_as_encoded(tmp_path, tokenizer):
    rows = [
        {"prompt": "0123456789" * 5, "chosen": "yes", "rejected": "no"},
        {"prompt": "p", "chosen": "a", "rejected": "b"},
    ]
    path = write_rows(tmp_path / "a.jsonl", rows)
    prepared = prepare(tmp_path / "out", path, tokenizer, truncation="keep_end", max_length=40)
    report = prepared.report()
    assert report["rows"]["cut"] == 1 and report["cut"]["rows"] == 1
    record = next(record for record in prepared.texts("train") if "cut_tokens" in record)
    assert record["cut_tokens"] == report["cut"]["tokens"] > 0
    assert rows[0]["prompt"].endswith(record["prompt"][0]["content"])
    assert "prompt cut by" in report["cut"]["examples"][0]


def test_a_finished_folder_is_found_again_and_a_changed_setting_makes_another(tmp_path, tokenizer):
    path = write_rows(tmp_path / "a.jsonl", make_rows(10))
    first = prepare(tmp_path / "out", path, tokenizer)
    before = {file: file.stat().st_mtime_ns for file in first.folder.iterdir()}
    again = prepare(tmp_path / "out", path, tokenizer)
    assert again.folder == first.folder and "already prepared" in again.said
    assert before == {file: file.stat().st_mtime_ns for file in first.folder.iterdir()}
    for changed in ({"max_length": 100}, {"template": "plain"}, {"seed": 1}, {"validation_fraction": 0.1}):
        assert prepare(tmp_path / "out", path, tokenizer, **changed).folder != first.folder
    write_rows(path, make_rows(11))
    assert prepare(tmp_path / "out", path, tokenizer).folder != first.folder
    encoder, part = TextEncoder(tokenizer, max_length=4096), Part("jsonl", Request(dataset_name=str(path)))
    assert find_prepared(tmp_path / "out", "test", [part], encoder, Rules()) is not None
    assert find_prepared(tmp_path / "out", "test", [part], encoder, Rules(seed=9)) is None


@pytest.mark.parametrize("step", ["report_figure", "_encode_batch", "choose_rows", "report_table"])
def test_a_failure_at_any_step_leaves_nothing(step, tmp_path, tokenizer, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(preparation, step, fail)
    with pytest.raises(RuntimeError, match="a fault of ours"):
        prepare(tmp_path / "out", write_rows(tmp_path / "a.jsonl", make_rows(10)), tokenizer)
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("full", ["Spool.add", "PreparedWriter.add"])
def test_a_full_disk_is_said_in_one_message_and_leaves_nothing(full, tmp_path, tokenizer, monkeypatch):
    def fail(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(f"laddpo.preference.preparation.{full}", fail)
    with pytest.raises(UserError, match="could not be written: No space left"):
        prepare(tmp_path / "out", write_rows(tmp_path / "a.jsonl", make_rows(10)), tokenizer)
    assert not list((tmp_path / "out").iterdir())


def test_a_killed_run_leaves_no_folder_and_the_next_one_clears_up(tmp_path, tokenizer):
    path = write_rows(tmp_path / "a.jsonl", make_rows(10))
    script = (
        "import os, sys; from pathlib import Path; from transformers import AutoTokenizer\n"
        "from laddpo.preference import preparation as p; from laddpo.preference.encoding.encode import TextEncoder\n"
        "p.report_figure = lambda report: os.kill(os.getpid(), 9)\n"
        f"encoder = TextEncoder(AutoTokenizer.from_pretrained({str(SHIPPED)!r}), max_length=4096)\n"
        f"part = p.Part('jsonl', p.Request(dataset_name={str(path)!r}))\n"
        f"p.prepare_pairs(Path({str(tmp_path / 'out')!r}), 'test', [part], encoder, p.Rules(), progress=False)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    killed = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert killed.returncode == -9, killed.stderr
    left = [folder.name for folder in (tmp_path / "out").iterdir()]
    assert len(left) == 1 and re.fullmatch(r"test-[0-9a-f]{16}", NAME.fullmatch(left[0])["name"])
    prepared = prepare(tmp_path / "out", path, tokenizer)
    assert [folder.name for folder in (tmp_path / "out").iterdir()] == [prepared.folder.name]


def test_of_two_processes_that_prepare_the_same_the_first_to_finish_wins(tmp_path, tokenizer):
    path = write_rows(tmp_path / "a.jsonl", make_rows(10))
    target = prepare(tmp_path / "out", path, tokenizer).folder
    mark = target.stat().st_ino
    with whole_folder(target) as building:
        (building / "late.txt").touch()
    assert target.stat().st_ino == mark and not (target / "late.txt").exists()
    assert [folder.name for folder in (tmp_path / "out").iterdir()] == [target.name]


def test_a_damaged_or_unfinished_folder_is_not_read(tmp_path, tokenizer):
    path = write_rows(tmp_path / "a.jsonl", make_rows(10))
    folder = prepare(tmp_path / "out", path, tokenizer).folder
    damaged = bytearray((folder / "tokens.safetensors").read_bytes())
    damaged[-1] ^= 1
    (folder / "tokens.safetensors").write_bytes(damaged)
    with pytest.raises(UserError, match=r"tokens\.safetensors: differs"):
        PreparedPairs.load(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match="not a finished folder"):
        PreparedPairs.load(folder)
    with pytest.raises(UserError, match="is in the way"):
        prepare(tmp_path / "out", path, tokenizer)


def test_arithmetic_splits_are_those_of_the_problems(tmp_path, tokenizer):
    from laddpo.preference.embedded import arithmetic

    prepared = prepare(tmp_path / "out", None, tokenizer, "arithmetic", num_pairs=200, validation_fraction=0.2, seed=4)
    assert (len(prepared.train), len(prepared.validation)) == (160, 40)
    for side in ("train", "validation"):
        for record in prepared.texts(side):
            problem = record["prompt"][0]["content"]
            assert arithmetic.split_of(problem) == side
            assert record["answer"] == f"{sum(map(int, re.findall('[+-]?[0-9]+', problem))):02d}"
    assert prepared.train.column("answer")[0] == next(prepared.texts("train"))["answer"]


def test_a_corpus_is_prepared_like_pairs(tmp_path, tokenizer):
    encoder = TextEncoder(tokenizer)
    request = Request(num_examples=300, mistake_share=0.6, seed=1)
    prepared = prepare_examples(
        tmp_path / "out", "corpus", [Part("arithmetic", request)], encoder, Rules(), show=str, progress=False
    )
    assert len(prepared.train) == 300
    record = next(prepared.texts("train"))
    assert encoder.decode_response(prepared.train[0].response_ids) == record["response"]
    own = write_rows(tmp_path / "own.jsonl", [{"prompt": f"p{i}", "response": f"r{i}"} for i in range(10)])
    part = Part("jsonl", Request(dataset_name=str(own)))
    rules = Rules(validation_fraction=0.3)
    mine = prepare_examples(tmp_path / "out", "own", [part], encoder, rules, show=str, progress=False)
    assert len(mine.train) + len(mine.validation) == 10 and len(mine.validation) > 0


def test_a_mixture_holds_its_parts_in_proportion(tmp_path, tokenizer):
    a = write_rows(tmp_path / "a.jsonl", [{"prompt": f"a{i}", "chosen": "c", "rejected": "r"} for i in range(100)])
    b = write_rows(tmp_path / "b.jsonl", [{"prompt": f"b{i}", "chosen": "c", "rejected": "r"} for i in range(30)])
    encoder = TextEncoder(tokenizer)

    def mixed(weights, **rules):
        parts = [Part("jsonl", Request(dataset_name=str(p)), w) for p, w in zip((a, b), weights, strict=True)]
        prepared = prepare_pairs(tmp_path / "out", "mix", parts, encoder, Rules(**rules), show=str, progress=False)
        return Counter(record["prompt"][0]["content"][0] for record in prepared.texts("train"))

    assert mixed((2, 1)) == {"a": 60, "b": 30}  # b is the scarce one: no row is used twice
    assert mixed((3, 1), random_sample_size=40) == {"a": 30, "b": 10}
    assert mixed((0.7, 0.1)) == {"a": 100, "b": 14}
    with pytest.raises(UserError, match="weight of the source jsonl is 0"):
        mixed((0, 1))


def test_a_part_of_a_mixture_without_a_row_is_named_with_its_bad_rows(tmp_path, tokenizer):
    good = write_rows(tmp_path / "good.jsonl", make_rows(40))
    bad = write_rows(tmp_path / "bad.jsonl", [{**row, "chosen": ""} for row in make_rows(3)])
    parts = [Part("jsonl", Request(dataset_name=str(path))) for path in (good, bad)]
    with pytest.raises(UserError) as caught:
        prepare_pairs(
            tmp_path / "out", "mix", parts, TextEncoder(tokenizer), Rules(on_bad_row="skip"), show=str, progress=False
        )
    assert str(caught.value).splitlines() == [
        f"data.mixture[1], jsonl of {bad}, gives no row that can be used (DATA-40):",
        f"  3 rows, at {bad}:1, :2, :3: chosen: is empty (DATA-07). Fix the row or set data.on_bad_row=skip.",
        "Mend its rows, or leave it out of the mixture.",
    ]


def test_a_source_without_a_row_says_what_is_known_of_it(tmp_path, tokenizer):
    grader = FunctionGrader("all right", lambda text, answer: True)
    path = write_rows(tmp_path / "a.jsonl", [{"prompt": "1+1?", "answer": "2", "candidates": ["2", "two"]}])
    with pytest.raises(UserError, match=r"graded_candidates of .*DATA-40\):\n  questions with no wrong candidate"):
        prepare(tmp_path / "out", path, tokenizer, "graded_candidates", grader=grader)


@pytest.mark.parametrize(
    ("scores", "asked", "said"),
    [
        ([3, 3], {}, "4 times two answers had equal scores"),
        (
            [1, 3],
            {"pair_rule": PairRule(min_gap=100)},
            "4 pairs left out: their scores differ by less than data.min_gap",
        ),
    ],
)
def test_lists_that_make_no_pair_say_why(scores, asked, said, tmp_path, tokenizer):
    rows = [{"prompt": f"p{i}", "completions": ["a", "b"], "scores": scores} for i in range(4)]
    with pytest.raises(UserError, match=rf"DATA-40\):\n  {said}"):
        prepare(tmp_path / "out", write_rows(tmp_path / "a.jsonl", rows), tokenizer, **asked)


def test_a_sample_of_bad_rows_alone_names_them(tmp_path, tokenizer):
    path = write_rows(tmp_path / "a.jsonl", [{**row, "prompt": "p" * 100} for row in make_rows(4)])
    with pytest.raises(UserError, match=r"No row is left to train on:\n.*a\.jsonl:\d: .*\(DATA-75\)"):
        prepare(tmp_path / "out", path, tokenizer, max_length=40, random_sample_size=1, on_bad_row="skip")


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ({"on_bad_row": "skp"}, "did you mean skip"),
        ({"random_sample_size": 0}, r"data\.random_sample_size is 0"),
        ({"validation_fraction": 1.0}, r"data\.validation_fraction is 1\.0"),
    ],
)
def test_rules_that_cannot_work_are_refused_by_name(rules, words):
    with pytest.raises(UserError, match=words):
        Rules(**rules)
