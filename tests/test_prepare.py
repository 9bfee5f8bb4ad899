"""`python -m laddpo.prepare` as a user meets it: settings, mixtures, graded candidates, leaks, refusals."""

import dataclasses
import json
from collections import Counter

import pytest

from laddpo.cli.app import cli
from laddpo.errors import UserError
from laddpo.evaluation.answering import question_in
from laddpo.inputs.data import difficulty_of
from laddpo.inputs.policy import _check_vocabulary, model_path
from laddpo.models.loading import load_tokenizer
from laddpo.preference.prepared import SPLITS, PreparedPairs
from laddpo.preference.reading.ranked import PairRule
from laddpo.problems.tasks import ARC_INSTRUCTION, GSM8K_INSTRUCTION, MATH500_INSTRUCTION
from laddpo.settings.compose import compose
from laddpo.settings.read_settings import stage_reads
from laddpo.storage.atomic import read_json
from laddpo.training.pairs import _arguments, check_enough


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def rows_of(letter, count):
    return [{"prompt": f"{letter} {i}", "chosen": f"right {i}", "rejected": f"wrong {i}"} for i in range(count)]


def run_prepare(tmp_path, *settings):
    """(exit code, folder prepared): the command line with its own data folder."""
    data = tmp_path / "data"
    code = cli("prepare", [f"paths.data_dir={data}", f"paths.outputs_dir={tmp_path / 'outputs'}", *settings])
    manifests = sorted(data.glob("prepared/*/manifest.json"), key=lambda path: path.stat().st_mtime_ns)
    return code, manifests[-1].parent if manifests else None


def test_every_setting_of_the_data_reaches_the_source_or_the_rules():
    """Each setting of `data` that a source or a rule has under the same name, away from its default."""
    changed = [
        "data.dataset_name=org/a", "data.dataset_split=s", "data.revision=v", "data.format=implicit",
        "data.dataset_config=c",
        "data.max_line_bytes=5000", "data.follow_symlinks=true", "data.allow_empty_prompt=true", "data.allow_nul=true",
        "data.habit=smaller_from_larger", "data.validation_fraction=0.3", "data.test_fraction=0.2", "data.test_split=t",
        "data.random_sample_size=11",
        "data.on_bad_row=skip", "data.max_bad_fraction=0.5",
        "data.duplicates=drop", "data.fail_on_leak=true", "data.columns.system=s", "data.columns.answer=gold",
        "data.min_gap=1.5", "data.pairs_from=best_rest", "data.margin_per_gap=0.5",
        "data.terms=4", "data.width=3", "data.operand_max=100", "seed=5", "data.label_threshold=4",
    ]  # fmt: skip
    *_, plain_parts, _, plain_rules = _arguments(compose(["data=jsonl", "data.dataset_name=b.jsonl"]))
    of_other_sources = {"num_pairs": 7, "pairs_per_question": 9, "candidates_name": "c", "balance_lengths": False}
    config = compose(["data=jsonl", *changed])
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, **of_other_sources))
    _, name, parts, _, rules = _arguments(config)
    assert name == "jsonl" and parts[0].request.columns["system"] == "s"
    assert parts[0].request.columns["answer"] == "gold"
    for made, plain, ours in (
        (
            parts[0].request,
            plain_parts[0].request,
            {"grader", "rater", "pair_by", "preference_dir", "num_examples", "mistake_share"},
        ),
        (rules, plain_rules, {"needs_test", "needs_test_split"}),  # of the command line
    ):
        same = {field for field in vars(made) if getattr(made, field) == getattr(plain, field)}
        assert same <= ours
    difficulty = difficulty_of(config.data)
    assert (difficulty.terms, difficulty.width, difficulty.operand_max) == (4, 3, 100)
    assert parts[0].request.difficulty == difficulty
    assert parts[0].request.pair_rule == PairRule("best_rest", 1.5, 0.5)


