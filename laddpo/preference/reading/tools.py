"""Tools in a row: the columns `tools` and `chat_template_kwargs`, calls of tools in messages, and the order of turns.

Everything is brought into one form, that of OpenAI and transformers: a call is {"type": "function", "function":
{"name": ..., "arguments": {...}}}, with its `id` if it has one. A value may be given as JSON text, as files with
columns of one type hold it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from laddpo.preference.reading.bad_rows import RowError
from laddpo.preference.reading.pairs import FIRST_ROLES, OF_ROW, Message, extra_of
from laddpo.preference.reading.strict_json import parse_value
from laddpo.preference.reading.texts import FIX, check_text, is_blank, kind_of
from laddpo.preference.reading.unread import is_empty, refuse_unread_keys

if TYPE_CHECKING:
    from laddpo.preference.reading.rows import RowRules

Warn = Callable[[str], None]
TOOLS, KWARGS = OF_ROW
GIVEN = ("messages", "tools", "add_generation_prompt")  # what a template is given by itself
KEYS_OF_ROLE = {"assistant": ("tool_calls",), "tool": ("tool_call_id", "name")}  # beside role and content
CALL_MARK = "\ufdd0"  # begins a response that is no text yet: a code point that no text may hold
CALL_FORM = 'Write each call as {"type": "function", "function": {"name": ..., "arguments": {...}}}.'
TOOL_FORM = 'Give a list such as [{"type": "function", "function": {"name": ..., "parameters": {...}}}].'


def row_values(row: Mapping[str, Any], rules: RowRules, warn: Warn) -> dict[str, Any]:
    """What a row gives its template beside the messages: `tools` and `chat_template_kwargs`, as far as it has them."""
    found = {}
    if not is_empty(row.get(TOOLS)) and (tools := _value(row[TOOLS], TOOLS, TOOL_FORM, warn)) is not None:
        tools = tools if isinstance(tools, list) else [tools]
        found[TOOLS] = [_value(tool, f"{TOOLS}[{index}]", TOOL_FORM, warn) for index, tool in enumerate(tools)]
        for index, tool in enumerate(found[TOOLS]):
            if not isinstance(tool, dict) or not isinstance(_named(tool).get("name"), str):
                problem = f"is {kind_of(tool)}, want an object that describes a tool and has its name"
                raise RowError("DATA-130", f"{TOOLS}[{index}]", problem, TOOL_FORM)
    if not is_empty(row.get(KWARGS)) and (kwargs := _value(row[KWARGS], KWARGS, KWARGS_FORM, warn)) is not None:
        if not isinstance(kwargs, dict):
            raise RowError("DATA-131", KWARGS, f"is {kind_of(kwargs)}, want an object", KWARGS_FORM)
        if own := [name for name in kwargs if name in GIVEN]:
            problem = f"has {own[0]!r}, which the template is given by itself"
            raise RowError("DATA-131", KWARGS, problem, "Remove it.")
        found[KWARGS] = kwargs
    for name, value in found.items():
        check_strings(value, name, rules, warn)
    return {name: value for name, value in found.items() if value}


def turn_extra(message: Mapping[str, Any], place: str, rules: RowRules, warn: Warn) -> str:
    """The `extra` of a message: its calls of tools, or which call it answers. Other keys are refused."""
    role, found = message["role"], {}
    own = [key for key in KEYS_OF_ROLE.get(role, ()) if not is_empty(message.get(key))]
    refuse_unread_keys(message, ("role", "content", *own), place, warn)
    if "tool_calls" in own:
        calls = _value(message["tool_calls"], f"{place}.tool_calls", CALL_FORM, warn)
        if not isinstance(calls, list):
            raise RowError("DATA-130", f"{place}.tool_calls", f"is {kind_of(calls)}, want a list", CALL_FORM)
        named = enumerate(calls)
        found["tool_calls"] = [_call(call, f"{place}.tool_calls[{index}]", warn) for index, call in named]
    for key in own if role == "tool" else ():
        if not isinstance(message[key], str):
            raise RowError("DATA-12", f"{place}.{key}", f"is {kind_of(message[key])}, want text", FIX)
        found[key] = message[key]
    check_strings(found, place, rules, warn)
    return extra_of(found)


def _call(call: Any, place: str, warn: Warn) -> dict[str, Any]:
    """One call in the common form. Its arguments may be JSON text, as OpenAI writes them."""
    call = _value(call, place, CALL_FORM, warn)
    inner = _named(call) if isinstance(call, dict) else {}
    if not isinstance(inner.get("name"), str) or is_blank(inner["name"]):
        problem = f"is {kind_of(call)}" if not isinstance(call, dict) else f"has the keys {sorted(map(str, inner))}"
        raise RowError("DATA-130", place, f"{problem}, want a function with its name", CALL_FORM)
    if inner is not call:
        refuse_unread_keys(call, ("id", "type", "function"), place, warn)
    refuse_unread_keys(inner, ("id", "type", "name", "arguments"), place, warn)
    arguments = _value(inner.get("arguments"), f"{place}.arguments", CALL_FORM, warn) or {}
    if not isinstance(arguments, dict):
        raise RowError("DATA-130", f"{place}.arguments", f"is {kind_of(arguments)}, want an object", CALL_FORM)
    found = {"type": "function", "function": {"name": inner["name"], "arguments": arguments}}
    return {"id": call["id"], **found} if call.get("id") else found


def _named(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    """The object with the name: that of the key `function`, or the whole."""
    inner = tool.get("function")
    return inner if isinstance(inner, dict) else tool


def _value(value: Any, place: str, form: str, warn: Warn) -> Any:
    """The value, read if it is JSON text, without keys that are null: a file with columns of one type fills them in."""
    if isinstance(value, str):
        if is_blank(value):
            return None
        try:
            value = parse_value(value)
        except RowError as error:
            problem = f"is text, want an object, a list or JSON text of one ({error.problem})"
            raise RowError("DATA-130", place, problem, form) from error
    kept = _without_nulls(value)
    if kept != value:
        warn("rows whose tools or calls have keys that are null, which are left out")
    return kept


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def strings_in(value: Any) -> Iterator[str]:
    """All texts in a value of JSON, keys included."""
    if isinstance(value, str):
        yield value
    for inner in (*value, *value.values()) if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from strings_in(inner)


def check_strings(value: Any, place: str, rules: RowRules, warn: Warn) -> None:
    """Refuse what is no value of JSON, and texts that cannot be meant; see `check_text`."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise RowError("DATA-130", place, f"cannot be written as JSON: {error}", FIX) from error
    for text in strings_in(value):
        if not is_blank(text):
            check_text(text, place, rules, warn)


