"""Which model families this program can train, decided by the `architectures` entry of a checkpoint's config.json.

Not by `model_type`: LLaDA-MoE says `llada` too and is another network. Unknown and known-unsupported ones are refused
by name before any weight is read. A row says all that differs between families; the network itself is imported when it
is needed, so that settings and plans can ask without torch.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from laddpo.errors import UserError
from laddpo.models.linears import LLADA, LLADA2, LLAMA, LLAMA_MOE, Layout

SIZES = ("d_model", "n_layers", "n_heads", "n_kv_heads", "mlp_hidden_size", "vocab_size", "max_sequence_length",
         "head_dim", "is_tied", "n_experts", "experts_chosen", "dense_layers", "dense_mlp_size",
         "shared_experts")  # fmt: skip
LLAMA_NAMES = {  # of sizes: this program's names, and those of a config.json in Llama's spelling
    "d_model": "hidden_size",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "n_layers": "num_hidden_layers",
    "mlp_hidden_size": "intermediate_size",
    "max_sequence_length": "max_position_embeddings",
    "embedding_size": "vocab_size",
    "is_tied": "tie_word_embeddings",
}
MOE_NAMES = {
    **LLAMA_NAMES,
    "mlp_hidden_size": "expert_intermediate_size",
    "n_experts": "num_experts",
    "experts_chosen": "num_experts_per_tok",
}
LLADA2_NAMES = {
    **MOE_NAMES,
    "mlp_hidden_size": "moe_intermediate_size",
    "dense_mlp_size": "intermediate_size",
    "dense_layers": "first_k_dense_replace",
    "shared_experts": "num_shared_experts",
}


@dataclass(frozen=True)
class Family:
    """A supported network. `network`: module of its class, and the class.

    `names`: of sizes in its config.json, where they are not this program's. `reads_before`: how many positions before a
    token its score is read. `mask_token_id`: that of every checkpoint, where neither config nor tokenizer tells it.
    `block_length`: of a network that attends block-causally, where its config.json does not tell; None: bidirectional.
    `may_be_block`: checkpoints of both kinds have this architecture. `has_qkv_bias`, `has_head_norms`,
    `has_fused_qkv`: parts that plans count. `tag`: for the hub. `code`: the public repository and the classes in it
    that `auto_map` of a written config.json names, for programs that run a checkpoint's own code. This one never does.
    """

    network: tuple[str, str]
    layout: Layout
    names: Mapping[str, str] = field(default_factory=lambda: LLAMA_NAMES)
    reads_before: int = 0
    mask_token_id: int | None = None
    block_length: int | None = None
    may_be_block: bool = False
    has_qkv_bias: bool = False
    has_head_norms: bool = False
    has_fused_qkv: bool = False
    tag: str = "a2d"
    code: tuple[str, Mapping[str, str]] | None = None

    @functools.cached_property
    def model_class(self) -> type:
        module, name = self.network
        return getattr(importlib.import_module(f"laddpo.models.{module}"), name)

    @property
    def config_class(self) -> type:
        """Says what is taken from a config.json (`fields`), the original's switches with the values that are computed
        with (`switches`), and its other fields (`inert`)."""
        return self.model_class.config_class

    def sizes(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The sizes that a config.json of this family states, under the names of `model.shape`."""
        found = {name: config.get(self.names.get(name, name)) for name in SIZES}
        found["n_kv_heads"] = found["n_kv_heads"] or found["n_heads"]
        found["vocab_size"] = config.get("embedding_size") or found["vocab_size"]
        return {name: size for name, size in found.items() if size is not None}

    @property
    def repository(self) -> str | None:
        """The hub repository of its public code, if one is known."""
        return self.code[0] if self.code else None

    def auto_map(self) -> dict[str, str]:
        """Where a program that runs a checkpoint's own code finds it; empty where no public code is known."""
        repository, classes = self.code or ("", {})
        return {auto: f"{repository}--{name}" for auto, name in classes.items()}


def family_of(model) -> tuple[str, Family]:
    """The architecture and family of a model; sharding gives its class another name."""
    names = [kind.__name__ for kind in type(model).__mro__]
    return next((name, FAMILIES[name]) for name in names if name in FAMILIES)


