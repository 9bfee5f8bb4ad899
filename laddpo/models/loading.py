"""Checkpoints from a local folder or the hub: tokenizer, model (optionally 4- or 8-bit), fingerprint of the weights.

One path in, one local folder out, then everything reads that folder: safetensors only, no code from the checkpoint, no
second look at the network. What cannot be had ends in one message that says how to point at a local folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.configuration_utils import PreTrainedConfig

from laddpo.errors import Damaged, UserError
from laddpo.models.block_length import resolve
from laddpo.models.checkpoint_files import (
    SMALL_FILES,
    WEIGHTS,
    checkpoint_folder,
    require_fitting_weights,
    require_safetensors,
    weight_files,
)
from laddpo.models.experts import stack_experts
from laddpo.models.families import FAMILIES, Family, family_of, find_family
from laddpo.models.foreign import checked, read_settings, tensor_shapes
from laddpo.models.quantization import DTYPES, quantization_config, settle_quantized
from laddpo.models.stacked import are_stacked, read_split, split_tensors
from laddpo.models.tokenizers import build_tokenizer, tokenizer_files
from laddpo.preference.encoding.special_text import MASK_TOKENS
from laddpo.processes.progress import is_terminal
from laddpo.processes.ranks import placed_like
from laddpo.storage import atomic, manifests
from laddpo.storage.seals import require_sealed, sealed_digests

FRESH_NS = 2_000_000_000  # a file can change again within the same tick of its system's clock: two seconds at the most
TOKENIZER_FILES = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"]
# Every name in a checkpoint folder that the model's loader and the tokenizer's open when it is there.
READ_FOR_MODEL = ("config.json", "generation_config.json", "adapter_*", "model*.safetensors", "*.index.json")
READ_FOR_TOKENIZER = (
    *("config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*", "*.jinja"),
    *("vocab.*", "merges.txt", "processor_config.json", "preprocessor_config.json", "spiece.model"),
)


def load_model(
    path: str,
    revision: str | None = None,
    dtype: str | torch.dtype = "fp32",
    quantization: dict[str, Any] | None = None,
    device: str | torch.device = "cpu",
    attention: str = "auto",
    attends: str | None = None,
    block_length: int | None = None,
):
    """The model of a checkpoint, in eval mode, on `device`; frozen when it is quantised.

    `dtype`: fp32, bf16, fp16, fp64 or a torch dtype. `quantization`: the config group's fields (load_in_4bit, ...),
    None or all off for none. `attention`: auto (sdpa, and a variable-length kernel for packed input where the GPU has
    one), sdpa, eager, flash_attention_2, flex_attention. `attends` and `block_length`: the settings `model.attention`
    and `model.block_length`; None leaves it to config.json and the family. Raises `UserError` for a family that is not
    supported, for pickled or incomplete weights, and for options that this implementation does not compute.
    """
    folder = checkpoint_folder(path, revision, [*SMALL_FILES, WEIGHTS])
    require_sealed(folder, *READ_FOR_MODEL)
    refuse_adapter_beside(folder)
    config, family = read_config(folder)
    set_block_length(config, family, attends, block_length)
    require_safetensors(folder)
    require_fitting_weights(folder, config, family)
    weights_dtype = DTYPES[dtype] if isinstance(dtype, str) else dtype
    quantizer = quantization_config(quantization, family, weights_dtype)
    kwargs: dict[str, Any] = {"attn_implementation": "sdpa" if attention == "auto" else attention}
    if quantizer is not None or torch.device(device).type != "cpu":
        kwargs["device_map"] = {"": str(device)}
    state = _stacked_state(folder)
    with _quiet_small_loads(folder), _explained_imports(attention):
        model = family.model_class.from_pretrained(
            None if state else str(folder),
            config=config,
            state_dict=state,
            dtype=weights_dtype,
            quantization_config=quantizer,
            use_safetensors=True,
            **kwargs,
        )
    stack_experts(model)
    model.packed_kernel = "auto" if attention == "auto" else "batched"
    if quantizer is not None:
        settle_quantized(model, family)
    return model.eval()


def _stacked_state(folder: Path) -> dict[str, torch.Tensor] | None:
    """The weights of a checkpoint whose experts are stacked, by hub names; None: the files are read as they are."""
    files = weight_files(folder)
    names = [name for file in files for name in tensor_shapes(file, "Get the file again.")]
    return read_split(files) if are_stacked(names) else None


def set_block_length(config, family: Family, attends: str | None, block_length: int | None) -> None:
    """Write into a config what holds of its own word and the settings. One that is right stays as it is."""
    found = resolve(family, config.block_length, attends, block_length)
    if found != config.block_length:
        config.block_length = found


def new_config(architecture: str, shape: Mapping[str, Any], **special: int | None):
    """The config of a new model. `shape`: the sizes of `model.shape`; `special`: ids of special tokens, by their names
    in a config.json."""
    kind = FAMILIES[architecture].config_class
    sizes = {name: size for name, size in shape.items() if size}  # 0, false and null: the network has no such part
    return kind(**{kind.attribute_map.get(name, name): size for name, size in sizes.items()}, **special)


def new_model(config, seed: int, architecture: str = "LLaDAModelLM"):
    """A model with random weights drawn from `seed`, without changing the global random state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = FAMILIES[architecture].model_class(config).eval()
    stack_experts(model)
    return model


