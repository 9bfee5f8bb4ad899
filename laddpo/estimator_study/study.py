"""The whole study: every setting at every number of draws, reference first, then the policy under the same masks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from laddpo.core.budget import TokenBudget
from laddpo.core.elbo import Denoiser
from laddpo.core.objectives import DpoObjective
from laddpo.errors import UserError
from laddpo.estimator_study import techniques
from laddpo.estimator_study.noise import SETTINGS, drift, favouring, measure, reference_values, summarise
from laddpo.estimator_study.report import length_words
from laddpo.processes.progress import Progress

if TYPE_CHECKING:
    from laddpo.preference.encoding.encode import EncodedPair


def run_study(
    denoiser: Denoiser,
    parameters: Sequence[Tensor],
    pairs: Sequence[EncodedPair],
    objective: DpoObjective,
    *,
    settings: Sequence[str],
    draws: Sequence[int],
    evaluations: int,
    gradient_pairs: int,
    seed: int,
    token_budget: int | TokenBudget,
    as_reference: AbstractContextManager,
    become_policy: Callable[[], object],
) -> dict[str, Any]:
    """Everything that variance.json holds about the masks.

    `settings`: rows of SETTINGS, none for all. The denoiser is the reference within `as_reference`, and the policy
    after `become_policy`.
    """
    few = pairs[:gradient_pairs]
    jobs = [(name, n) for name in _rows(settings, has_blocks=bool(denoiser.block_length)) for n in draws]
    studied = [(name, n) for name, n in jobs if name == "default" and n > 1]
    bar = functools.partial(Progress, unit="setting", dynamic_ncols=True)

    references, mixtures = {}, {}
    with as_reference:
        taken = {name: favouring(denoiser, pairs, SETTINGS[name], seed, token_budget) for name, _ in jobs}
        for name, n in bar(jobs, desc="reference"):
            row = SETTINGS[name]
            references[name, n] = reference_values(denoiser, taken[name], row, n, seed, evaluations, token_budget)
        for name, n in studied:
            estimator_of = functools.partial(SETTINGS[name].of, n, seed, block_length=denoiser.block_length)
            mixtures[n] = techniques.reference_mixture(denoiser, estimator_of, evaluations, few)

    become_policy()
    measured, common = {}, (objective, len(few), token_budget)
    for name, n in bar(jobs, desc="policy"):
        values = references.pop((name, n))
        measured[name, n] = measure(denoiser, parameters, taken[name], name, SETTINGS[name], n, seed, values, *common)

    tried = {}
    for name, n in bar(studied, desc="techniques"):
        step = (denoiser, parameters, few, token_budget)
        tried[n] = techniques.study(measured[name, n], mixtures[n], objective, *step)

    best = measured[max(jobs, key=lambda job: (job[0] == "default", job[1]))]
    return {
        "pairs": len(pairs),
        "gradient_pairs": len(few),
        "evaluations": evaluations,
        "trainable_parameters": sum(p.numel() for p in parameters),
        "response_tokens": length_words(pairs),
        "drift": drift(best),
        "settings": summarise(list(measured.values()), objective.beta, np.random.default_rng(seed)),
        "techniques": tried,
    }


def _rows(asked: Sequence[str], *, has_blocks: bool) -> Sequence[str]:
    """The rows of SETTINGS to measure: those asked for, else all that mean something to the model."""
    possible = [name for name, row in SETTINGS.items() if has_blocks or not row.needs_blocks]
    for name in asked:
        if name not in possible:
            raise UserError(
                f"variance.settings has {name!r}, which is about blocks, and the model is bidirectional. Leave it out."
            )
    return asked or possible
