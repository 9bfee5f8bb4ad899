"""What a finished run left: its settings, its weights, and the model that it started from."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from laddpo.errors import Damaged, UserError
from laddpo.settings.schema import AdapterSettings, ModelSettings
from laddpo.storage import manifests


def kept_names(adapter: AdapterSettings) -> tuple[str, str]:
    """The folders of the best and of the last weights, in a run's folder."""
    from laddpo.inputs.policy import ADAPTER, ADAPTER_LAST, MODEL, MODEL_LAST

    return (MODEL, MODEL_LAST) if adapter.kind == "full" else (ADAPTER, ADAPTER_LAST)


def tuned_weights(adapter: AdapterSettings, trained: Path) -> Path:
    """The folder of the best weights of the run, whole. `UserError` says what to do where they are not."""
    folder = trained / kept_names(adapter)[0]
    try:
        if manifests.read_manifest(folder, "weights") is not None:
            return folder
        found = f"{folder}: has no finished weights; expected the weights of the run."
    except Damaged as error:
        found = error.found
    raise UserError(f"{found} {what_is_left(trained, folder)}")


def what_is_left(trained: Path, folder: Path) -> str:
    """What else a run holds when the weights in `folder` are gone, and how to continue from it."""
    from laddpo.storage.checkpoint import step_folders
    from laddpo.storage.run_outputs import round_folders

    last = folder.with_name(f"{folder.name}_last")
    others = [last, *(path / folder.name for path in round_folders(trained)[-1:])]
    whole = [path for path in others if _is_whole(path)]
    checkpoints = step_folders(trained / "checkpoints")
    there = ", ".join(path.relative_to(trained).as_posix() for path in (*whole, *checkpoints))
    there = f"Still there: {there or 'no weights of this run'}."
    if whole:
        step = manifests.read_manifest(whole[0], "weights", verify=False)["fields"]["step"]
        remove = f"{shlex.join(['rm', '-r', str(folder)])} && " if folder.exists() else ""
        copy_it = shlex.join(["cp", "-r", str(whole[0]), str(folder)])
        return f"{there} To take the weights of step {step}{_kept(trained)} in their place: {remove}{copy_it}"
    again = f"give the command of the run again with resume={trained}"
    if checkpoints and (trained / manifests.MANIFEST).exists():
        return f"{there} Remove {trained / manifests.MANIFEST} and {again}: {last.name} is written from the checkpoint."
    if (trained / manifests.MANIFEST).exists():
        return f"{there} Start a new run of the same settings, or check run=."
    return f"{there} The run is not finished: {again}, or check run=."


def _is_whole(folder: Path) -> bool:
    try:
        return manifests.read_manifest(folder, "weights") is not None
    except UserError:
        return False


def _kept(trained: Path) -> str:
    """The step that a finished run kept, in words; nothing where it does not say."""
    try:
        manifest = manifests.read_manifest(trained, "train", "sft", verify=False)
    except UserError:
        return ""
    step = (manifest or {"fields": {}})["fields"].get("best_step")
    return "" if step is None else f" (the run kept step {step})"


def use_weights(adapter: AdapterSettings, loaded, weights: Path) -> None:
    """Load a run's weights into the model that carries its adapter."""
    from laddpo.models import adapters, loading

    if adapter.kind == "full":
        loading.load_weights(loaded.model, weights)
    else:
        adapters.load_adapter(loaded.model, weights)


@contextmanager
def base_model(model: ModelSettings, adapter: AdapterSettings, loaded) -> Iterator[None]:
    """Inside the block the model is what training started from: the reference.

    Whatever weights the model had are not restored afterwards where they had to be overwritten: load what you need.
    """
    from laddpo.inputs.policy import model_path
    from laddpo.models import adapters, loading

    if adapter.kind == "full":
        folder = loading.checkpoint_folder(model_path(model), model.revision)
        loading.load_weights(loaded.model, folder)
        yield
    elif adapter.path:
        adapters.load_adapter(loaded.model, adapter.path)
        yield
    else:
        with adapters.adapter_disabled(loaded.model):
            yield
