"""Questions to an OpenAI-compatible chat endpoint: several at a time, asked again where that can help.

The address, the key and the model's name come from the environment. The key is sent to that address alone: redirects
are not followed, and no text that is kept or shown holds it.
"""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from http.client import HTTPException
from threading import Event
from typing import Any
from urllib.parse import urlsplit

from laddpo.errors import RunFault, Stopped, UserError
from laddpo.processes.progress import Progress

URL, KEY, MODEL = "LADDPO_JUDGE_URL", "LADDPO_JUDGE_KEY", "LADDPO_JUDGE_MODEL"
LONGEST_REPLY = 16 * 2**20  # bytes
LONGEST_WAIT = 60.0  # seconds between two attempts, whatever the server asks for
AGAIN = (408, 409, 425, 429)  # and 5xx: statuses that may be gone at the next attempt
WRONG = {401: f"the key in {KEY} is refused", 403: f"the key in {KEY} may not do this", 404: "no such address or model"}


@dataclass(frozen=True)
class Server:
    """Where to ask, and with what key."""

    url: str
    model: str
    key: str | None = field(default=None, repr=False)

    def hide(self, text: str) -> str:
        """The text without the key."""
        return text.replace(self.key, "<hidden>") if self.key else text


@dataclass(frozen=True)
class Patience:
    """How long a question is asked: `retries` more attempts, the first after `wait_s` seconds, each after twice as
    many; at most `max_failures` questions may fail. `key`: of the settings that say so."""

    parallel: int
    timeout_s: float
    retries: int
    wait_s: float
    max_failures: int
    key: str


class Failed(Exception):
    """An attempt without an answer. `is_final`: another attempt would fail, too. `after`: seconds that the server asks
    for."""

    def __init__(self, problem: str, is_final: bool = False, after: float = 0.0):
        super().__init__(problem)
        self.is_final, self.after = is_final, after


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *arguments):
        return None  # which urllib turns into an error of that status


_OPENER = urllib.request.build_opener(_NoRedirect)


def server_of(environment: Mapping[str, str] = os.environ) -> Server:
    """What the environment names; `UserError` names each variable that is missing or cannot be meant."""
    url, model, key = (environment.get(name, "").strip() for name in (URL, MODEL, KEY))
    problems = []
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
        found = "is not set" if not url else "is no plain http or https address (it is not shown here)"
        problems.append(
            f"the environment variable {URL} {found}; the judge is an OpenAI-compatible endpoint; expected its base "
            f"address, as http://localhost:8000/v1; a key belongs into {KEY}."
        )
    if not model:
        problems.append(f"the environment variable {MODEL} is not set; expected the name of the model to ask.")
    if not key.isprintable() or not key.isascii():
        problems.append(f"the environment variable {KEY} holds characters that no key has; set it again.")
    if problems:
        raise UserError(*problems)
    url = url.rstrip("/")
    return Server(url if url.endswith("/chat/completions") else f"{url}/chat/completions", model, key or None)


