"""Rows with labels through the stages: kto trains on them, resumes to the same bytes, and two processes equal one."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.launching import launch
from tests.pipeline.conftest import Stages

BRIEF = (
    "optim.max_train_steps=4",
    "evaluation.every_steps=2",
    "evaluation.tasks=[]",
    "best_metric=none",
    "dpo.loss=kto",
)


def write_rows(path, count: int, flip: bool = False, good: int = 2) -> str:
    """Sums of two numbers; one row of `good` is right, and has the label true."""
    lines = []
    for i in range(count):
        is_good = i % good == 0
        answer = 10 + i + (0 if is_good else 1 + i % 3)
        row = {"prompt": f"{i // 2}+{10 + i - i // 2}=", "completion": str(answer), "label": is_good != flip}
        lines.append(json.dumps(row) + "\n")
    path.write_text("".join(lines), encoding="utf-8")
    return f"data.dataset_name={path}"


@pytest.fixture(scope="module")
def labelled(tmp_path_factory, tiny_model):
    """The stages, the data and a finished run of kto on 40 rows."""
    folder = tmp_path_factory.mktemp("labelled")
    stages = Stages(folder, tiny_model)
    data = ["data=jsonl", write_rows(folder / "rows.jsonl", 40)]
    assert stages.run("train", *data, *BRIEF, f"output_dir={folder / 'run'}") == 0
    return stages, data, folder / "run"


def records(run) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_has_the_metrics_of_labels_and_ends_with_how_well_they_are_told_apart(labelled):
    _, _, run = labelled
    steps = [row for row in records(run) if "grad_norm" in row]
    assert (
        steps[0]["loss"] == 0.5 and steps[0]["kl/baseline"] == 0
    )  # before the first update the policy is the reference
    assert all(0 < row["loss"] < 1 for row in steps) and steps[-1]["kl"] != 0
    measured = [row for row in records(run) if "validation/loss" in row]
    assert measured[0]["validation/rewards/accuracies"] == 0.5
    results = json.loads((run / "evaluation" / "results.json").read_text())
    accuracy = results["reward_accuracy"]
    assert accuracy["base"] == 0.5 and 0 <= accuracy["tuned"] <= 1 and accuracy["items"] == 5
    assert results["held_out"]["unit"] == "row" and {"logps_chosen", "logps_rejected"} <= results.keys()
    rows = [json.loads(line) for line in (run / "evaluation" / "pairs.jsonl").read_text().splitlines()]
    good, bad = ([row["reward"] for row in rows if row["label"] is label] for label in (True, False))
    won = np.mean([(a > b) + (a == b) / 2 for a in good for b in bad])
    assert accuracy["tuned"] == pytest.approx(won)
    assert results["reward_margin"]["tuned"] == pytest.approx(np.mean(good) - np.mean(bad))


def test_a_run_cut_at_its_checkpoint_resumes_to_the_same_bytes(labelled):
    stages, data, run = labelled
    again = stages.folder / "again"
    shutil.copytree(run, again)
    for name in ("manifest.json", "evaluation", "adapter_last", "plots"):
        path = again / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.rmtree(again / "checkpoints" / "step_0000004")
    assert stages.run("train", *data, *BRIEF, f"output_dir={again}", "resume=true") == 0
    for name in ("metrics.jsonl", "adapter_last/adapter_model.safetensors", "evaluation/results.json"):
        assert (again / name).read_bytes() == (run / name).read_bytes(), name


def test_precompute_leaves_nothing_to_train_and_evaluate_measures_the_run_again(labelled, capsys):
    stages, data, run = labelled
    shutil.rmtree(stages.folder / "data" / "reference")
    given = [*data, "evaluation.tasks=[]", "dpo.loss=kto", "optim.max_train_steps=4"]
    assert stages.run("precompute", *given) == 0
    assert "the same prompts with other completions: computing" in capsys.readouterr().out
    assert stages.run("precompute", *given, "verify=true") == 0
    folder = stages.folder / "alone"
    assert stages.run("train", *data, *BRIEF, f"output_dir={folder}", "auto=false") == 0
    assert (folder / "metrics.jsonl").read_bytes() == (run / "metrics.jsonl").read_bytes()
    measured = stages.folder / "measured"
    assert stages.run("evaluate", f"run={run}", f"output_dir={measured}") == 0
    assert (measured / "results.json").read_bytes() == (run / "evaluation" / "results.json").read_bytes()


def test_flipped_labels_give_another_adapter_and_pairs_are_split_in_two(labelled, capsys):
    stages, _, run = labelled
    brief = [*BRIEF, "evaluation.every_steps=null", "evaluation.at_end=false"]
    flipped = write_rows(stages.folder / "flipped.jsonl", 40, flip=True)
    folders = [stages.folder / name for name in ("flipped", "pairs")]
    assert stages.run("train", "data=jsonl", flipped, *brief, f"output_dir={folders[0]}") == 0
    capsys.readouterr()
    assert stages.run("train", *brief, "dpo.kl_baseline=batch_mean", f"output_dir={folders[1]}") == 0
    assert "completions: 4 steps of 4 rows from 48" in capsys.readouterr().out  # of 24 pairs of arithmetic
    weights = [load_file(folder / "adapter_last" / "adapter_model.safetensors") for folder in (run, *folders)]
    name = next(name for name in weights[0] if "lora_B" in name)
    assert all(not torch.equal(weights[0][name], other[name]) for other in weights[1:])


def test_a_dry_run_and_a_plan_count_rows_and_the_passes_of_the_baseline(labelled, capsys):
    stages, data, _ = labelled
    assert stages.run("train", *data, *BRIEF, "dry_run=true") == 0
    assert "completions: 2 steps of 4 rows" in capsys.readouterr().out
    tokens = {}
    for more in (["dpo.loss=sigmoid"], ["dpo.loss=kto"], ["dpo.loss=apo_zero_unpaired"]):
        assert stages.run("plan", "hardware.vram_gib=8", "hardware.tflops=1e-3", "optim.max_train_steps=90", *more) == 0
        tokens[more[0]] = capsys.readouterr().out
    assert "rows not counted" not in tokens["dpo.loss=kto"] and " rows, mean" in tokens["dpo.loss=kto"]
    times = {name.partition("=")[2]: text.split("time: ")[1].split(" to ")[0] for name, text in tokens.items()}
    assert times["apo_zero_unpaired"] != times["sigmoid"] != times["kto"] != times["apo_zero_unpaired"], times


def test_ten_bad_rows_for_a_good_one_train_without_running_away(labelled):
    stages, _, _ = labelled
    data = ["data=jsonl", write_rows(stages.folder / "rare.jsonl", 66, good=11)]
    more = ["optim.max_train_steps=12", "dpo.desirable_weight=10", "evaluation.at_end=false", "logging_steps=1"]
    folder = stages.folder / "rare"
    assert stages.run("train", *data, *BRIEF, *more, f"output_dir={folder}") == 0
    steps = [row for row in records(folder) if "grad_norm" in row]
    assert len(steps) == 12 and all(np.isfinite(row["loss"]) and row["grad_norm"] < 100 for row in steps)
    assert any(row["rewards/chosen"] is None for row in steps)  # a step without a good row says so


def test_two_processes_make_the_weights_of_one(labelled):
    stages, data, run = labelled
    brief = [*data, *BRIEF, "evaluation.every_steps=null", "evaluation.at_end=false"]
    folder = stages.folder / "two"
    both = stages.overrides(*brief, "optim.per_device_train_batch_size=2", f"output_dir={folder}")
    done = launch(2, "-m", "laddpo.train", *both)
    assert done.returncode == 0, done.stdout
    once, twice = (load_file(place / "adapter_last" / "adapter_model.safetensors") for place in (run, folder))
    for key in once:
        torch.testing.assert_close(twice[key], once[key], atol=2e-4, rtol=2e-3, msg=key)
    for alone, together in zip(
        *([r for r in records(place) if "grad_norm" in r] for place in (run, folder)), strict=True
    ):
        assert together["kl/baseline"] == pytest.approx(alone["kl/baseline"], abs=1e-4)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["dpo.loss=sigmoid"], "Set dpo.loss to kto or apo_zero_unpaired"),
        (["dpo.difference_focus=0.3"], "a completion has no other side"),
        (["dpo.shared_masks=true"], "a completion has no other side"),
    ],
)
def test_what_needs_a_pair_is_refused(labelled, given, said, capsys):
    stages, data, _ = labelled
    assert stages.run("train", *data, *BRIEF, *given) == 2
    assert said in capsys.readouterr().err


def test_a_judge_of_right_answers_is_refused_before_training_where_no_prompt_has_one(labelled, capsys):
    stages, data, _ = labelled
    folder = stages.folder / "judged"
    given = [text for text in BRIEF if not text.startswith("evaluation.tasks")]
    assert stages.run("train", *data, *given, "evaluation=winrate", f"output_dir={folder}") == 2
    assert "evaluation.judge.rule is 'right', which needs right answers" in capsys.readouterr().err
    assert not (folder / "metrics.jsonl").exists()
