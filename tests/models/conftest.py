"""A tiny random LLaDA for tests that need no files."""

import pytest
import torch

from laddpo.models.llada import LLaDAConfig
from laddpo.models.loading import new_model

TINY = {
    "d_model": 32,
    "n_heads": 4,
    "n_layers": 2,
    "mlp_hidden_size": 48,
    "vocab_size": 60,
    "max_sequence_length": 64,
    "mask_token_id": 59,
    "eos_token_id": 58,
    "pad_token_id": 58,
    "architectures": ["LLaDAModelLM"],
}


@pytest.fixture
def tiny_model():
    """Builds a model: fields of the config override the tiny ones."""

    def build(seed: int = 0, dtype: torch.dtype = torch.float32, **fields):
        return new_model(LLaDAConfig(**{**TINY, **fields}), seed).to(dtype)

    return build


@pytest.fixture
def tiny_folder(tiny_model, tmp_path):
    """A checkpoint folder of a tiny model, as the hub lays it out."""
    from laddpo.models.loading import save_model

    save_model(tiny_model(), tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.fixture
def random_ids():
    """random_ids(*shape, seed=0): ids below the special ones."""

    def draw(*shape: int, seed: int = 0) -> torch.Tensor:
        return torch.randint(0, 58, shape, generator=torch.Generator().manual_seed(seed))

    return draw


@pytest.fixture
def packed_input(random_ids):
    """packed_input(lengths): random ids and restarting positions of sequences laid end to end. # [T], [T]"""

    def build(lengths: list[int], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        return random_ids(sum(lengths), seed=seed), torch.cat([torch.arange(n) for n in lengths])

    return build
