"""What fits a card, and at what speed: whole optimizer steps of LLaDA-8B's shape under a cap on memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from laddpo.benchmarking.contenders import BETA, Contender, Ours, fixed_budget
from laddpo.benchmarking.limits import Rows
from laddpo.benchmarking.measure import measure
from laddpo.benchmarking.rivals import PublicLaddpo, TrlLike
from laddpo.benchmarking.workload import Workbench, pair_of_tokens, quantization_of
from laddpo.core.budget import release_memory
from laddpo.core.optim import build_optimizer, clip_gradients
from laddpo.hardware.memory import GIB, Load, predict_memory
from laddpo.models import blocks
from laddpo.models.adapters import trainable_parameters
from laddpo.models.denoiser import TransformerDenoiser
from laddpo.models.offload import keep_embeddings_on_host
from laddpo.results.tables import markdown
from laddpo.settings.schema import BenchmarkSettings, StepSetting

TIMES = 3  # that a step is timed, after one to warm up
WHO = {
    "ours": "ours",
    "public_laddpo": "public_laddpo",
    "trl_like_full": "trl_like (full logits)",
    "trl_like_chunked": "trl_like (chunked logits)",
}
OPTIONS = {
    "gradient_checkpointing": "checkpointing",
    "offload_activations": "offload",
    "embeddings_on_cpu": "embeddings on the CPU",
    "compile": "compiled",
}


@dataclass
class Shelf:
    """The last model that was asked for: settings that can share one do, and only one takes memory at a time."""

    key: tuple = ()
    model: object = None

    def get(self, bench: Workbench, setting: StepSetting):
        """A model with its adapter, stored and executed as the setting says."""
        key = (setting.quantization, setting.embeddings_on_cpu, setting.compile)
        if key != self.key:
            self.key, self.model = (), None
            release_memory()
            self.model = bench.random_policy(quantization_of(setting.quantization))
            if setting.embeddings_on_cpu:
                keep_embeddings_on_host(self.model)
            if setting.compile:
                blocks.compile_blocks(self.model)
            self.key = key
        blocks.checkpoint_blocks(self.model, setting.gradient_checkpointing)
        return self.model


def cards_part(bench: Workbench, rows: Rows) -> tuple[str, dict]:
    """Whole optimizer steps on the longest pair, under the cap of every setting."""
    wanted, shelf = bench.settings, Shelf()
    pair = pair_of_tokens(wanted.card_tokens, wanted.shape.vocab_size - 2, bench.seed, prompt_share=0.25)

    def row_of(setting: StepSetting) -> dict:
        model = shelf.get(bench, setting)
        step = whole_step(bench, model, setting, pair)  # what it holds, a rival's copy too, is freed before the next
        found = measure(step, model, bench.machine.device, TIMES if setting.draws < 16 else 1, setting.gib)
        predicted, tokens = predicted_peak(bench, setting, pair), 2 * setting.draws * wanted.card_tokens
        return {**dataclasses.asdict(found), "predicted": predicted, "tokens": tokens}

    text, record = cards_section(rows.measured(wanted.cards, row_of))
    about = (
        f"One pair a step: prompt and either response together {wanted.card_tokens} tokens, reference pass and "
        "optimizer included. tokens/s counts those of all draws."
    )
    return f"{about}{_no_cap(bench.machine)}\n\n{text}", record


def cards_section(rows: Sequence[Mapping[str, Any]]) -> tuple[str, dict[str, Any]]:
    """Peak memory and speed of whole steps by card; and how far our peak moves with the number of draws."""
    cells = []
    for row in rows:
        setting = row["setting"]
        ran = not row["problem"]
        speed = f"{row['tokens'] / median_seconds(row):,.0f}" if ran else ""
        peaks = [gib_text(row[name]) for name in ("allocated", "reserved", "predicted")]
        cells.append(
            [_card(setting), describe(setting), str(setting["draws"]), *peaks, speed, "yes" if ran else row["problem"]]
        )
    header = ["tensors at most", "step", "n", "allocated GiB", "reserved GiB", "predicted GiB", "tokens/s", "ran"]
    growth = _growth(rows)
    lines = [
        f"- {name}: {most / least - 1:+.1%} from n = {fewest} to n = {largest} ({kind})"
        for name, kind, fewest, largest, least, most in growth
    ]
    said = "\n\nPeak over the number of draws:\n\n" + "\n".join(lines) if lines else ""
    names = ("setting", "kind", "fewest", "most", "bytes_fewest", "bytes_most")
    record = {"rows": list(rows), "growth": [dict(zip(names, entry, strict=True)) for entry in growth]}
    return markdown(header, cells) + said, record


def _growth(rows: Sequence[Mapping[str, Any]]) -> list[tuple]:
    """Settings of ours that were run with several numbers of draws: their least and most."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["setting"]["who"] == "ours" and not row["problem"]:
            groups.setdefault(f"{describe(row['setting'])}, {_card(row['setting'])}", []).append(row)
    found = []
    for name, members in groups.items():
        ordered = sorted(members, key=lambda row: row["setting"]["draws"])
        first, last = ordered[0], ordered[-1]
        if first["setting"]["draws"] == last["setting"]["draws"]:
            continue
        for kind in ("allocated", "reserved"):
            if first[kind]:
                draws = (first["setting"]["draws"], last["setting"]["draws"])
                found.append((name, kind, *draws, first[kind], last[kind]))
    return found


