"""The parts of the benchmark about time: pairs a second of all contenders, and the sampler's fast paths.

Plain is the public sampler: a fixed number of steps for every answer, everything computed again in each.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from laddpo.benchmarking.alike import ALIKE_HEADER, BEST, CHECKPOINTED, FIRST_EPOCH, TRL, alike_section, ratio_text
from laddpo.benchmarking.contenders import MEASURED, Ours
from laddpo.benchmarking.measure import Ratio, median_ratio, timed_rounds
from laddpo.benchmarking.workload import Bench, Workbench, longest_sequence, random_model
from laddpo.core.budget import answer_budget
from laddpo.evaluation.answering import open_task, sampler_settings
from laddpo.evaluation.sampling import SamplerSettings, generate, until_stop
from laddpo.inputs import policy
from laddpo.inputs.data import encoder_for
from laddpo.results.stats import compare
from laddpo.results.tables import markdown
from laddpo.settings.schema import ModelSettings, keywords

ONE_SEQUENCE = "one sequence at a time"
CAUSES = (  # slower, faster, what the second does that the first does not
    ("public_laddpo", "trl_like (full logits)", "rows in one batch, padded to the pair's longest alone"),
    ("trl_like (full logits)", TRL, "the head on scored rows alone"),
    (TRL, BEST, "the rival's reference from a store, and no padding"),
    (TRL, FIRST_EPOCH, "packing without padding, streamed"),
    (FIRST_EPOCH, "stream", "the reference from the store"),
    (CHECKPOINTED, "stream", "no recomputation"),
    ("stream, one sequence at a time", "stream", "many sequences in a micro-step"),
)


def speed_part(bench: Workbench) -> tuple[str, dict]:
    """Pairs per second, interleaved; and by what ours are faster, one thing after the other."""
    wanted, opened = bench.settings, bench.open()
    batches = [bench.pairs(1 + number) for number in range(wanted.rounds)]
    longest = max(map(longest_sequence, batches))
    denoiser, budget = opened.contenders["stream"].denoiser, wanted.token_budget
    contenders = [c for c in opened.contenders.values() if not (isinstance(c, Ours) and c.mode == "joint")]
    contenders += [
        Ours(opened.model, denoiser, "stream", longest, label=f"stream, {ONE_SEQUENCE}"),
        Ours(opened.model, denoiser, "stream", budget, checkpointing=True, label=CHECKPOINTED),
    ]
    seconds = timed_rounds(contenders, opened.model, batches, wanted.draws)
    rng = np.random.default_rng(bench.seed)
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
    text, record = speed_section(rates, walls, processor if bench.machine.device.type == "cpu" else {}, "stream")
    later = median_ratio(seconds["stream"], seconds[FIRST_EPOCH], rng)
    alike, record["alike"] = alike_section(seconds, rng)
    causes, record["causes"] = causes_section(seconds, rng)
    failed = [contender for contender in contenders if contender.name not in seconds]
    fewer, record["one_draw"] = _with_one_draw(opened, wanted.draws, failed, batches, rng)
    record["second_epoch_over_first"] = asdict(later)
    record["seconds"] = {name: values.tolist() for name, values in seconds.items()}
    interval = f"[{later.low:.2f}, {later.high:.2f}]"
    return (
        f"Like with like:\n\n{markdown(ALIKE_HEADER, alike)}\n\n{text}{fewer}\n\n{causes}\n\n"
        f"A later epoch takes {later.median:.2f} {interval} of the first, which computes the reference.",
        record,
    )


def speed_section(
    rates: Mapping[str, float], ratios: Mapping[str, Ratio], processor: Mapping[str, Ratio], ours: str
) -> tuple[str, dict[str, Any]]:
    """Pairs per second, and the time of each contender over ours on the same pairs."""
    rows = [
        [name, f"{rate:.3g}", _ratio(ratios.get(name)), _ratio(processor.get(name))] for name, rate in rates.items()
    ]
    header = ["", "pairs/s", f"time over {ours}", "processor time over it"]
    record = {
        "pairs_per_s": dict(rates),
        "compared_with": ours,
        "time_ratios": {name: asdict(ratio) for name, ratio in ratios.items()},
        "processor_time_ratios": {name: asdict(ratio) for name, ratio in processor.items()},
    }
    return markdown(header, rows), record


def causes_section(seconds: Mapping[str, np.ndarray], rng: np.random.Generator) -> tuple[str, dict[str, Any]]:
    """How much faster every step of the way from the public project to ours is, from rounds of the same pairs."""
    lines, record = [], {}
    for slower, faster, what in CAUSES:
        if slower in seconds and faster in seconds:
            ratio = median_ratio(seconds[slower], seconds[faster], rng)
            record[what] = {"slower": slower, "faster": faster, **asdict(ratio)}
            lines.append([what, slower, faster, ratio_text(ratio)])
    return markdown(["by what ours is faster", "from", "to", "times"], lines), record


def _with_one_draw(bench: Bench, draws: int, failed: list, batches: list, rng) -> tuple[str, dict]:
    """Those for whom the memory was too small, against ours with one draw, which is as little as there can be."""
    if not failed:
        return "", {}
    seconds = timed_rounds([bench.contenders["stream"], *failed], bench.model, batches, 1)
    lines, record = [], {}
    for contender in failed:
        said = f"{contender.name} ran out of memory with {draws} draws"
        if contender.name not in seconds:
            lines.append(f"{said} and with one.")
            continue
        ratio = median_ratio(seconds[contender.name], seconds["stream"], rng)
        record[contender.name] = asdict(ratio)
        lines.append(f"{said}; with one draw it takes {ratio_text(ratio)} the time of ours with one.")
    return "\n\n" + " ".join(lines), record


def sampler_part(bench: Workbench) -> tuple[str, dict]:
    """The sampler's fast paths against the plain one, on test problems of the embedded task.

    The configured model answers where its files are on this machine, and its answers are graded; else random weights in
    the benchmark's shape answer random prompts, and only time is compared.
    """
    wanted, run = bench.settings, bench.run
    answer, stops, grade, about = _graded(bench) if is_local(run.model) else _ungraded(bench)
    batch = min(wanted.sampler_batch, wanted.sampler_items)
    ways = ways_of(sampler_settings(run.evaluation, run.seed, run.model.known_block_length), batch)
    found = decode(answer, wanted.sampler_items, ways, batch, stops)
    text, record = sampler_section(found, PLAIN, grade, np.random.default_rng(bench.seed))
    return f"{about}, {wanted.sampler_items} of them in batches of {batch}.\n\n{text}", record


PLAIN = "plain"
Answer = Callable[[Sequence[int], SamplerSettings], list[np.ndarray]]


@dataclass(frozen=True)
class Decoded:
    """`seconds` [rounds]; `answers`: one array of ids per question, `tokens`: those before and with the stop token."""

    seconds: np.ndarray
    answers: list[np.ndarray]
    tokens: int


def ways_of(settings: SamplerSettings, batch: int) -> dict[str, SamplerSettings]:
    """What is compared, by name: each adds one thing to the one before; then smaller batches, which show what larger
    ones bring. A block model has the cache in every way."""
    plain = replace(settings, confidence_threshold=None, stop_early=False, block_cache="none", batch_size=batch)
    stopping = replace(plain, stop_early=True)
    threshold = replace(stopping, confidence_threshold=0.9)
    kinds = () if settings.is_on_grid else ("prefix", "dual")
    return {
        PLAIN: plain,
        "stop early": stopping,
        "+ threshold 0.9": threshold,
        **{f"+ {kind} cache": replace(threshold, block_cache=kind) for kind in kinds},
        "threshold 0.9, half at a time": replace(threshold, batch_size=max(1, batch // 2)),
        "plain, one at a time": replace(plain, batch_size=1),
    }


def decode(
    answer: Answer, questions: int, wanted: Mapping[str, SamplerSettings], batch: int, stops: Sequence[int]
) -> dict[str, Decoded]:
    """Every way answers every question; a round is one batch of questions, answered by all ways in rotating order.

    One untimed answer of each comes first.
    """
    names = list(wanted)
    for name in names:
        answer([0], wanted[name])
    answers: dict[str, list[np.ndarray]] = {name: [] for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number, start in enumerate(range(0, questions, batch)):
        picked = range(start, min(start + batch, questions))
        turn = number % len(names)
        for name in [*names[turn:], *names[:turn]]:
            started = time.perf_counter()
            answers[name] += answer(picked, wanted[name])
            seconds[name].append(time.perf_counter() - started)
    return {
        name: Decoded(
            np.array(seconds[name]),
            answers[name],
            sum(min(len(until_stop(ids, stops)) + 1, len(ids)) for ids in answers[name]),
        )
        for name in names
    }


def sampler_section(
    found: Mapping[str, Decoded], plain: str, grade: Callable | None, rng: np.random.Generator
) -> tuple[str, dict[str, Any]]:
    """Answers per second and, with `grade`, how many are right: against the plain way, on the same questions."""
    header = ["", "answers/s", "tokens/s", f"times {plain}", "exact match", f"difference to {plain}"]
    rows, record = [], {}
    right = {name: grade(decoded.answers) for name, decoded in found.items()} if grade else {}
    for name, decoded in found.items():
        total = float(decoded.seconds.sum())
        speedup = median_ratio(found[plain].seconds, decoded.seconds, rng)
        entry: dict[str, Any] = {
            "answers_per_s": len(decoded.answers) / total,
            "tokens_per_s": decoded.tokens / total,
            "speedup": asdict(speedup),
        }
        if right:
            entry["exact_match"] = compare(right[plain], right[name], rng, is_share=True)
        record[name] = entry
        rows.append(
            [
                name,
                f"{entry['answers_per_s']:.3g}",
                f"{entry['tokens_per_s']:.3g}",
                _ratio(None if name == plain else speedup),
                *_exact_match(entry.get("exact_match"), name == plain),
            ]
        )
    columns = len(header) if right else len(header) - 2
    return markdown(header[:columns], [row[:columns] for row in rows]), {"compared_with": plain, "ways": record}


def _exact_match(entry: Mapping[str, Any] | None, is_plain: bool) -> tuple[str, str]:
    if entry is None:
        return "", ""
    low, high = (f"{100 * bound:+.1f}" for bound in entry["interval"])
    return f"{entry['tuned']:.1%}", "" if is_plain else f"{100 * entry['difference']:+.1f} points [{low}, {high}]"


def _ratio(ratio: Ratio | None) -> str:
    return "1" if ratio is None else ratio_text(ratio)


def is_local(model: ModelSettings) -> bool:
    return Path(policy.model_path(model)).expanduser().is_dir()


def _graded(bench: Workbench) -> tuple:
    run, loaded = bench.run, bench.load()
    encoder = encoder_for(run.data, loaded.tokenizer)
    settings = (run.evaluation, run.data, run.seed, run.paths.data_dir)
    task = open_task("arithmetic", "test", bench.settings.sampler_items, *settings, with_shots=False)
    prompts = [encoder.encode_prompt(item.prompt) for item in task.items]
    keys = [item.id for item in task.items]

    def answer(picked, settings):
        chosen, names = [prompts[i] for i in picked], [keys[i] for i in picked]
        mask, autocast = loaded.denoiser.mask_token_id, loaded.denoiser.autocast
        ends = (encoder.stop_ids, names, autocast, encoder.eos_id)
        return generate(loaded.model, chosen, settings, mask, *ends, budget=answer_budget(MEASURED))

    def grade(answers):
        texts = [encoder.decode_response(ids) for ids in answers]
        return task.grader.grade_all(texts, [item.answer for item in task.items])

    return answer, encoder.stop_ids, grade, f"Test problems of the embedded task, answered by {run.model.name}"


def _ungraded(bench: Workbench) -> tuple:
    shape, machine = bench.shape, bench.machine
    stored = policy.storage_of(bench.run.quantization)
    model = random_model(keywords(shape), bench.seed, machine.device, machine.dtype, stored)
    prompts = [pair.prompt_ids for n in range(bench.settings.sampler_items) for pair in bench.pairs(n)[:1]]

    def answer(picked, settings):
        asked = ([prompts[i] for i in picked], settings, shape.vocab_size - 1)
        return generate(model, *asked, budget=answer_budget(MEASURED))

    return answer, [], None, "Random prompts, answered by random weights, which never stop"
