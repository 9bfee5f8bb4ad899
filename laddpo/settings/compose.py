"""From yaml files and command-line overrides to one checked `RunConfig`.

Hydra composes and knows the grammar; laddpo/settings/mistakes.py decides what a mistake looks like to the user: all of
them at once, as "found; expected; what to do". `compose(overrides)` is the way in from Python; stages use
laddpo/cli/app.py.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import operator
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from hydra.version import setbase
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from laddpo.errors import UserError
from laddpo.settings.checks import EPOCHS, STEPS, find_problems
from laddpo.settings.decoding_checks import settle_decoding
from laddpo.settings.judge_ranges import JUDGE_GROUPS
from laddpo.settings.mistakes import (
    OPEN,
    REMOVED,
    diagnose,
    forbidden,
    foreign_code,
    put_stand_in,
    schema_types,
    setting_of,
    unresolved,
    yaml_mistake,
)
from laddpo.settings.path_checks import path_problem, path_problems
from laddpo.settings.ranges import CONF_DIR, PATHS
from laddpo.settings.read_settings import unread_problems
from laddpo.settings.redaction import find_secrets, foreign_variables, redact, strings
from laddpo.settings.schema import RunConfig
from laddpo.storage.atomic import write_text
from laddpo.storage.seals import read_checked_text, sealed_file, with_check

# in these a ~ at the beginning is the user's home
HOME_PATHS = (*PATHS, "run", "prompts", "data.chat_template", "evaluation.dataset_name", "evaluation.harness_dir")
HOME_PATHS += ("variance.pairs_file", "variance.write_pairs")
HOME_PATHS += tuple(f"{group}.{name}" for group in JUDGE_GROUPS for name in ("model", "prompt"))


def compose(overrides: Sequence[str] = (), config_name: str = "config", config_dir: str | None = None) -> RunConfig:
    """The configuration that a stage would run with, or `UserError` naming everything that is wrong with it."""
    with open_hydra("python", config_dir) as hydra:
        return to_run_config(compose_tree(hydra, config_name, list(overrides)))


@contextlib.contextmanager
def open_hydra(task_name: str, config_dir: str | None = None) -> Iterator[Hydra]:
    """Hydra over our conf/ and, after it, the user's own folder; cleared again on the way out."""
    setbase("1.3")
    ConfigStore.instance().store(name="schema", node=_schema())
    if not (CONF_DIR / "config.yaml").is_file():
        raise UserError(f"{CONF_DIR}: config.yaml is missing; the installation is damaged; install laddpo again.")
    search_path = create_config_search_path(str(CONF_DIR))
    if config_dir is not None:
        if problem := path_problem(config_dir):
            raise UserError(f"--config-dir is {config_dir!r}; {problem}")
        folder = Path(config_dir).resolve()
        if not folder.is_dir():
            raise UserError(
                f"--config-dir is {config_dir!r}; no such folder; expected one that holds groups like conf/."
            )
        search_path.prepend(provider="command-line", path=f"file://{folder}", anchor=SearchPathQuery(provider="schema"))
    GlobalHydra.instance().clear()
    try:
        yield Hydra.create_main_hydra2(task_name=task_name, config_search_path=search_path)
    finally:
        GlobalHydra.instance().clear()


def _schema() -> DictConfig:
    """The schema, with the settings that hold names of the user's own open for new names."""
    schema = OmegaConf.structured(RunConfig)
    for key in OPEN:
        OmegaConf.set_struct(OmegaConf.select(schema, key), False)
    return schema


