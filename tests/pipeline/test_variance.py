"""python -m laddpo.variance on a run that has moved its policy."""

import json
import os
import shutil
import signal

from laddpo.errors import EXIT_STOPPED
from laddpo.inputs import policy
from laddpo.settings.compose import compose, read_config, write_config


def test_a_run_is_measured_into_page_numbers_and_picture(stages, capsys):
    run, folder = stages.folder / "run", stages.folder / "variance"
    assert stages.run("train", f"output_dir={run}", "evaluation.at_end=false", "evaluation.tasks=[]") == 0
    few = ["variance.pairs=5", "variance.gradient_pairs=2", "variance.evaluations=4", "variance.draws=[1,4]"]
    names = ["vrpo_paper", "naive", "default"]
    few.append(f"variance.settings=[{','.join(names)}]")
    assert stages.run("variance", f"run={run}", f"output_dir={folder}", *few) == 0
    assert capsys.readouterr().out.strip().splitlines()[-1] == str(folder)
    result = json.loads((folder / "variance.json").read_text())
    assert {(row["setting"], row["draws"]) for row in result["settings"]} == {(n, d) for n in names for d in (1, 4)}
    values = {(row["setting"], row["draws"]): row for row in result["settings"]}
    assert values["naive", 4]["score"]["value"] > values["default", 4]["score"]["value"]
    assert all(side["moved"] and side["reference"] < 0 for side in result["drift"].values())
    assert list(result["techniques"]) == ["4"]
    page = (folder / "variance.md").read_text()
    assert "| default | 4 |" in page and "at equal forwards" in page
    assert (folder / "variance.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_that_kept_its_start_is_refused_and_one_that_was_stopped_starts_anew(stages, monkeypatch, capsys):
    run, folder = stages.folder / "run", stages.folder / "variance"
    quick = ["optim.max_train_steps=1", "evaluation.at_end=false", "evaluation.tasks=[]"]
    assert stages.run("train", f"output_dir={run}", *quick, "best_metric=loss", "optim.learning_rate=1") == 0
    few = ["variance.pairs=2", "variance.gradient_pairs=2", "variance.evaluations=3", "variance.draws=[1]"]
    command = ["variance", f"run={run}", f"output_dir={folder}", *few, "variance.settings=[vrpo_paper]"]
    assert stages.run(*command) == 2
    assert f"{run / 'adapter'}: holds the weights of step 0" in capsys.readouterr().err and not folder.exists()
    shutil.rmtree(run / "adapter")
    shutil.copytree(run / "adapter_last", run / "adapter")
    plain = policy.load

    def stopped(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return plain(*arguments)

    monkeypatch.setattr(policy, "load", stopped)
    assert stages.run(*command) == EXIT_STOPPED
    assert "nothing was written. The same command starts again" in capsys.readouterr().err
    monkeypatch.undo()
    assert stages.run(*command) == 0
    assert read_config(folder).variance.draws == [1] and (folder / "variance.md").is_file()
    assert stages.run(*command) == 2
    assert "holds an earlier run" in capsys.readouterr().err


def test_what_cannot_be_measured_is_named(stages, capsys):
    assert stages.run("variance") == 2
    assert "run is not set" in capsys.readouterr().err
    write_config(compose(), stages.folder)
    assert stages.run("variance", f"run={stages.folder}", "variance.settings=[vrpo]") == 2
    message = capsys.readouterr().err
    assert "vrpo_paper" in message and "balanced, low discrepancy" in message
