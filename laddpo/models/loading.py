"""Checkpoints from a local folder or the hub: tokenizer, model (optionally 4- or 8-bit), fingerprint of the weights.

One path in, one local folder out, then everything reads that folder: safetensors only, no code from the checkpoint, no
second look at the network. What cannot be had ends in one message that says how to point at a local folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.configuration_utils import PreTrainedConfig

from laddpo import runs
from laddpo.core.ranks import placed_like
from laddpo.errors import UserError
from laddpo.models.families import Family, family_of, find_family
from laddpo.models.quantization import DTYPES, quantization_config, settle_quantized
from laddpo.preference.special_text import MASK_TOKEN

SMALL_FILES = ["*.json", "*.jinja", "*.txt", "*.model"]
TOKENIZER_FILES = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"]
WEIGHTS = "*.safetensors"


def load_model(
    path: str,
    revision: str | None = None,
    dtype: str | torch.dtype = "fp32",
    quantization: dict[str, Any] | None = None,
    device: str | torch.device = "cpu",
    attention: str = "auto",
):
    """The model of a checkpoint, in eval mode, on `device`; frozen when it is quantised.

    `dtype`: fp32, bf16, fp16, fp64 or a torch dtype. `quantization`: the config group's fields (load_in_4bit, ...),
    None or all off for none. `attention`: auto (sdpa, and a variable-length kernel for packed input where the GPU has
    one), sdpa, eager, flash_attention_2, flex_attention. Raises `UserError` for a family that is not supported, for
    pickled or incomplete weights, and for options that this implementation does not compute.
    """
    folder = checkpoint_folder(path, revision, [*SMALL_FILES, WEIGHTS])
    config, family = read_config(folder)
    require_safetensors(folder)
    require_fitting_weights(folder, config, family)
    weights_dtype = DTYPES[dtype] if isinstance(dtype, str) else dtype
    quantizer = quantization_config(quantization, family, weights_dtype)
    kwargs: dict[str, Any] = {"attn_implementation": "sdpa" if attention == "auto" else attention}
    if quantizer is not None or torch.device(device).type != "cpu":
        kwargs["device_map"] = {"": str(device)}
    with _quiet_small_loads(folder), _explained_imports(attention):
        model = family.model_class.from_pretrained(
            str(folder),
            config=config,
            dtype=weights_dtype,
            quantization_config=quantizer,
            use_safetensors=True,
            **kwargs,
        )
    model.packed_kernel = "auto" if attention == "auto" else "batched"
    if quantizer is not None:
        settle_quantized(model, family)
    return model.eval()


def new_model(config, seed: int):
    """A model with random weights drawn from `seed`, leaving the global random state as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return find_family({"architectures": ["LLaDAModelLM"]}, "new model").model_class(config).eval()


def load_tokenizer(path: str, revision: str | None = None):
    """The tokenizer of a checkpoint (its own code is never run). Needs no weights."""
    from transformers import AutoTokenizer

    folder = checkpoint_folder(path, revision, SMALL_FILES)
    if not (folder / "tokenizer.json").exists():
        raise UserError(
            f"{folder}: has no tokenizer.json; expected a fast tokenizer beside the model. "
            "Copy the tokenizer's files into that folder."
        )
    try:
        return AutoTokenizer.from_pretrained(str(folder), use_fast=True, trust_remote_code=False)
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"{folder}: its tokenizer cannot be read ({type(error).__name__}: {reason}). config.json, tokenizer.json "
            "and tokenizer_config.json must be whole and of one checkpoint; copy them anew."
        ) from error


def copy_tokenizer(path: str, revision: str | None, target: Path) -> list[str]:
    """Copy a checkpoint's tokenizer files byte for byte beside weights made from it. Returns their names."""
    folder = checkpoint_folder(path, revision, SMALL_FILES)
    files = [file for pattern in TOKENIZER_FILES for file in sorted(folder.glob(pattern))]
    for file in files:
        runs.write_bytes(target / file.name, file.read_bytes())
    return [file.name for file in files]


def mask_token_id(model_config, tokenizer=None) -> int:
    """The id of the mask token: the config's, else the id of `<|mdm_mask|>` in the tokenizer."""
    found = getattr(model_config, "mask_token_id", None)
    if found is None and tokenizer is not None and MASK_TOKEN in tokenizer.get_vocab():
        found = tokenizer.convert_tokens_to_ids(MASK_TOKEN)
    if found is None or not 0 <= found < model_config.embedding_size:
        raise UserError(
            f"the mask token id is {found} (config.json: mask_token_id; tokenizer: {MASK_TOKEN}); expected an id below "
            f"{model_config.embedding_size}. Write mask_token_id into the checkpoint's config.json."
        )
    return found


