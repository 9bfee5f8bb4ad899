"""The study stage: ordinary runs in processes of their own, continued where some are missing, one page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from laddpo.cli.app import cli, given_overrides
from laddpo.errors import UserError
from laddpo.jobs import runner
from laddpo.jobs.arms import arm_overrides, asked_of, shared_overrides, wanted_runs
from laddpo.jobs.starts import with_folders
from laddpo.settings.compose import compose
from laddpo.settings.ranges import CONF_DIR
from laddpo.storage import manifests

STUDIES = [path.stem for path in sorted((CONF_DIR / "study").glob("*.yaml")) if path.stem != "none"]


@pytest.mark.parametrize("name", STUDIES)
def test_every_arm_of_every_study_composes(name):
    study = compose([f"study={name}"]).study
    names = [arm.name for arm in study.arms]
    assert len(names) == len(set(names)) and study.arms[0].against == names[0]  # the default arm
    assert {arm.stage for arm in study.arms} <= {"train", "sft"}
    for arm in study.arms:
        assert arm.against in names
        compose(with_folders([*study.settings, *arm.overrides], Path("s"), 1))
    for run in study.first:
        compose(with_folders(run.overrides, Path("s"), 1))
    for claim in study.claims:
        assert claim.arm in names and claim.against in [*names, "base"]


def test_a_study_without_arms_or_with_unknown_ones_is_refused():
    with pytest.raises(UserError, match="name a study"):
        wanted_runs(compose().study)
    with pytest.raises(UserError, match="'defualt'; the arms are: default"):
        wanted_runs(compose(["study=nano", "study.only=[defualt]"]).study)


ONE_ARM = "study.arms=[{name: default}]"
FIRST = "study.first=[{name: starts}]"
TWO_ARMS = "study.arms=[{name: default}, {name: other, overrides: ['dpo.loss=ipo']}]"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["study.claims=[{arm: othre}]"], "study.claims: arm is 'othre'; .*did you mean other"),
        (["study.claims=[{arm: base}]"], "study.claims: arm is 'base'; the arms are: default, other"),
        (["study.claims=[{arm: other, against: bse}]"], "study.claims: against is 'bse'; .*did you mean base"),
        (["study.arms=[{name: default}, {name: a, against: b}]"], "study.arms, a: against is 'b'; the arms are"),
        (["study.arms=[{name: default}, {name: base}]"], "one is named 'base'"),
        (["study.arms=[{name: default}, {name: default}]"], "2 are named 'default'"),
        (["study.arms=[{name: default, stage: prepare}]"], "stage is 'prepare'; expected train or sft"),
        (["study.settings=['x={start}/model']", FIRST], r"study.arms, default: \{start\} .*did you mean starts"),
        (
            ["study.settings=['x={other}/model']"],
            r"study.arms, other: \{other\} is the folder of a run",
        ),
        ([FIRST], "study.first, starts: no run starts from it"),
        (["study.first=[{name: other}]"], "2 are named 'other'"),
        (["study.first=[{name: a, overrides: ['seed=3']}]"], r"seed=3 \(study.first, a\)"),
        (["study.settings=['seed=3']"], r"seed=3 \(study.settings\): .*set study.seeds"),
        (["study.arms=[{name: default, overrides: ['seed=3']}]"], r"seed=3 \(study.arms, default\)"),
    ],
)
def test_what_is_wrong_with_a_study_is_said_before_its_first_arm(settings, message):
    arms = [] if settings[0].startswith("study.arms") else [TWO_ARMS]
    with pytest.raises(UserError, match=message):
        wanted_runs(compose([*arms, *settings]).study)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            ["study.arms=[{name: default, stage: sft, overrides: ['sft=control', 'dry_run=true']}]"],
            "dry_run=true: sft does not read it",
        ),
        ([ONE_ARM, "verify=true"], "verify=true: no arm of this study reads it"),
        (["study.arms=[{name: default, overrides: ['dpo.beta=-1']}]"], "dpo.beta is -1.0"),
        ([ONE_ARM, "study.settings=['prompt=hello']"], "prompt=hello: no arm of this study reads it"),
    ],
)
def test_a_setting_that_no_arm_reads_is_refused_before_the_first_run(settings, said, tmp_path, capsys):
    assert cli("study", [*settings, f"output_dir={tmp_path / 's'}"]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "s").exists()


def test_a_setting_of_the_study_goes_to_the_arms_that_read_it(given):
    given(("dpo.beta=0.7", "hardware.threads=1"))
    config = compose(
        ["study.arms=[{name: a}, {name: b, stage: sft}]", "study.settings=['stopping.max_chosen_fall=0.1']"]
    )
    dpo, sft = (arm_overrides(config.study, arm, 1) for arm in config.study.arms)
    assert dpo == ["stopping.max_chosen_fall=0.1", "dpo.beta=0.7", "hardware.threads=1", "seed=1"]
    assert sft == ["dpo.beta=0.7", "hardware.threads=1", "seed=1"], "whose last evaluation takes beta"


def test_a_seed_beside_the_study_is_refused(tmp_path, capsys):
    assert cli("study", ["study=nano", "seed=7", f"output_dir={tmp_path / 's'}"]) == 2
    assert "set study.seeds=" in capsys.readouterr().err and not (tmp_path / "s").exists()


@pytest.fixture
def given():
    """Says what the command line gave, until the test is over."""
    before = given_overrides.get()
    yield given_overrides.set
    given_overrides.set(before)


def test_what_the_command_line_says_beside_the_study_reaches_every_run(given):
    given(("study=nano", "study.seeds=[1]", "output_dir=x", "experiment=mine", "hardware.threads=1"))
    config = compose(["study=nano"])
    assert shared_overrides(config.study) == [*config.study.settings, "experiment=mine", "hardware.threads=1"]


def test_an_arm_with_data_of_its_own_goes_without_what_only_the_studys_source_reads(given):
    given(("study=nano", "data.sampling.num_questions=30", "data.max_length=99"))
    config = compose(["study=nano", "data.sampling.num_questions=30", "data.max_length=99"])
    synthetic = next(arm for arm in config.study.arms if arm.name == "synthetic")
    shared = shared_overrides(config.study, synthetic)
    assert "data.max_length=99" in shared and "data.sampling.num_questions=30" not in shared
    compose([*shared, *synthetic.overrides])
    assert "data.sampling.num_questions=30" in shared_overrides(config.study, config.study.arms[0])


def test_the_page_says_which_command_makes_it(given):
    given(("study=nano", "study.only=[a]", "resume=true", "output_dir=x", "hardware=cpu", "study.seeds=[1, 2]"))
    assert asked_of() == ["study=nano", "hardware=cpu", "study.seeds=[1, 2]"]


def test_a_study_runs_its_arms_and_goes_on_with_what_is_missing(tmp_path, capsys):
    folder = tmp_path / "study"
    command = [
        "study=nano",
        "study.seeds=[42]",
        f"output_dir={folder}",
        f"paths.data_dir={tmp_path / 'data'}",
        "hardware.device=cpu",
        "hardware.threads=1",
        "data.sampling.num_questions=24",
        "optim.max_train_steps=1",
        "optim.per_device_train_batch_size=2",
        "evaluation.limit=6",
        "evaluation.every_steps=1",
    ]
    assert cli("study", [*command, "study.only=[default]"]) == 0
    content = json.loads((folder / "study.json").read_text())
    assert [row["arm"] for row in content["arms"]] == ["default"] and content["arms"][0]["facts"]["steps"] == 1
    capsys.readouterr()
    assert cli("study", [*command, "study.only=[sft_control]", "resume=true"]) == 0
    shown = capsys.readouterr().out
    assert "1 of 1: sft_control-42" in shown and "default-42" not in shown
    assert "default against sft_control" not in shown and "sft_control" in shown
    again = json.loads((folder / "study.json").read_text())
    assert [row["arm"] for row in again["arms"]] == ["default", "sft_control"] and again["arms"][0] == content["arms"][
        0
    ]
    for name in ("study.md", "study.png", "default-42/log.txt", "sft_control-42/evaluation/results.json"):
        assert (folder / name).is_file(), name


@pytest.fixture
def no_runs(monkeypatch):
    """Arms end at once and are finished; gives the commands that they would be."""
    commands = []

    def run_child(command, folder, log=None):
        commands.append(command)
        manifests.write_manifest(folder, "train", {}, [])
        return 0

    monkeypatch.setattr(runner, "run_child", run_child)
    return commands


def test_an_arm_of_other_settings_is_not_taken_for_one_of_these(tmp_path, no_runs, capsys):
    command = [TWO_ARMS, "study.seeds=[1]", f"output_dir={tmp_path / 's'}"]
    assert cli("study", [*command, "dpo.beta=2"]) == 0 and len(no_runs) == 2
    assert cli("study", [*command, "dpo.beta=2", "resume=true"]) == 0 and len(no_runs) == 2
    for others, message in (
        (["dpo.beta=7"], "was begun with dpo.beta=2, not with dpo.beta=7; repeat"),
        (["dpo.beta=2", "optim.weight_decay=0.3"], "was begun without optim.weight_decay=0.3; repeat"),
    ):
        assert cli("study", [*command, *others, "resume=true"]) == 2 and len(no_runs) == 2
        shown = capsys.readouterr().err
        assert message in shown and "(job default-1, other-1 of 2 finished)" in shown
    # what nobody names is as the study was begun, and how often a run saves changes no result
    for others in (["study.only=[other]"], ["dpo.beta=2", "save_steps=3"]):
        assert cli("study", [*command, *others, "resume=true"]) == 0 and len(no_runs) == 2
    job = tmp_path / "s" / "default-1" / "job.json"
    whole = job.read_bytes()
    job.write_bytes(whole.replace(b"dpo.beta=2", b"dpo.beta=7"))
    assert cli("study", [*command, "dpo.beta=7", "resume=true"]) == 2, "the record of a finished arm is sealed, too"
    assert f"{job}: is damaged" in capsys.readouterr().err
    job.write_bytes(whole)
    (tmp_path / "s" / "other-1" / "manifest.json").unlink()
    assert cli("study", [f"resume={tmp_path / 's'}"]) == 0 and len(no_runs) == 3
    assert {"dpo.beta=2", "save_steps=3", "seed=1"} <= set(no_runs[-1]), "a study goes on by its folder alone"
    # what a failed or interrupted run was begun with is the run's own to compare
    for name in ("default-1", "other-1"):
        (tmp_path / "s" / name / "manifest.json").unlink()
    assert cli("study", [*command, "dpo.beta=7", "resume=true"]) == 0 and len(no_runs) == 5


def test_arms_are_composed_from_the_files_that_the_study_is(tmp_path, no_runs, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine/study").mkdir(parents=True)
    Path("mine/root.yaml").write_text("defaults: [config, _self_]\n")
    Path("mine/study/small.yaml").write_text("name: small\nseeds: [1]\narms: [{name: default}]\n")
    assert cli("study", ["--config-dir", "mine", "--config-name", "root", "study=small", "output_dir=s"]) == 0
    (command,) = no_runs
    at = command.index("--config-name")
    assert command[at : at + 4] == ["--config-name", "root", "--config-dir", str(tmp_path / "mine")]
    again = "python -m laddpo.study --config-name root --config-dir mine study=small"
    assert f"`{again}`" in Path("s/study.md").read_text()


def test_failed_runs_are_named_with_their_log(tmp_path, capsys):
    command = ["study=nano", "study.only=[default]", "study.seeds=[1]", f"output_dir={tmp_path / 's'}"]
    assert cli("study", [*command, "model.model_name_or_path=nowhere", "hardware.device=cpu"]) == 1
    shown = capsys.readouterr()
    assert "1 of 1 runs failed: default-1" in shown.err and f"resume=true output_dir={tmp_path / 's'}." in shown.err
    assert "nowhere" in (tmp_path / "s" / "default-1" / "log.txt").read_text()
    assert "default-1 (failed (exit code 2))" in (tmp_path / "s" / "study.md").read_text()


CHAIN = [
    "study.first=[{name: start, overrides: ['experiment=make_rubric_base']}, {name: b, overrides: ['logger=none']}]",
    "study.settings=['model.model_name_or_path={start}/model', 'evaluation.limit=3']",
    "study.arms=[{name: default}, {name: sft, stage: sft}, {name: then, overrides: ['adapter.path={sft}/adapter']}, "
    "{name: last, overrides: ['adapter.path={b}/adapter']}]",
    "study.seeds=[1]",
]


def test_a_run_starts_from_the_folder_of_another_one_of_its_seed(tmp_path, no_runs, capsys):
    command = [*CHAIN, f"output_dir={tmp_path / 'a b'}", "hardware.threads=1"]
    assert cli("study", [*command, "study.only=[then]"]) == 0
    first, sft, then = ([text for text in given if text[0] != "-"] for given in no_runs)
    assert "hardware.threads=1" in first and "evaluation.limit=3" not in first, "settings of the study are for its arms"
    assert f"model.model_name_or_path='{tmp_path}/a b/start-1/model'" in sft
    assert f"adapter.path='{tmp_path}/a b/sft-1/adapter'" in then
    (tmp_path / "a b").rename(tmp_path / "moved")
    command[-2] = f"output_dir={tmp_path / 'moved'}"
    assert cli("study", [*command, "resume=true"]) == 0 and len(no_runs) == 6, "start-1, sft-1 and then-1 are there"
    job = json.loads((tmp_path / "moved" / "then-1" / "job.json").read_text())
    assert "adapter.path={sft}/adapter" in job["overrides"]
    assert cli("study", [*command, "study.first=[{name: start}, {name: b}]", "resume=true"]) == 2
    assert "start-1" in capsys.readouterr().err


def test_what_starts_from_a_failed_run_is_not_started(tmp_path, monkeypatch, capsys):
    started = []

    def fail(command, folder, log=None):
        started.append(folder.name)
        return 2

    monkeypatch.setattr(runner, "run_child", fail)
    assert cli("study", [*CHAIN, f"output_dir={tmp_path / 's'}"]) == 1
    shown = capsys.readouterr()
    assert started == ["start-1", "b-1"] and "it starts from start-1, which failed" in shown.out
    assert "6 of 6 runs failed" in shown.err


def test_a_study_starts_from_a_base_that_it_makes_and_answers_at_two_temperatures(tmp_path):
    few = [
        "evaluation.limit=4",
        "evaluation.gen_length=20",
        "evaluation.steps=2",
        "evaluation.confidence_threshold=null",
        "evaluation.block_length=20",
    ]
    first = ["experiment=make_rubric_base", "logger=none", "optim.max_train_steps=1", "sft.num_examples=8", *few]
    folder = tmp_path / "study"
    command = [
        "study=rubric",
        "study.seeds=[42]",
        "study.only=[dpo]",
        f"study.first=[{{name: base, overrides: {json.dumps(first)}}}]",
        f"output_dir={folder}",
        f"paths.data_dir={tmp_path / 'data'}",
        *("hardware.device=cpu", "hardware.threads=1", "data.sampling.num_questions=16", "optim.max_train_steps=1"),
        *("optim.per_device_train_batch_size=2", "evaluation.every_steps=1", *few),
    ]
    assert cli("study", command) == 0
    results = json.loads((folder / "dpo-42" / "evaluation" / "results.json").read_text())
    for name in ("exact_match", "mean_marks", "share_carry", "share_hash"):
        assert results[name]["items"] == results[f"{name}_at_temperature_1"]["items"] == 4
    content = json.loads((folder / "study.json").read_text())
    assert content["also"][" at temperature 1"]["arms"][0]["arm"] == "dpo"
    found = content["mended"][" at temperature 1"]["dpo"]["carry"]
    assert found["wrong"] + found["right"] == 4 and found["kept"] <= found["right"]
    page = (folder / "study.md").read_text()
    assert "## Answers at temperature 1" in page and "| dpo | right, still right |" in page
    assert (folder / "study_at_temperature_1.png").is_file()
    config = (folder / "dpo-42" / "config.yaml").read_text()
    assert f"model_name_or_path: {folder}/base-42/model" in config
