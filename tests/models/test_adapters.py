"""LoRA: on the blocks and nowhere else, in PEFT's files, random by seed."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from laddpo.errors import UserError
from laddpo.models.adapters import (
    adapter_disabled,
    adapter_identity,
    adapter_state,
    attach_lora,
    has_adapter,
    load_adapter,
    merge_adapter,
    save_adapter,
    trainable_parameters,
)
from laddpo.storage import atomic

PARTS = ["q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out"]


def scramble(model, seed=7):
    """Give the adapter weights that matter (a fresh one is a no-op: lora_B is zero)."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in adapter_state(model).values():
            tensor.copy_(torch.randn(tensor.shape, generator=g) * 0.1 + (tensor.abs() if tensor.dim() == 1 else 0))
    return model


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


def test_all_linear_matches_every_linear_of_the_blocks_and_not_the_head(tiny_model):
    model = tiny_model()
    matched = attach_lora(model, r=2)
    assert matched == [f"model.transformer.blocks.{i}.{part}" for i in range(2) for part in PARTS]
    assert type(model.get_output_embeddings()) is torch.nn.Linear


def test_ff_out_means_the_down_projections_and_never_the_head(tiny_model):
    model = tiny_model()
    assert attach_lora(model, r=2, target_modules=["ff_out"]) == [
        "model.transformer.blocks.0.ff_out",
        "model.transformer.blocks.1.ff_out",
    ]
    assert type(model.get_output_embeddings()) is torch.nn.Linear
    assert attach_lora(tiny_model(), r=2, target_modules="ff_out") == [
        f"model.transformer.blocks.{i}.ff_out" for i in (0, 1)
    ]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (["q_proj|k_proj"], ["0.q_proj", "0.k_proj", "1.q_proj", "1.k_proj"]),
        (r"blocks\.1\.ff_.*", ["1.ff_proj", "1.ff_out"]),
        ([r"blocks\.0\.q_proj", "ff_out"], ["0.q_proj", "0.ff_out", "1.ff_out"]),
        (".*", [f"{i}.{part}" for i in range(2) for part in PARTS]),
    ],
)
def test_targets_are_regular_expressions_looked_for_inside_the_blocks(tiny_model, tmp_path, pattern, expected):
    model = tiny_model()
    names = [f"model.transformer.blocks.{name}" for name in expected]
    assert attach_lora(model, r=2, target_modules=pattern) == names
    save_adapter(model, tmp_path)
    assert attach_lora(tiny_model(), path=str(tmp_path)) == names


@pytest.mark.parametrize("wrong", [["q_prj"], ["wte"], [], [r"transformer\.ff_out"], ["ln_f"]])
def test_a_target_outside_the_blocks_is_refused(tiny_model, wrong):
    with pytest.raises(UserError, match=r"adapter\.target_modules.*known: all-linear, attn_out"):
        attach_lora(tiny_model(), target_modules=wrong)


def test_a_misspelt_target_is_answered_with_the_nearest(tiny_model):
    with pytest.raises(UserError, match="did you mean q_proj"):
        attach_lora(tiny_model(), target_modules=["q_prj"])


def test_only_the_adapter_is_trainable(tiny_model):
    model = tiny_model()
    attach_lora(model, r=2)
    names = trainable_parameters(model)
    assert len(names) == 2 * 7 * 2
    assert all(".lora_A." in name or ".lora_B." in name for name in names)


def test_a_fresh_adapter_changes_no_logit(tiny_model, random_ids):
    model, ids = tiny_model(), random_ids(2, 6)
    before = logits(model, ids)
    attach_lora(model, r=2)
    assert torch.equal(logits(model, ids), before)


def test_weights_come_from_the_seed_and_global_randomness_stays(tiny_model):
    def states(seed):
        model = tiny_model()
        attach_lora(model, r=2, seed=seed)
        return torch.cat([t.detach().flatten() for t in adapter_state(model).values()])

    torch.manual_seed(0)
    before = torch.get_rng_state()
    first, same, other = states(1), states(1), states(2)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_disabling_the_adapter_gives_the_base_model_and_back(tiny_model, random_ids):
    model, ids = tiny_model(), random_ids(2, 6)
    base = logits(model, ids)
    attach_lora(model, r=2)
    tuned = logits(scramble(model), ids)
    trainable = list(trainable_parameters(model))
    with adapter_disabled(model):
        assert torch.equal(logits(model, ids), base)
    assert torch.equal(logits(model, ids), tuned)
    assert (tuned - base).abs().max() > 1e-3
    assert list(trainable_parameters(model)) == trainable
    model.requires_grad_(False)
    with adapter_disabled(model):
        pass
    assert not trainable_parameters(model), "a frozen adapter stays frozen"


