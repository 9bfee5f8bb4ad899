"""What is kept of a run whose numbers went wrong, and the check that they begin right."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from laddpo.core.gradient import Item
from laddpo.core.loop import LoopSettings
from laddpo.core.noise import step_items
from laddpo.core.objectives import reference_draws
from laddpo.core.sharing import score_shared
from laddpo.core.tasks import DpoTask
from laddpo.errors import NonFiniteStep, RunFault
from laddpo.processes.ranks import Ranks, whole
from laddpo.storage import atomic, manifests
from laddpo.storage.checkpoint import save_tensors

STEP_ZERO_TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2, "fp16": 1e-2}  # relative, for another packing than the reference's
FAULT_BYTES = 2**30  # trainable weights up to this size go into a report of a fault


@contextlib.contextmanager
def fault_reports(folder: Path, parameters: Mapping[str, Tensor], seed: int, ranks: Ranks) -> Iterator[None]:
    """A step that is not finite leaves `fault/` in the run's folder: what, beside config.yaml, doing it again takes.

    The noise of the step follows from seed, step and row ids; the weights are stored where they are not huge. Of
    several ranks all come here, and the first one writes.
    """
    try:
        yield
    except NonFiniteStep as fault:
        size = sum(tensor.numel() * tensor.element_size() for tensor in parameters.values())
        weights = whole(parameters, ranks.is_main) if size <= FAULT_BYTES else {}
        if ranks.is_main:
            _write_fault(folder / "fault", {**fault.facts, "seed": seed}, weights)
        message = f"{fault} What a bug report needs is in {folder / 'fault'}, beside {folder / 'config.yaml'}."
        raise NonFiniteStep(message, fault.facts) from fault


def _write_fault(folder: Path, facts: Mapping[str, object], weights: Mapping[str, Tensor]) -> None:
    broken = sorted(name for name, tensor in weights.items() if not bool(tensor.isfinite().all()))
    with atomic.replaced_folder(folder) as target:
        atomic.write_json(target / "fault.json", {**facts, "nonfinite_weights": broken})
        files = ["fault.json"]
        if weights:
            save_tensors(target / "weights.safetensors", weights)
            files.append("weights.safetensors")
        manifests.write_manifest(target, "fault", {}, files, **manifests.provenance())


def step_zero_check(
    task: DpoTask, settings: LoopSettings, precision: str, held_out: Sequence[Item] | None = None
) -> None:
    """Before the first step the policy is the reference: every draw agrees, every margin is 0, or the run stops here.

    Catches what would silently train on a wrong margin: a stale store, other masks, dropout, an adapter that is not
    neutral. `held_out`: items to check in place of the first step's, where the reference saw other masks than the
    policy in training (dpo.common_random_numbers=false) and the same ones in validation.
    """
    if held_out is None:
        _, indices = step_items(settings.seed, 0, task.item_count, settings.items_per_step)
        items = task.items(indices, 0)
    elif not (items := held_out[: settings.items_per_step]):
        print("step 0: not checked, since dpo.common_random_numbers=false and there are no validation pairs")
        return
    draws = score_shared(task.denoiser, items, task.token_budget, task.ranks)
    reference = reference_draws(items, draws.device)
    difference = (draws - reference).abs()
    relative = float((difference / reference.abs().clamp(min=1.0)).max())
    losses = task.objective.losses(items, draws)
    at_zero = float(task.objective.losses(items, reference).mean())
    tolerance = STEP_ZERO_TOLERANCE[precision]
    if relative > tolerance:
        worst = items[int(difference.flatten(1).max(dim=1).values.argmax())].id
        raise RunFault(
            f"step 0: policy and reference differ by {float(difference.max()):.3g} nats on pair {worst} (relative "
            f"{relative:.2g}, allowed {tolerance:g} in {precision}), expected the same value before any training. The "
            "reference store may have been computed by another program or on faulty hardware: check it with "
            "python -m laddpo.precompute verify=true, or remove its folder."
        )
    print(
        f"check before training: model and reference differ by at most {float(difference.max()):.2g} nats over "
        f"{draws.numel()} draws; loss {float(losses.mean()):.6f}, expected {at_zero:.6f}"
    )
