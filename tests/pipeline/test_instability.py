"""Training that goes wrong says so once, while it happens, and a calm run says nothing."""

from __future__ import annotations

import json

import pytest

from laddpo.storage.atomic import read_json
from laddpo.training.instability import Watch

START = 0.693


def steps(count, **changed):
    """Rows of a calm run; `changed` gives the value of a metric at each step."""
    calm = {"loss": START, "grad_norm": 1.0, "rewards/chosen": 0.0, "logps/chosen": -100.0}
    for step in range(1, count + 1):
        given = {name.replace("_of_", "/"): value(step) for name, value in changed.items()}
        yield {"step": step, **calm, **given}


def said(rows, beta=0.1):
    watch = Watch(beta)
    return [(row["step"], note) for row in rows for note in watch.see(row)]


def test_a_calm_run_says_nothing_and_one_bad_step_of_the_loss_is_none():
    assert not said(steps(50))
    assert not said(steps(50, loss=lambda step: 1.3 if step == 20 else START))
    assert not said(steps(50, loss=lambda step: START / step))


@pytest.mark.parametrize(
    ("changed", "step", "words"),
    [
        ({"loss": lambda step: START if step == 1 else 0.9}, 10, ("above its start of 0.693", "Lower dpo.beta")),
        ({"grad_norm": lambda step: 11.0 if step in (15, 18) else 1.0}, 15, ("median so far 1", "learning_rate")),
        ({"rewards_of_chosen": lambda step: -1.5, "logps_of_chosen": lambda step: -115.0}, 10, ("15% lower", "sft")),
    ],
)
def test_each_sign_is_one_line_with_a_cure_said_once(changed, step, words):
    ((at, note),) = said(steps(40, **changed))
    assert at == step and note.startswith(f"note: step {step}: ")
    assert all(word in note for word in words)


@pytest.mark.parametrize(
    ("metric", "values", "words"),
    [
        ("loss", (0.69, 0.17, 0.2, 0.31, 0.4), ("0.31, and 0.17 at step 20", "learning_rate")),
        ("exact_match", (0.6, 0.815, 0.75, 0.71, 0.4), ("is 71.0% and was 81.5% at step 20", "dpo.beta")),
    ],
)
def test_a_collapse_under_a_low_loss_is_said_once_when_validation_shows_it(metric, values, words):
    rows = [{"step": 20 * i, f"validation/{metric}": value} for i, value in enumerate(values)]
    ((at, note),) = said(rows)
    assert at == 60 and all(word in note for word in words)
    assert not said(rows[:3])
    assert not said([{"step": i, "validation/loss": value} for i, value in enumerate((0.5, 0.49, 0.4999))])


def test_rows_that_lack_a_value_are_passed_over():
    assert not said([{"step": 0, "validation/loss": 9.0}, {"step": 1, "loss": None}, {"step": 2, "note": "x"}])
    assert not said({"step": step, "loss": 1.0} for step in range(30))


def test_a_run_that_diverges_says_so_in_console_and_log_and_resuming_does_not_repeat_it(stages, capsys):
    rows = [{"prompt": f"{i}?", "chosen": f"{i} is right " * 3, "rejected": f"{i} is wrong"} for i in range(24)]
    file, run = stages.folder / "a.jsonl", stages.folder / "run"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    wild = ["data=jsonl", f"data.dataset_name={file}", "optim.learning_rate=0.3", "dpo.beta=5", "save_steps=12"]
    wild += ["evaluation.at_end=false", "evaluation.every_steps=30", "optim.max_train_steps=30", f"output_dir={run}"]
    assert stages.run("train", *wild) == 0
    shown = capsys.readouterr()
    log = (run / "metrics.jsonl").read_bytes()
    notes = [row["note"] for line in log.splitlines() if "note" in (row := json.loads(line))]
    assert notes, "the run was to diverge"
    assert all((shown.out + shown.err).count(note) == 1 for note in notes)

    (run / "manifest.json").unlink()  # as if it had been killed
    newest = max((run / "checkpoints").iterdir())
    for file in sorted(newest.iterdir()):
        file.unlink()
    newest.rmdir()
    assert stages.run("train", *wild, "resume=true") == 0
    again = capsys.readouterr()
    assert (run / "metrics.jsonl").read_bytes() == log
    early = [note for note in notes if int(note.split()[2].rstrip(":")) <= 24]
    assert early and not any(note in again.out + again.err for note in early)
    assert read_json(run / "manifest.json")["fields"]["step"] == 30
