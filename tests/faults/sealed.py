"""Every kind of folder that this program seals or continues, the commands that read it, and ways to damage its files.

Folders are made once, by the stages themselves, in a work folder that the commands run in. A cell of the table is one
damage of one file before one command. inotify tells which files a command opens, whatever library opens them.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import random
import shutil
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from laddpo.settings.read_settings import stage_reads
from laddpo.storage import manifests
from laddpo.storage.seals import CheckedLines
from tests.faults.bench import Bench, Outcome
from tests.faults.parent import BARE

DAMAGES = ("flipped", "truncated", "swapped", "deleted")
OUT = "output_dir=out/new"
PLACES = (BARE, "paths.data_dir=data", "hardware.device=cpu")


@dataclass(frozen=True)
class Command:
    """`stage` with `overrides`, which name OUT as a new folder. `stand_ins`: see `install`."""

    name: str
    stage: str
    overrides: Sequence[str]
    stand_ins: Sequence[str] = ()


@dataclass(frozen=True)
class Kind:
    """A folder, or a folder of several. `twin`: another of the kind, whose files are swapped in. `needs`: folders
    of MAKERS that it takes. `files`: those that carry checks of their own; else all that its manifests seal.
    `same`: files that are then equal to those of this folder, whatever was damaged and made again."""

    name: str
    folder: str
    twin: str
    commands: Sequence[Command]
    needs: Sequence[str] = ()
    files: Sequence[str] = ()
    same: str = ""

    def damaged_files(self, place: Path) -> list[str]:
        """Every file that may be damaged, by its path in the folder."""
        folder = place / self.folder
        if self.files:
            return [path.relative_to(folder).as_posix() for name in self.files for path in sorted(folder.glob(name))]
        manifest_files = [folder / manifests.MANIFEST]
        manifest_files = (
            manifest_files if manifest_files[0].exists() else sorted(folder.glob(f"*/{manifests.MANIFEST}"))
        )
        found = []
        for path in manifest_files:
            content = json.loads(path.read_bytes())
            within = path.parent.relative_to(folder)
            found += [(within / name).as_posix() for name in content.get("files", content.get("shards"))]
            found.append((within / path.name).as_posix())
        return found


VARIANCE = (
    *("variance.pairs=2", "variance.gradient_pairs=2", "variance.evaluations=3", "variance.draws=[1]"),
    *("variance.settings=[naive]", "variance.token_pairs=0"),
)
KEPT = ("best_metric=none", "stopping.patience=null")
FULL = ("adapter=full", *KEPT)
SFT = ("sft.examples=chosen", "sft.diffusion_samples=null", *KEPT)
ROUNDS = (
    "data=onpolicy",
    "paths.data_dir=round_data",
    "rounds=2",
    "data.sampling.num_questions=8",
    *KEPT,
)
ROUNDS += ("data.sampling.samples=4", "data.sampling.gen_length=4", "data.sampling.block_length=4")
ROUNDS += ("data.sampling.steps=4", "data.sampling.confidence_threshold=null", "data.sampling.temperature=1")
SWEEP = ("-m", "seed=42,7", *KEPT, "output_dir=sweep", "resume=true")
ARMS = "study.arms=[{name: default}, {name: other, overrides: ['dpo.loss=ipo']}]"
STUDY = (BARE, ARMS, "study.name=two", "study.seeds=[42]", "output_dir=study", "resume=true")


def on(run: str, *stages: str, data: str = "data", stand_ins: Sequence[str] = ()) -> list[Command]:
    """The commands that look at a finished run."""
    more = {
        "evaluate": [f"paths.data_dir={data}", "hardware.device=cpu"],
        "generate": ["prompt=one", "hardware.device=cpu"],
        "variance": [*VARIANCE, f"paths.data_dir={data}", "hardware.device=cpu"],
        "export": [],
        "report": [],
    }
    return [Command(f"{stage} run=", stage, [BARE, f"run={run}", OUT, *more[stage]], stand_ins) for stage in stages]


def again(stage: str, folder: str, *more: str, stand_ins: Sequence[str] = ()) -> Command:
    return Command(f"{stage} resume=", stage, [*more, f"output_dir={folder}", "resume=true"], stand_ins)


def resumed_and_read(stage: str, run: str, *more: str) -> list[Command]:
    return [again(stage, run, *more), *on(run, "evaluate", "generate", "export", "report")]


def evaluated(folder: str) -> list[Command]:
    """The command of an evaluation once more, and a report of it."""
    (command,) = on(RUN, "evaluate")
    settings = [text for text in command.overrides if text != OUT]
    resumed = Command("evaluate resume=", "evaluate", [*settings, f"output_dir={folder}", "resume=true"])
    return [resumed, *on(folder, "report")]


def by_path(adapter: str) -> list[Command]:
    at, short = [f"adapter.path={adapter}", OUT], ["optim.max_train_steps=1", "evaluation.at_end=false"]
    return [
        Command("train adapter.path=", "train", [*at, *short]),
        Command("generate adapter.path=", "generate", [*at, "prompt=one"]),
        Command("export adapter.path=", "export", at),
    ]


def as_base(model: str) -> list[Command]:
    at, short = f"model.model_name_or_path={model}", ["optim.max_train_steps=1", "evaluation.at_end=false"]
    return [
        Command("generate model=", "generate", [at, OUT, "prompt=one"]),
        Command("train model=", "train", [at, OUT, *short]),
        Command("prepare model=", "prepare", [at]),
    ]


RUN, OTHER = "run", "other"
READERS = [again("train", RUN, *KEPT), *on(RUN, "evaluate", "generate", "variance", "export", "report")]
STORED = [Command("precompute", "precompute", []), Command("train", "train", [OUT]), *on(RUN, "evaluate")]
GO_ON = [again("train", "unfinished", *KEPT), *on("unfinished", "report")]
RESUME_FULL = again("train", "full", *FULL)
GO_ON_ROUNDS = again("train", "gathered", *ROUNDS, stand_ins=["any_grader"])
ASKED = [text for text in ROUNDS if stage_reads("prepare", text)]
SAMPLE = Command("prepare data=onpolicy", "prepare", ASKED, ["any_grader"])
SAMPLE_REST = Command(SAMPLE.name, "prepare", [*SAMPLE.overrides, "paths.data_dir=half_data"], ["any_grader"])
RESUME_SWEEP = Command("train -m resume=", "train", SWEEP, ["jobs"])
RESUME_STUDY = Command("study resume=", "study", STUDY, ["jobs"])
PREPARED = [Command("prepare", "prepare", []), Command("plan", "plan", []), *STORED]
UNFINISHED = ("unfinished", OTHER)
SWEEP_FILES = ("command.json", "sweep.json", "*/job.json")
KINDS = [
    Kind("run of train", RUN, OTHER, READERS, [RUN, OTHER]),
    Kind("adapter", "run/adapter", "other/adapter", [*READERS, *by_path("run/adapter")], [RUN, OTHER]),
    Kind("prepared", "data/prepared", "other_data/prepared", PREPARED, [RUN, OTHER]),
    Kind("reference", "data/reference", "other_data/reference", STORED, [RUN, OTHER]),
    Kind("unfinished run", "unfinished", OTHER, GO_ON, UNFINISHED, ["config.yaml", "metrics.jsonl"]),
    Kind("its checkpoints", "unfinished/checkpoints", "other/checkpoints", GO_ON, UNFINISHED),
    Kind("its adapter", "unfinished/adapter", "other/adapter", GO_ON, UNFINISHED),
    Kind("run of sft", "sft", OTHER, resumed_and_read("sft", "sft", *SFT), ["sft", OTHER]),
    Kind("its adapter", "sft/adapter", "other/adapter", resumed_and_read("sft", "sft", *SFT), ["sft", OTHER]),
    Kind("full fine-tuning", "full", OTHER, resumed_and_read("train", "full", *FULL), ["full", OTHER]),
    Kind(
        "its model folder",
        "full/model",
        "full_other/model",
        [*resumed_and_read("train", "full", *FULL), *as_base("full/model")],
        ["full", "full_other"],
    ),
    Kind("full run of sft", "sft_full", OTHER, resumed_and_read("sft", "sft_full", *SFT, *FULL), ["sft_full", OTHER]),
    Kind("export", "export", "full_other/model", as_base("export"), ["export", "full_other"]),
    Kind("exported adapter", "export_adapter", "other/adapter", by_path("export_adapter"), ["export_adapter", OTHER]),
    Kind("evaluation", "evaluation", "evaluation_other", evaluated("evaluation"), ["evaluation", "evaluation_other"]),
    Kind(
        "unfinished evaluation",
        "half",
        "evaluation_other",
        evaluated("half"),
        ["half", "evaluation_other"],
        ["config.yaml", "items.jsonl"],
        same="evaluation",
    ),
    Kind(
        "run of rounds",
        "rounds",
        OTHER,
        [
            again("train", "rounds", *ROUNDS, stand_ins=["any_grader"]),
            *on("rounds", "evaluate", "generate", "export", "report", data="round_data", stand_ins=["any_grader"]),
        ],
        ["rounds", OTHER],
    ),
    Kind("round to be gathered", "gathered/round_1", "rounds/round_2", [GO_ON_ROUNDS], ["gathered"]),
    Kind("its adapter", "gathered/round_1/adapter", "other/adapter", [GO_ON_ROUNDS], ["gathered", OTHER]),
    Kind("last round's adapter", "gathered/round_2/adapter", "other/adapter", [GO_ON_ROUNDS], ["gathered", OTHER]),
    Kind("samples", "round_data/samples", "half_data/samples", [SAMPLE, GO_ON_ROUNDS], ["gathered", "half_data"]),
    Kind(
        "unfinished samples",
        "half_data/samples",
        "round_data/samples",
        [SAMPLE_REST],
        ["half_data"],
        ["*/parts/*/answers.jsonl"],
        same="round_data/samples",
    ),
    Kind("sweep", "sweep", RUN, [RESUME_SWEEP, *on("sweep", "report")], ["sweep"], SWEEP_FILES),
    Kind("job of a sweep", "sweep/0", OTHER, [RESUME_SWEEP, *on("sweep", "report")], ["sweep"]),
    Kind("study", "study", RUN, [RESUME_STUDY], ["study"], ["command.json", "*/job.json"]),
    Kind("arm of a study", "study/default-42", OTHER, [RESUME_STUDY, *on("study/default-42", "report")], ["study"]),
    Kind("variance", "variance", OTHER, on("variance", "report"), ["variance", OTHER]),
]


def install(names: Sequence[str]) -> None:
    """What a child replaces before its stage runs. any_grader: answers are numbers, of which half are right,
    though the model is random. jobs: a job of a sweep or study is a copy of a finished run instead of a process."""
    if "any_grader" in names:
        from laddpo.problems.grading import FunctionGrader
        from laddpo.training import on_policy

        half = FunctionGrader("half of all", lambda text, answer: zlib.crc32(text.encode()) % 2 == 0)
        on_policy.pair_grader = lambda config, questions: half
        on_policy._sampler = lambda config, questions: _answers
    if "jobs" in names:
        from laddpo.jobs import runner

        runner.run_child = _copy_a_run


def _answers(prompts: Sequence, keys: Sequence[str]) -> list[str]:
    """In the place of a random model's, which are no text to learn from."""
    return [f"answer {zlib.crc32(key.encode()) % 900 + 100}" for key in keys]


