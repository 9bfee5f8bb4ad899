"""Mask predictors under Llama's key names: iLLaDA, Dream, LLaDA-MoE, SDAR, and Qwen and Llama models that were turned
into mask predictors.

One network with what a family's config says of it: biases of queries, keys and values, norms of heads, a tied head, an
MLP or experts. Written here, not taken from transformers: packing, checkpointing, compilation, block caches and the
memory plan rely on a block of two token-wise parts with attention between them, in every version of that library.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers import initialization as init

from laddpo.models.experts import Experts, GatedMLP, Router, SoftmaxRouter
from laddpo.models.llama_config import (
    A2DLlamaConfig,
    A2DQwen2Config,
    A2DQwen3Config,
    DreamConfig,
    ILLaDAConfig,
    LLaDAMoEConfig,
    LlamaLikeConfig,
    SDARConfig,
    refuse_impossible,
)
from laddpo.models.network import Block, MaskPredictor, RMSNorm, rotary_angles
from laddpo.models.tokenwise import rotate


class LlamaLike(MaskPredictor):
    """Embedding, blocks, norm and head. A tied head is the embedding itself: one tensor, trained and saved once."""

    _no_split_modules = ["LlamaBlock"]  # noqa: RUF012
    embedding = "embed_tokens"  # the hub's name

    def __init__(self, config: LlamaLikeConfig):
        refuse_impossible(config)
        super().__init__(config)
        parts = {
            self.embedding: nn.Embedding(config.vocab_size, config.d_model),
            "layers": nn.ModuleList(self.new_block(index) for index in range(config.n_layers)),
            "norm": RMSNorm(config.d_model, config.rms_norm_eps),
        }
        self.model = nn.ModuleDict(parts)
        self.lm_head = None if config.tie_word_embeddings else nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.post_init()

    def new_block(self, index: int) -> Block:
        return LlamaBlock(self.config, index)

    @property
    def blocks(self) -> nn.ModuleList:
        return self.model["layers"]

    @property
    def last_norm(self) -> nn.Module:
        return self.model["norm"]

    def rotation(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Rounded to the dtype of the hidden states, as these families were trained; LLaDA keeps float32."""
        cos, sin = rotary_angles(position_ids, self.config.head_dim, self.config.rope_theta)
        return cos.to(dtype), sin.to(dtype)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.model[self.embedding]

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.model[self.embedding] = value

    def get_output_embeddings(self) -> nn.Linear | None:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.lm_head = value

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.init_std
        if isinstance(module, RMSNorm):
            init.ones_(module.weight)
        elif isinstance(module, nn.Embedding | nn.Linear | Router):
            init.normal_(module.weight, std=std)
            if getattr(module, "bias", None) is not None:
                init.zeros_(module.bias)


class LlamaBlock(Block):
    """Attention and MLP, each behind a norm and added to the residual. Attribute names are the hub's keys."""

    def __init__(self, config: LlamaLikeConfig, index: int):
        super().__init__(config, index)
        self.input_layernorm = RMSNorm(config.d_model, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.d_model, config.rms_norm_eps)
        sizes = config.d_model, config.mlp_hidden_size
        self.mlp = Experts(*sizes, config.n_experts, _router(config)) if config.n_experts else GatedMLP(*sizes)

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        attention, x = self.self_attn, self.input_layernorm(x)
        query, key, value = (
            proj(x).unflatten(-1, (-1, self.head_dim))
            for proj in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        if attention.q_norm is not None:
            query, key = attention.q_norm(query), attention.k_norm(key)
        return rotate(query, cos, sin), rotate(key, cos, sin), value

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + self.self_attn.o_proj(attended)
        return x + self.mlp(self.post_attention_layernorm(x))


class Attention(nn.Module):
    """The weights of attention; what is done with them is in the block."""

    def __init__(self, config: LlamaLikeConfig):
        super().__init__()
        width, query, keys = config.d_model, config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        self.q_proj = nn.Linear(width, query, bias=config.has_qkv_bias)
        self.k_proj = nn.Linear(width, keys, bias=config.has_qkv_bias)
        self.v_proj = nn.Linear(width, keys, bias=config.has_qkv_bias)
        self.o_proj = nn.Linear(query, width, bias=False)
        self.q_norm = self.k_norm = None
        if config.has_head_norms:
            self.q_norm, self.k_norm = (RMSNorm(config.head_dim, config.rms_norm_eps) for _ in "qk")


def _router(config: LlamaLikeConfig) -> Router:
    return SoftmaxRouter(config.d_model, config.n_experts, config.experts_chosen)


class ILLaDAForCausalLM(LlamaLike):
    config_class = ILLaDAConfig


class DreamModel(LlamaLike):
    config_class = DreamConfig


class LLaDAMoEModelLM(LlamaLike):
    config_class = LLaDAMoEConfig


class SDARForCausalLM(LlamaLike):
    config_class = SDARConfig


class A2DQwen3LMHeadModel(LlamaLike):
    config_class = A2DQwen3Config


class A2DQwen2LMHeadModel(LlamaLike):
    config_class = A2DQwen2Config


class A2DLlamaLMHeadModel(LlamaLike):
    config_class = A2DLlamaConfig


for _network in (
    *(ILLaDAForCausalLM, DreamModel, LLaDAMoEModelLM, SDARForCausalLM),
    *(A2DQwen3LMHeadModel, A2DQwen2LMHeadModel, A2DLlamaLMHeadModel),
):
    AutoConfig.register(_network.config_class.model_type, _network.config_class, exist_ok=True)
    AutoModel.register(_network.config_class, _network, exist_ok=True)
    AutoModelForCausalLM.register(_network.config_class, _network, exist_ok=True)
