"""Experts at once and one by one, in full and in 4 bits, with and without adapters; the choice of experts by hand."""

import copy

import pytest
import torch
from safetensors.torch import save_file

from laddpo.models.adapters import adapter_disabled, attach_lora, trainable_parameters
from laddpo.models.experts import Experts
from laddpo.models.llada2 import GroupedRouter
from laddpo.models.llada2_config import LLaDA2MoeConfig
from laddpo.models.loading import load_model, new_config, new_model, save_model

SHAPES = {
    "LLaDA2MoeModelLM": {"n_experts": 16, "experts_chosen": 4, "dense_layers": 1, "dense_mlp_size": 96,
                         "shared_experts": 1, "mlp_hidden_size": 128},
    "LLaDAMoEModelLM": {"n_experts": 8, "experts_chosen": 2, "mlp_hidden_size": 128},
}  # fmt: skip
SIZES = {"d_model": 128, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 160, "max_sequence_length": 64}
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
IDS = torch.arange(30, 72)[None]


def made(architecture: str = "LLaDA2MoeModelLM", **sizes):
    shape = {**SIZES, **SHAPES[architecture], **sizes}
    config = new_config(architecture, shape, mask_token_id=150, initializer_range=0.1)
    model = new_model(config, 0, architecture)
    for module in model.modules():
        if isinstance(module, GroupedRouter):
            module.expert_bias.copy_(torch.linspace(-0.2, 0.2, len(module.expert_bias)))
    return model


@pytest.fixture
def ways(monkeypatch):
    """How often experts ran one by one; set `only` to have them run so."""
    found = {"one by one": 0, "only": False}
    plain, products = Experts.run_one_by_one, Experts._products

    def count(self, *args):
        found["one by one"] += 1
        return plain(self, *args)

    monkeypatch.setattr(Experts, "run_one_by_one", count)
    monkeypatch.setattr(Experts, "_products", lambda self, dtype: None if found["only"] else products(self, dtype))
    return found


def values_and_slopes(model):
    model.zero_grad()
    logps = model(IDS, rows=torch.arange(5, 30), targets=IDS[0, 5:30]).token_logps
    if trainable_parameters(model):
        logps.sum().backward()
    slopes = {name: p.grad.clone() for name, p in trainable_parameters(model).items() if p.grad is not None}
    return logps.detach(), slopes


def both_ways(model, ways):
    """Values and slopes at once, and one by one; the first without a single expert alone."""
    ways["only"], ways["one by one"] = False, 0
    at_once = values_and_slopes(model)
    assert ways["one by one"] == 0
    ways["only"] = True
    return at_once, values_and_slopes(model)


@pytest.mark.parametrize("architecture", SHAPES)
@pytest.mark.parametrize("storage", [None, NF4, {**NF4, "bnb_4bit_use_double_quant": True}], ids=str)
def test_experts_at_once_are_experts_one_by_one(architecture, storage, ways, tmp_path):
    model = made(architecture)
    if storage:
        save_model(model, tmp_path)
        model = load_model(str(tmp_path), quantization=storage)
    model.requires_grad_(False)
    attach_lora(model, r=8, seed=1)
    for name, parameter in trainable_parameters(model).items():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(len(name)))
    (values, slopes), (wanted, wanted_slopes) = both_ways(model, ways)
    torch.testing.assert_close(values, wanted, atol=1e-6 * float(wanted.abs().max()), rtol=0)
    assert slopes.keys() == wanted_slopes.keys() == trainable_parameters(model).keys()
    for name, wanted_slope in wanted_slopes.items():
        scale = max(1.0, float(wanted_slope.abs().max()))
        torch.testing.assert_close(slopes[name], wanted_slope, atol=1e-5 * scale, rtol=0, msg=name)
    with torch.no_grad(), adapter_disabled(model):
        (base, _), (wanted_base, _) = both_ways(model, ways)
    torch.testing.assert_close(base, wanted_base, atol=1e-6 * float(wanted_base.abs().max()), rtol=0)
    assert (base - values).abs().max() > 1e-3


def test_a_copied_moved_or_partly_adapted_model_is_read_as_it_is(ways):
    """What was found of the weights must not outlive a change of them."""
    model = made().requires_grad_(False)
    before, _ = values_and_slopes(model)
    twin = copy.deepcopy(model)
    for expert in twin.model["layers"][1].mlp.experts:
        expert.down_proj.weight.data.mul_(-3.0)
    changed, _ = values_and_slopes(twin)
    assert ways["one by one"] == 1  # a copy's weights lie apart, until they are moved or cast
    assert torch.equal(values_and_slopes(model)[0], before)
    narrow = values_and_slopes(twin.to(torch.bfloat16))[0]
    assert 0 < (narrow - changed).abs().mean() < 0.1 < (changed - before).abs().mean()
    assert ways["one by one"] == 1
    attach_lora(model, r=8, target_modules=r"experts\.3\.gate_proj")
    model.get_submodule("model.layers.1.mlp.experts.3.gate_proj").lora_B["default"].weight.data.fill_(0.1)
    assert (values_and_slopes(model)[0] - before).abs().max() > 1e-4
    assert ways["one by one"] == 2


