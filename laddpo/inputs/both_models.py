"""The base and the tuned model in one set of weights, which is switched from the one to the other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from laddpo.hardware.machine import find_machine
from laddpo.inputs import pins, policy, tuned
from laddpo.inputs.policy import Loaded
from laddpo.models import adapters
from laddpo.settings.schema import AdapterSettings, ModelSettings, RunConfig

BASE, TUNED = "base", "tuned"


class BothModels:
    """`names` of the models that are there: the base, and the tuned one if there is one.

    `weights` are those of a run. If it is None, the base with `adapter.path` is the tuned model where
    `adapter_is_tuned` says so, and the base otherwise.
    """

    def __init__(
        self,
        model: ModelSettings,
        adapter: AdapterSettings,
        loaded: Loaded,
        weights: Path | None,
        adapter_is_tuned: bool = False,
    ):
        self.model, self.adapter, self.loaded, self.weights = model, adapter, loaded, weights
        is_by_adapter = weights is None and adapter_is_tuned and adapter.path is not None
        self.names = (BASE, TUNED) if weights or is_by_adapter else (BASE,)
        # whether the base is what is left without the adapter; else one set of weights overwrites the other
        self.is_beside = is_by_adapter or (weights is not None and adapter.kind == "lora" and adapter.path is None)
        self.stored = BASE  # whose weights were loaded last

    @contextmanager
    def weights_of(self, name: str) -> Iterator[None]:
        """Inside the block the model is the one of this name."""
        assert name in self.names, f"{name!r} of {self.names}"
        if name == TUNED:
            if self.weights and self.stored != TUNED:
                tuned.use_weights(self.adapter, self.loaded, self.weights)
                self.stored = TUNED
            yield
        elif self.is_beside:
            with adapters.adapter_disabled(self.loaded.model):
                yield
        else:
            if self.stored != BASE:
                with tuned.base_model(self.model, self.adapter, self.loaded):
                    self.stored = BASE  # and stays so after the block
            yield


def checked_weights(config: RunConfig) -> Path | None:
    """The weights of the run that `run` names, None without one. Refuses what cannot work before minutes of loading."""
    weights = tuned.tuned_weights(config.adapter, Path(config.run)) if config.run else None
    policy.check_before_loading(config)
    if weights:
        pins.require_inputs_of(weights, config)
    return weights


def open_both(config: RunConfig, weights: Path | None, adapter_is_tuned: bool = False) -> BothModels:
    """Load the base model, with the adapter on it that the run's `weights` belong to."""
    loaded = policy.load(config, find_machine(config))
    if weights is not None and config.adapter.kind == "lora" and not adapters.has_adapter(loaded.model):
        policy.attach_adapter(config, loaded.model)
    return BothModels(config.model, config.adapter, loaded, weights, adapter_is_tuned)
