"""The parts of the benchmark that run on any machine: memory, plan, speed, sampler."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

from laddpo.benchmarking import real_size
from laddpo.benchmarking.real_shapes import dialogue_pairs, random_policy
from laddpo.settings.schema import RunConfig, keywords


def about(config: RunConfig, machine) -> str:
    """What was measured on what."""
    import torch

    wanted, shape = config.benchmark, _shape(config)
    weights = "random weights" if wanted.weights == "random" else f"weights of {config.model.name}"
    return " ".join(
        [
            f"{time.strftime('%Y-%m-%d')}, {machine.name}, {machine.precision}, torch {torch.__version__}.",
            f"Model: {weights}{_stored(config)}, width {shape.d_model}, {shape.n_layers} blocks,",
            f"MLP {shape.mlp_hidden_size}, vocabulary {shape.vocab_size};",
            f"LoRA r={config.adapter.r} on {config.adapter.target_modules}.",
            f"Pairs: random tokens; prompt + response log-normal with mean {wanted.mean:g} and 99th percentile",
            f"{wanted.p99:g}, prompt {wanted.prompt_mean:g}, at most {wanted.max_length}; {wanted.pairs} pairs a step.",
            "A step is forward and backward, without the optimizer where nothing else is said. Peaks are counted on",
            "allocations.",
            "public_laddpo and trl_like are written anew from their descriptions (laddpo/benchmarking/rivals.py).",
        ]
    )


def memory_part(config: RunConfig, machine) -> tuple[str, dict]:
    """Peaks of all contenders on the longest of four pairs; ours also one sequence at a time, and checkpointed."""
    from laddpo.benchmarking.contenders import Ours
    from laddpo.benchmarking.measure import step_peak
    from laddpo.benchmarking.report import memory_section
    from laddpo.benchmarking.workload import longest_sequence

    drawn = [_pairs(config, seed)[0] for seed in range(4)]
    bench, pairs = _open(config, machine), [max(drawn, key=lambda pair: longest_sequence([pair]))]
    one, small = longest_sequence(pairs), f"stream, {ONE_SEQUENCE}"
    stream = bench.contenders["stream"]
    lean = Ours(bench.model, stream.denoiser, "stream", one, label=small)
    peaks = [
        step_peak(contender, bench.model, pairs, draws)
        for contender in [lean, *bench.contenders.values()]
        for draws in config.benchmark.memory_draws
    ]
    leaner = dataclasses.replace(lean, checkpointing=True, label=f"{small}, checkpointing")
    peaks += [step_peak(leaner, bench.model, pairs, draws) for draws in config.benchmark.memory_draws]
    text, record = memory_section(peaks, small)
    return f"One pair, {_lengths_text(pairs[0])}.\n\n{text}", record


def flat_part(config: RunConfig, machine) -> tuple[str, dict]:
    """Peaks of our passes from few to many draws, at a budget of one longest sequence and at the configured one."""
    from laddpo.benchmarking.contenders import Ours
    from laddpo.benchmarking.measure import pass_peaks
    from laddpo.benchmarking.report import flat_section

    wanted, bench = config.benchmark, _open(config, machine)
    denoiser = bench.contenders["stream"].denoiser
    tokens = max(16, wanted.token_budget // 8)  # so that 8 draws fill the configured budget
    pairs = [_pair_with_full_first_draw(tokens, _shape(config).vocab_size - 2)]
    budgets = {ONE_SEQUENCE: (tokens, 1), f"{wanted.token_budget} tokens": (wanted.token_budget, 8)}
    found = {
        name: {
            draws: pass_peaks(Ours(bench.model, denoiser, "stream", budget), pairs, draws)
            for draws in sorted({fewest, wanted.flat_draws})
        }
        for name, (budget, fewest) in budgets.items()
    }
    text, record = flat_section(found)
    about = f"One pair, {_lengths_text(pairs[0])}, whose first draw masks at least half of the response, so that the"
    return f"{about} head works on whole chunks of rows for every n.\n\n{text}", record


def plan_part(config: RunConfig, machine) -> tuple[str, dict]:
    """The memory plan against measured peaks, over rank, tokens and checkpointing."""
    from laddpo.benchmarking.measure import predicted_and_measured
    from laddpo.benchmarking.report import plan_section
    from laddpo.benchmarking.workload import pair_of_tokens
    from laddpo.hardware.planning import memory_setup
    from laddpo.models.blocks import checkpoint_blocks

    rows = []
    shape = _shape(config)
    for rank in config.benchmark.plan_ranks:
        adapter = dataclasses.replace(config.adapter, r=rank)
        model = dataclasses.replace(config.model, shape=shape)
        changed = dataclasses.replace(config, adapter=adapter, model=model)
        bench = _open(changed, machine)
        for checkpointing in (False, True):
            checkpoint_blocks(bench.model, checkpointing)
            setup = memory_setup(changed, machine.device.type, machine.precision)
            setup = dataclasses.replace(setup, checkpointing=checkpointing)
            for tokens in config.benchmark.plan_tokens:
                draws = max(1, tokens // 256)
                pair = pair_of_tokens(tokens // (2 * draws), shape.vocab_size - 2, seed=tokens)
                found = predicted_and_measured(bench.contenders["stream"], setup, pair, draws)
                names = ("tokens", "predicted", "measured")
                rows.append({"rank": rank, "checkpointing": checkpointing, **dict(zip(names, found, strict=True))})
    return plan_section(rows)


def speed_part(config: RunConfig, machine) -> tuple[str, dict]:
    """Pairs per second, interleaved; and by what ours are faster, one thing after the other."""
    import numpy as np

    from laddpo.benchmarking.contenders import Ours
    from laddpo.benchmarking.measure import median_ratio, timed_rounds
    from laddpo.benchmarking.report import causes_section, speed_section
    from laddpo.benchmarking.workload import longest_sequence

    wanted, bench = config.benchmark, _open(config, machine)
    batches = [_pairs(config, seed=1 + number) for number in range(wanted.rounds)]
    longest = max(map(longest_sequence, batches))
    denoiser, budget = bench.contenders["stream"].denoiser, wanted.token_budget
    contenders = [c for c in bench.contenders.values() if not (isinstance(c, Ours) and c.mode == "joint")]
    contenders += [
        Ours(bench.model, denoiser, "stream", longest, label=f"stream, {ONE_SEQUENCE}"),
        Ours(bench.model, denoiser, "stream", budget, checkpointing=True, label="stream, checkpointing"),
    ]
    seconds = timed_rounds(contenders, bench.model, batches, wanted.draws)
    rng = np.random.default_rng(config.seed)
    names = [contender.name for contender in contenders if contender.name in seconds]
    walls, processor = (
        {
            name: median_ratio(seconds[name + suffix], seconds["stream" + suffix], rng)
            for name in names
            if name != "stream"
        }
        for suffix in ("", "/cpu")
    )
    rates = {name: wanted.pairs * wanted.rounds / float(seconds[name].sum()) for name in names}
    text, record = speed_section(rates, walls, processor if machine.device.type == "cpu" else {}, "stream")
    later = median_ratio(seconds["stream"], seconds[FIRST_EPOCH], rng)
    causes, record["causes"] = causes_section(seconds, rng)
    failed = [contender for contender in contenders if contender.name not in seconds]
    fewer, record["one_draw"] = _with_one_draw(config, bench, failed, batches, rng)
    record["second_epoch_over_first"] = dataclasses.asdict(later)
    record["seconds"] = {name: values.tolist() for name, values in seconds.items()}
    interval = f"[{later.low:.2f}, {later.high:.2f}]"
    return (
        f"{text}{fewer}\n\n{causes}\n\n"
        f"A later epoch takes {later.median:.2f} {interval} of the first, which computes the reference.",
        record,
    )


def _with_one_draw(config: RunConfig, bench: Bench, failed: list, batches: list, rng) -> tuple[str, dict]:
    """Those for whom the memory was too small, against ours with one draw, which is as little as there can be."""
    from laddpo.benchmarking.measure import median_ratio, timed_rounds

    if not failed:
        return "", {}
    seconds = timed_rounds([bench.contenders["stream"], *failed], bench.model, batches, 1)
    lines, record = [], {}
    for contender in failed:
        said = f"{contender.name} ran out of memory with {config.benchmark.draws} draws"
        if contender.name not in seconds:
            lines.append(f"{said} and with one.")
            continue
        ratio = median_ratio(seconds[contender.name], seconds["stream"], rng)
        record[contender.name] = dataclasses.asdict(ratio)
        times = f"{ratio.median:.2f}x [{ratio.low:.2f}, {ratio.high:.2f}]"
        lines.append(f"{said}; with one draw it takes {times} the time of ours with one.")
    return "\n\n" + " ".join(lines), record


def sampler_part(config: RunConfig, machine) -> tuple[str, dict]:
    """The sampler's fast paths against the plain one, on test problems of the embedded task.

    The configured model answers where its files are on this machine, and its answers are graded; else random weights in
    the benchmark's shape answer random prompts, and only time is compared.
    """
    import numpy as np

    from laddpo.benchmarking import decoding
    from laddpo.benchmarking.report import sampler_section
    from laddpo.evaluation.answering import sampler_settings

    wanted = config.benchmark
    answer, stops, grade, about = _graded(config, machine) if _is_local(config) else _ungraded(config, machine)
    batch = min(wanted.sampler_batch, wanted.sampler_items)
    ways = decoding.ways(sampler_settings(config), batch)
    found = decoding.decode(answer, wanted.sampler_items, ways, batch, stops)
    text, record = sampler_section(found, decoding.PLAIN, grade, np.random.default_rng(config.seed))
    return f"{about}, {wanted.sampler_items} of them in batches of {batch}.\n\n{text}", record


def _stored(config: RunConfig) -> str:
    stored = config.quantization
    kind = f"{stored.bnb_4bit_quant_type} " * stored.load_in_4bit or "int8 " * stored.load_in_8bit
    return f" stored in {kind.strip()} where nothing else is said" if kind else ""


def _is_local(config: RunConfig) -> bool:
    from laddpo.inputs.policy import model_path

    return Path(model_path(config)).expanduser().is_dir()


def _graded(config: RunConfig, machine) -> tuple:
    from laddpo.evaluation.answering import open_task
    from laddpo.evaluation.sampling import generate
    from laddpo.inputs import policy
    from laddpo.inputs.data import encoder_for

    loaded = policy.load(config, machine)
    encoder = encoder_for(config.data, loaded.tokenizer)
    task = open_task(config, "arithmetic", "test", config.benchmark.sampler_items, with_shots=False)
    prompts = [encoder.encode_prompt(item.prompt) for item in task.items]
    keys = [item.id for item in task.items]

    def answer(picked, settings):
        chosen, names = [prompts[i] for i in picked], [keys[i] for i in picked]
        mask, autocast = loaded.denoiser.mask_token_id, loaded.denoiser.autocast
        return generate(loaded.model, chosen, settings, mask, encoder.stop_ids, names, autocast, encoder.eos_id)

    def grade(answers):
        texts = [encoder.decode_response(ids) for ids in answers]
        return task.grader.grade_all(texts, [item.answer for item in task.items])

    return answer, encoder.stop_ids, grade, f"Test problems of the embedded task, answered by {config.model.name}"


def _ungraded(config: RunConfig, machine) -> tuple:
    from laddpo.benchmarking.workload import random_model
    from laddpo.evaluation.sampling import generate
    from laddpo.inputs import policy

    shape = _shape(config)
    stored = policy.storage_of(config.quantization)
    model = random_model(keywords(shape), config.seed, machine.device, machine.dtype, stored)
    prompts = [pair.prompt_ids for n in range(config.benchmark.sampler_items) for pair in _pairs(config, n)[:1]]

    def answer(picked, settings):
        return generate(model, [prompts[i] for i in picked], settings, shape.vocab_size - 1)

    return answer, [], None, "Random prompts, answered by random weights, which never stop"


@dataclasses.dataclass(frozen=True)
class Bench:
    """The policy with its adapter, and everything that is measured around it, by name."""

    model: object
    contenders: dict


def _open(config: RunConfig, machine) -> Bench:
    """A fresh model with a fresh adapter: parts do not see one another's settings."""
    from laddpo.benchmarking.contenders import build_contenders
    from laddpo.inputs import policy

    wanted, shape = config.benchmark, _shape(config)
    if wanted.weights == "model":
        loaded = policy.load(config, machine)
        policy.make_trainable(config, loaded)
        model, mask, pad = loaded.model, loaded.denoiser.mask_token_id, loaded.tokenizer.pad_token_id
    else:
        model = random_policy(config, machine, config.quantization)
        mask, pad = shape.vocab_size - 1, shape.vocab_size - 2
    return Bench(model, build_contenders(model, mask, pad, wanted.max_length, wanted.token_budget))


