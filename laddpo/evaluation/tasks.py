"""Tasks with a gold answer: prompts go to a generate function, its texts are graded, one record per item is kept.

A `Task` is a list of items and a grader. `run_task` appends each item's record to items.jsonl as it goes and continues
an interrupted run: an item whose record has the same fingerprint (prompt, answer, model, sampler) is not generated
again, unless its line is damaged. `CheckedLines.finish` ends the file. Models are not imported here; `generate` is any
callable from a list of prompts to a list of texts.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from laddpo.errors import UserError, choose
from laddpo.evaluation.grading import FunctionGrader, math_grader, same_choice, same_final_number, text_grader
from laddpo.evaluation.rows import is_choices, local_file, matches, task_rows
from laddpo.preference.embedded import arithmetic
from laddpo.preference.embedded.word_problems import INSTRUCTION as GSM8K_INSTRUCTION
from laddpo.preference.embedded.word_problems import word_problems
from laddpo.preference.reading.pairs import Message, Prompt, prompt_rows, user_prompt
from laddpo.processes.ranks import ALONE, Ranks
from laddpo.storage.json_lines import JsonLines
from laddpo.storage.manifests import fingerprint
from laddpo.storage.run_outputs import SilentLines
from laddpo.storage.seals import CheckedLines


@dataclass(frozen=True)
class Answer:
    """A generated text; `tokens` before its stop token, and whether it has one (None: not known)."""

    text: str
    tokens: int | None = None
    stopped: bool | None = None


Generate = Callable[[list[Prompt]], "list[str] | list[Answer]"]

GSM8K_HUB_ID = "openai/gsm8k"
GSM8K_FIELDS = (
    ("question", "text", matches(r"\S")),
    ("answer", "text that ends with `#### number`", matches(r"####\s*[-$]*[\d.,]*\d\s*$")),
)

MATH500_HUB_ID = "HuggingFaceH4/MATH-500"
MATH500_FIELDS = (("problem", "text", matches(r"\S")), ("answer", "a number or formula", matches(r"\S")))
MATH500_INSTRUCTION = "\n\nReason step by step, and put the final answer into \\boxed{}."
ARC_HUB_ID = "allenai/ai2_arc"
ARC_FIELDS = (
    ("question", "text", matches(r"\S")),
    ("choices", "an object with equally long lists text and label", is_choices),
    ("answerKey", "the label of a choice", matches(r"^\S$")),
)
ARC_INSTRUCTION = "\n\nAnswer with the letter of the right choice alone."
FILE_ANSWER = ("answer", "text or a number", lambda value: isinstance(value, (str, int, float)) and str(value).strip())


class Grader(Protocol):
    name: str

    def grade_all(self, texts: Sequence[str], answers: Sequence[str]) -> list[bool]: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Item:
    """One problem: an id that depends on its content or its place in the data, the prompt, the gold answer."""

    id: str
    prompt: Prompt
    answer: str


@dataclass(frozen=True)
class Task:
    """`fields` says how the items were made (split, shots, file); it is stated in results, not compared."""

    name: str
    items: list[Item]
    grader: Grader
    fields: dict[str, Any] = field(default_factory=dict)

    def grade(self, text: str, answer: str) -> bool:
        return self.grader.grade_all([text], [answer])[0]


@dataclass(frozen=True)
class TaskOptions:
    """What a task may be asked for; each task uses what applies to it.

    `limit` keeps the first items (None: all that the data has; a generated task takes its own default). `dataset_name`
    is a local .jsonl, a name inside `benchmarks_dir`, or a hub id; `shots` worked examples come from `shots_from`
    (likewise), never from the items that are graded; `difficulty` is for the generated problems.
    """

    split: str = "test"
    limit: int | None = None
    seed: int = 0
    shots: int = 0
    dataset_name: str | None = None
    shots_from: str | None = None
    revision: str | None = None
    benchmarks_dir: Path | None = None
    difficulty: arithmetic.Difficulty | None = None
    grader: str = "auto"


def load_task(name: str, options: TaskOptions) -> Task:
    """The task of that name; `UserError` for an unknown name or data that cannot be had."""
    return choose(TASKS, name, "evaluation.tasks", "laddpo/evaluation/tasks.py")(options)


def run_task(
    generate: Generate,
    task: Task,
    *,
    batch_size: int,
    items_path: Path | None,
    fields: Mapping[str, Any],
    labels: Mapping[str, str] | None = None,
    show_progress: bool | None = None,
    say: Callable[[str], None] = print,
    ranks: Ranks = ALONE,
) -> list[dict[str, Any]]:
    """One record per item, in the order of `task.items`; those already in `items_path` are taken from there. None:
    nothing is written, and all are generated.

    `fields` are what a text depends on beside its prompt (weights, adapter, sampler settings). `labels` (for example
    {"model": "tuned"}) are written into each record and let several runs share one file: only records with the same
    task and labels are looked at, and of these the ones with another fingerprint are dropped, with a line saying so.

    Several ranks take one batch each at a time; rank 0 grades and writes, in the order of one process, and all return
    all records. `generate` is then called by every rank every time, without prompts where no batch is left.

    Batches are the same whatever was done before: one with a missing item is generated whole, so an interrupted run
    gives the texts of an uninterrupted one even where a text depends slightly on its batch. `show_progress` None shows
    the bar on a terminal only.
    """
    labels = {"task": task.name, **(labels or {})}
    prints = {item.id: fingerprint(_item_fields(item, fields)) for item in task.items}
    assert len(prints) == len(task.items), f"task {task.name}: {len(task.items) - len(prints)} items share an id"
    log = CheckedLines(items_path, say) if items_path else SilentLines()
    done, stale = _take_finished(log, labels, prints, task.grader.name) if ranks.is_main else ({}, 0)
    if stale:
        say(f"{items_path}: {stale} items of {labels} came from other settings or another model and are generated anew")
    try:
        regrade = [record for record in done.values() if record["grader"] != task.grader.name]
        verdicts = task.grader.grade_all([r["text"] for r in regrade], [r["answer"] for r in regrade])
        for record, is_correct in zip(regrade, verdicts, strict=True):
            record.update(correct=is_correct, grader=task.grader.name)
            log.append(record)
        if done:
            say(f"{task.name}: {len(done)} of {len(task.items)} items are already in {items_path}")
        done, is_shown = ranks.broadcast(done), show_progress if ranks.is_main else False
        _run_batches(generate, task, batch_size, log, labels, prints, done, is_shown, ranks)
        if ranks.is_main:
            log.sync()
    finally:
        task.grader.close()
    return [done[item.id] for item in task.items]


def _run_batches(generate, task, batch_size, log, labels, prints, done, show_progress, ranks) -> None:
    """Generate and grade every batch with a missing item, one on each rank at a time; adds to `done` and to the log."""
    batches = [task.items[start : start + batch_size] for start in range(0, len(task.items), batch_size)]
    batches = [batch for batch in batches if any(item.id not in done for item in batch)]
    bar = tqdm(
        total=len(task.items), initial=len(done), desc=_title(labels), unit="item", disable=_hidden(show_progress)
    )
    with bar:
        for start in range(0, len(batches), ranks.world):
            together = batches[start : start + ranks.world]
            own = together[ranks.rank] if ranks.rank < len(together) else []
            given = ranks.gather([asdict(as_answer(answer)) for answer in generate([item.prompt for item in own])])
            records: list[dict[str, Any]] = []
            if ranks.is_main:
                for batch, answers in zip(together, given, strict=False):  # ranks without a batch gave nothing
                    records += _graded(task, batch, [Answer(**a) for a in answers], labels, prints, done)
                for record in records:
                    log.append(record)
            records = ranks.broadcast(records)
            done.update((record["id"], record) for record in records)
            bar.update(len(records))
            bar.set_postfix_str(f"right {sum(record['correct'] for record in done.values()) / len(done):.1%}")


def as_answer(given: str | Answer) -> Answer:
    """What a generate function gave, as an Answer."""
    return Answer(given) if isinstance(given, str) else given


def _graded(task, batch, answers, labels, prints, done) -> list[dict[str, Any]]:
    """A record of every item of the batch that has none yet."""
    assert len(answers) == len(batch), f"generate gave {len(answers)} texts for {len(batch)} prompts"
    missing = [i for i, item in enumerate(batch) if item.id not in done]
    verdicts = task.grader.grade_all([answers[i].text for i in missing], [batch[i].answer for i in missing])
    return [
        {
            **labels,
            "id": batch[i].id,
            "prompt": batch[i].prompt[-1].content,  # without the shots, which are the same for every item
            "answer": batch[i].answer,
            "text": answers[i].text,
            "correct": is_correct,
            "grader": task.grader.name,
            "fingerprint": prints[batch[i].id],
            **_length(answers[i]),
        }
        for i, is_correct in zip(missing, verdicts, strict=True)
    ]


def _length(answer: Answer) -> dict[str, Any]:
    return {} if answer.tokens is None else {"tokens": answer.tokens, "stopped": answer.stopped}


def _take_finished(log: JsonLines, labels: Mapping, prints: Mapping, grader: str) -> tuple[dict[str, dict], int]:
    """Finished records by item id and the number of stale ones; leaves the log without torn, stale or regraded lines.

    Records under the same labels for items that are not asked for now (a smaller `limit`) stay in the file.
    """
    done: dict[str, dict] = {}
    stale = 0

    def keep(record: dict) -> bool:
        nonlocal stale
        if any(record.get(key) != value for key, value in labels.items()) or record["id"] not in prints:
            return True
        if record["fingerprint"] != prints[record["id"]]:
            stale += 1
            return False
        done[record["id"]] = record
        return record["grader"] == grader

    log.rewind(keep)
    return done, stale


def _item_fields(item: Item, fields: Mapping[str, Any]) -> dict[str, Any]:
    return {"fields": dict(fields), "prompt": prompt_rows(item.prompt), "answer": item.answer}


def _title(labels: Mapping[str, str]) -> str:
    return " ".join(labels.values())


def _hidden(show_progress: bool | None) -> bool | None:
    return None if show_progress is None else not show_progress  # tqdm's None: hidden unless on a terminal


def arithmetic_task(options: TaskOptions) -> Task:
    """The embedded multi-step problems of one split, graded by their final answer."""
    if options.shots:
        raise UserError("evaluation.shots is not 0 for the task arithmetic, which has no worked examples. Set it to 0.")
    count = options.limit if options.limit is not None else 500
    difficulty = options.difficulty or arithmetic.Difficulty()
    problems = arithmetic.problems(options.split, count, options.seed, difficulty)
    items = [Item(f"arithmetic-{problem.text}", user_prompt(problem.text), problem.answer) for problem in problems]
    described = {"split": options.split, "seed": options.seed, "items": len(items), **asdict(difficulty)}
    return Task("arithmetic", items, FunctionGrader("exact final answer", arithmetic.grade), described)


def word_problems_task(options: TaskOptions) -> Task:
    """The embedded word problems of one split, asked as GSM8K's questions and graded by their last number."""
    _no_shots("word_problems", options)
    problems = word_problems(options.split, options.limit or 500, options.seed)
    items = [
        Item(f"word_problems-{problem.question}", user_prompt(problem.question + GSM8K_INSTRUCTION), problem.answer)
        for problem in problems
    ]
    described = {"split": options.split, "seed": options.seed, "items": len(items)}
    return Task("word_problems", items, FunctionGrader("equal final number", same_final_number), described)


