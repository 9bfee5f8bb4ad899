"""Tasks from generated and from written rows; runs that are interrupted, continued, changed."""

import json
from types import SimpleNamespace

import pytest
import torch

from laddpo.core.budget import answer_budget
from laddpo.errors import UserError
from laddpo.evaluation.base_answers import BaseAnswers, base_answers
from laddpo.evaluation.harness import answers_key
from laddpo.evaluation.run_task import run_task
from laddpo.evaluation.sampling import SamplerSettings
from laddpo.preference.reading.pairs import user_prompt
from laddpo.problems.grading import FunctionGrader
from laddpo.problems.tasks import Item, Task, TaskOptions, load_task
from laddpo.processes.ranks import Ranks
from laddpo.settings.schema import QuantizationSettings
from laddpo.storage.seals import CheckedLines


class Adder:
    """A generate function that adds two numbers, remembers its batches and stops where it is told."""

    def __init__(self, wrong=(), stop_at=None):
        self.wrong, self.stop_at, self.batches = set(wrong), stop_at, []

    def __call__(self, prompts):
        texts = [prompt[-1].content for prompt in prompts]
        if self.stop_at in texts:
            raise KeyboardInterrupt
        self.batches.append(texts)
        return [str(sum(map(int, text.split("+"))) + (text in self.wrong)) for text in texts]


def sums(count=10, grader_name="equality"):
    items = [Item(f"sum-{n}", user_prompt(f"{n}+{n}"), str(2 * n)) for n in range(count)]
    return Task("sums", items, FunctionGrader(grader_name, lambda text, answer: text == answer))


def run(generate, task, path, fields=None, **more):
    said = []
    more = {"batch_size": 4, "fields": fields or {"weights": "a"}, "show_progress": False, "say": said.append, **more}
    return run_task(generate, task, items_path=path, **more), said


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def gsm8k_rows(count, offset=0):
    return [
        {"question": f"What is {n} plus 1?", "answer": f"{n}+1=<<{n}+1={n + 1}>>{n + 1}\n#### {n + 1}"}
        for n in range(offset, offset + count)
    ]


def test_records_hold_prompt_answer_text_and_verdict_in_the_order_of_the_items(tmp_path):
    records, _ = run(Adder(wrong=["3+3"]), sums(), tmp_path / "items.jsonl", labels={"model": "base"})
    assert [record["id"] for record in records] == [f"sum-{n}" for n in range(10)]
    assert [record["correct"] for record in records] == [n != 3 for n in range(10)]
    assert {key: records[3][key] for key in ("task", "model", "prompt", "answer", "text", "grader")} == {
        "task": "sums",
        "model": "base",
        "prompt": "3+3",
        "answer": "6",
        "text": "7",
        "grader": "equality",
    }
    assert CheckedLines(tmp_path / "items.jsonl").read() == records


def test_an_interrupted_run_continues_and_ends_as_an_uninterrupted_one(tmp_path):
    whole, _ = run(Adder(), sums(), tmp_path / "whole.jsonl")
    path = tmp_path / "items.jsonl"
    with pytest.raises(KeyboardInterrupt):
        run(Adder(stop_at="9+9"), sums(), path)
    generate = Adder()
    records, said = run(generate, sums(), path)
    assert generate.batches == [["8+8", "9+9"]]
    assert records == whole
    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert said == [f"sums: 8 of 10 items are already in {path}"]


def test_without_a_file_the_records_are_the_same_and_nothing_is_written(tmp_path, monkeypatch):
    kept, _ = run(Adder(), sums(), tmp_path / "items.jsonl")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    generate = Adder()
    assert run(generate, sums(), None) == (kept, [])
    assert sum(map(len, generate.batches)) == 10 and not list((tmp_path / "empty").iterdir())


