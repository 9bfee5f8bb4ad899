"""The reference store grows without loss, and never gives a value that it cannot vouch for."""

import json
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from laddpo.errors import UserError
from laddpo.storage import atomic, manifests
from laddpo.storage.reference_store import ReferenceStore
from laddpo.storage.shards import StoredPair, token_digest

FIELDS = {"weights": "sha256:abc", "estimator": {"estimator": "complement", "seed": 42}}
REPOSITORY = Path(__file__).resolve().parents[2]


def stored(name: str) -> StoredPair:
    return StoredPair(name, token_digest(np.arange(3), np.array([len(name)]), np.array([1])))


def values(pairs: int, draws: int, start: float = -1.0) -> np.ndarray:
    """Distinct negative numbers. # [pairs, 2, draws]"""
    return start - np.arange(pairs * 2 * draws, dtype=np.float64).reshape(pairs, 2, draws)


@pytest.fixture
def stores(tmp_path) -> Path:
    return tmp_path / "reference"


# Growth


def test_a_store_begins_empty_and_misses_everything(stores):
    store = ReferenceStore.open(stores, FIELDS)
    assert len(store) == 0 and store.missing(stored("a"), range(3)) == [0, 1, 2]
    assert not store.folder.exists(), "opening writes nothing"


def test_values_come_back_bit_for_bit_here_and_after_reopening(stores):
    store = ReferenceStore.open(stores, FIELDS)
    block = np.random.default_rng(0).uniform(-900, 0, (2, 2, 4))
    store.append([stored("a"), stored("b")], 0, block)
    for reader in (store, ReferenceStore.open(stores, FIELDS)):
        assert len(reader) == 2
        assert np.array_equal(reader.values(stored("b"), range(4)), block[1])
        assert np.array_equal(reader.values(stored("a"), [3, 1]), block[0][:, [3, 1]])


def test_a_store_grows_in_rows_and_in_draws(stores):
    store = ReferenceStore.open(stores, FIELDS)
    first, more_draws, more_rows = values(1, 2), values(1, 3, -50), values(1, 5, -100)
    store.append([stored("a")], 0, first)
    store.append([stored("a")], 2, more_draws)
    store.append([stored("b")], 0, more_rows)
    for reader in (store, ReferenceStore.open(stores, FIELDS)):
        assert np.array_equal(reader.values(stored("a"), range(5)), np.concatenate([first[0], more_draws[0]], axis=1))
        assert np.array_equal(reader.values(stored("b"), range(5)), more_rows[0])
        assert reader.missing(stored("a"), range(7)) == [5, 6]


def test_draws_may_come_in_any_order(stores):
    store = ReferenceStore.open(stores, FIELDS)
    store.append([stored("a")], 2, values(1, 2, -50))
    assert store.missing(stored("a"), range(5)) == [0, 1, 4]
    store.append([stored("a")], 0, values(1, 2))
    for reader in (store, ReferenceStore.open(stores, FIELDS)):
        assert reader.missing(stored("a"), range(4)) == []
        assert reader.values(stored("a"), [2]).tolist() == [[-50.0], [-52.0]]


def test_an_absent_value_is_named_with_the_command_that_computes_it(stores):
    store = ReferenceStore.open(stores, FIELDS)
    store.append([stored("a")], 0, values(1, 2))
    with pytest.raises(UserError, match=r"pair a, draws \[2, 3\].*laddpo\.precompute"):
        store.values(stored("a"), range(4))


def test_other_tokens_under_the_same_id_have_no_values(stores):
    store = ReferenceStore.open(stores, FIELDS)
    store.append([stored("a")], 0, values(1, 2))
    assert store.missing(StoredPair("a", token_digest(np.array([9]))), range(2)) == [0, 1]


