"""Sizes of a transformer as plain numbers: what plans of memory and time count with. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from laddpo.models.linears import ROLES


@dataclass(frozen=True)
class Shape:
    """Sizes of the transformer. `vocab_size` counts the rows of embedding and head, `is_tied` that they are one.

    `head_dim` None: d_model / n_heads. `n_experts` 0: an MLP; else experts of `mlp_hidden_size`, of which a token takes
    `experts_chosen`.
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
        return self.mlp_hidden_size * (self.experts_chosen if self.n_experts else 1)

    def linear(self, role: str) -> tuple[int, int]:
        """(inputs, outputs) of a block's linear layer."""
        width, mlp, query = self.d_model, self.mlp_hidden_size, self.query_width
        outputs = {"q": query, "k": self.kv_width, "v": self.kv_width, "gate": mlp, "up": mlp}
        return {"o": query, "down": mlp}.get(role, width), outputs.get(role, width)

    def copies(self, role: str) -> int:
        """How many linear layers of a block have this role."""
        return self.n_experts if self.n_experts and role in ("gate", "up", "down") else 1

    @property
    def block_parameters(self) -> int:
        """Weights of the linear layers of one block."""
        return sum(a * b * self.copies(role) for role in ROLES for a, b in [self.linear(role)])

    @property
    def active_parameters(self) -> int:
        """Those of the linear layers that one token goes through."""
        chosen = {role: self.experts_chosen if self.copies(role) > 1 else 1 for role in ROLES}
        return sum(a * b * chosen[role] for role in ROLES for a, b in [self.linear(role)])

    @property
    def block_extras(self) -> int:
        """A block's other weights: two norms, biases, norms of heads, the router."""
        biases = self.has_qkv_bias * (self.query_width + 2 * self.kv_width)
        return 2 * self.d_model + biases + self.has_head_norms * 2 * self.head_width + self.n_experts * self.d_model

    @property
    def vocabulary_parameters(self) -> int:
        """Weights of embedding and head."""
        return (1 if self.is_tied else 2) * self.vocab_size * self.d_model

    @property
    def parameters(self) -> int:
        """Weights of the whole model: blocks, last norm, embedding and head."""
        return self.n_layers * (self.block_parameters + self.block_extras) + self.d_model + self.vocabulary_parameters
