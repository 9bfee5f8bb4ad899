"""Keys and tokens: never in a setting, never in what is printed or written.

`find_secrets(tree)` says where a setting looks like one (without repeating it), or reads a variable of the environment
that it may not read. `redact(text)` takes every known shape, and the values of environment variables that are named
like secrets, out of a text that is about to be shown.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote, unquote

HIDDEN = "<hidden>"


def find_secrets(tree: Any) -> list[str]:
    """One problem for each value that looks like a credential or reads what it may not read from the environment."""
    hidden = _environment_secrets()
    return foreign_variables(tree) + [
        f"{key}: the value looks like {what}; secrets are no settings, they would be written into the run's files; "
        f"set the environment variable instead (HF_TOKEN, WANDB_API_KEY) and revoke it if it was shared."
        for key, value in strings("", tree)
        if (what := _kind_of_secret(key, value, hidden))
    ]


def foreign_variables(tree: Any) -> list[str]:
    """One problem for each value that reads a variable of the environment which does not name a place or a job."""
    return [
        f"{key}: reads {redact(name)!r} from the environment; its value would be written into the run's files; "
        "expected a variable that names a place or a job (HOME, USER, TMPDIR, SLURM_*, LADDPO_*, *_DIR, *_PATH); "
        "write the value itself, or name the variable LADDPO_<NAME> if it is no secret."
        for key, value in strings("", tree)
        for name in re.findall(READS_ENVIRONMENT, value)
        if not re.fullmatch(READABLE, name) or re.search(SECRET_NAME, name, re.IGNORECASE)
    ]


def redact(text: str) -> str:
    """The text with everything that looks like a credential replaced."""
    for value in _environment_secrets():
        text = text.replace(value, HIDDEN)
    for pattern, _ in PATTERNS:
        text = re.sub(pattern, HIDDEN, text)
    return re.sub(USER_IN_URL, rf"\1{HIDDEN}@", text)


def strings(key: str, value: Any) -> Iterator[tuple[str, str]]:
    """The texts in a tree of settings with their dotted keys. Items of a list have the key of the list."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from strings(f"{key}.{name}" if key else str(name), item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from strings(key, item)
    elif isinstance(value, str):
        yield key, value


def _kind_of_secret(key: str, value: str, hidden: list[str]) -> str | None:
    for pattern, what in PATTERNS:
        if re.search(pattern, value):
            return what
    if re.search(USER_IN_URL, value):
        return "an address with a password"
    if any(secret in value for secret in hidden):
        return "the value of an environment variable that holds a secret"
    last = key.rsplit(".", 1)[-1]
    if re.fullmatch(r"[0-9a-f]{40}", value) and "revision" not in last:
        return "an API key"
    if "oc.env" in value:  # judged by the variable's name
        return None
    if re.search(SECRET_KEY, last, re.IGNORECASE) and last not in NOT_SECRET and len(value) >= 8:
        return "a key or token"
    return None


def _environment_secrets() -> list[str]:
    """Values of the environment that must not be shown, the longest first, each also as JSON and an address write it.

    Short values and names of files that exist are words that may occur anywhere: hiding those would spoil settings.
    """
    found = {
        value
        for name, value in os.environ.items()
        if len(value) >= SHORTEST_SECRET and re.search(SECRET_NAME, name, re.IGNORECASE) and not os.path.exists(value)
    }
    found |= {
        unquote(password)
        for value in os.environ.values()
        for password in re.findall(r"\w+://[^/\s:@]*:([^/\s@]+)@", value)
        if len(password) >= SHORTEST_SECRET
    }
    written = {form for value in found for form in (value, json.dumps(value)[1:-1], quote(value, safe=""))}
    lines = {line.strip() for value in found for line in value.splitlines() if len(line.strip()) >= 2 * SHORTEST_SECRET}
    return sorted(written | lines, key=len, reverse=True)


SHORTEST_SECRET = 8
# names of environment variables whose values are hidden wherever they would appear
SECRET_NAME = (
    r"token|secret|passw|passphrase|passcode|_pwd|_pw$|credential|cookie|webhook|bearer|jwt|signature|dsn$|"
    r"connection_?string|private|(^|_)(auth|cred|creds|key|keys|pass|pat|sas|pin)(_|$)|apikey|accesskey"
)
# names of settings that would hold one
SECRET_KEY = r"(token|api_?key|secret|password|passwd|credential)s?$"
# the text after oc.env: in a setting; a resolver whose name another setting gives (${oc.${a}:X}) may be that one too
READS_ENVIRONMENT = r"(?:oc\s*\.\s*env|\$\{[^{}]*\}[\w.\s]*)\s*:\s*([^},]*?)\s*[},]"
# environment variables that a setting may read by ${oc.env:NAME}
READABLE = (
    r"HOME|USER|LOGNAME|HOSTNAME|PWD|TMPDIR|TMP|TEMP|SCRATCH|WORK|WORKDIR|CUDA_VISIBLE_DEVICES|"
    r"(SLURM|PBS|LSB|LADDPO)_[A-Z0-9_]+|[A-Z0-9_]+_(DIR|DIRS|HOME|ROOT|PATH|FOLDER|SCRATCH)"
)
NOT_SECRET = ("plan_tokens", "card_tokens", "max_tokens")  # settings of other meaning whose names end like one
USER_IN_URL = r"(\w+://[^/\s:@]*:)[^/\s@]+@"
PATTERNS = (
    (r"\bhf_[A-Za-z0-9]{20,}", "a Hugging Face token"),
    (r"\bwandb_v1_[A-Za-z0-9_]{20,}", "a W&B key"),
    (r"\bsk-[A-Za-z0-9_-]{20,}", "an API key"),
    (r"\bgh[pousr]_[A-Za-z0-9]{30,}", "a GitHub token"),
    (r"\bgithub_pat_[A-Za-z0-9_]{30,}", "a GitHub token"),
    (r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b", "an AWS key"),
    (r"\bnpm_[A-Za-z0-9]{30,}", "an npm token"),
    (r"\bglpat-[A-Za-z0-9_-]{20,}", "a GitLab token"),
    (r"\bxox[abprs]-[A-Za-z0-9-]{20,}", "a Slack token"),
    (r"\bAIza[A-Za-z0-9_-]{35}", "a Google key"),
    (r"\beyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]*", "a JSON web token"),
    (r"(?s)-----BEGIN [A-Z ]*PRIVATE KEY-----(?:.*?-----END [A-Z ]*-----|.*)", "a private key"),
)