def _copy_a_run(command: Sequence[str], folder: Path, log: Path | None = None) -> int:
    source = {"0": "run", "1": "other", "default-42": "run", "other-42": "other"}[folder.name]
    shutil.copytree(source, folder, dirs_exist_ok=True)
    return 0


class Folders:
    """The work folder `place`: each of its folders is made when it is first asked for, and can be put back."""

    def __init__(self, bench: Bench):
        self.bench = bench
        self.place = bench.new_folder()
        self.kept = bench.new_folder()
        self.made: set[str] = set()

    def command(self, stage: str, *overrides: str, stand_ins: Sequence[str] = ()) -> Outcome:
        return self.bench.run(stage, self.place, overrides=list(overrides), stand_ins=list(stand_ins), limit=250)

    def need(self, name: str) -> None:
        """Make the folder and all that it is made of, once."""
        if name in self.made:
            return
        self.made.add(name)
        MAKERS[name](self)
        for path in self.place.iterdir():
            target = self.kept / path.name
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(path, target)

    def do(self, stage: str, *overrides: str, stand_ins: Sequence[str] = ()) -> None:
        outcome = self.command(stage, *overrides, stand_ins=stand_ins)
        assert outcome.status == 0, f"{stage} {' '.join(overrides)}:\n{outcome.log}"

    def differing(self, kind: Kind) -> list[str]:
        """Results of the kind's folder that are not those of the folder that was never stopped or damaged."""
        wanted, found = self.kept / kind.same, self.place / kind.folder
        names = [path.relative_to(wanted) for path in sorted(wanted.rglob("*.json*")) if path.name in RESULTS]
        assert names, f"{wanted} holds no result"
        return [name.as_posix() for name in names if not _equal(wanted / name, found / name)]

    def put_back(self) -> None:
        """Undo what a command did to the folders; those that it made go."""
        for path in self.place.iterdir():
            shutil.rmtree(path)
        for path in self.kept.iterdir():
            shutil.copytree(path, self.place / path.name)


