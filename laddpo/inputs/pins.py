"""What a run was trained on, as fingerprints: `make` takes them, `require_same` compares them and names what changed.

Checkpoints, kept weights and finished runs carry them. A resumed run, and every stage that reads the weights of a
run, compares them with the inputs as they are now. What an older folder lacks is one note.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from laddpo.errors import UserError
from laddpo.models.block_length import resolve
from laddpo.models.families import FAMILIES
from laddpo.models.tokenizers import TEMPLATE
from laddpo.settings.compose import plain_settings, read_config
from laddpo.settings.ranges import CONF_DIR
from laddpo.settings.schema import ModelSettings, RunConfig
from laddpo.storage import atomic, manifests
from laddpo.storage.seals import sealed_file

PINS_FILE = "pins.json"  # of a folder that is worked on in parts: an evaluation, a run of several rounds
OF_EXAMPLES = "examples:"  # begins the data pin of SFT rows that are no prepared pairs
OF_TEMPLATE = ("template", "terminator", "bos", "template_kwargs")  # the fields of an encoder in the template's pin
RANDOM = "random weights"  # begins the base pin of a model that training made from nothing

Pins = dict[str, Any]


def model_path(model: ModelSettings) -> str:
    """A local folder from the working directory or beside the installed conf/, else the hub id as given."""
    given = model.model_name_or_path
    shipped = CONF_DIR.parent / given
    return str(shipped) if not Path(given).expanduser().is_dir() and shipped.is_dir() else given


def make(config: RunConfig, data: str | None = None, from_scratch: bool = False) -> Pins:
    """The fingerprints of base weights, starting adapter, tokenizer and template as they are now.

    `data`: a digest of the rows, if there are any. `from_scratch`: training starts from random weights.
    """
    from laddpo.inputs.data import encoder_for
    from laddpo.models import adapters, loading

    path, revision = model_path(config.model), config.model.revision
    encoder = encoder_for(config.data, loading.load_tokenizer(path, revision))
    folder = loading.checkpoint_folder(path, revision)
    spoken = {**encoder.fields(), "bos": encoder.bos_id}
    pins: Pins = {
        "tokenizer": loading.tokenizer_digest(folder),
        "template": manifests.fingerprint({name: spoken[name] for name in OF_TEMPLATE if name in spoken}),
        "adapter": "none",
    }
    if from_scratch:
        pins["base"] = f"{RANDOM} of seed {config.seed}"
    else:
        pins["base"] = loading.weights_fingerprint(path, revision)
        pins["config"] = atomic.file_sha256(folder / "config.json")
    pins |= _attention(config.model, None if from_scratch else folder)
    if config.adapter.path:
        pins |= adapters.adapter_identity(Path(config.adapter.path))
    if data is not None:
        pins["data"] = data
    return pins


def _attention(model: ModelSettings, folder: Path | None) -> Pins:
    """The length of blocks, if the network may attend in blocks. `folder`: that of its config.json, if it has one."""
    from laddpo.models import loading

    family, stated = FAMILIES[model.architecture], FAMILIES[model.architecture].block_length
    if folder is not None:
        config, family = loading.read_config(folder)
        stated = config.block_length
    length = resolve(family, stated, model.attention, model.block_length)
    return {"block_length": length or "none"} if length or family.may_be_block else {}


def require_same(
    where: Path, stored: Mapping[str, Any], now: Mapping[str, Any], config: RunConfig, cure: str | None = None
) -> None:
    """`UserError` naming each input whose fingerprint is not the one stored in `where`; one note on what is not stored.

    An input that follows from another one is not named beside it: other tokens of rows follow from a tokenizer.
    """
    stored = _comparable(stored, now)
    lacking = [INPUTS[name][0] for name in INPUTS if name in now and name not in stored]
    if lacking:
        print(f"note: {where}: an earlier version made it and kept no fingerprint of: {', '.join(lacking)}.")
    changed = {name for name in INPUTS if name in now and name in stored and stored[name] != now[name]}
    named = [name for name in INPUTS if name in changed and not changed.intersection(FOLLOWS_FROM.get(name, ()))]
    if named:
        raise UserError(*(_problem(where, name, stored[name], now[name], config, cure) for name in named))


def of_folder(folder: Path) -> Pins | None:
    """The pins in the manifest of weights, of a run or of an export; None where there is no such manifest."""
    path = folder / manifests.MANIFEST
    content = manifests.unsealed(path) if path.exists() else None
    fields = content.get("fields") if isinstance(content, dict) else None
    if not isinstance(fields, dict) or content.get("kind") not in ("weights", "train", "sft", "export"):
        return None
    if "pins" in fields:
        return dict(fields["pins"])
    older = fields.get("start", fields.get("base", {}))  # as every version kept it: the base, and the starting adapter
    older = {"base": older} if isinstance(older, str) else dict(older)
    if (folder.parent / "rounds.json").exists():  # of several rounds this is the adapter that the last one started from
        older.pop("adapter", None)
    return older


def of_run(folder: Path) -> Pins | None:
    """The pins of the newest whole checkpoint of a run; None when it has none. A checkpoint of an earlier version has
    the base that the run's kept weights name."""
    from laddpo.storage.checkpoint import STATE, step_folders

    for place in step_folders(folder / "checkpoints"):
        try:
            state = atomic.read_json(sealed_file(place, STATE))
        except (UserError, OSError):  # set aside when the run is resumed
            continue
        if "pins" in state:
            return dict(state["pins"])
        kept = (of_folder(folder / name) for name in ("adapter", "model", "adapter_last", "model_last"))
        return next((pins for pins in kept if pins), {})
    return None


