"""What is wrong with the settings that name files and folders, before any of them is opened.

A path that no file system takes, that no text file can hold, or that may not be looked at is named with its key.
`of_this_process()` asks the same of the working directory of this process.
"""

from __future__ import annotations

import errno
import operator
import os
from collections.abc import Iterator
from typing import Any

from laddpo.errors import UserError
from laddpo.settings.judge_ranges import JUDGE_GROUPS
from laddpo.settings.ranges import PATHS

# data.dataset_name is looked at where it is read: it may be a pattern
NAMED = (*PATHS, "run", "prompts", "data.questions", "data.candidates_name", "evaluation.dataset_name")
NAMED += ("data.chat_template", "evaluation.shots_from", "evaluation.harness_dir")
NAMED += ("variance.pairs_file", "variance.write_pairs")
NAMED += tuple(f"{group}.{name}" for group in JUDGE_GROUPS for name in ("model", "prompt"))
LONGEST_NAME, LONGEST_PATH = 255, 4095  # bytes; what Linux and macOS take at most


def path_problems(config: Any, ignore: set[str] = frozenset()) -> Iterator[str]:
    """A sentence for each setting whose path cannot be used; `ignore` names keys already known to be wrong."""
    named = [(key, operator.attrgetter(key)(config)) for key in NAMED]
    named += [("runs", path) for path in config.runs]
    for key, path in named:
        if path and key not in ignore and (problem := path_problem(path) or _wrong_kind(key, path)):
            yield f"{key} is {_shown(path)}; {problem}"


def path_problem(path: str) -> str | None:
    """What is wrong with a path and what to do; None if it can be used, or be made, or is simply not there."""
    if "\0" in path:
        return "it contains a NUL character, which no file name has; remove it."
    try:
        encoded = path.encode("utf-8")
    except UnicodeEncodeError:
        return "its name is not UTF-8, and it is written into text files; expected UTF-8; rename it."
    longest = max(len(name) for name in encoded.split(b"/"))
    if longest > LONGEST_NAME or len(encoded) > LONGEST_PATH:
        return (
            f"it has {len(encoded)} bytes, and {longest} in one name; a file system takes at most {LONGEST_PATH} and "
            f"{LONGEST_NAME}; choose a shorter one."
        )
    if os.path.expanduser(path).startswith("~") and not os.path.lexists(path):
        user = path.split("/", 1)[0]
        return f"{user} is the home of no known user; expected a path; write it in full."
    try:
        os.stat(os.path.expanduser(path))
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR):
            return f"it cannot be looked at: {error.strerror}; check the path and your rights to its folders."
    return None


def _wrong_kind(key: str, path: str) -> str | None:
    """A file where a folder has to be."""
    place = os.path.expanduser(path)
    if key in NO_HUB_IDS:
        try:
            os.stat(place)
        except NotADirectoryError:
            return "a part of it is a file; expected a folder; choose another name."
        except OSError:
            return None
    if key in FOLDERS and os.path.lexists(place) and not os.path.isdir(place):
        return "it is a file; expected a folder; choose another name."
    return None


def of_this_process() -> None:
    """Refuse to start in a folder that is gone, or whose name no text file can hold."""
    try:
        here = os.getcwd()
    except OSError as error:
        raise UserError(
            f"the current folder cannot be used: {error.strerror}; it was removed, or you may not enter it; cd into a "
            "folder that exists, and give the command again."
        ) from error
    if problem := path_problem(here):
        raise UserError(f"the current folder is {_shown(here)}; {problem}")


def cannot_use(error: OSError) -> str | None:
    """The message for a file or folder that the user may not use, or that is of another kind; None for other errors."""
    if error.errno not in NOT_OURS or error.filename is None:
        return None
    path = os.fspath(error.filename)
    shown = _shown(path if isinstance(path, str) else os.fsdecode(path))
    return f"{shown}: cannot be used: {error.strerror}. Check the path and your rights to it, then run again."


def _shown(path: str) -> str:
    """A path in quotes, with its middle left out if it is long."""
    return repr(path if len(path) <= 300 else f"{path[:140]}[...]{path[-140:]}")


FOLDERS = ("output_dir", "paths.data_dir", "paths.outputs_dir", "evaluation.harness_dir")
NO_HUB_IDS = (*FOLDERS, "resume", "run", "runs", "prompts", "adapter.path")
NOT_OURS = {errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.EEXIST}
NOT_OURS |= {errno.EIO, getattr(errno, "ESTALE", errno.EIO), errno.ENODEV, errno.ENXIO}
