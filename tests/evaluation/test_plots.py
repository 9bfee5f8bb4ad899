"""Pictures and tables: files of the expected size whose pixels change with what is drawn."""

import math
import struct
import subprocess
import sys

import numpy as np
import pytest

from laddpo.results.figures import DPI, PAGE_DPI
from laddpo.results.plots import evaluation_plot, training_plot
from laddpo.results.stats import compare


def size_inches(path, dpi: int = DPI) -> tuple[float, float]:
    """Width and height of a PNG, from its header."""
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", head[16:24])
    return width / dpi, height / dpi


def metric_rows(steps: int) -> list[dict]:
    rng, rows = np.random.default_rng(0), []
    for step in range(steps):
        margin = 3 * step / steps + rng.normal(0, 0.1)
        row = {
            "step": step,
            "loss": math.log1p(math.exp(-margin)),
            "rewards/accuracies": min(1.0, 0.5 + step / steps / 2),
            "rewards/margins": margin,
            "rewards/chosen": -step / steps,
            "rewards/rejected": -step / steps - margin,
            "score/variance": 0.04,
            "elbo/std_error": 0.2,
            "grad_norm": math.exp(rng.normal()),
            "learning_rate": 1e-5,
        }
        rows.append(row)
        if step % 10 == 0:
            rows.append({"step": step, "validation/loss": row["loss"] * 0.9, "validation/exact_match": 0.5})
    return rows


def binary_entry() -> dict:
    return compare([0, 0, 0, 1] * 25, [0, 1, 1, 1] * 25, np.random.default_rng(0), is_share=True)


def test_a_training_picture_has_a_panel_for_each_kind_of_metric(tmp_path):
    training_plot(metric_rows(40), tmp_path / "plots" / "training.png", title="a run", best_step=20)
    assert size_inches(tmp_path / "plots" / "training.png") == (
        pytest.approx(4.2 * 4),
        pytest.approx(3.1 * 2, abs=0.01),
    )


def test_timing_adds_a_row_of_panels(tmp_path):
    timing = [{"step": step, "speed/tokens_per_s": 100.0, "memory/peak_gib": 1.0} for step in range(40)]
    training_plot(metric_rows(40), tmp_path / "p.png", timing=timing)
    assert size_inches(tmp_path / "p.png")[1] == pytest.approx(3.1 * 3, abs=0.01)


def test_the_band_the_smoothing_and_the_kept_step_are_drawn(tmp_path):
    def drawn(rows, **more):
        training_plot(rows, tmp_path / "p.png", **more)
        return (tmp_path / "p.png").read_bytes()

    rows = metric_rows(80)
    plain = drawn(rows)
    assert drawn(rows) == plain
    assert drawn(rows, best_step=20) != plain
    assert drawn([{k: v for k, v in row.items() if k != "score/variance"} for row in rows]) != plain


@pytest.mark.parametrize("rows", [[], [{"step": 0, "loss": 0.7}], [{"step": 3, "note": "text", "loss": None}]])
def test_a_run_that_has_hardly_begun_still_gets_a_picture(tmp_path, rows):
    training_plot(rows, tmp_path / "p.png")
    assert len((tmp_path / "p.png").read_bytes()) > 1000


def test_an_evaluation_picture_gains_a_panel_with_margins(tmp_path):
    results = {"exact_match": binary_entry(), "reward_accuracy": binary_entry(), "items_path": "items.jsonl"}
    evaluation_plot(results, tmp_path / "bars.png")
    evaluation_plot(results, tmp_path / "both.png", base_margins=[0.0] * 50, tuned_margins=np.linspace(-1, 2, 50))
    bars, both = (size_inches(tmp_path / name, PAGE_DPI)[0] for name in ("bars.png", "both.png"))
    assert both == pytest.approx(bars + 5, abs=0.02)


def test_margins_that_are_all_equal_are_drawn_without_a_warning(tmp_path):
    evaluation_plot({}, tmp_path / "p.png", base_margins=[0.0] * 4, tuned_margins=[0.0] * 4)
    assert len((tmp_path / "p.png").read_bytes()) > 1000


def test_an_entry_with_only_the_agreed_fields_is_drawn(tmp_path):
    entry = {"base": 0.5, "tuned": 0.75, "difference": 0.25, "interval": [0.1, 0.4], "items": 100}
    evaluation_plot({"exact_match": entry}, tmp_path / "p.png")
    assert len((tmp_path / "p.png").read_bytes()) > 5000


def test_an_entry_whose_interval_is_not_known_is_drawn(tmp_path):
    entry = {"base": 0.5, "tuned": 0.5, "difference": 0.0, "interval": None, "tuned_interval": None, "items": 1}
    evaluation_plot({"success_rate": entry}, tmp_path / "p.png")
    assert len((tmp_path / "p.png").read_bytes()) > 5000


def test_drawing_touches_neither_pyplot_nor_the_backend(tmp_path):
    code = (
        "import sys; from pathlib import Path; from laddpo.results.plots import training_plot\n"
        "assert 'matplotlib' not in sys.modules\n"
        f"training_plot([{{'step': 0, 'loss': 1.0}}], Path({str(tmp_path / 'p.png')!r}))\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=120)
