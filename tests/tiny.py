"""A checkpoint folder with random weights and nano's tokenizer, for tests that run whole stages."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from laddpo.settings.needs import OF_PARTS

REPOSITORY = Path(__file__).resolve().parents[1]


def write_tiny_model(folder: Path, shape: Mapping[str, Any], architecture: str = "LLaDAModelLM") -> Path:
    """Random weights of a fixed seed in `shape`, saved in `folder`."""
    from laddpo.models.loading import load_tokenizer, new_config, new_model, save_model

    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(REPOSITORY / "data" / "llada_nano" / name, folder)
    tokenizer = load_tokenizer(str(folder))
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    special["mask_token_id"] = tokenizer.convert_tokens_to_ids("<|mdm_mask|>")
    config = new_config(architecture, {**shape, "vocab_size": len(tokenizer)}, **special)
    save_model(new_model(config, 3, architecture), folder)
    return folder


def of_parts(overrides: list[str], *parts: str) -> list[str]:
    """The overrides of a benchmark that these parts of it read."""
    unread = {f"benchmark.{name}" for part, names in OF_PARTS.items() if part not in parts for name in names}
    return [text for text in overrides if text.partition("=")[0] not in unread]
