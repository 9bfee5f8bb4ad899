"""4-bit and 8-bit weights with LoRA, on a CPU too: what is quantised, and that gradients reach the adapter."""

import subprocess
import sys
import weakref

import pytest
import torch

from laddpo.core.elbo import PackedSequences
from laddpo.errors import UserError
from laddpo.models import bitsandbytes_import
from laddpo.models.adapters import (
    adapter_disabled,
    adapter_state,
    attach_lora,
    merge_adapter,
    save_adapter,
    trainable_parameters,
)
from laddpo.models.blocks import checkpoint_blocks
from laddpo.models.denoiser import TransformerDenoiser
from laddpo.models.loading import load_model

bitsandbytes = pytest.importorskip("bitsandbytes")

NF4 = {
    "load_in_4bit": True,
    "load_in_8bit": False,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": None,
    "llm_int8_threshold": None,
}
INT8 = {"load_in_8bit": True, "llm_int8_threshold": 0.0}
KINDS = {
    "nf4": (NF4, "Linear4bit"),
    "nf4_single": ({**NF4, "bnb_4bit_use_double_quant": False}, "Linear4bit"),
    "int8": (INT8, "Linear8bitLt"),
}


@pytest.fixture(params=KINDS)
def quantized(request, tiny_model, tmp_path):
    from laddpo.models.loading import save_model

    save_model(tiny_model(d_model=64, mlp_hidden_size=128), tmp_path)
    settings, layer = KINDS[request.param]
    return tmp_path, settings, layer


def packed(random_ids):
    ids = random_ids(24)
    ids[3:9] = 59
    return PackedSequences(ids, torch.arange(12).repeat(2), [12, 12], torch.arange(3, 9), random_ids(6, seed=1))


def test_every_linear_of_the_blocks_is_quantised_and_head_and_embedding_are_not(quantized):
    folder, settings, layer = quantized
    model = load_model(str(folder), dtype="bf16", quantization=settings)
    kinds = {name: type(module).__name__ for name, module in model.named_modules()}
    for i in range(2):
        for part in ("q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out"):
            name = f"model.transformer.blocks.{i}.{part}"
            assert kinds[name] == layer
            assert model.get_submodule(name).weight.element_size() == 1, f"{name} is stored in bytes"
    assert kinds["model.transformer.ff_out"] == "Linear"
    assert model.get_output_embeddings().weight.dtype == model.get_input_embeddings().weight.dtype == torch.bfloat16
    assert not trainable_parameters(model)


def test_quantised_logits_stay_near_the_full_ones(quantized, random_ids):
    folder, settings, _ = quantized
    ids = random_ids(2, 9)
    with torch.no_grad():
        full = load_model(str(folder))(input_ids=ids).logits
        logits = load_model(str(folder), quantization=settings)(input_ids=ids).logits.float()
    relative = (logits - full).norm() / full.norm()
    assert 0 < relative < (0.05 if settings is INT8 else 0.5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_every_adapter_weight_and_an_update_raises_the_likelihood(quantized, random_ids, checkpointing):
    folder, settings, _ = quantized
    model = load_model(str(folder), dtype="bf16", quantization=settings)
    assert len(attach_lora(model, r=4, alpha=8)) == 14
    checkpoint_blocks(model, checkpointing)
    denoiser, batch = TransformerDenoiser(model, 59), packed(random_ids)
    optimizer = torch.optim.SGD(trainable_parameters(model).values(), lr=0.02)
    values = []
    for _ in range(4):
        total = denoiser.token_logps(batch).sum()
        values.append(total.item())
        optimizer.zero_grad()
        (-total).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in trainable_parameters(model).values())
        assert all(p.grad.abs().sum() > 0 for n, p in trainable_parameters(model).items() if "lora_B" in n)
        optimizer.step()
    assert values[-1] > values[0] + 0.1


def test_values_are_the_same_in_every_mode(quantized, random_ids):
    """A reference scored without gradients must equal the policy at step 0, or its margin is not 0."""
    folder, settings, _ = quantized
    model = load_model(str(folder), dtype="bf16", quantization=settings)
    attach_lora(model, r=4)
    denoiser, batch = TransformerDenoiser(model, 59), packed(random_ids)
    values = []
    for training in (False, True, False):
        model.train(training)
        with torch.no_grad():
            values.append(denoiser.token_logps(batch))
        values.append(denoiser.token_logps(batch).detach())
        with torch.no_grad(), adapter_disabled(model):
            values.append(denoiser.token_logps(batch))
    assert all(torch.equal(v, values[0]) for v in values)


