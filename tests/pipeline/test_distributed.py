"""Stages in several processes: one of them is killed, others take over, and the run ends as in one process."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from laddpo.training.outputs import resume_step
from tests.launching import command, environment, launch

SECONDS = 180
STEPS = 24
RUN = (
    f"optim.max_train_steps={STEPS}",
    "optim.per_device_train_batch_size=5",
    "optim.lr_scheduler_type=constant",  # the killed run would have been longer
    "evaluation.every_steps=12",
    "best_metric=loss",
)
# 24 pairs in steps of 5 per process: each epoch ends in a short step


def rank_processes(launcher: int) -> dict[int, int]:
    """Process numbers by rank of what a launcher started."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            names = (path / "environ").read_bytes().split(b"\0") if parent == launcher else []
        except OSError:  # ended meanwhile
            continue
        for name in names:
            if name.startswith(b"RANK="):
                found[int(name.removeprefix(b"RANK="))] = int(path.name)
    return found


def killed_run(stages, run: Path, *settings: str, restarts: int = 0) -> tuple[int, str]:
    """Exit code of the launcher, and what two processes said of which the second was killed after the third checkpoint.
    Without restarts the launcher has a minute to end."""
    arguments = stages.overrides(*RUN, f"output_dir={run}", "save_steps=1", *settings)
    with subprocess.Popen(
        command(2, f"--max-restarts={restarts}", "-m", "laddpo.train", *arguments),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            deadline = time.monotonic() + SECONDS
            while resume_step(run) < 3:
                assert process.poll() is None, process.stdout.read()
                assert time.monotonic() < deadline, "no third checkpoint"
                time.sleep(0.01)
            os.kill(rank_processes(process.pid)[1], signal.SIGKILL)
            said, _ = process.communicate(timeout=60 if restarts == 0 else SECONDS)
        finally:
            if process.poll() is None:
                process.kill()
    return process.returncode, said


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_model):
    """A run of two processes of which one was killed, continued by three; and the same run by one."""
    from tests.pipeline.conftest import Stages

    stages = Stages(tmp_path_factory.mktemp("distributed"), tiny_model)
    together, alone = stages.folder / "together", stages.folder / "alone"
    code, said = killed_run(stages, together, "optim.max_train_steps=2000")
    assert code == 1, said
    continued = launch(
        3, "-m", "laddpo.train", *stages.overrides(*RUN, f"output_dir={together}", "resume=true", "save_steps=50")
    )
    assert continued.returncode == 0, continued.stdout
    assert stages.run("train", *RUN, f"output_dir={alone}", f"paths.data_dir={stages.folder / 'other'}",
                      "hardware.processes=2", "save_steps=50") == 0  # fmt: skip
    return {"said": said, "continued": continued.stdout, "together": together, "alone": alone, "stages": stages}


@pytest.fixture(scope="module")
def restarted(runs) -> Path:
    """The folder of a run whose second process was killed, and all of which the launcher started again."""
    folder = runs["stages"].folder / "restarted"
    code, said = killed_run(runs["stages"], folder, "resume=true", restarts=1)
    assert code == 0, said
    assert said.count("holds no run yet") == 1 and said.count("resuming at step") == 1, said
    return folder


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def largest_difference(a: Path, b: Path) -> float:
    """Relative, of any tensor of two adapters."""
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (a, b))
    assert first.keys() == second.keys()
    return max(float(np.linalg.norm(first[k] - second[k]) / max(1e-9, np.linalg.norm(second[k]))) for k in first)


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes by /proc")
class TestKilledAndTakenOver:
    def test_the_others_say_once_that_a_process_ended_and_what_to_do(self, runs):
        assert runs["said"].count("error: another of the 2 processes") == 1, runs["said"]
        assert "resume=true" in runs["said"]
        ours = runs["said"].split("torch/distributed")[0]
        assert "Traceback" not in ours

    def test_one_process_shows_progress_and_one_line_of_each_kind(self, runs):
        assert len(re.findall(r"^DPO: ", runs["continued"], re.M)) == 1
        assert len(re.findall(r"^machine: 3 processes", runs["continued"], re.M)) == 1
        assert runs["continued"].count("resuming at step") == 1

    def test_the_run_has_the_steps_order_and_noise_of_one_process(self, runs):
        found, wanted = (lines(runs[name] / "metrics.jsonl") for name in ("together", "alone"))
        assert [record["step"] for record in found] == [record["step"] for record in wanted]
        for a, b in zip(found, wanted, strict=True):
            assert a.keys() == b.keys()
            for name in b:
                assert a[name] == pytest.approx(b[name], rel=2e-3, abs=2e-3), (a["step"], name)

    def test_adapters_equal_those_of_one_process(self, runs):
        for name in ("adapter", "adapter_last"):
            assert largest_difference(runs["together"] / name, runs["alone"] / name) < 1e-3

    def test_answers_and_their_order_equal_those_of_one_process(self, runs):
        found, wanted = (lines(runs[name] / "evaluation" / "items.jsonl") for name in ("together", "alone"))
        assert [(r["model"], r["id"]) for r in found] == [(r["model"], r["id"]) for r in wanted]
        assert [r["text"] for r in found] == [r["text"] for r in wanted]
        results = [json.loads((runs[n] / "evaluation" / "results.json").read_text()) for n in ("together", "alone")]
        assert results[0]["exact_match"] == results[1]["exact_match"]

    def test_the_finished_run_is_whole_and_sealed(self, runs):
        from laddpo.storage.manifests import read_manifest

        manifests = [read_manifest(runs[name], "train") for name in ("together", "alone")]
        assert manifests[0]["fields"]["step"] == manifests[1]["fields"]["step"] == STEPS
        assert "processes: 2" in (runs["together"] / "config.yaml").read_text(encoding="utf-8")

    def test_a_launcher_that_restarts_all_ends_the_run_as_one_process(self, runs, restarted):
        for name in ("adapter", "adapter_last"):
            assert largest_difference(restarted / name, runs["alone"] / name) < 1e-3
        assert [record["step"] for record in lines(restarted / "metrics.jsonl")] == [
            record["step"] for record in lines(runs["alone"] / "metrics.jsonl")
        ]
