"""The benchmark: what it draws, how it forms ratios, and the tables it writes, on a shape that takes seconds."""

import json
import math
import signal

import numpy as np
import pytest
import torch

from laddpo.benchmarking import cards as cards_module
from laddpo.benchmarking import limits, speed
from laddpo.benchmarking.measure import median_ratio, timed_rounds
from laddpo.benchmarking.workload import length_parameters, pair_of_tokens, random_model, random_pairs
from laddpo.cli.app import cli
from laddpo.settings.compose import compose
from laddpo.storage.manifests import read_manifest
from tests.tiny import of_parts

TINY = [
    "hardware=cpu",
    "adapter.r=2",
    "benchmark.shape={d_model: 16, n_layers: 2, n_heads: 2, n_kv_heads: 2, mlp_hidden_size: 32, vocab_size: 300, "
    "max_sequence_length: 256}",
    "benchmark.mean=24",
    "benchmark.p99=60",
    "benchmark.prompt_mean=10",
    "benchmark.max_length=64",
    "benchmark.token_budget=128",
    "benchmark.pairs=1",
    "benchmark.rounds=3",
    "benchmark.draws=2",
    "benchmark.memory_draws=[1,2]",
    "benchmark.flat_draws=12",
    "benchmark.long_answers=[32]",
    "benchmark.sft_rows=3",
    "benchmark.sampler_items=4",
    "benchmark.sampler_batch=2",
]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(benchmark.md, benchmark.json) of a run of all parts"""
    folder = tmp_path_factory.mktemp("benchmark") / "run"
    assert cli("benchmark", [*TINY, f"output_dir={folder}"]) == 0
    assert read_manifest(folder, "benchmark") is not None
    return (folder / "benchmark.md").read_text(encoding="utf-8"), json.loads((folder / "benchmark.json").read_text())


def test_the_table_says_what_was_measured_on_what(written):
    text, _ = written
    for part in ("random weights", "width 16, 2 blocks", "vocabulary 300", "mean 24", "torch "):
        assert part in text
    assert "rewritten from their descriptions" in text
    for title in ("Peak memory of one step", "Memory over the number of draws", "Predicted and measured", "Speed"):
        assert f"## {title}" in text


def test_every_contender_is_in_the_memory_table(written):
    text, record = written
    names = {peak["contender"] for peak in record["memory"]["peaks"]}
    rivals = {"public_laddpo", "trl_like (full logits)", "trl_like (chunked logits)"}
    assert rivals <= names and {"stream", "two_pass", "joint", "stream with reference pass"} <= names
    assert record["memory"]["compared_with"] == "stream, one sequence at a time"
    assert record["memory"]["ratios"]["stream, one sequence at a time"] == 1
    assert all(peak["total"] > peak["above"] > 0 for peak in record["memory"]["peaks"])
    assert all(name in text for name in names)


def test_flatness_and_plan_are_reported_as_numbers(written):
    _, record = written
    growth = record["flat"]["growth"]
    assert {name.split(", ")[-1] for name in growth} == {"policy", "margin", "reference"}
    assert all(entry["to"] == 12 for entry in growth.values())
    assert len(record["plan"]["rows"]) == 12 and record["plan"]["worst"] < 0.25  # a few kilobytes weigh here


def test_speed_is_in_pairs_per_second_with_intervals(written):
    _, record = written
    speed = record["speed"]
    assert speed["compared_with"] == "stream" and "stream" not in speed["time_ratios"]
    for ratio in speed["time_ratios"].values():
        assert ratio["low"] <= ratio["median"] <= ratio["high"] and ratio["rounds"] == 3
    assert all(len(speed["seconds"][name]) == 3 for name in speed["pairs_per_s"])
    assert speed["second_epoch_over_first"]["median"] > 0


def test_like_is_compared_with_like(written):
    text, record = written
    for found in (record["speed"]["alike"], record["long"]["lengths"]["32"]):
        assert [entry["ours"] for entry in found.values()] == [
            "stream with reference pass",
            "stream",
            "stream, checkpointing",
        ]
        assert [entry["rival"] for entry in found.values()] == [
            "trl_like (chunked logits)",
            "trl_like (chunked logits), stored reference, unpadded",
            "trl_like (chunked logits), stored reference, unpadded, checkpointing",
        ]
    assert (
        "Like with like" in text and "| time of trl_like (chunked logits), stored reference, unpadded over ours" in text
    )
    assert record["sft"]["peaks"].keys() == {"ours, packed", "plain, a row at a time"}


def test_the_fast_paths_are_compared_with_the_plain_sampler_on_graded_answers(written):
    text, record = written
    ways = record["sampler"]["ways"]
    assert {"plain", "stop early", "+ threshold 0.9", "+ dual cache", "plain, one at a time"} <= ways.keys()
    assert ways["plain"]["exact_match"]["items"] == 4 and ways["plain"]["speedup"]["median"] == 1
    exact = {name: way["exact_match"]["tuned"] for name, way in ways.items()}
    assert exact["stop early"] == exact["plain"] == exact["plain, one at a time"]
    assert "answered by llada_nano" in text and "points [" in text


def test_a_shipped_model_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert speed.is_local(compose().model) and not speed.is_local(compose(["model=llada_8b"]).model)


def test_random_weights_answer_for_time_alone(tmp_path):
    folder = tmp_path / "run"
    elsewhere = ["model.model_name_or_path=org/not-here", "benchmark.parts=[sampler]", f"output_dir={folder}"]
    assert cli("benchmark", [*of_parts(TINY, "sampler"), *elsewhere]) == 0
    text = (folder / "benchmark.md").read_text(encoding="utf-8")
    assert "random weights, which never stop" in text and "exact match" not in text


def test_a_part_can_run_alone_on_the_configured_model(tmp_path, capsys):
    folder = tmp_path / "run"
    more = ["benchmark.weights=model", "benchmark.parts=[memory]", "benchmark.memory_draws=[1]", f"output_dir={folder}"]
    shape_is_the_models = [item for item in of_parts(TINY, "memory") if "shape" not in item]
    assert cli("benchmark", [*shape_is_the_models, *more]) == 0
    text = (folder / "benchmark.md").read_text(encoding="utf-8")
    assert "weights of llada_nano" in text and "random weights" not in text and "## Speed" not in text


def test_a_model_that_is_no_part_is_refused(capsys):
    assert cli("benchmark", ["benchmark.parts=[sped]"]) == 2
    assert (
        "benchmark.parts is 'sped'; known: memory, flat, plan, speed, long, sft, sampler, cards, rates, agreement, "
        "nano, block, many; did you mean speed?" in capsys.readouterr().err
    )


def test_lengths_have_the_wanted_mean_and_percentile():
    mu, sigma = length_parameters(157, 646)
    assert math.exp(mu + sigma**2 / 2) == pytest.approx(157)
    assert math.exp(mu + 2.3263478740408408 * sigma) == pytest.approx(646)
    pairs = random_pairs(3000, 100, 157, 646, 90, 1024, seed=0)
    chosen = np.array([len(p.prompt_ids) + len(p.chosen_ids) for p in pairs])
    assert chosen.mean() == pytest.approx(157, rel=0.05)
    assert np.quantile(chosen, 0.99) == pytest.approx(646, rel=0.1)
    assert np.mean([len(p.prompt_ids) for p in pairs]) == pytest.approx(90, rel=0.07)
    longest = max(len(p.prompt_ids) + max(len(p.chosen_ids), len(p.rejected_ids)) for p in pairs)
    assert longest <= 1024 and min(len(p.rejected_ids) for p in pairs) >= 8


def test_pairs_are_a_function_of_the_seed_and_never_hold_the_mask():
    first, again, other = (random_pairs(5, 10, 30, 60, 10, 64, seed) for seed in (1, 1, 2))
    assert all((a.chosen_ids == b.chosen_ids).all() for a, b in zip(first, again, strict=True))
    assert any(len(a.chosen_ids) != len(b.chosen_ids) for a, b in zip(first, other, strict=True))
    assert max(p.chosen_ids.max() for p in first) < 10
    pair = pair_of_tokens(40, 10, seed=0, prompt_share=0.25)
    assert (len(pair.prompt_ids), len(pair.chosen_ids), len(pair.rejected_ids)) == (10, 30, 30)


def test_a_ratio_is_formed_per_round_and_its_interval_holds_the_median():
    """A machine that was ten times slower in one round slows both: the ratio does not see it."""
    ours = np.array([1.0, 10.0, 1.0, 1.0, 1.0])
    ratio = median_ratio(2 * ours, ours, np.random.default_rng(0))
    assert (ratio.median, ratio.low, ratio.high, ratio.rounds) == (2, 2, 2, 5)
    mixed = median_ratio(np.array([1.0, 2, 3, 4, 5]), np.ones(5), np.random.default_rng(0))
    assert mixed.median == 3 and 1 <= mixed.low < 3 < mixed.high <= 5


def test_rounds_rotate_the_order_and_every_contender_sees_the_same_pairs():
    seen = []

    class Contender:
        extra_bytes = 0

        def __init__(self, name):
            self.name = name

        def prepare(self, pairs, draws):
            assert pairs

        def step(self, pairs, draws):
            seen.append((self.name, pairs[0].id, draws))

    shape = {"d_model": 16, "n_layers": 1, "n_heads": 2, "n_kv_heads": 2, "mlp_hidden_size": 16, "vocab_size": 20}
    model = random_model({**shape, "max_sequence_length": 64}, 0, torch.device("cpu"), torch.float32)
    batches = [random_pairs(1, 10, 30, 60, 10, 64, seed) for seed in (1, 2, 3)]
    seconds = timed_rounds([Contender("a"), Contender("b")], model, batches, draws=4)
    assert [name for name, _, _ in seen] == ["a", "b", "a", "b", "b", "a", "a", "b"]  # one untimed step of each first
    assert [pair for _, pair, _ in seen[2:]] == [batch[0].id for batch in batches for _ in range(2)]
    assert set(seconds) == {"a", "b", "a/cpu", "b/cpu"} and all(len(values) == 3 for values in seconds.values())


def test_a_benchmark_that_is_cut_by_its_minutes_keeps_its_rows_and_measures_the_rest_when_resumed(
    tmp_path, monkeypatch, capsys
):
    folder = tmp_path / "run"
    cards = "benchmark.cards=[{draws: 1, quantization: none}, {draws: 2, quantization: none}]"
    asked = [*of_parts(TINY, "cards", "plan"), cards, "benchmark.card_tokens=48", "benchmark.plan_ranks=[2]"]
    asked += ["benchmark.parts=[cards,plan]", "benchmark.plan_tokens=[64]", f"output_dir={folder}"]
    measured = []
    plain = cards_module.whole_step

    def slow(bench, model, setting, pair):
        measured.append(setting.draws)
        if measured == [1, 2]:  # as the clock does when the time is over
            signal.raise_signal(signal.SIGALRM)
        return plain(bench, model, setting, pair)

    monkeypatch.setattr(cards_module, "whole_step", slow)
    monkeypatch.setattr(limits.Clock, "_left", lambda clock: 0.0 if measured == [1, 2] else 600.0)
    assert cli("benchmark", [*asked, "benchmark.minutes=1"]) == 0
    shown, record = capsys.readouterr().out, json.loads((folder / "benchmark.json").read_text())
    assert "1 minutes are over; not measured: cards, plan" in shown and f"resume=true output_dir={folder}" in shown
    assert measured == [1, 2] and len(record["cards"]["rows"]) == 1 and "plan" not in record
    assert "The time was over before all rows were measured" in (folder / "benchmark.md").read_text()
    assert not (folder / "manifest.json").exists()

    assert cli("benchmark", [*asked, "resume=true", "seed=7", "benchmark.card_tokens=64"]) == 2
    assert "card_tokens" in capsys.readouterr().err
    first = record["cards"]["rows"][0]
    monkeypatch.setattr(limits.Clock, "_left", lambda clock: float("inf"))
    assert cli("benchmark", [*asked, "resume=true"]) == 0
    record = json.loads((folder / "benchmark.json").read_text())
    assert measured == [1, 2, 2] and record["cards"]["rows"][0] == first and len(record["cards"]["rows"]) == 2
    assert record["plan"]["is_whole"] and read_manifest(folder, "benchmark") is not None
    text = (folder / "benchmark.md").read_text()
    assert "## In short" in text and "largest error of the memory plan in 2 settings" in text
