"""Chat templates are foreign code: whatever one does, it ends in one message with its own line, and in bounded time."""

import json
import shutil
import time
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from laddpo.cli.app import cli
from laddpo.errors import UserError
from laddpo.models.loading import load_tokenizer
from laddpo.preference.encoding import rendering
from laddpo.preference.encoding.encode import TextEncoder
from laddpo.preference.reading.bad_rows import RowError
from laddpo.preference.reading.pairs import Message, prompt_rows, user_prompt

NANO = Path(__file__).resolve().parents[2] / "data" / "llada_nano"
TURNS = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|eot_id|>{% endfor %}"
OPEN = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
GOOD = TURNS + OPEN
LOOP = "{% for a in range(90000) %}{% for b in range(90000) %}{% for c in range(90000) %}{% endfor %}{% endfor %}"

# by case: the template, the line that is at fault (None: no single one), words of the message
BROKEN = {
    "syntax error": ("\n{% for m in messages %}{{ m.content }", 2, "TemplateSyntaxError"),
    "block that is not closed": ("\n{% for m in messages %}\n{{ m.content }}\n", 3, "TemplateSyntaxError"),
    "unknown tag": ("{% frobnicate %}" + GOOD, 1, "unknown tag"),
    "unknown filter": ("\n\n{{ messages | frobnicate }}", 3, "No filter named"),
    "unknown test": ("{{ messages is frobnicated }}", 1, "No test named"),
    "undefined variable": ("{{ a }}\n{{ a.b.c }}" + GOOD, 2, "UndefinedError"),
    "a key that messages lack": ("{% for m in messages %}\n{{ m.text.strip() }}{% endfor %}", 2, "UndefinedError"),
    "raise_exception": ("\n{{ raise_exception('only for tools') }}", 2, "only for tools"),
    "recursion": ("{% macro m() %}\n{{ m() }}{% endmacro %}{{ m() }}", 2, "RecursionError"),
    "blocks nested too deep": ("{% for a in [1] %}" * 60 + "{% endfor %}" * 60, None, ""),
    "nested loops": ("\n" + LOOP + "{% endfor %}", 2, "takes more than"),
    "an endless generator": ("{{ lipsum(n=10 ** 9) }}", 1, "takes more than"),
    "a number without end": ("{{ 7 ** (10 ** 9) }}", None, "takes more than"),
    "giant string": ("{{ 'x' * 10 ** 10 }}", 1, "bytes"),
    "giant list": ("{{ [0] * 10 ** 10 }}", 1, "bytes"),
    "long output": ("\n{% for a in range(90000) %}{{ 'x' * 1000 }}{% endfor %}", 2, "characters"),
    "content is dropped": ("<|user|>" + OPEN, None, "does not write every message once"),
    "content of the last message alone": ("{{ messages[-1].content }}", None, "does not write every message once"),
    "content twice": (GOOD + GOOD, None, "does not write every message once"),
    "wrong type": ("{{ messages + 1 }}", 1, "TypeError"),
    "division by zero": ("\n{{ 1 / 0 }}", 2, "ZeroDivisionError"),
    "include": ("{% include 'other.jinja' %}", 1, ""),
    "import": ("{% import '/etc/passwd' as x %}", 1, ""),
    "extends": ("{% extends 'base' %}", 1, ""),
    "way out of the sandbox": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", 1, "SecurityError"),
    "change of a message": ("{{ messages.append(1) }}", 1, "SecurityError"),
    "hidden name in a namespace": ("{% set n = namespace(__class__=1) %}", 1, "SecurityError"),
    "format string": ("{{ '{0.__class__.x}'.format(messages) }}", 1, "SecurityError"),
    "macro without its argument": ("{% macro m(a) %}{{ a.b.c }}{% endmacro %}\n{{ m() }}", 1, "UndefinedError"),
    "macro with too many": ("{% macro m() %}{% endmacro %}\n{{ m(1) }}", 2, "TypeError"),
    "unicode in a name": ("{{ messages\u200b.x }}", 1, "TemplateSyntaxError"),
    "half a surrogate pair": ("\ud800{{ x.y.z }}", 1, "UndefinedError"),
    "no generation prompt": (TURNS, None, "add_generation_prompt"),
    "empty": ("", None, "is empty"),
    "white space": (" \n", None, "is empty"),
    "number": (5, None, ""),
    "list": ([1, 2], None, ""),
    "object": ({"a": GOOD}, None, ""),
    "several without a default": ([{"name": "tools", "template": GOOD}, {"name": "rag", "template": GOOD}], None, ""),
    "several, a broken default": ([{"name": "default", "template": "\n{{ a.b.c }}"}], 2, "UndefinedError"),
}


