"""Every setting that names data, against paths that cannot be read: one message with the path, never a traceback."""

import gzip
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from laddpo.errors import UserError
from laddpo.generate import wanted_prompts
from laddpo.preference.encoding.encode import TextEncoder
from laddpo.preference.preparation import Part, Rules, prepare_pairs
from laddpo.preference.reading.files import ReadLog
from laddpo.preference.requested import raw_rows
from laddpo.preference.sources import Request, open_source
from laddpo.problems.grading import FunctionGrader
from laddpo.problems.rows import task_rows
from laddpo.problems.tasks import TaskOptions, load_task

SHIPPED = Path(__file__).resolve().parents[2] / "data" / "llada_nano"
ROW = {"prompt": "p", "chosen": "c", "rejected": "r", "question": "q", "answer": "#### 1"}


def lines(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows or (ROW,)), encoding="utf-8")
    return path


def candidates(path):
    questions = lines(path.parent / "questions.jsonl")
    grader = FunctionGrader("equal", lambda text, answer: text == answer)
    return list(
        open_source("graded_candidates").read(
            Request(dataset_name=str(questions), candidates_name=str(path), grader=grader), ReadLog()
        )
    )


def shots(path):
    rows = lines(path.parent / "asked.jsonl")
    return load_task("gsm8k", TaskOptions(dataset_name=str(rows), shots=1, shots_from=str(path)))


READERS = {
    "data.dataset_name": lambda path: list(open_source("jsonl").read(Request(dataset_name=str(path)), ReadLog())),
    "data.questions": lambda path: list(raw_rows(Request(dataset_name=str(path)), ReadLog())),
    "data.candidates_name": candidates,
    "evaluation.dataset_name": lambda path: task_rows(str(path), None, "test", None, None, ()),
    "evaluation.shots_from": shots,
    "prompts": lambda path: wanted_prompts(
        SimpleNamespace(prompt=None, prompts=str(path), data=SimpleNamespace(max_line_bytes=10**6))
    ),
}


def refuse(monkeypatch, *names, path):
    """What the system says of a forbidden path to a user who is not root."""
    for name in names:
        real = getattr(Path, name)

        def refused(self, *args, _real=real, **kwargs):
            if self == path:
                raise PermissionError(13, "Permission denied", str(path))
            return _real(self, *args, **kwargs)

        monkeypatch.setattr(Path, name, refused)


def forbidden_file(folder, monkeypatch):
    path = lines(folder / "a.jsonl")
    refuse(monkeypatch, "open", path=path)
    return path


def in_a_forbidden_folder(folder, monkeypatch):
    path = lines(folder / "closed" / "a.jsonl")
    refuse(monkeypatch, "stat", "is_file", "is_dir", "exists", "is_symlink", path=path)
    real = os.path.lexists
    monkeypatch.setattr(os.path, "lexists", lambda other: Path(other) != path and real(other))
    return path


def forbidden_folder(folder, monkeypatch):
    path = lines(folder / "closed" / "test.jsonl").parent
    refuse(monkeypatch, "iterdir", path=path)
    return path


def broken_link(folder, _):
    (folder / "a.jsonl").symlink_to("gone")
    return folder / "a.jsonl"


def link_to_itself(folder, _):
    (folder / "a.jsonl").symlink_to("a.jsonl")
    return folder / "a.jsonl"


def broken_link_to_a_folder(folder, _):
    (folder / "rows").symlink_to("gone")
    return folder / "rows"


SITUATIONS = [
    forbidden_file,
    in_a_forbidden_folder,
    forbidden_folder,
    broken_link,
    link_to_itself,
    broken_link_to_a_folder,
]


