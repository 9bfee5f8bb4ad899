"""LLaDA as our own transformers model: no remote code, the hub's key names, padding and packing both honoured.

A Llama-shaped transformer without causal mask and without biases: it reads a sequence in which some tokens are the mask
token and predicts all of them at once. LLaDA, arXiv:2502.09992. Shapes: B rows, L positions, T packed tokens, D width,
V logit columns (`embedding_size`, which may exceed `vocab_size`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers import initialization as init
from transformers.masking_utils import (
    create_bidirectional_mask,
    find_packed_sequence_indices,
    packed_sequence_mask_function,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput

from laddpo.errors import UserError
from laddpo.models.attention import PackedLayout, attend, length_order, token_order, varlen_problem
from laddpo.models.head import token_logps
from laddpo.models.llada_config import LLaDAConfig, refuse_dead_options
from laddpo.models.tokenwise import gated, rotate


@dataclass
class LLaDAOutput(ModelOutput):
    """logits [B, L, V] or, for chosen rows, [M, V]; token_logps [M]; hidden_states: embedding, blocks, normed last."""

    logits: Tensor | None = None
    token_logps: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


class LLaDAModelLM(PreTrainedModel):
    """The mask predictor with its vocabulary head (`model.transformer.ff_out`, not tied to the embedding).

    `packed_kernel` "auto" lets packed input use the variable-length kernel where it can run, "batched" never does.
    """

    config_class = LLaDAConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LLaDABlock"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    packed_kernel = "auto"

    def __init__(self, config: LLaDAConfig):
        refuse_dead_options(config)
        super().__init__(config)
        self.is_causal = False
        blocks = [LLaDABlock(config, index) for index in range(config.n_layers)]
        parts = {
            "wte": nn.Embedding(config.embedding_size, config.d_model),
            "blocks": nn.ModuleList(blocks),
            "ln_f": RMSNorm(config.d_model, config.rms_norm_eps),
            "ff_out": nn.Linear(config.d_model, config.embedding_size, bias=False),
        }
        self.model = nn.ModuleDict({"transformer": nn.ModuleDict(parts)})
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        lengths: list[int] | None = None,
        rows: Tensor | None = None,
        targets: Tensor | None = None,
        head_chunk: int | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        use_cache: bool | None = None,
    ) -> LLaDAOutput | tuple:
        """Logits of every position, or only what was asked for.

        input_ids [B, L]; attention_mask [B, L], 1 = real token. `lengths` says that B is 1 and the row holds sequences
        of these lengths end to end; position_ids that restart say the same in any row. `rows` [M] (flat indices into
        the B * L positions) limits the head to those rows; with `targets` [M] the answer is log p(targets), in
        float32, and no logits (`head_chunk` rows at a time). `use_cache` is accepted and means nothing here.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        parts = self.model["transformer"]
        x = parts["wte"](input_ids) if inputs_embeds is None else inputs_embeds
        x, rows, states = self._encode(x, attention_mask, position_ids, lengths, rows, output_hidden_states)
        if rows is not None:
            x = x.flatten(0, 1)[rows]
        if targets is None:
            output = LLaDAOutput(logits=parts["ff_out"](x), hidden_states=states)
        else:
            assert rows is not None, "targets belong to rows; rows were not given"
            logps = token_logps(x, parts["ff_out"].weight, targets, head_chunk)
            output = LLaDAOutput(token_logps=logps, hidden_states=states)
        return output.to_tuple() if return_dict is False else output

    def packed_hidden_states(self, input_ids: Tensor, position_ids: Tensor, lengths: list[int]) -> Tensor:
        """Final hidden states of sequences laid end to end, each exactly as if alone. input_ids [T] -> [T, D]"""
        x = self.model["transformer"]["wte"](input_ids[None])
        return self._encode(x, None, position_ids[None], lengths, None, False)[0][0]

    def _encode(self, x, attention_mask, position_ids, lengths, rows, keep_states):
        """Final-normed hidden states [B, L, D], rows as indices into them, and all states when asked for."""
        batch, length = x.shape[:2]
        lengths = lengths or self._lengths_of(attention_mask, position_ids, batch)
        back = None
        if lengths is not None:
            assert sum(lengths) == batch * length and attention_mask is None, "lengths must tile the input, unpadded"
            if position_ids is None:
                position_ids = torch.cat([torch.arange(n) for n in lengths]).to(x.device)
            elif len(position_ids) < batch:
                position_ids = position_ids.expand(batch, -1)
            x, position_ids = x.reshape(1, batch * length, -1), position_ids.reshape(1, -1)
            layout = PackedLayout.build(lengths, self._packed_route(x), x.device)
            if layout.offsets is None and (order := length_order(lengths)) is not None:
                layout = PackedLayout([lengths[i] for i in order])
                tokens = token_order(lengths, order).to(x.device)
                x, position_ids, back = x[:, tokens], position_ids[:, tokens], tokens.argsort()
            mask = None
        else:
            layout = None
            if position_ids is None:
                position_ids = torch.arange(length, device=x.device)[None]
            mask = self._mask(x, attention_mask, position_ids)
        x, states = self._run_blocks(x, position_ids, mask, layout, keep_states)
        if back is not None and rows is not None and not keep_states:
            return x, back[rows], None  # the rows move instead of the hidden states

        def restore(state: Tensor) -> Tensor:
            state = state if back is None else state[:, back]
            return state.reshape(batch, length, -1)

        return restore(x), rows, tuple(restore(state) for state in states) if keep_states else None

    def _run_blocks(self, x, position_ids, mask, layout, keep_states) -> tuple[Tensor, list[Tensor]]:
        parts = self.model["transformer"]
        rotation, states = self._rotation(position_ids), []
        for block in parts["blocks"]:
            if keep_states:
                states.append(x)
            x = block(x, rotation, mask, layout)
        x = parts["ln_f"](x)
        return x, [*states, x]

    def _rotation(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin of the rotary angles, float32: a bfloat16 angle of 1,000 is off by up to 2.

        # [B, L, 1, head_dim / 2] each

        Computed here, not kept in a buffer, which `.to(dtype)` would round.
        """
        dim = self.config.d_model // self.config.n_heads
        exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=position_ids.device) / dim
        angles = position_ids[..., None, None].float() * (1.0 / self.config.rope_theta**exponents)
        return angles.cos(), angles.sin()

    def _mask(self, x: Tensor, attention_mask: Tensor | None, position_ids: Tensor):
        """The padding mask in the form the attention implementation wants; None when all may see all."""
        if attention_mask is None:
            return None
        sequences = find_packed_sequence_indices(position_ids)
        if sequences is None:
            return create_bidirectional_mask(self.config, x, attention_mask)
        if self.config._attn_implementation.startswith("flash"):
            raise UserError(
                "packed sequences came with an attention_mask, which flash attention cannot combine; "
                "leave the mask out (packing needs no padding) or use hardware.attention=sdpa."
            )
        sequences = sequences.expand(len(x), -1).to(x.device)
        within = packed_sequence_mask_function(sequences)
        return create_bidirectional_mask(self.config, x, attention_mask, and_mask_function=within)

    def _lengths_of(self, attention_mask: Tensor | None, position_ids: Tensor | None, batch: int) -> list[int] | None:
        """Lengths of the sequences that restarting position_ids announce, over all rows; None when nothing restarts."""
        if attention_mask is not None or position_ids is None:
            return None
        sequences = find_packed_sequence_indices(position_ids)
        if sequences is None:
            return None
        return [count for row in sequences.expand(batch, -1) for count in torch.bincount(row).tolist()]

    def _packed_route(self, x: Tensor) -> str:
        """How packed input will be attended: "flash", "varlen" or "batched"."""
        attention, device = self.config._attn_implementation, x.device.type
        if attention.startswith("flash"):
            return "flash"
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        wanted = attention == "sdpa" and self.packed_kernel == "auto"
        return "varlen" if wanted and varlen_problem(x.device, dtype) is None else "batched"

    def get_input_embeddings(self) -> nn.Embedding:
        return self.model["transformer"]["wte"]

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.model["transformer"]["wte"] = value

    def get_output_embeddings(self) -> nn.Linear:
        return self.model["transformer"]["ff_out"]

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.model["transformer"]["ff_out"] = value

    def resize_token_embeddings(self, *args, **kwargs) -> nn.Embedding:
        """As in transformers; `embedding_size` follows, or the saved config would not describe the saved weights."""
        embedding = super().resize_token_embeddings(*args, **kwargs)
        self.config.embedding_size = self.config.vocab_size = embedding.num_embeddings
        return embedding

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


class LLaDABlock(GradientCheckpointingLayer):
    """Attention and gated MLP, each behind a norm and added to the residual. Attribute names are the hub's keys:
    `ff_proj` is the gate, `up_proj` the plain branch, `ff_out` the way down."""

    is_causal = False

    def __init__(self, config: LLaDAConfig, index: int):
        super().__init__()
        self.config, self.layer_idx = config, index
        self.head_dim = config.d_model // config.n_heads
        self.num_key_value_groups = config.n_heads // config.n_kv_heads
        self.scaling = self.head_dim**-0.5
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

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], mask=None, layout: PackedLayout | None = None):
        query, key, value = self.project(x, *rotation)
        return self.finish(x, attend(self, query, key, value, mask, layout).flatten(2))

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries and keys, and values. [B, L, D] -> [B, L, heads, head_dim] each"""
        x = self.attn_norm(x)
        query, key, value = (
            proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        return rotate(query, cos, sin), rotate(key, cos, sin), value

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """Everything after attention, token by token. [B, L, D] -> [B, L, D]"""
        x = x + self.attn_out(attended)
        hidden = self.ff_norm(x)
        return x + self.ff_out(gated(self.ff_proj(hidden), self.up_proj(hidden)))


class RMSNorm(nn.Module):
    """Root-mean-square norm, computed in float32 (float64 for float64), rounded BEFORE the weight as LLaDA was trained:
    one fused product with the weight moves bfloat16 logits by 0.14 on a two-block model."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * nn.functional.rms_norm(x, self.weight.shape, None, self.eps)


# What makes Auto classes and checkpoints find this class: a registered class wins over a checkpoint's own remote code.
AutoConfig.register("llada", LLaDAConfig, exist_ok=True)
AutoModel.register(LLaDAConfig, LLaDAModelLM, exist_ok=True)
AutoModelForCausalLM.register(LLaDAConfig, LLaDAModelLM, exist_ok=True)
