"""Iterated DPO: each round samples answers, makes pairs, computes the reference and trains, from the model before it.

A round's reference is the model that the round starts from, so every round begins at margin 0. Folders: round_1/,
round_2/, … are ordinary runs; around them adapter/ (the last round's), rounds.json, rounds.md and evaluation/, the
answers of the model before the first round against those of the last. Finished rounds are kept when the run is resumed.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from laddpo.processes.signals import StopFlag
from laddpo.settings.schema import RunConfig
from laddpo.storage import atomic, manifests
from laddpo.storage.seals import CheckedLines, sealed_file

TrainRun = Callable[[RunConfig, Path, bool, StopFlag], None]  # settings, folder, is_resumed, stop


def train_rounds(config: RunConfig, folder: Path, train: TrainRun, stop: StopFlag) -> None:
    """Run the rounds that are not finished yet, each by `train`, then compare them."""
    from laddpo.core.budget import release_memory
    from laddpo.inputs import pins
    from laddpo.inputs.policy import ADAPTER
    from laddpo.processes.ranks import here
    from laddpo.settings.compose import write_config
    from laddpo.settings.of_a_run import COMMAND, write_command
    from laddpo.settings.read_settings import given_overrides

    ranks = here()
    if ranks.is_main:
        pinned = pins.make(config, questions_pin(config))
        pins.require_like_siblings(folder, pinned, config)
        pins.hold(folder, pinned, config)
        write_config(config, folder)
        if not (folder / COMMAND).exists():
            write_command(folder, given_overrides.get())
    start = config.adapter.path
    for number in range(1, config.data.rounds + 1):
        place = folder / f"round_{number}"
        found = [(place / name).exists() for name in (manifests.MANIFEST, "config.yaml")] if ranks.is_main else None
        is_finished, is_resumed = ranks.broadcast(found)
        if is_finished:
            _require_whole(config, place)
            print(f"round {number} of {config.data.rounds}: done before, {place}")
        else:
            print(f"\nround {number} of {config.data.rounds}, from {start or 'the base model'}: {place}")
            train(config_of_round(config, number, start, place), place, is_resumed, stop)
            release_memory()
        start = str(place / ADAPTER)
    if ranks.is_main:
        finish_rounds(folder, config.data.rounds, config.seed)


def _require_whole(config: RunConfig, place: Path) -> None:
    """A finished round is what it sealed: its results are compared, and the next round starts from its weights."""
    from laddpo.inputs.tuned import tuned_weights

    manifests.read_manifest(place, "train")
    tuned_weights(config.adapter, place)


def finish_rounds(folder: Path, count: int, seed: int) -> None:
    """The last round's adapter as the run's own, the table of rounds, and the manifest that links them."""
    from laddpo.inputs.policy import ADAPTER
    from laddpo.results.rounds import rounds_plot, rounds_text
    from laddpo.results.runs import ROUNDS_FILE
    from laddpo.training.outputs import SEALED

    places = [folder / f"round_{number}" for number in range(1, count + 1)]
    records = [_round_record(folder, place) for place in places]
    with atomic.replaced_folder(folder / ADAPTER) as target:
        shutil.copytree(places[-1] / ADAPTER, target, dirs_exist_ok=True)
        manifests.read_manifest(target, "weights")
        _pin_like_the_first(target, places[0])
    write_evaluation(places[0], places[-1], folder, seed)
    content = {"rounds": records, **compare_rounds(folder, count, seed)}
    atomic.write_json(folder / ROUNDS_FILE, content)
    text = rounds_text(content)
    atomic.write_text(folder / "rounds.md", text + "\n")
    if "against_base" in content:
        rounds_plot(content, folder / "plots" / "rounds.png", title=folder.name)
    fields = {"rounds": [record["manifest"] for record in records]}
    if "pins" in records[0]["manifest"]:
        fields["pins"] = records[0]["manifest"]["pins"]
    manifests.write_manifest(
        folder, "train", fields, [ROUNDS_FILE, *manifests.present(folder, SEALED)], **manifests.provenance()
    )
    print("\n" + text)


def _pin_like_the_first(adapter: Path, first: Path) -> None:
    """The settings of the whole run name what its first round started from: so do the pins of its adapter."""
    from laddpo.inputs import pins

    manifest = manifests.unsealed(adapter / manifests.MANIFEST)
    if "pins" in manifest["fields"]:
        fields = {**manifest["fields"], "pins": pins.of_folder(first)}
        manifests.write_manifest(adapter, "weights", fields, list(manifest["files"]), **manifest["provenance"])


def questions_pin(config: RunConfig) -> str | None:
    """A digest of the questions of all rounds, if they come from a file."""
    from laddpo.training.on_policy import open_questions

    if config.data.source != "onpolicy" or config.data.dataset_name is None:
        return None
    sampling = dataclasses.replace(config.data.sampling, first_question=0, num_questions=None)
    asked = open_questions(dataclasses.replace(config, data=dataclasses.replace(config.data, sampling=sampling)))
    return manifests.fingerprint({"questions": [[question.text, question.answer] for question in asked]})


def config_of_round(config: RunConfig, number: int, start: str | None, folder: Path) -> RunConfig:
    """A single round as a run of its own: the next questions, from the adapter of the round before, at a lower rate."""
    from laddpo.training.on_policy import questions_of_a_round

    sampling = config.data.sampling
    first = sampling.first_question + (number - 1) * questions_of_a_round(config)
    data = dataclasses.replace(config.data, rounds=1, sampling=dataclasses.replace(sampling, first_question=first))
    adapter = dataclasses.replace(config.adapter, path=start)
    rate = config.optim.learning_rate * config.optim.round_decay ** (number - 1)
    optim = dataclasses.replace(config.optim, learning_rate=rate)
    return dataclasses.replace(
        config, rounds=1, data=data, adapter=adapter, optim=optim, output_dir=str(folder), resume="false"
    )


def _round_record(folder: Path, place: Path) -> dict[str, Any]:
    """What a round did: its manifest's fields, which link it to its pairs and its start, and what was sampled."""
    from laddpo.results.of_jobs import find_results

    manifest = manifests.read_manifest(place, "train")
    assert manifest is not None, f"{place}: a round that is not finished"
    return {
        "folder": place.relative_to(folder).as_posix(),
        "manifest": {"fingerprint": manifest["fingerprint"], **manifest["fields"]},
        "results": find_results(place),
    }


