"""Rows of a dataset of the hub, through `datasets` (imported here only, so that local files never need it)."""

from __future__ import annotations

import re
from collections.abc import Generator

from laddpo.errors import UserError, nearest
from laddpo.preference.reading.files import ReadLog
from laddpo.preference.reading.strict_json import one_line
from laddpo.processes.progress import quiet_datasets


class NoSuchSplit(UserError):
    """The dataset is there, and the split that was asked for is not."""


COMMIT = re.compile(r"[0-9a-f]{40}")
HUB_FILE = re.compile(r"hf://datasets/[^@]+@([0-9a-f]{40})/")


def hub_rows(
    dataset_name: str, dataset_split: str | None, revision: str | None, log: ReadLog, config: str | None = None
) -> Generator[tuple[str, dict], None, None]:
    """The rows of one split, whole and in order; the place of a row is `dataset[split]:number`. `config` names one of
    the dataset's configurations.

    Not streamed: a sample and a split by content need every row, and a stream that breaks would look like a short one.
    """
    split = dataset_split or "train"
    rows = load_split(dataset_name, split, revision, config)
    name = f"{dataset_name}[{f'{config}/' if config else ''}{split}]"
    commit = loaded_commit(rows, revision)
    if commit is not None:
        log.commits[name] = commit
    if revision is None:
        pin = f"; set data.revision={commit} to get these again" if commit else ""
        log.warn(f"{dataset_name} is read without data.revision: a later download may give other rows{pin}")
    log.files[name] = len(rows)
    number = 0
    try:
        for row in rows:
            yield f"{name}:{number + 1}", row
            number += 1
    except (MemoryError, GeneratorExit):
        raise
    except Exception as error:  # of decoding a value; the kinds depend on what is installed
        raise UserError(
            f"{name}: row {number + 1}: cannot be read, {type(error).__name__}: {one_line(error)} (DATA-53). Download "
            "its data files, save the column as text, and give their path."
        ) from error


def loaded_commit(rows, revision: str | None) -> str | None:
    """The commit that the rows are from: the one asked for, else the one in the addresses of the files downloaded.

    Those addresses are kept in the cache, so the commit is known without network too. None when they say nothing.
    """
    if revision is not None and COMMIT.fullmatch(revision):
        return revision
    found = {match.group(1) for url in (rows.download_checksums or {}) if (match := HUB_FILE.match(str(url)))}
    return found.pop() if len(found) == 1 else None


def load_split(dataset_name: str, split: str, revision: str | None, config: str | None = None):
    """The dataset, downloaded or from the cache; one clear UserError when neither has it."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise UserError(
            f"{dataset_name} is a dataset of the hub; reading it needs the package `datasets`. pip install datasets, "
            f"or set data.dataset_name to a local file."
        ) from error
    wanted = f"{dataset_name}@{revision or 'newest'}, split {split}" + (f", configuration {config}" if config else "")
    quiet_datasets()
    try:
        return load_dataset(dataset_name, *([config] if config else []), split=split, revision=revision)
    except Exception as error:  # the hub client has many ways to say that it could not reach or find something
        if "script" in str(error).lower():
            problem = (
                "needs a loading script, which is never run (DATA-93). Download its data files and give their path."
            )
            raise UserError(f"{wanted}: {problem}.") from error
        if problem := _other_name(dataset_name, split, config, str(error)):
            raise (NoSuchSplit if "data.dataset_split" in problem else UserError)(problem) from error
        raise UserError(_unavailable(wanted, error)) from error


def _unavailable(wanted: str, error: BaseException) -> str:
    return (
        f"data.dataset_name: {wanted} could not be had, neither from the network nor from the cache "
        f"({one_line(error)}) (DATA-93). Check the name, or download its files elsewhere and set data.dataset_name to "
        "their local path."
    )


def _other_name(dataset_name: str, split: str, config: str | None, text: str) -> str | None:
    """The message for an unknown split, or for an unknown or missing configuration, from the text of `datasets`."""
    named = re.search(r"(Should be one of|available configs:|not found\. Available:) \[(.*?)\]", text)
    if not named:
        return None
    known = [name.strip(" '\"") for name in named[2].split(",")]
    key, asked, code = ("dataset_config", config, 72) if "vailable" in named[1] else ("dataset_split", split, 70)
    guess = nearest(asked, known) if asked else None
    return (
        f"data.{key} is {repr(asked) if asked else 'not set'}; {dataset_name} has {', '.join(known)} (DATA-{code}). "
        + (f"Did you mean {guess}?" if guess else "Name one of them.")
    )
