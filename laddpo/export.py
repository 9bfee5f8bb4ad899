"""A finished run as a folder that others can use: merged weights in the hub's layout, or the adapter alone.

    python -m laddpo.export run=outputs/train/<run>                            weights in the dtype of the base's files
    python -m laddpo.export run=outputs/train/<run> export.adapter_only=true   the adapter, a few MB
    python -m laddpo.export run=outputs/train/<run> export.push_to_hub=me/my-llada

Merges into the unquantised base (a run on 4-bit weights too), compares logits before and after, and loads the result
again. Writes weights, tokenizer, README.md (the model card) and manifest.json.
"""

from __future__ import annotations

from pathlib import Path

from laddpo.cli.app import run_stage
from laddpo.errors import UserError
from laddpo.settings.schema import RunConfig


def main(config: RunConfig, run_folder: Path) -> None:
    """Export the run that `run` names, or the adapter at `adapter.path` on the configured model."""
    from laddpo.results.model_card import licences
    from laddpo.storage import atomic, manifests

    if config.run is None and config.adapter.path is None:
        raise UserError(
            "run is not set; expected the folder of a finished run: run=outputs/train/<run>. An adapter from elsewhere "
            "is named by adapter.path, with its base in model.model_name_or_path."
        )
    if config.export.license is not None and not licences(config.export.license):
        raise UserError(
            f"export.license is {config.export.license!r}; expected a short name such as mit or apache-2.0. Correct it."
        )

    from laddpo.inputs.pins import of_folder
    from laddpo.results import exporting
    from laddpo.storage.folders import owned

    trained = Path(config.run) if config.run else None
    if config.export.push_to_hub:
        exporting.check_hub_access()
    with owned(run_folder, "export"):
        source = exporting.find_weights(config, trained)
        if config.export.adapter_only:
            files, facts = exporting.export_adapter(config, source, run_folder)
        else:
            files, facts = exporting.export_merged(config, source, run_folder)
        atomic.write_text(run_folder / "README.md", exporting.model_card(config, trained, source, facts))
        fields = {"step": source.step, "base": source.base, "adapter_only": config.export.adapter_only}
        if config.export.adapter_only and (pinned := of_folder(source.folder)):
            fields["pins"] = pinned
        manifests.write_manifest(run_folder, "export", fields, [*files, "README.md"], **manifests.provenance())
    if not facts.is_adapter:
        print(f"loaded again: {facts.tensors} tensors byte for byte, logits equal")
    if config.export.push_to_hub:
        exporting.push(run_folder, config.export.push_to_hub, config.export.private)
    print(run_folder)


if __name__ == "__main__":
    run_stage("export", main)
