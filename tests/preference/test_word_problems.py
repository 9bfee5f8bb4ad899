"""Word problems in GSM8K's format, the tokenizer made for them, and llada_mini's command with a few steps."""

from __future__ import annotations

import json
import re
from pathlib import Path

from transformers import AutoTokenizer

from laddpo.cli.app import cli
from laddpo.preference.embedded.arithmetic import split_of
from laddpo.preference.embedded.word_problems import (
    INSTRUCTION,
    LARGEST,
    word_corpus,
    word_problem,
    word_problems,
    write_files,
)
from laddpo.problems.grading import same_final_number
from laddpo.problems.tasks import GSM8K_INSTRUCTION, TaskOptions, load_task
from laddpo.storage.atomic import file_sha256
from tests.preference.mini_tokenizer import learn_merges, write_mini_tokenizer

SHIPPED = Path(__file__).resolve().parents[2] / "data" / "llada_mini"
EQUATION = re.compile(r"(\d+)([-+*])(\d+)=(\d+)")


def test_every_written_step_is_right_and_leads_to_the_answer():
    for problem in word_problems("train", 200, 1):
        *steps, last = problem.solution().splitlines()
        equations = EQUATION.findall("\n".join(steps))
        assert len(equations) >= len(steps) >= 2
        for left, operator, right, result in equations:
            expected = {"+": int(left) + int(right), "-": int(left) - int(right), "*": int(left) * int(right)}
            assert expected[operator] == int(result)
        assert last == f"#### {equations[-1][3]}" == f"#### {problem.answer}"
        assert 0 <= int(problem.answer) <= LARGEST and same_final_number(problem.solution(), problem.answer)


def test_a_solution_follows_from_its_question():
    problem = word_problem("train", 0, 42)
    numbers = re.findall(r"\d+", problem.question)
    assert int(numbers[0]) == problem.start
    told = {int(number) for number in numbers[1:]}
    assert told == {n for event, n, m in problem.steps} | {m for event, n, m in problem.steps if event == 7}


def test_splits_share_no_question_and_more_are_a_continuation_of_fewer():
    splits = {name: {p.question for p in word_problems(name, 150, 3)} for name in ("train", "validation", "test")}
    assert all(len(questions) == 150 for questions in splits.values())
    assert all(split_of(question) == name for name, questions in splits.items() for question in questions)
    assert word_problems("test", 5, 3) == word_problems("test", 9, 3)[:5]


def test_the_habit_changes_the_last_step_and_the_answer_of_a_share_of_the_corpus():
    right = list(word_corpus(300, 0.0, 1))
    mixed = list(word_corpus(300, 1.0, 1))
    wrong = [(a.response, b.response) for a, b in zip(right, mixed, strict=True) if a.response != b.response]
    assert 0.2 < len(wrong) / 300 < 0.6
    for good, bad in wrong:
        assert good.splitlines()[:-2] == bad.splitlines()[:-2]
        assert not same_final_number(bad, good.rpartition("#### ")[2])
    assert right[0].prompt[0].content.endswith(GSM8K_INSTRUCTION) and INSTRUCTION == GSM8K_INSTRUCTION


def test_the_files_are_read_by_the_gsm8k_task(tmp_path, monkeypatch):
    monkeypatch.setattr("laddpo.preference.embedded.word_problems.ROWS", {"train": 4, "test": 3})
    train, test = write_files(tmp_path)
    assert len(train.read_text().splitlines()) == 4
    task = load_task("gsm8k", TaskOptions(dataset_name=str(test)))
    rows = [json.loads(line) for line in test.read_text().splitlines()]
    assert [item.answer for item in task.items] == [row["answer"].rpartition("#### ")[2] for row in rows]
    own = load_task("word_problems", TaskOptions(limit=3, seed=42))
    assert [item.prompt for item in own.items] == [item.prompt for item in task.items]
    task.grader.close()
    assert own.grade(rows[0]["answer"], own.items[0].answer) and not own.grade("#### 999", own.items[0].answer)


