"""What `data=onpolicy` asks of the model: answers to questions, sampled by the model that training will start from.

Reads the settings, gives the sampled file to laddpo/prepare.py, which makes pairs of it. With adapter.path, or run, the
answers are those of the tuned model.
"""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from pathlib import Path

from laddpo.errors import UserError
from laddpo.judging.judges import RULES
from laddpo.settings.judge_schema import needs_gold
from laddpo.settings.read_settings import command_of
from laddpo.settings.schema import MixturePart, RunConfig
from laddpo.storage import atomic

EMBEDDED_QUESTIONS = 1500  # asked in a round where sampling.num_questions is null


def with_run(config: RunConfig) -> RunConfig:
    """`run=` names a finished run whose best adapter samples: the same as adapter.path=<run>/adapter."""
    if config.data.source != "onpolicy" or not config.run or config.adapter.path:
        return config
    from laddpo.inputs.tuned import tuned_weights
    from laddpo.settings.compose import read_config

    trained = read_config(Path(config.run))
    if trained.adapter.kind != "lora":
        raise UserError(
            f"run is {config.run!r}, a run of adapter=full, whose weights are a model of their own; sample from it by "
            f"model.model_name_or_path={Path(config.run) / 'model'}."
        )
    adapter = dataclasses.replace(trained.adapter, path=str(tuned_weights(trained.adapter, Path(config.run))))
    return dataclasses.replace(config, adapter=adapter)


def sampled_file(config: RunConfig, questions: list) -> Path:
    """samples.jsonl of these settings, which ask `questions`: found, or sampled now with auto=true."""
    from laddpo.core.budget import release_memory
    from laddpo.evaluation import samples
    from laddpo.processes.ranks import here
    from laddpo.processes.signals import stop_on_signal

    fields = sample_fields(config, questions)
    folder = samples.samples_folder(Path(config.paths.data_dir), fields)
    if samples.is_finished(folder):
        return folder / samples.SAMPLES
    if not config.auto:
        raise UserError(
            f"{folder}: these answers are not sampled yet and auto is false. Run {command_of('prepare')}, or set "
            "auto=true."
        )
    ranks = here()
    with stop_on_signal() as stop:
        sample = _sampler(config, questions)
        sampling, size = config.data.sampling, config.evaluation.batch_size
        path = samples.collect_samples(
            sample, questions, sampling.samples, folder, fields, size, stop, ranks.rank, ranks.world
        )
    del sample  # and with it the model
    release_memory()
    return path


def open_questions(config: RunConfig) -> list:
    """The questions asked: of the file or hub data set, else embedded training problems; never validation or test."""
    from laddpo.inputs.data import difficulty_of, request_of
    from laddpo.preference.embedded import arithmetic, rubric, word_problems
    from laddpo.preference.onpolicy import Question, read_questions
    from laddpo.preference.reading.files import ReadLog
    from laddpo.preference.reading.rows import RowRules
    from laddpo.preference.report import unread_lines
    from laddpo.preference.requested import raw_rows
    from laddpo.processes.ranks import here

    data, sampling = config.data, config.data.sampling
    first, count = sampling.first_question, sampling.num_questions
    if data.dataset_name is None:
        last = first + (count or EMBEDDED_QUESTIONS)
        if data.problems == "word_problems":
            words = word_problems.word_problems("train", last, config.seed)
            return [Question(one.question + word_problems.INSTRUCTION, one.answer) for one in words[first:]]
        difficulty = rubric.DIFFICULTY if data.problems == "rubric" else difficulty_of(data)
        problems = arithmetic.problems("train", last, config.seed, difficulty, sampling.unseen_steps)
        return [Question(problem.text, problem.answer) for problem in problems[first:]]
    log = ReadLog()
    asked = MixturePart(
        "jsonl",
        data.dataset_name,
        data.dataset_split,
        data.revision,
        data.columns,
        dataset_config=data.dataset_config,
    )
    request = request_of(config.data, asked, config.sft, config.paths.data_dir, config.seed)
    needs_answer = data.judge.kind == "none" or needs_gold(data.judge)
    rows = raw_rows(request, log, ("prompt", "answer") if needs_answer else ("prompt",))
    found = read_questions(rows, RowRules(request.columns), sampling.instruction, log, needs_answer)
    if here().is_main:
        for message, count in log.warnings.items():
            print(f"note: questions of {data.dataset_name}: {count:,} {message}", file=sys.stderr)
        for line in unread_lines(log.unread):
            print(f"note: {line.strip()}", file=sys.stderr)
    # the same order for the same questions wherever the rows came from; a later round begins where this one ends
    found.sort(key=lambda question: hashlib.sha256(f"{config.seed}/{question.text}".encode()).digest())
    count = min(count or len(found), len(found))
    return [found[(first + i) % len(found)] for i in range(count)]


