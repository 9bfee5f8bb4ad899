"""The model on random weights: packing, padding, dtypes, shapes that differ from the published ones."""

import math

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from laddpo.errors import UserError
from laddpo.models.llada import LLaDAConfig, LLaDAModelLM
from laddpo.models.tokenwise import rotate

LENGTHS = [5, 9, 5, 1, 9, 7]


def alone(model, ids, lengths):
    """Logits of each sequence run by itself, laid end to end. # [T, V]"""
    return torch.cat([model(input_ids=part[None]).logits[0] for part in ids.split(lengths)])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("how", ["lengths", "position_ids"])
def test_packed_sequences_equal_each_sequence_alone(tiny_model, packed_input, attention, how):
    model = tiny_model(dtype=torch.float64)
    model.set_attn_implementation(attention)
    ids, positions = packed_input(LENGTHS)
    where = {"lengths": LENGTHS} if how == "lengths" else {"position_ids": positions[None]}
    with torch.no_grad():
        torch.testing.assert_close(
            model(input_ids=ids[None], **where).logits[0], alone(model, ids, LENGTHS), atol=1e-12, rtol=0
        )


def test_one_row_of_restarting_position_ids_serves_every_row(tiny_model, random_ids):
    model, ids = tiny_model(), random_ids(2, 6)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1]])
    with torch.no_grad():
        logits = model(input_ids=ids, position_ids=positions).logits
        alone = [model(input_ids=ids[:, part]).logits for part in (slice(0, 4), slice(4, 6))]
    torch.testing.assert_close(logits, torch.cat(alone, dim=1), atol=1e-5, rtol=0)


def test_packing_in_several_rows_is_recognised_by_position_ids(tiny_model, packed_input):
    model = tiny_model(dtype=torch.float64)
    ids, positions = packed_input([4, 8, 6, 6])
    with torch.no_grad():
        logits = model(input_ids=ids.view(2, 12), position_ids=positions.view(2, 12)).logits
        torch.testing.assert_close(logits.flatten(0, 1), alone(model, ids, [4, 8, 6, 6]), atol=1e-12, rtol=0)


def test_packing_beside_padding_equals_each_sequence_alone(tiny_model, packed_input):
    model = tiny_model(dtype=torch.float64)
    ids, positions = packed_input([4, 6])
    padded = torch.cat([ids, torch.tensor([58, 58])])[None]
    positions = torch.cat([positions, torch.arange(2)])[None]
    mask = torch.tensor([[1] * 10 + [0] * 2])
    with torch.no_grad():
        logits = model(input_ids=padded, position_ids=positions, attention_mask=mask).logits[0, :10]
        torch.testing.assert_close(logits, alone(model, ids, [4, 6]), atol=1e-12, rtol=0)


def test_flash_attention_refuses_packing_together_with_a_mask(tiny_model, packed_input):
    model = tiny_model()
    model.config._attn_implementation_internal = "flash_attention_2"
    ids, positions = packed_input([4, 6])
    with pytest.raises(UserError, match="leave the mask out"):
        model(input_ids=ids[None], position_ids=positions[None], attention_mask=torch.ones(1, 10, dtype=torch.long))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing_for_the_real_tokens(tiny_model, random_ids, attention, side):
    model = tiny_model(dtype=torch.float64)
    model.set_attn_implementation(attention)
    ids, pads = random_ids(1, 7), torch.full((1, 4), 58)
    real, no = torch.ones_like(ids), torch.zeros_like(pads)
    padded, mask = ((pads, ids), (no, real)) if side == "left" else ((ids, pads), (real, no))
    padded, mask = torch.cat(padded, 1), torch.cat(mask, 1)
    with torch.no_grad():
        logits = model(input_ids=padded, attention_mask=mask).logits[mask.bool()]
        # left padding shifts all positions: rotary attention sees only differences, to the rounding of its angles
        torch.testing.assert_close(logits, model(input_ids=ids).logits[0], atol=1e-6, rtol=0)
        assert (model(input_ids=padded).logits[mask.bool()] - logits).abs().max() > 1e-3


def test_later_tokens_are_seen_by_earlier_ones(tiny_model, random_ids):
    model, ids = tiny_model(), random_ids(1, 8)
    changed = ids.clone()
    changed[0, -1] = (ids[0, -1] + 1) % 58
    with torch.no_grad():
        assert (model(input_ids=ids).logits[0, 0] - model(input_ids=changed).logits[0, 0]).abs().max() > 1e-4


def test_hidden_states_of_packed_input_come_back_in_the_order_given(tiny_model, packed_input):
    model = tiny_model(dtype=torch.float64)
    ids, positions = packed_input(LENGTHS)
    with torch.no_grad():
        packed = model.packed_hidden_states(ids, positions, LENGTHS)
        states = model(input_ids=ids[None], lengths=LENGTHS, output_hidden_states=True).hidden_states
        single = torch.cat([model.packed_hidden_states(p, torch.arange(len(p)), [len(p)]) for p in ids.split(LENGTHS)])
    torch.testing.assert_close(packed, single, atol=1e-12, rtol=0)
    torch.testing.assert_close(states[-1][0], single, atol=1e-12, rtol=0)
    assert torch.equal(states[0][0], model.get_input_embeddings()(ids)), "the embedding output, unsorted"


