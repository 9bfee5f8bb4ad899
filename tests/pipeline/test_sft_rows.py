"""`python -m laddpo.sft` on rows: what it trains on is what the data hold."""

from __future__ import annotations

import json

import pytest

from laddpo.core.tasks import SftTask

ROWS = [{"prompt": f"say {i % 9} of {i}", "response": f"word {i % 9} it is"} for i in range(16)]


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return ["data=jsonl", f"data.dataset_name={path}", "data.test_fraction=0", "optim.max_train_steps=4"]


def test_sft_trains_on_the_rows_of_the_file_and_measures_held_out_ones(stages, rows, monkeypatch, capsys):
    learned, accumulate = [], SftTask.accumulate
    monkeypatch.setattr(SftTask, "accumulate", lambda self, *given: learned.append(self) or accumulate(self, *given))
    run = stages.folder / "run"
    assert stages.run("sft", *rows, f"output_dir={run}") == 0
    (folder,) = (stages.folder / "data" / "prepared").iterdir()
    written = [json.loads(line) for line in (folder / "examples.jsonl").read_text().splitlines()]
    assert {(row["prompt"][0]["content"], row["response"]) for row in written} == {tuple(r.values()) for r in ROWS}
    trained = {row["id"] for row in written if row["split"] == "train"}
    assert {example.id for task in learned for example in task.examples} == trained and len(trained) < len(ROWS)
    assert {"report.json", "report.png", "tokens.safetensors"} <= {path.name for path in folder.iterdir()}

    fields = json.loads((run / "manifest.json").read_text())["fields"]
    assert fields["data"] == json.loads((folder / "manifest.json").read_text())["fingerprint"]
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    held_out = [record["validation/loss"] for record in metrics if "validation/loss" in record]
    assert len(held_out) == 2 and held_out[-1] < held_out[0]
    results = json.loads((run / "evaluation" / "results.json").read_text())
    assert [results["held_out_loss"][side] for side in ("base", "tuned")] == pytest.approx([held_out[0], min(held_out)])
    assert f"SFT on the rows of {stages.folder / 'rows.jsonl'}" in capsys.readouterr().out

    again = stages.folder / "again"
    assert stages.run("evaluate", f"run={run}", f"output_dir={again}") == 0
    assert json.loads((again / "results.json").read_text()) == results
    assert stages.run("export", f"run={run}", "export.adapter_only=true", f"output_dir={stages.folder / 'out'}") == 0
    card = (stages.folder / "out" / "README.md").read_text()
    assert f"rows.jsonl, fingerprint of the prepared rows `{fields['data']}`" in card and "generated" not in card


REFUSED = [
    (["data=jsonl", "data.dataset_name=/no/such/file.jsonl"], "/no/such/file.jsonl"),
    (["data=hh_rlhf", "data.dataset_name=/no/such/file.jsonl"], "/no/such/file.jsonl"),
    (["data=jsonl", "data.dataset_name=x.jsonl", "sft.examples=corpus"], "data=arithmetic"),
    (["data=hh_rlhf", "experiment=make_llada_nano"], "sft.examples is 'corpus'"),
    (["data=onpolicy", "sft.examples=corpus"], "sft.examples is 'corpus'"),
    (["data=jsonl", "data.dataset_name=x.jsonl", "sft.num_examples=8"], "data.random_sample_size"),
    (["data=jsonl", "data.dataset_name=x.jsonl", "sft.mistake_share=0.6"], "sft.mistake_share"),  # the default, too
    (["sft=control", "sft.num_examples=8"], "sft.num_examples"),
    (["data=arithmetic", "sft.drill_share=0.5"], "sft.drill_share"),
]


def test_only_sft_takes_a_name_for_the_response(stages, rows, capsys):
    assert stages.run("train", *rows, "data.columns.response=output") == 2
    assert "data.columns.response" in capsys.readouterr().err


@pytest.mark.parametrize(("asked", "words"), REFUSED)
def test_what_would_not_be_trained_on_is_refused_and_nothing_is_written(stages, capsys, asked, words):
    run = stages.folder / "run"
    assert stages.run("sft", *asked, f"output_dir={run}") == 2
    said = capsys.readouterr()
    assert words in said.err and "Traceback" not in said.err
    assert not (run / "config.yaml").exists() and not list(stages.folder.glob("data/prepared/*"))


def test_generated_data_are_trained_on_as_before(stages):
    from laddpo.settings.compose import compose
    from laddpo.settings.data_checks import sft_examples

    wanted = {
        (): "corpus",
        ("data=word_problems",): "corpus",
        ("data=word_problems", "data.questions=mine.jsonl", "data.tasks=[]"): "rows",
        ("experiment=make_llada_mini",): "corpus",
        ("sft=control", "data=onpolicy"): "chosen",
        ("data=onpolicy",): "rows",
        ("data=mixture",): "rows",
    }
    assert {asked: sft_examples(compose(list(asked))) for asked in wanted} == wanted


def test_a_mixture_gives_examples_of_every_part(stages, tmp_path):
    from laddpo.settings.compose import compose
    from laddpo.training.pairs import open_examples

    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    pairs = [{"prompt": f"p{i}", "chosen": f"c{i}", "rejected": "r"} for i in range(16)]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    parts = ",".join(f"{{dataset_name:{tmp_path / name}}}" for name in ("a.jsonl", "b.jsonl"))
    config = compose(
        stages.overrides("data=mixture", "data.test_fraction=0", f"data.mixture=[{parts},{{source:arithmetic}}]")
    )
    prepared = open_examples(config)
    texts = [row["response"] for side in ("train", "validation") for row in prepared.texts(side)]
    kinds = [sum(map(test, texts)) for test in (lambda t: t.startswith("word"), lambda t: t[0] == "c")]
    assert kinds == [16, 16] and len(texts) == 48
    assert len(prepared.validation) > 0
