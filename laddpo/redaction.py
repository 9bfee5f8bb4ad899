"""Keys and tokens: never in a setting, never in what is printed or written.

`find_secrets(tree)` says where a setting looks like one (without repeating it); `redact(text)` takes every known shape,
and the values of environment variables that are named like secrets, out of a text that is about to be shown.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any

HIDDEN = "<hidden>"


def find_secrets(tree: Any) -> list[str]:
    """One problem for each value that looks like a credential or reads one from the environment."""
    return [
        f"{key}: the value looks like {what}; secrets are no settings, they would be written into the run's files; "
        f"set the environment variable instead (HF_TOKEN, WANDB_API_KEY) and revoke it if it was shared."
        for key, value in _strings("", tree)
        if (what := _kind_of_secret(key, value))
    ]


def redact(text: str) -> str:
    """The text with everything that looks like a credential replaced."""
    for value in _environment_secrets():
        text = text.replace(value, HIDDEN)
    for pattern, _ in PATTERNS:
        text = re.sub(pattern, HIDDEN, text)
    return re.sub(USER_IN_URL, rf"\1{HIDDEN}@", text)


def _strings(key: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _strings(f"{key}.{name}" if key else str(name), item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(key, item)
    elif isinstance(value, str):
        yield key, value


def _kind_of_secret(key: str, value: str) -> str | None:
    if reference := re.search(r"\$\{oc\.env:\s*([^},]+)", value):
        return "a secret from the environment" if re.search(SECRET_NAME, reference.group(1), re.IGNORECASE) else None
    for pattern, what in PATTERNS:
        if re.search(pattern, value):
            return what
    if re.search(USER_IN_URL, value):
        return "an address with a password"
    if any(secret in value for secret in _environment_secrets()):
        return "the value of an environment variable that holds a secret"
    last = key.rsplit(".", 1)[-1]
    if re.fullmatch(r"[0-9a-f]{40}", value) and "revision" not in last:
        return "an API key"
    if re.search(SECRET_NAME, last, re.IGNORECASE) and last not in NOT_SECRET and len(value) >= 8:
        return "a key or token"
    return None


def _environment_secrets() -> list[str]:
    return [
        v for k, v in os.environ.items() if re.search(SECRET_NAME, k, re.IGNORECASE) and len(v) >= 12 and " " not in v
    ]


SECRET_NAME = r"(token|api_?key|secret|password|passwd|credential)s?$"
NOT_SECRET = ("plan_tokens", "card_tokens")  # settings of other meaning whose names end like one
USER_IN_URL = r"(\w+://[^/\s:@]+:)[^/\s@]+@"
PATTERNS = (
    (r"\bhf_[A-Za-z0-9]{20,}", "a Hugging Face token"),
    (r"\bwandb_v1_[A-Za-z0-9_]{20,}", "a W&B key"),
    (r"\bsk-[A-Za-z0-9_-]{20,}", "an API key"),
    (r"\bgh[pousr]_[A-Za-z0-9]{30,}", "a GitHub token"),
    (r"\bgithub_pat_[A-Za-z0-9_]{30,}", "a GitHub token"),
    (r"\bAKIA[0-9A-Z]{16}\b", "an AWS key"),
    (r"-----BEGIN [A-Z ]*PRIVATE KEY-----", "a private key"),
)
