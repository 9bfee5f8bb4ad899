"""doctor prints one table whatever the machine, and its exit code says whether a run would work."""

import pytest

from laddpo.cli import machine_checks
from laddpo.cli.app import cli
from laddpo.cli.machine_checks import FAIL, OK, WARN, Finding, examine, table
from laddpo.settings.compose import compose


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
    monkeypatch.chdir(tmp_path)

    def no_moon():
        raise OSError("no moon")
        yield

    monkeypatch.setattr(machine_checks, "check_start", no_moon)
    config = compose()
    findings = examine(config.hardware, config.quantization, config.model, config.paths, config.logger)
    assert {"python", "packages", "gpu", "quantization", "model", "data folder"} <= {
        finding.what for finding in findings
    }
    assert findings[-1].what == "start" and findings[-1].status == FAIL
    assert "no moon" in findings[-1].found


@pytest.mark.parametrize(
    ("host", "status"), [("api.wandb.ai", OK), ("github.com", WARN), (None, WARN)], ids=["wandb", "another", "no file"]
)
def test_a_key_is_one_for_the_host_of_wandb(monkeypatch, tmp_path, host, status):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_BASE_URL", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    if host:
        (tmp_path / "netrc").write_text(f"machine {host} login user password {'0a' * 20}\n")
        (tmp_path / "netrc").chmod(0o600)
    (finding,) = machine_checks.check_loggers(compose(["logger=wandb", "logger.wandb_mode=online"]).logger)
    assert finding.status == status
    assert ("a key is set" in finding.found) is (status == OK)


def test_a_failed_line_ends_in_exit_code_one(monkeypatch, capsys):
    def found(status, text, fix):
        monkeypatch.setattr("laddpo.doctor.examine", lambda *groups: [Finding("x", status, text, fix)])

    found(FAIL, "broken", "mend it")
    assert cli("doctor", []) == 1
    assert "mend it" in capsys.readouterr().out
    found(WARN, "slow", "wait")
    assert cli("doctor", []) == 0
