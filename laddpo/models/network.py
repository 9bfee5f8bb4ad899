"""What every mask predictor here shares: padded and packed input, chosen rows of the head, Auto classes' manners.

A network is its parts (embedding, blocks, last norm, head) and how they turn positions into angles; packing, masks and
the head on chosen rows are written once. Shapes: B rows, L positions, T packed tokens, D width, V logit columns
(`embedding_size`, which may exceed `vocab_size`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import (
    create_bidirectional_mask,
    find_packed_sequence_indices,
    packed_sequence_mask_function,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput

from laddpo.core.sequences import Context
from laddpo.errors import UserError
from laddpo.models.attention import PackedLayout, attend, length_order, token_order, varlen_problem
from laddpo.models.block_attention import SharedLayout, block_causal
from laddpo.models.families import family_of
from laddpo.models.head import token_logps


@dataclass
class MaskPredictorOutput(ModelOutput):
    """logits [B, L, V] or, for chosen rows, [M, V]; token_logps [M]; hidden_states: embedding, blocks, normed last."""

    logits: Tensor | None = None
    token_logps: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


class MaskPredictor(PreTrainedModel):
    """A transformer that predicts the masked tokens of a sequence, all at once or block after block.

    A family's class sets `blocks`, `last_norm` and the embedding, and says how positions are turned into angles. A tied
    head is no module: `head_weight` is the embedding's. `packed_kernel` "auto" lets packed input use the
    variable-length kernel where it can run, "batched" never.
    """

    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    packed_kernel = "auto"
    is_causal = False

    @property
    def reads_before(self) -> int:
        """How many positions before a token its score is read: what the row of its family says."""
        return family_of(self)[1].reads_before

    @property
    def block_length(self) -> int | None:
        """Positions of a block where attention is causal over blocks, on a grid from 0; None: bidirectional."""
        return getattr(self.config, "block_length", None)

    @property
    def blocks(self) -> nn.ModuleList:
        """The blocks of the network, in order."""
        raise NotImplementedError

    @property
    def last_norm(self) -> nn.Module:
        """The norm before the head."""
        raise NotImplementedError

    def rotation(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin of the rotary angles. `dtype`: that of the hidden states. # [B, L, 1, head_dim / 2] each"""
        return rotary_angles(position_ids, self.config.head_dim, self.config.rope_theta)

    @property
    def head_weight(self) -> Tensor:
        """The vocabulary matrix. # [V, D]"""
        return (self.get_output_embeddings() or self.get_input_embeddings()).weight

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of final hidden states. [..., D] -> [..., V]"""
        head = self.get_output_embeddings()
        return nn.functional.linear(hidden, self.head_weight) if head is None else head(hidden)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        lengths: list[int] | None = None,
        contexts: list[Context] | None = None,
        rows: Tensor | None = None,
        targets: Tensor | None = None,
        head_chunk: int | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        use_cache: bool | None = None,
    ) -> MaskPredictorOutput | tuple:
        """Logits of every position, or only what was asked for.

        input_ids [B, L]; attention_mask [B, L], 1 = real token. `lengths` says that B is 1 and the row holds sequences
        of these lengths end to end; position_ids that restart say the same in any row; `contexts` say how draws of a
        block model share clean tokens (laddpo/core/sequences.py). `rows` [M] (flat indices into
        the B * L positions) asks for the scores of the tokens there alone, wherever this family reads them; none may be
        the first of its sequence where it reads them one before. With `targets` [M] the answer is log p(targets), in
        float32, and no logits (`head_chunk` rows at a time). Without `rows`, logits are in the order in which the
        network writes them. `use_cache` is accepted and means nothing here.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if rows is not None and self.reads_before:
            rows = rows - self.reads_before
        x = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        if contexts is None:
            x, rows, states = self._encode(x, attention_mask, position_ids, lengths, rows, output_hidden_states)
        else:
            layout = SharedLayout.build(contexts, position_ids[0], self.block_length)
            x, states = self._run_blocks(x, position_ids, None, layout, output_hidden_states)
        if rows is not None:
            x = x.flatten(0, 1)[rows]
        if targets is None:
            output = MaskPredictorOutput(logits=self.logits(x), hidden_states=states)
        else:
            assert rows is not None, "targets belong to rows; rows were not given"
            logps = token_logps(x, self.head_weight, targets, head_chunk)
            output = MaskPredictorOutput(token_logps=logps, hidden_states=states)
        return output.to_tuple() if return_dict is False else output

    def packed_hidden_states(self, input_ids: Tensor, position_ids: Tensor, lengths: list[int]) -> Tensor:
        """Final hidden states of sequences laid end to end, each exactly as if alone. input_ids [T] -> [T, D]"""
        x = self.get_input_embeddings()(input_ids[None])
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
            layout = PackedLayout.build(lengths, self._packed_route(x), x.device, self.block_length)
            if layout.offsets is None and (order := length_order(lengths)) is not None:
                layout = PackedLayout([lengths[i] for i in order], block_length=self.block_length)
                tokens = token_order(lengths, order).to(x.device)
                x, position_ids, back = x[:, tokens], position_ids[:, tokens], tokens.argsort()
            mask = None
        else:
            layout = None
            if position_ids is None and self.block_length and attention_mask is not None:
                position_ids = (attention_mask.long().cumsum(1) - 1).clamp(min=0)  # padding moves no grid
            elif position_ids is None:
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
        rotation, states = self.rotation(position_ids, x.dtype), []
        for block in self.blocks:
            if keep_states:
                states.append(x)
            x = block(x, rotation, mask, layout)
        x = self.last_norm(x)
        return x, [*states, x]

    def _mask(self, x: Tensor, attention_mask: Tensor | None, position_ids: Tensor):
        """The padding mask in the form the attention implementation wants; None when all may see all."""
        if self.block_length:
            return self._block_mask(attention_mask, position_ids)
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

    def _block_mask(self, attention_mask: Tensor | None, position_ids: Tensor) -> Tensor:
        """True where a key is seen. A padding token sees itself, or its row of the softmax would be empty."""
        blocks = position_ids // self.block_length
        seen = block_causal(blocks, blocks)
        if (sequences := find_packed_sequence_indices(position_ids)) is not None:
            sequences = sequences.to(seen.device)
            seen = seen & (sequences[:, None] == sequences[..., None])
        if attention_mask is not None:
            itself = torch.eye(seen.shape[-1], dtype=torch.bool, device=seen.device)
            seen = seen & attention_mask.bool()[:, None] | itself
        return seen[:, None]

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
        if self.block_length:
            return "batched"
        attention, device = self.config._attn_implementation, x.device.type
        if attention.startswith("flash"):
            return "flash"
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        wanted = attention == "sdpa" and self.packed_kernel == "auto"
        return "varlen" if wanted and varlen_problem(x.device, dtype) is None else "batched"

    def resize_token_embeddings(self, *args, **kwargs) -> nn.Embedding:
        """As in transformers; the saved config follows, or it would not describe the saved weights."""
        embedding = super().resize_token_embeddings(*args, **kwargs)
        self.config.embedding_size = self.config.vocab_size = embedding.num_embeddings
        return embedding


