"""The part of the benchmark about many pairs: its rows, its processes, its table. The whole part is marked `long`."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from laddpo.benchmarking import limits, many
from laddpo.benchmarking.process_cost import process_cost
from laddpo.benchmarking.workload import Workbench
from laddpo.cli.app import cli
from laddpo.errors import RunFault, UserError
from laddpo.hardware.machine import find_machine
from laddpo.settings.compose import compose

PYTHON = [sys.executable, "-c"]


@pytest.fixture(scope="module")
def bench():
    config = compose(["benchmark.mean=40", "benchmark.p99=90", "benchmark.prompt_mean=20", "benchmark.max_length=100"])
    return Workbench(config, find_machine(config))


def test_rows_have_the_lengths_of_dialogues_and_prompts_of_their_own(tmp_path, bench):
    many.write_rows(tmp_path / "rows.jsonl", 400, bench)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert len({row["prompt"] for row in rows}) == 400
    assert all(row["chosen"] != row["rejected"] for row in rows)
    mean = sum(len(row["prompt"]) + len(row["chosen"]) for row in rows) / 400
    assert mean == pytest.approx(40 + 4, rel=0.1)  # each text has some letters more


def test_a_store_is_filled_opened_and_looked_up(tmp_path, monkeypatch):
    monkeypatch.setattr(many, "SHARD", 50)
    many.write_store(tmp_path / "store", 120)
    many.open_store(str(tmp_path / "store"), "120", str(tmp_path / "told.json"))
    assert json.loads((tmp_path / "told.json").read_text())["lookup_us"] > 0
    with pytest.raises(UserError, match="has no reference value"):
        many.open_store(str(tmp_path / "store"), "5000", str(tmp_path / "told.json"))


@pytest.mark.skipif(not hasattr(os, "wait4"), reason="the system does not say what a process took")
class TestProcesses:
    def test_time_and_memory_are_those_of_the_process(self):
        beside = bytearray(300 * 2**20)  # memory of this process is none of theirs
        idle = process_cost([*PYTHON, "pass"])
        assert idle["gib"] < 0.1 and len(beside)
        busy = process_cost([*PYTHON, "x = bytearray(200 * 2**20); sum(range(10**7))"])
        assert busy["seconds"] > idle["seconds"] and busy["gib"] - idle["gib"] == pytest.approx(200 / 1024, rel=0.1)

    def test_one_that_is_stopped_in_time_is_no_failure(self, tmp_path):
        code = (
            "import signal, sys, time, pathlib; signal.signal(signal.SIGTERM, lambda *_: sys.exit(75)); "
            f"pathlib.Path({str(tmp_path / 'there')!r}).touch(); time.sleep(60)"
        )
        assert process_cost([*PYTHON, code], tmp_path / "there")["seconds"] < 30

    @pytest.mark.parametrize("until", [None, "never"])
    def test_one_that_fails_is_reported_with_its_words(self, until, tmp_path):
        with pytest.raises(RunFault, match="ended with 3: some words"):
            process_cost([*PYTHON, "print('some words'); raise SystemExit(3)"], until and tmp_path / until)

    def test_a_benchmark_that_is_stopped_leaves_no_process_behind(self, tmp_path):
        def ring() -> None:
            wait_until((tmp_path / "there").exists)
            os.kill(os.getpid(), signal.SIGALRM)

        watch = threading.Thread(target=ring)
        with pytest.raises(limits.TimeUp), limits.Clock(minutes=10).watched():
            watch.start()
            process_cost([*PYTHON, sleeping(tmp_path / "there")])
        watch.join()
        wait_until(lambda: not processes_that_name(tmp_path))  # what is killed takes a moment to go

    def test_one_whose_benchmark_is_killed_ends_with_it(self, tmp_path):
        command = [*PYTHON, sleeping(tmp_path / "there")]
        call = f"from laddpo.benchmarking.process_cost import process_cost; process_cost({command})"
        benchmark = subprocess.Popen([*PYTHON, call])
        wait_until((tmp_path / "there").exists)
        benchmark.kill()
        benchmark.wait()
        wait_until(lambda: not processes_that_name(tmp_path))


def sleeping(there: Path) -> str:
    """The code of a process that makes this file and then does nothing for long."""
    return f"import time, pathlib; pathlib.Path({str(there)!r}).touch(); time.sleep(300)"


def wait_until(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def processes_that_name(folder: Path) -> list[Path]:
    """Those in whose command the folder stands."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # a process that has ended meanwhile
            found += [path] if str(folder).encode() in path.read_bytes() else []
    return found


def test_growth_is_the_slope_in_logarithms():
    assert many.growth_exponent([10, 100, 1000], [2.0, 20.0, 200.0]) == pytest.approx(1)
    assert many.growth_exponent([10, 1000], [3.0, 30.0]) == pytest.approx(0.5)
    assert many.growth_exponent([10], [3.0]) is None
    assert many.growth_exponent([10, 100, 1000], [-0.1, 20.0, 200.0]) == pytest.approx(1), "noise about nothing"


def test_the_table_has_a_row_for_each_number_of_pairs_and_one_of_growth_beyond_the_start():
    costs = {name: {"seconds": 6.0, "gib": 0.5} for name in many.COLUMNS}
    rows = [{"setting": count, "lookup_us": 40.0, **costs} for count in (many.FEW, 10_000, 100_000)]
    rows[1]["prepare"], rows[2]["prepare"] = {"seconds": 7.0, "gib": 0.5}, {"seconds": 106.0, "gib": 0.75}
    text, record = many.many_section(rows)
    assert "| 100,000 | 106.0 s, 0.75 GiB | 6.0 s, 0.50 GiB |" in text and "40.0 us" in text
    assert record["growth"]["prepare"] == pytest.approx(2), "1 s and 100 s beside a start of 6 s: quadratic"
    assert record["growth"]["resumed"] is None
    assert "growth of time" in many.many_section(rows[:1])[0], "the time was over before the second row"


@pytest.mark.long
def test_stages_run_on_rows_that_are_made(tmp_path):
    wanted = ["benchmark.parts=[many]", "benchmark.many_pairs=[60,120]", "hardware.device=cpu"]
    assert cli("benchmark", [*wanted, f"output_dir={tmp_path / 'run'}"]) == 0
    found = json.loads((tmp_path / "run" / "benchmark.json").read_text())["many"]
    assert [row["setting"] for row in found["rows"]] == [many.FEW, 60, 120] and found["growth"].keys() == set(
        many.COLUMNS
    )
