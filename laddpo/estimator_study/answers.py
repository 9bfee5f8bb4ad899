"""What the measurement of noise says to a user, in sentences and tables: the first part of variance.md.

Takes the content of variance.json.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from laddpo.estimator_study.tokens import FLAGGED
from laddpo.results.tables import markdown

Result = Mapping[str, Any]


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def with_interval(found: Result | None, show=number) -> str:
    """A value with its 95% interval. Example: 0.53 [0.47, 0.6]"""
    if found is None or found["value"] is None:
        return "–"
    if found["interval"] is None:
        return show(found["value"])
    low, high = found["interval"]
    upper = "without bound" if high is None else show(high)
    return f"{show(found['value'])} [{show(low)}, {upper}]"


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * min(value, 1.0):.0f}%"


def times(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def answer(result: Result) -> str:
    """The page's first three sentences: masks against pairs, what to set, and the focus."""
    return " ".join([_masks_and_pairs(result), recommendation(result), focus_words(result)])


def _masks_and_pairs(result: Result) -> str:
    step = result["step"]
    own = next(row for row in result["step_noise"] if row["draws"] == step["draws"])
    share = own["mask_share"]
    return (
        f"With n = {step['draws']} draws and {step['pairs']} pairs a step, masks make {with_interval(share, percent)} "
        "of the noise of a step's gradient, and pairs make the rest."
    )


def recommendation(result: Result) -> str:
    """One sentence that says what n and how many pairs a step should be."""
    step, best = result["step"], result["recommended"]
    compared = [row for row in result["step_noise"] if row.get("relative")]
    if not compared:
        return "No other n was measured that has whole steps at equal forwards, so there is nothing to recommend."
    if best is not None:
        return (
            f"At equal forwards n = {best['draws']} with {best['pairs_per_step']} pairs a step has "
            f"{with_interval(best['relative'], times)} times this noise: set dpo.diffusion_samples={best['draws']} and "
            f"{best['pairs_per_step']} pairs a step (optim.per_device_train_batch_size times "
            "optim.gradient_accumulation_steps)."
        )
    least = min(compared, key=lambda row: row["relative"]["value"])
    if least["relative"]["value"] >= 1:
        kept = f"the nearest, n = {least['draws']}, has {with_interval(least['relative'], times)} times the noise"
    else:
        kept = f"n = {least['draws']} has {with_interval(least['relative'], times)} times the noise"
        over = least["relative_over_signal"]
        if over["value"] is not None and over["value"] >= 1:
            kept += f", and {with_interval(over, times)} times the noise for its signal"
    worse = [str(row["draws"]) for row in compared if (row["relative_corrected"] or [0])[0] > 1]
    kept += f"; n = {', '.join(worse)} is shown to be worse" if worse else ""
    return f"At equal forwards no other n is shown to be better: {kept}. Keep n = {step['draws']}."


def focus_words(result: Result) -> str:
    """Whether the focus on differing tokens can help, in a sentence."""
    focus = result["focus"]
    said = f"The answers of a pair differ in {percent(focus['differing'])} of their tokens"
    if "gradient" not in focus:
        return f"{said}; these draws pick no tokens, so they have no focus."
    ratio, step = (with_interval(focus[name], times) for name in ("gradient", "step"))
    low, high = focus["step"]["interval"] or (0, math.inf)
    verdict = "it helps" if high < 1 else "it harms: set dpo.focus=none" if low > 1 else "no difference is shown"
    if focus["score"]["interval"] and not result["is_start"] and low <= 1 <= high:
        verdict += f"; that of the score is {with_interval(focus['score'], times)} times"
    return (
        f"{said}, and with the focus the masks' noise of the gradient is {ratio} times what it is without, a step's "
        f"noise {step} times: {verdict}."
    )


