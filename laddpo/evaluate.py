"""Base against tuned: held-out reward accuracy and margins, and exact answers to test problems.

    python -m laddpo.evaluate run=outputs/train/<run>                  a finished or interrupted run's best adapter
    python -m laddpo.evaluate evaluation=gsm8k evaluation.limit=200    the base model alone, on GSM8K

Writes results.json, items.jsonl (one object per answer, resumable), pairs.jsonl (one per held-out pair) and a plot.
"""

from __future__ import annotations

from pathlib import Path

from laddpo.cli.app import run_stage
from laddpo.errors import UserError
from laddpo.evaluation.base_and_tuned import evaluate_base, evaluate_run, learned_rows, open_tasks, seal, unseal
from laddpo.inputs.tuned import tuned_weights
from laddpo.problems.tasks import JUDGED
from laddpo.settings.schema import RunConfig


def main(config: RunConfig, run_folder: Path) -> None:
    """Evaluate the run that `run` names, or the configured model as it is."""
    if not (config.run or config.evaluation.tasks):
        raise UserError(
            "evaluation.tasks is empty and run is not set; a base model alone can only be measured on tasks. "
            "Add run=outputs/train/<run>, or evaluation=arithmetic."
        )
    if not config.run and config.evaluation.harness == "none" and JUDGED in config.evaluation.tasks:
        raise UserError(
            f"evaluation.tasks has {JUDGED} and run is not set; a base model alone has nothing to be compared with. "
            "Add run=outputs/train/<run>."
        )

    from laddpo.hardware.machine import find_machine
    from laddpo.inputs import pins, policy
    from laddpo.processes.ranks import here
    from laddpo.processes.signals import stop_on_signal
    from laddpo.settings.compose import write_config
    from laddpo.training.pairs import open_examples, open_prepared
    from laddpo.training.resuming import held, told_to_resume

    # before minutes of loading, which would be lost, and before anything is written
    tuned = tuned_weights(config.adapter, Path(config.run)) if config.run else None
    policy.check_before_loading(config)
    if config.evaluation.harness != "none":
        from laddpo.evaluation.harness import require_harness

        require_harness(config.evaluation)
    tasks = open_tasks(config)
    prepared = None
    if tuned:
        prepared = open_examples(config) if learned_rows(tuned) else open_prepared(config)
        pins.require_inputs_of(tuned, config, prepared.content)
    way = f"output_dir={run_folder} resume=true"
    is_resumed, shown = config.resume != "false", []
    with held(run_folder, "evaluation", is_resumed), told_to_resume(run_folder, way), stop_on_signal() as stop:
        if here().is_main:
            unseal(run_folder)
            if not tuned:
                pins.hold(run_folder, pins.make(config), config)
            write_config(config, run_folder)
        loaded = policy.load(config, find_machine(config))
        if tuned:
            policy.make_trainable(config, loaded)
            evaluate_run(config, tuned, run_folder, prepared, loaded, stop, tasks, shown.append)
        else:
            evaluate_base(config, run_folder, loaded, stop, tasks, shown.append)
        if here().is_main:
            seal(run_folder, config.run, loaded.weights)
    print(*shown, run_folder, sep="\n")  # once nothing of it can be lost


if __name__ == "__main__":
    run_stage("evaluate", main)
