"""The whole configuration: its type, where its yaml files lie, and every check that needs no torch and no weights.

`find_problems(config)` returns all contradictions together, each naming the key, the value found, what was expected and
what to do; `unlikely_settings(config)` returns what runs correctly but probably not as wished. `check_machine(config)`
looks at the machine (it imports torch) and is called only by stages that run the model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator

from laddpo.core.draws import ESTIMATORS, exact_draws
from laddpo.core.losses import LOSSES
from laddpo.errors import UserError
from laddpo.models import block_length
from laddpo.models.families import FAMILIES
from laddpo.models.linears import match_linears, unknown_target
from laddpo.preference.reading.splits import has_file_name
from laddpo.preference.sources import SOURCES
from laddpo.problems.tasks import TASKS, embedded
from laddpo.settings.data_checks import file_problems, onpolicy_problems, unread_settings
from laddpo.settings.decoding_checks import decoding_problems, room_problems
from laddpo.settings.hardware_checks import device_problems, step_problems
from laddpo.settings.judge_checks import judge_problems
from laddpo.settings.ranges import CHOICES, as_written, single_problems, unknown_name
from laddpo.settings.schema import RunConfig


def find_problems(
    config: RunConfig, ignore: Collection[str] = frozenset(), given: Collection[str] = frozenset()
) -> list[str]:
    """Everything wrong with the settings, one sentence or two each; an empty list when nothing is.

    `ignore` names keys already known to be wrong: they are not checked again. `given` names those that the command
    line set itself, which the others are not to be blamed for.
    """
    single = [problem for problem in single_problems(config) if problem.split(" ", 1)[0] not in ignore]
    wrong_keys = {problem.split(" ", 1)[0] for problem in single} | set(ignore)
    return [*single, *_contradictions(config, wrong_keys, given)]


def check(config: RunConfig) -> RunConfig:
    """The same configuration, or `UserError` with all its problems."""
    problems = find_problems(config)
    if problems:
        raise UserError(*problems)
    return config


def _contradictions(config: RunConfig, wrong_keys: set[str], given: Collection[str]) -> Iterator[str]:
    """Problems between settings, leaving out those that speak of a key whose own value is already refused."""
    parts = (_weights, _lengths, _objective, _data, _schedule, device_problems, _decoding, step_problems)
    found = (problem for part in parts for problem in part(config))
    found = (*found, *judge_problems(config))
    late = (_length, unread_settings, file_problems)
    for problem in (*found, *(problem for check in late for problem in check(config, given))):
        if not any(re.search(rf"(?<![\w.]){re.escape(key)}(?![\w.])", problem) for key in wrong_keys):
            yield problem


def _weights(config: RunConfig) -> Iterator[str]:
    quantization, adapter, model = config.quantization, config.adapter, config.model
    if quantization.load_in_4bit and quantization.load_in_8bit:
        yield (
            "quantization.load_in_4bit and quantization.load_in_8bit are both true; a weight is stored in one way; "
            "choose one: quantization=nf4 (smallest) or quantization=int8."
        )
    elif (quantization.load_in_4bit or quantization.load_in_8bit) and adapter.kind == "full":
        which = "load_in_4bit" if quantization.load_in_4bit else "load_in_8bit"
        yield (
            f"adapter.kind is 'full' and quantization.{which} is true; quantized weights cannot be trained; "
            "use adapter=lora, or quantization=none."
        )
    if quantization.bnb_4bit_compute_dtype is not None and not quantization.load_in_4bit:
        yield (
            f"quantization.bnb_4bit_compute_dtype is {quantization.bnb_4bit_compute_dtype!r} but nothing is loaded in "
            "4 bits; use quantization=nf4, or quantization.bnb_4bit_compute_dtype=null."
        )
    if adapter.kind == "full" and adapter.path is not None:
        yield (
            f"adapter.path is {adapter.path!r} and adapter.kind is 'full'; an adapter is loaded only into a LoRA run; "
            "use adapter=lora, or merge it first with python -m laddpo.export."
        )
    if adapter.kind == "lora" and adapter.lora_dropout != 0:
        yield (
            f"adapter.lora_dropout is {adapter.lora_dropout:g}; expected 0: a pair's gradient is summed over several "
            "passes, which must see the same network; use more optim.weight_decay or fewer steps instead."
        )
    is_new = adapter.kind == "lora" and adapter.path is None  # one from elsewhere brings its own layers
    if is_new and adapter.r > (width := model.shape.d_model):
        yield (
            f"adapter.r is {adapter.r} and {model.name} is {width} wide (model.shape.d_model); every linear layer has "
            f"that on one side, so no higher rank means anything; set adapter.r={width} or lower, or adapter=full."
        )
    layout = FAMILIES[model.architecture].layout
    if is_new and not match_linears(adapter.target_modules, layout.names(model.shape)):
        yield unknown_target(adapter.target_modules, layout)
    yield from block_length.setting_problems(model.architecture, model.attention, model.block_length)
    if model.shape.head_dim is None and model.shape.d_model % model.shape.n_heads:
        yield (
            f"model.shape.d_model is {model.shape.d_model}; expected a multiple of "
            f"model.shape.n_heads={model.shape.n_heads}; see the model's config.json."
        )


def _lengths(config: RunConfig) -> Iterator[str]:
    longest, limit, name = config.data.max_length, config.model.shape.max_sequence_length, config.model.name
    if longest > limit:
        yield (
            f"data.max_length is {longest}; {name} knows {limit} positions (model.shape.max_sequence_length); "
            f"set data.max_length={limit} or lower."
        )
    if longest < SHORTEST_PAIR:
        yield (
            f"data.max_length is {longest}; prompt and template take about {SHORTEST_PAIR - 4} tokens, so no response "
            f"would be left; set data.max_length={config.model.recommended.max_length}, or at least {SHORTEST_PAIR}."
        )
    budget = config.hardware.token_budget
    if budget is not None and budget < longest <= limit:
        yield (
            f"hardware.token_budget is {budget} and data.max_length is {longest}; a micro-step must hold the longest "
            f"sequence; raise hardware.token_budget to {longest} or more, or lower data.max_length."
        )
    if config.evaluation.tasks:
        yield from room_problems(config.evaluation, "evaluation", limit, name)


def _objective(config: RunConfig) -> Iterator[str]:
    dpo = config.dpo
    loss, smoothing = LOSSES.get(dpo.loss), dpo.label_smoothing
    if loss and smoothing > 0 and not loss.takes_label_smoothing:
        takers = [name for name, row in LOSSES.items() if row.takes_label_smoothing]
        yield (
            f"dpo.label_smoothing is {smoothing:g} and dpo.loss is {dpo.loss!r}, which has no such term; "
            f"set dpo.label_smoothing=0, or dpo.loss to one of {', '.join(takers)}."
        )
    if loss and loss.smoothing_below is not None and smoothing >= loss.smoothing_below:
        yield (
            f"dpo.label_smoothing is {smoothing:g} with dpo.loss={dpo.loss}; expected less than "
            f"{loss.smoothing_below:g}; 0.1 is usual."
        )
    if loss and loss.smoothing_above is not None and smoothing <= loss.smoothing_above:
        yield (
            f"dpo.label_smoothing is {smoothing:g} with dpo.loss={dpo.loss}, whose loss there is infinite; expected "
            f"more than {loss.smoothing_above:g}; 0.001 is the paper's value."
        )
    if loss and loss.has_sft_term and dpo.sft_weight > 0:
        own = "weighted by dpo.cpo_alpha" if "cpo_alpha" in loss.reads else "with weight 1"
        yield (
            f"dpo.sft_weight is {dpo.sft_weight:g} and dpo.loss is {dpo.loss!r}, which has that term itself, {own}; "
            "set dpo.sft_weight=0."
        )
    n, law = dpo.diffusion_samples, ESTIMATORS.get(dpo.estimator)
    if law and law.refuses_parts and n > 1 and (rest := n % law.together):
        fitting = " or ".join(str(m) for m in (n - rest, n - rest + law.together) if m)
        yield (
            f"dpo.diffusion_samples is {n} with dpo.estimator={dpo.estimator}, which makes {law.together} draws "
            f"together; expected 1 or a multiple of {law.together}; set dpo.diffusion_samples={fitting}."
        )
    if law and law.is_exact:
        yield from _exact(n, config.model.known_block_length)
    if law and law.is_exact and dpo.mask_rounds > 1:
        yield (
            f"dpo.mask_rounds is {dpo.mask_rounds} with dpo.estimator=exact, whose draws are all masks in every round; "
            "set dpo.mask_rounds=1."
        )
    if dpo.schedule == "one_per_draw" and not config.model.known_block_length:
        yield (
            "dpo.schedule is 'one_per_draw', which is about the blocks of a block model, and this model is "
            "bidirectional; use dpo.schedule=iid."
        )
    favoured = {"difference": dpo.difference_focus, "surprise": dpo.surprise_focus}.get(dpo.focus, 0.0)
    if law and not law.picks and (favoured or dpo.count_tilt):
        yield (
            f"dpo.focus is {dpo.focus} ({favoured:g}) and dpo.count_tilt is {dpo.count_tilt:g} with "
            f"dpo.estimator={dpo.estimator}, which picks neither tokens nor counts; set dpo.focus=none and "
            "dpo.count_tilt=0, or another dpo.estimator."
        )
    if dpo.focus == "surprise" and loss and not loss.needs_reference:
        yield (
            f"dpo.focus is 'surprise', which asks the reference how likely each token is, and dpo.loss={dpo.loss} "
            f"compares with no reference; use dpo.focus={'difference' if loss.takes_pairs else 'none'}."
        )
    if dpo.focus == "surprise" and dpo.surprise_draws % 2:
        yield (
            f"dpo.surprise_draws is {dpo.surprise_draws}; draws are pairs of a mask and its inverse, so that no token "
            f"stays unseen; expected an even number; set dpo.surprise_draws={dpo.surprise_draws + 1}."
        )


LONGEST_EXACT = 8  # tokens of a block: 255 draws


def _exact(draws: int, block_length: int | None) -> Iterator[str]:
    if block_length is None:
        yield (
            "dpo.estimator is 'exact' and the model is bidirectional: a response has too many masks; it serves block "
            "models. Use dpo.estimator=balanced."
        )
    elif block_length > LONGEST_EXACT:
        yield (
            f"dpo.estimator is 'exact' and a block has {block_length} tokens, which have too many masks; expected at "
            f"most {LONGEST_EXACT}. Use dpo.estimator=balanced."
        )
    elif draws != exact_draws(block_length):
        yield (
            f"dpo.diffusion_samples is {draws} with dpo.estimator=exact, which takes all {exact_draws(block_length):,} "
            f"masks of a block of {block_length}; set dpo.diffusion_samples={exact_draws(block_length)}, or "
            "dpo.estimator=balanced."
        )


def _data(config: RunConfig) -> Iterator[str]:
    data = config.data
    if data.source in SOURCES and SOURCES[data.source].needs_dataset and not data.dataset_name:
        yield (
            f"data.dataset_name is not set and data.source is {data.source!r}; expected a local file or a hub id; "
            "add data.dataset_name=path/to/pairs.jsonl."
        )
    if data.source == "mixture" and not data.mixture:
        yield (
            "data.mixture is empty and data.source is 'mixture'; expected the sources to mix; write "
            "data.mixture=[{source:hh_rlhf,weight:2},{dataset_name:my_pairs.jsonl,weight:1}]."
        )
    if data.mixture and data.source != "mixture":
        yield (
            f"data.mixture lists {len(data.mixture)} sources and data.source is {data.source!r}, which reads one; "
            "use data=mixture, or data.mixture=[]."
        )
    if data.validation_fraction + data.test_fraction > 1:
        yield (
            f"data.test_fraction is {data.test_fraction:g} and data.validation_fraction is "
            f"{data.validation_fraction:g}; together they leave nothing to train on; lower one of them."
        )
    for key in ("chat_template", "template_kwargs") if data.template == "plain" else ():
        if value := getattr(data, key):
            yield (
                f"data.{key} is {as_written(value)} and data.template is 'plain', which uses no template; leave one of "
                "them out."
            )
    yield from _mixture_parts(config)
    yield from onpolicy_problems(config)
    if data.source == "arithmetic" and data.operand_max >= 10**data.width:
        yield (
            f"data.operand_max is {data.operand_max} and data.width is {data.width}; numbers are written with that "
            f"many digits; set data.operand_max={10**data.width - 1} or lower, or a larger data.width."
        )


def _mixture_parts(config: RunConfig) -> Iterator[str]:
    """What each part of a mixture may be: as the settings of `data` with the same names."""
    for index, part in enumerate(config.data.mixture):
        key = f"data.mixture[{index}]"
        if part.source not in SOURCES:
            yield unknown_name(f"{key}.source", part.source, SOURCES)
        elif SOURCES[part.source].needs_dataset and not part.dataset_name:
            yield (
                f"{key}.dataset_name is not set and its source is {part.source!r}; expected a local file or a hub id; "
                "add dataset_name to that part."
            )
        if part.format not in CHOICES["data.format"]:
            yield unknown_name(f"{key}.format", part.format, CHOICES["data.format"])
        if not 0 < part.weight < math.inf:
            yield (
                f"{key}.weight is {part.weight:g}; expected a number above 0; rows are taken in proportion to the "
                "weights."
            )


def _schedule(config: RunConfig) -> Iterator[str]:
    optim = config.optim
    if config.dry_run and config.resume != "false":
        yield (
            f"dry_run is true and resume is {config.resume!r}; a dry run cannot resume a run and cannot be resumed; "
            "leave one of them out."
        )
    if len(optim.betas) != 2 or not all(0 <= b < 1 for b in optim.betas):
        yield f"optim.betas is {optim.betas}; expected two numbers from 0 to below 1; [0.9,0.95] is usual."


def _length(config: RunConfig, given: Collection[str]) -> Iterator[str]:
    """Epochs and steps both set by the command line: only one of them can say when a run ends."""
    optim = config.optim
    if optim.max_train_steps is not None and EPOCHS.intersection(given) and STEPS.intersection(given):
        epochs, steps = f"{optim.num_train_epochs:g}", optim.max_train_steps
        found = f"optim.num_train_epochs is {epochs} and optim.max_train_steps is {steps}"
        yield f"{found}; both say when the run ends; leave one of them out."


def _decoding(config: RunConfig) -> Iterator[str]:
    evaluation = config.evaluation
    made_here = embedded(evaluation.tasks)
    of_rows = [name for name in evaluation.tasks if name not in made_here]
    for name in evaluation.tasks if evaluation.harness == "none" else ():
        if name not in TASKS:
            yield unknown_name("evaluation.tasks", name, TASKS)
        elif TASKS[name].needs_file and evaluation.dataset_name is None:
            yield (
                f"evaluation.tasks has {name} and evaluation.dataset_name is not set; expected "
                f"{TASKS[name].needs_file}; add evaluation.dataset_name=path/to/questions.jsonl."
            )
    if evaluation.dataset_name is not None and len(of_rows) > 1:
        yield (
            f"evaluation.dataset_name is {evaluation.dataset_name!r} with the tasks {', '.join(of_rows)}; one file "
            "holds the rows of one task; set evaluation.dataset_name=null, or name one task."
        )
    if evaluation.dataset_split and has_file_name(evaluation.dataset_name or ""):
        yield (
            f"evaluation.dataset_split is {evaluation.dataset_split!r} and evaluation.dataset_name is the file "
            f"{evaluation.dataset_name!r}, which has no splits; leave evaluation.dataset_split out."
        )
    yield from decoding_problems(evaluation, "evaluation", config.model.known_block_length)


SHORTEST_PAIR = 24  # tokens: the template of one turn, a short prompt, a token of response and its terminator
EPOCHS = frozenset({"optim.num_train_epochs", "model.recommended.num_train_epochs"})
STEPS = frozenset({"optim.max_train_steps", "model.recommended.max_train_steps"})
