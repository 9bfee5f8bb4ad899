"""doctor prints one table whatever the machine, and its exit code says whether a run would work."""

from laddpo import doctor
from laddpo.app import cli
from laddpo.doctor import FAIL, OK, WARN, Finding, examine, table


def test_the_table_has_a_line_for_each_finding_and_a_fix_for_each_that_is_not_ok():
    shown = table(
        [
            Finding("a", OK, "fine", "unused"),
            Finding("bb", WARN, "small", "free some"),
            Finding("c", FAIL, "no", "get it"),
        ]
    )
    assert shown.splitlines() == [
        "ok    a   fine",
        "warn  bb  small",
        "          -> free some",
        "fail  c   no",
        "          -> get it",
        "1 ok, 1 warn, 1 fail",
    ]


def test_this_machine_is_examined_and_a_check_that_breaks_is_a_line_too(monkeypatch, tmp_path):
    from laddpo.compose import compose

    monkeypatch.chdir(tmp_path)

    def check_moon(config):
        raise OSError("no moon")
        yield

    checks = [check for check in doctor.CHECKS if check.__name__ != "check_start"]
    monkeypatch.setattr(doctor, "CHECKS", (*checks, check_moon))
    findings = examine(compose())
    assert {"python", "packages", "gpu", "quantization", "model", "data folder"} <= {
        finding.what for finding in findings
    }
    assert findings[-1].what == "moon" and findings[-1].status == FAIL
    assert "no moon" in findings[-1].found


def test_a_failed_line_ends_in_exit_code_one(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "CHECKS", (lambda config: [Finding("x", FAIL, "broken", "mend it")],))
    assert cli("doctor", []) == 1
    assert "mend it" in capsys.readouterr().out
    monkeypatch.setattr(doctor, "CHECKS", (lambda config: [Finding("x", WARN, "slow", "wait")],))
    assert cli("doctor", []) == 0
