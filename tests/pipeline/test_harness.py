"""lm-evaluation-harness through `evaluation=lm_eval`: local tasks, offline; and its model interface by itself."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

pytest.importorskip("lm_eval", reason="the extra `eval` (lm-evaluation-harness) is not installed")

QUESTIONS = [{"q": f"0{n}+0{n}=", "a": str(2 * n), "choices": [str(2 * n), str(2 * n + 1)]} for n in range(1, 5)]


@pytest.fixture
def task_folder(tmp_path):
    """A generation task and a multiple-choice task over a local file."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS), encoding="utf-8")
    common = f"dataset_path: json\ndataset_kwargs:\n  data_files: {{test: {data}}}\ntest_split: test\n"
    common += "doc_to_text: '{{q}}'\n"
    generation = "task: local_sums\noutput_type: generate_until\ndoc_to_target: '{{a}}'\n"
    generation += "generation_kwargs: {until: ['#']}\nmetric_list:\n- metric: exact_match\n"
    choice = "task: local_choices\noutput_type: multiple_choice\ndoc_to_choice: choices\ndoc_to_target: 0\n"
    choice += "metric_list:\n- metric: acc\n"
    (folder / "sums.yaml").write_text(generation + common, encoding="utf-8")
    (folder / "choices.yaml").write_text(choice + common, encoding="utf-8")
    return folder


@pytest.fixture
def offline(monkeypatch, tmp_path):
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))


def settings(task_folder, *more):
    return ["evaluation=lm_eval", f"evaluation.harness_dir={task_folder}", "evaluation.elbo_draws=4", *more]


def test_local_tasks_run_offline_on_a_base_alone(stages, task_folder, offline, capsys):
    out = stages.folder / "out"
    tasks = "evaluation.tasks=[local_sums,local_choices]"
    assert stages.run("evaluate", *settings(task_folder, tasks), f"output_dir={out}") == 0
    results = json.loads((out / "results.json").read_text())
    assert results.keys() == {"local_sums/exact_match,none", "local_choices/acc,none"}
    assert all(0 <= entry["base"] <= 1 and entry["items"] == 4 for entry in results.values())
    rows = [json.loads(line) for line in (out / "items_base.jsonl").read_text().splitlines()]
    assert sorted({row["task"] for row in rows}) == ["local_choices", "local_sums"] and len(rows) == 8


def test_a_run_is_compared_with_its_base(stages, task_folder, offline):
    run, out = stages.folder / "run", stages.folder / "out"
    quick = ["optim.max_train_steps=2", "evaluation.at_end=false", "evaluation.tasks=[]"]
    assert stages.run("train", f"output_dir={run}", *quick) == 0
    more = settings(task_folder, "evaluation.tasks=[local_choices]")
    assert stages.run("evaluate", f"run={run}", *more, f"output_dir={out}") == 0
    entry = json.loads((out / "results.json").read_text())["local_choices/acc,none"]
    assert {"base", "tuned", "difference", "interval", "items"} <= entry.keys()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("evaluation.tasks=[no_such_task_anywhere]", "the harness has no task no_such_task_anywhere"),
        ("evaluation.tasks=[]", "evaluation.tasks is empty"),
    ],
)
def test_what_the_harness_does_not_know_is_refused_before_the_model_loads(
    stages, task_folder, capsys, override, message
):
    assert stages.run("evaluate", *settings(task_folder, override), f"output_dir={stages.folder / 'out'}") == 2
    assert message in capsys.readouterr().err


@pytest.fixture(scope="module")
def harness(tmp_path_factory, tiny_model):
    from laddpo.evaluation.answering import answerer
    from laddpo.evaluation.harness_model import HarnessModel
    from laddpo.hardware.machine import find_machine
    from laddpo.inputs import policy
    from laddpo.settings.compose import compose
    from tests.pipeline.conftest import Stages

    decoding = [f"evaluation.{name}=8" for name in ("gen_length", "block_length")]
    places = Stages(tmp_path_factory.mktemp("harness"), tiny_model).places()
    config = compose([*places, *decoding, "evaluation.steps=8", "evaluation.confidence_threshold=null"])
    loaded = policy.load(config, find_machine(config))
    return HarnessModel(answerer(loaded, config.evaluation, config.data, config.seed), draws=512)


def request(kind, *arguments):
    from lm_eval.api.instance import Instance

    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