@pytest.mark.parametrize("situation", SITUATIONS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("setting", READERS)
def test_a_path_that_cannot_be_read_is_one_message_that_names_it(setting, situation, tmp_path, monkeypatch):
    path = situation(tmp_path, monkeypatch)
    with pytest.raises(UserError) as caught:
        READERS[setting](path)
    assert str(path) in str(caught.value) and "DATA-4" in str(caught.value)


def odd_name(folder, name):
    """A path whose name is no UTF-8."""
    path = Path(os.fsdecode(os.fsencode(folder) + b"/od\xffd" + name))
    try:
        return lines(path)
    except OSError as error:
        pytest.skip(f"this file system refuses such a name: {error}")


@pytest.mark.parametrize("setting", [name for name in READERS if name != "evaluation.shots_from"])
def test_a_file_whose_name_is_no_utf8_is_read(setting, tmp_path):
    assert len(READERS[setting](odd_name(tmp_path, b".jsonl"))) >= 1


def test_a_folder_of_such_names_is_prepared_and_reported(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    for name in (b"_train.jsonl", b"_test.jsonl", b".bin"):
        odd_name(folder, name)
    shown = []
    encoder = TextEncoder(AutoTokenizer.from_pretrained(SHIPPED), max_length=100)
    part = Part("jsonl", Request(dataset_name=str(folder)))
    prepared = prepare_pairs(tmp_path, "odd", [part], encoder, Rules(), show=shown.append, progress=False)
    report = prepared.report()
    assert list(report["files"]) == [f"{folder}/od\\udcffd_train.jsonl"]
    assert report["files_not_read"] == {f"{folder}/od\\udcffd_test.jsonl": "test"}
    "\n".join(shown).encode("utf-8")


GSM8K = [{"question": f"q{i}", "answer": f"#### {i}"} for i in range(4)]


def test_a_task_reads_the_test_split_of_a_local_folder_and_its_shots_from_the_train_split(tmp_path, capsys):
    folder = tmp_path / "benchmarks" / "org" / "gsm8k"
    lines(folder / "main" / "train-00000-of-00001.jsonl", *GSM8K[:2])
    lines(folder / "main" / "test-00000-of-00001.jsonl", *GSM8K[2:])
    lines(folder / "socratic" / "test-00000-of-00001.jsonl", *GSM8K)
    task = load_task("gsm8k", TaskOptions(dataset_name="org/gsm8k", benchmarks_dir=tmp_path / "benchmarks", shots=1))
    assert [item.answer for item in task.items] == ["2", "3"]
    assert task.items[0].prompt[0].content.startswith(("q0", "q1"))
    assert "files of split train" in capsys.readouterr().err
    (folder / "main" / "test-00000-of-00001.jsonl").unlink()
    with pytest.raises(UserError, match=r"evaluation\.dataset_name: the split is 'test'; .* has train \(DATA-70\)"):
        load_task("gsm8k", TaskOptions(dataset_name="org/gsm8k", benchmarks_dir=tmp_path / "benchmarks"))


@pytest.mark.parametrize("kind", ["a.txt", "a.jsonl", "a.jsonl.gz", "a.json", "a.csv", "a.parquet"])
def test_prompts_are_read_from_tables_and_from_lines(kind, tmp_path):
    path, rows = tmp_path / kind, [{"prompt": "1+1="}, {"prompt": "2+2="}]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if kind == "a.parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif kind == "a.jsonl.gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        texts = {"a.jsonl": text, "a.json": json.dumps(rows), "a.csv": "prompt\n1+1=\n2+2=\n", "a.txt": "1+1=\n\n2+2="}
        path.write_text(texts[kind])
    found = wanted_prompts(SimpleNamespace(prompt=None, prompts=str(path)))
    assert [prompt[0].content for _, prompt in found] == ["1+1=", "2+2="]


def test_a_table_of_prompts_that_is_not_there_is_named_by_its_setting(tmp_path):
    with pytest.raises(UserError, match=r"Check prompts\."):
        wanted_prompts(SimpleNamespace(prompt=None, prompts=str(tmp_path / "gone.parquet")))