def test_a_torn_last_line_is_generated_again_within_its_old_batch(tmp_path):
    path = tmp_path / "items.jsonl"
    whole, _ = run(Adder(), sums(), path)
    content = path.read_bytes()
    lines = content.splitlines(keepends=True)
    for cut in (len(content) - 1, len(content) - 20, len(content) - len(lines[-1]) + 1):
        path.write_bytes(content[:cut])
        generate = Adder()
        records, _ = run(generate, sums(), path)
        assert records == whole
        assert path.read_bytes() == content
        # only the newline is missing: the record is whole; else its batch (8+8, 9+9) runs again as it was
        assert generate.batches == ([] if cut == len(content) - 1 else [["8+8", "9+9"]])


def test_other_weights_replace_records_of_the_same_label_and_say_so(tmp_path):
    path = tmp_path / "items.jsonl"
    run(Adder(), sums(), path, labels={"model": "tuned"})
    records, said = run(Adder(wrong=["1+1"]), sums(), path, {"weights": "b"}, labels={"model": "tuned"})
    assert [record["correct"] for record in records].count(False) == 1
    assert CheckedLines(path).read() == records
    assert "10 items" in said[0] and "generated again" in said[0]


def test_base_and_tuned_share_a_file(tmp_path):
    path = tmp_path / "items.jsonl"
    base, _ = run(Adder(wrong=["1+1", "2+2"]), sums(), path, {"weights": "a"}, labels={"model": "base"})
    tuned, _ = run(Adder(wrong=["1+1"]), sums(), path, {"weights": "b"}, labels={"model": "tuned"})
    again = Adder()
    assert run(again, sums(), path, {"weights": "a"}, labels={"model": "base"})[0] == base
    assert again.batches == []
    assert CheckedLines(path).read() == base + tuned


def test_a_larger_limit_adds_items_and_a_smaller_one_keeps_them_on_disk(tmp_path):
    path = tmp_path / "items.jsonl"
    run(Adder(), sums(8), path)
    generate = Adder()
    assert len(run(generate, sums(10), path)[0]) == 10
    assert generate.batches == [["8+8", "9+9"]]
    assert len(run(Adder(), sums(2), path)[0]) == 2
    assert len(CheckedLines(path).read()) == 10


def test_another_grader_grades_stored_texts_without_generating(tmp_path):
    path = tmp_path / "items.jsonl"
    run(Adder(wrong=["1+1"]), sums(), path)
    lenient = Task("sums", sums().items, FunctionGrader("lenient", lambda text, answer: True))
    generate = Adder()
    records, _ = run(generate, lenient, path)
    assert generate.batches == [] and all(record["correct"] for record in records)
    assert {record["grader"] for record in CheckedLines(path).read()} == {"lenient"}
    assert len(CheckedLines(path).read()) == 10


def test_a_grader_that_fails_takes_no_stored_text_away(tmp_path):
    path = tmp_path / "items.jsonl"
    run(Adder(), sums(), path)
    before = path.read_bytes()

    def fails(text, answer):
        raise UserError("the worker process could not start")

    with pytest.raises(UserError, match="could not start"):
        run(Adder(), Task("sums", sums().items, FunctionGrader("broken", fails)), path)
    assert path.read_bytes() == before


def test_a_generate_function_that_loses_a_text_is_caught(tmp_path):
    with pytest.raises(AssertionError, match="3 texts for 4 prompts"):
        run(lambda prompts: ["1"] * (len(prompts) - 1), sums(), tmp_path / "items.jsonl")


def test_arithmetic_problems_of_test_and_validation_differ_and_are_graded_by_their_final_number():
    test, validation = (load_task("arithmetic", TaskOptions(split=s, limit=50)) for s in ("test", "validation"))
    assert len(test.items) == 50
    assert not {i.id for i in test.items} & {i.id for i in validation.items}
    item = test.items[0]
    assert item.prompt[-1].content.endswith("=")
    assert test.grade(f"steps#{item.answer}", item.answer)
    assert not test.grade(f"steps#{item.answer}0", item.answer)


def test_a_larger_limit_of_arithmetic_continues_a_smaller_one():
    few, many = (load_task("arithmetic", TaskOptions(limit=n)).items for n in (5, 20))
    assert many[:5] == few


