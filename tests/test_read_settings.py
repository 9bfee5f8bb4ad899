"""Every setting is read or refused: each stage runs with its reads recorded, and the table must say the same."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from laddpo.cli.app import cli
from laddpo.hardware.planning import memory_setup
from laddpo.results import run_blocks
from laddpo.settings.checks import find_problems
from laddpo.settings.compose import compose
from laddpo.settings.data_checks import OF_EACH_PART
from laddpo.settings.mistakes import schema_types
from laddpo.settings.needs import NEEDS
from laddpo.settings.of_a_run import MAY_CHANGE
from laddpo.settings.read_settings import ADVICE, EVERYWHERE, READS, command_of, given_overrides, matches, unread
from laddpo.settings.schema import RunConfig
from tests.pipeline.conftest import SHAPE
from tests.recording import recorded
from tests.tiny import write_tiny_model

LOOK = [
    "evaluation.limit=1",
    "evaluation.gen_length=8",
    "evaluation.block_length=8",
    "evaluation.steps=1",
    "evaluation.confidence_threshold=null",
]
DATA = ["data.max_length=512", "data.validation_fraction=0.25"]
PAIRS = [*DATA, "data.num_pairs=12"]
DRAWS = ["dpo.diffusion_samples=2", "evaluation.num_pairs=1", "evaluation.diffusion_samples=2"]
STEPS = ["optim.per_device_train_batch_size=2", "optim.num_warmup_steps=0", "evaluation.every_steps=1"]
TWO = "optim.max_train_steps=2"
TRAIN = [*LOOK, *PAIRS, *DRAWS, *STEPS]
ROWS = [*LOOK, *DATA, *DRAWS, *STEPS, TWO, "data=jsonl", "evaluation.tasks=[]"]
OWN = ["data=onpolicy", "data.sampling.num_questions=2", "data.sampling.samples=2", *DATA, "evaluation.tasks=[]"]
# By name: the stage and what it is given beside the tiny model. {name} is the folder of an earlier one.
VARIANTS: dict[str, tuple[str, list[str]]] = {
    "train": ("train", [*TRAIN, TWO, "adapter.r=4", "adapter.lora_alpha=12"]),
    "train, epochs": (
        "train", [*TRAIN, "optim.num_train_epochs=0.2", "quantization=nf4", "optim.num_warmup_steps=9"]
    ),
    "train, adapter.path": ("train", [*TRAIN, TWO, "adapter.path={train}/adapter"]),
    "train, full": ("train", [*TRAIN, TWO, "adapter=full", "dpo.loss=simpo"]),
    "train, surprise": ("train", [*TRAIN, TWO, "dpo.focus=surprise", "evaluation.at_end=false"]),
    "train, rows": ("train", [*ROWS, "data.dataset_name={rows}", "quantization=int8", "best_metric=none"]),
    "sft, from scratch": (
        "sft",
        [*LOOK, *STEPS, TWO, DATA[0], "sft.num_examples=4", "adapter=full", "sft.from_scratch=true"],
    ),
    "sft, chosen": ("sft", [*TRAIN, TWO, "sft=control"]),
    "sft, chosen, one mask": (
        "sft",
        [*LOOK, *PAIRS, *STEPS, TWO, "sft=control", "sft.diffusion_samples=1", "evaluation.at_end=false"],
    ),
    "prepare": ("prepare", PAIRS),
    "prepare, rows": ("prepare", [*DATA, "seed=2", "data=jsonl", "data.dataset_name={rows}"]),
    "prepare, hh": ("prepare", [*DATA, "data=hh_rlhf", "data.dataset_name={dialogues}"]),
    "prepare, file": ("prepare", [*PAIRS, "evaluation=file", "evaluation.dataset_name={questions}", "seed=1"]),
    "prepare, own answers": ("prepare", OWN),
    "prepare, judged": (
        "prepare",
        [*OWN, "seed=3", "data.judge.kind=rule", "data.judge.rule=must_match", "data.judge.pattern=a"],
    ),
    "prepare, mixture": (
        "prepare",
        [*DATA, "data=mixture", "data.mixture=[{dataset_name: {rows}}, {source: arithmetic}]", "data.num_pairs=9"],
    ),
    "precompute": ("precompute", [*PAIRS, *DRAWS, "optim.per_device_train_batch_size=2", TWO]),
    "evaluate": ("evaluate", [*LOOK, "evaluation.tasks=[arithmetic]"]),
    "evaluate, file": ("evaluate", [*LOOK, "evaluation=file", "evaluation.dataset_name={questions}"]),
    "evaluate, run": ("evaluate", ["run={train}"]),
    "evaluate, winrate": (
        "evaluate",
        ["run={train}", "evaluation=winrate", *LOOK, "evaluation.judge.rule=must_match", "evaluation.judge.pattern=1"],
    ),
    "generate": ("generate", [*LOOK[1:], "prompt=hello"]),
    "generate, file": ("generate", [*LOOK[1:], "prompts={asked}"]),
    "generate, run": ("generate", ["run={train}", "prompt=hello"]),
    "chat": ("chat", [*LOOK[1:], "chat.turns=1"]),
    "chat, adapter.path": ("chat", [*LOOK[1:], "adapter.path={train}/adapter", "base=true"]),
    "chat, run": ("chat", ["run={train}"]),
    "variance": (
        "variance",
        [*PAIRS, "variance.pairs=3", "variance.gradient_pairs=2", "variance.evaluations=3", "variance.draws=[1]",
         "variance.token_pairs=1", "optim.per_device_train_batch_size=2", "dpo.diffusion_samples=2"],
    ),
    "variance, run": (
        "variance",
        ["run={train, rows}", "variance.pairs=2", "variance.gradient_pairs=2", "variance.evaluations=3",
         "variance.draws=[1]", "variance.settings=[naive]"],
    ),
    "export, run": ("export", ["run={train, adapter.path}"]),
    "export, adapter": ("export", ["adapter.path={train}/adapter", "export.adapter_only=true"]),
    "export, adapter merged": ("export", ["adapter.path={train}/adapter"]),
    "report, run": ("report", ["run={train}"]),
    "plan": ("plan", [*TRAIN[4:6], *DRAWS[:1], TWO]),
    "plan, surprise": ("plan", [*TRAIN[4:6], *DRAWS[:1], TWO, "dpo.focus=surprise"]),
    "doctor": ("doctor", []),
}  # fmt: skip

FILES = ("rows", "questions", "asked", "dialogues")


class Lab:
    """Runs variants once each, below `folder`, and keeps what they read."""

    def __init__(self, folder: Path):
        self.folder, self.known, self.said = folder, {}, {}
        self.model = write_tiny_model(folder / "tiny", SHAPE)
        rows = [{"prompt": f"q{i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(12)]
        self._write("rows", rows)
        self._write("questions", [{"prompt": "one?", "answer": "1"}, {"prompt": "two?", "answer": "2"}])
        self._write("asked", [{"prompt": "one?"}])
        said = "\n\nHuman: q{}\n\nAssistant: "
        self._write(
            "dialogues", [{side: f"{said.format(i)}{side} {i}" for side in ("chosen", "rejected")} for i in range(12)]
        )

    def _write(self, name: str, rows: list[dict]) -> None:
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (self.folder / f"{name}.jsonl").write_text(text, encoding="utf-8")

    def place(self, name: str) -> str:
        return str(self.folder / (f"{name}.jsonl" if name in FILES else name.replace(", ", "-")))

    def reads(self, name: str) -> tuple[RunConfig, set[str]]:
        """(the settings, those that were read) of a variant."""
        if name in self.known:
            return self.known[name]
        stage, given = VARIANTS[name]
        for other in (*VARIANTS, *FILES):
            if any(f"{{{other}}}" in text for text in given):
                if other in VARIANTS:
                    self.reads(other)
                given = [text.replace(f"{{{other}}}", self.place(other)) for text in given]
        shape = [f"model.shape.{size}={value}" for size, value in SHAPE.items()]
        model = [f"model.model_name_or_path={self.model}", *shape, "logger=none"]
        own = [] if any(text.startswith("run=") for text in given) else model
        places = [f"paths.data_dir={self.folder / 'data'}", f"output_dir={self.place(name)}", "hardware.device=cpu"]
        seen: list[RunConfig] = []

        def main(config: RunConfig, folder: Path) -> None:
            seen.append(config)
            sys.stdin = io.StringIO("hello\n")
            importlib.import_module(f"laddpo.{stage}").main(config, folder)

        said = io.StringIO()
        with recorded(stage) as found, contextlib.redirect_stderr(said):
            code = cli(stage, [*own, *places, *given], main)
        self.said[name] = said.getvalue()
        is_expected = stage == "doctor" or "gave no pair" in self.said[name]  # a random model is right about nothing
        assert code == 0 or is_expected, self.said[name]
        self.known[name] = (seen[0], found)
        return self.known[name]


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> Iterator[Lab]:
    """Pictures read no settings, and take most of the time of stages as small as these."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", None)  # chat is given one of its own
        patch.setattr(run_blocks, "panel_plots", lambda *arguments, **options: [])
        yield Lab(tmp_path_factory.mktemp("read_settings"))


