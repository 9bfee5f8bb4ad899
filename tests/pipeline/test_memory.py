"""Runs through the command line: hardware settings change no number, memory that runs out changes none either."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file

from laddpo.models.denoiser import TransformerDenoiser

QUICK = (
    "optim.max_train_steps=3",
    "evaluation.at_end=false",
    "evaluation.every_steps=null",
    "evaluation.tasks=[]",
    "stopping.patience=null",
)


def train(stages, name: str, *more: str):
    """The run's folder."""
    run = stages.folder / name
    assert stages.run("train", f"output_dir={run}", *QUICK, *more) == 0
    return run


def results(run) -> tuple[bytes, dict[str, torch.Tensor]]:
    return (run / "metrics.jsonl").read_bytes(), load_file(run / "adapter_last" / "adapter_model.safetensors")


@pytest.fixture
def cramped(monkeypatch):
    """Memory runs out in forward passes of more than `room` tokens; the list collects the sizes that failed."""
    failures = []

    def set_room(room: int, where: str = "training"):
        plain = TransformerDenoiser.token_logps

        def token_logps(self, packed):
            tokens = sum(packed.lengths)
            if tokens > room and (where == "any" or torch.is_grad_enabled()):
                failures.append(tokens)
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")
            return plain(self, packed)

        monkeypatch.setattr(TransformerDenoiser, "token_logps", token_logps)
        return failures

    return set_room


@pytest.mark.parametrize(
    "setting",
    ["hardware.gradient_checkpointing=true", "hardware.offload_activations=true", "hardware.embeddings_on_cpu=true"],
)
def test_a_hardware_setting_changes_no_byte_of_the_result(stages, setting):
    metrics, adapter = results(train(stages, "plain", "hardware.gradient_checkpointing=false"))
    again, other = results(train(stages, "other", setting))
    assert again == metrics
    assert all(torch.equal(adapter[name], other[name]) for name in adapter)


def test_memory_that_runs_out_in_training_is_survived_counted_and_said(stages, cramped, capsys):
    _, adapter = results(train(stages, "plain"))
    failures = cramped(room=300)
    run = train(stages, "cramped")
    _, other = results(run)
    for name in adapter:
        torch.testing.assert_close(other[name], adapter[name], rtol=1e-3, atol=1e-5)
    timing = [json.loads(line) for line in (run / "timing.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [record for record in timing if "seconds" in record]
    assert steps[-1]["memory/oom_retries"] == len(failures) > 0
    output = capsys.readouterr().out
    assert f"memory ran out {len(failures)} times; micro-steps were halved from 4096 to 256 tokens" in output
    assert "Start with hardware.token_budget=256" in output


def test_memory_that_runs_out_in_the_reference_pass_is_survived_too(stages, cramped):
    metrics, _ = results(train(stages, "plain", f"paths.data_dir={stages.folder / 'first'}"))
    failures = cramped(room=300, where="any")
    again, _ = results(train(stages, "cramped"))
    losses = [
        [json.loads(line)["loss"] for line in text.splitlines() if b'"loss"' in line] for text in (metrics, again)
    ]
    assert failures and losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_one_sequence_that_does_not_fit_ends_the_run_with_an_explanation(stages, cramped, capsys):
    cramped(room=20)
    run = stages.folder / "run"
    assert stages.run("train", f"output_dir={run}", *QUICK) == 1
    error = capsys.readouterr().err
    assert "out of memory: one sequence of 40 tokens does not fit: predicted " in error and ", available " in error
    assert "The largest part is " in error and error.count("(saves ") == 2
    assert "Traceback" not in error


def test_memory_that_runs_out_elsewhere_ends_in_a_message(stages, monkeypatch, capsys):
    def no_memory(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr("laddpo.core.loop.torch.nn.utils.clip_grad_norm_", no_memory)
    assert stages.run("train", f"output_dir={stages.folder / 'run'}", *QUICK) == 1
    error = capsys.readouterr().err
    assert "memory ran out outside of a micro-step" in error and "Traceback" not in error


def test_a_dry_run_takes_two_steps_on_the_longest_batch_and_says_what_it_saw(stages, monkeypatch, capsys):
    seen = []
    from laddpo.core.tasks import DpoTask

    accumulate = DpoTask.accumulate

    def watched(self, indices, epoch, loss_scale):
        seen.append(sorted(len(self.pairs[i].prompt_ids) + len(self.pairs[i].chosen_ids) for i in indices))
        return accumulate(self, indices, epoch, loss_scale)

    monkeypatch.setattr(DpoTask, "accumulate", watched)
    rows = [
        {"prompt": "01+01+01=", "chosen": "03 " * length, "rejected": "04 " * length}
        for length in (2, 3, 9, 4, 8, 2, 3, 7, 1, 6, 5, 2)
    ]
    data = stages.folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    more = ["data=jsonl", f"data.dataset_name={data}", "data.validation_fraction=0", "data.template=plain"]
    run = stages.folder / "run"
    assert stages.run("train", f"output_dir={run}", "dry_run=true", *more, "evaluation.tasks=[]") == 0
    assert len(seen) == 2 and seen[0] == seen[1]
    assert seen[0] == sorted(seen[0])[-4:] and len(set(seen[0])) == 4, "the four longest of all lengths"
    output = capsys.readouterr().out
    assert "dry run: the longest batch fits." in output and "memory of a step: predicted " in output
    share = re.search(r"memory of a step: predicted .* measured .* \((\d+)%\)", output)
    assert 80 < int(share[1]) < 110
    assert "No run was kept" in output and "checkpoints and plots" not in output


def test_a_dry_run_leaves_nothing_that_is_taken_for_a_run(stages, capsys):
    run = stages.folder / "run"
    for place in ([], [f"output_dir={run}"]):
        assert stages.run("train", "dry_run=true", *place) == 0
    assert not run.exists() and list((stages.folder / "outputs" / "train").iterdir()) == []
    (stages.folder / "mine").mkdir()
    (stages.folder / "mine" / "notes.txt").write_text("kept")
    assert stages.run("train", "dry_run=true", f"output_dir={stages.folder / 'mine'}") == 0
    assert [path.name for path in (stages.folder / "mine").iterdir()] == ["notes.txt"]
    assert stages.run("train", "dry_run=true", "resume=true") == 2
    assert "leave one of them out" in capsys.readouterr().err
    assert stages.run("sft", "dry_run=true") == 2
    assert "sft does not read it; train does" in capsys.readouterr().err
    assert stages.run("train", "resume=true", f"output_dir={run}", "evaluation.at_end=false") == 0
    assert "holds no run yet; starting a new one" in capsys.readouterr().out


def test_a_dry_run_that_is_not_finite_leaves_what_a_report_needs(stages, monkeypatch, capsys):
    monkeypatch.setattr("laddpo.core.loop.clip_gradients", lambda parameters, most: float("nan"))
    run = stages.folder / "run"
    assert stages.run("train", "dry_run=true", f"output_dir={run}") == 1
    assert str(run / "dry_run" / "fault") in capsys.readouterr().err
    assert (run / "dry_run" / "fault" / "fault.json").exists() and (run / "dry_run" / "config.yaml").exists()
    monkeypatch.undo()
    assert stages.run("report", f"run={run}") == 2


def test_a_dry_run_that_runs_out_of_memory_leaves_nothing_either(stages, monkeypatch):
    def no_memory(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr("laddpo.core.loop.torch.nn.utils.clip_grad_norm_", no_memory)
    assert stages.run("train", "dry_run=true", f"output_dir={stages.folder / 'run'}") == 1
    assert not (stages.folder / "run").exists()
