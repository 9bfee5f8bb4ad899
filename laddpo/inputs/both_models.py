"""The base and the tuned model in one set of weights, which is switched from the one to the other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from laddpo.hardware.machine import find_machine
from laddpo.inputs import policy
from laddpo.inputs.policy import Loaded
from laddpo.inputs.tuned import base_model, use_weights
from laddpo.models import adapters
from laddpo.settings.schema import AdapterSettings, ModelSettings, RunConfig

BASE, TUNED = "base", "tuned"


class BothModels:
    """`names` of the models that are there: the base, and the tuned one if there is one.

    `tuned` holds the weights of a run. If it is None, the base with `adapter.path` is the tuned model where
    `adapter_is_tuned` says so, and the base otherwise.
    """

    def __init__(
        self,
        model: ModelSettings,
        adapter: AdapterSettings,
        loaded: Loaded,
        tuned: Path | None,
        adapter_is_tuned: bool = False,
    ):
        self.model, self.adapter, self.loaded, self.tuned = model, adapter, loaded, tuned
        is_by_adapter = tuned is None and adapter_is_tuned and adapter.path is not None
        self.names = (BASE, TUNED) if tuned or is_by_adapter else (BASE,)
        # whether the base is what is left without the adapter; else one set of weights overwrites the other
        self.is_beside = is_by_adapter or (tuned is not None and adapter.kind == "lora" and adapter.path is None)
        self.stored = BASE  # whose weights were loaded last

    @contextmanager
    def weights_of(self, name: str) -> Iterator[None]:
        """Inside the block the model is the one of this name."""
        assert name in self.names, f"{name!r} of {self.names}"
        if name == TUNED:
            if self.tuned and self.stored != TUNED:
                use_weights(self.adapter, self.loaded, self.tuned)
                self.stored = TUNED
            yield
        elif self.is_beside:
            with adapters.adapter_disabled(self.loaded.model):
                yield
        else:
            if self.stored != BASE:
                with base_model(self.model, self.adapter, self.loaded):
                    self.stored = BASE  # and stays so after the block
            yield


def open_both(config: RunConfig, tuned: Path | None, adapter_is_tuned: bool = False) -> BothModels:
    """Load the base model, with the adapter on it that the run's weights (`tuned`) belong to."""
    loaded = policy.load(config, find_machine(config))
    if tuned is not None and config.adapter.kind == "lora" and not adapters.has_adapter(loaded.model):
        policy.attach_adapter(config, loaded.model)
    return BothModels(config.model, config.adapter, loaded, tuned, adapter_is_tuned)