def gsm8k_task(options: TaskOptions) -> Task:
    """Grade-school word problems from rows with `question` and `answer` (which ends with `#### n`)."""
    source = options.dataset_name or GSM8K_HUB_ID
    rows = _gsm8k_rows(source, options.split, options)
    shots: Prompt = ()
    if options.shots:
        found = local_file(source, options.benchmarks_dir)
        worked_source = options.shots_from or (source if found is None or found.is_dir() else None)
        if worked_source is None:
            raise UserError(
                f"evaluation.shots is {options.shots} with a local file ({source}); worked examples must come from "
                f"other rows. Set evaluation.shots_from to a file of training rows, or evaluation.shots=0."
            )
        asked = {row["question"] for row in rows}
        worked = [row for row in _gsm8k_rows(worked_source, "train", options) if row["question"] not in asked]
        if len(worked) < options.shots:
            raise UserError(
                f"evaluation.shots is {options.shots} but {worked_source} has {len(worked)} rows that are not graded "
                f"themselves. Lower evaluation.shots or name another file in evaluation.shots_from."
            )
        picked = random.Random(options.seed).sample(worked, options.shots)
        shots = tuple(
            message
            for row in picked
            for message in (_gsm8k_question(row["question"]), Message("assistant", row["answer"].strip()))
        )
    items = [
        Item(
            f"gsm8k-{options.split}-{number}",
            (*shots, _gsm8k_question(row["question"])),
            row["answer"].rsplit("####", 1)[1].strip(),
        )
        for number, row in enumerate(rows[: options.limit])
    ]
    if not items:
        raise UserError(
            f"{source}: no rows to evaluate (evaluation.limit is {options.limit}). Raise the limit or check the file."
        )
    described = {
        "source": source,
        "revision": options.revision,
        "split": options.split,
        "shots": options.shots,
        "items": len(items),
    }
    return Task("gsm8k", items, math_grader(), described)


