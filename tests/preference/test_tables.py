"""Files of columns: bounded memory whatever they claim, folders of save_to_disk, CSV as other programs write it."""

import subprocess
import sys

import pytest

from laddpo.errors import UserError
from laddpo.preference.reading.bad_rows import BadRow
from laddpo.preference.reading.files import ReadLog, read_rows
from laddpo.preference.sources import Request, open_source

pa = pytest.importorskip("pyarrow")
ROWS = [{"prompt": f"p{i}", "chosen": "c", "rejected": "r"} for i in range(5)]
NAMES = ("prompt", "chosen", "rejected")


def read(path, **asked):
    log = ReadLog()
    return list(open_source("jsonl").read(Request(dataset_name=str(path), **asked), log)), log


def repeated(text, count):
    import numpy as np

    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(count, dtype=np.int8)), [text])


def lists(values, count):
    ends = pa.array([len(values) * i // count for i in range(count + 1)], pa.int32())
    return pa.ListArray.from_arrays(ends, values)


LONG = "x" * 1_000_000
MESSAGES = ["role", "content"]
BOMBS = {  # the column prompt, the options of the writer, the code, and what the message says of its size
    "one long text in every row": (lambda: repeated(LONG, 1000), {}, "DATA-49", "unpacks to more than 200 times"),
    "a long text in lists": (
        lambda: lists(pa.StructArray.from_arrays([repeated("user", 999), repeated(LONG, 999)], MESSAGES), 999),
        {},
        "DATA-49",
        "unpacks to more than 200 times",
    ),
    "a list without end": (lambda: lists(repeated("x", 17_000_000), 1), {}, "DATA-49", "17,000,000 values"),
    "a long list": (lambda: lists(repeated("x", 4_000_000), 1), {}, "DATA-37", "4,000,001 values"),
    "packed pages": (
        lambda: pa.array([LONG] * 280),
        {"compression": "zstd", "use_dictionary": False},
        "DATA-49",
        "unpacks to 280,0",
    ),
}  # fmt: skip
CHILD = """
import sys
from pathlib import Path
from laddpo.errors import UserError
from laddpo.preference.reading.files import ReadLog, read_rows
for path in sys.argv[1:]:
    try:
        for row in read_rows([Path(path)], 16 * 2**20, ReadLog()):
            pass
        print("read")
    except UserError as error:
        print(error)
status = Path("/proc/self/status").read_text()  # of this process alone, which getrusage is not
print(int(status.split("VmHWM:")[1].split()[0]) // 1024)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak of memory from /proc")
def test_a_small_parquet_file_that_stands_for_gigabytes_is_refused_under_a_gibibyte(tmp_path):
    import pyarrow.parquet as pq

    paths = []
    for name, (make, options, *_) in BOMBS.items():
        prompt = make()
        column = repeated("c", len(prompt))
        paths.append(tmp_path / f"{name}.parquet")
        pq.write_table(pa.table({"prompt": prompt, "chosen": column, "rejected": column}), paths[-1], **options)
        assert paths[-1].stat().st_size < 200_000
        del prompt
    run = subprocess.run(
        [sys.executable, "-c", CHILD, *map(str, paths)], capture_output=True, text=True, check=True, timeout=300
    )
    *said, peak_mib = run.stdout.splitlines()
    for path, line, (_, _, code, words) in zip(paths, said, BOMBS.values(), strict=True):
        assert f"({code})" in line and words in line and "column prompt" in line and str(path) in line, line
    assert int(peak_mib) < 1024


def test_texts_that_repeat_are_read_whole_from_parquet_and_arrow(tmp_path):
    import pyarrow.parquet as pq

    kinds = {
        "text": pa.array(["a", None, "b"] * 700),
        "repeated": pa.array(["a", None, "b"] * 700).dictionary_encode(),
        "large": pa.array(["a", None, "b"] * 700, pa.large_string()),
        "view": pa.array(["a", None, "b"] * 700, pa.string_view()),
        "messages": pa.array([[{"role": "user", "content": "é"}], None, []] * 700),
        "map": pa.array([[("k", "v")], None, []] * 700, pa.map_(pa.string(), pa.string())),
        "pair": pa.array([["a", "b"], None, ["c", None]] * 700, pa.list_(pa.string(), 2)),
    }
    table = pa.table(kinds)
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=1500)
    for name, new in (("b.arrow", pa.ipc.new_stream), ("c.arrow", pa.ipc.new_file)):
        with new(str(tmp_path / name), table.schema) as writer:
            writer.write_table(table)
    for name in ("a.parquet", "b.arrow", "c.arrow"):
        path = tmp_path / name
        rows = list(read_rows([path], 2**20, ReadLog()))
        assert rows == [(f"{path}:{i}", row) for i, row in enumerate(table.to_pylist(), 1)]


def saved(folder, splits=None):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list(ROWS)
    if splits:
        data = datasets.DatasetDict({split: datasets.Dataset.from_list(ROWS[:n]) for split, n in splits.items()})
    data.save_to_disk(folder, **({} if splits else {"num_shards": 2}))
    return folder


def test_a_folder_of_save_to_disk_is_read_with_file_and_row(tmp_path):
    folder = saved(tmp_path / "saved")
    rows, log = read(folder)
    assert [pair.prompt[0].content for pair in rows] == [row["prompt"] for row in ROWS]
    assert rows[0].source == f"{folder / 'data-00000-of-00002.arrow'}:1" and len(log.files) == 2
    with pytest.raises(UserError, match=r"'test'; .* has train .*DATA-70"):
        read(folder, dataset_split="test")
    (folder / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(UserError, match=r"lists data-00001-of-00002.arrow, which is not there \(DATA-71\)"):
        read(folder)


def test_a_saved_dictionary_of_splits_gives_the_split_that_is_asked_for(tmp_path):
    folder = saved(tmp_path / "saved", {"train": 3, "test": 2})
    rows, log = read(folder)
    assert len(rows) == 3 and list(log.unread.values()) == ["test"]
    assert len(read(folder, dataset_split="test")[0]) == 2
    (folder / "test" / "state.json").unlink()
    with pytest.raises(UserError, match="was not saved whole"):
        read(folder)


DAMAGES = {
    "cut": lambda data: data[: len(data) // 2],
    "no Arrow": lambda data: b"nothing of the kind",
    "empty": lambda data: b"",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_arrow_file_is_refused_by_name(damage, tmp_path):
    path, table = tmp_path / "a.arrow", pa.table({name: ["x"] * 100 for name in NAMES})
    with pa.ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table)
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    with pytest.raises(UserError, match=r"a\.arrow: .*\(DATA-(54|39)\)"):
        read(path)


@pytest.mark.parametrize("new", [pa.ipc.new_stream, pa.ipc.new_file])
def test_an_arrow_file_with_packed_columns_is_refused(new, tmp_path):
    path, table = tmp_path / "a.arrow", pa.table({"prompt": ["x" * 1000] * 100})
    with new(str(path), table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(table)
    with pytest.raises(UserError, match=r"a\.arrow: holds packed columns \(DATA-54\)"):
        read(path)


class OwnError(Exception):
    """What an optional package raises, with no base class that a reader could know."""


def test_a_column_that_fails_by_an_error_of_an_optional_package_is_named(tmp_path, monkeypatch):
    import pyarrow.parquet as pq

    from laddpo.preference.reading import tables

    class Unreadable:
        def to_pylist(self):
            raise OwnError("no such zone")

    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({name: ["x"] for name in NAMES}), path)
    monkeypatch.setattr(tables, "_texts", lambda *_: Unreadable())
    with pytest.raises(
        UserError, match=r"column (prompt|chosen|rejected): is string and cannot be read .*no such zone\) \(DATA-53\)"
    ):
        read(path)


def test_a_hub_row_that_fails_by_an_error_of_an_optional_package_is_named(monkeypatch):
    datasets = pytest.importorskip("datasets")

    class Rows:
        download_checksums = None

        def __len__(self):
            return 1

        def __iter__(self):
            raise OwnError("no such zone")

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: Rows())
    with pytest.raises(UserError, match=r"org/pairs\[train\]: row 1: .*no such zone.*DATA-53"):
        read("org/pairs")


def csv(tmp_path, text):
    (tmp_path / "a.csv").write_text(text, encoding="utf-8")
    return read(tmp_path / "a.csv")


@pytest.mark.parametrize("mark", [";", "\t", "|"])
def test_another_separator_of_csv_is_used_with_a_note(mark, tmp_path):
    lines = [mark.join(cells) for cells in (NAMES, ("p, q", '"c\nd"', "r"), ("p2", "c", ""))]
    (pair, bad), log = csv(tmp_path, "\n".join(lines) + "\n")
    assert (pair.prompt[0].content, pair.chosen, pair.rejected) == ("p, q", "c\nd", "r")
    assert bad.place.endswith("a.csv:4") and bad.code == "DATA-07"
    assert [f"separated by {mark!r}" in note for note in log.warnings] == [True]


@pytest.mark.parametrize("cell", ["nan", "NaN", "NA", "N/A", "<NA>", "#N/A", "null", "NULL", " nan"])
def test_a_missing_value_of_csv_is_not_trained_on(cell, tmp_path):
    rows, _ = csv(tmp_path, f"prompt,chosen,rejected,note\np,{cell},r,\np,c,r,{cell}\n")
    bad, pair = rows
    assert isinstance(bad, BadRow) and (bad.code, bad.field) == ("DATA-04", "chosen") and repr(cell) in bad.problem
    assert pair.chosen == "c"


def test_an_empty_cell_of_csv_is_empty_in_a_text_and_missing_elsewhere(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,chosen,rejected,system\np,,r,\np,c,r,\n", encoding="utf-8")
    bad, pair = read(tmp_path / "a.csv", columns={"system": "system"})[0]
    assert bad.code == "DATA-07" and [message.role for message in pair.prompt] == ["user"]


def test_a_row_of_csv_over_many_lines_is_bounded(tmp_path):
    quoted = '"' + "x" * 50 + '\n"'
    text = "prompt,chosen,rejected\n" + ",".join([quoted] * 100) + "\n"
    (tmp_path / "a.csv").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"its row is longer than 1,000 characters \(DATA-37\)"):
        read(tmp_path / "a.csv", max_line_bytes=1000)
    many = "prompt,chosen,rejected\n5'10\" tall,c,r\n" + 'p,c"d,r\n' * 500
    (tmp_path / "a.csv").write_text(many, encoding="utf-8")
    assert len(read(tmp_path / "a.csv", max_line_bytes=1000)[0]) == 501
