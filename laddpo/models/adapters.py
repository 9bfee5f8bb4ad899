"""LoRA on the blocks of a model, in place, in PEFT's layout, so that adapters travel between programs.

`attach_lora` puts the adapter on and returns what it matched; `save_adapter` and `load_adapter` speak PEFT's files with
the hub's key names. The model stays the same object: no wrapper to unwrap.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from laddpo.errors import UserError
from laddpo.models import lora
from laddpo.models.adapter_settings import ADAPTER_FILES, missing_file, read_adapter_settings, require_own_rank
from laddpo.models.bitsandbytes_import import import_bitsandbytes
from laddpo.models.families import family_of
from laddpo.models.foreign import tensor_shapes
from laddpo.models.linears import ALL_LINEAR, match_linears, unknown_target
from laddpo.models.lora import ADAPTER as NAME
from laddpo.processes.ranks import placed_like
from laddpo.storage import atomic, manifests
from laddpo.storage.seals import note_once, require_sealed

PREFIX = "base_model.model."
SCALING = ("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern")  # settings that change values


def attach_lora(
    model,
    r: int = 16,
    alpha: float = 32,
    dropout: float = 0.0,
    target_modules: str | Sequence[str] = ALL_LINEAR,
    use_rslora: bool = False,
    use_dora: bool = False,
    seed: int = 0,
    path: str | None = None,
) -> list[str]:
    """Freeze the model and put a LoRA adapter on linear layers of its blocks. Returns the matched module names.

    `target_modules`: "all-linear", or names or regular expressions such as ["q_proj", "blocks[.][0-3][.]ff_.*"]; they
    are looked for inside the blocks only, so `ff_out` means the down-projections and never the vocabulary head. With
    `path`, rank, scale and weights come from that PEFT adapter folder instead (warm start). Adapter weights are float32
    (float64 under a float64 model), the arithmetic stays in the model's dtype. Random numbers come from `seed`; the
    global state is not changed.
    """
    import_bitsandbytes()  # as peft does
    from peft import LoraConfig, inject_adapter_in_model

    if has_adapter(model):
        raise UserError("the model already carries an adapter; expected none. Load the base model again.")
    if path is not None:
        config = _read_adapter_config(Path(path).expanduser(), model)
    else:
        if dropout:
            raise UserError(
                f"adapter.lora_dropout is {dropout}; expected 0: policy and reference must see the same network, "
                "and gradients are summed over several passes of one pair. Set it to 0."
            )
        config = LoraConfig(
            r=r,
            lora_alpha=alpha,
            lora_dropout=dropout,
            target_modules=_anchored(model, target_modules),
            use_rslora=use_rslora,
            use_dora=use_dora,
            base_model_name_or_path=str(getattr(model.config, "name_or_path", "") or "") or None,
        )
    model.requires_grad_(False)
    with torch.random.fork_rng(devices=_devices(model)):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model, adapter_name=NAME)
    model.peft_config = {NAME: config}
    matched = adapted_modules(model)
    wide = torch.promote_types(model.dtype, torch.float32)
    for layer in map(model.get_submodule, matched):
        lora.widen(layer, wide)
        lora.add_in_one_product(layer)
    if path is not None:
        load_adapter(model, path)
    return matched


def save_adapter(model, folder: Path, state: Mapping[str, Tensor] | None = None) -> list[str]:
    """Write the adapter as PEFT does (config and safetensors), atomically. Returns the names of the files.

    `state`: whole tensors under PEFT's names, of a model that holds only parts of them.
    """
    from safetensors.torch import save

    config = model.peft_config[NAME].to_dict()
    config["inference_mode"] = True
    plain = {key: _plain(value) for key, value in config.items()}
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in (state or adapter_state(model)).items()}
    atomic.write_bytes(folder / ADAPTER_FILES[1], save(state, metadata={"format": "pt"}))
    atomic.write_json(folder / ADAPTER_FILES[0], plain)
    return list(ADAPTER_FILES)


def load_adapter(model, path: str | Path) -> None:
    """Fill the attached adapter from a PEFT folder. Raises `UserError` when the tensors do not fit one another."""
    from safetensors.torch import load_file

    file = Path(path).expanduser() / ADAPTER_FILES[1]
    if not file.exists():
        raise missing_file(file)
    require_sealed(file.parent, file.name)
    load_adapter_state(model, load_file(str(file)), str(file))


def adapter_identity(folder: Path) -> dict[str, Any]:
    """What the values of an adapter's model depend on beside its base: the matrices, and how they are scaled."""
    require_sealed(folder, *ADAPTER_FILES)
    settings = read_adapter_settings(folder)[1]
    return {
        "adapter": atomic.file_sha256(folder / ADAPTER_FILES[1]),
        "adapter_scaling": {name: settings[name] for name in SCALING if settings.get(name)},
    }


