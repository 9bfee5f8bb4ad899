"""What the names in tables and pictures mean, in one short phrase each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

MEANINGS = {
    "exact match": "share of problems whose final answer is right",
    "mean marks": "how many of its five marks an answer has, on average",
    "share carry": "share of answers whose last number is right",
    "share equals 1": "share of answers with = in the first step",
    "share semicolon": "share of answers with ; between the steps",
    "share equals 2": "share of answers with = in the second step",
    "share hash": "share of answers with # before the last number",
    "win rate": "share of prompts to which the tuned model's answer is better, a tie as one half; 50% is chance",
    "reward accuracy": "share of pairs in which the chosen answer has the higher reward; 50% is chance",
    "reward accuracy on training pairs": "the same for pairs that training has seen",
    "reward margin": "reward of the chosen answer minus reward of the rejected one",
    "reward": "beta times (ELBO of the answer now minus its ELBO before training)",
    "ELBO": "the estimate of an answer's log-likelihood, in nats; it is a lower bound",
    "held out loss": "loss per token on rows that training has not seen",
    "training rows loss": "loss per token on rows that training has seen",
    "answer tokens": "mean length of an answer",
    "ended rate": "share of answers that ended before the length limit",
    "validation loss": "what training makes smaller; with the sigmoid loss 0.693 means no preference",
    "chosen fall": "share of their log-likelihood that the chosen answers lost in training; below 0 it rose",
    "step kept": "the step whose weights are the result",
    "peak GiB": "the most memory that a step used",
    "interval": "95% interval of the value itself; the difference has its own",
}


def in_order(results: Mapping[str, Any]) -> dict[str, Any]:
    """Results in the order of MEANINGS: what the user asked for first. Others keep their order, after these."""
    places = list(MEANINGS)

    def place(name: str) -> int:
        plain = _plain(name)
        return places.index(plain) if plain in places else len(places)

    return {name: results[name] for name in sorted(results, key=place)}


def explained(names: Iterable[str]) -> list[tuple[str, str]]:
    """(name, phrase) for each of these names of a table that has one; what a phrase itself uses comes after it."""
    found: dict[str, str] = {}
    for name in names:
        plain = _plain(name)
        if plain in MEANINGS:
            found[plain] = MEANINGS[plain]
    if any(name.startswith("reward") for name in found):
        found |= {name: MEANINGS[name] for name in ("reward", "ELBO")}
    return list(found.items())


def _plain(name: str) -> str:
    """ "gsm8k/exact_match" -> "exact match" """
    plain = name.removesuffix(" so far").rsplit("/", 1)[-1].replace("_", " ")
    return plain.partition(" at temperature ")[0]
