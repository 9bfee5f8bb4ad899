"""Judges by themselves: rules, contests among several answers, and an endpoint with all that can go wrong there."""

from __future__ import annotations

import json
import threading
import time
from types import SimpleNamespace

import pytest

from laddpo.errors import RunFault, Stopped, UserError
from laddpo.evaluation.winrate import win_rate
from laddpo.inputs.judge import OPENERS, Surroundings, open_judge
from laddpo.judging.endpoint import JudgePrompt, verdict_in
from laddpo.judging.judges import FAILED, NO_VERDICT, RULES, Answered, ScoringJudge, Verdict, rating, ring
from laddpo.judging.server import server_of
from laddpo.preference.reading.pairs import user_prompt
from laddpo.settings.judge_schema import JudgeSettings, RatingSettings, fields_read
from laddpo.storage.seals import CheckedLines
from tests.fake_judge import KEY, longer_wins, serving, shown

QUICK = {"kind": "endpoint", "wait_s": 0.001, "timeout_s": 30.0, "retries": 2, "parallel": 2}


def contests(*pairs: tuple[str, str], question: str = "why?"):
    return [tuple(Answered(user_prompt(question), text) for text in pair) for pair in pairs]


def endpoint(folder, stop=None, **settings):
    return open_judge(RatingSettings(**{**QUICK, **settings}), Surroundings("data.judge", folder, stop=stop, seed=1))


def outcomes(judge, *pairs):
    return [verdict.outcome for verdict in judge.compare(contests(*pairs))]


@pytest.mark.parametrize(
    ("rule", "pattern", "expected"),
    [
        ("right", None, [1.0, 0.0, None]),
        ("shorter", None, [-1.0, -2.0, -3.0]),
        ("longer", None, [1.0, 2.0, 3.0]),
        ("must_match", "^b+$", [0.0, 1.0, 0.0]),
        ("must_not_match", "^b+$", [1.0, 0.0, 1.0]),
    ],
)
def test_rules(rule, pattern, expected):
    answers = [Answered(user_prompt("?"), text, gold) for text, gold in (("a", "a"), ("bb", "a"), ("abc", None))]
    grade = lambda texts, golds: [text == gold for text, gold in zip(texts, golds, strict=True)]  # noqa: E731
    assert RULES[rule].score(pattern, grade)(answers) == expected


def test_scores_within_the_tie_are_one_and_a_missing_score_is_no_verdict():
    judge = ScoringJudge({}, lambda answers: [{"a": 1.0, "b": 1.5, "c": None}[a.text] for a in answers], tie=0.5)
    assert outcomes(judge, ("a", "b"), ("a", "c")) == [0.5, None]
    judge.tie = 0.4
    assert outcomes(judge, ("a", "b"), ("b", "a")) == [0.0, 1.0]


def test_contests_among_several_answers_are_bounded_spread_and_rated():
    assert ring(4, 99) == [(0, 1), (1, 2), (2, 3), (3, 0), (0, 2), (1, 3)]
    assert ring(2, 9) == [(0, 1)] and ring(1, 9) == [] and len(ring(8, 8)) == 8
    answers = [Answered(user_prompt("?"), "x" * n) for n in (1, 2, 3, 4)]
    judge = ScoringJudge({}, lambda asked: [float(len(a.text)) for a in asked])
    assert rating(judge.compare, answers, 6, "") == [0, 1 / 3, 2 / 3, 1]
    assert rating(lambda asked: [Verdict(None)] * len(asked), answers, 6, "") == [None] * 4


def test_a_win_rate_counts_ties_half_and_leaves_out_what_has_no_verdict():
    pairs = contests(("aaa", "b"), ("aa", "b"), ("a", "bb"), ("a", "b"), ("a", "b"))
    verdicts = [Verdict(1.0), Verdict(0.0), Verdict(1.0), Verdict(0.5), Verdict(None, NO_VERDICT)]
    found = win_rate(verdicts, pairs, 0)
    assert found["tuned"] == 2.5 / 4 and found["items"] == 4 and found["unjudged"] == {NO_VERDICT: 1}
    assert found["longer_won"] == pytest.approx(1 / 3)  # of three decided contests between unequal lengths
    assert found["mean_characters"] == {"base": 1.2, "tuned": 1.6}
    with pytest.raises(UserError, match="no verdict on any of 1 prompts"):
        win_rate(verdicts[-1:], pairs[-1:], 0)