def ask_all(
    server: Server,
    bodies: Sequence[tuple[str, dict[str, Any]]],
    patience: Patience,
    keep: Callable[[str, str], None],
    stop: Any = None,
    earlier: int = 0,
    is_shown: bool = True,
) -> dict[str, Failed]:
    """Ask all (key, body); `keep(key, text)` is called with each answer as it comes. Gives why others have none, by
    key.

    Raises `Stopped` after a signal, `RunFault` after more than `max_failures` failures, of which `earlier` happened
    before. Both keep what was answered.
    """
    failures: dict[str, Failed] = {}
    ended = Event()
    rest: Iterator[tuple[str, dict[str, Any]]] = iter(bodies)
    with (
        ThreadPoolExecutor(patience.parallel) as pool,
        Progress(total=len(bodies), unit="requests", desc="judging", disable=None if is_shown else True) as bar,
    ):
        running: dict[Any, str] = {}
        try:
            while True:
                for key, body in rest if len(running) < patience.parallel else ():
                    running[pool.submit(_ask, server, body, patience, ended)] = key
                    if len(running) == patience.parallel:
                        break
                if not running:
                    return failures
                done, _ = wait(running, timeout=0.2, return_when=FIRST_COMPLETED)
                for future in done:
                    key = running.pop(future)
                    try:
                        keep(key, future.result())
                    except Failed as error:
                        failures[key] = error
                    bar.update()
                if earlier + len(failures) > patience.max_failures:
                    place, count = urlsplit(server.url).netloc, earlier + len(failures)
                    raise RunFault(
                        f"{place}: {count} requests to the judge failed, more than "
                        f"{patience.key}.max_failures={patience.max_failures}; the last: "
                        f"{list(failures.values())[-1]}. All answers so far are kept. Give the command again with "
                        "resume=true; only what is missing is asked."
                    )
                if stop:
                    raise Stopped(f"stopped by {stop.name}; the judge's answers so far are kept.", "Give it again.")
        finally:
            ended.set()
            for future, key in running.items():  # what is under way ends, and counts
                if not future.cancel() and not future.exception():
                    keep(key, future.result())


def _ask(server: Server, body: dict[str, Any], patience: Patience, ended: Event) -> str:
    """The text of the reply to one request, asked again as `patience` says."""
    for attempt in range(patience.retries + 1):
        try:
            return ask_once(server, body, patience.timeout_s)
        except Failed as error:
            pause = min(max(error.after, patience.wait_s * 2**attempt), LONGEST_WAIT)
            if error.is_final or attempt == patience.retries or ended.wait(pause):
                raise
    raise AssertionError("no attempt")


def ask_once(server: Server, body: dict[str, Any], timeout_s: float) -> str:
    """One attempt. Raises `Failed`; `UserError` where no request of this run can succeed."""
    headers = {"Content-Type": "application/json", "User-Agent": "laddpo"}
    if server.key:
        headers["Authorization"] = f"Bearer {server.key}"
    request = urllib.request.Request(server.url, json.dumps(body).encode(), headers, method="POST")
    end = time.monotonic() + timeout_s
    try:
        with _OPENER.open(request, timeout=timeout_s) as response:
            content = b""
            while part := response.read1(1 << 16):
                content += part
                if time.monotonic() > end or len(content) > LONGEST_REPLY:
                    raise TimeoutError("the reply does not end")
    except urllib.error.HTTPError as error:
        raise _of_status(server, error) from None
    except (OSError, HTTPException) as error:  # URLError and timeouts are OSErrors
        reason = getattr(error, "reason", error)
        raise Failed(server.hide(f"{type(error).__name__}: {reason}")) from None
    return _text(server, content)


def _of_status(server: Server, error: urllib.error.HTTPError) -> Exception:
    try:
        said = server.hide(" ".join(error.read(2000).decode("utf-8", "replace").split()))[:200]
    except (OSError, HTTPException):
        said = ""
    place, code = urlsplit(server.url).netloc, error.code
    if code in WRONG or 300 <= code < 400:
        why = WRONG.get(code, "it sends requests elsewhere, which is not followed")
        return UserError(
            f"{URL} ({place}) answered {code}: {why}. It said: {said or 'nothing'}. Correct {URL}, {KEY} or {MODEL} "
            f"({server.model})."
        )
    after = error.headers.get("Retry-After", "")
    return Failed(f"status {code}: {said}", code < 500 and code not in AGAIN, float(after) if after.isdigit() else 0.0)


def _text(server: Server, content: bytes) -> str:
    """The text of the first choice. A reply of another shape is no answer; one without text is an empty one."""
    try:
        text = json.loads(content)["choices"][0]["message"].get("content")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        raise Failed(server.hide(f"no chat completion: {content[:200]!r}")) from None
    return server.hide(text) if isinstance(text, str) else ""
