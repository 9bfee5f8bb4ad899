"""The benchmark's parts for a model of real size on a real card: what fits, how fast it is, and what 4 bits change.

Parts of `python -m laddpo.benchmark`; experiment=gpu_proof puts them together for LLaDA-8B's shape.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from laddpo.settings.schema import RunConfig, StepSetting

if TYPE_CHECKING:
    from laddpo.benchmarking.steps import Measured
from laddpo.benchmarking.real_shapes import dialogue_pairs, quantization_of, random_policy, setup_of

TIMES = 3  # that a step is timed, after one to warm up
MICRO_STEPS = 3  # that a step of the part `rates` fills
TITLES = {
    "cards": "What fits, and at what speed",
    "rates": "Share of the matrix speed, and where the time goes",
    "agreement": "What 4-bit weights change",
    "nano": "Training on this device and on the CPU",
}


@dataclass
class Shelf:
    """The last model that was asked for: settings that can share one do, and only one takes memory at a time."""

    key: tuple = ()
    model: object = None

    def get(self, config: RunConfig, machine, setting: StepSetting):
        """A model with its adapter, stored and executed as the setting says."""
        from laddpo.core.budget import release_memory
        from laddpo.models.blocks import checkpoint_blocks, compile_blocks
        from laddpo.models.offload import keep_embeddings_on_host

        key = (setting.quantization, setting.embeddings_on_cpu, setting.compile)
        if key != self.key:
            self.key, self.model = (), None
            release_memory()
            self.model = random_policy(config, machine, quantization_of(setting.quantization))
            if setting.embeddings_on_cpu:
                keep_embeddings_on_host(self.model)
            if setting.compile:
                compile_blocks(self.model)
            self.key = key
        checkpoint_blocks(self.model, setting.gradient_checkpointing)
        return self.model


def cards_part(config: RunConfig, machine) -> tuple[str, dict]:
    """Whole optimizer steps on the longest pair, under the cap of every setting."""
    from laddpo.benchmarking.steps import measure
    from laddpo.benchmarking.steps_report import cards_section
    from laddpo.benchmarking.workload import pair_of_tokens

    wanted = config.benchmark
    pair = pair_of_tokens(wanted.card_tokens, wanted.shape.vocab_size - 2, config.seed, prompt_share=0.25)
    shelf, rows = Shelf(), []
    for setting in wanted.cards:
        model = shelf.get(config, machine, setting)
        step = whole_step(config, model, setting, pair)
        found = measure(step, model, machine.device, TIMES if setting.draws < 16 else 1, setting.gib)
        rows.append(
            {
                "setting": dataclasses.asdict(setting),
                **dataclasses.asdict(found),
                "predicted": predicted_peak(config, machine, setting, pair),
                "tokens": 2 * setting.draws * wanted.card_tokens,
            }
        )
        step = model = None  # a rival's copy goes now, and the model before the next one is made
    text, record = cards_section(rows)
    about = (
        f"One pair a step: prompt and either response together {wanted.card_tokens} tokens, reference pass and "
        "optimizer included. tokens/s counts those of all draws."
    )
    return f"{about}{_no_cap(machine)}\n\n{text}", record


def whole_step(config: RunConfig, model, setting: StepSetting, pair):
    """A function that runs one optimizer step; what it needs is made at its first call, so that it counts."""
    import torch

    from laddpo.core.optim import build_optimizer, clip_gradients
    from laddpo.models.adapters import trainable_parameters

    named, made = trainable_parameters(model), {}
    optim = config.optim

    def step() -> None:
        if not made:
            made["contender"] = contender_of(config, model, setting)
            made["optimizer"] = build_optimizer(setting.optimizer, named, tuple(optim.betas), optim.eps, 0.0)
        if hasattr(made["contender"], "prepare"):
            made["contender"].prepare([pair], setting.draws)
        made["contender"].step([pair], setting.draws)
        clip_gradients(list(named.values()), 1.0)
        with torch.no_grad():
            made["optimizer"].step()
        model.zero_grad(set_to_none=True)

    return step


def contender_of(config: RunConfig, model, setting: StepSetting):
    """Whose step is measured. Ours never makes its micro-steps smaller: what does not fit is reported."""
    from laddpo.benchmarking.contenders import BETA, Ours, Rival
    from laddpo.benchmarking.rivals import PublicLaddpo, TrlLike
    from laddpo.benchmarking.steps import fixed_budget
    from laddpo.models.denoiser import TransformerDenoiser

    mask, pad = config.benchmark.shape.vocab_size - 1, config.benchmark.shape.vocab_size - 2
    if setting.who == "public_laddpo":
        return Rival(PublicLaddpo(model, mask, pad, config.benchmark.max_length, BETA))
    if setting.who != "ours":
        return Rival(TrlLike(model, mask, pad, BETA, setting.who.removeprefix("trl_like_")))
    denoiser = TransformerDenoiser(model, mask, offload=setting.offload_activations)
    return Ours(model, denoiser, "stream", fixed_budget(setting.token_budget))


def rates_part(config: RunConfig, machine) -> tuple[str, dict]:
    """Packed micro-steps of dialogue lengths: operations per second against matrix products, and kernels by kind."""
    from laddpo.benchmarking.rates import matmul_rate
    from laddpo.benchmarking.steps_report import rates_section

    wanted, shelf = config.benchmark, Shelf()
    budgets = sorted({setting.token_budget for setting in wanted.rates})
    shape = setup_of(config, machine, StepSetting()).shape
    products = {tokens: matmul_rate(machine.device, machine.dtype, tokens, shape) for tokens in budgets}
    ceiling = max(products.values())
    rows = [rate_of(config, machine, shelf, setting) for setting in wanted.rates]
    text, record = rates_section(rows, products, ceiling)
    about = (
        f"Pairs of dialogue lengths, packed; {MICRO_STEPS} micro-steps or more, gradients without the optimizer. "
        "Counted are the operations that had to be done: no recomputation, no padding, no unpacking of weights."
    )
    predicted, record["predictions"] = _predictions(config, machine, rows, ceiling)
    return f"{about}\n\n{text}{predicted}", record


def rate_of(config: RunConfig, machine, shelf: Shelf, setting: StepSetting) -> dict:
    """One setting's time, operations per second, peak, and kernels by kind."""
    import numpy as np

    from laddpo.benchmarking.rates import micro_steps, where_time_goes, work_of
    from laddpo.benchmarking.steps import measure
    from laddpo.hardware.speed import forward_flops

    model, is_training = shelf.get(config, machine, setting), setting.work == "train"
    ours = contender_of(config, model, setting)
    pairs = _pairs_of_tokens(config, MICRO_STEPS * setting.token_budget, setting.draws)
    items = ours.items(pairs, setting.draws)
    ours.stored[ours.key(pairs, setting.draws)] = np.zeros((len(pairs), 2, setting.draws))

    def work() -> None:
        if not is_training:
            ours.reference(items)
            return
        ours.step(pairs, setting.draws)
        model.zero_grad(set_to_none=True)

    counted = work_of(items)
    found = _unless_uncompiled(lambda: measure(work, model, machine.device, TIMES, setting.gib), setting)
    flops = forward_flops(setup_of(config, machine, setting), counted) * (2 if is_training else 1)
    row = {"setting": dataclasses.asdict(setting), **dataclasses.asdict(found)}
    row |= {"tokens": counted.tokens, "useful_flops": flops}
    row["micro_steps"] = micro_steps(items, setting.token_budget)
    if not found.problem:
        row["flops_per_s"] = flops / found.median
        row["seconds_profiled"], row["kinds"] = where_time_goes(work, machine.device)
    return row