def check_adapter_files(folder: Path, linears: Mapping[str, tuple[int, int]]) -> None:
    """Refuse an adapter that cannot fit a model before there is one, from its settings and the head of its weights.

    `linears`: (inputs, outputs) of the linear layers of the model's blocks, by full name. Whether every layer that the
    adapter wants has its tensors is seen when it is attached.
    """
    read_adapter_settings(folder)
    file = folder / ADAPTER_FILES[1]
    if not file.exists():
        raise missing_file(file)
    require_sealed(folder, file.name)
    if not (folder / manifests.MANIFEST).exists() and (folder.parent / "config.yaml").exists():
        note_once(
            f"{folder}: has no {manifests.MANIFEST}, unlike every adapter of a run; its files are read unchecked."
        )
    unknown, reshaped = [], []
    for name, shape in tensor_shapes(file, "Copy the adapter again.").items():
        module, _, part = name.removeprefix(PREFIX).partition(".lora_")
        inputs, outputs = linears.get(module, (0, 0))
        fits = {"A.weight": shape[1:] == (inputs,), "B.weight": shape[:1] == (outputs,)}
        if module not in linears:
            unknown.append(name)
        elif not fits.get(part, True):
            reshaped.append(name)
    _require_fit(str(file), [], unknown, reshaped)


def _require_fit(where: str, missing: list[str], unknown: list[str], reshaped: list[str]) -> None:
    problems = [
        f"{where}: {len(names)} adapter tensors {what} (first: {names[0]}). "
        "Use the adapter with the base model it was trained on, or start without adapter.path."
        for names, what in ((missing, "are missing"), (unknown, "match no module"), (reshaped, "have another shape"))
        if names
    ]
    if problems:
        raise UserError(*problems)


def rank(model) -> int:
    """r of the attached adapter."""
    return model.peft_config[NAME].r


def adapter_state(model) -> dict[str, Tensor]:
    """The adapter's tensors under PEFT's names (`base_model.model.<hub name>.lora_A.weight`), not copied."""
    return {_peft_name(name): tensor for name, tensor in model.named_parameters() if ".lora_" in name}


def load_adapter_state(model, state: dict[str, Tensor], where: str) -> None:
    """Copy tensors under PEFT's names into the attached adapter; all must fit. `where` names them in a message."""
    own = adapter_state(model)
    missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    reshaped = [k for k in own.keys() & state.keys() if own[k].shape != state[k].shape]
    _require_fit(where, missing, unknown, reshaped)
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(placed_like(tensor, state[name]))


def has_adapter(model) -> bool:
    """True when a LoRA adapter is attached."""
    return any(_is_lora_layer(module) for module in model.modules())


@contextlib.contextmanager
def adapter_disabled(model) -> Iterator[None]:
    """The base model inside the `with` block (a no-op without an adapter)."""
    layers = [module for module in model.modules() if _is_lora_layer(module)]
    flags = [(parameter, parameter.requires_grad) for layer in layers for parameter in layer.parameters()]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for parameter, flag in flags:  # enabling sets the flag on every adapter tensor; put back what was there
            parameter.requires_grad_(flag)


