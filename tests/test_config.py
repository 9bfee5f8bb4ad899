"""Mistakes in settings, through the command line: exit code 2, all together, no traceback, nothing run."""

import dataclasses
import re
from types import SimpleNamespace

import pytest

from laddpo.cli.app import cli
from laddpo.errors import UserError
from laddpo.hardware.machine import check_machine
from laddpo.preference.sources import SOURCES
from laddpo.settings import ranges
from laddpo.settings.advice import unlikely_settings
from laddpo.settings.checks import find_problems
from laddpo.settings.compose import compose, read_config, write_config
from laddpo.settings.data_checks import WANTED
from laddpo.settings.mistakes import schema_types
from laddpo.settings.ranges import CHOICES, LISTS, RANGES, leaves
from laddpo.settings.redaction import find_secrets
from laddpo.settings.schema import RunConfig

TOKEN = "hf_" + "a" * 30

MISTAKES = {
    # C1, C2: names
    "a misspelt setting": (["dpo.betta=0.1"], ["dpo.betta: no such setting; did you mean dpo.beta?"]),
    "a setting without its group": (
        ["learning_rate=1"],
        ["learning_rate: no such setting; did you mean optim.learning_rate?"],
    ),
    "a setting in the wrong group": (["optim.beta=1"], ["did you mean"]),
    "an appended setting": (["+dpo.betta=0.1"], ["settings cannot be added", "did you mean dpo.beta?"]),
    "an appended setting that exists": (["++dpo.beta=0.1"], ["settings cannot be added; write dpo.beta=0.1."]),
    "a removed setting": (["~dpo.beta"], ["a setting cannot be removed", "leave it out to take its default"]),
    "a removed setting that may be null": (["~adapter.path"], ["write adapter.path=null to switch it off"]),
    "a removed group": (["~optim"], ["a group cannot be removed; choose another of its options"]),
    "a removed setting that is not there": (["~dpo.betta"], ["did you mean dpo.beta?"]),
    "a group that is null": (["optim=null"], ["optim is null; known: adamw_8bit,", "or leave optim out"]),
    "a value without a name": (["=3"], ["'=3': it has no name before the value; expected key=value"]),
    "a list of target modules": (["adapter.target_modules=[q_proj,foo]"], ["like 'q_proj|v_proj'"]),
    "several target modules": (
        ["adapter.target_modules=q_proj,v_proj"],
        ["write 'adapter.target_modules=q_proj|v_proj' for several names"],
    ),
    "several values for text": (["dpo.loss=ipo,hinge"], ["several values; expected one; add -m"]),
    "an unknown flag between settings": (["seed=1", "--foo", "dpo.beta=1"], ["--foo: no such option"]),
    "an unknown group": (["modle=llada_8b"], ["modle: no such setting; did you mean model?"]),
    "an unknown option": (["model=llada_9b"], ["model is 'llada_9b'; known:", "did you mean model=llada_8b?"]),
    "an unknown option far from all": (["dpo=xyz"], ["dpo is 'xyz'; known: default,", "--config-dir"]),
    "a group with a package": (["data@train=jsonl"], ["a group is chosen without @; write data=jsonl."]),
    "an unknown launcher": (["hydra/launcher=nonsense"], ["hydra/launcher/nonsense"]),
    # grammar and types
    "a bare path": (["outputs/train/x"], ["'outputs/train/x' is not a setting", "run=outputs/train/x"]),
    "a slice": (
        ["data.dataset_split=train[:10]"],
        ["data.dataset_split is 'train[:10]' and data.source is 'arithmetic'"],
    ),
    "a value with an equals sign": (["dpo.beta=a=b"], ["does not parse", "two pairs of quotes"]),
    "an unfinished list": (["evaluation.tasks=[gsm8k"], ["does not parse"]),
    "text for a number": (["optim.learning_rate=fast"], ["optim.learning_rate is 'fast'; expected a number"]),
    "a fraction for a whole number": (["dpo.diffusion_samples=2.5"], ["expected a whole number"]),
    "a word for a truth value": (["auto=perhaps"], ["auto is 'perhaps'; expected true or false"]),
    "a value for a list": (["logger.wandb_tags=a"], ["expected a list like [a,b]"]),
    "null where a value is needed": (["dpo.beta=null"], ["dpo.beta", "expected a number"]),
    "a value for a group": (["model.shape=3"], ["expected a group of settings"]),
    "a decimal comma": (["dpo.beta=0,1"], ["several values", "write dpo.beta=0.1", "-m"]),
    "an unknown flag": (["--multi-run"], ["no such option; did you mean --multirun?"]),
    "a setting as a flag": (["--my-own=1"], ["settings are written my_own=<value>"]),
    "a misspelt flag": (["--learning-rat=1"], ["did you mean --learning-rate?"]),
    "two flags at once": (["--cfg", "job", "--info"], ["were both given"]),
    "--resolve alone": (["--resolve"], ["without --cfg"]),
    "a bad choice for a flag": (["--cfg", "jobs"], ["invalid choice"]),
    "a folder that is not there": (["--config-dir", "nowhere"], ["--config-dir is 'nowhere'; no such folder"]),
    "an unknown root file": (["--config-name", "other"], ["--config-name is 'other'; known: config"]),
    "a reference to nothing": (["dpo.beta=${dpo.gamma}"], ["dpo.beta is '${dpo.gamma}'", "'dpo.gamma' not found"]),
    "a reference to the wrong type": (["dpo.beta=${dpo.loss}"], ["'sigmoid'", "expected a number"]),
    "a resolver": (["output_dir=${now:%Y}"], ["now is not an allowed resolver"]),
    # C3, C4, C33 and other ranges
    "a negative beta": (["dpo.beta=-0.1"], ["dpo.beta is -0.1; it must be > 0 and at most 1000; 0.05 to 0.5 is usual"]),
    "beta zero": (["dpo.beta=0"], ["it must be > 0"]),
    "a beta that saturates": (["dpo.beta=1e308"], ["it must be > 0 and at most 1000"]),
    "a rank above the model's width": (
        ["adapter.r=100000"],
        ["adapter.r is 100000 and llada_nano is 128 wide", "set adapter.r=128 or lower"],
    ),
    "beta not a number": (["dpo.beta=nan"], ["dpo.beta is nan; expected a finite number"]),
    "an infinite learning rate": (["optim.learning_rate=inf"], ["expected a finite number"]),
    "no draws": (["dpo.diffusion_samples=0"], ["it must be >= 1", "8 the paper's value"]),
    "a negative seed": (["seed=-1"], ["seed is -1; it must be >= 0"]),
    "a seed beyond 63 bits": (["seed=9223372036854775808"], ["seed is 9223372036854775808"]),
    "learning rate zero": (["optim.learning_rate=0"], ["it must be > 0"]),
    "a learning rate of five": (["optim.learning_rate=5"], ["it must be > 0 and at most 1"]),
    "all rows for validation": (["data.validation_fraction=1"], ["it must be >= 0 and at most 0.9"]),
    "a loss that is not there": (
        ["dpo.loss=sigmod"],
        ["dpo.loss is 'sigmod'; known: sigmoid,", "did you mean sigmoid?"],
    ),
    "a task that is not there": (["evaluation.tasks=[gsm9k]"], ["did you mean gsm8k?"]),
    "a word in a list of numbers": (
        ["evaluation.temperatures=[1,x]"],
        ["evaluation.temperatures is '[1,x]'; expected a list of numbers"],
    ),
    "a name of several words": (["variance.settings=[foo]"], ["naive, 'one time, many masks', one time a draw"]),
    "three betas of Adam": (["optim.betas=[0.9,0.95,0.99]"], ["optim.betas"]),
    # C5
    "an odd number of complement draws": (
        ["dpo.estimator=complement", "dpo.diffusion_samples=5"],
        ["expected 1 or a multiple of 2; set dpo.diffusion_samples=4 or 6"],
    ),
    # C6
    "an unknown hardware profile": (
        ["hardware=rtx4081"],
        ["hardware is 'rtx4081'; known:", "auto", "hardware=rtx4080?"],
    ),
    # C7
    "longer than the model": (["data.max_length=8192"], ["data.max_length is 8192; llada_nano knows 4096 positions"]),
    "no room for a response": (["data.max_length=8"], ["no response would be left"]),
    "a micro-step shorter than a row": (["hardware.token_budget=100"], ["a micro-step must hold the longest sequence"]),
    "an answer longer than the model": (
        ["evaluation.gen_length=8192", "evaluation.steps=8192", "evaluation.confidence_threshold=null"],
        ["evaluation.gen_length is 8192; llada_nano knows 4096"],
    ),
    # C8
    "fp16 on the CPU": (
        ["hardware=cpu", "hardware.precision=fp16"],
        ["hardware.precision is 'fp16'", "use hardware.precision=fp32"],
    ),
    "paging on the CPU": (
        ["hardware=cpu", "optim=paged_adamw_8bit"],
        ["which needs a CUDA device; use optim.optimizer=adamw, adamw_8bit"],
    ),
    # C9, C11
    "4 and 8 bits at once": (["quantization=nf4", "quantization.load_in_8bit=true"], ["are both true", "choose one"]),
    "4 bits trained in full": (["quantization=nf4", "adapter=full"], ["quantized weights cannot be trained"]),
    "8 bits trained in full": (["quantization=int8", "adapter=full"], ["load_in_8bit is true"]),
    "a misspelt layer": (
        ["adapter.target_modules=q_prj"],
        ["adapter.target_modules is 'q_prj', which matches no linear layer", "did you mean q_proj?"],
    ),
    "a layer of a block that is not there": (['adapter.target_modules="blocks[.]99[.]q_proj"'], ["matches no linear"]),
    "half a pattern": (["adapter.target_modules='(q_proj'"], ["adapter.target_modules is '(q_proj'"]),
    "an adapter in a full run": (["adapter=full", "adapter.path=a"], ["an adapter is loaded only into a LoRA run"]),
    "dropout": (["adapter.lora_dropout=0.1"], ["adapter.lora_dropout is 0.1; expected 0"]),
    # C24, C25
    "patience without evaluations": (
        ["stopping.patience=3", "evaluation.every_steps=null"],
        ["stopping.patience=3: early stopping looks at", "set evaluation.every_steps"],
    ),
    # data, losses, decoding
    "no data set": (["data=jsonl"], ["data.dataset_name is not set", "add data.dataset_name=path/to/pairs.jsonl"]),
    "a file that no source reads": (
        ["data.dataset_name=foo.jsonl", "data.format=implicit", "data.columns.prompt=q"],
        [
            "3 problems",
            "data.dataset_name is 'foo.jsonl' and data.source is 'arithmetic', which does not read it",
            "write data=jsonl",
            "data.format is 'implicit'",
            "data.columns.prompt is 'q'",
        ],
    ),
    "a file that no source reads, beside a misspelt setting": (
        ["data.dataset_name=foo.jsonl", "dpo.betta=1"],
        ["data.dataset_name is 'foo.jsonl' and data.source is 'arithmetic'", "dpo.betta"],
    ),
    "questions for given pairs": (["data=hh_rlhf", "data.questions=q.jsonl"], ["write data=onpolicy"]),
    "a number of generated pairs for a file": (
        ["data=jsonl", "data.dataset_name=x.jsonl", "data.num_pairs=9"],
        ["data.num_pairs is 9", "data.random_sample_size"],
    ),
    "a file beside a mixture": (["data=mixture", "data.dataset_name=x"], ["give it to the parts in data.mixture"]),
    "numbers too wide": (["data.operand_max=100"], ["set data.operand_max=99 or lower"]),
    "smoothing without a place": (["dpo.loss=hinge", "dpo.label_smoothing=0.1"], ["which has no such term"]),
    "half of the labels wrong": (["dpo.loss=robust", "dpo.label_smoothing=0.5"], ["expected less than 0.5"]),
    "blocks that do not fill an answer": (
        ["evaluation.gen_length=32", "evaluation.block_length=5"],
        ["set evaluation.block_length=4 or"],
    ),
    "steps that do not fill blocks": (
        [
            "evaluation.gen_length=32",
            "evaluation.block_length=16",
            "evaluation.steps=31",
            "evaluation.confidence_threshold=null",
        ],
        ["evaluation.steps is 31 over 2 blocks", "set evaluation.steps=30 or 32"],
    ),
    "an option of a decoder": (
        ["evaluation.remasking=confidence"],
        ["evaluation.remasking is 'confidence'", "did you mean"],
    ),
    # what is measured for each of several
    "no parts": (["benchmark.parts=[]"], ["benchmark.parts is empty; expected a list such as [memory,speed]"]),
    "no draws of a part": (["benchmark.memory_draws=[]"], ["benchmark.memory_draws is empty"]),
    "no ranks of the plan": (["benchmark.plan_ranks=[]", "benchmark.plan_tokens=[]"], ["2 problems", "plan_tokens"]),
    "zero draws of a part": (["benchmark.memory_draws=[4,0]"], ["benchmark.memory_draws is 0; it must be >= 1"]),
    "no draws of the noise study": (
        ["variance.draws=[]"],
        ["variance.draws is empty; expected a list such as [1,2,4,8]"],
    ),
    "draws named twice": (["variance.draws=[4,8,4]"], ["variance.draws is [4, 8, 4], which names 4 twice"]),
    "draws below one": (["variance.draws=[4,-1]"], ["variance.draws is -1; it must be >= 1"]),
    "a row of the noise study that is not there": (["variance.settings=[vrpo_papr]"], ["did you mean vrpo_paper?"]),
    "parts without settings": (
        ["benchmark.parts=[cards,rates]"],
        ["benchmark.parts has cards and benchmark.cards is empty", "benchmark.parts has rates", "gpu_proof_small"],
    ),
    "a mean above the longest": (
        ["benchmark.mean=700"],
        ["benchmark.mean is 700 and benchmark.p99 is 646; lengths are log-normal", "157 and 646"],
    ),
    "a percentile that no mean has": (["benchmark.mean=20", "benchmark.p99=300"], ["below 14.9 times it"]),
    "a metric that is not there": (
        ["best_metric=acuracy"],
        ["best_metric is 'acuracy'; known: auto, none, exact_match"],
    ),
    "a metric that nothing measures": (
        ["best_metric=exact_match", "evaluation=gsm8k"],
        ["best_metric is 'exact_match' and evaluation.tasks is ['gsm8k']", "arithmetic, rubric, word_problems have"],
    ),
    # C29, C30
    "a token": ([f"logger.wandb_name={TOKEN}"], ["looks like a Hugging Face token", "HF_TOKEN"]),
    "a token under an unknown name": ([f"hf_token={'b' * 20}"], ["looks like a key or token"]),
    "an address with a password": (
        ["model.model_name_or_path=https://me:secret@host/x"],
        ["an address with a password"],
    ),
    "a secret of the environment": (["logger.wandb_name=${oc.env:HF_TOKEN}"], ["'HF_TOKEN' from the environment"]),
    "a forty-digit key": ([f"logger.wandb_project={'0a' * 20}"], ["looks like an API key"]),
    "code to run": (["+dpo._target_=os.system"], ["names code to run"]),
    "code to run, partially": (["dpo._partial_=true"], ["names code to run"]),
    "code to run in a value": (["data.columns={_target_: os.system}"], ["names code to run"]),
    "code for the launcher": (["hydra.launcher._target_=os.system"], ["names code to run"]),
    "a callback": (["+hydra.callbacks={a: {_target_: os.system}}"], ["names code to run"]),
    "an empty folder": (
        ["output_dir=", "paths.data_dir=''"],
        ["output_dir is empty; expected a path", "paths.data_dir is"],
    ),
    # C31
    "a swept folder": (["-m", "dpo.beta=1,2", "output_dir=a,b"], ["a sweep has one folder"]),
    "a swept contradiction": (["-m", "dpo.beta=1,-2"], ["dpo.beta is -2.0", "(job 1 of 2)"]),
    "a swept contradiction behind another setting": (["seed=1", "-m", "dpo.beta=1,-2"], ["(job 1 of 2)"]),
    "a swept name": (["-m", "dpo.betta=1,2"], ["dpo.betta: no such setting"]),
    "a sweep that goes on nowhere": (["-m", "dpo.beta=1,2", "resume=true"], ["resume=true output_dir=<folder>"]),
}