def log_probability(harness, prompt, known):
    """log p of every token at each masked position; `known` maps answer positions to tokens, None is masked."""
    loaded = harness.answers.loaded
    mask = loaded.denoiser.mask_token_id
    ids = torch.tensor([*prompt, *(mask if token is None else token for token in known)])[None]
    with torch.no_grad():
        return loaded.model(input_ids=ids).logits[0, len(prompt) :].log_softmax(-1)


def ids(harness, context, answer):
    return harness.requests.prompt_ids(context), harness.requests.answer_ids(context, answer)


def test_one_token_is_scored_exactly(harness):
    ((value, _),) = harness.loglikelihood([request("loglikelihood", "01+01=", "2")], disable_tqdm=True)
    prompt, response = ids(harness, "01+01=", "2")
    assert len(response) == 1
    assert value == pytest.approx(float(log_probability(harness, prompt, [None])[0, response[0]]), abs=1e-5)


def test_two_tokens_have_the_mean_of_their_orders(harness):
    """The ELBO of two tokens by hand: both masked once with weight 1, each alone with weight 2, halves of each."""
    prompt, response = ids(harness, "01+01=", "07")
    a, b = (int(token) for token in response)
    both = log_probability(harness, prompt, [None, None])
    alone = log_probability(harness, prompt, [None, b])[0, a] + log_probability(harness, prompt, [a, None])[1, b]
    exact = 0.5 * (both[0, a] + both[1, b]) + 0.5 * alone
    assert harness.likelihoods.elbo(prompt, response) == pytest.approx(float(exact), abs=0.02)


def test_answers_end_before_the_first_stop_text(harness):
    from laddpo.evaluation.harness_model import cut_before

    assert cut_before("a#b\n\nc", ["\n\n", "#"]) == "a" and cut_before("abc", ["#"]) == "abc"
    (plain,) = harness.generate_until([request("generate_until", "01+01=", {"until": []})], disable_tqdm=True)
    stop = plain[len(plain) // 2] if plain else "x"
    (cut,) = harness.generate_until([request("generate_until", "01+01=", {"until": [stop]})], disable_tqdm=True)
    assert cut == plain.split(stop)[0]


def test_a_text_is_scored_in_windows(harness):
    (value,) = harness.loglikelihood_rolling([request("loglikelihood_rolling", "01+01=02")], disable_tqdm=True)
    assert value < 0 and np.isfinite(value)


def test_what_the_harness_asks_beyond_the_models_positions_is_refused_before_any_answer(harness, monkeypatch):
    from laddpo.errors import UserError

    monkeypatch.setattr(harness, "positions", 20)
    monkeypatch.setattr(harness.likelihoods, "elbo", lambda *_: pytest.fail("answered"))
    for kind, arguments in (("generate_until", ("1" * 16, {})), ("loglikelihood", ("1" * 16, "2" * 8))):
        with pytest.raises(UserError, match=r"1 of 1 prompts are too long.*20 positions"):
            getattr(harness, kind)([request(kind, *arguments)], disable_tqdm=True)


def test_the_models_own_greedy_answers_are_chosen_through_the_harness(tmp_path, offline):
    """With the chat template whose line breaks end the prompt, on llada_nano as it is shipped."""
    from laddpo.cli.app import cli

    def answered(name, *more):
        quick = ["logger=none", "hardware.device=cpu", f"paths.data_dir={tmp_path}", f"output_dir={tmp_path / name}"]
        assert cli("evaluate", [*quick, *more]) == 0
        return json.loads((tmp_path / name / "results.json").read_text())

    answered("own", "evaluation.limit=12", "evaluation.confidence_threshold=0.9")
    items = [json.loads(line) for line in (tmp_path / "own" / "items.jsonl").read_text().splitlines()]
    rows = [{"q": item["prompt"], "choices": [item["text"], item["text"][:-1] + str((int(item["text"][-1]) + 1) % 10)]}
            for item in items]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "own.yaml").write_text(
        f"task: own_answers\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path / 'rows.jsonl'}}}}}\n"
        "test_split: test\ndoc_to_text: '{{q}}'\noutput_type: multiple_choice\ndoc_to_choice: choices\n"
        "doc_to_target: 0\nmetric_list: [{metric: acc}]\n"
    )
    harness = ["evaluation=lm_eval", f"evaluation.harness_dir={tmp_path}", "evaluation.tasks=[own_answers]"]
    results = answered("chosen", *harness, "evaluation.elbo_draws=32")
    assert results["own_answers/acc,none"]["base"] >= 11 / 12
