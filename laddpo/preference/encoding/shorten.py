"""Shortens a prompt to a number of tokens by cutting text of its messages; template and roles stay whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from laddpo.preference.encoding.special_text import PlainTokenizer
from laddpo.preference.reading.bad_rows import RowError
from laddpo.preference.reading.pairs import FIRST_ROLES, Prompt


def shorten_prompt(
    prompt: Prompt, room: int, keep: str, encode: Callable[[Prompt], np.ndarray], tokens: PlainTokenizer
) -> tuple[Prompt, np.ndarray]:
    """The prompt cut to at most `room` tokens, and its ids.

    keep "end": the oldest turns go first, then the start of the oldest that is left. keep "start": the newest turns go
    first, then the end of the newest that is left. A system turn stays as long as there is another turn to cut, and
    what is left starts and ends with the user. RowError when not even one token of text fits.
    """
    system = prompt[:1] if prompt[0].role in FIRST_ROLES and len(prompt) > 1 else ()
    turns = prompt[len(system) :]
    while len(turns) > 1:
        fewer = _without_edge(turns, keep)
        if not fewer or len(encode(system + fewer)) <= room:
            break
        turns = fewer
    shorter = _without_edge(turns, keep)
    edge = 0 if keep == "end" else len(turns) - 1
    text_ids = tokens.encode_plain([turns[edge].content])[0]
    left = len(text_ids)
    excess = len(encode(system + turns)) - room
    while excess > 0:
        left -= excess
        if left <= 0:
            break
        text = _cut(text_ids, left, keep, tokens, turns[edge].content)
        candidate = system + turns[:edge] + (replace(turns[edge], content=text),) + turns[edge + 1 :]
        ids = encode(candidate)
        excess = len(ids) - room
        if excess <= 0 and text.strip():
            return candidate, ids
    if shorter:  # no text of the turn at the edge fits beside the others: it is dropped whole
        ids = encode(system + shorter)
        if len(ids) <= room:
            return system + shorter, ids
    problem = f"has responses that leave {max(room, 0)} tokens for the prompt, too few for any of its text"
    raise RowError("DATA-75", "prompt", problem, "Raise data.max_length or remove the row.")


def _without_edge(turns: Prompt, keep: str) -> Prompt:
    """Without the oldest turn (keep "end") or the newest; at that edge what is left has a user's turn, or is empty."""
    edge, rest = (0, slice(1, None)) if keep == "end" else (-1, slice(None, -1))
    left = turns[rest]
    while left and left[edge].role != "user":
        left = left[rest]
    return left


def _cut(ids: list[int], left: int, keep: str, tokens: PlainTokenizer, original: str) -> str:
    """Text of the last or first `left` tokens, without the broken character that a cut inside one leaves."""
    text = tokens.decode(ids[-left:] if keep == "end" else ids[:left])
    if "\ufffd" not in original:
        text = text.strip("\ufffd")
    return text
