"""The benchmark's parts for real sizes, in a small shape on a CPU: every part runs, counts and says what it must."""

import dataclasses
import gc
import json
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from laddpo.benchmarking import twins
from laddpo.benchmarking.cards import predicted_peak
from laddpo.benchmarking.contenders import fixed_budget
from laddpo.benchmarking.measure import Measured, measure, timed_rounds
from laddpo.benchmarking.rates import kernel_kind, micro_steps, work_of
from laddpo.benchmarking.workload import Workbench, random_model, random_pairs
from laddpo.cli.app import cli
from laddpo.core.draws import ElboEstimator
from laddpo.core.tasks import pair_item
from laddpo.errors import UserError
from laddpo.hardware.memory import GIB, Load, predict_memory
from laddpo.hardware.speed import Device, forward_flops, predicted_tokens_per_s
from laddpo.models.adapters import attach_lora
from laddpo.settings.compose import compose
from tests.tiny import of_parts

SHAPE = {"d_model": 64, "n_layers": 2, "n_heads": 2, "n_kv_heads": 2, "mlp_hidden_size": 128, "vocab_size": 512}
SMALL = [
    "experiment=gpu_proof_small",
    "hardware=cpu",
    "benchmark.shape={d_model: 64, n_layers: 2, n_heads: 2, n_kv_heads: 2, mlp_hidden_size: 128, vocab_size: 512, "
    "max_sequence_length: 256}",
    "benchmark.card_tokens=64",
    "benchmark.agreement_pairs=2",
    "benchmark.nano_steps=2",
    "benchmark.parts=[cards,rates,agreement,nano]",
    "benchmark.predicted=[{name: RTX 4080, tflops: 97.5, memory_gb_per_s: 717}]",
]


@pytest.fixture(scope="module")
def models():
    """For every model made while `written` was measured, whether those before it were gone."""
    return []


@pytest.fixture(scope="module")
def written(tmp_path_factory, models):
    """(benchmark.md, benchmark.json) of the parts of a real size"""
    folder = tmp_path_factory.mktemp("realsize") / "run"
    plain, made = Workbench.random_policy, []

    def watched(*arguments, **named):
        gc.collect()
        models.append(all(reference() is None for reference in made))
        made.append(weakref.ref(model := plain(*arguments, **named)))
        return model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Workbench, "random_policy", watched)
        patch.setattr(twins, "SAME", (*twins.SAME, "data.num_pairs=16", "optim.per_device_train_batch_size=4"))
        assert cli("benchmark", [*SMALL, f"output_dir={folder}"]) == 0
    return (folder / "benchmark.md").read_text(encoding="utf-8"), json.loads((folder / "benchmark.json").read_text())


def test_whole_steps_run_on_every_card_and_ours_do_not_grow_with_the_draws(written):
    text, record = written
    rows = record["cards"]["rows"]
    assert len(rows) == 9 and all(row["allocated"] > 0 and row["seconds"] and not row["problem"] for row in rows)
    (growth,) = record["cards"]["growth"]
    assert (growth["fewest"], growth["most"], growth["kind"]) == (4, 16, "allocated")
    assert growth["bytes_most"] / growth["bytes_fewest"] < 1.01
    assert "a CPU, which knows no cap" in text and "| 15 GiB | ours, nf4, 256 tokens, checkpointing | 16 |" in text
    ours = [row for row in rows if row["setting"]["who"] == "ours"]
    assert all((row["predicted"] is None) == (row not in ours) for row in rows)


def test_rates_count_what_had_to_be_done(written):
    text, record = written
    rows = record["rates"]["rows"]
    plain, checkpointed, reference, packed, _ = rows
    assert plain["useful_flops"] == checkpointed["useful_flops"] == 2 * reference["useful_flops"]
    assert packed["useful_flops"] == plain["useful_flops"]  # unpacking is overhead
    assert all(row["flops_per_s"] == row["useful_flops"] / np.median(row["seconds"]) for row in rows)
    assert "512" in record["rates"]["matmul_flops_per_s"] and "Matrix products alone" in text
    kinds = packed["kinds"]
    assert kinds["unpacking 4 bits"] > 0 and "unpacking 4 bits" not in {k for k, v in plain["kinds"].items() if v > 0}
    assert sum(kinds.values()) <= 1.05 * packed["seconds_profiled"]


def test_micro_steps_are_the_forward_passes_that_are_made(monkeypatch):
    from laddpo.benchmarking.contenders import build_contenders

    model = random_model({**SHAPE, "max_sequence_length": 64}, 0, torch.device("cpu"), torch.float32)
    attach_lora(model, r=2)
    budget, pairs, calls = 200, pairs_of(12), []
    ours = build_contenders(model, 511, 510, 64, budget)["stream"]
    items, plain = ours.items(pairs, 4), ours.denoiser.token_logps
    ours.prepare(pairs, 4)
    monkeypatch.setattr(ours.denoiser, "token_logps", lambda packed: calls.append(packed) or plain(packed))
    ours.step(pairs, 4)
    assert {item.tokens > budget for item in items} == {False, True} and len(calls) < 2 * len(pairs)
    assert len(calls) == micro_steps(items, budget)