# read through the settings that refer to them in conf/
REFERRED = ("rounds", "data.questions", "data.tasks", "model.recommended.")


# handed to loaders, which look at it for models of the hub alone; all models here are local folders
ALONE = {"model.revision"}
# kept with what was asked, also beside a threshold that takes its place
KEPT = {"evaluation.steps", "data.sampling.steps"}
# what code shared with train asks for; sft itself refuses them where a yaml file sets them
CHECKED = {"sft": {"dry_run", "data.rounds"}, "variance": {"dpo.mask_rounds"}}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_stage_reads_what_the_table_lets_it_be_given_and_nothing_else(name, lab):
    config, read = lab.reads(name)
    stage = VARIANTS[name][0]
    keys = {key for key in schema_types() if not matches(key, (*EVERYWHERE, *REFERRED))}
    if config.run is not None and stage in MAY_CHANGE:  # the rest is as the run has it
        keys = {key for key in keys if key.partition(".")[0] in (*MAY_CHANGE[stage], "run", "logger")}
    taken = {key for key in keys if unread(stage, key, config) is None}
    if "data.columns" in read:
        read |= {key for key in taken if key.startswith("data.columns.")}
    read -= CHECKED.get(stage, set()) | ALONE
    if config.data.source == "mixture":  # these were asked of its parts
        read -= {f"data.{part}" for part in OF_EACH_PART}
    ignored, refused = sorted(taken - read), sorted((read & keys) - taken - KEPT)
    assert not ignored, f"{name}: these may be given and nothing reads them"
    assert not refused, f"{name}: these are read and refused; see laddpo/settings/read_settings.py"


