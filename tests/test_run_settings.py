"""What may be said beside run=: a finished run decides how it was trained, the command line how it is looked at."""

import pytest

from laddpo.cli.app import cli
from laddpo.settings.compose import compose, write_config


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The folder of a run, as far as its settings go, in an otherwise empty working directory."""
    monkeypatch.chdir(tmp_path)
    write_config(
        compose(["model=llada_mini", "data=onpolicy", "adapter.r=8", "hardware.precision=fp32"]), tmp_path / "r"
    )
    return "run=r"


def asked(stage: str, *overrides: str) -> list:
    """[(settings, folder)] that the stage got; [] where it was refused."""
    got: list = []
    code = cli(stage, overrides, lambda config, folder: got.append((config, folder)))
    assert code == (0 if got else 2)
    return got


@pytest.mark.parametrize("stage", ["evaluate", "generate", "chat", "variance", "export"])
def test_what_a_finished_run_decides_is_refused_by_name(stage, run, capsys):
    assert asked(stage, run, "model=llada_nano", "adapter.r=64", "dpo.beta=0.7", "adapter.kind=lora") == []
    err = capsys.readouterr().err
    assert "model=llada_nano, adapter.r=64, dpo.beta=0.7: given beside run=r, which was made with" in err
    assert "model.name=llada_mini, adapter.r=8, dpo.beta=0.5" in err
    assert "hardware.*, paths.*" in err and err.count("error:") == 1


@pytest.mark.parametrize("stage", ["evaluate", "generate", "chat", "variance", "export"])
def test_what_a_run_has_anyway_may_be_repeated(stage, run):
    ((config, folder),) = asked(stage, run, "model=llada_mini", "adapter.r=8", "seed=42", "logger=none")
    assert (config.model.name, config.data.source, config.adapter.r) == ("llada_mini", "onpolicy", 8)
    assert folder.name.endswith("-llada_mini-onpolicy")


def test_measuring_machine_and_places_stay_the_command_lines(run):
    more = ["evaluation.limit=3", "hardware.threads=1", "paths.outputs_dir=out", "output_dir=e", "auto=false"]
    ((config, folder),) = asked("evaluate", run, *more)
    assert (config.evaluation.limit, config.hardware.threads, config.paths.outputs_dir) == (3, 1, "out")
    assert (config.hardware.precision, config.auto, str(folder)) == ("fp32", False, "e")
    ((config, _),) = asked("variance", run, "variance.pairs=4", "hardware=cpu")
    assert (config.variance.pairs, config.hardware.device, config.hardware.precision) == (4, "cpu", "fp32")
    ((config, _),) = asked("generate", run, "prompt=hello", "evaluation=gsm8k")
    assert (config.prompt, config.evaluation.tasks) == ("hello", ["gsm8k"])
    ((config, _),) = asked("export", run, "export.adapter_only=true")
    assert config.export.adapter_only and config.run == "r"


def test_a_setting_of_another_stage_is_refused_beside_a_run(run, capsys):
    assert asked("export", run, "evaluation.limit=3") == []
    assert "evaluation.limit=3: given beside run=r" in capsys.readouterr().err
    assert asked("evaluate", run, "data.random_sample_size=9") == []
    assert "which was made with data.random_sample_size=null;" in capsys.readouterr().err
    assert asked("evaluate", run, "experiment=laddpo_hh") == []
    assert "experiment=laddpo_hh: given beside run=r" in capsys.readouterr().err


def test_preparing_answers_of_a_run_takes_the_settings_of_its_data(run):
    ((config, _),) = asked("prepare", run, "data=onpolicy", "model=llada_mini", "data.sampling.samples=4")
    assert config.data.sampling.samples == 4


def test_a_way_of_decoding_changes_how_answers_are_made_and_not_which(run):
    ((config, _),) = asked("evaluate", run)
    plain = config.evaluation
    ((config, _),) = asked("evaluate", run, "decoding=llada_1_5_gpqa")
    found = config.evaluation
    assert (found.steps, found.confidence_threshold, found.block_cache) == (256, None, "none")
    assert (found.tasks, found.limit, found.batch_size) == (plain.tasks, plain.limit, plain.batch_size)
    ((config, _),) = asked("evaluate", run, "decoding=llada_1_5_gpqa", "evaluation.steps=512")
    assert config.evaluation.steps == 512


def test_answers_made_in_another_way_are_pointed_out_where_nobody_named_it(run, capsys):
    asked("evaluate", run, "decoding=llada_1_5_gpqa", "evaluation.steps=256")
    said = capsys.readouterr().err
    assert (
        "note: answers are made otherwise than when this run was evaluated: evaluation.gen_length=256 (it had 80)"
        in said
    )
    assert "evaluation.steps" not in said and "evaluation.block_cache=none (it had dual)" in said
    asked("evaluate", run, "evaluation.limit=3", "evaluation.gen_length=32")
    assert not capsys.readouterr().err


@pytest.mark.parametrize("group", ["evaluation", "data.sampling"])
def test_steps_beside_a_threshold_that_takes_their_place_are_refused(group, run, capsys):
    data = ["data=onpolicy", f"{group}.steps=12"]
    assert asked("train", *data) == []
    assert f"{group}.steps=12: it is read only with {group}.confidence_threshold=null" in capsys.readouterr().err
    ((config, _),) = asked("train", *data, f"{group}.confidence_threshold=null")
    assert (config.evaluation if group == "evaluation" else config.data.sampling).steps == 12


def test_steps_nobody_named_follow_the_length_where_a_threshold_takes_their_place(run):
    ((config, _),) = asked("evaluate", "evaluation.gen_length=12", "evaluation.block_length=12")
    assert (config.evaluation.confidence_threshold, config.evaluation.steps) == (0.9, 12)
    ((config, _),) = asked("evaluate", "evaluation.confidence_threshold=null")
    assert config.evaluation.steps == 24
    ((config, _),) = asked("generate", "model=sdar_1_7b", "decoding=sdar_dynamic", "evaluation.steps=128", "prompt=a")
    assert (config.evaluation.confidence_threshold, config.evaluation.steps) == (0.9, 128)


def test_an_evaluation_that_asks_what_the_data_asks_means_the_runs_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_config(compose(["model=llada_mini"]), tmp_path / "r")
    ((config, _),) = asked("evaluate", "run=r", "evaluation=default", "decoding=fast")
    assert config.evaluation.tasks == ["word_problems"]
    assert (config.evaluation.limit, config.evaluation.confidence_threshold) == (400, 0.9)


def test_settings_are_held_against_those_of_the_run(run, capsys):
    """llada_mini's rows have 512 tokens at most and blocks of 16; llada_nano's, which nobody named, 4,096 and 24."""
    ((config, _),) = asked("evaluate", run, "hardware.token_budget=600", "evaluation.gen_length=160")
    assert config.hardware.token_budget == 600 and config.evaluation.block_length == 16
    assert asked("evaluate", run, "hardware.token_budget=300") == []
    assert "hardware.token_budget is 300 and data.max_length is 512" in capsys.readouterr().err
    assert asked("evaluate", run, "evaluation.remasking=random") == []
    assert "evaluation.confidence_threshold is 0.9 and evaluation.remasking is 'random'" in capsys.readouterr().err


def test_what_a_run_was_made_with_is_no_mistake_of_who_looks_at_it(tmp_path, monkeypatch):
    """A newer version may refuse what an older one took."""
    monkeypatch.chdir(tmp_path)
    config = compose(["model=llada_mini"])
    config.dpo.label_smoothing = 2.0
    write_config(config, tmp_path / "r")
    assert asked("evaluate", "run=r", "evaluation.limit=3")


@pytest.mark.parametrize(
    ("stage", "setting", "said"),
    [
        ("prepare", "run=r", "run=r: prepare reads it only where the model answers questions (data=onpolicy)"),
        ("train", "run=r", "write adapter.path=<run>/adapter to start from it"),
        ("plan", "runs=[r]", 'runs=["r"]: plan does not read it; report does; leave it out.'),
        ("evaluate", "prompts=a.txt", "prompts=a.txt: evaluate does not read it; generate does"),
        ("plan", "verify=true", "verify=true: plan does not read it; prepare, precompute, evaluate"),
    ],
)
def test_a_setting_that_only_other_stages_look_at_is_refused(run, stage, setting, said, capsys):
    assert asked(stage, setting) == []
    assert said in capsys.readouterr().err


def test_a_tilde_is_the_users_home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    ((config, folder),) = asked("train", 'output_dir="~/o"', 'adapter.path="~/a"', 'paths.data_dir="~/d"')
    home = str(tmp_path / "home")
    assert (str(folder), config.adapter.path, config.paths.data_dir) == (f"{home}/o", f"{home}/a", f"{home}/d")
    ((_, folder),) = asked("train", "output_dir=~/o")
    assert str(folder) == f"{home}/o"


def test_a_block_model_keeps_its_blocks_in_every_way_of_answering(tmp_path, monkeypatch, capsys):
    """Options chosen as a whole have blocks and caches for other models; what is named itself is used or refused."""
    monkeypatch.chdir(tmp_path)
    block = ["model.architecture=SDARForCausalLM", "data=onpolicy"]  # blocks of 4, which its family tells
    config = compose([*block, "evaluation=math500", "decoding=fast", "evaluation.block_length=4"])
    for decoding in (config.evaluation, config.data.sampling):
        assert (decoding.block_length, decoding.block_cache) == (4, "none")
    write_config(config, tmp_path / "r")
    ((config, _),) = asked("evaluate", "run=r", "evaluation=word_problems", "evaluation.gen_length=30")
    found = config.evaluation
    assert (found.gen_length, found.block_length, found.block_cache) == (30, 4, "none")
    wrong = ["evaluation.block_length=16", "evaluation.block_cache=dual", "evaluation.cfg_scale=1"]
    for command in (["generate", "run=r", "prompt=a", *wrong], ["generate", *block[:1], "prompt=a", *wrong]):
        assert asked(*command) == []
        said = capsys.readouterr().err
        assert said.count("error:") == 3
        assert "leave evaluation.block_length out" in said and "leave evaluation.block_cache out" in said
        assert "set evaluation.cfg_scale=0" in said
    steps = ["evaluation.gen_length=30", "evaluation.steps=20"]
    assert asked("generate", "run=r", "prompt=a", *steps, "evaluation.confidence_threshold=null") == []
    assert "set evaluation.steps=15 or 30" in capsys.readouterr().err