def questions_of_a_round(config: RunConfig) -> int:
    """By how many questions a round is ahead of the one before; 0 where every round asks all of a file."""
    data = config.data
    return data.sampling.num_questions or (EMBEDDED_QUESTIONS if data.dataset_name is None else 0)


def sample_fields(config: RunConfig, questions: list) -> dict:
    """Everything that the sampled texts depend on: the key of their folder."""
    from laddpo.evaluation.answering import sampler_settings
    from laddpo.inputs.data import encoder_for
    from laddpo.inputs.policy import model_path
    from laddpo.models.adapters import adapter_identity
    from laddpo.models.loading import load_tokenizer, weights_fingerprint

    path, revision = model_path(config.model), config.model.revision
    sampler = sampler_settings(sampling_config(config).evaluation, config.seed, config.model.known_block_length)
    settings = dataclasses.asdict(sampler)
    for name in ("batch_size", "stop_early"):  # they change how, not what
        del settings[name]
    adapter = config.adapter.path
    return {
        "questions": hashlib.sha256(
            atomic.canonical_json([[q.text, q.answer] for q in questions]).encode()
        ).hexdigest(),
        "samples": config.data.sampling.samples,
        "sampler": settings,
        "encoding": encoder_for(config.data, load_tokenizer(path, revision)).fields(),
        "weights": {
            "base": weights_fingerprint(path, revision, hash_again=config.verify),
            **(adapter_identity(Path(adapter)) if adapter else {"adapter": "none"}),
        },
        "quantization": dataclasses.asdict(config.quantization),
        "precision": config.hardware.precision,
    }


def sampling_config(config: RunConfig) -> RunConfig:
    """The run's settings with the decoding of sampling in the place of the evaluation's."""
    sampling, known = config.data.sampling, {field.name for field in dataclasses.fields(config.evaluation)}
    names = [field.name for field in dataclasses.fields(sampling) if field.name in known and field.name != "samples"]
    chosen = {name: getattr(sampling, name) for name in names}
    return dataclasses.replace(config, evaluation=dataclasses.replace(config.evaluation, cfg_scale=0.0, **chosen))


def graded_or_rated(config: RunConfig, questions: list) -> tuple:
    """(grader, rater) of the answers to `questions`, one of them None: data.judge rates them, else the grader tells
    right from wrong."""
    from laddpo.inputs.judge import Surroundings, open_rater

    judge = config.data.judge
    if judge.kind == "none":
        return pair_grader(config, questions), None
    around = Surroundings("data.judge", Path(config.paths.data_dir), _device(config), seed=config.seed)
    if needs_gold(judge):
        grader = pair_grader(config, questions)
        around = dataclasses.replace(around, grade=grader.grade_all, grader=grader.name, close=grader.close)
        if RULES[judge.rule].is_partial:
            around = dataclasses.replace(around, grade=_count_marks, grader="number of marks of rubric")
    return None, open_rater(judge, around)


def _count_marks(texts: list[str], answers: list[str]) -> list[int]:
    from laddpo.preference.embedded.rubric import count_marks

    return [count_marks(text, answer) for text, answer in zip(texts, answers, strict=True)]


def _device(config: RunConfig) -> str:
    """Where a reward model runs if data.judge.device leaves it open."""
    if config.data.judge.kind != "reward_model":
        return "cpu"
    from laddpo.hardware.machine import find_device

    return str(find_device(config.hardware))


def pair_grader(config: RunConfig, questions: list):
    """Tells right answers to `questions` from wrong ones: exact for the embedded problems, else the one that
    data.grader names."""
    from laddpo.preference.embedded import arithmetic, rubric
    from laddpo.problems.grading import FunctionGrader, text_grader

    is_embedded = config.data.dataset_name is None and config.data.grader == "auto"
    if is_embedded and config.data.problems == "word_problems":
        return text_grader("number", ())
    if is_embedded and config.data.problems == "rubric":
        return FunctionGrader("all five marks", rubric.grade)
    if is_embedded:
        return FunctionGrader("exact final answer", arithmetic.grade)
    return text_grader(config.data.grader, [question.answer for question in questions])


def _sampler(config: RunConfig, questions: list):
    """A function from prompts to these questions and keys to texts, which holds the model."""
    from laddpo.hardware.machine import find_machine
    from laddpo.inputs import policy
    from laddpo.preference.reading.pairs import user_prompt

    policy.check_before_loading(config)
    config = sampling_config(config)
    loaded = policy.load(config, find_machine(config))
    prompts = [user_prompt(question.text) for question in questions]
    names = [f"question {question.text!r}" for question in questions]
    answers = _answerer(config, loaded)
    encoded = dict(zip(prompts, answers.encode(prompts, names), strict=True))

    def sample(asked: list, keys: list[str]) -> list[str]:
        return [answer.text for answer in answers.answers([encoded[prompt] for prompt in asked], keys)]

    return sample


def _answerer(config: RunConfig, loaded):
    from laddpo.evaluation.answering import answerer

    return answerer(loaded, config.evaluation, config.data, config.seed)
