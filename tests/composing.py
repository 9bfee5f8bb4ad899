"""Composing conf/ once for each choice of its groups, in place of once for each test.

Hydra reads the files of the groups chosen and merges them, which takes most of the time of a quick stage. Both depend
on the choice alone: single values come after. Where another folder is searched too, everything is as it was.
"""

from __future__ import annotations

import functools
import pickle
from pathlib import Path

from hydra._internal import config_loader_impl
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra._internal.core_plugins.importlib_resources_config_source import ImportlibResourcesConfigSource
from hydra._internal.defaults_list import DefaultsList
from hydra.core.config_store import ConfigNode, ConfigStore

OURS = ("pkg://hydra.conf", f"file://{Path(__file__).resolve().parents[1] / 'conf'}", "structured://")
_lists: dict[tuple, bytes] = {}
_trees: dict[tuple, bytes] = {}
_schemas: dict[tuple, ConfigNode] = {}
_files: dict[tuple, bytes] = {}


def compose_once() -> None:
    """For this process, from now on."""
    config_loader_impl.create_defaults_list = functools.partial(_defaults_list, config_loader_impl.create_defaults_list)
    ConfigStore.store = functools.partialmethod(_store, ConfigStore.store)
    for source in (FileConfigSource, ImportlibResourcesConfigSource):
        source.load_config = functools.partialmethod(_load_config, source.load_config)
    plain = ConfigLoaderImpl._compose_config_from_defaults_list
    ConfigLoaderImpl._compose_config_from_defaults_list = lambda self, defaults, repo: _tree(
        plain, self, defaults, repo
    )


def _store(self, plain, name, node, **place) -> None:
    """A class of settings is made into a tree once. What hydra takes from the store is a copy."""
    if place or not isinstance(node, type):
        return plain(self, name, node, **place)
    if (name, node) not in _schemas:
        plain(self, name, node)
        _schemas[name, node] = self.repo[f"{name}.yaml"]
    self.repo[f"{name}.yaml"] = _schemas[name, node]
    return None


def _load_config(self, plain, config_path):
    if self.full_path() not in OURS:
        return plain(self, config_path)
    key = (self.full_path(), self.provider, config_path)
    if key not in _files:
        _files[key] = pickle.dumps(plain(self, config_path))
    return pickle.loads(_files[key])  # noqa: S301


def _defaults_list(plain, repo, config_name, overrides_list, prepend_hydra, skip_missing) -> DefaultsList:
    is_value = {id(each): _is_value(each, repo) for each in overrides_list}
    chosen = [each for each in overrides_list if not is_value[id(each)]]
    key = (_only_ours(repo), config_name, tuple(each.input_line for each in chosen), prepend_hydra, skip_missing)
    if key not in _lists or not key[0]:
        made = plain(repo, config_name, overrides_list, prepend_hydra, skip_missing)
        if not key[0]:
            return made
        made.config_overrides.clear()
        _lists[key] = pickle.dumps(made)
    found = pickle.loads(_lists[key])  # noqa: S301
    found.config_overrides += [each for each in overrides_list if is_value[id(each)]]
    return found


def _is_value(override, repo) -> bool:
    """Whether it is no choice of a group, by the rule of hydra's `Overrides`."""
    if override.is_sweep_override():
        return False
    return isinstance(override.value(), dict) or not repo.group_exists(override.key_or_group)


def _tree(plain, loader, defaults, repo):
    key = (_only_ours(repo), repr([vars(default) for default in defaults]))
    if not key[0]:
        return plain(loader, defaults, repo)
    if key not in _trees:
        _trees[key] = pickle.dumps(plain(loader, defaults, repo))
    return pickle.loads(_trees[key])  # noqa: S301


def _only_ours(repo) -> str:
    """The places that are searched; empty where one is not hydra's own or conf/, as its files may change."""
    places = [source.full_path() for source in repo.get_sources()]
    return " ".join(places) if set(places) <= set(OURS) else ""
