"""How a network attends: what the family, config.json and the settings say; that it is saved, and pinned."""

import json

import pytest
import torch

from laddpo.errors import UserError
from laddpo.inputs import pins
from laddpo.models.block_length import setting_problems
from laddpo.models.loading import keep_original_fields, load_model, save_model
from laddpo.settings.compose import compose
from tests.tiny import write_tiny_model

SIZES = {"d_model": 16, "n_layers": 1, "n_heads": 2, "n_kv_heads": 2, "mlp_hidden_size": 16, "vocab_size": 279,
         "max_sequence_length": 64}  # fmt: skip
IDS = torch.arange(3, 15)[None]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {name: write_tiny_model(folder / name, SIZES, name) for name in ("A2DQwen2LMHeadModel", "SDARForCausalLM")}


@pytest.mark.parametrize(
    ("architecture", "attention", "length", "named"),
    [
        ("LLaDAModelLM", "block", None, "model.attention is 'block'"),
        ("DreamModel", None, 8, "model.block_length is 8"),
        ("LLaDA2MoeModelLM", "bidirectional", None, "model.attention is 'bidirectional'"),
        ("A2DQwen3LMHeadModel", "bidirectional", 8, "model.block_length is 8"),
        *[("LLaDAModelLM", "bidirectional", None, None), ("SDARForCausalLM", "block", 8, None)],
        ("A2DQwen3LMHeadModel", "block", 8, None),
    ],
)
def test_settings_that_a_family_cannot_follow_are_refused(architecture, attention, length, named):
    problems = list(setting_problems(architecture, attention, length))
    assert len(problems) == (named is not None) and all(text.startswith(named) for text in problems)


@pytest.mark.parametrize("setting", ["model.block_length=8", "model.block_length=0", "model.attention=causal"])
def test_the_check_of_all_settings_asks_too(setting):
    with pytest.raises(UserError, match=setting.split("=")[0]):
        compose([setting])


def test_a_setting_overrides_config_json_and_is_saved_with_the_weights(checkpoints, tmp_path):
    sdar, a2d = checkpoints["SDARForCausalLM"], checkpoints["A2DQwen2LMHeadModel"]
    assert load_model(str(sdar)).block_length == 4
    model = load_model(str(sdar), block_length=8)
    save_model(model, tmp_path / "sdar")
    keep_original_fields(tmp_path / "sdar", sdar)
    assert json.loads((tmp_path / "sdar" / "config.json").read_text())["block_size"] == 8
    assert load_model(str(tmp_path / "sdar")).block_length == 8

    assert load_model(str(a2d)).block_length is None
    block = load_model(str(a2d), attends="block", block_length=8)
    save_model(block, tmp_path / "block")
    keep_original_fields(tmp_path / "block", a2d)
    again = load_model(str(tmp_path / "block"))
    assert again.block_length == 8
    assert load_model(str(tmp_path / "block"), block_length=4).block_length == 4
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, block(IDS).logits)
        assert not torch.allclose(again(IDS).logits, load_model(str(a2d))(IDS).logits)

    both_ways = load_model(str(tmp_path / "block"), attends="bidirectional")
    save_model(both_ways, tmp_path / "plain")
    keep_original_fields(tmp_path / "plain", tmp_path / "block")
    assert load_model(str(tmp_path / "plain")).block_length is None


@pytest.mark.parametrize(
    ("settings", "cure"),
    [({"attends": "block"}, "Set model.block_length"), ({"block_length": 8}, "expected model.attention=block")],
)
def test_half_a_setting_is_refused_where_config_json_does_not_have_the_other_half(checkpoints, settings, cure):
    with pytest.raises(UserError, match=cure):
        load_model(str(checkpoints["A2DQwen2LMHeadModel"]), **settings)


def test_the_length_of_blocks_is_pinned_where_there_may_be_blocks(checkpoints, tmp_path):
    def made(architecture: str, *settings: str) -> dict:
        place = [f"model.architecture={architecture}", f"model.model_name_or_path={checkpoints[architecture]}"]
        return pins.make(compose([*place, *settings]))

    assert "block_length" not in pins.make(compose([]))  # keys of bidirectional families stay as they are
    plain = made("A2DQwen2LMHeadModel")
    assert plain["block_length"] == "none"
    assert made("SDARForCausalLM")["block_length"] == 4
    block = made("A2DQwen2LMHeadModel", "model.attention=block", "model.block_length=8")
    assert block == {**plain, "block_length": 8}
    with pytest.raises(UserError, match=r"the length of the blocks of attention changed.*stored none, now 8"):
        pins.require_same(tmp_path, plain, block, compose([]))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["model=llada_nano", "dpo.estimator=exact"], "the model is bidirectional"),
        (["model=sdar_4b", "dpo.estimator=exact", "dpo.difference_focus=0"], "set dpo.diffusion_samples=15"),
        (["model=sdar_4b", "hardware.attention=flash_attention_2"], "use hardware.attention=auto or sdpa or eager"),
    ],
)
def test_what_asks_for_blocks_or_cannot_do_them_is_refused(settings, said):
    with pytest.raises(UserError, match=said):
        compose(settings)


def test_a_folder_is_known_by_the_blocks_that_its_config_states(tmp_path):
    from laddpo.cli.shorthand import of_model

    sizes = {**SIZES, "head_dim": 8}
    plain = of_model(str(write_tiny_model(tmp_path / "plain", sizes, "A2DQwen3LMHeadModel")))
    assert not [line for line in plain if "block" in line]
    stated = tmp_path / "plain" / "config.json"
    stated.write_text(json.dumps({**json.loads(stated.read_text()), "block_length": 8}))
    assert {"model.attention=block", "model.block_length=8"} <= set(of_model(str(tmp_path / "plain")))
