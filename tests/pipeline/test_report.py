"""The report page: of one run, of several, of a sweep; read as a browser without network would read it."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest

from laddpo.app import cli
from laddpo.evaluation.page import heat_table
from laddpo.evaluation.sweeps import SweepJob, sweep_table


class Page(HTMLParser):
    """Tags, attributes and text of a page; rows of its tables."""

    def __init__(self, path: Path):
        super().__init__()
        self.tags, self.rows, self.images, self.links, self.words = [], [], [], [], []
        self.in_cell = False
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.in_cell = True
        for name, value in attrs:
            if name in ("src", "href", "action", "srcset"):
                (self.images if tag == "img" else self.links).append(value)

    def handle_endtag(self, tag):
        self.in_cell = self.in_cell and tag not in ("td", "th")

    def handle_data(self, data):
        self.words.append(data)
        if self.in_cell:
            self.rows[-1][-1] += data


def write_run(folder: Path, beta: float, draws: int, tuned: float | None, text: str = "7", job: int | None = None):
    """A run's folder as train leaves it, small."""
    evaluation = folder / "evaluation"
    evaluation.mkdir(parents=True)
    (folder / "config.yaml").write_text(f"seed: 1\ndpo:\n  beta: {beta}\n  diffusion_samples: {draws}\n")
    rows = [{"step": s, "loss": 0.7 - s / 100, "validation/loss": 0.6, "grad_norm": 1.0} for s in range(1, 4)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "timing.jsonl").write_text(json.dumps({"step": 1, "seconds": 60.0}) + "\n")
    if tuned is not None:
        entry = {"base": 0.5, "tuned": tuned, "difference": tuned - 0.5, "interval": [0.0, 0.1], "items": 100}
        (evaluation / "results.json").write_text(json.dumps({"exact_match": entry}))
        (folder / "manifest.json").write_text(json.dumps({"fields": {"best_step": 2}}))
        items = [
            {"task": "sums", "model": m, "id": "1", "prompt": "3+4", "answer": "7", "text": t, "correct": t == "7"}
            for m, t in (("base", "8"), ("tuned", text))
        ]
        (evaluation / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
        (evaluation / "pairs.jsonl").write_text(json.dumps({"id": "a", "margin": 0.5}) + "\n")


def report(tmp_path, *overrides):
    out = tmp_path / "report"
    code = cli("report", [*overrides, f"output_dir={out}"])
    return code, out


def is_self_contained(page: Page) -> bool:
    return not page.links and not {"script", "link", "iframe"} & set(page.tags) and all(
        image.startswith("data:image/png;base64,") for image in page.images
    )  # fmt: skip


def test_one_run_gives_a_page_that_needs_nothing_else(tmp_path):
    write_run(tmp_path / "a", 1.0, 2, 0.6, text="<script>alert(1)</script>")
    code, out = report(tmp_path, f"run={tmp_path / 'a'}")
    assert code == 0
    page = Page(out / "report.html")
    assert is_self_contained(page) and len(page.images) >= 4
    assert "<script>alert(1)</script>" in page.words, "shown as text"
    assert {"loss.png", "evaluation.png", "margins.png"} <= {f.name for f in (out / "plots").iterdir()}
    assert ["exact match", "50.0%", "60.0%", "+10.0 points", "[+0.0, +10.0]", "100", "interval holds 0"] in page.rows


def test_several_runs_are_sorted_by_the_metric_with_the_settings_that_differ(tmp_path):
    for name, beta, value in (("a", 0.5, 0.6), ("b", 1.0, 0.8), ("c", 2.0, 0.7)):
        write_run(tmp_path / name, beta, 2, value)
    code, out = report(tmp_path, f"runs=[{tmp_path / 'a'},{tmp_path / 'b'},{tmp_path / 'c'}]")
    assert code == 0
    page = Page(out / "report.html")
    assert is_self_contained(page)
    assert page.rows[0][:2] == ["run", "beta"]
    assert [row[:2] for row in page.rows[1:4]] == [["b", "1.0"], ["c", "2.0"], ["a", "0.5"]]
    code, _ = report(tmp_path, f"runs=[{tmp_path / 'a'},{tmp_path / 'b'}]", "report.metric=loss")
    assert code == 0


@pytest.mark.parametrize("metric", ["loss", "score/variance", "elbo/std_error"])
def test_of_loss_and_noise_the_lowest_is_the_best(tmp_path, metric):
    for name, value in (("a", 0.5), ("b", 0.25)):
        write_run(tmp_path / name, value, 2, None)
        row = {"step": 3, f"validation/{metric}": value}
        (tmp_path / name / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    code, out = report(tmp_path, f"runs=[{tmp_path / 'a'},{tmp_path / 'b'}]", f"report.metric={metric}")
    assert code == 0 and [row[0] for row in Page(out / "report.html").rows[1:3]] == ["b", "a"]


def test_a_tie_of_the_best_is_framed_in_the_table_as_in_the_picture():
    jobs = [SweepJob({"beta": b, "n": n}, 0.7 if b == 1 else 0.1 * n) for b in (1, 2) for n in (1, 2)]
    assert heat_table(sweep_table(jobs, "exact_match")).count("<td class=best") == 2


def write_sweep(folder: Path, more=()) -> None:
    jobs = []
    for number, (beta, draws) in enumerate((b, n) for b in (0.5, 1.0, 2.0) for n in (1, 2, 4)):
        value = None if number == 4 else 0.5 + 0.04 * number
        write_run(folder / str(number), beta, draws, value)
        overrides = [
            f"dpo.beta={beta}",
            f"dpo.diffusion_samples={draws}",
            "save_steps=3",
            *[m[number % 2] for m in more],
        ]
        jobs.append({"job": number, "overrides": overrides, "exit_code": 0, "folder": str(number), "results": {}})
    (folder / "sweep.json").write_text(json.dumps({"stage": "train", "jobs": jobs}))


def test_a_sweep_has_a_heat_map_over_beta_and_samples_and_says_what_failed(tmp_path):
    write_sweep(tmp_path / "sweep")
    code, out = report(tmp_path, f"run={tmp_path / 'sweep'}")
    assert code == 0
    page = Page(out / "report.html")
    assert is_self_contained(page)
    at = next(i for i, row in enumerate(page.rows) if row[0].startswith("beta"))
    assert page.rows[at][1:] == ["1", "2", "4"]
    assert [row[0] for row in page.rows[at + 1 : at + 4]] == ["0.5", "1", "2"]
    assert page.rows[at + 2][2] == "failed"
    assert page.rows[at + 3][3] == "0.82"
    assert (out / "plots" / "sweep.png").is_file()
    assert "1 of 9 unfinished" in " ".join(page.words)


def test_with_further_keys_the_heat_map_is_the_mean_over_them(tmp_path):
    write_sweep(tmp_path / "sweep", more=[("optim.learning_rate=1e-4", "optim.learning_rate=2e-4")])
    code, out = report(tmp_path, f"run={tmp_path / 'sweep'}")
    assert code == 0
    assert "Each cell is the mean over optim.learning_rate." in Page(out / "report.html").words
    assert (out / "plots" / "heat_map.png").is_file()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "neither run nor runs is set"),
        (["run=nowhere"], "holds neither config.yaml"),
        (["run=RUN", "report.metric=exact_mtch"], "did you mean exact_match?"),
        (["run=RUN", "output_dir=RUN", "resume=true"], "which holds a run"),
    ],
)
def test_what_cannot_be_reported_is_refused_by_name(tmp_path, capsys, overrides, message):
    write_run(tmp_path / "a", 1.0, 2, 0.6)
    place = [] if any("output_dir" in text for text in overrides) else [f"output_dir={tmp_path / 'report'}"]
    assert cli("report", [*(text.replace("RUN", str(tmp_path / "a")) for text in overrides), *place]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"seed: [1\n  2", b"\xff\xfe", b"", b"- 1\n"])
def test_settings_that_cannot_be_read_are_named(tmp_path, capsys, content):
    folder = tmp_path / "a"
    write_run(folder, 1.0, 2, 0.6)
    (folder / "config.yaml").write_bytes(content)
    assert report(tmp_path, f"run={folder}")[0] == 2
    assert f"{folder / 'config.yaml'}: " in capsys.readouterr().err


def test_an_evaluation_of_a_base_alone_has_a_page_too(tmp_path):
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.yaml").write_text("seed: 1\n")
    entry = {"base": 0.25, "base_interval": [0.2, 0.3], "items": 200}
    (folder / "results.json").write_text(json.dumps({"exact_match": entry}))
    code, out = report(tmp_path, f"run={folder}")
    assert code == 0
    assert page_row(out)[:3] == ["base", "25.0%", "20.0% to 30.0%"]


def page_row(out: Path) -> list[str]:
    return Page(out / "report.html").rows[1]