def read_config(folder: Path):
    """The checked config of a checkpoint folder and its family."""
    path = folder / "config.json"
    if not path.exists():
        raise UserError(f"{folder}: has no config.json; expected a checkpoint folder. Check model.model_name_or_path.")
    content = runs.read_json(path)
    family = find_family(content, str(path))
    return family.config_class.from_dict(content), family


def save_model(model, folder: Path, shard_bytes: int = 4 * 2**30, state: Mapping | None = None) -> list[str]:
    """Write config and weights in the hub's layout, key names unchanged. Returns the names of the files.

    `state`: whole tensors by name, of a model that holds only parts of them.
    """
    from safetensors.torch import save
    from transformers.pytorch_utils import id_tensor_storage

    state = {name: tensor.detach().contiguous() for name, tensor in (state or model.state_dict()).items()}
    assert len({id_tensor_storage(t) for t in state.values()}) == len(state), "tied weights cannot be saved as they are"
    shards: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    for name in sorted(state):
        if shards[-1] and size + state[name].nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = state[name]
        size += state[name].nbytes
    names = [
        "model.safetensors" if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        for i in range(len(shards))
    ]
    for name, shard in zip(names, shards, strict=True):
        runs.write_bytes(folder / name, save({k: v.cpu() for k, v in shard.items()}, metadata={"format": "pt"}))
    if len(shards) > 1:
        where = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        total = sum(tensor.nbytes for tensor in state.values())
        runs.write_json(
            folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where}
        )
        names.append("model.safetensors.index.json")
    runs.write_json(folder / "config.json", config_content(model))
    return ["config.json", *names]


def config_content(model) -> dict[str, Any]:
    """What a checkpoint's config.json holds, in the hub's spelling: the model's fields, every switch of the original
    with the value computed here, where the original's code is, the weights' dtype. No place of this machine."""
    architecture, family = family_of(model)
    transformers_own = PreTrainedConfig().to_dict()
    given = {
        name: value
        for name, value in model.config.to_dict().items()
        if name not in FOREIGN_FIELDS or (name in transformers_own and value != transformers_own[name])
    }
    for place in ("_name_or_path", "transformers_version"):
        given.pop(place, None)
    switches = {name: value for name, value in family.switches.items() if given.get(name) is None}
    dtype = str(model.dtype).removeprefix("torch.")
    content = {
        **family.inert,
        **given,
        **switches,
        "architectures": [architecture],
        "auto_map": family.auto_map(),
        "dtype": dtype,
        "torch_dtype": dtype,  # the same for older programs
    }
    if version := getattr(model.config, "transformers_version", None):
        content["transformers_version"] = version
    return content


def load_weights(model, folder: Path) -> None:
    """Overwrite the weights of an unquantised model with those of a checkpoint folder; all must fit."""
    from safetensors.torch import load_file

    own = model.state_dict()
    unseen = set(own)
    with torch.no_grad():
        for file in weight_files(folder):
            for name, tensor in load_file(file).items():
                if name not in own or own[name].shape != tensor.shape:
                    raise UserError(f"{file}: its tensor {name} does not fit the model. Use weights of the same model.")
                own[name].copy_(placed_like(own[name], tensor))
                unseen.discard(name)
    if unseen:
        raise UserError(
            f"{folder}: {len(unseen)} weights are missing, first {min(unseen)}; expected a whole checkpoint."
        )


def checkpoint_folder(path: str, revision: str | None = None, patterns: list[str] | None = None) -> Path:
    """The local folder of a checkpoint: `path` itself when it is one, else the hub's snapshot, cached or downloaded."""
    local = Path(path).expanduser()
    if local.is_dir():
        return local
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=patterns or SMALL_FILES))
    except Exception as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        at = f" at revision {revision}" if revision else ""
        raise UserError(
            f"model.model_name_or_path is {path!r}{at}: no such local folder, and the hub did not give it "
            f"({type(error).__name__}: {reason}). Connect to the network once (it is cached then), log in if the model "
            "is gated, or download it elsewhere and set model.model_name_or_path=<folder with config.json, "
            "tokenizer.json and *.safetensors>."
        ) from error


