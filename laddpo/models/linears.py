"""Where the parts of a network are by name: its blocks, the linear layers in them, and which of these a pattern means.
No torch: settings and plans ask, too.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from laddpo.errors import nearest

ROLES = (
    "q",
    "k",
    "v",
    "o",
    "gate",
    "up",
    "down",
)  # what a linear layer of a block does, in the order of Layout.linears
ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class Layout:
    """Names of modules. `linears`: those of a block by their role in ROLES, below the block; `{}` in a name stands for
    the number of an expert."""

    blocks: str
    head: str
    linears: tuple[str, ...]

    @property
    def block(self) -> str:
        """A regular expression for the name of a block."""
        return rf"{re.escape(self.blocks)}\.\d+"

    def names(self, n_layers: int, n_experts: int = 0) -> list[str]:
        """Full names of the linear layers of so many blocks."""
        return [
            f"{self.blocks}.{block}.{name.format(expert)}"
            for block in range(n_layers)
            for name in self.linears
            for expert in range(n_experts if "{}" in name else 1)
        ]

    def patterns(self, last: Sequence[str]) -> list[str]:
        """Regular expressions for the linear layers of a block whose names end so, by name."""
        named = sorted((name.rpartition(".")[2], name) for name in self.linears if name.rpartition(".")[2] in last)
        return [re.escape(name).replace(re.escape("{}"), r"\d+") for _, name in named]

    def role(self, name: str) -> str:
        """What the linear layer of this name does, by its last part. Example: o_proj -> o."""
        last = [linear.rpartition(".")[2] for linear in self.linears]
        return ROLES[last.index(name.rpartition(".")[2])]


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


def unknown_target(pattern: str, layout: Layout) -> str:
    """What is told of a value of adapter.target_modules that matches nothing."""
    known = sorted(name.rpartition(".")[2] for name in layout.linears)
    guess = nearest(pattern, known)
    hint = f"did you mean {guess}? " if guess else ""
    return (
        f"adapter.target_modules is {pattern!r}, which matches no linear layer of a block; known: {ALL_LINEAR}, "
        f"{', '.join(known)}, or a regular expression over them; {hint}the head and the embedding "
        "cannot carry an adapter. Fix the name."
    )


LLADA = Layout(
    "model.transformer.blocks",
    "model.transformer.ff_out",
    ("q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out"),
)
_ATTENTION = tuple(f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj"))
_MLP = ("gate_proj", "up_proj", "down_proj")
LLAMA = Layout("model.layers", "lm_head", (*_ATTENTION, *(f"mlp.{name}" for name in _MLP)))
LLAMA_MOE = Layout(
    *(LLAMA.blocks, LLAMA.head),
    (*_ATTENTION, *(f"mlp.experts.{{}}.{name}" for name in _MLP)),
)
