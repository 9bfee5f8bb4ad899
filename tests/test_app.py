"""The door of every stage: exit codes, flags, the run's folder, speed, and sweeps of real child processes."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from laddpo import __version__
from laddpo.cli.app import cli, run_folder
from laddpo.errors import UserError
from laddpo.jobs import runner, sweep
from laddpo.settings.compose import compose, write_config
from laddpo.settings.read_settings import READS
from laddpo.storage.atomic import write_json
from laddpo.storage.json_lines import JsonLines
from laddpo.storage.locks import locked

STAGES = ["prepare", "precompute", "train", "evaluate", "sft", "generate", "plan", "doctor"]


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def run_python(*arguments: str, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=child_environment(), **kwargs
    )


def child_environment() -> dict[str, str]:
    root = str(Path(sweep.__file__).parents[1])
    return {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}


def seconds_of_children() -> float:
    """Of a core, by processes that have ended: another one that keeps the machine busy adds little to it."""
    times = os.times()
    return times.children_user + times.children_system


def timed_python(*arguments: str) -> tuple[subprocess.CompletedProcess, float]:
    before = seconds_of_children()
    return run_python("-X", "importtime", *arguments), seconds_of_children() - before


def exit_code_of_stopped_sweep(command: list[str], until: Path, seconds: float) -> int:
    """Start a sweep of `tiny_jobs` in a process, send SIGTERM when `until` is there, and wait that long for its end."""
    script = (
        "import sys, laddpo.jobs.runner as s; from laddpo.cli.app import cli\n"
        "original = s.child_command\n"
        "s.child_command = lambda *a: [original(*a)[0], 'child.py', *original(*a)[3:]]\n"
        f"sys.exit(cli('train', {command}))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], env=child_environment(), stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not until.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    return process.wait(timeout=seconds)


def test_a_stage_gets_the_typed_settings_and_a_folder_that_it_owns():
    seen = []
    assert cli("train", ["seed=7"], lambda config, folder: seen.append((config, folder))) == 0
    config, folder = seen[0]
    assert config.seed == 7
    assert folder.parent == Path("outputs/train") and folder.name.endswith("-llada_nano-arithmetic")
    assert not folder.exists()


def test_exit_codes_tell_the_user_from_a_fault(capsys):
    def ends_by(error):
        def main(config, folder):
            raise error

        code = cli("train", [], main)
        return code, capsys.readouterr().err

    assert ends_by(UserError("a is 1", "b is 2")) == (2, "2 problems, nothing was run:\nerror: a is 1\nerror: b is 2\n")
    code, err = ends_by(RuntimeError("bug"))
    assert code == 1 and "Traceback" in err and "bug" in err
    assert ends_by(SystemExit(75))[0] == 75
    assert ends_by(SystemExit(None))[0] == 0
    code, err = ends_by(KeyboardInterrupt())
    assert code == 75 and "Traceback" not in err


def test_a_traceback_does_not_show_a_secret(capsys, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "correct-horse-battery")

    def main(config, folder):
        raise RuntimeError("could not log in with correct-horse-battery")

    assert cli("train", [], main) == 1
    assert "correct-horse" not in capsys.readouterr().err


def test_only_the_first_process_of_a_launch_reports_a_mistake(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli("train", ["dpo.betta=1"]) == 2
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_shows_its_purpose_and_the_options(stage, capsys):
    assert cli(stage, ["--help"]) == 0
    out = capsys.readouterr().out
    assert f"python -m laddpo.{stage}" in out and "rtx4080" in out
    assert ("vrpo_paper" in out) == any(name.startswith("dpo.") for name in READS[stage])


def test_cfg_prints_the_settings_and_the_mistakes_in_them(capsys):
    assert cli("train", ["--cfg", "job", "dpo.beta=0.3"]) == 0
    out = capsys.readouterr().out
    assert "beta: 0.3" in out and "${model.recommended." in out and "hydra" not in out
    assert cli("train", ["--cfg", "job", "--resolve", "--package", "optim"]) == 0
    assert "${" not in capsys.readouterr().out
    assert cli("train", ["--cfg", "job", "dpo.beta=-1"]) == 2
    captured = capsys.readouterr()
    assert "beta: -1" in captured.out and "dpo.beta is -1.0" in captured.err
    assert cli("train", ["--cfg", "job", "--package", "dpoo"]) == 2


def test_flags_may_stand_between_settings(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.yaml").write_text("defaults: [arithmetic, _self_]\nnum_pairs: 9\n", encoding="utf-8")
    seen = []
    command = ["optim.max_train_steps=2", "--config-dir", str(tmp_path), "data=mine"]
    assert cli("train", command, lambda config, folder: seen.append(config)) == 0
    assert (seen[0].optim.max_train_steps, seen[0].data.num_pairs) == (2, 9)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_an_output_that_is_full_is_named():
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "laddpo.train", "--version"],
            stdout=full, stderr=subprocess.PIPE, text=True, env=child_environment(),
        )  # fmt: skip
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: standard output, or a file, could not be written: No space left")


def test_version_and_info(capsys):
    assert cli("train", ["--version"]) == 0
    assert capsys.readouterr().out == f"laddpo {__version__}\n"
    assert cli("train", ["--info", "defaults"]) == 0
    assert "llada_nano" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["dpo.betta=1"], ["data.dataset_name=x.jsonl"], ["--cfg", "job"], ["model=llada_9b", "dpo.beta=x"]],
)
def test_help_and_mistakes_answer_soon_and_without_torch(arguments):
    """Two seconds on an idle machine; on any, a few times the work of starting Python with hydra."""
    ratios = []
    while not ratios or (ratios[-1] >= 6 and len(ratios) < 3):  # a neighbour may come between the two
        _, plain = timed_python("-c", "import hydra._internal.hydra, numpy")
        done, taken = timed_python("-m", "laddpo.train", *arguments)
        ratios.append(taken / plain)
    assert ratios[-1] < 6, ratios
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time")}
    assert "hydra" in imported
    # numpy comes with the tables of options, whose rows draw masks: a twentieth of a second
    heavy = imported & {"torch", "transformers", "datasets", "pyarrow", "peft", "matplotlib", "wandb"}
    assert not heavy
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("stage", "arguments", "message"),
    [
        ("generate", [], "neither prompt nor prompts is set"),
        ("generate", ["prompt=a", "prompts=b.txt"], "prompt is 'a' and prompts is 'b.txt'; expected one of them"),
        ("generate", ["prompts=latin1.txt"], "latin1.txt:2: is not UTF-8: byte 0xe9"),
        ("export", [], "run is not set"),
        ("evaluate", ["evaluation.tasks=[]"], "evaluation.tasks is empty and run is not set"),
    ],
)
def test_a_stage_without_what_it_works_on_says_so_before_torch_loads(stage, arguments, message, tmp_path):
    (tmp_path / "latin1.txt").write_bytes(b"01+01=\ncaf\xe9\n")
    done = run_python("-X", "importtime", "-m", f"laddpo.{stage}", *arguments, cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr
    assert not re.search(r"\| +torch$", done.stderr, re.MULTILINE)
    assert [path.name for path in tmp_path.iterdir()] == ["latin1.txt"]


def test_a_sweep_in_several_processes_is_refused(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli("train", ["-m", "dpo.beta=1,2"]) == 2
    assert "without torchrun" in capsys.readouterr().err


def test_of_a_stage_that_is_not_divided_only_the_first_process_runs(monkeypatch):
    called = []
    for rank in ("0", "1"):
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", rank)
        assert cli("plan", [], lambda config, folder: called.append(rank)) == 0  # noqa: B023
    assert called == ["0"]


def test_two_runs_started_in_the_same_second_get_different_folders():
    config = compose()
    assert run_folder("train", config) != run_folder("train", config)


def test_a_folder_that_holds_a_run_is_not_overwritten(tmp_path):
    config = compose(["output_dir=mine"])
    assert run_folder("train", config) == Path("mine")
    write_config(config, Path("mine"))
    with pytest.raises(UserError, match=r"holds an earlier run; nothing is overwritten; add resume=true"):
        run_folder("train", config)
    assert run_folder("train", compose(["output_dir=mine", "resume=true"])) == Path("mine")


@pytest.mark.parametrize("resume", ["true", "false"])
def test_a_folder_that_holds_a_sweeps_jobs_is_no_runs(resume):
    write_json(Path("sweep/0/job.json"), {"overrides": []})
    with pytest.raises(UserError, match="holds the jobs of a sweep or study, not a run; repeat its own command"):
        run_folder("train", compose(["output_dir=sweep", f"resume={resume}"]))
    assert run_folder("train", compose(["output_dir=sweep/1", f"resume={resume}"])) == Path("sweep/1")


def test_a_reports_folder_is_named_for_what_it_reports():
    assert run_folder("report", compose(["run=outputs/train/mine"])).name.endswith("-mine")
    assert run_folder("report", compose(["runs=[outputs/train/a,outputs/train/b]"])).name.endswith("-a")


def test_a_folder_that_cannot_be_made_is_refused(tmp_path, monkeypatch):
    Path("file").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match="is a file; expected a folder"):
        run_folder("train", compose(["output_dir=file/below"]))
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(UserError, match="cannot be written to"):
        run_folder("train", compose(["output_dir=elsewhere"]))


CHILD = """
import os, re, sys, time
from pathlib import Path
from laddpo.cli.app import run_stage
from laddpo.settings.compose import write_config
from laddpo.storage.atomic import write_json
from laddpo.storage.json_lines import JsonLines

