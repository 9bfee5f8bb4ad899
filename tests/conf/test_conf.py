"""Every yaml file composes, says what its keys cost, and the defaults find each other."""

import re
from pathlib import Path

import pytest
import yaml

from laddpo.errors import UserError
from laddpo.settings.advice import unlikely_settings
from laddpo.settings.compose import compose
from laddpo.settings.mistakes import NOT_GROUPS, schema_types
from laddpo.settings.ranges import CONF_DIR
from tests import composing

FILES = sorted(path for path in CONF_DIR.glob("*/*.yaml") if path.parent.name not in NOT_GROUPS)
OPTIONS = [f"{path.parent.name}={path.stem}" for path in FILES]
NEEDS = {
    "data=jsonl": ["data.dataset_name=x.jsonl"],
    "evaluation=file": ["evaluation.dataset_name=x.jsonl"],
    "data=laddpo_public": ["data.dataset_name=x.json"],
}


@pytest.mark.parametrize("option", OPTIONS)
def test_every_yaml_composes_into_a_valid_run(option):
    compose([option, *NEEDS.get(option, [])])


def test_what_the_tests_compose_once_is_what_hydra_composes():
    """See tests/composing.py: the groups chosen are kept, and no value of one test reaches another."""
    chosen = ["model=llada_8b", "dpo=ipo", "adapter=full"]
    for kept in (composing._lists, composing._trees, composing._files):
        kept.clear()
    anew = compose(["dpo.beta=3", *chosen])
    assert compose(["dpo.beta=3", *chosen]) == anew and anew.dpo.beta == 3
    assert compose(chosen).dpo.beta != 3 and compose().dpo != anew.dpo
    assert compose([*chosen, "model=llada_nano"]).model == compose().model


@pytest.mark.parametrize("model", ["llada_nano", "llada_8b"])
def test_every_hardware_profile_suits_every_model(model):
    for path in sorted((CONF_DIR / "hardware").glob("*.yaml")):
        compose([f"model={model}", f"hardware={path.stem}"])


@pytest.mark.parametrize("path", FILES, ids=OPTIONS)
def test_every_yaml_begins_by_saying_what_it_is(path: Path):
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("# @package")]
    assert lines[0].startswith("# "), f"{path} does not begin with a sentence"


def test_every_setting_stands_in_a_yaml_under_a_comment():
    """A comment may cover up to four keys that follow it, as dpo's weights of one kind do."""
    described = set()
    for path in [CONF_DIR / "config.yaml", *FILES]:
        covered, parents = 0, []
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.strip().startswith("#"):
                covered = 7 if "shape" in str(parents) else 4
            elif match := re.match(r"( *)([a-z_0-9]+):", line):
                depth = len(match.group(1)) // 2
                parents = [*parents[:depth], match.group(2)]
                group = path.parent.name if path.parent != CONF_DIR else ""
                is_global = "# @package _global_" in path.read_text(encoding="utf-8")
                key = ".".join(parents if is_global or not group else [group, *parents])
                if covered or "#" in line:
                    described.add(key)
                    described.update(f"{key}.{inner}" for inner in re.findall(r"(\w+):", line.split(":", 1)[1]))
                covered = max(0, covered - 1)
    missing = sorted(
        key
        for key in schema_types()
        if key not in described and not key.startswith(("model.shape.", "model.recommended."))
    )
    assert not missing, f"no comment in conf/ for {missing}"


def test_no_yaml_names_code_or_expressions():
    for path in [CONF_DIR / "config.yaml", *FILES]:
        text = path.read_text(encoding="utf-8")
        assert "_target_" not in text
        assert not re.search(r"\$\{(eval:|oc\.decode|oc\.env)", text)
        yaml.safe_load(text)


def test_the_default_run_is_nano_on_arithmetic():
    config = compose()
    assert (config.model.name, config.data.source, config.evaluation.tasks) == (
        "llada_nano",
        "arithmetic",
        ["arithmetic"],
    )
    assert config.dpo.beta == config.model.recommended.beta
    assert config.optim.learning_rate == config.model.recommended.learning_rate.lora
    assert unlikely_settings(config) == []


def test_the_large_model_brings_real_pairs_and_the_published_recipe():
    config = compose(["model=llada_8b", "hardware=rtx4080"])
    assert (config.data.source, config.evaluation.tasks) == ("hh_rlhf", [])
    assert config.quantization.load_in_4bit
    assert (config.dpo.beta, config.optim.max_train_steps) == (0.2, None)
    assert compose(["model=llada_8b", "adapter=full"]).optim.learning_rate == 5e-7


def test_the_command_line_wins_over_what_a_model_or_profile_brings():
    config = compose(["model=llada_8b", "data=arithmetic", "evaluation=gsm8k", "hardware=rtx4080", "quantization=none"])
    assert (config.data.source, config.evaluation.tasks) == ("arithmetic", ["gsm8k"])
    assert not config.quantization.load_in_4bit
    assert compose(["model=llada_8b", "dpo.beta=0.7"]).dpo.beta == 0.7


def test_the_learning_rate_follows_the_kind_of_adapter():
    rates = compose().model.recommended.learning_rate
    assert compose(["adapter=full"]).optim.learning_rate == rates.full
    assert compose(["adapter=lora"]).optim.learning_rate == rates.lora


