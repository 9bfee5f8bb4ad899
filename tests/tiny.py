"""A checkpoint folder with random weights and nano's tokenizer, for tests that run whole stages."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from laddpo.settings.needs import OF_PARTS

REPOSITORY = Path(__file__).resolve().parents[1]


def write_tiny_model(folder: Path, shape: Mapping[str, int]) -> Path:
    """Random weights of a fixed seed in `shape`, saved in `folder`."""
    from laddpo.models.llada_config import LLaDAConfig
    from laddpo.models.loading import load_tokenizer, new_model, save_model

    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(REPOSITORY / "data" / "llada_nano" / name, folder)
    tokenizer = load_tokenizer(str(folder))
    config = LLaDAConfig(
        **shape,
        vocab_size=len(tokenizer),
        mask_token_id=tokenizer.convert_tokens_to_ids("<|mdm_mask|>"),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    save_model(new_model(config, seed=3), folder)
    return folder


def of_parts(overrides: list[str], *parts: str) -> list[str]:
    """The overrides of a benchmark that these parts of it read."""
    unread = {f"benchmark.{name}" for part, names in OF_PARTS.items() if part not in parts for name in names}
    return [text for text in overrides if text.partition("=")[0] not in unread]
