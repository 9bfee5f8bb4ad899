"""What a stage works on: model, prepared pairs, reference values. Each is found, or made by the stage before.

Stages import from here; below this file nothing sees the whole configuration.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from laddpo.core.draws import ElboEstimator
from laddpo.core.gradient import Item
from laddpo.core.objectives import DpoObjective
from laddpo.core.tasks import fill_reference, pair_item, stored_pair
from laddpo.errors import UserError
from laddpo.evaluation.margins import WINDOW, evaluation_estimator
from laddpo.hardware.machine import Machine, check_machine
from laddpo.hardware.planning import Lengths, model_shape, prepared_lengths
from laddpo.models import adapters, loading
from laddpo.models.blocks import checkpoint_blocks, compile_blocks
from laddpo.models.denoiser import TransformerDenoiser
from laddpo.models.linears import linear_names
from laddpo.models.llada_config import LLaDAConfig
from laddpo.models.offload import keep_embeddings_on_host
from laddpo.models.sharding import ShardedDenoiser, shard_model
from laddpo.pins import check_adapter, model_path
from laddpo.preference.embedded.arithmetic import Difficulty
from laddpo.preference.encoding.encode import EncodedPair, TextEncoder
from laddpo.preference.prepared import PreparedPairs
from laddpo.preference.sources import Request
from laddpo.processes.signals import StopFlag
from laddpo.settings.read_settings import command_of
from laddpo.settings.schema import MixturePart, QuantizationSettings, RunConfig, keywords
from laddpo.storage.reference_store import ReferenceStore

ADAPTER, ADAPTER_LAST, MODEL, MODEL_LAST = "adapter", "adapter_last", "model", "model_last"
PAIRS_PER_SHARD = 512


@dataclass
class Loaded:
    """A model on its device with what belongs to it. `weights` stands for the base and the starting adapter in keys."""

    model: Any
    tokenizer: Any
    denoiser: TransformerDenoiser
    machine: Machine
    weights: dict[str, str]


def check_before_loading(config: RunConfig, hash_again: bool | None = None) -> None:
    """Refuse what cannot work before minutes go by: what this machine lacks, a model that cannot be had, a chat
    template that cannot be used, a starting adapter that does not fit the model. `hash_again` (None: as `verify` says):
    base weights that are no longer what they were."""
    problems: list[str] = []
    for check in (
        check_machine,
        lambda config: encoder_for(config, loading.load_tokenizer(model_path(config), config.model.revision)),
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
    loading.weights_fingerprint(model_path(config), config.model.revision, hash_again=True)


def load(config: RunConfig, machine: Machine) -> Loaded:
    """The base model, with `adapter.path` on it when given: that is the reference, and where training starts.

    Full fine-tuning keeps float32 weights and computes in `hardware.precision`; otherwise the frozen base is stored in
    it.
    """
    path, revision = model_path(config), config.model.revision
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
    )
    model.requires_grad_(False)
    _check_shape(config, model.config)
    weights = {"base": loading.weights_fingerprint(path, revision), "adapter": "none"}
    if config.adapter.path:
        attach_adapter(config, model)
        weights |= adapters.adapter_identity(Path(config.adapter.path))
    if machine.embeddings_on_cpu:
        keep_embeddings_on_host(model)
    if machine.is_sharded:
        _shard(config, model, machine)
    mask_token_id = loading.mask_token_id(model.config, tokenizer)
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
    tokenizer = loading.load_tokenizer(model_path(config), config.model.revision)
    shape = keywords(config.model.shape)
    if len(tokenizer) > shape["vocab_size"]:
        raise UserError(
            f"model.shape.vocab_size is {shape['vocab_size']} but the tokenizer of {config.model.model_name_or_path} "
            f"has {len(tokenizer)} tokens; expected at least as many rows. Raise model.shape.vocab_size."
        )
    model_config = LLaDAConfig(
        **shape,
        mask_token_id=tokenizer.convert_tokens_to_ids(loading.MASK_TOKEN),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = loading.new_model(model_config, config.seed)
    if machine.is_sharded:
        _shard(config, model, machine)
    else:
        model.to(machine.device)
    denoiser = _denoiser(model, model_config.mask_token_id, machine, config.adapter.kind == "full")
    weights = {"base": f"random weights of seed {config.seed}", "adapter": "none"}
    return Loaded(model, tokenizer, denoiser, machine, weights)


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


def data_lengths(config: RunConfig, prepared: PreparedPairs) -> Lengths:
    """What the memory plan must know of these pairs."""
    return prepared_lengths(prepared.train.lengths(), config.dpo.diffusion_samples, str(prepared.folder))


def encoder_for(config: RunConfig, tokenizer) -> TextEncoder:
    """How this run's texts become tokens."""
    return TextEncoder(
        tokenizer,
        template=config.data.template,
        max_length=config.data.max_length,
        truncation=config.data.truncation,
    )


