"""From the fields of a row to a PreferencePair or an Example: shapes of rows, and the checks on their texts.

A shape is a function (row, rules, warn) -> (prompt, chosen, rejected); SHAPES lists them. Each refuses what it
cannot understand by raising RowError with the field, what was found, what was expected and what to do.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from laddpo.errors import nearest
from laddpo.preference.reading.bad_rows import RowError
from laddpo.preference.reading.guesses import OTHER_NAMES, hint_for, hint_for_all, hint_for_texts
from laddpo.preference.reading.pairs import (
    FIRST_ROLES,
    ROLES,
    Message,
    Prompt,
    fold,
    split_row_values,
    with_row_values,
)
from laddpo.preference.reading.texts import FIX, check_text, is_blank, kind_of
from laddpo.preference.reading.tools import refuse_order, response_text, row_values, turn_extra
from laddpo.preference.reading.unread import is_empty, refuse_stored_messages, refuse_unread_keys

Warn = Callable[[str], None]


@dataclass(frozen=True)
class RowRules:
    """How rows are understood: which column holds what, and which doubtful rows are accepted.

    `columns` maps our names (prompt, input, chosen, rejected, completion, label, response, system, answer, candidates,
    candidate) to the data's.
    """

    columns: Mapping[str, str | None] = field(default_factory=dict)
    allow_empty_prompt: bool = False
    allow_nul: bool = False

    def column(self, name: str) -> str:
        return self.columns.get(name) or name


def explicit_pair(row: dict, rules: RowRules, warn: Warn) -> tuple[Prompt, str, str]:
    """Columns prompt, chosen, rejected: all text, or all lists of messages.

    A response in messages is one assistant turn, or the whole conversation, which must then begin with the prompt.
    """
    if len({isinstance(get_field(row, name, rules), str) for name in ("prompt", "chosen", "rejected")}) > 1:
        answers, column = get_field(row, "rejected", rules), rules.column("rejected")
        if answers == []:
            raise RowError("DATA-12", column, "is an empty list, want at least one answer", FIX)
        if isinstance(answers, list) and None in answers:
            raise RowError("DATA-04", f"{column}[{answers.index(None)}]", "is null", FIX)
        problem = "text and lists of messages are mixed in one row"
        advice = "Set data.format=conversation, which reads both, or give all three as text or all three as messages."
        raise RowError("DATA-58", "", problem, advice)
    return conversation_pair(row, rules, warn)


def auto_pair(row: dict, rules: RowRules, warn: Warn) -> tuple[Prompt, str, str]:
    """As explicit_pair; without a prompt column, two conversations that begin with the same turn hold it themselves."""
    sides = [row.get(rules.column(name)) for name in ("chosen", "rejected")]
    has_prompt = rules.column("prompt") != "prompt" or "prompt" in row
    if not has_prompt and all(isinstance(side, list) and side and isinstance(side[0], dict) for side in sides):
        first, other = ([side[0].get(key) for key in ("role", "content")] for side in sides)
        if first == other and first[0] != "assistant":
            return implicit_pair(row, rules, warn)
    return explicit_pair(row, rules, warn)


def conversation_pair(row: dict, rules: RowRules, warn: Warn) -> tuple[Prompt, str, str]:
    """As explicit_pair, but a prompt given as text may go with conversations that begin with it (UltraFeedback)."""
    prompt, *responses = (get_field(row, name, rules) for name in ("prompt", "chosen", "rejected"))
    messages = as_prompt(row, prompt, rules, warn)
    chosen, rejected = (
        as_response(value, name, messages, rules, warn)
        for name, value in zip(("chosen", "rejected"), responses, strict=True)
    )
    return messages, *different(chosen, rejected, warn)


def implicit_pair(row: dict, rules: RowRules, warn: Warn) -> tuple[Prompt, str, str]:
    """Columns chosen and rejected, both whole conversations: the prompt is all but the last turn, equal in both."""
    sides = {}
    for name in ("chosen", "rejected"):
        value = get_field(row, name, rules)
        if isinstance(value, str):
            problem = "is text; without a prompt column a list of messages is expected"
            raise RowError("DATA-67", name, problem, hint_for_texts(value))
        sides[name] = read_messages(value, name, rules, warn)
    if mapped_text(row, "input", rules, warn) is not None:
        refuse_input(rules, "chosen and rejected hold the prompt")
    prompt, chosen, rejected = split_at_last_turn(sides["chosen"], sides["rejected"], warn)
    return with_system(row, prompt, rules, warn), chosen, rejected


def hh_pair(row: dict, rules: RowRules, warn: Warn) -> tuple[Prompt, str, str]:
    """Columns chosen and rejected, both whole dialogues "\\n\\nHuman: …\\n\\nAssistant: …" (Anthropic/hh-rlhf).

    Split at the last assistant turn of the dialogues, never at the first differing character.
    """
    sides = {}
    for name in ("chosen", "rejected"):
        text = get_field(row, name, rules)
        if not isinstance(text, str):
            raise RowError("DATA-12", name, "is not text, want a whole dialogue", "Use data=jsonl for messages.")
        check_text(text, name, rules, warn)
        sides[name] = read_dialogue(text, name)
    if any(a.role == b.role for a, b in zip(sides["chosen"], sides["chosen"][1:], strict=False)):
        warn("dialogues with two turns of one speaker in a row, kept as they are")
    prompt, chosen, rejected = split_at_last_turn(sides["chosen"], sides["rejected"], warn)
    return with_system(row, prompt, rules, warn), chosen, rejected


def explicit_example(row: dict, rules: RowRules, warn: Warn) -> tuple[Prompt, str]:
    """Columns prompt and response, both text or both messages: a row of an SFT corpus."""
    prompt, response = get_field(row, "prompt", rules), get_field(row, "response", rules)
    messages = as_prompt(row, prompt, rules, warn)
    return messages, as_response(response, "response", messages, rules, warn)


def as_prompt(row: dict, value: Any, rules: RowRules, warn: Warn) -> Prompt:
    """Text becomes one user message, with the text of the input column behind it; messages must end with the user. A
    system column becomes the first message. Both columns are read only where they are mapped."""
    if isinstance(value, str):
        check_text(value, "prompt", rules, warn)
        more = mapped_text(row, "input", rules, warn)
        prompt: Prompt = (Message("user", value if more is None else f"{value}\n\n{more}"),)
    else:
        prompt = read_messages(value, "prompt", rules, warn)
        if prompt[-1].role not in ("user", "tool"):
            problem = f"ends with a {prompt[-1].role} turn, want a user turn"
            raise RowError("DATA-65", "prompt", problem, "Move the last turn into chosen and rejected.")
        if mapped_text(row, "input", rules, warn) is not None:
            refuse_input(rules, "the prompt is a list of messages")
    return with_system(row, prompt, rules, warn)


def with_system(row: dict, prompt: Prompt, rules: RowRules, warn: Warn) -> Prompt:
    """The prompt behind the text of the system column, if that is mapped and the row has one; with the tools and the
    template's variables that the row has."""
    values = row_values(row, rules, warn)
    system = mapped_text(row, "system", rules, warn)
    if system is None:
        return with_row_values(prompt, values)
    if prompt and prompt[0].role in FIRST_ROLES:
        problem = "has a text, and the messages begin with a system turn too: which of them counts cannot be known"
        advice = "Set data.columns.system=null to keep the turn, or remove the turn."
        raise RowError("DATA-103", rules.column("system"), problem, advice)
    return with_row_values((Message("system", system), *prompt), values)


