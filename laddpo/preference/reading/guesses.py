"""Columns that other data sets name otherwise: what each is taken for if only one can be meant, and hints otherwise."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from laddpo.errors import UserError, nearest
from laddpo.preference.reading.unread import is_mapped

if TYPE_CHECKING:
    from laddpo.preference.reading.rows import RowRules

PAIR = ("prompt", "chosen", "rejected")
UNPAIRED = ("prompt", "completion", "label")


def guess_columns(
    seen: Mapping[str, Any], columns: Mapping[str, str | None], dataset_name: str | None, *, is_pair: bool
) -> dict[str, str]:
    """Our name -> column, for what rows with the columns `seen` lack and one other column can only mean.

    `seen` holds a value of each column. `columns` are those that the settings name. `is_pair`: rows of preference
    pairs, else rows for sft. Raises UserError where several columns may be meant.
    """
    lacking = {name for name in (*PAIR, "response") if not _is_there(name, seen, columns)}
    taken = {column for name, column in columns.items() if is_mapped(name, column)}
    options = {name: _options(name, seen, taken) for name in lacking}
    if not is_pair:
        has_pair = "chosen" not in lacking or (options["chosen"] and options.get("rejected", True))
        lacking -= {"response"} if has_pair else {"chosen", "rejected"}
        if "messages" in seen:
            return {}
    else:
        lacking -= {"response"}
        if not {"chosen", "rejected"} & lacking and _hold_the_prompt(seen, columns):
            lacking -= {"prompt"}

    return _taken(lacking, options, seen, columns, dataset_name)


def guess_unpaired(
    seen: Mapping[str, Any], columns: Mapping[str, str | None], dataset_name: str | None
) -> dict[str, str]:
    """As guess_columns, for unpaired rows: prompt, completion and label."""
    taken = {column for name, column in columns.items() if is_mapped(name, column)}
    lacking = {name for name in UNPAIRED if not _is_there(name, seen, columns)}
    if "messages" in seen and "completion" in lacking:
        lacking -= {"prompt", "completion"}
    options = {name: _options(name, seen, taken) for name in lacking}
    return _taken(lacking, options, seen, columns, dataset_name)


def seen_kind(seen: Mapping[str, Any], columns: Mapping[str, str | None]) -> str:
    """pairs or unpaired: what rows with the columns `seen` look like. `columns` are those that the settings name."""
    if any(is_mapped(name, columns.get(name)) for name in ("completion", "label")):
        return "unpaired"
    taken = {column for name, column in columns.items() if is_mapped(name, column)}
    has = {
        name: _is_there(name, seen, columns) or bool(_options(name, seen, taken))
        for name in ("chosen", "rejected", "completion", "label")
    }
    is_unpaired = has["label"] and (has["completion"] or "messages" in seen)
    return "unpaired" if is_unpaired and not (has["chosen"] and has["rejected"]) else "pairs"


def _taken(
    lacking: set[str],
    options: dict[str, list[str]],
    seen: Mapping[str, Any],
    columns: Mapping[str, str | None],
    dataset_name: str | None,
) -> dict[str, str]:
    """Our name -> column for what is lacking; UserError where several columns may be meant."""
    guessed: dict[str, str] = {}
    if "prompt" in lacking and not columns.get("input") and {"instruction", "input"} <= set(options["prompt"]):
        guessed, options["prompt"] = {"input": "input"}, ["instruction"]
    unclear = {name: found for name in lacking if len(found := options[name]) > 1}
    if unclear:
        raise UserError(_unclear(unclear, lacking, options, seen, dataset_name))
    names = dict.fromkeys((*PAIR, *UNPAIRED, "response"))
    return {**{name: options[name][0] for name in names if name in lacking and options[name]}, **guessed}


def guess_scores(
    seen: Mapping[str, Any], columns: Mapping[str, str | None], dataset_name: str | None, reads_scores: bool
) -> dict[str, str]:
    """Our name -> column, for the scores of pairs and for lists of answers with their scores. `reads_scores`: whether
    score_chosen and score_rejected are looked at. Ranks are never guessed: a low one is good."""
    pair = {name: _matching(seen, SCORES_OF[name]) for name in SCORES_OF if not columns.get(name)}
    if all(_is_there(name, seen, columns) for name in ("chosen", "rejected")):
        has_both = reads_scores and len(pair) == 2 and all(len(found) == 1 for found in pair.values())
        return {name: found[0] for name, found in pair.items()} if has_both else {}
    lists = [columns["candidates"]] if columns.get("candidates") in seen else _matching(seen, LISTS)
    lists = [column for column in lists if seen[column] and isinstance(seen[column], list)]
    if not lists or any(_is_there(name, seen, columns) for name in ("chosen", "rejected")):
        return {}
    found = {"candidates": lists}
    first = seen[lists[0]][0]
    inside = first if isinstance(first, dict) else {}
    if inside and (columns.get("candidate") or "candidate") not in inside:
        found["candidate"] = _matching(inside, ("text", "answer", *OTHER_NAMES["candidate"]))
    if not columns.get("scores") and not columns.get("ranks"):
        found["scores"] = _matching(inside, SCORES) or _matching(seen, SCORES)
    unclear = {name: options for name, options in found.items() if len(options) > 1}
    if unclear:
        raise UserError(_unclear(unclear, set(), found, {**seen, **inside}, dataset_name))
    return {name: options[0] for name, options in found.items() if options and options[0] != columns.get(name)}


def _matching(seen: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    return [column for column in seen if plain_name(column) in names]


def taken_text(guessed: Mapping[str, str]) -> str:
    """What was taken for what, and how to set it otherwise: one line. Nothing of columns that have our names, but
    for `input`, which becomes a part of the prompt."""
    others = {name: column for name, column in guessed.items() if name != column or name == "input"}
    pairs = ", ".join(f"{column} as {name}" for name, column in others.items())
    settings = " ".join(f"data.columns.{name}=..." for name in others)
    return f"columns taken by their names: {pairs}; set {settings} for others" if others else ""


def _is_there(name: str, seen: Mapping[str, Any], columns: Mapping[str, str | None]) -> bool:
    return is_mapped(name, columns.get(name)) or (columns.get(name) or name) in seen


def _options(name: str, seen: Mapping[str, Any], taken: set[str]) -> list[str]:
    known = {name, *OTHER_NAMES[name]} - {"chosen"} if name == "response" else {name, *OTHER_NAMES[name]}
    return [column for column in seen if plain_name(column) in known and column not in taken]


def plain_name(column: Any) -> str:
    """A column's name in lower case with underscores: "Chosen Answer" is chosen_answer."""
    return re.sub(r"[\s-]+", "_", str(column).strip().lower())


