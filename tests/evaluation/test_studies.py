"""A study's page from the folders of its runs: pairing over seeds, claims decided plainly, drift pointed out."""

from __future__ import annotations

import pytest

from laddpo.problems.groups import group_of_items
from laddpo.results.mended import more_blocks, more_json
from laddpo.results.studies import Arm, Claim, Outcome, difference, read_outcome, study_json
from laddpo.results.study_page import study_markdown, study_plot
from laddpo.storage import json_lines, manifests


def arm(name: str, *right: float, seeds=(1, 2, 3), items=200, against="default", **facts) -> Arm:
    """Each seed has so many of its problems right; before training half of them were."""
    outcomes = [
        Outcome(
            seed,
            {f"{seed}/{i}": i < items // 2 for i in range(items)},
            {f"{seed}/{i}": i < share * items for i in range(items)},
            {"validation_kept": share, "validation_last": share, **facts},
        )
        for seed, share in zip(seeds, right, strict=True)
    ]
    return Arm(name, "Arms", "train", [f"x={name}"], against, outcomes)


def test_a_difference_is_paired_by_problem_and_pooled_over_seeds():
    default = arm("default", 0.7, 0.7, 0.7)
    found = difference(arm("a", 0.78, 0.8, 0.82), default)
    assert found.difference == pytest.approx(0.1) and found.items == 600
    assert 0 < found.low < 0.1 < found.high
    assert difference(arm("a", 0.7, 0.8, 0.9), None).difference == pytest.approx(0.3)


def test_seeds_that_differ_widen_the_interval_and_seeds_that_agree_by_chance_do_not_narrow_it():
    default = arm("default", 0.7, 0.7, 0.7)
    unsure, sure = difference(arm("a", 0.7, 0.8, 0.9), default), difference(arm("a", 0.8, 0.8, 0.8), default)
    assert unsure.low < 0 < unsure.high  # 4.303 standard errors of three seeds
    assert unsure.high - unsure.difference == pytest.approx(4.303 * 0.1 / 3**0.5, rel=1e-3)
    assert sure.low > 0 and sure.high - sure.low > 0.03


def test_seeds_that_only_one_arm_has_are_left_out():
    one = Arm("a", "Arms", "train", [], "default", arm("a", 0.7, 0.8, 0.9).outcomes[:1])
    assert difference(one, arm("default", 0.6, 0.6, 0.6)).items == 200
    assert difference(Arm("a", "Arms", "train", [], "default"), None) is None


def test_claims_are_decided_in_words_and_left_open_where_the_interval_includes_0():
    default = arm("default", 0.7, 0.7, 0.7)
    arms = [default, arm("good", 0.8, 0.8, 0.8), arm("bad", 0.5, 0.5, 0.5), arm("same", 0.7, 0.7, 0.7)]
    claims = [
        Claim("good", "default"),
        Claim("bad", "default"),
        Claim("same", "default"),
        Claim("same", "default", margin=2),
        Claim("bad", "default", margin=2),
        Claim("default", "base"),
    ]
    found = study_json(arms, claims)["claims"]
    texts = [claim["text"] for claim in found]
    words = [
        "better (p",
        "worse (p",
        "not decided (p",
        "not worse by 2 points or more (p",
        "not decided (p",
        "better (p",
    ]
    assert [f": {word} = " in text for text, word in zip(texts, words, strict=True)] == [True] * 6
    assert (
        texts[0].startswith("good against default: +10.0 [")
        and "seeds +10.0, +10.0, +10.0, above 0 by itself in 3 of 3" in texts[0]
    )
    assert all(claim["p_holm"] >= claim["p"] for claim in found) and found[4]["p"] > 0.99


def test_a_claim_that_is_sure_by_itself_is_not_decided_among_many():
    default = arm("default", 0.7, 0.7, 0.7)
    arms = [default, arm("good", 0.76, 0.8, 0.84), arm("same", 0.7, 0.7, 0.7)]
    alone = study_json(arms, [Claim("good", "default")])["claims"][0]
    among = study_json(arms, [Claim("good", "default"), *[Claim("same", "default")] * 9])["claims"][0]
    assert alone["p_holm"] == alone["p"] == among["p"] == pytest.approx(0.0495, abs=0.002)  # t = 4.33, 2 degrees
    assert ": better (p" in alone["text"]
    assert among["p_holm"] == pytest.approx(10 * alone["p"])
    assert "better by itself" in among["text"] and "not decided among so many claims" in among["text"]
    assert "10 claims, chosen before the runs" in study_markdown(
        study_json(arms, [Claim("good", "default"), *[Claim("same", "default")] * 9]), "Study", "x"
    )


def test_what_was_mended_and_what_was_harmed_are_shown_apart():
    base = {"t/a": False, "t/b": False, "t/c": True, "t/d": True}
    tuned = {"t/a": True, "t/b": True, "t/c": True, "t/d": False}
    groups = {"t/a": "habit", "t/b": "habit", "t/c": "no habit", "t/d": "no habit"}
    outcomes = [Outcome(seed, base, tuned, {}, groups) for seed in (1, 2)]
    content = study_json([Arm("default", "Arms", "train", [], "default", outcomes)], [])
    found = content["arms"][0]["groups"]
    assert (found["habit"]["base"], found["habit"]["tuned"], found["habit"]["items"]) == (0, 4, 4)
    assert found["no habit"]["difference"] == -0.5
    assert "| default | no habit | 4 → 2 of 4 | -50.0 [" in study_markdown(content, "Study", "x")


def test_problems_fall_into_groups_by_their_habit_and_by_whether_training_asked_the_step():
    fields = {"split": "test", "items": 60, "seed": 3, "operand_max": 20, "terms": 3, "width": 2}
    plain, apart = (group_of_items("arithmetic", fields, "drop_carry", share) for share in (0.0, 0.5))
    assert plain["arithmetic-15-11+04="] == "no habit" and plain["arithmetic-15-10+05="] == "habit"
    assert {plain[name] for name in apart if apart[name] == "no habit"} == {"no habit"}
    assert {plain[name] for name in apart if apart[name].endswith(("asked in training", "unseen in training"))} == {
        "habit"
    }
    assert len(set(apart.values())) == 3
    words = group_of_items("word_problems", {"split": "test", "items": 20, "seed": 3}, "drop_carry")
    assert len(words) == 20 and set(words.values()) == {"habit", "no habit"}
    assert group_of_items("gsm8k", {}, "drop_carry") == {}


def test_the_page_says_what_is_missing_and_what_drifted(tmp_path):
    drifted = arm("longer", 0.7, 0.7, 0.7, answer_tokens_base=20.0, answer_tokens_tuned=30.0)
    steady = arm("default", 0.6, 0.6, 0.6, answer_tokens_base=20.0, answer_tokens_tuned=20.5)
    content = study_json([steady, drifted, Arm("late", "Arms", "sft", [], "default")], [])
    page = study_markdown(content, "Study", "python -m laddpo.study")
    assert "Not finished: late." in page
    assert "- longer: tokens of an answer 20 → 30" in page and "- default:" not in page
    study_plot(content, tmp_path / "study.png", "Study")
    assert (tmp_path / "study.png").stat().st_size > 1000


@pytest.mark.parametrize("others", [[], [Arm("default", "Arms", "train", [], "default")]], ids=["absent", "unfinished"])
def test_an_arm_whose_reference_is_not_there_is_compared_with_nothing_else(others):
    content = study_json([*others, arm("lone", 0.7, 0.7, 0.7)], [])
    (row,) = content["arms"]
    assert row["difference"] is None and row["against_base"]["difference"] == pytest.approx(0.2)
    (line,) = [line for line in study_markdown(content, "Study", "x").splitlines() if line.startswith("| lone | 3")]
    assert "| - | - |" in line and "(default)" not in line


def record(model: str, problem: str, correct: bool) -> dict:
    return {"task": "t", "id": problem, "model": model, "correct": correct}


def write_run(folder, step_kept: int, tuned: list[bool], base: list[bool]) -> None:
    log = json_lines.JsonLines(folder / "evaluation" / "items.jsonl")
    for model, found in (("base", base), ("tuned", tuned)):
        for i, correct in enumerate(found):
            log.append(record(model, str(i), correct))
    metrics = json_lines.JsonLines(folder / "metrics.jsonl")
    metrics.append({"step": 0, "validation/exact_match": 0.5, "validation/chosen_fall": 0.0})
    for step, variance in ((1, 0.0), (2, 0.2), (3, 0.4)):
        metrics.append({"step": step, "score/variance": variance})
    metrics.append({"step": 3, "validation/exact_match": 0.4, "validation/chosen_fall": 0.3})
    manifests.write_manifest(folder, "train", {"step": 3, "best_step": step_kept}, [])


def test_a_run_is_read_with_the_checkpoint_that_was_kept(tmp_path):
    write_run(tmp_path / "run", 0, [True, True], [True, False])
    outcome = read_outcome(tmp_path / "run", 7)
    assert outcome.tuned == {"t/0": True, "t/1": True} and outcome.base == {"t/0": True, "t/1": False}
    assert outcome.facts["validation_kept"] == 0.5 and outcome.facts["validation_last"] == 0.4
    assert outcome.facts["score_variance"] == pytest.approx(0.3)  # the first step is at margin 0 and has none
    assert outcome.facts["chosen_fall"] == 0
    assert read_outcome(tmp_path / "unfinished", 7) is None


def test_rounds_are_read_from_the_first_base_to_the_last_model(tmp_path):
    for number, (tuned, base) in enumerate([([True, False], [False, False]), ([True, True], [True, False])], 1):
        write_run(tmp_path / "run" / f"round_{number}", 3, tuned, base)
    manifests.write_manifest(tmp_path / "run", "train", {"rounds": []}, [])
    outcome = read_outcome(tmp_path / "run", 7)
    assert list(outcome.base.values()) == [False, False] and list(outcome.tuned.values()) == [True, True]


def test_both_groups_are_counted_by_mark_and_by_temperature(tmp_path):
    folder = tmp_path / "a-1"
    log = json_lines.JsonLines(folder / "evaluation" / "items.jsonl")
    answers = {"base": "x yy", "tuned": "yyyx", "base at temperature 1": "xxyy", "tuned at temperature 1": "yyyy"}
    for model, texts in answers.items():
        for i, text in enumerate(texts):
            log.append({**record(model, str(i), text == "y"), "marks": {"neat": text != " "}})
    log.append({"task": "t", "model": "verdict", "id": "0", "verdict": "win"})
    one = Arm("a", "Arms", "train", [], "a", [Outcome(1, {}, {}, {})])
    found = more_json(tmp_path, [one, Arm("b", "Arms", "train", [], "a")], [Claim("a", "base"), Claim("b", "a")])
    assert found["mended"][""]["a"] == {
        "exact match": {"wrong": 2, "mended": 2, "right": 2, "kept": 1},
        "neat": {"wrong": 1, "mended": 1, "right": 3, "kept": 3},
    }
    hot = found["also"][" at temperature 1"]
    assert hot["arms"][0]["exact_match"] == 1 and hot["arms"][0]["against_base"]["difference"] == 0.5
    page = "\n".join(more_blocks({**found, "first": [{"name": "start", "stage": "sft", "overrides": ["x=1"]}]}))
    assert "| start | sft | x=1 |" in page
    assert "## Answers at temperature 1" in page and "| a | wrong, now right | 2 of 2 | 1 of 1 |" in page
    assert "| a | right, still right | 1 of 2 | 3 of 3 |" in page and "- b against a: not measured yet." in page
