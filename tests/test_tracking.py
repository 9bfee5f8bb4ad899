"""Trackers: what reaches TensorBoard and W&B offline, one run id after resume, failures that stop nothing."""

import json
import shlex
import struct
import sys
import threading
import time

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from laddpo.training import tracking
from laddpo.training.tracking import Trackers, log_results, wandb_id

BOTH = {"tensorboard": True, "wandb": True, "wandb_project": "laddpo-test", "wandb_mode": "offline"}


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
        if all(any(record.HasField("exit") for record in run) for run in runs) or time.monotonic() > deadline:
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
        payload += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last fragment
            yield payload
            payload = b""


def wandb_history(folder) -> list[dict]:
    histories = [record.history.item for record in wandb_records(folder) if record.HasField("history")]
    return [{i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items} for items in histories]


def test_numbers_reach_tensorboard_and_wandb_and_other_values_do_not(tmp_path):
    with Trackers(tmp_path, BOTH, {"dpo": {"beta": 2.0}}) as trackers:
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
    settings = {**BOTH, "wandb_name": "mine", "wandb_group": "sweep", "wandb_tags": ["a", "b"]}
    Trackers(tmp_path, settings, {"dpo": {"beta": 2.0}, "seed": 3}).close()
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
    with Trackers(tmp_path, BOTH, {}) as trackers:
        trackers.text(5, "samples", "07+15=\n<b>22</b> | `x`")
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (event,) = events.Tensors("samples/text_summary")
    assert event.step == 5 and event.tensor_proto.string_val[0].decode() == "    07+15=\n    <b>22</b> | `x`"
    (page,) = tmp_path.glob("wandb/offline-run-*/files/media/html/samples*.html")
    assert "07+15=\n&lt;b&gt;22&lt;/b&gt; | `x`" in page.read_text(encoding="utf-8")


def test_a_resumed_run_keeps_its_wandb_id_and_tensorboard_hides_steps_after_its_checkpoint(tmp_path):
    with Trackers(tmp_path, BOTH, {}) as trackers:
        for step in (1, 2, 3):
            trackers.scalars(step, {"loss": 1.0})
    first = wandb_id(tmp_path)
    time.sleep(1.1)  # TensorBoard and W&B name their files by the second
    with Trackers(tmp_path, BOTH, {}, resume_step=2) as trackers:
        trackers.scalars(3, {"loss": 9.0})
    assert tensorboard_scalars(tmp_path)["loss"] == [(1, 1.0), (2, 1.0), (3, 9.0)]
    runs = {record.run.run_id for record in wandb_records(tmp_path) if record.HasField("run")}
    assert [row["loss"] for row in wandb_history(tmp_path) if row["step"] == 3] == [1.0, 9.0]
    assert runs == {first} == {(tmp_path / "wandb_id.txt").read_text(encoding="utf-8").strip()}


def test_two_run_folders_have_two_ids(tmp_path):
    assert wandb_id(tmp_path / "a") != wandb_id(tmp_path / "b")


def test_no_key_is_written_anywhere(tmp_path, monkeypatch):
    key = "0123456789abcdef0123456789abcdef01234567"
    monkeypatch.setenv("WANDB_API_KEY", key)
    with Trackers(tmp_path, BOTH, {"data": {"name": f"https://user:{key}@host/rows"}, "also": [key]}) as trackers:
        trackers.scalars(1, {"loss": 1.0})
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 3
    assert [path.name for path in files if key.encode() in path.read_bytes()] == []


def test_without_a_key_wandb_runs_offline_and_says_so(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE")
    said = []
    with Trackers(tmp_path, {"wandb": True, "wandb_mode": "online"}, {}, say=said.append) as trackers:
        trackers.scalars(1, {"loss": 1.0})
    assert len(said) == 2 and "no API key" in said[0]
    place = shlex.split(said[1].partition("wandb sync ")[2])[0]
    assert place == str(next(tmp_path.glob("wandb/offline-run-*")).absolute())
    assert [row["loss"] for row in wandb_history(tmp_path)] == [1.0]


def test_tensorboard_gets_the_main_settings_and_final_results_in_the_runs_own_folder(tmp_path):
    from tensorboard.plugins.hparams import plugin_data_pb2

    config = {"dpo": {"beta": 2.0, "loss": "ipo"}, "optim": {"betas": [0.9, 0.99], "eps": None}, "seed": 3, "run": "a"}
    with Trackers(tmp_path, {"tensorboard": True}, config) as trackers:
        trackers.scalars(1, {"loss": 1.0})
    log_results(tmp_path, True, {"exact_match": {"base": 0.5, "tuned": 0.75}, "pairs": {}}, 7)
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
    with Trackers(tmp_path, {"tensorboard": False, "wandb": False}, {}, say=said.append) as trackers:
        trackers.scalars(1, {"loss": 1.0})
    assert said == [] and list(tmp_path.iterdir()) == []


def test_a_missing_package_is_said_and_the_other_tracker_goes_on(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it now raises
    said = []
    with Trackers(tmp_path, BOTH, {}, say=said.append) as trackers:
        for step in range(5):
            trackers.scalars(step, {"loss": 1.0})
    assert len(said) == 1 and said[0].startswith("logger.wandb stopped: ") and "logger.wandb=false" in said[0]
    assert len(tensorboard_scalars(tmp_path)["loss"]) == 5


class Moody:
    """A tracker that fails at its third event, or blocks until it is let go."""

    def __init__(self, folder, settings, config, resume_step, say):
        self.mood, self.seen = settings["mood"], settings["seen"]

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
    return Trackers(tmp_path, {"moody": True, "mood": mood, "seen": seen}, {}, say=said.append)


def test_a_tracker_that_fails_is_reported_once_and_the_run_goes_on(tmp_path, monkeypatch):
    said = []
    trackers = moody(tmp_path, monkeypatch, "fails", [], said)
    for step in range(100):
        trackers.scalars(step, {"loss": 1.0})
    trackers.close()
    assert said == [
        "logger.moody stopped: SystemExit: disk full. The run continues and metrics.jsonl stays complete; "
        "logger.moody=false switches this off."
    ]


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