def merge_adapter(model) -> None:
    """Fold the adapter into the base weights and take it off. Only for weights that are not quantised."""
    from peft.tuners.lora import Linear

    layers = [(name, module) for name, module in model.named_modules() if _is_lora_layer(module)]
    quantised = [name for name, module in layers if not isinstance(module, Linear)]
    if quantised:
        raise UserError(
            f"{quantised[0]} is quantised; merging would round the adapter away. Load the base model in bf16 "
            "(quantization=none) with the same adapter, and merge there."
        )
    for name, module in layers:
        weight = module.get_base_layer().weight
        dtype = weight.dtype
        weight.data = weight.data.to(torch.promote_types(dtype, torch.float32))  # sum wide, round once
        module.merge(safe_merge=True)
        weight = module.get_base_layer().weight
        weight.data = weight.data.to(dtype)
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, module.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config


def trainable_parameters(model) -> dict[str, nn.Parameter]:
    """The parameters that training changes, by name, in the model's own order."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def adapted_modules(model) -> list[str]:
    """Names of the modules that carry the adapter."""
    return [name for name, module in model.named_modules() if _is_lora_layer(module)]


def block_linears(model) -> list[str]:
    """Names of the linear layers inside the blocks: where an adapter may be, and what quantisation replaces."""
    block = family_of(model)[1].layout.block
    return [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and re.match(rf"{block}\.", n)]


def _anchored(model, target_modules: str | Sequence[str]) -> str | list[str]:
    """What PEFT shall match: a regular expression anchored in the blocks, or full names when blocks differ."""
    layout = family_of(model)[1].layout
    linears = block_linears(model)
    patterns = [target_modules] if isinstance(target_modules, str) else list(target_modules)
    chosen: set[str] = set()
    for pattern in patterns:
        matched = match_linears(pattern, linears)
        if not matched:
            raise UserError(unknown_target(pattern, layout))
        chosen.update(matched)
    if not chosen:
        raise UserError(unknown_target("", layout))
    last = sorted({name.rsplit(".", 1)[1] for name in chosen})
    if chosen == {name for name in linears if name.rsplit(".", 1)[1] in last}:
        return rf"{layout.block}\.({'|'.join(layout.patterns(last))})"
    return sorted(chosen)


def _read_adapter_config(folder: Path, model):
    """PEFT's settings of an adapter, whose layers are named in full."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    file, taken = read_adapter_settings(folder)
    require_own_rank(file, taken)
    config = LoraConfig(**taken)
    config.inference_mode, config.lora_dropout, config.task_type = False, 0.0, None
    config.init_lora_weights = True  # the values are loaded
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    linears = block_linears(model)
    wanted = config.target_modules
    if wanted == ALL_LINEAR:
        matched = linears
    else:
        matched = [name for name in names if check_target_module_exists(config, name)]
    if outside := set(matched) - set(linears) if isinstance(wanted, str) else ():
        raise UserError(f"{file}: target_modules {wanted!r} matches {min(outside)}; expected layers of blocks only.")
    matched = [name for name in matched if name in linears]
    if not matched:
        raise UserError(unknown_target(str(wanted), family_of(model)[1].layout))
    config.target_modules = _anchored(model, [re.escape(name) for name in matched])
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None  # the names say it all
    return config


def _peft_name(name: str) -> str:
    plain = PREFIX + name.replace(f".{NAME}.", ".")
    return plain.removesuffix(".weight") if "magnitude" in name else plain  # DoRA's vectors go without a suffix


def _plain(value: Any) -> Any:
    """JSON can hold it: sets become sorted lists, enums and other objects their text."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(value)
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _is_lora_layer(module: nn.Module) -> bool:
    return isinstance(module, _lora_layer_type())


@functools.cache
def _lora_layer_type() -> type:
    import_bitsandbytes()  # as peft does
    from peft.tuners.lora import LoraLayer

    return LoraLayer


def _devices(model) -> list[torch.device]:
    return [p.device for p in [next(model.parameters())] if p.device.type == "cuda"]
