"""The linear layers inside the blocks of a LLaDA by name, and which of them a pattern means. No torch."""

from __future__ import annotations

import re
from collections.abc import Sequence

from laddpo.errors import nearest

BLOCKS = "model.transformer.blocks"
BLOCK_LINEARS = ("q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out")
ALL_LINEAR = "all-linear"


def linear_names(n_layers: int) -> list[str]:
    """Full names of the linear layers of so many blocks."""
    return [f"{BLOCKS}.{block}.{name}" for block in range(n_layers) for name in BLOCK_LINEARS]


def match_linears(pattern: str, names: Sequence[str]) -> list[str]:
    """Those of the full names that a value of adapter.target_modules means: by the end of the name, as q_proj does.

    What is no regular expression matches nothing.
    """
    if pattern == ALL_LINEAR:
        return list(names)
    try:
        return [name for name in names if re.fullmatch(rf"(.*\.)?({pattern})", name)]
    except re.error:
        return []


def unknown_target(pattern: str) -> str:
    """What is told of a value of adapter.target_modules that matches nothing."""
    guess = nearest(pattern, BLOCK_LINEARS)
    hint = f"did you mean {guess}? " if guess else ""
    return (
        f"adapter.target_modules is {pattern!r}, which matches no linear layer of a block; known: {ALL_LINEAR}, "
        f"{', '.join(sorted(BLOCK_LINEARS))}, or a regular expression over them; {hint}the head and the embedding "
        "cannot carry an adapter. Fix the name."
    )
