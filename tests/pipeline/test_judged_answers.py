"""On-policy pairs without right answers: the shipped model's samples, rated by each judge."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from laddpo.cli.app import cli
from laddpo.errors import UserError
from laddpo.settings.compose import compose
from tests.fake_judge import serving, shown

CONSISTENT = r"data.judge.pattern='(..)#\1$'"  # the result of the last step is the final answer


@pytest.fixture(scope="module")
def nano(tmp_path_factory):
    """Runs a stage on llada_nano's answers to ten questions without answers, which are sampled once; its data folder is
    `run.data`."""
    folder = tmp_path_factory.mktemp("judged")
    questions = folder / "questions.jsonl"
    questions.write_text("".join(json.dumps({"question": f"{a}7+0{a}-03="}) + "\n" for a in range(10)))

    def run(stage: str, *more: str) -> int:
        given = [
            *("data=onpolicy", f"data.questions={questions}", "data.tasks=[]", "data.sampling.samples=4"),
            *("data.sampling.temperature=2", "hardware.device=cpu", "data.balance_lengths=false"),
            *(f"paths.data_dir={folder / 'data'}", "data.validation_fraction=0"),
        ]
        return cli(stage, [*given, *more])

    run.data = folder / "data"
    return run


def first_wins(text: str, number: int) -> str:
    """A judge that prefers what a dictionary lists first."""
    a, b = shown(text)
    return f"[[{'A' if a < b else 'B'}]]"


def prepared(capsys) -> tuple[dict, list[dict], str]:
    said = capsys.readouterr().out
    folder = Path(said.strip().splitlines()[-1])
    pairs = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    return json.loads((folder / "report.json").read_text())["sampling"], pairs, said


def test_a_rule_pairs_the_best_with_the_worst(nano, capsys):
    judge = ["data.judge.kind=rule", "data.judge.rule=must_match", CONSISTENT]
    assert nano("prepare", *judge) == 0
    facts, pairs, said = prepared(capsys)
    assert len(pairs) == facts["pairs"] > 0 and facts["judge"] == {
        **{"judge": "rule", "rule": "must_match", "pattern": r"(..)#\1$", "tie": 0.0}
    }
    for pair in pairs:
        assert [pair[side][-5:-3] == pair[side][-2:] for side in ("chosen", "rejected")] == [True, False]
    assert all("answer" not in pair or pair["answer"] is None for pair in pairs)
    assert "judged by rule must_match" in said
    assert nano("prepare") == 2  # a grader needs right answers
    assert "data.columns.answer is 'answer'" in capsys.readouterr().err


def test_a_reward_model_scores_each_answer_once(nano, classifier, capsys):
    judge = ["data.judge.kind=reward_model", f"data.judge.model={classifier}", "data.judge.label=good"]
    assert nano("prepare", *judge, "data.pair_by=best_random", "data.pairs_per_question=1") == 0
    facts, pairs, _ = prepared(capsys)
    assert 0 < len(pairs) <= 10 and facts["pair_by"] == "best_random"
    assert len({json.dumps(pair["prompt"]) for pair in pairs}) == len(pairs)
    (kept,) = nano.data.rglob("judged/*/judged.jsonl")
    before = kept.read_text()
    assert nano("prepare", *judge, "data.pair_by=best_first") == 0
    assert kept.read_text() == before


def test_an_endpoint_rates_by_a_bounded_number_of_contests(nano, monkeypatch, capsys):
    judge = ["data.judge.kind=endpoint", "data.judge.comparisons=3", "data.judge.wait_s=0.01", "data.judge.retries=0"]
    with serving(monkeypatch, lambda t, n: first_wins(t, n) if n <= 4 else (503, {}, "down")) as server:
        assert nano("prepare", *judge) == 1
        assert "only what is missing is asked" in capsys.readouterr().err
        server.reply = first_wins
        first, kept = len(server.asked), 4
        assert nano("prepare", *judge) == 0
        facts, pairs, _ = prepared(capsys)
        assert len(server.asked) - first + kept <= 10 * 3 * 2
        assert facts["judge"]["comparisons"] == 3 and pairs
        assert all(pair["chosen"] < pair["rejected"] for pair in pairs)
        asked = len(server.asked)
        assert nano("prepare", *judge) == 0
        assert "already prepared" in capsys.readouterr().out and len(server.asked) == asked


def test_sft_learns_the_best_of_several(nano, tmp_path, capsys):
    """Rejection sampling: the best answer of each question."""
    judge = ["data.judge.kind=rule", "data.judge.rule=must_match", CONSISTENT]
    judge += ["data.pair_by=best_random", "data.pairs_per_question=1"]
    quick = ["sft=control", "optim.max_train_steps=1", "evaluation.at_end=false", "evaluation.tasks=[]", "logger=none"]
    quick += ["best_metric=none", "evaluation.every_steps=null", f"output_dir={tmp_path / 'run'}"]
    assert nano("sft", *judge, *quick) == 0, capsys.readouterr().err
    assert (tmp_path / "run" / "adapter").is_dir()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["data.judge.kind=rule", "data.judge.rule=longer"], "data.balance_lengths is true"),
        (["data.judge.kind=reward_model"], "data.judge.model is not set"),
        (["data.judge.kind=rules"], "did you mean rule"),
        (["data.judge.kind=rule", "data.pair_by=best_wurst"], "did you mean best_worst"),
    ],
)
def test_contradictions_of_a_judge_are_refused_before_anything_is_loaded(given, said):
    with pytest.raises(UserError, match=said):
        compose(["data=onpolicy", *given])