def compose_tree(hydra: Hydra, config_name: str, overrides: list[str], mode: RunMode = RunMode.RUN) -> DictConfig:
    """The composed tree with its `hydra` node; `UserError` with all problems when it cannot be composed."""
    if not any(forbidden(text) for text in overrides):
        try:
            tree = hydra.compose_config(config_name, overrides, run_mode=mode, with_log_configuration=False)
        except (HydraException, OmegaConfBaseException, ValueError, yaml.YAMLError) as error:
            failure = error
        else:
            # before anything is resolved: a value of the environment must not get into a message either
            plain = OmegaConf.to_container(tree, resolve=False)
            if problems := [*foreign_code(tree), *foreign_variables(plain)]:
                raise UserError(*problems)
            return tree
    else:
        failure = None
    composed, problems = diagnose(hydra, config_name, overrides, mode)
    if composed is not None:
        problems += settings_problems(composed)[1]
    raise UserError(*(dict.fromkeys(problems) or [yaml_mistake(failure, hydra)]))


def to_run_config(tree: DictConfig) -> RunConfig:
    """The typed and checked configuration of a composed tree; `UserError` with all problems."""
    config, problems = settings_problems(tree)
    if problems:
        raise UserError(*problems)
    return config


def settings_problems(tree: DictConfig, stage: str | None = None) -> tuple[RunConfig, list[str]]:
    """(the typed configuration, all that is wrong with it, for `stage` if one is named). Missing values are filled with
    placeholders so that the other checks can still run."""
    typed = typed_settings(tree)
    found = [*typed.problems, *find_problems(typed.config, typed.broken, typed.given)]
    return typed.config, [*found, *(stage_problems(stage, typed, tree) if stage else [])]


def stage_problems(stage: str, typed: Typed, tree: DictConfig) -> list[str]:
    """Settings that the command line names and the stage does not read, beside those that are wrong anyway."""
    known = [*typed.problems, *find_problems(typed.config, typed.broken, typed.given)]
    named = {problem.split(" ", 1)[0].rstrip(":") for problem in known}
    return unread_problems(stage, typed.config, typed.given - named, references(tree))


def references(tree: DictConfig) -> dict[str, set[str]]:
    """By setting, those whose values refer to it, as data.rounds: ${rounds} does."""
    found: dict[str, set[str]] = {}
    plain = {key: value for key, value in tree.items_ex(resolve=False) if key != "hydra"}
    for key, text in strings("", OmegaConf.to_container(OmegaConf.create(plain), resolve=False)):
        while inner := re.search(r"\$\{([\w.]+)\}", text):
            found.setdefault(inner[1], set()).add(key)
            value = ""
            with contextlib.suppress(OmegaConfBaseException):  # what does not resolve is told of elsewhere
                value = OmegaConf.select(tree, inner[1], default="")
            text = text.replace(inner[0], str(value).replace("${", ""))
    return found


@dataclasses.dataclass(frozen=True)
class Typed:
    """Settings by their types: the problems are those of single values without a type or a sense. `broken` names them,
    and `given` what the command line set itself."""

    config: RunConfig
    problems: list[str]
    broken: set[str]
    given: set[str]


def typed_settings(tree: DictConfig) -> Typed:
    """The typed configuration of a composed tree, whose values were not held against each other yet."""
    tree = copy.deepcopy(tree)
    given: set[str] = set()
    if "hydra" in tree:
        overrides = OmegaConf.to_container(tree.hydra.overrides.task, resolve=False)
        keys = {setting_of(re.split(r"[=\[]", text)[0]) for text in overrides}
        given = {key for key in keys if "." in key or key in schema_types()}  # not the groups chosen
        HydraConfig.instance().set_config(tree)
        OmegaConf.set_struct(tree, False)
        del tree["hydra"]
    problems = find_secrets(OmegaConf.to_container(tree, resolve=False))
    secret = {key for key in schema_types() if any(text.startswith((f"{key}:", f"{key}.")) for text in problems)}
    for key in secret:  # never resolved: no message may show it
        put_stand_in(tree, key)
    broken = unresolved(tree)
    for key in broken:
        put_stand_in(tree, key)
    config = OmegaConf.to_object(tree)
    assert isinstance(config, RunConfig), "the root of conf/config.yaml is not the schema"
    if not given & STEPS and (given & EPOCHS or _only_steps_are_recommended(tree)):
        config.optim.max_train_steps = None
        given = given | {"optim.max_train_steps"}
    settle_decoding(config, given)
    if config.resume.lower() in ("true", "false"):  # a yaml bool arrives as "True"
        config.resume = config.resume.lower()
    for key in HOME_PATHS:
        group, _, name = key.rpartition(".")
        node = operator.attrgetter(group)(config) if group else config
        setattr(node, name, _from_home(getattr(node, name)))
    config.runs = [_from_home(folder) for folder in config.runs]
    config.data.chat_template = _in_data_dir(config.data.chat_template, config.paths.data_dir)
    problems += [*broken.values(), *path_problems(config, set(broken))]
    return Typed(config, problems, secret | set(broken), given)


