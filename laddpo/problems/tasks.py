"""Tasks with a gold answer: where their problems come from, how they are asked and graded. A row of TASKS each.

A `Task` is a list of items and a grader. A new task is one function and one row; settings read the row, so nothing here
imports anything heavy when it is loaded.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from laddpo.errors import UserError, choose
from laddpo.preference.embedded import arithmetic, rubric
from laddpo.preference.embedded.word_problems import INSTRUCTION as GSM8K_INSTRUCTION
from laddpo.preference.embedded.word_problems import word_problems
from laddpo.preference.reading.bad_rows import RowError
from laddpo.preference.reading.pairs import Message, Prompt, user_prompt
from laddpo.preference.reading.rows import RowRules, as_prompt
from laddpo.preference.reading.texts import kind_of
from laddpo.problems.grading import UNGRADED, FunctionGrader, Grader, math_grader, same_choice, text_grader
from laddpo.problems.rows import is_choices, local_file, matches, task_rows

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


@dataclass(frozen=True)
class Item:
    """One problem: an id that depends on its content or its place in the data, the prompt, the gold answer."""

    id: str
    prompt: Prompt
    answer: str


@dataclass(frozen=True)
class Task:
    """`fields` says how the items were made (split, shots, file); it is stated in results, not compared. `marks`, for a
    task with partial marks, says which of them a text has; it is right with all of them."""

    name: str
    items: list[Item]
    grader: Grader
    fields: dict[str, Any] = field(default_factory=dict)
    marks: Callable[[str, str], dict[str, bool]] | None = None

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
    kind = choose(TASKS, name, "evaluation.tasks", "laddpo/problems/tasks.py")
    if options.shots and not kind.has_shots:
        raise UserError(
            f"evaluation.shots is {options.shots}; the task {name} has no worked examples. Set it to 0, or use "
            "evaluation=lm_eval, whose tasks bring their own."
        )
    if kind.needs_file and options.dataset_name is None:
        raise UserError(f"evaluation.dataset_name is not set; the task {name} needs {kind.needs_file}. Name one.")
    return kind.load(options)


def embedded(names: Iterable[str]) -> list[str]:
    """Those of the tasks whose problems are made here."""
    return [name for name in names if name in TASKS and TASKS[name].is_embedded]


def question_in(text: str) -> str:
    """What is left of a task's prompt without the instruction at its end, and without the choices of a choice task."""
    for kind in TASKS.values():
        if kind.instruction and text.endswith(kind.instruction):
            bare = text.removesuffix(kind.instruction)
            return bare.rpartition("\n\n")[0] if kind.lists_choices else bare
    return text


def arithmetic_task(options: TaskOptions) -> Task:
    """The embedded multi-step problems of one split, graded by their final answer."""
    count = options.limit if options.limit is not None else 500
    difficulty = options.difficulty or arithmetic.Difficulty()
    problems = arithmetic.problems(options.split, count, options.seed, difficulty)
    items = [Item(f"arithmetic-{problem.text}", user_prompt(problem.text), problem.answer) for problem in problems]
    described = {"split": options.split, "seed": options.seed, "items": len(items), **asdict(difficulty)}
    return Task("arithmetic", items, FunctionGrader("exact final answer", arithmetic.grade), described)


def rubric_task(options: TaskOptions) -> Task:
    """The problems of arithmetic in a written form with five marks; right with all five."""
    count = options.limit if options.limit is not None else 500
    problems = arithmetic.problems(options.split, count, options.seed, rubric.DIFFICULTY)
    items = [Item(f"rubric-{problem.text}", user_prompt(problem.text), problem.answer) for problem in problems]
    described = {"split": options.split, "seed": options.seed, "items": len(items), "marks": list(rubric.MARKS)}
    return Task("rubric", items, FunctionGrader("all five marks", rubric.grade), described, rubric.marks)


def word_problems_task(options: TaskOptions) -> Task:
    """The embedded word problems of one split, asked as GSM8K's questions and graded by their last number."""
    problems = word_problems(options.split, options.limit or 500, options.seed)
    items = [
        Item(f"word_problems-{problem.question}", user_prompt(problem.question + GSM8K_INSTRUCTION), problem.answer)
        for problem in problems
    ]
    described = {"split": options.split, "seed": options.seed, "items": len(items)}
    return Task("word_problems", items, text_grader("number", ()), described)


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
    rows = task_rows(source, None, options.split, options.revision, options.benchmarks_dir, MATH500_FIELDS)
    prompts = [(user_prompt(row["problem"].strip() + MATH500_INSTRUCTION), row["answer"].strip()) for row in rows]
    grader = math_grader([answer for _, answer in prompts[: options.limit]])
    return _row_task("math500", source, prompts, grader, options)


