"""From yaml files and command-line overrides to one checked `RunConfig`, with every mistake explained together.

Hydra composes and knows the grammar; this module decides what a mistake looks like to the user: all of them at once, in
the form "found; expected; what to do", with the nearest valid name. `compose(overrides)` is also the way in from Python.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from hydra.version import setbase
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from laddpo.config import CONF_DIR, find_problems
from laddpo.errors import UserError, nearest
from laddpo.runs import write_text
from laddpo.redaction import find_secrets, redact
from laddpo.settings import RunConfig


def compose(overrides: Sequence[str] = (), config_name: str = "config", config_dir: str | None = None) -> RunConfig:
    """The configuration that a stage would run with, or `UserError` naming everything that is wrong with it."""
    with open_hydra("python", config_dir) as hydra:
        return to_run_config(compose_tree(hydra, config_name, list(overrides)))


@contextlib.contextmanager
def open_hydra(task_name: str, config_dir: str | None = None) -> Iterator[Hydra]:
    """Hydra over our conf/ and, after it, the user's own folder; the process-wide instance is cleared on the way out."""
    setbase("1.3")
    ConfigStore.instance().store(name="schema", node=RunConfig)
    if not (CONF_DIR / "config.yaml").is_file():
        raise UserError(
            f"{CONF_DIR}: the configuration folder is missing; the installation is damaged; install laddpo again."
        )
    search_path = create_config_search_path(str(CONF_DIR))
    if config_dir is not None:
        folder = Path(config_dir).resolve()
        if not folder.is_dir():
            raise UserError(
                f"--config-dir is {config_dir!r}; there is no such folder; expected one that holds groups like conf/."
            )
        search_path.prepend(provider="command-line", path=f"file://{folder}", anchor=SearchPathQuery(provider="schema"))
    GlobalHydra.instance().clear()
    try:
        yield Hydra.create_main_hydra2(task_name=task_name, config_search_path=search_path)
    finally:
        GlobalHydra.instance().clear()


def compose_tree(hydra: Hydra, config_name: str, overrides: list[str], mode: RunMode = RunMode.RUN) -> DictConfig:
    """The composed tree, `hydra` node included; `UserError` with all composition problems when there are any."""
    forbidden = [problem for text in overrides for problem in _forbidden(text)]
    try:
        if not forbidden:
            tree = hydra.compose_config(config_name, overrides, run_mode=mode, with_log_configuration=False)
            _refuse_foreign_targets(tree)
            return tree
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(*diagnose(hydra, config_name, overrides, mode, error)) from error
    raise UserError(*diagnose(hydra, config_name, overrides, mode, None))


def to_run_config(tree: DictConfig) -> RunConfig:
    """The typed configuration of a composed tree, checked; `UserError` with all problems."""
    config, problems = _convert(tree)
    if config is not None:
        problems += find_problems(config)
    if problems:
        raise UserError(*problems)
    return config


def _convert(tree: DictConfig) -> tuple[RunConfig | None, list[str]]:
    """(configuration, or None where a value is missing or cannot be resolved; problems)."""
    tree = copy.deepcopy(tree)
    HydraConfig.instance().set_config(tree) if "hydra" in tree else None
    OmegaConf.set_struct(tree, False)
    tree.pop("hydra", None)
    raw = OmegaConf.to_container(tree, resolve=False)
    problems = find_secrets(raw)
    problems += [
        f"{key} is not set; expected {_type_words(key)}; add {key}=<value> to the command or to its yaml."
        for key in sorted(OmegaConf.missing_keys(tree))
    ]
    if problems:
        return None, problems
    try:
        config = OmegaConf.to_object(tree)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "settings"
        return None, [
            f"{key}: {_first_line(error)}; expected a value that resolves; write it out or fix the name inside ${{}}."
        ]
    assert isinstance(config, RunConfig)
    config.resume = _resume_text(config.resume)
    return config, []


def _resume_text(value: str) -> str:
    return value.lower() if value.lower() in ("true", "false") else value


# ---- what went wrong ----


