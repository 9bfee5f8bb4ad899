"""Truncated, flipped, swapped and missing files: a thousand before the readers of every artifact, and each kind of
damage of every sealed file of every kind of folder before every command that reads it. All are noticed, none is used.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from laddpo.errors import UserError
from laddpo.models import adapters
from laddpo.preference.prepared import PreparedPairs
from laddpo.results.runs import read_run
from laddpo.settings.compose import read_config
from laddpo.storage import json_lines, manifests
from laddpo.storage.checkpoint import newest_checkpoint, step_folders
from laddpo.storage.reference_store import ReferenceStore
from laddpo.storage.seals import sealed_digests
from tests.faults.sealed import DAMAGES as WAYS
from tests.faults.sealed import KINDS as FOLDERS
from tests.faults.sealed import Command, Folders, Kind, damage_file, like, opened

DAMAGES = 1000
SUBSET = 60
KINDS = ("truncated", "flipped", "missing", "swapped")


@dataclass(frozen=True)
class Artifact:
    """Files that one reader vouches for. `twin` is another of the kind, whose files are whole and wrong here."""

    name: str
    folder: Path
    read: Callable[[Path], object]
    twin: Path
    may_miss: tuple[str, ...] = ()  # without this file the folder is nobody's, or an unfinished one


@pytest.fixture(scope="module")
def artifacts(bench) -> list[Artifact]:
    """What an undisturbed run left, and that of a run with another seed."""
    run, data = bench.done / "run", bench.done / "data"
    other = bench.new_folder()
    outcome = bench.run("train", other, overrides=["seed=7"])
    assert outcome.status == 0, outcome.log
    (prepared,), (other_prepared,) = (list((place / "data/prepared").iterdir()) for place in (bench.done, other))
    stores, other_stores = (sorted((place / "data/reference").iterdir()) for place in (bench.done, other))
    newest, older = step_folders(run / "checkpoints")[:2]
    assert len(stores) == len(other_stores) == 2 and data.exists()
    return [
        Artifact("prepared pairs", prepared, read_prepared, other_prepared),
        *[
            Artifact("reference store", store, read_store, twin, may_miss=(manifests.MANIFEST,))
            for store, twin in zip(stores, other_stores, strict=True)
        ],
        Artifact("checkpoint", newest, read_checkpoint, older),
        Artifact("adapter", run / "adapter", read_weights, other / "run" / "adapter"),
        Artifact(
            "adapter by path", run / "adapter_last", read_by_path, other / "run" / "adapter_last", (manifests.MANIFEST,)
        ),
        Artifact("finished run", run, read_finished, other / "run"),
        Artifact("run of a report", run, read_report, other / "run", may_miss=(manifests.MANIFEST,)),
        Artifact("log of a run", older, read_log, step_folders(other / "run" / "checkpoints")[0]),
    ]


def read_prepared(folder: Path) -> object:
    return len(PreparedPairs.load(folder))


def read_store(folder: Path) -> object:
    fields = json.loads((folder / "fields.json").read_bytes())
    return len(ReferenceStore(folder, fields))


def read_checkpoint(folder: Path) -> object:
    """As a resumed run does: a damaged newest one is set aside with a warning. Here that is an error."""
    with warnings_as_errors():
        return newest_checkpoint(folder.parent)


def read_weights(folder: Path) -> object:
    """As `run=` does."""
    if manifests.read_manifest(folder, "weights") is None:
        raise UserError(f"{folder}: no finished weights")
    return folder


class Stop(Exception):
    """The reader was about to use the content."""


class Model:
    def named_modules(self):
        raise Stop

    named_parameters = named_modules


def read_by_path(folder: Path) -> object:
    """As `adapter.path=` does."""
    with contextlib.suppress(Stop):
        adapters._read_adapter_config(folder, Model())
    with contextlib.suppress(Stop):
        adapters.load_adapter(Model(), folder)
    return folder


def read_finished(folder: Path) -> object:
    """As `resume=` on a finished run does, and every command with `run=`."""
    read_config(folder)
    if manifests.read_manifest(folder, "train") is None:
        raise UserError(f"{folder}: unfinished")
    return folder


def read_report(folder: Path) -> object:
    return read_run(folder)


def read_log(folder: Path) -> object:
    """metrics.jsonl (in the folder for this test) as a run that goes on from this checkpoint does."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        json_lines.JsonLines(folder / "metrics.jsonl").cut(json.loads((folder / "state.json").read_bytes())["metrics"])
    if "is missing" in out.getvalue():
        raise UserError(out.getvalue())
    return folder


