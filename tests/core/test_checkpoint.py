"""Checkpoints come back by name, bit for bit, or not at all; a damaged one is set aside and named."""

import logging

import pytest
import torch

from laddpo.core.optim import build_optimizer
from laddpo.errors import UserError
from laddpo.storage import atomic, manifests
from laddpo.storage.checkpoint import (
    MODEL,
    OPTIMIZER,
    STATE,
    newest_checkpoint,
    optimizer_state_by_name,
    restore,
    save_checkpoint,
    step_folders,
)

OPTIMIZER_NAMES = ["adamw", "adamw_8bit", "muon"]
SHAPES = {"blocks.0.z.weight": (64, 64), "a.weight": (3, 5), "a.bias": (5,), "m.weight": (2, 2)}


class Run:
    """Parameters and an optimizer that steps on made gradients. `order`: in which the names are registered."""

    def __init__(self, optimizer: str = "adamw", order=tuple(SHAPES)):
        draw = torch.Generator().manual_seed(0)
        made = {name: torch.nn.Parameter(torch.randn(shape, generator=draw)) for name, shape in SHAPES.items()}
        self.named = {name: made[name] for name in order}
        self.optimizer = build_optimizer(optimizer, self.named, (0.9, 0.95), 1e-8, weight_decay=0.1)
        self.steps = 0

    def step(self) -> None:
        draw = torch.Generator().manual_seed(self.steps)
        for name in sorted(self.named):  # the same gradients whatever the order of registration
            self.named[name].grad = torch.randn(SHAPES[name], generator=draw)
        for group in self.optimizer.param_groups:
            group["lr"] = 0.05
        self.optimizer.step()
        self.steps += 1

    def save(self, folder, keep: int = 5):
        return save_checkpoint(folder, self.steps, self.named, self.optimizer, {"loop": {"steps": self.steps}}, keep)

    def resume(self, folder) -> "Run":
        checkpoint = newest_checkpoint(folder)
        restore(checkpoint, self.named, self.optimizer)
        self.steps = checkpoint.state["loop"]["steps"]
        return self

    def weights(self) -> dict[str, list]:
        return {name: self.named[name].detach().tolist() for name in sorted(self.named)}


@pytest.fixture(params=OPTIMIZER_NAMES)
def optimizer(request):
    if "8bit" in request.param:
        pytest.importorskip("bitsandbytes")
    return request.param


# Round trips


def test_training_goes_on_as_if_never_stopped(folder, optimizer):
    whole, stopped = Run(optimizer), Run(optimizer)
    for _ in range(4):
        whole.step()
    for _ in range(2):
        stopped.step()
    stopped.save(folder)
    resumed = Run(optimizer).resume(folder)
    for _ in range(2):
        resumed.step()
    assert resumed.weights() == whole.weights()


def test_a_second_resume_under_another_order_of_names_scrambles_nothing(folder, optimizer):
    whole, first = Run(optimizer), Run(optimizer)
    for _ in range(6):
        whole.step()
    first.step()
    first.save(folder)
    for order in (sorted(SHAPES), sorted(SHAPES, reverse=True), list(SHAPES)):
        resumed = Run(optimizer, order).resume(folder)
        resumed.step()
        resumed.save(folder)
    last = Run(optimizer).resume(folder)
    while last.steps < 6:
        last.step()
    assert last.weights() == whole.weights()


def test_every_tensor_and_number_comes_back_bit_for_bit(folder, optimizer):
    saved = Run(optimizer)
    saved.step()
    saved.save(folder)
    resumed = Run(optimizer).resume(folder)
    arrays, numbers = optimizer_state_by_name(saved.optimizer, saved.named)
    again, numbers_again = optimizer_state_by_name(resumed.optimizer, resumed.named)
    assert numbers == numbers_again and arrays.keys() == again.keys()
    for name, array in arrays.items():
        assert array.dtype == again[name].dtype and torch.equal(array, again[name]), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_weights_keep_their_precision(folder, dtype):
    weight = torch.nn.Parameter(torch.randn(4, 4, generator=torch.Generator().manual_seed(0)).to(dtype))
    optimizer = build_optimizer("adamw", {"w": weight}, (0.9, 0.999), 1e-8, 0.0)
    save_checkpoint(folder, 1, {"w": weight}, optimizer, {}, 1)
    target = torch.nn.Parameter(torch.zeros(4, 4, dtype=dtype))
    checkpoint = newest_checkpoint(folder)
    restore(checkpoint, {"w": target}, build_optimizer("adamw", {"w": target}, (0.9, 0.999), 1e-8, 0.0))
    assert checkpoint.tensors["w"].dtype == dtype and torch.equal(target, weight)


def test_a_checkpoint_from_before_the_first_step_has_no_optimizer_state(folder):
    run = Run()
    run.save(folder)
    assert newest_checkpoint(folder).optimizer_tensors == {}
    assert Run().resume(folder).weights() == run.weights()


def test_weights_that_share_memory_are_saved_under_both_names(folder):
    shared = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = build_optimizer("adamw", {"a": shared}, (0.9, 0.999), 1e-8, 0.0)
    save_checkpoint(folder, 1, {"a": shared, "b": shared}, optimizer, {}, 1)
    assert set(newest_checkpoint(folder).tensors) == {"a", "b"}


# What does not fit


