"""From settings to a plan: what is left open is decided by what fits and what is faster; `plan` says it offline."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from laddpo import plan
from laddpo.cli.app import cli
from laddpo.core.losses import LOSSES
from laddpo.errors import UserError
from laddpo.hardware import planning
from laddpo.hardware.memory import GIB, predict_memory
from laddpo.hardware.plan_text import plan_text
from laddpo.hardware.planning import (
    Lengths,
    adapter_targets,
    assumed_lengths,
    choose_backward,
    choose_plan,
    prepared_lengths,
)
from laddpo.hardware.speed import Device, Work, duration, forward_flops, predicted_seconds, training_passes
from laddpo.models.linears import ROLES
from laddpo.settings.compose import compose

REPOSITORY = Path(__file__).resolve().parents[1]
REAL = ("model=llada_8b", "hardware=rtx4080")
DIALOGUES = Lengths(longest=1024, longest_pair=8192, mean=157, response=67, source="test")


def text_of(config) -> str:
    return plan_text(config, *plan.find_lengths(config))


def chosen(*overrides: str, available: float = 14.0, lengths: Lengths = DIALOGUES) -> planning.Choice:
    config = compose([*REAL, *overrides])
    return choose_plan(config, "cuda", "bf16", int(available * GIB), lengths)


# What is decided


def test_a_16_gb_card_trains_an_8b_in_4_bits_and_what_is_chosen_fits():
    choice = chosen()
    assert choice.fits and choice.token_budget >= DIALOGUES.longest
    assert choice.memory.peak <= 0.95 * 14 * GIB
    assert choice.largest[False] < choice.largest[True]


def test_8_gb_need_checkpointing():
    choice = chosen(available=7.5)
    assert choice.fits and choice.setup.checkpointing and choice.token_budget >= DIALOGUES.longest
    assert choice.largest[False] < DIALOGUES.longest


def test_where_not_even_the_weights_fit_the_choice_says_so():
    assert not chosen(available=5).fits
    assert not chosen("quantization=none").fits


def test_settings_that_are_given_are_kept():
    choice = chosen("hardware.token_budget=1280", "hardware.gradient_checkpointing=true")
    assert (choice.token_budget, choice.setup.checkpointing) == (1280, True)
    choice = chosen("hardware.gradient_checkpointing=false")
    assert not choice.setup.checkpointing and choice.token_budget == planning.steady(choice.largest[False])


def test_a_few_mebibytes_more_or_less_choose_the_same_budget():
    """Else two runs of one command would pack differently, and differ in the last bits."""
    budgets = {chosen(available=13 + i / 128).token_budget for i in range(8)}
    assert len(budgets) <= 2 and all(tokens % 256 == 0 for tokens in budgets)
    assert [planning.steady(tokens) for tokens in (64, 960, 1024, 1408, 4096)] == [64, 960, 1024, 1280, 4096]


def test_more_memory_never_gives_a_slower_choice():
    times = []
    for available in (7, 8, 10, 14, 22, 40):
        choice = chosen(available=available)
        assert choice.fits
        work = Work(1e6, 3e5, DIALOGUES.mean)
        times.append(predicted_seconds(choice.setup, work, choice.token_budget, Device(97.5, 717))[1])
    assert times == sorted(times, reverse=True)


def test_a_step_that_is_smaller_than_the_budget_is_planned_as_it_is():
    short = Lengths(longest=40, longest_pair=320, mean=40, response=21, source="test")
    config = compose(["optim.per_device_train_batch_size=2", "optim.gradient_accumulation_steps=1"])
    choice = choose_plan(config, "cpu", "fp32", 4 * GIB, short)
    assert choice.token_budget == 4096 and choice.memory.load.tokens == 640
    assert not choice.memory.load.exceeds and choice.memory.parts["gradient buffers"] == 0


def test_full_fine_tuning_takes_two_passes_only_where_pairs_exceed_a_micro_step():
    full = compose(["adapter=full"])
    assert choose_backward(full, DIALOGUES, 2048)[0] == "two_pass"
    assert choose_backward(full, DIALOGUES, 8192)[0] == "stream"
    assert choose_backward(compose([]), DIALOGUES, 2048)[0] == "stream"
    assert choose_backward(compose(["hardware.backward=joint"]), DIALOGUES, 1)[0] == "joint"
    assert all("8192" in choose_backward(c, DIALOGUES, 2048)[1] for c in (full, compose([])))


def test_a_step_of_one_pair_needs_no_buffer_of_its_own():
    one = ["optim.per_device_train_batch_size=1", "optim.gradient_accumulation_steps=1"]
    alone, several = chosen(*one), chosen()
    assert several.memory.parts["gradient buffers"] == several.memory.parts["gradient"]
    assert alone.memory.load.exceeds and alone.memory.parts["gradient buffers"] == 0
    assert chosen(*one, available=10).largest[True] > chosen(available=10).largest[True]
    assert chosen(*one, "dpo.loss=ipo").memory.parts["gradient buffers"] == alone.memory.parts["gradient"]
    # and where all weights are trained, none as large as the model: no second forward pass is needed to avoid it
    assert choose_backward(compose(["adapter=full", *one]), DIALOGUES, 2048)[0] == "stream"
    assert choose_backward(compose(["adapter=full", *one, "dpo.loss=ipo"]), DIALOGUES, 2048)[0] == "two_pass"
    two = [*one[:1], "optim.gradient_accumulation_steps=2"]
    assert choose_backward(compose(["adapter=full", *two]), DIALOGUES, 2048)[0] == "two_pass"


def test_buffers_are_those_of_the_loss():
    for loss, row in LOSSES.items():
        config = compose([])
        config.dpo.loss = loss
        one = row.depends_on_margin or not row.takes_pairs
        assert planning.memory_setup(config, "cpu", "fp32").gradient_groups == (1 if one else 2), loss
    anchored = planning.memory_setup(compose(["dpo.sft_weight=0.1"]), "cpu", "fp32")
    assert anchored.gradient_groups == 2


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("all-linear", ROLES),
        ("q_proj", ("q",)),
        ("q_proj|v_proj", ("q", "v")),
        ("blocks[.][0-3][.]ff_.*", ("gate", "down")),
    ],
)
def test_the_plan_counts_the_layers_that_carry_an_adapter(pattern, names):
    config = compose([])
    config = dataclasses.replace(config, adapter=dataclasses.replace(config.adapter, target_modules=pattern))
    assert adapter_targets(config) == tuple(names)


def test_lengths_come_from_the_rows():
    rows = np.array([[10, 5, 7], [20, 3, 1]])
    found = prepared_lengths(rows, draws=4, source="here")
    # sequences: 15, 17, 23, 21
    assert (found.longest, found.longest_pair, found.mean, found.response) == (23, 4 * 44, 19, 4)


def test_of_sft_rows_the_one_response_is_counted_and_all_draws_share_a_buffer():
    found = prepared_lengths(np.array([[200, 500], [400, 600]]), draws=4, source="here")
    assert (found.longest, found.longest_pair, found.mean, found.response) == (1000, 4 * 1000, 850, 550)
    settings = ["dpo.loss=ipo", "hardware.token_budget=1024"]
    plans = [chosen(*settings, lengths=dataclasses.replace(found, sides=sides)).memory for sides in (1, 2)]
    assert [plan.parts["gradient buffers"] / plan.parts["gradient"] for plan in plans] == [1, 2]


def test_assumed_lengths_never_exceed_max_length():
    lengths = assumed_lengths(compose(["model=llada_8b", "data.length_quantiles.p99=646"]))
    assert lengths.longest == 1024 and "nothing is prepared" in lengths.source
    short = assumed_lengths(compose(["model=llada_8b", "data.length_quantiles.p99=100"]))
    assert short.longest == 200


# Hours


def test_the_passes_of_a_step_are_those_of_the_mode():
    setup = chosen("hardware.gradient_checkpointing=false").setup
    assert training_passes(setup) == 2, "frozen weights need no gradient of their own"
    assert training_passes(dataclasses.replace(setup, checkpointing=True)) == 3
    assert training_passes(dataclasses.replace(setup, backward="two_pass")) == 3
    assert training_passes(dataclasses.replace(setup, rank=None)) == 3


def test_a_token_of_an_8b_costs_twice_its_block_weights():
    setup = chosen().setup
    flops = forward_flops(setup, Work(tokens=1, masked=0, length=0))
    assert flops == 2 * (6_979_321_856 + 41_943_040)


def test_hours_of_the_real_job_are_those_computed_by_hand():
    """50,000 pairs of 250-token sequences, 4 draws, reference included, on an RTX 4080: 22 to 30 hours."""
    setup = chosen("hardware.gradient_checkpointing=false").setup
    work = Work(50_000 * 2 * 4 * 250, 50_000 * 2 * 4 * 60, 250)
    low, high = (seconds / 3600 for seconds in predicted_seconds(setup, work, 1500, Device(97.5, 717)))
    assert 19 < low < 27 and 27 < high < 36


@pytest.mark.parametrize(
    ("seconds", "text"), [(40, "40 s"), (150, "2.5 min"), (7200, "2.0 h"), (3 * 86400, "3.0 days")]
)
def test_durations_read_well(seconds, text):
    assert duration(seconds) == text


# The stage


def plan_of(capsys, *overrides: str) -> str:
    assert cli("plan", list(overrides)) == 0
    return capsys.readouterr().out


def test_plan_shows_every_part_and_the_parts_add_up(capsys):
    text = plan_of(capsys, *REAL)
    for part in ("weights", "adapter", "optimizer", "gradient", "gradient buffers", "activations", "workspace"):
        assert f"  {part} " in text
    sizes = [float(line.split(" GiB")[0].split()[-1]) for line in text.splitlines() if line.startswith("  ")][:-1]
    *parts, peak, usable = sizes[: sizes.index(max(sizes)) + 1] if max(sizes) == sizes[-1] else sizes
    assert sum(parts) == pytest.approx(peak, abs=0.005) and peak <= usable
    assert "largest micro-step that fits" in text and "gradient checkpointing" in text
    assert "for 10,000 pairs" in text and " h to " in text


def test_plan_for_8_gb_shows_what_fits_there(capsys):
    text = plan_of(capsys, *REAL, "hardware.vram_gib=8")
    assert "gradient checkpointing: on (needed)" in text and "hardware.vram_gib=8" in text


def test_where_nothing_fits_the_plan_is_the_one_that_lacks_least():
    choice = chosen(available=4)
    assert not choice.fits and choice.setup.checkpointing and max(choice.largest.values()) == 0
    assert choice.memory.peak < chosen("hardware.gradient_checkpointing=false", available=4).memory.peak


def test_plan_explains_what_does_not_fit(capsys):
    text = plan_of(capsys, *REAL, "hardware.vram_gib=8", "quantization=none")
    assert "does not fit: predicted" in text and "The largest part is weights" in text
    assert "quantization=nf4 (saves" in text


def test_plan_knows_the_steps_of_a_run_that_counts_them(capsys):
    text = plan_of(capsys, *REAL, "optim.max_train_steps=10")
    # 10 steps of 64 pairs, 2 responses, 4 draws, mean length as assumed
    mean = assumed_lengths(compose(list(REAL))).mean
    assert f"({10 * 64 * 2 * 4 * mean:,.0f} tokens under all draws" in text


def test_plan_of_the_embedded_model_needs_no_gpu(capsys):
    text = plan_of(capsys, "hardware=cpu")
    assert text.startswith("llada_nano on cpu in fp32; LoRA r=16, 122,880 trained by adamw")
    assert "time: " in text and "free memory" in text


def test_plan_without_a_gpu_to_ask_wants_to_be_told(capsys, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli("plan", ["model=llada_8b", "hardware.device=cuda"]) == 2
    assert "Add hardware.vram_gib=16" in capsys.readouterr().err


def test_plan_needs_neither_torch_nor_weights_nor_network(tmp_path):
    """With torch and the hub made impossible to import."""
    blocked = tmp_path / "blocked"
    for name in ("torch", "transformers", "huggingface_hub", "peft", "datasets"):
        (blocked / name).mkdir(parents=True)
        (blocked / name / "__init__.py").write_text("raise ImportError('not here')\n", encoding="utf-8")
    path = os.pathsep.join([str(blocked), str(REPOSITORY)])
    command = [sys.executable, "-m", "laddpo.plan", *REAL]
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "predicted peak" in done.stdout


def test_plan_reads_lengths_of_prepared_data(tmp_path, capsys):
    overrides = [f"paths.data_dir={tmp_path}", "data.num_pairs=40", "hardware=cpu"]
    before = plan_of(capsys, *overrides)
    assert cli("prepare", overrides) == 0
    capsys.readouterr()
    after = plan_of(capsys, *overrides)
    assert "nothing is prepared yet" in before
    assert str(tmp_path / "prepared") in after and "nothing is prepared" not in after
    assert "longest 40;" in after


def test_plan_names_a_prepared_folder_that_holds_the_manifest_of_another(tmp_path, capsys):
    overrides = [f"paths.data_dir={tmp_path}", "data.num_pairs=40", "hardware=cpu"]
    for seed in (1, 2):
        assert cli("prepare", [*overrides, f"seed={seed}"]) == 0
    one, other = sorted(tmp_path.glob("prepared/*/manifest.json"))
    other.write_bytes(one.read_bytes())
    capsys.readouterr()
    assert sorted(cli("plan", [*overrides, f"seed={seed}"]) for seed in (1, 2)) == [0, 2]
    assert f"{other}: is that of rows with other settings: seed: stored" in capsys.readouterr().err


def test_stages_and_plan_choose_alike(capsys):
    from laddpo.hardware.machine import find_machine

    config = compose(["hardware=cpu"])
    machine = find_machine(config, DIALOGUES)
    choice = choose_plan(config, "cpu", "fp32", machine.choice.available, DIALOGUES)
    assert machine.token_budget.tokens == choice.token_budget
    assert machine.choice.memory.peak == predict_memory(choice.setup, choice.memory.load).peak
    assert f"{choice.token_budget} tokens per micro-step" in str(machine)
    assert text_of(config)


def test_the_message_of_one_sequence_that_does_not_fit_is_the_plans():
    from laddpo.hardware.machine import find_machine

    machine = find_machine(compose(["hardware=cpu"]), DIALOGUES)
    text = machine.token_budget.explain(900)
    assert text.startswith("out of memory: one sequence of 900 tokens does not fit: predicted ")
    assert "The largest part is activations" in text and "hardware.gradient_checkpointing=true (saves" in text


# Several processes


def test_a_steps_pairs_are_counted_per_process():
    settings = ["optim.per_device_train_batch_size=2", "optim.gradient_accumulation_steps=3"]
    for more, pairs in (([], 6), (["hardware.processes=4"], 24)):
        config = compose([*settings, *more])
        assert planning.pairs_per_step(config.optim, config.hardware) == pairs


def test_processes_are_those_launched_unless_the_settings_say_otherwise(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert planning.processes(compose([]).hardware) == 8
    assert planning.processes(compose(["hardware.processes=2"]).hardware) == 2


def test_a_run_counted_for_eight_is_planned_for_the_processes_it_has():
    from laddpo.hardware.machine import find_machine

    short = Lengths(longest=40, longest_pair=320, mean=40, response=21, source="test")
    one_pair = ["optim.per_device_train_batch_size=1", "optim.gradient_accumulation_steps=1", "hardware.processes=8"]
    config = compose(["hardware=cpu", *one_pair])
    assert choose_plan(config, "cpu", "fp32", 4 * GIB, short).memory.load.tokens == 320
    assert find_machine(config, short).choice.memory.load.tokens == 8 * 320  # alone it does the pairs of all
    sharded = compose([*REAL, *one_pair, "quantization=none", "adapter=full", "hardware.sharding=fsdp"])
    assert planning.memory_setup(sharded, "cuda", "bf16").shards == 8
    assert planning.memory_setup(sharded, "cuda", "bf16", world=4).shards == 4


def test_eight_gpus_take_an_eighth_of_the_time_and_no_fewer_gpu_hours(capsys):
    run = [*REAL, "data.random_sample_size=1000000"]
    alone, eight = (text_of(compose([*run, *more])) for more in ([], ["hardware.processes=8"]))
    assert "GPU hours" not in alone and "on 8 processes in steps of 512 pairs" in eight
    hours = [float(text.split("time: ")[1].split()[0]) for text in (alone, eight)]
    units = [text.split("time: ")[1].split()[1] for text in (alone, eight)]
    factor = {"h": 1.0, "days": 24.0, "min": 1 / 60}
    assert hours[0] * factor[units[0]] / (hours[1] * factor[units[1]]) == pytest.approx(8, rel=0.1)


def test_sharding_divides_what_is_kept_and_adds_what_is_gathered():
    setup = planning.memory_setup(compose([*REAL, "quantization=none", "adapter=full"]), "cuda", "bf16")
    whole = predict_memory(setup, planning.Load(1024))
    shards = predict_memory(dataclasses.replace(setup, shards=8, backward="two_pass"), planning.Load(1024))
    for part in ("weights", "optimizer", "gradient"):
        assert shards.parts[part] == whole.parts[part] // 8
    assert whole.parts["gathered weights"] == 0 < shards.parts["gathered weights"] < whole.parts["weights"]
    assert shards.peak < whole.peak / 3


def test_what_cannot_be_sharded_is_refused_together():
    from laddpo.errors import UserError

    with pytest.raises(UserError) as refused:
        compose([*REAL, "hardware.sharding=fsdp", "optim.optimizer=adamw_8bit", "hardware.backward=stream"])
    said = str(refused.value)
    assert said.count("hardware.sharding is 'fsdp' and") == 3
    assert "quantization=none" in said and "optim.optimizer=adamw" in said and "two_pass" in said


def test_a_tied_head_keeps_its_embedding_on_the_device():
    asked = ["hardware=rtx4080", "hardware.embeddings_on_cpu=true"]
    with pytest.raises(UserError, match="embeddings_on_cpu is true and illada_8b has a tied head"):
        compose(["model=illada_8b", *asked])
    assert compose(["model=dream_7b", *asked]).hardware.embeddings_on_cpu
