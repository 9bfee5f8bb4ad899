"""The four stages through the door a user uses: what each leaves, what it reuses, what it refuses."""

from __future__ import annotations

import json
import tempfile

import numpy as np
import pytest

from laddpo.inputs import policy
from laddpo.preference.encoding.encode import EncodedExample
from laddpo.settings.compose import compose, write_config
from laddpo.training.rows import padded


def test_train_alone_goes_from_rows_to_an_evaluated_adapter(stages, capsys, with_pictures):
    run = stages.folder / "run"
    assert stages.run("train", f"output_dir={run}") == 0
    shown = capsys.readouterr().out
    assert shown.strip().splitlines()[-1] == str(run)
    assert "differ by at most 0 nats" in shown and "loss 0.693147, expected 0.693147" in shown
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in metrics if "grad_norm" in row] == list(range(1, 9))
    assert [row["step"] for row in metrics if "validation/exact_match" in row] == [0, 4, 8]
    for name in (
        "config.yaml",
        "manifest.json",
        "timing.jsonl",
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "adapter/manifest.json",
        "adapter_last/adapter_model.safetensors",
        "plots/training.png",
        "evaluation/results.json",
        "evaluation/items.jsonl",
        "evaluation/pairs.jsonl",
        "evaluation/plots/evaluation.png",
    ):
        assert (run / name).is_file(), name
        assert not name.endswith(".png") or (run / name).stat().st_size > 5000, name
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step_0000006", "step_0000008"]
    results = json.loads((run / "evaluation" / "results.json").read_text())
    assert results["reward_accuracy"]["base"] == 0.5
    assert results["reward_accuracy"]["items"] == 6
    assert set(results["exact_match"]) >= {"base", "tuned", "difference", "interval", "items"}
    items = [json.loads(line) for line in (run / "evaluation" / "items.jsonl").read_text().splitlines()]
    assert (
        sorted((item["model"], item["task"]) for item in items)
        == [("base", "arithmetic")] * 4 + [("tuned", "arithmetic")] * 4
    )


def test_training_moves_the_margin_of_the_pairs_it_sees(stages):
    run = stages.folder / "run"
    settings = ["optim.max_train_steps=30", "best_metric=none", "evaluation.tasks=[]"]
    assert stages.run("train", f"output_dir={run}", *settings) == 0
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "grad_norm" in row]
    assert losses[0] == pytest.approx(0.693147, abs=1e-6)
    assert sum(losses[-6:]) / 6 < 0.6
    results = json.loads((run / "evaluation" / "results.json").read_text())
    assert results["reward_accuracy_on_training_pairs"]["tuned"] > 0.65


def test_stages_one_by_one_equal_train_alone(stages):
    assert stages.run("prepare") == 0
    assert stages.run("precompute", "auto=false") == 0
    together, apart = stages.folder / "together", stages.folder / "apart"
    assert stages.run("train", f"output_dir={apart}", "auto=false") == 0
    assert stages.run("train", f"output_dir={together}", f"paths.data_dir={stages.folder / 'other'}") == 0
    assert (together / "metrics.jsonl").read_bytes() == (apart / "metrics.jsonl").read_bytes()
    adapters = [(run / "adapter_last" / "adapter_model.safetensors").read_bytes() for run in (together, apart)]
    assert adapters[0] == adapters[1]


def test_without_auto_a_missing_input_names_the_stage_that_makes_it(stages, capsys):
    assert stages.run("train", "auto=false") == 2
    assert "python -m laddpo.prepare" in capsys.readouterr().err
    assert stages.run("prepare") == 0
    assert stages.run("train", "auto=false") == 2
    assert "python -m laddpo.precompute" in capsys.readouterr().err


