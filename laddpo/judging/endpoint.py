"""Another model as a judge, behind an OpenAI-compatible endpoint: every contest is asked in both orders.

Two orders that disagree are a tie. A reply without a verdict is kept and counted, and not asked again.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import StrictUndefined, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from laddpo.errors import RunFault, UserError
from laddpo.judging.judges import FAILED, NO_VERDICT, Answered, Verdict, rating
from laddpo.judging.kept import Kept, key_of
from laddpo.judging.server import Failed, Patience, Server, ask_all
from laddpo.preference.reading.pairs import Message, prompt_rows

OWN_PROMPT = Path(__file__).with_name("judge_prompt.jinja")
MARK = re.compile(r"\[\[\s*(A|B|tie)\s*\]\]", re.IGNORECASE)
OUTCOMES = {"a": 1.0, "b": 0.0, "tie": 0.5}


class JudgePrompt:
    """What the judge is told: a jinja file with `messages` (role and content), `answer_a` and `answer_b`."""

    def __init__(self, path: str | None, key: str):
        place = Path(path).expanduser() if path else OWN_PROMPT
        self.name = f"{key}.prompt ({place})"
        try:
            text = place.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{self.name} could not be read: {error}. Expected a jinja file in UTF-8.") from error
        self.sha256 = hashlib.sha256(text.encode()).hexdigest()
        try:
            self.template = ImmutableSandboxedEnvironment(undefined=StrictUndefined).from_string(text)
        except TemplateError as error:
            line = getattr(error, "lineno", None)
            raise UserError(f"{self.name}: line {line}: {error}. Correct the template.") from error
        probe = self.render(Answered((Message("user", "?"),), "<first>"), "<second>")
        missing = [name for name, text in (("answer_a", "<first>"), ("answer_b", "<second>")) if text not in probe]
        if missing:
            raise UserError(f"{self.name} does not show {' and '.join(missing)}. Write {{{{ {missing[0]} }}}} into it.")

    def render(self, first: Answered, second: str) -> str:
        """The text of the question."""
        try:
            return self.template.render(
                messages=prompt_rows(first.prompt), answer_a=first.text, answer_b=second, gold=first.gold
            )
        except Exception as error:  # whatever a template may do
            raise UserError(
                f"{self.name}: {type(error).__name__}: {error}. It knows messages, answer_a, answer_b and gold."
            ) from error


class EndpointJudge:
    """Compares answers by asking `server`. `request` is sent beside the question. `comparisons`, `tie` and `salt` are
    for `rate`."""

    def __init__(
        self,
        server: Server,
        prompt: JudgePrompt,
        request: dict[str, Any],
        patience: Patience,
        data_dir: Path,
        stop: Any = None,
        comparisons: int = 0,
        tie: float = 0.0,
        salt: str = "",
    ):
        self.server, self.prompt, self.request, self.patience = server, prompt, request, patience
        self.stop, self.comparisons, self.tie, self.salt = stop, comparisons, tie, salt
        self.about = {"judge": "endpoint", "model": server.model, "prompt": prompt.sha256, "request": request}
        self.kept, self.failed = Kept(data_dir, self.about), 0
        self.passing: list[str] = []  # failures that another run may not meet

    def fields(self) -> dict[str, Any]:
        """What verdicts depend on. The address is not part of it."""
        rates = {"comparisons": self.comparisons, "tie": self.tie} if self.comparisons else {}
        return {**self.about, **rates}

    def compare(self, contests: Sequence[tuple[Answered, Answered]]) -> list[Verdict]:
        """Equal answers are a tie that nobody needs to be asked about."""
        asked = [pair for pair in contests if pair[0].text != pair[1].text]
        bodies = [body for first, second in asked for body in (self._body(first, second), self._body(second, first))]
        keys = [key_of(body) for body in bodies]
        missing = {key: body for key, body in zip(keys, bodies, strict=True) if self.kept.get(key) is None}
        asks = (
            self.server,
            list(missing.items()),
            self.patience,
            self._keep,
            self.stop,
            self.failed,
            self.comparisons == 0,
        )
        failures = ask_all(*asks) if missing else {}
        self.failed += len(failures)
        self.passing += [str(failure) for failure in failures.values() if not failure.is_final]
        orders = iter([keys[i : i + 2] for i in range(0, len(keys), 2)])
        return [
            Verdict(0.5, details={"orders": []}) if first.text == second.text else self._verdict(next(orders), failures)
            for first, second in contests
        ]

    def rate(self, answers: Sequence[Answered]) -> list[float | None]:
        """The share of its contests that each answer wins."""
        return rating(self.compare, answers, self.comparisons, f"{self.salt}\x00{prompt_rows(answers[0].prompt)}")

    def finish(self) -> None:
        """Ratings must not depend on what failed by chance."""
        if self.passing:
            raise RunFault(
                f"{len(self.passing)} requests to the judge failed; the last: {self.passing[-1]}. All answers so far "
                "are kept. Give the command again; only what is missing is asked."
            )

    def close(self) -> None:
        """Nothing stays open."""

    def _body(self, first: Answered, second: Answered) -> dict[str, Any]:
        said = [{"role": "user", "content": self.prompt.render(first, second.text)}]
        return {"model": self.server.model, "messages": said, **self.request}

    def _keep(self, key: str, reply: str) -> None:
        self.kept.add(key, verdict=verdict_in(reply), reply=reply)

    def _verdict(self, keys: Sequence[str], failures: dict[str, Failed]) -> Verdict:
        if any(key in failures for key in keys):
            return Verdict(None, FAILED, {"problem": str(next(failures[key] for key in keys if key in failures))})
        said = [self.kept.get(key)["verdict"] for key in keys]
        if None in said:
            return Verdict(None, NO_VERDICT, {"orders": said})
        straight, swapped = OUTCOMES[said[0]], 1 - OUTCOMES[said[1]]
        return Verdict(straight if straight == swapped else 0.5, "", {"orders": said})


def verdict_in(reply: str) -> str | None:
    """The last mark of a reply: a, b or tie; None without one."""
    found = MARK.findall(reply)
    return found[-1].lower() if found else None