def _train(name: str, *more: str, stage: str = "train") -> Callable[[Folders], None]:
    return lambda folders: folders.do(stage, f"output_dir={name}", *more)


def _make_unfinished(folders: Folders) -> None:
    folders.need("run")
    shutil.copytree(folders.place / "run", folders.place / "unfinished")
    (folders.place / "unfinished" / manifests.MANIFEST).unlink()
    shutil.rmtree(folders.place / "unfinished" / "evaluation")


def _make_half(folders: Folders) -> None:
    """As an evaluation that was stopped before its last answer leaves it."""
    folders.need("evaluation")
    half = folders.place / "half"
    shutil.copytree(folders.place / "evaluation", half)
    for name in (manifests.MANIFEST, "results.json"):
        (half / name).unlink()
    log = CheckedLines(half / "items.jsonl")
    log.protect()
    records = log.read()
    log.rewind(lambda record: record["id"] != records[-1]["id"] or record["model"] != "tuned")


def _make_half_data(folders: Folders) -> None:
    """As a sampling that was stopped before its last question leaves it."""
    folders.need("rounds")
    shutil.copytree(folders.place / "round_data" / "samples", folders.place / "half_data" / "samples")
    for samples in sorted(folders.place.glob("half_data/samples/*")):
        rows = [json.loads(line) for line in (samples / "samples.jsonl").read_text().splitlines()]
        log = CheckedLines(samples / "parts" / "0-of-1" / "answers.jsonl")
        for row in rows[:-1]:
            log.append({"question": row["question"], "answers": row["answers"]})
        for name in (manifests.MANIFEST, "samples.jsonl"):
            (samples / name).unlink()


