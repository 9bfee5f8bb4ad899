"""The processes of one run: who this one is, and the few things that all of them do together.

`torchrun`, `accelerate launch` and SLURM scripts start the same command several times and tell each process its number
by RANK, WORLD_SIZE and LOCAL_RANK. `connect()` joins them; alone there is nothing to join, torch.distributed is never
touched, and every method below is the identity. Values go through gloo as JSON or float64, never as pickles; gradients
through NCCL on GPUs. Rank 0 ("main") alone writes, prints and decides.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from laddpo.errors import RunFault, UserError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from laddpo.processes.signals import StopFlag

# A process that died is noticed at once, by its closed connection; these bound the wait for one that hangs.
CONTROL_WAIT = datetime.timedelta(hours=12)  # one rank may answer, plot or score while the others wait
GRADIENT_WAIT = datetime.timedelta(minutes=30)  # all ranks get there within one step of each other
BUCKET_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Ranks:
    """This process among `world` of them; `local_*` count those on the same machine. The defaults are a run alone."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    control: Any = None  # the gloo group for everything but gradients

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.gather(None)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value (JSON), in the order of ranks, on every rank."""
        if self.world == 1:
            return [value]
        return [json.loads(content) for content in self._gather_bytes(json.dumps(value).encode())]

    def gather_arrays(self, array: np.ndarray) -> list[np.ndarray]:
        """Every rank's float64 array, flattened, in the order of ranks, on every rank."""
        import numpy as np

        if self.world == 1:
            return [array.ravel()]
        return [np.frombuffer(content, "<f8") for content in self._gather_bytes(array.astype("<f8").tobytes())]

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value (JSON), on every rank."""
        if self.world == 1:
            return value
        return self.gather(value if self.is_main else None)[0]

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        if self.world == 1:
            return bool(flag)
        import torch

        found = torch.tensor([int(flag)], dtype=torch.int32)
        with explained():
            torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX, group=self.control)
        return bool(found)

    def agree_to_stop(self, stop: StopFlag | None) -> bool:
        """Whether any rank was asked to stop; then all of them are, by the first one's signal."""
        names = [name for name in self.gather(stop.name if stop else None) if name]
        if names and stop is not None and not stop:
            stop.name = names[0]
        return bool(names)

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """Rank 0 runs the block before the others do: what it made, they find."""
        if not self.is_main:
            self.barrier()
        yield
        if self.is_main:
            self.barrier()

    def sum_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Replace every `parameter.grad` by its sum over ranks; one that no rank has stays None.

        Once per optimizer step, in flat buckets: the reduction of DDP with no_sync in between. DDP itself is not used,
        because its hooks count backward passes and ours differ in number from rank to rank. Sharded parameters
        (DTensors) were reduced in their own backward passes and are left alone.
        """
        if self.world == 1 or any(is_sharded(parameter) for parameter in parameters):
            return
        import torch

        present = torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.int32)
        with explained():
            torch.distributed.all_reduce(present, torch.distributed.ReduceOp.MAX, group=self.control)
        filled = [parameter for parameter, has in zip(parameters, present.tolist(), strict=True) if has]
        for parameter in filled:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        for bucket in _buckets([parameter.grad for parameter in filled]):
            flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
            with explained():
                torch.distributed.all_reduce(flat)
            for gradient, part in zip(bucket, flat.split([gradient.numel() for gradient in bucket]), strict=True):
                gradient.copy_(part.view_as(gradient))

    def broadcast_tensors(self, tensors: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        """Rank 0's tensors by name, on the CPU of every rank."""
        if self.world == 1:
            return dict(tensors)
        import torch

        mine = tensors if self.is_main else {}
        heads = self.broadcast([[n, str(t.dtype).removeprefix("torch."), list(t.shape)] for n, t in mine.items()])
        received = {}
        for name, dtype, shape in heads:
            whole = mine[name].cpu().contiguous() if self.is_main else torch.empty(shape, dtype=getattr(torch, dtype))
            if whole.numel():
                with explained():
                    torch.distributed.broadcast(whole.view(-1).view(torch.uint8), 0, group=self.control)
            received[name] = whole
        return received

    def speaks_first(self) -> bool:
        """Whether this is the first rank to report a failure: the others, who fail because of it, are silent."""
        if self.world == 1:
            return True
        from torch.distributed.distributed_c10d import _get_default_store

        try:
            return _get_default_store().add("laddpo/failures", 1) == 1
        except Exception:  # whoever kept the count is gone, too
            return True

    def _gather_bytes(self, content: bytes) -> list[bytes]:
        import torch

        size = torch.tensor([len(content)], dtype=torch.int64)
        sizes = [torch.zeros_like(size) for _ in range(self.world)]
        with explained():
            torch.distributed.all_gather(sizes, size, group=self.control)
            longest = int(max(sizes))
            if not longest:
                return [b""] * self.world
            padded = torch.zeros(longest, dtype=torch.uint8)
            if content:
                padded[: len(content)] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
            parts = [torch.zeros_like(padded) for _ in range(self.world)]
            torch.distributed.all_gather(parts, padded, group=self.control)
        return [part[: int(size)].numpy().tobytes() for part, size in zip(parts, sizes, strict=True)]


ALONE = Ranks()
_joined: list[Ranks] = []


