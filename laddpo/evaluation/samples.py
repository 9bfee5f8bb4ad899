"""Several sampled answers to each question: appended as they come, continued after a stop, split over processes.

A folder `<key>/` ends up with samples.jsonl (question, answer, answers) and manifest.json. Process r of w answers the
questions r, r + w, … and appends to a file of its own below parts/; process 0 gathers. An answer's random draws belong
to its question and its number, so neither batch nor process decides them. Models are not imported here.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from laddpo.errors import Stopped
from laddpo.preference.onpolicy import Question
from laddpo.preference.reading.pairs import Prompt, user_prompt
from laddpo.processes.progress import Progress
from laddpo.processes.signals import StopFlag
from laddpo.storage import atomic, json_lines, locks, manifests
from laddpo.storage.folders import refuse_others
from laddpo.storage.seals import CheckedLines

KIND, SAMPLES, PARTS = "samples", "samples.jsonl", "parts"
WAIT_S = 0.5

# prompts and a key for the random draws of each, to texts
Sample = Callable[[list[Prompt], list[str]], list[str]]


def samples_folder(data_dir: Path, fields: Mapping[str, Any]) -> Path:
    """Where samples that depend on these fields lie."""
    return Path(data_dir) / KIND / manifests.fingerprint(fields)


def is_finished(folder: Path) -> bool:
    """Whether all answers are there; a file that differs from its seal is a UserError."""
    return manifests.read_manifest(folder, KIND) is not None


def collect_samples(
    sample: Sample,
    questions: Sequence[Question],
    count: int,
    folder: Path,
    fields: Mapping[str, Any],
    batch_size: int,
    stop: StopFlag,
    rank: int = 0,
    world: int = 1,
    say: Callable[[str], None] = print,
) -> Path:
    """`count` answers to every question; returns the path of samples.jsonl.

    Answers already in the folder are reused. Batches are the same whatever was done before: one with a missing question
    is answered whole, so that a continued run gives the texts of an uninterrupted one. Raises `Stopped` after a signal.
    """
    mine = folder / PARTS / f"{rank}-of-{world}"
    own = partial(refuse_others, folder, (KIND,), True, "the folder of samples")
    own()
    with locks.locked(mine, check=own):
        if is_finished(folder):  # by another process, while this one waited
            return folder / SAMPLES
        log = CheckedLines(mine / "answers.jsonl", say)
        log.rewind(lambda record: len(record["answers"]) == count)
        own = questions[rank::world]
        done = _done(folder, count, say)
        missing = sum(question.text not in done for question in own)
        say(f"sampling {count} answers to each of {missing:,} of {len(own):,} questions into {folder}")
        bar = Progress(total=len(own), initial=len(own) - missing, unit="questions", desc="sampling", disable=None)
        with bar:
            step = max(1, batch_size // count)
            for start in range(0, len(own), step):
                batch = own[start : start + step]
                if all(question.text in done for question in batch):
                    continue
                if stop:
                    raise Stopped(f"{folder}: stopped by {stop.name}; the answers so far are kept.", "Give it again.")
                _answer(sample, batch, count, done, log)
                bar.update(len(batch))
        if rank == 0:
            _gather(questions, count, folder, fields, stop, say)
    _wait(lambda: is_finished(folder), stop, folder)
    return folder / SAMPLES


def _answer(sample: Sample, batch: Sequence[Question], count: int, done: dict, log: json_lines.JsonLines) -> None:
    asked = [question for question in batch for _ in range(count)]
    keys = [f"{question.text}/sample {number}" for question in batch for number in range(count)]
    texts = sample([user_prompt(question.text) for question in asked], keys)
    assert len(texts) == len(asked), f"{len(texts)} answers to {len(asked)} prompts"
    for index, question in enumerate(batch):
        if question.text not in done:
            done[question.text] = texts[index * count : (index + 1) * count]
            log.append({"question": question.text, "answers": done[question.text]})


def _done(folder: Path, count: int, say: Callable[[str], None]) -> dict[str, list[str]]:
    """Answers by question in the files of all processes, of this run or an earlier one of another size."""
    parts = [path for path in sorted((folder / PARTS).glob("*")) if re.fullmatch(r"[0-9]+-of-[0-9]+", path.name)]
    records = [record for part in parts for record in CheckedLines(part / "answers.jsonl", say).read()]
    return {record["question"]: record["answers"] for record in records if len(record["answers"]) == count}


def _gather(
    questions: Sequence[Question], count: int, folder: Path, fields: Mapping[str, Any], stop: StopFlag, say
) -> None:
    """Write samples.jsonl and the manifest once every process is done; the files of the parts go."""
    done: dict[str, list[str]] = {}

    def is_whole() -> bool:
        done.update(_done(folder, count, lambda text: None))  # another process may be writing its last line
        return all(question.text in done for question in questions)

    _wait(is_whole, stop, folder)
    rows = [{"question": q.text, "answer": q.answer, "answers": done[q.text]} for q in questions]
    atomic.write_text(folder / SAMPLES, "".join(atomic.canonical_json(row) + "\n" for row in rows))
    manifests.write_manifest(folder, KIND, fields, [SAMPLES], **manifests.provenance())
    shutil.rmtree(folder / PARTS, ignore_errors=True)
    say(f"{folder}: {len(questions):,} questions answered {count} times")


def _wait(is_done: Callable[[], bool], stop: StopFlag, folder: Path) -> None:
    """Until other processes have done their part."""
    while not is_done():
        if stop:
            raise Stopped(f"{folder}: stopped by {stop.name} while waiting for other processes.", "Give it again.")
        time.sleep(WAIT_S)