@contextlib.contextmanager
def warnings_as_errors():
    class Raising(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            raise UserError(record.getMessage())

    handler = Raising(logging.WARNING)
    log = logging.getLogger("laddpo.storage.checkpoint")
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)


def files_of(artifact: Artifact) -> list[str]:
    """The files that the artifact consists of."""
    if artifact.name == "log of a run":
        return ["metrics.jsonl"]
    if artifact.name == "run of a report":
        return ["config.yaml", "metrics.jsonl", "evaluation/results.json"]
    manifest = json.loads((artifact.folder / manifests.MANIFEST).read_bytes())
    return [*manifest.get("files", manifest.get("shards", {})), manifests.MANIFEST]


def laid_out(artifact: Artifact, place: Path) -> Path:
    """A copy that may be damaged, in a folder of its own."""
    folder = place / artifact.folder.name
    if artifact.name == "checkpoint":
        shutil.copytree(artifact.twin, place / artifact.twin.name)
    if artifact.name in ("finished run", "run of a report"):
        ignored = shutil.ignore_patterns("checkpoints", "adapter*")
        shutil.copytree(artifact.folder, folder, ignore=ignored)
    else:
        shutil.copytree(artifact.folder, folder)
    if artifact.name == "log of a run":
        shutil.copy(artifact.folder.parents[1] / "metrics.jsonl", folder)
        cut = json.loads((folder / "state.json").read_bytes())["metrics"]["bytes"]
        content = (folder / "metrics.jsonl").read_bytes()
        (folder / "metrics.jsonl").write_bytes(content[:cut])
    if artifact.name == "reference store":
        fields = json.loads((folder / manifests.MANIFEST).read_bytes())["fields"]
        (folder / "fields.json").write_text(json.dumps(fields))
    return folder


def damage(artifact: Artifact, folder: Path, name: str, kind: str, draw: random.Random) -> bool:
    """Damage one file; False where that leaves the same bytes or what is legitimate."""
    path = folder / name
    content = path.read_bytes()
    if kind == "missing":
        path.unlink()
        return name not in artifact.may_miss
    if kind == "truncated":
        path.write_bytes(content[: draw.randrange(len(content))])
    elif kind == "flipped":
        changed = bytearray(content)
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
        path.write_bytes(changed)
    else:
        root = artifact.twin.parents[1] if artifact.name == "log of a run" else artifact.twin
        others = [root / name]
        if name not in artifact.may_miss:  # in its place a file without a seal is another program's
            others += [folder / other for other in files_of(artifact)]
        there = [other for other in others if other.exists() and other.read_bytes() != content]
        if not there:
            return False
        path.write_bytes(draw.choice(there).read_bytes())
    return path.read_bytes() != content


def damage_all(artifacts: list[Artifact], count: int, place: Path, line) -> None:
    """Undamaged artifacts are read; of `count` damages each must end in a `UserError`."""
    for number, artifact in enumerate(artifacts):
        artifact.read(laid_out(artifact, place / f"whole-{number}"))
    draw = random.Random(8)
    while line.faults < count:
        artifact, kind = draw.choice(artifacts), draw.choice(KINDS)
        name = draw.choice(files_of(artifact))
        here = place / f"{line.runs}"
        line.runs += 1
        folder = laid_out(artifact, here)
        if damage(artifact, folder, name, kind, draw):
            line.faults += 1
            where = f"{artifact.name}: {name} {kind}"
            try:
                artifact.read(folder)
                line.silent.append(f"{where}: read as if nothing had been")
            except UserError:
                pass
            except Exception as error:
                line.silent.append(f"{where}: unexplained {error!r}")
        shutil.rmtree(here)