def test_gsm8k_reads_a_local_file_and_takes_the_number_after_the_mark(tmp_path):
    name = write_rows(tmp_path / "rows.jsonl", gsm8k_rows(5))
    task = load_task("gsm8k", TaskOptions(dataset_name=name, limit=3))
    assert [item.answer for item in task.items] == ["1", "2", "3"]
    assert task.items[0].prompt[0].content.startswith("What is 0 plus 1?")
    assert task.grade("0+1=1\n#### 1", "1") and not task.grade("#### 2", "1")
    task.grader.close()
    assert task.fields["items"] == 3


def test_gsm8k_finds_a_file_by_its_name_in_the_benchmarks_folder(tmp_path):
    write_rows(tmp_path / "mine.jsonl", gsm8k_rows(2))
    for name in ("mine", "mine.jsonl"):
        assert len(load_task("gsm8k", TaskOptions(dataset_name=name, benchmarks_dir=tmp_path)).items) == 2


def test_few_shot_prompts_hold_worked_examples_that_are_not_graded_themselves(tmp_path):
    name = write_rows(tmp_path / "test.jsonl", gsm8k_rows(3))
    worked = write_rows(tmp_path / "train.jsonl", gsm8k_rows(5, offset=1))  # two of five are test questions
    options = TaskOptions(dataset_name=name, shots_from=worked, shots=3, seed=1)
    items = load_task("gsm8k", options).items
    assert [message.role for message in items[0].prompt] == ["user", "assistant"] * 3 + ["user"]
    shown = {message.content for message in items[0].prompt[:-1]}
    assert not shown & {item.prompt[-1].content for item in items}
    assert items == load_task("gsm8k", options).items
    with pytest.raises(UserError, match="has 3 rows that are not graded"):
        load_task("gsm8k", TaskOptions(dataset_name=name, shots_from=worked, shots=4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset_name": "absent.jsonl"}, "no file absent.jsonl"),
        ({"dataset_name": "FILE", "shots": 2}, "evaluation.shots_from"),
        ({"dataset_name": "FILE", "limit": 0}, "no rows to evaluate"),
    ],
)
def test_a_gsm8k_request_that_cannot_be_met_says_what_to_set(tmp_path, options, message):
    name = write_rows(tmp_path / "rows.jsonl", gsm8k_rows(2))
    options = {key: name if value == "FILE" else value for key, value in options.items()}
    with pytest.raises(UserError, match=message):
        load_task("gsm8k", TaskOptions(**options))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken", ":2: is not JSON"),
        ("[1, 2]", ":2: is a list, want an object"),
        ('{"question": "q", "answer": "18"}', ":2: field 'answer' is '18', expected text that ends with"),
        ('{"question": 5, "answer": "#### 1"}', ":2: field 'question' is '5'"),
        ('{"question": "q", "answer": "no number ####"}', ":2: field 'answer'"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, line, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(gsm8k_rows(1)[0]) + "\n" + line + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=message):
        load_task("gsm8k", TaskOptions(dataset_name=str(path)))


def test_without_network_or_cache_the_hub_is_one_clear_error(monkeypatch):
    def no_network(*_, **__):
        raise ConnectionError("offline")

    monkeypatch.setattr("datasets.load_dataset", no_network)
    with pytest.raises(UserError, match=r"openai/gsm8k \(split test\).*point evaluation.dataset_name at a local"):
        load_task("gsm8k", TaskOptions())


def test_an_unknown_task_names_the_nearest():
    with pytest.raises(UserError, match="did you mean gsm8k"):
        load_task("gsm8", TaskOptions())


def test_the_real_gsm8k_rows_load_and_their_own_answers_are_right(shared_folder, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)  # the numeric grader, whatever is installed
    path = shared_folder / "data" / "gsm8k_test_first1000.jsonl"
    task = load_task("gsm8k", TaskOptions(dataset_name=str(path)))
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(task.items) == len(rows) == 1000
    verdicts = task.grader.grade_all([row["answer"] for row in rows], [item.answer for item in task.items])
    assert all(verdicts)


def of_base(folder, **fields):
    return BaseAnswers(folder / "answers", {"weights": "a", **fields}, answer_budget())