def find_family(config: Mapping[str, Any], where: str) -> Family:
    """The family of a config.json. `where` names the checkpoint in the message. Raises `UserError` if unsupported."""
    named = config.get("architectures")
    architecture = named[0] if isinstance(named, list) and named and isinstance(named[0], str) else "(none)"
    if architecture in FAMILIES:
        return FAMILIES[architecture]
    reason = UNSUPPORTED.get(architecture, f"model_type {config.get('model_type')!r:.60} is not known here")
    raise UserError(
        f"{where}: the architecture is {architecture:.60} ({reason}); supported: {', '.join(FAMILIES)}. "
        "Choose a checkpoint of one of these, or add a row to FAMILIES in laddpo/models/families.py with a network as "
        "in laddpo/models/llama.py."
    )


_MOE = Family(("llama", "LLaDAMoEModelLM"), LLAMA_MOE, names=MOE_NAMES, has_head_norms=True, tag="llada-moe")
FAMILIES = {
    "LLaDAModelLM": Family(
        ("llada", "LLaDAModelLM"),
        LLADA,
        names={},
        tag="llada",
        code=(
            "GSAI-ML/LLaDA-8B-Instruct",
            {
                "AutoConfig": "configuration_llada.LLaDAConfig",
                "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM",
                "AutoModel": "modeling_llada.LLaDAModelLM",
            },
        ),
    ),
    "ILLaDAForCausalLM": Family(
        ("llama", "ILLaDAForCausalLM"),
        LLAMA,
        mask_token_id=5,
        tag="illada",
        code=(
            "GSAI-ML/iLLaDA-8B-Instruct",
            {
                "AutoConfig": "configuration_illada.ILLaDAConfig",
                "AutoModel": "modeling_illada.ILLaDAModel",
                "AutoModelForCausalLM": "modeling_illada.ILLaDAForCausalLM",
            },
        ),
    ),
    "DreamModel": Family(
        ("llama", "DreamModel"),
        LLAMA,
        reads_before=1,
        has_qkv_bias=True,
        tag="dream",
        code=(
            "Dream-org/Dream-v0-Instruct-7B",
            {"AutoConfig": "configuration_dream.DreamConfig", "AutoModel": "modeling_dream.DreamModel"},
        ),
    ),
    "LLaDAMoEModelLM": _MOE,
    "LLaDAMoEModel": _MOE,
    "LLaDA2MoeModelLM": Family(
        ("llada2", "LLaDA2MoeModelLM"),
        LLADA2,
        names=LLADA2_NAMES,
        block_length=32,
        has_head_norms=True,
        has_fused_qkv=True,
        tag="llada2",
        code=(
            "inclusionAI/LLaDA2.0-mini",
            {
                "AutoConfig": "configuration_llada2_moe.LLaDA2MoeConfig",
                "AutoModel": "modeling_llada2_moe.LLaDA2MoeModel",
                "AutoModelForCausalLM": "modeling_llada2_moe.LLaDA2MoeModelLM",
            },
        ),
    ),
    "SDARForCausalLM": Family(
        ("llama", "SDARForCausalLM"),
        LLAMA,
        block_length=4,
        has_head_norms=True,
        tag="sdar",
        code=(
            "JetLM/SDAR-4B-Chat",
            {
                "AutoConfig": "configuration_sdar.SDARConfig",
                "AutoModel": "modeling_sdar.SDARModel",
                "AutoModelForCausalLM": "modeling_sdar.SDARForCausalLM",
            },
        ),
    ),
    "A2DQwen3LMHeadModel": Family(("llama", "A2DQwen3LMHeadModel"), LLAMA, may_be_block=True, has_head_norms=True),
    "A2DQwen2LMHeadModel": Family(("llama", "A2DQwen2LMHeadModel"), LLAMA, may_be_block=True, has_qkv_bias=True),
    "A2DLlamaLMHeadModel": Family(("llama", "A2DLlamaLMHeadModel"), LLAMA, may_be_block=True),
}

UNSUPPORTED = {
    "SDARMoeForCausalLM": "SDAR with experts: only the dense SDAR is known here",
    "Fast_dLLM_QwenForCausalLM": "Fast-dLLM v2: block diffusion that reads a score one position before its token",
    "NemotronLabsDiffusionModel": "Nemotron-Labs-Diffusion: block diffusion whose clean half is causal",
    "DiffusionGemmaForBlockDiffusion": "DiffusionGemma: uniform noise and no mask token, which is another likelihood",
    "LLaDAVModelLM": "LLaDA-V, which reads images",
    "LlavaLLaDAModelLM": "LLaDA-V, which reads images",
    "LlamaForCausalLM": "an autoregressive Llama, or iLLaDA under Llama's key names",
    "Qwen2ForCausalLM": "an autoregressive model",
    "Qwen3ForCausalLM": "an autoregressive model",
}
