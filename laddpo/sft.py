"""Supervised fine-tuning by the diffusion likelihood: the negative ELBO per token as loss, the same loop as DPO.

    python -m laddpo.sft data=jsonl data.dataset_name=rows.jsonl    trains on the rows of a file: prompt and response
    python -m laddpo.sft experiment=make_llada_nano    makes llada_nano from random weights, minutes on a CPU
    python -m laddpo.sft sft=control                   the control beside every DPO run: the chosen responses alone

`sft.examples=auto` takes the generated corpus where the data are generated, and the rows of the data elsewhere: a
response, a conversation, or the chosen side of a pair. `corpus` is generated arithmetic with a share of mistaken
solutions, `chosen` the chosen side of the prepared pairs. Rows and chosen sides end by evaluating base and tuned model.
DPO starts from the result by adapter.path=<run>/adapter, or model.model_name_or_path=<run>/model.
"""

from __future__ import annotations

from pathlib import Path

from laddpo.cli.app import run_stage
from laddpo.errors import UserError
from laddpo.problems.tasks import BY_ANSWERS
from laddpo.settings.data_checks import sft_examples
from laddpo.settings.loggers import check_trackers
from laddpo.settings.schema import RunConfig


def main(config: RunConfig, run_folder: Path) -> None:
    """Train one SFT run in `run_folder`, or in the run that `resume` names."""
    from laddpo.processes.signals import stop_on_signal
    from laddpo.training.resuming import check_finished, find_run, held, step_processes, told_to_resume

    if config.dry_run:  # of a yaml file; of the command line laddpo/settings/read_settings.py refuses it
        raise UserError("dry_run is true, which only python -m laddpo.train knows; expected false. Leave it out.")
    if config.data.rounds > 1:
        raise UserError(f"rounds is {config.data.rounds}, which only python -m laddpo.train knows; expected 1.")
    measured = ("auto", "none", *BY_ANSWERS, *(["loss"] if sft_examples(config) == "rows" else []))
    if config.best_metric not in measured:
        raise UserError(
            f"best_metric is {config.best_metric!r}, which is measured on preference pairs, and sft has none; expected "
            f"one of {', '.join(measured)}."
        )
    place = find_run(config, run_folder)
    if place.is_finished:
        check_finished(config, place.folder, "sft")
    else:
        check_trackers(config.logger)
        with held(place.folder, "sft", place.is_resumed), told_to_resume(place.folder), stop_on_signal() as stop:
            train(step_processes(config, place), place.folder, place.is_resumed, stop)
    print(place.folder)


def train(config: RunConfig, folder: Path, is_resumed: bool, stop) -> None:
    """Everything between the settings and the finished run folder."""
    from laddpo.training import rows, run

    data = rows.open_rows(config)
    begun = run.open_model(config, folder, is_resumed, stop, data)
    training = rows.build_task(begun)
    with run.trackers_of(begun) as trackers:
        ended = run.run_loop(begun, training, trackers, rows.kept_with_weights(config))
        rows.finish(begun, training, ended, trackers)


if __name__ == "__main__":
    run_stage("sft", main)