def mapped_text(row: dict, name: str, rules: RowRules, warn: Warn) -> str | None:
    """The text of a column that is read only where it is mapped. None: not mapped, or empty, which is counted."""
    column = rules.columns.get(name)
    if not column:
        return None
    value = row.get(column)
    if value is None or (isinstance(value, str) and is_blank(value)):
        warn(f"rows without a text in {column!r} (data.columns.{name})")
        return None
    if not isinstance(value, str):
        raise RowError("DATA-12", column, f"is {kind_of(value)}, want text (data.columns.{name})", FIX)
    check_text(value, name, rules, warn)
    return value


def refuse_input(rules: RowRules, why: str) -> None:
    """Raise RowError: the input column needs a text of a prompt before it."""
    advice = "Set data.columns.input=null, or write its text into the last user turn."
    raise RowError("DATA-58", rules.column("input"), f"cannot be joined to the prompt: {why}", advice)


def one_pair_each(row: dict, rules: RowRules, warn: Warn) -> list[dict]:
    """The row once for each of its rejected answers, when it has a list of them: texts, or lists of messages."""
    column = rules.column("rejected")
    answers = row.get(column)
    is_list = isinstance(answers, list) and bool(answers)
    if not is_list or not any(all(isinstance(answer, kind) for answer in answers) for kind in (str, list)):
        return [row]
    warn(MANY)
    return [{**row, column: answer} for answer in answers]


