"""What a finished run left: its settings, its weights, and the model that it started from."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from laddpo.errors import UserError
from laddpo.settings import RunConfig


def config_of_run(config: RunConfig, trained: Path) -> RunConfig:
    """The settings of a run; what this command line says of measuring, machine and places takes their place.

    The arithmetic (hardware.precision) stays the run's unless it is named itself.
    """
    from laddpo.app import given_overrides
    from laddpo.compose import read_config

    merged = copy.deepcopy(read_config(trained))
    merged.run, merged.auto = config.run, config.auto
    keys = [override.lstrip("+~").partition("=")[0] for override in given_overrides.get()]
    if "evaluation" in keys or "decoding" in keys:
        merged.evaluation = config.evaluation
    if "hardware" in keys:
        merged.hardware = dataclasses.replace(config.hardware, precision=merged.hardware.precision)
    for key in keys:
        if key.startswith(("evaluation.", "hardware.", "paths.")):
            group, _, name = key.partition(".")
            setattr(getattr(merged, group), name, getattr(getattr(config, group), name))
    return merged


def tuned_weights(config: RunConfig, trained: Path) -> Path:
    """The folder of the run's best weights; its last ones where the run was interrupted before any were kept."""
    from laddpo import runs
    from laddpo.inputs import ADAPTER, MODEL

    folder = trained / (MODEL if config.adapter.kind == "full" else ADAPTER)
    if runs.read_manifest(folder, "weights") is None:
        raise UserError(
            f"{folder}: has no finished weights; expected those that train keeps. Continue the run with "
            f"python -m laddpo.train resume={trained}, or check run=."
        )
    return folder


def use_weights(config: RunConfig, loaded, weights: Path) -> None:
    """Load a run's weights into the model that carries its adapter."""
    from laddpo.models import adapters, loading

    if config.adapter.kind == "full":
        loading.load_weights(loaded.model, weights)
    else:
        adapters.load_adapter(loaded.model, weights)


@contextmanager
def base_model(config: RunConfig, loaded) -> Iterator[None]:
    """Inside the block the model is what training started from: the reference.

    Whatever weights the model had are not restored afterwards where they had to be overwritten: load what you need.
    """
    from laddpo.inputs import model_path
    from laddpo.models import adapters, loading

    if config.adapter.kind == "full":
        folder = loading.checkpoint_folder(model_path(config), config.model.revision)
        loading.load_weights(loaded.model, folder)
        yield
    elif config.adapter.path:
        adapters.load_adapter(loaded.model, config.adapter.path)
        yield
    else:
        with adapters.adapter_disabled(loaded.model):
            yield
