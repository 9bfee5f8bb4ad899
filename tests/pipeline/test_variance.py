"""python -m laddpo.variance on a run that has moved its policy."""

import json

from laddpo.compose import compose, write_config


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


def test_what_cannot_be_measured_is_named(stages, capsys):
    assert stages.run("variance") == 2
    assert "run is not set" in capsys.readouterr().err
    write_config(compose(), stages.folder)
    assert stages.run("variance", f"run={stages.folder}", "variance.settings=[vrpo]") == 2
    message = capsys.readouterr().err
    assert "vrpo_paper" in message and "balanced, low discrepancy" in message
