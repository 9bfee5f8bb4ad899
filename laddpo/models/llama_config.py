"""The configs of mask predictors under Llama's key names: iLLaDA, Dream, LLaDA-MoE, SDAR and the A2D
conversions.

In: the content of a hub config.json, in the hub's spelling. Each family is a class that says what its network has
(biases, norms of heads, experts); fields that ask for anything else are refused by name.
"""

from __future__ import annotations

from types import MappingProxyType

from transformers.configuration_utils import PreTrainedConfig

from laddpo.errors import UserError
from laddpo.models.families import LLAMA_NAMES, MOE_NAMES
from laddpo.models.foreign import FLAG, MOST_ID, Kind, either, listed, number, only, optional, text, whole

_NONE_OR_0 = only(None, 0.0)
# The fields that are taken from a checkpoint's config.json, and the values under which the network is the one here.
FIELDS: dict[str, Kind] = {
    "architectures": listed(text(100)),
    "hidden_size": whole(1, 2**17),
    "num_attention_heads": whole(1, 2**12),
    "num_key_value_heads": optional(whole(1, 2**12)),
    "num_hidden_layers": whole(1, 2**10),
    "intermediate_size": whole(1, 2**20),
    "head_dim": optional(whole(1, 2**12)),
    "vocab_size": whole(1, 2**24),
    "max_position_embeddings": whole(1, 2**30),
    "rope_theta": number(0, 1e15),
    "rms_norm_eps": number(0, 0.1),
    "initializer_range": number(0, 100),
    **dict.fromkeys(("mask_token_id", "bos_token_id", "eos_token_id", "pad_token_id"), optional(whole(0, MOST_ID))),
    "tie_word_embeddings": FLAG,
    "hidden_act": only("silu"),
    "attention_dropout": _NONE_OR_0,
    "attention_bias": only(None, False),
    "mlp_bias": only(None, False),
    "rope_scaling": only(None),
    "partial_rotary_factor": only(None, 1),
    "use_sliding_window": only(None, False),
    "layer_types": optional(listed(only("full_attention"))),
}
ILLADA_FIELDS = {**FIELDS, "layer_norm_eps": only(None), "resid_pdrop": _NONE_OR_0}
DREAM_FIELDS = {**FIELDS, "use_mrope": only(None, False)}
BLOCK_LENGTH = whole(1, 2**16)
A2D_FIELDS = {**FIELDS, "block_length": optional(BLOCK_LENGTH)}
SDAR_FIELDS = {**FIELDS, "block_size": BLOCK_LENGTH}
MOE_FIELDS = {
    **{name: kind for name, kind in FIELDS.items() if name != "intermediate_size"},
    "expert_intermediate_size": whole(1, 2**20),
    "num_experts": whole(1, 2**12),
    "num_experts_per_tok": whole(1, 2**12),
    "moe_layer_freq": either(only(None, 1), listed(only(1))),
    "moe_router_enable_expert_bias": only(None, False),
    "moe_router_score_function": only(None, "softmax"),
    "qk_layernorm": only(True),
    "routed_scaling_factor": only(None, 1),
    "router_num_group": only(None),
    "router_topk_group": only(None),
    "shared_expert_intermediate_size": only(None),
    "clip_qkv": only(None),
}


