"""Every setting is read or refused: each stage runs with its reads recorded, and the table must say the same."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

from laddpo.app import cli
from laddpo.mistakes import schema_types
from laddpo.read_settings import EVERYWHERE, matches, unread
from laddpo.settings import RunConfig
from laddpo.tuned import MAY_CHANGE
from tests.pipeline.conftest import SHAPE
from tests.recording import recorded
from tests.tiny import write_tiny_model

LOOK = ["evaluation.limit=1", "evaluation.gen_length=8", "evaluation.block_length=8", "evaluation.steps=1"]
DATA = ["data.max_length=512", "data.validation_fraction=0.25"]
PAIRS = [*DATA, "data.num_pairs=12"]
DRAWS = ["dpo.diffusion_samples=2", "evaluation.num_pairs=1", "evaluation.diffusion_samples=2"]
STEPS = ["optim.per_device_train_batch_size=2", "optim.num_warmup_steps=0", "evaluation.every_steps=1"]
TWO = "optim.max_train_steps=2"
TRAIN = [*LOOK, *PAIRS, *DRAWS, *STEPS]
ROWS = [*LOOK, *DATA, *DRAWS, *STEPS, TWO, "data=jsonl", "evaluation.tasks=[]"]
OWN = ["data=onpolicy", "data.sampling.num_questions=3", "data.sampling.samples=2", *DATA]
# By name: the stage and what it is given beside the tiny model. {name} is the folder of an earlier one.
VARIANTS: dict[str, tuple[str, list[str]]] = {
    "train": ("train", [*TRAIN, TWO]),
    "train, epochs": ("train", [*TRAIN, "optim.num_train_epochs=0.2", "quantization=nf4"]),
    "train, adapter.path": ("train", [*TRAIN, TWO, "adapter.path={train}/adapter"]),
    "train, full": ("train", [*TRAIN, TWO, "adapter=full"]),
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
    "prepare, file": ("prepare", [*PAIRS, "evaluation=file", "evaluation.dataset_name={questions}", "seed=1"]),
    "precompute": ("precompute", [*PAIRS, *DRAWS, "optim.per_device_train_batch_size=2", TWO]),
    "evaluate": ("evaluate", [*LOOK, "evaluation.tasks=[arithmetic]"]),
    "evaluate, file": ("evaluate", [*LOOK, "evaluation=file", "evaluation.dataset_name={questions}"]),
    "evaluate, run": ("evaluate", ["run={train}"]),
    "generate": ("generate", [*LOOK[1:], "prompt=hello"]),
    "generate, run": ("generate", ["run={train}", "prompt=hello"]),
    "variance, run": (
        "variance",
        ["run={train, rows}", "variance.pairs=2", "variance.gradient_pairs=2", "variance.evaluations=3",
         "variance.draws=[1]", "variance.settings=[naive]"],
    ),
    "export, run": ("export", ["run={train}"]),
    "export, adapter": ("export", ["adapter.path={train}/adapter", "export.adapter_only=true"]),
    "export, adapter merged": ("export", ["adapter.path={train}/adapter"]),
    "report, run": ("report", ["run={train}"]),
    "plan": ("plan", [*TRAIN[4:6], *DRAWS[:1], TWO]),
    "doctor": ("doctor", []),
}  # fmt: skip


class Lab:
    """Runs variants once each, below `folder`, and keeps what they read."""

    def __init__(self, folder: Path):
        self.folder, self.known = folder, {}
        self.model = write_tiny_model(folder / "tiny", SHAPE)
        rows = [{"prompt": f"q{i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(12)]
        self._write("rows", rows)
        self._write("questions", [{"prompt": "one?", "answer": "1"}, {"prompt": "two?", "answer": "2"}])

    def _write(self, name: str, rows: list[dict]) -> None:
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (self.folder / f"{name}.jsonl").write_text(text, encoding="utf-8")

    def place(self, name: str) -> str:
        return str(self.folder / (f"{name}.jsonl" if name in ("rows", "questions") else name.replace(", ", "-")))

    def reads(self, name: str) -> tuple[RunConfig, set[str]]:
        """(the settings, those that were read) of a variant."""
        if name in self.known:
            return self.known[name]
        stage, given = VARIANTS[name]
        for other in (*VARIANTS, "rows", "questions"):
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
            importlib.import_module(f"laddpo.{stage}").main(config, folder)

        with recorded(stage) as found:
            code = cli(stage, [*own, *places, *given], main)
        assert code == (1 if stage == "doctor" and code else 0)
        self.known[name] = (seen[0], found)
        return self.known[name]


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> Lab:
    return Lab(tmp_path_factory.mktemp("read_settings"))


# read through the settings that refer to them in conf/
REFERRED = ("rounds", "data.questions", "data.tasks", "model.recommended.")


@pytest.mark.parametrize("name", VARIANTS)
def test_a_stage_reads_what_the_table_lets_it_be_given_and_nothing_else(name, lab, monkeypatch):
    config, read = lab.reads(name)
    stage = VARIANTS[name][0]
    keys = {key for key in schema_types() if not matches(key, (*EVERYWHERE, *REFERRED))}
    if config.run is not None and stage in MAY_CHANGE:  # the rest is as the run has it
        keys = {key for key in keys if key.partition(".")[0] in (*MAY_CHANGE[stage], "run", "logger")}
    taken = {key for key in keys if unread(stage, key, config) is None}
    if "data.columns" in read:
        read |= {key for key in taken if key.startswith("data.columns.")}
    print(name, "ignored", sorted(taken - read), "refused", sorted((read & keys) - taken))
    ignored, refused = sorted(taken - read), sorted((read & keys) - taken)
    assert not ignored, f"{name}: these may be given and nothing reads them"
    assert not refused, f"{name}: these are read and refused; see laddpo/read_settings.py"