@pytest.mark.parametrize("kind", [JudgeSettings, RatingSettings])
@pytest.mark.parametrize("name", OPENERS)
def test_a_judge_reads_what_the_table_says(name, kind, tmp_path, monkeypatch):
    """The settings' checks refuse everything else."""
    from laddpo.models import loading

    read = set()

    class Spied(kind):
        def __getattribute__(self, key):
            read.add(key)
            return super().__getattribute__(key)

    monkeypatch.setattr(loading, "weights_fingerprint", lambda *place: "sha256:0")
    with serving(monkeypatch, longer_wins):
        settings = Spied(kind=name, model=str(tmp_path), rule="must_match", pattern="x")
        open_judge(settings, Surroundings("evaluation.judge", tmp_path))
    read = {key for key in read if not key.startswith("_")}
    assert read - {"kind"} == fields_read(kind(kind=name, rule="must_match"), kind is RatingSettings)


def test_both_orders_are_asked_and_a_favour_for_a_place_is_a_tie(monkeypatch, tmp_path):
    with serving(monkeypatch, longer_wins) as judge:
        pairs = [("long", "s"), ("s", "long"), ("ab", "cd"), ("same", "same")]
        assert outcomes(endpoint(tmp_path), *pairs) == [1, 0, 0.5, 0.5]
        asked = {shown(body["messages"][0]["content"]) for body in judge.asked}
        assert {("long", "s"), ("s", "long"), ("ab", "cd"), ("cd", "ab")} == asked
        assert judge.asked[0]["model"] == "judge-1" and judge.asked[0]["temperature"] == 0
        assert set(judge.headers) == {("/v1/chat/completions", f"Bearer {KEY}")}
    with serving(monkeypatch, lambda text, number: "[[A]]"):
        (verdict,) = endpoint(tmp_path / "other").compare(contests(("long", "s")))
        assert verdict == Verdict(0.5, "", {"orders": ["a", "a"]})


def test_a_reply_without_a_verdict_is_kept_counted_and_not_asked_again(monkeypatch, tmp_path):
    with serving(monkeypatch, lambda text, number: "I cannot say."):
        (verdict,) = endpoint(tmp_path).compare(contests(("long", "s")))
    assert (verdict.outcome, verdict.why) == (None, NO_VERDICT)
    with serving(monkeypatch, longer_wins) as judge:
        (verdict,) = endpoint(tmp_path).compare(contests(("long", "s")))
        assert verdict.why == NO_VERDICT and not judge.asked
    (log,) = tmp_path.glob("judged/*/judged.jsonl")
    assert [record["reply"] for record in CheckedLines(log).read()] == ["I cannot say."] * 2
    assert verdict_in("[[A]] no, [[ b ]]") == "b" and verdict_in("[[TIE]]") == "tie" and verdict_in("[A]") is None


def test_what_passes_is_asked_again_with_waiting_and_what_does_not_is_counted(monkeypatch, tmp_path):
    """429 with Retry-After, 500, a reply that is no completion, one that is cut off; then an answer."""
    trouble = [(429, {"Retry-After": "0"}, "slow down"), (500, {}, "oops"), (200, {}, "<html>")]

    def reply(text, number):
        return trouble[number - 1] if number <= len(trouble) else longer_wins(text, number)

    with serving(monkeypatch, reply) as judge:
        assert outcomes(endpoint(tmp_path, retries=3, parallel=1), ("long", "s")) == [1.0]
        assert len(judge.asked) == 5
    with serving(monkeypatch, lambda text, number: (400, {}, f"too long {KEY}")) as judge:
        (verdict,) = endpoint(tmp_path, parallel=1).compare(contests(("longer", "s")))
        assert verdict.why == FAILED and "status 400: too long <hidden>" in verdict.details["problem"]
        assert len(judge.asked) == 2  # another attempt would not help
    with serving(monkeypatch, lambda text, number: (200, {"Content-Length": "999"}, "{")):
        (verdict,) = endpoint(tmp_path, retries=0).compare(contests(("longer", "s")))
        assert verdict.why == FAILED


def test_a_server_that_is_silent_or_gone_fails_in_the_time_that_is_stated(monkeypatch, tmp_path):
    free = threading.Event()
    with serving(monkeypatch, lambda text, number: free.wait(5) and "[[A]]") as judge:
        begun = time.monotonic()
        quick = {"timeout_s": 0.1, "retries": 1, "parallel": 1}
        (verdict,) = endpoint(tmp_path, **quick).compare(contests(("long", "s")))
        assert verdict.why == FAILED and "timed out" in verdict.details["problem"]
        assert time.monotonic() - begun < 3
        free.set()
    (verdict,) = endpoint(tmp_path, retries=0).compare(contests(("long", "s")))
    assert verdict.why == FAILED and "refused" in verdict.details["problem"]
    assert judge.asked


