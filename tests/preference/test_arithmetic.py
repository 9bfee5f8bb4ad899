"""The embedded task: solutions derived by hand, disjoint splits, reproducible draws."""

import re
import subprocess
import sys
from collections import Counter
from itertools import islice, product

import pytest

from laddpo.errors import UserError
from laddpo.preference.embedded import arithmetic
from laddpo.preference.embedded.arithmetic import Difficulty, Problem


def test_no_problem_has_a_step_that_is_kept_unseen_and_others_stay_as_they_are():
    asked, all_of_them = arithmetic.problems("train", 200, 5, unseen_steps=0.5), arithmetic.problems("train", 900, 5)
    assert not any(arithmetic.is_unseen(step, 0.5) for problem in asked for step in problem.steps)
    assert {problem.text for problem in asked[:100]} <= {problem.text for problem in all_of_them}
    shares = [arithmetic.is_unseen(f"{a:02d}+{b:02d}", 0.3) for a in range(21) for b in range(21)]
    assert 0.2 < sum(shares) / len(shares) < 0.4
    assert asked[0].steps[0] == asked[0].text[:5] and len(asked[0].steps) == 2


def test_a_solution_is_written_left_to_right_in_fixed_width():
    problem = Problem((7, 15, 4), "+-", 2)
    assert problem.text == "07+15-04="
    assert arithmetic.solution(problem) == "07+15=22;22-04=18#18"
    assert problem.answer == "18"


@pytest.mark.parametrize(
    ("operands", "operators", "habit", "mistaken"),
    [
        ((7, 15, 4), "+-", "drop_carry", "07+15=22;22-04=28#28"),  # 2-4 borrows
        ((7, 8, 8), "++", "drop_carry", "07+08=15;15+08=13#13"),  # 5+8 carries
        ((7, 8, 4), "++", "drop_carry", None),  # 15+04 has no carry: the first step's is done right
        ((7, 15, 4), "+-", "smaller_from_larger", "07+15=22;22-04=22#22"),
        ((15, 8), "+", "drop_carry", "15+08=13#13"),  # a single step takes the habit itself
        ((7, 8, 8, 1), "++-", "drop_carry", "07+08=15;15+08=13;13-01=12#12"),  # later steps follow the wrong one
        ((8, 1, 9, 9), "++-", "drop_carry", None),  # 09+09=08, and 08-09 could not be written
    ],
)
def test_a_habit_is_wrong_only_where_its_step_carries(operands, operators, habit, mistaken):
    assert arithmetic.mistaken_solution(Problem(operands, operators, 2), habit) == mistaken


def test_dropping_the_carry_is_wrong_exactly_when_a_column_overflows():
    for left, right, operator in product(range(100), range(100), "+-"):
        value = left + right if operator == "+" else left - right
        if 0 <= value < 100:
            if operator == "+":
                carries = left % 10 + right % 10 > 9
            else:
                carries = left % 10 < right % 10
            assert (arithmetic.drop_carry(left, operator, right, 2) != value) == carries


def test_problems_stay_within_width_and_range():
    for difficulty in (Difficulty(), Difficulty(operand_max=99, terms=4), Difficulty(operand_max=999, width=3)):
        for index in range(200):
            problem = arithmetic.problem("train", index, 3, difficulty)
            assert len(problem.operands) == difficulty.terms
            assert all(0 <= operand <= difficulty.operand_max for operand in problem.operands)
            assert all(0 <= result < 10**difficulty.width for result in problem.results)


def test_splits_are_disjoint_whatever_the_seed():
    drawn = {
        split: {arithmetic.problem(split, index, seed).text for seed in (0, 1) for index in range(600)}
        for split in arithmetic.SPLIT_SHARES
    }
    assert all(drawn.values())
    assert not drawn["train"] & drawn["validation"]
    assert not drawn["train"] & drawn["test"]
    assert not drawn["validation"] & drawn["test"]
    assert all(arithmetic.split_of(text) == split for split, texts in drawn.items() for text in texts)


def test_the_corpus_and_the_training_pairs_contain_no_held_out_problem():
    for row in [*arithmetic.corpus(400, 0.6, 7), *arithmetic.preference_pairs("train", 400, 7)]:
        assert arithmetic.split_of(row.prompt[0].content) == "train"


def test_split_shares_are_as_stated():
    counts = Counter(arithmetic.split_of(f"{a:02d}+{b:02d}=") for a in range(100) for b in range(100))
    assert abs(counts["train"] / 10_000 - 0.8) < 0.02
    assert abs(counts["validation"] / 10_000 - 0.1) < 0.02


