"""The one command-line door of every stage: `run_stage("train", main)` at the foot of laddpo/train.py.

Composes the settings, explains every mistake together (exit code 2, no traceback, no torch import), fixes the run's
folder, and calls `main(config, run_folder)`. With several values and -m, each job becomes a process of its own
(laddpo/jobs/sweep.py). `cli(stage, argv, main)` is the same door as a function that returns the exit code.

    python -m laddpo.train model=llada_nano hardware=cpu
    python -m laddpo.train model=llada_8b hardware=rtx4080 --cfg job --resolve
"""

from __future__ import annotations

import codecs
import contextlib
import dataclasses
import errno
import functools
import hashlib
import importlib
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from hydra._internal.hydra import Hydra
from hydra.types import RunMode
from omegaconf import DictConfig

import laddpo
from laddpo.cli.arguments import help_text, mode_of, parse, show
from laddpo.cli.launch import joined, leave, refuse_sweep, speaks
from laddpo.cli.shorthand import expand
from laddpo.errors import EXIT_DONE, EXIT_FAULT, EXIT_STOPPED, EXIT_USER, RunFault, UserError, visible
from laddpo.settings.advice import unlikely_settings
from laddpo.settings.checks import find_problems
from laddpo.settings.compose import (
    compose_tree,
    config_from,
    group_settings,
    open_hydra,
    settings_problems,
    stage_problems,
    typed_settings,
)
from laddpo.settings.data_checks import sft_problems
from laddpo.settings.of_a_run import (
    MAY_CHANGE,
    OF_EVERY_STAGE,
    begun_evaluation,
    other_decoding,
    resume_problems,
    settings_of_run,
)
from laddpo.settings.path_checks import cannot_use, of_this_process
from laddpo.settings.read_settings import given_overrides
from laddpo.settings.redaction import redact
from laddpo.settings.schema import RunConfig
from laddpo.storage.folders import FOREIGN, KINDS, OF_A_RUN, refuse_others, what_is
from laddpo.storage.locks import disk_message

WITH_STEPS = ("train", "sft")  # stages whose `resume` finds a run and its checkpoints

Main = Callable[[RunConfig, Path], None]
CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def run_stage(stage: str, main: Main | None = None, argv: Sequence[str] | None = None) -> None:
    """Run a stage on the command line's arguments, or on `argv`, and end the process with its exit code.

    SIGTERM ends it as Ctrl-C does, also where no step is under way that would have to be finished first.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    start_again_with_utf8()
    leave(cli(stage, sys.argv[1:] if argv is None else argv, main))


def cli(stage: str, argv: Sequence[str], main: Main | None = None) -> int:
    """The exit code of `python -m laddpo.<stage> <argv>`, run in this process."""
    try:
        show_everything()
        of_this_process()
        return run_command(stage, list(argv), main)
    except UserError as error:
        _print_problems(error)
        return error.exit_code
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else EXIT_DONE if stop.code is None else EXIT_FAULT
    except KeyboardInterrupt:
        return _interrupted()
    except BrokenPipeError:  # the reader of our output (head, less) went away
        _print_into_nothing()
        return EXIT_FAULT
    except OSError as error:
        if (message := of_system(error)) is None:
            _print_traceback()
            return EXIT_FAULT
        _print_problems(UserError(message))
        if error.filename is None:  # else Python writes what is left when it ends, and fails again
            _print_into_nothing()
        return EXIT_USER
    except Exception as error:
        if _came_of_interrupt(error):
            return _interrupted()
        _print_traceback()
        return EXIT_FAULT


def of_system(error: OSError) -> str | None:
    """The message for a full disk, or for a file or folder that the user may not use; None for other errors."""
    if error.errno not in CANNOT_WRITE:
        return cannot_use(error)
    if error.filename is None:  # files that we write are named
        reason = error.strerror or error
        return f"standard output, or a file, could not be written: {reason}. Free space where it goes, then run again."
    return disk_message(Path(error.filename), error)


def show_everything() -> None:
    """What a terminal cannot show is printed as `\\xe9`, and ends nothing.

    Each line is written at once: a pipe or a file has it while the command still runs, and a reader that has gone away
    is met where something is printed.
    """
    for stream in (sys.stdout, sys.stderr):
        strict = getattr(stream, "errors", "") in ("strict", "surrogateescape")
        with contextlib.suppress(AttributeError, OSError, ValueError):
            stream.reconfigure(line_buffering=True, **({"errors": "backslashreplace"} if strict else {}))


def start_again_with_utf8() -> None:
    """In an ASCII locale Python can name no other files and reads no other prompts: begin again in its UTF-8 mode.

    What is printed keeps the terminal's encoding. The process keeps its number.
    """
    if os.name != "posix" or sys.flags.utf8_mode or codecs.lookup(sys.getfilesystemencoding()).name != "ascii":
        return
    printed = f"{getattr(sys.stdout, 'encoding', 'ascii')}:backslashreplace"
    environment = {"PYTHONIOENCODING": printed, **os.environ, "PYTHONUTF8": "1"}
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def _interrupted() -> int:
    if speaks():
        print("interrupted.", file=sys.stderr)
    return EXIT_STOPPED


def _came_of_interrupt(error: BaseException | None) -> bool:
    """Whether a library, interrupted in the middle of something, made another error of it."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def main_of(stage: str) -> Main:
    """What the stage does with its settings and its folder."""
    return importlib.import_module(f"laddpo.{stage}").main


