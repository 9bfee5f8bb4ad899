"""The process that renders chat templates: it can be stopped, for a template is foreign code that may never end.

laddpo/preference/encoding/rendering.py starts this file. A request is one line of JSON: the template, its variables,
the limits of time and the jobs (messages, whether an open assistant turn is wanted, and perhaps further variables such
as tools). The answer is one line of JSON: for each job its text, or what went wrong, with the line of the template. The
jinja environment is the one of transformers, sandbox included, without the time that importing transformers takes.
Imports nothing of laddpo.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import sys
import time
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.meta
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

MEMORY_BYTES = 2**30  # address space of the process
SPARE_CHARACTERS = 2**20  # a rendering may be longer than its messages by this, and by this factor
SPARE_FACTOR = 16
READ_VARIABLES = [{"read": "variables"}]  # the messages of a job that asks for names of variables instead of a text


class TooLong(BaseException):
    """A rendering went over one of the limits. Not an Exception, which jinja's compiler catches."""


class GenerationBlock(Extension):
    """`{% generation %} … {% endgeneration %}`, which marks the assistant's text and renders as its content."""

    tags = frozenset({"generation"})

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Any) -> str:
        return caller()


class PlainDict:
    """`dict` for templates, without the attributes of the type."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any, **kwargs: Any) -> dict:
        return dict.fromkeys(*args, **kwargs)


class PlainNamespace(jinja2.utils.Namespace):
    """`namespace` for templates, without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args
        values = dict(*rest, **kwargs)
        for name in values:
            PlainNamespace._check(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: Any, value: Any) -> None:
        PlainNamespace._check(name)
        jinja2.utils.Namespace.__setitem__(self, name, value)

    @staticmethod
    def _check(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace may not hold {name!r}")


def environment() -> ImmutableSandboxedEnvironment:
    """The environment in which transformers renders chat templates."""
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, loopcontrols]
    )
    made.filters["tojson"] = to_json
    made.globals.update(
        raise_exception=raise_exception, strftime_now=strftime_now, dict=PlainDict(), namespace=PlainNamespace
    )
    return made


def to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def raise_exception(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


@lru_cache(maxsize=8)
def compiled(source: str) -> jinja2.Template:
    return environment().from_string(source)


def characters(messages: list, opens_turn: bool = True, more: dict | None = None) -> int:
    """About how many characters a job gives its template."""
    size = sum(len(str(message.get("content", ""))) for message in messages)
    extras = sum(len(str(message)) for message in messages if len(message) > 2)
    return size + extras + (len(str(more)) if more else 0)


def read_variables(source: str) -> list[str]:
    """What the template reads and does not set, without what the environment gives it."""
    made = environment()
    return sorted(jinja2.meta.find_undeclared_variables(made.parse(source)) - made.globals.keys())


def render(source: str, variables: dict, messages: list, opens_turn: bool, more: dict | None = None) -> str:
    """The text, whole; TooLong as soon as it grows past what messages of this size can need."""
    if messages == READ_VARIABLES:
        return json.dumps(read_variables(source))
    template = compiled(source)
    given = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": opens_turn, **variables}
    given |= more or {}
    limit = SPARE_CHARACTERS + SPARE_FACTOR * characters(messages, opens_turn, more)
    pieces: list[str] = []
    size = 0
    stream = template.root_render_func(template.new_context(given))
    for piece in stream:
        pieces.append(piece)
        size += len(piece)
        if size > limit:
            line = template.get_corresponding_lineno(stream.gi_frame.f_lineno)
            raise TooLong(f"it writes more than {limit:,} characters", line)
    return "".join(pieces)


def outcome(seconds: float, *job: Any) -> dict:
    """{"text": …}, or {"problem": …, "line": …, "over": whether a limit was reached}."""
    try:
        with limited_time(seconds):
            return {"text": render(*job)}
    except jinja2.TemplateSyntaxError as error:
        return {"problem": said(error), "line": error.lineno, "over": False}
    except TooLong as error:
        problem, line = error.args if len(error.args) == 2 else (f"it takes more than {seconds:g} seconds", None)
        return {"problem": problem, "line": line or line_of(error), "over": True}
    except MemoryError as error:
        return {"problem": f"it needs more than {MEMORY_BYTES:,} bytes", "line": line_of(error), "over": True}
    except Exception as error:  # a template can raise whatever Python can
        return {"problem": said(error), "line": line_of(error), "over": False}


@contextlib.contextmanager
def limited_time(seconds: float):
    """Raises TooLong inside once so much processor time is used, where the system can interrupt."""
    if not hasattr(signal, "setitimer"):
        yield
        return
    signal.setitimer(signal.ITIMER_PROF, seconds, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def out_of_time(*_: Any) -> None:
    raise TooLong


def said(error: BaseException) -> str:
    """The error in one line."""
    kind = type(error).__name__
    text = " ".join(str(error).split())[:200]
    return text if kind == "TemplateError" and text else f"{kind}: {text}" if text else kind


def line_of(error: BaseException) -> int | None:
    """The line of the template where the error came up."""
    line, trace = None, error.__traceback__
    while trace is not None:
        template = trace.tb_frame.f_globals.get("__jinja_template__")
        if template is not None:
            line = template.get_corresponding_lineno(trace.tb_lineno)
        trace = trace.tb_next
    return line


def limit_memory() -> None:
    try:
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_AS)
        limit = MEMORY_BYTES if most == resource.RLIM_INFINITY else min(MEMORY_BYTES, most)
        resource.setrlimit(resource.RLIMIT_AS, (limit, most))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (ImportError, OSError, ValueError):  # Windows has none, and a system may not let it be set
        pass


def main() -> None:
    """Answer requests until there are no more: whoever starts this process ends it by closing the pipe."""
    for name in ("SIGINT", "SIGTERM"):  # meant for the process that waits for the answer
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "SIGPROF"):
        signal.signal(signal.SIGPROF, out_of_time)
    limit_memory()
    silent = open(os.devnull, "w")  # noqa: SIM115 (open as long as the process runs)
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    while line := requests.readline():
        request = json.loads(line)
        done, armed = [], 0.0
        for job in request["jobs"]:
            if time.monotonic() - armed > 1:  # not at each job: every call starts a thread
                faulthandler.dump_traceback_later(request["stalled"], exit=True, file=silent)
                armed = time.monotonic()
            done.append(outcome(request["seconds"], request["template"], request["variables"], *job))
        faulthandler.cancel_dump_traceback_later()
        answers.write(json.dumps(done).encode() + b"\n")
        answers.flush()


if __name__ == "__main__":
    main()
