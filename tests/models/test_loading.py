"""Loading checkpoints: what is read, what is refused and in which words."""

import importlib.util
import os
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from laddpo.errors import UserError
from laddpo.models import loading
from laddpo.models.loading import load_model, load_tokenizer, mask_token_id, save_model, weights_fingerprint
from laddpo.storage import atomic


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_loading_what_was_saved_gives_the_same_weights_and_config(tiny_model, tiny_folder):
    model, again = tiny_model(), load_model(str(tiny_folder))
    assert list(again.state_dict()) == list(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
    assert again.config.rope_theta == model.config.rope_theta
    assert not again.training


def test_saving_what_was_loaded_gives_the_same_bytes(tiny_folder, tmp_path):
    save_model(load_model(str(tiny_folder)), tmp_path / "again")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tiny_folder / name).read_bytes(), name


def test_keys_are_the_hubs(tiny_folder):
    names = load_file(tiny_folder / "model.safetensors").keys()
    parts = ["attn_norm", "ff_norm", "q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out"]
    expected = {f"model.transformer.{part}.weight" for part in ("wte", "ln_f", "ff_out")}
    expected |= {f"model.transformer.blocks.{i}.{part}.weight" for i in range(2) for part in parts}
    assert names == expected


def test_shards_are_indexed_and_load_again(tiny_model, tmp_path):
    model = tiny_model()
    files = save_model(model, tmp_path, shard_bytes=20_000)
    assert "model-00001-of-00005.safetensors" in files
    index = atomic.read_json(tmp_path / "model.safetensors.index.json")
    assert index["weight_map"].keys() == model.state_dict().keys()
    again = load_model(str(tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("name", "dtype"), [("bf16", torch.bfloat16), ("fp64", torch.float64), ("float16", torch.float16)]
)
def test_dtype_is_the_one_asked_for(tiny_folder, name, dtype):
    assert {p.dtype for p in load_model(str(tiny_folder), dtype=name).parameters()} == {dtype}


def test_attention_auto_allows_the_fast_kernel_and_sdpa_does_not(tiny_folder):
    auto, sdpa = (load_model(str(tiny_folder), attention=a) for a in ("auto", "sdpa"))
    assert auto.config._attn_implementation == sdpa.config._attn_implementation == "sdpa"
    assert (auto.packed_kernel, sdpa.packed_kernel) == ("auto", "batched")


def test_an_attention_package_that_is_not_installed_is_named(tiny_folder):
    if importlib.util.find_spec("flash_attn"):
        pytest.skip("flash_attn is installed here")
    with pytest.raises(UserError, match=r"hardware\.attention is 'flash_attention_2'.*set hardware\.attention=auto"):
        load_model(str(tiny_folder), attention="flash_attention_2")


def test_a_missing_tensor_is_refused_instead_of_drawn_at_random(tiny_folder):
    state = load_file(tiny_folder / "model.safetensors")
    del state["model.transformer.blocks.1.ff_out.weight"]
    save_file(state, tiny_folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"1 tensors are missing \(first: model.transformer.blocks.1.ff_out.weight\)"):
        load_model(str(tiny_folder))


def test_an_unknown_tensor_is_refused(tiny_folder):
    state = load_file(tiny_folder / "model.safetensors")
    save_file(
        {**state, "model.transformer.extra.weight": torch.ones(2)}, tiny_folder / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(UserError, match="1 tensors are unknown"):
        load_model(str(tiny_folder))


def test_weights_of_another_shape_are_refused(tiny_folder):
    config = atomic.read_json(tiny_folder / "config.json")
    atomic.write_json(tiny_folder / "config.json", {**config, "mlp_hidden_size": 40})
    with pytest.raises(UserError, match=r"6 tensors have another shape \(first: model\.transformer\.blocks\.0\.ff_out"):
        load_model(str(tiny_folder))


def test_pickled_weights_are_refused_unopened(tiny_folder):
    class Bomb:
        def __reduce__(self):
            return (os.abort, ())

    (tiny_folder / "model.safetensors").unlink()
    (tiny_folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(UserError, match=r"only pickled weights \(pytorch_model.bin\)"):
        load_model(str(tiny_folder))


def test_a_missing_shard_is_named(tiny_model, tmp_path):
    save_model(tiny_model(), tmp_path, shard_bytes=20_000)
    (tmp_path / "model-00002-of-00005.safetensors").unlink()
    with pytest.raises(UserError, match=r"1 of 5 weight shards are missing, first model-00002"):
        load_model(str(tmp_path))


def test_another_family_is_refused_before_weights_are_looked_for(tmp_path):
    atomic.write_json(tmp_path / "config.json", {"architectures": ["Fast_dLLM_QwenForCausalLM"]})
    with pytest.raises(UserError, match="Fast-dLLM v2: block diffusion"):
        load_model(str(tmp_path))


def test_a_folder_without_config_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no config\.json"):
        load_model(str(tmp_path))


OFFLINE = [load_model, load_tokenizer, weights_fingerprint]


@pytest.mark.parametrize("load", OFFLINE)
def test_a_hub_id_without_network_or_cache_is_one_error_that_shows_the_way_out(load, tmp_path, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        load("GSAI-ML/LLaDA-8B-Instruct", "abc123")
    (problem,) = caught.value.problems
    assert "'GSAI-ML/LLaDA-8B-Instruct' at revision abc123" in problem
    assert "set model.model_name_or_path=<folder" in problem
    assert "\n" not in problem


@pytest.fixture
def cached_hub(tiny_folder, tmp_path, monkeypatch):
    """A hub cache that holds tiny as some/model, as a download leaves it."""
    import huggingface_hub.constants

    commit = "0123456789abcdef0123456789abcdef01234567"
    root = tmp_path / "hub" / "models--some--model"
    (root / "snapshots").mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(commit)
    tiny_folder.rename(root / "snapshots" / commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return commit


def test_a_cached_hub_model_loads_offline_and_its_commit_is_its_fingerprint(cached_hub):
    assert load_model("some/model").config.d_model == 32
    assert weights_fingerprint("some/model") == f"commit:{cached_hub}"


def test_fingerprint_of_a_folder_follows_weights_and_config_but_not_its_place(tiny_folder, tmp_path):
    first = weights_fingerprint(str(tiny_folder))
    moved = tiny_folder.rename(tmp_path / "elsewhere")
    assert weights_fingerprint(str(moved)) == first
    (moved / "notes.txt").write_text("x")
    assert weights_fingerprint(str(moved)) == first
    config = atomic.read_json(moved / "config.json")
    atomic.write_json(moved / "config.json", {**config, "rope_theta": 1000.0})
    second = weights_fingerprint(str(moved))
    state = load_file(moved / "model.safetensors")
    state["model.transformer.ln_f.weight"][0] += 1
    save_file(state, moved / "model.safetensors", {"format": "pt"})
    assert len({first, second, weights_fingerprint(str(moved))}) == 3


def test_fingerprint_reads_a_file_once(tiny_folder, monkeypatch):
    monkeypatch.setattr(loading, "FRESH_NS", 0)
    first = weights_fingerprint(str(tiny_folder))
    monkeypatch.setattr(atomic, "file_sha256", lambda path: pytest.fail(f"{path} was read again"))
    assert weights_fingerprint(str(tiny_folder)) == first


def test_fingerprint_reads_a_file_again_that_was_just_written(tiny_folder, monkeypatch):
    monkeypatch.setattr(loading, "FRESH_NS", 10**15)
    read, file_sha256 = [], atomic.file_sha256
    monkeypatch.setattr(atomic, "file_sha256", lambda path: read.append(path.name) or file_sha256(path))
    assert weights_fingerprint(str(tiny_folder)) == weights_fingerprint(str(tiny_folder))
    assert sorted(read) == ["config.json"] * 2 + ["model.safetensors"] * 2


def test_fingerprint_survives_a_cache_that_cannot_be_written(tiny_folder, tmp_path, monkeypatch):
    first = weights_fingerprint(str(tiny_folder))
    (tmp_path / "file").write_text("a file where a folder is wanted")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert weights_fingerprint(str(tiny_folder)) == first


def test_the_mask_token_comes_from_config_or_tokenizer_or_is_asked_for(tiny_model):
    class Tokenizer:
        def get_vocab(self):
            return {"<|mdm_mask|>": 7}

    model = tiny_model()
    assert mask_token_id(model) == 59
    model.config.mask_token_id = None
    assert mask_token_id(model, Tokenizer()) == 7
    for value in (None, 60):
        model.config.mask_token_id = value
        with pytest.raises(UserError, match=f"the mask token id is {value}"):
            mask_token_id(model)


def test_a_tokenizer_needs_no_weights(tmp_path):
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    atomic.write_json(tmp_path / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
    assert load_tokenizer(str(tmp_path)).convert_tokens_to_ids("b") == 1


def test_a_folder_without_tokenizer_says_so(tiny_folder):
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        load_tokenizer(str(tiny_folder))
