"""What is sealed is compared before it is used: by its manifest, or by the check that it carries itself."""

from __future__ import annotations

import ast
import os
import shutil
from pathlib import Path

import pytest

import laddpo
from laddpo.errors import Damaged, UserError
from laddpo.evaluation.kept_answers import KeptAnswers
from laddpo.models import loading
from laddpo.settings.compose import compose, read_config, write_config
from laddpo.storage import atomic, json_lines, manifests, seals
from laddpo.storage.run_outputs import SilentLines
from laddpo.storage.seals import CheckedLines
from tests.tiny import write_tiny_model

PACKAGE = Path(laddpo.__file__).parent
RECORDS = [{"id": str(n), "text": "é"} for n in range(4)]
RAW_READS = {"read_json", "read_bytes", "read_text", "load_file", "safe_open", "JsonLines", "CheckedLines"}
READ_BY_THEMSELVES = {  # modules whose reads of files do not go through sealed_file, and why that is right
    "cli.arguments": "a stage's own source text, for --help",
    "settings.compose": "plain data, to pass over runs of other settings; read_config compares the one that counts",
    "storage.checkpoint": "after read_manifest of the checkpoint",
    "storage.run_outputs": "the logs of the run itself: metrics.jsonl is compared by `cut`, timing.jsonl is not sealed",
    "storage.shards": "each shard's bytes are hashed before they are used",
    "benchmark": "after read_manifest; before the end its settings, machine and seed are compared",
    "inputs.measured_pairs": "the user's own list of pair ids, each of which must be in the data",
    "evaluation.base_and_tuned": "unseal reads the manifest first; finish checks every line",
    "models.stacked": "after require_sealed in models.loading",
    "evaluation.base_answers": "every line has a check",
    "benchmarking.many": "what a process of its own has just written",
    "evaluation.kept_answers": "every line has a check",
    "evaluation.winrate": "every line has a check",
    "judging.kept": "every line has a check",
    "judging.endpoint": "the user's own prompt for the judge, whose hash is in the results",
    "cli.shorthand": "the user's YAML, our conf/, and sizes of a model's folder, which are compared with its weights",
    "results.page": "pictures made a moment before",
    "evaluation.samples": "every line has a check; samples.jsonl is compared by read_manifest",
    "results.of_jobs": "after sealed_file; exit codes of jobs",
    "results.studies": "timing.jsonl is not sealed",
    "evaluation.run_task": "every line has a check",
    "results.exporting": "after require_sealed; the base's README.md for its licence",
    "storage.folders": "what kind of folder it is: marks and manifests, which decide no value",
    "models.adapters": "after require_sealed",
    "models.foreign": "after require_sealed of its callers",
    "models.loading": "after require_sealed; remembered digests are no content",
    "models.tokenizers": "after require_sealed in load_tokenizer",
    "inputs.pins": "an adapter of another program, which has no seal",
    "hardware.planning": "the kernel's estimate of free memory",
    "preference.reading.splits": "descriptions of a user's data set, which nothing of ours seals",
    "preference.prepared": "report.json after read_manifest of the folder",
    "results.runs": "timing.jsonl is not sealed; state.json names what a log must be",
    "storage.atomic": "the reading functions themselves",
    "storage.json_lines": "the log itself, which `cut` compares with what a checkpoint says",
    "storage.manifests": "the manifest itself, and its files while they are compared",
    "training.rounds": "results.json after sealed_file",
    "storage.seals": "the comparisons themselves",
    "jobs.runner": "process.json says which process runs a job, for as long as it runs",
    "storage.temporaries": "the system's boot and namespace ids",
    "api": "what a finished run wrote, shown to its caller as it is",
    "training.outputs": "metrics.jsonl of the run itself, which its checkpoint compares by `cut`",
    "training.tracker_opening": "wandb_id.txt is a name at a tracker; no value depends on it",
}