@pytest.mark.parametrize("why", ["trained weights", "float64", "DoRA"])
def test_experts_that_no_grouped_product_serves_run_one_by_one(why, ways):
    model = made().requires_grad_(why == "trained weights")
    if why == "float64":
        model = model.to(torch.float64)
    if why == "DoRA":
        attach_lora(model, r=8, use_dora=True)
    values, slopes = values_and_slopes(model)
    assert ways["one by one"] == 1 and values.isfinite().all()
    assert (why == "trained weights") == any(".gate.weight" in name for name in slopes)


def test_4_bit_experts_do_not_depend_on_what_the_processor_could_do(tmp_path):
    """bitsandbytes has another product in evaluation where there is AVX-512 BF16, which fails on some widths."""
    from bitsandbytes.nn import Linear4bit

    save_model(made(d_model=80, mlp_hidden_size=48), tmp_path)
    found = []
    for has_it in (False, True):
        model = load_model(str(tmp_path), quantization=NF4)
        for module in model.modules():
            if isinstance(module, Linear4bit):
                module.support_avx512bf16_for_cpu = has_it
        with torch.no_grad():
            found.append(model.eval()(IDS).logits)
    assert torch.equal(*found)


@pytest.mark.parametrize("layout", ["gate_up_proj", "gate_proj"])
def test_stacked_checkpoints_are_read(layout, tmp_path):
    """As transformers 5 writes experts, and as the public training code of LLaDA2 does."""
    model = made()
    save_model(model, tmp_path / "one by one")
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    place = "model.layers.1.mlp.experts"
    gate, up, down = (
        torch.stack([tensors.pop(f"{place}.{expert}.{part}_proj.weight") for expert in range(16)])
        for part in ("gate", "up", "down")
    )
    together = {f"{place}.gate_up_proj": torch.cat([gate, up], 1)}
    apart = {f"{place}.gate_proj": gate, f"{place}.up_proj": up}
    stacked = together if layout == "gate_up_proj" else apart
    (tmp_path / "stacked").mkdir()
    (tmp_path / "stacked" / "config.json").write_bytes((tmp_path / "one by one" / "config.json").read_bytes())
    save_file({**tensors, **stacked, f"{place}.down_proj": down}, tmp_path / "stacked" / "model.safetensors")
    for storage in (None, NF4):
        found, wanted = (
            load_model(str(tmp_path / name), quantization=storage).state_dict() for name in ("stacked", "one by one")
        )
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_the_router_chooses_the_best_of_the_best_groups_by_hand():
    """Two of four groups by the sum of their two best biased scores; weights from unbiased scores, times 2.5."""
    sizes = {"hidden_size": 8, "num_experts": 8, "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2}
    router = GroupedRouter(LLaDA2MoeConfig(**sizes))
    router.weight.data.copy_(torch.eye(8))
    router.expert_bias.copy_(torch.tensor([0.0, 0.0, 0.9, 0.0, 0.0, 0.0, 0.0, 0.0]))
    logits = torch.tensor([[2.0, -9.0, -1.0, 0.0, 1.0, 0.5, 1.0, -9.0]])
    # sigmoid: .881 0 | .269 .5 | .731 .622 | .731 0; groups with the bias: .881, 1.669, 1.353, .731
    weights, chosen = router(logits)
    assert chosen.tolist() == [[2, 4, 5]]  # 1.169, .731, .622; the best expert of all is in a group left out
    scores = logits[0, [2, 4, 5]].sigmoid()
    torch.testing.assert_close(weights[0], 2.5 * scores / scores.sum())


def test_the_router_is_float32_in_a_bfloat16_model_and_under_autocast(tmp_path):
    wide = made()
    save_model(wide, tmp_path)
    model = load_model(str(tmp_path), dtype="bf16")
    router, wanted = (m.model["layers"][1].mlp.gate for m in (model, wide))
    assert router.weight.dtype == router.expert_bias.dtype == torch.float32
    assert torch.equal(router.weight, wanted.weight) and torch.equal(router.expert_bias, wanted.expert_bias)
    assert model.model["layers"][1].mlp.experts[0].up_proj.weight.dtype == torch.bfloat16
    x = torch.randn(6, 128, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        weights, chosen = router(x)
    assert weights.dtype == torch.float32
    torch.testing.assert_close((weights, chosen), wanted(x), atol=1e-6, rtol=0)
