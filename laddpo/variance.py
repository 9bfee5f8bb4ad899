"""How noisy the masks make a trained run's scores, losses and gradients, for every way of drawing masks side by side.

    python -m laddpo.variance run=outputs/train/<run>                                          VRPO's protocol
    python -m laddpo.variance run=outputs/train/<run> variance.draws=[4] variance.pairs=32     a look, in minutes

Protocol: arXiv 2505.19223, table 2. Writes variance.md, variance.json and variance.png. The run must have moved its
policy: with common masks an untrained policy has no noise in its score at all.
"""

from __future__ import annotations

from pathlib import Path

from laddpo.cli.app import run_stage
from laddpo.core.losses import LOSSES
from laddpo.errors import UserError
from laddpo.settings.schema import RunConfig


def main(config: RunConfig, run_folder: Path) -> None:
    """Measure the run that `run` names."""
    if config.run is None:
        raise UserError("run is not set; expected the folder of a finished run: run=outputs/train/<run>.")

    from laddpo.hardware.machine import find_machine
    from laddpo.inputs import pins, policy
    from laddpo.inputs.data import data_lengths
    from laddpo.processes.signals import at_once, stop_on_signal
    from laddpo.storage.folders import owned
    from laddpo.training.pairs import open_prepared

    loss = LOSSES[config.dpo.loss]
    if not (loss.needs_reference and loss.takes_pairs):
        lacking = "compares with no reference" if loss.takes_pairs else "takes single completions"
        raise UserError(
            f"{config.run}: was trained with dpo.loss={config.dpo.loss}, which {lacking}. What is measured here is the "
            "noise of a pair's score against the reference; name a run whose loss has one."
        )
    tuned = moved_weights(config)
    policy.check_before_loading(config)
    nothing = f"{run_folder}: stopped; nothing was written."  # all is written at the end
    with owned(run_folder, "variance", config.resume != "false"), stop_on_signal() as stop:
        with at_once(stop, nothing, "The same command starts again from the beginning."):
            prepared = open_prepared(config)
            pins.require_inputs_of(tuned, config, prepared.content)
            loaded = policy.load(config, find_machine(config, data_lengths(prepared, config.dpo, config.model)))
            parameters = list(policy.make_trainable(config, loaded).values())
            result = measure_run(config, tuned, prepared, loaded, parameters)
        write_result(config, result, run_folder)
    print(run_folder)


def moved_weights(config: RunConfig) -> Path:
    """The folder of the run's best weights, which must not be those that it started from."""
    from laddpo.inputs.tuned import tuned_weights
    from laddpo.storage import manifests

    folder = tuned_weights(config.adapter, Path(config.run))
    if manifests.read_manifest(folder, "weights", verify=False)["fields"]["step"] == 0:
        raise UserError(
            f"{folder}: holds the weights of step 0, which are the reference's: under common masks their scores have "
            "no noise to measure. Expected a run that kept a later step: train longer, or keep the last step with "
            "best_metric=none."
        )
    return folder


def measure_run(config: RunConfig, tuned: Path, prepared, loaded, parameters: list) -> dict:
    """What is written: facts of the run, then what its masks' noise is."""
    import functools

    from laddpo.estimator_study.study import run_study
    from laddpo.inputs.reference_values import objective_of
    from laddpo.inputs.tuned import base_model, use_weights

    wanted = config.variance
    pairs = [prepared.train[i] for i in range(min(wanted.pairs, len(prepared.train)))]
    found = run_study(
        loaded.denoiser,
        parameters,
        pairs,
        objective_of(config.dpo),
        settings=wanted.settings,
        draws=wanted.draws,
        evaluations=wanted.evaluations,
        gradient_pairs=wanted.gradient_pairs,
        seed=config.seed,
        token_budget=loaded.machine.token_budget,
        as_reference=base_model(config.model, config.adapter, loaded),
        become_policy=functools.partial(use_weights, config.adapter, loaded, tuned),
    )
    facts = {"run": Path(config.run).name, "model": config.model.name, "data": config.data.source}
    return {**facts, "loss": config.dpo.loss, "beta": config.dpo.beta, **found}


def write_result(config: RunConfig, result: dict, folder: Path) -> None:
    """The page, its numbers and its picture; then the table for the terminal."""
    from laddpo.estimator_study import report
    from laddpo.settings.compose import write_config
    from laddpo.storage import atomic, manifests

    (folder / manifests.MANIFEST).unlink(missing_ok=True)
    write_config(config, folder)  # with it the folder is a run's: before it there was nothing to continue
    atomic.write_json(folder / "variance.json", result)
    atomic.write_text(folder / "variance.md", report.markdown_page(result))
    report.variance_plot(result, folder / "variance.png")
    sealed = ["config.yaml", "variance.json", "variance.md"]
    manifests.write_manifest(folder, "variance", {"run": config.run}, sealed, **manifests.provenance())
    print()
    print(report.terminal_table(result))
    print(f"\nvariance.md, variance.json and variance.png: {folder}")


if __name__ == "__main__":
    run_stage("variance", main)
