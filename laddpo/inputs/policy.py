"""What a stage works on: model, prepared pairs, reference values. Each is found, or made by the stage before.

Stages import from here; below this file nothing sees the whole configuration.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from laddpo.errors import UserError
from laddpo.hardware.machine import Machine, check_machine
from laddpo.hardware.planning import model_linears, model_shape
from laddpo.inputs.data import encoder_for
from laddpo.inputs.pins import check_adapter, model_path
from laddpo.models import adapters, loading
from laddpo.models.block_length import in_words
from laddpo.models.blocks import checkpoint_blocks, compile_blocks
from laddpo.models.denoiser import TransformerDenoiser
from laddpo.models.families import FAMILIES, family_of
from laddpo.models.offload import keep_embeddings_on_host
from laddpo.models.sharding import ShardedDenoiser, shard_model
from laddpo.settings.schema import QuantizationSettings, RunConfig, keywords

ADAPTER, ADAPTER_LAST, MODEL, MODEL_LAST = "adapter", "adapter_last", "model", "model_last"


@dataclass
class Loaded:
    """A model on its device with what belongs to it. `weights` identifies the base and the starting adapter in keys."""

    model: Any
    tokenizer: Any
    denoiser: TransformerDenoiser
    machine: Machine
    weights: dict[str, str]

    @property
    def block_length(self) -> int:
        """Tokens of a block, of which each draws its own masks; 0 for a bidirectional model."""
        return self.denoiser.block_length


def check_before_loading(config: RunConfig, hash_again: bool | None = None) -> None:
    """Refuse what cannot work before minutes go by: what this machine lacks, a model that cannot be had, a chat
    template that cannot be used, a starting adapter that does not fit the model. `hash_again` (None: as `verify` says):
    base weights that are no longer what they were."""
    problems: list[str] = []
    for check in (
        check_machine,
        lambda config: encoder_for(
            config.data, loading.load_tokenizer(model_path(config.model), config.model.revision)
        ),
        *([_hash_weights] if (config.verify if hash_again is None else hash_again) else []),
        check_adapter_fits,
        check_adapter,
    ):
        try:
            check(config)
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(*dict.fromkeys(problems))


def _hash_weights(config: RunConfig) -> None:
    loading.weights_fingerprint(model_path(config.model), config.model.revision, hash_again=True)


def load(config: RunConfig, machine: Machine) -> Loaded:
    """The base model, with `adapter.path` on it when given: that is the reference, and where training starts.

    Full fine-tuning keeps float32 weights and computes in `hardware.precision`; otherwise the frozen base is stored in
    it.
    """
    path, revision = model_path(config.model), config.model.revision
    is_full = config.adapter.kind == "full"
    tokenizer = loading.load_tokenizer(path, revision)
    _check_vocabulary(config, tokenizer)
    model = loading.load_model(
        path,
        revision,
        dtype="fp32" if is_full else machine.precision,
        quantization=storage_of(config.quantization),
        device="cpu" if machine.is_sharded else machine.device,
        attention=machine.attention,
        attends=config.model.attention,
        block_length=config.model.block_length,
    )
    model.requires_grad_(False)
    _check_shape(config, model)
    weights = {"base": loading.weights_fingerprint(path, revision), "adapter": "none", **_attention(model)}
    if config.adapter.path:
        attach_adapter(config, model)
        weights |= adapters.adapter_identity(Path(config.adapter.path))
    if machine.embeddings_on_cpu:
        keep_embeddings_on_host(model)
    if machine.is_sharded:
        _shard(config, model, machine)
    mask_token_id = loading.mask_token_id(model, tokenizer)
    return Loaded(model, tokenizer, _denoiser(model, mask_token_id, machine, is_full), machine, weights)


def storage_of(quantization: QuantizationSettings) -> dict[str, Any]:
    """The settings of the way in which weights are stored, without those of other ways."""
    in_4_bits, in_8_bits = quantization.load_in_4bit, quantization.load_in_8bit
    if in_4_bits:
        names = ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "bnb_4bit_compute_dtype")
        return {"load_in_4bit": True, **{name: getattr(quantization, name) for name in names}}
    if in_8_bits:
        return {"load_in_8bit": True, "llm_int8_threshold": quantization.llm_int8_threshold}
    return {}


def new_model(config: RunConfig, machine: Machine) -> Loaded:
    """Random weights in the shape of `model.shape`, with the tokenizer of `model.model_name_or_path`."""
    tokenizer = loading.load_tokenizer(model_path(config.model), config.model.revision)
    shape = keywords(config.model.shape)
    if len(tokenizer) > shape["vocab_size"]:
        raise UserError(
            f"model.shape.vocab_size is {shape['vocab_size']} but the tokenizer of {config.model.model_name_or_path} "
            f"has {len(tokenizer)} tokens; expected at least as many rows. Raise model.shape.vocab_size."
        )
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    architecture, settings = config.model.architecture, config.model
    made = loading.new_config(architecture, shape, **special)
    loading.set_block_length(made, FAMILIES[architecture], settings.attention, settings.block_length)
    model = loading.new_model(made, config.seed, architecture)
    model.config.mask_token_id = loading.mask_token_id(model, tokenizer)
    if machine.is_sharded:
        _shard(config, model, machine)
    else:
        model.to(machine.device)
    denoiser = _denoiser(model, model.config.mask_token_id, machine, config.adapter.kind == "full")
    weights = {"base": f"random weights of seed {config.seed}", "adapter": "none", **_attention(model)}
    return Loaded(model, tokenizer, denoiser, machine, weights)


def _attention(model) -> dict[str, int]:
    """What a key must say of the attention: nothing where it is bidirectional. Says it where it could be otherwise."""
    length = model.block_length
    if length is not None or family_of(model)[1].may_be_block:
        print(f"attention: {in_words(length)}")
    return {} if length is None else {"block_length": length}


def _shard(config: RunConfig, model, machine: Machine) -> None:
    """Divide the weights among the ranks, with all that will be trained on the model already."""
    if config.adapter.kind == "full":
        model.requires_grad_(True)
    elif not config.adapter.path:  # an untrained adapter adds exactly 0: the reference is the same with it
        attach_adapter(config, model)
    shard_model(model, machine.ranks, machine.device)


def _denoiser(model, mask_token_id: int, machine: Machine, is_full: bool) -> TransformerDenoiser:
    """The model as the objective sees it, executed as the machine decided."""
    if machine.gradient_checkpointing:
        checkpoint_blocks(model)
    if machine.compile:
        compile_blocks(model)
    autocast = machine.dtype if is_full and machine.precision != "fp32" else None
    if machine.is_sharded:
        return ShardedDenoiser(model, mask_token_id, autocast=autocast, ranks=machine.ranks)
    return TransformerDenoiser(model, mask_token_id, autocast=autocast, offload=machine.offload_activations)


def attach_adapter(config: RunConfig, model) -> list[str]:
    """Put the run's LoRA on the model; the names of the modules that carry it."""
    adapter = config.adapter
    if adapter.path:  # which brings its own rank, scale and layers
        return adapters.attach_lora(model, seed=config.seed, path=adapter.path)
    return adapters.attach_lora(
        model,
        r=adapter.r,
        alpha=adapter.lora_alpha,
        dropout=adapter.lora_dropout,
        target_modules=adapter.target_modules,
        use_rslora=adapter.use_rslora,
        use_dora=adapter.use_dora,
        seed=config.seed,
    )