def _make_gathered(folders: Folders) -> None:
    """As rounds that were stopped between the last one and the comparison leave them."""
    folders.need("rounds")
    shutil.copytree(folders.place / "rounds", folders.place / "gathered")
    (folders.place / "gathered" / manifests.MANIFEST).unlink()


def _evaluate(run: str, name: str) -> Callable[[Folders], None]:
    def make(folders: Folders) -> None:
        folders.need(run)
        folders.do("evaluate", *PLACES, f"run={run}", f"output_dir={name}")

    return make


def _of_run(stage: str, name: str, *more: str) -> Callable[[Folders], None]:
    def make(folders: Folders) -> None:
        folders.need("run")
        folders.do(stage, *PLACES, "run=run", f"output_dir={name}", *more)

    return make


def _with_jobs(stage: str, overrides: Sequence[str]) -> Callable[[Folders], None]:
    def make(folders: Folders) -> None:
        folders.need("run"), folders.need("other")
        folders.do(stage, *overrides, stand_ins=["jobs"])

    return make


MAKERS: dict[str, Callable[[Folders], None]] = {
    "run": _train("run", *KEPT),
    "other": _train("other", *KEPT, "seed=7", "paths.data_dir=other_data"),
    "unfinished": _make_unfinished,
    "sft": _train("sft", *SFT, stage="sft"),
    "sft_full": _train("sft_full", *SFT, *FULL, stage="sft"),
    "full": _train("full", *FULL),
    "full_other": _train("full_other", *FULL, "seed=7", "evaluation.at_end=false"),
    "export": _of_run("export", "export"),
    "export_adapter": _of_run("export", "export_adapter", "export.adapter_only=true"),
    "evaluation": _evaluate("run", "evaluation"),
    "evaluation_other": _evaluate("other", "evaluation_other"),
    "half": _make_half,
    "rounds": lambda folders: folders.do("train", *ROUNDS, "output_dir=rounds", stand_ins=["any_grader"]),
    "gathered": _make_gathered,
    "half_data": _make_half_data,
    "sweep": _with_jobs("train", SWEEP),
    "study": _with_jobs("study", STUDY),
    "variance": _of_run("variance", "variance", *VARIANCE),
}