def run_command(stage: str, argv: list[str], main: Main | None) -> int:
    """The exit code of a command that ends well; `UserError` and other errors are raised."""
    argv, rewritten = expand(stage, argv)
    for note in rewritten:
        print(f"note: {visible(redact(note))}", file=sys.stderr)
    args = parse(stage, argv)
    if args.version:
        print(f"laddpo {laddpo.__version__}")
        return EXIT_DONE
    with open_hydra(f"laddpo.{stage}", args.config_dir) as hydra:
        if args.help:
            print(help_text(stage, hydra))
            return EXIT_DONE
        if args.shell_completion:
            hydra.shell_completion(config_name=args.config_name, overrides=args.overrides)
            return EXIT_DONE
        if args.info:
            compose_tree(hydra, args.config_name, args.overrides, mode_of(args))
            logging.raiseExceptions = False  # a closed pipe (--info | head) is no fault
            hydra.show_info(args.info, config_name=args.config_name, overrides=args.overrides)
            return EXIT_DONE
        tree = compose_tree(hydra, args.config_name, args.overrides, mode_of(args))
        sweeping = args.multirun or tree.hydra.mode == RunMode.MULTIRUN
        if args.cfg:
            show(hydra, args, tree)
            if not sweeping and (problems := shown_problems(stage, tree)):
                raise UserError(*problems)
            return EXIT_DONE
        if sweeping:
            from laddpo.jobs.sweep import run_sweep

            refuse_sweep()
            return run_sweep(hydra, stage, args.config_name, args.config_dir, args.overrides, tree)
        with _reader_may_go():
            config = settings_for(hydra, stage, tree, args.overrides, args.config_name)
        given_overrides.set(tuple(args.overrides))
    with joined(stage, config.hardware) as ranks:
        if ranks is None:
            return EXIT_DONE
        if ranks.world > 1 and stage in WITH_STEPS and config.resume != "false":  # rank 0 says what is resumed, and how
            config = config_from(ranks.broadcast(dataclasses.asdict(config)))
        folder = Path(ranks.broadcast(str(run_folder(stage, config)) if ranks.is_main else None))
        if ranks.is_main:
            is_of_run = config.run is not None and stage in MAY_CHANGE
            notes = other_decoding(config, args.overrides) if is_of_run else unlikely_settings(config, stage)
            for note in notes:
                print(f"note: {visible(note)}", file=sys.stderr)
        return _call(main or main_of(stage), config, folder)


def shown_problems(stage: str, tree: DictConfig) -> list[str]:
    """What is wrong with settings that are only shown. Those of a run are not looked up."""
    is_of_run = tree.run is not None and stage in MAY_CHANGE
    return settings_problems(tree, None if is_of_run else stage)[1]


