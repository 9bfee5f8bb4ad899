"""Paths that cannot be used end every command with one message; what a terminal cannot show ends none."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from laddpo.cli.app import cli
from laddpo.errors import UserError
from laddpo.settings.path_checks import NAMED, NO_HUB_IDS, path_problem
from laddpo.storage import atomic, manifests

REPOSITORY = Path(__file__).resolve().parents[1]
FAULTS = {
    "NUL": ("a\0b", "NUL"),
    "not UTF-8": ("caf\udce9", "not UTF-8"),
    "a name that is too long": ("x" * 300, "at most 4095 and 255"),
    "a path that is too long": ("x/" * 2100, "at most 4095 and 255"),
    "a user that is not known": ("~nosuchuser/a", "no known user"),
    "a circle of links": ("circle/a", "cannot be looked at"),
    "a folder that may not be entered": ("closed/a", "cannot be looked at"),
    "below a file": ("file/a", "a part of it is a file"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_setting_that_names_a_path_is_refused_by_its_key(fault, tmp_path, monkeypatch, capsys):
    """One command line with the same fault in every setting: one message for each."""
    monkeypatch.chdir(tmp_path)
    Path("circle").symlink_to("circle")
    Path("file").touch()
    plain = os.stat

    def stat(path, *arguments, **named):  # root may enter any folder
        if str(path).startswith("closed"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return plain(path, *arguments, **named)

    monkeypatch.setattr(os, "stat", stat)
    path, said = FAULTS[fault]
    keys = [key for key in NAMED if fault != "below a file" or key in NO_HUB_IDS]
    groups = ["data=onpolicy", "evaluation=gsm8k"]
    asked = [f"{key}='{path}'" for key in keys if key not in ("run",)]
    assert cli("generate", [*groups, *asked, f"run='{path}'", f"runs=['{path}']"], lambda config, folder: None) == 2
    shown = capsys.readouterr().err
    assert "Traceback" not in shown
    for key in [*keys, "runs"]:
        lines = [line for line in shown.splitlines() if line.startswith(f"error: {key} is ")]
        assert any(said in line for line in lines), key


@pytest.mark.parametrize("path", ["a\0b", "caf\udce9", "x" * 300, "circle", "absent"])
def test_a_folder_of_settings_that_cannot_be_used_is_refused(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("circle").symlink_to("circle")
    assert cli("train", ["--config-dir", path], lambda config, folder: None) == 2
    shown = capsys.readouterr().err
    assert "--config-dir is " in shown and "Traceback" not in shown


def test_usual_paths_have_no_problem(tmp_path):
    for path in (
        "outputs",
        "GSAI-ML/LLaDA-8B-Base",
        str(tmp_path),
        str(tmp_path / "absent" / "a"),
        "données",
        "~/a",
        "a~b",
    ):
        assert path_problem(path) is None, path


@pytest.mark.parametrize(
    ("key", "stage"), [("output_dir", "train"), ("paths.data_dir", "prepare"), ("paths.outputs_dir", "train")]
)
def test_a_file_where_a_folder_has_to_be_is_refused(key, stage, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert cli(stage, [f"{key}={tmp_path / 'file'}"], lambda config, folder: None) == 2
    assert f"{key} is '{tmp_path / 'file'}'; it is a file; expected a folder" in capsys.readouterr().err


@pytest.mark.parametrize("number", [errno.EACCES, errno.ENOTDIR, errno.EROFS])
def test_what_a_stage_may_not_open_is_one_message(number, capsys):
    def forbidden(config, folder):
        raise OSError(number, os.strerror(number), "some/file")

    assert cli("train", [], forbidden) == 2
    shown = capsys.readouterr().err
    assert shown.count("error: ") == 1 and "some/file" in shown and "Traceback" not in shown


def test_a_fault_of_ours_keeps_its_traceback(capsys):
    def broken(config, folder):
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", "some/file")

    assert cli("train", [], broken) == 1
    assert "Traceback" in capsys.readouterr().err


CHILD = """
import os, sys
from laddpo.cli.app import run_stage
stage = sys.argv.pop(1)
if stage == "gone":
    os.rmdir(os.getcwd())
