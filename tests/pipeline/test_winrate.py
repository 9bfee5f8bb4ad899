"""evaluation=winrate through the door a user uses, on llada_nano: by a rule, a tiny classifier and a fake endpoint."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from laddpo.cli.app import cli
from laddpo.errors import UserError
from laddpo.settings.compose import compose
from tests.fake_judge import KEY, longer_wins, serving

ANSWERING = ["gen_length=24", "block_length=24", "steps=6", "limit=8"]


@dataclass(frozen=True)
class Lab:
    """A run of llada_nano of two steps, and evaluations of it."""

    folder: Path
    run: Path

    def evaluate(self, name: str, *more: str) -> int:
        quick = [f"evaluation.{text}" for text in (*ANSWERING, "num_pairs=2", "diffusion_samples=1")]
        place = [f"output_dir={self.folder / name}", f"paths.data_dir={self.folder / 'data'}", "hardware.device=cpu"]
        return cli("evaluate", [f"run={self.run}", "evaluation=winrate", *quick, *place, *more])

    def results(self, name: str) -> dict:
        return json.loads((self.folder / name / "results.json").read_text())

    def items(self, name: str) -> list[dict]:
        return [json.loads(line) for line in (self.folder / name / "items.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """The run judges its own held-out prompts at its end: which answers are right."""
    folder = tmp_path_factory.mktemp("winrate")
    quick = [f"evaluation.{text}" for text in (*ANSWERING, "num_pairs=2", "diffusion_samples=1", "every_steps=2")]
    given = [
        *("data.num_pairs=40", "data.validation_fraction=0.5", "optim.max_train_steps=2", "logger=none"),
        *("optim.learning_rate=0.01", "dpo.diffusion_samples=2", "optim.num_warmup_steps=0", "hardware.device=cpu"),
        *("evaluation=winrate", "evaluation.judge.rule=right", "best_metric=none", f"output_dir={folder / 'run'}"),
    ]
    assert cli("train", [*given, *quick, f"paths.data_dir={folder / 'data'}"]) == 0
    return Lab(folder, folder / "run")


def check(results: dict, items: list[dict]) -> None:
    """What results.json says is what the lines of items.jsonl add up to."""
    entry, verdicts = results["win_rate"], [item["verdict"] for item in items if item["model"] == "verdict"]
    counts = [verdicts.count(name) for name in ("win", "tie", "loss")]
    assert [entry["wins"], entry["ties"], entry["losses"]] == counts
    assert entry["items"] == sum(counts) and entry["tuned"] == pytest.approx((counts[0] + counts[1] / 2) / sum(counts))
    low, high = entry["tuned_interval"]
    assert 0 <= low <= entry["tuned"] <= high <= 1 and low < high and entry["base"] == 0.5
    assert entry["mean_characters"].keys() == {"base", "tuned"}
    for model in ("base", "tuned"):
        assert len([item for item in items if item["model"] == model]) == len(verdicts)


def test_a_run_ends_with_its_held_out_prompts_judged_by_a_rule(lab, capsys):
    place = Lab(lab.run, lab.run)
    results, items = place.results("evaluation"), place.items("evaluation")
    check(results, items)
    assert results["win_rate"]["judge"]["rule"] == "right" and results["win_rate"]["prompts"]["items"] == 8
    right = {(item["model"], item["id"]): item["correct"] for item in items if item["model"] != "verdict"}
    for item in items:
        if item["model"] == "verdict":
            expected = {1: "win", 0: "tie", -1: "loss"}[right["tuned", item["id"]] - right["base", item["id"]]]
            assert item["verdict"] == expected
    assert "exact_match" in results  # the prompts have answers
    assert cli("report", [f"run={lab.run}", f"output_dir={lab.folder / 'page'}"]) == 0
    page = (lab.folder / "page" / "report.html").read_text()
    assert "win rate" in page and "The tuned model won" in page


def test_a_users_prompts_are_judged_without_answers_and_continued(lab, tmp_path, capsys):
    prompts = tmp_path / "mine.jsonl"
    said = [{"role": "user", "content": "02+03-01="}]
    prompts.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in ("01+02+03=", "09-04+02=", said)))
    asked = [f"evaluation.dataset_name={prompts}", "evaluation.judge.rule=shorter"]
    assert lab.evaluate("mine", *asked) == 0
    out = capsys.readouterr().out
    assert "win rate" in out and "The tuned model won" in out
    results, items = lab.results("mine"), lab.items("mine")
    check(results, items)
    assert results["win_rate"]["items"] == 3 and "exact_match" not in results
    assert items[0]["correct"] is None
    assert lab.evaluate("mine", *asked, "resume=true", "evaluation.judge.rule=longer") == 0
    again = lab.results("mine")["win_rate"]
    assert (again["wins"], again["losses"]) == (results["win_rate"]["losses"], results["win_rate"]["wins"])
    assert len(lab.items("mine")) == len(items)
    prompts.write_text('{"prompt": "1+1="}\n{"text": "1+1="}\n')
    assert lab.evaluate("bad", *asked) == 2
    assert "row 2: prompt: is null" in capsys.readouterr().err


def test_a_classifier_judges_by_the_label_that_is_named(lab, classifier, capsys):
    asked = ["evaluation.judge.kind=reward_model", f"evaluation.judge.model={classifier}"]
    assert lab.evaluate("unlabelled", *asked) == 2
    assert "has the labels bad, good, fair" in capsys.readouterr().err
    asked.append("evaluation.judge.label=good")
    assert lab.evaluate("classified", *asked) == 0
    results, items = lab.results("classified"), lab.items("classified")
    check(results, items)
    texts = {(item["model"], item["id"]): item["text"] for item in items if item["model"] != "verdict"}
    for item in items:
        if item["model"] == "verdict":
            scores = [_score(classifier, item["id"], items, texts[model, item["id"]]) for model in ("tuned", "base")]
            assert item["scores"] == pytest.approx(scores, abs=1e-4)
            tuned, base = item["scores"]
            assert item["verdict"] == ("tie" if tuned == base else "win" if tuned > base else "loss")
    kept = list((lab.folder / "data" / "judged").glob("*/judged.jsonl"))
    before = [path.read_text() for path in kept]
    assert lab.evaluate("again", *asked) == 0
    assert [path.read_text() for path in kept] == before and lab.results("again") == results
    again = ["resume=true", "evaluation.judge.tie=1000"]  # the rest of the judge stays as the evaluation was begun
    place = [f"output_dir={lab.folder / 'classified'}", f"paths.data_dir={lab.folder / 'data'}"]
    assert cli("evaluate", [f"run={lab.run}", *place, *again]) == 0
    wide = lab.results("classified")["win_rate"]
    assert wide["ties"] == results["win_rate"]["items"] and wide["judge"]["label"] == "good"


def _score(folder: Path, name: str, items: list[dict], text: str) -> float:
    """log-odds of `good`, by transformers alone."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model, tokenizer = (kind.from_pretrained(folder) for kind in (AutoModelForSequenceClassification, AutoTokenizer))
    prompt = next(item["prompt"] for item in items if item["id"] == name and "prompt" in item)
    odds = model.eval()(**tokenizer(prompt, text, return_tensors="pt")).logits[0].softmax(0)
    return torch.log(odds[1] / (odds[0] + odds[2])).item()


