"""What is wrong with a command line or a yaml file, in words: all mistakes together, each with the nearest valid name.

Hydra stops at its first error. `diagnose` splits a refused command line instead: each override is parsed by
itself, the group choices that exist are composed, the values are applied to that one by one.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from laddpo.errors import nearest
from laddpo.settings.habits import HABITS
from laddpo.settings.redaction import find_secrets, redact
from laddpo.settings.schema import RunConfig


def diagnose(hydra: Any, config_name: str, overrides: list[str], mode: RunMode) -> tuple[DictConfig | None, list[str]]:
    """The tree without the mistakes of a refused command line (None: nothing can be composed), and every mistake."""
    parser = OverridesParser.create(config_loader=hydra.config_loader)
    groups = config_groups(hydra)
    problems: list[str] = []
    choices: list[str] = []
    values: list[Override] = []
    for text in overrides:
        if refused := forbidden(text):
            problems += refused
            continue
        try:
            override = parser.parse_override(text)
        except HydraException:
            problems.append(_grammar_mistake(text))
            continue
        name = override.key_or_group
        if override.is_sweep_override():
            if mode == RunMode.RUN:
                problems.append(_several_values(text))
            elif not _is_known(name, groups):
                problems.append(unknown_key(name, groups))
        elif name in groups:
            options = hydra.config_loader.get_group_options(name, ObjectType.CONFIG)
            chosen = override.value() if isinstance(override.value(), list) else [override.value()]
            unknown = [_unknown_option(name, x, options) for x in chosen if str(x) not in options]
            problems += unknown
            if not unknown:
                choices.append(text)
        elif name.split("/")[0].split(".")[0] == "hydra":
            choices.append(text)
        else:
            values.append(override)
    try:
        tree = hydra.compose_config(config_name, choices, run_mode=mode, with_log_configuration=False)
    except (HydraException, OmegaConfBaseException, ValueError, yaml.YAMLError) as error:
        return None, [*problems, yaml_mistake(error, hydra)]
    problems += foreign_code(tree)
    for override in values:
        if problem := _apply(tree, override, groups):
            problems.append(problem)
        else:
            tree.hydra.overrides.task.append(override.input_line)
    return tree, problems


def forbidden(text: str) -> list[str]:
    """What no override may do, whatever its key: carry a secret, name code to run, add or remove a setting."""
    key, _, value = text.partition("=")
    bare = key.lstrip("+~")
    if not bare:
        return [f"{redact(text)!r}: it has no name before the value; expected key=value."]
    if problems := find_secrets({bare: value}):
        return problems
    if re.search(CODE_KEYS, text):
        return [f"{redact(text)}: names code to run, which no setting may; choose components by their names."]
    if "@" in key:
        return [f"{text}: a group is chosen without @; write {bare.split('@')[0]}={value}."]
    if key.startswith("~"):
        if "." not in bare and bare not in schema_types():
            return [f"{text}: a group cannot be removed; choose another of its options; --help lists them."]
        if bare not in schema_types():
            return [unknown_key(bare, set())]
        is_optional = "None" in schema_types()[bare]
        instead = f"write {bare}=null to switch it off" if is_optional else "leave it out to take its default"
        return [f"{text}: a setting cannot be removed; expected key=value; {instead}."]
    if key.startswith("+") and not bare.startswith("hydra"):
        known = setting_of(bare) in schema_types()
        return [
            f"{text}: settings cannot be added; "
            + (f"write {text.lstrip('+')}." if known else unknown_key(bare, set()))
        ]
    return []


def foreign_code(tree: DictConfig) -> list[str]:
    """Hydra's own node may name as code to run only what its plugins bring: launchers, sweepers, Optuna's samplers. The
    rest may name nothing at all."""
    plugins = ("hydra._internal.", "hydra_plugins.", "optuna.samplers.")

    def walk(prefix: str, value: Any) -> Iterator[str]:
        if isinstance(value, dict):
            for key, item in value.items():
                inside = f"{prefix}.{key}" if prefix else str(key)
                is_plugin = inside.startswith("hydra.") and str(item).startswith(plugins)
                if (key == "()" or re.fullmatch(CODE_KEYS, str(key))) and not (key == "_target_" and is_plugin):
                    yield f"{inside} is {str(item)!r}: names code to run, which no setting may; remove it."
                yield from walk(inside, item)
        elif isinstance(value, list):
            for item in value:
                yield from walk(prefix, item)

    return list(walk("", OmegaConf.to_container(tree, resolve=False)))


def unresolved(tree: DictConfig) -> dict[str, str]:
    """{key: what is wrong} for settings without a value and for references like ${dpo.beta} that do not resolve."""
    problems = {}
    plain = OmegaConf.to_container(tree, resolve=False)
    for key in schema_types():
        written = functools.reduce(operator.getitem, key.split("."), plain)
        if written == "???":
            advice = f"add {key}=<value> to the command or to its yaml"
            problems[key] = f"{key} is not set; expected {type_words(key)}; {advice}."
        elif "${" in str(written):
            try:
                _refuse_resolvers(str(written))
                value = OmegaConf.select(tree, key)
                if OmegaConf.is_config(value):
                    OmegaConf.to_container(value, resolve=True)
            except OmegaConfBaseException as error:
                wanted = f"expected {type_words(key)}, or a reference like ${{dpo.beta}} that resolves to it"
                problems[key] = f"{key} is {redact(str(written))!r}: {_first_line(error)}; {wanted}."
    return problems


def _refuse_resolvers(written: str) -> None:
    """Raise where a value calls a resolver that is not allowed, or one whose name another setting gives."""
    called = set(re.findall(r"\$\{\s*((?:[^:{}$]|\$\{[^{}]*\})+?)\s*:", written))
    if resolvers := called - ALLOWED_RESOLVERS:
        raise OmegaConfBaseException(f"{', '.join(sorted(resolvers))} is not an allowed resolver")


def put_stand_in(tree: DictConfig, key: str) -> None:
    """Give a setting without a usable value one of its type, so that the others can still be checked."""
    kind = schema_types()[key]
    value = next((value for name, value in STAND_INS.items() if kind.startswith(name)), None)
    OmegaConf.update(tree, key, value, force_add=True)


def yaml_mistake(error: Exception | None, hydra: Any) -> str:
    """A yaml file that does not fit the schema, a file that does not exist, or what Hydra says of anything else."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"{mark.name}:{mark.line + 1}: {error.problem}; expected yaml; correct that line."
    chain = [str(e) for e in (error, getattr(error, "__cause__", None)) if e is not None]
    text = "\n".join(chain)
    where = re.search(r"In '([^']+)'", text)
    file = f"{where.group(1)}.yaml: " if where else ""
    key = re.search(r"full_key: (\S+)", text)
    if key and re.search(r"Key '[^']*' (not in|is not in struct)", text):
        return file + unknown_key(key.group(1), set())
    if key:
        value = re.search(r"Value '(.*?)' of type", text)
        found = f" is {redact(value.group(1))!r}" if value else " has a value of another type"
        return f"{file}{key.group(1)}{found}; expected {type_words(key.group(1))}; correct it there."
    if missing := re.search(r"Cannot find primary config '([^']+)'", text):
        known = sorted(
            set(hydra.config_loader.get_group_options("", ObjectType.CONFIG)) - {"schema", "_dummy_empty_config_"}
        )
        return f"--config-name is {missing.group(1)!r}; known: {', '.join(known)}; others are read from --config-dir."
    if missing := re.search(r"Could not (?:find|load) '([^']+)'", text):
        group, _, option = missing.group(1).rpartition("/")
        if group in config_groups(hydra):
            return file + _unknown_option(
                group, option, hydra.config_loader.get_group_options(group, ObjectType.CONFIG)
            )
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return redact(" ".join(dict.fromkeys(lines)))


