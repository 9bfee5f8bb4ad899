"""Exports through the door a user uses: merged weights that load again, the adapter alone, a hub that is not there."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from laddpo.models import adapters, loading
from laddpo.results.model_card import CardFacts, card_text
from laddpo.settings.compose import compose


@pytest.fixture
def trained(stages):
    run = stages.folder / "run"
    steps = ["optim.max_train_steps=3", "best_metric=none"]
    assert stages.run("train", f"output_dir={run}", *steps) == 0
    return run


def export(stages, run, name, *more):
    folder = stages.folder / name
    return stages.run("export", f"run={run}", f"output_dir={folder}", *more), folder


def adapted(stages, run):
    model = loading.load_model(str(stages.model))
    adapters.attach_lora(model, path=str(run / "adapter"))
    return model


IDS = torch.arange(12)[None]


def test_merged_weights_are_the_adapters_model_in_a_folder_that_every_stage_can_start_from(stages, trained, capsys):
    code, folder = export(stages, trained, "merged", "export.shard_gib=1e-4")
    assert code == 0
    shown = capsys.readouterr().out
    assert "byte for byte" in shown and shown.strip().splitlines()[-1] == str(folder)
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 1
    assert {"tokenizer.json", "config.json", "README.md", "manifest.json"} <= {f.name for f in folder.iterdir()}
    model = loading.load_model(str(folder))
    with torch.no_grad():
        wanted, found = adapted(stages, trained)(input_ids=IDS).logits, model(input_ids=IDS).logits
        base = loading.load_model(str(stages.model))(input_ids=IDS).logits
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    assert (base - wanted).abs().max() > 1e-3, "the adapter does something"
    again = stages.folder / "again"
    assert stages.run("train", f"model.model_name_or_path={folder}", f"output_dir={again}", "dry_run=true") == 0


def test_the_card_names_base_data_licence_settings_and_metrics_and_no_place_of_this_machine(stages, trained):
    code, folder = export(stages, trained, "merged", "export.license=mit")
    assert code == 0
    card = (folder / "README.md").read_text()
    data = json.loads((trained / "manifest.json").read_text())["fields"]["data"]
    for words in ("license: mit", "sha256:", data, "learning_rate: 0.001", "exact match", "byte for byte", "beta: 2.0"):
        assert words in card, words
    assert str(stages.folder) not in card and str(stages.model.parent) not in card


@pytest.mark.parametrize(
    ("name", "is_on_hub"),
    [
        ("Anthropic/hh-rlhf", True),
        ("pairs.csv", False),
        ("mine/pairs.parquet", False),
        ("mine/pairs.jsonl.xz", False),
        ("mine/folder", False),
        ("data/of_the_data_dir", False),
        ("/somewhere/else", False),
    ],
)
def test_only_a_dataset_of_the_hub_is_a_dataset_of_the_card(tmp_path, monkeypatch, name, is_on_hub):
    monkeypatch.chdir(tmp_path)
    for folder in ("mine/folder", "stored/preference_data/data/of_the_data_dir"):
        (tmp_path / folder).mkdir(parents=True)
    config = compose(["data=jsonl", f"data.dataset_name={name}", "paths.data_dir=stored"])
    sealed = {"fields": {"rounds": [{"data": "first"}, {"data": "second"}]}}
    card = card_text(config, CardFacts("bf16", "", 0), {}, sealed, "sha256:0", 0, [])
    assert "those kept at step 0 of round 2, each round from the model before it; no evaluation during" in card
    card = card_text(config, CardFacts("bf16", "", 0), {}, None, "sha256:0", None, [])
    assert (f"datasets: [{name}]" in card) is is_on_hub
    assert ("datasets:" in card.split("---")[1]) is is_on_hub


EVIL = "mit\ntags: [evil]\n---\n# Evil\n<script>"


@pytest.mark.parametrize(
    ("front", "wanted"),
    [
        ("license: apache-2.0\ntags: [x]", ["apache-2.0"]),
        ("license:\n- mit\n- apache-2.0", ["mit", "apache-2.0"]),
        ("license: [mit, cc-by-4.0]  # both", ["mit", "cc-by-4.0"]),
        ("license: 'mit'\ntext: |\n  license: evil", ["mit"]),
        (f"license: {json.dumps(EVIL)}", []),
        ("license: {a: b}", []),
        ("license: [unclosed", []),
        ("- license", []),
        ("x: 1", []),
    ],
)
def test_the_bases_licence_is_read_from_its_front_matter_alone(tmp_path, front, wanted):
    from laddpo.results.exporting import base_licence

    (tmp_path / "README.md").write_text(f"---\n{front}\n---\n# Base\n\n---\nlicense: other\n---\n")
    assert base_licence(compose([f"model.model_name_or_path={tmp_path}"])) == wanted


def test_nothing_that_others_wrote_leaves_its_place_in_the_card():
    import dataclasses

    import yaml

    config = compose([])
    evil = "a/b\n---\n# Evil ```\n<script> [x](y)"
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, model_name_or_path=evil, revision=evil),
        data=dataclasses.replace(config.data, dataset_name=evil, habit=f"{evil}\n```\n# Evil\n"),
    )
    entry = {"base": 0.1, "tuned": 0.2, "difference": 0.1, "interval": [0.0, 0.2], "items": 3}
    results = {evil: {**entry, "task": {"name": evil, "grader": evil}}}
    for is_adapter in (False, True):
        card = card_text(config, CardFacts("bf16", "", 0, is_adapter), results, None, "sha256:0", 0, ["mit", "x: y"])
        _, front, body = card.split("---\n", 2)
        assert yaml.safe_load(front)["license"] == ["mit", "x: y"]
        assert yaml.safe_load(front)["tags"] == ["dpo", "masked-diffusion", "llada"]
        outside, fence = [], None
        for line in body.splitlines():
            ticks = line[: len(line) - len(line.lstrip("`"))]
            if fence is None and len(ticks) >= 3:
                fence = ticks
            elif fence is not None:
                fence = None if line.strip() == fence else fence
            else:
                outside.append(line)
        assert fence is None, "every code block ends"
        headings = [line for line in outside if line.startswith("#")]
        assert headings[1:] == ["## Origin", "## Metrics", "## Use", "## Settings"]
        assert "---" not in outside and not any(line.lstrip().startswith("<") for line in outside)


def test_a_licence_that_is_no_short_name_is_refused(stages, capsys):
    assert stages.run("export", f"adapter.path={stages.folder}", f"export.license={'x' * 101}") == 2
    assert "export.license" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_narrow_export_rounds_the_sum_once(stages, trained, dtype):
    code, folder = export(stages, trained, dtype, f"export.dtype={dtype}")
    assert code == 0
    name = "model.transformer.blocks.0.q_proj"
    written = load_file(folder / "model.safetensors")[f"{name}.weight"]
    narrow = loading.DTYPES[dtype]
    base = loading.load_model(str(stages.model), dtype=dtype).get_submodule(name).weight
    state = load_file(trained / "adapter" / "adapter_model.safetensors")
    a, b = (state[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
    assert written.dtype == narrow
    assert torch.equal(written, (base.float() + 2.0 * (b @ a)).to(narrow)), "alpha / r = 32 / 16"


def test_a_run_on_four_bit_weights_merges_into_the_unquantised_base(stages):
    run = stages.folder / "run"
    quick = ["optim.max_train_steps=2", "evaluation.at_end=false", "evaluation.tasks=[]", "best_metric=none"]
    assert stages.run("train", "quantization=nf4", f"output_dir={run}", *quick) == 0
    code, folder = export(stages, run, "merged")
    assert code == 0
    written = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {torch.float32}, "as the base's own files"
    assert "4-bit weights and merged into the unquantised" in (folder / "README.md").read_text()


def test_the_adapter_alone_is_copied_byte_for_byte_and_attaches_again(stages, trained):
    code, folder = export(stages, trained, "adapter", "export.adapter_only=true")
    assert code == 0
    written, kept = (f / "adapter_model.safetensors" for f in (folder, trained / "adapter"))
    assert written.read_bytes() == kept.read_bytes()
    model = loading.load_model(str(stages.model))
    adapters.attach_lora(model, path=str(folder))
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, adapted(stages, trained)(input_ids=IDS).logits)
    merged = stages.folder / "from_adapter"
    assert stages.run("export", f"adapter.path={folder}", f"output_dir={merged}") == 0
    assert (merged / "model.safetensors").is_file()


def test_full_fine_tuning_exports_its_own_weights(stages):
    run = stages.folder / "run"
    quick = ["optim.max_train_steps=2", "evaluation.at_end=false", "evaluation.tasks=[]", "best_metric=none"]
    assert stages.run("train", "adapter=full", f"output_dir={run}", *quick) == 0
    code, folder = export(stages, run, "full")
    assert code == 0
    kept, written = load_file(run / "model" / "model.safetensors"), load_file(folder / "model.safetensors")
    assert kept.keys() == written.keys() and all(torch.equal(kept[name], written[name]) for name in kept)
    for place in (run / "model", folder):
        content = json.loads((place / "config.json").read_text())
        assert content["rope"] is True and content["weight_tying"] is False and content["block_type"] == "llama"
        assert content["auto_map"]["AutoModel"] == "GSAI-ML/LLaDA-8B-Instruct--modeling_llada.LLaDAModelLM"
    assert export(stages, run, "none", "export.adapter_only=true")[0] == 2


def test_sft_runs_export_too_even_from_random_weights_where_the_base_has_none(stages, tmp_path):
    base = tmp_path / "tokenizer only"
    base.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (base / name).write_bytes((stages.model / name).read_bytes())
    run = stages.folder / "run"
    settings = ["sft.from_scratch=true", "sft.num_examples=16", "optim.max_train_steps=2", "evaluation.tasks=[]"]
    place = f"model.model_name_or_path={base}"
    assert stages.run("sft", place, "adapter=full", *settings, f"output_dir={run}") == 0
    for name, more, dtype in (("as stored", [], torch.float32), ("narrow", ["export.dtype=bf16"], torch.bfloat16)):
        code, folder = export(stages, run, name, *more)
        assert code == 0
        assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {dtype}
        card = (folder / "README.md").read_text()
        assert "supervised fine-tuning" in card and "16 generated examples" in card and "tags: [sft," in card


def test_a_base_that_changed_since_training_is_refused(stages, trained, capsys):
    model = loading.load_model(str(stages.model))
    with torch.no_grad():
        model.model["transformer"]["ln_f"].weight.mul_(1.5)
    before = (stages.model / "model.safetensors").read_bytes()
    try:
        loading.save_model(model, stages.model)
        assert export(stages, trained, "merged")[0] == 2
        assert "now sha256:" in capsys.readouterr().err
    finally:
        (stages.model / "model.safetensors").write_bytes(before)


class Hub:
    """What huggingface_hub's client is asked to do."""

    def __init__(self, calls, refuse=()):
        self.calls, self.refuse = calls, refuse

    def __getattr__(self, name):
        def call(*args, **kwargs):
            if name in self.refuse:
                raise OSError(f"{name} refused")
            self.calls.append((name, args, kwargs))

        return call


