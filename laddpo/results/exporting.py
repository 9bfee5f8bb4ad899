"""The work of `export`: merge, compare logits, write, load again; what the model card says; sending it to the hub."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from laddpo.errors import RunFault, UserError
from laddpo.hardware.planning import stored_adapter
from laddpo.inputs.data import encoder_for, given_template
from laddpo.inputs.pins import check_adapter, model_path, require_inputs_of
from laddpo.inputs.policy import check_adapter_fits
from laddpo.inputs.tuned import tuned_weights
from laddpo.models import adapters, loading
from laddpo.models.families import find_family
from laddpo.models.tokenizers import TEMPLATE, write_template
from laddpo.preference.reading.pairs import user_prompt
from laddpo.results.model_card import CardFacts, card_text, licences
from laddpo.settings.schema import RunConfig
from laddpo.storage import atomic, manifests
from laddpo.storage.seals import require_sealed, sealed_file

PROBES = ("07+15-04=", "What is the capital of France?", "Write one sentence about rivers.", "2, 4, 8, 16,")
PROBE_MASKS = 16  # masked positions after each probe, where logits are compared
FRONT_MATTER_CHARACTERS = 2**16  # of a base's model card: where its licence is looked for
MERGE_TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2, "fp16": 1e-2}  # of the largest logit: merging rounds every weight once


@dataclass(frozen=True)
class Source:
    """The weights to export: an adapter on a base (`is_full` false), or the whole model of a full fine-tuning."""

    folder: Path
    is_full: bool
    step: int | None
    base: Any


@dataclass(frozen=True)
class LogitCheck:
    """Root mean square of logit differences on masked positions: what the adapter does, what merging lost."""

    effect: float
    error: float
    largest_relative: float


def find_weights(config: RunConfig, trained: Path | None) -> Source:
    """The best weights of the run, or the adapter at `adapter.path`. Raises `UserError` where there are none."""
    is_full = trained is not None and config.adapter.kind == "full"
    if trained is None:
        folder = Path(config.adapter.path)
        if not (folder / adapters.ADAPTER_FILES[0]).exists():
            raise UserError(f"adapter.path is {str(folder)!r}: no adapter in PEFT's layout is there; check the path.")
        check_adapter_fits(config)
        check_adapter(config)
        require_sealed(folder, *adapters.ADAPTER_FILES)
        return Source(folder, False, None, _base_fingerprint(config))
    manifests.read_manifest(trained, "train", "sft")  # the model card cites what it seals
    folder = tuned_weights(config.adapter, trained)
    require_inputs_of(folder, config, is_export=True)
    sealed = manifests.read_manifest(folder, "weights", verify=False)["fields"]
    if not is_full:
        _base_fingerprint(config)
    return Source(folder, is_full, sealed["step"], sealed["base"]["base"])


def _base_fingerprint(config: RunConfig) -> str:
    return loading.weights_fingerprint(model_path(config.model), config.model.revision, hash_again=True)


def export_merged(config: RunConfig, source: Source, folder: Path) -> tuple[list[str], CardFacts]:
    """Write a whole checkpoint. Returns its files and what the card says about the check."""
    path, revision = model_path(config.model), config.model.revision
    dtype = config.export.dtype
    if dtype is None and source.is_full and config.sft.from_scratch:  # no base has weights
        dtype = stored_dtype(source.folder)
    elif dtype is None:
        dtype = stored_dtype(loading.checkpoint_folder(path, revision, ["*.json", loading.WEIGHTS]))
    device = "cuda" if config.hardware.device == "cuda" else "cpu"
    print(f"loading {config.model.model_name_or_path} in {dtype} on {device}")
    tokenizer = loading.load_tokenizer(path, revision)
    probes = [
        encoder_for(config.data, tokenizer).encode_prompt(user_prompt(text)) for text in PROBES
    ]  # without the run's own texts: they may be private
    check = None
    if source.is_full:
        model = loading.load_model(str(source.folder), dtype=dtype, device=device)
        mask = loading.mask_token_id(model, tokenizer)
    else:
        attends, length = config.model.attention, config.model.block_length
        model = loading.load_model(path, revision, dtype=dtype, device=device, attends=attends, block_length=length)
        mask = loading.mask_token_id(model, tokenizer)
        before = probe_logits(model, probes, mask)
        adapters.attach_lora(model, path=str(source.folder))
        tuned = probe_logits(model, probes, mask)
        adapters.merge_adapter(model)
        check = compare_logits(before, tuned, probe_logits(model, probes, mask))
        _judge(check, dtype)
    model.config.mask_token_id = mask  # where config.json leaves it to the tokenizer
    final, digests = probe_logits(model, probes, mask), tensor_digests(model)
    files = loading.save_model(model, folder, int(config.export.shard_gib * 2**30))
    if not (source.is_full and config.sft.from_scratch):
        loading.keep_original_fields(folder, loading.checkpoint_folder(path, revision))
    files += loading.copy_tokenizer(path, revision, folder)
    if template := given_template(config.data).source:
        files += [name for name in write_template(folder, template) if name not in files]
    del model  # two 8B models would not fit beside each other
    again = loading.load_model(str(folder), dtype=dtype, device=device)
    changed = [name for name, digest in tensor_digests(again).items() if digests.get(name) != digest]
    if changed or not torch.equal(probe_logits(again, probes, mask), final):
        raise RunFault(
            f"{folder}: loads with other values than were written ({len(changed)} tensors, first "
            f"{min(changed, default='none, but the logits differ')}); expected the same bytes. The disk or memory may "
            "be faulty: export again to another disk."
        )
    return files, CardFacts(dtype=dtype, check=check_words(check, dtype), tensors=len(digests), **_family_facts(folder))


def export_adapter(config: RunConfig, source: Source, folder: Path) -> tuple[list[str], CardFacts]:
    """Write the adapter in PEFT's layout, byte for byte, naming its base as the hub or the user knows it."""
    if source.is_full:
        raise UserError(
            "export.adapter_only is true and the run trained all weights (adapter.kind is 'full'); there is no "
            "adapter; set export.adapter_only=false."
        )
    settings, weights = adapters.ADAPTER_FILES
    require_sealed(source.folder, settings, weights)
    content = atomic.read_json(source.folder / settings)
    content["base_model_name_or_path"] = config.model.model_name_or_path
    content["revision"] = config.model.revision
    atomic.write_json(folder / settings, content)
    atomic.write_bytes(folder / weights, (source.folder / weights).read_bytes())
    base = loading.checkpoint_folder(model_path(config.model), config.model.revision, ["config.json"])
    kept = [name for name in (TEMPLATE,) if (source.folder / name).exists()]
    require_sealed(source.folder, *kept)
    for name in kept:
        atomic.write_bytes(folder / name, (source.folder / name).read_bytes())
    return [settings, weights, *kept], CardFacts(
        dtype="fp32", check="", tensors=0, is_adapter=True, **_family_facts(base)
    )


