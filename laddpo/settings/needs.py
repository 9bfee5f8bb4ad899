"""Settings that are read only together with others; each row says when, and why not otherwise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

from laddpo.core.losses import LOSSES, OPTION_READERS
from laddpo.preference.reading.unread import OF_SCORES
from laddpo.settings.conditions import (
    asks,
    generates,
    has_hub_judge,
    has_local_data,
    has_local_model,
    is_corpus,
    is_judged,
    learns_rows,
    lists_pairs,
    loss_is,
    sources_of,
    takes_steps,
)
from laddpo.settings.judge_schema import JudgeSettings, RatingSettings, fields_read, needs_gold
from laddpo.settings.loggers import wanted_trackers
from laddpo.settings.schema import RunConfig

ENCODING = ("data.template", "data.chat_template", "data.template_kwargs", "data.max_length", "data.truncation")
DIFFICULTY = ("data.operand_max", "data.terms", "data.width")
NEW_ADAPTER = (
    *("adapter.r", "adapter.lora_alpha", "adapter.lora_dropout", "adapter.target_modules"),
    *("adapter.use_rslora", "adapter.use_dora"),
)
HELD_OUT = ("evaluation.num_pairs", "evaluation.diffusion_samples")
MEASURED = (
    *("dpo.loss", "dpo.beta", "dpo.sft_weight", *(f"dpo.{option}" for option in OPTION_READERS)),
    *HELD_OUT,
    "evaluation.at_end",
)


@dataclass(frozen=True)
class Need:
    """Settings that are read only where `holds(stage, config)` is true; `why` says so to the user."""

    keys: tuple[str, ...]
    holds: Callable[[str, RunConfig], bool]
    why: str


def _of_judge(group: str, name: str) -> Need:
    """The row of one setting of a judge."""
    return Need(
        (f"{group}.judge.{name}",),
        lambda stage, config: name in fields_read(getattr(config, group).judge, group == "data"),
        f"the judge that {group}.judge.kind names does not read it",
    )


CORPUS = (*ENCODING, *DIFFICULTY, "data.problems", "data.habit")
OF_QUESTIONS = (
    *(
        "data.dataset_split",
        "data.dataset_config",
        "data.columns.",
        "data.follow_symlinks",
        "data.allow_empty_prompt",
        "data.allow_nul",
    ),
    "data.sampling.instruction",
)
LISTS_PAIRS = "variance.write_pairs only writes a list of pairs"
DECODINGS = {"evaluation": lambda config: config.evaluation, "data.sampling": lambda config: config.data.sampling}
OF_PARTS = {
    "memory": ("memory_draws",),
    "flat": ("flat_draws",),
    "plan": ("plan_ranks", "plan_tokens"),
    "long": ("long_answers",),
    "sft": ("sft_rows",),
    "sampler": ("sampler_items", "sampler_batch"),
    "cards": ("cards", "card_tokens"),
    "rates": ("rates", "predicted"),
    "agreement": ("agreement_pairs",),
    "nano": ("nano_steps",),
    "block": ("block_length", "block_answer", "block_draws"),
    "many": ("many_pairs",),
}
NEEDS = (
    Need(
        NEW_ADAPTER,
        lambda stage, config: config.adapter.kind == "lora" and config.adapter.path is None,
        "only a new LoRA adapter reads it; adapter.path brings an adapter with its own rank, scale and layers, and "
        "adapter=full has none",
    ),
    Need(
        ("quantization.bnb_4bit_",),
        lambda stage, config: config.quantization.load_in_4bit,
        "it is read only where weights are stored in 4 bits (quantization=nf4)",
    ),
    Need(
        ("quantization.llm_int8_threshold",),
        lambda stage, config: config.quantization.load_in_8bit,
        "it is read only where weights are stored in 8 bits (quantization=int8)",
    ),
    Need(
        ("logger.wandb_",),
        lambda stage, config: "wandb" in wanted_trackers(config.logger),
        "it is read only with logger.wandb=true (logger=wandb or logger=both)",
    ),
    Need(
        ("logger.project", "logger.name", "logger.group", "logger.tags"),
        lambda stage, config: bool(set(wanted_trackers(config.logger)) - {"tensorboard"}),
        "TensorBoard has no such names; name another tracker (logger=wandb, logger.trackers=[mlflow])",
    ),
    Need(
        ("run", "verify", "quantization.", "adapter."),
        lambda stage, config: stage != "prepare" or "onpolicy" in sources_of(config),
        "prepare reads it only where the model answers questions (data=onpolicy)",
    ),
    Need(
        ("evaluation.batch_size",),
        lambda stage, config: stage not in ("prepare", "precompute", "variance") or "onpolicy" in sources_of(config),
        "it is read only where the model answers questions (data=onpolicy)",
    ),
    Need(
        OF_QUESTIONS,
        lambda stage, config: config.data.source != "onpolicy" or config.data.dataset_name is not None,
        "it is read only for questions of a file or of the hub (data.questions)",
    ),
    Need(
        ("data.sampling.unseen_steps",),
        lambda stage, config: config.data.dataset_name is None and config.data.problems != "word_problems",
        "only questions of embedded arithmetic have such steps (data=onpolicy data.problems=arithmetic)",
    ),
    Need(
        ("data.revision",),
        lambda stage, config: not has_local_data(config),
        "only a dataset of the hub has revisions, and data.dataset_name is a local one",
    ),
    Need(
        ("model.revision",),
        lambda stage, config: not has_local_model(config),
        "only a model of the hub has revisions, and model.model_name_or_path is a local folder",
    ),
    Need(
        ("optim.round_decay",),
        lambda stage, config: stage == "train" and config.data.rounds > 1,
        "it is read only by train with several rounds (data=onpolicy rounds=3)",
    ),
    Need(
        ("optim.num_train_epochs",),
        lambda stage, config: config.optim.max_train_steps is None,
        "optim.max_train_steps decides when the run ends",
    ),
    Need(
        ("data.pairs_from", "data.min_gap", "data.margin_per_gap", *(f"data.columns.{name}" for name in OF_SCORES)),
        lambda stage, config: not learns_rows(stage, config),
        "sft on rows makes no pairs; sft.examples=chosen learns the chosen side of pairs",
    ),
    Need(
        ("stopping.patience",),
        lambda stage, config: config.evaluation.every_steps is not None and config.best_metric != "none",
        "early stopping looks at best_metric at evaluations during training; set evaluation.every_steps, and not "
        "best_metric=none",
    ),
    Need(
        ("sft.num_examples", "sft.mistake_share"),
        lambda stage, config: (
            is_corpus(stage, config) or (learns_rows(stage, config) and "arithmetic" in sources_of(config))
        ),
        "it is read only where sft trains on a generated corpus; data.random_sample_size takes a number of rows",
    ),
    Need(
        ("sft.fault_rate",),
        lambda stage, config: is_corpus(stage, config) and config.data.problems == "rubric",
        "it is read only where sft trains on the generated corpus of data=rubric",
    ),
    Need(
        ("evaluation.temperatures",),
        lambda stage, config: (
            config.evaluation.harness == "none"
            and bool(config.evaluation.tasks)
            and (stage == "evaluate" or (config.evaluation.at_end and not is_corpus(stage, config)))
        ),
        "test problems are answered only by evaluate, or at the end of a run on pairs or rows",
    ),
    Need(
        ("sft.drill_share",),
        lambda stage, config: is_corpus(stage, config) and config.data.problems == "word_problems",
        "it is read only where sft trains on generated word problems (data=word_problems)",
    ),
    Need(
        ("data.", *(f"-{key}" for key in CORPUS)),
        lambda stage, config: not is_corpus(stage, config),
        "a generated corpus does not read it (sft.examples=corpus)",
    ),
    Need(
        MEASURED,
        lambda stage, config: not is_corpus(stage, config),
        "a run on a generated corpus ends without an evaluation on pairs (sft.examples=corpus)",
    ),
    Need(
        (*MEASURED, "-evaluation.at_end"),
        lambda stage, config: stage != "sft" or config.evaluation.at_end or learns_rows(stage, config),
        "sft measures pairs only at its end (evaluation.at_end=true)",
    ),
    Need(
        tuple(name for name in MEASURED if name.startswith("dpo.")),
        lambda stage, config: not learns_rows(stage, config),
        "sft on rows measures their likelihood and no preference",
    ),
    Need(
        ("dpo.diffusion_samples",),
        lambda stage, config: stage != "sft" or config.sft.diffusion_samples is None,
        "sft reads it only with sft.diffusion_samples=null; write sft.diffusion_samples",
    ),
    *(
        Need(
            (f"dpo.{option}",),
            lambda stage, config, option=option: loss_is(lambda row: option in row.reads, config),
            f"only dpo.loss={' or '.join(readers)} reads it",
        )
        for option, readers in OPTION_READERS.items()
        if option != "label_smoothing"  # whose 0 fits every loss; laddpo/settings/checks.py refuses the rest
    ),
    Need(
        ("dpo.common_random_numbers", "stopping.max_chosen_fall"),
        lambda stage, config: loss_is(lambda row: row.needs_reference, config),
        "it is about the reference, and this dpo.loss compares with none",
    ),
    Need(
        ("dpo.difference_focus", "dpo.shared_counts", "dpo.shared_masks"),
        lambda stage, config: loss_is(lambda row: row.takes_pairs, config),
        "a completion has no other side; only losses of pairs read it",
    ),
    Need(
        ("dpo.focus",),
        lambda stage, config: config.dpo.focus != "difference" or loss_is(lambda row: row.takes_pairs, config),
        "a completion has no other side to differ from; dpo.focus=surprise or none fits it",
    ),
    Need(
        ("dpo.difference_focus",),
        lambda stage, config: config.dpo.focus == "difference",
        "it is read only with dpo.focus=difference",
    ),
    Need(
        ("dpo.surprise_focus", "dpo.surprise_share", "dpo.surprise_draws"),
        lambda stage, config: config.dpo.focus == "surprise",
        "it is read only with dpo.focus=surprise",
    ),
    Need(
        ("dpo.kl_baseline",),
        lambda stage, config: loss_is(lambda row: row.has_baseline, config),
        f"only dpo.loss={' or '.join(name for name, row in LOSSES.items() if row.has_baseline)} reads it",
    ),
    Need(
        DIFFICULTY,
        generates,
        "it is the difficulty of generated arithmetic, and none is generated here",
    ),
    Need(
        ("data.habit",),
        lambda stage, config: "arithmetic" in sources_of(config) or is_corpus(stage, config),
        "it is read only for generated pairs and corpora (data=arithmetic, sft.examples=corpus)",
    ),
    Need(
        ("data.problems",),
        lambda stage, config: (
            is_corpus(stage, config) or ("onpolicy" in sources_of(config) and config.data.dataset_name is None)
        ),
        "it is read only for embedded questions and corpora (data=onpolicy, sft.examples=corpus)",
    ),
    Need(
        ("evaluation.dataset_name", "evaluation.dataset_split"),
        asks,
        "it names the rows of a task, and evaluation.tasks has none that reads a file",
    ),
    Need(
        ("evaluation.shots_from",),
        lambda stage, config: bool(config.evaluation.shots) and asks(stage, config),
        "it is read only with evaluation.shots and a task that reads a file",
    ),
    Need(
        ("evaluation.shots",),
        lambda stage, config: bool(config.evaluation.tasks),
        "evaluation.tasks names no task",
    ),
    Need(
        ("evaluation.grader",),
        lambda stage, config: asks(stage, config, "takes_grader"),
        "it is read only by the task file (evaluation=file)",
    ),
    Need(
        ("evaluation.judge.",),
        lambda stage, config: is_judged(config) and (stage == "evaluate" or config.evaluation.at_end),
        "it is read only where answers are judged (evaluation=winrate, at the end of a run or by evaluate)",
    ),
    *(
        _of_judge(group, item.name)
        for group, kind in (("evaluation", JudgeSettings), ("data", RatingSettings))
        for item in fields(kind)
        if item.name not in ("kind", "revision")
    ),
    *(
        Need(
            (f"{group}.judge.revision",),
            lambda stage, config, group=group: has_hub_judge(getattr(config, group).judge),
            "only a reward model of the hub has revisions",
        )
        for group in ("evaluation", "data")
    ),
    Need(
        ("data.pair_by",),
        lambda stage, config: config.data.judge.kind != "none",
        "it is read only where a judge rates answers (data.judge.kind); without one right answers are preferred over "
        "wrong ones",
    ),
    Need(
        ("data.grader",),
        lambda stage, config: config.data.judge.kind == "none" or needs_gold(config.data.judge),
        "data.judge says which answers are better; only its rule `right` reads it",
    ),
    *(
        Need(
            (f"{group}.steps",),
            lambda stage, config, place=place: takes_steps(place(config), config),
            f"it is read only with {group}.confidence_threshold=null",
        )
        for group, place in DECODINGS.items()
    ),
    Need(
        ("evaluation.elbo_draws", "evaluation.harness_dir"),
        lambda stage, config: config.evaluation.harness != "none",
        "it is read only by lm-evaluation-harness (evaluation.harness=lm_eval)",
    ),
    Need(
        HELD_OUT,
        lambda stage, config: stage != "evaluate" or config.run is not None,
        "pairs are measured only of a run (run=)",
    ),
    Need(
        ("export.dtype", "export.shard_gib", *ENCODING),
        lambda stage, config: stage != "export" or not config.export.adapter_only,
        "an adapter alone is copied as it is (export.adapter_only=true)",
    ),
    Need(
        ("export.private",),
        lambda stage, config: config.export.push_to_hub is not None,
        "it is read only with export.push_to_hub",
    ),
    Need(
        ("variance.pairs",),
        lambda stage, config: config.variance.pairs_file is None,
        "variance.pairs_file names the pairs",
    ),
    Need(
        ("variance.", "-variance.pairs", "-variance.write_pairs", "dpo.", "-dpo.loss", "optim."),
        lambda stage, config: not lists_pairs(stage, config),
        LISTS_PAIRS,
    ),
    Need(
        ("adapter.", "quantization."),
        lambda stage, config: not lists_pairs(stage, config) or "onpolicy" in sources_of(config),
        LISTS_PAIRS,
    ),
    Need(
        ("optim.betas", "optim.eps"),
        lambda stage, config: stage != "benchmark" or bool({"cards", "rates"} & set(config.benchmark.parts)),
        "it is read only by the parts cards and rates of benchmark.parts",
    ),
    *(
        Need(
            tuple(f"benchmark.{name}" for name in names),
            lambda stage, config, part=part: part in config.benchmark.parts,
            f"it is read only by the part {part} of benchmark.parts",
        )
        for part, names in OF_PARTS.items()
    ),
)