def whole_step(bench: Workbench, model, setting: StepSetting, pair):
    """A function that runs one optimizer step; what it needs is made at its first call, so that it counts."""
    named, made = trainable_parameters(model), {}
    optim = bench.run.optim

    def step() -> None:
        if not made:
            made["contender"] = contender_of(bench.settings, model, setting)
            made["optimizer"] = build_optimizer(setting.optimizer, named, tuple(optim.betas), optim.eps, 0.0)
        made["contender"].prepare([pair], setting.draws)
        made["contender"].step([pair], setting.draws)
        clip_gradients(list(named.values()), 1.0)
        with torch.no_grad():
            made["optimizer"].step()
        model.zero_grad(set_to_none=True)

    return step


def contender_of(wanted: BenchmarkSettings, model, setting: StepSetting) -> Contender:
    """Whose step is measured. Ours never makes its micro-steps smaller: what does not fit is reported."""
    mask, pad = wanted.shape.vocab_size - 1, wanted.shape.vocab_size - 2
    if setting.who == "public_laddpo":
        return PublicLaddpo(model, mask, pad, wanted.max_length, BETA)
    if setting.who != "ours":
        return TrlLike(model, mask, pad, BETA, setting.who.removeprefix("trl_like_"))
    denoiser = TransformerDenoiser(model, mask, offload=setting.offload_activations)
    return Ours(model, denoiser, "stream", fixed_budget(setting.token_budget))


def predicted_peak(bench: Workbench, setting: StepSetting, pair) -> int | None:
    """What the plan says of our step; it knows no others."""
    if setting.who != "ours":
        return None
    longest = len(pair.prompt_ids) + len(pair.chosen_ids)
    everything = 2 * setting.draws * longest
    packed = max(longest, min(setting.token_budget // longest * longest, everything))
    load = Load(packed, mixed=False, exceeds=everything > setting.token_budget, alone=True)
    return predict_memory(bench.setup_of(setting), load).peak


def describe(setting: Mapping[str, Any]) -> str:
    """A setting in words. Example: ours, nf4, 2,048 tokens, checkpointing"""
    parts = [WHO[setting["who"]], {"none": "unquantised"}.get(setting["quantization"], setting["quantization"])]
    parts += [f"{setting['token_budget']:,} tokens"] if setting["who"] == "ours" else []
    parts += [text for name, text in OPTIONS.items() if setting[name]]
    parts += [setting["optimizer"]] if setting["optimizer"] != "adamw" else []
    return ", ".join(parts)


def _no_cap(machine) -> str:
    return "" if machine.device.type == "cuda" else " This is a CPU, which knows no cap: everything runs."


def _card(setting: Mapping[str, Any]) -> str:
    return "no cap" if setting["gib"] is None else f"{setting['gib']:g} GiB"


def median_seconds(row: Mapping[str, Any]) -> float:
    return float(np.median(row["seconds"]))


def gib_text(size: float | None) -> str:
    return "" if size is None else f"{size / GIB:.2f}" if size >= 0.01 * GIB else f"{size / GIB:.4f}"
