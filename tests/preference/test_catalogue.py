"""Every kind of bad row and bad file: found with its place, refused with its code, and counted when skipped."""

import gzip
import json
import lzma
import os
import random
import sys
from pathlib import Path

import pytest

from laddpo.errors import UserError
from laddpo.preference.reading import json_arrays
from laddpo.preference.reading.bad_rows import CODES, BadRow
from laddpo.preference.reading.files import ReadLog
from laddpo.preference.sources import Request, open_source

GOOD = {"prompt": "p", "chosen": "c", "rejected": "r"}


def row(**changes):
    return json.dumps({**GOOD, **changes}, ensure_ascii=False)


def without(name):
    return json.dumps({key: value for key, value in GOOD.items() if key != name})


def read(path, source="jsonl", **asked):
    log = ReadLog()
    request = Request(dataset_name=str(path), **asked)
    return list(open_source(source).read(request, log)), log


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


BAD_ROWS = {
    "prompt missing": (without("prompt"), "DATA-01", "prompt: field missing; found the fields [chosen, rejected]"),
    "chosen missing": (without("chosen"), "DATA-01", "chosen: field missing"),
    "rejected missing": (without("rejected"), "DATA-01", "rejected: field missing"),
    "another name": (
        '{"question": "p", "chosen": "c", "rejected": "r"}',
        "DATA-01",
        "Set data.columns.prompt=question.",
    ),
    "null": (row(chosen=None), "DATA-04", "chosen: is null"),
    "empty prompt": (row(prompt=""), "DATA-05", "prompt: is empty"),
    "empty chosen": (row(chosen=""), "DATA-07", "chosen: is empty"),
    "empty rejected": (row(rejected=""), "DATA-07", "rejected: is empty"),
    "blank prompt": (row(prompt="\u200b \ufeff\u00a0"), "DATA-08", "prompt: empty after strip"),
    "blank chosen": (row(chosen=" \n\t"), "DATA-07", "chosen: empty after strip"),
    "no preference": (row(rejected="c"), "DATA-09", "no preference"),
    "number": (row(chosen=5), "DATA-12", "chosen: is an int (5), want text or a list of messages"),
    "object": (row(chosen={"a": 1}), "DATA-12", "chosen: is an object"),
    "boolean": (row(prompt=True), "DATA-13", "prompt: is a boolean (True)"),
    "NaN": ('{"prompt": "p", "chosen": NaN, "rejected": "r"}', "DATA-15", "non-finite number NaN"),
    "infinity": ('{"prompt": "p", "chosen": "c", "rejected": -Infinity}', "DATA-15", "-Infinity"),
    "overflow": ('{"prompt": "p", "chosen": 1e999, "rejected": "r"}', "DATA-16", "1e999"),
    "endless digits": ('{"prompt": "p", "chosen": %s, "rejected": "r"}' % ("9" * 5000), "DATA-16", "5000 digits"),
    "repeated key": ('{"prompt": "p", "chosen": "c", "chosen": "d", "rejected": "r"}', "DATA-17", "key 'chosen' twice"),
    "list": ("[1, 2]", "DATA-18", "is a list, want an object"),
    "text": ('"prompt"', "DATA-18", "is text, want an object"),
    "number row": ("17", "DATA-18", "is a int, want an object"),
    "not UTF-8": (b'{"prompt": "\xff"}', "DATA-21", "byte 0xff at offset 12 of the line"),
    "late byte order mark": (("\ufeff" + row()).encode(), "DATA-24", "byte order mark inside the file"),
    "control byte": (
        '{"prompt": "a\x01b", "chosen": "c", "rejected": "r"}',
        "DATA-27",
        "control character at column 14",
    ),
    "NUL": (json.dumps({**GOOD, "chosen": "a\x00"}), "DATA-28", "chosen: has the character NUL at 1"),
    "half a pair": ('{"prompt": "\\ud800", "chosen": "c", "rejected": "r"}', "DATA-29", "'\\ud800', at character 0"),
    "not JSON": ("prompt: p", "DATA-35", "is not JSON: Expecting value at column 1"),
    "nested too deep": ('{"prompt": ' + "[" * 100_000 + "1" + "]" * 100_000 + "}", "DATA-38", "nested too deep"),
    "kinds mixed": (row(chosen=[assistant("c")]), "DATA-58", "text and lists of messages are mixed"),
    "no messages": (row(prompt=[], chosen=[assistant("c")], rejected=[assistant("r")]), "DATA-60", "empty list"),
    "message without content": (
        row(prompt=[user("p")], chosen=[{"role": "assistant"}], rejected=[assistant("r")]),
        "DATA-61",
        "chosen[0]: has the keys ['role'], want an object with role and content",
    ),
    "from and value": (
        row(prompt=[{"from": "human", "value": "p"}], chosen=[assistant("c")], rejected=[assistant("r")]),
        "DATA-61",
        "Rename from/value to role/content.",
    ),
    "picture": (
        row(prompt=[user([{"type": "image", "url": "x"}])], chosen=[assistant("c")], rejected=[assistant("r")]),
        "DATA-62",
        "prompt[0].content: has a part that is not text",
    ),
    "unknown role": (
        row(prompt=[user("p")], chosen=[{"role": "bot", "content": "c"}], rejected=[assistant("r")]),
        "DATA-63",
        "chosen[0].role: is 'bot', want one of system, developer, user, assistant, tool (DATA-63). Did you mean "
        "assistant?",
    ),
    "two users": (
        row(prompt=[user("p"), user("q")], chosen=[assistant("c")], rejected=[assistant("r")]),
        "DATA-64",
        "in the order user, user",
    ),
    "late system turn": (
        row(prompt=[user("p"), {"role": "system", "content": "s"}], chosen=[assistant("c")], rejected=[assistant("r")]),
        "DATA-64",
        "in the order user, system",
    ),
    "prompt ends with the assistant": (
        row(prompt=[user("p"), assistant("q")], chosen=[assistant("c")], rejected=[assistant("r")]),
        "DATA-65",
        "prompt: ends with a assistant turn",
    ),
    "different prompts": (
        row(prompt=[user("p")], chosen=[user("q"), assistant("c")], rejected=[user("p"), assistant("r")]),
        "DATA-66",
        "chosen: starts with a user turn but differs from the prompt at message 1",
    ),
    "several turns": (
        row(prompt=[user("p")], chosen=[assistant("c"), user("d"), assistant("e")], rejected=[assistant("r")]),
        "DATA-68",
        "chosen: has 3 turns after the prompt",
    ),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row_is_named_with_its_line_field_and_code(case, tmp_path):
    bad, code, words = BAD_ROWS[case]
    bad = bad if isinstance(bad, bytes) else bad.encode("utf-8", "surrogatepass")
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join([row().encode(), b"", bad, row(prompt="q").encode()]) + b"\n")
    rows, _ = read(path)
    assert [type(found) is BadRow for found in rows] == [False, True, False]
    message = str(rows[1])
    assert message.startswith(f"{path}:3: ")  # blank lines count as lines
    assert f"({code})." in message
    assert words in message
    assert code in CODES


