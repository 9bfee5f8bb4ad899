"""What settings of data=onpolicy contradict each other; part of the checks of laddpo/config.py, without torch."""

from __future__ import annotations

from collections.abc import Iterator

from laddpo.ranges import EMBEDDED_TASKS
from laddpo.settings import RunConfig


def onpolicy_problems(config: RunConfig) -> Iterator[str]:
    """A sentence or two for each contradiction."""
    data, sampling = config.data, config.data.sampling
    if data.source != "onpolicy":
        if (rounds := max(data.rounds, config.rounds)) > 1:
            yield (
                f"rounds is {rounds} and data.source is {data.source!r}, whose pairs are the same in every round; use "
                "data=onpolicy, or rounds=1."
            )
        return
    if data.rounds > 1 and config.adapter.kind == "full":
        yield (
            f"rounds is {data.rounds} and adapter.kind is 'full'; a round starts from the adapter of the one before; "
            "use adapter=lora, or rounds=1."
        )
    if sampling.confidence_threshold is not None and sampling.remasking == "random":
        yield (
            f"data.sampling.confidence_threshold is {sampling.confidence_threshold:g} and data.sampling.remasking is "
            "'random', which ranks by no confidence; set data.sampling.confidence_threshold=null, or another remasking."
        )
    if min(sampling.gen_length, sampling.block_length) < 1 or sampling.gen_length % sampling.block_length:
        yield (
            f"data.sampling.block_length is {sampling.block_length} and data.sampling.gen_length is "
            f"{sampling.gen_length}; an answer is made of whole blocks; change one of them."
        )
    if data.dataset_name is not None and set(EMBEDDED_TASKS) & set(config.evaluation.tasks):
        yield (
            f"data.questions is {data.dataset_name!r} and evaluation.tasks has embedded problems; name "
            "the task of these questions, as evaluation=gsm8k, or data.tasks=[]."
        )
