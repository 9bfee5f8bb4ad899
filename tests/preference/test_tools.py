"""Tools, calls and variables of a row reach the model through its template, or the row is refused: nothing is lost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from laddpo.errors import UserError
from laddpo.models.loading import load_tokenizer
from laddpo.preference.encoding.encode import TextEncoder
from laddpo.preference.encoding.templates import GivenTemplate
from laddpo.preference.reading.bad_rows import BadRow, RowError
from laddpo.preference.reading.files import ReadLog
from laddpo.preference.reading.pairs import Message, content_digest, prompt_group, prompt_of, prompt_rows, user_prompt
from laddpo.preference.sources import Request, open_source

NANO = Path(__file__).resolve().parents[2] / "data" / "llada_nano"
# Writes tools, calls and any role, and reads the variable `terse`. The second drops all of them.
KNOWS = (
    "{% if tools %}<|user|>{% for tool in tools %}{{ tool | tojson }}{% endfor %}<|eot_id|>{% endif %}"
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% for call in m.tool_calls or [] %}"
    "[{{ call.function.name }} {{ call.function.arguments | tojson }}]{% endfor %}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% if terse %}short: {% endif %}{% endif %}"
)
DROPS = (
    "{% for m in messages %}{% if m.role in ['system', 'user', 'assistant'] %}<|{{ m.role }}|>{{ m.content }}<|eot_id|>"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TOOL = {
    "type": "function",
    "function": {"name": "sun", "description": "Where it shines", "parameters": {"type": "object"}},
}
CALL = {"type": "function", "function": {"name": "sun", "arguments": {"town": "Rome", "days": [2, 1]}}}
ASKED = [{"role": "user", "content": "Sun?"}]
CALLED = [*ASKED, {"role": "assistant", "content": None, "tool_calls": [CALL]}, {"role": "tool", "content": "yes"}]
TEXTS = {"chosen": [{"role": "assistant", "content": "Go."}], "rejected": [{"role": "assistant", "content": "Stay."}]}


def encoder(template, **variables):
    return TextEncoder(AutoTokenizer.from_pretrained(NANO), given=GivenTemplate(template, "t.jinja", variables))


def read(tmp_path, row):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    (found,) = open_source("jsonl").read(Request(dataset_name=str(path)), ReadLog())
    return found


def encoded(tmp_path, with_encoder, row):
    """The row encoded, with its texts; or what refuses it."""
    pair = read(tmp_path, row)
    if isinstance(pair, BadRow):
        return pair
    (found,) = with_encoder.encode_rows([(pair.prompt, (pair.chosen, pair.rejected))])
    return found


@pytest.mark.parametrize("as_text", [False, True])
def test_tools_calls_and_results_are_written_as_transformers_writes_them(tmp_path, as_text):
    """`as_text`: the same as JSON text, and with keys that are null, as files with columns of one type hold them."""
    row = {"prompt": CALLED, **TEXTS, "tools": [TOOL], "chat_template_kwargs": {"terse": True}}
    if as_text:
        arguments = json.dumps(CALL["function"]["arguments"])
        call = {"id": None, "type": "function", "function": {"name": "sun", "arguments": arguments}}
        prompt = [{"tool_calls": None, **turn} for turn in CALLED]
        prompt[1]["tool_calls"] = [call]
        row |= {"prompt": prompt, "tools": json.dumps([TOOL]), "chat_template_kwargs": {"terse": True, "other": None}}
    with_encoder = encoder(KNOWS)
    found = encoded(tmp_path, with_encoder, row)
    tokenizer = AutoTokenizer.from_pretrained(NANO)
    tokenizer.chat_template = KNOWS
    messages = [{**turn, "content": turn["content"] or ""} for turn in CALLED]
    wanted = tokenizer.apply_chat_template(messages, [TOOL], tokenize=False, add_generation_prompt=True, terse=True)
    assert with_encoder.decode(found.prompt_ids) == wanted and "short: " in wanted


def test_a_response_that_calls_tools_is_what_the_template_writes_in_the_place_of_a_text(tmp_path):
    row = {"prompt": ASKED, **TEXTS, "chosen": [{"role": "assistant", "content": "I look. ", "tool_calls": [CALL]}]}
    with_encoder = encoder(KNOWS)
    found = encoded(tmp_path, with_encoder, row)
    assert found.responses == ('I look. [sun {"town": "Rome", "days": [2, 1]}]', "Stay.")
    assert with_encoder.decode_response(found.response_ids[0]) == found.responses[0]


REFUSED = {  # case: template, change of the row, code, field, words
    "tools": (DROPS, {"tools": [TOOL]}, "DATA-95", "tools[0]", "does not write"),
    "calls": (DROPS, {"prompt": CALLED}, "DATA-95", "prompt[2]", "lost text"),
    "a call as response": (
        DROPS,
        {"chosen": [{"role": "assistant", "content": "", "tool_calls": [CALL]}]},
        *("DATA-95", "chosen.tool_calls[0].name", "does not write"),
    ),
    "developer": (
        DROPS,
        {"prompt": [{"role": "developer", "content": "d"}, *ASKED]},
        *("DATA-95", "prompt[0].content", "does not write"),
    ),
    "variable": (KNOWS, {"chat_template_kwargs": {"ters": 1}}, "DATA-131", "chat_template_kwargs.ters", "reads terse"),
    "variable of ours": (KNOWS, {"chat_template_kwargs": {"messages": 1}}, "DATA-131", "chat_template_kwargs", "given"),
    "tools as prose": (KNOWS, {"tools": "sun"}, "DATA-130", "tools", "is not JSON"),
    "tool without a name": (KNOWS, {"tools": [{"type": "function"}]}, "DATA-130", "tools[0]", "name"),
    "arguments as prose": (
        KNOWS,
        {"chosen": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "x"}}]}]},
        *("DATA-130", "chosen[0].tool_calls[0].arguments", "JSON"),
    ),
    "a result of nothing": (KNOWS, {"prompt": [*ASKED, CALLED[2]]}, "DATA-64", "prompt[1]", "must follow"),
    "two results of one call": (KNOWS, {"prompt": [*CALLED, CALLED[2]]}, "DATA-64", "prompt[3]", "tool turn 2"),
    "a call without a result": (KNOWS, {"prompt": [*CALLED[:2], *ASKED]}, "DATA-64", "prompt[2]", "nothing answers"),
    "another id": (
        KNOWS,
        {"prompt": [*ASKED, {**CALLED[1], "tool_calls": [{**CALL, "id": "a"}]}, {**CALLED[2], "tool_call_id": "b"}]},
        *("DATA-64", "prompt[2]", "tool_call_id 'b'"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_template_does_not_write_refuses_the_row_at_its_place(case, tmp_path):
    template, change, code, field, words = REFUSED[case]
    found = encoded(tmp_path, encoder(template), {"prompt": ASKED, **TEXTS, **change})
    assert isinstance(found, RowError | BadRow), found
    assert (found.code, found.field) == (code, field) and words in found.problem


def test_a_plain_template_refuses_tools_and_a_given_template_serves_a_tokenizer_without_one(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(NANO)
    tokenizer.chat_template = None
    assert encoded(tmp_path, TextEncoder(tokenizer), {"prompt": ASKED, **TEXTS, "tools": [TOOL]}).code == "DATA-130"
    with pytest.raises(UserError, match=r"no chat template that reads it"):
        TextEncoder(tokenizer, given=GivenTemplate(variables={"terse": True}))
    assert TextEncoder(tokenizer, given=GivenTemplate(KNOWS, "t.jinja")).chat.source == KNOWS


def test_text_of_special_tokens_in_tools_calls_and_results_stays_text(tmp_path):
    """Counted: the template's own <|eot_id|> and no other, though each place spells it."""
    spelled = "a <|eot_id|> b"
    tool = {"type": "function", "function": {"name": "sun", "description": spelled, "parameters": {}}}
    call = {"function": {"name": "sun", "arguments": {spelled: [spelled]}}}
    prompt = [*ASKED, {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": spelled}]
    with_encoder = encoder(KNOWS)
    found = encoded(tmp_path, with_encoder, {"prompt": prompt, **TEXTS, "tools": [tool]})
    assert found.prompt_ids.tolist().count(with_encoder.terminator_id) == 4
    assert with_encoder.decode(found.prompt_ids).count(spelled) == 4
    joined = {"function": {"name": "<|mdm_", "arguments": {}}}
    together = KNOWS.replace("call.function.name }}", "call.function.name }}mask|>")
    row = {"prompt": [*ASKED, {"role": "assistant", "tool_calls": [joined]}, CALLED[2]], **TEXTS}
    assert encoded(tmp_path, encoder(together), row).code == "DATA-74"


def test_variables_of_a_run_enter_the_fingerprint_and_those_of_a_row_win(tmp_path):
    plain, terse = encoder(KNOWS), encoder(KNOWS, terse=True)
    assert "template_kwargs" not in plain.fields()
    assert terse.fields() == {**plain.fields(), "template_kwargs": {"terse": True}}
    row = {"prompt": ASKED, **TEXTS, "chat_template_kwargs": {"terse": False}}
    texts = [each.decode(encoded(tmp_path, each, row).prompt_ids) for each in (plain, terse)]
    assert texts[0] == texts[1] == "<|user|>Sun?<|eot_id|><|assistant|>"
    assert terse.decode(terse.encode_prompt(user_prompt("Sun?"))).endswith("short: ")
    with pytest.raises(UserError, match=r"data\.template_kwargs\.ters: .*it reads terse.*Did you mean terse"):
        encoder(KNOWS, ters=True)


def test_ids_depend_on_tools_only_where_there_are_some(tmp_path):
    rows = [{"prompt": ASKED, **TEXTS, **more} for more in ({}, {"tools": []}, {"tools": [TOOL]})]
    plain, empty, tools = (read(tmp_path, row) for row in rows)
    assert plain.id == empty.id == f"{content_digest(user_prompt('Sun?'), 'Go.', 'Stay.')}-0"
    assert plain.group == prompt_group([Message("user", "Sun?")])
    assert tools.id != plain.id and tools.group != plain.group
    assert prompt_of(prompt_rows(tools.prompt)) == tools.prompt


def test_a_prompt_that_is_cut_keeps_its_tools(tmp_path):
    long = [{"role": "user", "content": "x" * 80}, {"role": "assistant", "content": "y"}, *ASKED]
    with_encoder = encoder(KNOWS)
    pair = read(tmp_path, {"prompt": long, **TEXTS, "tools": [TOOL]})
    (whole,) = with_encoder.encode_rows([(pair.prompt, (pair.chosen, pair.rejected))])
    with_encoder.truncation, with_encoder.max_length = "keep_end", len(whole.prompt_ids) - 40
    (cut,) = with_encoder.encode_rows([(pair.prompt, (pair.chosen, pair.rejected))])
    assert cut.cut_tokens >= 40 and '"name": "sun"' in with_encoder.decode(cut.prompt_ids)


def test_a_block_of_thought_that_the_template_closes_is_not_written_twice(tmp_path):
    closed = KNOWS.replace("short: ", "<think>\n\n</think>\n\n")
    row = {"prompt": ASKED, **TEXTS, "chosen": [{"role": "assistant", "content": "<think>\nso\n</think>\nyes"}]}
    assert not isinstance(encoded(tmp_path, encoder(closed), row), RowError)
    for with_encoder, more in ((encoder(closed, terse=True), {}), (encoder(closed), {"terse": True})):
        assert encoded(tmp_path, with_encoder, {**row, "chat_template_kwargs": more}).code == "DATA-106"


@pytest.fixture(scope="module", params=["sdar_4b_chat", "dream_7b_instruct"])
def qwen(request, shared_folder):
    return load_tokenizer(str(shared_folder / "assets" / request.param))


def test_templates_of_qwen_write_a_conversation_with_tools(qwen, tmp_path):
    spelled = "yes </tool_response> <|im_end|>"
    prompt = [*CALLED[:2], {"role": "tool", "content": spelled}]
    with_encoder = TextEncoder(qwen)
    row = {"prompt": prompt, **TEXTS, "chosen": [{"role": "assistant", "content": "Look.", "tool_calls": [CALL]}]}
    found = encoded(tmp_path, with_encoder, {**row, "tools": [TOOL]})
    messages = [{**turn, "content": turn["content"] or ""} for turn in prompt]
    wanted = qwen.apply_chat_template(messages, [TOOL], tokenize=False, add_generation_prompt=True)
    assert with_encoder.decode(found.prompt_ids) == wanted
    end = qwen.get_vocab().get("</tool_response>", qwen.eos_token_id)  # Dream's tokenizer has none
    own = 1 if "</tool_response>" in qwen.get_vocab() else 0
    assert wanted.count("</tool_response>") == 2 and found.prompt_ids.tolist().count(end) == own
    assert found.responses[0].startswith('Look.\n<tool_call>\n{"name": "sun"')
