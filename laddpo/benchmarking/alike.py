"""Like with like: ours against TRL's way in arrangements that do the same work, on short and long answers; and SFT.

A ratio against a padded step with the reference inside mixes three things. Here both sides store the reference, or
neither does; both lay rows without padding; both recompute their blocks, or neither does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from laddpo.benchmarking.contenders import Contender, Ours, OurSft
from laddpo.benchmarking.measure import Ratio, median_ratio, step_peak, timed_rounds
from laddpo.benchmarking.rivals import PlainSft
from laddpo.benchmarking.workload import Bench, Workbench, pairs_of_answers
from laddpo.results.tables import markdown

FIRST_EPOCH, CHECKPOINTED = "stream with reference pass", "stream, checkpointing"
TRL, BEST = "trl_like (chunked logits)", "trl_like (chunked logits), stored reference, unpadded"
ALIKE = (  # rival, ours, what both do
    (TRL, FIRST_EPOCH, "reference in the step; the rival pads"),
    (BEST, "stream", "stored reference, no padding"),
    (f"{BEST}, checkpointing", CHECKPOINTED, "the same, blocks recomputed"),
)
MIB = 2**20


def alike_section(
    seconds: Mapping[str, np.ndarray], rng: np.random.Generator, suffix: str = ""
) -> tuple[list[list[str]], dict[str, Any]]:
    """Rows (what both do, ours, rival, ratio) and their record: time of the rival over ours on the same pairs."""
    rows, record = [], {}
    for rival, ours, both in ALIKE:
        if rival in seconds and ours in seconds:
            ratio = median_ratio(seconds[rival + suffix], seconds[ours + suffix], rng)
            rows.append([both, ours, rival, ratio_text(ratio)])
            record[both] = {"ours": ours, "rival": rival, **asdict(ratio)}
    return rows, record


ALIKE_HEADER = ["what both do", "ours", "rival", "time of the rival over ours"]


def long_part(bench: Workbench) -> tuple[str, dict]:
    """The same comparison where responses have `benchmark.long_answers` tokens."""
    wanted, opened = bench.settings, bench.open()
    contenders = arrangements(opened, wanted.token_budget)
    rows, record = [], {}
    for length in wanted.long_answers:
        made = [
            pairs_of_answers(length, wanted.pairs, bench.shape.vocab_size, bench.seed + k) for k in range(wanted.rounds)
        ]
        seconds = timed_rounds(contenders, opened.model, made, wanted.draws)
        found, record[str(length)] = alike_section(seconds, np.random.default_rng(bench.seed))
        rows += [[f"{length:,}", *row] for row in found]
    about = f"Chosen answers of so many tokens, rejected ones of about as many, prompts of 64; {wanted.draws} draws."
    return f"{about}\n\n{markdown(['tokens', *ALIKE_HEADER], rows)}", {"lengths": record}


def arrangements(opened: Bench, token_budget: int) -> list[Contender]:
    """All that ALIKE names."""
    plain = opened.contenders["stream"]
    recomputed = Ours(opened.model, plain.denoiser, "stream", token_budget, checkpointing=True, label=CHECKPOINTED)
    known = {**opened.contenders, CHECKPOINTED: recomputed}
    return [known[name] for name in dict.fromkeys(name for rival, ours, _ in ALIKE for name in (ours, rival))]


def sft_part(bench: Workbench) -> tuple[str, dict]:
    """Fine-tuning on the chosen responses of `benchmark.sft_rows` pairs, one draw each: time and peak."""
    wanted, opened = bench.settings, bench.open()
    denoiser = opened.contenders["stream"].denoiser
    contenders = [OurSft(opened.model, denoiser, wanted.token_budget), PlainSft(opened.model, denoiser.mask_token_id)]
    made = [bench.dialogues(wanted.sft_rows, 100 + k, bench.shape.vocab_size) for k in range(wanted.rounds)]
    seconds = timed_rounds(contenders, opened.model, made, 1)
    peaks = {one.name: step_peak(one, opened.model, made[0], 1).above for one in contenders}
    ours, plain = (one.name for one in contenders)
    ratio = median_ratio(seconds[plain], seconds[ours], np.random.default_rng(bench.seed))
    rows = [
        [name, f"{wanted.sft_rows * wanted.rounds / float(seconds[name].sum()):.3g}", times, f"{peaks[name] / MIB:.1f}"]
        for name, times in ((ours, "1"), (plain, ratio_text(ratio)))
    ]
    table = markdown(["", "rows/s", "time over ours", "peak MiB above the weights"], rows)
    record = {"time_ratio": asdict(ratio), "peaks": peaks, "seconds": {k: v.tolist() for k, v in seconds.items()}}
    return f"{wanted.sft_rows} rows a step, one draw each.\n\n{table}", record


def ratio_text(ratio: Ratio) -> str:
    """A ratio with its interval."""
    return f"{ratio.median:.2f}x [{ratio.low:.2f}, {ratio.high:.2f}]"
