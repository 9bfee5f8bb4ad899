"""Cases of the catalogue that lie in the surroundings (permissions, modules, other writers, the model's template),
through the command line: message, exit code, nothing left behind."""

import json
import lzma
import os
import shutil
import sys
from pathlib import Path

import pytest

from laddpo.cli.app import cli
from laddpo.preference.reading import files

NANO = Path(__file__).resolve().parents[2] / "data" / "llada_nano"
ROW = {"prompt": "p", "chosen": "c", "rejected": "r"}


def lines(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def forbidden(folder, monkeypatch):
    """A file without permissions; for a user who may read all the same, the refusal that the system would give."""
    path = lines(folder / "a.jsonl", ROW)
    path.chmod(0)
    if os.access(path, os.R_OK):
        real = Path.open

        def refused(self, *args, **kwargs):
            if self == path:
                raise PermissionError(13, "Permission denied", str(path))
            return real(self, *args, **kwargs)

        monkeypatch.setattr(Path, "open", refused)
    return path, []


def packed_with_xz(folder, monkeypatch):
    path = folder / "a.jsonl.xz"
    path.write_bytes(lzma.compress(json.dumps(ROW).encode()))
    monkeypatch.setitem(sys.modules, "lzma", None)
    return path, []


def written_to_by_another(folder, monkeypatch):
    path = lines(folder / "a.jsonl", ROW, ROW)
    real = files.open_plain

    def open_plain(path, *args):
        with open(path, "a", encoding="utf-8") as other:
            other.write(json.dumps(ROW) + "\n")
        return real(path, *args)

    monkeypatch.setattr(files, "open_plain", open_plain)
    return path, []


def with_template(folder, template):
    """A copy of the shipped model whose chat template is another."""
    model = folder / "model"
    shutil.copytree(NANO, model, ignore=shutil.ignore_patterns("manifest.json"))
    (model / "chat_template.jinja").unlink(missing_ok=True)
    settings = json.loads((model / "tokenizer_config.json").read_text(encoding="utf-8"))
    (model / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template}), encoding="utf-8")
    return [f"model.model_name_or_path={model}"]


def special_token_over_the_seam(folder, _):
    template = "{% for m in messages %}{{ '<|mdm_' if m.role == 'user' }}{{ m['content'] }}<|eot_id|>{% endfor %}"
    return lines(folder / "a.jsonl", {**ROW, "prompt": "mask|>"}), with_template(folder, template)


def template_that_loses_text(folder, _):
    template = "{% for m in messages %}{{ m['content'] | replace('x', '') }}<|eot_id|>{% endfor %}"
    return lines(folder / "a.jsonl", {**ROW, "prompt": "axb"}), with_template(folder, template)


CASES = {
    "DATA-43": (forbidden, "may not be read (mode"),
    "DATA-51": (packed_with_xz, "this Python has no module lzma"),
    "DATA-52": (written_to_by_another, "changed while it was read"),
    "DATA-74": (special_token_over_the_seam, "a.jsonl:1"),
    "DATA-95": (template_that_loses_text, "lost text"),
}


@pytest.mark.parametrize("code", CASES)
def test_surroundings_that_spoil_the_data_end_with_exit_code_2_and_leave_nothing(code, tmp_path, monkeypatch, capsys):
    make, words = CASES[code]
    path, settings = make(tmp_path, monkeypatch)
    made = tmp_path / "data"
    asked = ["data=jsonl", f"data.dataset_name={path}", f"paths.data_dir={made}", f"paths.outputs_dir={tmp_path / 'o'}"]
    assert cli("prepare", [*asked, *settings]) == 2
    said = capsys.readouterr().err
    assert f"({code})" in said and words in said and "Traceback" not in said
    assert not list(made.glob("prepared/*"))
