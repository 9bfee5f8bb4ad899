"""What people write by habit, in the words of this program: `expand` rewrites a command line before it is parsed.

    data=my_pairs.csv                  data=jsonl data.dataset_name=my_pairs.csv (any format that prepare reads)
    data=Anthropic/hh-rlhf             data=hh_rlhf
    model=GSAI-ML/LLaDA-8B-Instruct    model=llada_8b; a local folder is compared with the known shapes
    --learning_rate 1e-5               optim.learning_rate=1e-5, as the public LaDDPO script and TRL name it
    --config-file flat.yaml            the same names from a YAML file

Each rewriting is one note, so nothing happens silently.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import MISSING

from laddpo.errors import UserError, nearest
from laddpo.models.families import FAMILIES, Family
from laddpo.preference.reading.splits import HUB_ID
from laddpo.settings.habits import HABITS, SAME
from laddpo.settings.mistakes import schema_types
from laddpo.settings.model_schema import ModelSettings, ModelShape
from laddpo.settings.ranges import CONF_DIR
from laddpo.settings.read_settings import stage_reads

FILE = "config_file"
FLAT = {**HABITS, **{name: name for name in SAME}}
ROWS = re.compile(r"\.(jsonl?|ndjson|csv|tsv|parquet|arrow)(\.(gz|bz2|xz|zst))?$", re.IGNORECASE)
PLAIN = re.compile(r"[\w./:+-]*", re.ASCII)


def expand(stage: str, argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The command line in settings of this program, and a note for every word that was rewritten."""
    written: list[str] = []
    notes: list[str] = []
    words = iter(argv)
    for word in words:
        name, equals, value = word.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if word.startswith("--") and name in (FILE, *FLAT):
            value = value if equals else next(words, None)
            if value is None:
                raise UserError(f"{word}: has no value; expected one, as {word} {'x.yaml' if name == FILE else '...'}.")
            found = of_file(stage, Path(value)) if name == FILE else [(word.split("=")[0], of_flat(name, value))]
        elif name in GROUPS and equals and not _is_option(name, value, argv):
            found = [(word, GROUPS[name](value))]
        else:
            written.append(quoted(word))
            continue
        for given, settings in found:
            written = [text for text in written if not _names_one_of(text, settings)] + settings
            notes += [f"{given} means {' '.join(settings)}"] if settings != [given] and settings else []
    return written, notes


def quoted(word: str) -> str:
    """`key=text` with the text in quotes if Hydra's grammar would refuse it and the setting is a text."""
    key, equals, value = word.partition("=")
    kind = schema_types().get(key, "")
    if not (equals and value and kind.startswith("str")) or (len(value) > 1 and value[0] == value[-1] in "'\""):
        return word
    if key in ("prompt", "chat.system") and value != "null":
        return setting(key, value, is_text=True)
    try:
        OverridesParser.create().parse_override(word)
    except HydraException:
        return setting(key, value, is_text=True)
    return word


def of_file(stage: str, path: Path) -> Iterator[tuple[str, list[str]]]:
    """(key, the settings that it means) for each key of a flat YAML file that the stage reads."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        why = error.strerror if isinstance(error, OSError) else " ".join(str(error).split())
        raise UserError(
            f"--config-file is {str(path)!r}, which cannot be read: {why}; expected a YAML file."
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds no settings; expected lines such as learning_rate: 1.0e-5.")
    if problems := [_unknown(path, key, value) for key, value in content.items() if key not in FLAT or _is_tree(value)]:
        raise UserError(*problems)
    for key, value in content.items():
        settings = [text for text in of_flat(key, value) if stage_reads(stage, text)]
        if settings:
            yield f"{key} in {path}", settings


def of_flat(name: str, value: Any) -> list[str]:
    """The settings that a flat key with this value means."""
    if name not in SWITCHES:
        return [setting(FLAT[name], value)]
    return SWITCHES[name](yaml.safe_load(value) if isinstance(value, str) else value)


def setting(key: str, value: Any, is_text: bool = False) -> str:
    """`key=value` as Hydra's grammar takes it. `is_text`: the value is a text, even if it looks like something else."""
    if not isinstance(value, str):
        return f"{key}={json.dumps(value)}"
    if not is_text and (PLAIN.fullmatch(value) or value[:1] in "[{'\""):
        return f"{key}={value}"
    return f"{key}={QuotedString(value, Quote.single).with_quotes()}"


def of_data(value: str) -> list[str]:
    """A file, folder or hub id of preference rows."""
    if value in (known := _ids("data", "dataset_name")):
        return [f"data={known[value]}"]
    return ["data=jsonl", setting("data.dataset_name", value)]


