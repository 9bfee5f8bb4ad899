"""A stand-in for the public code that an export's `auto_map` names: the network of LLaDA under the hub's names.

Plain PyTorch. A config that describes another network is an error.
"""

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention, silu
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from .configuration_llada import LLaDAConfig

# The value of each switch for the network that stands here.
LLADA = {
    "activation_type": "silu", "block_type": "llama", "block_group_size": 1, "alibi": False, "rope": True,
    "rope_full_precision": True, "attention_dropout": 0.0, "residual_dropout": 0.0, "embedding_dropout": 0.0,
    "attention_layer_norm": False, "input_emb_norm": False, "layer_norm_type": "rms", "layer_norm_with_affine": True,
    "include_qkv_bias": False, "include_bias": False, "bias_for_layer_norm": False, "scale_logits": False,
    "weight_tying": False, "multi_query_attention": None,
}  # fmt: skip


class RmsNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        return self.weight * x * (x.pow(2).mean(-1, keepdim=True) + self.eps).rsqrt()


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        wide, inner = config.d_model, config.mlp_hidden_size or config.mlp_ratio * config.d_model
        self.heads, self.kv_heads = config.n_heads, config.n_kv_heads or config.n_heads
        self.width, self.theta = wide // self.heads, config.rope_theta
        self.attn_norm, self.ff_norm = (RmsNorm(wide, config.rms_norm_eps) for _ in range(2))
        self.q_proj, self.attn_out = (nn.Linear(wide, wide, bias=False) for _ in range(2))
        self.k_proj, self.v_proj = (nn.Linear(wide, self.kv_heads * self.width, bias=False) for _ in range(2))
        self.ff_proj, self.up_proj = (nn.Linear(wide, inner, bias=False) for _ in range(2))
        self.ff_out = nn.Linear(inner, wide, bias=False)

    def rotated(self, x):
        angle = torch.arange(x.shape[-2])[:, None] / self.theta ** (torch.arange(0, self.width, 2) / self.width)
        cos, sin = (part(torch.cat([angle, angle], -1)).to(x.dtype) for part in (torch.cos, torch.sin))
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat([-second, first], -1) * sin

    def forward(self, x):
        h = self.attn_norm(x)
        q, k, v = (
            layer(h).unflatten(-1, (-1, self.width)).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = scaled_dot_product_attention(self.rotated(q), self.rotated(k), v, enable_gqa=self.heads > self.kv_heads)
        x = x + self.attn_out(mixed.transpose(1, 2).flatten(2))
        h = self.ff_norm(x)
        return x + self.ff_out(silu(self.ff_proj(h)) * self.up_proj(h))


class LLaDAModel(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.embedding_size, config.d_model),
                "blocks": nn.ModuleList(Block(config) for _ in range(config.n_layers)),
                "ln_f": RmsNorm(config.d_model, config.rms_norm_eps),
                "ff_out": nn.Linear(config.d_model, config.embedding_size, bias=False),
            }
        )

    def forward(self, input_ids):
        x = self.transformer.wte(input_ids)
        for block in self.transformer.blocks:
            x = block(x)
        return self.transformer.ff_out(self.transformer.ln_f(x))


class LLaDAModelLM(PreTrainedModel):
    config_class = LLaDAConfig

    def __init__(self, config):
        super().__init__(config)
        wrong = {name: getattr(config, name) for name, value in LLADA.items() if getattr(config, name) != value}
        if wrong:
            raise ValueError(f"another network is described: {wrong}")
        self.model = LLaDAModel(config)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, **unused):
        return CausalLMOutput(logits=self.model(input_ids))
