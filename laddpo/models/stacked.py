"""Checkpoints whose experts are stacked: one tensor for all of a layer. Here they get the hub's names, one for each.

transformers 5 writes gate and up in one tensor, experts.gate_up_proj [experts, 2 * inner, width], beside
experts.down_proj [experts, width, inner]. The public training code of LLaDA2 writes three tensors:
experts.gate_proj [experts, inner, width], up_proj and down_proj.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from torch import Tensor

STACKED = re.compile(r"(.+\.experts)\.(gate_up_proj|gate_proj|up_proj|down_proj)")


def split_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors of a file, with those of stacked experts as they are split."""
    found = {}
    for name, shape in shapes.items():
        parts = _parts(name) if len(shape) == 3 else ()
        if parts and shape[1] % len(parts) == 0:
            each = (shape[1] // len(parts), shape[2])
            found |= {f"{place}.{i}.{part}.weight": each for place, part in parts for i in range(shape[0])}
        else:
            found[name] = tuple(shape)
    return found


def split_tensors(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a file by their hub names. Those of stacked experts are views: nothing is copied."""
    for name, tensor in tensors.items():
        parts = _parts(name)
        for (place, part), stack in zip(parts, tensor.chunk(len(parts), 1) if parts else (), strict=True):
            yield from ((f"{place}.{expert}.{part}.weight", each) for expert, each in enumerate(stack))
        if not parts:
            yield name, tensor


def are_stacked(names: Sequence[str]) -> bool:
    return any(map(_parts, names))


def read_split(files: Sequence[Path]) -> dict[str, Tensor]:
    """All tensors of these files by their hub names; they stay in the files until they are used."""
    from safetensors.torch import load_file

    return {name: tensor for file in files for name, tensor in split_tensors(load_file(file))}


def _parts(name: str) -> list[tuple[str, str]]:
    """What a tensor of stacked experts holds, as (place of the experts, projection) in order; nothing for others."""
    found = STACKED.fullmatch(name)
    if found is None:
        return []
    place, kind = found.groups()
    return [(place, part) for part in (("gate_proj", "up_proj") if kind == "gate_up_proj" else (kind,))]
