"""What models and data say is shown, never acted on: control characters on a terminal, HTML and Markdown on pages."""

from __future__ import annotations

import json
import re

import pytest

from laddpo.errors import visible
from laddpo.evaluation.run_task import Answer
from laddpo.results.page import html
from laddpo.results.tables import aligned, examples_text, markdown

EVIL = "\x1b[2J\x1b]0;title\x07 a\x08b\rc \x9b31m \x7f \u202e \u2066 <b>|`x`"
ACTING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def is_harmless(shown: str) -> bool:
    """Whether nothing of it acts. What progress bars write themselves is left out."""
    own = re.sub(r"\r(train|reading|encoding|reference|\w+): [^\r\n]*", "", shown)
    return not ACTING.search(own.replace("\r\n", "\n").replace("\x1b[A", "").replace("\r", ""))


def test_every_control_character_is_written_out_and_other_text_stays():
    assert visible(EVIL).startswith("\\x1b[2J\\x1b]0;title\\x07 a\\x08b\\x0dc \\x9b31m \\x7f \\u202e \\u2066 <b>")
    for text in ("plain\n\ttext", "é 日本 🙂 ✓ – …", "", "C:\\x1b"):
        assert visible(text) == text and visible(visible(EVIL)) == visible(EVIL)
    every = "".join(map(chr, range(0x3000)))
    assert not ACTING.search(visible(every)) and visible("\ud800").encode() == b"\\ud800"


def test_tables_examples_and_pages_show_what_data_hold():
    record = {"id": "1", "prompt": EVIL, "answer": EVIL, "text": EVIL, "correct": False}
    shown = {
        "examples": examples_text([record], [record]),
        "aligned": aligned(["", EVIL], [[EVIL, EVIL]]),
        "markdown": markdown(["a", EVIL], [[EVIL, f"{EVIL}\n{EVIL}"]]),
        "examples of a page": html.examples([(record, record)]),
        "page": html.page(EVIL, EVIL, EVIL, [html.section(EVIL, html.paragraph(EVIL), html.table([EVIL], [[EVIL]]))]),
        "folded": html.folded(EVIL, [html.paragraph(EVIL)]),
    }
    for name, text in shown.items():
        assert not ACTING.search(text) and "\\x1b[2J" in text, name
        if name not in ("examples", "aligned"):
            assert "<b>|" not in text and "&lt;b&gt;" in text.replace("&lt;b>", "&lt;b&gt;"), name
    assert [line.replace("\\|", "").count("|") for line in shown["markdown"].splitlines()] == [3, 3, 3]


def test_generate_shows_an_answer_harmlessly_and_keeps_its_true_text(stages, monkeypatch, capsys):
    from laddpo.evaluation import answering

    monkeypatch.setattr(answering.Answerer, "to", lambda *given: lambda prompts: [Answer(EVIL)] * len(prompts))
    (stages.folder / "prompts.txt").write_text(EVIL.replace("\r", " ") + "\n", encoding="utf-8")
    out = stages.folder / "out"
    assert stages.run("generate", f"prompts={stages.folder / 'prompts.txt'}", f"output_dir={out}") == 0
    said = capsys.readouterr().out
    assert not ACTING.search(said) and said.count("\\x1b[2J") == 2
    (row,) = [json.loads(line) for line in (out / "generations.jsonl").read_text(encoding="utf-8").split("\n") if line]
    assert row["base"] == EVIL and row["prompt"] == EVIL.replace("\r", " ")


ROWS = [
    ({"prompt": "p", "chosen": "c", "rejected": "r", EVIL: 1}, 0),  # a warning that quotes a column
    ({"prompt": "p", "chosen": "c", EVIL: 1}, 2),  # an error that quotes the fields found
    ({"prompt": "p", "chosen": "c", "rejected": [{"role": EVIL, "content": "x"}]}, 2),
    ({"prompt": "p", "chosen": [{EVIL: "x"}], "rejected": [{EVIL: "x"}]}, 2),
]


@pytest.mark.parametrize(("row", "code"), ROWS)
def test_prepare_shows_what_it_quotes_of_rows_harmlessly(stages, capsys, row, code):
    path = stages.folder / "rows.jsonl"
    text = json.dumps(row, ensure_ascii=False)
    path.write_text((text + "\n" + text.replace('"p"', '"q"') + "\n"), encoding="utf-8")
    assert stages.run("prepare", "data=jsonl", f"data.dataset_name={path}", "data.validation_fraction=0") == code
    said = capsys.readouterr()
    assert not ACTING.search(said.out) and is_harmless(said.err)
    if EVIL in row:  # it was quoted, and not left out
        assert "x1b[2J" in said.out + said.err


def test_a_traceback_shows_what_it_quotes_harmlessly(capsys):
    from laddpo.cli.app import cli

    def broken(config, folder):
        raise RuntimeError(EVIL)

    assert cli("train", [], broken) == 1
    assert not ACTING.search(capsys.readouterr().err)
