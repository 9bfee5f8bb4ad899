"""python -m laddpo.variance on a run and before training, and lists of pairs chosen beforehand."""

import json
import os
import signal

from laddpo.errors import EXIT_STOPPED
from laddpo.inputs import policy
from laddpo.settings.compose import compose, read_config, write_config

FEW = [
    *("variance.pairs=5", "variance.gradient_pairs=4", "variance.evaluations=3", "variance.draws=[1,4]"),
    "variance.token_pairs=2",
]


def test_a_run_is_measured_into_page_numbers_and_picture(stages, capsys):
    run, folder = stages.folder / "run", stages.folder / "variance"
    assert stages.run("train", f"output_dir={run}", "evaluation.at_end=false", "evaluation.tasks=[]") == 0
    names = ["vrpo_paper", "naive", "default"]
    rows = f"variance.settings=[{','.join(names)}]"
    assert stages.run("variance", f"run={run}", f"output_dir={folder}", *FEW, rows, "variance.techniques=true") == 0
    said = capsys.readouterr().out
    assert said.strip().splitlines()[-1] == str(folder) and "the rest takes about" in said
    result = json.loads((folder / "variance.json").read_text())
    values = {(row["setting"], row["draws"]): row for row in result["settings"]}
    # the run's own draws at its own n, 2, as well; with the other focus at that n alone
    own = {("own", 1), ("own", 2), ("own", 4), ("own, focus 0", 2)}
    assert values.keys() == {(n, d) for n in names for d in (1, 4)} | own
    assert {**values["own", 4], "setting": "default"} == values["default", 4]  # drawn alike, measured once
    assert values["naive", 4]["score"]["value"] > values["default", 4]["score"]["value"] > 0
    assert all(side["moved"] and side["reference"] < 0 for side in result["drift"].values())
    assert list(result["techniques"]) == ["4"] and not result["is_start"]
    steps = {row["draws"]: row["pairs_per_step"] for row in result["step_noise"]}
    assert steps == {1: 8, 2: 4, 4: 2}  # of 4 pairs and 2 draws
    assert len(result["tokens"]) == 2 and all(0 < row["share"] <= 1 and row["token"] for row in result["tokens"])
    page = (folder / "variance.md").read_text()
    assert page.splitlines()[2].startswith("With n = 2 draws and 4 pairs a step, masks make ")
    for words in ("| default | 4 |", "at equal forwards", "of their tokens", "steps at 4 pairs", "control variate"):
        assert words in page, words
    assert (folder / "variance.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_that_kept_its_start_has_noise_in_gradients_alone_and_a_stopped_command_starts_anew(
    stages, monkeypatch, capsys
):
    run, folder = stages.folder / "run", stages.folder / "variance"
    quick = ["optim.max_train_steps=1", "evaluation.at_end=false", "evaluation.tasks=[]"]
    assert stages.run("train", f"output_dir={run}", *quick, "best_metric=loss", "optim.learning_rate=1") == 0
    command = ["variance", f"run={run}", f"output_dir={folder}", *FEW]
    plain = policy.load

    def stopped(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return plain(*arguments)

    monkeypatch.setattr(policy, "load", stopped)
    assert stages.run(*command) == EXIT_STOPPED
    assert "nothing was written. The same command starts again" in capsys.readouterr().err
    monkeypatch.undo()
    assert stages.run(*command) == 0
    assert read_config(folder).variance.draws == [1, 4]
    result = json.loads((folder / "variance.json").read_text())
    assert result["is_start"] and result["run"] == "run"
    assert all(
        row["score"]["value"] == row["loss"]["value"] == 0 < row["gradient"]["value"] for row in result["settings"]
    )
    assert "scores and losses do not vary at all" in (folder / "variance.md").read_text()
    assert stages.run(*command) == 2
    assert "holds an earlier run" in capsys.readouterr().err


def test_before_training_the_pairs_of_a_list_are_measured(stages, capsys):
    listed, folder = stages.folder / "pairs.json", stages.folder / "variance"
    assert stages.run("variance", "variance.pairs=3", "seed=7", f"variance.write_pairs={listed}") == 0
    assert "3 of 24 training pairs, chosen by seed=7" in capsys.readouterr().out
    ids = json.loads(listed.read_text())
    assert stages.run("variance", f"variance.write_pairs={listed}") == 2
    assert "which exists; expected a new file" in capsys.readouterr().err
    few = [text for text in FEW if not text.startswith("variance.pairs")] + ["variance.settings=[vrpo_paper]"]
    assert stages.run("variance", f"variance.pairs_file={listed}", "seed=7", f"output_dir={folder}", *few) == 0
    result = json.loads((folder / "variance.json").read_text())
    assert result["pair_ids"] == ids and result["is_start"] and result["run"] is None

    for content, said in (
        (json.dumps([*ids, "nobody"]), "element 3 is 'nobody': no pair of"),
        (json.dumps([*ids, ids[0]]), "it stands there twice"),
        (json.dumps({"ids": ids}), "holds dict; expected a list of two or more pair ids"),
        ("[1, 2]", "element 0 is 1: expected the id of a pair"),
        ("no list", "is no JSON"),
    ):
        listed.write_text(content)
        assert stages.run("variance", f"variance.pairs_file={listed}", "seed=7") == 2
        assert said in (shown := capsys.readouterr().err) and "variance.write_pairs=FILE" in shown


def test_what_cannot_be_measured_is_named(stages, capsys):
    for given, said in (
        (["dpo.loss=simpo"], "this command has dpo.loss=simpo, which compares with no reference"),
        (["variance.pairs_file=a.json", "variance.pairs=4"], "variance.pairs_file names the pairs"),
        (["variance.write_pairs=a.json", "dpo.beta=1"], "variance.write_pairs only writes a list of pairs"),
        (["dpo.mask_rounds=2"], "variance does not read it"),
        (["variance.settings=[vrpo]"], "vrpo_paper"),
        (["variance.pairs_file=a.json"], "a.json': cannot be read"),
    ):
        assert stages.run("variance", *given) == 2, given
        assert said in capsys.readouterr().err, given
    write_config(compose(), stages.folder)
    assert stages.run("variance", f"run={stages.folder}", "variance.settings=[vrpo]") == 2
    message = capsys.readouterr().err
    assert "vrpo_paper" in message and "balanced, low discrepancy" in message