def test_too_many_failures_stop_and_the_next_run_asks_only_what_is_missing(monkeypatch, tmp_path):
    pairs = [("x" * n, "y") for n in range(2, 12)]

    def breaks(text, number):
        return longer_wins(text, number) if number <= 7 else (503, {}, "down")

    with (
        serving(monkeypatch, breaks),
        pytest.raises(RunFault, match=r"more than data\.judge\.max_failures=2.*status 503: down"),
    ):
        outcomes(endpoint(tmp_path, max_failures=2, retries=0), *pairs)
    (log,) = tmp_path.glob("judged/*/judged.jsonl")
    kept = len(CheckedLines(log).read())
    assert kept == 7
    log.write_bytes(log.read_bytes()[:-9])  # the last line was torn, too
    with serving(monkeypatch, longer_wins) as judge:
        assert outcomes(endpoint(tmp_path), *pairs) == [1.0] * 10
        assert len(judge.asked) == 20 - kept + 1
    with serving(monkeypatch, longer_wins) as judge:
        assert outcomes(endpoint(tmp_path), *pairs) == [1.0] * 10 and not judge.asked


def test_a_signal_stops_between_replies_and_keeps_them(monkeypatch, tmp_path):
    class Stop(SimpleNamespace):
        def __bool__(self):
            return self.name is not None

    stop = Stop(name=None)

    def reply(text, number):
        stop.name = "SIGTERM" if number == 3 else stop.name
        return longer_wins(text, number)

    pairs = [("x" * n, "y") for n in range(2, 12)]
    with serving(monkeypatch, reply) as judge:
        with pytest.raises(Stopped, match=r"stopped by SIGTERM"):
            outcomes(endpoint(tmp_path, stop=stop), *pairs)
        first = len(judge.asked)
        assert 3 <= first < 20
        stop.name = None
        judge.reply = longer_wins
        assert outcomes(endpoint(tmp_path, stop=stop), *pairs) == [1.0] * 10
        assert len(judge.asked) == 20


@pytest.mark.parametrize(("status", "said"), [(401, "is refused"), (404, "no such address"), (302, "not followed")])
def test_a_wrong_key_or_address_ends_at_once_without_showing_the_key(status, said, monkeypatch, tmp_path):
    answer = (status, {"Location": "http://127.0.0.1:9/"}, json.dumps({"error": f"bad key {KEY}"}))
    with serving(monkeypatch, lambda text, number: answer) as judge:
        with pytest.raises(UserError, match=said) as error:
            outcomes(endpoint(tmp_path, parallel=1, retries=9), ("long", "s"))
        assert KEY not in str(error.value) and len(judge.asked) <= 2


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({}, "LADDPO_JUDGE_URL is not set"),
        ({"LADDPO_JUDGE_URL": "http://me:secret@host/v1"}, "is no plain http or https address"),
        ({"LADDPO_JUDGE_URL": "file:///etc/passwd"}, "is no plain http or https address"),
        ({"LADDPO_JUDGE_URL": "http://host/v1", "LADDPO_JUDGE_MODEL": "m", "LADDPO_JUDGE_KEY": "a\nb"}, "no key has"),
    ],
)
def test_an_environment_that_cannot_be_meant_is_refused_and_not_shown(environment, said):
    with pytest.raises(UserError, match=said) as error:
        server_of(environment)
    assert "secret" not in str(error.value)
    server = server_of({"LADDPO_JUDGE_URL": "http://host/v1/", "LADDPO_JUDGE_MODEL": "m", "LADDPO_JUDGE_KEY": KEY})
    assert server.url == "http://host/v1/chat/completions" and KEY not in repr(server)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{{ answer_a }} {{ answer_c }}", "answer_c.* is undefined"),
        ("{{ answer_a", "line 1"),
        ("{{ answer_a }}", "does not show answer_b"),
        ("{{ answer_a.__class__.__mro__ }}{{ answer_b }}", "SecurityError"),
    ],
)
def test_a_prompt_of_ones_own_is_checked_and_its_content_tells_verdicts_apart(text, said, tmp_path):
    path = tmp_path / "mine.jinja"
    path.write_text(text)
    with pytest.raises(UserError, match=said):
        JudgePrompt(str(path), "evaluation.judge")
    path.write_text("{{ messages[0].content }}: {{ answer_a }} or {{ answer_b }}?")
    (first, second), *_ = contests(("x", "y"))
    prompt = JudgePrompt(str(path), "evaluation.judge")
    assert prompt.render(first, second.text) == "why?: x or y?"
    assert prompt.sha256 != JudgePrompt(None, "evaluation.judge").sha256
