"""Which model families this program can train, decided by the `architectures` entry of a checkpoint's config.json.

Not by `model_type`: LLaDA-MoE says `llada` too and is another network. Unknown and known-unsupported ones are refused
by name before any weight is read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from laddpo.errors import UserError
from laddpo.models.foreign import Kind
from laddpo.models.linears import BLOCKS
from laddpo.models.llada import LLaDAConfig, LLaDAModelLM
from laddpo.models.llada_config import AUTO_MAP, CONFIG_FIELDS, INERT, SWITCHES


@dataclass(frozen=True)
class Family:
    """A supported network. `head`: module that must never be quantised or wrapped; `block`: regex of its blocks;
    `fields`: what is taken from its config.json.

    What other programs need in a config.json: `code`, the public repository and the classes in it that `auto_map`
    names; `switches`, the values of the original's switches that this program computes with; `inert`, its other fields.
    """

    config_class: type
    model_class: type
    head: str
    block: str
    fields: Mapping[str, Kind]
    code: tuple[str, Mapping[str, str]]
    switches: Mapping[str, Any]
    inert: Mapping[str, Any]

    def auto_map(self) -> dict[str, str]:
        """Where a program that runs a checkpoint's own code finds it. This program never does."""
        repository, classes = self.code
        return {auto: f"{repository}--{name}" for auto, name in classes.items()}


def family_of(model) -> tuple[str, Family]:
    """The architecture and family of a model; sharding gives its class another name."""
    return next((name, family) for name, family in FAMILIES.items() if isinstance(model, family.model_class))


def find_family(config: Mapping[str, Any], where: str) -> Family:
    """The family of a config.json. `where` names the checkpoint in the message. Raises `UserError` if unsupported."""
    named = config.get("architectures")
    architecture = named[0] if isinstance(named, list) and named and isinstance(named[0], str) else "(none)"
    if architecture in FAMILIES:
        return FAMILIES[architecture]
    reason = UNSUPPORTED.get(architecture, f"model_type {config.get('model_type')!r:.60} is not known here")
    raise UserError(
        f"{where}: the architecture is {architecture:.60} ({reason}); supported: {', '.join(FAMILIES)}. "
        "Choose a LLaDA checkpoint, or add a row to FAMILIES in laddpo/models/families.py with a model whose forward "
        "takes `lengths`, `rows` and `targets`."
    )


FAMILIES = {
    "LLaDAModelLM": Family(
        LLaDAConfig,
        LLaDAModelLM,
        head="model.transformer.ff_out",
        block=rf"{re.escape(BLOCKS)}\.\d+",
        fields=CONFIG_FIELDS,
        code=("GSAI-ML/LLaDA-8B-Instruct", AUTO_MAP),
        switches=SWITCHES,
        inert=INERT,
    ),
}

UNSUPPORTED = {
    "LLaDAMoEModelLM": "LLaDA-MoE, a mixture of experts that says model_type llada as well",
    "LLaDAMoEModel": "LLaDA-MoE, a mixture of experts that says model_type llada as well",
    "LLaDA2MoeModelLM": "LLaDA2, block diffusion: its likelihood is another one",
    "LLaDAVModelLM": "LLaDA-V, which reads images",
    "LlavaLLaDAModelLM": "LLaDA-V, which reads images",
    "DreamModel": "Dream, whose logits are shifted by one position",
    "DreamBaseModel": "Dream, whose logits are shifted by one position",
    "LlamaForCausalLM": "an autoregressive Llama, or iLLaDA under Llama's key names",
    "Qwen2ForCausalLM": "an autoregressive model",
    "Qwen3ForCausalLM": "an autoregressive model",
}