def _shape(config: RunConfig):
    return config.benchmark.shape if config.benchmark.weights == "random" else config.model.shape


def _pair_with_full_first_draw(tokens: int, vocabulary: int):
    """A pair for which one draw is as much work as any of many: its first one masks half of the response or more."""
    from laddpo.benchmarking.workload import pair_of_tokens
    from laddpo.core.draws import ElboEstimator
    from laddpo.core.tasks import pair_item

    for seed in range(1000):
        pair = pair_of_tokens(tokens, vocabulary, seed, prompt_share=0.1)
        item = pair_item(pair, ElboEstimator(diffusion_samples=1), range(1))
        if all(2 * len(side[0].draw.masked) >= len(side[0].response_ids) for side in item.sides):
            return pair
    raise AssertionError("half of all seeds have such a draw")


def _lengths_text(pair) -> str:
    lengths = [len(ids) for ids in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)]
    return "prompt {}, chosen {}, rejected {} tokens".format(*lengths)


def _pairs(config: RunConfig, seed: int = 0) -> list:
    return dialogue_pairs(config, config.benchmark.pairs, seed, _shape(config).vocab_size)


ONE_SEQUENCE, FIRST_EPOCH = "one sequence at a time", "stream with reference pass"
TITLES = {
    **real_size.TITLES,
    "memory": "Peak memory of one step",
    "flat": "Memory over the number of draws",
    "plan": "Predicted and measured memory",
    "speed": "Speed",
    "sampler": "Speed of answering",
}
PARTS = {
    **real_size.PARTS,
    "memory": memory_part,
    "flat": flat_part,
    "plan": plan_part,
    "speed": speed_part,
    "sampler": sampler_part,
}
