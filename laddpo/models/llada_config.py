"""The config of a LLaDA checkpoint: which fields mean anything, and which of the original's switches are refused.

In: the content of a hub config.json. Out: `LLaDAConfig`, or one `UserError` naming every field that asks for a network
this program does not compute.
"""

from __future__ import annotations

import json

from transformers.configuration_utils import PreTrainedConfig

from laddpo.errors import UserError
from laddpo.models.foreign import FLAG, MOST_ID, Kind, listed, number, only, optional, text, whole

# The original's switches that decide what is computed, each with the one value that this model computes with.
SWITCHES = {
    "activation_type": "silu",
    "alibi": False,
    "attention_dropout": 0.0,
    "attention_layer_norm": False,
    "bias_for_layer_norm": False,
    "block_group_size": 1,
    "block_type": "llama",
    "embedding_dropout": 0.0,
    "include_bias": False,
    "include_qkv_bias": False,
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "residual_dropout": 0.0,
    "rope": True,
    "rope_full_precision": True,
    "scale_logits": False,
    "tie_word_embeddings": False,
    "weight_tying": False,
}
# The original's other fields, as LLaDA-8B has them: without effect on what this model computes.
INERT = {
    "alibi_bias_max": 8.0,
    "attention_layer_norm_with_affine": True,
    "flash_attention": False,
    "init_cutoff_factor": None,
    "init_device": "meta",
    "multi_query_attention": None,
    "precision": "amp_bf16",
    "use_cache": False,
}
# Fields whose null is no switch: the allowed values, and how to say so.
NULL_OR = {"clip_qkv": ((), "null"), "multi_query_attention": ((False,), "false or null")}
# The fields that are taken from a checkpoint's config.json. Other spellings (hidden_size for d_model), classes, kernels
# and files that it may name are not.
CONFIG_FIELDS: dict[str, Kind] = {
    "architectures": listed(text(100)),
    "d_model": whole(1, 2**17),
    "n_heads": whole(1, 2**12),
    "n_kv_heads": optional(whole(1, 2**12)),
    "n_layers": whole(1, 2**10),
    "mlp_hidden_size": optional(whole(1, 2**20)),
    "mlp_ratio": whole(1, 2**10),
    "vocab_size": whole(1, 2**24),
    "embedding_size": optional(whole(1, 2**24)),
    "max_sequence_length": whole(1, 2**30),
    "rope_theta": number(0, 1e15),
    "rms_norm_eps": number(0, 0.1),
    "init_fn": text(100),
    "init_std": number(0, 100),
    **dict.fromkeys(("mask_token_id", "bos_token_id", "eos_token_id", "pad_token_id"), optional(whole(0, MOST_ID))),
    **{name: optional(only(value)) for name, value in SWITCHES.items()},
    **{name: optional(only(*allowed)) if allowed else only(None) for name, (allowed, _) in NULL_OR.items()},
    # of another place for every token, which the original does not compute either
    "rope_scaling": only(None),
    # read by nothing here, and kept for whoever reads our config.json
    "alibi_bias_max": optional(number(0, 1e6)),
    "attention_layer_norm_with_affine": optional(FLAG),
    "flash_attention": optional(FLAG),
    "init_cutoff_factor": optional(number(0, 1e6)),
    "precision": optional(text(100)),
    "use_cache": optional(FLAG),
}


class LLaDAConfig(PreTrainedConfig):
    """The fields of a hub LLaDA config.json that mean anything; the rest travels along untouched.

    `mlp_hidden_size` None means mlp_ratio * d_model, `n_kv_heads` None means n_heads, `embedding_size` None means
    vocab_size. Switches of the original that no published LLaDA uses are refused when a model is built.
    """

    model_type = "llada"
    fields, switches, inert = CONFIG_FIELDS, SWITCHES, INERT
    block_length = None  # of block-causal attention; None: bidirectional
    attribute_map = {  # noqa: RUF012 - transformers' own spelling
        "hidden_size": "d_model",
        "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_kv_heads",
        "num_hidden_layers": "n_layers",
        "intermediate_size": "mlp_hidden_size",
        "max_position_embeddings": "max_sequence_length",
        "initializer_range": "init_std",
    }

    def __init__(
        self,
        *,
        d_model: int = 4096,
        n_heads: int = 32,
        n_kv_heads: int | None = None,
        n_layers: int = 32,
        mlp_hidden_size: int | None = None,
        mlp_ratio: int = 4,
        vocab_size: int = 126464,
        embedding_size: int | None = None,
        max_sequence_length: int = 4096,
        rope_theta: float = 500000.0,
        rms_norm_eps: float = 1e-5,
        init_fn: str = "mitchell",
        init_std: float = 0.02,
        mask_token_id: int | None = None,
        bos_token_id: int | None = None,
        eos_token_id: int | None = None,
        pad_token_id: int | None = None,
        **kwargs,
    ):
        self.d_model = d_model
        self.n_heads = n_heads
        self.n_kv_heads = n_heads if n_kv_heads is None else n_kv_heads
        self.n_layers = n_layers
        self.mlp_hidden_size = mlp_ratio * d_model if mlp_hidden_size is None else mlp_hidden_size
        self.mlp_ratio = mlp_ratio
        self.vocab_size = vocab_size
        self.embedding_size = vocab_size if embedding_size is None else embedding_size
        self.max_sequence_length = max_sequence_length
        self.rope_theta = rope_theta
        self.rms_norm_eps = rms_norm_eps
        self.init_fn = init_fn
        self.init_std = init_std
        self.mask_token_id = mask_token_id
        kwargs.pop("init_device", None)  # the original would build on "cuda"; where a model lives is the loader's say
        kwargs.setdefault("tie_word_embeddings", False)
        special = {"bos_token_id": bos_token_id, "eos_token_id": eos_token_id, "pad_token_id": pad_token_id}
        super().__init__(**special, **kwargs)

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.d_model // self.n_heads


def refuse_dead_options(config: LLaDAConfig) -> None:
    """Raise `UserError` for every field that asks for a computation this model does not do."""
    supported = {name: ((value,), json.dumps(value)) for name, value in SWITCHES.items()} | NULL_OR
    problems = [
        f"model config: {name} is {getattr(config, name)!r}; this LLaDA implementation supports only {expected}. "
        "No published LLaDA uses it; set it so, or train that model elsewhere."
        for name, (allowed, expected) in sorted(supported.items())
        if getattr(config, name, None) is not None and getattr(config, name) not in allowed
    ]
    if config.d_model % config.n_heads or (config.d_model // config.n_heads) % 2:
        problems.append(
            f"model config: d_model {config.d_model} and n_heads {config.n_heads} give heads of "
            f"{config.d_model / config.n_heads:g}; expected an even whole width. Change one of them."
        )
    if config.n_heads % config.n_kv_heads:
        problems.append(
            f"model config: n_heads {config.n_heads} is no multiple of n_kv_heads {config.n_kv_heads}; change one."
        )
    if config.embedding_size < config.vocab_size:
        problems.append(
            f"model config: embedding_size {config.embedding_size} is below vocab_size {config.vocab_size}; "
            "expected at least as many rows as tokens. Raise embedding_size."
        )
    if problems:
        raise UserError(*problems)