@pytest.mark.faults
def test_a_thousand_damages_are_all_noticed(artifacts, tally, tmp_path):
    line = tally("truncated, bit flipped, swapped, missing", "all artifacts", "each ends in an explained error")
    damage_all(artifacts, DAMAGES, tmp_path, line)


def test_some_damages_are_noticed(artifacts, tally, tmp_path):
    damage_all(artifacts, SUBSET, tmp_path, tally("some of the damages", "all artifacts"))


BY_DESIGN = (  # (kind, command, file, damage), None for any: the command rightly finds this undone and does it again
    (None, None, manifests.MANIFEST, "deleted"),  # a folder without a manifest is unfinished, by definition
    # prepare reads the tokenizer alone, whose files are those that the other model's manifest seals, too
    (None, "prepare model=", manifests.MANIFEST, "swapped"),
    (None, None, "command.json", "deleted"),  # earlier versions wrote none: config.yaml and the jobs' own are compared
    ("unfinished evaluation", None, "items.jsonl", "deleted"),  # no answer is there yet
    ("unfinished evaluation", None, "items.jsonl", "truncated"),  # at the end of a line: it was stopped earlier
    ("unfinished samples", None, "answers.jsonl", "deleted"),
    ("unfinished samples", None, "answers.jsonl", "truncated"),
    ("sweep", "train -m resume=", "sweep.json", None),  # only written, from the jobs' folders
    ("sweep", "train -m resume=", "job.json", "deleted"),  # the job starts again, and says that its run is finished
    ("unfinished evaluation", "evaluate resume=", "config.yaml", None),  # only written
    # answers of another evaluation: those of other problems stay in the file and are in no result, the rest is compared
    ("unfinished evaluation", None, "items.jsonl", "swapped"),
    # a whole config.yaml of another unfinished folder: nothing binds it to this one, and going on compares its settings
    ("unfinished evaluation", "report run=", "config.yaml", "swapped"),
    ("unfinished run", "report run=", "config.yaml", "swapped"),
)
REPORTED = ("note: ", "checkpoint ", "is missing; going on without")  # beginnings of a line, or what a line holds
NOT_SEALED = {  # what these folders hold beside, and why no manifest names it
    "timing.jsonl": "clocks and memory; shown, and in no comparison",
    "events.out.tfevents": "TensorBoard's; only written",
    "samples/": "texts for people; only written",
    "plots/": "pictures; only written",
    ".png": "pictures; only written",
    ".lock": "who holds the folder",
    ".laddpo": "the kind of the folder; decides no value",
    "log.txt": "what a job printed; only written",
    "process.json": "a job's number while it runs",
    "multirun.yaml": "Hydra's record of a sweep; only written",
    "rounds.md": "the table of rounds.json for people; only written",
    "sweep.md": "the table of sweep.json for people; only written",
    "study.": "the page of a study; written from its arms each time",
    "examples_": "answers for people; only written",
}


@pytest.fixture(scope="module")
def folders(bench) -> Folders:
    return Folders(bench)


