"""Command lines of the stages: their flags, --help, and --cfg, which shows the settings."""

from __future__ import annotations

import argparse
from pathlib import Path

from hydra._internal.hydra import Hydra
from hydra._internal.utils import get_args_parser
from hydra.core.object_type import ObjectType
from hydra.types import RunMode
from omegaconf import OmegaConf

import laddpo
from laddpo.cli.shorthand import FLAT
from laddpo.errors import UserError, nearest
from laddpo.processes.terminal import hanging
from laddpo.settings.mistakes import config_groups, unresolved
from laddpo.settings.of_a_run import AT_ONCE
from laddpo.settings.read_settings import EVERYWHERE, READS, matches
from laddpo.settings.redaction import redact


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        words = message.removeprefix("unrecognized arguments: ").split()
        if message.startswith("unrecognized arguments"):
            flag = words[0].split("=")[0]
            known = [option for action in self._actions for option in action.option_strings]
            guess = nearest(flag, [*known, *(f"--{name.replace('_', '-')}" for name in FLAT)])
            hint = (
                f"did you mean {guess}?"
                if guess
                else f"settings are written {flag.lstrip('-').replace('-', '_')}=<value>."
            )
            flags = " ".join(word for word in words if word.startswith("-"))
            raise UserError(f"{flags}: no such option; {hint}")
        raise UserError(f"{message}; python -m laddpo.train --help shows what can be written.")


def parse(stage: str, argv: list[str]) -> argparse.Namespace:
    """Hydra's own flags, with our messages, and --version as a plain flag."""
    parser = Parser(prog=f"python -m laddpo.{stage}", add_help=False, allow_abbrev=False)
    for action in get_args_parser()._actions:
        if action.dest not in ("version", "config_path", "experimental_rerun", "hydra_help"):
            parser._add_action(action)
    parser.add_argument("--version", action="store_true", help="print the version")
    args = parser.parse_intermixed_args(argv)  # flags may be between settings
    args.config_name = (args.config_name or "config").removesuffix(".yaml")
    chosen = [flag for flag in ("cfg", "multirun", "run", "info", "shell_completion") if getattr(args, flag)]
    if len(chosen) > 1 and chosen != ["cfg", "multirun"]:
        raise UserError(f"--{chosen[0]} and --{chosen[1]} were both given; expected one of them.")
    if args.resolve and not args.cfg:
        raise UserError(
            "--resolve was given without --cfg; write --cfg job --resolve to see the settings without references."
        )
    return args


def mode_of(args: argparse.Namespace) -> RunMode:
    return RunMode.MULTIRUN if args.multirun else RunMode.RUN


def show(hydra: Hydra, args: argparse.Namespace, tree) -> None:
    from hydra.core.hydra_config import HydraConfig

    HydraConfig.instance().set_config(tree)
    OmegaConf.set_readonly(tree.hydra, None)
    shown = hydra.get_sanitized_cfg(tree.copy(), args.cfg)
    if args.package not in (None, "_global_"):
        shown = OmegaConf.select(shown, args.package)
        if shown is None:
            raise UserError(
                f"--package is {args.package!r}; there is no such part of the settings; dpo or model.shape are."
            )
    if OmegaConf.is_config(shown):
        if args.resolve:
            if broken := unresolved(tree):
                raise UserError(*broken.values())
            OmegaConf.resolve(shown)
        shown = OmegaConf.to_yaml(shown)
    print(redact(str(shown)), end="")


def help_text(stage: str, hydra: Hydra) -> str:
    """What the stage does with examples, the groups that it reads with their options, its own settings, the flags."""
    loader = hydra.config_loader
    groups = [group for group in sorted(config_groups(hydra)) if group in CHOSEN or _reads_group(stage, group)]
    width = max(map(len, (*groups, *SETTINGS)))
    options = "\n".join(
        hanging(f"  {group:<{width}}  ", ", ".join(sorted(loader.get_group_options(group, ObjectType.CONFIG))))
        for group in groups
    )
    settings = "\n".join(
        hanging(f"  {name:<{width}}  ", words)
        for name, words in SETTINGS.items()
        if matches(name, READS[stage]) or (name in EVERYWHERE and not (name == "resume" and stage in AT_ONCE))
    )
    flags = "\n".join(hanging(f"  {flag:<21}  ", words) for flag, words in FLAGS.items())
    return f"""{described(stage)}

usage: python -m laddpo.{stage} [group=option ...] [group.setting=value ...]

Groups and their options (conf/<group>/<option>.yaml):
{options}

Settings outside of groups:
{settings}

Flags:
{flags}"""


def _reads_group(stage: str, group: str) -> bool:
    return any(pattern == group or pattern.startswith(f"{group}.") for pattern in READS[stage])


def described(stage: str) -> str:
    """The stage's module docstring, read without running it."""
    import ast

    file = Path(laddpo.__file__).parent / f"{stage}.py"
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) if file.exists() else None
    return text or f"laddpo.{stage}"


FLAGS = {
    "--config-file FILE": "a flat YAML file, as learning_rate: 1e-5; its keys also work as --learning_rate 1e-5",
    "--cfg job [--resolve]": "print the settings instead of running",
    "--info defaults": "print which yaml files are composed",
    "--config-dir FOLDER": "add your own folder of groups",
    "--config-name NAME": "another root file than config.yaml",
    "-m, --multirun": "one job, in its own process, for each combination of values",
    "--version": "print the version",
}
CHOSEN = ("model", "hardware", "experiment")  # groups that a stage takes though it may read few of their settings
SETTINGS = {
    "run": "the folder of a finished run",
    "runs": "several of them: [outputs/train/a,outputs/train/b]",
    "prompt": "a text to answer",
    "prompts": "a file with one prompt on each line",
    "base": "true: the base model answers beside the tuned one",
    "data.rounds": "rounds=3: sample, prepare and train three times over",
    "dry_run": "true: two steps on the longest batch, then stop",
    "resume": "true, or a folder: continue what was stopped",
    "output_dir": "the folder to write into",
    "seed": "decides every random choice",
    "auto": "false: stop and name the command if an input is missing",
    "verify": "true: check stored values and weights again",
}