def here() -> Ranks:
    """This process among those it was joined with by `connect`; alone where it was not."""
    return _joined[0] if _joined else ALONE


def launched() -> Ranks:
    """What the launcher says of this process, before any connection is made."""
    names = {"rank": "RANK", "world": "WORLD_SIZE", "local_rank": "LOCAL_RANK", "local_world": "LOCAL_WORLD_SIZE"}
    found = {field: os.environ[name] for field, name in names.items() if os.environ.get(name)}
    try:
        ranks = Ranks(**{field: int(value) for field, value in found.items()})
    except ValueError as error:
        raise UserError(
            f"{', '.join(names.values())} are {found}; expected whole numbers from the launcher."
        ) from error
    if not 0 <= ranks.rank < ranks.world:
        raise UserError(f"RANK is {ranks.rank} and WORLD_SIZE {ranks.world}; expected a rank below it. Use torchrun.")
    return ranks


def connect(device: str) -> Ranks:
    """Join the processes of this launch, which compute on `device` (cuda or cpu); `here()` knows it from then on."""
    found = launched()
    if found.world == 1 or _joined:
        return here()
    import torch

    if device == "cuda":
        if found.local_rank >= torch.cuda.device_count():
            raise UserError(
                f"LOCAL_RANK is {found.local_rank} and this machine has {torch.cuda.device_count()} GPUs; expected one "
                "process for each GPU. Lower --nproc_per_node."
            )
        torch.cuda.set_device(found.local_rank)
    with explained():
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        store, rank, world = next(torch.distributed.rendezvous("env://", timeout=GRADIENT_WAIT))
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            # torchrun's store outlives a restart, with the addresses of the processes before it
            store = torch.distributed.PrefixStore(f"restart {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
        torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=GRADIENT_WAIT)
        control = torch.distributed.new_group(backend="gloo", timeout=CONTROL_WAIT)
    joined = Ranks(found.rank, found.world, found.local_rank, found.local_world, control)
    _joined.append(joined)
    return joined


def disconnect() -> None:
    """Leave in order, at the end of a run that went well."""
    if _joined:
        import torch

        _joined.clear()
        torch.distributed.destroy_process_group()


def share_out(sizes: Sequence[int], world: int) -> list[list[int]]:
    """Which items go to which rank, so that the sums of sizes are near each other: the largest item first, always to
    the least loaded rank. Each rank's items stay in order. Example: sizes 5, 3, 3, 1 for 2 ranks -> [0, 3], [1, 2]."""
    shares: list[list[int]] = [[] for _ in range(world)]
    loads = [(0, rank) for rank in range(world)]
    for item in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        load, rank = min(loads)
        loads[rank] = (load + sizes[item], rank)
        shares[rank].append(item)
    return [sorted(share) for share in shares]


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds only its part of the tensor."""
    return hasattr(tensor, "full_tensor")


def whole(tensors: Mapping[str, Tensor], keeps: bool = True) -> dict[str, Tensor]:
    """Sharded tensors put together on the CPU, one after the other; all ranks call this, those that keep get them."""
    found = {}
    for name, tensor in tensors.items():
        if is_sharded(tensor):
            tensor = tensor.detach().full_tensor()
            tensor = tensor.cpu() if keeps else None
        found[name] = tensor
    return found if keeps else {}


def placed_like(tensor: Tensor, value: Tensor) -> Tensor:
    """A whole `value` where `tensor` is: on its device, and of a sharded tensor this rank's part. No communication."""
    if not is_sharded(tensor) or value.shape != tensor.shape:
        return value.to(tensor.device)
    from torch.distributed.tensor import distribute_tensor

    whole_value = value.to(tensor.device)
    return distribute_tensor(whole_value, tensor.device_mesh, tensor.placements, src_data_rank=None)


def is_lost_peer(error: BaseException) -> bool:
    """Whether the error says that another process of the run is gone."""
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in LOST_PEER_SIGNS)


def lost_peer(error: BaseException, ranks: Ranks | None = None) -> RunFault:
    """What is told when another process of the run ended.

    The launcher sends SIGTERM to those that are left, at any moment now: they are ending already, and shall say why.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    ranks = ranks or launched()
    reason = str(error).strip().partition("\n")[0]
    return RunFault(
        f"another of the {ranks.world} processes of this run ended or does not answer (killed, out of memory, or its "
        f"machine is gone), and rank {ranks.rank} cannot continue without it. Everything up to the last checkpoint or "
        f"shard is kept: give the same command again, a train run with resume=true. ({reason})"
    )


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """A failed exchange between processes becomes a `RunFault` that says so."""
    try:
        yield
    except RuntimeError as error:
        raise lost_peer(error) from error


def _buckets(gradients: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Runs of gradients of one dtype and device, each of BUCKET_BYTES or one tensor."""
    bucket: list[Tensor] = []
    filled = 0
    for gradient in gradients:
        is_other = bucket and (gradient.dtype, gradient.device) != (bucket[0].dtype, bucket[0].device)
        if bucket and (is_other or filled + gradient.nbytes > BUCKET_BYTES):
            yield bucket
            bucket, filled = [], 0
        bucket.append(gradient)
        filled += gradient.nbytes
    if bucket:
        yield bucket


LOST_PEER_SIGNS = ("onnection closed by peer", "onnection reset by peer", "gloo/transport", "NCCL error", "Broken pipe")