def test_other_parameter_names_are_refused_naming_one(folder):
    Run().save(folder)
    other = torch.nn.Parameter(torch.zeros(2, 2))
    with pytest.raises(UserError, match="trainable parameters differ from the model's, for example"):
        restore(
            newest_checkpoint(folder), {"other": other}, build_optimizer("adamw", {"o": other}, (0.9, 0.9), 1e-8, 0)
        )


def test_other_shapes_are_refused_naming_one_and_change_nothing(folder):
    """A LoRA of rank 1 would broadcast silently into one of rank 16."""
    run = Run()
    run.save(folder)
    narrow = Run()
    narrow.named["a.weight"] = torch.nn.Parameter(torch.zeros(7, 3, 5))
    before = narrow.weights()
    with pytest.raises(UserError, match=r"a\.weight.*\(3, 5\).*\(7, 3, 5\)"):
        restore(newest_checkpoint(folder), narrow.named, narrow.optimizer)
    assert narrow.weights() == before


# Which one is read


def test_there_is_none_before_the_first(folder):
    assert newest_checkpoint(folder) is None


def test_the_newest_wins(folder):
    run = Run()
    for _ in range(12):
        run.step()
        run.save(folder)
    assert newest_checkpoint(folder).step == 12


def test_an_unfinished_temporary_folder_is_not_a_checkpoint(folder):
    run = Run()
    run.step()
    run.save(folder)
    (folder / ".tmp-99-step_0000002").mkdir()
    (folder / ".tmp-99-step_0000002" / MODEL).write_bytes(b"half")
    assert newest_checkpoint(folder).step == 1


@pytest.mark.parametrize("name", [MODEL, OPTIMIZER, STATE, manifests.MANIFEST])
@pytest.mark.parametrize("damage", ["missing", "truncated", "empty", "one bit"])
def test_a_damaged_newest_one_is_set_aside_and_the_one_before_is_read(folder, name, damage, caplog):
    run = Run()
    for _ in range(2):
        run.step()
        run.save(folder)
    path = folder / "step_0000002" / name
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        content[len(content) // 2] ^= 4
        path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert newest_checkpoint(folder).step == 1
    assert "step_0000002 is damaged" in caplog.text and ".corrupt-step_0000002-0" in caplog.text
    assert [found.name for found in step_folders(folder)] == ["step_0000001"]
    assert (folder / ".corrupt-step_0000002-0").is_dir(), "what was damaged is kept for a look"


def test_any_flipped_bit_of_the_manifest_is_noticed_or_harmless(folder):
    run = Run()
    for _ in range(2):
        run.step()
        run.save(folder)
    path = folder / "step_0000002" / manifests.MANIFEST
    whole, weights = path.read_bytes(), run.weights()
    for position in range(len(whole)):
        content = bytearray(whole)
        content[position] ^= 1
        path.write_bytes(content)
        checkpoint = newest_checkpoint(folder)
        if checkpoint.step == 2:
            assert {name: checkpoint.tensors[name].tolist() for name in sorted(SHAPES)} == weights
        else:
            (folder / ".corrupt-step_0000002-0").rename(folder / "step_0000002")


def test_when_all_are_damaged_the_user_is_asked(folder):
    run = Run()
    for _ in range(2):
        run.step()
        (run.save(folder) / STATE).unlink()
    with pytest.raises(
        UserError, match=r"every checkpoint is damaged \(\.corrupt-step_0000002-0, \.corrupt-step_0000001-0"
    ):
        newest_checkpoint(folder)


def test_damaged_copies_of_one_step_get_names_of_their_own(folder):
    run = Run()
    run.step()
    run.save(folder)
    for number in range(3):
        run.steps = 2
        (run.save(folder) / STATE).unlink()
        assert newest_checkpoint(folder).step == 1
        assert (folder / f".corrupt-step_0000002-{number}").is_dir()


# Saving


def test_saving_over_a_damaged_folder_of_the_same_step_works(folder):
    run = Run()
    run.step()
    (run.save(folder) / MODEL).write_bytes(b"")
    run.save(folder)
    assert newest_checkpoint(folder).step == 1
    assert [found.name for found in folder.iterdir()] == ["step_0000001"]


def test_only_the_newest_are_kept_and_zero_keeps_all(folder):
    run = Run()
    for _ in range(4):
        run.step()
        run.save(folder, keep=2)
    assert [found.name for found in step_folders(folder)] == ["step_0000004", "step_0000003"]
    for _ in range(3):
        run.step()
        run.save(folder, keep=0)
    assert len(step_folders(folder)) == 5


def test_a_failed_save_leaves_the_older_ones_and_no_rest(folder, monkeypatch):
    run = Run()
    run.step()
    run.save(folder, keep=1)

    def full_disk(path, value):
        raise UserError(f"{path}: could not be written: No space left on device.")

    monkeypatch.setattr(atomic, "write_json", full_disk)
    run.step()
    with pytest.raises(UserError, match="No space left"):
        run.save(folder, keep=1)
    monkeypatch.undo()
    assert newest_checkpoint(folder).step == 1
    assert [found.name for found in folder.iterdir()] == ["step_0000001"]


def test_a_checkpoint_under_the_name_of_another_step_is_damaged(folder, caplog):
    run = Run()
    for _ in range(2):
        run.step()
        run.save(folder)
    (folder / "step_0000002").rename(folder / "away")
    (folder / "step_0000001").rename(folder / "step_0000002")
    (folder / "away").rename(folder / "step_0000001")
    with caplog.at_level(logging.WARNING), pytest.raises(UserError, match="every checkpoint is damaged"):
        newest_checkpoint(folder)
    assert "is that of another checkpoint" in caplog.text
