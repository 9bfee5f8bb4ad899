"""Our LLaDA against recorded outputs of the public reference code on one tiny random model."""

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

from laddpo.core.elbo import PackedSequences
from laddpo.models.denoiser import TransformerDenoiser
from laddpo.models.loading import load_model

CASES = ["full", "masked", "right_pad", "left_pad", "right_pad_nomask", "one_token", "beyond_max_len", "packed"]


@pytest.fixture(scope="module")
def golden(shared_folder):
    folder = shared_folder / "golden" / "llada_tiny"
    tensors = {**load_file(folder / "inputs.safetensors"), **load_file(folder / "expected.safetensors")}
    return folder, load_model(str(folder)), tensors


def run(model, tensors, case, **kwargs):
    named = {name: tensors.get(f"{case}.{name}") for name in ("input_ids", "attention_mask", "position_ids")}
    with torch.no_grad():
        return model(**named, **kwargs)


def real_tokens(tensors, case):
    ids = tensors[f"{case}.input_ids"]
    return tensors.get(f"{case}.attention_mask", torch.ones_like(ids)).bool()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("attention", ["auto", "eager"])
def test_logits_equal_the_reference(golden, case, attention):
    folder, model, tensors = golden
    if attention != "auto":
        model = load_model(str(folder), attention=attention)
    real = real_tokens(tensors, case)
    logits = run(model, tensors, case).logits
    torch.testing.assert_close(logits[real], tensors[f"{case}.logits"][real], atol=2e-5, rtol=0)


def test_packing_is_recognised_by_position_ids_alone(golden):
    _, model, tensors = golden
    with torch.no_grad():
        unpacked = model(input_ids=tensors["packed.input_ids"]).logits
    assert (unpacked - tensors["packed.logits"]).abs().max() > 0.1


def test_packing_by_lengths_equals_the_reference(golden):
    _, model, tensors = golden
    with torch.no_grad():
        logits = model(input_ids=tensors["packed.input_ids"], lengths=tensors["packed.seq_lens"].tolist()).logits
    torch.testing.assert_close(logits, tensors["packed.logits"], atol=2e-5, rtol=0)


def test_ignoring_the_attention_mask_changes_the_logits(golden):
    _, model, tensors = golden
    assert torch.equal(tensors["right_pad.input_ids"], tensors["right_pad_nomask.input_ids"])
    real = real_tokens(tensors, "right_pad")
    masked, unmasked = (run(model, tensors, case).logits[real] for case in ("right_pad", "right_pad_nomask"))
    assert (masked - unmasked).abs().max() > 0.01


@pytest.mark.parametrize("case", ["masked", "left_pad"])
def test_hidden_states_equal_the_reference(golden, case):
    _, model, tensors = golden
    real = real_tokens(tensors, case)
    states = torch.stack(run(model, tensors, case, output_hidden_states=True).hidden_states)
    torch.testing.assert_close(states[:, real], tensors[f"{case}.hidden_states"][:, real], atol=2e-5, rtol=0)


def test_bfloat16_logits_equal_the_reference(golden):
    folder, _, tensors = golden
    logits = run(load_model(str(folder), dtype="bf16"), tensors, "masked").logits
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), tensors["masked.logits_bf16"].float(), atol=2e-2, rtol=0)


def test_loss_and_every_gradient_equal_the_reference(golden):
    folder, _, tensors = golden
    model = load_model(str(folder))
    logits = model(input_ids=tensors["sft.noisy_ids"]).logits
    torch.testing.assert_close(logits, tensors["sft.logits"], atol=2e-5, rtol=0)
    masked = tensors["sft.masked"].bool()
    answer = tensors["sft.input_ids"].shape[1] - tensors["sft.prompt_lengths"]
    nats = cross_entropy(logits[masked], tensors["sft.input_ids"][masked], reduction="none")
    nats = nats / tensors["sft.p_mask"][masked]
    rows = masked.nonzero()[:, 0]
    loss = (nats / answer[rows]).sum() / len(answer)
    torch.testing.assert_close(loss[None], tensors["sft.loss"], atol=1e-5, rtol=0)
    elbos = -torch.zeros(len(answer)).index_add(0, rows, nats.detach())
    torch.testing.assert_close(elbos, tensors["sft.elbo_per_seq"], atol=1e-3, rtol=0)
    loss.backward()
    assert_golden_gradients(model, tensors)