def test_token_digests_see_every_token_and_where_one_array_ends():
    """The last line is golden: another digest would orphan every store."""
    base = token_digest(np.array([1, 2]), np.array([3]))
    assert base == token_digest(np.array([1, 2], dtype=np.int64), np.array([3], dtype=np.int32))
    assert base != token_digest(np.array([1]), np.array([2, 3]))
    assert base != token_digest(np.array([1, 2]), np.array([4]))
    assert base == "40db0a76839a96a8980734060825a83c"


# Why values are computed


def test_why_pairs_are_missing_is_said_by_what_changed(stores):
    store = ReferenceStore.open(stores, FIELDS)
    assert store.why_missing(Counter()) == "nothing is stored yet"
    store.append([stored("a"), stored("b")], 0, values(2, 2))
    shorter = StoredPair("b", token_digest(np.array([9])))
    lacking = [stored("a"), shorter, stored("c"), stored("d")]
    assert store.why_missing(Counter(map(store.reason, lacking))) == (
        "1 with more draws than are stored; 1 with other tokens than are stored (data.max_length); 2 new to this store"
    )


def test_why_a_store_is_new_is_said_by_the_fields_in_which_the_nearest_differs(stores):
    near = {"weights": "sha256:abc", "estimator": {"estimator": "complement", "seed": 7}}
    far = {"weights": "sha256:def", "estimator": {"estimator": "count", "seed": 7}}
    for fields in (FIELDS, far):
        ReferenceStore.open(stores, fields).append([stored("a")], 0, values(1, 1))
    (stores / "damaged").mkdir()
    (stores / "damaged" / "manifest.json").write_bytes(b"half")
    text = ReferenceStore.open(stores, near).why_missing(Counter(new=1))
    assert "estimator.seed: stored 42, now 7" in text and "weights" not in text


# What is refused


def test_other_settings_have_another_store(stores):
    other = {**FIELDS, "weights": "sha256:def"}
    ReferenceStore.open(stores, FIELDS).append([stored("a")], 0, values(1, 1))
    assert len(ReferenceStore.open(stores, other)) == 0


def test_a_folder_of_other_settings_is_refused_listing_the_fields(stores):
    store = ReferenceStore.open(stores, FIELDS)
    store.append([stored("a")], 0, values(1, 1))
    other = {"weights": "sha256:def", "estimator": {"estimator": "complement", "seed": 7}}
    with pytest.raises(UserError) as caught:
        ReferenceStore(store.folder, other)
    text = str(caught.value)
    assert "weights: stored 'sha256:abc', now 'sha256:def'" in text
    assert "estimator.seed: stored 42, now 7" in text and "estimator.estimator" not in text


@pytest.mark.parametrize("damage", ["truncated", "one bit", "missing"])
def test_a_damaged_shard_is_named(stores, damage):
    store = ReferenceStore.open(stores, FIELDS)
    store.append([stored("a"), stored("b")], 0, values(2, 3))
    (shard,) = store.folder.glob("shard-*.safetensors")
    content = bytearray(shard.read_bytes())
    if damage == "missing":
        shard.unlink()
    elif damage == "truncated":
        shard.write_bytes(content[:-1])
    else:
        content[-5] ^= 1
        shard.write_bytes(content)
    with pytest.raises(UserError, match=rf"{shard.name}: .*missing, truncated or changed.*Remove"):
        ReferenceStore.open(stores, FIELDS)


def test_a_shard_outside_the_folder_is_refused(stores):
    store = ReferenceStore.open(stores, FIELDS)
    store.append([stored("a")], 0, values(1, 1))
    path = store.folder / manifests.MANIFEST
    manifest = manifests.unsealed(path)
    manifest["shards"] = {f"../{name}": entry for name, entry in manifest["shards"].items()}
    atomic.write_json(path, manifests.with_seal(manifest))
    with pytest.raises(UserError, match="is no shard of this folder"):
        ReferenceStore.open(stores, FIELDS)


