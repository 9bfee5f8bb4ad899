"""What a run was trained on, changed one input at a time: refused by name wherever the run is used; unchanged: used."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from laddpo.cli.app import cli
from laddpo.errors import UserError
from laddpo.inputs import pins
from laddpo.settings.compose import compose
from laddpo.storage.atomic import read_json, write_json
from laddpo.storage.manifests import MANIFEST, unsealed, with_seal
from tests.pipeline.conftest import SHAPE

SETTINGS = [
    "model.model_name_or_path=model",
    *[f"model.shape.{name}={value}" for name, value in SHAPE.items()],
    "hardware.device=cpu",
    "logger=none",
    "data=jsonl",
    "data.dataset_name=rows.jsonl",
    "data.max_length=64",
    "data.validation_fraction=0.25",
    "adapter.r=2",
    "dpo.diffusion_samples=2",
    "optim.per_device_train_batch_size=4",
    "optim.num_warmup_steps=0",
    "optim.max_train_steps=2",
    "save_steps=1",
    "evaluation.at_end=false",
    "evaluation.num_pairs=2",
    "evaluation.diffusion_samples=2",
    "evaluation.samples=0",
    "best_metric=none",
]
START = [*(text for text in SETTINGS if text != "adapter.r=2"), "adapter.path=start"]


def write_rows(path: Path, count: int) -> None:
    rows = [{"prompt": f"{n}+1=", "chosen": f"{n + 1}", "rejected": f"{n + 2}"} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_model) -> Path:
    """A working folder: model/, rows.jsonl, start/ (an adapter in PEFT's layout alone), run/ (finished) and part/ (the
    same run, stopped after its first step)."""
    from laddpo.models import adapters, loading

    folder = tmp_path_factory.mktemp("pins")
    shutil.copytree(tiny_model, folder / "model")
    write_rows(folder / "rows.jsonl", 16)
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        model = loading.load_model("model")
        adapters.attach_lora(model, r=2, alpha=4)
        adapters.save_adapter(model, Path("start"))
        assert cli("train", [*START, "output_dir=run"]) == 0
        shutil.copytree("run", "part")
        Path("part/manifest.json").unlink()
        shutil.rmtree("part/checkpoints/step_0000002")
        shutil.rmtree("part/adapter_last")
    return folder


@pytest.fixture
def place(trained, tmp_path, monkeypatch) -> Path:
    """A copy of the working folder, which is the working directory."""
    shutil.copytree(trained, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    return tmp_path / "place"


def flip_last_byte(path: str) -> None:
    content = bytearray(Path(path).read_bytes())
    content[-1] ^= 1
    Path(path).write_bytes(content)


def add_template() -> None:
    path = Path("model/tokenizer_config.json")
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": template}))


def add_line(path: str) -> None:
    with open(path, "a") as f:
        f.write("\n")


CHANGES = {
    "data file": (lambda: write_rows(Path("rows.jsonl"), 17), "the data changed (data.dataset_name=rows.jsonl)"),
    "base weights": (lambda: flip_last_byte("model/model.safetensors"), "weights or config.json changed"),
    "config.json": (lambda: add_line("model/config.json"), "config.json of the base model changed"),
    "tokenizer.json": (lambda: add_line("model/tokenizer.json"), "the tokenizer (tokenizer.json) changed"),
    "chat template": (add_template, "the chat template or its special tokens"),
    "starting adapter": (
        lambda: flip_last_byte("start/adapter_model.safetensors"),
        "the starting adapter changed (adapter.path=start)",
    ),
}
COMMANDS = {
    "train": ["resume=part"],
    "evaluate": ["run=run", "output_dir=out"],
    "generate": ["run=run", "output_dir=out", "prompt=hello"],
    "variance": ["run=run", "output_dir=out"],
    "export": ["run=run", "output_dir=out"],
}


def said(capsys, command: str) -> list[str]:
    """The one problem that a refused command names."""
    shown = capsys.readouterr()
    assert "Traceback" not in shown.err, command
    return [line for line in shown.err.splitlines() if line.startswith("error:")]


@pytest.mark.parametrize("what", CHANGES)
def test_a_changed_input_is_refused_by_name_wherever_the_run_is_used(place, capsys, what):
    change, name = CHANGES[what]
    before = Path("part/metrics.jsonl").read_bytes(), Path("part/config.yaml").read_bytes()
    change()
    for stage, arguments in COMMANDS.items():
        if (what, stage) in {("data file", "generate"), ("data file", "export")}:  # which read no rows
            continue
        assert cli(stage, arguments) == 2, stage
        (problem,) = said(capsys, stage)
        assert name in problem and ": stored " in problem and ", now " in problem, stage
    assert not any(Path("out").glob("*.json*"))
    assert (Path("part/metrics.jsonl").read_bytes(), Path("part/config.yaml").read_bytes()) == before


def test_unchanged_inputs_go_on_to_the_same_bytes_and_are_carried_by_all_that_a_run_leaves(place, capsys):
    assert cli("train", ["resume=part"]) == 0
    assert "kept no fingerprint" not in capsys.readouterr().out
    for name in ("metrics.jsonl", "adapter/adapter_model.safetensors", "adapter_last/adapter_model.safetensors"):
        assert (place / "part" / name).read_bytes() == (place / "run" / name).read_bytes(), name
    kept = read_json(Path("run/checkpoints/step_0000002/state.json"))["pins"]
    assert kept.keys() == {*pins.INPUTS} - {"block_length"}  # which this model has not
    for folder in ("run", "run/adapter", "run/adapter_last", "part"):
        assert unsealed(Path(folder, MANIFEST))["fields"]["pins"] == kept, folder
    assert cli("export", ["run=run", "output_dir=out", "export.adapter_only=true"]) == 0
    assert pins.of_folder(Path("out")) == kept


def test_a_base_that_was_moved_is_named_by_its_new_place(place, capsys):
    shutil.move("model", "moved")
    assert cli("train", ["resume=part", "model.model_name_or_path=moved"]) == 0
    assert cli("generate", ["run=run", "output_dir=g", "prompt=hello", "model.model_name_or_path=moved"]) == 0


def test_an_adapter_starts_on_the_base_that_it_was_trained_on(place, capsys):
    flip_last_byte("model/model.safetensors")
    given = ["adapter.path=run/adapter", "output_dir=out"]
    for stage in ("train", "sft", "export"):
        more = [] if stage == "export" else [text for text in START[:-1] if not text.startswith("dpo.")]
        assert cli(stage, [*SETTINGS[:6], *more, *given]) == 2, stage
        (problem,) = said(capsys, stage)
        assert "run/adapter: the base model's weights or config.json changed" in problem, stage
        assert "start without adapter.path" in problem
    onpolicy = ["data=onpolicy", "data.sampling.num_questions=2", "data.sampling.samples=2", "run=run"]
    assert cli("prepare", [*SETTINGS[:8], *onpolicy]) == 2
    assert "run/adapter: the base model's weights" in said(capsys, "prepare")[0]


@pytest.mark.parametrize(
    ("named", "configured", "is_refused"),
    [
        ("GSAI-ML/LLaDA-8B-Base", "GSAI-ML/LLaDA-8B-Instruct", True),
        ("gsai-ml/llada-8b-base", "GSAI-ML/LLaDA-8B-Base", False),
        ("GSAI-ML/LLaDA-8B-Base", "model", False),  # which may be a copy of it
        ("/nowhere/llada", "GSAI-ML/LLaDA-8B-Base", False),
        ("other", "model", True),
        ("copy", "model", False),
        (None, "model", False),
    ],
)
def test_an_adapter_of_another_program_is_known_by_the_base_that_it_names(place, named, configured, is_refused):
    shutil.copytree("model", "copy")
    shutil.copytree("model", "other")
    flip_last_byte("other/model.safetensors")
    path = Path("start/adapter_config.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": named}))
    config = compose([f"model.model_name_or_path={configured}", "adapter.path=start"])
    if not is_refused:
        pins.check_adapter(config)
        return
    with pytest.raises(UserError, match=r"adapter_config\.json: the adapter was trained on .*model_name_or_path"):
        pins.check_adapter(config)


def test_an_older_version_kept_less_and_that_is_one_note(place, capsys):
    for folder in ("run/adapter", "part/adapter"):
        manifest = unsealed(Path(folder, MANIFEST))
        del manifest["fields"]["pins"]
        write_json(Path(folder, MANIFEST), with_seal(manifest))
    assert cli("generate", ["run=run", "output_dir=g", "prompt=hello"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("note: ") == 1 and "kept no fingerprint of: the tokenizer" in shown
    flip_last_byte("model/model.safetensors")
    assert cli("generate", ["run=run", "output_dir=h", "prompt=hello"]) == 2
    assert "the base model's weights or config.json changed" in said(capsys, "generate")[0]


def test_a_users_copies_beside_checkpoints_and_rounds_are_ignored_with_a_note(place, capsys):
    from laddpo.storage.checkpoint import step_folders
    from laddpo.storage.run_outputs import round_folders

    shutil.copytree("part/checkpoints/step_0000001", "part/checkpoints/step_0000001_backup")
    assert cli("train", ["resume=part"]) == 0
    assert capsys.readouterr().out.count("ignored: step_0000001_backup.") == 1
    assert Path("part/checkpoints/step_0000001_backup/state.json").is_file()
    for name in ("round_2", "round_10", "round_2_backup", "round_old"):
        Path("rounds", name).mkdir(parents=True)
    assert [path.name for path in round_folders(Path("rounds"))] == ["round_2", "round_10"]
    Path("many/step_10000000").mkdir(parents=True)
    Path("many/step_9999999").mkdir()
    assert [path.name for path in step_folders(Path("many"))] == ["step_10000000", "step_9999999"]


def test_a_base_model_alone_is_evaluated_on_in_parts_of_one_model(place, capsys):
    base = [*SETTINGS[:8], "evaluation.tasks=[arithmetic]", "evaluation.limit=2"]
    decoding = [
        "evaluation.gen_length=4",
        "evaluation.block_length=4",
        "evaluation.steps=2",
        "evaluation.confidence_threshold=null",
    ]
    assert cli("evaluate", [*base, *decoding, "output_dir=out"]) == 0
    assert cli("evaluate", ["resume=out", "evaluation.limit=3"]) == 0
    add_template()
    assert cli("evaluate", ["resume=out"]) == 2
    assert "out: the chat template" in said(capsys, "evaluate")[0]


def test_the_jobs_of_a_sweep_share_their_inputs(place, capsys):
    Path("sweep").mkdir()
    shutil.copytree("run", "sweep/0")
    for number, settings in ((1, []), (2, ["model.model_name_or_path=other"])):
        write_json(Path(f"sweep/{number}/job.json"), {"overrides": []})
        config = compose([*START, *settings])
        now = {**pins.of_folder(Path("run")), "base": "sha256:0", "config": "0"}
        if settings:  # another base by name is another base
            pins.require_like_siblings(Path(f"sweep/{number}"), now, config)
            continue
        with pytest.raises(UserError, match=r"sweep/0: config\.json of the base model changed.*start a new sweep"):
            pins.require_like_siblings(Path(f"sweep/{number}"), now, config)
        pins.require_like_siblings(Path("elsewhere"), now, config)


def test_a_run_keeps_its_chat_template_and_a_changed_file_is_refused_by_name(place, capsys):
    template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{{ 'short: ' if terse else '' }}{% endif %}"
    )
    Path("own.jinja").write_text(template)
    own = ["data.chat_template=own.jinja", "data.template_kwargs.terse=true", "output_dir=own"]
    assert cli("train", [*SETTINGS, *own]) == 0
    answered = [
        "run=own",
        "prompt=hello",
        "evaluation.gen_length=8",
        "evaluation.block_length=8",
        "evaluation.steps=1",
        "evaluation.confidence_threshold=null",
    ]
    Path("own.jinja").write_text(template.replace("short", "long"))
    assert cli("generate", [*answered, "output_dir=out"]) == 0  # with the run's copy
    assert cli("export", ["run=own", "output_dir=exported"]) == 0
    assert Path("exported/chat_template.jinja").read_text() == template

    Path("own/manifest.json").unlink()
    capsys.readouterr()
    assert cli("train", ["resume=own"]) == 2
    (problem,) = said(capsys, "train")
    assert "data.chat_template=own.jinja" in problem
    like = [text for text in SETTINGS if text.startswith(("model.", "hardware.", "logger"))]
    assert cli("generate", [*like, "adapter.path=own/adapter", "prompt=hello", "output_dir=other"]) == 2
    (problem,) = said(capsys, "generate")
    assert "set data.chat_template=own/adapter/chat_template.jinja" in problem
