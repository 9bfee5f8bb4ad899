"""A small OpenAI-compatible server for tests: it answers as a function of the request says, and remembers requests."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KEY = "sk-test-0123456789abcdefghij"


class FakeJudge:
    """`reply(text, number)` gives the text of a reply to the n-th request, or (status, headers, body), or raises."""

    def __init__(self, reply: Callable):
        self.reply, self.asked, self.headers, self.lock = reply, [], [], threading.Lock()

    def handler(self):
        judge = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                text = body["messages"][0]["content"]
                with judge.lock:
                    judge.asked.append(body)
                    judge.headers.append((self.path, self.headers.get("Authorization")))
                    found = judge.reply(text, len(judge.asked))
                if isinstance(found, str):
                    found = (200, {}, json.dumps({"choices": [{"message": {"role": "assistant", "content": found}}]}))
                status, headers, content = found
                with contextlib.suppress(OSError):  # the client may be gone
                    self.send_response(status)
                    for name, value in {"Content-Length": str(len(content.encode())), **headers}.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(content.encode())

            def log_message(self, *arguments) -> None:
                pass

        return Handler


@contextlib.contextmanager
def serving(monkeypatch, reply: Callable) -> Iterator[FakeJudge]:
    """The environment names the server inside the block."""
    judge = FakeJudge(reply)
    server = ThreadingHTTPServer(("127.0.0.1", 0), judge.handler())
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("LADDPO_JUDGE_URL", f"http://127.0.0.1:{server.server_port}/v1")
    monkeypatch.setenv("LADDPO_JUDGE_KEY", KEY)
    monkeypatch.setenv("LADDPO_JUDGE_MODEL", "judge-1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    try:
        yield judge
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def shown(text: str) -> tuple[str, str]:
    """Answers A and B in our own judge's prompt."""
    return tuple(text.split(f"[answer {name}]\n")[1].split(f"\n[end of answer {name}]")[0] for name in "AB")


def longer_wins(text: str, number: int) -> str:
    """A judge without favour for a place."""
    a, b = shown(text)
    return "[[tie]]" if len(a) == len(b) else f"It says more. [[{'A' if len(a) > len(b) else 'B'}]]"
