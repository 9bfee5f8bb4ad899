"""What may be said beside run=: a finished run decides how it was trained, the command line how it is looked at."""

import pytest

from laddpo.app import cli
from laddpo.compose import compose, write_config


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


@pytest.mark.parametrize("stage", ["evaluate", "generate", "variance", "export"])
def test_what_a_finished_run_decides_is_refused_by_name(stage, run, capsys):
    assert asked(stage, run, "model=llada_nano", "adapter.r=64", "dpo.beta=0.7", "adapter.kind=lora") == []
    err = capsys.readouterr().err
    assert "model=llada_nano, adapter.r=64, dpo.beta=0.7: given beside run=r, which was made with" in err
    assert "model.name=llada_mini, adapter.r=8, dpo.beta=0.5" in err
    assert "hardware.*, paths.*" in err and err.count("error:") == 1


@pytest.mark.parametrize("stage", ["evaluate", "generate", "variance", "export"])
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
