"""LLaDA as our own transformers model: no remote code, the hub's key names, padding and packing both honoured.

A Llama-shaped transformer without causal mask and without biases: it reads a sequence in which some tokens are the mask
token and predicts all of them at once. LLaDA, arXiv:2502.09992. Packing and the head on chosen rows:
laddpo/models/network.py.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers import initialization as init

from laddpo.models.llada_config import LLaDAConfig, refuse_dead_options
from laddpo.models.network import Block, MaskPredictor, RMSNorm
from laddpo.models.tokenwise import gated, rotate


class LLaDAModelLM(MaskPredictor):
    """The mask predictor with its vocabulary head (`model.transformer.ff_out`, not tied to the embedding)."""

    config_class = LLaDAConfig
    _no_split_modules = ["LLaDABlock"]  # noqa: RUF012

    def __init__(self, config: LLaDAConfig):
        refuse_dead_options(config)
        super().__init__(config)
        blocks = [LLaDABlock(config, index) for index in range(config.n_layers)]
        parts = {
            "wte": nn.Embedding(config.embedding_size, config.d_model),
            "blocks": nn.ModuleList(blocks),
            "ln_f": RMSNorm(config.d_model, config.rms_norm_eps),
            "ff_out": nn.Linear(config.d_model, config.embedding_size, bias=False),
        }
        self.model = nn.ModuleDict({"transformer": nn.ModuleDict(parts)})
        self.post_init()

    @property
    def blocks(self) -> nn.ModuleList:
        return self.model["transformer"]["blocks"]

    @property
    def last_norm(self) -> nn.Module:
        return self.model["transformer"]["ln_f"]

    def get_input_embeddings(self) -> nn.Embedding:
        return self.model["transformer"]["wte"]

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.model["transformer"]["wte"] = value

    def get_output_embeddings(self) -> nn.Linear:
        return self.model["transformer"]["ff_out"]

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.model["transformer"]["ff_out"] = value

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """`init_fn` "mitchell": std 1 / sqrt(fan in), and smaller with depth where a block writes to the residual."""
        if isinstance(module, RMSNorm):
            init.ones_(module.weight)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=self._std(module.embedding_dim))
        elif isinstance(module, nn.Linear):
            depth = getattr(module, "residual_depth", 0)
            std = self._std(module.in_features) / math.sqrt(2 * depth if depth else 1)
            init.trunc_normal_(module.weight, std=std, a=-3 * std, b=3 * std)

    def _std(self, fan_in: int) -> float:
        return fan_in**-0.5 if self.config.init_fn == "mitchell" else self.config.init_std


class LLaDABlock(Block):
    """Attention and gated MLP, each behind a norm and added to the residual. Attribute names are the hub's keys:
    `ff_proj` is the gate, `up_proj` the plain branch, `ff_out` the way down."""

    def __init__(self, config: LLaDAConfig, index: int):
        super().__init__(config, index)
        width, kv_width, mlp_width = config.d_model, config.n_kv_heads * self.head_dim, config.mlp_hidden_size
        self.attn_norm = RMSNorm(width, config.rms_norm_eps)
        self.ff_norm = RMSNorm(width, config.rms_norm_eps)
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, kv_width, bias=False)
        self.v_proj = nn.Linear(width, kv_width, bias=False)
        self.attn_out = nn.Linear(width, width, bias=False)
        self.ff_proj = nn.Linear(width, mlp_width, bias=False)
        self.up_proj = nn.Linear(width, mlp_width, bias=False)
        self.ff_out = nn.Linear(mlp_width, width, bias=False)
        self.attn_out.residual_depth = self.ff_out.residual_depth = index + 1

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.attn_norm(x)
        query, key, value = (
            proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        return rotate(query, cos, sin), rotate(key, cos, sin), value

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + self.attn_out(attended)
        hidden = self.ff_norm(x)
        return x + self.ff_out(gated(self.ff_proj(hidden), self.up_proj(hidden)))


# What makes Auto classes and checkpoints find this class: a registered class wins over a checkpoint's own remote code.
AutoConfig.register("llada", LLaDAConfig, exist_ok=True)
AutoModel.register(LLaDAConfig, LLaDAModelLM, exist_ok=True)
AutoModelForCausalLM.register(LLaDAConfig, LLaDAModelLM, exist_ok=True)