def _hold_the_prompt(seen: Mapping[str, Any], columns: Mapping[str, str | None]) -> bool:
    """Whether both sides are conversations, or dialogues as text, that begin with the prompt themselves."""
    sides = [seen.get(columns.get(name) or name) for name in ("chosen", "rejected")]
    if all(isinstance(side, list) and side and isinstance(side[0], dict) for side in sides):
        return sides[0][0] == sides[1][0] and sides[0][0].get("role") != "assistant"
    return all(isinstance(side, str) and side.lstrip().startswith("Human:") for side in sides)


def _unclear(unclear, lacking, options, seen, dataset_name) -> str:
    """The message for columns that may mean the same, with all columns and a line that maps them."""
    found = "; ".join(f"{' and '.join(columns)} may each be the {name}" for name, columns in sorted(unclear.items()))
    names = dict.fromkeys((*PAIR, *UNPAIRED))
    example = " ".join(f"data.columns.{name}={options[name][0]}" for name in names if name in lacking and options[name])
    example = example or " ".join(f"data.columns.{name}={columns[0]}" for name, columns in unclear.items())
    names = ", ".join(map(str, seen)).encode("utf-8", "backslashreplace").decode("utf-8")
    return (
        f"{dataset_name}: the columns are not clear: {found}; found the columns [{names[:400]}] (DATA-108). Name them, "
        f"for example {example}."
    )


