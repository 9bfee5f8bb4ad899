"""Answers of a model before training, kept for all runs that start from it.

The jobs of a sweep, the arms of a study and the stages of one run ask the same model the same questions. Its answers
lie in `data/answers/<key>.jsonl`: one object for each item, each line with a check. The key has all that an answer
depends on, rounding included: so also the kind of machine, and which other questions stand in the same batch. Each run
grades them itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from laddpo.core.budget import TokenBudget
from laddpo.errors import UserError, visible
from laddpo.evaluation.answering import Answerer
from laddpo.evaluation.run_task import Answer
from laddpo.settings.schema import QuantizationSettings
from laddpo.storage import atomic
from laddpo.storage.manifests import fingerprint
from laddpo.storage.seals import CheckedLines

FORMAT = 1  # raise it when the sampler or a model gives other answers under the same settings


@dataclasses.dataclass(frozen=True)
class BaseAnswers:
    """The answers of one model, asked in one way. `fields`: what they depend on beside the questions. `budget`: of the
    tokens that are answered together."""

    folder: Path
    fields: Mapping[str, Any]
    budget: TokenBudget

    @property
    def may_keep(self) -> bool:
        """False once memory has run out: the answers may then depend, by rounding, on when it did."""
        return not self.budget.retries

    def read(self, prints: Mapping[str, str]) -> dict[str, Answer]:
        """The stored answers, by item id. `prints`: a fingerprint of each item. A damaged line is left out. If the file
        cannot be read, a note says so."""
        try:
            lines = CheckedLines(self._file(prints)).read()
        except OSError as error:
            print(visible(f"note: kept answers of the base cannot be read; it is asked again. {error}"))
            return {}
        return {
            line["id"]: Answer(line["text"], line["tokens"], line["stopped"])
            for line in lines
            if line.keys() >= {"id", "print", "text", "tokens", "stopped"} and line["print"] == prints.get(line["id"])
        }

    def keep(self, prints: Mapping[str, str], answers: Mapping[str, Answer]) -> None:
        """Store the answers to all items at once. Two runs may do this at the same time: they write the same content.
        If the folder cannot be written, a note says so; this run has its answers all the same."""
        path = self._file(prints)
        lines = CheckedLines(path)
        records = ({"id": id, "print": prints[id], **dataclasses.asdict(answer)} for id, answer in answers.items())
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic.write_text(path, "".join(lines.line(record) for record in records))
        except (OSError, UserError) as error:
            print(visible(f"note: the base's answers are not kept for other runs. {error}"))

    def _file(self, prints: Mapping[str, str]) -> Path:
        key = fingerprint({**self.fields, "items": list(prints.values())})
        return self.folder / f"{key}.jsonl"


def base_answers(data_dir: str, quantization: QuantizationSettings, answers: Answerer) -> BaseAnswers:
    """The kept answers of the loaded base, below `data_dir`/answers."""
    machine = answers.loaded.machine
    kind = torch.backends.cpu.get_cpu_capability() if machine.device.type == "cpu" else torch.version.cuda
    fields = {
        **answer_fields(answers, quantization, answers.loaded.weights),
        "machine": [machine.device.type, machine.name, kind, machine.attention, machine.compile, machine.is_sharded],
        "torch": torch.__version__,
    }
    return BaseAnswers(Path(data_dir) / "answers", fields, machine.answer_budget)


def answer_fields(answers: Answerer, quantization: QuantizationSettings, weights: Mapping[str, Any]) -> dict[str, Any]:
    """What the answers of the model that answers now depend on beside the questions; on another machine they may differ
    by rounding. `weights`: those that the model has now."""
    loaded, encoder = answers.loaded, answers.encoder
    return {
        "format": FORMAT,
        "weights": dict(weights),
        "quantization": dataclasses.asdict(quantization),
        "precision": [loaded.machine.precision, str(loaded.denoiser.autocast)],
        "encoding": encoder.fields(),
        "tokens": [encoder.bos_id, encoder.eos_id, encoder.stop_ids, loaded.denoiser.mask_token_id],
        "sampler": dataclasses.asdict(answers.sampler),
    }
