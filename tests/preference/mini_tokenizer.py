"""The tokenizer of `llada_mini`: that of llada_nano with merges for the words of its stories.

`python -m tests.preference.mini_tokenizer` writes data/llada_mini/tokenizer.json and tokenizer_config.json again.
test_word_problems.py proves that the shipped files have these bytes. Words become one or a few tokens, numbers of two
digits become one, and any other text is still spelled in bytes. A sum is then a fixed number of tokens whatever its
numbers, as llada_nano has by writing 7 as 07.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

from laddpo.preference.embedded.word_problems import INSTRUCTION, word_problem
from laddpo.storage.atomic import write_json
from tests.preference.nano_tokenizer import byte_letters, tokenizer_config, tokenizer_json

SAMPLE, MERGES = 2000, 400
WORD = re.compile(r" ?[A-Za-z]+|#+")  # a subset of the pieces that byte-level BPE splits text into
NUMBERS = [(tens, units) for tens in "123456789" for units in "0123456789"]


def write_mini_tokenizer(folder: Path) -> None:
    """Write both files into `folder`; the same bytes every time."""
    merges = NUMBERS + learn_merges(story_words(), MERGES)
    write_json(folder / "tokenizer.json", tokenizer_json(merges, splits_words=True))
    write_json(folder / "tokenizer_config.json", tokenizer_config())


def story_words() -> Counter[str]:
    """How often each word, with the space before it, occurs in a sample of problems and solutions."""
    words: Counter[str] = Counter()
    for index in range(SAMPLE):
        drawn = word_problem("train", index, 0)
        words.update(WORD.findall(drawn.question + INSTRUCTION + "\n" + drawn.solution()))
    return words


def learn_merges(words: Mapping[str, int], count: int) -> list[tuple[str, str]]:
    """Byte-pair encoding: `count` times the most frequent neighbours become one; ties by the letters.

    `{"ab": 3, "abc": 1}` gives [("a", "b"), ("ab", "c")]. BpeTrainer of the `tokenizers` library breaks ties by token
    ids and has no option for it: 71 of the 592 ids that the shipped weights know would mean another token.
    """
    letters = byte_letters()
    spelled = {tuple(letters[byte] for byte in word.encode()): number for word, number in words.items()}
    merges: list[tuple[str, str]] = []
    while len(merges) < count:
        pairs: Counter[tuple[str, str]] = Counter()
        for parts, number in spelled.items():
            for pair in pairwise(parts):
                pairs[pair] += number
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        joined: dict[tuple[str, ...], int] = {}
        for parts, number in spelled.items():
            merged = _merge(parts, best)
            joined[merged] = joined.get(merged, 0) + number
        spelled = joined
    return merges


def _merge(parts: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    found: list[str] = []
    for part in parts:
        if found and (found[-1], part) == pair:
            found[-1] += part
        else:
            found.append(part)
    return tuple(found)


if __name__ == "__main__":
    target = Path(__file__).resolve().parents[2] / "data" / "llada_mini"
    write_mini_tokenizer(target)
    print(target)
