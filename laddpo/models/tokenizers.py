"""A checkpoint's tokenizer out of its files: tokenizer.json, and the known fields of the files beside it.

The class is always the one that runs tokenizer.json unchanged; Dream has none, and Qwen2's is built from vocab.json and
merges.txt. A class, code or further files that the settings name are not looked at.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from laddpo.errors import UserError
from laddpo.models.foreign import (
    FLAG,
    MOST_ID,
    Kind,
    checked,
    either,
    fields,
    listed,
    mapped,
    number,
    only,
    optional,
    read_settings,
    text,
    whole,
)
from laddpo.storage import atomic

TOKENIZER, SETTINGS, SPECIAL_TOKENS = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"
TEMPLATE = "chat_template.jinja"
OF_QWEN2 = ("vocab.json", "merges.txt")
QWEN2_CLASSES = ("Qwen2Tokenizer", "Qwen2TokenizerFast", "DreamTokenizer")


def build_tokenizer(folder: Path):
    """The tokenizer of the files in `folder`. Raises `UserError` for files that are not whole or not of their kind."""
    from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer

    settings, is_whole = _settings(folder), (folder / TOKENIZER).exists()
    if not is_whole:
        _require_qwen2(folder)
    try:
        if is_whole:
            backend = {"tokenizer_file": str(folder / TOKENIZER)}
        else:
            vocab, merges = (str(folder / name) for name in OF_QWEN2)
            backend = {"tokenizer_object": Qwen2Tokenizer(vocab=vocab, merges=merges).backend_tokenizer}
        tokenizer = PreTrainedTokenizerFast(**backend, **settings)
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # the library behind it raises bare exceptions, and panics as none
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"{folder}: its tokenizer cannot be read ({type(error).__name__}: {reason}). {TOKENIZER} (or "
            f"{' and '.join(OF_QWEN2)}) and {SETTINGS} must be whole and of one checkpoint; copy them again."
        ) from error
    tokenizer.name_or_path = str(folder)
    return tokenizer


def write_template(folder: Path, source: str) -> list[str]:
    """Give the tokenizer in `folder`, if there is one, this chat template. Returns the names of the files written."""
    atomic.write_text(folder / TEMPLATE, source)
    settings = folder / SETTINGS
    content = read_settings(settings) if settings.exists() else {}
    if "chat_template" not in content:
        return [TEMPLATE]
    atomic.write_json(settings, {**content, "chat_template": source})  # for programs that do not know the other file
    return [TEMPLATE, SETTINGS]


def tokenizer_files(folder: Path) -> list[Path]:
    """The files that say how text becomes ids."""
    return [folder / TOKENIZER] if (folder / TOKENIZER).exists() else [folder / name for name in OF_QWEN2]


def _require_qwen2(folder: Path) -> None:
    kind = read_settings(folder / SETTINGS).get("tokenizer_class") if (folder / SETTINGS).exists() else None
    if kind not in QWEN2_CLASSES or not all(file.exists() for file in tokenizer_files(folder)):
        raise UserError(
            f"{folder}: has no {TOKENIZER}; expected a fast tokenizer beside the model, or {' and '.join(OF_QWEN2)} of "
            "a Qwen2 tokenizer. Copy the tokenizer's files into that folder."
        )


def _settings(folder: Path) -> dict[str, Any]:
    """What the tokenizer is built with beside tokenizer.json: as transformers reads these files."""
    content = _read(folder / SETTINGS, SETTINGS_FIELDS)
    own = _read(folder / TOKENIZER, TOKENIZER_FIELDS)
    listed_tokens = content.pop("added_tokens_decoder", None)
    if listed_tokens is None:  # an older layout, or a newer one: the tokens are in the other files
        special = _read(folder / SPECIAL_TOKENS, SPECIAL_FIELDS)
        more = special.pop("additional_special_tokens", None)
        if more and not {"additional_special_tokens", "extra_special_tokens"} & content.keys():
            content["additional_special_tokens"] = more
        content |= {name: _token(value, is_special=True) for name, value in special.items()}
        listed_tokens = {token["id"]: token for token in own.get("added_tokens", [])}
    tokens = {int(place): _token(token) for place, token in listed_tokens.items()}
    by_text = {str(token): token for token in tokens.values()}
    for name, value in content.items():
        if name in NAMED_TOKENS and value is not None:
            content[name] = by_text.get(_content(value), _token(value))
    extra = content.pop("additional_special_tokens", None)
    if extra and not content.get("extra_special_tokens"):
        content["extra_special_tokens"] = extra
    if isinstance(content.get("extra_special_tokens"), list):
        content["extra_special_tokens"] = [_token(value) for value in content["extra_special_tokens"]]
    template = folder / TEMPLATE
    if template.exists():
        try:
            content["chat_template"] = template.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{template}: cannot be read as UTF-8 text ({error}). Copy it again.") from error
    return {**content, "added_tokens_decoder": tokens}


def _read(path: Path, table: Mapping[str, Kind]) -> dict[str, Any]:
    return checked(path, read_settings(path), table) if path.exists() else {}


def _content(value: Any) -> str:
    return value["content"] if isinstance(value, dict) else str(value)


def _token(value: Any, is_special: bool = False) -> Any:
    """An AddedToken of an object that describes one; a text stays a text."""
    from tokenizers import AddedToken

    if not isinstance(value, dict):
        return value
    named = {name: inner for name, inner in value.items() if name in ("content", *TOKEN_FLAGS)}
    return AddedToken(**{**named, "special": True} if is_special else named)


TOKEN_FLAGS = ("lstrip", "rstrip", "normalized", "single_word", "special")
_FLAGS = {**dict.fromkeys(TOKEN_FLAGS, FLAG), "__type": only("AddedToken")}
TOKEN = either(text(1000), fields({"content": text(1000)}, _FLAGS))
NAMED_TOKENS = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_ID = Kind(
    f"a token id from 0 to {MOST_ID:,}",
    lambda key: key.isascii() and key.isdigit() and len(key) < 11 and int(key) <= MOST_ID,
)
SETTINGS_FIELDS: dict[str, Kind] = {
    **dict.fromkeys(NAMED_TOKENS, optional(TOKEN)),
    "added_tokens_decoder": mapped(fields({"content": text(1000)}, _FLAGS), _ID),
    "additional_special_tokens": optional(listed(TOKEN)),
    "gmask_token": optional(text(1000)),  # a token of LLaDA's own
    "extra_special_tokens": optional(either(listed(TOKEN), mapped(text(1000)))),
    "chat_template": optional(either(text(2**20), listed(fields({"name": text(100), "template": text(2**20)}, {})))),
    "clean_up_tokenization_spaces": optional(FLAG),
    "model_input_names": listed(text(100)),
    "model_max_length": optional(number(0, 1e40)),  # 1e30 is how transformers writes none
    "padding_side": only("left", "right"),
    "split_special_tokens": FLAG,
    "truncation_side": only("left", "right"),
}
SPECIAL_FIELDS: dict[str, Kind] = {
    **dict.fromkeys(NAMED_TOKENS, optional(TOKEN)),
    "additional_special_tokens": optional(listed(TOKEN)),
}
TOKENIZER_FIELDS: dict[str, Kind] = {
    "added_tokens": listed(fields({"id": whole(0, MOST_ID), "content": text(1000)}, _FLAGS)),
    "model": Kind("an object", lambda value: isinstance(value, dict)),
}
