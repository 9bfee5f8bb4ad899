"""The whole study: every row at every number of draws, reference first, then the policy under the same masks.

The reference pass comes first and by itself: whatever needs the reference (its values of the draws, its log-probability
of single tokens) is computed there. The run's own draws are the row `own`.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from laddpo.core.budget import TokenBudget
from laddpo.core.draws import ESTIMATORS, ElboEstimator
from laddpo.core.elbo import Denoiser
from laddpo.core.objectives import DpoObjective
from laddpo.core.tasks import differing_share
from laddpo.errors import UserError
from laddpo.estimator_study import techniques
from laddpo.estimator_study.intervals import Intervals
from laddpo.estimator_study.noise import (
    SETTINGS,
    Measured,
    Setting,
    compared,
    drift,
    favouring,
    measure,
    per_pair,
    reference_values,
    summarise,
)
from laddpo.estimator_study.report import length_words
from laddpo.estimator_study.step_noise import Step, noise_table, recommended, total
from laddpo.estimator_study.tokens import mean_logps, token_shares
from laddpo.processes.progress import Progress

if TYPE_CHECKING:
    from laddpo.preference.encoding.encode import EncodedPair
    from laddpo.settings.stage_schema import VarianceSettings

OWN = "own"
Job = tuple[str, int]  # a row and its number of draws


@dataclass(frozen=True)
class Models:
    """Policy and reference in one model: the reference within `as_reference`, the policy after `become_policy`.

    `is_start`: they are the same, because nothing was trained yet.
    """

    denoiser: Denoiser
    parameters: Sequence[Tensor]
    token_budget: int | TokenBudget
    as_reference: AbstractContextManager
    become_policy: Callable[[], object]
    is_start: bool


def run_study(
    models: Models,
    pairs: Sequence[EncodedPair],
    objective: DpoObjective,
    own: Setting,
    step: Step,
    wanted: VarianceSettings,
    seed: int,
) -> dict[str, Any]:
    """Everything that variance.json holds about the noise. `own`: the run's own draws, of which `step` takes some."""
    denoiser, few = models.denoiser, pairs[: wanted.gradient_pairs]
    rows = named_rows(own, _compared_names(wanted, has_blocks=bool(denoiser.block_length)))
    jobs = _jobs(rows, step, wanted)
    studied = [job for job in jobs if wanted.techniques and job[0] == "default" and job[1] > 1]
    mine = rows[OWN].of(step.draws, seed, 0, denoiser.block_length)
    with models.as_reference:
        needed = dict.fromkeys(rows[name] for name, _ in jobs)
        taken = {setting: favouring(denoiser, pairs, setting, seed, models.token_budget) for setting in needed}
        references = _reference_pass(models, taken, rows, jobs, wanted, seed)
        looked_at = taken[rows[OWN]][: len(few)][: wanted.token_pairs]
        expected = mean_logps(denoiser, looked_at, mine)
        mixtures = {}
        for name, n in studied:
            estimator_of = functools.partial(rows[name].of, n, seed, block_length=denoiser.block_length)
            mixtures[n] = techniques.reference_mixture(denoiser, estimator_of, wanted.evaluations, few)

    models.become_policy()
    measured = _policy_pass(models, taken, objective, rows, jobs, references, wanted, seed)
    started = time.monotonic()
    with Progress(total=len(looked_at), desc="tokens", unit="pair", dynamic_ncols=True) as bar:
        tokens = token_shares(denoiser, models.parameters, looked_at, mine, expected, bar.update)
    token_seconds, tried = time.monotonic() - started, {}
    for name, n in Progress(studied, desc="techniques", unit="setting", dynamic_ncols=True):
        model = (denoiser, models.parameters, few, models.token_budget)
        tried[n] = techniques.study(measured[name, n], mixtures[n], objective, *model)

    of_own = {n: m for (name, n), m in measured.items() if name == OWN}
    intervals = Intervals(len(few), np.random.default_rng(seed))
    table = noise_table(of_own, step, intervals)
    return {
        "pairs": len(pairs),
        "prompts": len({pair.group for pair in pairs}),
        "gradient_pairs": len(few),
        "evaluations": wanted.evaluations,
        "trainable_parameters": sum(p.numel() for p in models.parameters),
        "response_tokens": length_words(pairs),
        "is_start": models.is_start,
        "drift": drift(of_own[step.draws]),
        "step": {**dataclasses.asdict(step), "block_length": denoiser.block_length},
        "step_noise": table,
        "recommended": recommended(table),
        "focus": _focus(measured, rows, step, pairs, intervals, Intervals(len(pairs), np.random.default_rng(seed))),
        "tokens": tokens,
        "token_seconds": token_seconds,
        "settings": summarise(list(measured.values()), objective.beta, np.random.default_rng(seed)),
        "techniques": tried,
        "pair_ids": [pair.id for pair in pairs],
    }