@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True}, {"use_dora": True}, {"target_modules": ["ff_out", "q_proj"]}]
)
def test_a_saved_adapter_loads_again_on_a_fresh_base(tiny_model, random_ids, tmp_path, options):
    model, ids = tiny_model(), random_ids(2, 6)
    attach_lora(model, r=3, alpha=5, **options)
    tuned = logits(scramble(model), ids)
    save_adapter(model, tmp_path)
    again = tiny_model()
    matched = attach_lora(again, r=99, path=str(tmp_path))
    assert len(matched) == (4 if "target_modules" in options else 14)
    assert torch.equal(logits(again, ids), tuned)
    assert set(trainable_parameters(again)) == set(trainable_parameters(model))


@pytest.mark.parametrize("use_dora", [False, True])
def test_our_adapter_is_read_by_peft_with_the_same_logits(tiny_model, random_ids, tmp_path, use_dora):
    from peft import PeftModel

    model, ids = tiny_model(), random_ids(2, 6)
    attach_lora(model, r=3, use_dora=use_dora)
    tuned = logits(scramble(model), ids)
    save_adapter(model, tmp_path)
    keys = load_file(tmp_path / "adapter_model.safetensors").keys()
    assert "base_model.model.model.transformer.blocks.0.ff_out.lora_A.weight" in keys
    theirs = PeftModel.from_pretrained(tiny_model(), str(tmp_path))
    torch.testing.assert_close(logits(theirs, ids), tuned, atol=2e-5, rtol=0)


def test_an_adapter_made_by_peft_is_read_by_us(tiny_model, random_ids, tmp_path):
    from peft import LoraConfig, get_peft_model

    ids = random_ids(2, 6)
    torch.manual_seed(0)
    config = LoraConfig(r=3, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    theirs = get_peft_model(tiny_model(), config)
    theirs.save_pretrained(str(tmp_path))
    model = tiny_model()
    assert len(attach_lora(model, path=str(tmp_path))) == 4
    torch.testing.assert_close(logits(model, ids), logits(theirs, ids), atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
        {"target_modules": r".*blocks.*\.(q_proj|up_proj)", "exclude_modules": r".*blocks\.0\..*"},
    ],
)
def test_an_adapter_on_some_layers_alone_is_read(tiny_model, random_ids, tmp_path, options):
    from peft import LoraConfig, get_peft_model

    ids = random_ids(2, 6)
    torch.manual_seed(0)
    theirs = get_peft_model(tiny_model(), LoraConfig(r=3, init_lora_weights=False, **options))
    theirs.save_pretrained(str(tmp_path / "theirs"))
    model = tiny_model()
    expected = [f"model.transformer.blocks.1.{part}" for part in ("q_proj", "up_proj")]
    assert attach_lora(model, path=str(tmp_path / "theirs")) == expected
    torch.testing.assert_close(logits(model, ids), logits(theirs, ids), atol=2e-5, rtol=0)
    save_adapter(model, tmp_path / "ours")
    assert attach_lora(tiny_model(), path=str(tmp_path / "ours")) == expected


def test_the_identity_of_an_adapter_is_its_matrices_and_their_scale(tiny_model, tmp_path):
    model = tiny_model()
    attach_lora(model, r=2, alpha=4)
    save_adapter(model, tmp_path)
    first = adapter_identity(tmp_path)
    settings = atomic.read_json(tmp_path / "adapter_config.json")
    atomic.write_json(tmp_path / "adapter_config.json", {**settings, "base_model_name_or_path": "elsewhere"})
    assert adapter_identity(tmp_path) == first
    for change in ({"lora_alpha": 40}, {"use_rslora": True}, {"alpha_pattern": {"q_proj": 1}}):
        atomic.write_json(tmp_path / "adapter_config.json", {**settings, **change})
        assert adapter_identity(tmp_path) != first


def test_adapter_files_are_the_same_bytes_for_the_same_weights(tiny_model, tmp_path):
    model = tiny_model()
    attach_lora(model, r=2)
    for name in ("a", "b"):
        save_adapter(model, tmp_path / name)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_an_adapter_of_another_model_is_refused(tiny_model, tmp_path):
    small = tiny_model()
    attach_lora(small, r=2)
    save_adapter(small, tmp_path)
    with pytest.raises(UserError, match="have another shape") as caught:
        attach_lora(tiny_model(d_model=64), path=str(tmp_path))
    assert "start without adapter.path" in str(caught.value)
    with pytest.raises(UserError, match="adapter tensors are missing"):
        attach_lora(tiny_model(n_layers=3), path=str(tmp_path))
    with pytest.raises(UserError, match="match no module"):
        attach_lora(tiny_model(n_layers=1), path=str(tmp_path))


