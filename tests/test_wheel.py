"""The wheel carries conf/ and the shipped model, and works from anywhere."""

import os
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
SHIPPED_MODEL = REPOSITORY / "data" / "llada_nano"


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder into which the wheel of this tree was installed, without its dependencies."""
    setuptools = int(metadata.version("setuptools").split(".")[0])
    if setuptools < 77:
        pytest.skip(f"building needs setuptools 77 or newer, here is {setuptools}")
    source = tmp_path_factory.mktemp("source")  # a copy: building leaves build/ and egg-info behind
    for name in ("laddpo", "conf"):
        shutil.copytree(REPOSITORY / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source / name)
    shutil.copytree(SHIPPED_MODEL, source / "data" / "llada_nano")
    build = "from setuptools.build_meta import build_wheel; print(build_wheel('out'))"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    (wheel,) = (source / "out").glob("*.whl")
    target = tmp_path_factory.mktemp("site")
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--target",
        str(target),
        str(wheel),
    ]
    if subprocess.run(install, capture_output=True, check=False).returncode:
        zipfile.ZipFile(wheel).extractall(target)  # environments without pip: a pure wheel is its files
    return target


def run(installed: Path, folder: Path, *arguments: str, timeout: float = 300) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )


def test_the_wheel_holds_every_yaml_template_and_module(installed):
    for folder, inside in (("conf", "laddpo/conf"), ("laddpo", "laddpo")):
        for suffix in ("*.yaml", "*.py", "*.html", "*.jinja"):
            wanted = {path.relative_to(REPOSITORY / folder) for path in (REPOSITORY / folder).rglob(suffix)}
            found = {path.relative_to(installed / inside) for path in (installed / inside).rglob(suffix)}
            assert wanted <= found


def test_the_installed_package_composes_from_another_folder(installed, tmp_path):
    done = run(installed, tmp_path, "laddpo.train", "--cfg", "job", "--resolve", "model=llada_8b", "hardware=rtx4080")
    assert done.returncode == 0, done.stderr
    assert "name: llada_8b" in done.stdout and "load_in_4bit: true" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_the_installed_package_is_the_one_that_ran(installed, tmp_path):
    code = "import laddpo.settings.ranges as r; print(r.CONF_DIR)"
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert Path(done.stdout.strip()) == installed / "laddpo" / "conf"


def test_the_installed_package_trains_two_steps_from_another_folder(installed, tmp_path):
    if not list(SHIPPED_MODEL.glob("*.safetensors")):
        pytest.skip("data/llada_nano has no weights in this checkout")
    small = [
        "optim.max_train_steps=2",
        "optim.num_warmup_steps=0",
        "optim.per_device_train_batch_size=4",
        "data.num_pairs=16",
    ]
    fast = [
        "hardware=cpu",
        "logger=none",
        "evaluation.at_end=false",
        "evaluation.every_steps=null",
        "evaluation.tasks=[]",
        "best_metric=none",
        "stopping.patience=null",
        "output_dir=run",
    ]
    done = run(installed, tmp_path, "laddpo.train", *small, *fast, timeout=600)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "metrics.jsonl").exists()
    assert (tmp_path / "data" / "prepared").is_dir()
    assert done.stdout.splitlines()[-1] == "run"