def main(config, folder):
    status = Path("/proc/self/status")
    memory = int(re.search(r"VmHWM:\\s+(\\d+)", status.read_text())[1]) if status.exists() else 0
    JsonLines(folder.parent / "started.jsonl").append({"folder": folder.name, "pid": os.getpid(), "memory": memory})
    write_config(config, folder)
    if config.optim.weight_decay == 0.5:
        raise RuntimeError("this job is broken")
    time.sleep(config.optim.eps if config.optim.eps > 1 else 0)
    beta = config.dpo.beta
    results = {"exact_match": {"base": 0.5, "tuned": 0.5 + beta / 10}}
    write_json(folder / "evaluation" / "results.json", results)

run_stage("train", main)
"""


@pytest.fixture
def tiny_jobs(tmp_path, monkeypatch):
    """Jobs are real child processes with the door of a stage, but of a stage that only writes its results."""
    child = tmp_path / "child.py"
    child.write_text(CHILD, encoding="utf-8")
    original = runner.child_command

    def command(*job):
        python, _, _, *rest = original(*job)
        return [python, str(child), *rest]

    monkeypatch.setattr(runner, "child_command", command)
    return tmp_path


def sweep_json(folder: str) -> list[dict]:
    return json.loads(Path(folder, "sweep.json").read_text(encoding="utf-8"))["jobs"]


def test_a_sweep_runs_each_combination_in_a_process_and_a_folder_of_its_own(tiny_jobs, capfd):
    assert cli("train", ["-m", "dpo.beta=0.5,2", "dpo.diffusion_samples=2", "output_dir=sweep"]) == 0
    jobs = sweep_json("sweep")
    assert [job["overrides"] for job in jobs] == [[f"dpo.beta={b}", "dpo.diffusion_samples=2"] for b in ("0.5", "2")]
    assert [job["exit_code"] for job in jobs] == [0, 0]
    assert [job["results"]["exact_match"]["tuned"] for job in jobs] == [0.55, 0.7]
    assert "beta: 2.0" in Path("sweep/1/config.yaml").read_text(encoding="utf-8")
    out = capfd.readouterr().out
    assert "0.500 -> 0.700" in out
    assert out.splitlines()[-1] == "sweep"


def test_a_sweep_without_a_folder_gets_one_below_outputs(tiny_jobs):
    assert cli("train", ["-m", "dpo.beta=1,2", "paths.outputs_dir=out"]) == 0
    assert len(list(Path("out/sweep").glob("*/sweep.json"))) == 1


def test_two_sweeps_of_one_second_have_two_folders(monkeypatch, tmp_path):
    monkeypatch.setattr("time.strftime", lambda form: "now")
    names = {sweep.sweep_folder({}, tmp_path)[0].name for _ in range(3)}
    assert len(names) > 1 and all(name.startswith("now-") for name in names)


def test_a_sweep_that_another_process_runs_is_left_alone(tiny_jobs, capfd):
    command = ["-m", "dpo.beta=1,2", "output_dir=sweep", "resume=true"]
    with locked(Path("sweep"), wait=False):
        Path("sweep/0").mkdir()
        Path("sweep/0/process.json").write_text("{}", encoding="utf-8")
        assert cli("train", command) == 2
    assert "sweep: is in use by process" in capfd.readouterr().err
    assert Path("sweep/0/process.json").exists(), "by which the other's signals reach its job"
    Path("sweep/0/process.json").unlink()
    assert cli("train", command) == 0


def test_a_failed_job_is_reported_and_the_others_run(tiny_jobs, capfd):
    assert cli("train", ["-m", "optim.weight_decay=0.5,0.1", "output_dir=sweep"]) == 1
    assert [job["exit_code"] for job in sweep_json("sweep")] == [1, 0]
    assert "this job is broken" in capfd.readouterr().err


def test_a_sweep_goes_on_where_it_was_and_repeats_nothing(tiny_jobs, capfd):
    command = ["-m", "optim.weight_decay=0.5,0.1", "output_dir=sweep"]
    cli("train", command)
    assert cli("train", command) == 2
    assert "holds a sweep; nothing is overwritten" in capfd.readouterr().err
    assert cli("train", [*command, "resume=true"]) == 1
    started = Path("sweep/started.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["folder"] for line in started] == ["0", "1", "0"]
    assert cli("train", ["-m", "optim.weight_decay=0.1,0.5", "output_dir=sweep", "resume=true"]) == 2
    shown = capfd.readouterr().err
    assert "sweep: was begun with train optim.weight_decay=0.5,0.1, not with optim.weight_decay=0.1,0.5" in shown
    assert "repeat the same command" in shown
    # an earlier version did not keep what a sweep was begun with: then its jobs are compared
    Path("sweep/command.json").rename("kept.json")
    assert cli("train", ["-m", "optim.weight_decay=0.1,0.5", "output_dir=sweep", "resume=true"]) == 2
    assert "was begun with optim.weight_decay=0.5, not with optim.weight_decay=0.1;" in capfd.readouterr().err
    # what is not named is as its folder says
    Path("kept.json").rename("sweep/command.json")
    assert cli("train", ["-m", "output_dir=sweep", "resume=true"]) == 1
    assert [job["overrides"] for job in sweep_json("sweep")] == [[f"optim.weight_decay={w}"] for w in (0.5, 0.1)]


def test_the_sweep_experiment_needs_no_flag_and_its_jobs_do_not_sweep_again(tiny_jobs):
    assert cli("train", ["experiment=sweep_beta_samples", "dpo.beta=1", "output_dir=sweep"]) == 0
    assert [job["exit_code"] for job in sweep_json("sweep")] == [0, 0, 0]


def test_a_sweep_of_two_by_three_that_was_interrupted_ends_with_six_results_and_repeats_none(tiny_jobs):
    command = ["-m", "dpo.beta=0.5,1", "optim.weight_decay=0.1,0.2,0.3", "output_dir=sweep"]
    assert exit_code_of_stopped_sweep(command, Path("sweep/2/job.json"), 60) == 75
    done = [job["job"] for job in sweep_json("sweep") if job["exit_code"] == 0]
    assert 3 <= len(done) < 6
    started = Path("sweep/started.jsonl")
    before = len(JsonLines(started).read())
    assert cli("train", [*command, "resume=true"]) == 0
    records = JsonLines(started).read()
    after = [record["folder"] for record in records[before:]]
    assert len({record["pid"] for record in records}) == len(records)
    first, last = (next(r["memory"] for r in records if r["folder"] == name) for name in ("0", "5"))
    assert last == pytest.approx(first, rel=0.05)
    jobs = sweep_json("sweep")
    assert len(jobs) == 6 and all(job["exit_code"] == 0 for job in jobs)
    assert len({job["results"]["exact_match"]["tuned"] for job in jobs}) == 2  # one for each beta
    assert sorted(after, key=int) == [str(n) for n in range(6) if n not in done]


def test_jobs_without_a_final_evaluation_are_compared_by_their_validation(tmp_path):
    from laddpo.results.of_jobs import find_results, jobs_table, objective, picture_sweep

    records = []
    for job, losses in enumerate(([0.7, 0.4, 0.5], [0.7, 0.3], [])):
        log = JsonLines(tmp_path / str(job) / "metrics.jsonl")
        for step, loss in enumerate(losses):
            log.append({"step": step, "loss": 1.0})
            log.append({"step": step, "validation/loss": loss, "validation/exact_match": None})
        found = find_results(tmp_path / str(job))
        overrides = [f"dpo.beta={job + 1}"]
        records.append({"job": job, "overrides": overrides, "exit_code": 0, "folder": str(job), "results": found})
    assert records[0]["results"] == {"validation/loss": {"base": 0.7, "tuned": 0.4}}
    assert objective(records[1]["results"]) == -0.3 and records[2]["results"] == {}
    assert "0.700 -> 0.300" in jobs_table(records)
    picture_sweep(tmp_path, records)
    assert (tmp_path / "sweep.md").read_text(encoding="utf-8").splitlines()[2].startswith("| 2 | 0.3 ")
    assert (tmp_path / "plots" / "sweep.png").is_file()


def test_no_job_starts_when_one_of_them_is_wrong(tiny_jobs, capsys):
    rest = ["dpo.estimator=complement", "output_dir=sweep"]
    assert cli("train", ["-m", "dpo.beta=1,-1,2", "dpo.diffusion_samples=2,3", *rest]) == 2
    err = capsys.readouterr().err
    assert "dpo.beta is -1.0" in err and "(job 2, 3 of 6)" in err
    assert "(job 1, 3, 5 of 6)" in err
    assert not Path("sweep").exists()


def test_stopping_a_sweep_stops_its_job_and_starts_no_other(tiny_jobs):
    command = ["-m", "optim.eps=60", "dpo.beta=1,2", "output_dir=sweep"]
    assert exit_code_of_stopped_sweep(command, Path("sweep/0/config.yaml"), 30) == 75
    jobs = sweep_json("sweep")
    assert jobs[0]["exit_code"] not in (0, None)
    assert jobs[1]["exit_code"] is None


def test_a_jobs_values_keep_their_quotes(tiny_jobs):
    assert cli("train", ["-m", "logger=wandb", "logger.wandb_name='a b','c,d'", "output_dir='my sweep'"]) == 0
    assert [job["exit_code"] for job in sweep_json("my sweep")] == [0, 0]
    assert "wandb_name: c,d" in Path("my sweep/1/config.yaml").read_text(encoding="utf-8")