def test_sources_are_mixed_in_proportion_to_their_weights(tmp_path):
    a = write_rows(tmp_path / "a.jsonl", rows_of("a", 30))
    b = write_rows(tmp_path / "b.jsonl", [{"question": r["prompt"], **r} for r in rows_of("b", 10)])
    parts = f"[{{dataset_name:{a},weight:1}},{{source:jsonl,dataset_name:{b},columns:{{prompt:question}},weight:0.5}}]"
    code, folder = run_prepare(tmp_path, "data=mixture", f"data.mixture={parts}")
    assert code == 0 and folder.name.startswith("mixture-")
    prepared = PreparedPairs.load(folder)
    texts = [record["prompt"][0]["content"][0] for split in SPLITS for record in prepared.texts(split)]
    assert Counter(texts) == {"a": 20, "b": 10}  # b is the scarce one
    assert [source["weight"] for source in prepared.manifest["fields"]["sources"]] == [1.0, 0.5]
    assert read_json(folder / "report.json")["rows"]["not_sampled"] == 10


def test_a_part_of_a_mixture_has_the_columns_of_its_source_unless_it_names_some(tmp_path):
    theirs = write_rows(tmp_path / "a.jsonl", [{"question": r["prompt"], **r, "system": "s"} for r in rows_of("a", 4)])
    asked = "data=mixture", f"data.mixture=[{{source:orca_dpo_pairs,dataset_name:{theirs}COLUMNS}}]"
    roles = {}
    for columns in ("", ",columns:{prompt:prompt}"):
        code, folder = run_prepare(tmp_path, *(text.replace("COLUMNS", columns) for text in asked))
        assert code == 0
        record = next(PreparedPairs.load(folder).texts("train"))
        roles[columns] = [message["role"] for message in record["prompt"]]
    assert list(roles.values()) == [["system", "user"], ["user"]]


def test_a_mixture_can_stand_in_a_file_of_the_user(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.yaml").write_text(
        "defaults: [mixture, _self_]\nmixture:\n  - {dataset_name: a.jsonl, weight: 3}\n  - {source: orca_dpo_pairs}\n"
    )
    config = compose(["data=mine"], config_dir=str(tmp_path))
    parts = _arguments(config)[2]
    assert [(part.source, part.request.dataset_name, part.weight) for part in parts] == [
        ("jsonl", "a.jsonl", 3.0),
        ("orca_dpo_pairs", None, 1.0),
    ]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["data=mixture", "data.mixture=[]"], "data.mixture is empty"),
        (["data.mixture=[{source:hh_rlhf}]"], "data.source is 'arithmetic', which reads one"),
        (["data=mixture", "data.mixture=[{source:hh_rlfh}]"], "data.mixture[0].source is 'hh_rlfh'; known:"),
        (["data=mixture", "data.mixture=[{source:mixture}]"], "data.mixture[0].source is 'mixture'; known:"),
        (["data=mixture", "data.mixture=[{weight:1}]"], "data.mixture[0].dataset_name is not set"),
        (["data=mixture", "data.mixture=[{source:hh_rlhf,weight:0}]"], "data.mixture[0].weight is 0; expected"),
        (["data=mixture", "data.mixture=[{source:hh_rlhf,wieght:2}]"], "Key 'wieght' not in 'MixturePart'"),
        (["data=mixture", "data.mixture=3"], "expected a list like [{source:hh_rlhf,weight:2}"),
        (["data=mixture", "data.mixture=[{source:'${data.foo}'}]"], "'data.foo' not found"),
        (["data.streaming=true"], "a stream that breaks off looks like a shorter one"),
        (["data.duplicates=keeep"], "did you mean keep?"),
        (["data=gsm8k_candidates", "data.pairs_per_question=0"], "data.pairs_per_question is 0; it must be >= 1"),
    ],
)
def test_data_settings_that_cannot_be_meant_are_refused_in_words(settings, words, tmp_path, capsys):
    code, folder = run_prepare(tmp_path, *settings)
    said = capsys.readouterr().err
    assert code == 2 and folder is None
    assert words in said and "Traceback" not in said