def test_a_folder_without_adapter_is_refused(tiny_model, tmp_path):
    with pytest.raises(UserError, match=r"adapter_config\.json: no such file"):
        attach_lora(tiny_model(), path=str(tmp_path))
    model = tiny_model()
    attach_lora(model)
    save_adapter(model, tmp_path / "run" / "adapter")
    with pytest.raises(UserError, match=r"did you mean .*run.adapter\?"):
        attach_lora(tiny_model(), path=str(tmp_path / "run"))
    with pytest.raises(UserError, match=r"adapter_model\.safetensors: no such file"):
        load_adapter(model, tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"modules_to_save": ["wte"]}, r"holds more than LoRA matrices \(modules_to_save\)"),
        ({"bias": "lora_only"}, r"holds more than LoRA matrices \(bias\)"),
        ({"lora_bias": True}, r"holds more than LoRA matrices \(lora_bias\)"),
        ({"init_lora_weights": "pissa"}, r"init_lora_weights='pissa', which changes the base's weights too"),
        ({"target_modules": r".*\.ff_out"}, r"matches model\.transformer\.ff_out; expected layers of blocks only"),
    ],
)
def test_an_adapter_that_is_more_than_lora_is_refused(tiny_model, tmp_path, change, message):
    model = tiny_model()
    attach_lora(model, r=2)
    save_adapter(model, tmp_path)
    config = atomic.read_json(tmp_path / "adapter_config.json")
    atomic.write_json(tmp_path / "adapter_config.json", {**config, **change})
    with pytest.raises(UserError, match=message):
        attach_lora(tiny_model(), path=str(tmp_path))


def test_two_adapters_and_dropout_are_refused(tiny_model):
    model = tiny_model()
    attach_lora(model, r=2)
    with pytest.raises(UserError, match="already carries an adapter"):
        attach_lora(model, r=2)
    with pytest.raises(UserError, match=r"adapter\.lora_dropout is 0\.1"):
        attach_lora(tiny_model(), dropout=0.1)


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_adapter_weights_are_wide_and_the_arithmetic_is_the_models(tiny_model, random_ids, dtype, use_dora):
    model, ids = tiny_model(dtype=dtype), random_ids(1, 6)
    base = logits(model, ids)
    attach_lora(model, r=2, use_dora=use_dora)
    assert torch.equal(logits(model, ids), base)
    wide = torch.promote_types(dtype, torch.float32)
    assert {p.dtype for p in trainable_parameters(model).values()} == {wide}
    seen = set()
    layer = model.model["transformer"]["blocks"][0].q_proj
    layer.lora_A["default"].register_forward_hook(lambda m, args, out: seen.add((args[0].dtype, out.dtype)))
    model(input_ids=ids).logits.float().sum().backward()
    of_norm = {(wide, wide)} if use_dora else set()  # DoRA measures its weights by passing an identity matrix
    assert seen - of_norm == {(dtype, dtype)} - of_norm, "no wide copy of the activations"
    assert {p.grad.dtype for p in trainable_parameters(model).values()} == {wide}


@pytest.mark.parametrize("use_dora", [False, True])
def test_gradients_of_a_float64_adapter_agree_with_finite_differences(tiny_model, random_ids, use_dora):
    model, ids = tiny_model(dtype=torch.float64), random_ids(1, 8)
    attach_lora(model, r=2, use_dora=use_dora)
    scramble(model)
    rows, targets = torch.arange(8), random_ids(8, seed=3)

    def value():
        return model(input_ids=ids, rows=rows, targets=targets).token_logps.sum()

    value().backward()
    for name, parameter in list(trainable_parameters(model).items())[:6]:
        if use_dora and "magnitude" not in name:
            continue  # DoRA treats the norm as a constant: only the magnitude has the true slope
        where, step = parameter.grad.abs().argmax(), 1e-6
        with torch.no_grad():
            flat = parameter.view(-1)
            flat[where] += step
            above = value()
            flat[where] -= 2 * step
            below = value()
            flat[where] += step
        assert ((above - below) / (2 * step)).item() == pytest.approx(
            parameter.grad.view(-1)[where].item(), rel=1e-5
        ), name


@pytest.mark.parametrize("use_dora", [False, True])
def test_merging_keeps_the_logits_and_leaves_a_plain_model(tiny_model, random_ids, tmp_path, use_dora):
    from laddpo.models.loading import load_model, save_model

    model, ids = tiny_model(), random_ids(2, 6)
    keys = list(model.state_dict())
    attach_lora(model, r=2, use_dora=use_dora)
    tuned = logits(scramble(model), ids)
    merge_adapter(model)
    assert not has_adapter(model)
    assert list(model.state_dict()) == keys
    torch.testing.assert_close(logits(model, ids), tuned, atol=1e-5, rtol=0)
    save_model(model, tmp_path)
    assert torch.equal(logits(load_model(str(tmp_path)), ids), logits(model, ids))


def test_asking_for_an_adapter_says_nothing_on_the_terminal():
    """The first import of peft brings a library along that speaks of an optional kernel."""
    program = "import torch; from laddpo.models.adapters import has_adapter; print(has_adapter(torch.nn.Linear(1, 1)))"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert (ran.stdout, ran.stderr) == ("False\n", "")
