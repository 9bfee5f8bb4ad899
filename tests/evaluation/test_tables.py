"""Result tables, line by line."""

from laddpo.results.tables import before_after_table, examples_text, notes_of


def test_the_table_before_and_after_is_aligned_and_says_when_nothing_is_shown():
    results = {
        "exact_match": {"base": 0.5, "tuned": 0.725, "difference": 0.225, "interval": [0.18, 0.27], "items": 500},
        "reward_accuracy": {"base": 0.5, "tuned": 0.52, "difference": 0.02, "interval": [-0.01, 0.05], "items": 64},
        "reward_margin": {"base": 0.0, "tuned": 0.4, "difference": 0.4, "interval": [0.3, 0.5], "items": 64},
        "seconds": 12.0,
    }
    assert before_after_table(results).splitlines() == [
        "                  base  tuned    difference      95% interval  items",
        "──────────────────────────────────────────────────────────────────────────────────────",
        "exact match      50.0%  72.5%  +22.5 points    [+18.0, +27.0]    500",
        "reward accuracy  50.0%  52.0%   +2.0 points      [-1.0, +5.0]     64  interval holds 0",
        "reward margin    0.000  0.400        +0.400  [+0.300, +0.500]     64",
    ]


def test_an_interval_that_is_not_known_is_neither_printed_nor_passed_over():
    entry = {"base": 0.0, "tuned": 0.007, "difference": 0.007, "interval": None, "items": 1}
    (line,) = before_after_table({"reward_margin": entry}).splitlines()[2:]
    assert line.split() == ["reward", "margin", "0.000", "0.007", "+0.007", "–", "1", "interval", "unknown"]


def test_a_line_below_says_how_both_models_answered_once_for_each_way():
    ways = ["24 tokens, 24 steps, temperature 0"] * 2 + ["8 tokens, 4 steps, temperature 0"]
    results = {f"{i}/exact_match": {"task": {"name": f"{i}", "decoding": way}} for i, way in enumerate(ways)}
    assert notes_of(results) == [f"Both models answered with {ways[0]}; with {ways[2]}."]
    assert notes_of({"exact_match": {"task": {"name": "of an earlier version"}}, "seconds": 3.0}) == []


def test_examples_show_the_items_that_changed_first():
    def record(name, text, correct):
        return {"id": name, "prompt": f"{name}?", "answer": "2", "text": text, "correct": correct}

    base = [record("a", "2", True), record("b", "3", False), record("only base", "", False)]
    tuned = [record("a", "2", True), record("b", "2", True)]
    assert examples_text(base, tuned) == (
        "prompt  b?\ngold    2\nbase  ✗ 3\ntuned ✓ 2\n\nprompt  a?\ngold    2\nbase  ✓ 2\ntuned ✓ 2"
    )
