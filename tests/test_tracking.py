"""Trackers: what reaches TensorBoard and W&B offline, one run id after resume, failures that stop nothing."""

import json
import shlex
import struct
import sys
import threading
import time

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from laddpo.errors import UserError
from laddpo.settings.loggers import TRACKER_MODULES, check_trackers, names_of, wanted_trackers
from laddpo.settings.ranges import CHOICES
from laddpo.settings.schema import LoggerSettings
from laddpo.training import tracking
from laddpo.training.tracker_opening import stored_id
from laddpo.training.trackers import TRACKERS
from laddpo.training.tracking import Trackers, log_results

BOTH = ["tensorboard", "wandb"]
NAMES = {"wandb_project": "laddpo-test", "wandb_mode": "offline"}


@pytest.fixture(autouse=True)
def no_account(monkeypatch, tmp_path):
    """No key, no network, no user files."""
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("WANDB_MODE", "offline")


def tensorboard_scalars(folder) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def wandb_records(folder, patience_s: float = 20.0) -> list:
    """All records of the offline runs below a run folder; wandb's writer may outlive `finish` for a moment."""
    deadline = time.monotonic() + patience_s
    while True:
        paths = sorted(folder.glob("wandb/offline-run-*/*.wandb"))
        runs = [[parsed(payload) for payload in leveldb_payloads(path.read_bytes())] for path in paths]
        are_whole = runs and all(any(record.HasField("exit") for record in run) for run in runs)
        if are_whole or time.monotonic() > deadline:
            return [record for run in runs for record in run]
        time.sleep(0.2)


def parsed(payload: bytes):
    from wandb.proto import wandb_internal_pb2

    record = wandb_internal_pb2.Record()
    record.ParseFromString(payload)
    return record


def leveldb_payloads(data: bytes):
    """The payloads of a LevelDB log (W&B's file): blocks of 32 KiB, in them fragments of crc, length, type, bytes."""
    at, payload = 7, b""  # the file's own header
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # no room for a fragment's header: the block is padded
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        if at + 7 + length > len(data):  # still being written
            return
        payload += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last fragment
            yield payload
            payload = b""


def wandb_history(folder) -> list[dict]:
    histories = [record.history.item for record in wandb_records(folder) if record.HasField("history")]
    return [{i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items} for items in histories]


def test_numbers_reach_tensorboard_and_wandb_and_other_values_do_not(tmp_path):
    with Trackers(tmp_path, BOTH, NAMES, {"dpo": {"beta": 2.0}}) as trackers:
        for step in range(1, 4):
            trackers.scalars(step, {"step": step, "loss": 1 / step, "rewards/margins": step, "note": "x", "kept": True})
        trackers.scalars(4, {"only": None})
    assert tensorboard_scalars(tmp_path) == {
        "loss": [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3))],
        "rewards/margins": [(1, 1.0), (2, 2.0), (3, 3.0)],
    }
    history = wandb_history(tmp_path)
    assert [(row["step"], row["loss"], row["rewards/margins"]) for row in history] == [
        (1, 1.0, 1),
        (2, 0.5, 2),
        (3, pytest.approx(1 / 3), 3),
    ]
    assert not any("note" in row or "kept" in row for row in history)


def test_name_group_tags_and_config_reach_wandb(tmp_path):
    settings = {**NAMES, "wandb_name": "mine", "wandb_group": "sweep", "wandb_tags": ["a", "b"]}
    Trackers(tmp_path, BOTH, settings, {"dpo": {"beta": 2.0}, "seed": 3}).close()
    run = next(record.run for record in wandb_records(tmp_path) if record.HasField("run"))
    assert (run.display_name, run.run_group, list(run.tags), run.project) == (
        "mine",
        "sweep",
        ["a", "b"],
        "laddpo-test",
    )
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert config["dpo"] == {"beta": 2.0} and config["seed"] == 3