def _compared_names(wanted: VarianceSettings, *, has_blocks: bool) -> list[str]:
    """The rows of SETTINGS to measure: those asked for, else all that mean something to the model."""
    possible = [name for name, row in SETTINGS.items() if has_blocks or not row.needs_blocks]
    for name in wanted.settings:
        if name not in (OWN, *possible):
            raise UserError(
                f"variance.settings has {name!r}, which is about blocks, and the model is bidirectional. Leave it out."
            )
    if wanted.techniques and max(wanted.draws) < 2:
        raise UserError(
            "variance.techniques is true and reads the row default with 2 or more draws; add such a number "
            f"to variance.draws={wanted.draws}."
        )
    names = [name for name in wanted.settings or possible if name != OWN]
    return names + ["default"] * (wanted.techniques and "default" not in names)


def named_rows(own: Setting, names: Sequence[str]) -> dict[str, Setting]:
    """The rows by name: the run's own draws without what `Setting.of` decides, the same with the other focus, and
    those of SETTINGS."""
    usual = ElboEstimator()
    fields = {name: getattr(usual, name) for name in ("diffusion_samples", "seed", "mask_rounds", "block_length")}
    own = dataclasses.replace(own, estimator=dataclasses.replace(own.estimator, **fields))
    rows = {OWN: own}
    if ESTIMATORS[own.estimator.estimator].picks:
        other = 0.0 if own.estimator.focus else 0.5
        changed = dataclasses.replace(own.estimator, difference_focus=other, surprise_focus=0.0)
        rows[f"own, focus {other:g}"] = dataclasses.replace(own, estimator=changed)
    return rows | {name: SETTINGS[name] for name in names}


def _jobs(rows: dict[str, Setting], step: Step, wanted: VarianceSettings) -> list[Job]:
    """The run's own draws at its own n first, then at the others; the other focus at the run's own n; the rest."""
    is_exact = ESTIMATORS[rows[OWN].estimator.estimator].is_exact  # which has one number of draws
    own = [step.draws, *(n for n in wanted.draws if n != step.draws and not is_exact)]
    jobs = [(OWN, n) for n in own]
    for name in list(rows)[1:]:
        jobs += [(name, n) for n in ([step.draws] if name.startswith(f"{OWN}, ") else wanted.draws)]
    return jobs


def _work(rows: dict[str, Setting], job: Job) -> tuple[Setting, int]:
    """What is computed for a job: equal for two rows that draw alike."""
    return rows[job[0]], job[1]


def _reference_pass(
    models: Models,
    taken: dict[Setting, Sequence[EncodedPair]],
    rows: dict[str, Setting],
    jobs: Sequence[Job],
    wanted: VarianceSettings,
    seed: int,
) -> dict[tuple[Setting, int], np.ndarray]:
    """The reference's values under the draws of every job. At the start common masks need none: they are the
    policy's."""
    needed = [_work(rows, job) for job in jobs if not (models.is_start and rows[job[0]].common)]
    needed, found = list(dict.fromkeys(needed)), {}
    total = len(needed) * wanted.evaluations
    with Progress(total=total, unit="evaluation", desc="reference", dynamic_ncols=True) as bar:
        for setting, n in needed:
            values = setting, n, seed, wanted.evaluations, models.token_budget, bar.update
            found[setting, n] = reference_values(models.denoiser, taken[setting], *values)
    return found


