"""What the README shows works as it stands there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from laddpo.cli.app import cli

REPOSITORY = Path(__file__).resolve().parents[1]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
LINES = [
    line.split("    #")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", README.replace("\\\n", " "), re.S)
    for line in block.splitlines()
]
# by whatever starts them: python, torchrun, accelerate, srun
COMMANDS = sorted({found for line in LINES for found in re.findall(r"-m (laddpo\.\w[^&]*)", line)})
EXTRAS = sorted({name for found in re.findall(r"pip install -e '\.\[([\w,]+)\]'", README) for name in found.split(",")})
PLUGINS = {"joblib": "hydra_joblib_launcher", "submitit": "hydra_submitit_launcher", "optuna": "hydra_optuna_sweeper"}


def test_the_python_example_gives_ln_2_before_training(monkeypatch, capsys):
    monkeypatch.chdir(REPOSITORY)
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    exec(code, {})
    assert "0.6931" in capsys.readouterr().out


def test_every_way_of_starting_a_stage_is_seen():
    started = [line for line in LINES if "laddpo." in line]
    for launcher in ("python", "torchrun", "accelerate", "srun"):
        assert any(line.startswith(launcher) and "-m laddpo." in line for line in started), launcher


@pytest.mark.parametrize("name", EXTRAS)
def test_every_extra_that_is_installed_exists(name):
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has none")
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert name in project["optional-dependencies"]


@pytest.mark.parametrize("command", [c for c in COMMANDS if "my_conf" not in c])
def test_every_command_composes(command, capsys):
    if plugin := re.search(r"hydra/(?:launcher|sweeper)=([a-z]+)", command):
        pytest.importorskip(f"hydra_plugins.{PLUGINS[plugin[1]]}", reason="an optional extra that is not installed")
    module, *arguments = shlex.split(command, comments=True)
    arguments = [argument for argument in arguments if argument not in ("--help", "--resolve")]
    assert cli(module.removeprefix("laddpo."), [*arguments, "--cfg", "job"]) == 0, capsys.readouterr().err
