"""How a network attends: to everything, or block-causally, and then in blocks of which length. No torch.

The network's family, its config.json and the settings `model.attention` and `model.block_length` have a say.
"""

from __future__ import annotations

from collections.abc import Iterator

from laddpo.errors import UserError
from laddpo.models.families import FAMILIES, Family

BIDIRECTIONAL, BLOCK = "bidirectional", "block"


def setting_problems(architecture: str, attention: str | None, block_length: int | None) -> Iterator[str]:
    """What the two settings ask of a family that cannot do it, before there is a checkpoint."""
    family = FAMILIES[architecture]
    if family.may_be_block:
        if attention == BIDIRECTIONAL and block_length is not None:
            yield (
                f"model.block_length is {block_length} and model.attention is 'bidirectional', which has no blocks; "
                "set model.attention=block, or model.block_length=null."
            )
        if (attention == BLOCK) != (block_length is not None) and attention != BIDIRECTIONAL:
            yield (
                f"model.attention is {attention!r} and model.block_length is {block_length}; {architecture} attends "
                "either way, and blocks need both. Set model.attention=block and model.block_length to the length that "
                "the checkpoint was trained with, or leave both out."
            )
    elif family.block_length is None:
        for name, value in (("attention", attention), ("block_length", block_length)):
            if value not in (None, BIDIRECTIONAL):
                yield f"model.{name} is {value!r}; {architecture} has bidirectional attention alone; leave it out."
    elif attention == BIDIRECTIONAL:
        yield (
            f"model.attention is 'bidirectional'; {architecture} was trained block by block and is read so alone; "
            "leave it out."
        )


def resolve(family: Family, stated: int | None, attention: str | None, block_length: int | None) -> int | None:
    """The length of the blocks; None: bidirectional. `stated`: what config.json says. Raises `UserError`."""
    if not family.may_be_block:
        return stated if block_length is None else block_length
    if attention == BIDIRECTIONAL:
        return None
    found = stated if block_length is None else block_length
    if attention == BLOCK and found is None:
        raise UserError(
            "model.attention is 'block' and config.json states no block_length; expected one. Set "
            "model.block_length to the length that the checkpoint was trained with."
        )
    if attention is None and block_length is not None and stated is None:
        raise UserError(
            f"model.block_length is {block_length}, and config.json does not say that this checkpoint attends in "
            "blocks; expected model.attention=block beside it. Set that, or leave model.block_length out."
        )
    return found


def expected(architecture: str, attention: str | None, block_length: int | None) -> int | None:
    """The length of the blocks by the settings and the family, before config.json is there; None: bidirectional."""
    family = FAMILIES[architecture]
    if family.may_be_block and attention != BLOCK:
        return None
    return block_length or family.block_length


def in_words(block_length: int | None) -> str:
    """For the terminal."""
    return "bidirectional" if block_length is None else f"block-causal, blocks of {block_length} tokens"
