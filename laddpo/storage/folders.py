"""Who owns a folder: what lies there decides, under the folder's lock, for every stage that writes.

`what_is(folder)` names the kinds that a folder may be. `owned(folder, kind)` holds it for one kind and refuses every
other; it marks the folder, so that an unfinished one is known too. A folder that is absent, or holds only what nobody
would miss, is free.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from laddpo.errors import UserError
from laddpo.storage import atomic, locks, manifests
from laddpo.storage.locks import LOCK
from laddpo.storage.temporaries import NAME

MARK = ".laddpo"  # holds the kind of the folder, from its first moment on


@dataclass(frozen=True)
class Found:
    """What a folder is: one of `kinds` (older versions wrote no mark, and two kinds may look alike). None: it is free.

    `words` describes it. `is_finished`: its manifest is there.
    """

    kinds: tuple[str, ...] = ()
    words: str = "nothing"
    is_finished: bool = False

    @property
    def is_free(self) -> bool:
        return not self.kinds


def what_is(folder: Path) -> Found:
    """What the folder is by its manifest, by its mark, else by the files that the stages of older versions wrote."""
    names = _names(folder)
    if not names:
        return Found()
    manifest = _read(folder / manifests.MANIFEST)
    kind = manifest.get("kind") if isinstance(manifest, dict) else None
    if isinstance(kind, str) and kind in WORDS:
        return Found((kind,), f"{WORDS[kind]} (finished)", True)
    is_finished = manifests.MANIFEST in names
    marked = _marked(folder)
    if marked in WORDS:
        return Found((marked,), f"{WORDS[marked]} (unfinished)", is_finished)
    kinds = _kinds_by_files(folder, names)
    if kinds:
        return Found(kinds, " or ".join(WORDS[kind] for kind in kinds), is_finished)
    return Found((FOREIGN,), _foreign_words(names), is_finished)


def refuse_others(folder: Path, kinds: tuple[str, ...], resume: bool, setting: str = "output_dir") -> Found:
    """What the folder is, if it is free, or if it is of these kinds and may be continued. Else `UserError`."""
    try:
        found = what_is(folder)
    except OSError as error:
        raise UserError(f"{setting} is {str(folder)!r}, which cannot be read: {error.strerror or error}.") from error
    is_own = bool(set(found.kinds) & set(kinds))
    if found.is_free or (is_own and _may_go_on(found, set(kinds), resume)):
        return found
    where = f"{setting} is {str(folder)!r}, which holds"
    if is_own and set(kinds) & CONTINUED:
        earlier = "a sweep" if kinds == ("sweep",) else "an earlier run"
        raise UserError(
            f"{where} {earlier}; nothing is overwritten; add resume=true to continue it, or choose another folder."
        )
    if is_own:
        raise UserError(f"{where} {found.words} already; nothing is overwritten; choose another folder.")
    if "sweep" in found.kinds or "study" in found.kinds:
        raise UserError(
            f"{where} the jobs of a sweep or study, not a run; repeat its own command (a sweep's has -m), name one of "
            "the folders in it, or choose another folder."
        )
    expected = " or ".join(WORDS[kind] for kind in kinds)
    raise UserError(
        f"{where} {found.words}; expected an empty folder, a new one, or {expected}; nothing was changed there; choose "
        "another folder."
    )


@contextlib.contextmanager
def owned(folder: Path, kind: str, resume: bool = False, setting: str = "output_dir") -> Iterator[Found]:
    """Hold a folder for a stage that writes this kind. What it gives was found under the lock.

    A folder that is refused is not touched, not even by a lock. One in which nothing was written is free again.
    """
    refuse_others(folder, (kind,), resume, setting)
    found: list[Found] = []
    with locks.locked(folder, wait=False, check=lambda: found.append(refuse_others(folder, (kind,), resume, setting))):
        if found[0].is_free:
            atomic.write_text(folder / MARK, kind + "\n")
        try:
            yield found[0]
        finally:
            with contextlib.suppress(OSError):
                if not _names(folder):
                    os.unlink(folder / MARK)


def _may_go_on(found: Found, kinds: set[str], resume: bool) -> bool:
    if kinds <= WRITTEN_AGAIN or (kinds <= REDONE and not found.is_finished):
        return True
    return resume and not kinds <= {"export"}  # an export has been given to others


def _names(folder: Path) -> list[str]:
    """What lies in the folder and matters to somebody. `OSError` where it cannot be read."""
    return sorted(_that_matter(folder))


def _that_matter(folder: Path, is_top: bool = True) -> Iterator[str]:
    """As `_names`, one by one. A job's files do not keep its own stage out; inside, they make the folder a sweep's."""
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        is_job = any(_is_job_file(folder / name) for name in JOB_FILES)
        of_a_job = () if not is_job else (*JOB_FILES, "log.txt") if is_top else ("process.json",)
        for entry in entries:
            if not _is_harmless(entry, of_a_job):
                yield entry.name


def _is_harmless(entry: os.DirEntry, of_a_job: tuple[str, ...]) -> bool:
    if entry.is_symlink():
        return False
    if entry.is_dir():
        path = Path(entry.path)
        return entry.name in HARMLESS_FOLDERS or _marked(path) == "dry_run" or not any(_that_matter(path, False))
    is_left = entry.name.startswith(".tmp-") and NAME.fullmatch(entry.name) is not None
    return is_left or entry.name in HARMLESS or entry.name in of_a_job


def _is_job_file(path: Path) -> bool:
    """What a sweep or study keeps in the folder of its job, beside what the job's own stage writes."""
    content = _read(path)
    return isinstance(content, dict) and (not content or bool({"overrides", "pid"} & content.keys()))


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None


