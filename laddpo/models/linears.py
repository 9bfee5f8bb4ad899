"""Where the parts of a network are by name: its blocks, the linear layers in them, and which of these a pattern means.
No torch: settings and plans ask, too.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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
MLP = ROLES[4:]
ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class Layout:
    """Names of modules. `linears`: those of a block, below the block; `{}` in a name stands for the number of an
    expert. `roles`: what they do, in the same order; roles that begin with `dense_` are of the first blocks, which then
    have no experts."""

    blocks: str
    head: str
    linears: tuple[str, ...]
    roles: tuple[str, ...] = ROLES

    @property
    def block(self) -> str:
        """A regular expression for the name of a block."""
        return rf"{re.escape(self.blocks)}\.\d+"

    def names(self, sizes: Any) -> list[str]:
        """Full names of the linear layers of a network of these sizes: a config, or the settings `model.shape`."""
        n_experts, dense, shared = (getattr(sizes, n, 0) for n in ("n_experts", "dense_layers", "shared_experts"))
        return [
            f"{self.blocks}.{block}.{name.format(expert)}"
            for block in range(max(1, sizes.n_layers))
            for name, role in zip(self.linears, self.roles, strict=True)
            if _is_in(role, block < dense, shared)
            for expert in range(n_experts if "{}" in name else 1)
        ]

    def patterns(self, last: Sequence[str]) -> list[str]:
        """Regular expressions for the linear layers of a block whose names end so, by name."""
        named = sorted((name.rpartition(".")[2], name) for name in self.linears if name.rpartition(".")[2] in last)
        return [_pattern(name) for _, name in named]

    def role(self, name: str) -> str:
        """What the linear layer of this name does, by its last parts. Example: model.layers.0.self_attn.o_proj -> o."""
        found = zip(self.linears, self.roles, strict=True)
        return next(role for linear, role in found if re.search(rf"(^|\.){_pattern(linear)}$", name))


def _pattern(linear: str) -> str:
    return re.escape(linear).replace(re.escape("{}"), r"\d+")


def _is_in(role: str, is_dense: bool, shared_experts: int) -> bool:
    """Whether a block has a linear layer of this role."""
    kind, _, part = role.rpartition("_")
    if part not in MLP:
        return True
    return kind == "dense" if is_dense else kind == "" or (kind == "shared" and shared_experts > 0)


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
    known = sorted({name.rpartition(".")[2] for name in layout.linears})
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
_MLP = tuple(f"{role}_proj" for role in MLP)
LLAMA = Layout("model.layers", "lm_head", (*_ATTENTION, *(f"mlp.{name}" for name in _MLP)))
LLAMA_MOE = Layout(
    *(LLAMA.blocks, LLAMA.head),
    (*_ATTENTION, *(f"mlp.experts.{{}}.{name}" for name in _MLP)),
)
LLADA2 = Layout(
    *(LLAMA.blocks, LLAMA.head),
    (
        *("attention.query_key_value", "attention.dense"),
        *(f"mlp.{place}{name}" for place in ("experts.{}.", "shared_experts.", "") for name in _MLP),
    ),
    ("qkv", "o", *(f"{kind}{role}" for kind in ("", "shared_", "dense_") for role in MLP)),
)
