"""Rows in, token ids out: reads preference data, checks every row, applies the chat template, reports what it did.

    python -m laddpo.prepare                                                     the embedded arithmetic pairs
    python -m laddpo.prepare data=jsonl data.dataset_name=my_pairs.jsonl         prompt, chosen, rejected a line
    python -m laddpo.prepare model=llada_8b data=hh_rlhf                         Anthropic/hh-rlhf for LLaDA-8B

Writes data/prepared/<name>-<key>/: pairs.jsonl, tokens.safetensors, report.json, report.png, manifest.json.
"""

from __future__ import annotations

from pathlib import Path

from laddpo.app import run_stage
from laddpo.settings import RunConfig


def main(config: RunConfig, run_folder: Path) -> None:
    """Prepare the configured data, or find it prepared."""
    print(prepare(config).folder)


def open_prepared(config: RunConfig):
    """The prepared pairs of this configuration: found, or made now with auto=true."""
    from laddpo.errors import UserError
    from laddpo.preference.preparation import find_prepared

    if not config.auto and find_prepared(*_arguments(config)) is None:
        raise UserError(
            f"{Path(config.paths.data_dir) / 'prepared'}: these data are not prepared yet and auto is false. "
            "Run python -m laddpo.prepare with the same settings, or set auto=true."
        )
    return prepare(config)


def prepare(config: RunConfig):
    """The finished folder as `PreparedPairs`."""
    from laddpo.errors import UserError
    from laddpo.preference.preparation import prepare_pairs

    prepared = prepare_pairs(*_arguments(config))
    if not len(prepared.train):
        raise UserError(f"{prepared.folder}: holds no pair for training; its report.json says what became of the rows.")
    return prepared


def _arguments(config: RunConfig) -> tuple:
    """What the settings mean to laddpo/preference: folder, name, parts, encoder, rules."""
    from laddpo.inputs import encoder_for, model_path
    from laddpo.models.loading import load_tokenizer
    from laddpo.preference.arithmetic import Difficulty
    from laddpo.preference.preparation import Part, Rules
    from laddpo.preference.sources import Request

    data = config.data
    folder = Path(config.paths.data_dir)
    request = Request(
        dataset_name=data.dataset_name,
        dataset_split=data.dataset_split,
        revision=data.revision,
        columns={"prompt": data.columns.prompt, "chosen": data.columns.chosen, "rejected": data.columns.rejected},
        format=data.format,
        preference_dir=folder / "preference_data",
        max_line_bytes=data.max_line_bytes,
        num_pairs=data.num_pairs,
        difficulty=Difficulty(operand_max=data.operand_max),
        seed=config.seed,
        validation_fraction=data.validation_fraction,
    )
    rules = Rules(
        seed=config.seed,
        random_sample_size=data.random_sample_size,
        validation_fraction=data.validation_fraction,
        on_bad_row=data.on_bad_row,
        max_bad_fraction=data.max_bad_fraction,
    )
    encoder = encoder_for(config, load_tokenizer(model_path(config), config.model.revision))
    return folder / "prepared", data.source, [Part(data.source, request)], encoder, rules


if __name__ == "__main__":
    run_stage("prepare", main)