def _apply(tree: DictConfig, override: Override, groups: set[str]) -> str | None:
    """Put one value into the tree; what is wrong with it, if anything (then the tree is unchanged)."""
    key = override.key_or_group
    if not _is_known(key, groups):
        return unknown_key(key, groups)
    try:
        OmegaConf.update(tree, key, override.value(), merge=True)
    except (HydraException, OmegaConfBaseException) as error:
        full_key = getattr(error, "full_key", None) or key
        if schema_types().get(key, "").startswith("list[Mix"):
            return f"{key}: {_first_line(error)}; expected {type_words(key)}; correct the value."
        if not _is_known(full_key, groups):
            return unknown_key(full_key, groups)
        full_key = full_key.partition("[")[0]  # of a list the whole is shown
        found = redact(str(override.get_value_element_as_str()))
        return f"{full_key} is {found!r}; expected {type_words(full_key)}; correct the value."
    return None


def _is_known(key: str, groups: set[str]) -> bool:
    key = setting_of(key.partition("[")[0])  # of an item of data.mixture the type is checked where it is applied
    return key in groups or key in schema_types() or any(name.startswith(f"{key}.") for name in schema_types())


def setting_of(key: str) -> str:
    """The setting that a key names: a key inside of one that holds names of its own belongs to it."""
    return next((name for name in OPEN if key.startswith(f"{name}.")), key)