@contextmanager
def opened(folder: Path) -> Iterator[set[str]]:
    """Files below `folder` that anybody opens inside the block, by their path in it."""
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.inotify_init1(os.O_NONBLOCK)
    assert fd >= 0, "no inotify"
    watched = {
        libc.inotify_add_watch(fd, os.fsencode(place), IN_OPEN): place
        for place in [folder, *(path for path in folder.rglob("*") if path.is_dir())]
    }
    found: set[str] = set()
    try:
        yield found
        with contextlib.suppress(BlockingIOError):
            while events := os.read(fd, 1 << 20):
                at = 0
                while at < len(events):
                    watch, mask, _, length = struct.unpack_from("iIII", events, at)
                    name = events[at + 16 : at + 16 + length].rstrip(b"\0").decode()
                    if name and not mask & IN_ISDIR and watch in watched:
                        found.add((watched[watch] / name).relative_to(folder).as_posix())
                    at += 16 + length
    finally:
        os.close(fd)


def damage_file(path: Path, how: str, others: Sequence[Path], draw: random.Random) -> bool:
    """Damage a file; False if that would leave the same bytes. A flipped bit keeps the file's size and times."""
    content, stat = path.read_bytes(), path.stat()
    if how == "deleted":
        path.unlink()
        return True
    changed = content
    if how == "truncated":
        changed = content[: draw.randrange(max(1, len(content)))]
    elif how == "flipped":
        place = draw.randrange(len(content))
        changed = content[:place] + bytes([content[place] ^ 1 << draw.randrange(8)]) + content[place + 1 :]
    else:
        different = [data for other in others if (data := other.read_bytes()) != content]
        changed = draw.choice(different) if different else content
    path.write_bytes(changed)
    if how == "flipped":
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    return changed != content


def like(path: Path, name: str, twin: Path) -> list[Path]:
    """Whole files of the kind of `path` (`name` in its folder): that of the twin, else others of its type."""
    if (twin / name).is_file():
        return [twin / name]
    return [other for place in (twin, path.parent) for other in sorted(place.rglob(f"*{path.suffix}")) if other != path]


def _equal(path: Path, other: Path) -> bool:
    return other.is_file() and path.read_bytes() == other.read_bytes()


RESULTS = ("results.json", "items.jsonl", "pairs.jsonl", "samples.jsonl")
IN_OPEN, IN_ISDIR = 0x20, 0x40000000