def test_a_flipped_bit_of_the_manifest_is_an_explained_error_or_harmless(stores):
    store = ReferenceStore.open(stores, FIELDS)
    store.append([stored("a")], 0, values(1, 2))
    path = store.folder / manifests.MANIFEST
    whole = path.read_bytes()
    for position in range(len(whole)):
        content = bytearray(whole)
        content[position] ^= 1
        path.write_bytes(content)
        try:
            reopened = ReferenceStore(store.folder, FIELDS)
        except UserError as error:
            assert str(store.folder) in str(error)
        else:
            assert np.array_equal(reopened.values(stored("a"), range(2)), values(1, 2)[0])


@pytest.mark.parametrize("bad", [0.5, np.nan, np.inf, -np.inf])
def test_a_value_that_no_likelihood_has_is_refused_naming_the_pair(stores, bad):
    store = ReferenceStore.open(stores, FIELDS)
    block = values(3, 2)
    block[1, 0, 1] = bad
    with pytest.raises(UserError, match=rf"pair second is {bad}, expected a finite number <= 0"):
        store.append([stored("first"), stored("second"), stored("third")], 0, block)
    assert len(store) == 0 and not store.folder.exists(), "nothing of the shard may be kept"


def test_zero_is_a_value_since_a_draw_that_masks_nothing_scores_it(stores):
    store = ReferenceStore.open(stores, FIELDS)
    store.append([stored("a")], 0, np.array([[[0.0, -0.0], [0.0, -1.0]]]))
    assert store.missing(stored("a"), range(2)) == []


# Crashes and neighbours


def test_a_file_that_the_manifest_does_not_name_is_ignored(stores):
    """A crash between a shard and the manifest leaves one."""
    store = ReferenceStore.open(stores, FIELDS)
    store.append([stored("a")], 0, values(1, 1))
    (store.folder / "shard-000.safetensors").write_bytes(b"half")
    (store.folder / ".tmp-1-shard-001.safetensors").write_bytes(b"half")
    assert len(ReferenceStore.open(stores, FIELDS)) == 1


def test_a_store_that_another_process_has_grown_keeps_both_parts(stores):
    ours, theirs = ReferenceStore.open(stores, FIELDS), ReferenceStore.open(stores, FIELDS)
    ours.append([stored("a")], 0, values(1, 1))
    theirs.append([stored("b")], 0, values(1, 1))
    ours.append([stored("c")], 0, values(1, 1))
    assert len(ReferenceStore.open(stores, FIELDS)) == 3


def test_a_shard_that_another_process_left_out_of_the_manifest_is_taken_in(stores):
    """Two writers without locks: both read the manifest before either wrote it, and the later one wins."""
    ours, theirs = ReferenceStore.open(stores, FIELDS), ReferenceStore.open(stores, FIELDS)
    ours.append([stored("a")], 0, values(1, 1))
    before = (ours.folder / manifests.MANIFEST).read_bytes()
    theirs.append([stored("bc")], 0, values(1, 2, -7))
    (ours.folder / manifests.MANIFEST).write_bytes(before)
    ours.refresh()
    assert ours.values(stored("bc"), [0, 1]).tolist() == values(1, 2, -7)[0].tolist()
    ours.append([stored("def")], 0, values(1, 1))
    assert len(manifests.unsealed(ours.folder / manifests.MANIFEST)["shards"]) == 3
    assert len(ReferenceStore.open(stores, FIELDS)) == 3


def test_a_pass_lists_its_shards_at_its_end_and_the_next_takes_in_those_of_a_killed_one(stores, monkeypatch):
    plain, written = atomic.write_json, []
    monkeypatch.setattr(atomic, "write_json", lambda path, content: written.append(path) or plain(path, content))
    store = ReferenceStore.open(stores, FIELDS)
    with store.filling():
        for number in range(6):
            store.append([stored(f"{number}")], 0, values(1, 2, -1.0 - number))
        assert len(written) == 1
        shutil.copytree(store.folder, stores / "killed" / store.folder.name)
    assert len(written) == 2 and len(manifests.unsealed(store.folder / manifests.MANIFEST)["shards"]) == 6
    with store.filling():
        pass
    assert len(written) == 2, "a pass without a new shard writes nothing"
    for folder in (stores, stores / "killed"):
        found = ReferenceStore.open(folder, FIELDS)
        assert [found.values(stored(f"{n}"), [0])[0, 0] for n in range(6)] == [-1.0 - n for n in range(6)]
    assert len(manifests.unsealed(stores / "killed" / store.folder.name / manifests.MANIFEST)["shards"]) == 6


