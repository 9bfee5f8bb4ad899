"""The key of the reference store is what changes its values: everything else finds it, everything in it is named."""

from __future__ import annotations

import json
import re
import shutil

import pytest

from tests.pipeline.conftest import Stages

BRIEF = ("evaluation.at_end=false", "evaluation.every_steps=null", "evaluation.tasks=[]", "save_steps=100")


@pytest.fixture(scope="module")
def computed(tmp_path_factory, tiny_model) -> Stages:
    """Pairs and their reference values."""
    stages = Stages(tmp_path_factory.mktemp("computed"), tiny_model)
    assert stages.run("precompute") == 0
    return stages


@pytest.mark.parametrize(
    "change",
    [
        "dpo.beta=3",
        "dpo.loss=hinge",
        "optim.learning_rate=1e-4",
        "adapter.r=2",
        "optim.per_device_train_batch_size=8",
        "optim.gradient_accumulation_steps=2",
        "hardware.token_budget=2000",
        "dpo.diffusion_samples=1",
        "dpo.sft_weight=0.1",
        "output_dir",
    ],
)
def test_what_does_not_change_reference_values_reuses_the_store(computed, capsys, change):
    stages = computed
    is_larger = "batch" in change or "accumulation" in change
    steps = "optim.max_train_steps=4" if is_larger else "optim.max_train_steps=8"
    change = f"output_dir={stages.folder / 'another'}" if change == "output_dir" else change
    assert stages.run("train", change, steps, *BRIEF) == 0
    shown = capsys.readouterr().out
    assert "reference, training pairs: all 24 pairs" in shown and "computing" not in shown


@pytest.mark.parametrize(
    ("change", "reason"),
    {
        "seed=7": "draws.seed: stored 42, now 7",
        "dpo.estimator=count": "draws.estimator: stored",
        "dpo.schedule=iid": "draws.schedule: stored",
        "dpo.shared_counts=false": "draws.shared_counts: stored True, now False",
        "hardware.precision=bf16": "precision: stored 'fp32', now 'bf16'",
        "quantization=nf4": "quantization: stored 'none', now 'nf4",
        "data.truncation=keep_start": "encoding.truncation: stored 'error', now 'keep_start'",
        "data.template=plain": "encoding.template: stored",
    }.items(),
)
def test_what_changes_reference_values_is_computed_anew_and_named(stages, computed, capsys, change, reason):
    shutil.copytree(computed.folder, stages.folder, dirs_exist_ok=True)
    assert stages.run("precompute", change) == 0
    shown = capsys.readouterr().out
    assert "reference, training pairs: computing 24 of 24" in shown
    assert "reference, training pairs: a new store; the nearest" in shown and reason in shown


def test_full_fine_tuning_in_bf16_has_a_reference_of_its_own(stages, capsys):
    """It keeps float32 weights and computes in bf16, where LoRA's base is stored in bf16: other roundings."""
    more = ["hardware.precision=bf16", "evaluation.at_end=false", "evaluation.tasks=[]"]
    assert stages.run("precompute", *more) == 0
    capsys.readouterr()
    assert stages.run("train", *more, "adapter=full") == 0
    shown = capsys.readouterr().out
    assert "precision: stored 'bf16', now 'bf16 autocast over fp32 weights'" in shown
    assert re.search(r"differ by at most 0 nats", shown)


def test_other_weights_and_another_tokenizer_are_computed_anew_and_named(stages, capsys):
    from safetensors.torch import load_file, save_file

    assert stages.run("precompute") == 0
    weights, tokenizer = stages.folder / "weights", stages.folder / "tokenizer"
    for folder in (weights, tokenizer):
        shutil.copytree(stages.model, folder)
    tensors = load_file(weights / "model.safetensors")
    next(iter(tensors.values())).view(-1)[0] += 1
    save_file(tensors, weights / "model.safetensors", metadata={"format": "pt"})
    vocabulary = json.loads((tokenizer / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary["normalizer"] = {"type": "Strip", "strip_left": True, "strip_right": True}
    (tokenizer / "tokenizer.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    for folder, reason in ((weights, r"weights\.base: stored 'sha256:"), (tokenizer, r"encoding\.tokenizer: stored")):
        capsys.readouterr()
        assert stages.run("precompute", f"model.model_name_or_path={folder}") == 0
        shown = capsys.readouterr().out
        assert "computing 24 of 24" in shown
        assert re.search(rf"training pairs: a new store; the nearest.*{reason}", shown)


def write_pairs(stages, *texts: str):
    file = stages.folder / "pairs.jsonl"
    rows = [{"prompt": text * 12, "chosen": "yes", "rejected": "no"} for text in texts]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return [
        "data=jsonl",
        f"data.dataset_name={file}",
        "data.validation_fraction=0",
        "data.test_fraction=0",
        "evaluation.tasks=[]",
    ]


def test_a_changed_text_is_one_new_row(stages, capsys):
    assert stages.run("precompute", *write_pairs(stages, "abcd", "efgh", "ijkl")) == 0
    capsys.readouterr()
    assert stages.run("precompute", *write_pairs(stages, "abcd", "efgh", "ijkm")) == 0
    shown = capsys.readouterr().out
    assert "computing 1 of 3 pairs into" in shown and "training pairs: 1 new to this store" in shown


def test_another_max_length_computes_the_rows_that_it_cuts(stages, capsys):
    long, cut = "data.max_length=512", "data.max_length=70"
    pairs = [*write_pairs(stages, "ab", "abcdefgh"), "data.truncation=keep_end"]
    assert stages.run("precompute", *pairs, long) == 0
    capsys.readouterr()
    assert stages.run("precompute", *pairs, cut) == 0
    shown = capsys.readouterr().out
    assert (
        "computing 1 of 2" in shown and "training pairs: 1 with other tokens than are stored (data.max_length)" in shown
    )


@pytest.mark.parametrize("packing", ["hardware.token_budget=64", "hardware.token_budget=4000"])
def test_the_margin_at_step_0_is_zero_after_a_precompute_stopped_and_continued_in_another_batch(
    stages, capsys, monkeypatch, packing
):
    """Exactly 0 in the packing that computed the reference; in another one within the tolerance that is stated."""
    import contextlib

    from laddpo.processes import signals
    from laddpo.training.faults import STEP_ZERO_TOLERANCE

    class Late(signals.StopFlag):
        """Set while the second window or a later one is computed."""

        asked = 0

        def __bool__(self) -> bool:
            self.asked += 1
            self.name = "SIGTERM" if self.asked > 12 else None
            return super().__bool__()

    flag = Late()
    packing = [packing, "data.max_length=64"]
    batches = ["optim.per_device_train_batch_size=2", "optim.max_train_steps=16"]
    with monkeypatch.context() as patched:
        patched.setattr(signals, "stop_on_signal", lambda: contextlib.nullcontext(flag))
        assert stages.run("precompute", *batches, *packing) == 75
    stored = int(re.search(r"(\d+) pairs are stored", capsys.readouterr().err).group(1))
    assert 0 < stored < 24
    assert stages.run("precompute", *packing) == 0
    assert f"computing {24 - stored} of 24" in capsys.readouterr().out
    assert stages.run("train", "evaluation.at_end=false", "evaluation.tasks=[]", *packing) == 0
    shown = re.search(r"differ by at most (\S+) nats", capsys.readouterr().out)
    assert float(shown.group(1)) <= 60 * STEP_ZERO_TOLERANCE["fp32"]
    if packing[0].endswith("=64"):  # one sequence a micro-step, in every batch
        assert float(shown.group(1)) == 0
