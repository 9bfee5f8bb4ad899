"""A stage for a caller's code: `settings_of` checks its words, `run_here` runs it. Both raise what a command prints.

Words are those of a command line, without flags: model=llada_nano dpo.beta=0.5. `words_of` writes them from the
dictionary that `flat` gives.
"""

from __future__ import annotations

import contextlib
import contextvars
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.version import VersionBase

from laddpo.cli import app
from laddpo.cli.arguments import parse
from laddpo.cli.shorthand import FLAT, SWITCHES, expand, of_flat, setting
from laddpo.errors import UserError
from laddpo.settings.compose import compose_tree, open_hydra, typed_settings
from laddpo.settings.mistakes import schema_types
from laddpo.settings.path_checks import of_this_process
from laddpo.settings.ranges import single_problems
from laddpo.settings.schema import RunConfig


def settings_of(stage: str, words: Sequence[str]) -> RunConfig:
    """The checked settings with which `laddpo <stage> <words>` would run."""
    with _apart():
        args = parse(stage, expand(stage, words)[0])
        with open_hydra(f"laddpo.{stage}") as hydra:
            return app.settings_for(hydra, stage, compose_tree(hydra, "config", args.overrides), args.overrides)


def values_of(words: Sequence[str]) -> RunConfig:
    """The defaults with these words in place, each checked by itself and not against the others."""
    with _apart(), open_hydra("laddpo") as hydra:
        typed = typed_settings(compose_tree(hydra, "config", list(words)))
    if problems := [*typed.problems, *single_problems(typed.config)]:
        raise UserError(*problems)
    return typed.config


def run_here(stage: str, words: Sequence[str]) -> Path:
    """Do what `laddpo <stage> <words>` does; the folder that it worked in."""
    if any(word.startswith("hydra") for word in words):
        raise UserError("settings of hydra (sweeps, launchers) are for the command line. Leave them out.")
    folders: list[Path] = []

    def main(config: RunConfig, folder: Path) -> None:
        folders.append(folder)
        app.main_of(stage)(config, folder)

    with _apart():
        contextvars.copy_context().run(app.run_command, stage, list(words), main)
    return folders[0]


@contextlib.contextmanager
def _apart() -> Iterator[None]:
    """Leaves a program that composes settings with Hydra itself as it was, and explains errors of the file system."""
    hydra, node, base = GlobalHydra.instance(), HydraConfig.instance(), VersionBase.instance()
    kept = hydra.hydra, node.cfg, base.version_base
    try:
        of_this_process()
        yield
    except OSError as error:
        if (message := app.of_system(error)) is None:
            raise
        raise UserError(message) from error
    finally:
        hydra.hydra, node.cfg, base.version_base = kept


def flat(*groups: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by their full names: with two underscores for a dot, a dictionary for the settings of a group."""
    found: dict[str, Any] = {}
    for key, value in (pair for group in groups for pair in _flattened("", group)):
        if key in found:
            raise UserError(f"{key} was given twice; expected one value. Leave one out.")
        found[key] = value
    return found


def _flattened(prefix: str, settings: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        key = prefix + str(name).replace("__", ".")
        if isinstance(value, Mapping):
            yield from _flattened(f"{key}.", value)
        else:
            yield key, value


def words_of(settings: Mapping[str, Any]) -> list[str]:
    """Flat settings as words. Beside full names there are groups (model) and the flat names that the command line takes
    (learning_rate)."""
    words: list[str] = []
    for key, value in settings.items():
        is_habit = key in (*FLAT, *SWITCHES) and key not in schema_types()
        words += of_flat(key, _plain(key, value)) if is_habit else [setting(key, _written(key, value))]
    for name, count in Counter(word.partition("=")[0] for word in words).items():
        if count > 1:
            raise UserError(f"{name} was given twice, once by a short name; expected one value. Leave one out.")
        if name.startswith("-"):
            raise UserError(f"{name} is a flag of the command line; expected the name of a setting. Leave it out.")
    return words


def _plain(key: str, value: Any) -> Any:
    """A value of Python or NumPy, or a path, as yaml would hold it."""
    value = value.item() if hasattr(value, "item") else str(value) if isinstance(value, Path) else value
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise UserError(f"{key} is {value!r}; expected text, a number, true or false, None, or a list of such.")


def _written(key: str, value: Any) -> str:
    """The value in Hydra's grammar; a text as it would be typed."""
    if isinstance(value, list | tuple):
        return f"[{','.join(_inside(key, each) for each in value)}]"
    value = _plain(key, value)
    return value if isinstance(value, str) else json.dumps(value)


def _inside(key: str, value: Any) -> str:
    """The same within a list, where a text has quotes."""
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{name}: {_inside(key, each)}" for name, each in value.items()) + "}"
    if isinstance(value, str | Path):
        return QuotedString(str(value), Quote.single).with_quotes()
    return _written(key, value)
