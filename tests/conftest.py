"""Fixtures for all tests."""

from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]


def pytest_addoption(parser) -> None:
    parser.addoption("--faults-report", metavar="FILE", help="with -m faults: write the table of faults as Markdown")


@pytest.fixture(scope="session")
def shared_folder() -> Path:
    """Real files kept beside the repository; tests that want them skip where they are absent."""
    folder = REPOSITORY.parent / "shared"
    if not folder.is_dir():
        pytest.skip(f"the folder of real files, {folder.name}/ beside the repository, is not here")
    return folder
