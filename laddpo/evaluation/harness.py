"""lm-evaluation-harness on a loaded model: its tasks, prompts and graders, our sampler and likelihoods."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from laddpo.errors import UserError
from laddpo.evaluation.answering import Answerer
from laddpo.evaluation.base_answers import answer_fields
from laddpo.settings.schema import EvaluationSettings, QuantizationSettings
from laddpo.storage import atomic, manifests

SHARES = ("acc", "match", "pass@")  # in the names of the harness's metrics that are right or wrong by item


def require_harness(evaluation: EvaluationSettings) -> None:
    """Refuse before any weight loads what the harness would refuse later: not installed, no task, an unknown one."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(
            "evaluation.harness is lm_eval and lm-evaluation-harness is not installed; pip install 'laddpo[eval]', or "
            "use evaluation=gsm8k, which needs nothing more."
        )
    if not evaluation.tasks:
        raise UserError("evaluation.tasks is empty; name tasks of the harness, as evaluation.tasks=[gsm8k,ifeval].")
    if evaluation.harness_dir and not Path(evaluation.harness_dir).is_dir():
        raise UserError(f"evaluation.harness_dir is {evaluation.harness_dir!r}; no such folder; correct it.")
    unknown = [name for name in evaluation.tasks if not _manager(evaluation).match_tasks([name])]
    if unknown:
        raise UserError(
            f"evaluation.tasks: the harness has no task {', '.join(unknown)}; `lm_eval ls tasks` lists them, and "
            "evaluation.harness_dir adds a folder of your own yaml files."
        )


def run_harness(
    answers: Answerer,
    evaluation: EvaluationSettings,
    quantization: QuantizationSettings,
    folder: Path,
    label: str,
    weights: Mapping[str, Any],
) -> dict[str, Any]:
    """What the harness returns for the model as it is now, whose `weights` are these. Answers are kept in `folder` as
    they come, and reused for the same weights and settings."""
    import lm_eval

    from laddpo.evaluation.harness_model import HarnessModel
    from laddpo.evaluation.kept_answers import KeptAnswers

    model, seed = HarnessModel(answers, evaluation.elbo_draws), answers.sampler.seed
    folder.mkdir(parents=True, exist_ok=True)
    name = f"harness_{label}_{answers_key(answers, evaluation.elbo_draws, quantization, weights)}"
    KeptAnswers(folder / f"{name}.jsonl").put_before(model)
    try:
        return lm_eval.simple_evaluate(
            model=model,
            tasks=list(evaluation.tasks),
            num_fewshot=evaluation.shots or None,
            limit=evaluation.limit,
            task_manager=_manager(evaluation),
            apply_chat_template=answers.encoder.chat is not None,
            bootstrap_iters=0,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
            verbosity="ERROR",
        )
    except (ConnectionError, FileNotFoundError, OSError) as error:
        raise UserError(
            f"the harness could not get the data of {', '.join(evaluation.tasks)} ({type(error).__name__}: {error}). "
            "Connect to the network once (it is cached then), or point evaluation.harness_dir at tasks with local data."
        ) from error


def answers_key(
    answers: Answerer, elbo_draws: int, quantization: QuantizationSettings, weights: Mapping[str, Any]
) -> str:
    """Fingerprint of what answers and likelihoods depend on beside the request, by which the harness tells them apart.
    The machine is not in it: a stopped evaluation may go on elsewhere, as that of other tasks."""
    return manifests.fingerprint(answer_fields(answers, quantization, weights) | {"elbo_draws": elbo_draws})


def harness_results(base: dict[str, Any], tuned: dict[str, Any] | None, seed: int) -> dict[str, Any]:
    """Entries of results.json: `<task>/<metric>,<filter>` with base, and with tuned and a paired interval."""
    from laddpo.results.stats import compare

    entries: dict[str, Any] = {}
    for task, numbers in base["results"].items():
        for name, value in numbers.items():
            metric, _, chosen = name.partition(",")
            if not isinstance(value, (int, float)) or metric.endswith("_stderr") or not chosen:
                continue
            values = [_item_values(part, task, metric, chosen) for part in (base, tuned) if part is not None]
            if tuned is None:
                entries[f"{task}/{name}"] = {"base": value, "items": len(values[0]) or None}
            elif values[0] and len(values[0]) == len(values[1]):
                rng, is_share = np.random.default_rng(seed), any(word in metric for word in SHARES)
                entries[f"{task}/{name}"] = compare(values[0], values[1], rng, is_share=is_share)
            else:
                after = tuned["results"][task][name]
                entries[f"{task}/{name}"] = {"base": value, "tuned": after, "difference": after - value}
    return entries


def write_items(folder: Path, results: dict[str, Any], label: str) -> None:
    """Every answered item of the harness as one JSON line."""
    rows = [
        {
            "task": task,
            "model": label,
            "id": str(item["doc_id"]),
            "filter": item.get("filter"),
            "target": str(item["target"]),
            "texts": [str(text) for text in item["filtered_resps"]],
        }
        for task, items in (results.get("samples") or {}).items()
        for item in items
    ]
    atomic.write_text(folder / f"items_{label}.jsonl", "".join(atomic.canonical_json(row) + "\n" for row in rows))


def _item_values(results: dict[str, Any], task: str, metric: str, chosen: str) -> list[float]:
    items = (results.get("samples") or {}).get(task, [])
    values = [item.get(metric) for item in items if item.get("filter", chosen) == chosen]
    return [float(v) for v in values] if all(isinstance(v, (int, float, np.number)) for v in values) else []


def _manager(evaluation: EvaluationSettings):
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=evaluation.harness_dir)