def never(config, folder):
    raise AssertionError("a stage ran with wrong settings")


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_refused_in_our_own_words(name, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments, needles = MISTAKES[name]
    assert cli("train", arguments, never) == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    for needle in needles:
        assert needle in captured.err
    assert captured.out == ""
    assert list(tmp_path.iterdir()) == []


def test_all_mistakes_are_reported_together(capsys):
    arguments = [
        "dpo.betta=1",
        "optim.learning_rate=abc",
        "model=llada_9b",
        "dpo.diffusion_samples=0",
        "+x=1",
        "outputs/a",
    ]
    assert (
        cli("train", [*arguments, "data.max_length=9999", "dpo.loss=sigmod", "adapter=full", "quantization=nf4"], never)
        == 2
    )
    err = capsys.readouterr().err
    for part in [
        "dpo.betta",
        "optim.learning_rate",
        "llada_9b",
        "diffusion_samples is 0",
        "+x=1",
        "outputs/a",
        "9999",
        "sigmod",
    ]:
        assert part in err
    assert "quantized weights" in err
    assert err.startswith("9 problems, nothing was run:")


def test_a_wrong_value_hides_no_contradiction_between_the_others(capsys):
    assert cli("train", ["dpo.beta=${dpo.gamma}", "adapter=full", "quantization=nf4"], never) == 2
    err = capsys.readouterr().err
    assert "dpo.gamma" in err and "quantized weights" in err


def test_no_message_repeats_a_secret(capsys, monkeypatch):
    monkeypatch.setenv("MY_API_KEY", "correct-horse-battery")
    for arguments in [
        [f"dpo.beta={TOKEN}"],
        [f"nonsense={TOKEN}"],
        [TOKEN],
        ["logger.wandb_name=correct-horse-battery"],
    ]:
        assert cli("train", arguments, never) == 2
        captured = capsys.readouterr()
        assert TOKEN not in captured.err + captured.out
        assert "correct-horse" not in captured.err + captured.out


def test_no_setting_is_taken_for_a_secret_by_its_name():
    assert find_secrets({"hub_tokens": "long enough"})
    assert find_secrets({key: "long enough" for key, _ in leaves(RunConfig())}) == []
    assert compose(["benchmark.plan_tokens=[256,1024]"]).benchmark.plan_tokens == [256, 1024]


def test_a_commit_is_not_taken_for_a_key():
    assert compose([f"model.revision={'0a' * 20}"]).model.revision == "0a" * 20


def test_a_yaml_file_with_a_wrong_line_is_named(tmp_path, capsys):
    (tmp_path / "dpo").mkdir()
    cases = {
        "beta: [1\n": ("mine.yaml:2", "expected yaml"),
        "beta: x\n": ("dpo/mine.yaml: dpo.beta is 'x'; expected a number",),
        "defaults: [defalt, _self_]\n": ("dpo is 'defalt'", "did you mean dpo=default?"),
        "_target_: os.system\n": ("dpo/mine.yaml: dpo._target_: no such setting",),
        f"loss: {TOKEN}\n": ("looks like a Hugging Face token",),
    }
    for text, needles in cases.items():
        (tmp_path / "dpo" / "mine.yaml").write_text(text, encoding="utf-8")
        assert cli("train", ["--config-dir", str(tmp_path), "dpo=mine"], never) == 2
        err = capsys.readouterr().err
        assert all(needle in err for needle in needles), err
        assert "Traceback" not in err and TOKEN not in err


def test_a_model_yaml_without_its_values_names_every_missing_one(tmp_path, capsys):
    (tmp_path / "model").mkdir()
    text = "# @package _global_\nmodel:\n  name: mine\n  model_name_or_path: here\n"
    (tmp_path / "model" / "mine.yaml").write_text(text, encoding="utf-8")
    assert cli("train", ["--config-dir", str(tmp_path), "model=mine"], never) == 2
    err = capsys.readouterr().err
    for key in (
        "model.shape.d_model",
        "model.shape.vocab_size",
        "model.recommended.beta",
        "model.recommended.learning_rate.lora",
    ):
        assert f"{key} is not set; expected" in err


def test_resume_takes_a_truth_value_or_a_folder():
    assert [compose([f"resume={value}"]).resume for value in ("true", "False", "outputs/train/x")] == [
        "true",
        "false",
        "outputs/train/x",
    ]


def test_unlikely_settings_are_named_and_run(capsys):
    ran = []
    assert cli("train", ["dpo.beta=0.1", "optim.learning_rate=0.01"], lambda config, folder: ran.append(config)) == 0
    err = capsys.readouterr().err
    assert ran and "note: dpo.beta=0.1 is far from what suits llada_nano" in err
    assert "note: optim.learning_rate=0.01 is far" in err


@pytest.mark.parametrize(
    ("overrides", "needle"),
    [
        (["model=llada_8b", "data=arithmetic"], "small embedded task"),
        (["model=llada_8b", "hardware.precision=fp32"], "doubles the memory"),
        (["dpo.estimator=bernoulli", "dpo.difference_focus=0", "dpo.count_tilt=0"], "biased"),
        (["dpo=naive"], "noisier"),
        (["model=llada_8b", "optim.num_train_epochs=3"], "raise dpo.mask_rounds"),
        (["dpo=ipo"], "per token"),
        (["data=gsm8k_preferences", "evaluation=gsm8k"], "test questions"),
        (["optim.num_warmup_steps=50", "optim.max_train_steps=10"], "ends within the warm-up"),
        (["adapter.use_dora=true"], "twice the memory that the plan counts"),
    ],
)
def test_each_unlikely_setting_has_its_note(overrides, needle):
    assert any(needle in note for note in unlikely_settings(compose(overrides)))


@pytest.mark.parametrize(
    ("overrides", "epochs", "steps"),
    [
        ([], 1, 60),
        (["optim.num_train_epochs=3"], 3, None),
        (["model.recommended.num_train_epochs=2"], 2, None),
        (["experiment=make_llada_nano", "optim.num_train_epochs=2"], 2, None),
        (["optim.num_train_epochs=3", "optim.max_train_steps=null"], 3, None),
        (["optim.max_train_steps=7"], 1, 7),
        (["optim=vrpo_paper"], 1, None),
        (["optim=vrpo_paper", "optim.max_train_steps=5"], 1, 5),
    ],
)
def test_epochs_that_are_set_win_over_steps_that_are_recommended(overrides, epochs, steps):
    optim = compose(overrides).optim
    assert (optim.num_train_epochs, optim.max_train_steps) == (epochs, steps)


def test_of_a_users_yaml_the_epochs_win_too_and_steps_set_beside_them_decide(tmp_path):
    (tmp_path / "optim").mkdir()
    for line, steps in (("", None), ("max_train_steps: 5\n", 5)):
        text = f"defaults: [default]\nnum_train_epochs: 2.0\n{line}"
        (tmp_path / "optim" / "mine.yaml").write_text(text, encoding="utf-8")
        assert compose(["optim=mine"], config_dir=str(tmp_path)).optim.max_train_steps == steps


def test_epochs_and_steps_on_one_command_line_are_refused(capsys):
    assert cli("train", ["optim.num_train_epochs=3", "optim.max_train_steps=5"], never) == 2
    assert "both say when the run ends; leave one of them out" in capsys.readouterr().err


@pytest.mark.parametrize("experiment", ["make_llada_mini", "make_llada_nano"])
def test_random_weights_take_a_learning_rate_of_their_own(experiment, capsys):
    def notes(stage: str, *more: str) -> str:
        assert cli(stage, [f"experiment={experiment}", *more], lambda config, folder: None) == 0
        return capsys.readouterr().err

    note = "note: optim.learning_rate=0.002 is far from what suits"
    assert note not in notes("sft")
    assert note in notes("sft", "sft.from_scratch=false")
    assert note in notes("train"), "DPO starts from trained weights, whatever sft says"


def test_the_run_config_is_written_and_read_back_whole(tmp_path):
    config = compose(["dpo.beta=0.3", "evaluation.tasks=[gsm8k]", "resume=true"])
    write_config(config, tmp_path)
    assert read_config(tmp_path) == config
    assert "${" not in (tmp_path / "config.yaml").read_text(encoding="utf-8")


def test_a_damaged_run_config_is_the_users_problem(tmp_path):
    for text in ["dpo: [", "dpo: {betta: 1}", "- 1\n"]:
        (tmp_path / "config.yaml").write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=r"config.yaml"):
            read_config(tmp_path)
    with pytest.raises(UserError, match="not found"):
        read_config(tmp_path / "nowhere")