def test_sample_texts_reach_both_with_their_line_breaks(tmp_path):
    with Trackers(tmp_path, BOTH, NAMES, {}) as trackers:
        trackers.text(5, "samples", "07+15=\n<b>22</b> | `x`")
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (event,) = events.Tensors("samples/text_summary")
    assert event.step == 5 and event.tensor_proto.string_val[0].decode() == "    07+15=\n    <b>22</b> | `x`"
    (page,) = tmp_path.glob("wandb/offline-run-*/files/media/html/samples*.html")
    assert "07+15=\n&lt;b&gt;22&lt;/b&gt; | `x`" in page.read_text(encoding="utf-8")


def test_a_resumed_run_keeps_its_wandb_id_and_tensorboard_hides_steps_after_its_checkpoint(tmp_path):
    with Trackers(tmp_path, BOTH, NAMES, {}) as trackers:
        for step in (1, 2, 3):
            trackers.scalars(step, {"loss": 1.0})
    first = stored_id(tmp_path, "wandb")
    time.sleep(1.1)  # TensorBoard and W&B name their files by the second
    with Trackers(tmp_path, BOTH, NAMES, {}, resume_step=2) as trackers:
        trackers.scalars(3, {"loss": 9.0})
    assert tensorboard_scalars(tmp_path)["loss"] == [(1, 1.0), (2, 1.0), (3, 9.0)]
    runs = {record.run.run_id for record in wandb_records(tmp_path) if record.HasField("run")}
    assert [row["loss"] for row in wandb_history(tmp_path) if row["step"] == 3] == [1.0, 9.0]
    assert runs == {first} == {(tmp_path / "wandb_id.txt").read_text(encoding="utf-8").strip()}


def test_no_key_is_written_anywhere(tmp_path, monkeypatch):
    key = "0123456789abcdef0123456789abcdef01234567"
    monkeypatch.setenv("WANDB_API_KEY", key)
    with Trackers(
        tmp_path, BOTH, NAMES, {"data": {"name": f"https://user:{key}@host/rows"}, "also": [key]}
    ) as trackers:
        trackers.scalars(1, {"loss": 1.0})
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 3
    assert [path.name for path in files if key.encode() in path.read_bytes()] == []


