"""A new loss, estimator or task is one function and one row: it is then known, checked, advised on, planned and run."""

from __future__ import annotations

import json

import numpy as np
import pytest

from laddpo.cli.app import cli
from laddpo.core.draws import ESTIMATORS, ElboEstimator, MaskedDraw, MaskLaw, Response, count_draw
from laddpo.core.losses import LOSSES, LossOptions, PairScores, PreferenceLoss
from laddpo.core.noise import COUNT_SCHEDULES
from laddpo.core.optim import OPTIMIZERS, SCHEDULES
from laddpo.hardware.planning import gradient_groups
from laddpo.preference.embedded.arithmetic import HABITS
from laddpo.preference.reading.pairs import user_prompt
from laddpo.problems.grading import GRADERS, FunctionGrader, same_text
from laddpo.problems.tasks import TASKS, Item, Task, TaskKind, TaskOptions
from laddpo.settings.compose import compose
from tests.tiny import write_tiny_model

SHAPE = {"d_model": 32, "n_layers": 2, "n_heads": 2, "n_kv_heads": 2, "mlp_hidden_size": 64}


def squared(scores: PairScores, options: LossOptions):
    """(3 - beta * margin)^2: 9 where policy and reference are equal."""
    return (3 - options.beta * scores.margin) ** 2


def counted(e: ElboEstimator, response: Response, index: int) -> MaskedDraw:
    """An exact count, written down."""
    DRAWN.append(response.pair_id)
    return count_draw(e, response, index)


def echo(options: TaskOptions) -> Task:
    """Three words to say again."""
    items = [Item(f"echo-{word}", user_prompt(word), word) for word in ("07", "12", "30")]
    return Task("echo", items[: options.limit], FunctionGrader("equal text", same_text), {"split": options.split})


DRAWN: list[str] = []
# The whole change for three new options.
ADDED = (
    (
        LOSSES,
        "squared",
        PreferenceLoss(squared, depends_on_margin=False, reads=("label_smoothing",), is_per_token=True),
    ),
    (ESTIMATORS, "counted", MaskLaw(counted, together=4, picks=False, note="writes its draws down.")),
    (TASKS, "echo", TaskKind(echo, is_embedded=True)),
)


@pytest.fixture
def added(monkeypatch) -> None:
    DRAWN.clear()
    for table, name, row in ADDED:
        monkeypatch.setitem(table, name, row)


@pytest.mark.usefixtures("added")
def test_new_options_train_and_are_evaluated(tmp_path, capsys):
    model, run = write_tiny_model(tmp_path / "model", SHAPE), tmp_path / "run"
    new = ["dpo.loss=squared", "dpo.estimator=counted", "evaluation.tasks=[echo]", "dpo.difference_focus=0"]
    command = [
        *new,
        f"model.model_name_or_path={model}",
        *(f"model.shape.{name}={value}" for name, value in SHAPE.items()),
        f"output_dir={run}",
        f"paths.data_dir={tmp_path / 'data'}",
        *("data.num_pairs=16", "data.validation_fraction=0.25", "data.max_length=512", "dpo.diffusion_samples=2"),
        *("optim.per_device_train_batch_size=4", "optim.max_train_steps=2", "optim.num_warmup_steps=0"),
        *("evaluation.every_steps=2", "evaluation.num_pairs=4", "evaluation.diffusion_samples=2"),
        *(
            "evaluation.gen_length=8",
            "evaluation.block_length=8",
            "evaluation.steps=2",
            "evaluation.confidence_threshold=null",
        ),
        *("hardware.device=cpu", "logger=none", "logging_steps=1"),
    ]
    assert cli("train", command) == 0

    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    first = next(row for row in metrics if "grad_norm" in row)
    assert first["loss"] == pytest.approx(9, rel=1e-3) and first["grad_norm"] > 0
    assert [row["step"] for row in metrics if "validation/exact_match" in row] == [0, 2]
    assert len(set(DRAWN)) == 8, "the pairs of two steps of four were masked by the new estimator"
    items = [json.loads(line) for line in (run / "evaluation" / "items.jsonl").read_text().splitlines()]
    assert sorted((item["model"], item["id"]) for item in items) == sorted(
        (model, f"echo-{word}") for model in ("base", "tuned") for word in ("07", "12", "30")
    )

    notes = capsys.readouterr().err
    assert "note: dpo.estimator=counted writes its draws down." in notes
    assert "is no multiple of the 4 draws that dpo.estimator=counted makes together" in notes


@pytest.mark.usefixtures("added")
@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["dpo.loss=squard"], ["apo_zero_unpaired, squared; did you mean squared?"]),
        (["dpo.estimator=countd"], ["bernoulli, counted; did you mean"]),
        (["evaluation.tasks=[ecko]"], ["file, winrate, echo; did you mean echo?"]),
        (
            ["dpo.loss=hinge", "dpo.label_smoothing=0.1"],
            ["dpo.loss to one of sigmoid, robust,", "cpo, squared."],
        ),
        (["dpo.estimator=counted"], ["which picks neither tokens nor counts"]),
        (["best_metric=exact_match", "evaluation.tasks=[]"], ["those of arithmetic, rubric, word_problems, echo have"]),
    ],
)
def test_checks_and_advice_know_new_options(wrong, said, capsys):
    assert cli("train", wrong, lambda config, folder: pytest.fail("ran")) == 2
    shown = capsys.readouterr().err
    assert all(words in shown for words in said), shown


@pytest.mark.usefixtures("added")
def test_the_memory_plan_knows_a_new_loss():
    assert [gradient_groups(compose([f"dpo.loss={name}"])) for name in ("squared", "sigmoid")] == [2, 1]


@pytest.mark.parametrize(
    ("key", "table"),
    [
        ("dpo.schedule", COUNT_SCHEDULES),
        ("optim.optimizer", OPTIMIZERS),
        ("optim.lr_scheduler_type", SCHEDULES),
        ("evaluation.grader", GRADERS),
        ("data.grader", GRADERS),
        ("data.habit", HABITS),
    ],
)
def test_a_row_is_all_that_settings_need(key, table, monkeypatch):
    others = ["data=onpolicy", "data.dataset_name=q.jsonl", "evaluation.tasks=[]"] if key == "data.grader" else []
    monkeypatch.setitem(table, "brand_new", next(iter(table.values())))
    config = compose([*others, f"{key}=brand_new"])
    group, name = key.split(".")
    assert getattr(getattr(config, group), name) == "brand_new"
    monkeypatch.delitem(table, "brand_new")
    with pytest.raises(Exception, match=rf"{key} is 'brand_new'; known: {next(iter(table))}"):
        compose([*others, f"{key}=brand_new"])


def test_draws_of_the_new_estimator_are_what_its_function_gives(added):
    e = ElboEstimator("counted", diffusion_samples=2)
    one, two = (ElboEstimator(name, diffusion_samples=2).draw("p", "chosen", 9, 1) for name in ("counted", "count"))
    assert np.array_equal(one.masked, two.masked) and e.block == 1 and DRAWN == ["p"]