def test_every_range_and_choice_belongs_to_a_setting():
    keys = {key for key, _ in leaves(compose())}
    assert CHOICES.keys() | RANGES.keys() | LISTS.keys() <= keys


def test_metrics_that_may_choose_a_checkpoint_are_measured():
    import numpy as np
    import torch

    from laddpo.core.metrics import preference_metrics

    item = SimpleNamespace(reference=np.zeros((2, 1)), response_tokens=(1, 1), weight=1.0, margin=0.0)
    measured = preference_metrics([item], torch.zeros(1, 2, 1), torch.zeros(1), 1.0)
    assert set(CHOICES["best_metric"]) - set(measured) == {"auto", "none", "exact_match", "mean_marks"}
    assert compose(["best_metric=exact_match"]).best_metric == "exact_match"


def test_lengths_that_a_log_normal_has_are_taken_and_a_wrong_percentile_is_blamed_alone():
    from laddpo.benchmarking.workload import length_parameters

    config = compose(["benchmark.mean=20", f"benchmark.p99={20 * ranges.P99_OVER_MEAN - 1}"])
    length_parameters(config.benchmark.mean, config.benchmark.p99)
    with pytest.raises(UserError) as caught:
        compose(["benchmark.p99=abc"])
    assert len(caught.value.problems) == 1