def write_evaluation(first: Path, last: Path, folder: Path, seed: int) -> None:
    """evaluation/ of all rounds as a run of one has it, from what the rounds answered; nothing where they did not.

    Reward accuracy is not in it: every round has pairs of its own, and measures it against the model it started from.
    """
    import numpy as np

    from laddpo.results.plots import evaluation_plot
    from laddpo.results.stats import compare

    before, after = _answers(first, "base"), _answers(last, "tuned")
    place = sealed_file(last, "evaluation/results.json")
    of_tasks = {n: e for n, e in (atomic.read_json(place) if place.exists() else {}).items() if "task" in e}
    results: dict[str, Any] = {}
    for name, entry in of_tasks.items():
        keys = sorted(key for key in before.keys() & after.keys() if key[0] == entry["task"]["name"])
        for measured, field, is_share in ANSWERED:
            pair = [
                [float(records[key][field]) for key in keys if field in records[key]] for records in (before, after)
            ]
            if keys and len(pair[0]) == len(pair[1]) == len(keys):  # an earlier version counted no tokens
                found = compare(*pair, np.random.default_rng(seed), is_share=is_share)
                results[name.removesuffix("exact_match") + measured] = found
        if name in results:
            results[name]["task"] = entry["task"]
    if results:
        target = folder / "evaluation"
        lines = [atomic.canonical_json(record) + "\n" for record in (*before.values(), *after.values())]
        atomic.write_text(target / "items.jsonl", "".join(lines))
        atomic.write_json(target / "results.json", results)
        evaluation_plot(results, target / "plots" / "evaluation.png", title=f"{folder.name}, {last.name}")


def _answers(run: Path, model: str) -> dict[tuple[str, str], dict[str, Any]]:
    """The records of `model` (base or tuned) in a run's evaluation, by task and problem."""
    records = CheckedLines(sealed_file(run, "evaluation/items.jsonl")).read()
    return {(record["task"], record["id"]): record for record in records if record["model"] == model}


def compare_rounds(folder: Path, count: int, seed: int) -> dict[str, Any]:
    """Exact match after every round against the model before the first, against the round before, and last against
    first; paired by problem. Empty where nothing was answered."""
    import numpy as np

    from laddpo.results.stats import compare
    from laddpo.results.studies import right_by_item

    after = [right_by_item(folder / f"round_{number}", "tuned") for number in range(1, count + 1)]
    before = [right_by_item(folder / "round_1", "base"), *after[:-1]]
    if not before[0] or not all(after):
        return {}

    def paired(a: dict[str, bool], b: dict[str, bool]) -> dict[str, Any]:
        keys = sorted(a.keys() & b.keys())
        return compare([a[key] for key in keys], [b[key] for key in keys], np.random.default_rng(seed), is_share=True)

    return {
        "against_base": [paired(before[0], tuned) for tuned in after],
        "against_round_before": [paired(a, b) for a, b in zip(before, after, strict=True)],
        "last_against_first": paired(after[0], after[-1]),
    }


ANSWERED = (  # what an evaluation says of answers, of which field of a record, whether that is a share
    ("exact_match", "correct", True),
    ("answer_tokens", "tokens", False),
    ("ended_rate", "stopped", True),
)