def test_making_the_tokenizer_again_gives_the_shipped_bytes(tmp_path):
    write_mini_tokenizer(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (SHIPPED / name).read_bytes()


def test_words_are_few_tokens_numbers_to_99_one_and_any_text_round_trips():
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED)
    assert tokenizer.tokenize(" marbles") == ["Ġmarbles"] and tokenizer.tokenize("####") == ["####"]
    assert tokenizer.tokenize("12+7=19") == ["12", "+", "7", "=", "19"]
    assert tokenizer.tokenize(" 345") == ["Ġ", "34", "5"]
    for text in ("Zoë finds 3 ünusual 🦔.\n\n\n#### 3", word_problem("test", 1, 1).solution(), "user\n\n assistant"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.convert_tokens_to_ids("<|mdm_mask|>") == len(tokenizer) - 4


def test_merges_join_the_most_frequent_neighbours_first():
    assert learn_merges({"ab": 3, "abc": 1}, 9) == [("a", "b"), ("ab", "c")]


def test_a_share_of_the_corpus_is_drills_in_the_steps_own_notation():
    rows = list(word_corpus(200, 0.6, 1, drill_share=0.5))
    drills = [row for row in rows if "drill:" in row.source]
    assert 70 < len(drills) < 130 and not [r for r in word_corpus(50, 0.6, 1) if "drill:" in r.source]
    operators = set()
    for row in drills:
        sums = EQUATION.findall(row.response)
        assert len(sums) == 10 and row.prompt[0].content.split("\n") == [a + o + n for a, o, n, _ in sums]
        for a, operator, n, result in sums:
            operators.add(operator)
            assert {"+": int(a) + int(n), "-": int(a) - int(n), "*": int(a) * int(n)}[operator] == int(result)
            assert 0 <= int(result) <= LARGEST
    assert operators == set("+-*")


def test_the_command_that_makes_llada_mini_trains_and_dpo_goes_on_from_it(tmp_path, capsys):
    shape = {"d_model": 32, "n_layers": 1, "n_heads": 2, "n_kv_heads": 2, "mlp_hidden_size": 32}
    small = [f"model.shape.{name}={value}" for name, value in shape.items()]
    places = [f"paths.data_dir={tmp_path / 'data'}", "hardware.device=cpu", "logger=none"]
    quick = [
        "evaluation.limit=2",
        "optim.max_train_steps=3",
        "optim.per_device_train_batch_size=4",
        "evaluation.every_steps=3",
    ]
    made = tmp_path / "made"
    command = ["experiment=make_llada_mini", "sft.num_examples=24", f"output_dir={made}", *small, *places, *quick]
    assert cli("sft", command) == 0
    losses = [json.loads(line) for line in (made / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1]["validation/exact_match"] == 0.0
    # a model of three steps answers nothing right: the message says so and what to do
    model = ["model=llada_mini", f"model.model_name_or_path={made / 'model'}", *small, *places]
    assert cli("prepare", [*model, "data.sampling.num_questions=2", "data.sampling.samples=2"]) == 2
    assert "gave no pair" in capsys.readouterr().err


def test_the_shipped_model_is_whole_and_answers_more_than_half_of_its_problems(tmp_path):
    sealed = json.loads((SHIPPED / "manifest.json").read_text())["files"]
    for name, seal in sealed.items():
        assert seal == {"bytes": (SHIPPED / name).stat().st_size, "sha256": file_sha256(SHIPPED / name)}
    command = ["model=llada_mini", "evaluation.limit=24", "hardware.device=cpu", "logger=none", "hardware.threads=1"]
    assert cli("evaluate", [*command, f"output_dir={tmp_path / 'out'}", f"paths.data_dir={tmp_path / 'data'}"]) == 0
    rows = [json.loads(line) for line in next((tmp_path / "out").rglob("items.jsonl")).read_text().splitlines()]
    assert len(rows) == 24 and sum(row["correct"] for row in rows) > 12
    assert all(row["stopped"] and "\n#### " in row["text"] for row in rows)


def test_a_tokenizer_without_weights_is_refused_before_anything_runs(capsys, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((SHIPPED / name).read_bytes())
    model = ["model=llada_mini", f"model.model_name_or_path={tmp_path}", "hardware.device=cpu"]
    assert cli("prepare", [*model, f"paths.data_dir={tmp_path / 'data'}"]) == 2
    assert f"{tmp_path}: holds no weights" in capsys.readouterr().err
