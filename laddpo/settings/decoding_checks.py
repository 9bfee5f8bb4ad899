"""What the settings of decoding contradict, for every group that has them; part of the checks of
laddpo/settings/checks.py.

The sampler asks here too (laddpo/evaluation/sampling.py), so settings and sampler agree. No torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from laddpo.settings.ranges import setting_problems


def sampler_problems(settings: Any, group: str = "evaluation") -> list[str]:
    """What is wrong with settings of the sampler: first each by itself, then together."""
    values = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    single = [text for name, value in values.items() for text in setting_problems(f"{group}.{name}", value)]
    return single or list(decoding_problems(settings, group))


def decoding_problems(decoding: Any, group: str) -> Iterator[str]:
    """A sentence or two for each contradiction. `group` is the config group of the settings, for the messages."""
    gen, block, steps = decoding.gen_length, decoding.block_length, decoding.steps
    threshold = decoding.confidence_threshold
    if threshold is not None and decoding.remasking in ("random", "sequential", "entropy", "topk_margin"):
        yield (
            f"{group}.confidence_threshold is {threshold:g} and {group}.remasking is {decoding.remasking!r}, which "
            f"ranks by no probability; set {group}.confidence_threshold=null, or another remasking such as "
            "low_confidence."
        )
    if min(gen, block, steps) < 1:
        return
    blocks = gen // block
    if gen % block:
        fitting = max(b for b in range(1, min(block, gen) + 1) if gen % b == 0)
        yield (
            f"{group}.block_length is {block} and {group}.gen_length is {gen}; an answer is made of whole blocks; "
            f"set {group}.block_length={fitting} or {group}.gen_length={(blocks + 1) * block}."
        )
    elif steps % blocks and threshold is None:
        yield (
            f"{group}.steps is {steps} over {blocks} blocks; each block takes the same number of steps; "
            f"set {group}.steps={max(1, steps // blocks) * blocks} or {(steps // blocks + 1) * blocks}."
        )


def room_problems(decoding: Any, group: str, positions: int, name: str) -> Iterator[str]:
    """A sentence where an answer alone fills the positions of the model `name`, so that no prompt fits before it."""
    if decoding.gen_length >= positions:
        yield (
            f"{group}.gen_length is {decoding.gen_length}; {name} knows {positions} positions "
            f"(model.shape.max_sequence_length), which hold the prompt too; lower {group}.gen_length."
        )
