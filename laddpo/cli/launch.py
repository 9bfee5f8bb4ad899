"""A stage in several processes, as torchrun, accelerate and SLURM start it: they are joined, one speaks, all end.

Stages that divide their work are named in SHARED; of the others rank 0 runs everything and the rest have nothing to do.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
from collections.abc import Iterator

from laddpo.errors import EXIT_DONE, UserError
from laddpo.processes.ranks import Ranks, connect, disconnect, here, is_lost_peer, launched, lost_peer
from laddpo.settings.schema import HardwareSettings

SHARED = ("prepare", "train", "sft", "precompute", "evaluate")


@contextlib.contextmanager
def joined(stage: str, hardware: HardwareSettings) -> Iterator[Ranks | None]:
    """Inside the block the processes of this launch are one run; None where this one has nothing to do.

    Ranks above 0 print nothing to stdout and show no bars; warnings and errors go to stderr from wherever they are.
    """
    found = launched()
    if found.world == 1:
        yield here()
        return
    if stage not in SHARED:
        yield here() if found.is_main else None
        return
    if not found.is_main:
        os.environ["TQDM_DISABLE"] = "1"  # before anything that draws bars is imported
    from laddpo.hardware.machine import find_device

    ranks = connect(find_device(hardware).type)
    with contextlib.ExitStack() as quiet:
        if not ranks.is_main:
            nowhere = quiet.enter_context(open(os.devnull, "a", encoding="utf-8"))
            quiet.enter_context(contextlib.redirect_stdout(nowhere))
        try:
            yield ranks
        except RuntimeError as error:
            if is_lost_peer(error):
                raise lost_peer(error) from error
            raise


def refuse_sweep() -> None:
    """A sweep starts processes of its own; started several times it would do everything as often."""
    if launched().world > 1:
        raise UserError(
            f"a sweep was started in {launched().world} processes; expected one, which starts the jobs. Use python -m "
            "without torchrun, and hydra/launcher=joblib or submitit for several jobs at once."
        )


def speaks() -> bool:
    """Whether this process tells the user of a failure: before it is joined rank 0, then the first that fails."""
    return here().speaks_first() if here().world > 1 else launched().is_main


def leave(code: int) -> None:
    """End this process. With several processes, each ends without taking the interpreter down.

    Gloo's threads outlive `destroy_process_group` while anything refers to a group (sharded weights do). One that frees
    the last exchange's tensors then needs the interpreter, and where that is being taken down it aborts: a run that
    went well would be reported as failed. After a failure not even the exit functions run: they would wait for others.
    """
    if here().world == 1:
        sys.exit(code)
    if code == EXIT_DONE:
        disconnect()
        atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
