"""How noisy a step's gradient is: how much of the noise masks bring, how much pairs, and what n has the least of it.

    python -m laddpo.variance run=outputs/train/<run>                a finished run, in minutes
    python -m laddpo.variance data=jsonl data.dataset_name=...       the model before training, at step 0
    python -m laddpo.variance variance.write_pairs=pairs.json        a list of pairs, for variance.pairs_file

Writes variance.md, which begins with the answer, variance.json and variance.png. Where training starts, common masks
leave no noise in the score; the gradient has noise there too. The protocol is that of arXiv 2505.19223, table 2, on
fewer pairs; conf/variance/default.yaml has the whole one.
"""

from __future__ import annotations

from pathlib import Path

from laddpo.cli.app import run_stage
from laddpo.core.losses import LOSSES
from laddpo.errors import UserError
from laddpo.settings.schema import RunConfig


def main(config: RunConfig, run_folder: Path) -> None:
    """Measure the run that `run` names, or the model and data of the command line before training."""
    loss = LOSSES[config.dpo.loss]
    if not (loss.needs_reference and loss.takes_pairs):
        lacking = "compares with no reference" if loss.takes_pairs else "takes single completions"
        where = f"{config.run}: was trained with" if config.run else "this command has"
        raise UserError(
            f"{where} dpo.loss={config.dpo.loss}, which {lacking}. What is measured here is the noise of a pair's "
            "score against the reference; name a loss, or a run, that has one."
        )
    from laddpo.hardware.machine import find_machine
    from laddpo.inputs import pins, policy
    from laddpo.inputs.data import data_lengths
    from laddpo.processes.signals import at_once, stop_on_signal
    from laddpo.storage.folders import owned
    from laddpo.training.pairs import open_prepared

    tuned, step = weights_of_run(config) if config.run else (None, 0)
    policy.check_before_loading(config)
    if config.variance.write_pairs is not None:
        prepared = open_prepared(config)
        if tuned is not None:
            pins.require_inputs_of(tuned, config, prepared.content)
        return write_pairs(config, prepared)
    nothing = f"{run_folder}: stopped; nothing was written."  # all is written at the end
    with owned(run_folder, "variance", config.resume != "false"), stop_on_signal() as stop:
        with at_once(stop, nothing, "The same command starts again from the beginning."):
            prepared = open_prepared(config)
            if tuned is not None:
                pins.require_inputs_of(tuned, config, prepared.content)
            pairs = chosen_pairs(config, prepared)
            loaded = policy.load(config, find_machine(config, data_lengths(prepared, config.dpo, config.model)))
            parameters = list(policy.make_trainable(config, loaded).values())
            result = measure(config, tuned if step else None, pairs, len(prepared.train), loaded, parameters)
        write_result(config, result, run_folder)
    print(run_folder)


def weights_of_run(config: RunConfig) -> tuple[Path, int]:
    """The folder of the run's best weights, and their step. At step 0 they are those that it started from."""
    from laddpo.inputs.tuned import tuned_weights
    from laddpo.storage import manifests

    folder = tuned_weights(config.adapter, Path(config.run))
    return folder, manifests.read_manifest(folder, "weights", verify=False)["fields"]["step"]


def chosen_pairs(config: RunConfig, prepared) -> list:
    """The pairs to measure."""
    from laddpo.inputs import measured_pairs

    if config.variance.pairs_file is not None:
        return measured_pairs.listed(prepared, Path(config.variance.pairs_file))
    pairs = measured_pairs.first_visited(prepared, config.variance.pairs, config.seed)
    if len(pairs) < 2:
        raise UserError(f"{prepared.folder}: has one training pair; expected two or more, so that pairs can differ.")
    if len(pairs) < config.variance.pairs:
        print(f"note: variance.pairs is {config.variance.pairs:,}, and there are {len(pairs):,} training pairs")
    return pairs


def write_pairs(config: RunConfig, prepared) -> None:
    """A list of pairs for `variance.pairs_file`, before anything is measured."""
    from laddpo.inputs.measured_pairs import write_list

    pairs, path = chosen_pairs(config, prepared), Path(config.variance.write_pairs)
    write_list(path, pairs)
    print(f"{path}: {len(pairs)} of {len(prepared.train):,} training pairs, chosen by seed={config.seed}")


def measure(config: RunConfig, tuned: Path | None, pairs: list, training_pairs: int, loaded, parameters: list) -> dict:
    """What is written: facts of the run, then what its noise is. `tuned`: weights that were trained, if any."""
    import functools

    from laddpo.estimator_study.noise import Setting
    from laddpo.estimator_study.step_noise import Step
    from laddpo.estimator_study.study import Models, run_study
    from laddpo.hardware.planning import pairs_per_step
    from laddpo.inputs.reference_values import objective_of, training_estimator
    from laddpo.inputs.tuned import base_model, use_weights
    from laddpo.settings.data_checks import is_read

    if tuned is None:
        print("step 0: policy and reference are the same, so common masks leave no noise in scores; gradients have it")
    models = Models(
        loaded.denoiser,
        parameters,
        loaded.machine.token_budget,
        as_reference=base_model(config.model, config.adapter, loaded),
        become_policy=functools.partial(use_weights, config.adapter, loaded, tuned) if tuned else lambda: None,
        is_start=tuned is None,
    )
    own = Setting(
        training_estimator(config.dpo, config.seed, loaded.block_length), common=config.dpo.common_random_numbers
    )
    step = Step(config.dpo.diffusion_samples, pairs_per_step(config.optim, config.hardware), training_pairs)
    found = run_study(models, pairs, objective_of(config.dpo), own, step, config.variance, config.seed)
    for row in found["tokens"]:
        row["token"], row["text_before"] = (loaded.tokenizer.decode(ids) for ids in ([row["token_id"]], row["before"]))
    has_name = is_read("data.dataset_name", config) and config.data.dataset_name
    data = Path(config.data.dataset_name).name if has_name else config.data.source
    facts = {"run": config.run and Path(config.run).name, "model": config.model.name, "data": data}
    return {**facts, "loss": config.dpo.loss, "beta": config.dpo.beta, **found}


def write_result(config: RunConfig, result: dict, folder: Path) -> None:
    """The page, its numbers and its picture; then the answer for the terminal."""
    from laddpo.estimator_study import answers, report
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
    print(f"\n{answers.answer(result)}")
    print(f"\nvariance.md, variance.json and variance.png: {folder}")


if __name__ == "__main__":
    run_stage("variance", main)
