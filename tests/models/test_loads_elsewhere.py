"""An export is used by its card's own lines: with laddpo, and by programs that know nothing of it.

The public code that `auto_map` names is a stand-in here (public_code/), in a folder with the name of the hub
repository: so transformers takes it from there, and the exported folder stays as it was written.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from laddpo.cli.app import cli
from laddpo.models import adapters, loading
from laddpo.models.families import FAMILIES
from tests.tiny import write_tiny_model

HERE = Path(__file__).resolve().parent
SHAPE = {"d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "mlp_hidden_size": 64, "rope_theta": 12345.0}
GIVEN = {"torch_dtype": "float32", "alibi_bias_max": 7.0, "precision": "amp_fp16", "a_field_of_ours": [1, {"b": None}]}
EVIL = {"AutoTokenizer": ["tokenization_evil.Tokenizer", None], "AutoModel": "evil--modeling_evil.Model"}
IDS = torch.arange(12)[None]

LOADER = """
import json, sys, torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

merged, ids = sys.argv[1], torch.arange(12)[None]
found = {}
for auto in (AutoModel, AutoModelForCausalLM):
    model, info = auto.from_pretrained(merged, trust_remote_code=True, output_loading_info=True)
    found[auto.__name__] = {name: sorted(map(str, keys)) for name, keys in info.items() if name.endswith("_keys")}
    found[auto.__name__]["class"] = type(model).__module__ + "." + type(model).__qualname__
with torch.no_grad():
    torch.save(model(input_ids=ids).logits, "loaded.pt")
found["theta"] = AutoConfig.from_pretrained(merged, trust_remote_code=True).rope_theta
template = AutoTokenizer.from_pretrained(merged, trust_remote_code=True).apply_chat_template
messages = [{"role": "user", "content": "1+1="}]
found["prompt"] = template(messages, add_generation_prompt=True, tokenize=False)
found["ids"] = template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A base with an unusual config and a tokenizer that names code, an adapter on it, and both exports."""
    folder = tmp_path_factory.mktemp("elsewhere")
    base = write_tiny_model(folder / "my-llada", SHAPE)
    own = {name: json.loads((base / name).read_text()) for name in ("config.json", "tokenizer_config.json")}
    own["config.json"] |= GIVEN
    for name, content in own.items():
        (base / name).write_text(json.dumps(content | {"auto_map": EVIL}))
    model = loading.load_model(str(base))
    adapters.attach_lora(model, r=4, seed=1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(name))) / 5)
        wanted = model(input_ids=IDS).logits
    (folder / "run").mkdir()
    adapters.save_adapter(model, folder / "run")
    settings = [f"model={base}", f"adapter.path={folder / 'run'}"]
    for name, more in (("merged", []), ("adapter", ["export.adapter_only=true"])):
        assert cli("export", [*settings, f"output_dir={folder / name}", *more]) == 0
    shutil.copytree(base, folder / "published")  # without the evil: what the adapter's Python lines load
    for name, content in own.items():
        (folder / "published" / name).write_text(json.dumps(content))
    public = folder / "GSAI-ML" / "LLaDA-8B-Instruct"
    public.mkdir(parents=True)
    for file in ("configuration_llada.py", "modeling_llada.py"):
        shutil.copy(HERE / "public_code" / file, public)
    return SimpleNamespace(folder=folder, base=base, wanted=wanted)


def elsewhere(folder: Path, code: str, *arguments: str) -> str:
    """What a Python program prints that has neither this package nor a network."""
    hidden = {"PYTHONPATH": str(folder), "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(folder / "modules")}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=folder,
        env={**os.environ, **hidden},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def card_lines(exported, name: str, language: str) -> str:
    """The lines of one language in the card of an export, with this machine's folders for the placeholders."""
    (block,) = re.findall(rf"```{language}\n(.*?)```", (exported.folder / name / "README.md").read_text(), re.DOTALL)
    base = exported.folder / "published" if language == "python" else exported.base
    return block.replace("THIS_FOLDER", str(exported.folder / name)).replace(exported.base.name, str(base))