def _marked(folder: Path) -> str | None:
    path = folder / MARK
    with contextlib.suppress(OSError, ValueError):
        if not path.is_symlink():
            return path.read_text(encoding="utf-8").strip()
    return None


def _kinds_by_files(folder: Path, names: list[str]) -> tuple[str, ...]:
    """The kinds of folders that older versions left without a mark."""
    there = set(names)
    has_jobs = any(_is_job_file(path) for path in folder.glob("*/job.json"))
    if ".git" in there:
        return ()
    if "config.yaml" in there and _is_config(folder / "config.yaml"):
        if "study.json" in there or has_jobs:
            return ("study",)
        if "variance.json" in there:
            return ("variance",)
        if there & TRAINED:
            return ("train", "sft")
        if there & ANSWERED:
            return ("evaluation",)
        return ("train", "sft", "evaluation", "study") if there == {"config.yaml"} else ("train", "sft")
    if "sweep.json" in there or has_jobs:
        return ("sweep",)
    if folder.name == "evaluation" and there & ANSWERED and _is_config(folder.parent / "config.yaml"):
        return ("final_evaluation",) if (folder.parent / manifests.MANIFEST).exists() else ("evaluation",)
    for kind, own in FILES_OF.items():
        if all(re.fullmatch(own, name) for name in names if name != manifests.MANIFEST) and names != [
            manifests.MANIFEST
        ]:
            return (kind,)
    return ()


def _is_config(path: Path) -> bool:
    """Whether this is the config.yaml of a run of ours, damaged or not, and not a file of another program."""
    try:
        content = path.read_bytes()
    except OSError:
        return False
    return re.search(rb"^dpo:", content, re.MULTILINE) is not None


def _foreign_words(names: list[str]) -> str:
    shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    if ".git" in names:
        return f"a git checkout ({shown})"
    if "adapter_config.json" in names:
        return f"an adapter ({shown})"
    if "config.json" in names and any(name.endswith((".safetensors", ".bin")) for name in names):
        return f"the weights of a model ({shown})"
    return f"other files ({shown})"


FOREIGN = "foreign"
KINDS = {  # by stage: what its output_dir may be. Stages that write nothing there are given the settings of a run.
    "train": ("train",),
    "sft": ("sft",),
    "evaluate": ("evaluation",),
    "generate": ("generations",),
    "variance": ("variance",),
    "export": ("export",),
    "report": ("report",),
    "study": ("study",),
    "benchmark": ("benchmark",),
}
OF_A_RUN = ("train", "sft", "evaluation")
WORDS = {  # by kind
    "train": "a run of train",
    "sft": "a run of sft",
    "dry_run": "a dry run",
    "evaluation": "an evaluation",
    "final_evaluation": "the evaluation of a finished run",
    "generations": "answers of generate",
    "variance": "a measurement of variance",
    "export": "an export",
    "report": "a report",
    "study": "a study",
    "sweep": "a sweep",
    "benchmark": "a benchmark",
    "prepared": "prepared pairs",
    "prepared_examples": "a prepared corpus",
    "reference": "a reference store",
    "surprise": "a store of surprising tokens",
    "samples": "sampled answers",
    "weights": "weights of a run",
    "checkpoint": "a checkpoint",
    "fault": "the report of a fault",
}
CONTINUED = {"train", "sft", "evaluation", "variance", "study", "sweep", "benchmark"}  # with resume=true
REDONE = {"export"}  # what was left half done is written again
WRITTEN_AGAIN = {"report", "reference", "surprise", "samples", "dry_run"}  # by every further command
HARMLESS = {LOCK, MARK, ".gitkeep", ".DS_Store", "Thumbs.db", "desktop.ini", "multirun.yaml"}
HARMLESS |= {"command.json"}  # alone it is all that a run wrote before its config.yaml
HARMLESS_FOLDERS = {".hydra"}
JOB_FILES = ("job.json", "process.json")
TRAINED = {"metrics.jsonl", "checkpoints", "adapter", "adapter_last", "model", "model_last", "round_1", "rounds.json"}
ANSWERED = {"items.jsonl", "results.json", "pairs.jsonl"}
FILES_OF = {  # of kinds without a config.yaml: the names that all files there must have
    "generations": r"generations\.jsonl",
    "report": r"report\.html|plots",
    "benchmark": r"benchmark\.(md|json)",
    "reference": r"shard-[0-9a-f]+\.safetensors",
    "surprise": r"set-[0-9a-f]+\.safetensors",
    "samples": r"parts|samples\.jsonl",
}
