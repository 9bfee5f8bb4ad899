"""The sources of generated rows: arithmetic pairs and their SFT corpus, and what they depend on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from laddpo.preference.embedded import arithmetic
from laddpo.preference.reading.bad_rows import BadRow
from laddpo.preference.reading.files import ReadLog
from laddpo.preference.reading.pairs import Example, PreferencePair, Prompt

if TYPE_CHECKING:
    from laddpo.preference.sources import Request


def arithmetic_pairs(request: Request, log: ReadLog) -> Iterator[PreferencePair | BadRow]:
    """Generated pairs: the validation share from problems of the validation split, the rest from the training split."""
    num_validation = round(request.num_pairs * request.validation_fraction)
    if request.validation_fraction > 0 and request.num_pairs > 1:
        num_validation = max(1, num_validation)
    for split, num_pairs in (("train", request.num_pairs - num_validation), ("validation", num_validation)):
        yield from arithmetic.preference_pairs(split, num_pairs, request.seed, request.difficulty, request.habit)


def arithmetic_identity(request: Request) -> dict:
    """What generated pairs depend on."""
    return {
        "num_pairs": request.num_pairs,
        "operand_max": request.difficulty.operand_max,
        "terms": request.difficulty.terms,
        "width": request.difficulty.width,
        "habit": request.habit,
        "seed": request.seed,
        "validation_fraction": request.validation_fraction,
    }


def arithmetic_corpus(request: Request, log: ReadLog) -> Iterator[Example | BadRow]:
    """The generated SFT corpus, a share of it with the wrong habit."""
    return arithmetic.corpus(
        request.num_examples, request.mistake_share, request.seed, request.difficulty, request.habit
    )


def corpus_identity(request: Request) -> dict:
    """What the generated corpus depends on."""
    sizes = {"num_examples": request.num_examples, "mistake_share": request.mistake_share}
    return {**{key: value for key, value in arithmetic_identity(request).items() if key != "num_pairs"}, **sizes}


def arithmetic_split(prompt: Prompt) -> str:
    """The split of a generated problem."""
    return arithmetic.split_of(prompt[0].content)