def hint_for_all(row: dict, name: str, rules: RowRules) -> str | None:
    """The settings that map every column of a pair, if the row has other names for all of them that it lacks."""
    lacking = [other for other in PAIR if rules.column(other) not in row]
    named = {other: next((key for key in row if plain_name(key) in OTHER_NAMES[other]), None) for other in lacking}
    if name not in lacking or len(lacking) < 2 or None in named.values() or len(set(named.values())) < len(lacking):
        return None
    more = next((key for key in ("input", "context") if key in row and key not in named.values()), None)
    settings = [f"data.columns.{other}={key}" for other, key in named.items()]
    settings += [f"data.columns.input={more}"] if more and "prompt" in named and not rules.columns.get("input") else []
    return f"Set {' '.join(settings)}."


def hint_for(row: dict, name: str, rules: RowRules) -> str:
    """What to do about a column that a row lacks."""
    guess = next((key for key in row if plain_name(key) in OTHER_NAMES.get(name, ())), None)
    guess = name if name in row else guess or nearest(rules.column(name), map(str, row))
    chosen = row.get(rules.column("chosen"))
    if guess is None and name == "prompt" and isinstance(chosen, str):
        return hint_for_texts(chosen)
    if guess is None and name == "prompt" and isinstance(chosen, list):
        return "Add the field, or set data.format=implicit where chosen and rejected hold the prompt as messages."
    if guess is None:
        return f"Add the field, or set data.columns.{name}."
    more = next((key for key in ("input", "context") if key in row and key != guess), None)
    if name == "prompt" and more and not rules.columns.get("input"):
        return f"Set data.columns.prompt={guess} and data.columns.input={more}, which joins the two."
    return f"Set data.columns.{name}={guess}."


def hint_for_texts(chosen: str) -> str:
    """What to do about texts without a prompt: only marked turns show where it ends."""
    if chosen.startswith("\n\nHuman:"):
        return "These are dialogues of Anthropic/hh-rlhf: use data=hh_rlhf."
    return (
        "Give the prompt a field of its own, or name it by data.columns.prompt. Where chosen and rejected begin with "
        "the prompt, move it there: text does not show where it ends. For answers to no prompt at all write an empty "
        "one into each row and set data.allow_empty_prompt=true."
    )


OTHER_NAMES: dict[str, Sequence[str]] = {
    "prompt": (
        *("question", "instruction", "input", "query", "problem", "prompts", "context", "user_prompt", "user_input"),
        *("user_query", "instructions"),
    ),
    "chosen": (
        *("chosen_response", "preferred", "accepted", "positive", "response_chosen", "better", "winner", "choosen"),
        *("response_j", "output", "good", "accept", "chosen_answer", "chosen_output", "chosen_text", "answer_chosen"),
        *("preferred_response", "preferred_answer", "preferred_output", "accepted_response", "better_response"),
        *("good_response", "win", "y_w"),
    ),
    "rejected": (
        *("rejected_response", "dispreferred", "negative", "response_rejected", "worse", "loser", "reject"),
        *("response_k", "rejected_output", "bad", "rejected_answer", "rejected_text", "answer_rejected"),
        *("dispreferred_response", "non_preferred", "rejected_completion", "worse_response", "bad_response", "lose"),
        *("y_l",),
    ),
    "candidates": ("solutions", "outputs", "completions", "responses", "generations"),
    "candidate": ("output", "completion", "response", "solution", "generation"),
    "answer": ("gold", "target", "label", "ground_truth"),
    "response": ("answer", "output", "completion", "target", "solution", "chosen"),
    "completion": (
        *("response", "answer", "output", "generation", "reply", "completion_text", "response_text", "model_output"),
        *("model_response", "assistant_response", "bot_response"),
    ),
    "label": (
        *(
            "labels",
            "kto_tag",
            "thumbs",
            "thumb",
            "thumbs_up",
            "feedback",
            "vote",
            "is_good",
            "is_desirable",
            "desirable",
        ),
        *("liked", "is_positive", "rating", "score", "stars"),
    ),
}
LISTS = ("candidates", *OTHER_NAMES["candidates"], "answers")  # columns of several answers to one prompt
SCORES = ("scores", "score", "ratings", "rating", "rewards", "reward", "overall_score")
RANKS = ("ranks", "rank", "rankings", "ranking")
SCORES_OF = {
    f"score_{side}": [f"{word}_{side}" for word in SCORES] + [f"{side}_{word}" for word in SCORES]
    for side in ("chosen", "rejected")
}
