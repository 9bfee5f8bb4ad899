"""Answers of a model before training, kept for all runs that start from it.

The jobs of a sweep, the arms of a study and the stages of one run ask the same model the same questions. Its answers
lie in `data/answers/<key>.jsonl`: one record for each item, each line with a check. The key has all that an answer
depends on. Which other questions stand in the same batch is part of it, since that changes the rounding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from laddpo.errors import UserError, visible
from laddpo.evaluation.answering import Answerer
from laddpo.settings.schema import QuantizationSettings
from laddpo.storage import atomic
from laddpo.storage.manifests import fingerprint
from laddpo.storage.seals import CheckedLines

FORMAT = 1  # raise it when the sampler gives other answers under the same settings


@dataclasses.dataclass(frozen=True)
class BaseAnswers:
    """The answers of one model, asked in one way. `fields`: what they depend on beside the questions."""

    folder: Path
    fields: Mapping[str, Any]

    def read(self, prints: Mapping[str, str]) -> dict[str, dict[str, Any]]:
        """Records by item id, in the order of `prints`: a fingerprint of each item. A damaged line is left out, and its
        item answered again."""
        found = {record["id"]: record for record in CheckedLines(self._file(prints)).read()}
        return {id: found[id] for id in prints if id in found and found[id]["fingerprint"] == prints[id]}

    def keep(self, prints: Mapping[str, str], records: Sequence[Mapping[str, Any]]) -> None:
        """Write the records of all items at once. Two runs that do so at a time write the same. A folder that cannot be
        written, as that of others may be, is a note: this run has its answers."""
        path = self._file(prints)
        lines = CheckedLines(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic.write_text(path, "".join(lines.line(record) for record in records))
        except (OSError, UserError) as error:
            print(visible(f"note: the base's answers are not kept for other runs. {error}"))

    def _file(self, prints: Mapping[str, str]) -> Path:
        key = fingerprint({**self.fields, "items": list(prints.values())})
        return self.folder / f"{key}.jsonl"


def base_answers(
    data_dir: str, quantization: QuantizationSettings, answers: Answerer, weights: Mapping[str, Any]
) -> BaseAnswers:
    """Those of the model that answers now and whose weights are these."""
    loaded = answers.loaded
    fields = {
        "format": FORMAT,
        "weights": dict(weights),
        "quantization": dataclasses.asdict(quantization),
        "precision": [loaded.machine.precision, str(loaded.denoiser.autocast)],
        "device": loaded.machine.device.type,
        "attention": loaded.machine.attention,
        "encoding": answers.encoder.fields(),
        "sampler": dataclasses.asdict(answers.sampler),
        "batch_size": answers.batch_size,
    }
    return BaseAnswers(Path(data_dir) / "answers", fields)