def test_every_number_that_can_be_wrong_has_a_range():
    """By its type in the schema, so also where the default is null or a list."""
    free = ("model.recommended.", "optim.betas")  # what is recommended is checked where it lands, betas by themselves
    numbers = {key for key, kind in schema_types().items() if re.search(r"\b(int|float)\b", kind)}
    nullable = {key for key, kind in schema_types().items() if re.match(r"(int|float) \| None", kind)}
    assert nullable < numbers and len(nullable) > 20
    assert {key for key in numbers if not key.startswith(free)} == RANGES.keys()


def test_names_in_the_settings_are_those_of_the_tables_that_need_torch():
    from laddpo.core.gradient import BACKWARD_MODES
    from laddpo.estimator_study.noise import SETTINGS
    from laddpo.estimator_study.study import OWN
    from laddpo.evaluation.orders import REMASKING
    from laddpo.evaluation.sampling import SUPPRESSION
    from laddpo.models.block_cache import KINDS

    tables = {
        "hardware.backward": ["auto", *BACKWARD_MODES],
        "variance.settings": [OWN, *SETTINGS],
        "evaluation.remasking": REMASKING,
        "evaluation.suppress_eos": SUPPRESSION,
        "evaluation.block_cache": ["none", *KINDS],
    }
    tables |= {
        key.replace("evaluation", "data.sampling"): row for key, row in tables.items() if key.startswith("evaluation.")
    }
    for key, table in tables.items():
        assert set(CHOICES[key]) == set(table), key