def test_graded_candidates_become_pairs_of_right_over_wrong(tmp_path, capsys):
    rows = [
        {"question": "6*7?", "answer": "so\n#### 42", "candidates": ["it is 42", "#### 42", "41"]},
        {"question": "1+1?", "answer": "#### 2", "candidates": ["2"]},
    ]
    path = write_rows(tmp_path / "a.jsonl", rows)
    settings = [f"data.dataset_name={path}", "data.validation_fraction=0"]  # the pairs have one question
    code, folder = run_prepare(tmp_path, "data=gsm8k_candidates", *settings)
    assert code == 0
    records = [record for split in SPLITS for record in PreparedPairs.load(folder).texts(split)]
    assert {(r["chosen"], r["rejected"], r["answer"]) for r in records} == {
        ("it is 42", "41", "42"),
        ("#### 42", "41", "42"),
    }
    assert "no wrong candidate" in capsys.readouterr().out
    assert "grader" in read_json(folder / "manifest.json")["fields"]["sources"][0]


def test_rows_that_are_test_problems_are_counted_again_for_another_test_and_refused_if_wished(tmp_path, capsys):
    path = write_rows(tmp_path / "a.jsonl", rows_of("Question", 8))
    problems = write_rows(tmp_path / "test.jsonl", [{"question": " question 3", "answer": "#### 1"}])
    others = write_rows(tmp_path / "other.jsonl", [{"question": "q", "answer": "#### 1"}])
    asked = ["data=jsonl", f"data.dataset_name={path}", "evaluation=gsm8k"]
    code, folder = run_prepare(tmp_path, *asked, f"evaluation.dataset_name={problems}")
    words = f"1  rows whose prompt is in the test problems of gsm8k ({problems})"
    assert code == 0 and words in capsys.readouterr().out
    assert list(read_json(folder / "report.json")["leaks"].values()) == [1]
    code, again = run_prepare(tmp_path, *asked, f"evaluation.dataset_name={others}")
    assert (code, again) == (0, folder) and "whose prompt" not in capsys.readouterr().out
    run_prepare(tmp_path, *asked, f"evaluation.dataset_name={problems}")  # counted again for the first test
    assert words in capsys.readouterr().out
    code, _ = run_prepare(tmp_path, *asked, f"evaluation.dataset_name={problems}", "data.fail_on_leak=true")
    assert code == 2 and "DATA-87" in capsys.readouterr().err
    code, found = run_prepare(tmp_path / "new", *asked, f"evaluation.dataset_name={problems}", "data.fail_on_leak=true")
    assert (code, found) == (2, None)


def test_questions_are_known_again_without_what_a_task_writes_around_them():
    choices = "A. one\nB. two"
    for instruction in (GSM8K_INSTRUCTION, MATH500_INSTRUCTION, f"\n\n{choices}{ARC_INSTRUCTION}"):
        assert question_in(f"Two parts.\n\nHow many?{instruction}") == "Two parts.\n\nHow many?"
    assert question_in("07+15-04=") == "07+15-04="


def test_a_test_set_that_cannot_be_had_stops_nothing_and_is_named(tmp_path, capsys):
    path = write_rows(tmp_path / "a.jsonl", rows_of("a", 4))
    code, folder = run_prepare(
        tmp_path, "data=jsonl", f"data.dataset_name={path}", "evaluation=gsm8k", "evaluation.dataset_name=gone.jsonl"
    )
    assert code == 0 and "no file gone.jsonl" in capsys.readouterr().out
    report = read_json(folder / "report.json")
    assert not report["leaks"] and len(report["leaks_unknown"]) == 1