def test_packed_rows_through_the_chunked_head_give_the_reference_gradients(golden):
    folder, _, tensors = golden
    model = load_model(str(folder))
    batch, length = tensors["sft.input_ids"].shape
    masked = tensors["sft.masked"].bool()
    packed = PackedSequences(
        tensors["sft.noisy_ids"].flatten(),
        torch.arange(length).repeat(batch),
        [length] * batch,
        masked.flatten().nonzero()[:, 0],
        tensors["sft.input_ids"][masked],
    )
    logps = TransformerDenoiser(model, 150, head_chunk=7).token_logps(packed)
    answer = length - tensors["sft.prompt_lengths"]
    weights = 1 / tensors["sft.p_mask"][masked] / answer[masked.nonzero()[:, 0]] / batch
    loss = -(logps * weights).sum()
    torch.testing.assert_close(loss[None], tensors["sft.loss"], atol=1e-5, rtol=0)
    loss.backward()
    assert_golden_gradients(model, tensors)


def assert_golden_gradients(model, tensors):
    for name, parameter in model.named_parameters():
        expected = tensors[f"grad.{name}"]
        error = (parameter.grad - expected).abs().max() / expected.abs().max()
        assert error <= 1e-4, f"{name}: relative error {error:.1e}"


def test_log_likelihood_of_every_draw_equals_the_reference(golden):
    _, model, tensors = golden
    prompt, answer = tensors["ll.prompt"], tensors["ll.answer"]
    noisy = tensors["ll.perturbed"]
    draws, length = noisy.shape
    masked = noisy == 150
    masked[:, : len(prompt)] = False
    truth = torch.cat([prompt, answer]).expand(draws, length)
    positions, rows = torch.arange(length).repeat(draws), masked.flatten().nonzero()[:, 0]
    packed = PackedSequences(noisy.flatten(), positions, [length] * draws, rows, truth[masked])
    with torch.no_grad():
        logps = TransformerDenoiser(model, 150).token_logps(packed)
    nll = torch.zeros(draws, length).masked_scatter(masked, -logps)
    torch.testing.assert_close(nll, tensors["ll.cfg0.0.token_nll"], atol=1e-4, rtol=0)
    assert torch.equal(masked.sum(1), tensors["ll.num_masked"])
    per_draw = -nll.sum(1) * len(answer) / tensors["ll.num_masked"]
    torch.testing.assert_close(per_draw, tensors["ll.cfg0.0.per_draw"], atol=1e-3, rtol=0)
    assert per_draw.double().mean().item() == pytest.approx(tensors["ll.cfg0.0.value"].item(), abs=1e-3)


def test_guided_log_likelihood_of_every_draw_equals_the_reference(golden):
    _, model, tensors = golden
    prompt, answer, noisy = tensors["ll.prompt"], tensors["ll.answer"], tensors["ll.perturbed"]
    without_prompt = noisy.clone()
    without_prompt[:, : len(prompt)] = 150
    with torch.no_grad():
        conditional, unconditional = model(input_ids=noisy).logits, model(input_ids=without_prompt).logits
    logits = unconditional + 2.5 * (conditional - unconditional)
    truth = torch.cat([prompt, answer]).expand_as(noisy)
    nll = cross_entropy(logits.flatten(0, 1), truth.flatten(), reduction="none").view_as(noisy) * (noisy == 150)
    torch.testing.assert_close(nll, tensors["ll.cfg1.5.token_nll"], atol=1e-4, rtol=0)
    per_draw = -nll.sum(1) * len(answer) / tensors["ll.num_masked"]
    torch.testing.assert_close(per_draw, tensors["ll.cfg1.5.per_draw"], atol=1e-3, rtol=0)


def test_saved_weights_are_byte_equal_under_the_same_key_names(golden, tmp_path):
    from laddpo.models.loading import save_model

    folder, model, _ = golden
    save_model(model, tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