def as_response(value: Any, name: str, prompt: Prompt, rules: RowRules, warn: Warn) -> str:
    """Text as it is, or the content of the one assistant turn that follows the prompt."""
    if isinstance(value, str):
        check_text(value, name, rules, warn)
        return value
    messages, (prompt, _) = read_messages(value, name, rules, warn, is_response=True), split_row_values(prompt)
    if messages[0].role != "assistant":
        is_whole = messages[0].role in FIRST_ROLES
        shown = prompt if is_whole else tuple(m for m in prompt if m.role not in FIRST_ROLES)
        for index, expected in enumerate(shown):
            if index >= len(messages) or messages[index] != expected:
                problem = f"starts with a {messages[0].role} turn but differs from the prompt at message {index + 1}"
                raise RowError("DATA-66", name, problem, "Give one assistant turn, or the prompt followed by it.")
        messages = messages[len(shown) :]
    if len(messages) != 1 or messages[0].role != "assistant":
        problem = f"has {len(messages)} turns after the prompt, want one assistant turn"
        raise RowError("DATA-68", name, problem, "Move all turns but the last into the prompt.")
    return response_text(messages[0])


def split_at_last_turn(chosen: Prompt, rejected: Prompt, warn: Warn) -> tuple[Prompt, str, str]:
    """Whole conversations into prompt and responses; the prompts must be equal."""
    for name, messages in (("chosen", chosen), ("rejected", rejected)):
        last_answer(messages, name)
        if len(messages) < 2:
            raise RowError("DATA-67", name, "has no turn before the response", "A dialogue starts with the user.")
    if chosen[:-1] != rejected[:-1]:
        pairs = zip(chosen[:-1], rejected[:-1], strict=False)
        index = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(chosen), len(rejected)) - 1)
        problem = f"the dialogues differ at message {index + 1}, before the last assistant turn"
        raise RowError("DATA-66", "", problem, "A pair is two answers to one prompt; this row is two dialogues.")
    return chosen[:-1], *different(response_text(chosen[-1]), response_text(rejected[-1]), warn)


def last_answer(messages: Prompt, name: str) -> str:
    """The text of the last turn, which must be the assistant's and must have one."""
    role, text = messages[-1].role, response_text(messages[-1])
    if role != "assistant":
        problem = f"ends with a {role} turn, want an assistant turn"
        raise RowError("DATA-65", name, problem, "Cut the dialogue after its last assistant turn.")
    if is_blank(text):
        raise RowError("DATA-07", name, "empty after strip: the last assistant turn has no text", FIX)
    return text


def different(chosen: str, rejected: str, warn: Warn) -> tuple[str, str]:
    """Both responses, which must not be the same text; warns where only spacing or normal form tells them apart."""
    if chosen == rejected:
        raise RowError("DATA-09", "rejected", "is the same as chosen: no preference", "Remove the row.")
    if fold(chosen) == fold(rejected):
        warn("pairs whose responses differ only in white space or Unicode normal form")
    if chosen.lstrip().startswith("<think>") or rejected.lstrip().startswith("<think>"):
        warn("pairs with a response that begins with <think>: the reasoning is learned as part of it")
    return chosen, rejected


def read_dialogue(text: str, name: str) -> Prompt:
    """The turns of "\\n\\nHuman: Hi\\n\\nAssistant: Hello": contents are stripped, an empty one is kept."""
    before, *turns = re.split(r"\n\n(Human|Assistant):", text)
    if before.strip() or not turns or turns[0] != "Human":
        problem = f"starts with {text[:30]!r}, want a dialogue that starts with '\\n\\nHuman:'"
        raise RowError("DATA-64", name, problem, "Use data=jsonl for rows that are not dialogues in this form.")
    roles = {"Human": "user", "Assistant": "assistant"}
    return tuple(
        Message(roles[speaker], content.strip()) for speaker, content in zip(turns[::2], turns[1::2], strict=True)
    )


