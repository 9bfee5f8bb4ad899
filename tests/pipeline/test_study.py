"""The study stage: ordinary runs in processes of their own, continued where some are missing, one page."""

from __future__ import annotations

import json

import pytest

from laddpo.app import cli, given_overrides
from laddpo.compose import compose
from laddpo.config import CONF_DIR
from laddpo.errors import UserError
from laddpo.study import asked_of, shared_overrides, wanted_arms

STUDIES = [path.stem for path in sorted((CONF_DIR / "study").glob("*.yaml")) if path.stem != "none"]


@pytest.mark.parametrize("name", STUDIES)
def test_every_arm_of_every_study_composes(name):
    study = compose([f"study={name}"]).study
    names = [arm.name for arm in study.arms]
    assert len(names) == len(set(names)) and names[0] == "default"
    assert {arm.stage for arm in study.arms} <= {"train", "sft"}
    for arm in study.arms:
        assert arm.against in names
        compose([*study.settings, *arm.overrides])
    for claim in study.claims:
        assert claim.arm in names and claim.against in [*names, "base"]


def test_a_study_without_arms_or_with_unknown_ones_is_refused():
    with pytest.raises(UserError, match="name a study"):
        wanted_arms(compose())
    with pytest.raises(UserError, match="defualt; the arms are: default"):
        wanted_arms(compose(["study=nano", "study.only=[defualt]"]))


@pytest.fixture
def given():
    """Says what the command line gave, until the test is over."""
    before = given_overrides.get()
    yield given_overrides.set
    given_overrides.set(before)


def test_what_the_command_line_says_beside_the_study_reaches_every_run(given):
    given(("study=nano", "study.seeds=[1]", "output_dir=x", "seed=3", "hardware.threads=1"))
    config = compose(["study=nano"])
    assert shared_overrides(config) == [*config.study.settings, "hardware.threads=1"]


def test_an_arm_with_data_of_its_own_goes_without_what_only_the_studys_source_reads(given):
    given(("study=nano", "data.sampling.num_questions=30", "data.max_length=99"))
    config = compose(["study=nano", "data.sampling.num_questions=30", "data.max_length=99"])
    synthetic = next(arm for arm in config.study.arms if arm.name == "synthetic")
    shared = shared_overrides(config, synthetic)
    assert "data.max_length=99" in shared and "data.sampling.num_questions=30" not in shared
    compose([*shared, *synthetic.overrides])
    assert "data.sampling.num_questions=30" in shared_overrides(config, config.study.arms[0])


def test_the_page_says_which_command_makes_it(given):
    given(("study=nano", "study.only=[a]", "resume=true", "output_dir=x", "hardware=cpu", "study.seeds=[1, 2]"))
    assert asked_of(compose(["study=nano"])) == ["study=nano", "hardware=cpu", "study.seeds=[1, 2]"]


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


def test_failed_runs_are_named_with_their_log(tmp_path, capsys):
    command = ["study=nano", "study.only=[default]", "study.seeds=[1]", f"output_dir={tmp_path / 's'}"]
    assert cli("study", [*command, "model.model_name_or_path=nowhere", "hardware.device=cpu"]) == 1
    shown = capsys.readouterr()
    assert "1 of 1 runs failed: default-1" in shown.err
    assert "nowhere" in (tmp_path / "s" / "default-1" / "log.txt").read_text()
