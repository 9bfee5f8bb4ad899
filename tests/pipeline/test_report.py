"""The report page: of one run, of several, of a sweep; read as a browser without network would read it."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest

from laddpo.cli.app import cli
from laddpo.results import plots
from laddpo.results.meanings import MEANINGS
from laddpo.results.page import heat_table
from laddpo.results.panels import PANELS
from laddpo.results.sweeps import SweepJob, sweep_table
from laddpo.storage.atomic import write_json
from laddpo.storage.json_lines import JsonLines
from laddpo.storage.manifests import write_manifest


@pytest.fixture(autouse=True)
def unrendered(request, monkeypatch):
    """Pictures are drawn and not rendered, which takes most of the time of a page, but where a test asks for them."""
    from matplotlib.figure import Figure

    if "with_pictures" not in request.fixturenames:
        monkeypatch.setattr(Figure, "savefig", lambda self, out, **named: out.write(b"\x89PNG, not rendered"))


class Page(HTMLParser):
    """Tags, attributes and text of a page; rows of its tables."""

    def __init__(self, path: Path):
        super().__init__()
        self.tags, self.rows, self.images, self.links, self.words = [], [], [], [], []
        self.in_cell = False
        self.open, self.unframed_tables, self.captions, self.meta = [], 0, [], {}
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag == "meta":
            self.meta |= {dict(attrs).get("name"): dict(attrs).get("content")}
        if tag == "table":
            self.unframed_tables += ("div", "frame") not in self.open
        if tag not in ("meta", "img", "br"):
            self.open.append((tag, dict(attrs).get("class")))
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
        while self.open and self.open.pop()[0] != tag:
            pass

    def handle_data(self, data):
        self.words.append(data)
        if ("figcaption", None) in self.open:
            self.captions.append(data)
        if self.in_cell:
            self.rows[-1][-1] += data


def write_run(folder: Path, beta: float, draws: int, tuned: float | None, text: str = "7", job: int | None = None):
    """A run's folder as train leaves it, small."""
    evaluation = folder / "evaluation"
    evaluation.mkdir(parents=True)
    (folder / "config.yaml").write_text(f"seed: 1\ndpo:\n  beta: {beta}\n  diffusion_samples: {draws}\n")
    same = {"validation/loss": 0.6, "learning_rate": 1e-5}
    rows = [{"step": s, "loss": 0.7 - s / 100, "grad_norm": 1.0 + s, **same} for s in range(1, 4)]
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
        pairs = [{"id": name, "margin": margin} for name, margin in (("a", 0.5), ("b", 1.5))]
        (evaluation / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))


def report(tmp_path, *overrides):
    out = tmp_path / "report"
    code = cli("report", [*overrides, f"output_dir={out}"])
    return code, out


def is_self_contained(page: Page) -> bool:
    return not page.links and not {"script", "link", "iframe"} & set(page.tags) and all(
        image.startswith("data:image/png;base64,") for image in page.images
    )  # fmt: skip


def test_one_run_gives_a_page_that_needs_nothing_else(tmp_path, with_pictures):
    write_run(tmp_path / "a", 1.0, 2, 0.6, text="<script>alert(1)</script>")
    code, out = report(tmp_path, f"run={tmp_path / 'a'}")
    assert code == 0
    page = Page(out / "report.html")
    assert is_self_contained(page) and len(page.images) >= 4
    assert "<script>alert(1)</script>" in page.words, "shown as text"
    assert {"loss.png", "evaluation.png", "margins.png"} <= {f.name for f in (out / "plots").iterdir()}
    assert ["exact match", "50.0%", "60.0%", "+10.0 points", "[+0.0, +10.0]", "100", "interval holds 0"] in page.rows


def test_the_page_of_one_run_begins_with_its_result(tmp_path):
    write_run(tmp_path / "a", 1.0, 2, 0.6)
    code, out = report(tmp_path, f"run={tmp_path / 'a'}")
    text = " ".join(Page(out / "report.html").words)
    assert code == 0 and "Exact match 50.0% → 60.0%, +10 points [+0, +10] on 100 items." in text
    write_run(tmp_path / "b", 1.0, 2, None)
    assert cli("report", [f"run={tmp_path / 'b'}", f"output_dir={tmp_path / 'second'}"]) == 0
    assert (
        "→" not in " ".join(Page(tmp_path / "second" / "report.html").words).split("Settings")[0].split("Intervals")[0]
    )


def test_a_page_fits_a_phone_and_explains_its_names(tmp_path):
    write_run(tmp_path / "a", 1.0, 2, 0.6)
    _, out = report(tmp_path, f"run={tmp_path / 'a'}")
    page = Page(out / "report.html")
    assert page.meta["viewport"].startswith("width=device-width") and page.tags.count("table") >= 3
    assert page.unframed_tables == 0, "a wide table scrolls in its own frame"
    assert "figure img{width:100%" in "".join(page.words)
    loss, norm = (next(p.meaning for p in PANELS if p.title == title) for title in ("Loss", "Gradient norm"))
    assert page.captions == [loss, norm], "what each curve shows, those that matter first"
    assert page.tags.count("dt") == 1 and MEANINGS["exact match"] in page.words