def require_resumable(folder: Path, now: Mapping[str, Any], config: RunConfig) -> None:
    """Check before a run is resumed that its inputs are those of its newest checkpoint."""
    stored = of_run(folder)
    if stored is None:
        return
    before = read_config(folder).model
    if "base" not in stored and before.model_name_or_path != config.model.model_name_or_path:
        raise UserError(
            f"{folder}: was begun with model.model_name_or_path={before.model_name_or_path}, and has no fingerprint by "
            f"which {config.model.model_name_or_path} could be known for the same. Leave it out."
        )
    require_same(folder, stored, now, config)


def require_like_siblings(folder: Path, now: Mapping[str, Any], config: RunConfig) -> None:
    """A job of a sweep or a study: the finished jobs beside it were trained on the same inputs, as far as their
    settings name the same."""
    if not any((folder / name).exists() for name in MARKS_OF_A_JOB):
        return
    ours = dataclasses.asdict(config)
    for place in sorted(path.parent for path in folder.parent.glob(f"*/{manifests.MANIFEST}")):
        stored = of_folder(place) if place != folder and (place / "config.yaml").exists() else None
        if not stored or "tokenizer" not in stored:  # none, or of an earlier version
            continue
        theirs = plain_settings(place / "config.yaml")
        shared = [
            name
            for name in now
            if name in stored and all(_setting(ours, key) == _setting(theirs, key) for key in NAMED_BY[name])
        ]
        if config.data.source == "onpolicy":  # rows that the model of each job answered
            shared = [name for name in shared if name != "data"]
        if now["base"].startswith(RANDOM):  # which follow from the seed
            shared = [name for name in shared if name != "base"]
        require_same(place, stored, {name: now[name] for name in shared}, config, OF_A_JOB)


def _setting(tree: Mapping[str, Any], key: str) -> Any:
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, Mapping) else None
    return tree


def require_inputs_of(weights: Path, config: RunConfig, data: str | None = None, is_export: bool = False) -> None:
    """Before kept weights are used with the settings of their run: the inputs are those that they were trained on.

    An export of a whole model takes nothing from its base but the tokenizer.
    """
    stored = of_folder(weights) or {}
    is_whole = is_export and config.adapter.kind == "full"
    now = make(config, data, from_scratch=is_whole or str(stored.get("base", "")).startswith(RANDOM))
    if is_whole:
        now = {name: now[name] for name in ("tokenizer", "template")}
    require_same(weights, stored, now, config)


def check_adapter(config: RunConfig) -> None:
    """`adapter.path` against the model: the base that the adapter was trained on, by its pins, else by its name."""
    from laddpo.models import adapters

    if not config.adapter.path:
        return
    folder = Path(config.adapter.path).expanduser()
    stored = of_folder(folder)
    if stored is None:
        _check_named_base(folder / adapters.ADAPTER_FILES[0], config)
        return
    now = make(config)
    compared = ("base", "config", "block_length", "tokenizer", "template")
    cure = "An adapter belongs to what it was trained with. Restore that, or start without adapter.path."
    kept = folder / TEMPLATE
    if kept.exists() and stored.get("template") != now["template"]:
        cure = f"Its own chat template lies beside it: set data.chat_template={kept}, with its data.template_kwargs."
    require_same(folder, stored, {name: now[name] for name in compared if name in now}, config, cure)


def hold(folder: Path, now: Pins, config: RunConfig) -> None:
    """Keep the pins in a folder that is worked on in parts, or compare them with those that it keeps."""
    path = folder / PINS_FILE
    if path.exists():
        kept = manifests.unsealed(path)
        manifests.require_keys(path, kept, ["fields"], f"Remove {path} if the inputs are as they were.")
        require_same(folder, kept["fields"], now, config)
        return
    if (folder / "config.yaml").exists():
        require_same(folder, {}, now, config)
    atomic.write_json(path, manifests.with_seal({"kind": "pins", "fields": now}))