def test_push_sends_the_finished_folder_to_a_private_repository(stages, trained, monkeypatch):
    calls = []
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: Hub(calls))
    code, folder = export(stages, trained, "merged", "export.push_to_hub=me/mine")
    assert code == 0
    (asked, _, _), (made, where, options), (sent, _, what) = calls
    assert (asked, made, sent) == ("whoami", "create_repo", "upload_folder")
    assert where == ("me/mine",) and options["private"] is True
    assert what["folder_path"] == str(folder) and what["repo_id"] == "me/mine"


def test_a_hub_that_does_not_know_the_user_is_found_out_before_the_work(stages, trained, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: Hub([], refuse=["whoami"]))
    code, folder = export(stages, trained, "merged", "export.push_to_hub=me/mine")
    assert code == 2 and not (folder / "config.json").exists()
    assert "hf auth login" in capsys.readouterr().err


def test_a_failed_upload_leaves_the_export_and_says_how_to_send_it(stages, trained, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: Hub([], refuse=["upload_folder"]))
    code, folder = export(stages, trained, "merged", "export.push_to_hub=me/mine")
    assert code == 2 and (folder / "manifest.json").exists()
    assert "hf upload me/mine" in capsys.readouterr().err


def test_without_a_run_the_message_names_what_is_missing(stages, capsys):
    assert stages.run("export") == 2
    assert "run is not set" in capsys.readouterr().err