def test_a_cut_last_line_says_that_the_file_may_be_cut(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(row().encode() + b"\n" + row().encode()[:-9])
    rows, _ = read(path)
    assert "ends in the middle of the object" in str(rows[1])
    assert rows[1].code == "DATA-35"


ACCEPTED = {
    "byte order mark at the start": b"\xef\xbb\xbf" + row().encode() + b"\n",
    "CRLF": row().encode() + b"\r\n\r\n",
    "no line end at the end": row().encode(),
    "line separators inside a text": (row(prompt="a\u2028b\u0085c") + "\n").encode(),
    "text parts": (
        json.dumps(
            {
                "prompt": [user([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])],
                "chosen": [assistant("c")],
                "rejected": [assistant("r")],
            }
        )
    ).encode(),
    "a number among the unused columns": row(score=0.7).encode(),
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_harmless_oddities_are_accepted(case, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(ACCEPTED[case])
    rows, _ = read(path)
    assert [type(found) is BadRow for found in rows] == [False]
    if case == "text parts":
        assert rows[0].prompt[0].content == "ab"


@pytest.mark.parametrize("before", ["", "\n", "\ufeff\r\n \n", ",,\n"])
def test_blank_lines_before_the_header_of_a_csv_file_are_skipped(before, tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(f"{before}prompt,chosen,rejected\np,c,r\n\nq,c\n", encoding="utf-8", newline="")
    (pair, bad), _ = read(path)
    assert (pair.prompt[0].content, pair.source) == ("p", f"{path}:{2 + before.count(chr(10))}")
    assert str(bad).startswith(f"{path}:{4 + before.count(chr(10))}: has 2 fields, the header has 3")


DOUBTFUL = {
    "U+FFFD": row(prompt="a\ufffd"),
    "private-use": row(prompt="a\ue123"),
    "look-alikes of special tokens": row(prompt="＜|mdm_mask|＞ <|mdm\u200b_mask|>"),
    "bidirectional": row(prompt="a\u202eb"),
    "normal form C": row(prompt="e\u0301"),
    "differ only in white space": row(chosen="a  b", rejected="a b"),
    "column 'score' is not used": row(score=1),
}


@pytest.mark.parametrize("words", DOUBTFUL)
def test_doubtful_rows_are_kept_and_counted(words, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes((DOUBTFUL[words] + "\n" + row() + "\n").encode())
    rows, log = read(path)
    assert not [found for found in rows if isinstance(found, BadRow)]
    assert [count for message, count in log.warnings.items() if words in message] == [1]


def test_settings_permit_what_is_refused_by_default(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(row(prompt="") + "\n" + json.dumps({**GOOD, "chosen": "a\x00"}) + "\n", encoding="utf-8")
    rows, _ = read(path, allow_empty_prompt=True, allow_nul=True)
    assert not [found for found in rows if isinstance(found, BadRow)]


def test_kinds_of_rows_may_be_mixed_in_a_file_only_when_the_format_is_auto(tmp_path):
    path = tmp_path / "rows.jsonl"
    talk = json.dumps({"prompt": [user("p")], "chosen": [assistant("c")], "rejected": [assistant("r")]})
    path.write_text(row() + "\n" + talk + "\n", encoding="utf-8")
    assert not [found for found in read(path)[0] if isinstance(found, BadRow)]
    rows, _ = read(path, format="explicit")
    assert rows[1].code == "DATA-59"


def utf16(path):
    path.write_bytes((row() + "\n").encode("utf-16"))


def gzip_cut(path):
    noise = "".join(random.Random(0).choices("abcdefgh", k=20_000))
    path.write_bytes(gzip.compress((row(prompt=noise) + "\n").encode() * 3)[:-500])


def gzip_damaged(path):
    packed = bytearray(gzip.compress((row() + "\n").encode()))
    packed[-6] ^= 0xFF
    path.write_bytes(packed)


def bomb(path):
    path.write_bytes(gzip.compress(b" " * 100_000_000))


def zstandard_cut(path):
    pa = pytest.importorskip("pyarrow")
    with pa.CompressedOutputStream(str(path), "zstd") as out:
        out.write(row().encode() * 100)
    path.write_bytes(path.read_bytes()[:-5])


def endless(path):
    """A file of the system that is not regular and never ends."""
    path.symlink_to("/dev/zero")


BAD_FILES = {
    "array": ("a.jsonl", lambda path: path.write_text(f"[{row()}]"), "DATA-19", "Rename it to .json"),
    "spread object": ("a.jsonl", lambda path: path.write_text(json.dumps(GOOD, indent=1)), "DATA-20", "several lines"),
    "UTF-16": ("a.jsonl", utf16, "DATA-22", "Save it as UTF-8"),
    "lone CR": (
        "a.jsonl",
        lambda path: path.write_bytes(row().encode() + b"\r" + row().encode()),
        "DATA-25",
        "lone CR",
    ),
    "long line": ("a.jsonl", lambda path: path.write_text(row(prompt="x" * 5000)), "DATA-37", "data.max_line_bytes"),
    "empty": ("a.jsonl", lambda path: path.write_bytes(b""), "DATA-39", "has 0 rows"),
    "only blank lines": ("a.jsonl", lambda path: path.write_bytes(b"\n \n\n"), "DATA-39", "has 0 rows"),
    "absent": ("a.jsonl", lambda path: path.with_name("b.jsonl").touch(), "DATA-41", "Did you mean"),
    "no pattern match": ("*.jsonl", lambda path: None, "DATA-41", "matches no file"),
    "FIFO": ("a.jsonl", os.mkfifo, "DATA-42", "not a regular file"),
    "broken link": ("a.jsonl", lambda path: path.symlink_to("gone"), "DATA-44", "'gone', which is not there"),
    "gzip cut": ("a.jsonl.gz", gzip_cut, "DATA-45", "ends early"),
    "gzip damaged": ("a.jsonl.gz", gzip_damaged, "DATA-46", "is damaged"),
    "xz cut": (
        "a.jsonl.xz",
        lambda path: path.write_bytes(lzma.compress(row().encode())[:-20]),
        "DATA-45",
        "ends early",
    ),
    "zstandard cut": ("a.jsonl.zst", zstandard_cut, "DATA-45", "ends early"),
    "device": ("a.jsonl", endless, "DATA-42", "not a regular file"),
    "zip": ("a.zip", lambda path: path.write_bytes(b"PK\x03\x04"), "DATA-48", "Unpack it first"),
    "zip named otherwise": ("a.jsonl", lambda path: path.write_bytes(b"PK\x03\x04rest"), "DATA-48", "Unpack it first"),
    "bomb": ("a.jsonl.gz", bomb, "DATA-49", "more than 200 times"),
    "CSV": ("a.jsonl", lambda path: path.write_text("prompt,chosen,rejected\np,c,r\n"), "DATA-57", "Rename it to .csv"),
    "CSV cut in quotes": (
        "a.csv",
        lambda path: path.write_text('prompt,chosen,rejected\n"p,c,r'),
        "DATA-57",
        "quoting",
    ),
    "CSV with equal columns": (
        "a.csv",
        lambda path: path.write_text("prompt,prompt\na,b\n"),
        "DATA-17",
        "repeated column",
    ),
    "CSV not UTF-8": ("a.csv", lambda path: path.write_bytes(b"prompt,chosen,rejected\np,\xff,r"), "DATA-21", ":2: "),
    "object in .json": ("a.json", lambda path: path.write_text(row()), "DATA-20", "not with '['"),
    "JSON array cut": ("a.json", lambda path: path.write_text(f"[{row()}, {row()[:-4]}"), "DATA-35", "line 1: "),
    "JSON array with a cut word": (
        "a.json",
        lambda path: path.write_text('[{"a": 1},\n {"a": tru'),
        "DATA-35",
        "line 2: Expecting value; found 'tru' (DATA-35)",
    ),
    "JSON array without commas": ("a.json", lambda path: path.write_text(f"[{row()} {row()}]"), "DATA-35", "a comma"),
    "JSON array going on": (
        "a.json",
        lambda path: path.write_text(f"[{row()}] x"),
        "DATA-35",
        "there is more after the array",
    ),
    "JSON array not UTF-8": (
        "a.json",
        lambda path: path.write_bytes(b'[{"prompt": "\xff"}]'),
        "DATA-21",
        "near byte 13",
    ),
    "parquet damaged": (
        "a.parquet",
        lambda path: path.write_bytes(b"PAR1 nothing PAR1"),
        "DATA-54",
        "whole parquet file",
    ),
    "unknown kind": ("a.docx", lambda path: path.touch(), "DATA-41", "Rename it to end in"),
}


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ('{"prompt": "p",\n "chosen": tru, "x": 1}', 'line 2: Expecting value; found \'tru, "x": 1}'),
        ('{"prompt": "p",\n "chosen": "c" "x": 1}', "line 2: Expecting ',' delimiter; found '\"x\": 1}"),
        ('{"prompt": "', "line 1: a row is longer than 100,000 characters (DATA-37)"),
        ('{"prompt": [', "line 1: a row is longer than 100,000 characters (DATA-37)"),
    ],
)
def test_a_mistake_in_a_long_array_is_told_from_a_row_that_is_too_long(bad, words, tmp_path):
    path = tmp_path / "a.json"
    rest = {'"': "x" * 3_000_000, "[": "1, " * 1_000_000, "}": f", {row()}" * 60_000}
    path.write_text(f"[{bad}{rest[bad[-1]]}")
    with pytest.raises(UserError) as caught:
        read(path, max_line_bytes=100_000)
    assert f"{path}: {words}" in str(caught.value)


def test_an_array_above_the_limit_is_refused_with_the_command_that_converts_it(tmp_path, monkeypatch):
    monkeypatch.setattr(json_arrays, "MOST_BYTES", 50)
    (tmp_path / "a.json").write_text(f"[{row()}, {row(prompt='q')}]")
    with pytest.raises(UserError) as caught:
        read(tmp_path / "a.json")
    assert "(DATA-37)" in str(caught.value) and "jq -c '.[]' rows.json > rows.jsonl" in str(caught.value)


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_refused_with_its_name_and_code(case, tmp_path):
    name, make, code, words = BAD_FILES[case]
    make(tmp_path / name)
    with pytest.raises(UserError) as caught:
        read(
            tmp_path / name, max_line_bytes=100_000_000 if case == "bomb" else 4000 if case == "long line" else 100_000
        )
    message = str(caught.value)
    assert f"({code})" in message
    assert words in message
    assert str(tmp_path) in message
    assert code in CODES


def test_a_file_that_may_not_be_read_says_so_with_its_mode(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(row())
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read everything")
    with pytest.raises(UserError, match=r"may not be read \(mode ----------.*DATA-43"):
        read(path)


def test_a_packing_that_this_python_cannot_open_is_named(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl.xz"
    path.write_bytes(lzma.compress(row().encode()))
    monkeypatch.setitem(sys.modules, "lzma", None)
    with pytest.raises(UserError, match=r"packed with xz, and this Python has no module lzma \(DATA-51\)"):
        read(path)


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(row() + "\n" + row() + "\n")
    rows = open_source("jsonl").read(Request(dataset_name=str(path)), ReadLog())
    next(rows)
    with path.open("a", encoding="utf-8") as f:
        f.write(row() + "\n")
    with pytest.raises(UserError, match=r"changed while it was read \(DATA-52\)"):
        list(rows)


@pytest.mark.parametrize(
    "name",
    ["file:///etc/passwd", "https://example.org/a.jsonl", "~/a.jsonl", "$HOME/a.jsonl", "a\nb.jsonl", "a\x00b", " "],
)
def test_names_that_are_no_plain_path_are_refused(name):
    with pytest.raises(UserError, match="DATA-91"):
        read(name)


@pytest.mark.parametrize("name", ["/", "//", "/.", "/tmp/.."])
def test_the_whole_file_system_is_not_read(name, monkeypatch):
    monkeypatch.setattr(Path, "iterdir", lambda *_: pytest.fail("walked the file system"))
    with pytest.raises(UserError, match=r"is the root of the file system \(DATA-91\)"):
        read(name)


def test_what_may_not_be_looked_at_is_named(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"a{300}: could not be looked at: File name too long \(DATA-43\)"):
        read("a" * 300)
    closed, plain = tmp_path / "closed.jsonl", Path.is_dir

    def is_dir(self):
        if self == closed:
            raise PermissionError(13, "Permission denied", str(self))
        return plain(self)

    closed.write_text(row() + "\n")
    monkeypatch.setattr(Path, "is_dir", is_dir)
    with pytest.raises(UserError, match=r"closed.jsonl: could not be looked at: Permission denied \(DATA-43\)"):
        read(tmp_path)


def test_a_link_out_of_a_folder_is_refused_unless_asked_for(tmp_path):
    outside, folder = tmp_path / "outside.jsonl", tmp_path / "folder"
    folder.mkdir()
    outside.write_text(row() + "\n")
    (folder / "in.jsonl").symlink_to(outside)
    with pytest.raises(UserError, match="DATA-44"):
        read(folder)
    assert len(read(folder, follow_symlinks=True)[0]) == 1


def test_hidden_files_and_what_lies_in_hidden_folders_are_not_read(tmp_path):
    for name in (".hidden/rows.jsonl", "part/rows.jsonl", "part/.ipynb_checkpoints/rows-checkpoint.jsonl", ".b.jsonl"):
        (tmp_path / ".data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / ".data" / name).write_text(row() + "\n")
    rows, log = read(tmp_path / ".data")
    assert list(log.files) == [str(tmp_path / ".data/part/rows.jsonl")] and len(rows) == 1


def test_a_linked_folder_is_refused_unless_asked_for_and_nothing_is_read_twice(tmp_path):
    folder, outside = tmp_path / "folder", tmp_path / "outside"
    for place, name in ((folder / "part", "a"), (outside / "deep", "b")):
        place.mkdir(parents=True)
        (place / f"{name}.jsonl").write_text(row(prompt=name) + "\n")
    (folder / "again").symlink_to("part")
    (folder / "again.jsonl").symlink_to("part/a.jsonl")
    (folder / "part" / "circle").symlink_to(folder)
    rows, log = read(folder)
    assert [one.prompt[0].content for one in rows] == ["a"] and list(log.files) == [str(folder / "part/a.jsonl")]
    (folder / "other").symlink_to(outside)
    (outside / "back").symlink_to(folder)
    with pytest.raises(UserError, match=r"other: is a link out of the folder, to .*outside \(DATA-44\)"):
        read(folder)
    rows, log = read(folder, follow_symlinks=True)
    assert [one.prompt[0].content for one in rows] == ["b", "a"]
    assert list(log.files) == [str(folder / name) for name in ("other/deep/b.jsonl", "part/a.jsonl")]


def test_a_folder_that_may_not_be_listed_is_named(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_text(row() + "\n")
    closed, plain = tmp_path / "closed", Path.iterdir

    def iterdir(self):
        if self == closed:
            raise PermissionError(13, "Permission denied", str(self))
        return plain(self)

    closed.mkdir()
    monkeypatch.setattr(Path, "iterdir", iterdir)
    with pytest.raises(UserError, match=r"closed: could not be looked at: Permission denied \(DATA-43\)"):
        read(tmp_path)


def test_what_a_packed_file_is_decides_over_its_name(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(gzip.compress((row() + "\n").encode()) + gzip.compress((row(prompt="q") + "\n").encode()))
    rows, log = read(path)
    assert [found.prompt[0].content for found in rows] == ["p", "q"]
    assert any("its name says not packed, its content gzip" in message for message in log.warnings)


COMMAND_LINE = [(case, "row") for case in BAD_ROWS] + [(case, "file") for case in BAD_FILES]


@pytest.mark.parametrize(("case", "kind"), COMMAND_LINE)
def test_the_command_line_ends_with_exit_code_2_and_leaves_nothing(case, kind, tmp_path, capsys):
    from laddpo.cli.app import cli

    if kind == "row":
        bad, code, words = BAD_ROWS[case]
        path = tmp_path / "rows.jsonl"
        path.write_bytes(bad if isinstance(bad, bytes) else bad.encode("utf-8", "surrogatepass"))
        path.write_bytes(row().encode() + b"\n" + path.read_bytes() + b"\n")
        data = path
    else:
        name, make, code, words = BAD_FILES[case]
        make(tmp_path / name)
        data = f"'{tmp_path / name}'"
    made = tmp_path / "data"
    limit = 100_000_000 if case == "bomb" else 4000 if case == "long line" else 1_000_000
    arguments = [
        "data=jsonl", f"data.dataset_name={data}", f"paths.data_dir={made}", f"data.max_line_bytes={limit}",
        f"paths.outputs_dir={tmp_path / 'outputs'}",
    ]  # fmt: skip
    assert cli("prepare", arguments) == 2
    said = capsys.readouterr().err
    assert f"({code})" in said
    assert words in said
    assert "Traceback" not in said
    assert not [path for path in made.rglob("*") if path.is_file()]
    assert not list(made.glob("prepared/.building*"))
