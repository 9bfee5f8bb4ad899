"""A sequence classifier of transformers as a judge: prompt and answer go in, one number comes out.

Only code of transformers runs, and only safetensors are read. A number is kept as soon as its batch is scored.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from laddpo.core.budget import release_memory
from laddpo.errors import UserError
from laddpo.judging.judges import Answered
from laddpo.judging.kept import Kept, key_of
from laddpo.preference.reading.pairs import plain_prompt, prompt_rows


class RewardModel:
    """Scores of answers. The model is loaded when an answer is scored that is not known yet."""

    def __init__(
        self,
        path: str,
        revision: str | None,
        label: str | None,
        device: str,
        batch_size: int,
        max_length: int,
        kept: Kept,
        key: str,
    ):
        self.path, self.revision, self.label, self.device = path, revision, label, device
        self.batch_size, self.max_length, self.kept, self.key = batch_size, max_length, kept, key
        self.model: Any = None

    def scores(self, answers: Sequence[Answered]) -> list[float | None]:
        """A number for each answer; None for one that is longer than the model reads, or whose number is not finite."""
        keys = [key_of([prompt_rows(answer.prompt), answer.text]) for answer in answers]
        missing = {key: answer for key, answer in zip(keys, answers, strict=True) if self.kept.get(key) is None}
        if missing:
            self._load()
        todo = list(missing.items())
        for start in range(0, len(todo), self.batch_size):
            batch = todo[start : start + self.batch_size]
            for (key, _), score in zip(batch, self._score([answer for _, answer in batch]), strict=True):
                self.kept.add(key, score=score)
        return [self.kept.get(key)["score"] for key in keys]

    def close(self) -> None:
        """Free the model's memory."""
        if self.model is not None:
            self.model = None
            release_memory()

    def _load(self) -> None:
        if self.model is not None:
            return
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        if self.device.startswith("cuda") and int(self.device[5:] or 0) >= torch.cuda.device_count():
            raise UserError(
                f"{self.key}.device is {self.device!r}, and this machine has {torch.cuda.device_count()} GPUs; write "
                f"{self.key}.device=cpu."
            )
        place = {"revision": self.revision, "trust_remote_code": False}
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(self.path, padding_side="right", **place)
            dtype = torch.float32 if self.device == "cpu" else "auto"
            model, said = AutoModelForSequenceClassification.from_pretrained(
                self.path, dtype=dtype, use_safetensors=True, output_loading_info=True, **place
            )
        except (OSError, ValueError, ImportError, KeyError) as error:
            raise UserError(
                f"{self.key}.model is {self.path!r}, which could not be loaded as a sequence classifier: "
                f"{type(error).__name__}: {' '.join(str(error).split())[:300]}. Expected a folder or hub id with "
                "config.json, safetensors and a tokenizer, whose code is part of transformers."
            ) from error
        if said["missing_keys"]:
            raise UserError(
                f"{self.key}.model is {self.path!r}, which lacks trained weights of a classifier "
                f"({', '.join(sorted(said['missing_keys'])[:3])}); its scores would be random. Name a reward model."
            )
        self.column = self._column(model.config)
        if model.config.pad_token_id is None:
            model.config.pad_token_id = self.tokenizer.pad_token_id
        positions = getattr(model.config, "max_position_embeddings", None) or self.max_length
        self.limit = min(self.max_length, positions, self.tokenizer.model_max_length)
        self.model = model.to(self.device).eval()

    def _column(self, config) -> int:
        if config.num_labels == 1 and self.label is None:
            return 0
        names = {str(name): int(index) for index, name in config.id2label.items()}
        if self.label not in names:
            found = "is not set" if self.label is None else f"is {self.label!r}"
            raise UserError(
                f"{self.key}.label {found}, and {self.path} has the labels {', '.join(names)}. Name the one that a "
                "better answer has."
            )
        return names[self.label]

    def _encode(self, answer: Answered) -> dict[str, list[int]]:
        """By the tokenizer's chat template, else as a pair of texts."""
        if not self.tokenizer.chat_template:
            return dict(self.tokenizer(plain_prompt(answer.prompt), answer.text))
        said = [*prompt_rows(answer.prompt), {"role": "assistant", "content": answer.text}]
        try:
            text = self.tokenizer.apply_chat_template(said, tokenize=False)
        except Exception as error:  # whatever a template may raise
            turns = ", ".join(message["role"] for message in said)
            raise UserError(
                f"{self.key}.model is {self.path!r}, whose chat template refuses the turns {turns}: "
                f"{type(error).__name__}: {error}. Name another reward model."
            ) from error
        return dict(self.tokenizer(text, add_special_tokens=False))

    @torch.inference_mode()
    def _score(self, answers: Sequence[Answered]) -> list[float | None]:
        rows = [self._encode(answer) for answer in answers]
        fitting = [i for i, row in enumerate(rows) if len(row["input_ids"]) <= self.limit]
        has_padding = self.tokenizer.pad_token_id is not None and self.model.config.pad_token_id is not None
        found: list[float | None] = [None] * len(rows)
        for group in [fitting] if has_padding else [[i] for i in fitting]:
            if not group:
                continue
            inputs = {name: [rows[i][name] for i in group] for name in rows[group[0]]}
            if has_padding:
                inputs = self.tokenizer.pad(inputs, padding=True, return_tensors="pt")
            else:
                inputs = {name: torch.tensor(values) for name, values in inputs.items()}
            logits = self.model(**{name: ids.to(self.device) for name, ids in inputs.items()}).logits.float().cpu()
            for i, score in zip(group, self._numbers(logits), strict=True):
                found[i] = score if math.isfinite(score) else None
        return found

    def _numbers(self, logits: torch.Tensor) -> list[float]:
        """The one logit; of exclusive labels the log-odds of the chosen one, which never saturate."""
        kind = self.model.config.problem_type
        if logits.shape[1] == 1 or kind in ("regression", "multi_label_classification"):
            return logits[:, self.column].tolist()
        others = [i for i in range(logits.shape[1]) if i != self.column]
        return (logits[:, self.column] - torch.logsumexp(logits[:, others], 1)).tolist()
