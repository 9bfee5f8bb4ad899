"""What several processes compute together, held against one: run by torch.distributed.run, figures to a JSON file.

    python -m torch.distributed.run --standalone --nproc_per_node 2 tests/core/rank_worker.py FOLDER

Every rank computes each thing alone as well, which is the expectation. Rank 0 writes figures.json: for each rank a
figure by the name of the check.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import torch

from laddpo.cli.launch import leave
from laddpo.core.draws import ElboEstimator
from laddpo.core.loop import LoopSettings, train_loop
from laddpo.core.losses import LossOptions
from laddpo.core.objectives import DpoObjective
from laddpo.core.optim import build_optimizer, clip_gradients
from laddpo.core.sharing import accumulate_shared, score_shared
from laddpo.core.tasks import DpoTask, stored_pair
from laddpo.errors import EXIT_DONE, RunFault, Stopped
from laddpo.evaluation.sampling import SamplerSettings, generate
from laddpo.inputs.reference_values import fill_reference, visited_windows
from laddpo.models.adapters import attach_lora, trainable_parameters
from laddpo.models.denoiser import TransformerDenoiser
from laddpo.models.sharding import ShardedDenoiser, shard_model
from laddpo.processes.ranks import ALONE, Ranks, connect, is_sharded, whole
from laddpo.processes.signals import StopFlag
from laddpo.storage.reference_store import ReferenceStore
from laddpo.storage.run_outputs import RunOutputs
from tests.core.helpers import MASK_ID, random_pair, referenced_items, tiny_denoiser, tiny_family

ESTIMATOR = ElboEstimator("balanced", diffusion_samples=4)
OBJECTIVE = DpoObjective("sigmoid", LossOptions(beta=0.5))
SMALL, LARGE = 40, 10**6  # token budgets: a fraction of a pair, everything
ITEMS, PER_STEP, STEPS = 8, 5, 6  # epochs of two steps, of 5 and 3 pairs
RNG = np.random.default_rng(5)
PAIRS = [random_pair(RNG, f"pair-{i}", longest=9) for i in range(ITEMS)]
FAMILY_SHAPES = {
    "tied": ("A2DLlamaLMHeadModel", {"is_tied": True}),
    "experts": ("LLaDAMoEModelLM", {"n_experts": 4, "experts_chosen": 2}),
}


def denoiser_of(kind: str, dtype: torch.dtype, ranks: Ranks | None = None) -> TransformerDenoiser:
    """The same tiny model each time: LLaDA with `kind` full or lora, another family with tied or experts; with `ranks`
    its weights are sharded."""
    denoiser = tiny_family(*FAMILY_SHAPES[kind], dtype) if kind in FAMILY_SHAPES else tiny_denoiser(dtype)
    if kind == "lora":
        attach_lora(denoiser.model, r=2, alpha=4, seed=1)
        with torch.no_grad():  # B starts at 0, where half of the gradient vanishes
            for name, parameter in trainable_parameters(denoiser.model).items():
                if "lora_B" in name:
                    parameter.copy_(torch.linspace(-0.1, 0.1, parameter.numel(), dtype=dtype).view_as(parameter))
    if ranks is None:
        return denoiser
    shard_model(denoiser.model, ranks, torch.device("cpu"))
    return ShardedDenoiser(denoiser.model, MASK_ID, ranks=ranks)


def gradients(denoiser, count: int, budget: int, mode: str, ranks: Ranks) -> dict[str, torch.Tensor]:
    """The gradient of `count` items, whole, by name, and beside it the losses and the norm before clipping."""
    items = referenced_items(denoiser_of("full", torch.float64), PAIRS[:count], ESTIMATOR, spread=0.5)
    parameters = trainable_parameters(denoiser.model)
    values = accumulate_shared(denoiser, list(parameters.values()), items, OBJECTIVE, 1 / count, budget, mode, ranks)
    grads = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    found = {name: tensor.clone() for name, tensor in whole(grads).items()}
    norm = clip_gradients(list(parameters.values()), math.inf)
    return {**found, "losses": values.losses, "norm": torch.tensor(norm, dtype=torch.float64)}


def relative(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """The largest relative error of a tensor; infinite where one is missing."""
    if found.keys() != wanted.keys():
        return math.inf
    return max(float((found[n].double() - wanted[n].double()).norm() / wanted[n].double().norm()) for n in wanted)


def check_gradients(ranks: Ranks) -> dict[str, float]:
    figures = {}
    cases = [("lora", mode, budget, False) for mode in ("stream", "two_pass") for budget in (SMALL, LARGE)]
    sharded_kinds = ("full", "lora", *(FAMILY_SHAPES if ranks.world == 2 else ()))
    cases += [(kind, "two_pass", budget, True) for kind in sharded_kinds for budget in (SMALL, LARGE)]
    for kind, mode, budget, sharded in cases:
        for dtype in (torch.float32, torch.float64):
            for count in (1, 7) if budget == SMALL else (7,):  # with one item the other ranks have nothing to do
                wanted = gradients(denoiser_of(kind, dtype), count, budget, mode, ALONE)
                denoiser = denoiser_of(kind, dtype, ranks if sharded else None)
                found = gradients(denoiser, count, budget, mode, ranks)
                bits = str(dtype).removeprefix("torch.")
                name = f"{'fsdp' if sharded else 'ddp'} {kind} {mode} {budget} {count} items {bits}"
                figures[name] = relative(found, wanted)
    return figures


class Run:
    """A small training run over PAIRS in a folder; the store of reference values is made by all ranks."""

    def __init__(self, folder: Path, store: Path, kind: str, ranks: Ranks, sharded: bool = False):
        self.folder, self.ranks, self.stop = folder, ranks, StopFlag()
        self.denoiser = denoiser_of(kind, torch.float32, ranks if sharded else None)
        self.store = ReferenceStore.open(store, {"weights": kind})
        windows = [
            ([PAIRS[i] for i in indices], ESTIMATOR.draw_indices(epoch))
            for epoch, indices in visited_windows(3, STEPS, ITEMS, PER_STEP, 1)
        ]
        fill_reference(self.denoiser, self.store, windows, ESTIMATOR, SMALL, self.stop, 100, print, ranks)
        ranks.barrier()
        self.store.refresh()
        self.parameters = trainable_parameters(self.denoiser.model)
        self.optimizer = build_optimizer("adamw", self.parameters, (0.9, 0.95), 1e-8, 0.1)
        mode = "two_pass" if sharded else "stream"
        self.task = DpoTask(self.denoiser, self.parameters, PAIRS, self.store, ESTIMATOR, OBJECTIVE, SMALL, mode, ranks)

    def train(self, steps: int = STEPS, resume: bool = False, before_step=lambda step: None) -> dict:
        """Final weights by name, whole; on rank 0 beside the metrics of all steps."""
        settings = LoopSettings(3, STEPS, PER_STEP, 1e-2, max_grad_norm=0.5)
        calls = iter(range(10**6))
        accumulate = self.task.accumulate

        class Watched:
            item_count, names = self.task.item_count, staticmethod(self.task.names)

            @staticmethod
            def accumulate(indices, epoch, loss_scale):
                step = next(calls)
                if step == steps:
                    self.stop.name = "SIGTERM"
                before_step(step)
                return accumulate(indices, epoch, loss_scale)

        outputs = RunOutputs(self.folder, lambda step: None, lambda step: None, writes=self.ranks.is_main)
        train_loop(
            Watched(), self.parameters, self.optimizer, settings, outputs, None, self.stop, resume, ranks=self.ranks
        )
        return {name: tensor.detach().clone() for name, tensor in whole(self.parameters).items()}

    def stopped_after(self, step: int) -> str:
        try:
            self.train(steps=step)
        except Stopped as stopped:
            return str(stopped)
        return "not stopped"


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def check_training(folder: Path, ranks: Ranks) -> dict[str, float | str]:
    """Six steps of Adam by all ranks and by one; stopped and continued in another way."""
    figures: dict[str, float | str] = {}
    runs = (("lora", False), ("full", True), ("lora", True))
    for kind, sharded in runs[: 3 if ranks.world == 2 else 2]:
        name = f"{'fsdp' if sharded else 'ddp'} {kind}"
        own = folder / f"alone-{kind}-{sharded}-{ranks.rank}"
        alone = Run(own, own / "store", kind, ALONE)
        wanted = alone.train()
        together = Run(folder / name, folder / "store", kind, ranks, sharded)
        figures[f"{name}: 6 steps"] = relative(together.train(), wanted)
        draws = ESTIMATOR.draw_indices(0)
        stored, known = (
            {p.id: torch.tensor(s.values(stored_pair(p), draws)) for p in PAIRS} for s in (together.store, alone.store)
        )
        figures[f"{name}: stored reference"] = relative(stored, known)
        # stopped after a signal to one rank only, then continued by one process that holds everything
        halved = Run(folder / f"{name} halved", folder / "store", kind, ranks, sharded)
        last = ranks.world - 1
        said = halved.stopped_after(3 if ranks.rank == last else STEPS + 1)
        figures[f"{name}: stop"] = "; ".join(sorted(set(ranks.gather(said.partition(": ")[2].partition(",")[0]))))
        continued = Run(halved.folder, own / "store", kind, ALONE)
        if ranks.is_main:
            figures[f"{name}: continued alone"] = relative(continued.train(resume=True), wanted)
            pairs = zip(metrics(folder / name), metrics(own), strict=True)
            figures[f"{name}: metrics"] = max(abs(a[k] - b[k]) for a, b in pairs for k in b if b[k] is not None)
        ranks.barrier()
        # begun alone, continued by all
        if ranks.is_main:
            begun = Run(folder / f"{name} begun", own / "store", kind, ALONE)
            begun.stopped_after(2)
        ranks.barrier()
        taken_over = Run(folder / f"{name} begun", folder / "store", kind, ranks, sharded)
        figures[f"{name}: continued by all"] = relative(taken_over.train(resume=True), wanted)
    return figures


def check_faults(folder: Path, ranks: Ranks) -> dict[str, str]:
    """A value that is not finite on one rank stops all, before the step."""
    run = Run(folder / "fault", folder / "store", "lora", ranks)

    def spoil(step: int) -> None:
        if step == 2 and ranks.rank == ranks.world - 1:
            next(iter(run.parameters.values())).data.fill_(math.nan)

    try:
        run.train(before_step=spoil)
        said = "went on"
    except RunFault as fault:
        said = str(fault).partition(":")[0]
    return {"not finite on one rank": "; ".join(sorted(set(ranks.gather(said))))}


def check_answers(ranks: Ranks) -> dict[str, float]:
    """Sharded weights answer different prompts on different ranks, some on none, as whole ones do."""
    settings = SamplerSettings(gen_length=4, steps=4, block_length=4)
    prompts = [pair.prompt_ids for pair in PAIRS[: ranks.world + 1]]
    wanted = [generate(denoiser_of("full", torch.float64).model, [p], settings, MASK_ID)[0] for p in prompts]
    sharded = denoiser_of("full", torch.float64, ranks)
    with sharded.lockstep():
        own = prompts[ranks.rank :: ranks.world]
        found = [generate(sharded.model, [p], settings, MASK_ID)[0].tolist() for p in own]
    given = ranks.gather(found)
    merged = [given[i % ranks.world][i // ranks.world] for i in range(len(prompts))]
    is_resharded = all(is_sharded(p) for p in sharded.model.parameters())
    whole_one = denoiser_of("full", torch.float64)
    items = referenced_items(whole_one, PAIRS, ESTIMATOR)
    scored, known = score_shared(sharded, items, SMALL, ranks), score_shared(whole_one, items, SMALL)
    return {
        "answers that differ": float(sum(a != list(b) for a, b in zip(merged, wanted, strict=True))),
        "weights left together": float(not is_resharded),
        "scores": float(((scored - known).abs() / known.abs().clamp(min=1)).max()),
    }


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    ranks = connect("cpu")
    figures = {**check_gradients(ranks), **check_training(folder, ranks), **check_faults(folder, ranks)}
    figures.update(check_answers(ranks))
    everyone = ranks.gather(figures)
    if ranks.is_main:
        (folder / "figures.json").write_text(json.dumps(everyone))
    leave(EXIT_DONE)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