def test_draws_are_the_same_in_another_process():
    script = (
        "from laddpo.preference.embedded import arithmetic as a; "
        "print(a.problem('test', 5, 11).text, a.split_of('01+02='), "
        "a.keyed_integers('k', 2), *[p.id for p in a.preference_pairs('train', 3, 1)])"
    )
    runs = {
        subprocess.run(
            [sys.executable, "-c", script], env={"PYTHONHASHSEED": hash_seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True, text=True, check=True,
        ).stdout
        for hash_seed in ("1", "2")
    }  # fmt: skip
    assert len(runs) == 1
    assert arithmetic.keyed_integers("k", 2) == GOLDEN_INTEGERS


GOLDEN_INTEGERS = [15031228356842531665, 7383962906710288999]


def test_more_pairs_continue_fewer_and_problems_are_different():
    few, many = list(arithmetic.preference_pairs("train", 50, 5)), list(arithmetic.preference_pairs("train", 120, 5))
    assert many[:50] == few
    assert len({pair.group for pair in many}) == 120
    texts = [problem.text for problem in arithmetic.problems("test", 100, 5)]
    assert len(set(texts)) == 100
    assert texts[:10] == [problem.text for problem in arithmetic.problems("test", 10, 5)]


def test_pairs_prefer_right_steps_of_equal_length():
    for pair in arithmetic.preference_pairs("validation", 100, 0):
        assert len(pair.chosen) == len(pair.rejected)
        assert arithmetic.grade(pair.chosen, pair.answer)
        assert pair.chosen == arithmetic.solution(parsed(pair.prompt[0].content))
        assert not arithmetic.grade(pair.rejected, pair.answer)


def parsed(text):
    """The problem that a prompt such as `07+15-04=` states."""
    numbers = re.findall(r"\d+", text)
    return arithmetic.Problem(tuple(map(int, numbers)), "".join(re.findall(r"[+-]", text)), len(numbers[0]))


def test_the_mistake_share_decides_how_many_carries_are_dropped():
    def share_of_mistakes(mistake_share):
        rows = list(arithmetic.corpus(2000, mistake_share, 2))
        problems = [parsed(row.prompt[0].content) for row in rows]
        can_show = [row for row, p in zip(rows, problems, strict=True) if arithmetic.mistaken_solution(p) is not None]
        wrong = [row for row in can_show if row.response != arithmetic.solution(parsed(row.prompt[0].content))]
        return len(wrong) / len(can_show)

    assert share_of_mistakes(0.0) == 0
    assert share_of_mistakes(1.0) == 1
    assert abs(share_of_mistakes(0.6) - 0.6) < 0.06


def test_grading_reads_the_number_after_the_last_mark():
    assert arithmetic.grade("07+15=22;22-04=18#18", "18")
    assert arithmetic.grade("nonsense#18\n", "18")
    for wrong in ("07+15=22;22-04=18#28", "18", "#18#", "", "#018", "#18 or so"):
        assert not arithmetic.grade(wrong, "18")


def test_too_many_problems_are_refused_with_the_number_that_exists():
    few = Difficulty(operand_max=1, terms=2, width=1)
    with pytest.raises(UserError, match=r"only \d+ different arithmetic problems"):
        arithmetic.problems("train", 50, 0, few)


@pytest.mark.parametrize("fields", [{"operand_max": 100}, {"operand_max": 0}, {"terms": 1}, {"width": 0}])
def test_impossible_difficulties_are_refused_by_name(fields):
    with pytest.raises(UserError, match=r"data\."):
        Difficulty(**fields)


def test_asking_for_an_unknown_split_or_habit_names_the_known_ones():
    with pytest.raises(UserError, match="test, train, validation"):
        arithmetic.problem("eval", 0, 0)
    with pytest.raises(UserError, match="did you mean drop_carry"):
        list(islice(arithmetic.preference_pairs("train", 1, 0, habit="drop_cary"), 1))


def test_most_single_steps_of_the_test_problems_stand_in_the_default_run_s_pairs():
    """The figure of docs/study.md: problems are unseen as a whole, their steps mostly are not."""
    questions = {pair.prompt[0].content for pair in arithmetic.preference_pairs("train", 1843, 42)}
    asked = {step for text in questions for step in read(text).steps}
    shows = [one for one in arithmetic.problems("test", 400, 42) if arithmetic.mistaken_solution(one)]
    assert not questions & {one.text for one in shows}
    seen = sum(one.steps[one.habit_step] in asked for one in shows)
    assert (seen, len(shows)) == (152, 162)


def read(text: str) -> arithmetic.Problem:
    numbers = tuple(int(number) for number in re.findall(r"\d+", text))
    return arithmetic.Problem(numbers, "".join(re.findall("[+-]", text)), 2)
