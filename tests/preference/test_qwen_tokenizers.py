"""Tokenizers of two files, vocab.json and merges.txt: the ids are those of the rendered template."""

import json
import shutil

import pytest

from laddpo.errors import UserError
from laddpo.models.loading import copy_tokenizer, load_tokenizer
from laddpo.preference.encoding.encode import TextEncoder
from laddpo.preference.reading.pairs import Message

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXTS = ("What is 2+2?", "héllo\n\n  wörld 12345 <|im_end|>", "def f(x):\n    return x")


def check(tokenizer, text):
    encoder, answer = TextEncoder(tokenizer), "The answer is 4."
    asked = [{"role": "user", "content": text}]
    rendered = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
    whole = tokenizer.apply_chat_template([*asked, {"role": "assistant", "content": answer}], tokenize=False)
    prompt = encoder.encode_prompt((Message("user", text),)).tolist()
    response = encoder.encode_response(answer).tolist()
    assert tokenizer.decode(prompt) == rendered
    if "<|" not in text:  # which stays text here, and would be a special token there
        assert prompt == tokenizer(rendered, add_special_tokens=False)["input_ids"]
        assert [*prompt, *response] == tokenizer(whole, add_special_tokens=False)["input_ids"][: len(prompt + response)]
    assert tokenizer.convert_ids_to_tokens(response[-1]) == encoder.terminator == "<|im_end|>"


@pytest.mark.parametrize("text", TEXTS)
def test_dreams_own_template(shared_folder, text):
    tokenizer = load_tokenizer(str(shared_folder / "assets" / "dream_7b_instruct"))
    assert tokenizer.convert_tokens_to_ids(tokenizer.mask_token) == 151666
    check(tokenizer, text)


@pytest.mark.parametrize("text", TEXTS)
def test_a_qwen_tokenizer_under_a_plain_template(shared_folder, text):
    tokenizer = load_tokenizer(str(shared_folder / "assets" / "sdar_4b_chat"))
    tokenizer.chat_template = CHATML
    check(tokenizer, text)


def test_it_is_copied_whole(shared_folder, tmp_path):
    folder = shared_folder / "assets" / "dream_7b_instruct"
    assert {"vocab.json", "merges.txt"} <= set(copy_tokenizer(str(folder), None, tmp_path))
    ids = [load_tokenizer(str(place))(TEXTS[0])["input_ids"] for place in (folder, tmp_path)]
    assert ids[0] == ids[1]


@pytest.mark.parametrize("change", ["class", "file"])
def test_two_files_of_another_kind_are_refused(tmp_path, change):
    (tmp_path / "vocab.json").write_text("{}")
    settings = {"tokenizer_class": "GPT2Tokenizer" if change == "class" else "Qwen2Tokenizer"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    if change == "class":
        (tmp_path / "merges.txt").write_text("")
    with pytest.raises(UserError, match=r"has no tokenizer.json; expected .* of a Qwen2 tokenizer"):
        load_tokenizer(str(tmp_path))
    shutil.rmtree(tmp_path)
