"""A small DPO run for the tests of the training loop, and ways to disturb it."""

import math

import numpy as np
import torch

from laddpo.core.draws import ElboEstimator
from laddpo.core.gradient import score_items
from laddpo.core.loop import LoopSettings, train_loop
from laddpo.core.losses import LossOptions
from laddpo.core.objectives import DpoObjective, pair_scores
from laddpo.core.optim import build_optimizer
from laddpo.core.tasks import DpoTask
from laddpo.inputs.reference_values import fill_reference, visited_windows
from laddpo.processes.signals import StopFlag
from laddpo.storage.atomic import write_json
from laddpo.storage.reference_store import ReferenceStore
from laddpo.storage.run_outputs import RunOutputs
from tests.core.helpers import LinearDenoiser, random_pair, referenced_items

PAIRS, PER_STEP, STEPS = 5, 2, 7  # epochs of 3 steps, the last of them short
ESTIMATOR = ElboEstimator(diffusion_samples=2, mask_rounds=2)
BUDGET = 25


def settings(**changes) -> LoopSettings:
    base = {"seed": 3, "total_steps": STEPS, "items_per_step": PER_STEP, "learning_rate": 0.02, "num_warmup_steps": 2}
    return LoopSettings(**{**base, "save_steps": 1, "eval_steps": 2, **changes})


class Crash(Exception):
    """Stands for a kill: nothing of the loop runs after it."""


class Run:
    """A DPO run in `folder`, made anew in every process as far as the loop can tell."""

    def __init__(self, folder, optimizer: str = "adamw"):
        self.folder = folder
        rng = np.random.default_rng(0)
        self.pairs = [random_pair(rng, f"pair-{i}") for i in range(PAIRS)]
        self.held_out = [random_pair(rng, f"held-out-{i}") for i in range(3)]
        self.denoiser = LinearDenoiser(width=64, vocabulary=64, dtype=torch.float32)  # large enough for 8-bit moments
        self.validation = referenced_items(self.denoiser, self.held_out, ElboEstimator(diffusion_samples=2))
        store = ReferenceStore.open(folder.parent / "reference", {"weights": "start"})
        windows = [
            ([self.pairs[i] for i in indices], ESTIMATOR.draw_indices(epoch))
            for epoch, indices in visited_windows(3, STEPS, PAIRS, PER_STEP, ESTIMATOR.mask_rounds)
        ]
        fill_reference(self.denoiser, store, windows, ESTIMATOR, BUDGET, StopFlag(), 100, lambda pairs: None)
        self.parameters = dict(self.denoiser.named_parameters())
        self.optimizer = build_optimizer(optimizer, self.parameters, (0.9, 0.95), 1e-8, 0.1)
        self.objective = DpoObjective("sigmoid", LossOptions(beta=0.5))
        self.task = DpoTask(self.denoiser, self.parameters, self.pairs, store, ESTIMATOR, self.objective, BUDGET)
        self.stop = StopFlag()
        self.tracked: list[tuple[int, dict]] = []

    def weights(self) -> dict:
        return {name: p.detach().tolist() for name, p in self.parameters.items()}

    def validate(self, step: int) -> dict[str, float]:
        draws = score_items(self.denoiser, self.validation, BUDGET)
        losses = self.objective.losses(self.validation, draws)
        ratio = pair_scores(self.validation, draws).chosen_ratio.mean()
        return {"validation/loss": float(losses.mean()), "validation/chosen_fall": -float(ratio)}

    def outputs(self) -> RunOutputs:
        return RunOutputs(
            self.folder,
            save_best=lambda step: write_json(self.folder / "best.json", [step, self.weights()]),
            save_last=lambda step: write_json(self.folder / "last.json", [step, self.weights()]),
            track=lambda metrics, step: self.tracked.append((step, dict(metrics))),
        )

    def train(self, resume: bool = False, before_step=None, task=None, **changes):
        """`before_step(task call number from 0)` runs before each step of this process."""
        task, validate = task or self.task, changes.pop("validate", self.validate)
        scaler = changes.pop("scaler", None)
        calls = iter(range(10**6))
        accumulate = task.accumulate

        class Watched:
            item_count, names = task.item_count, staticmethod(task.names)

            @staticmethod
            def accumulate(indices, epoch, loss_scale):
                if before_step:
                    before_step(next(calls))
                return accumulate(indices, epoch, loss_scale)

        goal = {"best_metric": "validation/loss", "higher_is_better": False} if validate else {}
        return train_loop(
            Watched(),
            self.parameters,
            self.optimizer,
            settings(**{**goal, **changes}),
            self.outputs(),
            validate,
            self.stop,
            resume,
            scaler,
        )

    def stop_at(self, step: int):
        def before_step(call: int) -> None:
            if call == step:
                self.stop.name = "SIGTERM"

        return before_step

    def records(self) -> list[dict]:
        return self.outputs().metrics.read()

    def files(self) -> dict[str, bytes]:
        """What must not depend on how often the run was stopped."""
        return {name: (self.folder / name).read_bytes() for name in ("metrics.jsonl", "best.json", "last.json")}


def crash_at(step: int):
    def before_step(call: int) -> None:
        if call == step:
            raise Crash

    return before_step


def spoiled(run: Run, steps: set[int]):
    """The task with a NaN weight in the denoiser during some of its steps, as an overflow would have it."""
    calls = iter(range(10**6))

    class Spoiled:
        item_count, names = run.task.item_count, staticmethod(run.task.names)

        @staticmethod
        def accumulate(indices, epoch, loss_scale):
            is_spoiled = next(calls) in steps
            kept = run.denoiser.bias.detach().clone()
            if is_spoiled:
                run.denoiser.bias.data.fill_(math.nan)
            metrics = run.task.accumulate(indices, epoch, loss_scale)
            run.denoiser.bias.data.copy_(kept)
            return metrics

    return Spoiled


def overflowing(run: Run, steps: set[int]):
    """The task with an infinite gradient in some of its steps, as float16 has one when the scale is too large."""
    calls = iter(range(10**6))

    class Overflowing:
        item_count, names = run.task.item_count, staticmethod(run.task.names)

        @staticmethod
        def accumulate(indices, epoch, loss_scale):
            metrics = run.task.accumulate(indices, epoch, loss_scale)
            if next(calls) in steps:
                run.denoiser.head.grad[0, 0] = math.inf
            return metrics

    return Overflowing
