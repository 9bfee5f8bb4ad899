"""Iterated DPO on a model's own answers, and the control on the chosen ones, through the door a user uses."""

from __future__ import annotations

import json
import shutil

import pytest

from laddpo.cli.app import cli
from laddpo.errors import UserError
from laddpo.results.of_jobs import find_results, objective
from laddpo.results.runs import find_runs
from laddpo.settings.read_settings import stage_reads

QUICK = [
    "data=onpolicy",
    "hardware.device=cpu",
    "logger=none",
    "data.sampling.num_questions=24",
    "data.sampling.samples=4",
    "dpo.diffusion_samples=2",
    "dpo.estimator=complement",
    "optim.per_device_train_batch_size=4",
    "optim.max_train_steps=2",
    "optim.num_warmup_steps=0",
    "evaluation.every_steps=2",
    "evaluation.limit=8",
    "evaluation.confidence_threshold=0.9",
    "evaluation.num_pairs=4",
    "evaluation.diffusion_samples=2",
    "best_metric=none",
]


@pytest.fixture(scope="module")
def two_rounds(tmp_path_factory):
    """(folder of the run, settings that place its data)."""
    home = tmp_path_factory.mktemp("rounds")
    places = [f"paths.data_dir={home / 'data'}", f"paths.outputs_dir={home / 'outputs'}"]
    assert cli("train", [*QUICK, *places, "rounds=2", f"output_dir={home / 'run'}"]) == 0
    return home / "run", places


def read(path):
    return json.loads(path.read_text())


