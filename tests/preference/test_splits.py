"""Every file of a data set is read, listed with its split, or refused: a table over the layouts that folders have."""

import json
from pathlib import Path

import pytest

from laddpo.cli.app import cli
from laddpo.errors import UserError
from laddpo.preference.reading.files import ReadLog
from laddpo.preference.reading.splits import splits_by_name
from laddpo.preference.sources import Request, open_source
from laddpo.storage.atomic import read_json


def make(root, names, rows=None):
    """Files of one pair each, whose prompt is the file's own name."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        row = {"prompt": name, "chosen": "c", "rejected": "r"}
        if path.suffix == ".parquet":
            import pyarrow as pa
            import pyarrow.parquet as pq

            pq.write_table(pa.table({key: [value] for key, value in row.items()}), path)
        else:
            path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    return root


def read(root, **asked):
    log = ReadLog()
    pairs = list(open_source("jsonl").read(Request(dataset_name=str(root), **asked), log))
    return sorted(pair.prompt[0].content for pair in pairs), {Path(path): split for path, split in log.unread.items()}


HUB = ["data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"]
ULTRA = [f"data/{split}-00000-of-00001.parquet" for split in ("train_prefs", "test_prefs", "train_sft", "test_gen")]
CLONE = ["harmless-base/train.jsonl", "harmless-base/test.jsonl", "helpful/train.jsonl", "red-team/attempts.jsonl"]
ULTRA_OTHERS = {1: "test_prefs", 2: "train_sft", 3: "test_gen"}
# files, the split that is asked for, the files of it by their number in the list, the splits of the others
LAYOUTS = {
    "hub": (HUB, None, [0], {1: "test"}),
    "hub, the test split": (HUB, "test", [1], {0: "train"}),
    "hub, both": (HUB, "train+test", [0, 1], {}),
    "ultrafeedback": (ULTRA, "train_prefs", [0], ULTRA_OTHERS),
    "its data folder alone": ([name[5:] for name in ULTRA], "train_prefs", [0], ULTRA_OTHERS),
    "hub, and a file beside data": ([*HUB, "extra_train.jsonl"], None, [0], {1: "test", 2: "no split"}),
    "a hash in the name": (
        ["data/train-00000-of-00001-0a1b.parquet", "data/test-00000-of-00001-2c.parquet"],
        None,
        [0],
        {1: "test"},
    ),
    "hh clone": (CLONE, None, [0, 2], {1: "test", 3: "no split"}),
    "folders": (["train/a.jsonl", "test/a.jsonl", "dev/train.jsonl"], None, [0], {1: "test", 2: "validation"}),
    "folders inside": (["en/train/a.jsonl", "en/eval_set/a.jsonl", "b.jsonl"], None, [0], {1: "test", 2: "no split"}),
    "words in names": (
        ["my_train.v2.jsonl", "my-valid.jsonl", "testing 1.jsonl"],
        None,
        [0],
        {1: "validation", 2: "test"},
    ),
    "upper case": (["TRAIN.jsonl", "Test.jsonl"], None, [0], {1: "test"}),
    "no split named": (["a.jsonl", "part/latest.jsonl", "contest.jsonl"], None, [0, 1, 2], {}),
    "validation": (["train.jsonl", "val.jsonl"], "validation", [1], {0: "train"}),
    "descriptions": (["a.jsonl", "dataset_infos.json", "config.json"], None, [0], None),
    "special folder": (["a.jsonl", "__pycache__/a.jsonl", ".git/a.jsonl"], None, [0], None),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_file_of_a_folder_is_read_or_listed_with_its_split(layout, tmp_path):
    names, asked, wanted, others = LAYOUTS[layout]
    root = make(tmp_path / "set", names)
    rows, unread = read(root, dataset_split=asked)
    assert rows == sorted(names[i] for i in wanted)
    if others is not None:
        assert unread == {root / names[i]: split for i, split in others.items()}
        assert len(rows) + len(unread) == len(names)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name not in ("its data folder alone", "upper case")])
def test_splits_by_name_are_those_of_datasets(layout, tmp_path):
    """Two layouts differ on purpose: `datasets` takes upper case for no word, and a folder `data` given by itself for
    one whose names have keywords."""
    data_files = pytest.importorskip("datasets.data_files")
    names = [name for name in LAYOUTS[layout][0] if not name.startswith((".", "_", "config", "dataset_infos"))]
    root = make(tmp_path / "set", names)
    patterns = data_files._get_data_files_patterns(lambda p: data_files.resolve_pattern(p, base_path=str(root)))
    theirs = {
        str(split): {file for pattern in found for file in _resolved(data_files, pattern, root)}
        for split, found in patterns.items()
    }
    ours = splits_by_name(root, [root / name for name in names])
    assert {split: {str(file) for file in files} for split, files in ours.items()} == theirs


def _resolved(data_files, pattern, root):
    try:
        return data_files.resolve_pattern(pattern, base_path=str(root))
    except FileNotFoundError:
        return []


REFUSED = {
    "a split that is not there": (HUB, {"dataset_split": "validation"}, ["'validation'", "has train, test", "DATA-70"]),
    "a split written otherwise": (ULTRA, {"dataset_split": "train_pref"}, ["Did you mean train_prefs?"]),
    "the default split is not there": (["test.jsonl", "mine.jsonl"], {}, ["has test", "name no split: mine.jsonl"]),
    "a file of two splits": (["train.jsonl", "train_eval.jsonl"], {}, ["train_eval.jsonl", "says train and test"]),
    "a missing part": (
        [f"data/train-0000{i}-of-00005.parquet" for i in (0, 1, 3, 4)],
        {},
        ["train-00002-of-00005 is missing", "DATA-71"],
    ),
    "missing parts of another scheme": (
        [f"my.rows-0000{i}-of-00004.jsonl" for i in (1, 4)],
        {},
        ["my.rows-00002-of-00004, my.rows-00003-of-00004 are missing"],
    ),
    "a part twice": ([f"train-00000-of-00001{rest}" for rest in (".jsonl", "-0a.jsonl")], {}, ["is the same part as"]),
    "parts of two versions": (
        ["train-00000-of-00001.jsonl", *(f"train-0000{i}-of-00002.jsonl" for i in range(2))],
        {},
        ["in parts of 1 and of 2"],
    ),
    "a configuration without a description": (
        HUB,
        {"dataset_config": "en"},
        ["data.dataset_config is 'en'", "DATA-72"],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_folder_cannot_give_is_refused_by_name(case, tmp_path):
    names, asked, words = REFUSED[case]
    make(tmp_path / "set", names)
    with pytest.raises(UserError) as caught:
        read(tmp_path / "set", **asked)
    assert all(word in str(caught.value) for word in words), caught.value


def test_parts_of_another_split_may_be_missing_and_a_file_given_by_name_is_read_alone(tmp_path):
    names = ["train-00000-of-00001.jsonl", "test-00000-of-00002.jsonl"]
    make(tmp_path, names)
    assert read(tmp_path)[0] == names[:1]
    log = ReadLog()
    (pair,) = open_source("jsonl").read(Request(dataset_name=str(tmp_path / names[1]), dataset_split="train"), log)
    assert pair.prompt[0].content == names[1]
    assert any("one of 2 parts" in note for note in log.warnings)
    assert any("its name says test; it is read" in note for note in log.warnings)


def test_a_pattern_reads_one_split_too_unless_all_its_files_are_of_another(tmp_path):
    make(tmp_path, ["train.jsonl", "test.jsonl", "test_2.jsonl"])
    assert read(tmp_path / "*.jsonl") == (
        ["train.jsonl"],
        {tmp_path / "test.jsonl": "test", tmp_path / "test_2.jsonl": "test"},
    )
    assert read(tmp_path / "test*.jsonl") == (["test.jsonl", "test_2.jsonl"], {})
    make(tmp_path, [f"rows-0000{i}-of-00003.jsonl" for i in range(3)])
    assert len(read(tmp_path / "rows-*.jsonl")[0]) == 3
    (tmp_path / "rows-00001-of-00003.jsonl").unlink()
    with pytest.raises(UserError, match="rows-00001-of-00003 is missing"):
        read(tmp_path / "rows-*.jsonl")


CARD = """---
license: mit
configs:
- config_name: main
  data_files:
  - split: train
    path: main/train-*
  - split: test
    path: ["main/test-*"]
