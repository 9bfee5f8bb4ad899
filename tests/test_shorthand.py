"""What people type by habit: files and hub ids as groups, flat keys, a flat YAML, `laddpo` itself."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

import laddpo.__main__ as top
from laddpo.cli.app import cli
from laddpo.cli.shorthand import FLAT, expand
from laddpo.errors import UserError
from laddpo.settings.compose import compose
from laddpo.settings.habits import HABITS, SAME
from laddpo.settings.ranges import leaves
from laddpo.settings.schema import RunConfig
from tests.tiny import REPOSITORY

DOORS = sorted(path.stem for path in (REPOSITORY / "laddpo").glob("[a-z]*.py") if "run_stage(" in path.read_text())
PUBLIC_COMMAND = """
    --model_name_or_path "GSAI-ML/LLaDA-8B-Instruct" --dataset_name "Anthropic/hh-rlhf" --random_sample_size 50000
    --output_dir "my_dpo_output" --learning_rate 5e-7 --per_device_train_batch_size 1 --gradient_accumulation_steps 64
"""
PUBLIC_YAML = """
model_name_or_path: "GSAI-ML/LLaDA-8B-Instruct"
load_in_8bit: false
load_in_4bit: true
dataset_name: "Anthropic/hh-rlhf"
dataset_split: "train"
max_length: 1024
random_sample_size: 50000
learning_rate: 5.0e-7
per_device_train_batch_size: 1
gradient_accumulation_steps: 64
num_train_epochs: 1
beta: 0.1
diffusion_samples: 4
use_mixed_precision: true
gradient_checkpointing: true
checkpointing_steps: 500
resume_from_checkpoint: null
"""


def settings_of(stage: str, *argv: str) -> RunConfig:
    return compose(expand(stage, argv)[0])


def test_habits_are_settings_and_none_is_a_setting_already():
    names = {name for name, _ in leaves(RunConfig())}
    assert set(HABITS.values()) | set(SAME) <= names
    assert not set(HABITS) & names


def test_the_public_projects_command_line_means_the_same_here():
    config = settings_of("train", *shlex.split(PUBLIC_COMMAND))
    assert config.model.name == "llada_8b" and config.data.source == "hh_rlhf"
    assert config.data.random_sample_size == 50000 and config.output_dir == "my_dpo_output"
    assert (config.optim.learning_rate, config.optim.gradient_accumulation_steps) == (5e-7, 64)


@pytest.mark.parametrize("flag", ["--config_file", "--config-file"])
def test_the_public_projects_yaml_is_read_with_a_note_for_each_key(tmp_path, flag, capsys):
    path = tmp_path / "config.yaml"
    path.write_text(PUBLIC_YAML)
    argv, notes = expand("train", [flag, str(path), "dpo.beta=0.2"])
    config = compose(argv)
    assert (config.dpo.beta, config.dpo.diffusion_samples) == (0.2, 4), "the command line wins"
    assert config.quantization.load_in_4bit and not config.quantization.load_in_8bit
    assert (config.save_steps, config.hardware.precision, config.resume) == (500, "auto", "false")
    assert config.hardware.gradient_checkpointing is True and config.optim.num_train_epochs == 1
    silent = {"load_in_8bit", "resume_from_checkpoint"}
    keys = [line.split(":")[0] for line in PUBLIC_YAML.split("\n") if line]
    assert [note.split()[0] for note in notes] == [key for key in keys if key not in silent]
    assert f"learning_rate in {path} means optim.learning_rate=5e-07" in notes
    assert cli("train", [flag, str(path), "--cfg", "job"]) == 0
    assert "note: beta in " in capsys.readouterr().err
    # a stage takes of the file what it reads
    argv, _ = expand("prepare", [flag, str(path)])
    assert "data=hh_rlhf" in argv and not any("learning_rate" in text for text in argv)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("learning_rat: 1", "learning_rat: no such key; did you mean learning_rate?"),
        ("dpo: {beta: 1}", "dpo holds settings of its own"),
        ("beta: [1, 2]", "beta holds a list"),
        ("- 1", "holds no settings"),
        ("a: [", "cannot be read"),
        (None, "cannot be read: No such file"),
    ],
)
def test_a_yaml_that_is_not_flat_or_not_known_is_refused(tmp_path, content, said):
    path = tmp_path / "x.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError) as caught:
        expand("train", ["--config-file", str(path)])
    assert said in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize("name", ["my pairs.csv", "it's.jsonl", "a=b.parquet", "päare.json"])
def test_a_file_of_rows_is_data_whatever_its_name(tmp_path, name):
    path = tmp_path / name
    config = settings_of("train", f"data={path}")
    assert (config.data.source, config.data.dataset_name) == ("jsonl", str(path))


@pytest.mark.parametrize(
    "text", ["What is 2+2?", "07+15-04=", "it's \\'so\\", "[1,2]", "a: b, {c}", "ends in \\", "yes"]
)
def test_a_prompt_is_a_text_whatever_it_holds(text):
    assert settings_of("generate", f"prompt={text}").prompt == text
    assert expand("generate", [f"prompt={text}"])[1] == [], "nothing else is meant than what was written"


def test_other_texts_are_quoted_only_where_they_would_be_refused():
    assert settings_of("train", "output_dir=my runs/a=b").output_dir == "my runs/a=b"
    given = ["output_dir=runs/a", 'prompt="two words"', "dpo.beta=1", "run='a b'", "dpo.loss=ipo", "adapter.path=null"]
    assert expand("train", given) == (given, [])


def test_known_hub_ids_choose_their_group_and_others_the_general_one():
    assert settings_of("train", "data=Anthropic/hh-rlhf").data.source == "hh_rlhf"
    assert settings_of("train", "data=me/my-pairs").data.dataset_name == "me/my-pairs"
    assert settings_of("train", "model=GSAI-ML/LLaDA-8B-Base").model.name == "llada_8b_base"
    other = settings_of("train", "model=me/my-llada").model
    assert (other.model_name_or_path, other.name) == ("me/my-llada", "my-llada") and other.shape.d_model == 4096


def test_a_models_folder_is_known_by_its_shape(tmp_path):
    nano = settings_of("train", f"model={REPOSITORY / 'data' / 'llada_nano'}")
    assert nano.data.source == "arithmetic" and nano.model.model_name_or_path == str(REPOSITORY / "data" / "llada_nano")
    sizes = {"d_model": 32, "n_layers": 1, "n_heads": 2, "mlp_hidden_size": 16, "vocab_size": 99}
    llada = {"architectures": ["LLaDAModelLM"], **sizes, "max_sequence_length": 2048}
    (tmp_path / "config.json").write_text(json.dumps(llada))
    shape = settings_of("train", f"model={tmp_path}").model.shape
    assert (shape.d_model, shape.n_kv_heads, shape.vocab_size) == (32, 2, 99)
    dream = {"architectures": ["DreamModel"], "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    dream |= {"num_key_value_heads": 1, "intermediate_size": 16, "vocab_size": 99, "max_position_embeddings": 2048}
    (tmp_path / "config.json").write_text(json.dumps(dream))
    model = settings_of("train", f"model={tmp_path}").model
    assert (model.architecture, model.shape.n_kv_heads, model.shape.max_sequence_length) == ("DreamModel", 1, 2048)
    moe = {name: value for name, value in dream.items() if name != "intermediate_size"}
    moe |= {"architectures": ["LLaDAMoEModel"], "expert_intermediate_size": 16, "num_experts": 4}
    (tmp_path / "config.json").write_text(json.dumps({**moe, "num_experts_per_tok": 2}))
    config = settings_of("train", f"model={tmp_path}")
    assert (config.model.shape.n_experts, config.model.shape.experts_chosen) == (4, 2)
    assert config.adapter.target_modules == "q_proj|k_proj|v_proj|o_proj"  # not an adapter for each expert


def test_options_and_misspelt_ones_are_left_to_the_groups(tmp_path):
    (tmp_path / "data" / "my").mkdir(parents=True)
    (tmp_path / "data" / "my" / "own.yaml").write_text("source: jsonl\n")
    given = ["data=arithmetic", "model=lada_8b", "data=my/own", f"--config-dir={tmp_path}", "dpo.beta=1"]
    assert expand("train", given) == (given, [])


def test_a_flag_without_a_value_is_refused(capsys):
    assert cli("train", ["--learning_rate"]) == 2
    assert "--learning_rate: has no value" in capsys.readouterr().err


@pytest.mark.parametrize(("word", "key"), [("lr", "optim.learning_rate"), ("epochs", "optim.num_train_epochs")])
def test_names_of_other_programs_lead_to_the_right_setting(word, key, capsys):
    assert cli("train", [f"{word}=1"]) == 2
    assert f"did you mean {key}?" in capsys.readouterr().err
    assert FLAT[word] == key


def test_laddpo_lists_its_stages_and_runs_them(capsys):
    assert sorted(top.STAGES) == DOORS
    for argv in ([], ["--help"], ["-h"]):
        assert top.main(argv) == 0
        assert all(f"  {name} " in (shown := capsys.readouterr().out) or name in shown for name in list(top.STAGES)[:1])
    assert top.main(["--version"]) == 0
    assert top.main(["trian"]) == 2 and "did you mean laddpo train?" in capsys.readouterr().err
    assert top.main(["beta=0.5"]) == 2 and "laddpo train beta=0.5" in capsys.readouterr().err


@pytest.mark.parametrize("stage", DOORS)
def test_help_shows_the_stages_own_examples_settings_and_groups(stage, capsys):
    assert cli(stage, ["--help"]) == 0
    shown = capsys.readouterr().out
    assert f"python -m laddpo.{stage}" in shown
    assert ("  prompt " in shown) == (stage == "generate") and ("  runs " in shown) == (stage == "report")
    assert ("  resume " in shown) == (stage not in ("generate", "chat", "variance"))


@pytest.mark.parametrize("stage", DOORS)
def test_every_example_of_a_stages_help_composes(stage, capsys):
    text = (REPOSITORY / "laddpo" / f"{stage}.py").read_text(encoding="utf-8").split('"""')[1]
    lines = [line.strip() for line in text.splitlines() if line.strip().startswith("python -m laddpo.")]
    assert lines
    for line in lines:
        command = line.split("   ")[0].replace("<run>", "RUN").replace("<sweep>", "SWEEP")
        _, _, module, *arguments = shlex.split(command)
        assert cli(module.removeprefix("laddpo."), [*arguments, "--cfg", "job"]) == 0, (line, capsys.readouterr().err)


def test_the_console_command_is_declared():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has none")
    project = tomllib.loads(Path(REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["scripts"] == {"laddpo": "laddpo.__main__:main"}