def records(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_each_round_starts_from_the_model_of_the_one_before(two_rounds):
    run, _ = two_rounds
    first, second = (read(run / f"round_{n}" / "manifest.json")["fields"] for n in (1, 2))
    kept = read(run / "round_1" / "adapter" / "manifest.json")["files"]["adapter_model.safetensors"]["sha256"]
    assert first["start"]["adapter"] == "none" and second["start"]["adapter"] == kept
    assert first["data"] != second["data"]
    steps = [[row for row in records(run / f"round_{n}") if "grad_norm" in row] for n in (1, 2)]
    assert steps[1][0]["loss"] == pytest.approx(0.693147, abs=1e-5)
    rates = [row["learning_rate"] for row in steps[0]]
    assert [row["learning_rate"] for row in steps[1]] == pytest.approx([rate / 4 for rate in rates])


def test_rounds_ask_different_questions_of_the_model_as_it_is(two_rounds):
    run, _ = two_rounds
    folders = sorted((run.parent / "data" / "samples").glob("*/samples.jsonl"))
    asked = [{json.loads(line)["question"] for line in path.read_text().splitlines()} for path in folders]
    assert len(asked) == 2 and not asked[0] & asked[1]
    weights = {read(path.parent / "manifest.json")["fields"]["weights"]["adapter"] for path in folders}
    assert len(weights) == 2 and "none" in weights


def test_a_tuned_model_can_be_asked_instead_of_the_base(two_rounds, tmp_path, capsys):
    run, _ = two_rounds
    quick = [text for text in QUICK if stage_reads("prepare", text)]
    command = [*quick, f"paths.data_dir={tmp_path}", "data.sampling.temperature=1.5"]
    assert cli("prepare", [*command, f"run={run / 'round_1'}"]) == 0
    (manifest,) = tmp_path.glob("samples/*/manifest.json")
    kept = read(run / "round_1" / "adapter" / "manifest.json")["files"]["adapter_model.safetensors"]["sha256"]
    assert read(manifest)["fields"]["weights"]["adapter"] == kept
    assert cli("prepare", [*command, f"run={tmp_path}"]) == 2
    assert "config.yaml: not found" in capsys.readouterr().err


def test_the_run_of_rounds_is_a_run_with_the_last_adapter_and_a_table(two_rounds):
    run, _ = two_rounds
    last = (run / "round_2" / "adapter" / "adapter_model.safetensors").read_bytes()
    assert (run / "adapter" / "adapter_model.safetensors").read_bytes() == last
    content = read(run / "rounds.json")
    assert [record["folder"] for record in content["rounds"]] == ["round_1", "round_2"]
    assert content["last_against_first"]["items"] == 8
    assert content["against_base"][1]["base"] == content["against_round_before"][0]["base"]
    results = read(run / "evaluation" / "results.json")
    found = {name: value for name, value in results["exact_match"].items() if name != "task"}
    assert found == content["against_base"][1]
    table = (run / "rounds.md").read_text()
    assert "2 rounds against 1:" in table and "over the base" in table
    assert (run / "plots" / "rounds.png").is_file()
    assert cli("evaluate", [f"run={run}", f"output_dir={run.parent / 'again'}", "logger=none"]) == 0
    again = read(run.parent / "again" / "results.json")
    for name, entry in results.items():
        assert (entry["base"], entry["tuned"]) == (again[name]["base"], again[name]["tuned"]), name
        assert entry.get("task") == again[name].get("task")


def test_what_reads_results_finds_those_of_all_rounds(two_rounds, tmp_path):
    run, _ = two_rounds
    results = read(run / "evaluation" / "results.json")
    assert "reward_accuracy" not in results, "each round's is against another model"
    assert find_results(run) == results and objective(results) == results["exact_match"]["tuned"]
    (found,) = find_runs([run])
    assert found.results == results and found.value("exact_match") == results["exact_match"]["tuned"]
    assert cli("export", [f"run={run}", f"output_dir={tmp_path / 'card'}", "export.adapter_only=true"]) == 0
    card = (tmp_path / "card" / "README.md").read_text()
    assert "| exact match |" in card and "not recorded" not in card
    shutil.copytree(run, tmp_path / "bare", ignore=shutil.ignore_patterns("evaluation", "manifest.json"))
    rows = [row for row in records(run / "round_2") if row.get("validation/exact_match") is not None]
    best = max(row["validation/exact_match"] for row in rows)
    assert find_results(tmp_path / "bare") == {"validation/exact_match": {"tuned": best}}


def test_a_run_of_rounds_goes_on_where_it_stopped(two_rounds, tmp_path, capsys):
    run, places = two_rounds
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    (copy / "manifest.json").unlink()
    shutil.rmtree(copy / "round_2")
    assert cli("train", [*QUICK, *places, "rounds=2", f"output_dir={copy}", "resume=true"]) == 0
    shown = capsys.readouterr().out
    assert "round 1 of 2: done before" in shown
    adapters = [folder / "round_2" / "adapter" / "adapter_model.safetensors" for folder in (run, copy)]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()
    assert read(copy / "rounds.json")["against_base"] == read(run / "rounds.json")["against_base"]


def test_a_run_of_rounds_is_pinned_to_what_its_settings_name(two_rounds):
    from laddpo.inputs import pins
    from laddpo.settings.compose import read_config
    from laddpo.training.pairs import open_prepared

    run, _ = two_rounds
    config = read_config(run)
    pins.require_inputs_of(run / "adapter", config, open_prepared(config).content)
    assert pins.of_folder(run) == pins.of_folder(run / "adapter") == pins.of_folder(run / "round_1")
    assert pins.of_folder(run / "round_2")["adapter"] != "none"
    now = pins.make(config)
    pins.hold(run, now, config)
    with pytest.raises(UserError, match=r"the base model's weights or config\.json changed"):
        pins.hold(run, {**now, "base": "sha256:0"}, config)


def test_the_control_takes_the_forwards_of_dpo_and_ends_with_the_same_evaluation(two_rounds, tmp_path, capsys):
    run, places = two_rounds
    control = tmp_path / "control"
    quick = [text for text in QUICK if stage_reads("sft", text)]
    assert cli("sft", [*quick, *places, "sft=control", f"output_dir={control}"]) == 0
    shown = capsys.readouterr().out
    assert "4 masks each" in shown  # 2 draws of chosen and of rejected
    results = read(control / "evaluation" / "results.json")
    base = read(run / "round_1" / "evaluation" / "results.json")
    assert results["exact_match"]["base"] == base["exact_match"]["base"]
    assert results["exact_match"]["items"] == 8 and "reward_accuracy" in results
    assert cli("evaluate", [f"run={control}", f"output_dir={tmp_path / 'e'}", "logger=none"]) == 0
    assert read(tmp_path / "e" / "results.json") == results


def test_fine_tuning_in_rounds_is_refused(capsys, tmp_path):
    assert cli("sft", [*QUICK, "sft=control", "rounds=3", f"output_dir={tmp_path / 'x'}"]) == 2
    assert "rounds=3: sft does not read it; train does" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_results_tell_the_length_of_answers_and_how_many_end(two_rounds):
    run, _ = two_rounds
    results = read(run / "round_1" / "evaluation" / "results.json")
    assert results["answer_tokens"]["base"] == pytest.approx(20, abs=2)
    assert 0.5 < results["ended_rate"]["base"] <= 1