def difficulty_of(config: RunConfig) -> Difficulty:
    """How hard the generated problems are: one answer for training pairs, the corpus and the test."""
    return Difficulty(operand_max=config.data.operand_max, terms=config.data.terms, width=config.data.width)


def request_of(config: RunConfig, part: MixturePart, grader=None) -> Request:
    """What is asked of one source of rows; `grader` tells right from wrong where pairs are made of answers."""
    data = config.data
    return Request(
        dataset_name=part.dataset_name,
        dataset_split=part.dataset_split,
        dataset_config=part.dataset_config,
        revision=part.revision,
        columns=keywords(part.columns),
        format=part.format,
        preference_dir=Path(config.paths.data_dir) / "preference_data",
        max_line_bytes=data.max_line_bytes,
        follow_symlinks=data.follow_symlinks,
        allow_empty_prompt=data.allow_empty_prompt,
        allow_nul=data.allow_nul,
        num_pairs=data.num_pairs,
        difficulty=difficulty_of(config),
        habit=data.habit,
        seed=config.seed,
        validation_fraction=data.validation_fraction,
        candidates_name=data.candidates_name,
        pairs_per_question=data.pairs_per_question,
        grader=grader,
        balance_lengths=data.balance_lengths,
        num_examples=config.sft.num_examples,
        mistake_share=config.sft.mistake_share,
    )


def training_estimator(config: RunConfig) -> ElboEstimator:
    """The policy's draws during training."""
    dpo = config.dpo
    return ElboEstimator(
        dpo.estimator,
        dpo.schedule,
        dpo.diffusion_samples,
        config.seed,
        dpo.shared_counts,
        dpo.mask_rounds,
        shared_masks=dpo.shared_masks,
        difference_focus=dpo.difference_focus,
        count_tilt=dpo.count_tilt,
    )


def reference_estimator(config: RunConfig) -> ElboEstimator:
    """The reference's draws: the policy's own, or an independent stream without common random numbers."""
    policy = training_estimator(config)
    return policy if config.dpo.common_random_numbers else dataclasses.replace(policy, stream="/reference")


def objective_of(config: RunConfig) -> DpoObjective:
    """The preference loss of this run."""
    dpo = config.dpo
    block = ElboEstimator(dpo.estimator).block
    return DpoObjective(dpo.loss, dpo.beta, dpo.label_smoothing, dpo.sft_weight, dpo.correction, block)


def reference_fields(config: RunConfig, prepared: PreparedPairs, loaded: Loaded, estimator: ElboEstimator) -> dict:
    """Everything that the reference's values depend on: the key of the store.

    Not among it: which rows, their order, the number of draws, batch, learning rate, beta, loss, LoRA, memory settings.
    """
    quantization = config.quantization
    stored = "none"
    if quantization.load_in_4bit:
        stored = (
            f"{quantization.bnb_4bit_quant_type}, double {quantization.bnb_4bit_use_double_quant}, "
            f"compute {quantization.bnb_4bit_compute_dtype or 'default'}"
        )
    elif quantization.load_in_8bit:
        stored = f"int8, threshold {quantization.llm_int8_threshold}"
    precision = loaded.machine.precision
    if loaded.denoiser.autocast is not None:  # full fine-tuning: the same arithmetic rounds other things
        precision = f"{precision} autocast over fp32 weights"
    return {
        "encoding": prepared.manifest["fields"]["encoding"],
        "weights": loaded.weights,
        "quantization": stored,
        "precision": precision,
        "draws": estimator.store_fields(),
    }


