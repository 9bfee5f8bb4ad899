"""No traceback whatever the bytes: every reader gives rows, bad rows or one UserError."""

import gzip
import json
import lzma

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from laddpo.errors import UserError
from laddpo.preference.reading.bad_rows import CODES, BadRow
from laddpo.preference.reading.files import ReadLog
from laddpo.preference.reading.pairs import PreferencePair, plain_prompt
from laddpo.preference.sources import Request, open_source

LINE_LIMIT = 10_000
anything = st.text(alphabet=st.characters(), max_size=12)
json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), anything),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(anything, inner, max_size=3)),
    max_leaves=8,
)
messages = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system", "bot"]), "content": st.one_of(anything, json_values)}
    ),
    max_size=4,
)
field = st.one_of(anything, json_values, messages)
near_rows = st.fixed_dictionaries({}, optional={name: field for name in ("prompt", "chosen", "rejected", "id")})
row_bytes = st.one_of(
    st.binary(max_size=60),
    json_values.map(lambda value: json.dumps(value).encode()),
    near_rows.map(lambda value: json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")),
)
dialogue = st.lists(st.sampled_from(["\n\nHuman:", "\n\nAssistant:", " a", " b", "\n", " "]), max_size=8).map("".join)


def read_all(source, path, **asked):
    """Reads to the end; anything but pairs, bad rows with a known code, or a UserError is a failure."""
    try:
        rows = list(
            open_source(source).read(Request(dataset_name=str(path), max_line_bytes=LINE_LIMIT, **asked), ReadLog())
        )
    except UserError as error:
        assert str(error)
        return []
    for row in rows:
        assert isinstance(row, (PreferencePair, BadRow))
        if isinstance(row, BadRow):
            assert row.code in CODES and str(path) in str(row)
        else:
            assert row.chosen != row.rejected and row.prompt
            texts = row.chosen + row.rejected + plain_prompt(row.prompt)
            texts.encode("utf-8")  # no half of a surrogate pair came through
    return rows


class NoRows(list):
    """A dataset of the hub without rows."""

    download_checksums = None


fuzz = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet", "a.jsonl.gz"])
@fuzz
@given(content=st.binary(max_size=400))
def test_any_bytes_in_any_kind_of_file(name, content, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    read_all("jsonl", path)


@pytest.mark.parametrize("format", ["auto", "explicit", "implicit", "json"])
@fuzz
@given(lines=st.lists(row_bytes, max_size=5), ending=st.sampled_from([b"\n", b"\r\n", b"\r", b","]))
def test_rows_that_are_almost_right(format, lines, ending, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(ending.join(lines))
    read_all("jsonl", path, format=format)
    array = tmp_path / "a.json"
    array.write_bytes(b"[" + b",".join(lines) + b"]")
    read_all("ultrafeedback", array)


@fuzz
@given(rows=st.lists(st.tuples(dialogue, dialogue), min_size=1, max_size=4))
def test_any_dialogue(rows, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"chosen": a, "rejected": b}) + "\n" for a, b in rows), encoding="utf-8")
    assert len(read_all("hh_rlhf", path)) == len(rows)  # no dialogue makes the file unreadable


@pytest.mark.parametrize("pack", [gzip.compress, lzma.compress])
@fuzz
@given(data=st.data())
def test_packed_files_that_are_cut_or_changed(pack, data, tmp_path):
    row = {"prompt": "p", "chosen": "c", "rejected": "r"}
    packed = bytearray(pack((json.dumps(row) + "\n").encode() * 20))
    packed = packed[: data.draw(st.integers(0, len(packed)))]
    if packed:
        packed[data.draw(st.integers(0, len(packed) - 1))] ^= data.draw(st.integers(0, 255))
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(packed)
    read_all("jsonl", path)


@fuzz
@given(name=st.text(alphabet=st.characters(), max_size=20))
@example(name="0/0")  # of the form of the hub
def test_any_dataset_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("laddpo.preference.reading.hub.load_split", lambda *_: NoRows())
    try:
        assert list(open_source("jsonl").read(Request(dataset_name=name), ReadLog())) == []
    except UserError as error:
        assert str(error)