@pytest.fixture(autouse=True)
def short_limits(monkeypatch):
    monkeypatch.setattr(rendering, "SECONDS", 0.2)


def with_template(folder, template):
    """A copy of the shipped model without its weights, whose chat template is another."""
    model = folder / "model"
    model.mkdir()
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(NANO / name, model)
    settings = json.loads((NANO / "tokenizer_config.json").read_text(encoding="utf-8"))
    (model / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template}), encoding="utf-8")
    return model


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_template_is_one_message_with_its_own_line(case, tmp_path):
    template, line, words = BROKEN[case]
    model = with_template(tmp_path, template)
    began = time.monotonic()
    with pytest.raises(UserError) as caught:
        TextEncoder(load_tokenizer(str(model)))
    assert time.monotonic() - began < 30
    message = str(caught.value)
    assert len(caught.value.problems) == 1 and caught.value.exit_code == 2
    assert words in message and str(model) in message and len(message) < 1200
    assert line is None or f"line {line}" in message
    assert "data.template=plain" in message or "tokenizer_config.json" in message
    with_plain = TextEncoder(AutoTokenizer.from_pretrained(NANO), template="plain")
    assert with_plain.chat is None  # the cure needs no template


@pytest.mark.parametrize(
    ("stage", "settings"),
    [
        ("prepare", []),
        ("precompute", []),
        ("train", []),
        ("evaluate", []),
        ("generate", ["prompt=x"]),
        ("sft", []),
    ],
)
def test_every_stage_refuses_a_broken_template_with_exit_code_2(stage, settings, tmp_path, capsys):
    model = with_template(tmp_path, "\n{{ raise_exception('not this model') }}")
    paths = [f"paths.data_dir={tmp_path / 'data'}", f"paths.outputs_dir={tmp_path / 'outputs'}"]
    assert cli(stage, [f"model.model_name_or_path={model}", "hardware=cpu", *paths, *settings]) == 2
    said = capsys.readouterr().err
    assert said.count("line 2, `{{ raise_exception('not this model') }}`: not this model.") == 1
    assert "Traceback" not in said and "data.template=plain" in said


def test_the_default_of_several_templates_is_used(tmp_path):
    several = [{"name": "tool_use", "template": "{{ a.b.c }}"}, {"name": "default", "template": GOOD}]
    encoder = TextEncoder(load_tokenizer(str(with_template(tmp_path, several))))
    assert encoder.chat.source == GOOD


FEATURES = {
    "roles and generation prompt": GOOD,
    "generation block": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "json, keys sorted": "{{ messages | tojson(sort_keys=true, indent=1) }}",
    "break and continue": "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.content }}"
    "{% break %}{% endfor %}",
    "namespace": "{% set n = namespace(x=1) %}{% for m in messages %}{% set n.x = n.x + 1 %}{% endfor %}{{ n.x }}",
    "dict": "{{ dict(a=1).a }}{{ dict.fromkeys('ab') }}",
    "trimmed blocks": "  {% if true %}\n a\n  {% endif %}\n b\n",
    "date": "{{ strftime_now('%Y') }}",
    "special tokens": "{{ bos_token }}{{ eos_token }}",
    "no tools": "{{ tools is none }}{{ documents is none }}{{ add_generation_prompt }}",
    "letters of other scripts": "é🙂<b>&\u2028{{ messages[0].content | upper }}",
}