def test_a_hub_dataset_leaves_its_commit_in_the_manifest(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    commit = "0123456789abcdef" * 2 + "01234567"
    asked = []

    def load_dataset(name, **options):
        asked.append((name, options))
        rows = datasets.Dataset.from_list(rows_of("a", 6))
        rows.info.download_checksums = {f"hf://datasets/org/pairs@{commit}/data/a.parquet": {"num_bytes": 1}}
        return rows

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    code, folder = run_prepare(tmp_path, "data=jsonl", "data.dataset_name=org/pairs", "data.dataset_split=test")
    assert code == 0 and asked and all(call == ("org/pairs", {"split": "test", "revision": None}) for call in asked)
    assert read_json(folder / "manifest.json")["fields"]["commits"] == {"org/pairs[test]": commit}
    assert any(commit in warning for warning in read_json(folder / "report.json")["warnings"])
    code, pinned = run_prepare(tmp_path, "data=jsonl", "data.dataset_name=org/pairs", f"data.revision={commit}")
    commits = read_json(pinned / "manifest.json")["fields"]["commits"]
    assert commits == {"org/pairs[train]": commit, "org/pairs[test]": commit}
    assert not any("without data.revision" in warning for warning in read_json(pinned / "report.json")["warnings"])


def prepared_pairs(tmp_path, count, *settings):
    path = write_rows(tmp_path / "a.jsonl", rows_of("a", count))
    asked = ["data=jsonl", f"data.dataset_name={path}", *settings]
    code, folder = run_prepare(tmp_path, *(text for text in asked if stage_reads("prepare", text)))
    assert code == 0
    return compose(asked), PreparedPairs.load(folder)


def test_training_without_the_held_out_pairs_it_measures_on_is_refused(tmp_path):
    config, prepared = prepared_pairs(
        tmp_path, 20, "data.validation_fraction=0", "evaluation.every_steps=5", "evaluation=preference"
    )
    with pytest.raises(UserError, match=r"no validation pair and evaluation\.every_steps is 5.*DATA-88"):
        check_enough(config, prepared)
    config.evaluation.every_steps = None
    check_enough(config, prepared)
    config.best_metric = "loss"
    with pytest.raises(UserError, match="best_metric is 'loss'"):
        check_enough(config, prepared)
    config.best_metric, config.evaluation.every_steps, config.evaluation.tasks = "auto", 5, ["arithmetic"]
    check_enough(config, prepared)  # has validation problems of its own


def test_fewer_pairs_than_one_step_takes_is_a_note(tmp_path, capsys):
    asked = ["data.validation_fraction=0.2", "optim.per_device_train_batch_size=1"]
    config, prepared = prepared_pairs(tmp_path, 20, *asked, "optim.gradient_accumulation_steps=64")
    check_enough(config, prepared)
    assert f"{len(prepared.train)} training pairs are fewer than the 64 of a step" in capsys.readouterr().err
    config.optim.gradient_accumulation_steps = 2
    check_enough(config, prepared)
    assert not capsys.readouterr().err


def test_a_tokenizer_that_outgrows_the_embedding_is_refused_before_the_weights():
    config = compose()
    tokenizer = load_tokenizer(model_path(config.model))
    _check_vocabulary(config, tokenizer)
    tokenizer.add_tokens([f"<new{i}>" for i in range(2000)])
    with pytest.raises(UserError, match=r"the token '<new\d+>' with id .* embeds \d+ tokens"):
        _check_vocabulary(config, tokenizer)


def test_rows_of_one_prompt_are_all_trained_on_when_no_validation_is_asked_for(tmp_path, capsys):
    path = write_rows(tmp_path / "one.jsonl", [{"prompt": "a", "chosen": f"b {i}", "rejected": "c"} for i in range(3)])
    settings = ["data=jsonl", f"data.dataset_name={path}"]
    assert run_prepare(tmp_path, *settings, "data.validation_fraction=0.9") == (2, None)
    said = capsys.readouterr().err
    assert "(DATA-88)" in said and "Set data.validation_fraction=0" in said and "Traceback" not in said
    code, folder = run_prepare(tmp_path, *settings, "data.validation_fraction=0")
    prepared = PreparedPairs.load(folder)
    assert code == 0 and (len(prepared.train), len(prepared.validation)) == (3, 0)
