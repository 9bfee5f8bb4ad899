"""A tiny model of every family through the stages: prepare, precompute, train, evaluate, resume, export."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load_file

from laddpo.models import adapters, loading
from laddpo.models.families import FAMILIES
from tests.launching import launch
from tests.pipeline.conftest import Stages
from tests.tiny import write_tiny_model

SIZES = {"d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "mlp_hidden_size": 64, "vocab_size": 279}
SHAPES = {
    "ILLaDAForCausalLM": {"is_tied": True},
    "DreamModel": {},
    "LLaDAMoEModelLM": {"n_experts": 4, "experts_chosen": 2, "mlp_hidden_size": 24},
    "LLaDA2MoeModelLM": {"n_experts": 16, "experts_chosen": 2, "mlp_hidden_size": 24, "shared_experts": 1,
                         "dense_layers": 1, "dense_mlp_size": 48},
    "SDARForCausalLM": {"head_dim": 16},
    "A2DQwen3LMHeadModel": {"is_tied": True, "head_dim": 16},
    "A2DQwen2LMHeadModel": {"is_tied": True},
    "A2DLlamaLMHeadModel": {"is_tied": True},
}  # fmt: skip
BRIEF = ("optim.max_train_steps=4", "evaluation.every_steps=2", "best_metric=none", "save_steps=2")


@dataclass(frozen=True)
class FamilyStages(Stages):
    architecture: str = ""

    def overrides(self, *more: str) -> list[str]:
        found = super().overrides(*more)
        has_blocks = FAMILIES[self.architecture].block_length  # of its own, and no others
        return [text for text in found if not (has_blocks and text.startswith("evaluation.block_length="))]

    def places(self) -> list[str]:
        shape = {**SIZES, "max_sequence_length": 4096, **SHAPES[self.architecture]}
        own = [text for text in super().places() if not text.startswith("model.shape.")]
        sizes = [f"model.shape.{name}={value}" for name, value in shape.items()]
        return [*own, f"model.architecture={self.architecture}", *sizes]


BY_DEFAULT = ("DreamModel", "LLaDA2MoeModelLM")  # the others repeat their parts
FAMILIES_TRIED = [pytest.param(name, marks=() if name in BY_DEFAULT else pytest.mark.long) for name in sorted(SHAPES)]


@pytest.fixture(scope="module", params=FAMILIES_TRIED)
def stages(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("family")
    shape = {**SIZES, "max_sequence_length": 4096, **SHAPES[request.param]}
    return FamilyStages(folder, write_tiny_model(folder / "model", shape, request.param), request.param)


@pytest.fixture(scope="module")
def run(stages):
    """A finished run: its pairs prepared, its reference computed, base and tuned evaluated."""
    folder = stages.folder / "run"
    assert stages.run("train", *BRIEF, f"output_dir={folder}") == 0  # step 0 is checked: policy and reference are equal
    return folder


def test_every_family_of_one_network_is_tried():
    assert {FAMILIES[name].model_class for name in SHAPES} | {FAMILIES["LLaDAModelLM"].model_class} == {
        family.model_class for family in FAMILIES.values()
    }


def test_training_changes_the_adapter_and_its_evaluation_is_written(stages, run):
    tensors = load_file(run / "adapter_last" / "adapter_model.safetensors")
    assert any(tensor.abs().max() > 0 for name, tensor in tensors.items() if "lora_B" in name)
    results = json.loads((run / "evaluation" / "results.json").read_text())
    assert {"exact_match", "reward_accuracy"} <= results.keys()
    first = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert first["validation/rewards/margins"] == 0.0


def test_a_run_cut_at_its_checkpoint_resumes_to_the_same_bytes(stages, run):
    if stages.architecture in ("A2DQwen2LMHeadModel", "A2DLlamaLMHeadModel"):
        pytest.skip("the same network as another one")
    again = stages.folder / "again"
    shutil.copytree(run, again)
    for name in ("manifest.json", "evaluation", "adapter_last", "plots"):
        path = again / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.rmtree(again / "checkpoints" / "step_0000004")
    assert stages.run("train", *BRIEF, f"output_dir={again}", "resume=true") == 0
    for name in ("metrics.jsonl", "adapter_last/adapter_model.safetensors", "evaluation/results.json"):
        assert (again / name).read_bytes() == (run / name).read_bytes(), name


def test_merged_weights_are_those_of_base_and_adapter(stages, run):
    folder = stages.folder / "merged"
    assert stages.run("export", f"run={run}", f"output_dir={folder}") == 0
    model = loading.load_model(str(stages.model))
    adapters.attach_lora(model, path=str(run / "adapter"))
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        wanted, found = (m(ids).logits for m in (model, loading.load_model(str(folder))))
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    given, written = (json.loads((place / "config.json").read_text()) for place in (stages.model, folder))
    assert {name: written.get(name) for name in given} == given
    assert load_file(folder / "model.safetensors").keys() == load_file(stages.model / "model.safetensors").keys()


@pytest.mark.parametrize("kind", ["quantization=nf4", "quantization=int8", "adapter=full"])
def test_4_bits_8_bits_and_all_weights_are_trained(stages, kind):
    others = ("DreamModel", "LLaDAMoEModelLM", "LLaDA2MoeModelLM", "ILLaDAForCausalLM")
    if kind != "quantization=nf4" and stages.architecture not in others:
        pytest.skip("the same network as one of these")
    folder, brief = stages.folder / kind, ["optim.max_train_steps=2", "evaluation.at_end=false", "best_metric=none"]
    assert stages.run("train", *brief, "evaluation.every_steps=null", kind, f"output_dir={folder}") == 0
    assert (folder / ("model_last" if kind == "adapter=full" else "adapter_last") / "manifest.json").exists()
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if "loss" in record]
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)


def test_a_small_model_is_made_from_random_weights(stages):
    if stages.architecture in ("A2DQwen2LMHeadModel", "A2DLlamaLMHeadModel"):
        pytest.skip("the same network as another one")
    folder = stages.folder / "made"
    made = [
        "sft.examples=corpus",
        "sft.num_examples=64",
        "sft.from_scratch=true",
        "adapter=full",
        "optim.max_train_steps=2",
    ]
    assert stages.run("sft", *made, "evaluation.every_steps=null", "best_metric=none", f"output_dir={folder}") == 0
    model = loading.load_model(str(folder / "model"))
    assert type(model).__name__ == stages.architecture


@pytest.mark.parametrize(
    ("architecture", "sharding"),
    [
        ("SDARForCausalLM", "none"),
        ("LLaDA2MoeModelLM", "fsdp"),
        pytest.param("DreamModel", "none", marks=pytest.mark.long),
        pytest.param("LLaDAMoEModelLM", "fsdp", marks=pytest.mark.long),
        pytest.param("A2DQwen3LMHeadModel", "none", marks=pytest.mark.long),
        pytest.param("ILLaDAForCausalLM", "fsdp", marks=pytest.mark.long),
    ],
)
def test_two_processes_make_the_weights_of_one(tmp_path, architecture, sharding):
    shape = {**SIZES, "max_sequence_length": 4096, **SHAPES[architecture]}
    stages = FamilyStages(tmp_path, write_tiny_model(tmp_path / "model", shape, architecture), architecture)
    brief = ("optim.max_train_steps=2", "evaluation.every_steps=null", "evaluation.at_end=false", "best_metric=none")
    kind = "adapter=full" if sharding == "fsdp" else "adapter=lora"
    once, twice = tmp_path / "once", tmp_path / "twice"
    alone = [*brief, kind, "optim.per_device_train_batch_size=8", f"output_dir={once}"]
    assert stages.run("train", *alone) == 0
    both = stages.overrides(*brief, kind, f"hardware.sharding={sharding}", f"output_dir={twice}")
    done = launch(2, "-m", "laddpo.train", *both)
    assert done.returncode == 0, done.stdout
    name = "model_last/model.safetensors" if kind == "adapter=full" else "adapter_last/adapter_model.safetensors"
    first, second = load_file(once / name), load_file(twice / name)
    assert first.keys() == second.keys()
    for key in first:
        torch.testing.assert_close(second[key], first[key], atol=2e-4, rtol=2e-3, msg=key)