class LlamaLikeConfig(PreTrainedConfig):
    """The fields that mean anything, under the hub's names, and by this program's names (d_model, n_layers, ...).

    `num_key_value_heads` None means num_attention_heads, `head_dim` None means hidden_size / num_attention_heads.
    """

    attribute_map = {**LLAMA_NAMES, "init_std": "initializer_range"}  # noqa: RUF012
    fields, switches, inert = FIELDS, MappingProxyType({}), MappingProxyType({})
    has_qkv_bias = False
    has_head_norms = False  # of queries and keys, before the rotation
    n_experts = 0
    block_length: int | None = None  # of block-causal attention; None: bidirectional

    def __init_subclass__(cls, **kwargs):
        cls.__init__ = cls.__dict__.get("__init__", LlamaLikeConfig.__init__)  # transformers would write another one
        super().__init_subclass__(**kwargs)

    def __init__(
        self,
        *,
        hidden_size: int = 64,
        num_attention_heads: int = 4,
        num_key_value_heads: int | None = None,
        num_hidden_layers: int = 2,
        intermediate_size: int = 160,
        head_dim: int | None = None,
        vocab_size: int = 160,
        max_position_embeddings: int = 4096,
        rope_theta: float = 10000.0,
        rms_norm_eps: float = 1e-6,
        initializer_range: float = 0.02,
        mask_token_id: int | None = None,
        bos_token_id: int | None = None,
        eos_token_id: int | None = None,
        pad_token_id: int | None = None,
        **kwargs,
    ):
        self.hidden_size = hidden_size
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_attention_heads if num_key_value_heads is None else num_key_value_heads
        self.num_hidden_layers = num_hidden_layers
        self.intermediate_size = intermediate_size
        self.head_dim = hidden_size // num_attention_heads if head_dim is None else head_dim
        self.vocab_size = vocab_size
        self.max_position_embeddings = max_position_embeddings
        self.rope_theta = rope_theta
        self.rms_norm_eps = rms_norm_eps
        self.initializer_range = initializer_range
        self.mask_token_id = mask_token_id
        kwargs.setdefault("tie_word_embeddings", False)
        kwargs.pop("rope_scaling", None)  # null, as `fields` says
        special = {"bos_token_id": bos_token_id, "eos_token_id": eos_token_id, "pad_token_id": pad_token_id}
        super().__init__(**special, **kwargs)


class ILLaDAConfig(LlamaLikeConfig):
    """iLLaDA, arXiv 2606.25331: Llama's network, head tied to the embedding, no biases."""

    model_type = "illada"
    fields = ILLADA_FIELDS


class DreamConfig(LlamaLikeConfig):
    """Dream and Dream-Coder: Qwen2's network; the score of a token is read one position before it."""

    model_type = "Dream"
    fields = DREAM_FIELDS
    has_qkv_bias = True


class LLaDAMoEConfig(LlamaLikeConfig):
    """LLaDA-MoE: an MLP of experts, of which the router chooses some for each token; norms of heads."""

    model_type = "lladamoe"
    fields = MOE_FIELDS
    attribute_map = {  # noqa: RUF012
        **MOE_NAMES,
        "init_std": "initializer_range",
        "intermediate_size": "expert_intermediate_size",
    }
    has_head_norms = True

    def __init__(
        self, *, num_experts: int = 8, num_experts_per_tok: int = 2, expert_intermediate_size: int = 48, **kwargs
    ):
        kwargs.pop("intermediate_size", None)
        self.num_experts, self.num_experts_per_tok = num_experts, num_experts_per_tok
        super().__init__(intermediate_size=expert_intermediate_size, **kwargs)


class SDARConfig(LlamaLikeConfig):
    """SDAR, arXiv 2510.06303: Qwen3's network with block-causal attention."""

    model_type = "sdar"
    fields = SDAR_FIELDS
    attribute_map = {**LlamaLikeConfig.attribute_map, "block_length": "block_size"}  # noqa: RUF012
    has_head_norms = True

    def __init__(self, *, block_size: int = 4, **kwargs):
        self.block_size = block_size
        super().__init__(**kwargs)


class A2DQwen3Config(LlamaLikeConfig):
    """Qwen3 turned into a mask predictor: norms of heads, which may be wider than their share of the model."""

    fields = A2D_FIELDS
    model_type = "a2d-qwen3"
    has_head_norms = True


class A2DQwen2Config(LlamaLikeConfig):
    """Qwen2 or Qwen2.5 turned into a mask predictor."""

    fields = A2D_FIELDS
    model_type = "a2d-qwen2"
    has_qkv_bias = True


class A2DLlamaConfig(LlamaLikeConfig):
    """Llama turned into a mask predictor."""

    fields = A2D_FIELDS
    model_type = "a2d-llama"


def refuse_impossible(config: LlamaLikeConfig) -> None:
    """Raise `UserError` for sizes that fit no network."""
    problems = []
    if config.head_dim % 2:
        problems.append(f"model config: head_dim is {config.head_dim}; expected an even number. Change it.")
    if config.n_heads % config.n_kv_heads:
        problems.append(
            f"model config: num_attention_heads {config.n_heads} is no multiple of num_key_value_heads "
            f"{config.n_kv_heads}; change one."
        )
    if config.n_experts and config.experts_chosen > config.n_experts:
        problems.append(
            f"model config: num_experts_per_tok is {config.experts_chosen}, of {config.n_experts} experts; expected "
            "no more than there are. Correct one."
        )
    if problems:
        raise UserError(*problems)