def test_checkpointed_gradients_equal_plain_ones(quantized, random_ids):
    folder, settings, _ = quantized
    gradients = []
    for checkpointing in (False, True):
        model = load_model(str(folder), dtype="fp32", quantization=settings)
        attach_lora(model, r=4, seed=1)
        checkpoint_blocks(model, checkpointing)
        TransformerDenoiser(model, 59).token_logps(packed(random_ids)).sum().backward()
        gradients.append([p.grad for p in trainable_parameters(model).values()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_qlora_adapter_saves_and_loads_on_the_full_model(quantized, random_ids, tmp_path):
    folder, settings, _ = quantized
    model = load_model(str(folder), quantization=settings)
    attach_lora(model, r=4, seed=1)
    save_adapter(model, tmp_path / "adapter")
    full = load_model(str(folder))
    attach_lora(full, path=str(tmp_path / "adapter"))
    assert all(
        torch.equal(a, b) for a, b in zip(adapter_state(full).values(), adapter_state(model).values(), strict=True)
    )


def test_merging_into_quantised_weights_is_refused(quantized):
    folder, settings, _ = quantized
    model = load_model(str(folder), quantization=settings)
    attach_lora(model, r=4)
    with pytest.raises(UserError, match="is quantised; merging would round the adapter away"):
        merge_adapter(model)


def test_quantization_off_gives_the_plain_model(tiny_folder):
    model = load_model(str(tiny_folder), quantization={"load_in_4bit": False, "load_in_8bit": False})
    assert type(model.model["transformer"]["blocks"][0].ff_out) is torch.nn.Linear


def test_int8_products_do_not_fill_the_log(quantized, random_ids, caplog):
    folder, settings, _ = quantized
    model = load_model(str(folder), dtype="bf16", quantization=settings)
    model(input_ids=random_ids(1, 4))
    assert not [r for r in caplog.records if "will be cast" in r.getMessage() or "kernels" in r.getMessage()]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_quantised_as_they_are_made_are_those_that_a_checkpoint_would_give(kind, dtype, random_ids, tmp_path):
    from laddpo.benchmarking.workload import random_model
    from laddpo.models.loading import save_model

    shape = {"d_model": 64, "n_layers": 2, "n_heads": 2, "n_kv_heads": 2, "mlp_hidden_size": 128, "vocab_size": 60}
    settings, _ = KINDS[kind]
    arguments = ({**shape, "max_sequence_length": 64}, 3, torch.device("cpu"), dtype)
    save_model(random_model(*arguments), tmp_path)
    loaded = load_model(str(tmp_path), dtype=dtype, quantization=settings)
    made, ids = random_model(*arguments, settings), random_ids(20)[None]
    assert torch.equal(made(input_ids=ids).logits, loaded(input_ids=ids).logits)
    assert not any(p.requires_grad for p in made.parameters())
    assert len(attach_lora(made, r=4)) == 14
    made(input_ids=ids).logits.float().sum().backward()
    assert all(p.grad is not None for p in trainable_parameters(made).values())


def test_a_layer_s_own_weight_is_gone_before_the_next_one_is_made(monkeypatch):
    from laddpo.benchmarking import workload

    plain, earlier = workload.quantized_linear, []

    def watched(linear, quantizer):
        assert all(reference() is None for reference in earlier)
        earlier.append(weakref.ref(linear.weight))
        return plain(linear, quantizer)

    monkeypatch.setattr(workload, "quantized_linear", watched)
    shape = {"d_model": 64, "n_layers": 2, "n_heads": 2, "n_kv_heads": 2, "mlp_hidden_size": 128, "vocab_size": 60}
    workload.random_model({**shape, "max_sequence_length": 64}, 3, torch.device("cpu"), torch.bfloat16, NF4)
    assert len(earlier) == 14


def test_unpacked_weights_compute_what_the_packed_ones_do(random_ids):
    from laddpo.benchmarking.workload import random_model
    from laddpo.models.quantization import unpack_4bit

    shape = {"d_model": 64, "n_layers": 2, "n_heads": 2, "n_kv_heads": 2, "mlp_hidden_size": 128, "vocab_size": 60}
    model = random_model({**shape, "max_sequence_length": 64}, 3, torch.device("cpu"), torch.float32, NF4)
    ids = random_ids(20)[None]
    packed = model(input_ids=ids).logits
    unpack_4bit(model)
    assert not any(isinstance(module, bitsandbytes.nn.Linear4bit) for module in model.modules())
    assert torch.allclose(model(input_ids=ids).logits, packed, atol=1e-5)
    assert type(attach_and_first(model)).__name__ == "Linear"


def attach_and_first(model):
    return model.get_submodule(attach_lora(model, r=2)[0])


def test_importing_bitsandbytes_loads_no_compiler():
    code = (
        "import sys; from laddpo.models.bitsandbytes_import import import_bitsandbytes; import_bitsandbytes(); "
        "print('bitsandbytes' in sys.modules, 'torch._inductor.compile_fx' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False"]


def test_what_a_library_compiles_at_its_import_is_compiled_once_at_the_first_call(monkeypatch):
    seen = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: seen.append(options) or function)
    plain = torch.compile
    with bitsandbytes_import._compiled_when_called():

        @torch.compile
        def one(x):
            return x + 1

        @torch.compile(dynamic=False)
        def two(x, by=1):
            return x + by

    assert torch.compile is plain and not seen
    assert (one(1), two(1, by=5), two(2)) == (2, 6, 3) and two.__name__ == "two"
    assert seen == [{}, {"dynamic": False}]
