"""Sizes of a transformer as plain numbers: what plans of memory and time count with. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from laddpo.models.linears import MLP, ROLES


@dataclass(frozen=True)
class Shape:
    """Sizes of the transformer. `vocab_size` counts the rows of embedding and head, `is_tied` that they are one.

    `head_dim` None: d_model / n_heads. `n_experts` 0: an MLP; else experts of `mlp_hidden_size`, of which a token takes
    `experts_chosen` and all `shared_experts`, in all blocks but the first `dense_layers`: those have an MLP of
    `dense_mlp_size`. Roles are those of laddpo/models/linears.py.
    """

    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    mlp_hidden_size: int
    vocab_size: int
    head_dim: int | None = None
    is_tied: bool = False
    n_experts: int = 0
    experts_chosen: int = 0
    has_qkv_bias: bool = False
    has_head_norms: bool = False
    dense_layers: int = 0
    dense_mlp_size: int = 0
    shared_experts: int = 0
    has_fused_qkv: bool = False

    @property
    def head_width(self) -> int:
        return self.head_dim or self.d_model // self.n_heads

    @property
    def query_width(self) -> int:
        return self.head_width * self.n_heads

    @property
    def kv_width(self) -> int:
        return self.head_width * self.n_kv_heads

    @property
    def active_mlp(self) -> int:
        """Width of the MLP that one token goes through."""
        return self.mlp_hidden_size * (self.experts_chosen + self.shared_experts if self.n_experts else 1)

    @property
    def roles(self) -> tuple[str, ...]:
        """What the linear layers of the blocks do."""
        attention = ("qkv", "o") if self.has_fused_qkv else ROLES[:4]
        shared = MLP if self.shared_experts else ()
        dense = MLP if self.dense_layers else ()
        return (*attention, *MLP, *(f"shared_{role}" for role in shared), *(f"dense_{role}" for role in dense))

    def linear(self, role: str) -> tuple[int, int]:
        """(inputs, outputs) of a block's linear layer."""
        width, query, keys = self.d_model, self.query_width, self.kv_width
        kind, _, part = role.rpartition("_")
        mlp = {"dense": self.dense_mlp_size, "shared": self.shared_experts * self.mlp_hidden_size}
        mlp = mlp.get(kind, self.mlp_hidden_size)
        outputs = {"q": query, "k": keys, "v": keys, "qkv": query + 2 * keys, "gate": mlp, "up": mlp}
        return {"o": query, "down": mlp}.get(part, width), outputs.get(part, width)

    def copies(self, role: str) -> int:
        """How many linear layers of a block have this role."""
        return self.n_experts if self.n_experts and role in MLP else 1

    def layers(self, role: str) -> int:
        """How many blocks have linear layers of this role."""
        if role.startswith("dense_"):
            return self.dense_layers
        return self.n_layers - (self.dense_layers if role.rpartition("_")[2] in MLP else 0)

    def count(self, role: str) -> int:
        """How many linear layers of the model have this role."""
        return self.copies(role) * self.layers(role)

    @property
    def linear_parameters(self) -> int:
        """Weights of the linear layers of all blocks."""
        return sum(math.prod(self.linear(role)) * self.count(role) for role in self.roles)

    @property
    def block_parameters(self) -> int:
        """Those of one block; of one with experts, if there are any."""
        roles = [role for role in self.roles if not role.startswith("dense_")]
        return sum(math.prod(self.linear(role)) * self.copies(role) for role in roles)

    @property
    def active_parameters(self) -> int:
        """Weights of the linear layers of all blocks that one token goes through."""
        passed = {role: self.experts_chosen if self.copies(role) > 1 else 1 for role in self.roles}
        return sum(math.prod(self.linear(role)) * self.layers(role) * passed[role] for role in self.roles)

    @property
    def block_extras(self) -> int:
        """A block's other weights: two norms, biases, norms of heads."""
        biases = self.has_qkv_bias * (self.query_width + 2 * self.kv_width)
        return 2 * self.d_model + biases + self.has_head_norms * 2 * self.head_width

    @property
    def router_parameters(self) -> int:
        """Weights that choose experts."""
        return (self.n_layers - self.dense_layers) * self.n_experts * self.d_model

    @property
    def vocabulary_parameters(self) -> int:
        """Weights of embedding and head."""
        return (1 if self.is_tied else 2) * self.vocab_size * self.d_model

    @property
    def parameters(self) -> int:
        """Weights of the whole model: blocks, last norm, embedding and head."""
        blocks = self.linear_parameters + self.n_layers * self.block_extras + self.router_parameters
        return blocks + self.d_model + self.vocabulary_parameters