class Block(GradientCheckpointingLayer):
    """A block in two parts that treat each token by itself, with attention between them. A family's class writes
    `project`, `finish` and sets `head_dim` and the numbers of heads."""

    is_causal = False

    def __init__(self, config, index: int):
        super().__init__()
        self.config, self.layer_idx = config, index
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.n_heads // config.n_kv_heads
        self.scaling = self.head_dim**-0.5

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], mask=None, layout: PackedLayout | None = None):
        query, key, value = self.project(x, *rotation)
        return self.finish(x, attend(self, query, key, value, mask, layout).flatten(2))

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries and keys, and values. [B, L, D] -> [B, L, heads, head_dim] each"""
        raise NotImplementedError

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """Everything after attention, token by token. [B, L, D] -> [B, L, D]"""
        raise NotImplementedError


class RMSNorm(nn.Module):
    """Root-mean-square norm, computed in float32 (float64 for float64), rounded BEFORE the weight as these models were
    trained: one fused product with the weight moves bfloat16 logits by 0.14 on a two-block LLaDA."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * nn.functional.rms_norm(x, self.weight.shape, None, self.eps)


def rotary_angles(position_ids: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin of the rotary angles, float32: a bfloat16 angle of 1,000 is off by up to 2.

    # [B, L, 1, head_dim / 2] each

    Computed at every call, not kept in a buffer, which `.to(dtype)` would round.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=position_ids.device) / head_dim
    angles = position_ids[..., None, None].float() * (1.0 / theta**exponents)
    return angles.cos(), angles.sin()