def test_every_setting_is_read_by_some_stage():
    """A new setting needs a reader; what stands in its group's row must be read by every stage of that row (above)."""
    listed = [key for key in schema_types() if any(matches(key, patterns) for patterns in READS.values())]
    nowhere = {key for key in schema_types() if not matches(key, (*EVERYWHERE, *REFERRED))} - set(listed)
    assert nowhere == {"data.length_quantiles.p50", "data.length_quantiles.p90"}, "shown beside the others, never used"


def test_rows_of_the_table_name_settings():
    keys = list(schema_types())
    patterns = [text for row in READS.values() for text in row] + [text for need in NEEDS for text in need.keys]
    for text in (*patterns, *EVERYWHERE, *ADVICE):
        assert any(matches(key, (text.removeprefix("-"),)) for key in keys), text


def test_what_the_recorder_sees_are_uses_and_no_copies():
    config = compose(["dpo.beta=0.7"])

    def looks(config: RunConfig) -> float:
        dataclasses.asdict(config)
        copy.deepcopy(config)
        find_problems(config)
        return dataclasses.replace(config, seed=1).optim.eps

    looks.__globals__["__name__"] = "laddpo.any"  # this module is taken for a stage
    try:
        with recorded("train") as found:
            looks(config)
    finally:
        looks.__globals__["__name__"] = __name__
    assert found == {"optim.eps"}


def test_the_card_and_the_plan_state_what_the_adapter_really_has(lab):
    """Adapters of rank 4, where the settings beside adapter.path say 16."""
    for name in ("export, run", "export, adapter merged"):
        lab.reads(name)
        card = (Path(lab.place(name)) / "README.md").read_text(encoding="utf-8")
        assert "  r: 4\n" in card and "  lora_alpha: 12" in card, name
    assert "How it was trained is not recorded" in card and "beta:" not in card and "arithmetic" not in card
    config, _ = lab.reads("train, adapter.path")
    assert config.adapter.r == 16 and memory_setup(config, "cpu", "fp32").rank == 4


def test_a_warm_up_longer_than_the_epochs_is_noted_once_they_are_counted(lab):
    lab.reads("train, epochs")
    assert "note: optim.num_train_epochs=0.2 are 1 steps on these rows, which end within" in lab.said["train, epochs"]
    lab.reads("train")
    assert "warm-up" not in lab.said["train"]


