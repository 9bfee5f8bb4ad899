"""The tokens of a pass, which shrink when memory runs out: the one place where work is done again.

Noise is keyed and gradients are summed, so the same work in smaller micro-steps gives the same result to rounding. Work
is a function of the budget; it must leave nothing behind that a second run would meet.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch

from laddpo.errors import RunFault, Stopped
from laddpo.processes.ranks import ALONE, Ranks
from laddpo.processes.signals import StopFlag

log = logging.getLogger(__name__)
T = TypeVar("T")


SHARED_PASS = "Several processes share each pass, so that none can repeat it alone. Start with {}."  # a `why_once`


def _no_plan(tokens: int) -> str:
    return f"one sequence of {tokens} tokens does not fit the memory. Lower data.max_length or adapter.r."


def _nothing() -> None:
    pass


@dataclass
class TokenBudget:
    """At most `tokens` in a micro-step, or one longer sequence. `explain(tokens)` is the message when that fails.

    One object serves all passes of a run, so that what one of them learns about memory holds for the others.
    `why_once`: for work that must not be repeated, why, and what to start with. {half} in it is half of the tokens.
    `between` is called before every micro-step that scores; see `stoppable`.
    """

    tokens: int
    explain: Callable[[int], str] = _no_plan
    retries: int = 0
    why_once: str = ""
    between: Callable[[], None] = _nothing

    @classmethod
    def of(cls, budget: int | TokenBudget) -> TokenBudget:
        return budget if isinstance(budget, TokenBudget) else cls(budget)

    def run(self, work: Callable[[int], T], longest: int, total: int | None = None) -> T:
        """`work(tokens)`, again with half the tokens each time memory runs out.

        `longest`: tokens of the longest sequence in the work. Raises `RunFault` when that alone does not fit.
        `total`: tokens of the whole work, where the budget may be larger: half of what was in use is tried next.
        """
        while True:
            try:
                return work(self.tokens)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                reason = str(error).partition("\n")[0]
            # outside the handler: the traceback held every tensor of the failed attempt
            if total is not None:
                self.tokens = min(self.tokens, total)
            self._shrink(longest, reason)

    @contextlib.contextmanager
    def stoppable(self, stop: StopFlag | None, ranks: Ranks = ALONE) -> Iterator[None]:
        """Within the block a signal ends scoring before the next micro-step, by `Stopped`.

        Several processes share their micro-steps and must stop at the same place: there the caller asks all of them.
        """

        def give_way() -> None:
            if stop:
                raise Stopped(f"scoring pairs: stopped by {stop.name}.", "Give the command again.")

        outer, self.between = self.between, give_way if stop is not None and ranks.world == 1 else self.between
        try:
            yield
        finally:
            self.between = outer

    def _shrink(self, longest: int, reason: str) -> None:
        if self.tokens <= longest:
            raise RunFault(f"{self.explain(longest)} ({reason})")
        if why := self.why_once.format(half=self.tokens // 2):
            raise RunFault(f"out of memory with {self.tokens} tokens in a pass. {why} ({reason})")
        self.retries += 1
        release_memory()
        log.warning(
            "out of memory with %d tokens in a pass; doing the work again with %d (%s)",
            self.tokens,
            self.tokens // 2,
            reason,
        )
        self.tokens //= 2


def answer_budget(why_once: str = "") -> TokenBudget:
    """For answers: whole batches, until memory runs out. Tokens are those of prompts and answers."""
    return TokenBudget(sys.maxsize, _one_answer, why_once=why_once)


def _one_answer(tokens: int) -> str:
    return (
        f"a prompt and its answer of {tokens:,} tokens together do not fit the memory. Close other programs on the "
        "device, shorten the prompt, or lower evaluation.block_length or evaluation.gen_length."
    )


def release_memory() -> None:
    """Give back what nothing refers to any more: cycles of objects, and the cache of CUDA's allocator."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error says that memory ran out; torch has an exception of its own for that on GPUs alone."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in OUT_OF_MEMORY_SIGNS)
    )


OUT_OF_MEMORY_SIGNS = (
    "CUDA out of memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "DefaultCPUAllocator: can't allocate memory",
)