def verdict(folders: Folders, kind: Kind, command: Command, name: str, how: str, undone: list[str]) -> str:
    """What came of the command: refused, noted, made again, or what is wrong. `undone`: results that it never makes."""
    outcome = folders.command(command.stage, *command.overrides, stand_ins=command.stand_ins)
    named = name.rpartition("/")[2]
    lines = [line for line in outcome.log.splitlines() if named in line or Path(kind.folder, name).parent.name in line]
    if "Traceback" in outcome.log:
        return f"a traceback: {outcome.log[-600:]}"
    if outcome.status == 2:
        return "refused" if lines else f"refused without its name: {outcome.log[-300:]}"
    if outcome.status != 0:
        return f"exit code {outcome.status}: {outcome.log[-300:]}"
    asked = (kind.name, command.name, named, how)
    is_by_design = any(all(a in (b, None) for a, b in zip(row, asked, strict=True)) for row in BY_DESIGN)
    different = [result for result in folders.differing(kind) if result not in undone] if kind.same else []
    if different and not (is_by_design and different == [named]):
        return f"another result: {different}"
    if any(mark in line for mark in REPORTED for line in lines if named in line):
        return "noted"
    return "made again" if is_by_design else "silent"


def fill_row(folders: Folders, kind: Kind, command: Command, line, draw: random.Random, cells: int | None) -> None:
    """Damage each file that the command opens in each way, or only `cells` of these, before the command runs."""
    for name in kind.needs:
        folders.need(name)
    folders.put_back()
    folder = folders.place / kind.folder
    with opened(folder) as read:
        outcome = folders.command(command.stage, *command.overrides, stand_ins=command.stand_ins)
    undone = folders.differing(kind) if kind.same else []
    folders.put_back()
    line.runs += 1
    assert outcome.status == 0, f"{kind.name}: {command.name} on whole folders:\n{outcome.log}"
    files = kind.damaged_files(folders.place)
    assert files, f"{kind.name}: no file"
    row = [(name, how) for name in files if name in read for how in WAYS]
    came = dict.fromkeys(("refused", "noted", "made again"), 0)
    for name, how in row if cells is None else draw.sample(row, min(cells, len(row))):
        others = like(folder / name, name, folders.place / kind.twin)
        if damage_file(folder / name, how, others, draw):
            line.runs, line.faults = line.runs + 1, line.faults + 1
            found = verdict(folders, kind, command, name, how, undone)
            if found in came:
                came[found] += 1
            else:
                line.silent.append(f"{kind.name}: {name} {how} before {command.name}: {found}")
        folders.put_back()
    counts = ", ".join(f"{count} {name}" for name, count in came.items() if count)
    line.note = f"{sum(name in read for name in files)} of {len(files)} files read; {counts or 'none damaged'}"


@pytest.mark.faults
def test_every_damage_of_what_is_sealed_is_noticed_by_every_command_that_reads_it(folders, tally):
    draw = random.Random(63)
    for kind in FOLDERS:
        for command in kind.commands:
            fill_row(folders, kind, command, tally(f"damaged: {kind.name}", command.name), draw, None)


def test_some_damages_are_noticed_by_some_commands(folders, tally):
    draw = random.Random(64)
    for kind in draw.sample([kind for kind in FOLDERS if kind.name in CHEAP], 4):
        command = draw.choice(kind.commands)
        fill_row(folders, kind, command, tally(f"some damages: {kind.name}", command.name), draw, 2)


@pytest.mark.faults
def test_every_file_that_is_left_is_sealed_or_listed(folders):
    """A file of a finished folder that neither a manifest nor the file itself vouches for has a reason."""
    left = []
    for name in ("run", "sft", "full", "rounds", "evaluation", "export", "variance", "sweep", "study"):
        folders.need(name)
        top = folders.place / name
        for path in sorted(path for path in top.rglob("*") if path.is_file()):
            above = [folder for folder in path.parents if folder == top or top in folder.parents]
            is_sealed = any(path.relative_to(folder).as_posix() in sealed_digests(folder) for folder in above)
            text = path.relative_to(top).as_posix()
            if not is_sealed and path.name not in WITH_CHECKS and not any(part in text for part in NOT_SEALED):
                left.append(f"{name}/{text}")
    assert not left, "read unchecked, or useless"


WITH_CHECKS = (manifests.MANIFEST, "config.yaml", "command.json", "job.json", "pins.json", "sweep.json")
CHEAP = ("run of train", "adapter", "prepared", "reference", "unfinished run", "its checkpoints")  # of two runs
