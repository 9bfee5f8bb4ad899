"""Settings files of checkpoints and adapters from elsewhere: hostile values are refused by name, or go nowhere."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import peft
import pytest
import transformers

from laddpo.errors import UserError
from laddpo.models.adapters import attach_lora, save_adapter
from laddpo.models.llada import LLaDAModelLM
from laddpo.models.llada_config import LLaDAConfig
from laddpo.models.loading import load_model, load_tokenizer, original_config, read_config

NANO = Path(__file__).resolve().parents[2] / "data" / "llada_nano"
SECONDS = 5.0  # for any of them; most take milliseconds
DEEP = "[" * 100_000 + "]" * 100_000

# file, field, value as it stands in the file, words of the message (None: it goes nowhere)
MODEL = [
    ("n_layers", "1000000000", "a whole number from 1 to 1,024"),
    ("n_layers", '"2"', "a whole number"),
    ("n_layers", "2.0", "a whole number"),
    ("n_layers", "true", "a whole number"),
    ("n_layers", "-1", "a whole number"),
    ("n_layers", "0", "a whole number"),
    ("n_layers", "null", "a whole number"),
    ("n_layers", "[2]", "a whole number"),
    ("n_heads", '{"a": {"b": 4}}', "a whole number"),
    ("d_model", "1e9", "a whole number"),
    ("d_model", "NaN", "a whole number"),
    ("mlp_hidden_size", "1e400", "a whole number"),
    ("vocab_size", "9" * 4000, "a whole number"),
    ("vocab_size", "9" * 5000, "config.json: cannot be read as JSON"),
    ("embedding_size", "true", "a whole number"),
    ("max_sequence_length", "-4096", "a whole number"),
    ("rope_theta", "NaN", "a number above 0"),
    ("rope_theta", '"500000"', "a number above 0"),
    ("rope_theta", "9" * 4000, "a number above 0"),
    ("rope_theta", "0", "a number above 0"),
    ("rms_norm_eps", "-1e-5", "a number above 0"),
    ("rms_norm_eps", "true", "a number above 0"),
    ("init_std", "Infinity", "a number above 0"),
    ("mask_token_id", '"275"', "a whole number"),
    ("eos_token_id", "[274]", "a whole number"),
    ("pad_token_id", "-1", "a whole number"),
    ("alibi", '"no"', "alibi"),
    ("activation_type", '["silu"]', "activation_type"),
    ("block_group_size", "true", "block_group_size"),
    ("rope_scaling", '{"type": "linear", "factor": 4}', "rope_scaling"),
    ("architectures", '"LLaDAModelLM"', "architecture"),
    ("architectures", "[{}]", "architecture"),
    ("use_cache", "1", "true or false"),
    ("x", DEEP, "config.json: cannot be read as JSON"),
    ("_attn_implementation", '"someone/kernel"', None),
    ("attn_implementation", '"someone/kernel"', None),
    ("_attn_implementation_internal", '"someone/kernel"', None),
    ("experts_implementation", '"someone/kernel"', None),
    ("hidden_size", '"x"', None),  # another name for d_model
    ("num_hidden_layers", "1000000000", None),
    ("auto_map", '{"AutoModel": "evil--code.Model"}', None),
    ("quantization_config", '{"quant_method": "awq"}', None),
    ("per_layer_config", '{"0": {}}', None),
    ("torch_dtype", '"float64"', None),
    ("dtype", '{"a": 1}', None),
    ("name_or_path", '"/elsewhere"', None),
    ("id2label", '"x"', None),
    ("output_attentions", '"x"', None),
    ("base_model_tp_plan", '{"*": "colwise"}', None),
]
TOKENIZER = [
    ("eos_token", "5", "eos_token"),
    ("eos_token", '{"content": "<|endoftext|>", "handler": "x"}', "eos_token"),
    ("bos_token", "[]", "bos_token"),
    ("chat_template", "7", "chat_template"),
    ("chat_template", '[{"name": "default"}]', "chat_template"),
    ("model_max_length", '"4096"', "a number above 0"),
    ("model_max_length", "NaN", "a number above 0"),
    ("model_max_length", "-1", "a number above 0"),
    ("padding_side", '"up"', "padding_side"),
    ("additional_special_tokens", '"<|eot_id|>"', "additional_special_tokens"),
    ("extra_special_tokens", '{"a": 1}', "extra_special_tokens"),
    ("added_tokens_decoder", '{"99999999999": {"content": "x"}}', "a token id"),
    ("added_tokens_decoder", '{"-1": {"content": "x"}}', "a token id"),
    ("added_tokens_decoder", '{"1": "x"}', "added_tokens_decoder"),
    ("added_tokens_decoder", '{"1": {"content": "x", "special": "yes"}}', "added_tokens_decoder"),
    ("x", DEEP, "tokenizer_config.json: cannot be read as JSON"),
    ("model_max_length", "1000000000000000019884624838656", None),  # how transformers writes none
    ("tokenizer_class", '"EvilTokenizer"', None),
    ("tokenizer_class", '{"a": 1}', None),
    ("auto_map", '{"AutoTokenizer": ["evil.Tokenizer", null]}', None),
    ("vocab_file", '"/etc/passwd"', None),
    ("gguf_file", '"evil.gguf"', None),
    ("tokenizer_object", '"x"', None),
    ("convert_tokens_to_ids", '"x"', None),
    ("init_inputs", '["x"]', None),
    ("add_prefix_space", '"x"', None),
]
ADAPTER = [
    ("r", "1000000000", "a whole number"),
    ("r", "60000", "has rank 2"),
    ("r", '"2"', "a whole number"),
    ("r", "true", "a whole number"),
    ("lora_alpha", "NaN", "a number above 0"),
    ("lora_alpha", "-4", "a number above 0"),
    ("lora_alpha", '"4"', "a number above 0"),
    ("use_rslora", '"yes"', "true or false"),
    ("use_dora", "1", "true or false"),
    ("target_modules", '"(.*)*x"', "target_modules"),
    ("target_modules", '"(a|a)*b"', "target_modules"),
    ("target_modules", '".*.*.*.*x"', "target_modules"),
    ("target_modules", json.dumps("(.|.)" * 40 + "x"), "target_modules"),
    ("target_modules", '"(?=a)a"', "target_modules"),
    ("target_modules", '"("', "target_modules"),
    ("target_modules", "7", "target_modules"),
    ("target_modules", "null", "target_modules"),
    ("target_modules", "[7]", "target_modules"),
    ("rank_pattern", '{"q_proj": 1000000}', "rank_pattern"),
    ("rank_pattern", '{"q_proj": 60000}', "has rank 2"),
    ("rank_pattern", '{"(a+)+b": 2}', "rank_pattern"),
    ("rank_pattern", '{".*.*.*b": 2}', "rank_pattern"),
    ("alpha_pattern", '{"q_proj": "4"}', "alpha_pattern"),
    ("layers_to_transform", '["0"]', "layers_to_transform"),
    ("layers_pattern", '"(a+)+"', "layers_pattern"),
    ("fan_in_fan_out", "true", "fan_in_fan_out"),
    ("peft_type", '{"a": 1}', "peft_type"),
    ("megatron_config", '{"a": 1}', None),
    ("megatron_core", '"os"', None),
    ("auto_mapping", '{"parent_library": "os"}', None),
    ("runtime_config", '{"a": 1}', None),
    ("lora_dropout", '"x"', None),
    ("task_type", "[]", None),
    ("loftq_config", '{"a": 1}', None),
    ("unheard_of", "1", None),
]


def with_field(path, field, value):
    """Write a field into a JSON file as the text `value`, which need not be JSON that Python would write."""
    content = json.loads(path.read_text())
    content.pop(field, None)
    text = json.dumps(content)
    path.write_text(f'{text[:-1]}, "{field}": {value}}}' if content else f'{{"{field}": {value}}}')


def refused_or_the_same(call, spied, clean, path, words):
    """A refusal that names file and field and calls no loader, or the same call as without the field."""
    spied.clear()
    started = time.monotonic()
    if words is None:
        call()
        assert clean and spied == clean
    else:
        with pytest.raises(UserError) as caught:
            call()
        said = str(caught.value)
        assert str(path.parent) in said and words in said and len(said) < 3000, said
        assert not spied, "a refused value came to the loader"
    assert time.monotonic() - started < SECONDS


@pytest.fixture
def nano(tmp_path):
    """A copy of the shipped model without its seal, so that its files can be changed."""
    return Path(shutil.copytree(NANO, tmp_path / "model", ignore=shutil.ignore_patterns("manifest.json")))


@pytest.mark.parametrize(("field", "value", "words"), MODEL)
def test_a_checkpoints_config_passes_on_known_fields_of_their_kind_alone(nano, monkeypatch, field, value, words):
    spied, load = [], LLaDAModelLM.from_pretrained.__func__

    def spy(cls, *given, config, **named):
        spied.append((config.to_dict(), config._attn_implementation, named))
        return load(cls, *given, config=config, **named)

    monkeypatch.setattr(LLaDAModelLM, "from_pretrained", classmethod(spy))
    if words is None:
        load_model(str(nano))
    clean = [*spied]
    with_field(nano / "config.json", field, value)
    refused_or_the_same(lambda: load_model(str(nano)), spied, clean, nano / "config.json", words)


@pytest.mark.parametrize(("field", "value", "words"), TOKENIZER)
def test_a_tokenizers_settings_pass_on_known_fields_of_their_kind_alone(nano, monkeypatch, field, value, words):
    spied, build = [], transformers.PreTrainedTokenizerFast.__init__

    def spy(self, *given, **named):
        spied.append({**named, "added_tokens_decoder": repr(named["added_tokens_decoder"]), "model_max_length": 0})
        build(self, *given, **named)

    monkeypatch.setattr(transformers.PreTrainedTokenizerFast, "__init__", spy)
    if words is None:
        load_tokenizer(str(nano))
    clean = [*spied]
    with_field(nano / "tokenizer_config.json", field, value)
    refused_or_the_same(lambda: load_tokenizer(str(nano)), spied, clean, nano / "tokenizer_config.json", words)


@pytest.mark.parametrize(("field", "value", "words"), ADAPTER)
def test_an_adapters_settings_pass_on_known_fields_of_their_kind_alone(
    tiny_model, tmp_path, monkeypatch, field, value, words
):
    model = tiny_model()
    attach_lora(model, r=2, alpha=4)
    save_adapter(model, tmp_path)
    spied, real = [], peft.LoraConfig
    monkeypatch.setattr(peft, "LoraConfig", lambda **named: spied.append(named) or real(**named))
    if words is None:
        attach_lora(tiny_model(), path=str(tmp_path))
    clean = [*spied]
    with_field(tmp_path / "adapter_config.json", field, value)
    refused_or_the_same(
        lambda: attach_lora(tiny_model(), path=str(tmp_path)), spied, clean, tmp_path / "adapter_config.json", words
    )


OTHER_FILES = [
    ("tokenizer.json", '{"added_tokens": [{"id": 99999999999, "content": "x"}]}', "added_tokens"),
    ("tokenizer.json", '{"added_tokens": {}}', "added_tokens"),
    ("tokenizer.json", '{"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}', "tokenizer cannot be read"),
    ("tokenizer.json", "[]", "a JSON object"),
    ("special_tokens_map.json", '{"eos_token": 7}', "eos_token"),
    ("model.safetensors.index.json", '{"weight_map": {"a": "../../elsewhere"}}', "weight shards are missing"),
    ("model.safetensors.index.json", '{"weight_map": [1]}', "weight_map"),
    ("adapter_config.json", '{"base_model_name_or_path": "someone/else", "peft_type": "LORA"}', "adapter.path"),
    ("config.json", "[]", "a JSON object"),
]


@pytest.mark.parametrize(("name", "content", "words"), OTHER_FILES)
def test_the_other_files_of_a_checkpoint_are_refused_by_name(nano, name, content, words):
    (nano / name).write_text(content)
    with pytest.raises(UserError, match=words) as caught:
        load_tokenizer(str(nano))
        load_model(str(nano))
    assert str(nano) in str(caught.value)


def test_generation_settings_of_a_checkpoint_are_never_read(nano, monkeypatch):
    (nano / "generation_config.json").write_text('{"max_length": "x", "custom_generate": "someone/code", "eos": NaN')
    for name in ("from_pretrained", "from_dict", "from_model_config"):
        monkeypatch.setattr(transformers.GenerationConfig, name, None)
    load_model(str(nano))
    load_tokenizer(str(nano))


def test_a_tokenizer_is_the_one_that_transformers_makes_of_the_files(nano):
    special = {"content": "<|eot_id|>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    settings = json.loads((nano / "tokenizer_config.json").read_text())
    listed = {
        str(token.pop("id")): token for token in json.loads((nano / "tokenizer.json").read_text())["added_tokens"]
    }
    new = {**listed, "500": {"content": "<new>", "special": True}}
    for change in (
        {},
        {"extra_special_tokens": ["<|eot_id|>", "<one>"], "additional_special_tokens": None},
        {"added_tokens_decoder": listed},
        {"added_tokens_decoder": new, "eos_token": {**special, "__type": "AddedToken"}},
        {"additional_special_tokens": []},
        {"chat_template": [{"name": "default", "template": "{{ messages }}"}]},
    ):
        (nano / "tokenizer_config.json").write_text(json.dumps({**settings, **change}))
        special_tokens = {
            "sep_token": special,
            "pad_token": "<|endoftext|>",
            "cls_token": {**special, "special": False},
        }
        (nano / "special_tokens_map.json").write_text(
            json.dumps({**special_tokens, "additional_special_tokens": ["<n>"]})
        )
        theirs, ours = transformers.PreTrainedTokenizerFast.from_pretrained(str(nano)), load_tokenizer(str(nano))
        assert ours.backend_tokenizer.to_str() == theirs.backend_tokenizer.to_str(), change
        for name in ("all_special_ids", "special_tokens_map", "chat_template", "added_tokens_decoder", "name_or_path"):
            assert getattr(ours, name) == getattr(theirs, name), (change, name)


def test_the_real_config_is_taken_as_before(shared_folder):
    folder = shared_folder / "assets" / "llada_8b_instruct"
    content, (config, _) = original_config(folder), read_config(folder)
    before = LLaDAConfig.from_dict(json.loads((folder / "config.json").read_text())).to_dict()
    gone = {"auto_map", "model_type", "transformers_version"}
    kept = [{key: value for key, value in found.items() if key not in gone} for found in (before, config.to_dict())]
    assert kept[0] == kept[1]
    assert "auto_map" in content  # what a card or an export may quote
    for other, length in {"llada2_mini": 32, "sdar_4b_chat": 4, "sdar_8b_chat": 4}.items():
        assert read_config(shared_folder / "assets" / other)[0].block_length == length