def arc_c_task(options: TaskOptions) -> Task:
    """Multiple-choice questions from rows with `question`, `choices` (text, label) and `answerKey`."""
    source = options.dataset_name or ARC_HUB_ID
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
    given = task_rows(source, None, options.split, options.revision, options.benchmarks_dir, (FILE_ANSWER,))
    rows = [(str(row.get("prompt", row.get("question", ""))), str(row["answer"]).strip()) for row in given]
    for number, (prompt, _) in enumerate(rows, 1):
        if not prompt.strip():
            raise UserError(f"{source}: row {number} has no prompt; expected text in prompt or question. Mend the row.")
    grader = text_grader(options.grader, [answer for _, answer in rows])
    return _row_task("file", source, [(user_prompt(prompt), answer) for prompt, answer in rows], grader, options)


def winrate_task(options: TaskOptions) -> Task:
    """The user's own prompts, as text or as messages, for answers that are compared. An `answer` may stand beside them.

    Without options.dataset_name it has no items: the held-out prompts of the run take their place."""
    source, rows = options.dataset_name, []
    if source is None:
        return Task(JUDGED, [], UNGRADED)
    for number, row in enumerate(
        task_rows(source, None, options.split, options.revision, options.benchmarks_dir, ()), 1
    ):
        value = next((row[name] for name in ("prompt", "question", "messages") if row.get(name) is not None), None)
        try:
            if not isinstance(value, str | list):
                raise RowError("DATA-12", "prompt", f"is {kind_of(value)}, want text or a list of messages", "")
            prompt = as_prompt(row, value, RowRules(), lambda text: None)
        except RowError as error:
            raise UserError(
                f"{source}: row {number}: {error.field}: {error.problem}. Mend or remove the row, or name another file "
                "in evaluation.dataset_name."
            ) from error
        rows.append((prompt, "" if row.get("answer") is None else str(row["answer"]).strip()))
    task = _row_task(JUDGED, source, rows, UNGRADED, options)
    return replace(task, grader=grader_of(task.items, options.grader))


def grader_of(items: list[Item], name: str) -> Grader:
    """The grader of that name if every item has a gold answer, else none."""
    has_gold = all(item.answer for item in items)
    return text_grader(name, [item.answer for item in items]) if has_gold else UNGRADED


def _row_task(name: str, source: str, rows: list[tuple[Prompt, str]], grader: Grader, options: TaskOptions) -> Task:
    items = [Item(f"{name}-{options.split}-{i}", *row) for i, row in enumerate(rows[: options.limit])]
    if not items:
        raise UserError(f"{source}: no rows to evaluate. Raise evaluation.limit or check the file.")
    described = {"source": source, "revision": options.revision, "split": options.split, "items": len(items)}
    return Task(name, items, grader, described)


@dataclass(frozen=True)
class TaskKind:
    """A row of TASKS.

    `is_embedded`: its problems are made here, also some to choose a checkpoint by; the others read rows and have
    test problems only. `has_difficulty`: data.operand_max and its like are its difficulty. `has_shots`: it can show
    worked examples. `needs_file`: the file that the user must name. `takes_grader`: evaluation.grader says how its
    answers are compared. `has_marks`: an answer has several marks, and is right with all of them. `is_judged`: base and
    tuned answers are compared with each other. `instruction`: what it
    writes behind a question, which `lists_choices` before that.
    """

    load: Callable[[TaskOptions], Task]
    is_embedded: bool = False
    has_difficulty: bool = False
    has_shots: bool = False
    needs_file: str = ""
    takes_grader: bool = False
    instruction: str = ""
    lists_choices: bool = False
    has_marks: bool = False
    is_judged: bool = False


BY_ANSWERS = ("exact_match", "mean_marks")  # what best_metric may measure on answers to problems
JUDGED = "winrate"  # the task whose answers are compared
TASKS: dict[str, TaskKind] = {
    "arithmetic": TaskKind(arithmetic_task, is_embedded=True, has_difficulty=True),
    "rubric": TaskKind(rubric_task, is_embedded=True, has_marks=True),
    "word_problems": TaskKind(word_problems_task, is_embedded=True, instruction=GSM8K_INSTRUCTION),
    "gsm8k": TaskKind(gsm8k_task, has_shots=True, instruction=GSM8K_INSTRUCTION),
    "math500": TaskKind(math500_task, instruction=MATH500_INSTRUCTION),
    "arc_c": TaskKind(arc_c_task, instruction=ARC_INSTRUCTION, lists_choices=True),
    "file": TaskKind(file_task, needs_file="a .jsonl with prompt and answer on each line", takes_grader=True),
    JUDGED: TaskKind(winrate_task, takes_grader=True, is_judged=True),
}
