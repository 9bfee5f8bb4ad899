"""The first signal asks, the second ends; handlers are put back."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from laddpo.errors import Stopped
from laddpo.processes.signals import at_once, stop_on_signal

REPOSITORY = Path(__file__).resolve().parents[1]
posix = pytest.mark.skipif(os.name != "posix", reason="signals are sent as POSIX has them")


@posix
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_sets_the_flag_and_says_so(number, capfd):
    with stop_on_signal() as stop:
        assert not stop
        os.kill(os.getpid(), number)
        assert stop and stop.name == number.name
    assert f"{number.name}: stopping where nothing is lost; once more to stop at once." in capfd.readouterr().err


@posix
def test_handlers_are_put_back():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with pytest.raises(RuntimeError), stop_on_signal():
        raise RuntimeError
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


@posix
def test_a_second_signal_ends_the_process_at_once_with_code_75():
    code = (
        "import os, signal, time\nfrom laddpo.processes.signals import stop_on_signal\n"
        "with stop_on_signal():\n"
        "    for _ in range(2): os.kill(os.getpid(), signal.SIGTERM)\n"
        "    time.sleep(30)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, timeout=60, capture_output=True)
    assert done.returncode == 75


@posix
def test_work_that_polls_nothing_is_ended_where_it_is_and_says_what_is_left():
    said = pytest.raises(Stopped, match=r"nothing was written\. Give it again\.")
    with said, stop_on_signal() as stop, at_once(stop, "nothing was written.", "Give it again."):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            pytest.fail("went on")
        except KeyboardInterrupt:
            raise ValueError from None  # what a library may make of it
    assert stop.name == "SIGTERM"
    with pytest.raises(Stopped), at_once(stop, "stopped before.", "Again."):
        pytest.fail("began after the signal")
    with pytest.raises(ValueError), stop_on_signal() as stop, at_once(stop, "stopped.", "Again."):
        raise ValueError
    with stop_on_signal() as stop:
        with at_once(stop, "stopped.", "Again."):
            pass
        os.kill(os.getpid(), signal.SIGTERM)  # after the block it is a flag again
        assert stop


def test_outside_the_main_thread_the_flag_stays_false():
    seen = []

    def work() -> None:
        with stop_on_signal() as stop:
            seen.append(bool(stop))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False]


@posix
def test_outside_of_any_step_sigterm_ends_a_stage_as_ctrl_c_does():
    code = (
        "import os, signal, sys, time\nfrom laddpo.cli.app import run_stage\nsys.argv = ['prepare']\n"
        "run_stage('prepare', lambda config, folder: (os.kill(os.getpid(), signal.SIGTERM), time.sleep(30)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, timeout=60, capture_output=True, text=True)
    assert done.returncode == 75 and "Traceback" not in done.stderr


def test_an_error_that_an_interrupt_became_inside_a_library_is_an_interrupt(capsys):
    from laddpo.cli.app import cli

    def library(config, folder):
        try:
            raise KeyboardInterrupt
        finally:
            None.flags()

    assert cli("prepare", [], library) == 75
    assert "Traceback" not in capsys.readouterr().err