def examples_pin(examples: Iterable) -> str:
    """A digest of encoded SFT rows: of their ids and tokens."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(f"{example.id}/{len(example.prompt_ids)}/{len(example.response_ids)}/".encode())
        digest.update(example.prompt_ids.astype("<i4").tobytes() + example.response_ids.astype("<i4").tobytes())
    return f"{OF_EXAMPLES}{digest.hexdigest()}"


def _comparable(stored: Mapping[str, Any], now: Mapping[str, Any]) -> Pins:
    """`stored` with what is of another kind than in `now` taken as equal: nothing follows from its difference."""
    held = dict(stored)
    if str(held.get("data", "")).startswith(OF_EXAMPLES) != str(now.get("data", "")).startswith(OF_EXAMPLES):
        held["data"] = now.get("data")
    if "adapter" in held:
        held.setdefault("adapter_scaling", "none")
    if "base" in held:  # that of a local base has the bytes of config.json in it
        held.setdefault("config", now.get("config"))
    return held


def _problem(where: Path, name: str, stored: Any, now: Any, config: RunConfig, cure: str | None) -> str:
    what, setting, usual_cure = INPUTS[name]
    values = {
        "data.dataset_name": config.data.dataset_name or config.data.source,
        "model.model_name_or_path": config.model.model_name_or_path,
        "model.block_length": config.model.block_length,
        "adapter.path": config.adapter.path,
        "data.template": config.data.template,
        "data.chat_template": config.data.chat_template,
    }
    if setting == "data.template" and config.data.chat_template:
        setting = "data.chat_template"
    commit = re.fullmatch(r"commit:([0-9a-f]{40})", str(stored)) if name == "base" else None
    cure = f"Set model.revision={commit[1]}." if commit else cure or usual_cure
    return f"{where}: {what} changed ({setting}={values[setting]}): stored {stored}, now {now}. {cure}"


def _check_named_base(file: Path, config: RunConfig) -> None:
    """An adapter of another program: the base that its settings name, where that name tells something."""
    from laddpo.models import loading

    content = atomic.read_json(file) if file.exists() else {}
    name, revision = (content.get(key) for key in ("base_model_name_or_path", "revision"))
    if not isinstance(name, str) or not name:
        return
    path = model_path(config.model)
    is_local = Path(path).expanduser().is_dir()
    wanted = Path(name).expanduser()
    if (wanted / "config.json").is_file():
        found, now = (loading.weights_fingerprint(*place) for place in ((name, None), (path, config.model.revision)))
        is_other = found != now and now.partition(":")[0] == found.partition(":")[0]
    else:
        is_hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not wanted.exists()
        is_other = not is_local and is_hub_id and name.lower() != path.lower()
        if not is_local and is_hub_id and not is_other and re.fullmatch(r"[0-9a-f]{40}", str(revision)):
            found, now = f"commit:{revision}", loading.weights_fingerprint(path, config.model.revision)
            is_other = found != now
            name = f"{name} at revision {revision}"
    if is_other:
        raise UserError(
            f"{file}: the adapter was trained on base_model_name_or_path {name!r}, and model.model_name_or_path is "
            f"{config.model.model_name_or_path!r}, which holds other weights. Set model.model_name_or_path to the "
            "adapter's base. If both are the same weights, correct that name in the adapter's file."
        )


MARKS_OF_A_JOB = ("job.json", "process.json")
OF_A_JOB = "The jobs of a sweep share their inputs. Restore it, or start a new sweep."
BASE_KEYS = ("model.model_name_or_path", "model.revision", "sft.from_scratch")
NAMED_BY = {  # by pin: the settings that name its input
    "base": BASE_KEYS,
    "config": BASE_KEYS,
    "block_length": (*BASE_KEYS, "model.attention", "model.block_length"),
    "tokenizer": BASE_KEYS,
    "template": (*BASE_KEYS, "data.template", "data.chat_template", "data.template_kwargs"),
    "adapter": ("adapter.path",),
    "adapter_scaling": ("adapter.path",),
    "data": (*BASE_KEYS, "data", "sft", "seed"),
}
RESTORE = "Restore it, or start a new run with it."
# By pin: its input in words, the setting that names it, what to do. In the order in which they are named.
INPUTS = {
    "tokenizer": ("the tokenizer (tokenizer.json)", "model.model_name_or_path", RESTORE),
    "template": (
        "the chat template or its special tokens (tokenizer_config.json, chat_template.jinja, data.chat_template, "
        "data.template_kwargs)",
        "data.template",
        RESTORE,
    ),
    "config": ("config.json of the base model", "model.model_name_or_path", RESTORE),
    "block_length": ("the length of the blocks of attention", "model.block_length", RESTORE),
    "base": (
        "the base model's weights or config.json",
        "model.model_name_or_path",
        "Restore them, or name the place that still has them by model.model_name_or_path. Other weights need a new "
        "run.",
    ),
    "adapter": ("the starting adapter", "adapter.path", RESTORE),
    "adapter_scaling": ("the scaling of the starting adapter (adapter_config.json)", "adapter.path", RESTORE),
    "data": ("the data", "data.dataset_name", "Restore the rows as they were, or start a new run with these."),
}
FOLLOWS_FROM = {
    "block_length": ("config",),
    "base": ("config",),  # whose bytes are in the fingerprint of a local base
    "data": ("tokenizer", "template"),
    "adapter_scaling": ("adapter",),
}
