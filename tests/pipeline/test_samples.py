"""Sample answers at every evaluation: in the run's folder and in TensorBoard, from a task or from held-out prompts."""

from __future__ import annotations

import pytest


def texts_in_tensorboard(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    (tag,) = [name for name in events.Tags()["tensors"] if name.startswith("samples")]
    return {event.step: event.tensor_proto.string_val[0].decode() for event in events.Tensors(tag)}


@pytest.mark.parametrize("tasks", ["[arithmetic]", "[]"])
def test_every_evaluation_leaves_sample_answers(stages, tasks):
    run = stages.folder / "run"
    more = [f"evaluation.tasks={tasks}", "evaluation.samples=2", "evaluation.at_end=false", "logger=tensorboard"]
    assert stages.run("train", f"output_dir={run}", "optim.max_train_steps=4", *more) == 0
    shown = {path.name: path.read_text(encoding="utf-8") for path in (run / "samples").iterdir()}
    assert sorted(shown) == ["step_0000000.txt", "step_0000004.txt"]
    for text in shown.values():
        assert text.count("prompt  ") == text.count("answer  ") == 2
        assert text.count("gold    ") == (2 if "arithmetic" in tasks else 0)
        assert "=" in text, "an arithmetic prompt"
    logged = texts_in_tensorboard(run / "tensorboard")
    assert logged.keys() == {0, 4} and "answer  " in logged[4]


def test_no_samples_are_made_when_none_are_wanted(stages):
    run = stages.folder / "run"
    more = ["evaluation.samples=0", "evaluation.at_end=false", "evaluation.tasks=[]", "optim.max_train_steps=4"]
    assert stages.run("train", f"output_dir={run}", *more) == 0
    assert not (run / "samples").exists()


def test_samples_change_no_number_of_the_run(stages):
    quick = ["evaluation.at_end=false", "evaluation.tasks=[]", "optim.max_train_steps=4"]
    written = []
    for count in (0, 3):
        run = stages.folder / str(count)
        assert stages.run("train", f"output_dir={run}", f"evaluation.samples={count}", *quick) == 0
        written.append(
            [(run / name).read_bytes() for name in ("metrics.jsonl", "adapter_last/adapter_model.safetensors")]
        )
    assert written[0] == written[1]
