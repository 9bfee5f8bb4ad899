"""config.json as other programs read it: every switch of the original is there and describes the network we compute."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import embedding, linear, silu, softmax

from laddpo.models.loading import config_content, copy_tokenizer, load_model, load_tokenizer, save_model

DATA = Path(__file__).resolve().parents[2] / "data"

# What the original's config takes where a config.json is silent: the network of GPT-2, which is not LLaDA.
DEFAULTS = {
    "d_model": 768, "n_heads": 12, "n_kv_heads": None, "n_layers": 12, "mlp_ratio": 4, "mlp_hidden_size": None,
    "activation_type": "swiglu", "block_type": "sequential", "block_group_size": 1, "alibi": False,
    "alibi_bias_max": 8.0, "rope": False, "rope_full_precision": True, "flash_attention": False,
    "attention_dropout": 0.1, "multi_query_attention": None, "attention_layer_norm": False, "residual_dropout": 0.1,
    "embedding_dropout": 0.1, "input_emb_norm": False, "layer_norm_type": "default", "layer_norm_with_affine": True,
    "rms_norm_eps": 1e-5, "attention_layer_norm_with_affine": True, "max_sequence_length": 1024,
    "rope_theta": 10000.0, "include_qkv_bias": False, "include_bias": False, "bias_for_layer_norm": None,
    "scale_logits": False, "vocab_size": 50257, "embedding_size": 50304, "weight_tying": True, "eos_token_id": 50256,
    "pad_token_id": 50256, "mask_token_id": 50256, "init_device": None, "init_fn": "normal", "init_std": 0.02,
    "init_cutoff_factor": None, "precision": None, "use_cache": False,
}  # fmt: skip
# The value of each switch for the network that `described_logits` writes out.
LLADA = {
    "activation_type": "silu", "block_type": "llama", "block_group_size": 1, "alibi": False, "rope": True,
    "rope_full_precision": True, "attention_dropout": 0.0, "residual_dropout": 0.0, "embedding_dropout": 0.0,
    "attention_layer_norm": False, "input_emb_norm": False, "layer_norm_type": "rms", "layer_norm_with_affine": True,
    "include_qkv_bias": False, "include_bias": False, "bias_for_layer_norm": False, "scale_logits": False,
    "weight_tying": False, "multi_query_attention": None,
}  # fmt: skip


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
    """The network that a config describes, written out for the switches of LLaDA alone."""
    wrong = {name: described[name] for name, value in LLADA.items() if described[name] != value}
    assert not wrong, f"another network is described: {wrong}"
    heads, kv_heads = described["n_heads"], described["n_kv_heads"] or described["n_heads"]
    width = described["d_model"] // heads
    angle = torch.arange(len(ids))[:, None] / described["rope_theta"] ** (torch.arange(0, width, 2) / width)
    cos, sin = torch.cat([angle, angle], -1).cos(), torch.cat([angle, angle], -1).sin()

    def norm(x, name):
        return weights[name] * x * (x.pow(2).mean(-1, keepdim=True) + described["rms_norm_eps"]).rsqrt()

    def rotated(x):  # [heads, L, width]
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat([-second, first], -1) * sin

    x = embedding(ids, weights["model.transformer.wte.weight"])
    for layer in range(described["n_layers"]):
        part = {name: f"model.transformer.blocks.{layer}.{name}.weight" for name in PARTS}
        h = norm(x, part["attn_norm"])
        q, k, v = (
            linear(h, weights[part[name]]).view(len(ids), -1, width).transpose(0, 1)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        k, v = (t.repeat_interleave(heads // kv_heads, 0) for t in (k, v))
        mixed = softmax(rotated(q) @ rotated(k).transpose(1, 2) / width**0.5, -1) @ v
        x = x + linear(mixed.transpose(0, 1).reshape(len(ids), -1), weights[part["attn_out"]])
        h = norm(x, part["ff_norm"])
        x = x + linear(
            silu(linear(h, weights[part["ff_proj"]])) * linear(h, weights[part["up_proj"]]), weights[part["ff_out"]]
        )
    return linear(norm(x, "model.transformer.ln_f.weight"), weights["model.transformer.ff_out.weight"])


PARTS = ("attn_norm", "q_proj", "k_proj", "v_proj", "attn_out", "ff_norm", "ff_proj", "up_proj", "ff_out")


def test_read_with_the_originals_defaults_it_describes_the_same_network(saved):
    shipped, folder, model = saved
    written = read(folder)
    assert not DEFAULTS.keys() - written.keys(), "no field is left to the original's defaults"
    ids = torch.arange(12)
    with torch.no_grad():
        found = described_logits({**DEFAULTS, **written}, load_file(folder / "model.safetensors"), ids)
        wanted = model(input_ids=ids[None]).logits[0]
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    with pytest.raises(AssertionError, match="another network is described"):
        described_logits({**DEFAULTS, **read(shipped)}, {}, ids)


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