def diagnose(hydra: Hydra, config_name: str, overrides: list[str], mode: RunMode, error: Exception | None) -> list[str]:
    """Every mistake in a command line that Hydra refused (it stops at its first one), in our own words.

    Each override is parsed alone; the group choices that exist are composed; the remaining values are applied to that
    one by one, so that each is judged on its own; what is left is checked for contradictions.
    """
    loader = hydra.config_loader
    problems: list[str] = []
    choices: list[str] = []
    values: list[Override] = []
    parser = OverridesParser.create(config_loader=loader)
    groups = {group for group in hydra.list_all_config_groups() if not group.startswith("hydra")}
    for text in overrides:
        if forbidden := _forbidden(text):
            problems += forbidden
            continue
        try:
            override = parser.parse_override(text)
        except HydraException as parse_error:
            problems.append(_grammar_problem(text, parse_error))
            continue
        if override.is_sweep_override():
            if mode == RunMode.RUN:
                problems.append(_list_of_values(text, override))
            continue
        name = override.key_or_group
        if name in groups and not isinstance(override.value(), dict):
            options = loader.get_group_options(name, ObjectType.CONFIG)
            if override.value() is None or str(override.value()) in options:
                choices.append(text)
            else:
                problems.append(_unknown_option(name, str(override.value()), options))
        elif name == "hydra" or name.startswith(("hydra.", "hydra/")):
            choices.append(text)
        else:
            values.append(override)
    try:
        tree = hydra.compose_config(config_name, choices, run_mode=RunMode.RUN, with_log_configuration=False)
    except (HydraException, OmegaConfBaseException) as compose_error:
        return problems + [_yaml_problem(compose_error, config_name, hydra)]
    for override in values:
        problem = _apply(tree, override, groups)
        if problem:
            problems.append(problem)
    config, more = _convert(tree)
    problems += more
    if config is not None:
        problems += find_problems(config)
    if not problems:
        problems = [_sentence(error) if error else "the settings could not be composed."]
    return list(dict.fromkeys(problems))


def _apply(tree: DictConfig, override: Override, groups: set[str]) -> str | None:
    """Put one value into the tree; the problem with it, if any (the tree is then left as it was)."""
    key = override.key_or_group
    known = [name for name, _ in _schema_keys()]
    if key not in known and not any(name.startswith(f"{key}.") for name in known):
        return _unknown_key(key, known, groups)
    try:
        ConfigLoaderImpl._apply_overrides_to_config([override], tree)
    except (HydraException, OmegaConfBaseException) as error:
        cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
        full_key = getattr(cause, "full_key", None) or key
        if full_key not in known and full_key != key:
            return _unknown_key(full_key, known, groups)
        return f"{full_key} is {_shown(override)}; expected {_type_words(full_key)}; correct the value."
    return None


def _unknown_key(key: str, known: list[str], groups: set[str]) -> str:
    if key in groups or key.split("@")[0] in groups:
        return f"{key}: a group is chosen as {key.split('@')[0]}=<option>, without @; write it so."
    guess = nearest(key, [*known, *groups]) or _same_ending(key, known)
    hint = f"did you mean {guess}?" if guess else "python -m laddpo.train --cfg job lists all settings."
    return f"{key}: no such setting; {hint}"


def _same_ending(key: str, known: list[str]) -> str | None:
    """`beta` or `optim.beta` was meant to be dpo.beta: the key whose last part is the closest."""
    last = key.rsplit(".", 1)[-1]
    endings = {name.rsplit(".", 1)[-1]: name for name in reversed(known)}
    guess = nearest(last, endings)
    return endings[guess] if guess else None


def _unknown_option(group: str, value: str, options: list[str]) -> str:
    guess = nearest(value, options)
    hint = (
        f"did you mean {group}={guess}?" if guess else f"choose one, or add conf/{group}/{value}.yaml by --config-dir."
    )
    return f"{group} is {value!r}; known: {', '.join(sorted(options))}; {hint}"


def _forbidden(text: str) -> list[str]:
    """What no override may do, whatever its key: add or remove settings, name code to run, carry a secret."""
    key = text.split("=", 1)[0]
    if secrets := find_secrets({key.lstrip("+~"): text.split("=", 1)[1] if "=" in text else ""}):
        return secrets
    if re.search(r"_(target|partial|args|recursive|convert)_", text):
        return [
            f"{redact(text)}: _target_ and its kin would run code named by a setting; choose components by their names."
        ]
    if key.startswith("+") and not key.lstrip("+").startswith("hydra"):
        bare = text.lstrip("+")
        return [
            f"{text}: settings cannot be added; expected one that exists, without +; write {bare} if that was meant."
            + _hint_for(bare)
        ]
    if key.startswith("~"):
        return [f"{text}: a setting cannot be removed; expected key=value; write {key[1:]}=null to switch it off."]
    return []


def _hint_for(bare: str) -> str:
    key = bare.split("=", 1)[0]
    known = [name for name, _ in _schema_keys()]
    if key in known:
        return ""
    guess = nearest(key, known) or _same_ending(key, known)
    return f" {key}: no such setting; did you mean {guess}?" if guess else f" {key}: no such setting."


def _grammar_problem(text: str, error: Exception) -> str:
    if "=" not in text:
        return f"{text!r} is not a setting; expected key=value; a folder of a run is named as run={text}."
    key, value = text.split("=", 1)
    return (
        f"{key} is {value!r}, which does not parse; expected plain text, a number or [a,b]; "
        f"put a value with spaces, brackets or = in quotes twice: '{key}=\"{value}\"'."
    )


