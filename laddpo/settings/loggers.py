"""The trackers of a run by name: which ones `logger` asks for, and whether their packages are there."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from laddpo.errors import UserError
from laddpo.settings.schema import LoggerSettings

# By name, the module that the tracker needs. Packages that laddpo itself does not bring are extras of the same name.
TRACKER_MODULES = {
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "trackio": "trackio",
    "mlflow": "mlflow",
    "swanlab": "swanlab",
    "comet": "comet_ml",
}
WITHOUT_EXTRA = ("tensorboard", "wandb")


def wanted_trackers(logger: LoggerSettings) -> list[str]:
    """The trackers that are switched on or named in logger.trackers, each once, in the order of the table."""
    switched = {"tensorboard": logger.tensorboard, "wandb": logger.wandb}
    return [name for name in TRACKER_MODULES if switched.get(name) or name in logger.trackers]


def names_of(logger: LoggerSettings) -> dict[str, Any]:
    """Under which names the trackers show the run: the group's settings, as far as a tracker reads them."""
    wanted = set(wanted_trackers(logger)) - {"tensorboard"}
    own = ("project", "name", "group", "tags") if wanted else ()
    of_wandb = ("project", "name", "group", "tags", "mode") if "wandb" in wanted else ()
    return {key: getattr(logger, key) for key in (*own, *(f"wandb_{key}" for key in of_wandb))}


def is_installed(name: str) -> bool:
    """Whether the package of a tracker is there. It is not imported."""
    return find_spec(TRACKER_MODULES[name]) is not None


def install_command(name: str) -> str:
    """How to get a tracker's package."""
    return f"pip install {name}" if name in WITHOUT_EXTRA else f"pip install 'laddpo[{name}]'"


def check_trackers(logger: LoggerSettings) -> None:
    """UserError before a run begins if the package of a named tracker is missing."""
    missing = [name for name in logger.trackers if not is_installed(name)]
    if missing:
        raise UserError(
            *(
                f"logger.trackers has {name!r}, and its package {TRACKER_MODULES[name]} is not installed; "
                f"{install_command(name)}, or leave {name} out of logger.trackers."
                for name in missing
            )
        )