def test_what_a_yaml_sets_beside_its_source_is_no_mistake_of_the_user(tmp_path):
    """Nor is a value that says what holds anyway, nor one that a part of a mixture reads."""
    (tmp_path / "data").mkdir()
    own = "defaults: [jsonl, _self_]\nsource: arithmetic\ndataset_name: x.jsonl\n"
    (tmp_path / "data" / "mine.yaml").write_text(own, encoding="utf-8")
    assert compose(["data=mine"], config_dir=str(tmp_path)).data.dataset_name == "x.jsonl"
    compose(["data.dataset_name=null", "data.columns.prompt=prompt"])
    compose(["experiment=laddpo_hh", "data=arithmetic"])
    compose(["model=llada_8b", "data.dataset_name=x.jsonl", "data.columns.chosen=good"])
    compose(["data=mixture", "data.mixture=[{source:arithmetic}]", "data.num_pairs=9"])


def test_a_patience_that_a_yaml_brings_lets_a_run_go_without_evaluations():
    config = compose(["evaluation.every_steps=null"])
    assert config.stopping.patience == 3 and config.evaluation.every_steps is None


def test_the_highest_rank_is_the_models_width():
    assert compose(["adapter.r=128"]).adapter.r == 128
    assert compose(["model=llada_8b", "adapter.r=4096"]).adapter.r == 4096
    assert compose(["adapter=full", "adapter.r=129"]).adapter.kind == "full"