def _list_of_values(text: str, override: Override) -> str:
    key, value = text.split("=", 1)
    dot = value.replace(",", ".") if re.fullmatch(r"\d+,\d+", value) else None
    alternative = f"write {key}={dot} for a decimal point, or " if dot else ""
    return (
        f"{key} is {value!r}, several values; expected one; {alternative}add -m to run one job for each, "
        f"or write {key}=[{value}] where a list is meant."
    )


def _yaml_problem(error: Exception, config_name: str, hydra: Hydra) -> str:
    """A yaml file that does not fit the schema, or a config that does not exist."""
    text = str(error)
    where = re.search(r"In '([^']+)'", text)
    file = f"{where.group(1)}.yaml: " if where else ""
    key = re.search(r"full_key: (\S+)", text)
    known = [name for name, _ in _schema_keys()]
    if key and re.search(r"Key '[^']+' not in|is not in struct", text):
        return file + _unknown_key(key.group(1), known, set())
    if key and re.search(r"could not be converted|Invalid type|is not a|incompatible|unsupported", text, re.IGNORECASE):
        value = re.search(r"Value '(.*?)' of type", text)
        shown = f" is {value.group(1)!r}" if value else " has a value of another type"
        return f"{file}{key.group(1)}{shown}; expected {_type_words(key.group(1))}; correct it there."
    if missing := re.search(r"Cannot find primary config '([^']+)'", text):
        names = hydra.config_loader.get_group_options("", ObjectType.CONFIG)
        guess = nearest(missing.group(1), names)
        hint = f"did you mean {guess}?" if guess else "put it into the folder named by --config-dir."
        return f"--config-name is {missing.group(1)!r}; known: {', '.join(sorted(set(names) - {'schema'}))}; {hint}"
    return _sentence(error)


def _sentence(error: Exception) -> str:
    """Hydra's own words on one line, for what we did not foresee."""
    parts = [line.strip() for line in str(error).splitlines() if line.strip()]
    cause = error.__cause__
    if cause is not None:
        parts += [line.strip() for line in str(cause).splitlines()[:2]]
    return redact(" ".join(dict.fromkeys(parts)))


def _first_line(error: Exception) -> str:
    return redact(str(error).splitlines()[0])


def _refuse_foreign_targets(tree: DictConfig) -> None:
    """Hydra's own node may name only Hydra's plugins as code to run (launchers and sweepers)."""
    raw = OmegaConf.to_container(tree, resolve=False)

    def walk(prefix: str, value: Any) -> Iterator[str]:
        if isinstance(value, dict):
            for key, item in value.items():
                inside = f"{prefix}.{key}" if prefix else str(key)
                trusted = inside.startswith("hydra.") and str(item).startswith(("hydra._internal.", "hydra_plugins."))
                if key in ("_target_", "()") and not trusted:
                    yield f"{inside} is {str(item)!r}; a setting may not name code to run; remove it."
                yield from walk(inside, item)
        elif isinstance(value, list):
            for item in value:
                yield from walk(prefix, item)

    problems = list(walk("", raw))
    if problems:
        raise UserError(*problems)


def _schema_keys() -> list[tuple[str, Any]]:
    """(dotted key, type) of every setting there is."""

    def walk(kind: type, prefix: str) -> Iterator[tuple[str, Any]]:
        node = OmegaConf.structured(kind)
        for item in dataclasses.fields(kind):
            inner = OmegaConf.get_type(node, item.name)
            if dataclasses.is_dataclass(inner):
                yield from walk(inner, f"{prefix}{item.name}.")
            else:
                yield f"{prefix}{item.name}", item.type

    return list(walk(RunConfig, ""))


def _type_words(key: str) -> str:
    """`float | None` as a person says it."""
    kind = str(dict(_schema_keys()).get(key, ""))
    words = next((word for name, word in TYPE_WORDS if kind.startswith(name)), "a group of settings")
    return words + (" or null" if "None" in kind else "")


def _shown(override: Override) -> str:
    return repr(redact(str(override.get_value_element_as_str())))


def write_config(config: RunConfig, folder: Path) -> None:
    """Write the resolved configuration as `config.yaml` into a run's folder."""
    write_text(folder / "config.yaml", redact(OmegaConf.to_yaml(OmegaConf.structured(config))))


def read_config(folder: Path) -> RunConfig:
    """The configuration that a run was made with. Read as data: nothing in it is composed or executed."""
    path = folder / "config.yaml"
    if not path.is_file():
        raise UserError(f"{path}: not found; expected the folder of a run, which holds config.yaml; check run=.")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(RunConfig), OmegaConf.load(path))
        return OmegaConf.to_object(merged)
    except (OmegaConfBaseException, ValueError, OSError) as error:
        raise UserError(f"{path}: cannot be read as a configuration of this version ({_first_line(error)}).") from error


TYPE_WORDS = (
    ("int", "a whole number"),
    ("float", "a number"),
    ("bool", "true or false"),
    ("str", "text"),
    ("list[str]", "a list like [a,b]"),
    ("list[float]", "a list of numbers like [0.9,0.95]"),
)
