"""Sweeps as tables and pictures: pooled seeds, numeric order, every shape of grid."""

import struct
from itertools import pairwise

import pytest

from laddpo.results.figures import DPI, cell_colors
from laddpo.results.sweep_plots import sweep_plot
from laddpo.results.sweeps import SweepJob, number_text, sweep_table
from laddpo.results.tables import sweep_markdown


def size_inches(path) -> tuple[float, float]:
    """Width and height of a PNG, from its header."""
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", head[16:24])
    return width / DPI, height / DPI


def sweep_jobs() -> list[SweepJob]:
    return [
        SweepJob({"dpo.beta": beta, "dpo.diffusion_samples": draws, "seed": seed}, 0.5 + 0.1 * draws + 0.01 * seed)
        for beta in ("0.5", "1", "10")
        for draws in (1, 2)
        for seed in (0, 2)
    ]


def test_a_sweep_pools_seeds_and_orders_numbers_as_numbers():
    table = sweep_table(sweep_jobs(), "exact_match")
    assert table.keys == ("dpo.beta", "dpo.diffusion_samples")
    assert table.values_of("dpo.beta") == [0.5, 1.0, 10.0]
    assert len(table.cells) == 6
    cell = table.cells[0]
    assert cell.mean == pytest.approx(0.61)  # seeds 0 and 2 give 0.60 and 0.62: error sqrt(0.0002 / 2) = 0.01
    assert cell.interval == (pytest.approx(0.59), pytest.approx(0.63))
    assert cell.spread_text == "±0.01, 2 runs"
    assert table.best.values[1] == 2.0


def test_a_lower_metric_can_be_the_better_one():
    jobs = [SweepJob({"dpo.loss": loss}, value) for loss, value in (("ipo", 0.3), ("sigmoid", 0.2), ("hinge", None))]
    table = sweep_table(jobs, "validation/loss", is_higher_better=False)
    assert [cell.values[0] for cell in table.sorted_cells()] == ["sigmoid", "ipo", "hinge"]


@pytest.mark.parametrize("jobs", [sweep_jobs(), sweep_jobs()[:4], sweep_jobs()[:1], [SweepJob({"a": 1}, None)], []])
def test_every_shape_of_sweep_has_a_picture_and_a_table(tmp_path, jobs):
    table = sweep_table(jobs, "exact_match")
    sweep_plot(table, tmp_path / "p.png", title="a sweep")
    assert len((tmp_path / "p.png").read_bytes()) > 1000
    shown = sweep_markdown(table).split("\n\n")[0]
    ranked = [cell for cell in table.cells if cell.mean is not None]
    assert len(shown.splitlines()) == (2 + len(ranked) if ranked else 1)


def test_a_heat_map_grows_with_its_grid(tmp_path):
    jobs = [SweepJob({"a": a, "b": b}, a * b) for a in range(5) for b in range(9)]
    sweep_plot(sweep_table(jobs, "m"), tmp_path / "p.png")
    assert size_inches(tmp_path / "p.png") == (
        pytest.approx(1.3 * 9 + 2.4, abs=0.02),
        pytest.approx(0.75 * 5 + 1.9, abs=0.02),
    )


def test_equal_runs_are_no_proof_that_runs_do_not_vary():
    (cell,) = sweep_table([SweepJob({"seed": seed}, 0.1, (0.05, 0.2)) for seed in (1, 2, 3)], "exact_match").cells
    assert cell.mean == pytest.approx(0.1) and cell.interval is None
    assert cell.spread_text == "3 equal runs"


def test_failed_jobs_are_listed_apart():
    jobs = [SweepJob({"dpo.beta": 1}, 0.5, (0.4, 0.6)), SweepJob({"dpo.beta": 2}, None), SweepJob({"dpo.beta": 0}, 0.7)]
    jobs[1] = SweepJob({"dpo.beta": 2}, None, folder="1", state="failed (exit code 1)", measured="validation/loss 0.1")
    assert sweep_markdown(sweep_table(jobs, "exact_match")).splitlines() == [
        "| dpo.beta | exact_match | interval | runs |",
        "|---|---:|---:|---:|",
        "| 0 | 0.7 | – | 1 |",
        "| 1 | 0.5 | [0.4, 0.6] | 1 |",
        "",
        "Not ranked:",
        "",
        "| job | dpo.beta | state | measured so far |",
        "|---|---:|---:|---:|",
        "| 1 | 2 | failed (exit code 1) | validation/loss 0.1 |",
    ]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.125, "0.125"), (5e-7, "5e-07"), (1500.0, "1500"), (2.0, "2"), (0.66666, "0.667"), ("ipo", "ipo")],
)
def test_numbers_are_short(value, text):
    assert number_text(value) == text


def test_a_tie_of_the_best_is_said_and_all_of_them_are_framed(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    jobs = [SweepJob({"beta": b, "n": n}, 0.7 if b == 1 else 0.1 * n) for b in (1, 2) for n in (1, 2)]
    table = sweep_table(jobs, "exact_match")
    assert table.tie_text == "2 settings tie at 0.7: beta=1, n=1; beta=1, n=2"
    assert sweep_markdown(table).splitlines()[-1] == table.tie_text + "."
    titles, frames = [], []
    monkeypatch.setattr(Axes, "set_title", lambda axes, text, **kwargs: titles.append(text))
    monkeypatch.setattr(Axes, "add_patch", lambda axes, patch: frames.append(patch.get_linewidth()))
    sweep_plot(table, tmp_path / "p.png")
    assert titles == ["exact_match (★ best, 2 tie)"]
    assert len(frames) == 4 and sum(width > 2 for width in frames) == 2
    alone = sweep_table(jobs[:1] + jobs[2:], "exact_match")
    assert alone.tie_text == "" and "tie" not in sweep_markdown(alone)


@pytest.mark.filterwarnings("error")
def test_rows_that_differ_in_many_settings_leave_the_picture_its_room(tmp_path):
    names = ["optim.per_device_train_batch_size", "optim.max_train_steps", "data.num_pairs", "evaluation.num_pairs"]
    jobs = [SweepJob({**{name: i for name in names}, "data.dataset_name": f"{i}" * 200}, 0.1 * i) for i in range(3)]
    sweep_plot(sweep_table(jobs, "exact_match"), tmp_path / "p.png")
    width, height = size_inches(tmp_path / "p.png")
    assert width == pytest.approx(7, abs=0.02) and height > 3.5, "three lines for each of three"


def test_colours_of_cells_read_in_grey_and_their_numbers_are_legible():
    def luminance(color: str) -> float:
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    shown = [[luminance(color) for color in cell_colors(share / 20)] for share in range(21)]
    assert all(before[0] < after[0] for before, after in pairwise(shown)), "brighter is always better"
    contrasts = [(max(pair) + 0.05) / (min(pair) + 0.05) for pair in shown]
    assert min(contrasts) >= 4.5, "what WCAG asks of text"


def test_the_best_is_brightest_whichever_way_is_better():
    jobs = [SweepJob({"a": a, "b": 1}, float(a), (a - 0.5, a + 0.5)) for a in (1, 2, 3)]
    table = sweep_table(jobs, "held_out_loss", is_higher_better=False)
    assert [table.share(cell) for cell in table.cells] == [1.0, 0.5, 0.0]
    assert [cell.detail for cell in table.cells] == ["[0.5, 1.5]", "[1.5, 2.5]", "[2.5, 3.5]"]
    equal = sweep_table([SweepJob({"a": a}, 0.5) for a in (1, 2)], "m")
    assert [equal.share(cell) for cell in equal.cells] == [0.5, 0.5] and equal.cells[0].detail == ""