def agreement_part(config: RunConfig, machine) -> tuple[str, dict]:
    """Scores and gradients of the same random weights as they are, in 4 bits, and unpacked again."""
    from laddpo.benchmarking import agreement
    from laddpo.benchmarking.contenders import Ours
    from laddpo.benchmarking.steps_report import agreement_section
    from laddpo.core.budget import release_memory
    from laddpo.models.denoiser import TransformerDenoiser
    from laddpo.models.quantization import unpack_4bit

    wanted, shape, found = config.benchmark, config.benchmark.shape, {}
    pairs = dialogue_pairs(config, wanted.agreement_pairs, 5, shape.vocab_size)
    for name in ("as made", "4-bit", "4-bit, unpacked"):
        settings = quantization_of("none" if name == "as made" else "nf4")
        prepare = unpack_4bit if "unpacked" in name else None
        model = random_policy(config, machine, settings, prepare)
        denoiser = TransformerDenoiser(model, shape.vocab_size - 1)
        found[name] = agreement.observe(Ours(model, denoiser, "stream", wanted.token_budget), pairs, wanted.draws)
        del model, denoiser
        release_memory()
    text, record = agreement_section(
        {
            "storing in 4 bits": agreement.difference(found["4-bit"], found["as made"]),
            "the kernels alone": agreement.difference(found["4-bit"], found["4-bit, unpacked"]),
        },
        {name: observed["margin_at_start"] for name, observed in found.items()},
    )
    about = (
        f"{len(pairs)} pairs under {wanted.draws} draws, random weights: a trained model's error may differ. Which "
        "kernels bitsandbytes takes depends on the card and on the tokens of a micro-step."
    )
    return f"{about}\n\n{text}", record


