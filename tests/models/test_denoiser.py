"""The denoiser that the objective talks to."""

import torch

from laddpo.core.draws import ElboEstimator
from laddpo.core.elbo import draw_logps
from laddpo.models.denoiser import TransformerDenoiser


def sequences(random_ids, pairs=3):
    estimator = ElboEstimator(diffusion_samples=4)
    found = []
    for i in range(pairs):
        prompt, response = random_ids(4 + i, seed=i).int().numpy(), random_ids(6 + i % 2, seed=50 + i).int().numpy()
        found += estimator.sequences(f"pair{i}", "chosen", prompt, response, range(4))
    return found


def test_draws_scored_together_equal_draws_scored_alone(tiny_model, random_ids):
    denoiser = TransformerDenoiser(tiny_model(dtype=torch.float64), mask_token_id=59)
    drawn = sequences(random_ids)
    with torch.no_grad():
        together = draw_logps(denoiser, drawn)
        alone = torch.cat([draw_logps(denoiser, [s]) for s in drawn])
    torch.testing.assert_close(together, alone, atol=1e-11, rtol=0)
    assert (together < 0).sum() >= 9, "most draws mask something and have a negative log-sum"


def test_head_chunks_do_not_change_values_or_gradients(tiny_model, random_ids):
    drawn, results = sequences(random_ids), []
    for chunk in (None, 3):
        model = tiny_model(dtype=torch.float64)
        values = draw_logps(TransformerDenoiser(model, 59, head_chunk=chunk), drawn)
        values.sum().backward()
        results.append((values.detach(), [p.grad for p in model.parameters()]))
    torch.testing.assert_close(results[0], results[1], atol=1e-11, rtol=0)


def test_float64_models_are_scored_in_float64_and_others_in_float32(tiny_model, random_ids):
    from laddpo.core.elbo import pack_sequences

    packed = pack_sequences([s for s in sequences(random_ids) if s.tokens], 59)
    for dtype, expected in (
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
    ):
        assert TransformerDenoiser(tiny_model(dtype=dtype), 59).token_logps(packed).dtype == expected


def test_device_is_the_models(tiny_model):
    assert TransformerDenoiser(tiny_model(), 59).device == torch.device("cpu")
