"""A stand-in for the public code that an export's `auto_map` names: its config, with the original's defaults."""

from transformers import PretrainedConfig

# What the original's config takes where a config.json is silent: the network of GPT-2, which is not LLaDA.
DEFAULTS = {
    "d_model": 768, "n_heads": 12, "n_kv_heads": None, "n_layers": 12, "mlp_ratio": 4, "mlp_hidden_size": None,
    "activation_type": "swiglu", "block_type": "sequential", "block_group_size": 1, "alibi": False,
    "alibi_bias_max": 8.0, "rope": False, "rope_full_precision": True, "flash_attention": False,
    "attention_dropout": 0.1, "multi_query_attention": None, "attention_layer_norm": False, "residual_dropout": 0.1,
    "embedding_dropout": 0.1, "input_emb_norm": False, "layer_norm_type": "default", "layer_norm_with_affine": True,
    "rms_norm_eps": 1e-5, "attention_layer_norm_with_affine": True, "max_sequence_length": 1024,
    "rope_theta": 10000.0, "include_qkv_bias": False, "include_bias": False, "bias_for_layer_norm": None,
    "scale_logits": False, "vocab_size": 50257, "embedding_size": 50304, "weight_tying": True, "eos_token_id": 50256,
    "pad_token_id": 50256, "mask_token_id": 50256, "init_device": None, "init_fn": "normal", "init_std": 0.02,
    "init_cutoff_factor": None, "precision": None, "use_cache": False,
}  # fmt: skip


class LLaDAConfig(PretrainedConfig):
    model_type = "llada"

    def __init__(self, **given):
        super().__init__(**{name: value for name, value in given.items() if name not in DEFAULTS})
        for name, value in DEFAULTS.items():
            setattr(self, name, given.get(name, value))
