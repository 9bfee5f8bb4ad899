"""How noisy the masks make a trained run's scores, losses and gradients, for every way of drawing masks side by side.

    python -m laddpo.variance run=outputs/train/<run>                                          VRPO's protocol
    python -m laddpo.variance run=outputs/train/<run> variance.draws=[4] variance.pairs=32     a look, in minutes

Protocol: arXiv 2505.19223, table 2. Writes variance.md, variance.json and variance.png. The run must have moved its
policy: with common masks an untrained policy has no noise in its score at all.
"""

from __future__ import annotations

from pathlib import Path

from laddpo.cli.app import run_stage
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

    tuned = moved_weights(config)
    policy.check_before_loading(config)
    nothing = f"{run_folder}: stopped; nothing was written."  # all is written at the end
    with owned(run_folder, "variance", config.resume != "false"), stop_on_signal() as stop:
        with at_once(stop, nothing, "The same command starts anew."):
            prepared = open_prepared(config)
            pins.require_inputs_of(tuned, config, prepared.content)
            loaded = policy.load(config, find_machine(config, data_lengths(prepared, config.dpo.diffusion_samples)))
            parameters = list(policy.make_trainable(config, loaded).values())
            result = measure_run(config, tuned, prepared, loaded, parameters)
        write_result(config, result, run_folder)
    print(run_folder)


def moved_weights(config: RunConfig) -> Path:
    """The folder of the run's best weights, which must not be those that it started from."""
    from laddpo.inputs.tuned import tuned_weights
    from laddpo.storage import manifests

    folder = tuned_weights(config, Path(config.run))
    if manifests.read_manifest(folder, "weights", verify=False)["fields"]["step"] == 0:
        raise UserError(
            f"{folder}: holds the weights of step 0, which are the reference's: under common masks their scores have "
            "no noise to measure. Expected a run that kept a later step: train longer, or keep the last step with "
            "best_metric=none."
        )
    return folder


def measure_run(config: RunConfig, tuned: Path, prepared, loaded, parameters: list) -> dict:
    """Reference values of all settings first, then the policy with the weights in `tuned` under the same masks."""
    import numpy as np
    from tqdm.auto import tqdm

    from laddpo.estimator_study import report, techniques
    from laddpo.estimator_study.noise import SETTINGS, drift, measure, reference_values, summarise
    from laddpo.inputs.reference_values import objective_of
    from laddpo.inputs.tuned import base_model, use_weights

    wanted, machine = config.variance, loaded.machine
    settings = {name: SETTINGS[name] for name in wanted.settings or SETTINGS}
    pairs = [prepared.train[i] for i in range(min(wanted.pairs, len(prepared.train)))]
    few = pairs[: wanted.gradient_pairs]
    jobs = [(name, draws) for name in settings for draws in wanted.draws]
    studied = [(name, draws) for name, draws in jobs if name == "default" and draws > 1]
    objective = objective_of(config)
    common = (config.seed, wanted.evaluations, machine.token_budget)
    references, mixtures = {}, {}
    with base_model(config, loaded):
        for name, draws in tqdm(jobs, unit="setting", desc="reference", dynamic_ncols=True):
            references[name, draws] = reference_values(loaded.denoiser, pairs, settings[name], draws, *common)
        for name, draws in studied:
            estimator_of = _estimators(settings[name], draws, config.seed)
            mixtures[draws] = techniques.reference_mixture(loaded.denoiser, estimator_of, wanted.evaluations, few)
    use_weights(config, loaded, tuned)
    measured = {}
    for name, draws in tqdm(jobs, unit="setting", desc="policy", dynamic_ncols=True):
        measured[name, draws] = measure(
            loaded.denoiser,
            parameters,
            pairs,
            name,
            settings[name],
            draws,
            config.seed,
            references.pop((name, draws)),
            objective,
            len(few),
            machine.token_budget,
        )
    tried = {}
    for name, draws in tqdm(studied, unit="setting", desc="techniques", dynamic_ncols=True):
        step = (loaded.denoiser, parameters, few)
        tried[draws] = techniques.study(measured[name, draws], mixtures[draws], objective, *step, machine.token_budget)
    best = measured[max(jobs, key=lambda job: (job[0] == "default", job[1]))]
    facts = {
        "run": Path(config.run).name,
        "model": config.model.name,
        "data": config.data.source,
        "loss": config.dpo.loss,
        "beta": config.dpo.beta,
        "pairs": len(pairs),
        "gradient_pairs": len(few),
        "evaluations": wanted.evaluations,
        "trainable_parameters": sum(p.numel() for p in parameters),
        "response_tokens": report.length_words(pairs),
        "drift": drift(best),
    }
    table = summarise(list(measured.values()), config.dpo.beta, np.random.default_rng(config.seed))
    return {**facts, "settings": table, "techniques": tried}


def write_result(config: RunConfig, result: dict, folder: Path) -> None:
    """The page, its numbers and its picture; then the table for the terminal."""
    from laddpo.estimator_study import report
    from laddpo.settings.compose import write_config
    from laddpo.storage import atomic, manifests

    (folder / manifests.MANIFEST).unlink(missing_ok=True)
    write_config(config, folder)  # which makes the folder a run's: until here nothing could be gone on with
    atomic.write_json(folder / "variance.json", result)
    atomic.write_text(folder / "variance.md", report.markdown_page(result))
    report.variance_plot(result, folder / "variance.png")
    sealed = ["config.yaml", "variance.json", "variance.md"]
    manifests.write_manifest(folder, "variance", {"run": config.run}, sealed, **manifests.provenance())
    print()
    print(report.terminal_table(result))
    print(f"\nvariance.md, variance.json and variance.png: {folder}")


def _estimators(setting, draws: int, seed: int):
    return lambda evaluation: setting.of(draws, seed, evaluation)


if __name__ == "__main__":
    run_stage("variance", main)
