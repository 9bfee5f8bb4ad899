"""What 4-bit weights change: the score of a pair and its gradient, against the weights that they were made from.

Three models of the same random weights: as they are, quantised, and quantised and unpacked again. The first difference
is what storing in 4 bits costs; the second, against the unpacked weights, is the kernels' rounding alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from laddpo.benchmarking.contenders import Ours
from laddpo.benchmarking.workload import Workbench, quantization_of
from laddpo.core.budget import release_memory
from laddpo.core.gradient import Item, score_items
from laddpo.models.adapters import trainable_parameters
from laddpo.models.denoiser import TransformerDenoiser
from laddpo.models.quantization import unpack_4bit
from laddpo.preference.encoding.encode import EncodedPair
from laddpo.results.tables import markdown


def observe(ours: Ours, pairs: Sequence[EncodedPair], draws: int) -> dict[str, Any]:
    """Scores of every draw, how far policy and reference are apart at step 0, and the gradient of the step, flat.

    # scores float64 [pairs, 2, draws] in nats, lengths [pairs, 2], gradient float32 [parameters], on the CPU
    """
    items = ours.items(pairs, draws)
    policy = score_items(ours.denoiser, items, ours.token_budget).cpu()
    reference = torch.as_tensor(ours.reference(items))
    ours.prepare(pairs, draws)
    ours.step(pairs, draws)
    parameters = trainable_parameters(ours.model).values()
    gradient = torch.cat([p.grad.flatten().float().cpu() for p in parameters if p.grad is not None])
    ours.model.zero_grad(set_to_none=True)
    return {
        "scores": policy,
        "lengths": lengths_of(items),
        "margin_at_start": float((policy - reference).abs().max()),
        "gradient": gradient,
    }


def difference(found: dict[str, Any], wanted: dict[str, Any]) -> dict[str, float]:
    """Nats per response token between the mean scores, root mean square and largest; and the gradient's error."""
    per_token = (found["scores"].mean(-1) - wanted["scores"].mean(-1)) / found["lengths"]
    margins = [observed["scores"].mean(-1) for observed in (found, wanted)]
    of_margin = (margins[0][:, 0] - margins[0][:, 1]) - (margins[1][:, 0] - margins[1][:, 1])
    error = (found["gradient"] - wanted["gradient"]).norm() / wanted["gradient"].norm()
    return {
        "nats_per_token_rms": float(per_token.square().mean().sqrt()),
        "nats_per_token_largest": float(per_token.abs().max()),
        "margin_rms": float(of_margin.square().mean().sqrt()),
        "gradient_relative": float(error),
    }


def lengths_of(items: Sequence[Item]) -> torch.Tensor:
    """Response tokens. # float64 [items, 2]"""
    return torch.tensor([item.response_tokens for item in items], dtype=torch.float64)


def agreement_part(bench: Workbench) -> tuple[str, dict]:
    """Scores and gradients of the same random weights as they are, in 4 bits, and unpacked again."""
    wanted, shape, found = bench.settings, bench.settings.shape, {}
    pairs = bench.dialogues(wanted.agreement_pairs, 5, shape.vocab_size)
    for name in ("as made", "4-bit", "4-bit, unpacked"):
        settings = quantization_of("none" if name == "as made" else "nf4")
        prepare = unpack_4bit if "unpacked" in name else None
        model = bench.random_policy(settings, prepare)
        denoiser = TransformerDenoiser(model, shape.vocab_size - 1)
        found[name] = observe(Ours(model, denoiser, "stream", wanted.token_budget), pairs, wanted.draws)
        del model, denoiser
        release_memory()
    text, record = agreement_section(
        {
            "storing in 4 bits": difference(found["4-bit"], found["as made"]),
            "the kernels alone": difference(found["4-bit"], found["4-bit, unpacked"]),
        },
        {name: observed["margin_at_start"] for name, observed in found.items()},
    )
    about = (
        f"{len(pairs)} pairs under {wanted.draws} draws, random weights: a trained model's error may differ. Which "
        "kernels bitsandbytes takes depends on the card and on the tokens of a micro-step."
    )
    return f"{about}\n\n{text}", record


def agreement_section(
    differences: Mapping[str, Mapping[str, float]], at_start: Mapping[str, float]
) -> tuple[str, dict[str, Any]]:
    """Errors of scores, margins and gradients, and the largest margin of an untrained policy."""
    header = ["against", "nats a token, rms", "largest", "nats of a margin, rms", "gradient, relative"]
    names = ("nats_per_token_rms", "nats_per_token_largest", "margin_rms", "gradient_relative")
    rows = [[what, *[f"{found[name]:.2g}" for name in names]] for what, found in differences.items()]
    start = ", ".join(f"{name} {value:g}" for name, value in at_start.items())
    text = f"{markdown(header, rows)}\n\nLargest |policy - reference| of a draw before training: {start}."
    return text, {"differences": dict(differences), "margin_at_start": dict(at_start)}
