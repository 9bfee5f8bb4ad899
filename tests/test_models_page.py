"""The table of docs/models.md is what the plan says."""

import re

import pytest

from laddpo.hardware.plan_text import find_memory
from laddpo.hardware.planning import assumed_lengths, choose_plan, model_shape
from laddpo.settings.compose import compose
from tests.tiny import REPOSITORY

PAGE = (REPOSITORY / "docs" / "models.md").read_text(encoding="utf-8")
CARDS = (["hardware=rtx4080", "hardware.vram_gib=8"], ["hardware=rtx4080", "hardware.vram_gib=12"],
         ["hardware=rtx4080"], ["hardware=rtx4090"])  # fmt: skip
ROWS = dict(re.findall(r"^\| `(\w+)` \| ((?:no|[0-9,]+(?: ckpt)?) \|.*) \|$", PAGE, re.M))


def predicted(model: str, card: list[str]) -> str:
    config = compose([f"model={model}", *card])
    device, precision, available, _ = find_memory(config)
    choice = choose_plan(config, device, precision, available, assumed_lengths(config))
    return f"{choice.token_budget:,}{' ckpt' * choice.setup.checkpointing}" if choice.fits else "no"


@pytest.mark.parametrize("model", sorted(ROWS))
def test_a_row_is_the_plans(model):
    assert ROWS[model] == " | ".join(predicted(model, card) for card in CARDS)


def test_every_large_model_has_a_row_and_its_number_of_parameters():
    assert len(ROWS) == 12
    for model in ROWS:
        parameters = model_shape(compose([f"model={model}"]).model).parameters
        line = next(line for line in PAGE.splitlines() if line.startswith("| ") and f"`{model}`" in line)
        assert f"{parameters / 1e9:.2f}B" in line
