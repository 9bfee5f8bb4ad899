"""The typed schema of the group `model`; see laddpo/settings/schema.py. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING

from laddpo.models.block_length import expected


@dataclass
class Sizes:
    d_model: int = MISSING
    n_layers: int = MISSING
    n_heads: int = MISSING
    n_kv_heads: int = MISSING
    mlp_hidden_size: int = MISSING
    vocab_size: int = MISSING
    max_sequence_length: int = MISSING


@dataclass
class ModelShape(Sizes):
    """For `plan`, and checked against config.json. `n_experts` 0: an MLP; else each has `mlp_hidden_size`, and the
    first `dense_layers` blocks have an MLP of `dense_mlp_size` instead."""

    head_dim: int | None = None  # d_model / n_heads
    is_tied: bool = False  # the head is the embedding
    n_experts: int = 0
    experts_chosen: int = 0
    shared_experts: int = 0  # that every token goes through
    dense_layers: int = 0
    dense_mlp_size: int = 0


@dataclass
class LearningRates:
    """By adapter.kind."""

    lora: float = MISSING
    full: float = MISSING


@dataclass
class Recommended:
    """What suits this model; dpo, optim, data and sft take their defaults from here."""

    beta: float = MISSING
    learning_rate: LearningRates = field(default_factory=LearningRates)
    num_train_epochs: float = 1.0
    max_train_steps: int | None = None
    num_warmup_steps: int = 0
    per_device_train_batch_size: int = 1
    gradient_accumulation_steps: int = 64
    max_length: int = 1024
    save_steps: int = 500
    evaluate_every_steps: int | None = None


@dataclass
class ModelSettings:
    name: str = MISSING
    architecture: str = "LLaDAModelLM"
    model_name_or_path: str = MISSING
    revision: str | None = None
    attention: str | None = None  # bidirectional, block, or what config.json and the family say
    block_length: int | None = None  # what config.json and the family say
    shape: ModelShape = field(default_factory=ModelShape)
    recommended: Recommended = field(default_factory=Recommended)

    @property
    def known_block_length(self) -> int | None:
        """Tokens of the network's blocks, by settings and family; None: bidirectional. Compared with the checkpoint."""
        return expected(self.architecture, self.attention, self.block_length)