def test_a_model_without_a_trained_head_is_refused(lab, classifier, tmp_path, capsys):
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(classifier, tmp_path / "headless")
    weights = tmp_path / "headless" / "model.safetensors"
    state = {name: value for name, value in load_file(weights).items() if not name.startswith("classifier")}
    save_file(state, weights, {"format": "pt"})
    asked = ["evaluation.judge.kind=reward_model", "evaluation.judge.label=good"]
    assert lab.evaluate("headless", *asked, f"evaluation.judge.model={tmp_path / 'headless'}") == 2
    assert "lacks trained weights of a classifier" in capsys.readouterr().err


def test_an_endpoint_judges_and_is_never_asked_twice(lab, monkeypatch, capsys):
    asked = ["evaluation.judge.kind=endpoint", "evaluation.judge.wait_s=0.01"]
    with serving(monkeypatch, longer_wins) as judge:
        assert lab.evaluate("endpoint", *asked) == 0
        results = lab.results("endpoint")
        check(results, lab.items("endpoint"))
        first = len(judge.asked)
        assert first % 2 == 0 and lab.evaluate("endpoint 2", *asked) == 0
        assert len(judge.asked) == first and lab.results("endpoint 2") == results
    facts = results["win_rate"]
    assert facts["judge"]["model"] == "judge-1" and len(facts["judge"]["prompt"]) == 64
    if facts["wins"] + facts["losses"]:
        assert facts["longer_won"] == 1.0
    said = "".join(capsys.readouterr())
    written = [path for path in lab.folder.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]
    assert not written and KEY not in said


def test_what_a_judge_lacks_is_said_before_anything_is_loaded(lab, monkeypatch, capsys, tmp_path):
    for name in ("URL", "MODEL"):
        monkeypatch.delenv(f"LADDPO_JUDGE_{name}", raising=False)
    template = tmp_path / "judge.jinja"
    template.write_text("{{ answer_a }} {{ answer_c }}")
    for more, said in (
        (["kind=endpoint"], "LADDPO_JUDGE_URL is not set"),
        (["parallel=2"], "does not read it"),
        (["kind=reward_model", "model=x", "label=a", "device=cuda:99"], "evaluation.judge.model is 'x'"),
    ):
        assert lab.evaluate("never", *(f"evaluation.judge.{text}" for text in more)) == 2
        assert said in capsys.readouterr().err
    for more, said in (
        (["kind=reward_model"], "evaluation.judge.model is not set"),
        (["rule=must_match"], "evaluation.judge.pattern is not set"),
        (["rule=must_match", "pattern='('"], "is no regular expression"),
        (["kind=none"], "expected who judges"),
        (["kind=reward_model", "model=x", "device=gpu"], "expected auto, cpu, cuda"),
    ):
        with pytest.raises(UserError, match=said):
            compose(["evaluation=winrate", *(f"evaluation.judge.{text}" for text in more)])
    with serving(monkeypatch, longer_wins) as judge:
        asked = ["evaluation.judge.kind=endpoint", f"evaluation.judge.prompt={template}"]
        assert lab.evaluate("never", *asked) == 2
        assert "'answer_c' is undefined" in capsys.readouterr().err and not judge.asked
    prompts = tmp_path / "some.jsonl"
    prompts.write_text('{"prompt": "01+02=", "answer": "03"}\n{"prompt": "01+04="}\n')
    asked = [f"evaluation.dataset_name={prompts}", "evaluation.judge.rule=right"]
    assert lab.evaluate("never", *asked) == 2
    assert "1 of 2 prompts have none, the first winrate-test-1" in capsys.readouterr().err
    assert cli("evaluate", ["evaluation=winrate", f"output_dir={tmp_path / 'base'}"]) == 2
    assert "nothing to be compared with" in capsys.readouterr().err
