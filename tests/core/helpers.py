"""Small real objects for the tests of the core: a tiny LLaDA, a linear stand-in for it, pairs of random tokens."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from laddpo.core.draws import ElboEstimator
from laddpo.core.elbo import PackedSequences
from laddpo.core.gradient import Item, score_items
from laddpo.core.tasks import pair_item
from laddpo.models.denoiser import TransformerDenoiser
from laddpo.models.llada import LLaDAModelLM
from laddpo.models.llada_config import LLaDAConfig
from laddpo.models.loading import new_config, new_model
from laddpo.preference.encoding.encode import EncodedPair

VOCABULARY, MASK_ID = 8, 7
ANY_BUDGET = 10**9  # tokens: everything fits one micro-step


def tiny_denoiser(dtype: torch.dtype = torch.float64, seed: int = 0) -> TransformerDenoiser:
    """A real LLaDA of 2 blocks and width 16, with random weights that make it far from uniform."""
    torch.manual_seed(seed)
    shape = {"d_model": 16, "n_heads": 2, "n_layers": 2, "mlp_hidden_size": 24, "max_sequence_length": 64}
    model = LLaDAModelLM(LLaDAConfig(**shape, vocab_size=VOCABULARY, mask_token_id=MASK_ID)).to(dtype)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(2)
    return TransformerDenoiser(model, MASK_ID)


def tiny_family(architecture: str, shape: dict, dtype: torch.dtype) -> TransformerDenoiser:
    """The same size in the network of another family, which has parts of its own (`shape`)."""
    sizes = {"d_model": 16, "n_heads": 2, "n_kv_heads": 2, "n_layers": 2, "mlp_hidden_size": 24}
    sizes |= {"max_sequence_length": 64, "vocab_size": VOCABULARY, **shape}
    model = new_model(new_config(architecture, sizes, mask_token_id=MASK_ID), 0, architecture).to(dtype)
    return TransformerDenoiser(model, MASK_ID)


def parameters_of(denoiser: TransformerDenoiser) -> list[Tensor]:
    """The trainable parameters, in the model's order."""
    return [p for p in denoiser.model.parameters() if p.requires_grad]


class LinearDenoiser(nn.Module):
    """A denoiser without a transformer, for tests of what surrounds the model: a masked token is predicted from the
    mean embedding of its own sequence and from its position. `packed_tokens` records the size of every forward."""

    mask_token_id = MASK_ID
    device = torch.device("cpu")
    block_length = 0

    def __init__(self, width: int = 6, vocabulary: int = VOCABULARY, seed: int = 0, dtype: torch.dtype = torch.float64):
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        shapes = {"embedding": (vocabulary, width), "positions": (16, width), "head": (vocabulary, width)}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=draw, dtype=dtype)))
        self.bias = nn.Parameter(torch.zeros(vocabulary, dtype=dtype))
        self.packed_tokens: list[int] = []

    def token_logps(self, packed: PackedSequences) -> Tensor:
        """log p(target) at every masked token. # [M]"""
        self.packed_tokens.append(sum(packed.lengths))
        lengths = torch.tensor(packed.lengths)
        owner = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
        embedded = self.embedding[packed.input_ids]
        sums = torch.zeros(len(lengths), embedded.shape[1], dtype=embedded.dtype).index_add(0, owner, embedded)
        means = sums / lengths[:, None]
        hidden = torch.tanh(means[owner[packed.rows]] + self.positions[packed.position_ids[packed.rows] % 16])
        logits = hidden @ self.head.T + self.bias
        return logits.log_softmax(-1).gather(1, packed.targets[:, None])[:, 0]


def random_ids(rng: np.random.Generator, length: int) -> np.ndarray:
    """Token ids without the mask token. # int32 [length]"""
    return rng.integers(0, MASK_ID, length).astype(np.int32)


def random_pair(rng: np.random.Generator, pair_id: str, longest: int = 6, prompt: int = 3) -> EncodedPair:
    """A pair whose responses have 1 to `longest` tokens."""
    chosen, rejected = (random_ids(rng, int(rng.integers(1, longest + 1))) for _ in range(2))
    return EncodedPair(pair_id, random_ids(rng, prompt), chosen, rejected, group=pair_id)


def referenced_items(denoiser, pairs: list[EncodedPair], estimator: ElboEstimator, spread: float = 0.0) -> list[Item]:
    """Pairs under the draws of epoch 0, with reference values: the model's own, moved by noise of size `spread`."""
    draws = estimator.draw_indices(0)
    items = [pair_item(pair, estimator, draws) for pair in pairs]
    values = score_items(denoiser, items, ANY_BUDGET).numpy()
    values = values + spread * np.random.default_rng(1).standard_normal(values.shape)
    return [replace(item, reference=value) for item, value in zip(items, values, strict=True)]