def _family_facts(folder: Path) -> dict[str, str]:
    """What a card must know of the model of a checkpoint to say which programs load it."""
    content = loading.original_config(folder)
    return {"architecture": content["architectures"][0], "public_code": find_family(content, str(folder)).repository}


def stored_dtype(folder: Path) -> str:
    """The name of the dtype of a checkpoint's first weight; float64 and others are exported as fp32."""
    from safetensors import safe_open

    loading.require_safetensors(folder)
    names = {"BF16": "bf16", "F16": "fp16"}
    with safe_open(str(loading.weight_files(folder)[0]), "pt") as content:
        first = min(content.keys())
        return names.get(content.get_slice(first).get_dtype(), "fp32")


@torch.no_grad()
def probe_logits(model, probes: list, mask: int) -> Tensor:
    """Logits at the masked positions behind each probe. # float32 [probes * PROBE_MASKS, V]"""
    rows = []
    for prompt in probes:
        ids = torch.cat([torch.as_tensor(prompt).long(), torch.full((PROBE_MASKS,), mask)])[None].to(model.device)
        rows.append(model(input_ids=ids).logits[0, -PROBE_MASKS:].float().cpu())
    return torch.cat(rows)


def compare_logits(base: Tensor, tuned: Tensor, merged: Tensor) -> LogitCheck:
    """What the adapter changes, and what of it merging got wrong."""
    effect, error = ((difference**2).mean().sqrt().item() for difference in (tuned - base, merged - tuned))
    return LogitCheck(effect, error, float((merged - tuned).abs().max() / tuned.abs().max()))


