"""The base and the tuned model on the same tasks and pairs: answers, grades, margins and their differences."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from laddpo.errors import visible
from laddpo.inputs.tuned import base_model, use_weights
from laddpo.settings.schema import RunConfig

EXAMPLES = "examples"  # field of a manifest: "rows" where sft trained on the rows of the data
TRAINING_SAMPLE = 64  # training pairs on which reward accuracy is measured, too
FILES = ("config.yaml", "results.json", "items.jsonl", "pairs.jsonl")


def learned_rows(weights: Path) -> bool:
    """Whether the run that kept these weights was an sft on the rows of the data, which hold no pairs."""
    from laddpo.storage import manifests

    return manifests.read_manifest(weights, "weights", verify=False)["fields"].get(EXAMPLES) == "rows"


def unseal(folder: Path) -> None:
    """Open a finished evaluation again: its answers are reused, and must be those that were sealed."""
    from laddpo.storage import manifests
    from laddpo.storage.seals import CheckedLines

    if manifests.read_manifest(folder, "evaluation"):
        (folder / manifests.MANIFEST).unlink()
        CheckedLines(folder / "items.jsonl").protect()


def seal(folder: Path, run: str | None, weights: dict) -> None:
    """The manifest of a finished evaluation: what was evaluated, and the checksums of what was found."""
    from laddpo.storage import manifests

    fields = {"run": run, "start": weights}
    manifests.write_manifest(folder, "evaluation", fields, manifests.present(folder, FILES), **manifests.provenance())


def evaluate_run(config: RunConfig, tuned: Path, folder: Path, prepared, loaded, stop, tasks=None, say=print) -> dict:
    """Base against the weights of a run in `tuned` (tuned_weights); returns the content of results.json.

    `prepared` are the pairs of the run, or the examples of an sft on rows. Several ranks divide the pairs and the
    answers; rank 0 writes what one process would. The model in `loaded` must already carry the run's adapter (or be
    trainable as a whole); its weights are replaced. `tasks` are those of open_tasks, where they are open already. `say`
    takes what is only for people, once all is written.
    """
    from laddpo.evaluation.answering import answer_task, answerer
    from laddpo.evaluation.marks import at_temperatures
    from laddpo.evaluation.winrate import with_prompts
    from laddpo.preference.prepared import PreparedExamples
    from laddpo.results.plots import evaluation_plot
    from laddpo.results.tables import before_after_table, notes_of
    from laddpo.storage import atomic, manifests
    from laddpo.storage.seals import CheckedLines

    results: dict = {}
    is_main = loaded.machine.ranks.is_main
    measure_base = _measure_rows if isinstance(prepared, PreparedExamples) else _measure_pairs
    answers = answerer(loaded, config.evaluation, config.data, config.seed)
    with base_model(config.model, config.adapter, loaded):
        measure_tuned = measure_base(config, prepared, loaded, folder, stop)
        opened = open_tasks(config) if tasks is None else tasks
        tasks = with_prompts(opened, prepared, config.evaluation)
        harness = _harness(config, answers, folder, "base", loaded.weights, stop)
        ways = list(at_temperatures(answers, config.evaluation.temperatures)) if tasks else []
        base_records = {
            (task.name, said): _answers_of_base(config, way, task, folder, said, stop)
            for task in tasks
            for said, way in ways
        }
    use_weights(config.adapter, loaded, tuned)
    found, margins = measure_tuned()
    results.update(found)
    digest = {
        **loaded.weights,
        "tuned": manifests.read_manifest(tuned, "weights", verify=False)["files"],
    }  # checked above
    for task in tasks:
        prefix = "" if len(tasks) == 1 else f"{task.name}/"
        for said, way in ways:
            records = answer_task(way, task, folder / "items.jsonl", digest, f"tuned{said}", stop)
            both = (base_records[task.name, said], records)
            if said:
                results.update(_compare_grades(config, task, *both, prefix, way, said))
            else:
                results.update(_compare_answers(config, task, *both, prefix, folder, way, stop, say))
    harness_tuned = _harness(config, answers, folder, "tuned", digest, stop)
    if not is_main:
        return results
    results.update(_harness_results(harness, harness_tuned, config.seed))
    CheckedLines(folder / "items.jsonl").finish()
    atomic.write_json(folder / "results.json", results)
    evaluation_plot(results, folder / "plots" / "evaluation.png", tuned_margins=margins, title=tuned.parent.name)
    say("")
    say(before_after_table(results))
    for note in notes_of(results):
        say(note)
    say(f"\nresults, answers and plots: {folder}")
    return results


def _answers_of_base(config: RunConfig, way, task, folder: Path, said: str, stop) -> list[dict]:
    """Records of the model before training. Every run that starts from it takes them from data/answers."""
    from laddpo.evaluation.answering import answer_task
    from laddpo.evaluation.base_answers import base_answers

    weights = way.loaded.weights
    kept = base_answers(config.paths.data_dir, config.quantization, way)
    return answer_task(way, task, folder / "items.jsonl", weights, f"base{said}", stop, kept)


def _compare_answers(config: RunConfig, task, base, tuned, prefix: str, folder: Path, way, stop, say) -> dict:
    """Entries of results.json for one task, from the records of both models; `prefix` tells several tasks apart."""
    from laddpo.evaluation.winrate import judge_answers
    from laddpo.inputs.judge import Surroundings
    from laddpo.problems.tasks import TASKS
    from laddpo.results.tables import WIN_RATE, examples_text
    from laddpo.storage import atomic

    loaded = way.loaded
    results = _compare_grades(config, task, base, tuned, prefix, way)
    results.update(_compare_lengths(config, base, tuned, prefix, say))
    if TASKS[task.name].is_judged:
        around = Surroundings("evaluation.judge", Path(config.paths.data_dir), str(loaded.machine.device), stop=stop)
        asked = (config.evaluation, task, base, tuned, folder / "items.jsonl", config.seed, around)
        ranks = loaded.machine.ranks
        results[WIN_RATE] = ranks.broadcast(judge_answers(*asked) if ranks.is_main else None)
    if loaded.machine.ranks.is_main:
        atomic.write_text(folder / f"examples_{task.name}.txt", examples_text(base, tuned) + "\n")
    return results


def _compare_grades(config: RunConfig, task, base, tuned, prefix: str, way, said: str = "") -> dict:
    """Exact match and marks of both models, which answered in one `way`; `said` names a further temperature."""
    from laddpo.evaluation.marks import key_of, mark_values

    results: dict = {}
    graded = [[record["correct"] for record in records] for records in (base, tuned)]
    if None not in graded[0]:
        key = key_of(f"{prefix}exact_match", said)
        results[key] = _compare(*graded, config.seed, is_share=True)
        results[key]["task"] = _task_facts(task, way)
    before, after = (mark_values(task, records) for records in (base, tuned))
    for name in before:
        is_share = name.startswith("share_")
        entry = _compare(before[name], after[name], config.seed, is_share=is_share)
        results[key_of(prefix + name, said)] = entry
    return results


def _task_facts(task, way) -> dict:
    """What results.json says of a task, and of the way in which it was answered."""
    return {"name": task.name, "grader": task.grader.name, "decoding": way.sampler.text, **task.fields}


def evaluate_base(config: RunConfig, folder: Path, loaded, stop, tasks, say=print) -> dict:
    """Exact match of the configured model alone, on the tasks of open_tasks."""
    from laddpo.evaluation.answering import answerer
    from laddpo.evaluation.marks import at_temperatures, key_of, mark_values
    from laddpo.results.stats import wilson_interval
    from laddpo.storage import atomic
    from laddpo.storage.seals import CheckedLines

    results: dict = {}
    answers = answerer(loaded, config.evaluation, config.data, config.seed)
    for task in tasks:
        name, prefix = task.name, "" if len(tasks) == 1 else f"{task.name}/"
        for said, way in at_temperatures(answers, config.evaluation.temperatures):
            records = _answers_of_base(config, way, task, folder, said, stop)
            right = sum(record["correct"] for record in records)
            low, high = wilson_interval(right, len(records))
            results[key_of(f"{prefix}exact_match", said)] = {
                "base": right / len(records),
                "base_interval": [low, high],
                "items": len(records),
                "task": _task_facts(task, way),
            }
            share = f"{right / len(records):.1%} (95% interval {low:.1%} to {high:.1%})"
            say(f"{name}{said}: {right} of {len(records)} exact, {share}; answers: {way.sampler.text}")
            for mark, values in mark_values(task, records).items():
                mean = sum(values) / len(values)
                results[key_of(prefix + mark, said)] = {"base": mean, "items": len(values)}
                say(f"  {mark.replace('_', ' ')}: {mean:.3g}")
    harness = _harness(config, answers, folder, "base", loaded.weights, stop)
    if not loaded.machine.ranks.is_main:
        return results
    for name, entry in _harness_results(harness, None, config.seed).items():
        results[name] = entry
        say(f"{visible(name)}: {entry['base']:.4g}")
    CheckedLines(folder / "items.jsonl").finish()
    atomic.write_json(folder / "results.json", results)
    return results


def open_tasks(config: RunConfig) -> list:
    """The test problems of the tasks that this program answers and grades itself."""
    from laddpo.evaluation.answering import open_task
    from laddpo.inputs.judge import check_judge
    from laddpo.problems.tasks import TASKS

    evaluation = config.evaluation
    own = evaluation.tasks if evaluation.harness == "none" else []
    if any(TASKS[name].is_judged for name in own if name in TASKS):
        check_judge(evaluation.judge, "evaluation.judge")
    of_data = (evaluation, config.data, config.seed, config.paths.data_dir)
    return [open_task(name, "test", evaluation.limit, *of_data) for name in own]


def _harness(config: RunConfig, answers, folder: Path, label: str, weights: dict, stop) -> dict | None:
    """What lm-evaluation-harness makes of the model as it is now; None where it is not asked for. Rank 0 runs it."""
    if config.evaluation.harness == "none":
        return None
    from laddpo.core.gradient import lockstep
    from laddpo.evaluation.harness import run_harness, write_items
    from laddpo.processes.signals import at_once

    with lockstep(answers.loaded.denoiser):
        if not answers.loaded.machine.ranks.is_main:
            return None
        with at_once(stop, f"{folder}: the harness was stopped; its answers so far are kept.", "Give it again."):
            found = run_harness(answers, config.evaluation, config.quantization, folder, label, weights)
        write_items(folder, found, label)
        return found


def _harness_results(base: dict | None, tuned: dict | None, seed: int) -> dict:
    if base is None:
        return {}
    from laddpo.evaluation.harness import harness_results

    return harness_results(base, tuned, seed)


def _compare(base, tuned, seed: int, groups=None, *, is_share: bool, is_base_known: bool = False) -> dict:
    import numpy as np

    from laddpo.results.stats import compare

    return compare(base, tuned, np.random.default_rng(seed), groups, is_share=is_share, is_base_known=is_base_known)


def _compare_lengths(config: RunConfig, base: list[dict], tuned: list[dict], prefix: str, say) -> dict:
    """Length of the answers and the share that ends by itself; says so where training moved either by a tenth."""
    if not all("tokens" in record for record in (*base, *tuned)):  # answered by an earlier version
        return {}
    from laddpo.results.stats import DRIFT

    found = {}
    for name, key, is_share in (("answer_tokens", "tokens", False), ("ended_rate", "stopped", True)):
        before, after = ([float(record[key]) for record in records] for records in (base, tuned))
        entry = found[prefix + name] = _compare(before, after, config.seed, is_share=is_share)
        if abs(entry["difference"]) > DRIFT * entry["base"]:
            say(f"note: {prefix}{name} went from {entry['base']:.3g} to {entry['tuned']:.3g}, more than {DRIFT:.0%}")
    return found


def _scores(config: RunConfig, loaded, items, block: int, stop):
    from laddpo.inputs.margins import score_preferences
    from laddpo.inputs.reference_values import objective_of

    machine = loaded.machine
    scored = (items, objective_of(config.dpo), block, machine.token_budget, machine.ranks, stop)
    return score_preferences(loaded.denoiser, *scored)


def _compare_accuracy(config: RunConfig, scores, pairs) -> dict:
    """Reward accuracy against the base's, which is its own reference: every margin 0, every pair a tie."""
    groups = [pair.group for pair in pairs]
    ties = [0.5] * len(pairs)
    return _compare(ties, list(scores.accuracies), config.seed, groups, is_share=True, is_base_known=True)


