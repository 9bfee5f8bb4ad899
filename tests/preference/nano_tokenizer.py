"""The tokenizer of `llada_nano`: byte-level, so any UTF-8 text encodes, with LLaDA's special tokens and template.

`python -m tests.preference.nano_tokenizer` writes data/llada_nano/tokenizer.json and tokenizer_config.json again.
test_nano_tokenizer.py proves that the shipped files have these bytes. Ids: 0-255 the bytes, then the merges that spell
the three roles and the blank line, then the special tokens. Digits have no merges: one digit is one position, which is
what makes fixed-width arithmetic learnable.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from laddpo.preference.encoding.special_text import MASK_TOKENS
from laddpo.storage.atomic import write_json

BOS, EOS, MASK = "<|startoftext|>", "<|endoftext|>", MASK_TOKENS[0]  # eos is also the padding, as in LLaDA
START_HEADER, END_HEADER, END_OF_TURN = "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"
SPECIAL_TOKENS = (BOS, EOS, MASK, START_HEADER, END_HEADER, END_OF_TURN)
MERGED_WORDS = ("\n\n", "user", "assistant", "system")

# LLaDA's layout: bos, then per message role header, blank line, trimmed content, end of turn; always ends with an
# open assistant turn, whether or not a generation prompt is asked for.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|start_header_id|>' ~ message['role'] ~ '<|end_header_id|>\\n\\n' }}"
    "{{ message['content'] | trim }}"
    "{{ '<|eot_id|>' }}"
    "{% endfor %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}"
)


def write_nano_tokenizer(folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json into `folder`; the same bytes every time."""
    write_json(folder / "tokenizer.json", tokenizer_json())
    write_json(folder / "tokenizer_config.json", tokenizer_config())


def tokenizer_json(more_merges: Sequence[tuple[str, str]] = (), splits_words: bool = False) -> dict:
    """The content of tokenizer.json, in the format of the `tokenizers` library.

    Built here rather than serialised by the library, so that no version of it changes the bytes. `more_merges` follow
    those of the roles; with `splits_words` no merge crosses the end of a word.
    """
    letters = byte_letters()
    vocab = {letter: byte for byte, letter in enumerate(letters)}
    merges = []
    for word in MERGED_WORDS:
        spelled = [letters[byte] for byte in word.encode()]
        prefix = spelled[0]
        for letter in spelled[1:]:  # left to right: u+s, us+e, use+r
            merges.append([prefix, letter])
            prefix += letter
            vocab[prefix] = len(vocab)
    for left, right in more_merges:
        if left + right not in vocab:
            merges.append([left, right])
            vocab[left + right] = len(vocab)
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    # Without splitting, the text between special tokens is one piece: nothing depends on a library's idea of
    # character classes; more merges than the roles' need it, or they would join parts of different words.
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": splits_words}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": len(vocab) + rank, "content": token, **added} for rank, token in enumerate(SPECIAL_TOKENS)
        ],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": merges,
        },
    }


def tokenizer_config() -> dict:
    """The content of tokenizer_config.json. Like LLaDA's it declares no mask token: the model's config does."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": EOS,
        "additional_special_tokens": [MASK, START_HEADER, END_HEADER, END_OF_TURN],
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": 4096,
        "chat_template": CHAT_TEMPLATE,
    }


def byte_letters() -> list[str]:
    """The printable character that byte-level BPE writes for each of the 256 bytes (GPT-2's table)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable}
    letters.update({byte: chr(256 + rank) for rank, byte in enumerate(others)})
    return [letters[byte] for byte in range(256)]


if __name__ == "__main__":
    target = Path(__file__).resolve().parents[2] / "data" / "llada_nano"
    write_nano_tokenizer(target)
    print(target)