def of_model(value: str) -> list[str]:
    """A folder or hub id of a model: a known one, else one in the shape of LLaDA-8B or of the folder's config.json."""
    if value in (known := _ids("model", "model_name_or_path")):
        return [f"model={known[value]}"]
    folder = Path(value).expanduser()
    stated = _stated(folder) if folder.is_dir() else {}
    alike = [
        name
        for name, content in _options("model")
        if stated and {**_flat(content["model"]), "architecture": _architecture(content)}.items() >= stated.items()
    ]
    place = [setting("model.model_name_or_path", value), setting("model.name", folder.name or folder.resolve().name)]
    if alike:
        return [f"model={alike[0]}", *place]
    base, sizes = "llada_8b", stated
    if stated.get("shape.n_experts"):  # of its own kind, for the layers that carry an adapter
        family = FAMILIES[stated["architecture"]]
        base = next(name for name, content in _options("model") if FAMILIES[_architecture(content)] is family)
        sizes = {**{f"shape.{name}": value for name, value in USUAL.items()}, **stated}
    return [f"model={base}", *place, *(setting(f"model.{name}", found) for name, found in sizes.items())]


def _stated(folder: Path) -> dict[str, Any]:
    """What a folder's config.json says of the model, under the names of the group; nothing if it is not all there."""
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        architecture = content["architectures"][0]
        sizes = FAMILIES[architecture].sizes(content)
        usual = {**USUAL, "head_dim": sizes["d_model"] // sizes["n_heads"]}
        sizes = {name: size for name, size in sizes.items() if usual.get(name) != size}
        if not sizes.keys() >= set(SIZES):
            return {}
        shape = {f"shape.{name}": size for name, size in sizes.items()}
        return {"architecture": architecture, **_blocks(FAMILIES[architecture], content), **shape}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError):
        return {}


def _blocks(family: Family, content: Mapping[str, Any]) -> dict[str, Any]:
    """How the network attends, where its family leaves that open or has another length of blocks as a rule."""
    length = content.get("block_length", content.get("block_size"))
    if length is None or length == family.block_length:
        return {}
    return {"attention": "block", "block_length": length} if family.may_be_block else {"block_length": length}


def _architecture(content: Mapping[str, Any]) -> str:
    return content["model"].get("architecture", ModelSettings.architecture)


def _flat(model: Mapping[str, Any]) -> dict[str, Any]:
    sizes = {f"shape.{name}": size for name, size in (model.get("shape") or {}).items()}
    return {name: value for name, value in {**model, **sizes}.items() if not isinstance(value, Mapping)}


def _options(group: str) -> Iterator[tuple[str, dict]]:
    for path in sorted((CONF_DIR / group).glob("*.yaml")):
        yield path.stem, yaml.safe_load(path.read_text(encoding="utf-8"))


def _ids(group: str, key: str) -> dict[str, str]:
    """The hub ids that the files of a group name, with the name of the file."""
    found: dict[str, str] = {}
    for name, content in _options(group):
        value = content.get("model", content).get(key)
        if isinstance(value, str) and HUB_ID.fullmatch(value):
            found.setdefault(value, name)
    return found


def _is_option(group: str, value: str, argv: Sequence[str]) -> bool:
    """Whether the value names an option of the group, or nothing that could be a file, folder or hub id."""
    folders = [Path(b) for a, b in pairwise(argv) if a in ("--config-dir", "-cd")]
    folders += [Path(word.partition("=")[2]) for word in argv if word.startswith("--config-dir=")]
    is_there = any((folder / group / f"{value}.yaml").is_file() for folder in (CONF_DIR, *folders))
    looks_like = "/" in value or bool(ROWS.search(value)) or (bool(value) and Path(value).expanduser().exists())
    return is_there or not looks_like


def _names_one_of(text: str, settings: Sequence[str]) -> bool:
    key = text.partition("=")[0]
    return any(key == other.partition("=")[0] for other in settings)


def _is_tree(value: Any) -> bool:
    return isinstance(value, (Mapping, list))


def _unknown(path: Path, key: Any, value: Any) -> str:
    if _is_tree(value):
        return (
            f"{path}: {key} holds {'a list' if isinstance(value, list) else 'settings of its own'}; expected one value "
            "a line. A file of this program's groups is chosen with --config-dir and --config-name."
        )
    guess = nearest(str(key), FLAT)
    return f"{path}: {key}: no such key; {f'did you mean {guess}?' if guess else 'known: ' + ', '.join(sorted(FLAT))}"


def _quantized(option: str):
    return lambda value: [f"quantization={option}"] if value else []


USUAL = {field.name: field.default for field in fields(ModelShape) if field.default != MISSING}
SIZES = ("d_model", "n_layers", "n_heads", "n_kv_heads", "mlp_hidden_size", "vocab_size", "max_sequence_length")
GROUPS = {"data": of_data, "model": of_model}
SWITCHES = {  # flat keys whose value decides what they mean
    "load_in_4bit": _quantized("nf4"),
    "load_in_8bit": _quantized("int8"),
    "use_mixed_precision": lambda value: ["hardware.precision=auto" if value else "hardware.precision=fp32"],
    "resume_from_checkpoint": lambda value: (
        [] if not value else ["resume=true"] if value in (True, "latest", "auto") else [setting("resume", value)]
    ),
    "model_name_or_path": of_model,
    "dataset_name": of_data,
    "dataset": of_data,
    "base_model": of_model,
}
