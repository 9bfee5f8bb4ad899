"""adapter_config.json of a PEFT adapter, which may come from anywhere: the fields that are taken, each of its kind."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from laddpo.errors import UserError
from laddpo.models.foreign import (
    FLAG,
    Kind,
    checked,
    either,
    listed,
    mapped,
    number,
    only,
    optional,
    read_settings,
    tensor_shapes,
    text,
    whole,
)
from laddpo.storage.seals import require_sealed

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
# What an adapter's settings may ask for beside two matrices a layer, and ways to fill these that leave the base alone.
MORE_THAN_MATRICES = (
    *("bias", "lora_bias", "modules_to_save", "trainable_token_indices", "target_parameters", "layer_replication"),
    *("alora_invocation_tokens", "arrow_config", "use_qalora", "use_bdlora", "kasa_config", "velora_config"),
    "monteclora_config",
)
STARTS_BESIDE_THE_BASE = ("gaussian", "orthogonal", "eva")


def missing_file(file: Path) -> UserError:
    below = file.parent / "adapter"
    hint = f"did you mean {below}?" if (below / file.name).exists() else "check adapter.path."
    return UserError(f"{file}: no such file; expected an adapter in PEFT's layout; {hint}")


def read_adapter_settings(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The adapter's settings file, which is there, whole, and of LoRA matrices alone; and the fields that are taken."""
    file = folder / ADAPTER_FILES[0]
    if folder.is_dir():
        require_sealed(folder, *ADAPTER_FILES)
    if not file.exists():
        raise missing_file(file)
    content = read_settings(file)
    if content.get("peft_type") != "LORA":
        raise UserError(
            f"{file}: peft_type is {content.get('peft_type')!r:.60}; expected 'LORA'. Choose a LoRA adapter."
        )
    more = [name for name in MORE_THAN_MATRICES if content.get(name) not in (None, False, "none", [], {})]
    start = content.get("init_lora_weights", True)
    if isinstance(start, str) and start not in STARTS_BESIDE_THE_BASE:
        more.append(f"init_lora_weights={start!r:.60}, which changes the base's weights too")
    if more:
        raise UserError(
            f"{file}: holds more than LoRA matrices ({', '.join(more)}); expected LoRA matrices alone. "
            "Merge that adapter into its base with the program that made it, and start from the merged model."
        )
    taken = {name: value for name, value in checked(file, content, ADAPTER_FIELDS).items() if value is not None}
    if "target_modules" not in taken:
        raise UserError(f"{file}: has no target_modules; expected the layers of the adapter. Copy the adapter again.")
    return file, taken


def require_own_rank(file: Path, taken: Mapping[str, Any]) -> None:
    """Matrices are made as the settings say before they are filled: no larger than those in the file."""
    weights = file.parent / ADAPTER_FILES[1]
    if not weights.exists():
        raise missing_file(weights)
    shapes = tensor_shapes(weights, "Copy the adapter again.")
    largest = max((shape[0] for name, shape in shapes.items() if ".lora_A." in name and shape), default=0)
    asked = max([taken.get("r", 8), *taken.get("rank_pattern", {}).values()])
    if asked > largest:
        raise UserError(
            f"{file}: asks for rank {asked} and {weights.name} has rank {largest}; expected files of one adapter. Copy "
            "both again."
        )


def _steps(pattern: str) -> float:
    """At most how many ways there are to match a name of NAME_LETTERS by this regular expression. Infinity for what
    cannot be counted: a repeat of more than one character, a look-around, a reference."""
    try:
        from re import _parser as parser  # its place since Python 3.11
    except ImportError:
        import sre_parse as parser

    def of(part: Any) -> float:
        ways = 1.0
        for name, value in part:
            kind = str(name)
            if kind in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
                is_single = len(value[2]) == 1 and str(value[2][0][0]) in ("ANY", "IN", "LITERAL", "NOT_LITERAL")
                ways *= NAME_LETTERS if is_single else math.inf
            elif kind == "BRANCH":
                ways *= sum(map(of, value[1]))
            elif kind == "SUBPATTERN":
                ways *= of(value[-1])
            elif kind not in ("ANY", "AT", "IN", "LITERAL", "NOT_LITERAL"):
                return math.inf
        return ways

    try:
        return of(parser.parse(pattern))
    except (re.error, OverflowError, RecursionError):
        return math.inf


def pattern_of(most_steps: int) -> Kind:
    """A name, or a regular expression that matches one or not within so many steps."""
    return Kind(
        "a name, or a regular expression that repeats single characters alone, a few times",
        lambda value: isinstance(value, str) and len(value) <= 10_000 and _steps(value) <= most_steps,
    )


NAME_LETTERS = 64  # of a module
PATTERN = pattern_of(NAME_LETTERS**3)
KEY = pattern_of(NAME_LETTERS**2)  # PEFT puts a repeat before it
MODULE = Kind("the name of a module", lambda value: isinstance(value, str) and re.fullmatch(r"\w{1,100}", value))
NAMES = either(PATTERN, listed(text(1000)))
# The fields of adapter_config.json that are taken. What PEFT may be told beside them (modules to import, files, ways to
# start) is not.
ADAPTER_FIELDS: dict[str, Kind] = {
    "peft_type": only("LORA"),
    "r": whole(1, 2**16),
    "lora_alpha": number(0, 1e6),
    "use_rslora": FLAG,
    "use_dora": FLAG,
    "fan_in_fan_out": only(False),
    "target_modules": NAMES,
    "exclude_modules": optional(NAMES),
    "rank_pattern": optional(mapped(whole(1, 2**16), KEY)),
    "alpha_pattern": optional(mapped(number(0, 1e6), KEY)),
    "layers_to_transform": optional(either(whole(0, 2**10), listed(whole(0, 2**10)))),
    "layers_pattern": optional(either(MODULE, listed(MODULE))),
    "base_model_name_or_path": optional(text(10_000)),
    "revision": optional(text(1000)),
}