def reference_store(
    config: RunConfig, prepared: PreparedPairs, loaded: Loaded, estimator: ElboEstimator
) -> ReferenceStore:
    """The store that holds, or will hold, this run's reference values."""
    stores = Path(config.paths.data_dir) / "reference"
    return ReferenceStore.open(stores, reference_fields(config, prepared, loaded, estimator))


def complete_reference(
    config: RunConfig,
    loaded: Loaded,
    store: ReferenceStore,
    estimator: ElboEstimator,
    windows: Sequence[tuple[list[EncodedPair], range]],
    stop: StopFlag,
    label: str,
) -> None:
    """Compute what the store lacks for these windows of pairs, saying how much that is."""
    ranks = loaded.machine.ranks
    absent = [
        stored_pair(pair) for pairs, draws in windows for pair in pairs if store.missing(stored_pair(pair), draws)
    ]
    lacking = max(ranks.gather(len(absent)))  # another run may be adding to the store while the ranks look
    total = sum(len(pairs) for pairs, _ in windows)
    if not lacking:
        print(f"reference, {label}: all {total} pairs are in {store.folder}")
        return
    if not config.auto:
        raise UserError(
            f"{store.folder}: {lacking} of {total} pairs ({label}) have no reference values yet and auto is false. "
            f"Run {command_of('precompute')}, or set auto=true."
        )
    print(f"reference, {label}: computing {lacking} of {total} pairs into {store.folder}")
    print(f"reference, {label}: {store.why_missing(absent)}")
    with tqdm(total=total, unit="pairs", desc="reference", dynamic_ncols=True, disable=not ranks.is_main) as progress:
        fill_reference(
            loaded.denoiser,
            store,
            windows,
            estimator,
            loaded.machine.token_budget,
            stop,
            PAIRS_PER_SHARD,
            progress.update,
            ranks,
        )
    if ranks.world > 1:
        ranks.barrier()
        store.refresh()


def measured_items(
    config: RunConfig,
    prepared: PreparedPairs,
    loaded: Loaded,
    pairs: Sequence[EncodedPair],
    stop: StopFlag,
    label: str,
) -> tuple[list[Item], int]:
    """Pairs with the reference's values under the evaluation's own draws; and the block size of these draws."""
    estimator = evaluation_estimator(config.evaluation.diffusion_samples, config.seed)
    if not pairs:
        return [], estimator.block
    draws = estimator.draw_indices(0)
    store = reference_store(config, prepared, loaded, estimator)
    windows = [(list(pairs[start : start + WINDOW]), draws) for start in range(0, len(pairs), WINDOW)]
    complete_reference(config, loaded, store, estimator, windows, stop, label)
    items = [pair_item(pair, estimator, draws, store.values(stored_pair(pair), draws)) for pair in pairs]
    return items, estimator.block


def check_adapter_fits(config: RunConfig) -> None:
    """`adapter.path` against the shape of the model, before there is a model."""
    if config.adapter.path:
        shape = model_shape(config)
        linears = {name: shape.linear(name.rpartition(".")[2]) for name in linear_names(shape.n_layers)}
        adapters.check_adapter_files(Path(config.adapter.path), linears)


def _check_vocabulary(config: RunConfig, tokenizer) -> None:
    """Refuse a tokenizer whose ids have no row in the model's embedding, before any weight is read."""
    folder = loading.checkpoint_folder(model_path(config), config.model.revision, ["config.json"])
    rows = loading.read_config(folder)[0].embedding_size
    name, token_id = max(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    if token_id >= rows:
        raise UserError(
            f"{config.model.model_name_or_path}: its tokenizer has the token {name!r} with id {token_id:,} and its "
            f"model embeds {rows:,} tokens; expected ids below that. Put the tokenizer that belongs to the weights "
            "beside them (DATA-96)."
        )


def _check_shape(config: RunConfig, found) -> None:
    """The sizes in conf/model/*.yaml, which `plan` believes, against the checkpoint's own."""
    problems = [
        f"model.shape.{field.name} is {wanted} but {config.model.model_name_or_path} has {getattr(found, field.name)}. "
        f"Correct it in conf/model/{config.model.name}.yaml or on the command line."
        for field in dataclasses.fields(config.model.shape)
        if (wanted := getattr(config.model.shape, field.name)) != getattr(found, field.name)
    ]
    if problems:
        raise UserError(*problems)
