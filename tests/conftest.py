"""Fixtures for all tests."""

import functools
import importlib
import inspect
import os
from pathlib import Path

import pytest
from hypothesis import settings

from tests.composing import compose_once

if "PYTEST_XDIST_WORKER" in os.environ:  # with -n: a core for each worker, before torch is imported
    os.environ.setdefault("OMP_NUM_THREADS", "1")

os.environ.pop("COLUMNS", None)  # workers of -n have a width, and tables would be wrapped to it
os.environ.pop("PYTHONUNBUFFERED", None)  # users seldom set it: what a test starts keeps its output back as theirs does

settings.register_profile("no deadline", deadline=None)  # a busy machine makes any example slow
settings.load_profile("no deadline")
compose_once()
REPOSITORY = Path(__file__).resolve().parents[1]


def pytest_addoption(parser) -> None:
    parser.addoption("--faults-report", metavar="FILE", help="with -m faults: write the table of faults as Markdown")
    help_of_share = "with -m faults: crash at this random share of the calls, such as 0.1"
    parser.addoption("--faults-share", type=float, default=1.0, metavar="SHARE", help=help_of_share)


def pytest_xdist_auto_num_workers() -> int:
    """How many `-n auto` means: a core and 2 GiB for each worker and the processes it starts."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    gibibytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30 if hasattr(os, "sysconf") else 4
    return max(1, min(cores, int(gibibytes // 2)))


@pytest.fixture(scope="session")
def shared_folder() -> Path:
    """Real files kept beside the repository; tests that want them skip where they are absent."""
    folder = REPOSITORY.parent / "shared"
    if not folder.is_dir():
        pytest.skip(f"the folder of real files, {folder.name}/ beside the repository, is not here")
    return folder


@pytest.fixture(autouse=True, scope="session")
def no_waiting_for_the_disk():
    """A quick run syncs 80 times, several milliseconds each; tests/faults check that what is written is synced."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda fd: None)
        yield


DRAWING = (  # of these nothing keeps the name that it imported
    ("laddpo.results.plots", "training_plot"),
    ("laddpo.results.plots", "evaluation_plot"),
    ("laddpo.estimator_study.report", "variance_plot"),
    ("laddpo.preference.preparation", "report_figure"),
)


@pytest.fixture(autouse=True, scope="session")
def no_pictures():
    """The pictures of a stage are files of one word: drawing them takes most of the time of a quick run."""
    importlib.import_module("laddpo.results.run_blocks")  # keeps the real ones: reports draw
    with pytest.MonkeyPatch.context() as patch:
        for module, name in DRAWING:
            patch.setattr(f"{module}.{name}", _undrawn(getattr(importlib.import_module(module), name)))
        yield


@pytest.fixture
def with_pictures(no_pictures, monkeypatch):
    """A test of the pictures themselves has the real ones."""
    for module, name in DRAWING:
        monkeypatch.setattr(f"{module}.{name}", getattr(importlib.import_module(module), name).__wrapped__)


def _undrawn(draw):
    @functools.wraps(draw)
    def write(*args, **kwargs) -> None:
        write_bytes(signature.bind(*args, **kwargs).arguments["path"], PICTURE)

    signature, write_bytes = inspect.signature(draw), importlib.import_module("laddpo.storage.atomic").write_bytes
    return write if "path" in signature.parameters else functools.wraps(draw)(lambda content: PICTURE)


PICTURE = b"\x89PNG, not drawn"