run_stage("generate", lambda config, folder: print(config.prompt, config.output_dir, "done \\u65e5 \\ud83d"))
"""


def run_child(place: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    given = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONDONTWRITEBYTECODE": "1", **environment}
    command = [sys.executable, "-c", CHILD, *arguments]
    return subprocess.run(command, capture_output=True, env=given, cwd=place, timeout=120, check=False)


def test_a_current_folder_that_is_gone_is_refused(tmp_path):
    (tmp_path / "gone").mkdir()
    done = run_child(tmp_path / "gone", "gone", "prompt=a")
    assert done.returncode == 2 and b"the current folder cannot be used" in done.stderr
    assert b"Traceback" not in done.stderr


@pytest.fixture
def open_to_all():
    """A folder that every user may enter. Those of pytest are closed whenever another pytest starts."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.mark.skipif(
    not hasattr(os, "setresuid") or os.geteuid() != 0, reason="root alone can become another user and come back"
)
def test_another_users_folders_are_refused_by_key(open_to_all, monkeypatch, capsys):
    tmp_path = open_to_all
    (tmp_path / "closed" / "run").mkdir(parents=True)
    (tmp_path / "read_only").mkdir()
    (tmp_path / "closed").chmod(0o700)
    (tmp_path / "read_only").chmod(0o555)
    monkeypatch.setenv("HOME", "/nonexistent")
    monkeypatch.chdir(tmp_path / "read_only")
    commands = [
        (["generate", "prompt=a", f"run={tmp_path}/closed/run"], "run is "),
        (["generate", "prompt=a", f"output_dir={tmp_path}/closed/new"], "output_dir is "),
        (["train", f"output_dir={tmp_path}/read_only/new"], "cannot be written to"),
        (["train"], "cannot be written to"),  # outputs/ in a current folder that is read-only
    ]
    for (stage, *more), _ in commands:  # what has to be imported is root's
        cli(stage, ["prompt=b", *more], lambda config, folder: None)
    capsys.readouterr()
    for (stage, *more), said in commands:
        try:
            os.setresuid(65534, 65534, 0)
            code = cli(stage, more, lambda config, folder: None)
        finally:
            os.setresuid(0, 0, 0)
        shown = capsys.readouterr().err
        assert code == 2 and said in shown and "Traceback" not in shown, more


def test_without_a_home_digests_are_not_remembered(tmp_path, monkeypatch):
    from laddpo.models import loading

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as for a user that no file knows
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").write_bytes(b"1")
    assert loading._remembered_sha256(tmp_path / "weights", False) == atomic.file_sha256(tmp_path / "weights")
    assert [path.name for path in tmp_path.iterdir()] == ["weights"]


# What cannot be encoded


def test_an_ascii_locale_takes_any_name_and_prompt_and_prints_escapes(tmp_path):
    asked = ["prompt='où 日本'", f"output_dir='{tmp_path}/données'"]
    done = run_child(tmp_path, "generate", *asked, LC_ALL="C", PYTHONUTF8="0")
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode("ascii") == f"o\\xf9 \\u65e5\\u672c {tmp_path}/donn\\xe9es done \\u65e5 \\ud83d\n"


def test_any_text_can_be_printed_and_written(tmp_path, monkeypatch):
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr(sys, "stdout", narrow)
    assert cli("train", [], lambda config, folder: print("日本 é \udce9")) == 0
    narrow.flush()
    assert narrow.buffer.getvalue() == b"\\u65e5\\u672c \xe9 \\udce9\n"
    value = {"path": "caf\udce9", "half": "\ud83d"}
    atomic.write_json(tmp_path / "a.json", value)
    assert atomic.read_json(tmp_path / "a.json") == value
    assert manifests.fingerprint(value) != manifests.fingerprint({**value, "path": "caf\udcea"})


def test_a_path_with_a_dollar_does_not_break_a_picture(tmp_path, capsys, monkeypatch, with_pictures):
    from laddpo.results import figures
    from laddpo.results.plots import panel_plots, training_plot

    rows = [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25}]
    training_plot(rows, tmp_path / "a.png", title="$x_{$")
    assert (tmp_path / "a.png").exists() and capsys.readouterr().err == ""

    def broken(*arguments, **named):
        raise RuntimeError("no font was found\nlong story")

    monkeypatch.setattr("laddpo.results.plots.new_figure", broken)
    training_plot(rows, tmp_path / "b.png")
    assert f"note: {tmp_path / 'b.png'}: was not drawn (RuntimeError: no font was found)" in capsys.readouterr().err
    assert panel_plots(rows, tmp_path) == [] and not (tmp_path / "b.png").exists()
    monkeypatch.setattr(figures, "write_bytes", lambda path, content: (_ for _ in ()).throw(UserError("full")))
    monkeypatch.setattr("laddpo.results.plots.new_figure", figures.new_figure)
    with pytest.raises(UserError, match="full"):  # what comes next could not be written either
        training_plot(rows, tmp_path / "c.png")
