"""DPO on preference pairs: rows, reference and base model in; adapter, metrics, plots and an evaluation out.

    python -m laddpo.train                                      embedded task and model, minutes on a CPU
    python -m laddpo.train model=llada_8b hardware=rtx4080      the real job
    python -m laddpo.train -m dpo.beta=0.5,1,2                  a sweep on one reference store
    python -m laddpo.train data=onpolicy rounds=3               on the model's own answers, three times over

Prepared pairs and reference log-likelihoods are made first when they are not there yet (auto=true).
"""

from __future__ import annotations

from pathlib import Path

from laddpo.cli.app import run_stage
from laddpo.settings.loggers import check_trackers
from laddpo.settings.schema import RunConfig


def main(config: RunConfig, run_folder: Path) -> None:
    """Train one run in `run_folder`, or in the run that `resume` names."""
    from laddpo.training.resuming import check_finished, find_run, held, step_processes, told_to_resume

    place = find_run(config, run_folder)
    if place.is_finished:
        check_finished(config, place.folder, "train")
        print(place.folder)
        return

    from laddpo.processes.signals import stop_on_signal

    if config.dry_run:
        from laddpo.training.dry_run import dry_run
        from laddpo.training.rounds import config_of_round

        def train_first(folder: Path, stop) -> None:
            counted = step_processes(config, place)
            train(config_of_round(counted, 1, counted.adapter.path, folder), folder, False, stop)

        dry_run(place.folder, train_first)
        return

    check_trackers(config.logger)
    with held(place.folder, "train", place.is_resumed), told_to_resume(place.folder), stop_on_signal() as stop:
        config = step_processes(config, place)
        if config.data.rounds > 1:
            from laddpo.training.rounds import train_rounds

            train_rounds(config, place.folder, train, stop)
        else:
            train(config, place.folder, place.is_resumed, stop)
    print(place.folder)


def train(config: RunConfig, folder: Path, is_resumed: bool, stop) -> None:
    """Everything between the settings and the finished run folder."""
    from laddpo.hardware.footprint import retries_text
    from laddpo.training import run as steps
    from laddpo.training.dry_run import say_forecast, two_steps

    data = steps.open_pairs(config)
    run = steps.open_model(config, folder, is_resumed, stop, data)
    if config.dry_run:
        run = two_steps(run)

    run, store = steps.fill_reference(run)
    training = steps.build_task(run, store)
    steps.check_step_zero(run, training)

    with steps.trackers_of(run) as trackers:
        ended = steps.run_loop(run, training, trackers)
        if run.machine.token_budget.retries:
            print(retries_text(run.machine))
        if config.dry_run:
            say_forecast(run, ended)
            return
        said = steps.finish(run, training, ended, trackers)

    state = ended.state
    steps.seal(run, "train", {"step": state.step, "best_step": state.best_step, "stopped_early": state.stopped_early})
    if run.ranks.is_main:  # for people, once nothing of the run can be lost
        print("\n".join(said))


if __name__ == "__main__":
    run_stage("train", main)