def test_answers_of_the_base_serve_the_next_run_with_the_same_model(tmp_path):
    kept = of_base(tmp_path)
    first, _ = run(Adder(wrong=["1+1"]), sums(), tmp_path / "one.jsonl", labels={"model": "base"}, kept=kept)
    generate = Adder()
    second, said = run(generate, sums(), tmp_path / "two.jsonl", labels={"model": "base"}, kept=kept)
    assert generate.batches == [] and second == first
    assert said == ["sums: 10 of 10 answers are those of an earlier run of the same model"]
    assert (tmp_path / "two.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes()
    third, _ = run(generate, sums(), None, labels={"model": "validation"}, kept=kept)
    assert [record["model"] for record in third] == ["validation"] * 10 and generate.batches == []


@pytest.mark.parametrize("change", ["weights", "questions"])
def test_another_model_or_another_batch_is_answered_itself(change, tmp_path):
    run(Adder(), sums(), None, kept=of_base(tmp_path))
    generate = Adder()
    if change == "weights":
        run(generate, sums(), None, {"weights": "b"}, kept=of_base(tmp_path))
    else:  # the last batch is another one
        run(generate, sums(9), None, kept=of_base(tmp_path))
    assert sum(map(len, generate.batches)) == (10 if change == "weights" else 9)
    assert len(list((tmp_path / "answers").iterdir())) == 2


def test_a_damaged_answer_of_the_base_is_made_again_and_written_again(tmp_path, capsys):
    kept = of_base(tmp_path)
    first, _ = run(Adder(), sums(), None, kept=kept)
    (file,) = (tmp_path / "answers").iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole.replace(b'"text": "6"', b'"text": "7"'))
    generate = Adder()
    again, _ = run(generate, sums(), None, kept=kept)
    assert again == first and generate.batches == [["0+0", "1+1", "2+2", "3+3"]]
    assert "1 of 10 lines are damaged" in capsys.readouterr().out and file.read_bytes() == whole


def test_answers_that_met_the_end_of_memory_are_not_given_to_others(tmp_path):
    kept = of_base(tmp_path)
    kept.budget.retries = 1
    run(Adder(), sums(), None, kept=kept)
    assert not (tmp_path / "answers").exists()


class Beside(Ranks):
    """Rank 0 beside another that says yes."""

    def any(self, flag: bool) -> bool:
        return True


def test_answers_of_which_another_rank_met_the_end_of_memory_are_not_given_to_others(tmp_path):
    run(Adder(), sums(), None, kept=of_base(tmp_path), ranks=Beside())
    assert not (tmp_path / "answers").exists()
    run(Adder(), sums(), None, kept=of_base(tmp_path), ranks=Ranks())
    assert (tmp_path / "answers").exists()


def test_answers_that_are_all_there_are_not_looked_up(tmp_path):
    run(Adder(), sums(), tmp_path / "items.jsonl")
    kept = SimpleNamespace(may_keep=True)  # without `read`
    records, _ = run(Adder(), sums(), tmp_path / "items.jsonl", kept=kept)
    assert len(records) == 10