REFUSED = [
    ("prepare", ["dpo.beta=0.3"], "dpo.beta=0.3: prepare does not read it; train, sft, variance do; leave it out."),
    ("train", ["adapter.path=a", "adapter.r=4", "adapter.lora_alpha=2"], "adapter.lora_alpha=2.0, adapter.r=4: only a"),
    ("train", ["adapter=full", "adapter.use_dora=true"], "adapter.use_dora=true: only a new LoRA adapter reads it"),
    ("train", ["optim.round_decay=0.5"], "data=onpolicy rounds=3"),
    ("train", ["logger.wandb_name=x"], "logger=wandb"),
    ("train", ["logger.project=x"], "logger.trackers"),
    ("sft", ["data=jsonl", "data.min_gap=1"], "sft.examples=chosen"),
    ("train", ["data.pairs_from=best_worst"], "data=jsonl"),
    ("train", ["quantization.llm_int8_threshold=3"], "quantization=int8"),
    ("train", ["evaluation.dataset_name=x.jsonl"], "evaluation.tasks has none that reads a file"),
    ("train", ["model.recommended.learning_rate.full=1e-5"], "train does not read it"),
    ("train", ["data=onpolicy", "data.operand_max=9", "data.problems=word_problems", "evaluation.tasks=[]"], "none is"),
    ("sft", ["sft=control", "dry_run=true"], "set optim.max_train_steps=2 for a run of two steps"),
    ("sft", ["sft=control", "data=onpolicy", "rounds=2"], "sft does not read it; train does"),
    ("sft", ["sft=control", "sft.num_examples=7"], "a generated corpus"),
    ("sft", ["data.random_sample_size=7"], "a generated corpus does not read it"),
    ("evaluate", ["evaluation.every_steps=3"], "train, sft do"),
    ("evaluate", ["evaluation.num_pairs=3"], "only of a run"),
    ("export", ["adapter.path=a", "export.private=false"], "export.push_to_hub"),
    ("train", ["model.revision=main"], "only a model of the hub has revisions"),
    ("prepare", ["data=jsonl", "data.dataset_name=a.jsonl", "data.revision=main"], "only a dataset of the hub has"),
    ("plan", ["data.length_quantiles.p50=9"], "plan does not read it; leave it out."),
    ("benchmark", ["benchmark.nano_steps=3"], "only by the part nano of benchmark.parts"),
    (
        "prepare",
        ["-m", "dpo.beta=1,2", "output_dir=s"],
        "dpo.beta=1.0: prepare does not read it; train, sft, variance do; leave",
    ),
    ("report", ["--cfg", "job", "dpo.beta=1"], "report does not read it"),
]


@pytest.mark.parametrize(("stage", "given", "said"), REFUSED, ids=[" ".join([s, *g]) for s, g, _ in REFUSED])
def test_a_named_setting_that_the_stage_does_not_read_is_refused_by_name(
    stage, given, said, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert cli(stage, given, lambda config, folder: pytest.fail("ran")) == 2
    assert said in capsys.readouterr().err and list(tmp_path.iterdir()) == []


TAKEN = [
    ("prepare", ["dpo=ipo", "optim=muon", "logger=wandb", "experiment=laddpo_hh"]),  # groups
    ("prepare", ["run=null", "verify=false", "runs=[]", "logger.wandb=false", "evaluation.shots=0"]),  # off
    ("prepare", ["seed=1", "hardware.threads=1", "model.shape.n_layers=3", "paths.data_dir=d", "auto=false"]),
    ("train", ["data=onpolicy", "rounds=2", "optim.round_decay=0.5", "data.questions=q.jsonl", "data.tasks=[]"]),
    ("train", ["model.recommended.beta=0.4", "model.recommended.learning_rate.lora=1e-4", "evaluation.limit=10"]),
    ("precompute", ["dpo.diffusion_samples=8", "data.max_length=300"]),
    ("evaluate", ["evaluation=gsm8k", "evaluation.limit=200"]),
    ("prepare", ["model=llada_8b", "data=hh_rlhf", "data.revision=main", "model.revision=main"]),
]


@pytest.mark.parametrize(("stage", "given"), TAKEN, ids=[" ".join([s, *g]) for s, g in TAKEN])
def test_groups_and_what_is_off_or_holds_everywhere_are_taken(stage, given, capsys):
    ran = []
    assert cli(stage, given, lambda config, folder: ran.append(config)) == 0, capsys.readouterr().err
    assert ran


def test_beside_a_run_too_a_setting_that_is_never_looked_at_is_refused(lab, capsys):
    lab.reads("train")
    for stage, given in (
        ("evaluate", "evaluation.samples=3"),
        ("generate", "logger.wandb=true"),
    ):
        place = [f"run={lab.place('train')}", *(["prompt=a"] if stage == "generate" else [])]
        assert cli(stage, [*place, given], lambda config, folder: pytest.fail("ran")) == 2
        assert f"{given}: {stage} does not read it" in capsys.readouterr().err


def test_a_command_that_another_one_names_has_only_what_that_one_reads():
    given_overrides.set(
        ("data=jsonl", "data.dataset_name=a b.jsonl", "dpo.beta=1", "seed=3", "output_dir=x", "rounds=2")
    )
    try:
        assert command_of("prepare") == "python -m laddpo.prepare data=jsonl 'data.dataset_name=a b.jsonl' seed=3"
    finally:
        given_overrides.set(())
