"""The part of the benchmark about block diffusion: draws over one clean context against layouts that repeat it.

Three rows of the same network, pairs and masks: ours, [prompt | clean | noisy] for every draw, and the public layout,
[clean; noisy] of the whole sequence for every draw. Their values and gradients are equal (tests/core/
test_block_elbo.py), so only tokens, time and memory differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from laddpo.benchmarking.contenders import Ours, fixed_budget
from laddpo.benchmarking.measure import Peak, Ratio, median_ratio, step_peak, timed_rounds
from laddpo.benchmarking.workload import Workbench, pair_of_tokens
from laddpo.core.draws import ElboEstimator
from laddpo.core.gradient import Item
from laddpo.core.sequences import MaskedSequence, tokens_of
from laddpo.core.tasks import pair_item
from laddpo.inputs import policy
from laddpo.models import loading
from laddpo.models.denoiser import TransformerDenoiser
from laddpo.preference.encoding.encode import EncodedPair
from laddpo.results.tables import markdown
from laddpo.settings.schema import keywords

ARCHITECTURE = "SDARForCausalLM"
MIB = 2**20
SHARED, ALONE, WHOLE = (
    "one context for all draws",
    "a context for every draw",
    "the whole sequence twice for every draw",
)


@dataclass(frozen=True)
class WholeSequence(MaskedSequence):
    """Laid out as public code does: a noisy copy of every block beside a clean one, those of the prompt included."""

    @property
    def noisy_starts(self) -> np.ndarray:
        return np.arange(0, self.full_length, self.block_length)


@dataclass
class BlockLayout(Ours):
    """A step over pairs of a block model in one of the layouts."""

    def items(self, pairs: Sequence[EncodedPair], draws: int) -> list[Item]:
        estimator = ElboEstimator(diffusion_samples=draws, block_length=self.denoiser.block_length)
        items = [pair_item(pair, estimator, range(draws)) for pair in pairs]
        if self.label == SHARED:
            return items
        return [replace(item, sides=tuple(tuple(map(self._unshared, side)) for side in item.sides)) for item in items]

    def _unshared(self, sequence: MaskedSequence) -> MaskedSequence:
        kind = WholeSequence if self.label == WHOLE else MaskedSequence
        own = sequence.prompt_ids.copy(), sequence.response_ids.copy()
        return kind(*own, sequence.draw, sequence.block_length)


def block_part(bench: Workbench) -> tuple[str, dict]:
    """Tokens, time and peak of a pair with P = L under every layout."""
    wanted, rng = bench.settings, np.random.default_rng(bench.seed)
    length, size = wanted.block_answer, wanted.block_length
    model = _random_policy(bench)
    denoiser = TransformerDenoiser(model, wanted.shape.vocab_size - 1)
    vocabulary = wanted.shape.vocab_size - 2
    batches = [[pair_of_tokens(2 * length, vocabulary, bench.seed + number)] for number in range(wanted.rounds)]

    rows, record = [], {"block_length": size, "prompt": length, "response": length, "draws": {}}
    for draws in wanted.block_draws:
        budget = fixed_budget(max(wanted.token_budget, tokens_of(length, [length] * 2, draws, size)))
        layouts = [BlockLayout(model, denoiser, "stream", budget, label=name) for name in (SHARED, ALONE, WHOLE)]
        seconds = timed_rounds(layouts, model, batches, draws)
        for layout in layouts:
            tokens = layout.items(batches[0], draws)[0].tokens
            peak = step_peak(layout, model, batches[0], draws)
            ratio = median_ratio(seconds[layout.label], seconds[SHARED], rng)
            rows.append(_row(draws, layout.label, tokens, ratio, peak))
            found = {"tokens": tokens, "peak_bytes": peak.above, "time_over_shared": asdict(ratio)}
            record["draws"].setdefault(str(draws), {})[layout.label] = found
    about = (
        f"One pair, prompt and both responses {length} tokens, blocks of {size}, {ARCHITECTURE} with random weights."
    )
    header = ["layout", "draws", "tokens", "time over ours", "peak MiB above the weights"]
    return f"{about}\n\n{markdown(header, rows)}", record


def _random_policy(bench: Workbench) -> Any:
    """SDAR in the benchmark's shape with random weights, under a fresh adapter."""
    config = loading.new_config(ARCHITECTURE, keywords(bench.settings.shape))
    config.block_length = bench.settings.block_length
    model = loading.new_model(config, bench.seed, ARCHITECTURE).to(bench.machine.device, bench.machine.dtype)
    policy.attach_adapter(bench.run, model)
    return model


def _row(draws: int, name: str, tokens: int, ratio: Ratio, peak: Peak) -> list[str]:
    times = "1" if name == SHARED else f"{ratio.median:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]"
    return [name, str(draws), f"{tokens:,}", times, f"{peak.above / MIB:.1f}"]
