"""The shipped tokenizer: any text round-trips, its template is LLaDA's, and the committed files can be made again."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests.preference import nano_tokenizer

SHIPPED = Path(__file__).resolve().parents[2] / "data" / "llada_nano"
MESSAGES = [
    {"role": "system", "content": " Be brief. \n"},
    {"role": "user", "content": "07+15-04="},
    {"role": "assistant", "content": "\n18"},
    {"role": "user", "content": "again\n\nuser"},
]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(SHIPPED)


def test_making_the_tokenizer_again_gives_the_shipped_bytes(tmp_path):
    nano_tokenizer.write_nano_tokenizer(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (SHIPPED / name).read_bytes()


def test_special_tokens_have_lladas_names_and_roles(tokenizer):
    assert tokenizer.bos_token == "<|startoftext|>"
    assert tokenizer.eos_token == tokenizer.pad_token == "<|endoftext|>"
    ids = tokenizer.convert_tokens_to_ids(list(nano_tokenizer.SPECIAL_TOKENS))
    assert ids == list(range(273, 279))
    assert len(tokenizer) == 279
    assert tokenizer.mask_token is None  # as LLaDA: the model's config names the mask


def test_digits_are_single_tokens_and_roles_are_one(tokenizer):
    assert len(tokenizer("07+15-04=", add_special_tokens=False)["input_ids"]) == 9
    for word in nano_tokenizer.MERGED_WORDS:
        assert len(tokenizer(word, add_special_tokens=False)["input_ids"]) == 1


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_any_text_comes_back_from_its_tokens(text):
    fast = PreTrainedTokenizerFast.from_pretrained(SHIPPED)
    ids = fast(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert fast.decode(ids) == text


def test_the_template_renders_by_hand(tokenizer):
    assert tokenizer.apply_chat_template(MESSAGES[1:2], tokenize=False) == (
        "<|startoftext|><|start_header_id|>user<|end_header_id|>\n\n07+15-04=<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


@pytest.mark.parametrize("add_generation_prompt", [False, True])
def test_the_template_equals_lladas_own(tokenizer, shared_folder, add_generation_prompt):
    config = json.loads((shared_folder / "assets" / "llada_8b_instruct" / "tokenizer_config.json").read_text("utf-8"))
    for length in range(1, len(MESSAGES) + 1):
        ours, theirs = (
            tokenizer.apply_chat_template(
                MESSAGES[:length], tokenize=False, chat_template=template, add_generation_prompt=add_generation_prompt
            )
            for template in (None, config["chat_template"])
        )
        assert ours == theirs