def test_only_one_model_is_there_at_a_time(written, models):
    assert models == [True] * (3 + 2 + 3)


def test_a_compiler_that_fails_costs_its_own_row_alone(monkeypatch, tmp_path):
    from laddpo.models import blocks

    def broken(model):
        def fail(*_):
            raise RuntimeError("no C compiler was found\nlong story")

        for block in model.blocks:
            block.project = fail

    monkeypatch.setattr(blocks, "compile_blocks", broken)
    rates = "benchmark.rates=[{quantization: none, compile: true}, {quantization: none, token_budget: 256}]"
    assert (
        cli(
            "benchmark", [*of_parts(SMALL, "rates"), "benchmark.parts=[rates]", rates, f"output_dir={tmp_path / 'run'}"]
        )
        == 0
    )
    rows = json.loads((tmp_path / "run" / "benchmark.json").read_text())["rates"]["rows"]
    assert [row["problem"] for row in rows] == ["not compiled: no C compiler was found", ""]


def test_what_was_measured_is_written_before_the_next_part(monkeypatch, tmp_path):
    from laddpo.benchmarking import parts

    def fails(bench):
        raise UserError("nano failed")

    monkeypatch.setitem(parts.PARTS, "nano", ("Twins", fails))
    folder = tmp_path / "run"
    assert (
        cli(
            "benchmark",
            [*of_parts(SMALL, "agreement", "nano"), "benchmark.parts=[agreement,nano]", f"output_dir={folder}"],
        )
        == 2
    )
    assert "agreement" in json.loads((folder / "benchmark.json").read_text())
    assert "## What 4-bit weights change" in (folder / "benchmark.md").read_text(encoding="utf-8")


def test_predictions_name_their_arithmetic(written):
    text, record = written
    predicted = record["rates"]["predictions"]
    assert [entry["card"] for entry in predicted] == ["RTX 4080"] and predicted[0]["tokens_per_s"] > 0
    assert "predicted, not measured" in text and "97.5 TFLOP/s and 717 GB/s" in text


def test_storing_in_four_bits_has_an_error_and_the_kernels_have_none_here(written):
    _, record = written
    stored, kernels = record["agreement"]["differences"].values()
    assert stored["nats_per_token_rms"] > 1e-3 and 0 < stored["gradient_relative"] < 2
    assert kernels["nats_per_token_largest"] < 1e-6 and kernels["gradient_relative"] < 1e-5
    assert set(record["agreement"]["margin_at_start"].values()) == {0.0}


def test_nano_is_trained_twice_and_ends_in_one_place(written):
    _, record = written
    nano = record["nano"]
    assert nano["compared"] == ["CPU", "CPU, smaller micro-steps"] and nano["steps"] == 2
    assert nano["largest_loss_difference"] < 1e-5 and nano["adapter_relative"] < 1e-4
    assert all(np.ptp(losses) > 0 for losses in nano["losses"].values()), "it was trained"


def test_operations_are_those_of_the_plan():
    items = [pair_item(pair, ElboEstimator(diffusion_samples=4), range(4)) for pair in pairs_of(3)]
    work = work_of(items)
    lengths = [sequence.tokens for item in items for sequence in item.sequences if len(sequence.draw.masked)]
    assert work.tokens == sum(lengths) and work.length == pytest.approx(np.average(lengths, weights=lengths))
    bench = Workbench(compose(SMALL), SimpleNamespace(device=torch.device("cpu"), precision="fp32"))
    setup = bench.setup_of(bench.settings.rates[0])
    blocks = 2 * (4 * 64 * 64 + 3 * 64 * 128)
    adapter = 2 * 16 * (4 * 128 + 3 * 192)
    attention = 4 * 2 * 64 * work.length
    wanted = work.tokens * (2 * blocks + 2 * adapter + attention) + work.masked * 2 * 512 * 64
    assert forward_flops(setup, work) == pytest.approx(wanted)


def test_a_prediction_is_products_and_unpacking():
    bench = Workbench(compose(SMALL), SimpleNamespace(device=torch.device("cuda"), precision="bf16"))
    setting = bench.settings.rates[3]
    setup = bench.setup_of(setting)
    assert setting.quantization == "nf4"
    seconds = 100 * 5e6 * 2 / 1e12 + 2.5 * 2 * 2 * (4 * 64 * 64 + 3 * 64 * 128) / 1e9
    assert predicted_tokens_per_s(setup, 5e6, 100, Device(1, 1)) == pytest.approx(100 / seconds)


