"""LLaDA2: block diffusion with experts, under its own key names. arXiv 2512.15745.

Differs from its neighbours in laddpo/models/llama.py by: queries, keys and values in one matrix; a rotation of the
first part of each head; dense first blocks; a router that ranks experts in groups, and a shared expert.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from laddpo.models.experts import Experts, GatedMLP, Router
from laddpo.models.llada2_config import LLaDA2MoeConfig, refuse_impossible_experts
from laddpo.models.llama import LlamaLike
from laddpo.models.network import Block, RMSNorm, rotary_angles
from laddpo.models.tokenwise import rotate


class LLaDA2MoeModelLM(LlamaLike):
    config_class = LLaDA2MoeConfig
    embedding = "word_embeddings"
    _no_split_modules = ["LLaDA2Block"]  # noqa: RUF012
    _keep_in_fp32_modules_strict = ["mlp.gate"]  # noqa: RUF012 - which expert a token takes must not depend on rounding

    def __init__(self, config: LLaDA2MoeConfig):
        refuse_impossible_experts(config)
        super().__init__(config)

    def new_block(self, index: int) -> Block:
        return LLaDA2Block(self.config, index)

    def rotation(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        cos, sin = rotary_angles(position_ids, self.config.rotary_width, self.config.rope_theta)
        return cos.to(dtype), sin.to(dtype)


class LLaDA2Block(Block):
    """Attention, then an MLP or experts, each behind a norm and added to the residual."""

    def __init__(self, config: LLaDA2MoeConfig, index: int):
        super().__init__(config, index)
        width = config.d_model
        self.input_layernorm = RMSNorm(width, config.rms_norm_eps)
        self.attention = Attention(config)
        self.post_attention_layernorm = RMSNorm(width, config.rms_norm_eps)
        if index < config.dense_layers:
            self.mlp = GatedMLP(width, config.dense_mlp_size)
        else:
            inner, shared = config.mlp_hidden_size, config.shared_experts * config.mlp_hidden_size
            self.mlp = Experts(width, inner, config.n_experts, GroupedRouter(config), shared)

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        config, attention = self.config, self.attention
        heads = attention.query_key_value(self.input_layernorm(x)).unflatten(-1, (-1, self.head_dim))
        query, key, value = heads.split((config.n_heads, config.n_kv_heads, config.n_kv_heads), dim=-2)
        query, key = attention.query_layernorm(query), attention.key_layernorm(key)
        return _rotate_first(query, cos, sin), _rotate_first(key, cos, sin), value

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + self.attention.dense(attended)
        return x + self.mlp(self.post_attention_layernorm(x))


class Attention(nn.Module):
    """The weights of attention. Rows of `query_key_value`: all heads of queries, then of keys, then of values."""

    def __init__(self, config: LLaDA2MoeConfig):
        super().__init__()
        query, keys = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        self.query_key_value = nn.Linear(config.d_model, query + 2 * keys, bias=False)
        self.dense = nn.Linear(query, config.d_model, bias=False)
        self.query_layernorm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.key_layernorm = RMSNorm(config.head_dim, config.rms_norm_eps)


class GroupedRouter(Router):
    """Chooses the best experts of the best groups. The bias counts for the choice alone; a weight is the expert's own
    score among those of the chosen. All in float32 or wider, under autocast too."""

    def __init__(self, config: LLaDA2MoeConfig):
        super().__init__(config.d_model, config.n_experts, config.experts_chosen)
        self.groups, self.groups_chosen, self.scale = config.n_group, config.topk_group, config.routed_scaling_factor
        self.register_buffer("expert_bias", torch.zeros(config.n_experts))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(x.device.type, enabled=False):
            wide = torch.promote_types(x.dtype, torch.float32)
            scores = nn.functional.linear(x.to(wide), self.weight.to(wide)).sigmoid()  # [T, experts]
            chosen = self.choose(scores.detach() + self.expert_bias)
            weights = scores.gather(1, chosen)
            if self.chosen > 1:
                weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)  # as published
            return weights * self.scale, chosen

    def choose(self, scores: Tensor) -> Tensor:
        """The experts with the highest scores among those of the chosen groups. [T, experts] -> [T, k]"""
        by_group = scores.unflatten(1, (self.groups, -1))
        ranks = by_group.topk(2, dim=-1).values.sum(-1)  # of a group: its two best
        others = torch.ones_like(ranks, dtype=torch.bool).scatter(1, ranks.topk(self.groups_chosen).indices, False)
        return by_group.masked_fill(others[..., None], -torch.inf).flatten(1).topk(self.chosen).indices


def _rotate_first(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The first part of each head, as wide as the angles ask for, is turned; the rest passes."""
    turned, rest = x.tensor_split((2 * cos.shape[-1],), dim=-1)
    return torch.cat([rotate(turned, cos, sin), rest], dim=-1)


AutoConfig.register(LLaDA2MoeConfig.model_type, LLaDA2MoeConfig, exist_ok=True)
AutoModel.register(LLaDA2MoeConfig, LLaDA2MoeModelLM, exist_ok=True)
AutoModelForCausalLM.register(LLaDA2MoeConfig, LLaDA2MoeModelLM, exist_ok=True)