def training_sample(seed: int, prepared) -> list:
    """The first pairs that training visited: what it learned, beside what it carried over to held-out pairs."""
    from laddpo.core.noise import step_items

    count = len(prepared.train)
    _, indices = step_items(seed, 0, count, min(count, TRAINING_SAMPLE))
    return [prepared.train[i] for i in indices]


def _measure_pairs(config: RunConfig, prepared, loaded, folder: Path, stop) -> Callable[[], tuple]:
    """The reference's values of held-out and training pairs, by the base model; gives the measure of the tuned one:
    entries of results.json, and the margins of the held-out pairs. Of completions with labels likewise, without
    margins."""
    from laddpo.inputs.margins import evaluation_estimator
    from laddpo.inputs.reference_values import Reference, objective_of
    from laddpo.preference.prepared import PreparedUnpaired

    held_out = list(prepared.result_rows(config.evaluation.num_pairs))
    is_labelled = isinstance(prepared, PreparedUnpaired)
    seen = [] if is_labelled else training_sample(config.seed, prepared)
    estimator = evaluation_estimator(config.evaluation.diffusion_samples, config.seed, loaded.block_length)
    auto = config.auto or not objective_of(config.dpo).needs_reference  # then no other stage computes these
    reference = Reference(config.paths.data_dir, auto, config.quantization, prepared, loaded)
    items = reference.items(held_out, estimator, stop, f"held-out {prepared.noun}")
    seen_items = reference.items(seen, estimator, stop, "training pairs of the evaluation")
    block = estimator.block

    def measure_tuned():
        results, margins = {}, None
        if held_out:
            measured = (items, block, held_out, prepared.result_split)
            measure = _measure_labelled if is_labelled else _measure_held_out
            results, margins = measure(config, loaded, *measured, folder, stop)
        if is_labelled:
            return results, margins
        seen_scores = _scores(config, loaded, seen_items, block, stop)
        return {**results, "reward_accuracy_on_training_pairs": _compare_accuracy(config, seen_scores, seen)}, margins

    return measure_tuned