def test_values_for_a_pair_of_model_and_data_override_the_models_own(tmp_path):
    group = tmp_path / "recommended"
    group.mkdir()
    (group / "llada_8b_gsm8k_preferences.yaml").write_text(
        "# @package model.recommended\nbeta: 0.4\nmax_train_steps: 7\n", encoding="utf-8"
    )
    chosen = ["model=llada_8b", "data=gsm8k_preferences"]
    config = compose(chosen, config_dir=str(tmp_path))
    assert (config.dpo.beta, config.optim.max_train_steps) == (0.4, 7)
    assert compose([*chosen, "dpo.beta=2"], config_dir=str(tmp_path)).dpo.beta == 2
    assert compose([], config_dir=str(tmp_path)).dpo.beta == compose().dpo.beta


def test_a_users_own_folder_adds_options_and_is_checked_like_ours(tmp_path):
    (tmp_path / "data").mkdir()
    own = tmp_path / "data" / "mine.yaml"
    own.write_text("defaults: [jsonl, _self_]\ndataset_name: pairs.jsonl\nmax_length: 256\n", encoding="utf-8")
    config = compose(["data=mine"], config_dir=str(tmp_path))
    assert (config.data.source, config.data.max_length) == ("jsonl", 256)
    own.write_text("defaults: [jsonl, _self_]\nmax_lenght: 256\n", encoding="utf-8")
    with pytest.raises(
        UserError, match=r"data/mine.yaml: data.max_lenght: no such setting; did you mean data.max_length\?"
    ):
        compose(["data=mine"], config_dir=str(tmp_path))


def test_a_users_own_root_file_can_start_from_ours(tmp_path):
    (tmp_path / "mine.yaml").write_text("defaults: [config, _self_]\nseed: 7\n", encoding="utf-8")
    assert compose([], config_name="mine", config_dir=str(tmp_path)).seed == 7


def test_the_documented_settings_of_the_public_project_are_one_experiment():
    config = compose(["experiment=laddpo_hh"])
    assert config.model.model_name_or_path == "GSAI-ML/LLaDA-8B-Instruct"
    assert config.quantization.load_in_4bit
    assert (config.data.source, config.data.dataset_name, config.data.dataset_split) == (
        "hh_rlhf",
        "Anthropic/hh-rlhf",
        "train",
    )
    assert (config.data.max_length, config.data.random_sample_size) == (1024, 50000)
    optim = config.optim
    assert (optim.learning_rate, optim.per_device_train_batch_size, optim.gradient_accumulation_steps) == (5e-7, 1, 64)
    assert (optim.num_train_epochs, optim.lr_scheduler_type, optim.num_warmup_steps) == (1, "cosine", 100)
    assert (optim.weight_decay, config.dpo.beta, config.dpo.diffusion_samples) == (0.01, 0.1, 4)
    assert (config.hardware.precision, config.hardware.gradient_checkpointing) == ("fp16", True)
    assert (config.save_steps, config.logging_steps, config.seed) == (500, 10, 42)


def test_an_experiment_wins_over_its_model_and_the_command_line_over_it():
    config = compose(["experiment=laddpo_hh", "data=ultrafeedback", "hardware=h200", "dpo.beta=0.3"])
    assert (config.data.source, config.dpo.beta, config.hardware.token_budget) == ("ultrafeedback", 0.3, 16384)


def test_hardware_changes_no_setting_outside_its_group_but_quantization():
    plain = compose(["model=llada_8b"])
    for path in (CONF_DIR / "hardware").glob("*.yaml"):
        config = compose(["model=llada_8b", f"hardware={path.stem}"])
        for name in ("model", "adapter", "data", "dpo", "optim", "evaluation"):
            assert getattr(config, name) == getattr(plain, name), f"{path.stem} changes {name}"


@pytest.mark.parametrize(
    ("settings", "beta", "rate", "tasks"),
    [
        (["model=llada_mini"], 0.5, 2e-4, ["word_problems"]),
        (["model=llada_mini", "data=jsonl", "data.dataset_name=a.jsonl"], 0.01, 5e-5, []),
        (["model=llada_mini", "data=hh_rlhf"], 0.01, 5e-5, []),
        (["model=llada_mini", "data=hh_rlhf", "evaluation=word_problems"], 0.01, 5e-5, ["word_problems"]),
        (["model=llada_8b", "data=jsonl", "data.dataset_name=a.jsonl"], 0.2, 5e-6, []),
        (["data=jsonl", "data.dataset_name=a.jsonl"], 0.01, 2e-4, []),
    ],
)
def test_own_pairs_get_settings_for_real_texts_and_no_embedded_task(settings, beta, rate, tasks):
    config = compose(settings)
    assert (config.dpo.beta, config.optim.learning_rate, config.evaluation.tasks) == (beta, rate, tasks)


def test_only_sources_of_rows_hold_out_a_test_by_default():
    shares = {path.stem: yaml.safe_load(path.read_text()).get("test_fraction") for path in CONF_DIR.glob("data/*.yaml")}
    assert shares["jsonl"] == 0.1 and shares["onpolicy"] == 0
    of = {name: compose([f"data={name}", *NEEDS.get(f"data={name}", [])]).data for name in shares}
    without = {name for name, data in of.items() if not data.test_fraction}
    assert without == {"arithmetic", "onpolicy", "onpolicy_gsm8k", "rubric", "word_problems"}
    assert of["arithmetic"].test_split is None and of["ultrafeedback"].test_split == "test_prefs"