def raw_reads(path: Path) -> list[int]:
    """Lines that read a file without going through a function of laddpo/storage/seals.py."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = []
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        is_own = name == "read_text" and isinstance(call.func, ast.Name)  # a function of laddpo/preference
        if name in RAW_READS and not is_own and "sealed_file" not in ast.dump(call):
            found.append(call.lineno)
    return found


def test_every_read_is_compared_with_a_seal_or_has_a_reason():
    modules = {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): raw_reads(path) for path in PACKAGE.rglob("*.py")
    }
    unexplained = {name: lines for name, lines in modules.items() if lines and name not in READ_BY_THEMSELVES}
    assert not unexplained, f"read through sealed_file, or say why not in READ_BY_THEMSELVES: {unexplained}"
    assert not [name for name in READ_BY_THEMSELVES if not modules.get(name)], "listed, and reads nothing"


@pytest.fixture
def log(tmp_path) -> CheckedLines:
    said: list[str] = []
    log = CheckedLines(tmp_path / "items.jsonl", said.append)
    for record in RECORDS:
        log.append(record)
    log.said = said
    return log


def test_a_finished_log_is_what_a_log_without_checks_would_be(log, tmp_path):
    plain = json_lines.JsonLines(tmp_path / "plain.jsonl")
    for record in RECORDS:
        plain.append(record)
    assert log.read() == RECORDS and log.path.read_bytes() != plain.path.read_bytes()
    log.finish()
    assert log.path.read_bytes() == plain.path.read_bytes()
    log.protect()
    assert log.read() == RECORDS and log.said == []
    log.finish()
    assert log.path.read_bytes() == plain.path.read_bytes()


def test_every_flipped_bit_of_a_log_is_noticed_and_no_other_record_is_lost(log):
    """Also in the check itself, in its name and at the line ends."""
    content = log.path.read_bytes()
    for bit in range(8 * len(content)):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        log.path.write_bytes(changed)
        log.said.clear()
        records = log.read()
        assert all(record in RECORDS for record in records) and len(records) >= len(RECORDS) - 2
        is_line_end = content[bit // 8] == 0x0A and bit // 8 == len(content) - 1
        assert log.said or (is_line_end and records == RECORDS), f"bit {bit}: read as if nothing had been"


def test_a_damaged_line_is_left_out_when_a_log_goes_on_and_refused_when_it_is_finished(log):
    log.path.write_bytes(log.path.read_bytes().replace(b'"2"', b'"3"'))
    with pytest.raises(Damaged, match=r"items\.jsonl"):
        log.finish()
    log.rewind(lambda record: True)
    assert "1 of 4 lines" in log.said[0] and log.read() == [record for record in RECORDS if record["id"] != "2"]


def test_a_log_of_an_earlier_version_goes_on_with_one_note(log):
    plain = json_lines.JsonLines(log.path)
    plain.rewind(lambda record: True)
    log.path.write_text("".join(plain.line(record) for record in RECORDS))
    log.rewind(lambda record: True)
    assert len(log.said) == 1 and "carry no checks" in log.said[0] and log.read() == RECORDS
    log.rewind(lambda record: True)
    assert len(log.said) == 1


def test_a_truncated_or_changed_config_is_refused_before_there_is_a_manifest(tmp_path, capsys):
    config = compose()
    write_config(config, tmp_path)
    path = tmp_path / "config.yaml"
    whole = path.read_bytes()
    for cut in (0, 1, 5, 40, 93, 94, 300):
        changed = bytearray(whole)
        changed[cut] ^= 1
        for content in (whole[:cut], changed):
            path.write_bytes(content)
            with pytest.raises(UserError, match=r"config\.yaml"):
                read_config(tmp_path)
    path.write_bytes(whole.partition(b"\n")[2])
    seals.note_once.cache_clear()
    assert read_config(tmp_path) == read_config(tmp_path) == config
    assert capsys.readouterr().err.count("carries no check") == 1


def test_a_small_json_file_is_compared_with_its_own_seal(tmp_path, capsys):
    path = tmp_path / "job.json"
    value = {"overrides": ["seed=1"], "exit_code": 0}
    seals.write_checked(path, value)
    assert seals.read_checked(path, value) == value
    for old, new in (("seed=1", "seed=3"), ('"seal"', '"sual"')):
        path.write_text(path.read_text().replace(old, new))
        with pytest.raises(Damaged, match=r"job\.json"):
            seals.read_checked(path, value)
        seals.write_checked(path, value)
    atomic.write_json(path, value)
    seals.note_once.cache_clear()
    assert [seals.read_checked(path, value) for _ in range(2)] == [value, value]
    assert capsys.readouterr().err.count("note: job.json of an earlier version") == 1


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory) -> Path:
    """A model folder without a manifest."""
    shape = {"d_model": 16, "n_layers": 1, "n_heads": 2, "n_kv_heads": 2, "mlp_hidden_size": 32}
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "model", shape)


@pytest.fixture
def model(tiny_model, tmp_path) -> Path:
    """A sealed model folder."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    manifests.write_manifest(folder, "weights", {"step": 1, "base": {"base": "x"}}, [p.name for p in folder.iterdir()])
    return folder


def flip(path: Path) -> None:
    """One bit, with size and times as they were, but for the one that cannot be set."""
    stat, content = path.stat(), bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    while path.stat().st_ctime_ns == stat.st_ctime_ns:  # some systems count it in hundredths of a second
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "config.json", "model.safetensors"])
@pytest.mark.parametrize("how", [flip, os.unlink])
def test_a_sealed_model_folder_is_compared_file_by_file(model, name, how):
    loading.load_model(str(model)), loading.load_tokenizer(str(model))
    how(model / name)
    with pytest.raises(UserError, match=name):
        loading.load_tokenizer(str(model))
        loading.load_model(str(model))


@pytest.mark.parametrize(
    "name", ["chat_template.jinja", "added_tokens.json", "model-00002-of-00002.safetensors", "adapter_config.json"]
)
def test_a_file_that_a_loader_would_read_beside_the_sealed_ones_is_refused(model, name):
    (model / name).write_text("{}")
    (model / "notes.txt").write_text("read by nobody")
    with pytest.raises(UserError, match=rf"{name}: is not among the files"):
        loading.load_tokenizer(str(model))
        loading.load_model(str(model))
    (model / manifests.MANIFEST).unlink()
    if name == "added_tokens.json":
        loading.load_tokenizer(str(model))