def _measure_rows(config: RunConfig, prepared, loaded, folder: Path, stop) -> Callable[[], tuple]:
    """The loss per token of the base model on held-out and training rows; gives the measure of the tuned one."""
    from laddpo.evaluation.heldout import measured_rows, row_losses

    held_out = prepared.result_rows(config.evaluation.num_pairs)
    sets = {
        "held_out_loss": (list(held_out), held_out.column("group")),
        "training_rows_loss": (training_sample(config.seed, prepared), None),
    }
    items = {
        name: measured_rows(rows, config.evaluation.diffusion_samples, config.seed, loaded.block_length)
        for name, (rows, _) in sets.items()
        if rows
    }
    machine = loaded.machine

    def losses() -> dict:
        return {
            name: list(row_losses(loaded.denoiser, of_set, machine.token_budget, machine.ranks, stop))
            for name, of_set in items.items()
        }

    base = losses()

    def measure_tuned():
        tuned = losses()
        return {n: _compare(base[n], tuned[n], config.seed, sets[n][1], is_share=False) for n in base}, None

    return measure_tuned


def _measure_labelled(config: RunConfig, loaded, items, block: int, rows, split: str, folder: Path, stop):
    """As _measure_held_out, of completions with labels."""
    from laddpo.evaluation.labelled import labelled_results
    from laddpo.evaluation.own_pairs import held_out_facts
    from laddpo.storage import atomic

    scores = _scores(config, loaded, items, block, stop)
    results, records = labelled_results(scores, rows, config.seed)
    ties = int((scores.rewards == 0).sum())
    if facts := held_out_facts(split, [row.group for row in rows], config.best_metric, config.evaluation.tasks, ties):
        results["held_out"] = {**facts, "unit": "row"}
    results["pairs"] = {name.removeprefix("validation/"): value for name, value in scores.metrics().items()}
    if loaded.machine.ranks.is_main:
        atomic.write_text(folder / "pairs.jsonl", "".join(atomic.canonical_json(row) + "\n" for row in records))
    return results, None


