"""The check before training that policy and reference agree."""

from __future__ import annotations

import pytest

from laddpo.training import faults


@pytest.mark.parametrize("common", ["true", "false"])
def test_a_reference_of_other_values_is_found_before_the_first_step(common, stages, capsys, monkeypatch):
    """Also where training draws other masks than the reference saw: then on validation pairs."""
    wanted = (f"dpo.common_random_numbers={common}", "stopping.max_chosen_fall=null", "optim.max_train_steps=1",
              "evaluation.at_end=false", "evaluation.tasks=[]")  # fmt: skip
    assert stages.run("train", *wanted, f"output_dir={stages.folder / 'good'}") == 0
    assert "model and reference differ by at most" in capsys.readouterr().out

    right = faults.score_shared
    monkeypatch.setattr(faults, "score_shared", lambda *asked: right(*asked) + 1)
    assert stages.run("train", *wanted, f"output_dir={stages.folder / 'bad'}") == 1
    assert "step 0: policy and reference differ by 1 nats" in capsys.readouterr().err
