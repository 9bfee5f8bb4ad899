"""Answers beyond the model's positions are refused by every stage that answers, by name, before the first answer."""

from __future__ import annotations

import json

import pytest

LONG = "1+" * 2050  # more tokens than the 4,096 positions of the tiny model hold beside an answer


def asked_of(stages, name, *texts):
    file = stages.folder / name
    file.write_text("".join(json.dumps({"prompt": text, "answer": "2"}) + "\n" for text in texts))
    return file


@pytest.fixture
def commands(stages):
    """By stage: a command line whose second prompt is too long."""
    lines = stages.folder / "prompts.txt"
    lines.write_text(f"1+1=\n{LONG}\n")
    file = asked_of(stages, "questions.jsonl", "1+1=", LONG)
    return {
        "generate": [f"prompts={lines}"],
        "evaluate": ["evaluation=file", f"evaluation.dataset_name={file}", *GENERATED],
        "prepare": [
            "data=onpolicy",
            f"data.questions={file}",
            "data.columns.prompt=prompt",
            "data.grader=exact",
            "evaluation.tasks=[]",
        ],
    }


GENERATED = [
    "evaluation.gen_length=8",
    "evaluation.block_length=8",
    "evaluation.steps=2",
    "evaluation.confidence_threshold=null",
]


@pytest.mark.parametrize("stage", ["generate", "evaluate", "prepare"])
def test_a_prompt_beyond_the_positions_is_refused_before_any_answer(stages, commands, stage, capsys, monkeypatch):
    from laddpo.evaluation import answering

    monkeypatch.setattr(answering, "generate", lambda *_, **__: pytest.fail("answered"))
    assert stages.run(stage, *commands[stage], f"output_dir={stages.folder / 'out'}") == 2
    said = capsys.readouterr().err
    assert "1 of 2 prompts are too long" in said and "4,096 positions" in said and "gen_length" in said


def test_the_stage_hands_the_end_of_text_to_the_sampler(stages, monkeypatch):
    from laddpo.evaluation import answering

    seen = []

    def watch(*args, **kwargs):
        seen.append((args[2].suppression, kwargs["eos_token_id"]))
        return plain(*args, **kwargs)

    plain = answering.generate
    monkeypatch.setattr(answering, "generate", watch)
    assert stages.run("generate", "prompt=1+1", "evaluation.suppress_eos=logits") == 0
    assert seen == [("logits", 274)], "the id of <|endoftext|>, not that of the end of a turn"