def _measure_held_out(config: RunConfig, loaded, items, block: int, pairs, split: str, folder: Path, stop):
    """Entries of results.json for the held-out pairs, and the margins of the tuned model. `split` is theirs."""
    from laddpo.evaluation.own_pairs import held_out_facts, likelihood_results
    from laddpo.inputs.margins import length_buckets
    from laddpo.storage import atomic

    scores = _scores(config, loaded, items, block, stop)
    groups, zeros = [pair.group for pair in pairs], [0.0] * len(items)
    margins = list(scores.margins)
    results = {
        "reward_accuracy": _compare_accuracy(config, scores, pairs),
        "reward_margin": _compare(zeros, margins, config.seed, groups, is_share=False, is_base_known=True),
    }
    errors = scores.margin_draw_error
    if errors is not None:
        results["reward_margin"]["draw_std_error"] = float((errors**2).mean() ** 0.5)
    ties = int((scores.margins == 0).sum())
    if facts := held_out_facts(split, groups, config.best_metric, config.evaluation.tasks, ties):
        results |= {**likelihood_results(scores, pairs, config.seed), "held_out": facts}
    results["pairs"] = {name.removeprefix("validation/"): value for name, value in scores.metrics().items()}
    results["by_length"] = length_buckets(scores)
    rows = [
        {
            "id": pair.id,
            "margin": float(scores.margins[i]),
            "draw_std_error": None if errors is None else float(errors[i]),
            "response_tokens": list(item.response_tokens),
        }
        for i, (pair, item) in enumerate(zip(pairs, items, strict=True))
    ]
    if loaded.machine.ranks.is_main:
        atomic.write_text(folder / "pairs.jsonl", "".join(atomic.canonical_json(row) + "\n" for row in rows))
    return results, scores.margins