def test_answers_of_an_earlier_part_of_an_evaluation_are_not_given_to_others(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(Adder(stop_at="9+9"), sums(), tmp_path / "items.jsonl")  # on another machine, it may be
    run(Adder(), sums(), tmp_path / "items.jsonl", kept=of_base(tmp_path))
    assert not (tmp_path / "answers").exists()


def test_marks_of_kept_answers_are_those_of_now(tmp_path):
    run(Adder(), sums(), None, kept=of_base(tmp_path))
    marked = Task("sums", sums().items, sums().grader, marks=lambda text, answer: {"even": True})
    records, _ = run(Adder(), marked, None, kept=of_base(tmp_path))
    assert all(record["marks"] == {"even": True} for record in records)


def test_kept_answers_that_cannot_be_read_are_made_again(tmp_path, capsys, monkeypatch):
    def refuse(self):
        raise PermissionError("not yours")

    monkeypatch.setattr(CheckedLines, "read", refuse)
    records, _ = run(Adder(), sums(), None, kept=of_base(tmp_path))
    assert len(records) == 10 and "cannot be read; it is asked again. not yours" in capsys.readouterr().out


def test_a_stopped_run_leaves_no_answers_of_the_base_to_others(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(Adder(stop_at="9+9"), sums(), tmp_path / "items.jsonl", kept=of_base(tmp_path))
    assert not (tmp_path / "answers").exists()


def test_a_folder_that_cannot_be_written_costs_no_answers(tmp_path, capsys):
    (tmp_path / "answers").write_text("in the way")
    records, _ = run(Adder(), sums(), tmp_path / "items.jsonl", kept=of_base(tmp_path))
    assert len(records) == 10 and "note: the base's answers are not kept for other runs." in capsys.readouterr().out


def test_another_grader_grades_kept_answers_of_the_base(tmp_path):
    run(Adder(wrong=["1+1"]), sums(), None, kept=of_base(tmp_path))
    lenient = Task("sums", sums().items, FunctionGrader("lenient", lambda text, answer: True))
    generate, path = Adder(), tmp_path / "items.jsonl"
    records, _ = run(generate, lenient, path, kept=of_base(tmp_path))
    assert generate.batches == [] and all(record["correct"] for record in records)
    assert [record["grader"] for record in CheckedLines(path).read()] == ["lenient"] * 10


def answers_like(**changed):
    """An Answerer, as far as its answers are kept by it."""
    machine = SimpleNamespace(
        precision=changed.get("precision", "fp32"),
        device=torch.device(changed.get("device", "cpu")),
        name=changed.get("name", "2 CPU threads"),
        attention=changed.get("attention", "sdpa"),
        compile=changed.get("compile", False),
        is_sharded=changed.get("is_sharded", False),
        answer_budget=answer_budget(),
    )
    denoiser = SimpleNamespace(autocast=changed.get("autocast"), mask_token_id=changed.get("mask_token_id", 9))
    weights = changed.get("weights", {"base": "a"})
    loaded = SimpleNamespace(machine=machine, denoiser=denoiser, weights=weights)
    encoder = SimpleNamespace(
        fields=lambda: {"template": changed.get("template", "plain")},
        bos_id=changed.get("bos_id"),
        eos_id=changed.get("eos_id", 1),
        stop_ids=changed.get("stop_ids", [1]),
    )
    sampler = SamplerSettings(seed=changed.get("seed", 0), batch_size=changed.get("batch_size", 4))
    return SimpleNamespace(loaded=loaded, encoder=encoder, sampler=sampler)


@pytest.mark.parametrize(
    "changed",
    [
        {"precision": "bf16"},
        {"device": "cuda"},
        {"name": "1 CPU threads"},
        {"attention": "eager"},
        {"compile": True},
        {"is_sharded": True},
        {"bos_id": 2},
        {"eos_id": 2},
        {"stop_ids": [1, 2]},
        {"mask_token_id": 8},
        {"autocast": torch.bfloat16},
        {"template": "chat"},
        {"seed": 1},
        {"batch_size": 5},
        {"weights": {"base": "b"}},
        {"quantization": QuantizationSettings(load_in_4bit=True)},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_answers_of_the_base_are_kept_by_all_that_they_depend_on(changed, tmp_path):
    def of(**changed):
        quantization = changed.pop("quantization", QuantizationSettings())
        return base_answers(str(tmp_path), quantization, answers_like(**changed))

    run(Adder(), sums(), None, kept=of())
    generate = Adder()
    run(generate, sums(), None, kept=of())
    assert generate.batches == []
    run(generate, sums(), None, kept=of(**changed))
    assert sum(map(len, generate.batches)) == 10


def test_another_kind_of_cpu_answers_by_itself(monkeypatch, tmp_path):
    def fields():
        return base_answers(str(tmp_path), QuantizationSettings(), answers_like()).fields

    before = fields()
    assert fields() == before
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "another")
    assert fields() != before


def test_the_harness_goes_on_with_its_answers_on_another_machine():
    def key(**changed):
        return answers_key(answers_like(**changed), 8, QuantizationSettings(), {"base": "a"})

    assert key() == key(name="another", device="cuda") and key() != key(seed=1)
