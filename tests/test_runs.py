"""Files that appear whole or not at all, logs that forget what a crash tore, manifests that notice a change."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from laddpo.errors import UserError
from laddpo.storage import atomic, json_lines, locks, manifests

REPOSITORY = Path(__file__).resolve().parents[1]


# Fingerprints


def test_fingerprints_ignore_the_order_of_keys_and_see_every_value():
    fields = {"a": 1, "b": {"c": [1, 2], "d": None}}
    assert manifests.fingerprint(fields) == manifests.fingerprint({"b": {"d": None, "c": [1, 2]}, "a": 1})
    assert manifests.fingerprint(fields) != manifests.fingerprint({"a": 1, "b": {"c": [2, 1], "d": None}})
    assert manifests.fingerprint(fields) == "6146dd4938e3bf91", "golden: another recipe would orphan every folder"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_json_cannot_hold_has_no_fingerprint(value):
    with pytest.raises(ValueError, match="JSON compliant"):
        manifests.fingerprint({"a": value})


def test_differing_fields_are_named_with_both_values():
    stored = {"a": 1, "b": {"c": 2, "gone": 3}, "same": [1, "x"]}
    wanted = {"a": 1, "b": {"c": 5, "new": 4}, "same": (1, "x")}
    assert manifests.differing_fields(stored, wanted) == [
        "b.c: stored 2, now 5",
        "b.gone: stored 3, now '(absent)'",
        "b.new: stored '(absent)', now 4",
    ]


# Atomic files


def test_a_write_that_fails_leaves_the_old_content_and_no_rest(tmp_path):
    path = tmp_path / "deep" / "file.txt"
    atomic.write_text(path, "old")
    with pytest.raises(RuntimeError), atomic.atomic_file(path) as f:
        f.write(b"half of the new")
        raise RuntimeError
    assert path.read_text() == "old"
    assert [entry.name for entry in path.parent.iterdir()] == ["file.txt"]


def test_a_full_disk_is_explained_with_path_and_cure(tmp_path, monkeypatch):
    def no_space(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(
        UserError, match=r"x\.json: could not be written: No space left on device \(\d+ MiB free there\)"
    ):
        atomic.write_json(tmp_path / "x.json", {})
    assert list(tmp_path.iterdir()) == []


def test_text_has_the_same_bytes_on_every_platform(tmp_path):
    atomic.write_text(tmp_path / "t", "é\n")
    atomic.write_json(tmp_path / "j", {"b": "é", "a": 1})
    assert (tmp_path / "t").read_bytes() == b"\xc3\xa9\n"
    assert (tmp_path / "j").read_bytes() == '{\n  "a": 1,\n  "b": "é"\n}\n'.encode()


def test_damaged_json_is_named(tmp_path):
    (tmp_path / "x.json").write_bytes(b'{"a": ')
    with pytest.raises(UserError, match=r"x\.json: cannot be read"):
        atomic.read_json(tmp_path / "x.json")


# Logs


def test_a_log_gives_back_what_was_appended_and_forgets_a_torn_line(tmp_path):
    log = json_lines.JsonLines(tmp_path / "log.jsonl")
    assert log.read() == []
    records = [{"step": step, "loss": step / 3} for step in range(3)]
    for record in records:
        log.append(record)
    with log.path.open("a") as f:
        f.write('{"step": 3, "lo')
    assert log.read() == records


def test_rewinding_restores_the_bytes_that_stood_before(tmp_path):
    log = json_lines.JsonLines(tmp_path / "log.jsonl")
    for step in range(3):
        log.append({"step": step, "loss": 0.1 + step / 3, "name": "é", "none": None})
    before = log.path.read_bytes()
    log.append({"step": 3, "loss": 1e-300})
    with log.path.open("a") as f:
        f.write('{"step": 4')
    log.rewind(lambda record: record["step"] < 3)
    assert log.path.read_bytes() == before


@pytest.mark.parametrize("kept", range(0, 30, 3))
def test_a_log_torn_anywhere_is_a_prefix(tmp_path, kept):
    log = json_lines.JsonLines(tmp_path / "log.jsonl")
    for step in range(3):
        log.append({"step": step})
    log.path.write_bytes(log.path.read_bytes()[:kept])
    assert log.read() == [{"step": step} for step in range(3)][: len(log.read())]
    log.rewind(lambda record: True)
    log.append({"step": 9})
    assert log.read()[-1] == {"step": 9}


def test_a_log_is_cut_back_to_what_was_sealed_whatever_came_after(tmp_path):
    log = json_lines.JsonLines(tmp_path / "log.jsonl")
    assert log.seal()["bytes"] == 0
    log.append({"step": 0, "loss": 0.1})
    sealed, before = log.seal(), log.path.read_bytes()
    log.append({"step": 1})
    log.cut(sealed)
    assert log.path.read_bytes() == before
    log.cut(json_lines.JsonLines(tmp_path / "other.jsonl").seal())
    assert log.path.read_bytes() == b""


@pytest.mark.parametrize("damage", ["one bit", "truncated"])
def test_a_log_that_changed_before_its_seal_is_refused(tmp_path, damage):
    log = json_lines.JsonLines(tmp_path / "log.jsonl")
    log.append({"step": 0, "loss": 0.125})
    sealed, content = log.seal(), bytearray(log.path.read_bytes())
    content[-4] ^= 1
    log.path.write_bytes(content if damage == "one bit" else content[:-3])
    with pytest.raises(UserError, match=r"log\.jsonl: differs from what the checkpoint sealed"):
        log.cut(sealed)


def test_a_log_that_is_gone_is_said_to_be_gone(tmp_path, capsys):
    log = json_lines.JsonLines(tmp_path / "log.jsonl")
    log.append({"step": 0})
    sealed = log.seal()
    log.path.unlink()
    log.cut(sealed)
    assert "log.jsonl: is missing" in capsys.readouterr().out


# Locks


def test_a_folder_in_use_is_refused_naming_the_process(tmp_path):
    pytest.importorskip("fcntl")
    holder = "import sys, pathlib; from laddpo.storage import locks\nwith locks.locked(pathlib.Path(sys.argv[1])):\n"
    holder += "    print('held', flush=True); sys.stdin.readline()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": REPOSITORY}
    process = subprocess.Popen([sys.executable, "-c", holder, str(tmp_path)], **pipes)
    assert process.stdout.readline() == "held\n"
    with (
        pytest.raises(UserError, match=rf"is in use by process {process.pid} on"),
        locks.locked(tmp_path, wait=False),
    ):
        pass
    process.communicate("go\n", timeout=30)
    with locks.locked(tmp_path, wait=False):
        pass


# Folders


def test_a_replaced_folder_is_the_old_or_the_new_one(tmp_path):
    folder = tmp_path / "adapter"
    for number in (1, 2):
        with atomic.replaced_folder(folder) as new:
            (new / "weights").write_text(str(number))
            (new / f"only-{number}").touch()
    assert sorted(entry.name for entry in folder.iterdir()) == ["only-2", "weights"]
    with pytest.raises(RuntimeError), atomic.replaced_folder(folder) as new:
        (new / "weights").write_text("half")
        raise RuntimeError
    assert (folder / "weights").read_text() == "2"
    assert [entry.name for entry in tmp_path.iterdir()] == ["adapter"]


def test_the_old_folder_comes_back_when_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    folder = tmp_path / "adapter"
    with atomic.replaced_folder(folder) as new:
        (new / "weights").write_text("old")
    replace = os.replace

    def refuse_the_new_one(source, target):
        if Path(source).name.startswith(".tmp"):
            raise PermissionError(13, "Permission denied")
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse_the_new_one)
    with pytest.raises(UserError, match="adapter: could not be written"), atomic.replaced_folder(folder) as new:
        (new / "weights").write_text("new")
    assert (folder / "weights").read_text() == "old"


# Manifests

FIELDS = {"seed": 1, "encoding": {"template": "plain"}}


@pytest.fixture
def sealed(tmp_path) -> Path:
    (tmp_path / "values").write_bytes(b"1234")
    manifests.write_manifest(tmp_path, "prepared", FIELDS, ["values"], made_by="a test")
    return tmp_path


def test_a_sealed_folder_gives_its_fields_back(sealed):
    manifest = manifests.read_manifest(sealed, "prepared")
    assert manifest["fields"] == FIELDS and manifest["fingerprint"] == manifests.fingerprint(FIELDS)
    assert manifest["files"]["values"]["bytes"] == 4 and manifest["provenance"] == {"made_by": "a test"}


def test_a_folder_without_a_manifest_is_unfinished(tmp_path):
    assert manifests.read_manifest(tmp_path, "prepared") is None


@pytest.mark.parametrize("content", [b"1235", b"123", b"", None])
def test_a_changed_file_is_named(sealed, content):
    (sealed / "values").unlink() if content is None else (sealed / "values").write_bytes(content)
    with pytest.raises(UserError, match=r"values: differs from what manifest\.json sealed"):
        manifests.read_manifest(sealed, "prepared")
    assert manifests.read_manifest(sealed, "prepared", verify=False)["fields"] == FIELDS


@pytest.mark.parametrize("name", ["../values", "/etc/hostname", "a/../../values"])
def test_a_manifest_that_names_a_file_outside_its_folder_is_refused(sealed, name):
    manifest = json.loads((sealed / manifests.MANIFEST).read_text())
    manifest["files"] = {name: manifest["files"]["values"]}
    del manifest[manifests.SEAL]
    atomic.write_json(sealed / manifests.MANIFEST, manifests.with_seal(manifest))
    with pytest.raises(UserError, match="outside of its folder"):
        manifests.read_manifest(sealed, "prepared")


def test_a_manifest_of_another_kind_is_refused(sealed):
    with pytest.raises(UserError, match="is a manifest of 'prepared', expected 'train'"):
        manifests.read_manifest(sealed, "train")
    with pytest.raises(UserError, match="is a manifest of 'prepared', expected 'train' or 'sft'"):
        manifests.read_manifest(sealed, "train", "sft")
    assert manifests.read_manifest(sealed, "train", "prepared")["kind"] == "prepared"


def test_any_flipped_bit_of_a_manifest_is_noticed(sealed):
    path = sealed / manifests.MANIFEST
    whole = path.read_bytes()
    for position in range(len(whole)):
        for bit in range(8):
            content = bytearray(whole)
            content[position] ^= 1 << bit
            path.write_bytes(content)
            with pytest.raises(UserError, match=r"manifest\.json: "):
                manifests.read_manifest(sealed, "prepared")


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.pop("files"),
        lambda m: m.pop("fields"),
        lambda m: m.update(files=[]),
        lambda m: (m.pop("fingerprint"), m.pop(manifests.SEAL)),
    ],
)
def test_a_manifest_that_lost_a_part_is_explained(sealed, change):
    manifest = json.loads((sealed / manifests.MANIFEST).read_text())
    change(manifest)
    (sealed / manifests.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"manifest\.json: is damaged"):
        manifests.read_manifest(sealed, "prepared")


@pytest.mark.parametrize(
    ("kind", "fields", "lacking"),
    [
        ("weights", {"base": {"base": "a"}}, "step"),
        ("weights", {"step": 3, "base": "a"}, r"base\.base"),
        ("weights", {}, r"no keys, expected also step, base\.base"),
        ("prepared", {"seed": 1}, "'seed', expected also encoding"),
    ],
)
def test_a_manifest_of_an_older_version_is_refused_where_it_is_read(tmp_path, kind, fields, lacking):
    manifests.write_manifest(tmp_path, kind, fields, [])
    with pytest.raises(UserError, match=rf"manifest\.json: has .*{lacking}; an older version of laddpo wrote it"):
        manifests.read_manifest(tmp_path, kind)