def _only_steps_are_recommended(tree: DictConfig) -> bool:
    """Whether the number of epochs was set by name, and the number of steps is only the one that suits the model."""
    return OmegaConf.is_interpolation(tree.optim, "max_train_steps") and not OmegaConf.is_interpolation(
        tree.optim, "num_train_epochs"
    )


def _from_home(path: str | None) -> str | None:
    return os.path.expanduser(path) if path and path.startswith("~") else path


def _in_data_dir(path: str | None, data_dir: str) -> str | None:
    """The path as given, or where it lies in the data directory if it only is there."""
    if not path or "\0" in path or os.path.lexists(path):
        return path
    inside = [os.path.join(data_dir, *more, path) for more in ((), ("preference_data",))]
    return next((place for place in inside if os.path.isfile(place)), path)


def group_settings(hydra: Hydra, group: str, option: str) -> DictConfig:
    """What one option of a group sets by itself, with its references unresolved."""
    tree = hydra.compose_config(f"{group}/{option}", [], run_mode=RunMode.RUN, with_log_configuration=False)
    return OmegaConf.masked_copy(tree, [key for key in tree if key != "hydra"])


def write_config(config: RunConfig, folder: Path) -> None:
    """Write the resolved configuration as `config.yaml` into a run's folder."""
    write_text(folder / "config.yaml", with_check(redact(OmegaConf.to_yaml(OmegaConf.structured(config)))))


def read_config(folder: Path) -> RunConfig:
    """The configuration that a run was made with. Read as data: nothing in it is composed or executed."""
    path = folder / "config.yaml"
    if not path.is_file():
        raise UserError(f"{path}: not found; expected the folder of a run, which holds config.yaml; check run=.")
    try:
        tree = OmegaConf.load(io.StringIO(read_checked_text(sealed_file(folder, path.name))))
    except (OmegaConfBaseException, yaml.YAMLError, ValueError, OSError) as error:
        raise _of_another_version(path, error) from error
    if problems := drop_removed(tree, path):
        raise UserError(*problems)
    try:
        return config_from(tree)
    except (OmegaConfBaseException, yaml.YAMLError, ValueError, AttributeError) as error:
        raise _of_another_version(path, error) from error


def _of_another_version(path: Path, error: Exception) -> UserError:
    reason = str(error).splitlines()[0]
    return UserError(
        f"{path}: is not a configuration of this version ({redact(reason)}); use the one it was made with."
    )


def config_from(values: Any) -> RunConfig:
    """The typed settings of plain values, as config.yaml or another process has them."""
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(RunConfig), values))


def plain_settings(path: Path) -> Any:
    """A config.yaml as plain data: thirty times as fast as `read_config`, which knows types and other versions."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)(path.read_text(encoding="utf-8"))
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def drop_removed(tree: Any, path: Path) -> list[str]:
    """Take the settings of REMOVED out of stored ones where they did nothing; a sentence for each that did."""
    problems = []
    for key, (neutral, instead) in REMOVED.items() if isinstance(tree, DictConfig) else ():
        group, _, name = key.rpartition(".")
        node = OmegaConf.select(tree, group) if group else tree
        if not isinstance(node, DictConfig) or name not in node:
            continue
        if node[name] == neutral:
            del node[name]
        else:
            problems.append(
                f"{path}: {key} is {node[name]!r}, and this version has no such setting; expected {neutral!r}, which "
                f"did nothing. {instead}"
            )
    return problems
