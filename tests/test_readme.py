"""What the README and docs/ show works as it is written there."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from laddpo.cli.app import cli

REPOSITORY = Path(__file__).resolve().parents[1]
PAGES = {
    path.relative_to(REPOSITORY).as_posix(): path.read_text(encoding="utf-8")
    for path in (REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md")))
}
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", "\n".join(PAGES.values()).replace("\\\n", " "), re.S)
LINES = [
    line.split("    #")[0].strip() for language, block in BLOCKS if language == "bash" for line in block.splitlines()
]
# by whatever starts them: python, torchrun, accelerate, srun, the console command
COMMANDS = sorted(
    {found for line in LINES for found in re.findall(r"-m (laddpo\.\w[^&]*)", line)}
    | {f"laddpo.{found}" for line in LINES for found in re.findall(r"^laddpo ([a-z]\w* ?[^&]*)", line)}
)
EXTRAS = sorted({name for found in re.findall(r"'\.\[([\w,]+)\]'", "\n".join(LINES)) for name in found.split(",")})
PLUGINS = {"joblib": "hydra_joblib_launcher", "submitit": "hydra_submitit_launcher", "optuna": "hydra_optuna_sweeper"}


def test_the_python_examples_run_in_the_order_of_their_page(tmp_path, monkeypatch, capsys):
    """The loop of one's own is run where the shipped model lies, and begins at ln 2."""
    examples = re.findall(r"```python\n(.*?)```", PAGES["docs/python.md"], re.S)
    assert len(examples) == 4
    *of_the_api, loop = examples
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for code in of_the_api:
        exec(code, names)
    assert len(names["texts"]) == 2 and not names["model"].has_base
    monkeypatch.chdir(REPOSITORY)
    capsys.readouterr()
    exec(loop, {})
    losses = [float(line.split("[")[1].rstrip("]")) for line in capsys.readouterr().out.splitlines()]
    assert f"{losses[0]:.4f}" == "0.6931" and losses[0] > losses[1] > losses[2]


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


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_a_page_names_exists(page):
    """Code in backticks that looks like a path of the repository."""
    named = re.findall(r"`((?:laddpo|tests|conf|docs|data/measurements)/[\w./-]+\.\w+)`", PAGES[page])
    missing = [name for name in named if not (REPOSITORY / name).exists()]
    assert not missing


def test_the_documentation_builds_without_a_warning(tmp_path):
    pytest.importorskip("material", reason="needs mkdocs-material (pip install -e '.[docs]')")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = {path.parent.name for path in (tmp_path / "site").glob("*/index.html")}
    assert {Path(page).stem for page in PAGES if page.startswith("docs/")} - {"index"} <= pages
