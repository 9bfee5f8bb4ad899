"""What the README shows works as it stands there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from laddpo.cli.app import cli

REPOSITORY = Path(__file__).resolve().parents[1]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line.split("#")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", README, re.S)
    for line in block.splitlines()
    if line.startswith("python -m laddpo.")
]
PLUGINS = {"joblib": "hydra_joblib_launcher", "submitit": "hydra_submitit_launcher", "optuna": "hydra_optuna_sweeper"}


def test_the_python_example_gives_ln_2_before_training(monkeypatch, capsys):
    monkeypatch.chdir(REPOSITORY)
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    exec(code, {})
    assert "0.6931" in capsys.readouterr().out


@pytest.mark.parametrize("command", [c for c in COMMANDS if "my_conf" not in c])
def test_every_command_composes(command, capsys):
    if plugin := re.search(r"hydra/(?:launcher|sweeper)=([a-z]+)", command):
        pytest.importorskip(f"hydra_plugins.{PLUGINS[plugin[1]]}", reason="an optional extra that is not installed")
    _, _, module, *arguments = shlex.split(command)
    arguments = [argument for argument in arguments if argument not in ("--help", "--resolve")]
    assert cli(module.removeprefix("laddpo."), [*arguments, "--cfg", "job"]) == 0, capsys.readouterr().err
