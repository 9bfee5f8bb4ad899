"""The settings of a stage that works on a finished run: the run's own, and what the command line may change."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from laddpo.errors import UserError
from laddpo.settings.checks import find_problems
from laddpo.settings.compose import read_config
from laddpo.settings.conditions import takes_steps
from laddpo.settings.decoding_checks import settle_decoding
from laddpo.settings.mistakes import setting_of
from laddpo.settings.ranges import as_written, leaves
from laddpo.settings.redaction import redact
from laddpo.settings.schema import RunConfig
from laddpo.storage import manifests
from laddpo.storage.seals import read_checked, write_checked


def begun_evaluation(asked: RunConfig) -> Path | None:
    """The folder of the evaluation that `resume` continues; None if none was begun. `UserError` for a folder of
    another kind, or without one."""
    if asked.resume == "false":
        return None
    if asked.resume == "true" and asked.output_dir is None:
        raise UserError("resume is true and output_dir is not set; expected the evaluation's folder: resume=<folder>.")
    folder = Path(asked.output_dir if asked.resume == "true" else asked.resume)
    if asked.output_dir is not None and Path(asked.output_dir).resolve() != folder.resolve():
        raise UserError(
            f"resume is {asked.resume!r} and output_dir is {asked.output_dir!r}; expected one folder. An evaluation "
            "goes on in its own; leave output_dir out."
        )
    manifests.read_manifest(folder, "evaluation", verify=False)
    return folder if (folder / "config.yaml").is_file() else None


def settings_of_run(
    stage: str,
    asked: RunConfig,
    overrides: Sequence[str],
    group_settings: Callable[[str, str], DictConfig],
    begun: Path | None = None,
) -> RunConfig:
    """What a stage of MAY_CHANGE works with: the settings of the run that `asked.run` names, and of the command line
    what the stage may change. UserError with everything else that the command line sets to something else, or with
    what its settings contradict in the run.

    The arithmetic (hardware.precision) stays the run's unless it is named itself. `group_settings(group, option)` is
    what an option sets; what it takes from other groups (evaluation=default: the data's tasks) it takes from the run.
    `begun`: the folder of an evaluation that is resumed; its settings are used instead of the run's.
    """

    keys = [override.lstrip("+~").partition("=")[0] for override in overrides]
    stored = read_config(begun or Path(asked.run))
    if begun is not None:
        asked = _of_begun(asked, stored, begun, keys)
    refuse_decided(stage, asked, stored, overrides, begun)
    merged = copy.deepcopy(stored)
    for name in (*MAY_CHANGE[stage], *OF_EVERY_STAGE):
        if name not in IN_PIECES:
            setattr(merged, name, getattr(asked, name))
    options = {key: text.partition("=")[2] for key, text in zip(keys, overrides, strict=True)}
    for group in ("evaluation", "decoding"):  # a decoding group overrides the evaluation group
        if options.get(group, "null") != "null":
            tree = OmegaConf.merge(OmegaConf.structured(merged), group_settings(group, options[group]))
            merged.evaluation = OmegaConf.to_object(tree).evaluation
    if stage == "export":  # merges where there is room, whatever the run was trained on
        merged.hardware = asked.hardware
    elif "hardware" in keys:
        merged.hardware = dataclasses.replace(asked.hardware, precision=stored.hardware.precision)
    for key in keys:
        if key.startswith(("evaluation.", "hardware.", "paths.", *PLACES_OF_BASE)):
            group, name, *inner = re.split(r"[.\[]", key)
            to, of = getattr(merged, group), getattr(asked, group)
            if inner and dataclasses.is_dataclass(getattr(of, name)):  # evaluation.judge.tie: the rest stays the run's
                to, of, name = getattr(to, name), getattr(of, name), inner[0]
            setattr(to, name, getattr(of, name))
    settle_decoding(merged, keys)
    merged.data.chat_template = _kept_template(stored, asked.run)
    known = find_problems(stored)
    if problems := [problem for problem in find_problems(merged) if problem not in known]:
        raise UserError(*problems)
    return merged


def _kept_template(stored: RunConfig, run: str | None) -> str | None:
    """The run's copy of its own chat template: the file that it was read from may be another by now."""
    if stored.data.chat_template is None or run is None:
        return stored.data.chat_template
    weights = "model" if stored.adapter.kind == "full" else "adapter"
    kept = Path(run) / weights / "chat_template.jinja"
    return str(kept) if kept.is_file() else stored.data.chat_template


def _of_begun(asked: RunConfig, stored: RunConfig, begun: Path, keys: Sequence[str]) -> RunConfig:
    """`asked` with the run that the evaluation in `begun` is of, and with what nobody named as it has it."""
    if asked.run is not None and (stored.run is None or Path(asked.run).resolve() != Path(stored.run).resolve()):
        raise UserError(
            f"run is {asked.run!r}, and the evaluation in {begun} is of {stored.run or 'a base model'}; expected the "
            "same. Leave run out, or choose another output_dir."
        )
    named = {key.split(".")[0] for key in keys}
    kept = {name: getattr(stored, name) for name in ("logger", "auto") if name not in named}
    return dataclasses.replace(asked, run=stored.run, **kept)


def other_decoding(config: RunConfig, overrides: Sequence[str]) -> list[str]:
    """A note where an option of evaluation or decoding, chosen as a whole, changes how the run `config.run` answers."""
    named = {override.partition("=")[0] for override in overrides}
    named |= set() if takes_steps(config.evaluation, config) else {"evaluation.steps"}
    was, now = (dataclasses.asdict(part.evaluation) for part in (read_config(Path(config.run)), config))
    changed = [
        f"evaluation.{name}={as_written(now[name])} (it had {as_written(was[name])})"
        for name in WAY_OF_ANSWERING
        if now[name] != was[name] and f"evaluation.{name}" not in named
    ]
    if not changed:
        return []
    return [
        f"answers are made otherwise than when this run was evaluated: {', '.join(changed)}; a small model answers "
        "well only in the length and blocks of its own."
    ]


def resume_problems(stage: str, config: RunConfig) -> Iterator[str]:
    """Refuse resume= for a stage that keeps nothing that could be resumed."""
    if stage in AT_ONCE and config.resume != "false":
        yield f"resume is {config.resume} and {stage} keeps nothing that could be resumed. Remove resume."


def refuse_decided(
    stage: str, asked: RunConfig, stored: RunConfig, overrides: Sequence[str], begun: Path | None = None
) -> None:
    """Name the overrides that a stored run, or the evaluation in `begun`, decides otherwise: they would have no
    effect."""
    may_change = (*MAY_CHANGE[stage], *OF_EVERY_STAGE)
    wanted, found = dict(leaves(asked)), dict(leaves(stored))
    given, has = [], []
    for override in overrides:
        key = setting_of(re.split(r"[=\[]", override.lstrip("+~"))[0])
        if re.split("[./]", key)[0] in may_change or key in PLACES_OF_BASE:
            continue
        concerned = [name for name in wanted if f"{name}.".startswith(f"{key}.")]
        for name in concerned or wanted:  # an experiment may set anything
            is_free = name.split(".")[0] in may_change or name.startswith("model.recommended.")
            if wanted[name] != found[name] and (not is_free or name == key):
                given.append(override)
                has.append(f"{name}={as_written(found[name])}")
                break
    if given and begun is not None:
        raise UserError(
            f"{', '.join(given)}: given beside the evaluation in {begun}, which was begun with {', '.join(has)}. Leave "
            f"it out, or choose another output_dir; a resumed evaluation takes "
            f"{', '.join(_patterns(may_change))}."
        )
    if given:
        raise UserError(
            f"{', '.join(given)}: given beside run={asked.run}, which was made with {', '.join(has)}; a finished run "
            f"decides that. Leave it out, or train with it; beside run, {stage} takes "
            f"{', '.join(_patterns(may_change))}."
        )


def _patterns(names: Sequence[str]) -> list[str]:
    groups = {item.name for item in dataclasses.fields(RunConfig) if dataclasses.is_dataclass(item.default_factory)}
    return [f"{name}.*" if name in groups else name for name in names if name != "hydra"]


# By stage that works on a finished run: the settings that stay the command line's.
MAY_CHANGE = {
    "evaluate": ("evaluation", "decoding"),
    "generate": ("evaluation", "decoding", "prompt", "prompts"),
    "chat": ("evaluation", "decoding", "chat", "base"),
    "variance": ("variance", "evaluation", "decoding"),
    "export": ("export",),
}
WAY_OF_ANSWERING = (
    *("gen_length", "steps", "block_length", "temperature", "cfg_scale", "remasking", "suppress_eos"),
    *("confidence_threshold", "block_cache"),
)
PLACES_OF_BASE = ("model.model_name_or_path", "model.revision")  # what lies there is compared by its fingerprint
AT_ONCE = ("generate", "chat", "variance")  # stages that keep nothing that could be resumed
OF_EVERY_STAGE = ("hardware", "paths", "logger", "output_dir", "resume", "auto", "verify", "run", "hydra")
IN_PIECES = ("evaluation", "decoding", "hardware", "paths", "hydra")  # of these only what the command line names


COMMAND = "command.json"  # in a run's folder: what the command line named when the run began


def override_key(override: str) -> str:
    """`dpo.beta` of `+dpo.beta=1`."""
    return re.split(r"[=\[@]", override.lstrip("+~"))[0]


def write_command(folder: Path, overrides: Iterable[str], **more: Any) -> None:
    """command.json of a run, a sweep or a study: what the command line named when it began, with a seal of its own."""
    named = [redact(text) for text in overrides if override_key(text) not in ("output_dir", "resume")]
    write_checked(folder / COMMAND, {**more, "overrides": named})


def read_command(folder: Path) -> dict[str, Any]:
    """What `write_command` wrote; an earlier version wrote nothing."""
    path = folder / COMMAND
    return read_checked(path, ("overrides", "stage")) if path.exists() else {}