def test_more_draws_are_added_to_the_store_of_fewer(stages, capsys):
    assert stages.run("precompute") == 0
    store = capsys.readouterr().out.strip().splitlines()[-1]
    assert stages.run("precompute", "dpo.diffusion_samples=4") == 0
    assert capsys.readouterr().out.strip().splitlines()[-1] == store
    assert stages.run("precompute", "dpo.diffusion_samples=4", "verify=true") == 0
    assert "verified" in capsys.readouterr().out


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_quantised_weights_train_on_a_cpu(stages, quantization, capsys):
    run = stages.folder / quantization
    assert stages.run("train", f"quantization={quantization}", f"output_dir={run}", "optim.max_train_steps=3") == 0
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(row["grad_norm"] > 0 for row in rows if "grad_norm" in row)
    assert "loss 0.693" in capsys.readouterr().out


def test_full_fine_tuning_writes_a_model_and_compares_it_with_the_base(stages):
    run = stages.folder / "full"
    assert stages.run("train", "adapter=full", "best_metric=none", f"output_dir={run}") == 0
    assert (run / "model" / "model.safetensors").is_file() and (run / "model" / "tokenizer.json").is_file()
    results = json.loads((run / "evaluation" / "results.json").read_text())
    assert results["reward_accuracy_on_training_pairs"]["tuned"] > 0.6
    assert results["reward_margin"]["base"] == 0 != results["reward_margin"]["tuned"]


def test_evaluate_of_a_run_repeats_what_train_measured_at_its_end(stages):
    run, again = stages.folder / "run", stages.folder / "again"
    assert stages.run("train", f"output_dir={run}") == 0
    assert stages.run("evaluate", f"run={run}", f"output_dir={again}") == 0
    assert (again / "results.json").read_text() == (run / "evaluation" / "results.json").read_text()


def test_a_finished_evaluation_is_sealed_and_goes_on_only_from_the_answers_it_sealed(stages, capsys):
    command = ["evaluation.tasks=[arithmetic]", f"output_dir={stages.folder / 'base'}"]
    assert stages.run("evaluate", *command) == 0
    manifest = json.loads((stages.folder / "base" / "manifest.json").read_text())
    assert manifest["kind"] == "evaluation" and {"results.json", "items.jsonl"} <= manifest["files"].keys()
    assert stages.run("evaluate", *command, "evaluation.limit=6", "resume=true") == 0
    again = json.loads((stages.folder / "base" / "manifest.json").read_text())
    assert again["files"] != manifest["files"]
    results = stages.folder / "base" / "results.json"
    results.write_text(results.read_text().replace("0.0", "1.0"))
    assert stages.run("evaluate", *command, "resume=true") == 2
    assert f"{results}: differs from what manifest.json sealed" in capsys.readouterr().err


def test_an_evaluation_goes_on_in_the_folder_that_resume_names(stages, capsys):
    base = stages.folder / "base"
    assert stages.run("evaluate", "evaluation.tasks=[arithmetic]", f"output_dir={base}") == 0
    capsys.readouterr()
    assert stages.run("evaluate", "evaluation.tasks=[arithmetic]", f"resume={base}") == 0
    out = capsys.readouterr().out
    assert "items are already in" in out and out.splitlines()[-1] == str(base)
    assert stages.run("evaluate", "evaluation.tasks=[arithmetic]", f"resume={stages.folder / 'nowhere'}") == 2
    assert "nowhere', which holds no config.yaml; expected a folder that evaluate made" in capsys.readouterr().err


def test_an_evaluation_into_the_folder_of_a_finished_run_is_refused(stages, capsys):
    run = stages.folder / "run"
    assert stages.run("train", f"output_dir={run}", "evaluation.at_end=false") == 0
    before = (run / "manifest.json").read_bytes()
    assert stages.run("evaluate", f"run={run}", f"output_dir={run}", "resume=true") == 2
    assert f"{run}/manifest.json: is a manifest of 'train', expected 'evaluation'" in capsys.readouterr().err
    assert (run / "manifest.json").read_bytes() == before