def test_without_a_key_wandb_runs_offline_and_says_so(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE")
    said = []
    with Trackers(tmp_path, ["wandb"], {"wandb_mode": "online"}, {}, say=said.append) as trackers:
        trackers.scalars(1, {"loss": 1.0})
    assert len(said) == 2 and "no API key" in said[0]
    place = shlex.split(said[1].partition("wandb sync ")[2])[0]
    assert place == str(next(tmp_path.glob("wandb/offline-run-*")).absolute())
    assert [row["loss"] for row in wandb_history(tmp_path)] == [1.0]


def test_tensorboard_gets_the_main_settings_and_final_results_in_the_runs_own_folder(tmp_path):
    from tensorboard.plugins.hparams import plugin_data_pb2

    config = {"dpo": {"beta": 2.0, "loss": "ipo"}, "optim": {"betas": [0.9, 0.99], "eps": None}, "seed": 3, "run": "a"}
    with Trackers(tmp_path, ["tensorboard"], {}, config) as trackers:
        trackers.scalars(1, {"loss": 1.0})
        log_results(trackers, {"exact_match": {"base": 0.5, "tuned": 0.75}, "pairs": {}}, 7)
    assert [path for path in (tmp_path / "tensorboard").iterdir() if path.is_dir()] == [], "no run below the run"
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    kept = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    hparams = plugin_data_pb2.HParamsPluginData.FromString(kept).session_start_info.hparams
    assert {name: value.number_value or value.string_value for name, value in hparams.items()} == {
        "dpo.beta": 2.0, "dpo.loss": "ipo", "optim.betas": "[0.9, 0.99]", "seed": 3.0,
    }  # fmt: skip
    assert {"_hparams_/experiment", "_hparams_/session_end_info"} <= set(events.summary_metadata)
    assert tensorboard_scalars(tmp_path) == {"loss": [(1, 1.0)], "result/exact_match": [(7, 0.75)]}


def test_trackers_that_are_off_import_nothing_and_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    said = []
    with Trackers(tmp_path, [], {}, {}, say=said.append) as trackers:
        trackers.scalars(1, {"loss": 1.0})
    assert said == [] and list(tmp_path.iterdir()) == []


def test_a_missing_package_is_said_and_the_other_tracker_goes_on(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it now raises
    said = []
    with Trackers(tmp_path, BOTH, NAMES, {}, say=said.append) as trackers:
        for step in range(5):
            trackers.scalars(step, {"loss": 1.0})
    assert len(said) == 1 and said[0].startswith("logger.wandb stopped: ") and "logger.wandb=false" in said[0]
    assert len(tensorboard_scalars(tmp_path)["loss"]) == 5


class Moody:
    """A tracker that fails at its third event, or blocks until it is let go."""

    def __init__(self, opening):
        self.mood, self.seen = opening.settings["mood"], opening.settings["seen"]

    def scalars(self, step, values):
        if self.mood == "fails" and step == 3:
            raise SystemExit("disk full")
        if self.mood == "blocks":
            self.seen.wait(30)
        if self.mood == "counts":
            self.seen.append(step)

    def text(self, step, name, text): ...

    def close(self): ...


def moody(tmp_path, monkeypatch, mood, seen, said):
    monkeypatch.setattr(tracking, "TRACKERS", {"moody": Moody})
    return Trackers(tmp_path, ["moody"], {"mood": mood, "seen": seen}, {}, say=said.append)


def test_a_tracker_that_fails_is_reported_once_and_the_run_goes_on(tmp_path, monkeypatch):
    said = []
    trackers = moody(tmp_path, monkeypatch, "fails", [], said)
    for step in range(100):
        trackers.scalars(step, {"loss": 1.0})
    trackers.close()
    assert said == [
        "logger.moody stopped: SystemExit: disk full. The run continues and metrics.jsonl stays complete; "
        "logger.trackers without moody switches this off."
    ]


def test_what_is_said_of_a_tracker_that_failed_is_said_before_the_end(tmp_path, monkeypatch):
    said, is_saying = [], threading.Event()

    def say_slowly(text):
        is_saying.set()
        time.sleep(0.2)
        said.append(text)

    monkeypatch.setattr(tracking, "TRACKERS", {"moody": Moody})
    trackers = Trackers(tmp_path, ["moody"], {"mood": "fails", "seen": []}, {}, say=say_slowly)
    trackers.scalars(3, {"loss": 1.0})
    assert is_saying.wait(30)
    trackers.close()
    assert len(said) == 1


def test_a_tracker_that_blocks_slows_nothing_and_is_left_behind(tmp_path, monkeypatch):
    said, release = [], threading.Event()
    trackers = moody(tmp_path, monkeypatch, "blocks", release, said)
    started = time.monotonic()
    for step in range(1000):
        trackers.scalars(step, {"loss": 1.0})
    assert time.monotonic() - started < 1.0
    trackers.close(timeout_s=0.2)
    assert time.monotonic() - started < 3.0
    assert len(said) == 1 and "did not finish within 0.2 s" in said[0]
    release.set()


def test_a_full_queue_drops_events_and_says_so_once(tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "EVENTS_WAITING", 10)
    said, release = [], threading.Event()
    trackers = moody(tmp_path, monkeypatch, "blocks", release, said)
    for step in range(100):
        trackers.scalars(step, {"loss": 1.0})
    assert len(said) == 1 and "10 logged events are waiting" in said[0]
    release.set()
    trackers.close()


def test_closing_delivers_everything_in_order(tmp_path, monkeypatch):
    said, seen = [], []
    trackers = moody(tmp_path, monkeypatch, "counts", seen, said)
    for step in range(500):
        trackers.scalars(step, {"loss": 1.0})
    trackers.close()
    trackers.close()
    assert seen == list(range(500)) and said == []


class StandIn:
    """A module, class or run that answers every call, and keeps the calls with their names in `calls`."""

    def __init__(self, calls, name="", **known):
        self.calls, self.name, self.known = calls, name, known

    def __getattr__(self, name):
        return self.known.get(name) or StandIn(self.calls, f"{self.name}.{name}".lstrip("."), **self.known)

    def __call__(self, *given, **named):
        self.calls.append((self.name, given, named))
        return self.known.get(f"{self.name}()", StandIn(self.calls, "run", **self.known))


def stand_in(monkeypatch, name, calls):
    """The module of a tracker, for machines without it."""
    module = StandIn(calls, Markdown=str, Text=str, **{"config.get_config()": None})
    if name == "mlflow":
        run = type("Run", (), {"info": type("Info", (), {"run_id": "r1"}), "data": type("Data", (), {"params": {}})})
        client = StandIn(
            calls,
            "client",
            **{"client.create_run()": run, "client.get_run()": run},
            get_experiment_by_name=lambda n: None,
        )
        module = StandIn(
            calls, Param=lambda *p: p, Metric=lambda *m: m, MlflowException=KeyError, MlflowClient=lambda: client
        )
        for part in ("entities", "tracking", "exceptions"):
            monkeypatch.setitem(sys.modules, f"mlflow.{part}", module)
    monkeypatch.setitem(sys.modules, TRACKER_MODULES[name], module)


CALLS = {  # of each tracker: how a run is opened, and where a number, a text, the result and the end go
    "trackio": ("init", "run.log", "run.log", "run.finish"),
    "mlflow": ("client.create_run", "client.log_batch", "client.log_text", "client.set_terminated"),
    "swanlab": ("init", "run.log", "run.log", "run.finish"),
    "comet": ("start", "run.log_metrics", "run.log_text", "run.end"),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_named_tracker_gets_names_numbers_texts_and_results_and_a_resumed_run_continues(tmp_path, monkeypatch, name):
    calls, said = [], []
    stand_in(monkeypatch, name, calls)
    monkeypatch.delenv("SWANLAB_MODE", raising=False)
    names = {"project": "mine", "name": "first", "group": "sweep", "tags": ["a"]}
    for _ in range(2):
        with Trackers(
            tmp_path, [name], names, {"dpo": {"beta": 2.0}, "key": "hf_" + "a" * 34}, say=said.append
        ) as trackers:
            trackers.scalars(1, {"loss": 1.5})
            trackers.text(2, "samples", "07+15=")
            log_results(trackers, {"acc,none": {"tuned": 0.75}}, 3)
    opened, number, text, end = CALLS[name]
    names_called = [called for called, _, _ in calls]
    assert said == [] and names_called.count(end) == 2
    everything = repr(calls)
    assert all(part in everything for part in ("mine", "first", "1.5", "07+15=", "0.75", "'beta': 2.0"))
    assert ("sweep" in everything) and ("'a'" in everything or name == "trackio") and "hf_aaa" not in everything
    assert {number, text} <= set(names_called)
    known = stored_id(tmp_path, name)
    if name == "mlflow":
        assert (
            names_called.count(opened) == 1 and ("client.update_run", ("r1", "RUNNING"), {}) in calls and known == "r1"
        )
        assert "result/acc_none" in everything
    else:
        assert names_called.count(opened) == 2 and everything.count(known) >= 2, "both openings name the same run"


def test_names_of_trackers_are_the_same_in_every_table():
    assert list(TRACKERS) == list(TRACKER_MODULES) == list(CHOICES["logger.trackers"])


def test_switches_and_names_together_open_each_tracker_once():
    logger = LoggerSettings(tensorboard=True, wandb=True, trackers=["comet", "wandb"], wandb_name="mine", name="all")
    assert wanted_trackers(logger) == ["tensorboard", "wandb", "comet"]
    assert (names_of(logger)["wandb_name"], names_of(logger)["name"]) == ("mine", "all")
    assert names_of(LoggerSettings()) == {}


def test_a_named_tracker_without_its_package_is_refused_and_names_the_extra(monkeypatch):
    monkeypatch.setitem(TRACKER_MODULES, "trackio", "no_such_package_trackio")
    with pytest.raises(UserError, match=r"logger\.trackers has 'trackio'.*pip install 'laddpo\[trackio\]'"):
        check_trackers(LoggerSettings(trackers=["tensorboard", "trackio"]))