def settings_for(
    hydra: Hydra, stage: str, tree: DictConfig, overrides: list[str], config_name: str = "config"
) -> RunConfig:
    """The checked settings of a stage; if it works on a run or resumes one, with the settings of that run."""
    typed = typed_settings(tree)
    is_of_run = typed.config.run is not None and stage in MAY_CHANGE
    begun = begun_evaluation(typed.config) if stage == "evaluate" else None
    resumed = None
    if stage in WITH_STEPS and typed.config.resume != "false" and not typed.problems:
        from laddpo.training.resuming import Asked, resumed_settings

        def compose_without(others: Sequence[str]) -> RunConfig:
            return typed_settings(compose_tree(hydra, config_name, list(others))).config

        resumed = resumed_settings(Asked(typed.config, tuple(overrides), compose_without), stage)
    is_of_run = is_of_run or begun is not None
    problems = [*typed.problems, *resume_problems(stage, typed.config)]
    if not is_of_run:
        problems += stage_problems(stage, dataclasses.replace(typed, config=resumed or typed.config), tree)
        problems += [] if resumed else find_problems(typed.config, typed.broken, typed.given)
        problems += sft_problems(typed.config) if stage == "sft" and not resumed else []
    if problems:
        raise UserError(*problems)
    if not is_of_run:
        return resumed or typed.config
    config = settings_of_run(stage, typed.config, overrides, functools.partial(group_settings, hydra), begun)
    # what else the command line names is what the run has anyway
    given = {key for key in typed.given if key.partition(".")[0] in (*MAY_CHANGE[stage], *OF_EVERY_STAGE)}
    if unread := stage_problems(stage, dataclasses.replace(typed, config=config, given=given), tree):
        raise UserError(*unread)
    return config


def _call(main: Main, config: RunConfig, folder: Path) -> int:
    try:
        with _reader_may_go():
            main(config, folder)
    except Exception as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, without importing torch
            raise
        from laddpo.hardware.footprint import out_of_memory_fault
        from laddpo.hardware.machine import find_machine

        raise out_of_memory_fault(find_machine(config).choice, error) from error
    return EXIT_DONE


@contextlib.contextmanager
def _reader_may_go() -> Iterator[None]:
    """A closed pipe at the output (`| head`) ends the block with a `RunFault` that says how to continue."""
    try:
        yield
    except BrokenPipeError as error:
        _print_into_nothing()
        raise RunFault(
            "what read this command's output went away, and the command stopped. Whatever it had finished is on disk: "
            "the same command continues from there (for a training run add resume=true). Write the output to a file."
        ) from error


def _print_into_nothing() -> None:
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run_folder(stage: str, config: RunConfig) -> Path:
    """The folder this run owns: `output_dir` when given, else outputs/<stage>/<date-time-name>. Not created here.

    A stage continues in the folder that `resume` names; for one with steps laddpo/training/resuming.py has found it by
    now. Rank 0 of a launch asks for all of them.
    """
    if stage in WITH_STEPS and config.resume not in ("true", "false"):
        folder = Path(config.resume)
    elif config.output_dir is not None:
        folder = Path(config.output_dir)
    elif config.resume not in ("true", "false"):
        folder = Path(config.resume)
        if not (folder / "config.yaml").is_file():
            raise UserError(
                f"resume is {config.resume!r}, which holds no config.yaml; expected a folder that {stage} made; "
                "check the path, or leave resume out."
            )
    else:
        salt = hashlib.sha256(f"{os.getpid()}-{time.time_ns()}".encode()).hexdigest()[:4]
        reported = [config.run, *config.runs] if stage == "report" else []
        subject = next((Path(run).name for run in reported if run), f"{config.model.name}-{config.data.source}")
        name = f"{time.strftime('%Y-%m-%d_%H-%M-%S')}-{salt}-{subject}"
        folder = Path(config.paths.outputs_dir) / stage / name
    _check_folder(folder, config, stage)
    return folder


def _check_folder(folder: Path, config: RunConfig, stage: str) -> None:
    """Refuse a folder that cannot be written, or that holds what this stage may not continue."""
    existing = folder
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise UserError(
            f"output_dir is {str(folder)!r} and {existing} is a file; expected a folder; choose another name."
        )
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"output_dir is {str(folder)!r} and {existing} cannot be written to; choose a folder you own.")
    if config.dry_run and what_is(folder).kinds == (FOREIGN,):
        return  # a dry run keeps to a folder of its own inside
    refuse_others(folder, KINDS.get(stage, OF_A_RUN), config.resume != "false")


def _print_traceback() -> None:
    speaks()  # counts: what the other processes of a launch will say of it is not needed
    sys.stderr.write(visible(redact(traceback.format_exc())))


def _print_problems(error: UserError) -> None:
    if not speaks():  # one process of a launch speaks
        return
    count = len(error.problems)
    head = "" if count == 1 else f"{count} problems, nothing was run:\n"
    print(visible(redact(head + "\n".join(f"error: {problem}" for problem in error.problems))), file=sys.stderr)