def _judge(check: LogitCheck, dtype: str) -> None:
    """Refuse a merge that went wrong; say so when rounding ate a small adapter."""
    if not check.largest_relative <= MERGE_TOLERANCE[dtype]:
        raise RunFault(
            f"merged logits differ from the adapter's by {check.largest_relative:.2g} of the largest logit, allowed "
            f"{MERGE_TOLERANCE[dtype]:g} in {dtype}; expected the same model. Export with export.dtype=fp32; if that "
            "differs too, the adapter does not fit its base."
        )
    print(check_words(check, dtype))
    if check.error > check.effect / 2:
        print(
            f"note: rounding to {dtype} is of the size of what the adapter changes; export.dtype=fp32 keeps it, or use "
            "the adapter unmerged (export.adapter_only=true)."
        )


def check_words(check: LogitCheck | None, dtype: str) -> str:
    """One sentence for the terminal and the card."""
    if check is None:
        return f"all weights were trained and stored in {dtype}"
    return (
        f"the adapter changes logits by {check.effect:.3g} (root mean square), merging in {dtype} by a further "
        f"{check.error:.2g}"
    )


def tensor_digests(model) -> dict[str, str]:
    """sha256 of the bytes of every tensor of the model."""
    digests = {}
    for name, tensor in model.state_dict().items():
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(memoryview(flat.numpy()))
        digests[name] = digest.hexdigest()
    return digests


def model_card(config: RunConfig, trained: Path | None, source: Source, facts: CardFacts) -> str:
    """README.md of the export."""
    results, sealed = {}, None
    if trained is not None:
        place = sealed_file(trained, "evaluation/results.json")
        results = atomic.read_json(place) if place.exists() else {}
        sealed = manifests.read_manifest(trained, "train", "sft")
    if not source.is_full:  # what the adapter has, which is not what was configured beside adapter.path
        adapter = stored_adapter(source.folder, config.adapter.path if trained else None)
        config = dataclasses.replace(config, adapter=adapter)
    licence = licences(config.export.license) if config.export.license else base_licence(config)
    is_foreign = trained is None
    return card_text(config, facts, results, sealed, source.base, source.step, licence, is_foreign=is_foreign)


def base_licence(config: RunConfig) -> list[str]:
    """The licences in the front matter of the base's own model card; none where it names none or cannot be read."""
    folder = loading.checkpoint_folder(model_path(config.model), config.model.revision, ["README.md", "config.json"])
    card = folder / "README.md"
    if not card.exists():
        return []
    with card.open(encoding="utf-8", errors="replace") as stream:
        start = stream.read(FRONT_MATTER_CHARACTERS)
    found = re.match(r"---[ \t]*\n(.*?\n)---[ \t]*(?:\n|$)", start, re.DOTALL)
    try:
        content = yaml.safe_load(found.group(1)) if found else None
    except (yaml.YAMLError, RecursionError, ValueError):
        return []
    return licences(content.get("license")) if isinstance(content, dict) else []


def check_hub_access() -> None:
    """Refuse before the long work when the hub would not take the result."""
    from huggingface_hub import HfApi

    try:
        HfApi().whoami()
    except Exception as error:  # the library raises many kinds: no token, no network, a token that has expired
        raise UserError(
            f"export.push_to_hub is set and the hub does not know you ({type(error).__name__}: "
            f"{str(error).splitlines()[0]}). Log in with `hf auth login`, or export without it and upload later."
        ) from error


def push(folder: Path, repository: str, private: bool) -> None:
    """Send a finished export to the hub, making the repository when it is new."""
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        message = "Export by laddpo"
        api.upload_folder(repo_id=repository, folder_path=str(folder), commit_message=message, ignore_patterns=[".*"])
    except Exception as error:
        raise UserError(
            f"{folder}: is complete here, but the hub did not take it as {repository} ({type(error).__name__}: "
            f"{str(error).splitlines()[0]}). Check the name and your rights, then: hf upload {repository} {folder}"
        ) from error
    print(f"sent to https://huggingface.co/{repository}")