def refuse_order(messages: Sequence[Message], name: str, *, is_response: bool) -> None:
    """Raise RowError at the first turn that cannot stand where it is, and for a conversation nobody speaks in.

    A system or developer turn may be the first. Then user and assistant speak in turn. After an assistant's calls come
    tool turns, no more than there are calls, and then the assistant again. `is_response`: the assistant may begin.
    """
    before, calls, answered = "", [], 0
    for index, message in enumerate(messages):
        role, extra = message.role, json.loads(message.extra or "{}")
        after = ("user", "tool", *(("", *FIRST_ROLES) if is_response and index < 2 else ()))
        allowed = {"user": ("", *FIRST_ROLES, "assistant"), "assistant": after, "tool": ("calls", "tool")}
        if before not in allowed.get(role, ("",)):
            raise _wrong_order(messages, name, index, before)
        if role == "tool":
            answered += 1
            _refuse_answer(extra, calls, answered, f"{name}[{index}]")
        else:
            calls, answered = extra.get("tool_calls", []), 0
        before = "calls" if calls and role == "assistant" else role
    if before in ("", *FIRST_ROLES):
        raise _wrong_order(messages, name, None, before)


def _wrong_order(messages: Sequence[Message], name: str, index: int | None, before: str) -> RowError:
    roles = ", ".join(message.role for message in messages)
    want = "an optional system or developer turn, then user and assistant in turn"
    if index is not None and messages[index].role == "tool":
        advice = "Give the assistant's turn before it the tool_calls that it answers, or write it into a user turn."
        problem = f"is a tool turn after {before or 'nothing'}; it must follow an assistant turn with tool_calls"
        return RowError("DATA-64", f"{name}[{index}]", problem, advice)
    if before == "calls":
        problem = f"is a turn of the {messages[index].role} and the turn before it calls tools, which nothing answers"
        return RowError("DATA-64", f"{name}[{index}]", problem, "Add the tool turns, or remove the tool_calls.")
    at = f"; turn {index + 1} ({messages[index].role}) is out of order" if index is not None else ""
    return RowError("DATA-64", name, f"has its turns in the order {roles}{at}; want {want}", FIX)


def _refuse_answer(extra: Mapping[str, str], calls: Sequence[dict], answered: int, place: str) -> None:
    """Raise RowError for a tool turn that answers none of the calls before it."""
    ids = [call["id"] for call in calls if "id" in call]
    names = [call["function"]["name"] for call in calls]
    problem = ""
    if answered > len(calls):
        problem = f"is the tool turn {answered} after {len(calls)} tool_calls"
    elif ids and extra.get("tool_call_id", ids[0]) not in ids:
        problem = f"has the tool_call_id {extra['tool_call_id']!r}, and the calls before it have {', '.join(ids)}"
    elif extra.get("name", names[0]) not in names:
        problem = f"has the name {extra['name']!r}, and the calls before it are of {', '.join(names)}"
    if problem:
        raise RowError("DATA-64", place, problem, "Let each tool turn answer one call of the turn before it.")


def response_text(message: Message) -> str:
    """The text of an assistant's turn; with calls of tools a mark and their JSON, until a template writes them."""
    if not message.extra:
        return message.content
    return CALL_MARK + extra_of({"content": message.content, **json.loads(message.extra)})


def called_message(response: str) -> Message | None:
    """The turn with calls of tools that `response_text` made this response of; None for a text."""
    if not response.startswith(CALL_MARK):
        return None
    values = json.loads(response[1:])
    return Message("assistant", values.pop("content"), extra_of(values))


KWARGS_FORM = 'Give an object of the template\'s own variables, such as {"enable_thinking": false}.'