def test_curves_that_never_change_are_one_line(tmp_path):
    write_run(tmp_path / "a", 1.0, 2, 0.6)
    _, out = report(tmp_path, f"run={tmp_path / 'a'}")
    page = Page(out / "report.html")
    assert "Did not change: learning rate 1e-05" in page.words
    assert not (out / "plots" / "learning_rate.png").exists() and (out / "plots" / "gradient_norm.png").exists()
    assert next(row for row in page.rows if row[0] == "Learning rate")[1] == "1e-05"


def test_one_pair_has_no_histogram(tmp_path):
    write_run(tmp_path / "a", 1.0, 2, 0.6)
    (tmp_path / "a" / "evaluation" / "pairs.jsonl").write_text('{"id": "a", "margin": 0.5}\n')
    code, out = report(tmp_path, f"run={tmp_path / 'a'}")
    assert code == 0 and not (out / "plots" / "margins.png").exists()


def test_a_base_that_ties_with_itself_is_not_drawn_as_a_result(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    bars = []
    draw = Axes.barh
    monkeypatch.setattr(Axes, "barh", lambda *args, **named: (bars.append(args[2]), draw(*args, **named)))
    write_run(tmp_path / "a", 1.0, 2, 0.6)
    known = {"base": 0.5, "base_interval": [0.5, 0.5], "tuned": 0.75, "tuned_interval": [0.6, 0.9]}
    results = {"reward_accuracy": {**known, "difference": 0.25, "interval": [0.1, 0.4], "items": 8}}
    (tmp_path / "a" / "evaluation" / "results.json").write_text(json.dumps(results))
    rows = [{"step": s, "rewards/accuracies": 0.5 + s / 8, "rewards/margins": float(s)} for s in range(3)]
    (tmp_path / "a" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, out = report(tmp_path, f"run={tmp_path / 'a'}")
    page = Page(out / "report.html")
    assert bars == [0.75]
    assert "Reward accuracy 75.0% [60.0%, 90.0%] on 8 items; chance is 50%. " in page.words
    row = ["reward accuracy", "ties", "75.0%", "+25.0 points", "[+10.0, +40.0]", "8"]
    assert row in page.rows and any(words.startswith("ties: ") for words in page.words)
    steps, _ = plots._series(rows)["rewards/accuracies"]
    assert list(steps) == [1, 2], "nor is the tie before the first update"


def test_rounds_have_a_picture_a_table_and_the_curves_of_each(tmp_path, with_pictures):
    write_run(tmp_path / "a", 1.0, 2, 0.6)
    (tmp_path / "a" / "metrics.jsonl").unlink()
    for number in (1, 2):
        write_run(tmp_path / "a" / f"round_{number}", 1.0, 2, 0.6)
    gains = [
        {"base": 0.25, "tuned": t, "difference": t - 0.25, "interval": [0.1, 0.4], "items": 80} for t in (0.5, 0.625)
    ]
    content = {"rounds": [{}, {}], "against_base": gains, "against_round_before": gains, "last_against_first": gains[1]}
    (tmp_path / "a" / "rounds.json").write_text(json.dumps(content))
    _, out = report(tmp_path, f"run={tmp_path / 'a'}")
    page = Page(out / "report.html")
    assert ["2", "62.5%", "+37.5 [+10.0, +40.0]", "+37.5 [+10.0, +40.0]"] in page.rows
    assert {"rounds.png", "round_1", "round_2"} <= {path.name for path in (out / "plots").iterdir()}
    assert {"Rounds", "Round 1", "Round 2"} <= set(page.words) and is_self_contained(page)


def test_a_page_of_several_begins_with_the_best_and_says_that_it_was_chosen(tmp_path):
    for name, value in (("a", 0.6), ("b", 0.8)):
        write_run(tmp_path / name, value, 2, value)
    _, out = report(tmp_path, f"runs=[{tmp_path / 'a'},{tmp_path / 'b'}]")
    (answer,) = (words for words in Page(out / "report.html").words if words.startswith("Best of "))
    assert answer.startswith("Best of 2 finished runs, b, dpo.beta=0.8: Exact match 50.0% → 80.0%")
    assert "confirm it with another seed" in answer


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
        (tmp_path / name / "manifest.json").write_text("{}")  # finished, without a final evaluation
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
        code = 1 if value is None else 0
        jobs.append({"job": number, "overrides": overrides, "exit_code": code, "folder": str(number), "results": {}})
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
    assert page.rows[at + 2][2] == "failed (exit code 1)"
    assert page.rows[at + 3][3] == "0.82"
    assert any(words.startswith("Brighter is better. ★ is the best: exact match in") for words in page.words)
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


def test_a_log_that_is_gone_from_an_unfinished_run_is_noted(tmp_path, capsys):
    folder = tmp_path / "a"
    write_run(folder, 1.0, 2, None)
    log, checkpoint = folder / "metrics.jsonl", folder / "checkpoints" / "step_3"
    checkpoint.mkdir(parents=True)
    write_json(checkpoint / "state.json", {"metrics": JsonLines(log).seal()})
    write_manifest(checkpoint, "checkpoint", {}, ["state.json"])
    assert report(tmp_path, f"run={folder}")[0] == 0
    assert "note: " not in capsys.readouterr().out
    log.unlink()
    code = cli("report", [f"run={folder}", f"output_dir={tmp_path / 'second'}"])
    assert code == 0 and f"note: {log}: is missing; " in capsys.readouterr().out


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


def test_a_validation_number_is_never_ranked_among_final_results(tmp_path, monkeypatch):
    """A sweep in every state: two finished jobs, and others that had better numbers on their way, or none."""
    from laddpo.jobs.sweep import write_sweep_file
    from laddpo.results.of_jobs import find_results, picture_sweep
    from laddpo.results.sweeps import SweepTable

    sweep, betas = tmp_path / "sweep", [0.1, 0.2, 0.5, 1.0, 2.0, 4.0, 8.0]
    codes = {0: 0, 1: 0, 2: 1, 3: 75, 4: -9, 5: 0}
    for job, beta in enumerate(betas[:6]):
        write_run(sweep / str(job), beta, 2, {0: 0.6, 1: 0.8}.get(job))
        lines = [{"step": step, "loss": 0.1, "validation/exact_match": 0.9 + job / 100} for step in (1, 2)]
        (sweep / str(job) / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        given = {"overrides": [f"dpo.beta={beta}"], "exit_code": codes[job]}
        (sweep / str(job) / "job.json").write_text(json.dumps(given))
    (sweep / "5" / "manifest.json").write_text("{}")  # finished, and never evaluated
    records = write_sweep_file(sweep, "train", [[f"dpo.beta={b}"] for b in betas])
    states = ["finished", "finished", "failed (exit code 1)", "stopped", "failed (signal 9)", "finished", "not started"]
    assert [record["state"] for record in records] == states
    assert [job["state"] for job in json.loads((sweep / "sweep.json").read_text())["jobs"]] == states
    assert find_results(sweep / "3")["validation/exact_match"]["tuned"] == 0.93

    drawn, winners = [], SweepTable.winners.fget
    monkeypatch.setattr(SweepTable, "winners", property(lambda table: drawn.append(table) or winners(table)))
    picture_sweep(sweep, records)
    assert [cell.mean for cell in drawn[-1].winners] == [0.8] and (sweep / "plots" / "sweep.png").is_file()
    ranked, apart = (sweep / "sweep.md").read_text().split("Not ranked:")
    assert [row.split("|")[1].strip() for row in ranked.splitlines()[2:4]] == ["0.2", "0.1"] and "0.9" not in ranked
    told = {cells[1]: cells[2:] for row in apart.splitlines()[4:] if len(cells := row.split(" | ")) > 3}
    assert {beta: cells[0] for beta, cells in told.items()} == dict(
        zip(map(str, betas[2:]), [*states[2:5], "finished, without exact_match", "not started"], strict=True)
    )
    assert told["1.0"][1].startswith("validation/exact_match 0.930")

    code, out = report(tmp_path, f"run={sweep}")
    assert code == 0
    page = Page(out / "report.html")
    first = [row[1] for row in page.rows[1 : page.rows.index(page.rows[0], 1) if page.rows[0] in page.rows[1:] else 3]]
    assert first == ["0.2", "0.1"]
    (header,) = [row for row in page.rows if "state" in row]
    at = page.rows.index(header)
    apart = {row[1]: dict(zip(header, row, strict=True)) for row in page.rows[at + 1 : at + 6]}
    assert {beta: row["state"] for beta, row in apart.items()} == dict(
        zip(map(str, betas[2:]), states[2:], strict=True)
    )
    assert apart["1.0"]["validation/exact match so far"] == "93.0%"
    assert "5 of 7" not in " ".join(page.words) and "4 of 7 unfinished" in " ".join(page.words)


def test_a_sweeper_learns_from_the_measure_that_ranks_the_sweep(tmp_path):
    import math

    from laddpo.results.of_jobs import job_objective

    for job, (value, code) in enumerate([(0.6, 0), (None, 1), (None, 0), (0.7, 1), (0.9, 0)]):
        write_run(tmp_path / str(job), 1.0, 2, value)
        (tmp_path / str(job) / "metrics.jsonl").write_text('{"step": 1, "validation/exact_match": 0.99}\n')
        (tmp_path / str(job) / "job.json").write_text(json.dumps({"overrides": [], "exit_code": code}))
    found = [job_objective(tmp_path, tmp_path / str(job)) for job in range(5)]
    assert [None if math.isnan(value) else value for value in found] == [0.6, None, None, None, 0.9]
