"""On-policy pairs through the door a user uses: sampled from the shipped model, graded, prepared, trained on."""

from __future__ import annotations

import json

import pytest

from laddpo.cli.app import cli
from laddpo.errors import UserError
from laddpo.settings.compose import compose
from laddpo.settings.read_settings import stage_reads


@pytest.fixture
def nano(tmp_path):
    """Runs a stage on llada_nano with few questions; settings of a quick run."""

    def run(stage: str, *more: str) -> int:
        quick = [
            "data=onpolicy",
            f"paths.data_dir={tmp_path / 'data'}",
            f"paths.outputs_dir={tmp_path / 'outputs'}",
            "hardware.device=cpu",
            "logger=none",
            "data.sampling.num_questions=30",
            "data.sampling.samples=4",
            "dpo.diffusion_samples=2",
            "dpo.estimator=complement",
            "optim.per_device_train_batch_size=4",
            "optim.max_train_steps=2",
            "evaluation.every_steps=2",
            "evaluation.limit=6",
            "evaluation.confidence_threshold=0.9",
            "evaluation.num_pairs=4",
            "evaluation.diffusion_samples=2",
        ]
        return cli(stage, [*(text for text in quick if stage_reads(stage, text)), *more])

    return run


def prepared_folder(capsys):
    from pathlib import Path

    return Path(capsys.readouterr().out.strip().splitlines()[-1])


def test_pairs_are_made_of_the_models_own_graded_answers(nano, capsys):
    assert nano("prepare") == 0
    folder = prepared_folder(capsys)
    sampling = json.loads((folder / "report.json").read_text())["sampling"]
    assert sampling["questions"] == 30 and sampling["samples_per_question"] == 4
    assert 0.4 < sampling["pass@1"] <= sampling["pass@k"] <= 1
    pairs = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    assert len(pairs) == sampling["pairs"] > 0
    for pair in pairs:
        assert pair["chosen"].endswith("#" + pair["answer"]) and not pair["rejected"].endswith("#" + pair["answer"])
    assert nano("prepare") == 0
    assert "already prepared" in capsys.readouterr().out


def test_answers_do_not_depend_on_how_many_are_sampled_together(nano, tmp_path, capsys):
    assert nano("prepare") == 0
    (samples,) = (tmp_path / "data" / "samples").glob("*/samples.jsonl")
    first = samples.read_bytes()
    assert nano("prepare", f"paths.data_dir={tmp_path / 'other'}", "evaluation.batch_size=8") == 0
    (again,) = (tmp_path / "other" / "samples").glob("*/samples.jsonl")
    assert again.read_bytes() == first


def test_without_auto_missing_samples_name_the_stage_that_makes_them(nano, capsys):
    assert nano("train", "auto=false") == 2
    assert "not sampled yet" in capsys.readouterr().err


def test_questions_of_a_file_are_graded_by_the_grader_of_that_name(nano, tmp_path, capsys):
    questions = tmp_path / "questions.jsonl"
    problems = [(a, b) for a in range(9) for b in (5, 8)]
    rows = [{"question": f"{a:02d}+{b:02d}-03=", "answer": f"so #### {a + b - 3:02d}"} for a, b in problems]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = [f"data.questions={questions}", "data.tasks=[]", "data.grader=contains", "data.sampling.temperature=1.5"]
    asked.append("data.validation_fraction=0")
    assert nano("prepare", *asked, "data.sampling.num_questions=null") == 0
    sampling = json.loads((prepared_folder(capsys) / "report.json").read_text())["sampling"]
    assert sampling["questions"] == 18


def test_a_file_of_questions_is_read_once(nano, tmp_path, monkeypatch):
    from laddpo.preference import onpolicy

    questions, read, times = tmp_path / "questions.jsonl", onpolicy.read_questions, []
    rows = [{"question": f"{a}2+{a}9-03=", "answer": f"{2 * a + 1}8"} for a in range(1, 5)]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(onpolicy, "read_questions", lambda *asked: times.append(asked) or read(*asked))
    asked = [f"data.questions={questions}", "data.tasks=[]", "data.grader=contains", "data.sampling.temperature=1.5"]
    asked.append("data.validation_fraction=0")
    assert nano("prepare", *asked, "data.sampling.num_questions=null") == 0
    assert len(times) == 1


def test_plan_samples_nothing(nano, tmp_path):
    assert nano("prepare") == 0
    assert nano("plan", "seed=5") == 0
    assert len(list((tmp_path / "data" / "samples").iterdir())) == 1


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["rounds=2"], "whose pairs are the same in every round"),
        (["data=onpolicy", "rounds=2", "adapter=full"], "starts from the adapter of the one before"),
        (["data=onpolicy", "data.questions=x.jsonl"], "evaluation.tasks has embedded problems"),
        (["data=onpolicy", "data.sampling.samples=1"], "a pair needs a right and a wrong one"),
        (["data=onpolicy", "data.sampling.remasking=random"], "ranks by no probability"),
        (["data=onpolicy", "data.sampling.gen_length=25"], "made of whole blocks"),
        (["data=onpolicy", "data.grader=maths"], "did you mean math"),
    ],
)
def test_contradictions_are_refused_before_anything_is_loaded(overrides, said):
    with pytest.raises(UserError, match=said):
        compose(overrides)


def test_the_instruction_of_gsm8k_questions_is_the_evaluations():
    from laddpo.problems.tasks import GSM8K_INSTRUCTION

    assert compose(["data=onpolicy_gsm8k", "evaluation=gsm8k"]).data.sampling.instruction == GSM8K_INSTRUCTION