def _gsm8k_question(question: str) -> Message:
    return Message("user", question.strip() + GSM8K_INSTRUCTION)


def _gsm8k_rows(source: str, split: str, options: TaskOptions) -> list[dict[str, str]]:
    return task_rows(source, "main", split, options.revision, options.benchmarks_dir, GSM8K_FIELDS)


def math500_task(options: TaskOptions) -> Task:
    """Competition problems from rows with `problem` and `answer` (a formula), compared by value."""
    source = options.dataset_name or MATH500_HUB_ID
    _no_shots("math500", options)
    rows = task_rows(source, None, options.split, options.revision, options.benchmarks_dir, MATH500_FIELDS)
    prompts = [(user_prompt(row["problem"].strip() + MATH500_INSTRUCTION), row["answer"].strip()) for row in rows]
    grader = math_grader([answer for _, answer in prompts[: options.limit]])
    return _row_task("math500", source, prompts, grader, options)


def arc_c_task(options: TaskOptions) -> Task:
    """Multiple-choice questions from rows with `question`, `choices` (text, label) and `answerKey`."""
    source = options.dataset_name or ARC_HUB_ID
    _no_shots("arc_c", options)
    rows = task_rows(source, "ARC-Challenge", options.split, options.revision, options.benchmarks_dir, ARC_FIELDS)
    prompts = []
    for row in rows:
        listed = zip(row["choices"]["label"], row["choices"]["text"], strict=True)
        choices = "\n".join(f"{label}. {text}" for label, text in listed)
        prompts.append((user_prompt(f"{row['question'].strip()}\n\n{choices}{ARC_INSTRUCTION}"), row["answerKey"]))
    return _row_task("arc_c", source, prompts, FunctionGrader("the choice that is named", same_choice), options)