def unknown_key(key: str, groups: set[str]) -> str:
    """The sentence about a setting that does not exist, with what was probably meant."""
    if key in NEVER:
        return f"{key}: no such setting; {NEVER[key]}"
    if key in REMOVED:
        return f"{key}: no such setting. {REMOVED[key][1]}"
    if key in HABITS:
        return f"{key}: no such setting; did you mean {HABITS[key]}?"
    names = list(schema_types())
    last_parts = {name.rpartition(".")[2]: name for name in reversed(names)}
    guess = nearest(key, [*names, *groups])
    if guess is None and (part := nearest(key.rpartition(".")[2], last_parts)):
        guess = last_parts[part]
    hint = f"did you mean {guess}?" if guess else "--cfg job lists all there are."
    return f"{key}: no such setting; {hint}"


def _unknown_option(group: str, value: Any, options: list[str]) -> str:
    known = f"known: {', '.join(sorted(options))}"
    if value is None:
        return f"{group} is null; {known}; choose one, or leave {group} out."
    guess = nearest(value, options)
    others = f"choose one{OTHERS.get(group, '')}, or add {group}/{value}.yaml by --config-dir."
    hint = f"did you mean {group}={guess}?" if guess else others
    return f"{group} is {str(value)!r}; {known}; {hint}"


BARE = {"resume": "resume=true", "help": "--help", "version": "--version", "dry_run": "dry_run=true"}
OTHERS = {  # what else is taken, as the command line is read (cli/shorthand.py)
    "model": ", name a masked-diffusion model of the hub (model=org/name) or a folder (model=/path)",
    "data": ", name a file, a folder or a dataset of the hub (data=my_pairs.jsonl, data=org/name)",
}


def _grammar_mistake(text: str) -> str:
    key, equals, value = text.partition("=")
    if not equals:
        if text in BARE or text in schema_types():
            return f"{text!r} is not a setting; write {BARE.get(text, f'{text}=<value>')}."
        if "/" not in text and not Path(text).exists():
            return (
                f"{text!r} is not a setting; expected key=value, as dpo.beta=0.5 or prompt='a text'; --help lists them."
            )
        name = "data" if Path(text).is_file() else "run"
        return f"{text!r} is not a setting; expected key=value; {NAMED[name]} is named as {name}={text}."
    return (
        f"{key} is {value!r}, which does not parse; expected text, a number or a list like [a,b]; "
        f"text with spaces, brackets or = needs two pairs of quotes: '{key}=\"{value}\"'."
    )