def test_what_was_remembered_of_unsealed_weights_is_held_against_them_when_they_are_hashed_again(
    tiny_model, tmp_path, monkeypatch
):
    """Bit rot leaves size, times and inode: only reading the content shows it."""
    monkeypatch.setattr(loading, "FRESH_NS", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    first = loading.weights_fingerprint(str(folder))
    assert loading.weights_fingerprint(str(folder), hash_again=True) == first
    before = (folder / "model.safetensors").stat()
    flip(folder / "model.safetensors")
    assert loading.weights_fingerprint(str(folder)) != first  # its ctime tells
    stat = os.stat
    monkeypatch.setattr(Path, "stat", lambda p, **k: before if p.name == "model.safetensors" else stat(p, **k))
    assert loading.weights_fingerprint(str(folder)) == first
    with pytest.raises(Damaged, match=r"model\.safetensors: its content changed while its size"):
        loading.weights_fingerprint(str(folder), hash_again=True)


def test_weights_of_the_hubs_cache_are_hashed_again_by_their_name(tiny_model, tmp_path, monkeypatch):
    import huggingface_hub.constants

    root = tmp_path / "hub" / "models--some--model"
    snapshot, blobs = root / "snapshots" / ("0" * 40), root / "blobs"
    shutil.copytree(tiny_model, snapshot)
    blobs.mkdir()
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("0" * 40)
    weights = snapshot / "model.safetensors"
    blob = blobs / atomic.file_sha256(weights)
    weights.rename(blob)
    weights.symlink_to(blob)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert loading.weights_fingerprint("some/model", hash_again=True) == f"commit:{'0' * 40}"
    flip(blob)
    assert loading.weights_fingerprint("some/model") == f"commit:{'0' * 40}"
    with pytest.raises(Damaged, match=r"model\.safetensors"):
        loading.weights_fingerprint("some/model", hash_again=True)


def test_verify_and_training_hash_the_base_again(monkeypatch, tiny_model):
    from laddpo.inputs import policy

    asked = []
    monkeypatch.setattr(
        loading, "weights_fingerprint", lambda path, revision, hash_again=False: asked.append(hash_again)
    )
    for overrides, again in (([], []), (["verify=true"], [True])):
        policy.check_before_loading(compose(["model=llada_nano", "hardware.device=cpu", *overrides]))
        assert asked == again
    policy.check_before_loading(compose(["model=llada_nano", "hardware.device=cpu"]), hash_again=True)
    assert asked == [True, True]


def test_a_sealed_file_that_is_given_as_data_is_compared(tmp_path):
    from laddpo.preference.reading.files import ReadLog, read_rows

    path = tmp_path / "samples.jsonl"
    atomic.write_text(path, '{"question": "1+1=", "answers": ["2"]}\n')
    manifests.write_manifest(tmp_path, "samples", {}, [path.name])
    assert len(list(read_rows([path], 1000, ReadLog()))) == 1
    flip(path)
    with pytest.raises(Damaged, match=r"samples\.jsonl"):
        list(read_rows([path], 1000, ReadLog()))
    (tmp_path / manifests.MANIFEST).write_text("not ours")
    list(read_rows([path], 1000, ReadLog()))


class Request:
    def __init__(self, *args):
        self.args = args


class Harness:
    """A model as lm-evaluation-harness has it, which counts what it is asked."""

    def __init__(self):
        self.asked = []

    def set_cache_hook(self, hook):
        self.hook = hook

    def loglikelihood(self, requests, disable_tqdm=False):
        self.asked += [request.args for request in requests]
        values = [(-0.1 * len(request.args[0]), True) for request in requests]
        for request, value in zip(requests, values, strict=True):
            self.hook.add_partial("loglikelihood", request.args, value)
        return values

    loglikelihood_rolling = generate_until = None


def test_answers_to_the_harness_are_kept_and_a_damaged_one_is_made_again(tmp_path):
    path, said = tmp_path / "harness_base_x.jsonl", []
    requests = [Request("a", "1"), Request("bb", "2"), Request("ccc", "3")]

    def answers(model):
        KeptAnswers(path, said.append).put_before(model)
        return model.loglikelihood(requests)

    first = Harness()
    found = answers(first)
    assert found == [(-0.1, True), (-0.2, True), (pytest.approx(-0.3), True)] and len(first.asked) == 3
    again = Harness()
    assert answers(again) == found and again.asked == []
    flip(path)
    third = Harness()
    assert answers(third) == found and third.asked == [("bb", "2")]
    assert any("1 of 3 lines are damaged" in text for text in said)


def test_a_log_that_is_not_written_stays_so_whatever_is_asked_of_it(tmp_path):
    log = SilentLines(tmp_path / "metrics.jsonl")
    log.append({"step": 1})
    log.rewind(lambda record: True)
    log.rewrite(lambda record: record)
    log.sync()
    log.cut({"bytes": 3, "sha256": "0"})
    assert log.read() == [] and list(tmp_path.iterdir()) == []
