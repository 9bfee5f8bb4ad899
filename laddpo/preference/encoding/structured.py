"""Prompts with more than texts: what a template is given beside role and content, and what must be found of it.

A prompt is structured if its row has tools or variables for the template, if a turn calls tools or answers a call, or
if it has a role beside system, user and assistant. Many templates drop such things without a word. So a probe of the
same structure is rendered, whose words occur nowhere else, and each word must be found.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from laddpo.preference.encoding.rendering import Job
from laddpo.preference.reading.pairs import Message, Prompt, extra_of, split_row_values, with_row_values

PROBE = "probe"
PLAIN_ROLES = ("system", "user", "assistant")


def is_structured(prompt: Prompt) -> bool:
    return any(message.extra or message.role not in PLAIN_ROLES for message in prompt)


def variables_of(prompt: Prompt) -> dict[str, Any]:
    """The variables that the row of a prompt gives its template."""
    return split_row_values(prompt)[1].get("chat_template_kwargs", {})


def job_of(prompt: Prompt, opens_turn: bool = True) -> Job:
    """What a template is given for a prompt."""
    if not any(message.extra for message in prompt):
        return [{"role": message.role, "content": message.content} for message in prompt], opens_turn
    turns, values = split_row_values(prompt)
    messages = [{"role": turn.role, "content": turn.content, **json.loads(turn.extra or "{}")} for turn in turns]
    tools = {"tools": values["tools"]} if "tools" in values else {}
    return messages, opens_turn, {**values.get("chat_template_kwargs", {}), **tools}


@lru_cache(maxsize=1024)
def plain_probe(roles: tuple[str, ...]) -> Prompt:
    """A prompt of turns of these roles, each with the same text."""
    return tuple(Message(role, PROBE) for role in roles)


class Words(dict[str, str]):
    """Texts that occur nowhere else, and where each stands in the row."""

    def new(self, place: str) -> str:
        text = f"{PROBE}{len(self)}x"
        self[text] = place
        return text


def structure_probe(prompt: Prompt) -> tuple[Prompt, Words]:
    """A prompt of the same structure in other words, and these words."""
    bare, values = split_row_values(prompt)
    words, turns, ids, names = Words(), [], {}, {}
    for index, message in enumerate(bare):
        place, own = f"prompt[{index}]", json.loads(message.extra or "{}")
        content = words.new(f"{place}.content") if message.content.strip() else message.content
        if "tool_calls" in own:
            ids, names, calls = {}, {}, own["tool_calls"]
            own["tool_calls"] = [_call(words, f"{place}.tool_calls[{rank}]", calls[rank]) for rank in range(len(calls))]
            for call, probe in zip(calls, own["tool_calls"], strict=True):
                names[call["function"]["name"]] = probe["function"]["name"]
                if "id" in call:
                    ids[call["id"]] = probe["id"] = f"call{len(words):05d}"  # some templates count the characters
        own |= {"tool_call_id": ids.get(own["tool_call_id"], "call00000")} if "tool_call_id" in own else {}
        own |= {"name": names[own["name"]]} if "name" in own else {}
        turns.append(Message(message.role, content, extra_of(own)))
    if "tools" in values:
        values = {**values, "tools": [_tool(words, f"tools[{rank}]") for rank in range(len(values["tools"]))]}
    return with_row_values(tuple(turns), values), words


def _call(words: Words, place: str, call: dict) -> dict[str, Any]:
    function: dict[str, Any] = {"name": words.new(f"{place}.name"), "arguments": {}}
    if call["function"]["arguments"]:
        function["arguments"] = {words.new(f"{place}.arguments"): words.new(f"{place}.arguments")}
    return {"type": "function", "function": function}


def _tool(words: Words, place: str) -> dict[str, Any]:
    name, description, parameter = (words.new(place) for _ in range(3))
    schema = {"type": "object", "properties": {parameter: {"type": "string", "description": PROBE}}, "required": []}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}


def same_calls(prompt: Prompt, may_join: Callable[[str], bool], mark: str) -> Prompt:
    """The prompt with another text in each turn. Tools and calls stay, but a text in them that may become a part of a
    special token (`may_join`) stands between two `mark`."""

    def apart(text: str) -> str:
        return f"{mark}{text}{mark}" if may_join(text) else text

    def walk(value: Any, is_data: bool) -> Any:
        if isinstance(value, str):
            return apart(value)
        if isinstance(value, list):
            return [walk(inner, is_data) for inner in value]
        if not isinstance(value, dict):
            return value
        if is_data:
            return {apart(key): walk(inner, True) for key, inner in value.items()}
        named = {key: inner for key, inner in value.items() if key in NAMED_BY_DATA and isinstance(inner, dict)}
        return {
            **{key: inner if key in COMPARED else walk(inner, key == "arguments") for key, inner in value.items()},
            **{key: {apart(name): walk(part, False) for name, part in inner.items()} for key, inner in named.items()},
        }

    return tuple(
        Message(turn.role, PROBE if turn.content.strip() else turn.content, _changed(turn.extra, walk, False))
        for turn in prompt
    )


def with_texts(prompt: Prompt, of_turn: Callable[[str], str], of_tool: Callable[[str], str]) -> Prompt:
    """The prompt with its texts changed: `of_turn` those of turns, `of_tool` those of tools, calls and answers."""

    def walk(value: Any) -> Any:
        if isinstance(value, str):
            return of_tool(value)
        if isinstance(value, dict):
            return {of_tool(key): walk(inner) for key, inner in value.items()}
        return [walk(inner) for inner in value] if isinstance(value, list) else value

    return tuple(
        Message(turn.role, (of_tool if turn.role == "tool" else of_turn)(turn.content), _changed(turn.extra, walk))
        for turn in prompt
    )


def _changed(extra: str, walk: Callable, *more: Any) -> str:
    return extra and extra_of(walk(json.loads(extra), *more))


COMPARED = ("type", "id", "tool_call_id", "chat_template_kwargs")  # keys whose values templates look at
NAMED_BY_DATA = ("properties", "$defs", "definitions")  # of a schema: objects whose keys are names of the data
TOOL_PROMPTS = (  # what tells which added tokens a template writes around tools, calls and answers of tools
    with_row_values(plain_probe(("user",)), {"tools": [_tool(Words(), "")]}),
    (
        *plain_probe(("user",)),
        Message("assistant", "", extra_of({"tool_calls": [_call(Words(), "", {"function": {"arguments": {"a": 1}}})]})),
        Message("tool", PROBE),
    ),
)