def test_rows_pick_the_logits_of_those_positions(tiny_model, packed_input):
    model = tiny_model(dtype=torch.float64)
    ids, positions = packed_input(LENGTHS)
    rows = torch.tensor([0, 6, 7, 20, 35])
    with torch.no_grad():
        full = model(input_ids=ids[None], position_ids=positions[None]).logits[0]
        picked = model(input_ids=ids[None], lengths=LENGTHS, rows=rows).logits
    torch.testing.assert_close(picked, full[rows], atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_token_logps_have_the_wide_dtype_and_the_values_of_a_log_softmax(tiny_model, packed_input, dtype):
    model = tiny_model(dtype=dtype)
    ids, positions = packed_input(LENGTHS)
    rows, targets = torch.tensor([0, 6, 20]), torch.tensor([3, 57, 11])
    with torch.no_grad():
        logps = model(input_ids=ids[None], position_ids=positions[None], rows=rows, targets=targets).token_logps
        logits = model(input_ids=ids[None], position_ids=positions[None]).logits[0, rows]
    wide = torch.promote_types(dtype, torch.float32)
    assert logps.dtype == wide
    expected = logits.to(wide).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(logps, expected, atol={torch.bfloat16: 5e-2}.get(dtype, 1e-5), rtol=0)


def test_gradients_of_a_float64_model_agree_with_finite_differences(tiny_model, packed_input):
    model = tiny_model(dtype=torch.float64)
    ids, positions = packed_input([5, 3, 5])
    rows, targets = torch.tensor([1, 4, 6, 12]), torch.tensor([3, 57, 11, 0])
    weights = torch.tensor([0.5, -1.0, 2.0, 0.25], dtype=torch.float64)

    def value() -> torch.Tensor:
        output = model(input_ids=ids[None], position_ids=positions[None], lengths=[5, 3, 5], rows=rows, targets=targets)
        return (output.token_logps * weights).sum()

    value().backward()
    step = 1e-6
    for name, parameter in model.named_parameters():
        where = parameter.grad.abs().argmax()
        with torch.no_grad():
            flat = parameter.view(-1)
            flat[where] += step
            above = value()
            flat[where] -= 2 * step
            below = value()
            flat[where] += step
        slope = (above - below) / (2 * step)
        assert slope == pytest.approx(parameter.grad.view(-1)[where].item(), rel=1e-6), name


def test_fewer_key_value_heads_equal_full_heads_with_repeated_weights(tiny_model, packed_input):
    few = tiny_model(n_kv_heads=2, dtype=torch.float64)
    many = tiny_model(dtype=torch.float64)
    state = few.state_dict()
    for name, tensor in state.items():
        if "k_proj" in name or "v_proj" in name:
            state[name] = tensor.unflatten(0, (2, 8)).repeat_interleave(2, dim=0).flatten(0, 1)
    many.load_state_dict(state)
    ids, positions = packed_input([6, 6, 4])
    for attention in ("sdpa", "eager"):
        few.set_attn_implementation(attention)
        with torch.no_grad():
            a, b = (m(input_ids=ids[None], position_ids=positions[None]).logits for m in (few, many))
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_an_embedding_larger_than_the_vocabulary_gives_that_many_logits(tiny_model, random_ids):
    model = tiny_model(embedding_size=64)
    assert model(input_ids=random_ids(1, 3)).logits.shape == (1, 3, 64)
    assert model.get_output_embeddings().out_features == model.get_input_embeddings().num_embeddings == 64


def test_resizing_keeps_vocabulary_and_embedding_size_together(tiny_model):
    model = tiny_model()
    model.resize_token_embeddings(70, mean_resizing=False)
    assert model.config.vocab_size == model.config.embedding_size == 70
    assert model.get_output_embeddings().weight.shape == (70, 32)
    again = LLaDAModelLM(LLaDAConfig.from_dict(model.config.to_dict()))
    again.load_state_dict(model.state_dict())


def test_norm_epsilon_and_rope_base_are_those_of_the_config(tiny_model, random_ids):
    ids = random_ids(1, 12)
    with torch.no_grad():
        plain, eps, theta = (
            tiny_model(**fields)(input_ids=ids).logits for fields in ({}, {"rms_norm_eps": 1e-2}, {"rope_theta": 100.0})
        )
    assert (plain - eps).abs().max() > 1e-4
    assert (plain - theta).abs().max() > 1e-4


def test_rotation_by_hand():
    # head_dim 2: one pair (x0, x1), turned by angle a: (x0 cos a - x1 sin a, x1 cos a + x0 sin a)
    a = torch.tensor([[0.0, math.pi / 2, math.pi]])[..., None, None].view(1, 3, 1, 1)
    turned = rotate(torch.tensor([[[[3.0, 1.0]]] * 3]).view(1, 3, 1, 2), a.cos(), a.sin())
    expected = torch.tensor([[3.0, 1.0], [-1.0, 3.0], [-3.0, -1.0]])
    torch.testing.assert_close(turned[0, :, 0], expected, atol=1e-6, rtol=0)


def test_rotary_angles_stay_float32_in_a_bfloat16_model(tiny_model):
    positions = torch.tensor([[0, 1, 1023]])
    narrow, wide = (tiny_model(dtype=d).rotation(positions, d) for d in (torch.bfloat16, torch.float32))
    assert torch.equal(narrow[0], wide[0])
    assert narrow[0].dtype == torch.float32


DEAD = [
    ("alibi", True),
    ("block_group_size", 4),
    ("include_bias", True),
    ("layer_norm_type", "default"),
    ("attention_dropout", 0.1),
    ("weight_tying", True),
    ("rope", False),
    ("clip_qkv", 8.0),
    ("activation_type", "gelu"),
]


@pytest.mark.parametrize(("field", "value"), DEAD)
def test_an_option_that_is_not_computed_is_refused_by_name(tiny_model, field, value):
    with pytest.raises(UserError, match=f"{field} is {value!r}.*supports only"):
        tiny_model(**{field: value})


def test_all_refused_options_are_reported_together(tiny_model):
    with pytest.raises(UserError) as caught:
        tiny_model(alibi=True, n_heads=5, n_kv_heads=2, embedding_size=10)
    assert len(caught.value.problems) == 4


def test_config_fills_what_the_hub_leaves_out_and_keeps_what_it_does_not_know():
    config = LLaDAConfig.from_dict(
        {"d_model": 64, "n_heads": 4, "n_kv_heads": None, "mlp_ratio": 3, "vocab_size": 9, "precision": "amp_bf16"}
        | {"init_device": "cuda", "model_type": "llada"}
    )
    assert (config.n_kv_heads, config.mlp_hidden_size, config.embedding_size) == (4, 192, 9)
    assert (config.hidden_size, config.num_attention_heads, config.num_key_value_heads) == (64, 4, 4)
    content = config.to_dict()
    assert content["precision"] == "amp_bf16"
    assert content["rope_theta"] == 500000.0, "flat, as the hub spells it"
    assert "init_device" not in content


def test_auto_classes_find_our_model(tiny_folder):
    assert isinstance(AutoConfig.from_pretrained(tiny_folder), LLaDAConfig)
    for auto in (AutoModel, AutoModelForCausalLM):
        assert type(auto.from_pretrained(tiny_folder)) is LLaDAModelLM


def test_remote_code_named_in_a_checkpoint_is_never_looked_for(tiny_folder):
    from laddpo.models.loading import load_model
    from laddpo.storage import atomic

    config = atomic.read_json(tiny_folder / "config.json")
    atomic.write_json(tiny_folder / "config.json", {**config, "auto_map": {"AutoModel": "modeling_llada.LLaDAModelLM"}})
    assert type(AutoModel.from_pretrained(tiny_folder)) is LLaDAModelLM
    assert type(load_model(str(tiny_folder))) is LLaDAModelLM


def test_initial_weights_shrink_with_fan_in_and_depth(tiny_model):
    model = tiny_model(d_model=128, mlp_hidden_size=256, n_layers=3, vocab_size=300)
    blocks = model.model["transformer"]["blocks"]
    # a normal cut off at 3 standard deviations keeps 0.9866 of its spread
    assert blocks[0].q_proj.weight.std().item() == pytest.approx(0.9866 * 128**-0.5, rel=0.03)
    assert blocks[2].ff_out.weight.std().item() == pytest.approx(0.9866 * (256 * 2 * 3) ** -0.5, rel=0.03)
    assert torch.equal(blocks[1].ff_norm.weight, torch.ones(128))


def test_a_new_model_is_a_function_of_its_seed_and_leaves_global_randomness_alone(tiny_model):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    a, b, c = tiny_model(seed=1), tiny_model(seed=1), tiny_model(seed=2)
    assert torch.equal(torch.get_rng_state(), before)
    pairs = list(zip(a.parameters(), b.parameters(), c.parameters(), strict=True))
    assert all(torch.equal(x, y) for x, y, _ in pairs)
    assert not all(torch.equal(x, z) for x, _, z in pairs)


def test_inputs_embeds_stand_for_input_ids(tiny_model, random_ids):
    model, ids = tiny_model(), random_ids(1, 5)
    with torch.no_grad():
        assert torch.equal(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, model(input_ids=ids).logits)
    with pytest.raises(ValueError, match="exactly one"):
        model()


def test_return_dict_false_gives_a_tuple(tiny_model, random_ids):
    (logits,) = tiny_model()(input_ids=random_ids(1, 5), return_dict=False)
    assert logits.shape == (1, 5, 60)
