"""A run that goes on takes the settings of its folder: what the command line names is compared, a default is not."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from laddpo.cli.app import cli
from laddpo.errors import UserError
from laddpo.settings import compose as composing
from laddpo.settings import of_a_run
from laddpo.settings.compose import compose, read_config, write_config
from laddpo.storage.manifests import write_manifest
from laddpo.training import resuming


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def settings():
    return compose(["dpo.loss=ipo"])


def run_folder(settings, name: str = "old", **command) -> Path:
    """A run that stopped; `command`: what it was begun with, as a version that keeps it writes it."""
    folder = Path("outputs/train", name)
    write_config(settings, folder)
    if command:
        of_a_run.write_command(folder, **command)
    return folder


def asked(stage: str, *overrides: str) -> list:
    """[settings] that the stage got; [] where it was refused."""
    got: list = []
    code = cli(stage, overrides, lambda config, folder: got.append((config, folder)))
    assert code == (0 if got else 2)
    return got


def with_values(config, **changes):
    """The settings with values in place of those of dotted names (`optim__eps=1e-3`)."""
    changed = dataclasses.replace(config)
    for name, value in changes.items():
        group, _, last = name.rpartition("__")
        if group:
            setattr(changed, group, dataclasses.replace(getattr(changed, group), **{last: value}))
        else:
            setattr(changed, last, value)
    return changed


def test_a_changed_default_refuses_no_old_run_and_changes_none(settings, capsys):
    folder = run_folder(with_values(settings, optim__eps=1e-3, dpo__label_smoothing=0.25))
    for given in ([f"resume={folder}"], ["resume=true"], ["resume=true", f"output_dir={folder}", "dpo.loss=ipo"]):
        ((config, place),) = asked("train", *given)
        assert (config.optim.eps, config.dpo.label_smoothing, config.dpo.loss) == (1e-3, 0.25, "ipo")
        assert Path(place) == folder and config.resume == str(folder)


@pytest.mark.parametrize(
    ("named", "said"),
    [
        (["dpo.loss=sigmoid"], "dpo.loss: stored 'ipo', now 'sigmoid'"),
        (["dpo=default"], "dpo.loss: stored 'ipo', now 'sigmoid'"),
        (["seed=1"], "seed: stored 42, now 1"),
        (["hardware.precision=bf16"], "hardware.precision: stored"),
        (["model.recommended.beta=9"], "dpo.beta: stored 2.0, now 9.0"),
        (["optim.per_device_train_batch_size=7"], "pairs per step: stored"),
        (["experiment=laddpo_hh"], "data.dataset_name: stored None, now 'Anthropic/hh-rlhf'"),
    ],
)
def test_what_the_command_line_names_otherwise_is_refused_by_name(settings, capsys, named, said):
    folder = run_folder(settings)
    assert asked("train", f"resume={folder}", *named) == []
    shown = capsys.readouterr().err
    assert said in shown and "Leave them out" in shown and shown.count("error:") == 1


def test_what_a_resumed_run_may_change_takes_effect(settings):
    folder = run_folder(settings)
    ((config, _),) = asked(
        "train",
        f"resume={folder}",
        *("save_steps=7", "logger=none", "hardware.threads=1", "optim.max_train_steps=5", "logging_steps=3"),
        *("evaluation.at_end=false", "paths.data_dir=d"),
    )
    assert (config.save_steps, config.logger.tensorboard, config.hardware.threads) == (7, False, 1)
    assert (config.optim.max_train_steps, config.logging_steps, config.paths.data_dir) == (5, 3, "d")
    assert not config.evaluation.at_end and config.dpo.loss == "ipo"
    assert settings.optim.max_train_steps == 60 and settings.optim.num_train_epochs == 1
    ((config, _),) = asked("train", f"resume={folder}", "optim.num_train_epochs=1")
    assert (config.optim.max_train_steps, config.optim.num_train_epochs) == (None, 1)


def test_values_that_do_not_go_with_the_runs_are_refused_and_what_the_run_had_is_not(settings, capsys):
    folder = run_folder(with_values(settings, dpo__label_smoothing=2.0))
    assert asked("train", f"resume={folder}", "save_steps=3")
    assert asked("train", f"resume={folder}", "save_steps=-3") == []
    assert "save_steps is -3" in capsys.readouterr().err


def test_a_group_that_was_chosen_as_now_is_as_it_was_then(settings, capsys):
    stored = with_values(settings, dpo__label_smoothing=0.25)
    begun = run_folder(stored, overrides=["dpo=ipo", "resume=true"])
    assert json.loads((begun / "command.json").read_text())["overrides"] == ["dpo=ipo"]
    ((config, _),) = asked("train", f"resume={begun}", "dpo=ipo")
    assert config.dpo.label_smoothing == 0.25
    assert asked("train", f"resume={begun}", "dpo=default") == []


def test_resume_true_takes_the_newest_run_that_agrees_and_reads_no_other(settings, monkeypatch, capsys):
    import os

    for number in range(200):
        folder = run_folder(settings, f"other-{number}") if number < 2 else Path(f"outputs/train/other-{number}")
        if number >= 2:
            folder.mkdir(parents=True)
            (folder / "config.yaml").write_bytes(Path("outputs/train/other-0/config.yaml").read_bytes())
        os.utime(folder / "config.yaml", (2e9 + number, 2e9 + number))
    wanted = run_folder(with_values(settings, dpo__beta=0.125), "wanted")
    older = run_folder(with_values(settings, dpo__beta=0.125), "older")
    done = run_folder(with_values(settings, dpo__beta=0.125), "done")
    write_manifest(done, "train", {}, [])
    for age, folder in enumerate((done, wanted, older)):
        os.utime(folder / "config.yaml", (1e9 - age, 1e9 - age))
    whole, count = resuming.read_config, []
    monkeypatch.setattr(resuming, "read_config", lambda folder: count.append(folder) or whole(folder))
    ((_, place),) = asked("train", "resume=true", "dpo.beta=0.125")
    assert place == wanted and count == [wanted]
    assert f"going on with {wanted}" in capsys.readouterr().out
    ((config, place),) = asked("train", "resume=true", "dpo.beta=0.75")
    assert not place.exists() and config.dpo.beta == 0.75 and count == [wanted]
    assert "starting a new one" in capsys.readouterr().out
    other = "model.model_name_or_path=elsewhere"
    ((_, place),) = asked("train", "resume=true", "dpo.beta=0.125", other)
    assert not place.exists(), "a run of another model is another run"


def test_two_folders_for_one_run_are_refused(settings, capsys):
    folder = run_folder(settings)
    assert asked("train", f"resume={folder}", "output_dir=else") == []
    assert "expected one folder" in capsys.readouterr().err
    assert asked("train", "resume=nowhere") == []
    assert "holds no run" in capsys.readouterr().err


@pytest.mark.parametrize("stage", ["generate", "chat", "variance"])
def test_a_stage_that_keeps_nothing_to_go_on_with_takes_no_resume(stage, capsys):
    assert asked(stage, "resume=true", "output_dir=x") == []
    assert "resume is true" in capsys.readouterr().err


def test_an_evaluation_goes_on_with_its_own_settings(settings, capsys):
    write_config(settings, Path("outputs/train/a"))
    write_config(with_values(settings, evaluation__limit=17, run="outputs/train/a", dpo__beta=0.75), Path("e"))
    ((config, folder),) = asked("evaluate", "resume=e")
    assert (config.run, config.evaluation.limit, config.dpo.beta, str(folder)) == ("outputs/train/a", 17, 0.75, "e")
    ((config, _),) = asked("evaluate", "resume=true", "output_dir=e", "evaluation.limit=5", "run=./outputs/train/a")
    assert (config.run, config.evaluation.limit) == ("outputs/train/a", 5)
    assert asked("evaluate", "resume=e", "run=outputs/train/b") == []
    assert "is of outputs/train/a" in capsys.readouterr().err
    assert asked("evaluate", "resume=e", "dpo.beta=0.5") == []
    assert "was begun with dpo.beta=0.75" in capsys.readouterr().err
    for given in (["resume=true"], ["resume=e", "output_dir=f"]):
        assert asked("evaluate", *given) == []
        assert "output_dir" in capsys.readouterr().err


def test_a_sweep_goes_on_with_what_it_was_begun_with(capsys):
    from laddpo.jobs.runner import begun_otherwise, overrides_to_resume
    from laddpo.storage.atomic import write_json

    begun = ["dpo.beta=1,2", "seed=3"]
    of_a_run.write_command(Path("sweep"), begun, stage="train")
    assert overrides_to_resume(Path("sweep"), "train", []) == begun
    assert overrides_to_resume(Path("sweep"), "train", begun) == begun
    assert overrides_to_resume(Path("sweep"), "train", ["seed=3", "logger=none"]) == [*begun, "logger=none"]
    assert overrides_to_resume(Path("older"), "train", ["seed=4"]) == ["seed=4"]
    for stage, given, said in (("train", ["seed=4"], "not with seed=4"), ("sft", [], "was begun with train")):
        with pytest.raises(UserError, match=f"{said}.*repeat the same command"):
            overrides_to_resume(Path("sweep"), stage, given)
    write_json(Path("sweep/0/job.json"), {"overrides": ["dpo.beta=1", "logger=none"]})
    assert begun_otherwise(Path("sweep/0"), ["dpo.beta=1", "save_steps=3"]) == []
    assert begun_otherwise(Path("sweep/0"), ["dpo.beta=2"])


def test_a_removed_setting_is_dropped_where_it_did_nothing_and_refused_by_name_elsewhere(settings, monkeypatch):
    removed = {"dpo.warp": (0.0, "Train with the version that has it."), "haste": (False, "Leave it out.")}
    monkeypatch.setattr(composing, "REMOVED", removed)
    folder = run_folder(settings)
    path = folder / "config.yaml"
    text = path.read_text().partition("\n")[2]  # without the check of this version
    path.write_text(text.replace("\ndpo:\n", "\nhaste: false\ndpo:\n  warp: 0.0\n"))
    assert read_config(folder) == settings
    path.write_text(text.replace("\ndpo:\n", "\nhaste: true\ndpo:\n  warp: 0.5\n"))
    with pytest.raises(UserError) as refused:
        read_config(folder)
    warp, haste = refused.value.problems
    assert "dpo.warp is 0.5" in warp and "expected 0.0" in warp and warp.endswith("Train with the version that has it.")
    assert "haste is True" in haste


def test_corrections_of_the_loss_are_gone_and_a_run_that_had_none_is_read(settings, capsys):
    folder = run_folder(settings)
    path = folder / "config.yaml"
    text = path.read_text().partition("\n")[2]  # without the check of this version
    path.write_text(text.replace("\ndpo:\n", "\ndpo:\n  correction: none\n"))
    assert read_config(folder) == settings
    path.write_text(text.replace("\ndpo:\n", "\ndpo:\n  correction: cross_fit\n"))
    with pytest.raises(UserError, match=r"dpo.correction is 'cross_fit'.*dpo.diffusion_samples"):
        read_config(folder)
    assert asked("train", "dpo.correction=none") == []
    assert "dpo.correction: no such setting" in capsys.readouterr().err