def _policy_pass(
    models: Models,
    taken: dict[Setting, Sequence[EncodedPair]],
    objective: DpoObjective,
    rows: dict[str, Setting],
    jobs: Sequence[Job],
    references: dict[tuple[Setting, int], np.ndarray],
    wanted: VarianceSettings,
    seed: int,
) -> dict[Job, Measured]:
    """The policy's pass. Says after the first job how long the others take."""
    done: dict[tuple[Setting, int], Measured] = {}
    works = list(dict.fromkeys(_work(rows, job) for job in jobs))
    pairs = taken[rows[OWN]]
    started, gradients = time.monotonic(), min(wanted.gradient_pairs, len(pairs))
    with Progress(total=len(works) * wanted.evaluations, unit="evaluation", desc="policy", dynamic_ncols=True) as bar:
        for setting, n in works:
            name = next(job[0] for job in jobs if _work(rows, job) == (setting, n))
            model = models.denoiser, models.parameters, taken[setting], name, setting, n, seed, wanted.evaluations
            values = None if models.is_start and setting.common else references[setting, n]
            common = values, objective, gradients, models.token_budget, bar.update
            done[setting, n] = measure(*model, *common)
            if len(done) == 1:
                took = time.monotonic() - started
                bar.clear()
                print(
                    f"the first of {len(works)} parts took {took:.0f} s; the rest takes about "
                    f"{_minutes(_rest(pairs, works, wanted, gradients) * took)}"
                )
    shown = sorted(jobs, key=lambda job: (job[0] != OWN, job[1] if job[0] == OWN else 0))
    return {job: dataclasses.replace(done[_work(rows, job)], name=job[0]) for job in shown}


def _rest(
    pairs: Sequence[EncodedPair], works: Sequence[tuple[Setting, int]], wanted: VarianceSettings, gradients: int
) -> float:
    """What is left after the first part, as a multiple of it, by the tokens that pass through the model.

    A backward pass counts as two forwards. Each token of `token_pairs` walks back through about half of the draws of
    its response.
    """
    first = works[0][1]
    part = first * wanted.evaluations * (3 * gradients + len(pairs) - gradients)
    others = sum(n for _, n in works[1:]) / first * part
    answers = [len(pair.chosen_ids) + len(pair.rejected_ids) for pair in pairs[:gradients][: wanted.token_pairs]]
    return (others + sum(answers) * first / 2) / part


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def _focus(
    measured: dict[Job, Measured],
    rows: dict[str, Setting],
    step: Step,
    pairs: Sequence[EncodedPair],
    intervals: Intervals,
    of_all_pairs: Intervals,
) -> dict[str, Any]:
    """How much the answers differ, and the noise with the focus on what differs over that without it."""
    found: dict[str, Any] = {"differing": differing_share(pairs)}
    other = next((name for name in rows if name.startswith(f"{OWN}, ")), None)
    if other is None:  # these draws pick no token
        return found
    with_it, without = (measured[name, step.draws] for name in (OWN, other))
    if not rows[OWN].estimator.focus:
        with_it, without = without, with_it
    found["focus"], found["kind"] = (
        with_it.estimator.focus,
        "surprise" if with_it.estimator.surprise_focus else "difference",
    )
    found["gradient"] = compared(with_it.gradient, without.gradient, intervals)
    found["score"] = compared(*(per_pair(m, 1.0)["score"] for m in (with_it, without)), of_all_pairs)
    value, interval = intervals.of(lambda s: total(s, with_it) / total(s, without))
    return found | {"step": {"value": value, "interval": interval}}
