"""Fixtures of the core's tests."""

import os

import pytest


@pytest.fixture(autouse=True)
def unsynced(monkeypatch):
    """No waiting for the disk: these tests kill processes, not machines, and save hundreds of small checkpoints."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


@pytest.fixture
def folder(tmp_path):
    """Where a run writes; other runs of the test may go beside it or inside."""
    return tmp_path / "run"
