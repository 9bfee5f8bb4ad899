"""The result on pairs that no task grades: which pairs they are, and what base and tuned model think of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from laddpo.core.objectives import pair_scores
from laddpo.inputs.margins import PreferenceScores
from laddpo.preference.encoding.encode import EncodedPair
from laddpo.problems.tasks import BY_ANSWERS, embedded
from laddpo.results.stats import compare


def held_out_facts(
    split: str, groups: Sequence[str], best_metric: str, tasks: Sequence[str], ties: int = 0
) -> dict[str, Any] | None:
    """What the table of results says about its pairs. None for validation pairs beside a task whose problems chose the
    checkpoint. `ties`: pairs of which the tuned model prefers neither side to the base."""
    by_pairs = best_metric not in ("none", *BY_ANSWERS) and not (best_metric == "auto" and embedded(tasks))
    if split == "validation" and not by_pairs:
        return None
    facts = {"split": split, "pairs": len(groups), "prompts": len(set(groups))}
    return {**facts, "chose_checkpoint": split == "validation", "ties": ties}


def likelihood_results(scores: PreferenceScores, pairs: Sequence[EncodedPair], seed: int) -> Mapping[str, Any]:
    """Entries of results.json: how often the chosen answer is the more likely one, a tie being no win, and the mean
    log-likelihood of both sides, for base and tuned model."""
    found = pair_scores(scores.items, scores.draws)
    tuned = {"chosen": found.policy_chosen.numpy(), "rejected": found.policy_rejected.numpy()}
    base = {"chosen": found.reference_chosen.numpy(), "rejected": found.reference_rejected.numpy()}
    wins = [(side["chosen"] > side["rejected"]).astype(float) for side in (base, tuned)]
    groups: list[str] | None = [pair.group for pair in pairs]
    if len(set(groups)) == len(groups):
        groups = None  # one pair a prompt: the pairs are independent

    def entry(before: np.ndarray, after: np.ndarray, *, is_share: bool) -> dict[str, Any]:
        return compare(list(before), list(after), np.random.default_rng(seed), groups, is_share=is_share)

    return {
        "likelihood_accuracy": entry(*wins, is_share=True),
        **{f"logps_{side}": entry(base[side], tuned[side], is_share=False) for side in base},
    }