def make_trainable(config: RunConfig, loaded: Loaded) -> dict[str, Any]:
    """Switch on what the run trains and say what it is; the trainable parameters by name."""
    model = loaded.model
    if config.adapter.kind == "full":
        model.requires_grad_(True)
        print("training all weights")
    else:
        matched = adapters.adapted_modules(model) if adapters.has_adapter(model) else attach_adapter(config, model)
        kinds = sorted({name.rsplit(".", 1)[-1] for name in matched})
        rank, source = adapters.rank(model), f" of {config.adapter.path}" if config.adapter.path else ""
        print(f"LoRA r={rank}{source} on {len(matched)} linear layers: {', '.join(kinds)}")
    parameters = adapters.trainable_parameters(model)
    trained, total = (sum(p.numel() for p in group) for group in (parameters.values(), model.parameters()))
    print(f"{trained:,} of {total:,} stored parameters are trained")
    return parameters


def check_adapter_fits(config: RunConfig) -> None:
    """`adapter.path` against the shape of the model, before there is a model."""
    if config.adapter.path:
        shape, layout = model_shape(config.model), FAMILIES[config.model.architecture].layout
        linears = {name: shape.linear(layout.role(name)) for name in model_linears(config.model)}
        adapters.check_adapter_files(Path(config.adapter.path), linears)


def _check_vocabulary(config: RunConfig, tokenizer) -> None:
    """Refuse a tokenizer whose ids have no row in the model's embedding, before any weight is read."""
    folder = loading.checkpoint_folder(model_path(config.model), config.model.revision, ["config.json"])
    rows = loading.read_config(folder)[0].embedding_size
    name, token_id = max(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    if token_id >= rows:
        raise UserError(
            f"{config.model.model_name_or_path}: its tokenizer has the token {name!r} with id {token_id:,} and its "
            f"model embeds {rows:,} tokens; expected ids below that. Put the tokenizer that belongs to the weights "
            "beside them (DATA-96)."
        )


def _check_shape(config: RunConfig, model) -> None:
    """The family and the sizes in conf/model/*.yaml, which `plan` believes, against the checkpoint's own."""
    settings, found = config.model, model.config
    architecture, family = family_of(model)
    has = {
        f"shape.{field.name}": (getattr(settings.shape, field.name), getattr(found, field.name, field.default))
        for field in dataclasses.fields(settings.shape)
    }
    has["shape.is_tied"] = (settings.shape.is_tied, bool(found.tie_word_embeddings))
    if settings.shape.max_sequence_length < found.max_sequence_length:  # positions that may be used, of those it knows
        del has["shape.max_sequence_length"]
    if settings.shape.head_dim is None:
        has["shape.head_dim"] = (settings.shape.d_model // settings.shape.n_heads, found.head_dim)
    if FAMILIES[settings.architecture] is not family:
        has = {"architecture": (settings.architecture, architecture)}
    problems = [
        f"model.{name} is {wanted} but {settings.model_name_or_path} has {value}. Correct it in "
        f"conf/model/{settings.name}.yaml or on the command line."
        for name, (wanted, value) in has.items()
        if wanted != value
    ]
    if settings.known_block_length != model.block_length and not problems:
        needed = f"model.attention=block model.block_length={model.block_length}"
        problems.append(
            f"{settings.model_name_or_path}: its attention is {in_words(model.block_length)}, and by the settings "
            f"{in_words(settings.known_block_length)}. Set {needed if family.may_be_block else needed.split()[1]}."
        )
    if problems:
        raise UserError(*problems)