def test_the_table_of_what_each_source_reads_names_settings_and_sources():
    keys = {key for key, _ in leaves(compose())}
    for name in WANTED:
        assert any(f"{key}.".startswith(f"data.{name}.") for key in keys), name
    assert {name for source in SOURCES.values() for name in source.reads} == WANTED.keys()


class Gpu:
    """A CUDA device of a given compute capability, as torch describes it."""

    def __init__(self, monkeypatch, capability):
        import torch

        monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")


def test_a_profile_for_a_gpu_is_refused_where_there_is_none(monkeypatch):
    Gpu(monkeypatch, None)
    with pytest.raises(UserError, match="torch finds no CUDA device"):
        check_machine(compose(["hardware=rtx4080", "quantization=none"]))
    check_machine(compose(["hardware=auto"]))


def test_bf16_is_refused_by_name_on_a_gpu_without_it(monkeypatch):
    Gpu(monkeypatch, (7, 5))
    with pytest.raises(
        UserError, match=r"bf16 needs compute capability 8.0 and Tesla T4 has 7.5; use hardware.precision=fp16"
    ):
        check_machine(compose(["hardware.precision=bf16"]))
    check_machine(compose(["hardware.precision=fp16"]))


def test_fp16_and_paging_are_refused_where_auto_means_the_cpu(monkeypatch):
    Gpu(monkeypatch, None)
    with pytest.raises(UserError) as caught:
        check_machine(compose(["hardware.precision=fp16", "optim=paged_adamw_8bit"]))
    assert len(caught.value.problems) == 2


