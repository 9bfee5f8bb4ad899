"""Which settings a stage reads: every attribute of the configuration that its own code asks for, by dotted key.

Copying (dataclasses, copy, omegaconf), checking, comparing, fingerprinting and printing are no reads: what only they
see has no effect on what the stage does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from types import FrameType

from laddpo.preference.sources import Request
from laddpo.settings.schema import DataSettings, RunConfig

# modules whose own code copies, checks or compares settings
COPYING = ("dataclasses", "copy", "omegaconf", "hydra", "tests")
CHECKING = (
    *(
        "cli.app",
        "cli.arguments",
        "settings.compose",
        "settings.advice",
        "settings.checks",
        "settings.data_checks",
        "settings.decoding_checks",
        "settings.hardware_checks",
        "settings.judge_checks",
        "settings.judge_schema",
        "cli.launch",
        "settings.mistakes",
        "settings.needs",
        "settings.path_checks",
    ),
    *("settings.ranges", "settings.read_settings", "training.resuming"),
)
ASKED = ("settings.model_schema", "models.linears")  # modules that read settings for whoever calls them
# functions that fingerprint, compare or print, with all that they call: (module, name)
NO_USE = {
    ("training.pairs", "_only_part"),
    ("inputs.data", "request_of"),  # what of it a source reads is recorded on the Request
    ("inputs.reference_values", "reference_fields"),
    ("inputs.policy", "_check_shape"),
    ("training.on_policy", "sample_fields"),
    ("training.on_policy", "_answerer"),  # whose evaluation holds data.sampling
    ("evaluation.harness", "answers_key"),
    *(("inputs.pins", name) for name in ("make", "require_same", "require_like_siblings", "check_adapter", "_problem")),
    ("settings.of_a_run", "settings_of_run"),
    ("settings.of_a_run", "refuse_decided"),
    ("settings.of_a_run", "other_decoding"),
    ("results.model_card", "card_text"),
    ("benchmarking.parts", "about"),
    ("hardware.plan_text", "_run_line"),
    ("training.rows", "source_of"),
}
USES = {("settings.data_checks", "sft_examples")}  # functions of CHECKING that decide what a stage does
PLANNING = {
    ("hardware.planning", "choose_plan"),
    ("hardware.planning", "assumed_lengths"),
    ("hardware.machine", "settled_sharding"),
}
PLANNED = ("train", "sft", "plan")  # of the others the memory plan is a forecast for nothing that they do


@contextlib.contextmanager
def recorded(stage: str) -> Iterator[set[str]]:
    """Inside the block, the set of settings that the stage has read so far."""
    found: set[str] = set()
    kinds = _kinds(RunConfig)
    no_use = NO_USE if stage in PLANNED else NO_USE | PLANNING
    with contextlib.ExitStack() as undo:
        Request.__getattribute__ = _request_reader(found)
        undo.callback(delattr, Request, "__getattribute__")
        for kind, names in kinds.items():
            kind.__getattribute__ = _reader(names, kind is RunConfig, found, no_use)
            undo.callback(delattr, kind, "__getattribute__")
        yield found


def _kinds(kind: type) -> dict[type, set[str]]:
    """The dataclass of each group, with the names of its fields."""
    names = {item.name for item in dataclasses.fields(kind)}
    found = {kind: names}
    for item in dataclasses.fields(kind):
        if dataclasses.is_dataclass(item.default_factory):
            found |= _kinds(item.default_factory)
        elif dataclasses.is_dataclass(value := getattr(kind(), item.name, None)):
            found |= _kinds(type(value))
    return found


def _reader(names: set[str], is_root: bool, found: set[str], no_use: set[tuple[str, str]]):
    def __getattribute__(self, name):
        value = object.__getattribute__(self, name)
        if name not in names:
            return value
        place = "" if is_root else object.__getattribute__(self, "__dict__").get("_place")
        if place is None:
            return value
        if dataclasses.is_dataclass(value):
            object.__setattr__(value, "_place", f"{place}{name}.")
        elif f"{place}{name}" not in found and _counts(sys._getframe(1), no_use):
            found.add(f"{place}{name}")
        return value

    return __getattribute__


def _request_reader(found: set[str]):
    """A source asks for settings of data on its Request."""
    own = {item.name for item in dataclasses.fields(DataSettings)} - {"grader"}  # which is no setting there
    others = {
        "difficulty": ("operand_max", "terms", "width"),
        "pair_rule": ("pairs_from", "min_gap", "margin_per_gap"),
    }

    def __getattribute__(self, name):
        module = sys._getframe(1).f_globals["__name__"]
        if module not in COPYING and (name in own or name in others):
            found.update(f"data.{setting}" for setting in others.get(name, (name,)))
        return object.__getattribute__(self, name)

    return __getattribute__


def _counts(frame: FrameType | None, no_use: set[tuple[str, str]]) -> bool:
    while frame.f_globals["__name__"].removeprefix("laddpo.") in ASKED:
        frame = frame.f_back
    module = frame.f_globals["__name__"]
    is_checking = module.removeprefix("laddpo.") in CHECKING
    is_use = (module.removeprefix("laddpo."), frame.f_code.co_name) in USES
    if module.partition(".")[0] in COPYING or (is_checking and not is_use):
        return False
    while frame is not None:
        place = frame.f_globals["__name__"].removeprefix("laddpo.")
        if (place, frame.f_code.co_name) in no_use:
            return False
        frame = frame.f_back
    return True
