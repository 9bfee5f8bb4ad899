"""laddpo from Python gives what the stages give: the same answers, likelihoods, bytes and messages."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from safetensors.numpy import load_file

import laddpo
from laddpo.cli.app import cli
from laddpo.cli.in_process import flat, values_of, words_of
from laddpo.errors import Stopped, UserError
from laddpo.storage.reference_store import ReferenceStore
from laddpo.storage.shards import _addresses
from laddpo.training.outputs import resume_step
from tests.pipeline.conftest import QUICK, SHAPE, Stages
from tests.tiny import REPOSITORY, write_tiny_model

ROWS = [
    {"prompt": f"{a:02}+07=", "chosen": f"{a + 7:02}#{a + 7}", "rejected": f"{a + 6:02}#{a + 6}"} for a in range(10, 34)
]
PROMPTS = ["07+15-04=", "hello", "01+01=", "07+15-04="]
SHORT = {"gen_length": 8, "block_length": 4, "steps": 4}
# as settings of Python what QUICK says, without tasks
HERE = {"evaluation": {"tasks": []}, "best_metric": "none", **dict(text.split("=") for text in QUICK)}


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Stages:
    """A tiny model, and one run of train on ROWS below the same folder."""
    folder = tmp_path_factory.mktemp("api")
    stages = Stages(folder, write_tiny_model(folder / "tiny", SHAPE))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    given = [f"data={folder / 'rows.jsonl'}", "evaluation.tasks=[]", "best_metric=none"]
    assert stages.run("train", *given, f"output_dir={folder / 'run'}") == 0
    return stages


def places(home: Stages, *but: str) -> dict:
    """Where the model and all folders are, without the settings that begin so."""
    return dict(text.split("=", 1) for text in home.places() if not text.startswith(but))


@pytest.fixture(scope="module")
def tuned(home):
    return laddpo.load(run=home.folder / "run")


def test_importing_laddpo_imports_nothing_heavy_and_names_no_module():
    code = "import sys, laddpo; print([m for m in ('torch', 'transformers', 'hydra', 'numpy') if m in sys.modules]);"
    code += "laddpo.load, laddpo.fit; print([m for m in ('torch', 'transformers', 'peft') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, check=True)
    assert done.stdout.split("\n")[:2] == ["[]", "[]"]
    modules = {path.stem for path in (REPOSITORY / "laddpo").iterdir()}
    assert {"load", "fit"} <= set(laddpo.__all__) <= set(dir(laddpo)) and not modules & set(laddpo.__all__)
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        _ = laddpo.lode


def test_answers_are_those_of_generate_for_the_base_and_the_tuned_model(home, tuned):
    asked, out = home.folder / "asked.txt", home.folder / "generated"
    asked.write_text("\n".join(PROMPTS), encoding="utf-8")
    decoding = [f"evaluation.{name}={value}" for name, value in SHORT.items()]
    assert home.run("generate", f"run={home.folder / 'run'}", f"prompts={asked}", f"output_dir={out}", *decoding) == 0
    rows = lines_of(out / "generations.jsonl")
    assert tuned.has_base
    assert tuned.generate(PROMPTS, **SHORT) == [row["tuned"] for row in rows]
    assert tuned.generate(PROMPTS, base=True, **SHORT) == [row["base"] for row in rows]
    assert tuned.generate(PROMPTS[0], **SHORT) == rows[0]["tuned"], "after the base, and alone"
    assert [row["tuned"] for row in rows] != [row["base"] for row in rows]
    talk = [{"role": "user", "content": PROMPTS[0]}]
    assert tuned.generate([talk], **SHORT) == [rows[0]["tuned"]]


def test_decoding_is_changed_for_one_call_and_draws_belong_to_the_seed(tuned):
    as_loaded = tuned.generate(PROMPTS)
    warm = {**SHORT, "temperature": 1.0}
    assert tuned.generate(PROMPTS, **warm) == tuned.generate(PROMPTS, **warm, batch_size=1)
    assert tuned.generate(PROMPTS, **warm) != tuned.generate(PROMPTS, **warm, seed=7)
    assert tuned.generate(PROMPTS[:1], decoding="llada_1_5_gpqa", **SHORT) and tuned.generate(PROMPTS) == as_loaded


def test_scores_are_the_margins_of_evaluate_and_the_values_of_the_reference_store(home, tuned):
    run = home.folder / "run"
    measured = lines_of(run / "evaluation" / "pairs.jsonl")
    assert len(measured) == 6
    (prepared,) = (home.folder / "data" / "prepared").glob("*/pairs.jsonl")
    by_id = {row["id"]: row for row in lines_of(prepared)}
    kept = [by_id[pair["id"]] for pair in measured]
    rows = [{"prompt": k["prompt"][0]["content"], "chosen": k["chosen"], "rejected": k["rejected"]} for k in kept]
    found = tuned.score(rows)
    assert [(r["id"], r["margin"], r["margin_std_error"], r["response_tokens"]) for r in found] == [
        (pair["id"], pair["margin"], pair["draw_std_error"], pair["response_tokens"]) for pair in measured
    ]
    assert any(record["margin"] for record in found)
    manifests = [json.loads(path.read_text()) for path in (home.folder / "data" / "reference").glob("*/manifest.json")]
    (fields,) = [m["fields"] for m in manifests if m["fields"]["draws"]["estimator"] == "complement"]
    store = ReferenceStore.open(home.folder / "data" / "reference", fields)
    pairs = [pair for path in store.folder.glob("shard-*") for pair in _addresses(load_file(path))]
    values = {pair.id: store.values(pair, range(2)).mean(-1).tolist() for pair in pairs}
    for record in found:
        assert [record["reference_logps_chosen"], record["reference_logps_rejected"]] == values[record["id"]]


def test_a_margin_is_what_its_record_says_and_scales_with_beta(tuned):
    (one, two), (half, _) = tuned.score(ROWS[:2], beta=1.0), tuned.score(ROWS[:2], beta=0.5)
    ratios = [one[f"logps_{side}"] - one[f"reference_logps_{side}"] for side in ("chosen", "rejected")]
    assert one["margin"] == pytest.approx(ratios[0] - ratios[1], abs=1e-9) and half["margin"] == 0.5 * one["margin"]
    assert one["logps_chosen"] < 0 and two["id"] != one["id"]
    assert tuned.score(ROWS[:1], seed=5)[0]["logps_chosen"] != one["logps_chosen"]
    few = tuned.score(ROWS[:1], diffusion_samples=2)[0]
    assert few["logps_chosen_std_error"] is None and tuned.score(ROWS[:1], diffusion_samples=16)[0]["margin_std_error"]
    small = tuned.score(ROWS[:2], beta=1.0, token_budget=64)
    assert small[0]["margin"] == pytest.approx(one["margin"], abs=1e-4)


def test_unpaired_rows_get_a_reward_each(home, tuned):
    rows = [{"prompt": row["prompt"], "completion": row["chosen"], "label": i % 2} for i, row in enumerate(ROWS[:4])]
    found = tuned.score(rows, beta=2.0, diffusion_samples=16)
    assert [record["label"] for record in found] == [False, True, False, True]
    for record in found:
        assert record["reward"] == pytest.approx(2 * (record["logps"] - record["reference_logps"]), abs=1e-9)
        assert record["reward_std_error"] >= 0 and record["response_tokens"] == 6
    with pytest.raises(UserError, match=r"1 of 2 rows cannot be used:\n  pairs\[1\]: label: is 'so so', want true"):
        tuned.score([rows[0], {**rows[1], "label": "so so"}])


def test_pairs_are_read_from_a_file_and_columns_of_other_names_are_mapped(home, tuned):
    assert tuned.score(home.folder / "rows.jsonl") == tuned.score(ROWS)
    renamed = [{"question": row["prompt"], "chosen": row["chosen"], "rejected": row["rejected"]} for row in ROWS[:3]]
    assert tuned.score(renamed, columns={"prompt": "question"}) == tuned.score(ROWS[:3])
    twice = tuned.score([ROWS[0], ROWS[0]])
    assert [record["id"][-2:] for record in twice] == ["-0", "-1"], "equal rows have draws of their own"


def test_fit_on_rows_gives_the_bytes_of_train(home):
    run = laddpo.fit(ROWS, HERE, output_dir=home.folder / "fitted", **places(home))
    for name in ("metrics.jsonl", "adapter/adapter_model.safetensors", "evaluation/results.json"):
        assert (run.folder / name).read_bytes() == (home.folder / "run" / name).read_bytes(), name
    assert run.folder == home.folder / "fitted" and run.adapter == run.folder / "adapter"
    assert run.results["reward_margin"]["tuned"] and run.metrics[-1]["step"] == 8
    model = run.load()
    assert model.generate(PROMPTS) == laddpo.load(run=home.folder / "run").generate(PROMPTS)
    by_adapter = laddpo.load(adapter=run.adapter, settings=places(home, "logger"))
    asked = {"beta": 2.0, "seed": 42, "diffusion_samples": 4}
    assert by_adapter.has_base and by_adapter.score(ROWS[:4], **asked) == model.score(ROWS[:4], **asked)


def test_a_fit_that_is_interrupted_raises_stopped_and_is_resumed(home):
    place = home.folder / "interrupted"
    asked = {**HERE, "optim.max_train_steps": 60, "evaluation.at_end": False, **places(home)}

    def interrupt() -> None:
        while not resume_step(place) and not ended.wait(0.002):
            pass
        if not ended.is_set():
            os.kill(os.getpid(), signal.SIGINT)

    ended = threading.Event()
    watch = threading.Thread(target=interrupt)
    watch.start()
    try:
        with pytest.raises(Stopped, match="resume="):
            laddpo.fit(ROWS, asked, output_dir=place)
    finally:
        ended.set()
        watch.join()
    run = laddpo.fit(ROWS, asked, resume=place)
    assert run.folder == place and run.metrics[-1]["step"] == 60 and (place / "manifest.json").exists()


def test_a_run_of_all_weights_is_switched_with_its_base(home):
    settings = {**HERE, "adapter": "full", "optim.max_train_steps": 2, "evaluation.at_end": False}
    run = laddpo.fit(home.folder / "rows.jsonl", settings, **places(home))
    model, base = run.load(), laddpo.load(home.model, settings=places(home, "model", "logger"))
    first = model.score(ROWS[:2])
    assert model.score(ROWS[:2]) == first and first[0]["margin"] != 0 and run.results == {}
    assert [r["reference_logps_chosen"] for r in first] == [
        r["logps_chosen"] for r in base.score(ROWS[:2], diffusion_samples=2)
    ]
    assert base.score(ROWS[:1])[0]["margin"] is None and not base.has_base
    assert model.generate(PROMPTS, base=True, **SHORT) == base.generate(PROMPTS, **SHORT)
    assert model.generate(PROMPTS, **SHORT) != base.generate(PROMPTS, **SHORT)


def said_by(capsys, stage: str, *words: str) -> str:
    assert cli(stage, words) == 2
    return "\n".join(line.removeprefix("error: ") for line in capsys.readouterr().err.splitlines())


def test_what_a_caller_gets_wrong_is_told_as_on_the_command_line(home, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "chosen": "b"}\n')
    (tmp_path / "thumbs.jsonl").write_text('{"prompt": "a", "completion": "b", "label": true}\n')
    wrong = [
        (lambda: laddpo.fit(None, {"dpo.betta": 1}), ["train", "dpo.betta=1"]),
        (lambda: laddpo.fit(None, dpo__beta=-1), ["train", "dpo.beta=-1"]),
        (lambda: laddpo.fit("bad.jsonl"), ["train", "data=bad.jsonl"]),
        (lambda: laddpo.fit("none.jsonl"), ["train", "data=none.jsonl"]),
        (lambda: laddpo.fit("thumbs.jsonl"), ["train", "data=thumbs.jsonl"]),  # a loss of pairs on rows with labels
        (lambda: laddpo.fit(None, output_dir=__file__), ["train", f"output_dir={__file__}"]),
        (lambda: laddpo.load(run="nowhere"), ["generate", "run=nowhere", "prompt=a"]),
        (lambda: laddpo.load("llada_nana"), ["generate", "model=llada_nana", "prompt=a"]),
        (lambda: laddpo.load(adapter="nowhere"), ["generate", "adapter.path=nowhere", "prompt=a"]),
        (lambda: laddpo.load(quantization="nf5"), ["generate", "quantization=nf5", "prompt=a"]),
        (lambda: laddpo.load(dpo__beta=1), ["generate", "dpo.beta=1", "prompt=a"]),
    ]
    for call, words in wrong:
        expected = said_by(capsys, *words)
        with pytest.raises(UserError) as caught:
            call()
        assert expected.endswith(str(caught.value)), words


def test_what_only_a_caller_can_get_wrong_is_refused_by_name(home, tuned):
    wrong = {
        "pairs is empty": lambda: laddpo.fit([]),
        "pairs[1]: is str, want a dictionary": lambda: laddpo.fit([ROWS[0], "text"]),
        "pairs[0]: cannot be written as JSON: a value is set": lambda: laddpo.fit([{"prompt": {1}}]),
        "settings of hydra": lambda: laddpo.fit(ROWS, {"hydra.mode": "MULTIRUN"}),
        "pairs was given beside data": lambda: laddpo.fit(ROWS, data="hh_rlhf"),
        "dpo.beta was given twice": lambda: laddpo.fit(ROWS, {"dpo": {"beta": 1}}, dpo__beta=2),
        "dpo.beta is <object": lambda: laddpo.fit(ROWS, dpo__beta=object()),
        "1 of 2 pairs cannot be used:\n  pairs[1]: chosen": lambda: tuned.score([ROWS[0], {**ROWS[1], "chosen": ""}]),
        "pairs[0]: is int, want a dictionary": lambda: tuned.score([3]),
        "evaluation.diffusion_samples is 0": lambda: tuned.score(ROWS, diffusion_samples=0),
        "dpo.beta is 'much'": lambda: tuned.score(ROWS, beta="much"),
        "evaluation.genlength: no such setting; did you mean evaluation.gen_length?": lambda: tuned.generate(
            "a", genlength=3
        ),
        "evaluation.block_length is 5 and evaluation.gen_length is 8": lambda: tuned.generate("a", block_length=5),
        "evaluation.limit=3: generate does not read it": lambda: tuned.generate("a", limit=3),
        "prompts[0]: prompt: ends with a assistant turn": lambda: tuned.generate(
            [[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]]
        ),
        "pairs is int; expected a list": lambda: laddpo.fit(3),
        "pairs is dict; expected a list": lambda: laddpo.fit({"prompt": ["a"]}),
        "optim.max_train_steps was given twice, once by a short name": lambda: laddpo.fit(
            ROWS, max_steps=2, optim__max_train_steps=3
        ),
        "--cfg is a flag of the command line": lambda: laddpo.fit(ROWS, **{"--cfg": "job"}),
        "prompts is NoneType": lambda: tuned.generate(None),
        "prompts[1] is int": lambda: tuned.generate(["a", 3]),
        "Put it into a list: [messages]": lambda: tuned.generate([{"role": "user", "content": "a"}]),
        "prompts[0]: prompt: has half of a surrogate pair, '\\ud800'": lambda: tuned.generate("a\ud800"),
        "there is only a base model": lambda: laddpo.load(
            home.model, settings=places(home, "model", "logger")
        ).generate("a", base=True),
    }
    for words, call in wrong.items():
        with pytest.raises(UserError) as caught:
            call()
        assert words in str(caught.value), words


def test_settings_of_python_are_the_settings_of_the_command_line(tmp_path):
    given = flat(
        {"dpo": {"beta": np.float64(0.25)}, "optim.betas": [0.8, 0.9]},
        {"learning_rate": 2e-5, "load_in_4bit": True, "paths__data_dir": tmp_path / "a b, {c}", "run": None},
        {"evaluation.tasks": ["arithmetic"], "data.columns": {"prompt": "the question?"}, "optim": "muon"},
    )
    config = values_of(words_of(given))
    assert (config.dpo.beta, config.optim.betas, config.optim.learning_rate) == (0.25, [0.8, 0.9], 2e-5)
    assert config.quantization.load_in_4bit and config.paths.data_dir == str(tmp_path / "a b, {c}")
    assert config.evaluation.tasks == ["arithmetic"] and config.data.columns.prompt == "the question?"
    assert (config.optim.optimizer, config.run) == ("muon", None)


def test_a_program_with_a_hydra_of_its_own_keeps_it(tmp_path, home):
    (tmp_path / "theirs.yaml").write_text("a: 1\n")
    with initialize_config_dir(str(tmp_path), version_base="1.2"):
        laddpo.load(home.model, settings=places(home, "model", "logger"))
        assert GlobalHydra.instance().is_initialized() and compose("theirs").a == 1
