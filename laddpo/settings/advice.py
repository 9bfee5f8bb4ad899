"""Settings that are possible and unlikely to be meant: each is one note before a run."""

from __future__ import annotations

from laddpo.core.draws import ESTIMATORS
from laddpo.core.losses import LOSSES
from laddpo.core.noise import COUNT_SCHEDULES
from laddpo.settings.schema import DpoSettings, RunConfig


def unlikely_settings(config: RunConfig, stage: str = "train") -> list[str]:
    """What of a stage runs, but probably not as wished: one sentence for each setting, by name. Never an error."""
    recommended, dpo, optim, name = config.model.recommended, config.dpo, config.optim, config.model.name
    is_lora = config.adapter.kind == "lora"
    rate = recommended.learning_rate.lora if is_lora else recommended.learning_rate.full
    is_from_scratch = stage == "sft" and config.sft.from_scratch  # what is recommended is for trained weights
    is_large = config.model.shape.n_layers >= 16
    is_arithmetic, kind = config.data.source == "arithmetic", "LoRA" if is_lora else "full fine-tuning"
    repeats_masks = optim.num_train_epochs > dpo.mask_rounds and optim.max_train_steps is None
    notes = [
        (
            not LOSSES[dpo.loss].is_per_token and not recommended.beta / 5 <= dpo.beta <= recommended.beta * 5,
            f"dpo.beta={dpo.beta:g} is far from what suits {name} ({recommended.beta:g}): too small lets the policy "
            "leave the reference, too large holds it still.",
        ),
        (
            not is_from_scratch and not rate / 9 <= optim.learning_rate <= rate * 9,
            f"optim.learning_rate={optim.learning_rate:g} is far from what suits {name} with {kind} ({rate:g}).",
        ),
        (
            is_arithmetic and is_large,
            f"data.source=arithmetic is the small embedded task, from which {name} learns nothing useful; name real "
            "pairs, for instance data=hh_rlhf.",
        ),
        (
            is_arithmetic and dpo.beta < 0.3 and dpo.loss != "orpo",  # where it is the weight of a term
            f"dpo.beta={dpo.beta:g} with data.source=arithmetic: so short an answer has a likelihood of a few nats, "
            "and a beta below 0.3 made a small model collapse; near 1 suits it.",
        ),
        (
            optim.max_train_steps is not None and optim.max_train_steps < optim.num_warmup_steps,
            f"optim.max_train_steps={optim.max_train_steps} ends within the warm-up of optim.num_warmup_steps="
            f"{optim.num_warmup_steps}: the learning rate never reaches its value.",
        ),
        (
            is_lora and config.adapter.use_dora,
            "adapter.use_dora=true keeps PEFT's arithmetic: a step takes about twice the memory that the plan counts, "
            "and twice the time (llada_nano, bf16).",
        ),
        (
            repeats_masks,
            f"optim.num_train_epochs={optim.num_train_epochs:g} with dpo.mask_rounds={dpo.mask_rounds}: later epochs "
            "see the same masks again and may fit their noise; raise dpo.mask_rounds"
            f"{' (each costs one reference pass)' if LOSSES[dpo.loss].needs_reference else ''}.",
        ),
        (
            LOSSES[dpo.loss].is_per_token and dpo.beta == recommended.beta,
            f"dpo.loss={dpo.loss} scores per token, where beta is usually larger by the response length; "
            f"dpo.beta={dpo.beta:g} was chosen for sums.",
        ),
        (
            "gsm8k_preferences" in (config.data.dataset_name or "") and "gsm8k" in config.evaluation.tasks,
            "evaluation.tasks has gsm8k, and data.dataset_name holds pairs made from its test questions: that accuracy "
            "would mean nothing; build pairs from training questions.",
        ),
        (
            is_large and config.hardware.precision == "fp32",
            f"hardware.precision=fp32 doubles the memory and more than doubles the time of bf16 for {name}.",
        ),
    ]
    return [note for applies, note in [*notes, *_notes_on_draws(dpo)] if applies]


def _notes_on_draws(dpo: DpoSettings) -> list[tuple[bool, str]]:
    """Whether each note on the masked draws applies, and the note."""
    law, schedule, n = ESTIMATORS[dpo.estimator], COUNT_SCHEDULES[dpo.schedule], dpo.diffusion_samples
    fitting = [name for name, row in ESTIMATORS.items() if row.together > 1 and n % row.together == 0]
    cure = f"; {n} draws suit dpo.estimator={' or '.join(fitting)}" if fitting else ""
    return [
        (bool(law.note), f"dpo.estimator={dpo.estimator} {law.note}"),
        (bool(schedule.note), f"dpo.schedule={dpo.schedule} {schedule.note}"),
        (
            bool(n % law.together) and not law.refuses_parts,
            f"dpo.diffusion_samples={n} is no multiple of the {law.together} draws that "
            f"dpo.estimator={dpo.estimator} makes together; a multiple has less noise per draw{cure}.",
        ),
        (
            not dpo.common_random_numbers,
            "dpo.common_random_numbers=false makes the score far noisier (about 100 times in variance on llada_nano, "
            "data/measurements/study_nano_untuned.md); it exists for comparison.",
        ),
    ]
