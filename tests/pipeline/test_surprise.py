"""dpo.focus=surprise: sets first, then the reference; read and never found twice; refused where it means nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file

from laddpo.processes import signals
from laddpo.storage import manifests
from laddpo.storage.shards import _addresses
from laddpo.storage.surprise_store import SurpriseStore
from tests.launching import launch
from tests.pipeline.conftest import Stages

SETS = ("dpo.focus=surprise",)
BRIEF = (*SETS, "evaluation.at_end=false", "evaluation.every_steps=null", "evaluation.tasks=[]", "data.max_length=64")
SAME = ("metrics.jsonl", "adapter_last/adapter_model.safetensors")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_model) -> Stages:
    """A run that made all that it needs."""
    stages = Stages(tmp_path_factory.mktemp("surprise"), tiny_model)
    assert stages.run("train", *BRIEF, f"output_dir={stages.folder / 'run'}") == 0
    return stages


def only_store(stages: Stages, kind: str):
    (folder,) = (stages.folder / "data" / kind).iterdir()
    return folder


def test_a_pass_stopped_and_continued_leaves_train_nothing_and_gives_its_bytes(trained, stages, capsys, monkeypatch):
    assert stages.run("precompute", *BRIEF, "auto=true") == 0
    shutil.rmtree(stages.folder / "data" / "surprise")
    shutil.rmtree(stages.folder / "data" / "reference")
    assert stages.run("train", *BRIEF, f"output_dir={stages.folder / 'refused'}", "auto=false") == 2
    said = capsys.readouterr().err
    assert "24 of 24 pairs (training pairs) have no surprising tokens yet" in said and "laddpo.precompute" in said
    assert "dpo.focus=surprise" in said, "the command makes the same sets"

    class Late(signals.StopFlag):
        asked = 0

        def __bool__(self) -> bool:
            self.asked += 1
            self.name = "SIGTERM" if self.asked > 6 else None
            return super().__bool__()

    with monkeypatch.context() as patched:
        flag = Late()
        patched.setattr(signals, "stop_on_signal", lambda: contextlib.nullcontext(flag))
        assert stages.run("precompute", *BRIEF) == 75
    stored = int(re.search(r"(\d+) pairs are stored", capsys.readouterr().err).group(1))
    assert 0 < stored < 24 and not (stages.folder / "data" / "reference").exists(), "sets come first"
    assert stages.run("precompute", *BRIEF) == 0
    assert f"surprise, training pairs: computing {24 - stored} of 24" in capsys.readouterr().out
    assert stages.run("precompute", *BRIEF, "verify=true") == 0
    assert "verified 24 pairs" in capsys.readouterr().out
    assert stages.run("train", *BRIEF, f"output_dir={stages.folder / 'run'}", "auto=false") == 0
    shown = capsys.readouterr().out
    assert "surprise, training pairs: all 24 pairs are in" in shown
    assert "reference, training pairs: all 24 pairs are in" in shown and "computing" not in shown
    for name in SAME:
        assert (stages.folder / "run" / name).read_bytes() == (trained.folder / "run" / name).read_bytes(), name


def test_a_run_resumes_to_the_same_bytes_from_the_stored_sets(trained, capsys):
    run = trained.folder / "run"
    before = [(run / name).read_bytes() for name in SAME]
    (run / "manifest.json").unlink()
    shutil.rmtree(run / "checkpoints" / "step_0000008")
    shutil.rmtree(run / "adapter_last")
    assert trained.run("train", *BRIEF, f"output_dir={run}", "resume=true") == 0
    assert "computing" not in capsys.readouterr().out
    assert [(run / name).read_bytes() for name in SAME] == before


def test_the_keys_of_the_stores_know_the_sets_and_other_focuses_do_not(trained, capsys):
    of_sets = manifests.unsealed(only_store(trained, "surprise") / "manifest.json")["fields"]
    stores = (trained.folder / "data" / "reference").iterdir()
    fields = [manifests.unsealed(folder / "manifest.json")["fields"] for folder in stores]
    (of_training,) = (found for found in fields if "surprise_share" in found["draws"])
    assert len(fields) == 2, "validation has draws of its own"
    assert of_sets["draws"]["stream"] == "/surprise" and of_sets["surprise_draws"] == 8
    assert of_sets["weights"] == of_training["weights"]
    for given, has_new_sets in {"surprise_share=0.5": True, "surprise_focus=0.3": False}.items():
        assert trained.run("precompute", *BRIEF, f"dpo.{given}") == 0
        shown = capsys.readouterr().out
        assert ("surprise, training pairs: computing" in shown) == has_new_sets
        assert "reference, training pairs: computing 24" in shown and f"draws.{given.split('=')[0]}: stored" in shown

    none = [text for text in BRIEF if text not in SETS]
    assert trained.run("precompute", *none, "dpo.focus=none") == 0
    assert trained.run("precompute", *none, "dpo.difference_focus=0") == 0
    shown = capsys.readouterr().out
    assert "reference, training pairs: all 24 pairs are in" in shown and "surprise, training" not in shown


def test_another_set_of_a_pair_finds_no_reference_values_of_the_old_one(stages, capsys):
    """Sets that are lost and found again on a machine that rounds otherwise may differ at a tie."""
    assert stages.run("precompute", *BRIEF) == 0
    capsys.readouterr()
    folder = only_store(stages, "surprise")
    old = SurpriseStore(folder, manifests.unsealed(folder / "manifest.json")["fields"])
    pairs = [pair for path in folder.glob("set-*") for pair in _addresses(load_file(path))]
    found = {pair: old.of(pair) for pair in pairs}
    shutil.rmtree(folder)
    changed, (chosen, rejected) = next(iter(found.items()))
    other = np.setdiff1d(np.arange(len(chosen.sums)), chosen.positions)[: len(chosen.positions)]
    found[changed] = (dataclasses.replace(chosen, positions=other), rejected)
    SurpriseStore(folder, old.fields).append(found)
    assert stages.run("precompute", *BRIEF) == 0
    assert "reference, training pairs: computing 1 of 24" in capsys.readouterr().out


def test_completions_favour_their_surprising_tokens_too(stages, capsys):
    given = [*BRIEF, "dpo.loss=kto", "optim.max_train_steps=2"]
    assert stages.run("train", *given, f"output_dir={stages.folder / 'run'}") == 0
    shown = capsys.readouterr().out
    assert "surprise, training rows: computing 8 of 8" in shown
    assert "surprise, the same prompts with other completions: computing 8 of 8" in shown
    assert stages.run("train", *given, "auto=false", f"output_dir={stages.folder / 'again'}") == 0


def test_a_plan_counts_the_draws_that_tell_surprise(stages, capsys):
    times = []
    for more in ([], SETS, [*SETS, "dpo.surprise_draws=64"]):
        assert stages.run("plan", "hardware.tflops=1e-3", "optim.max_train_steps=90", *more) == 0
        times.append(capsys.readouterr().out.split("time: ")[1])
    assert "for surprising tokens, reference and training" in times[1]
    assert len({text.split(" for ")[0] for text in times}) == 3


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["dpo.surprise_share=0.1"], "it is read only with dpo.focus=surprise"),
        ([*SETS, "dpo.difference_focus=0.3"], "it is read only with dpo.focus=difference"),
        (["dpo.focus=none", "dpo.difference_focus=0.3"], "it is read only with dpo.focus=difference"),
        ([*SETS, "dpo.loss=simpo"], "dpo.loss=simpo compares with no reference; use dpo.focus=difference"),
        ([*SETS, "dpo.surprise_draws=3"], "expected an even number; set dpo.surprise_draws=4"),
        ([*SETS, "dpo.estimator=bernoulli"], "dpo.focus is surprise (0.5)"),
        (["dpo.focus=surprize"], "dpo.focus"),
        (["dpo.focus=difference", "dpo.loss=kto"], "dpo.focus=surprise or none fits it"),
    ],
)
def test_what_a_focus_does_not_read_is_refused_by_name(stages, given, said, capsys):
    assert stages.run("train", *given) == 2
    assert said in capsys.readouterr().err


@pytest.mark.long
def test_two_processes_store_the_sets_of_one(trained, stages):
    done = launch(2, "-m", "laddpo.precompute", *stages.places(), "data.num_pairs=32", *WORK)
    assert done.returncode == 0, done.stdout
    folder = only_store(stages, "surprise")
    fields = manifests.unsealed(folder / "manifest.json")["fields"]
    two, one = (SurpriseStore.open(place.folder / "data" / "surprise", fields) for place in (stages, trained))
    assert two.folder == folder and len(two._shards) == 2 and len(two) == len(one) == 24
    for pair in one._values:
        for a, b in zip(one.positions(pair), two.positions(pair), strict=True):
            assert a.tolist() == b.tolist()


WORK = (
    *("dpo.focus=surprise", "data.max_length=64", "data.validation_fraction=0.25", "dpo.diffusion_samples=2"),
    *("optim.per_device_train_batch_size=2", "optim.max_train_steps=8", "evaluation.at_end=false"),
    *("evaluation.num_pairs=2", "evaluation.diffusion_samples=2"),
)
