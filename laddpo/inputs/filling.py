"""A pass of the reference model over the rows of a run that fills a store: shared out, stoppable, kept as it goes."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from laddpo.core.budget import TokenBudget
from laddpo.core.elbo import Denoiser
from laddpo.core.gradient import lockstep
from laddpo.core.tasks import is_completion, responses_of, stored_pair
from laddpo.errors import RunFault, Stopped, UserError
from laddpo.preference.encoding.encode import EncodedPair
from laddpo.processes.progress import Progress
from laddpo.processes.ranks import ALONE, Ranks, share_out
from laddpo.processes.signals import StopFlag
from laddpo.settings.read_settings import command_of
from laddpo.storage.shards import NOTHING_STORED, ShardStore

TRAINING = "training pairs"
KINDS_OF_ROWS = (TRAINING, "the same prompts with other completions")
PAIRS_PER_SHARD = 512
T = TypeVar("T")


@dataclass(frozen=True)
class Windows(Sequence):
    """Pairs that are computed together, and their draws: `places` says which of the `rows`. Rows are taken when a
    window is asked for, so that a million of them are never in memory."""

    rows: Sequence[EncodedPair]
    places: Sequence[tuple[Sequence[int], range]]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> tuple[list[EncodedPair], range]:
        places, draws = self.places[index]
        return [self.rows[place] for place in places], draws

    @property
    def pairs(self) -> int:
        """How many pairs all windows have together."""
        return sum(len(places) for places, _ in self.places)


def fill_store(
    denoiser: Denoiser,
    store: ShardStore,
    windows: Iterable[tuple[Sequence[EncodedPair], range]],
    compute: Callable[[Sequence[EncodedPair], range], Iterator[list[T]]],
    append: Callable[[list[T]], None],
    budget: TokenBudget,
    stop: StopFlag,
    pairs_per_shard: int,
    advance: Callable[[int], object],
    ranks: Ranks = ALONE,
) -> None:
    """`compute` what the store lacks of each window, and `append` it every `pairs_per_shard` pairs.

    `advance(pairs)` is told of every window done. Raises `Stopped` after a signal, with everything computed so far in
    the store. Each rank computes and stores its share of every window, the one that it will have in training; what the
    others stored is seen after `store.refresh()`.
    """
    pending: list[T] = []
    for pairs, draws in windows:
        with lockstep(denoiser), budget.stoppable(stop, ranks), _kept_when_stopped(store, append, pending, stop):
            for computed in compute(own_pairs(pairs, ranks), draws):
                pending += computed
        try:  # asked once: a signal after this line lets the next window be computed
            is_stopping = ranks.agree_to_stop(stop)
        except RunFault:  # another rank died: what this one has is kept
            append(pending)
            raise
        if len(pending) >= pairs_per_shard or is_stopping:
            append(pending)
            pending = []
        advance(len(pairs))
        if is_stopping:
            raise _stored(store, stop)
    append(pending)


@contextlib.contextmanager
def _kept_when_stopped(store: ShardStore, append: Callable[[list[T]], None], pending: list[T], stop: StopFlag):
    """A stop in the middle of a window keeps what was computed before, the whole groups of this window included."""
    try:
        yield
    except Stopped:
        append(pending)
        raise _stored(store, stop) from None


def _stored(store: ShardStore, stop: StopFlag) -> Stopped:
    kept = f"{store.folder}: stopped by {stop.name}; {len(store)} pairs are stored."
    return Stopped(kept, "The same command continues from there.")


def own_pairs(pairs: Sequence[EncodedPair], ranks: Ranks) -> Sequence[EncodedPair]:
    """This rank's share of a window, as `core/sharing.py` will share out its items."""
    if ranks.world == 1:
        return pairs
    sizes = [sum(len(pair.prompt_ids) + len(response) for response in responses_of(pair)) for pair in pairs]
    return [pairs[i] for i in share_out(sizes, ranks.world)[ranks.rank]]


@dataclass(frozen=True)
class Pass:
    """A pass over training or held-out rows, as it is told to the user: its name, what it finds, what that is."""

    name: str
    finds: str
    meaning: str


def complete(
    told: Pass,
    store: ShardStore,
    windows: Windows,
    fill: Callable[[Callable[[int], object]], object],
    label: str,
    auto: bool,
    ranks: Ranks,
) -> None:
    """`fill(advance)` the store with what it lacks for these windows, saying how many pairs that is, and why.

    Where `auto` is false, it is refused.
    """
    absent = Counter(
        store.reason(address)
        for pairs, draws in windows
        for address in map(stored_pair, pairs)
        if store.lacks(address, draws)
    )
    lacking = max(ranks.gather(sum(absent.values())))  # another run may be adding to the store while the ranks look
    total = windows.pairs
    first = next((pairs[0] for pairs, _ in windows if pairs), None)
    unit = "rows" if is_completion(first) else "pairs"
    is_training, label = label == TRAINING, label.replace(TRAINING, f"training {unit}")
    if not lacking:
        print(f"{told.name}, {label}: all {total} {unit} are in {store.folder}")
        return
    if not auto:
        raise UserError(
            f"{store.folder}: {lacking} of {total} {unit} ({label}) have no {told.finds} yet and auto is false. Run "
            f"{command_of('precompute')}, or set auto=true."
        )
    meaning = "" if len(store) else f" ({told.meaning}, which later runs reuse)"
    print(f"{told.name}, {label}: computing {lacking} of {total} {unit} into {store.folder}{meaning}")
    why = store.why_missing(absent)
    if is_training and why != NOTHING_STORED:  # evaluations have draws of their own
        print(f"{told.name}, {label}: {why}")

    shown = Progress(total=total, unit=unit, desc=told.name, dynamic_ncols=True, disable=not ranks.is_main)
    with store.filling(), shown as progress:
        fill(progress.update)
    if ranks.world > 1:
        ranks.barrier()
        store.refresh()