def _several_values(text: str) -> str:
    key, _, value = text.partition("=")
    written = []
    if re.fullmatch(r"\d+,\d+", value):
        written.append(f"{key}={value.replace(',', '.')} if a decimal point was meant")
    if schema_types().get(key, "").startswith("list"):
        written.append(f"{key}=[{value}] for a list")
    if key in KEY_WORDS:
        written.append(f"'{key}={value.replace(',', '|')}' for several names")
    write = f"write {' or '.join(written)}, or " if written else ""
    return f"{key} is {value!r}, several values; expected one; {write}add -m to run a job for each."


def config_groups(hydra: Any) -> set[str]:
    """Names of our and the user's groups, without Hydra's own and folders that hold no settings."""
    return set(hydra.config_loader.list_groups("")) - {"hydra", *NOT_GROUPS}


@functools.cache
def schema_types() -> dict[str, str]:
    """Type of every setting as written in laddpo/settings/schema.py, by dotted key."""

    def walk(kind: type, prefix: str) -> Iterator[tuple[str, str]]:
        node = OmegaConf.structured(kind)
        for item in dataclasses.fields(kind):
            inner = OmegaConf.get_type(node, item.name)
            if dataclasses.is_dataclass(inner):
                yield from walk(inner, f"{prefix}{item.name}.")
            else:
                yield f"{prefix}{item.name}", str(item.type)

    return dict(walk(RunConfig, ""))


def type_words(key: str) -> str:
    """`float | None` as a person says it."""
    if key in KEY_WORDS:
        return KEY_WORDS[key]
    kind = schema_types().get(key, "")
    words = next((words for name, words in TYPE_WORDS.items() if kind.startswith(name)), "a group of settings")
    return words + (" or null" if "None" in kind else "")


def _first_line(error: Exception) -> str:
    return redact(str(error).splitlines()[0])


NAMED = {"data": "a file of rows", "run": "a run's folder"}
NOT_GROUPS = ("accelerate",)  # files for accelerate's launcher, which lie in conf/ to be found
CODE_KEYS = r"_(target|partial|args|recursive|convert)_"
ALLOWED_RESOLVERS = {"oc.env", "oc.select"}  # which variables oc.env may read: laddpo/settings/redaction.py
OPEN = ("data.template_kwargs",)  # settings that hold names of the user's own
TYPE_WORDS = {
    "int": "a whole number",
    "float": "a number",
    "bool | str": "true, false or a name",
    "bool": "true or false",
    "str": "text",
    "list[str]": "a list like [a,b]",
    "list[float]": "a list of numbers like [0.9,0.95]",
    "dict": "names with values like {enable_thinking:false}",
    "list[MixturePart]": "a list like [{source:hh_rlhf,weight:2},{dataset_name:my_pairs.jsonl,weight:1}]",
}
KEY_WORDS = {
    "adapter.target_modules": "all-linear, or a regular expression over names of layers like 'q_proj|v_proj'",
}
NEVER = {
    "data.streaming": "rows are sampled, split and ordered by their content, which a stream never holds as a whole, "
    "and a stream that breaks off looks like a shorter one; a hub dataset is downloaded once, and rows are read in "
    "bounded memory; leave it out.",
}
# Settings that earlier versions had, by key: the value at which they did nothing, and what to do where it is another
# one. config.yaml of an older run may hold them, and a command line of then may name them.
REMOVED: dict[str, tuple[Any, str]] = {
    "dpo.correction": (
        "none",
        "Corrections of the loss did not help when they were measured (data/measurements/README.md). Leave it out, and "
        "raise dpo.diffusion_samples for a less noisy score.",
    ),
}
STAND_INS = {
    "int": 1,
    "float": 1.0,
    "bool": False,
    "str": "unset",
    "list[str]": [],
    "list[float]": [0.9, 0.95],
    "dict": {},
    "list[MixturePart]": [],
}
