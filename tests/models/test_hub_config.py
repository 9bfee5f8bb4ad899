"""config.json as other programs read it: every switch of the original is there and describes the network we compute."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from laddpo.models.loading import config_content, copy_tokenizer, load_model, load_tokenizer, save_model
from tests.models.public_code.configuration_llada import DEFAULTS, LLaDAConfig
from tests.models.public_code.modeling_llada import LLADA, LLaDAModelLM

DATA = Path(__file__).resolve().parents[2] / "data"


@pytest.fixture(scope="module", params=["llada_nano", "llada_mini"])
def saved(request, tmp_path_factory):
    """A shipped model written as export and training write checkpoints."""
    folder = tmp_path_factory.mktemp("saved")
    model = load_model(str(DATA / request.param))
    save_model(model, folder)
    copy_tokenizer(str(DATA / request.param), None, folder)
    return DATA / request.param, folder, model


def read(folder):
    return json.loads((folder / "config.json").read_text())


def described_logits(described, weights, ids):
    """The network that a config describes, in code that shares nothing with ours."""
    model = LLaDAModelLM(LLaDAConfig(**described))
    model.load_state_dict(weights)
    return model(ids[None]).logits[0]


def test_read_with_the_originals_defaults_it_describes_the_same_network(saved):
    shipped, folder, model = saved
    written = read(folder)
    assert not DEFAULTS.keys() - written.keys(), "no field is left to the original's defaults"
    ids = torch.arange(12)
    with torch.no_grad():
        found = described_logits(written, load_file(folder / "model.safetensors"), ids)
        wanted = model(input_ids=ids[None]).logits[0]
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="another network is described"):
        described_logits(read(shipped), {}, ids)


def test_every_key_of_the_input_is_kept_with_an_equal_value(saved):
    shipped, _, _ = saved
    given = read(shipped)
    written = config_content(load_model(str(shipped), dtype=getattr(torch, given["dtype"])))
    assert {name: written.get(name, "lost") for name in given} == given
    assert written["torch_dtype"] == written["dtype"], "for programs of both spellings"
    assert "rope_theta" in written and "rope_parameters" not in written


def test_the_originals_own_config_comes_back_whole():
    """The fields of the published config.json, on a small network."""
    from laddpo.models.llada import LLaDAConfig, LLaDAModelLM

    given = {
        **DEFAULTS, **LLADA, "d_model": 16, "n_heads": 2, "n_kv_heads": 2, "n_layers": 1, "mlp_hidden_size": 24,
        "vocab_size": 20, "embedding_size": 20, "max_sequence_length": 32, "eos_token_id": 1, "pad_token_id": 1,
        "mask_token_id": 19, "init_device": "meta", "init_fn": "mitchell", "precision": "amp_bf16",
        "rope_theta": 400000.0, "model_type": "llada", "architectures": ["LLaDAModelLM"], "torch_dtype": "float32",
        "transformers_version": "4.46.3",
    }  # fmt: skip
    foreign = {"AutoModel": "evil--modeling_evil.Model"}
    written = config_content(LLaDAModelLM(LLaDAConfig.from_dict({**given, "auto_map": foreign})))
    assert {name: written.get(name, "lost") for name in given} == given
    assert written["auto_map"] == {
        "AutoConfig": "GSAI-ML/LLaDA-8B-Instruct--configuration_llada.LLaDAConfig",
        "AutoModel": "GSAI-ML/LLaDA-8B-Instruct--modeling_llada.LLaDAModelLM",
        "AutoModelForCausalLM": "GSAI-ML/LLaDA-8B-Instruct--modeling_llada.LLaDAModelLM",
    }, "from the family, never from a checkpoint"


def test_a_null_switch_is_written_as_it_was_computed():
    from laddpo.models.llada import LLaDAConfig, LLaDAModelLM

    small = {"d_model": 16, "n_heads": 2, "n_layers": 1, "mlp_hidden_size": 24, "vocab_size": 20, "mask_token_id": 19}
    written = config_content(LLaDAModelLM(LLaDAConfig.from_dict({**small, "rope": None, "weight_tying": None})))
    assert written["rope"] is True and written["weight_tying"] is False


def test_what_was_written_is_read_again_without_code_or_network_and_written_the_same(saved, monkeypatch):
    _, folder, _ = saved
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert len(load_tokenizer(str(folder))) > 0
    assert config_content(load_model(str(folder))) == read(folder)
