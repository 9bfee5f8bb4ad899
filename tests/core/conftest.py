"""Fixtures of the core's tests."""

import pytest


@pytest.fixture
def folder(tmp_path):
    """Where a run writes; other runs of the test may go beside it or inside."""
    return tmp_path / "run"