@pytest.mark.parametrize("feature", FEATURES)
def test_a_template_renders_as_it_does_in_transformers(feature):
    tokenizer = AutoTokenizer.from_pretrained(NANO)
    tokenizer.chat_template = FEATURES[feature]
    messages = prompt_rows([Message("user", "ß <b> 'q'\n"), Message("assistant", "\ud83d x"), Message("user", "🙂")])
    for opens_turn in (True, False):
        wanted = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=opens_turn)
        jobs = [(messages, opens_turn)]
        assert rendering.render_jobs(tokenizer.chat_template, tokenizer.special_tokens_map, jobs) == [wanted]


def nano_with(template):
    tokenizer = AutoTokenizer.from_pretrained(NANO)
    tokenizer.chat_template = template
    return tokenizer


def test_a_template_that_only_some_rows_break_names_them_and_is_given_up_after_a_few():
    slow = GOOD + "{% if 'slow' in messages[0].content %}" + LOOP + "{% endfor %}{% endif %}"
    encoder = TextEncoder(nano_with(slow))
    rows = [(user_prompt(text), ("a", "b")) for text in ("x", "slow 1", "y")]
    good, bad, also_good = encoder.encode_rows(rows)
    assert good.prompt_ids is not None and also_good.prompt_ids is not None
    assert isinstance(bad, RowError) and bad.code == "DATA-95" and "takes more than" in bad.problem
    with pytest.raises(UserError, match=r"takes more than.*for more than 3 rows"):
        encoder.encode_rows([(user_prompt(f"slow {i}"), ("a", "b")) for i in range(4)])


def test_a_row_that_stalls_the_process_is_told_from_the_rows_beside_it(monkeypatch):
    monkeypatch.setattr(rendering, "SECONDS", 100.0)
    monkeypatch.setattr(rendering, "STALLED_SECONDS", 1.5)
    stalls = GOOD + "{% if 'stall' in messages[0].content %}" + LOOP + "{% endfor %}{% endif %}"
    encoder = TextEncoder(nano_with(stalls))
    rows = encoder.encode_rows([(user_prompt(text), ("a", "b")) for text in ("x", "stall", "y")])
    assert [isinstance(each, RowError) for each in rows] == [False, True, False]
    assert "ends or stalls" in rows[1].problem


def test_requests_are_split_by_size_and_keep_their_order(monkeypatch):
    monkeypatch.setattr(rendering, "REQUEST_CHARACTERS", 10)
    jobs = [([{"role": "user", "content": f"{i}" * i}], True) for i in range(12)]
    assert [len(part) for part in rendering.parts(jobs)][:2] == [5, 1]
    assert rendering.render_jobs("{{ messages[0].content }}", {}, jobs) == [f"{i}" * i for i in range(12)]


def test_one_process_renders_everything_and_a_lost_one_is_replaced():
    render = rendering.RenderProcess()
    job = ([{"role": "user", "content": "x"}], True)
    try:
        assert render.render("{{ messages[0].content }}", {}, [job]) == ["x"]
        first = render._process
        assert render.render("{{ messages[0].role }}", {}, [job]) == ["user"] and render._process is first
        first.kill()
        first.wait()
        assert render.render("{{ messages[0].content }}", {}, [job]) == ["x"]
    finally:
        render.close()


THINKING = GOOD.replace("<|assistant|>{% endif %}", "<|assistant|>\n<think>\n{% endif %}")


@pytest.mark.parametrize(("response", "is_doubled"), [("<think>\na\n</think>\nb", True), ("a\n</think>\nb", False)])
def test_a_response_that_repeats_the_tag_that_the_template_opens_is_refused(response, is_doubled):
    (row,) = TextEncoder(nano_with(THINKING)).encode_rows([(user_prompt("q"), (response, "c"))])
    assert isinstance(row, RowError) is is_doubled
    if is_doubled:
        assert (row.code, row.field) == ("DATA-106", "chosen") and "Remove <think>" in row.advice
    (plain,) = TextEncoder(nano_with(GOOD)).encode_rows([(user_prompt("q"), (response, "c"))])
    assert not isinstance(plain, RowError)