def nano_part(config: RunConfig, machine) -> tuple[str, dict]:
    """The embedded model trained twice from the same seed: on the CPU, and on this device (or packed otherwise)."""
    import tempfile

    from laddpo.benchmarking.steps_report import nano_section
    from laddpo.benchmarking.twins import train_nano, trained

    steps = config.benchmark.nano_steps
    ways = {"CPU": ["hardware.device=cpu", "hardware.token_budget=4096"]}
    if machine.device.type == "cuda":
        ways["this GPU"] = ["hardware.device=cuda", "hardware.token_budget=4096"]
    else:
        ways["CPU, smaller micro-steps"] = ["hardware.device=cpu", "hardware.token_budget=512"]
    with tempfile.TemporaryDirectory(prefix="laddpo-") as scratch:
        folders = {name: Path(scratch) / str(number) for number, name in enumerate(ways)}
        for name, overrides in ways.items():
            data = folders[name].with_suffix(".data")  # each computes its own reference
            train_nano([*overrides, f"optim.max_train_steps={steps}"], folders[name], data)
        text, record = nano_section({name: trained(folder) for name, folder in folders.items()})
    return f"{steps} steps of llada_nano on the embedded pairs, float32, same seed.\n\n{text}", record


def predicted_peak(config: RunConfig, machine, setting: StepSetting, pair) -> int | None:
    """What the plan says of our step; it knows no others."""
    from laddpo.hardware.memory import Load, predict_memory

    if setting.who != "ours":
        return None
    longest = len(pair.prompt_ids) + len(pair.chosen_ids)
    everything = 2 * setting.draws * longest
    packed = max(longest, min(setting.token_budget // longest * longest, everything))
    load = Load(packed, mixed=False, exceeds=everything > setting.token_budget, alone=True)
    return predict_memory(setup_of(config, machine, setting), load).peak


def _pairs_of_tokens(config: RunConfig, tokens: int, draws: int) -> list:
    """The first random pairs that have so many tokens under all draws, and no fewer than two."""
    pairs, total = [], 0
    for pair in dialogue_pairs(config, max(2, 2 * tokens // 64), 7, config.benchmark.shape.vocab_size):
        pairs.append(pair)
        total += draws * (2 * len(pair.prompt_ids) + len(pair.chosen_ids) + len(pair.rejected_ids))
        if total >= tokens and len(pairs) >= 2:
            break
    return pairs


def _predictions(config: RunConfig, machine, rows: Sequence[dict], ceiling: float) -> tuple[str, list[dict]]:
    """Tokens per second on other cards, from the share of the matrix speed that training reached on this one."""
    from laddpo.benchmarking.steps_report import predictions_section
    from laddpo.hardware.speed import Device, predicted_tokens_per_s, training_passes

    training = [row for row in rows if row["setting"]["work"] == "train" and not row["problem"]]
    plain = [row for row in training if row["setting"]["quantization"] == "none"]
    if not (plain and config.benchmark.predicted):
        return "", []
    found = []
    for card in config.benchmark.predicted:
        for row in training:
            setting = StepSetting(**row["setting"])
            if setting.quantization == "none":
                continue
            alike = [other for other in plain if other["setting"]["compile"] == setting.compile]
            if not alike:
                continue
            near = min(alike, key=lambda other: _distance(other["setting"], row["setting"]))
            passes = training_passes(setup_of(config, machine, StepSetting(**near["setting"])))
            share = near["flops_per_s"] / ceiling * passes / 2  # of operations done, recomputed ones too
            setup = setup_of(config, machine, setting)
            speed = predicted_tokens_per_s(
                setup,
                row["useful_flops"] / 2 / row["tokens"],
                row["tokens"] / row["micro_steps"],
                Device(card.tflops * share, card.memory_gb_per_s),
            )
            found.append({"card": card.name, "setting": row["setting"], "share": share, "tokens_per_s": speed})
    return predictions_section(found, [dataclasses.asdict(card) for card in config.benchmark.predicted]), found


def _distance(other: dict, setting: dict) -> tuple[bool, int]:
    """How unlike two settings are, for one to stand for the other."""
    name = "gradient_checkpointing"
    return other[name] != setting[name], abs(other["token_budget"] - setting["token_budget"])


def _unless_uncompiled(work: Callable[[], Measured], setting: StepSetting) -> Measured:
    """What the work gives; where the compiler fails (it needs a C compiler, say), its reason as the problem."""
    from laddpo.benchmarking.steps import Measured

    try:
        return work()
    except RuntimeError as error:
        if not setting.compile:
            raise
        return Measured(problem=f"not compiled: {str(error).strip().partition(chr(10))[0]}")


def _no_cap(machine) -> str:
    return "" if machine.device.type == "cuda" else " This is a CPU, which knows no cap: everything runs."


PARTS = {"cards": cards_part, "rates": rates_part, "agreement": agreement_part, "nano": nano_part}