- config_name: other
  data_dir: other
- config_name: one
  data_files: "**/b.jsonl"
---
# A data set
"""


def test_the_configurations_of_a_readme_choose_the_files_of_a_folder(tmp_path):
    names = ["main/train-1.jsonl", "main/test-1.jsonl", "other/train.jsonl", "other/test.jsonl", "x/b.jsonl"]
    make(tmp_path, names)
    (tmp_path / "README.md").write_text(CARD, encoding="utf-8")
    assert read(tmp_path, dataset_config="main")[0] == names[:1]
    assert read(tmp_path, dataset_config="main", dataset_split="test")[0] == names[1:2]
    rows, unread = read(tmp_path, dataset_config="other")
    assert rows == names[2:3] and len(unread) == 4
    assert read(tmp_path, dataset_config="one")[0] == names[4:]
    with pytest.raises(UserError, match=r"data.dataset_config is not set; .* has main, other, one"):
        read(tmp_path)
    with pytest.raises(UserError, match=r"data.dataset_config is 'mian'; .*Did you mean main\?"):
        read(tmp_path, dataset_config="mian")
    (tmp_path / "main" / "train-1.jsonl").unlink()
    with pytest.raises(UserError, match=r"README.md: says that split train is main/train-\*, which is not there"):
        read(tmp_path, dataset_config="main")


def test_a_dataset_configuration_reaches_the_hub_and_enters_the_identity_only_when_set(monkeypatch):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([{"prompt": "p", "chosen": "c", "rejected": "r"}])
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *names, **options: asked.append((names, options)) or rows)
    source, request = open_source("jsonl"), Request(dataset_name="org/pairs", revision="v1")
    named = Request(dataset_name="org/pairs", revision="v1", dataset_config="en")
    for one in (request, named):
        list(source.read(one, ReadLog()))
    options = {"split": "train", "revision": "v1"}
    calls = [call for place, call in enumerate(asked) if call not in asked[:place]]  # its columns are looked at first
    assert calls == [(("org/pairs",), options), (("org/pairs", "en"), options)]
    assert source.identity(request)["hub"] == {"dataset": "org/pairs", "split": "train", "revision": "v1"}
    assert source.identity(named)["hub"] == {**source.identity(request)["hub"], "config": "en"}


@pytest.mark.parametrize(
    "failure",
    [
        "Config name is missing.\nPlease pick one among the available configs: ['en', 'de']\nE",
        "BuilderConfig 'eng' not found. Available: ['en', 'de']",
    ],
)
def test_a_configuration_that_the_hub_lacks_is_answered_with_those_it_has(failure, monkeypatch):
    datasets = pytest.importorskip("datasets")

    def load_dataset(*_, **__):
        raise ValueError(failure)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    config = "eng" if "eng" in failure else None
    with pytest.raises(
        UserError, match=r"data.dataset_config is .*; org/pairs has en, de .*(Did you mean en|Name one)"
    ):
        list(open_source("jsonl").read(Request(dataset_name="org/pairs", dataset_config=config), ReadLog()))


def prepare(tmp_path, *settings):
    made = tmp_path / "made"
    return cli("prepare", ["data=jsonl", *settings, f"paths.data_dir={made}", f"paths.outputs_dir={tmp_path / 'o'}"])


def test_prepare_lists_what_it_leaves_in_the_console_and_in_the_report(tmp_path, capsys):
    root = make(tmp_path / "set", HUB)
    settings = ["data.validation_fraction=0", "data.test_fraction=0", "data.test_split=null"]
    assert prepare(tmp_path, f"data.dataset_name={root}", *settings) == 0
    assert "files of split test: " in capsys.readouterr().out
    (report,) = (tmp_path / "made").glob("prepared/*/report.json")
    assert read_json(report)["files_not_read"] == {str(root / HUB[1]): "test"}
    assert read_json(report)["rows"]["read"] == 1


@pytest.mark.parametrize(
    ("name", "settings", "key"),
    [
        ("test.jsonl", ["data.dataset_split=train"], "data.dataset_split"),
        ("pairs.jsonl", ["data.dataset_split=test"], "data.dataset_split"),
        ("pairs.jsonl", ["data.dataset_config=en"], "data.dataset_config"),
    ],
)
def test_a_split_or_configuration_given_beside_one_file_is_used_or_refused(name, settings, key, tmp_path, capsys):
    path = make(tmp_path, [name]) / name
    assert prepare(tmp_path, f"data.dataset_name={path}", *settings) == 2
    assert f"{key} is '{settings[0].partition('=')[2]}'" in capsys.readouterr().err
    part = "{dataset_name:" + f"{path},{settings[0].removeprefix('data.').replace('=', ':')}" + "}"
    assert prepare(tmp_path, "data=mixture", f"data.mixture=[{part}]") == 2
    assert f"data.mixture[0].{key[5:]}" in capsys.readouterr().err