def step_section(result: Result) -> list[str]:
    """Masks and pairs at each n, and steps of equal forwards."""
    step, rows = result["step"], result["step_noise"]
    budget = step["pairs"] * step["draws"]
    parts = [
        [
            str(row["draws"]),
            *(with_interval(row[name]) for name in ("within", "between")),
            with_interval(row["mask_share"], percent),
        ]
        for row in rows
    ]
    equal = [_step_cells(row, step) for row in rows if row["pairs_per_step"]]
    none = [str(row["draws"]) for row in rows if not row["pairs_per_step"]]
    lines = [
        "## Masks and pairs",
        "",
        "One pair's gradient varies because its masks are drawn (within the pair, over evaluations) and because pairs "
        "differ (between pairs, the part of the masks taken off). Both columns are traces of covariances over the "
        "trainable parameters. A step of B pairs has 1/B of their sum. The draws are the run's own.",
        "",
        markdown(["n", "within: masks", "between: pairs", "share of masks"], parts),
        "",
        "## Steps of equal forwards",
        "",
        f"Every row takes {budget} forwards of each side in a step, as the run does. Noise is (between + within) / B. "
        "Signal is the squared length of the mean gradient, its own noise taken off. A step's noise over signal below "
        "1 means that its gradient points mostly the right way. Intervals are those of each number by itself; the "
        "recommendation counts all comparisons (Bonferroni).",
        "",
        markdown(["n", "pairs a step B", "noise", "to the run's", "noise over signal", "to the run's"], equal),
        "",
    ]
    if none:
        lines += [
            f"n = {', '.join(none)}: no whole step of as many forwards with the {step['training_pairs']:,} "
            "training pairs.",
            "",
        ]
    return [*lines, _costs(step, rows), ""]


def _step_cells(row: Result, step: Result) -> list[str]:
    is_own = row["draws"] == step["draws"]
    ratios = (
        ["1 (the run's own)"] * 2
        if is_own
        else [with_interval(row[name], times) for name in ("relative", "relative_over_signal")]
    )
    noise, over = (with_interval(row[name]) for name in ("noise", "noise_over_signal"))
    return [str(row["draws"]), str(row["pairs_per_step"]), noise, ratios[0], over, ratios[1]]


def _costs(step: Result, rows: Sequence[Result]) -> str:
    sizes = sorted({row["pairs_per_step"] for row in rows if row["pairs_per_step"]})
    pairs = step["training_pairs"]
    epochs = ", ".join(f"{pairs / size:.3g} steps at {size} pairs" for size in sizes)
    said = (
        f"Not in equal forwards: data, and the reference. An epoch of the {pairs:,} training pairs has {epochs}: more "
        "pairs a step visit each pair more often in as many steps. The reference needs one forward for each pair and "
        "draw that training visits for the first time, so fewer draws of more pairs cost it no more; later epochs find "
        "its values stored."
    )
    if step["block_length"]:
        said += (
            " The draws of a pair share its clean tokens in a block model, so many draws of few pairs are cheaper than "
            "this table counts."
        )
    return said


def token_section(result: Result) -> list[str]:
    """Each pair's largest token, those above FLAGGED listed."""
    found = result["tokens"]
    if not found:
        return []
    shares = [row["share"] or 0.0 for row in found]
    flagged = sorted((row for row in found if (row["share"] or 0) > FLAGGED), key=lambda row: -row["share"])
    median, unit = statistics.median(shares), f"pair{'s' * (len(found) != 1)}"
    measured = (
        f"The gradient of each of the {sum(row['tokens'] for row in found):,} tokens of {len(found)} {unit}, one "
        f"backward pass each ({result['token_seconds']:.0f} s)"
    )
    lines = [
        "## The largest token",
        "",
        f"{measured}, under one set of the run's own draws. The largest token of a pair holds {percent(median)} of the "
        f"squared lengths at the median and {percent(max(shares))} at most. {_flagged_words(len(flagged), len(found))}",
        "",
    ]
    if flagged:
        cells = [
            [
                row["pair"],
                percent(row["share"]),
                row["token"],
                row["text_before"],
                row["side"],
                str(row["position"]),
                number(row["reference_logp"]),
            ]
            for row in flagged
        ]
        header = ["pair", "share", "token", "after", "side", "position", "reference log p"]
        lines += [markdown(header, cells), ""]
    return lines


def _flagged_words(flagged: int, pairs: int) -> str:
    if not flagged:
        return f"No token holds more than {FLAGGED:.0%} of its pair."
    return (
        f"In {flagged} of the {pairs} pairs one token holds more than {FLAGGED:.0%}: such a pair's gradient is mostly "
        "noise about that token."
    )