def file_task(options: TaskOptions) -> Task:
    """The user's own rows with `prompt` (or `question`) and `answer`, compared as `options.grader` says."""
    source = options.dataset_name
    if source is None:
        raise UserError("evaluation.dataset_name is not set; the task file needs it. Name a .jsonl (prompt, answer).")
    _no_shots("file", options)
    given = task_rows(source, None, options.split, options.revision, options.benchmarks_dir, (FILE_ANSWER,))
    rows = [(str(row.get("prompt", row.get("question", ""))), str(row["answer"]).strip()) for row in given]
    for number, (prompt, _) in enumerate(rows, 1):
        if not prompt.strip():
            raise UserError(f"{source}: row {number} has no prompt; expected text in prompt or question. Mend the row.")
    grader = text_grader(options.grader, [answer for _, answer in rows])
    return _row_task("file", source, [(user_prompt(prompt), answer) for prompt, answer in rows], grader, options)


def _no_shots(name: str, options: TaskOptions) -> None:
    if options.shots:
        raise UserError(
            f"evaluation.shots is {options.shots}; the task {name} has no worked examples. Set it to 0, or use "
            "evaluation=lm_eval, whose tasks bring their own."
        )


def _row_task(name: str, source: str, rows: list[tuple[Prompt, str]], grader: Grader, options: TaskOptions) -> Task:
    items = [Item(f"{name}-{options.split}-{i}", *row) for i, row in enumerate(rows[: options.limit])]
    if not items:
        raise UserError(f"{source}: no rows to evaluate. Raise evaluation.limit or check the file.")
    described = {"source": source, "revision": options.revision, "split": options.split, "items": len(items)}
    return Task(name, items, grader, described)


TASKS: dict[str, Callable[[TaskOptions], Task]] = {
    "arithmetic": arithmetic_task,
    "word_problems": word_problems_task,
    "gsm8k": gsm8k_task,
    "math500": math500_task,
    "arc_c": arc_c_task,
    "file": file_task,
}

# Tasks with problems of their own to choose a checkpoint by; the others have test problems only.
HAS_VALIDATION_SPLIT = frozenset({"arithmetic", "word_problems"})