def load_tokenizer(path: str, revision: str | None = None):
    """The tokenizer of a checkpoint (its own code is never run). Needs no weights."""
    folder = checkpoint_folder(path, revision, SMALL_FILES)
    require_sealed(folder, *READ_FOR_TOKENIZER)
    return build_tokenizer(folder)


def copy_tokenizer(path: str, revision: str | None, target: Path) -> list[str]:
    """Copy a checkpoint's tokenizer files byte for byte beside weights made from it. Returns their names.

    Settings that name code (`auto_map`) lose that name: the code stays behind.
    """
    folder = checkpoint_folder(path, revision, SMALL_FILES)
    require_sealed(folder, *TOKENIZER_FILES)
    files = [file for pattern in TOKENIZER_FILES for file in sorted(folder.glob(pattern))]
    files += [file for file in tokenizer_files(folder) if file not in files]
    for file in files:
        settings = read_settings(file) if file.name == "tokenizer_config.json" else {}
        if settings.pop("auto_map", None) is None:
            atomic.write_bytes(target / file.name, file.read_bytes())
        else:
            atomic.write_json(target / file.name, settings)
    return [file.name for file in files]


def tokenizer_digest(folder: Path) -> str:
    """The sha256 of the files that say how text becomes ids."""
    digests = [atomic.file_sha256(file) for file in tokenizer_files(folder)]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def mask_token_id(model, tokenizer=None) -> int:
    """The id of the mask token: the config's, else the tokenizer's mask token, else that of a known name, else the one
    of the model's family."""
    config, known = model.config, tokenizer.get_vocab() if tokenizer is not None else {}
    named = next((name for name in (getattr(tokenizer, "mask_token", None), *MASK_TOKENS) if name in known), None)
    found = getattr(config, "mask_token_id", None)
    if found is None:
        found = known[named] if named is not None else family_of(model)[1].mask_token_id
    if found is None or not 0 <= found < config.embedding_size:
        raise UserError(
            f"the mask token id is {found} (config.json: mask_token_id; tokenizer: mask_token, {', '.join(MASK_TOKENS)}"
            f"); expected an id below {config.embedding_size}. Write mask_token_id into the checkpoint's config.json."
        )
    return found


def read_config(folder: Path):
    """The checked config of a checkpoint folder and its family. It reads only the fields of its family."""
    content, path = original_config(folder), folder / "config.json"
    family = find_family(content, str(path))
    return family.config_class.from_dict(checked(path, content, family.config_class.fields)), family


def original_config(folder: Path) -> dict[str, Any]:
    """All that a checkpoint's config.json holds, unchecked: to be compared or written, never to build or load from."""
    path = folder / "config.json"
    if not path.exists():
        raise UserError(f"{folder}: has no config.json; expected a checkpoint folder. Check model.model_name_or_path.")
    require_sealed(folder, path.name)
    return read_settings(path)


