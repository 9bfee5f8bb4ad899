"""A tiny model with random weights and nano's tokenizer, and the stages run on it in this process."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from laddpo.cli.app import cli
from laddpo.settings.of_a_run import MAY_CHANGE
from tests.tiny import write_tiny_model

SHAPE = {"d_model": 32, "n_layers": 2, "n_heads": 2, "n_kv_heads": 2, "mlp_hidden_size": 64}


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A checkpoint folder: 2 blocks of width 32, random weights of a fixed seed."""
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "model", SHAPE)


@dataclass(frozen=True)
class Stages:
    """Runs stages on the tiny model, with prepared data and reference stores below `folder`."""

    folder: Path
    model: Path

    def overrides(self, *more: str) -> list[str]:
        """The command line of a quick run: 24 pairs, steps of 4, two draws, six-token evaluations."""
        has_data = any(text.startswith("data=") for text in more)
        return [*self.places(), *([] if has_data else ["data.num_pairs=32"]), *QUICK, *more]

    def places(self) -> list[str]:
        """Where the model and all folders are: what every stage may be told."""
        return [
            f"model.model_name_or_path={self.model}",
            *[f"model.shape.{name}={value}" for name, value in SHAPE.items()],
            f"paths.data_dir={self.folder / 'data'}",
            f"paths.outputs_dir={self.folder / 'outputs'}",
            "hardware.device=cpu",
            "logger=none",
        ]

    def run(self, stage: str, *more: str) -> int:
        """The exit code of `python -m laddpo.<stage>` with these overrides; a finished run has its own.

        What a stage other than train does not read may stand in a yaml file, and not on the command line.
        """
        if stage in MAY_CHANGE and any(text.startswith("run=") for text in more):
            return cli(stage, [*(text for text in self.places() if text.startswith(("paths.", "hardware."))), *more])
        if stage == "train":
            return cli(stage, self.overrides(*more))
        folder = self.folder / "conf" / "experiment"
        folder.mkdir(parents=True, exist_ok=True)
        quick = OmegaConf.from_dotlist(["data.num_pairs=32", *QUICK])
        (folder / "quick.yaml").write_text("# @package _global_\n" + OmegaConf.to_yaml(quick), encoding="utf-8")
        return cli(stage, ["--config-dir", str(folder.parent), *self.places(), "experiment=quick", *more])


QUICK = (
    "data.max_length=512",
    "data.validation_fraction=0.25",
    "dpo.diffusion_samples=2",
    "optim.per_device_train_batch_size=4",
    "optim.learning_rate=1e-3",
    "optim.num_warmup_steps=0",
    "optim.max_train_steps=8",
    "save_steps=2",
    "logging_steps=1",
    "evaluation.every_steps=4",
    "evaluation.limit=4",
    "evaluation.num_pairs=6",
    "evaluation.diffusion_samples=2",
    "evaluation.gen_length=8",
    "evaluation.block_length=8",
    "evaluation.steps=2",
    "evaluation.confidence_threshold=null",
)


@pytest.fixture
def stages(tmp_path, tiny_model) -> Stages:
    return Stages(tmp_path, tiny_model)


@pytest.fixture(scope="session")
def classifier(tmp_path_factory) -> Path:
    """BERT with random weights, one layer, and a tokenizer of characters."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("classifier")
    letters = ["[PAD]", "[UNK]", *"0123456789+-=# "]
    tokenizer = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(letters)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    fast.save_pretrained(folder)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    labels = {0: "bad", 1: "good", 2: "fair"}
    config = BertConfig(vocab_size=len(letters), max_position_embeddings=40, id2label=labels, **sizes)
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder
