"""From the fields of a row to a PreferencePair or an Example: shapes of rows, and the checks on their texts.

A shape is a function (row, columns, rules, warn) -> (prompt, chosen, rejected); SHAPES lists them. Each refuses what it
cannot understand by raising RowError with the field, what was found, what was expected and what to do.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from laddpo.errors import nearest
from laddpo.preference.badrows import RowError
from laddpo.preference.pairs import ROLES, Message, Prompt, fold

Warn = Callable[[str], None]


@dataclass(frozen=True)
class RowRules:
    """How rows are understood: which column holds what, and which doubtful rows are accepted.

    `columns` maps our names (prompt, chosen, rejected, response, system, answer, candidates, candidate) to the data's.
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
    prompt, responses = (
        get_field(row, "prompt", rules),
        [get_field(row, name, rules) for name in ("chosen", "rejected")],
    )
    kinds = {isinstance(value, str) for value in (prompt, *responses)}
    if len(kinds) > 1:
        problem = "text and lists of messages are mixed in one row"
        raise RowError("DATA-58", "", problem, "Give all three as text or all three as messages.")
    return joined_pair(row, prompt, responses, rules, warn)


def auto_pair(row: dict, rules: RowRules, warn: Warn) -> tuple[Prompt, str, str]:
    """As explicit_pair; without a prompt column, two conversations that begin with the same turn hold it themselves."""
    sides = [row.get(rules.column(name)) for name in ("chosen", "rejected")]
    has_prompt = rules.column("prompt") != "prompt" or "prompt" in row
    if not has_prompt and all(isinstance(side, list) and side for side in sides) and sides[0][0] == sides[1][0]:
        first = sides[0][0]
        if isinstance(first, dict) and first.get("role") != "assistant":
            return implicit_pair(row, rules, warn)
    return explicit_pair(row, rules, warn)


def conversation_pair(row: dict, rules: RowRules, warn: Warn) -> tuple[Prompt, str, str]:
    """As explicit_pair, but a prompt given as text may go with conversations that begin with it (UltraFeedback)."""
    prompt, responses = (
        get_field(row, "prompt", rules),
        [get_field(row, name, rules) for name in ("chosen", "rejected")],
    )
    return joined_pair(row, prompt, responses, rules, warn)


def implicit_pair(row: dict, rules: RowRules, warn: Warn) -> tuple[Prompt, str, str]:
    """Columns chosen and rejected, both whole conversations: the prompt is all but the last turn, equal in both."""
    sides = {}
    for name in ("chosen", "rejected"):
        value = get_field(row, name, rules)
        if isinstance(value, str):
            problem = "is text; without a prompt column a list of messages is expected"
            raise RowError("DATA-67", name, problem, hint_for_texts(value))
        sides[name] = read_messages(value, name, rules, warn)
    return split_at_last_turn(sides["chosen"], sides["rejected"], warn)


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
    return split_at_last_turn(sides["chosen"], sides["rejected"], warn)


def explicit_example(row: dict, rules: RowRules, warn: Warn) -> tuple[Prompt, str]:
    """Columns prompt and response, both text or both messages: a row of an SFT corpus."""
    prompt, response = get_field(row, "prompt", rules), get_field(row, "response", rules)
    messages = as_prompt(row, prompt, rules, warn)
    return messages, as_response(response, "response", messages, rules, warn)


def joined_pair(row: dict, prompt: Any, responses: list, rules: RowRules, warn: Warn) -> tuple[Prompt, str, str]:
    messages = as_prompt(row, prompt, rules, warn)
    chosen, rejected = (
        as_response(value, name, messages, rules, warn)
        for name, value in zip(("chosen", "rejected"), responses, strict=True)
    )
    return messages, *different(chosen, rejected, warn)


def as_prompt(row: dict, value: Any, rules: RowRules, warn: Warn) -> Prompt:
    """Text becomes one user message; messages must end with the user. A system column, if mapped, goes in front."""
    if isinstance(value, str):
        check_text(value, "prompt", rules, warn)
        prompt: Prompt = (Message("user", value),)
    else:
        prompt = read_messages(value, "prompt", rules, warn)
        if prompt[-1].role != "user":
            problem = f"ends with a {prompt[-1].role} turn, want a user turn"
            raise RowError("DATA-65", "prompt", problem, "Move the last turn into chosen and rejected.")
    system = row.get(rules.columns.get("system") or "")
    if isinstance(system, str) and not is_blank(system):
        check_text(system, "system", rules, warn)
        prompt = (Message("system", system), *prompt)
    return prompt


def as_response(value: Any, name: str, prompt: Prompt, rules: RowRules, warn: Warn) -> str:
    """Text as it is, or the content of the one assistant turn that follows the prompt."""
    if isinstance(value, str):
        check_text(value, name, rules, warn)
        return value
    messages = read_messages(value, name, rules, warn, is_response=True)
    if messages[0].role != "assistant":
        shown = prompt if messages[0].role == "system" else tuple(m for m in prompt if m.role != "system")
        for index, expected in enumerate(shown):
            if index >= len(messages) or messages[index] != expected:
                problem = f"starts with a {messages[0].role} turn but differs from the prompt at message {index + 1}"
                raise RowError("DATA-66", name, problem, "Give one assistant turn, or the prompt followed by it.")
        messages = messages[len(shown) :]
    if len(messages) != 1 or messages[0].role != "assistant":
        problem = f"has {len(messages)} turns after the prompt, want one assistant turn"
        raise RowError("DATA-68", name, problem, "Move all turns but the last into the prompt.")
    return messages[0].content


def split_at_last_turn(chosen: Prompt, rejected: Prompt, warn: Warn) -> tuple[Prompt, str, str]:
    """Whole conversations into prompt and responses; the prompts must be equal."""
    for name, messages in (("chosen", chosen), ("rejected", rejected)):
        if messages[-1].role != "assistant":
            problem = f"ends with a {messages[-1].role} turn, want an assistant turn"
            raise RowError("DATA-65", name, problem, "Cut the dialogue after its last assistant turn.")
        if len(messages) < 2:
            raise RowError("DATA-67", name, "has no turn before the response", "A dialogue starts with the user.")
        if is_blank(messages[-1].content):
            raise RowError("DATA-07", name, "empty after strip: the last assistant turn has no text", FIX)
    if chosen[:-1] != rejected[:-1]:
        pairs = zip(chosen[:-1], rejected[:-1], strict=False)
        index = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(chosen), len(rejected)) - 1)
        problem = f"the dialogues differ at message {index + 1}, before the last assistant turn"
        raise RowError("DATA-66", "", problem, "A pair is two answers to one prompt; this row is two dialogues.")
    return chosen[:-1], *different(chosen[-1].content, rejected[-1].content, warn)


def different(chosen: str, rejected: str, warn: Warn) -> tuple[str, str]:
    """Both responses, which must not be the same text; warns where only spacing or normal form tells them apart."""
    if chosen == rejected:
        raise RowError("DATA-09", "rejected", "is the same as chosen: no preference", "Remove the row.")
    if fold(chosen) == fold(rejected):
        warn("pairs whose responses differ only in white space or Unicode normal form")
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
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            found = f"has the keys {sorted(message)}" if isinstance(message, dict) else f"is {kind_of(message)}"
            hint = "Rename from/value to role/content." if isinstance(message, dict) and "value" in message else FIX
            raise RowError("DATA-61", place, f"{found}, want an object with role and content", hint)
        role, content = message["role"], join_parts(message["content"], f"{place}.content")
        if role not in ROLES:
            meant = ROLE_NAMES.get(str(role).lower()) or nearest(str(role), ROLES) or "user"
            problem = f"is {role!r}, want one of {', '.join(ROLES)}"
            raise RowError("DATA-63", f"{place}.role", problem, f"Did you mean {meant}?")
        check_text(content, f"{place}.content", rules, warn)
        messages.append(Message(role, content))
    spoken = [message.role for message in messages if message.role != "system"]
    first = 1 if is_response and spoken[:1] == ["assistant"] else 0
    wanted = [("user", "assistant")[(index + first) % 2] for index in range(len(spoken))]
    system_later = any(message.role == "system" for message in messages[1:])
    if spoken != wanted or system_later or not spoken:
        roles = ", ".join(message.role for message in messages)
        problem = f"has its turns in the order {roles}; want an optional system turn, then user and assistant in turn"
        raise RowError("DATA-64", name, problem, FIX)
    return tuple(messages)


def join_parts(content: Any, place: str) -> str:
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
        texts.append(text)
    return "".join(texts)


def get_field(row: dict, name: str, rules: RowRules) -> Any:
    """The value of one of our columns, which must be there and be text or a list."""
    column = rules.column(name)
    if column not in row:
        guess = next((key for key in row if str(key).lower() in OTHER_NAMES.get(name, ())), None)
        guess = name if name in row else guess
        hint = f"Set data.columns.{name}={guess}." if guess else f"Add the field, or set data.columns.{name}."
        chosen = row.get(rules.column("chosen"))
        if name == "prompt" and guess is None and isinstance(chosen, str):
            hint = hint_for_texts(chosen)
        elif name == "prompt" and guess is None and isinstance(chosen, list):
            hint = "Add the field, or set data.format=implicit where chosen and rejected hold the prompt as messages."
        found = ", ".join(str(key) for key in list(row)[:20])
        raise RowError("DATA-01", column, f"field missing; found the fields [{found[:200]}]", hint)
    value = row[column]
    if value is None:
        raise RowError("DATA-04", column, "is null", FIX)
    if isinstance(value, bool):
        raise RowError("DATA-13", column, f"is {kind_of(value)}, want text or a list of messages", FIX)
    if not isinstance(value, (str, list)):
        raise RowError("DATA-12", column, f"is {kind_of(value)}, want text or a list of messages", FIX)
    return value