def test_a_broken_bitsandbytes_is_named_only_where_it_is_needed(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    with pytest.raises(UserError, match="cannot be imported"):
        check_machine(compose(["quantization=nf4"]))
    check_machine(compose())


def test_problems_are_found_without_hydra_too():
    config = compose()
    wrong = dataclasses.replace(config, dpo=dataclasses.replace(config.dpo, beta=-1.0))
    assert [p.split(" ", 1)[0] for p in find_problems(wrong)] == ["dpo.beta"]
    assert isinstance(wrong, RunConfig)


@pytest.mark.parametrize(
    ("given", "meant"),
    [("true", "confidence"), ("false", "no"), ("no", "no"), ("confidence", "confidence"), ("logits", "logits")],
)
def test_every_way_of_suppressing_stop_tokens_can_be_asked_for(given, meant):
    from laddpo.evaluation.answering import sampler_settings
    from laddpo.training.on_policy import sampling_config

    config = compose(["data=onpolicy", f"evaluation.suppress_eos={given}"])
    groups = [config.evaluation, sampling_config(config).evaluation]
    assert [sampler_settings(group, config.seed, None).suppression for group in groups] == [meant, meant]


@pytest.mark.parametrize("given", ["logit", "1", "yes"])
def test_another_word_for_suppressing_stop_tokens_is_refused(given):
    with pytest.raises(UserError, match=r"evaluation\.suppress_eos is .*true, false"):
        compose([f"evaluation.suppress_eos={given}"])


@pytest.mark.parametrize("group", ["evaluation", "data.sampling"])
def test_blocks_steps_and_room_are_checked_alike_for_testing_and_sampling(group):
    for settings, named in (
        (["gen_length=10", "block_length=4"], "block_length=2"),
        (["gen_length=8", "block_length=4", "steps=5", "confidence_threshold=null"], "steps=4 or 6"),
        (["gen_length=4096", "block_length=32", "steps=4096"], "4096 positions"),
    ):
        with pytest.raises(UserError) as caught:
            compose(["data=onpolicy", "evaluation=arithmetic", *[f"{group}.{setting}" for setting in settings]])
        assert any(f"{group}." in problem and named in problem for problem in caught.value.problems), settings
