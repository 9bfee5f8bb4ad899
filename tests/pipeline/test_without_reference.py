"""Losses that compare with no reference: what a run of theirs leaves out, how it goes on, and what is refused."""

from __future__ import annotations

import json
import shutil

import pytest


def test_a_run_without_a_reference_computes_none_resumes_to_the_same_bytes_and_is_compared_with_its_base(
    stages, capsys
):
    run, more = stages.folder / "run", ["dpo.loss=simpo", "dpo.simpo_gamma=0.3", "evaluation.tasks=[]"]
    place = f"output_dir={run}"
    assert stages.run("train", *more, place, "evaluation.at_end=false", "auto=true") == 0
    shown = capsys.readouterr().out
    assert "reference: none. dpo.loss=simpo" in shown and "step 0: not checked" in shown and "loss simpo" in shown
    assert not (stages.folder / "data" / "reference").exists()
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    names = set().union(*logged)
    assert "validation/loss" in names and not names & {"kl", "validation/kl", "validation/chosen_fall"}
    step = next(row for row in logged if "grad_norm" in row)
    assert step["rewards/chosen"] == pytest.approx(step["logps/chosen"] * 2)  # beta of nano

    files = [run / name for name in ("metrics.jsonl", "adapter/adapter_model.safetensors")]
    before = [file.read_bytes() for file in files]
    (run / "manifest.json").unlink()
    shutil.rmtree(run / "checkpoints" / "step_0000008")
    shutil.rmtree(run / "adapter")
    assert stages.run("train", *more, place, "evaluation.at_end=false", "resume=true") == 0
    assert [file.read_bytes() for file in files] == before

    folder = stages.folder / "evaluation"
    assert stages.run("evaluate", f"run={run}", f"output_dir={folder}", "auto=false") == 0
    assert (stages.folder / "data" / "reference").exists(), "the base's values, which the table compares with"
    found = json.loads((folder / "results.json").read_text())
    assert found["reward_accuracy"]["base"] == 0.5 and found["pairs"]["chosen_fall"] != 0
    capsys.readouterr()

    assert stages.run("variance", f"run={run}") == 2
    assert "dpo.loss=simpo, which compares with no reference" in capsys.readouterr().err


def test_a_dry_run_and_a_plan_know_that_there_is_no_reference(stages, capsys):
    assert stages.run("train", "dpo.loss=orpo", "dry_run=true") == 0
    assert "reference: none" in capsys.readouterr().out
    assert stages.run("plan", "dpo.loss=orpo") == 0
    without = capsys.readouterr().out
    assert "reference: none (dpo.loss=orpo" in without and "for training (" in without
    assert stages.run("plan") == 0
    assert "for reference and training (" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("stage", "given", "said"),
    [
        ("precompute", ["dpo.loss=cpo"], "dpo.loss is 'cpo', which compares with no reference"),
        ("train", ["dpo.loss=cpo", "dpo.common_random_numbers=true"], "common_random_numbers=true: it is about the"),
        ("train", ["dpo.loss=orpo", "stopping.max_chosen_fall=0.2"], "max_chosen_fall=0.2: it is about the reference"),
        ("train", ["dpo.loss=orpo", "dpo.sft_weight=0.1"], "has that term itself, with weight 1"),
        ("train", ["dpo.loss=orpo", "dpo.label_smoothing=0.1"], "which has no such term"),
        ("train", ["dpo.simpo_gamma=1"], "dpo.simpo_gamma=1.0: only dpo.loss=simpo reads it"),
        ("train", ["dpo.desirable_weight=2"], "only dpo.loss=kto or apo_zero_unpaired reads it"),
        ("train", ["dpo.kl_baseline=batch_mean"], "only dpo.loss=kto reads it"),
        ("train", ["dpo.loss=exo_pair"], "expected more than 0; 0.001 is the paper's value"),
    ],
)
def test_what_the_loss_does_not_read_is_refused_by_name(stages, stage, given, said, capsys):
    assert stages.run(stage, *given) == 2
    assert said in capsys.readouterr().err


def test_a_pair_with_a_margin_is_refused_by_a_loss_that_reads_none():
    from types import SimpleNamespace

    from laddpo.errors import UserError
    from laddpo.training.pairs import check_margins

    prepared = SimpleNamespace(folder="p", columns={"id": ["a", "b"], "margin": [None, 1.5]})
    check_margins("sigmoid", prepared)
    with pytest.raises(UserError, match=r"pair b has the margin 1.5 and dpo.loss is 'ipo'.*sigmoid, robust"):
        check_margins("ipo", prepared)