def read_messages(value: Any, name: str, rules: RowRules, warn: Warn, is_response: bool = False) -> Prompt:
    """A checked list of messages: [{"role": "user", "content": "…"}, …], users and assistants in turn."""
    if not isinstance(value, list):
        raise RowError("DATA-12", name, f"is {kind_of(value)}, want text or a list of messages", FIX)
    if not value:
        raise RowError("DATA-60", name, "is an empty list of messages", FIX)
    messages = []
    for index, message in enumerate(value):
        place = f"{name}[{index}]"
        calls = (
            isinstance(message, dict) and message.get("role") == "assistant" and not is_empty(message.get("tool_calls"))
        )
        if not isinstance(message, dict) or "role" not in message or ("content" not in message and not calls):
            found = (
                f"has the keys {sorted(map(str, message))}" if isinstance(message, dict) else f"is {kind_of(message)}"
            )
            hint = "Rename from/value to role/content." if isinstance(message, dict) and "value" in message else FIX
            raise RowError("DATA-61", place, f"{found}, want an object with role and content", hint)
        role = message["role"]
        if role not in ROLES:
            meant = ROLE_NAMES.get(str(role).lower()) or nearest(str(role), ROLES) or "user"
            hint = f"Did you mean {meant}?"
            raise RowError("DATA-63", f"{place}.role", f"is {role!r}, want one of {', '.join(ROLES)}", hint)
        extra = turn_extra(message, place, rules, warn)
        content = message.get("content")
        if not calls or not is_empty(content):  # a turn that calls tools may say nothing
            content = join_parts(content, f"{place}.content", warn)
            check_text(content, f"{place}.content", rules, warn)
        messages.append(Message(role, content or "", extra))
    refuse_order(messages, name, is_response=is_response)
    return tuple(messages)


def join_parts(content: Any, place: str, warn: Warn) -> str:
    """Text, or the text parts of a message joined; images and other parts are refused."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RowError("DATA-12", place, f"is {kind_of(content)}, want text", FIX)
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, dict) and part.get("type", "text") == "text" else None
        if not isinstance(text, str):
            raise RowError("DATA-62", place, "has a part that is not text", "Only text parts can be used.")
        refuse_unread_keys(part, ("type", "text"), place, warn)
        texts.append(text)
    return "".join(texts)


def get_field(row: dict, name: str, rules: RowRules) -> Any:
    """The value of one of our columns, which must be there and be text or a list."""
    column = rules.column(name)
    if column not in row:
        if name in ("chosen", "rejected") and "label" in row and any(key in row for key in OTHER_NAMES["candidate"]):
            raise RowError("DATA-105", "", "has one answer and a label, not chosen and rejected", UNPAIRED)
        found = ", ".join(str(key) for key in list(row)[:20])
        problem = f"field missing; found the fields [{found[:200]}]"
        raise RowError("DATA-01", column, problem, hint_for_all(row, name, rules) or hint_for(row, name, rules))
    value = row[column]
    if value is None:
        raise RowError("DATA-04", column, "is null", FIX)
    if isinstance(value, bool):
        raise RowError("DATA-13", column, f"is {kind_of(value)}, want text or a list of messages", FIX)
    if not isinstance(value, (str, list)):
        raise RowError("DATA-12", column, f"is {kind_of(value)}, want text or a list of messages", FIX)
    if isinstance(value, str):
        refuse_stored_messages(value, column)
    elif value and name != "candidates" and all(isinstance(text, str) for text in value):
        problem = "is a list of texts, want text or a list of messages"
        raise RowError("DATA-12", column, problem, "Give one text. Only rejected may be a list of several answers.")
    return value


MANY = "rows with a list of rejected answers, each of which makes a pair"
UNPAIRED = (
    "Rows with a label are read by data.format=unpaired and trained on by dpo.loss=kto. Keep them and pairs in files "
    "of their own; data=mixture reads both."
)
ROLE_NAMES = {
    "human": "user",
    "function": "tool",
    **dict.fromkeys(("bot", "gpt", "model", "ai"), "assistant"),
}
SHAPES: dict[str, Callable[[dict, RowRules, Warn], tuple[Prompt, str, str]]] = {
    "auto": auto_pair,
    "explicit": explicit_pair,
    "conversation": conversation_pair,
    "implicit": implicit_pair,
    "hh_rlhf": hh_pair,
}
WITHOUT_PROMPT = ("implicit", "hh_rlhf")  # shapes whose chosen and rejected hold the prompt