def require_safetensors(folder: Path) -> None:
    """Raise `UserError` unless the folder's weights are safetensors and all shards of the index are there."""
    files = weight_files(folder)
    if not files:
        pickled = sorted(f.name for p in ("*.bin", "*.pt", "*.pth") for f in folder.glob(p))
        found = f"only pickled weights ({', '.join(pickled)})" if pickled else "no weights"
        raise UserError(
            f"{folder}: holds {found}; expected model.safetensors or its shards. Pickled weights can run code when "
            "opened and are not read: convert them to safetensors, or download the safetensors files."
        )
    index = folder / "model.safetensors.index.json"
    if index.exists():
        wanted = set(runs.read_json(index).get("weight_map", {}).values())
        missing = sorted(wanted - {f.name for f in files})
        if missing:
            raise UserError(
                f"{folder}: {len(missing)} of {len(wanted)} weight shards are missing, first {missing[0]}. "
                "The download was cut off: run it again."
            )


def require_fitting_weights(folder: Path, config, family: Family) -> None:
    """Compare the names and shapes in the files with the config's, before any weight is read. Raises `UserError`."""
    from safetensors import safe_open

    with torch.device("meta"):
        wanted = {name: tuple(t.shape) for name, t in family.model_class(config).state_dict().items()}
    found: dict[str, tuple[int, ...]] = {}
    for file in weight_files(folder):
        try:
            with safe_open(str(file), "pt") as content:
                found |= {name: tuple(content.get_slice(name).get_shape()) for name in content.keys()}  # noqa: SIM118
        except Exception as error:
            raise UserError(f"{file}: cannot be read ({error}). It is damaged or incomplete: get it again.") from error
    problems = [
        f"{folder}: weights and config.json disagree: {len(names)} tensors {kind} (first: {min(names)}). "
        "Check that all files come from one checkpoint, and that its weights are not quantised."
        for names, kind in (
            (wanted.keys() - found.keys(), "are missing"),
            (found.keys() - wanted.keys(), "are unknown"),
            ({n for n in wanted.keys() & found.keys() if wanted[n] != found[n]}, "have another shape"),
        )
        if names
    ]
    if problems:
        raise UserError(*problems)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of the model: model.safetensors, else its shards. Others in the folder are not read."""
    whole = folder / "model.safetensors"
    return [whole] if whole.exists() else sorted(folder.glob("model-*.safetensors"))


def weights_fingerprint(path: str, revision: str | None = None) -> str:
    """What stands for the base weights in every key: `commit:<hash>` from the hub, else `sha256:<of the local files>`.

    Local digests are remembered by (path, size, mtime in ns), so that 16 GB are read once.
    """
    folder = checkpoint_folder(path, revision, ["config.json"])
    if not Path(path).expanduser().is_dir() and re.fullmatch(r"[0-9a-f]{40}", folder.name):
        return f"commit:{folder.name}"
    digests = {f.name: _remembered_sha256(f) for f in [folder / "config.json", *weight_files(folder)] if f.exists()}
    runs.require_sealed(folder, digests)
    if len(digests) < 2:
        require_safetensors(folder)
        raise UserError(f"{folder}: has no config.json; expected a checkpoint folder. Check model.model_name_or_path.")
    return f"sha256:{hashlib.sha256(runs.canonical_json(digests).encode()).hexdigest()}"


def _remembered_sha256(file: Path) -> str:
    file = file.resolve()
    stat = file.stat()
    key = runs.fingerprint({"path": str(file), "size": stat.st_size, "mtime_ns": stat.st_mtime_ns})
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    memory = Path(root) / "laddpo" / "sha256" / key
    with contextlib.suppress(OSError):
        if re.fullmatch(r"[0-9a-f]{64}", known := memory.read_text(encoding="ascii")):
            return known
    digest = runs.file_sha256(file)
    with contextlib.suppress(UserError, OSError):  # a read-only home costs time, not the run
        runs.write_text(memory, digest)
    return digest


@contextlib.contextmanager
def _explained_imports(attention: str) -> Iterator[None]:
    """An attention or quantisation package that is not installed is the user's to mend."""
    try:
        yield
    except ImportError as error:
        raise UserError(
            f"hardware.attention is {attention!r}, and what loads the model is not installed ({str(error).strip()}). "
            "Install it, or set hardware.attention=auto and quantization=none."
        ) from error


@contextlib.contextmanager
def _quiet_small_loads(folder: Path) -> Iterator[None]:
    """No progress bar for what loads in a moment."""
    from transformers.utils import logging as progress

    small = sum(f.stat().st_size for f in weight_files(folder)) < 2**30 and progress.is_progress_bar_enabled()
    if small:
        progress.disable_progress_bar()
    try:
        yield
    finally:
        if small:
            progress.enable_progress_bar()


FOREIGN_FIELDS = (  # transformers' own, without meaning for this model; written only where a checkpoint gave them
    "chunk_size_feed_forward",
    "id2label",
    "is_encoder_decoder",
    "label2id",
    "output_attentions",
    "output_hidden_states",
    "problem_type",
    "return_dict",
)
