"""What the settings of decoding contradict, for every group that has them; part of the checks of
laddpo/settings/checks.py.

The sampler asks here too (laddpo/evaluation/sampling.py), so settings and sampler agree. No torch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterator
from typing import Any

from laddpo.settings.ranges import setting_problems
from laddpo.settings.schema import RunConfig


def sampler_problems(settings: Any, group: str = "evaluation") -> list[str]:
    """What is wrong with settings of the sampler: first each by itself, then together."""
    values = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    single = [text for name, value in values.items() for text in setting_problems(f"{group}.{name}", value)]
    return single or list(decoding_problems(settings, group, settings.block_length if settings.is_on_grid else None))


def decoding_problems(decoding: Any, group: str, model_block: int | None = None) -> Iterator[str]:
    """A sentence or two for each contradiction. `group` is the config group of the settings, for the messages.
    `model_block`: the positions of a block of a block model."""
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
    if model_block:
        yield from _grid_problems(decoding, group, model_block)
    elif gen % block:
        fitting = max(b for b in range(1, min(block, gen) + 1) if gen % b == 0)
        yield (
            f"{group}.block_length is {block} and {group}.gen_length is {gen}; an answer is made of whole blocks; "
            f"set {group}.block_length={fitting} or {group}.gen_length={(gen // block + 1) * block}."
        )
        return
    unit = gen // math.gcd(gen, model_block or block)  # fewest steps of an answer that are whole steps of a block
    if steps % unit and threshold is None:
        fitting = sorted({max(1, steps // unit) * unit, (steps // unit + 1) * unit})
        yield (
            f"{group}.steps is {steps} over {gen / (model_block or block):g} blocks; each block takes the same number "
            f"of steps; set {group}.steps={' or '.join(map(str, fitting))}."
        )


def _grid_problems(decoding: Any, group: str, model_block: int) -> Iterator[str]:
    """What means nothing for a block model."""
    if decoding.block_length != model_block:
        yield (
            f"{group}.block_length is {decoding.block_length} and the model writes in blocks of {model_block} "
            f"(model.block_length); leave {group}.block_length out."
        )
    if decoding.block_cache != "none":
        yield (
            f"{group}.block_cache is {decoding.block_cache!r} and the model is a block model, of which the keys and "
            f"values of finished blocks are always kept, exactly; leave {group}.block_cache out."
        )
    if getattr(decoding, "cfg_scale", 0):
        yield (
            f"{group}.cfg_scale is {decoding.cfg_scale:g} and the model is a block model; guidance compares with a "
            f"prompt of masks, and a block model never saw masks before its block; set {group}.cfg_scale=0."
        )


def settle_decoding(config: RunConfig, given: Collection[str]) -> None:
    """Put the blocks of a block model in the place of those that a yaml file chose for other models, and no other
    cache than its own. In other models a confidence threshold takes the place of `steps`, which is then as if every
    token took one. What the command line names (`given`) stays, to be checked."""
    block = config.model.known_block_length
    for group, decoding in (("evaluation", config.evaluation), ("data.sampling", config.data.sampling)):
        settled = {} if block is None else {"block_length": block, "block_cache": "none"}
        if block is None and decoding.confidence_threshold is not None:
            settled = {"steps": decoding.gen_length}
        for name, value in settled.items():
            if f"{group}.{name}" not in given:
                setattr(decoding, name, value)


def room_problems(decoding: Any, group: str, positions: int, name: str) -> Iterator[str]:
    """A sentence where an answer alone fills the positions of the model `name`, so that no prompt fits before it."""
    if decoding.gen_length >= positions:
        yield (
            f"{group}.gen_length is {decoding.gen_length}; {name} knows {positions} positions "
            f"(model.shape.max_sequence_length), which hold the prompt too; lower {group}.gen_length."
        )