def test_generate_shows_base_beside_tuned(stages, capsys):
    run = stages.folder / "run"
    assert stages.run("train", f"output_dir={run}", "evaluation.at_end=false") == 0
    assert stages.run("generate", f"run={run}", "prompt='07+15-04='", f"output_dir={stages.folder / 'g'}") == 0
    (row,) = [json.loads(line) for line in (stages.folder / "g" / "generations.jsonl").read_text().splitlines()]
    assert row.keys() == {"prompt", "base", "tuned"} and row["prompt"] == "07+15-04="
    (stages.folder / "questions.txt").write_bytes(b"\xef\xbb\xbf01+01=\r\n\n02+02=")
    asked = f"prompts={stages.folder / 'questions.txt'}"
    assert stages.run("generate", f"run={run}", asked, f"output_dir={stages.folder / 'q'}") == 0
    rows = [json.loads(line) for line in (stages.folder / "q" / "generations.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["01+01=", "02+02="]


def test_what_cannot_be_measured_is_refused_before_anything_is_loaded_or_written(stages, monkeypatch, capsys):
    monkeypatch.setattr(policy, "load", lambda *_: pytest.fail("a model was loaded"))
    run, rows = stages.folder / "run", stages.folder / "rows.jsonl"
    write_config(compose(stages.overrides()), run)
    base = ["evaluation=file", f"evaluation.dataset_name={rows}", f"output_dir={stages.folder / 'out'}"]
    lengths = [
        "evaluation.gen_length=8",
        "evaluation.block_length=8",
        "evaluation.steps=8",
        "evaluation.confidence_threshold=null",
    ]
    refused = {
        ("evaluate", *base, *lengths): "no file",
        ("evaluate", f"run={run}", *base[:2], *lengths, base[2]): "has no finished weights",
        ("generate", f"run={run}", "prompt=hello", base[2]): "has no finished weights",
        ("variance", f"run={run}", base[2]): "has no finished weights",
    }
    for command, message in refused.items():
        assert stages.run(*command) == 2
        assert message in capsys.readouterr().err
        assert not (stages.folder / "out").exists()


@pytest.mark.parametrize(("stage", "more"), [("train", []), ("sft", ["sft=control"])])
def test_test_problems_that_are_not_there_are_named_before_any_pair_is_made(stages, capsys, stage, more):
    missing = stages.folder / "missing.jsonl"
    asked = ["evaluation=file", f"evaluation.dataset_name={missing}", *more]
    assert stages.run(stage, *asked) == 2
    said = capsys.readouterr()
    assert str(missing) in said.err and not said.out
    assert not (stages.folder / "data").exists()


def test_sft_takes_no_metric_of_pairs(stages, capsys):
    assert stages.run("sft", "best_metric=loss") == 2
    assert "best_metric is 'loss', which is measured on preference pairs, and sft has none" in capsys.readouterr().err


def test_sft_lowers_its_loss_and_makes_a_model_that_dpo_can_start_from(stages):
    sft, dpo = stages.folder / "sft", stages.folder / "dpo"
    settings = ["adapter=full", "sft.num_examples=64", "optim.max_train_steps=12", "evaluation.tasks=[]"]
    assert stages.run("sft", *settings, f"output_dir={sft}") == 0
    losses = [json.loads(line)["loss"] for line in (sft / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0]
    assert stages.run("train", f"model.model_name_or_path={sft / 'model'}", f"output_dir={dpo}") == 0


def test_a_model_from_random_weights_obeys_the_hardware_settings_and_is_first_evaluated_when_due(stages):
    losses = {}
    for precision in ("fp32", "bf16"):
        folder = stages.folder / precision
        settings = ["adapter=full", "sft.from_scratch=true", "sft.num_examples=16", f"hardware.precision={precision}"]
        assert stages.run("sft", *settings, "optim.max_train_steps=4", f"output_dir={folder}") == 0
        records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        losses[precision] = [record["loss"] for record in records if "loss" in record]
        assert [record["step"] for record in records if "validation/exact_match" in record] == [4]
    assert losses["bf16"] != losses["fp32"]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.02)


def test_validation_writes_nothing_that_a_kill_could_leave(stages, monkeypatch):
    """Looked at whenever answers are made, in the run's folder and in the system's for temporary files."""
    from laddpo.evaluation import answering

    run, system, found = stages.folder / "run", stages.folder / "system", []
    system.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(system))
    answer = answering.Answerer.answers

    def watched(*arguments):
        found.append({path.relative_to(stages.folder).as_posix() for path in (*system.iterdir(), *run.iterdir())})
        return answer(*arguments)

    monkeypatch.setattr(answering.Answerer, "answers", watched)
    assert stages.run("train", f"output_dir={run}", "evaluation.at_end=false") == 0
    lasting = {"run/" + name for name in ("adapter", "checkpoints", "samples", "config.yaml", "command.json", ".lock")}
    lasting |= {"run/.laddpo"}
    lasting |= {"run/" + name for name in ("metrics.jsonl", "timing.jsonl")}
    assert found and set.union(*found) <= lasting


def test_padding_follows_each_response_by_any_number_of_eos_tokens_that_fits():
    eos, response = 99, np.arange(1, 6, dtype=np.int32)
    rows = [EncodedExample(f"row-{i}", np.arange(3, dtype=np.int32), response) for i in range(200)]
    filled = padded(rows, 12, 512, eos, seed=1)
    lengths = [len(row.response_ids) for row in filled]
    assert set(lengths) == set(range(5, 13))  # none, up to 12 in all
    for row, given in zip(filled, rows, strict=True):
        assert row.id == given.id and row.prompt_ids is given.prompt_ids and row.response_ids.dtype == np.int32
        assert row.response_ids[:5].tolist() == response.tolist() and set(row.response_ids[5:].tolist()) <= {eos}
    assert [len(row.response_ids) for row in padded(rows[::-1], 12, 512, eos, seed=1)] == lengths[::-1]
    assert [len(row.response_ids) for row in padded(rows, 12, 512, eos, seed=2)] != lengths
    assert all(len(row.response_ids) == 5 for row in padded(rows, 4, 512, eos, seed=1))
    assert {len(row.response_ids) for row in padded(rows, 12, 10, eos, seed=1)} == {5, 6, 7}  # prompts of 3 tokens


def test_sft_trains_on_the_padding_that_it_is_asked_for(stages):
    tokens = {}
    for pad_to in ("null", 64):
        folder = stages.folder / f"pad-{pad_to}"
        settings = ["sft.num_examples=16", f"sft.pad_to={pad_to}", "optim.max_train_steps=1", "evaluation.tasks=[]"]
        assert stages.run("sft", *settings, f"output_dir={folder}") == 0
        (timing,) = [json.loads(line) for line in (folder / "timing.jsonl").read_text().splitlines()]
        tokens[pad_to] = timing["speed/tokens_per_s"] * timing["seconds"]
    assert tokens[64] > 1.2 * tokens["null"]


def test_an_sft_run_is_planned_for_its_rows_padding_included(stages, monkeypatch):
    from laddpo.core.tasks import SftTask
    from laddpo.hardware import machine

    find, accumulate, machines, tasks = machine.find_machine, SftTask.accumulate, [], []
    monkeypatch.setattr(machine, "find_machine", lambda *given: machines.append(find(*given)) or machines[-1])
    monkeypatch.setattr(SftTask, "accumulate", lambda self, *given: tasks.append(self) or accumulate(self, *given))
    settings = ["adapter=full", "sft.num_examples=16", "sft.diffusion_samples=2", "optim.max_train_steps=1"]
    settings += ["evaluation.tasks=[]", "data.max_length=96", "hardware.token_budget=96"]
    for pad_to in ("null", 64):
        folder = stages.folder / f"pad-{pad_to}"
        assert stages.run("sft", *settings, f"sft.pad_to={pad_to}", f"output_dir={folder}") == 0
    for task, planned in zip(tasks, machines, strict=True):
        longest = max(len(row.prompt_ids) + len(row.response_ids) for row in task.examples)
        assert planned.choice.memory.load.exceeds == (2 * longest > 96), longest
        assert task.backward == planned.choice.setup.backward
    # a row padded no longer fits a micro-step, and a buffer would be as large as the model
    assert [task.backward for task in tasks] == ["stream", "two_pass"]


def test_dpo_from_an_sft_adapter_has_that_adapter_in_its_reference(stages, capsys):
    sft, dpo = stages.folder / "sft", stages.folder / "dpo"
    assert stages.run("sft", "sft.examples=chosen", "evaluation.tasks=[]", f"output_dir={sft}") == 0
    fields = json.loads((sft / "manifest.json").read_text())["fields"]
    (prepared,) = (stages.folder / "data" / "prepared").iterdir()
    assert fields["data"] == json.loads((prepared / "manifest.json").read_text())["fingerprint"]
    assert stages.run("train", f"adapter.path={sft / 'adapter'}", f"output_dir={dpo}") == 0
    shown = capsys.readouterr().out
    assert "differ by at most 0 nats" in shown
    results = json.loads((dpo / "evaluation" / "results.json").read_text())
    assert results["reward_accuracy"]["base"] == 0.5


def test_evaluate_takes_from_the_run_what_the_command_line_leaves_open(stages):
    from laddpo.cli.app import cli

    run, again = stages.folder / "run", stages.folder / "again"
    assert stages.run("train", f"output_dir={run}") == 0
    assert cli("evaluate", [f"run={run}", f"output_dir={again}", "evaluation.limit=2", "logger=none"]) == 0
    results = json.loads((again / "results.json").read_text())
    trained = json.loads((run / "evaluation" / "results.json").read_text())
    assert results["reward_accuracy"] == trained["reward_accuracy"]
    assert (trained["exact_match"]["items"], results["exact_match"]["items"]) == (4, 2)


def test_damaged_weights_are_named_before_they_are_used(stages, capsys):
    run = stages.folder / "run"
    assert stages.run("train", f"output_dir={run}", "evaluation.at_end=false") == 0
    file = run / "adapter" / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 0x40
    file.write_bytes(content)
    assert stages.run("train", f"adapter.path={run / 'adapter'}", f"output_dir={stages.folder / 'b'}") == 2
    assert "adapter_model.safetensors: differs from what" in capsys.readouterr().err


@pytest.fixture
def adapter_of_a_wider_model(tmp_path):
    """As PEFT writes it, for a model of width 64 where the stages' is 32 wide."""
    import torch

    from laddpo.models import adapters
    from laddpo.models.llada import LLaDAModelLM
    from laddpo.models.llada_config import LLaDAConfig

    shape = {"d_model": 64, "n_layers": 2, "n_heads": 2, "mlp_hidden_size": 64, "vocab_size": 300}
    model = LLaDAModelLM(LLaDAConfig(**shape)).to(torch.float32)
    adapters.attach_lora(model, r=2)
    adapters.save_adapter(model, tmp_path / "wide")
    return tmp_path / "wide"


def test_a_starting_adapter_is_looked_at_before_any_pair_is_made(stages, adapter_of_a_wider_model, capsys):
    assert stages.run("train", f"adapter.path={adapter_of_a_wider_model}") == 2
    assert "adapter tensors have another shape (first: base_model.model" in capsys.readouterr().err
    assert stages.run("train", f"adapter.path={stages.folder / 'nowhere'}") == 2
    assert "adapter_config.json: no such file; expected an adapter in PEFT's layout" in capsys.readouterr().err
    shallow = ["model.shape.d_model=64", "model.shape.n_layers=1"]
    assert stages.run("train", f"adapter.path={adapter_of_a_wider_model}", *shallow) == 2
    assert "adapter tensors match no module (first: base_model.model" in capsys.readouterr().err
    (adapter_of_a_wider_model / "adapter_model.safetensors").write_bytes(b"version https://git-lfs")
    assert stages.run("train", f"adapter.path={adapter_of_a_wider_model}") == 2
    assert "is no whole safetensors file" in capsys.readouterr().err
    assert not (stages.folder / "data").exists()


@pytest.mark.parametrize(("draws", "said"), [(1, "1 mask each"), (2, "2 masks each")])
def test_sft_counts_its_masks_in_words(stages, capsys, draws, said):
    quick = ["sft.examples=chosen", "evaluation.tasks=[]", "evaluation.at_end=false", "optim.max_train_steps=1"]
    assert stages.run("sft", *quick, f"sft.diffusion_samples={draws}") == 0
    assert f"rows from 24, {said}" in capsys.readouterr().out
