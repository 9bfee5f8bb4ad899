"""Likelihoods of block-diffusion models against recorded outputs of their public code: `block*` of $LADDPO_GOLDEN."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from laddpo.core.draws import block_spans
from laddpo.core.elbo import draw_logps, pack_sequences
from laddpo.core.sequences import MaskedDraw, MaskedSequence
from laddpo.models.denoiser import TransformerDenoiser
from tests.models.test_conformance import FOLDERS, PLACE, Golden, compare_gradients

CASES = [(folder, size) for folder in FOLDERS for size in (4, 8)]


def drawn(golden: Golden, size: int, shares: bool) -> list[MaskedSequence]:
    """The recorded draws; with `shares` in one row over one clean context, else each with arrays of its own."""
    t = {name: golden.tensors[f"block{size}.{name}"].numpy() for name in ("prompt", "response", "masked", "weight")}
    prompt, response = t["prompt"].astype(np.int32), t["response"].astype(np.int32)
    spans = block_spans(len(prompt), len(response), size)
    sequences = []
    for k, (masked, weight) in enumerate(
        zip(t["masked"][:, len(prompt) :], t["weight"][:, len(prompt) :], strict=True)
    ):
        parts = tuple((int(masked[a:b].sum()), float(weight[a:b].max())) for a, b in spans)
        draw = MaskedDraw(k, np.flatnonzero(masked), blocks=parts)
        arrays = (prompt, response) if shares else (prompt.copy(), response.copy())
        sequences.append(MaskedSequence(*arrays, draw, size))
    return sequences


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def golden(request):
    folder, size = request.param
    if not (PLACE / folder / "config.json").exists():
        pytest.skip(f"no folder of golden outputs is in {PLACE.name}/; name one by $LADDPO_GOLDEN")
    found = Golden(PLACE / folder)
    if f"block{size}.prompt" not in found.tensors:
        pytest.skip("the folder has no such blocks")
    found.model.config.block_length = size
    return found, size


@pytest.mark.parametrize("shares", [False, True], ids=["alone", "shared"])
def test_tokens_draws_and_gradients_are_those_of_the_reference(golden, shares):
    golden, size = golden
    golden.model.requires_grad_(True)
    sequences, denoiser = drawn(golden, size, shares), TransformerDenoiser(golden.model, golden.mask)
    wanted = {name: golden.tensors[f"block{size}.{name}"] for name in ("token_logps", "masked", "per_draw")}
    with torch.no_grad():
        tokens = denoiser.token_logps(pack_sequences(sequences, golden.mask))
    golden.close(tokens, wanted["token_logps"][wanted["masked"].bool()])

    values = draw_logps(denoiser, sequences)
    torch.testing.assert_close(values.detach(), wanted["per_draw"].double(), atol=1e-3, rtol=2e-6)
    values.mean().backward()
    compare_gradients(golden, f"block{size}")


def test_a_plain_forward_is_causal_over_blocks(golden):
    """Clean blocks before, the noisy block last: the recorded logits of each block, by one plain forward each."""
    golden, size = golden
    prompt, response = (golden.tensors[f"block{size}.{name}"] for name in ("prompt", "response"))
    noisy, wanted = (golden.tensors[f"block{size}.{name}"] for name in ("noisy_ids", "logits"))
    clean = torch.cat([prompt, response])
    for start, end in block_spans(len(prompt), len(response), size):
        start, end = (len(prompt) + start) // size * size, len(prompt) + end
        ids = torch.cat([clean[:start].expand(len(noisy), -1), noisy[:, start:end]], dim=1)
        with torch.no_grad():
            golden.close(golden.model(ids).logits[:, start:], wanted[:, start:end])