def test_what_another_pass_has_listed_meanwhile_stays_listed(stores):
    ours, theirs = ReferenceStore.open(stores, FIELDS), ReferenceStore.open(stores, FIELDS)
    with ours.filling():
        ours.append([stored("a")], 0, values(1, 1))
        with theirs.filling():
            theirs.append([stored("bc")], 0, values(1, 1, -5.0))
        ours.append([stored("def")], 0, values(1, 1, -7.0))
    assert len(manifests.unsealed(ours.folder / manifests.MANIFEST)["shards"]) == 3


@settings(max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3), st.integers(1, 3)), max_size=12))
def test_values_come_back_in_whatever_order_pairs_and_draws_came(given):
    """Every second one is a completion, which has one side."""
    expected: dict[tuple[int, int], float] = {}
    with tempfile.TemporaryDirectory() as folder:
        store = ReferenceStore.open(Path(folder), FIELDS)
        for pair, first, draws in given:
            of_draws = {draw: -1.0 - 10 * pair - draw for draw in range(first, first + draws)}
            store.append([stored("x" * (pair + 1))], first, np.array([[[*of_draws.values()]] * (1 + pair % 2)]))
            expected.update({(pair, draw): value for draw, value in of_draws.items()})
        for found in (store, ReferenceStore.open(Path(folder), FIELDS)):
            for pair in range(6):
                lacking = found.missing(stored("x" * (pair + 1)), range(7))
                assert lacking == [draw for draw in range(7) if (pair, draw) not in expected]
            for (pair, draw), value in expected.items():
                assert found.values(stored("x" * (pair + 1)), [draw]).tolist() == [[value]] * (1 + pair % 2)


APPENDER = """
import sys
from pathlib import Path
import numpy as np
from laddpo.storage.reference_store import ReferenceStore
from laddpo.storage.shards import StoredPair, token_digest
name, folder = sys.argv[1:]
store = ReferenceStore(Path(folder), {"weights": "w"})
print("ready", flush=True)
sys.stdin.readline()
for i in range(12):
    pair = StoredPair(f"{name}-{i}", token_digest(np.array([i])))
    store.append([pair], 0, np.full((1, 2, 1), -1.0 - i))
"""


def test_processes_that_append_at_once_lose_nothing(tmp_path):
    command = [sys.executable, "-c", APPENDER]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": REPOSITORY}
    writers = [subprocess.Popen([*command, name, str(tmp_path / "store")], **pipes) for name in ("a", "b")]
    for writer in writers:
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:  # both are waiting: start them together
        writer.stdin.write("go\n")
        writer.stdin.flush()
    for writer in writers:
        writer.communicate(timeout=60)
        assert writer.returncode == 0
    store = ReferenceStore(tmp_path / "store", {"weights": "w"})
    assert len(store) == 24
    for name in ("a", "b"):
        for i in range(12):
            pair = StoredPair(f"{name}-{i}", token_digest(np.array([i])))
            assert store.values(pair, [0]).tolist() == [[-1.0 - i], [-1.0 - i]]


def test_the_manifest_says_in_plain_text_what_the_values_depend_on(stores):
    store = ReferenceStore.open(stores, FIELDS)
    store.append([stored("a"), stored("b")], 4, values(2, 3))
    manifest = json.loads((store.folder / manifests.MANIFEST).read_text(encoding="utf-8"))
    assert manifest["kind"] == "reference" and manifest["fields"] == FIELDS
    (entry,) = manifest["shards"].values()
    assert entry["pairs"] == 2 and entry["first_draw"] == 4
    assert manifest["fingerprint"] == store.folder.name