def save_model(model, folder: Path, shard_bytes: int = 4 * 2**30, state: Mapping | None = None) -> list[str]:
    """Write config and weights in the hub's layout, key names unchanged. Returns the names of the files.

    `state`: whole tensors by name, of a model that holds only parts of them.
    """
    from safetensors.torch import save

    state = {name: tensor.detach().contiguous() for name, tensor in (state or model.state_dict()).items()}
    assert len({(t.device, t.data_ptr()) for t in state.values()}) == len(state), "tied weights cannot be saved"
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
        atomic.write_bytes(folder / name, save({k: v.cpu() for k, v in shard.items()}, metadata={"format": "pt"}))
    if len(shards) > 1:
        where = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        total = sum(tensor.nbytes for tensor in state.values())
        atomic.write_json(
            folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where}
        )
        names.append("model.safetensors.index.json")
    atomic.write_json(folder / "config.json", config_content(model))
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
    switches = {name: value for name, value in family.config_class.switches.items() if given.get(name) is None}
    dtype = str(model.dtype).removeprefix("torch.")
    content = {
        **family.config_class.inert,
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


def keep_original_fields(folder: Path, base: Path) -> None:
    """Add to the config.json of `folder` the fields of the base's that this program does not compute with.

    Names of code and kernels stay behind: `auto_map`, and what begins with an underscore.
    """
    original, content = original_config(base), atomic.read_json(folder / "config.json")
    inert = find_family(content, str(folder)).config_class.inert
    kept = {name: value for name, value in original.items() if name not in content or name in inert}
    kept = {name: value for name, value in kept.items() if name not in NOT_COPIED and not name.startswith("_")}
    atomic.write_json(folder / "config.json", {**content, **kept})


def load_weights(model, folder: Path) -> None:
    """Overwrite the weights of an unquantised model with those of a checkpoint folder; all must fit."""
    from safetensors.torch import load_file

    require_sealed(folder, *READ_FOR_MODEL)
    own = model.state_dict()
    unseen = set(own)
    with torch.no_grad():
        for file in weight_files(folder):
            for name, tensor in split_tensors(load_file(file)):
                if name not in own or own[name].shape != tensor.shape:
                    raise UserError(f"{file}: its tensor {name} does not fit the model. Use weights of the same model.")
                own[name].copy_(placed_like(own[name], tensor))
                unseen.discard(name)
    if unseen:
        raise UserError(
            f"{folder}: {len(unseen)} weights are missing, first {min(unseen)}; expected a whole checkpoint."
        )


def refuse_adapter_beside(folder: Path) -> None:
    """transformers puts an adapter that lies in a model's folder on the model, by the adapter's own settings."""
    file = folder / "adapter_config.json"
    if file.exists():
        raise UserError(
            f"{file}: an adapter lies in the folder of a model; expected the model alone. Move the adapter's files "
            "into a folder of their own, and name that by adapter.path."
        )


def weights_fingerprint(path: str, revision: str | None = None, hash_again: bool = False) -> str:
    """The name of the base weights in every key: `commit:<hash>` from the hub, else `sha256:<of the local files>`.

    Digests of files that a manifest seals are the manifest's: loading the files compares them. Others are remembered by
    path, size, times and inode, so that 16 GB are read once. `hash_again` reads them all the same, and raises `Damaged`
    where the content is not what was remembered, or what the hub's cache calls it.
    """
    folder = checkpoint_folder(path, revision, ["config.json"])
    if not Path(path).expanduser().is_dir() and re.fullmatch(r"[0-9a-f]{40}", folder.name):
        for file in weight_files(folder) if hash_again else ():
            _require_content_of_name(file)
        return f"commit:{folder.name}"
    sealed = sealed_digests(folder)
    digests = {
        f.name: sealed.get(f.name) or _remembered_sha256(f, hash_again)
        for f in [folder / "config.json", *weight_files(folder)]
        if f.exists()
    }
    if len(digests) < 2:
        require_safetensors(folder)
        raise UserError(f"{folder}: has no config.json; expected a checkpoint folder. Check model.model_name_or_path.")
    return f"sha256:{hashlib.sha256(atomic.canonical_json(digests).encode()).hexdigest()}"


def _require_content_of_name(file: Path) -> None:
    """A large file of the hub's cache is a link to a file that is named by its sha256."""
    name = file.resolve().name
    if re.fullmatch(r"[0-9a-f]{64}", name) and atomic.file_sha256(file) != name:
        raise Damaged(
            f"{file}: its content does not have the sha256 by which the hub's cache names it.",
            f"Remove {file.resolve()} and download the model again.",
        )


def _remembered_sha256(file: Path, hash_again: bool) -> str:
    """The sha256 of the file, which is read once while its size, times and inode stay the same."""
    file = file.resolve()
    stat = file.stat()
    is_fresh = time.time_ns() - stat.st_ctime_ns < FRESH_NS
    names = ("st_size", "st_mtime_ns", "st_ctime_ns", "st_ino")
    key = manifests.fingerprint({"path": str(file), **{name: getattr(stat, name) for name in names}})
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    memory, known = Path(root) / "laddpo" / "sha256" / key, ""
    if not memory.is_absolute():  # there is no home
        return atomic.file_sha256(file)
    with contextlib.suppress(OSError, UnicodeDecodeError):
        known = memory.read_text(encoding="ascii")
    is_known = re.fullmatch(r"[0-9a-f]{64}", known) is not None
    if is_known and not hash_again:
        return known
    digest = atomic.file_sha256(file)
    if is_known and digest != known:
        raise Damaged(
            f"{file}: its content changed while its size, times and inode stayed the same: sha256 {digest}, before "
            f"{known}. The disk may be faulty.",
            f"Get the file again; if it is right as it is, remove {memory}.",
        )
    if not is_fresh:
        with contextlib.suppress(UserError, OSError):  # a read-only home costs time, not the run
            atomic.write_text(memory, digest)
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
    """No progress bar for what loads in a moment, and no frames of one in a log file."""
    from transformers.utils import logging as progress

    small = sum(f.stat().st_size for f in weight_files(folder)) < 2**30 or not is_terminal(sys.stderr)
    if small := small and progress.is_progress_bar_enabled():
        progress.disable_progress_bar()
    try:
        yield
    finally:
        if small:
            progress.enable_progress_bar()


NOT_COPIED = ("auto_map", "custom_pipelines", "quantization_config")
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