def hint_for_texts(chosen: str) -> str:
    """What to do about texts without a prompt: only marked turns show where it ends."""
    if chosen.startswith("\n\nHuman:"):
        return "These are dialogues of Anthropic/hh-rlhf: use data=hh_rlhf."
    return (
        "Give the prompt a field of its own, or name it by data.columns.prompt. Where chosen and rejected begin with "
        "the prompt, move it there: text does not show where it ends."
    )


def check_text(text: str, name: str, rules: RowRules, warn: Warn) -> None:
    """Refuse text that cannot be meant or cannot be encoded; count what is only doubtful."""
    is_prompt = name.split("[")[0] in ("prompt", "system")
    if not text:
        if is_prompt and rules.allow_empty_prompt:
            return
        raise RowError("DATA-05" if is_prompt else "DATA-07", name, "is empty", FIX)
    if is_blank(text):
        code = "DATA-08" if is_prompt else "DATA-07"
        raise RowError(code, name, "empty after strip: only white space or invisible characters", FIX)
    if text.isascii() and "\x00" not in text:
        return
    if "\x00" in text and not rules.allow_nul:
        raise RowError("DATA-28", name, f"has the character NUL at {text.index(chr(0))}", "Remove it.")
    if half := _SURROGATES.search(text):
        problem = f"has half of a surrogate pair, {half.group()!a}, at character {half.start()}"
        raise RowError("DATA-29", name, problem, "Write the whole pair, or the character itself.")
    if _DOUBTFUL.search(text):
        for message, pattern in DOUBTFUL.items():
            if pattern.search(text):
                warn(message)
    if not unicodedata.is_normalized("NFC", text):
        warn("texts that are not in Unicode normal form C, kept as they are")


def is_blank(text: str) -> bool:
    """Whether nothing would be seen: white space, zero-width characters, byte order marks, soft hyphens."""
    return not any(map(_is_visible, text))


def _is_visible(character: str) -> bool:
    return not character.isspace() and character not in _INVISIBLE


def kind_of(value: Any) -> str:
    """A value's kind in the words of JSON, with the value where it is short."""
    kinds = {type(None): "null", bool: "a boolean", int: "an int", float: "a float", str: "text", list: "a list"}
    kind = kinds.get(type(value), "an object" if isinstance(value, dict) else f"a {type(value).__name__}")
    shown = str(value)[:40] if isinstance(value, (bool, int, float)) else ""
    return f"{kind} ({shown})" if shown else kind


FIX = "Fix the row or set data.on_bad_row=skip."
OTHER_NAMES = {
    "prompt": ("question", "instruction", "input", "query", "problem", "prompts", "context"),
    "chosen": (
        "chosen_response",
        "preferred",
        "accepted",
        "positive",
        "response_chosen",
        "better",
        "winner",
        "choosen",
    ),
    "rejected": ("rejected_response", "dispreferred", "negative", "response_rejected", "worse", "loser", "reject"),
    "candidates": ("solutions", "outputs", "completions", "responses", "generations"),
    "candidate": ("output", "completion", "response", "solution", "generation"),
    "answer": ("gold", "target", "label", "ground_truth"),
    "response": ("answer", "output", "completion", "target", "solution", "chosen"),
}
ROLE_NAMES = {"human": "user", "bot": "assistant", "gpt": "assistant", "model": "assistant", "ai": "assistant"}
_INVISIBLE = "\u200b\u200c\u200d\u2060\ufeff\u00ad\u180e \t\r\n\u00a0"
_SURROGATES = re.compile("[\ud800-\udfff]")
DOUBTFUL = {
    "texts with U+FFFD, which an earlier bad decoding leaves": re.compile("\ufffd"),
    "texts with private-use characters or noncharacters": re.compile(
        "[\ue000-\uf8ff\ufdd0-\ufdef\ufffe\uffff\U000f0000-\U0010ffff]"
    ),
    "texts with look-alikes of special tokens, which they are not": re.compile(
        "＜[|｜]|<｜|[|｜]＞|｜>|<[\u200b-\u200d\u2060]+[|]|<[|]\\w*[\u200b-\u200d\u2060]\\w*[|]>"
    ),
    "texts with bidirectional control characters": re.compile("[\u202a-\u202e\u2066-\u2069]"),
}
_DOUBTFUL = re.compile("|".join(pattern.pattern for pattern in DOUBTFUL.values()))
SHAPES: dict[str, Callable[[dict, RowRules, Warn], tuple[Prompt, str, str]]] = {
    "auto": auto_pair,
    "explicit": explicit_pair,
    "conversation": conversation_pair,
    "implicit": implicit_pair,
    "hh_rlhf": hh_pair,
}