def test_the_real_shape_is_planned_for_its_cards():
    config = compose(["experiment=gpu_proof"])
    bench = Workbench(config, SimpleNamespace(device=torch.device("cuda"), precision="bf16"))
    written, real = (dataclasses.asdict(shape) for shape in (config.benchmark.shape, config.model.shape))
    assert written.items() <= real.items(), "the shape written out is the model's"
    pair = SimpleNamespace(prompt_ids=range(256), chosen_ids=range(768))
    ours = [setting for setting in config.benchmark.cards if setting.who == "ours"]
    by_draws = {s.draws: predicted_peak(bench, s, pair) for s in ours[:3]}
    assert by_draws.keys() == {4, 16, 64} and len(set(by_draws.values())) == 1 and by_draws[4] < 9 * GIB
    assert all(predicted_peak(bench, s, pair) < s.gib * GIB for s in ours)
    # the pair is larger than a micro-step, and the step: its gradient needs no buffer
    whole = Load(ours[0].token_budget, mixed=False, exceeds=False)
    assert by_draws[4] == predict_memory(bench.setup_of(ours[0]), whole).peak


def test_what_runs_out_of_memory_is_reported_and_the_rest_goes_on():
    model = random_model({**SHAPE, "max_sequence_length": 64}, 0, torch.device("cpu"), torch.float32)

    def fails(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")

    assert measure(fails, model, torch.device("cpu"), 1) == Measured(problem="out of memory")
    assert measure(lambda: fixed_budget(64).run(fails, 8), model, torch.device("cpu"), 1).problem == "out of memory"
    assert measure(lambda: fixed_budget(64).run(fails, 64), model, torch.device("cpu"), 1).problem == "out of memory"
    with pytest.raises(RuntimeError, match="another thing"):
        measure(lambda: (_ for _ in ()).throw(RuntimeError("another thing")), model, torch.device("cpu"), 1)
    steps = {"works": lambda *_: None, "fails": fails}
    racing = [SimpleNamespace(name=name, prepare=lambda *_: None, step=step) for name, step in steps.items()]
    assert timed_rounds(racing, model, [pairs_of(1)] * 3, 1).keys() == {"works", "works/cpu"}


def test_whoever_runs_out_of_memory_is_timed_with_one_draw(tmp_path, monkeypatch):
    from laddpo.benchmarking.rivals import PublicLaddpo

    plain = PublicLaddpo.margin

    def greedy(self, pair, draws):
        if draws > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return plain(self, pair, draws)

    monkeypatch.setattr(PublicLaddpo, "margin", greedy)
    assert (
        cli("benchmark", [*of_parts(SMALL, "speed"), "benchmark.parts=[speed]", f"output_dir={tmp_path / 'run'}"]) == 0
    )
    text = (tmp_path / "run" / "benchmark.md").read_text(encoding="utf-8")
    record = json.loads((tmp_path / "run" / "benchmark.json").read_text())["speed"]
    assert "public_laddpo ran out of memory with 4 draws; with one draw it takes" in text
    assert record["one_draw"]["public_laddpo"]["rounds"] == 3 and "public_laddpo" not in record["pairs_per_s"]
    causes = record["causes"]
    assert causes["no recomputation"]["slower"] == "stream, checkpointing"
    assert not any(entry["slower"] == "public_laddpo" for entry in causes.values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_the_small_shape_is_pointed_to(capsys):
    assert cli("benchmark", ["experiment=gpu_proof"]) == 2
    said = capsys.readouterr().err
    assert "finds no CUDA device" in said and "experiment=gpu_proof_small" in said


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nvjet_tst_256x128_64x4_2x1_v_bz_coopA_TNT", "matrix products"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu>", "matrix products"),
        ("void kDequantizeBlockwise<__nv_bfloat16, 512, 64, 8, 2>(float*, unsigned char*)", "unpacking 4 bits"),
        ("void flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, 64, 64, 4>>", "attention"),
        ("void at::native::vectorized_layer_norm_kernel<float>", "norms"),
        ("Memcpy DtoD (Device -> Device)", "copies and casts"),
        ("void at::native::(anonymous namespace)::indexSelectLargeIndex<float>", "lookups"),
        (
            "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>",
            "element-wise and sums",
        ),
        ("void at::native::reduce_kernel<512, 1>", "element-wise and sums"),
        ("void at::native::segment_reduce_forward_kernel<float>", "element-wise and sums"),
        ("triton_poi_fused__to_copy_mul_silu_0", "fused by the compiler"),
        ("void gemv2T_kernel_val<int, int, __nv_bfloat16>", "matrix products"),
        ("ncclDevKernel_AllReduce", "other"),
    ],
)
def test_kernels_are_sorted_by_what_they_do(name, kind):
    assert kernel_kind(name) == kind


def test_mistaken_steps_are_refused_by_their_place():
    wrong = "benchmark.cards=[{who: trl, quantization: nf5, draws: 0, gib: -1}]"
    with pytest.raises(UserError) as refused:
        compose([wrong])
    said = str(refused.value)
    assert "benchmark.cards[0].who is 'trl'; known: ours, public_laddpo" in said
    assert "benchmark.cards[0].quantization is 'nf5'; known: none, nf4, int8; did you mean nf4?" in said
    assert "benchmark.cards[0].draws is 0; expected 1 or more" in said and "benchmark.cards[0].gib is -1" in said


def pairs_of(count):
    return random_pairs(count, 510, 24, 60, 10, 64, seed=1)
