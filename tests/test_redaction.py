"""Secrets of the environment: no setting reads them, and no file, message or table shows them."""

import json
from pathlib import Path

import pytest
import yaml

from laddpo import doctor
from laddpo.cli import machine_checks
from laddpo.cli.app import cli
from laddpo.errors import RunFault, Stopped, UserError
from laddpo.results.model_card import CardFacts, card_text
from laddpo.settings.compose import compose, read_config, write_config
from laddpo.settings.redaction import find_secrets, foreign_variables, redact
from laddpo.settings.schema import RunConfig
from laddpo.training.trackers import TRACKERS
from laddpo.training.tracking import Trackers

CANARY = "cAn4ry/K7MDENG+bPxRfi"
SECRETS = (
    *("AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "AWS_SESSION_TOKEN", "AZURE_CLIENT_SECRET", "OPENAI_API_KEY"),
    *("AZURE_STORAGE_CONNECTION_STRING", "GITHUB_TOKEN", "GH_TOKEN", "NPM_TOKEN", "COMET_API_KEY", "PGPASSWORD"),
    *("NEPTUNE_API_TOKEN", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "SSH_PRIVATE_KEY", "MYSQL_PWD"),
    *("GOOGLE_APPLICATION_CREDENTIALS", "DOCKER_AUTH_CONFIG", "SLACK_WEBHOOK_URL", "SENTRY_DSN", "JWT", "DB_PASS"),
    *("aws_secret_access_key", "My_Api_Key", "SMTP_PASSPHRASE", "LADDPO_TOKEN", "KEY"),
)
ADDRESSES = ("DATABASE_URL", "REDIS_URL", "SOME_SERVER")  # told by their value
READABLE = ("HOME", "USER", "TMPDIR", "SLURM_JOB_ID", "LADDPO_STUDY", "DATA_DIR", "PROJECT_ROOT", "MODEL_PATH")


@pytest.fixture(params=SECRETS)
def secret(request, monkeypatch) -> str:
    """The name of a variable that holds the canary."""
    monkeypatch.setenv(request.param, CANARY)
    return request.param


@pytest.mark.parametrize("name", ADDRESSES)
def test_the_password_of_an_address_is_hidden_with_and_without_the_address(name, monkeypatch):
    monkeypatch.setenv(name, "postgres://me:cAn4ry%2FK7@db.example/rows")
    for text in ("postgres://me:cAn4ry%2FK7@db.example/rows", "the password cAn4ry/K7 is wrong", "cAn4ry%2FK7"):
        assert "K7" not in redact(text)
    assert find_secrets({"logger.wandb_name": "cAn4ry/K7"})


def test_a_value_is_hidden_in_every_way_of_writing_it(secret):
    written = [CANARY, repr(CANARY), json.dumps([CANARY]), yaml.safe_dump({"a": CANARY}), f"https://h/?k={CANARY}"]
    assert not [text for text in written if "K7MDENG" in redact(text)]


def test_a_private_key_is_hidden_whole(monkeypatch):
    body = "\n".join(["MIIEvQIBADANBgkqhkiG9w0BAQEFAASC"] * 3)
    key = f"-----BEGIN RSA PRIVATE KEY-----\n{body}\n-----END RSA PRIVATE KEY-----"
    assert "MIIEv" not in redact(f"before {key} after") and "after" in redact(f"before {key} after")
    monkeypatch.setenv("DEPLOY_KEY", key)
    assert "MIIEv" not in redact(f"line 2: {body.splitlines()[1]}") + redact(json.dumps(key))


def test_words_and_files_that_exist_are_not_hidden(monkeypatch, tmp_path):
    monkeypatch.setenv("KEY_FILE_TOKEN", str(tmp_path))
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setenv("AUTH_MODE", "none")
    assert redact(f"{tmp_path}/run is false, none") == f"{tmp_path}/run is false, none"


WAYS = {
    "alone": "${oc.env:NAME}",
    "quoted": "${oc.env:'NAME'}",
    "behind one that may be read": "${oc.env:HOME}/${oc.env:NAME}",
    "with spaces": "${ oc.env : NAME }",
    "with a default": "${oc.env:NAME,nothing}",
    "as a default": "${oc.env:HOME,${oc.env:NAME}}",
    "inside another resolver": "${oc.decode:${oc.env:NAME}}",
    "by a name that a setting gives": "${oc.env:${logger.wandb_project}}",
    "by a resolver that a setting names": "${oc.${logger.wandb_project}:NAME}",
}


def test_no_setting_reads_a_secret_of_the_environment(monkeypatch, capsys, tmp_path):
    """PLAIN_NAME: a variable of which nothing tells that it holds one is not read either."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", CANARY)
    monkeypatch.setenv("PLAIN_NAME", CANARY)
    monkeypatch.chdir(tmp_path)
    values = [
        (way, text.replace("NAME", name))
        for way, text in WAYS.items()
        for name in ("AWS_SECRET_ACCESS_KEY", "PLAIN_NAME")
    ]
    for way, value in values:
        assert foreign_variables({"a": {"b": [value]}}), (way, value)
    (tmp_path / "dpo").mkdir()
    (tmp_path / "dpo" / "mine.yaml").write_text("defaults: [default]\nloss: ${oc.env:PLAIN_NAME}\n", encoding="utf-8")
    of_yaml = ["--config-dir", str(tmp_path), "dpo=mine"]
    listed = ", ".join(f'"{value}"' for _, value in values)
    for command in (
        [f"logger.wandb_tags=[{listed}]", f"study.settings=[{listed}]", "--cfg", "job", "--resolve"],
        ["dpo.loss=${oc.env:PLAIN_NAME}", "dpo.betta=1"],
        of_yaml,
        [*of_yaml, "dpo.betta=1"],
        [*of_yaml, "--cfg", "job", "--resolve"],
        ["-m", "logger.wandb_name='${oc.env:PLAIN_NAME}',b", "output_dir=sweep"],
    ):
        assert cli("train", command, lambda config, folder: pytest.fail("ran")) == 2, command
        captured = capsys.readouterr()
        assert "K7MDENG" not in captured.out + captured.err, command
        assert "from the environment" in captured.err
    assert [path.name for path in tmp_path.iterdir()] == ["dpo"]


def test_variables_that_name_places_and_jobs_are_read(monkeypatch):
    for name in READABLE:
        monkeypatch.setenv(name, "somewhere")
    written = "/".join(f"${{oc.env:{name}}}" for name in READABLE)
    assert compose([f"output_dir={written}"]).output_dir == "/".join(["somewhere"] * len(READABLE))
    assert foreign_variables({"a": "${oc.env:SECRET_DIR} ${oc.env:TOKEN_PATH}"}), "named like secrets all the same"


def test_no_sink_shows_a_secret_of_the_environment(monkeypatch, tmp_path, capsys):
    """Whatever brought it there: the configuration, trackers, the card, messages, tracebacks, the doctor's table."""
    for number, name in enumerate(SECRETS):
        monkeypatch.setenv(name, f"{CANARY}{number}")
    everything = " ".join(f"{CANARY}{number}" for number in range(len(SECRETS)))
    config = compose(["logger=none"])
    config.logger.wandb_name = config.data.dataset_name = everything
    config.logger.wandb_tags = [everything]
    write_config(config, tmp_path / "run")
    with Trackers(tmp_path / "board", ["tensorboard"], {}, {"a": {"b": [everything]}}) as trackers:
        trackers.scalars(1, {"loss": 1.0})
    said: list[str] = []

    def fails(*arguments) -> None:
        raise RuntimeError(everything)

    monkeypatch.setitem(TRACKERS, "wandb", fails)
    with Trackers(tmp_path / "other", ["wandb"], {}, {}, say=said.append):
        pass
    card = card_text(config, CardFacts("fp32", everything, 1), {}, None, everything, 1, [])
    errors = (UserError(everything), RunFault(everything), Stopped(everything, everything), RuntimeError(everything))
    for error in errors:

        def main(config: RunConfig, folder: Path, error=error) -> None:
            raise error

        assert cli("train", [], main)
    monkeypatch.setattr("laddpo.doctor.examine", lambda *groups: [machine_checks.Finding("a", "ok", everything)])
    doctor.main(config, tmp_path)
    shown = capsys.readouterr()
    texts = [shown.out, shown.err, card, *said]
    assert all("<hidden>" in text for text in texts)
    assert not [text for text in texts if "K7MDENG" in text]
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) >= 2 and not [path for path in files if b"K7MDENG" in path.read_bytes()]
    assert "<hidden>" in read_config(tmp_path / "run").logger.wandb_name


def test_the_children_of_a_sweep_are_given_no_secret(monkeypatch, tmp_path):
    """Neither on their command lines, which every user of the machine can list, nor in sweep.json and job.json."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", CANARY)
    monkeypatch.chdir(tmp_path)
    seen: list[list[str]] = []

    def run_child(command: list[str], folder: Path, log: Path | None = None) -> int:
        seen.append(command)
        return 0

    monkeypatch.setattr("laddpo.jobs.runner.run_child", run_child)
    for value in (CANARY, "${oc.env:AWS_SECRET_ACCESS_KEY}"):
        assert cli("train", ["-m", f"logger.wandb_name='{value}'", "dpo.beta=1,2", "output_dir=s"]) == 2
    named = ["logger=wandb", "logger.wandb_name='${oc.env:HOME}'"]
    assert cli("train", ["-m", "dpo.beta=1,2", "output_dir=s", *named]) == 0
    assert len(seen) == 2 and not [text for command in seen for text in command if "K7MDENG" in text]
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files and not [path for path in files if b"K7MDENG" in path.read_bytes()]
