"""What a run writes during its loop, and the check of its weights before it is sealed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from laddpo.errors import UserError
from laddpo.inputs import policy
from laddpo.inputs.policy import Loaded
from laddpo.inputs.tuned import kept_names, what_is_left
from laddpo.models import adapters, loading
from laddpo.models.tokenizers import write_template
from laddpo.processes.progress import Progress
from laddpo.processes.ranks import Ranks, whole
from laddpo.settings.loggers import names_of, wanted_trackers
from laddpo.settings.schema import AdapterSettings, LoggerSettings, ModelSettings
from laddpo.storage import atomic, manifests
from laddpo.storage.checkpoint import step_folders, step_of
from laddpo.storage.json_lines import JsonLines
from laddpo.storage.run_outputs import RunOutputs
from laddpo.training.instability import Watch
from laddpo.training.tracking import Trackers
from laddpo.training.validation import Validation

SEALED = (  # of a finished run
    *("config.yaml", "metrics.jsonl"),
    *("evaluation/results.json", "evaluation/items.jsonl", "evaluation/pairs.jsonl"),
)


def open_trackers(
    logger: LoggerSettings, folder: Path, settings: Mapping[str, Any], resume_step: int | None, ranks: Ranks
) -> Trackers:
    """The trackers that `logger` switches on, of rank 0 alone. `settings`: all of the run's, for people who compare."""
    names = wanted_trackers(logger) if ranks.is_main else []
    return Trackers(folder, names, names_of(logger), settings, resume_step=resume_step)


def watch_of(folder: Path, beta: float | None, resume_step: int | None) -> Watch:
    """The watch on a run's metrics, which has seen those before the step from which it is resumed."""
    watch = Watch(beta)
    for row in JsonLines(folder / "metrics.jsonl").read() if resume_step else ():
        if row["step"] <= resume_step:  # what it shows was said
            watch.see(row)
    return watch


def run_outputs(
    adapter: AdapterSettings,
    model: ModelSettings,
    folder: Path,
    loaded: Loaded,
    trackers: Trackers,
    watch: Watch,
    validation: Validation,
    fields: Mapping[str, Any],
    *,
    template: str | None = None,
    keeps_weights: bool = True,
) -> RunOutputs:
    """Where the loop writes: weights, metrics, sample answers, and the trackers.

    `fields` go into the manifest of the weights; `pins` among them into checkpoints, too. `template`: a chat template
    that is kept beside the weights.
    """
    is_full = adapter.kind == "full"
    best, last = kept_names(adapter)
    ranks = loaded.machine.ranks

    def save(name: str, step: int) -> None:
        if not keeps_weights:
            return
        state = None
        if loaded.machine.is_sharded:  # every rank gives its part
            state = whole(loaded.model.state_dict() if is_full else adapters.adapter_state(loaded.model), ranks.is_main)
        if not ranks.is_main:
            return

        with atomic.replaced_folder(folder / name) as target:
            if is_full:
                files = loading.save_model(loaded.model, target, state=state)
                files += loading.copy_tokenizer(policy.model_path(model), model.revision, target)
            else:
                files = adapters.save_adapter(loaded.model, target, state)
            files += [name for name in (write_template(target, template) if template else []) if name not in files]
            content = {"step": step, "base": loaded.weights, **fields}
            manifests.write_manifest(target, "weights", content, files, **manifests.provenance())

    def show(step: int, text: str) -> None:
        if not ranks.is_main:
            return
        atomic.write_text(folder / "samples" / f"step_{step:07d}.txt", text + "\n")
        trackers.text(step, "samples", text)

    def track(metrics: Mapping[str, float], step: int) -> None:
        trackers.scalars(step, metrics)
        for note in watch.see({"step": step, **metrics}) if ranks.is_main else ():
            outputs.metrics.append({"step": step, "note": note})
            Progress.write(note)

    validation.show = show
    outputs = RunOutputs(
        folder,
        save_best=lambda step: save(best, step),
        save_last=lambda step: save(last, step),
        track=track,
        writes=ranks.is_main,
        pins=fields["pins"],
    )
    return outputs


def check_weights(adapter: AdapterSettings, folder: Path) -> None:
    """Check before a run is sealed that its weights are whole: a resumed run may have written some of them days ago."""
    names = kept_names(adapter)
    for name in names:
        if manifests.read_manifest(folder / name, "weights") is None:
            raise UserError(
                f"{folder / name}: is gone; expected the weights of this run. {what_is_left(folder, folder / names[0])}"
            )


def resume_step(folder: Path) -> int:
    """The step from which a resumed run continues, for the trackers: that of the newest checkpoint, by its name."""
    newest = step_folders(folder / "checkpoints")[:1]
    return step_of(newest[0]) if newest else 0