def test_auto_classes_load_the_export_with_the_code_that_its_config_names(exported):
    found = json.loads(elsewhere(exported.folder, LOADER, "merged").splitlines()[-1])
    for auto in ("AutoModel", "AutoModelForCausalLM"):
        assert found[auto].pop("class").startswith("transformers_modules.")
        assert {"missing_keys", "unexpected_keys"} <= found[auto].keys() and not any(found[auto].values()), found
    loaded = torch.load(exported.folder / "loaded.pt")
    torch.testing.assert_close(loaded, exported.wanted, atol=1e-5, rtol=1e-4)
    assert found["theta"] == SHAPE["rope_theta"]
    tokenizer = loading.load_tokenizer(str(exported.base))
    messages = [{"role": "user", "content": "1+1="}]
    assert found["prompt"] == tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert found["ids"] == tokenizer(found["prompt"], add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("name", ["merged", "adapter"])
def test_the_python_lines_of_the_card_load_the_model(exported, name):
    lines = card_lines(exported, name, "python")
    then = "import torch\ntorch.save(model(input_ids=torch.arange(12)[None]).logits.detach(), 'card.pt')\n"
    elsewhere(exported.folder, lines + then)
    torch.testing.assert_close(torch.load(exported.folder / "card.pt"), exported.wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["merged", "adapter"])
def test_the_shell_lines_of_the_card_run(exported, name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    quick = [
        "evaluation.gen_length=8",
        "evaluation.block_length=8",
        "evaluation.steps=2",
        "evaluation.confidence_threshold=null",
    ]
    for number, line in enumerate(card_lines(exported, name, "bash").splitlines()):
        program, stage, *arguments = shlex.split(line)
        more = quick if stage == "generate" else []
        assert program == "laddpo" and cli(stage, [*arguments, *more, f"output_dir={tmp_path / str(number)}"]) == 0
    (row,) = (json.loads(line) for line in (tmp_path / "0" / "generations.jsonl").read_text().splitlines())
    assert set(row) == {"prompt", "base"}


def test_plain_peft_uses_every_tensor_of_the_adapter_under_the_hubs_names(exported):
    from peft import PeftModel, get_peft_model_state_dict

    from tests.models.public_code.configuration_llada import LLaDAConfig
    from tests.models.public_code.modeling_llada import LLaDAModelLM

    theirs = LLaDAModelLM(LLaDAConfig(**json.loads((exported.folder / "merged" / "config.json").read_text())))
    theirs.load_state_dict(load_file(exported.base / "model.safetensors"))
    tuned = PeftModel.from_pretrained(theirs, str(exported.folder / "adapter"))
    taken = get_peft_model_state_dict(tuned)
    written = load_file(exported.folder / "adapter" / "adapter_model.safetensors")
    assert taken.keys() == written.keys() and all(torch.equal(taken[name], written[name]) for name in written)
    with torch.no_grad():
        torch.testing.assert_close(tuned(input_ids=IDS).logits, exported.wanted, atol=1e-5, rtol=1e-4)
        merged = tuned.merge_and_unload().state_dict()
    for name, weight in load_file(exported.folder / "merged" / "model.safetensors").items():
        torch.testing.assert_close(merged[name], weight, atol=1e-6, rtol=1e-5)


def test_the_config_keeps_every_field_of_the_bases_and_no_name_of_its_code(exported):
    given, written = (
        json.loads((place / "config.json").read_text()) for place in (exported.base, exported.folder / "merged")
    )
    given["auto_map"] = written["auto_map"]
    assert {name: written.get(name, "lost") for name in given} == given
    assert all(value.startswith("GSAI-ML/LLaDA-8B-Instruct--") for value in written["auto_map"].values())
    assert "evil" not in (exported.folder / "merged" / "tokenizer_config.json").read_text()


def test_the_config_of_a_real_checkpoint_keeps_every_field(shared_folder, tmp_path):
    """Built on the meta device: only the config is looked at."""
    seen = 0
    for base in sorted((shared_folder / "assets").iterdir()):
        if not base.is_dir() or loading.original_config(base)["architectures"][0] not in FAMILIES:
            continue
        config, family = loading.read_config(base)
        dtype = getattr(torch, loading.original_config(base).get("torch_dtype", "float32"))
        with torch.device("meta"):
            model = family.model_class(config).to(dtype)
        (tmp_path / "config.json").write_text(json.dumps(loading.config_content(model)))
        loading.keep_original_fields(tmp_path, base)
        given, written = (json.loads((place / "config.json").read_text()) for place in (base, tmp_path))
        named = given.pop("auto_map")
        given.pop("_name_or_path", None)  # where it was loaded from, not what it is
        assert {name: written.get(name, "lost") for name in given} == given
        assert {name: value.split("--")[1] for name, value in written["auto_map"].items()} == named
        if (index := base / "model.safetensors.index.json").exists():  # of some only the config is at hand
            assert model.state_dict().keys() == json.loads(index.read_text())["weight_map"].keys()
        seen += 1
    assert seen >= 2
