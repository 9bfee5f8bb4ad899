"""What every tracker is given when it is opened, and the name under which it knows a run folder."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from laddpo.storage.atomic import write_text

MAIN_SETTINGS = ("model.name", "data.source", "dpo", "optim", "adapter.kind", "adapter.r", "hardware.precision", "seed")
Say = Callable[[str], None]


@dataclass(frozen=True)
class Opening:
    """What a tracker is opened with.

    `settings` is the logger group, `config` the resolved config without secrets. `resume_step` is the step of the
    checkpoint from which a resumed run continues.
    """

    folder: Path
    settings: Mapping[str, Any]
    config: Mapping[str, Any]
    resume_step: int | None
    say: Say

    def named(self, key: str, tracker: str = "") -> Any:
        """project, name, group or tags: the tracker's own setting if it has one that is given, else that of all."""
        given = self.settings.get(f"{tracker}_{key}") or self.settings.get(key)
        return given or {"project": "laddpo", "name": self.folder.name, "tags": []}.get(key)

    def id(self, tracker: str, digits: int = 8) -> str:
        """The name under which a tracker knows this run folder; made and stored at the first call."""
        return stored_id(self.folder, tracker) or store_id(self.folder, tracker, secrets.token_hex(digits // 2))


def main_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """What the HPARAMS page compares runs by: MAIN_SETTINGS of the config, by dotted name, as numbers and texts."""
    found: dict[str, Any] = {}
    for name in MAIN_SETTINGS:
        value: Any = config
        for part in name.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        settings = (
            {f"{name}.{key}": inner for key, inner in value.items()} if isinstance(value, Mapping) else {name: value}
        )
        for key, inner in settings.items():
            if inner is not None:
                found[key] = inner if isinstance(inner, (bool, int, float, str)) else str(inner)
    return found


def indented(text: str) -> str:
    """Markdown's code block, which shows any text as it is."""
    return "\n".join(f"    {line}" for line in text.splitlines())


def stored_id(folder: Path, tracker: str) -> str | None:
    """The name under which a tracker knows a run folder, if the folder has one."""
    path = folder / f"{tracker}_id.txt"
    return (path.read_text(encoding="utf-8").strip() or None) if path.exists() else None


def store_id(folder: Path, tracker: str, name: str) -> str:
    """Store and return the name under which a tracker knows a run folder."""
    write_text(folder / f"{tracker}_id.txt", name + "\n")
    return name
