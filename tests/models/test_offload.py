"""Activations and embeddings that wait in host memory: every value bit for bit, the weights untouched."""

import pytest
import torch

from laddpo.core.elbo import draw_logps
from laddpo.models.adapters import attach_lora, trainable_parameters
from laddpo.models.blocks import checkpoint_blocks
from laddpo.models.denoiser import TransformerDenoiser
from laddpo.models.offload import HostEmbedding, keep_embeddings_on_host, offloaded_activations
from tests.core.memory_helpers import masked_sequences


def gradients(model, offload: bool, dtype=None) -> tuple[torch.Tensor, dict]:
    denoiser = TransformerDenoiser(model, model.config.mask_token_id, autocast=dtype, offload=offload)
    sequences = masked_sequences([30, 40, 30], model.config.vocab_size - 1)
    values = draw_logps(denoiser, sequences)
    values.sum().backward()
    return values.detach(), {name: p.grad for name, p in trainable_parameters(model).items()}


@pytest.fixture
def small_offloads(monkeypatch):
    """Everything above 100 bytes travels, and what travels is counted."""
    from laddpo.models import offload

    monkeypatch.setattr(offload.offloaded_activations.__wrapped__, "__defaults__", (100,))
    travelled = []
    copy = offload._to_host
    monkeypatch.setattr(offload, "_to_host", lambda tensor: travelled.append(tensor.shape) or copy(tensor))
    return travelled


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("lora", [False, True])
def test_offloaded_activations_change_no_bit(tiny_model, small_offloads, lora, checkpointing):
    found = []
    for offload in (False, True):
        model = tiny_model()
        if lora:
            attach_lora(model, r=2, seed=3)
            with torch.no_grad():
                for name, parameter in trainable_parameters(model).items():
                    if "lora_B" in name:
                        parameter.normal_(generator=torch.Generator().manual_seed(0))
        checkpoint_blocks(model, checkpointing)
        found.append(gradients(model, offload))
        if not offload:
            assert not small_offloads
    assert small_offloads, "nothing was offloaded"
    assert torch.equal(found[0][0], found[1][0])
    assert all(torch.equal(found[1][1][name], gradient) for name, gradient in found[0][1].items())


def test_with_checkpointing_one_tensor_a_block_travels(tiny_model, small_offloads):
    model = tiny_model()
    attach_lora(model, r=2, seed=3)
    checkpoint_blocks(model)
    gradients(model, offload=True)
    width = model.config.d_model
    inputs = [shape for shape in small_offloads if shape == (1, 100, width)]
    assert len(inputs) == model.config.n_layers + 1, "the inputs of the blocks and of the last norm"


def test_a_storage_travels_once_and_weights_never(tiny_model, small_offloads):
    model = tiny_model()
    attach_lora(model, r=2, seed=3)
    gradients(model, offload=True)
    weights = {tuple(p.shape) for p in model.parameters() if p.ndim == 2}
    assert not [shape for shape in small_offloads if tuple(shape) in weights]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        gradients(model, offload=False)
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    storages = {t.untyped_storage()._cdata for t in kept if t.untyped_storage().nbytes() >= 100} - own
    assert len(kept) > len(storages) >= len(small_offloads) > len(storages) / 2


def test_a_storage_that_is_freed_and_reused_is_not_mistaken():
    """Addresses repeat: the copy of a dead tensor must not be handed out for the next one."""
    x = torch.full((1000,), 2.0, requires_grad=True)
    with offloaded_activations(torch.nn.Identity(), smallest_bytes=1):
        y = x
        for _ in range(20):  # exp saves its result, which dies at once as far as we hold it
            y = (y * 0.5).exp().log() * 2
    y.sum().backward()
    torch.testing.assert_close(x.grad, torch.ones(1000), rtol=1e-4, atol=0)


def test_views_come_back_with_their_layout():
    x = torch.arange(12.0).view(3, 4).requires_grad_()
    with offloaded_activations(torch.nn.Identity(), smallest_bytes=1):
        y = (x * 1).t()[1:, ::2]
        z = y * y
    seen = z.grad_fn._saved_self
    assert torch.equal(seen, y) and seen.stride() == y.stride()
    z.sum().backward()
    expected = torch.zeros(3, 4)
    expected[::2, 1:] = 2 * x.detach()[::2, 1:]
    assert torch.equal(x.grad, expected)


def test_embeddings_on_the_host_change_no_bit(tiny_model):
    found = []
    for on_host in (False, True):
        model = tiny_model()
        model.requires_grad_(False)
        attach_lora(model, r=2, seed=3)
        if on_host:
            keep_embeddings_on_host(model)
        found.append(gradients(model, offload=False))
    assert torch.equal(found[0][0], found[1][0])
    assert all(torch.equal(found[1][1][name], gradient) for name, gradient in found[0][1].items())


def test_the_table_stays_where_it_is_and_rows_travel():
    table = HostEmbedding(torch.nn.Embedding(10, 4), torch.device("meta"))
    assert table(torch.tensor([[1, 2]])).device.type == "meta"
    assert table.to("meta").weight.device.type == "cpu"
    assert not list(table.parameters()) and not table.state_dict()


def test_the_model_knows_its_device_without_the_table(tiny_model):
    model = tiny_model()
    keep_embeddings_on_host(model)
    assert model.device == TransformerDenoiser(model, 0).device == torch.device("cpu")
    assert all("wte" not in name for name, _ in model.named_parameters())
