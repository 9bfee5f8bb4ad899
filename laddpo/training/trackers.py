"""What each tracker does with a run: one class a tracker, and the table of them.

A class has scalars(step, values), text(step, name, text) and close(). A package is imported when its tracker is opened.
Each run folder keeps the name under which a tracker knows the run (<tracker>_id.txt), so a resumed run continues there.
"""

from __future__ import annotations

import html
import os
import re
import shlex
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from laddpo.training.tracker_opening import Opening, indented, main_settings, store_id, stored_id

COMPARED = (  # columns of results on TensorBoard's HPARAMS page
    *("loss", "validation/loss", "validation/exact_match", "validation/rewards/accuracies"),
    *("result/exact_match", "result/reward_accuracy", "result/held_out_loss"),
)
TENSORBOARD_FOLDER = "tensorboard"
NOT_OF_MLFLOW = re.compile(r"[^\w\-. /:]")  # what the name of its metric may not hold


class TensorBoardTracker:
    """Event files in <run folder>/tensorboard, with the main settings for its HPARAMS page.

    `SummaryWriter.add_hparams` would open a run of its own below the folder; the same summaries are written here into
    the run's own file.
    """

    def __init__(self, opening: Opening):
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        purge_step = None if opening.resume_step is None else opening.resume_step + 1
        self._writer = SummaryWriter(str(opening.folder / TENSORBOARD_FOLDER), purge_step=purge_step, flush_secs=10)
        begin, start, self._end = hparams(main_settings(opening.config), dict.fromkeys(COMPARED, 0))
        for summary in (begin, start):
            self._writer.file_writer.add_summary(summary)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def text(self, step: int, name: str, text: str) -> None:
        self._writer.add_text(name, indented(text), step)

    def close(self) -> None:
        self._writer.file_writer.add_summary(self._end)
        self._writer.close()


class WandbTracker:
    """One W&B run per run folder: its id is stored there before the run opens, so a resumed run continues it.

    Without network or key the run is kept in <run folder>/wandb, for `wandb sync` later. WANDB_MODE in the environment
    wins over `wandb_mode`. Step numbers are a metric of their own, since W&B's internal step cannot go back on resume:
    what it has of a step that is done again stays beside the new one. (Its `resume_from`, in beta, cuts at internal
    steps.)
    """

    def __init__(self, opening: Opening):
        import wandb

        self._wandb = wandb
        folder, say = opening.folder, opening.say
        mode = os.environ.get("WANDB_MODE") or opening.settings.get("wandb_mode") or "online"
        if mode == "online" and not has_wandb_key():
            say(
                f"logger.wandb: no API key in WANDB_API_KEY or the netrc file; logging offline to {folder / 'wandb'}. "
                "`wandb login` stores a key; logger.wandb_mode=offline chooses this without a note."
            )
            mode = "offline"
        self._run = wandb.init(
            project=opening.named("project", "wandb"),
            name=opening.named("name", "wandb"),
            group=opening.named("group", "wandb"),
            tags=list(opening.named("tags", "wandb")),
            config=dict(opening.config),
            dir=str(folder),
            id=opening.id("wandb"),
            resume="allow",
            mode=mode,
            save_code=False,
            settings=wandb.Settings(
                disable_code=True, disable_git=True, console="off", quiet=True, silent=mode != "online", init_timeout=60
            ),
        )
        self._say, self._is_offline = say, mode == "offline"
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({**values, "step": step})

    def text(self, step: int, name: str, text: str) -> None:
        shown = f'<pre style="white-space: pre-wrap">{html.escape(text)}</pre>'
        self._run.log({name: self._wandb.Html(shown, inject=False), "step": step})

    def close(self) -> None:
        place = Path(self._run.sync_dir).absolute()
        self._run.finish()
        if self._is_offline:
            self._say(f"W&B kept this run offline. To send it: wandb sync {shlex.quote(str(place))}")


def has_wandb_key() -> bool:
    """Whether WANDB_API_KEY, or the netrc file for W&B's host, holds a key."""
    from requests.utils import get_netrc_auth  # comes with wandb

    address = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    return bool(os.environ.get("WANDB_API_KEY") or get_netrc_auth(address))


class TrackioTracker:
    """A run of trackio in its own folder ($TRACKIO_DIR), for `trackio show`; in a Space with $TRACKIO_SPACE_ID.

    trackio knows a run by its name alone, so the name ends with the id of the run folder: another folder of the same
    name is another run. trackio has no tags.
    """

    def __init__(self, opening: Opening):
        import trackio

        self._trackio = trackio
        self._run = trackio.init(
            project=opening.named("project"),
            name=f"{opening.named('name')}-{opening.id('trackio')}",
            group=opening.named("group"),
            config=dict(opening.config),
            resume="allow",
            embed=False,
            auto_log_cpu=False,
            auto_log_gpu=False,
        )

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def text(self, step: int, name: str, text: str) -> None:
        self._run.log({name: self._trackio.Markdown(indented(text))}, step=step)

    def close(self) -> None:
        self._run.finish()


class MlflowTracker:
    """A run of MLflow where $MLFLOW_TRACKING_URI says, else in mlflow.db of the current folder, for `mlflow ui`.

    The main settings are its parameters, the whole config and the texts are artifacts. A resumed run continues where
    the server still knows it, else it is a new run.
    """

    def __init__(self, opening: Opening):
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient()
        self._run_id = self._earlier(opening) or self._new(opening)
        params = [Param(name, str(value)) for name, value in main_settings(opening.config).items()]
        if not self._client.get_run(self._run_id).data.params:  # parameters of a run cannot change
            self._client.log_batch(self._run_id, params=params)
        self._client.log_dict(self._run_id, dict(opening.config), "config.yaml")

    def _earlier(self, opening: Opening) -> str | None:
        from mlflow.exceptions import MlflowException

        run_id = stored_id(opening.folder, "mlflow")
        if run_id is None:
            return None
        try:
            self._client.update_run(run_id, "RUNNING")
        except MlflowException as error:
            opening.say(
                f"logger.mlflow: {self._client.tracking_uri} has no run {run_id} ({error}); a new one is begun."
            )
            return None
        return run_id

    def _new(self, opening: Opening) -> str:
        project = opening.named("project")
        experiment = self._client.get_experiment_by_name(project)
        place = experiment.experiment_id if experiment else self._client.create_experiment(project)
        group = opening.named("group")
        tags = {**dict.fromkeys(opening.named("tags"), "true"), **({"group": group} if group else {})}
        run = self._client.create_run(place, tags=tags, run_name=opening.named("name"))
        return store_id(opening.folder, "mlflow", run.info.run_id)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(NOT_OF_MLFLOW.sub("_", name), value, now, step) for name, value in values.items()]
        self._client.log_batch(self._run_id, metrics=metrics)

    def text(self, step: int, name: str, text: str) -> None:
        self._client.log_text(self._run_id, text, f"{name}/step_{step:07d}.txt")

    def close(self) -> None:
        self._client.set_terminated(self._run_id)


class SwanLabTracker:
    """A run of SwanLab, kept in <run folder>/swanlab for `swanlab sync` without a key.

    $SWANLAB_MODE chooses online, offline, local or disabled.
    """

    def __init__(self, opening: Opening):
        import swanlab

        self._swanlab = swanlab
        settings = swanlab.Settings(interactive=False)  # it would ask for a key
        self._run = swanlab.init(
            settings=settings,
            mode=os.environ.get("SWANLAB_MODE") or ("online" if settings.api_key else "offline"),
            log_dir=str(opening.folder / "swanlab"),
            project=opening.named("project"),
            name=opening.named("name"),
            group=opening.named("group"),
            tags=list(opening.named("tags")),
            id=opening.id("swanlab", 16),
            resume="allow",
            config=dict(opening.config),
        )

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def text(self, step: int, name: str, text: str) -> None:
        self._run.log({name: self._swanlab.Text(text)}, step=step)

    def close(self) -> None:
        self._run.finish()


class CometTracker:
    """An experiment of Comet, kept in <run folder>/comet for `comet upload` without a key.

    Only what laddpo sends is logged: no code, command line, console output or facts of the machine.
    """

    def __init__(self, opening: Opening):
        import comet_ml

        place = opening.folder / "comet"
        place.mkdir(exist_ok=True)  # Comet makes no folder above its own
        is_online = bool(comet_ml.config.get_config("comet.api_key"))
        off = ("log_code", "log_graph", "parse_args", "log_git_metadata", "log_git_patch", "log_env_details")
        automatic = ("auto_output_logging", "auto_param_logging", "auto_metric_logging", "auto_log_co2")
        self._experiment = comet_ml.start(
            project_name=opening.named("project"),
            experiment_key=opening.id("comet", 32),
            mode="get_or_create",
            online=is_online,
            experiment_config=comet_ml.ExperimentConfig(
                **dict.fromkeys((*off, *automatic), False),
                offline_directory=str(place),
                display_summary_level=0,
                name=opening.named("name"),
                tags=list(opening.named("tags")),
            ),
        )
        self._experiment.log_parameters(dict(opening.config))
        if group := opening.named("group"):
            self._experiment.log_other("group", group)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._experiment.log_metrics(dict(values), step=step)

    def text(self, step: int, name: str, text: str) -> None:
        self._experiment.log_text(text, step=step, metadata={"name": name})

    def close(self) -> None:
        self._experiment.end()


TRACKERS: dict[str, Callable[[Opening], Any]] = {
    "tensorboard": TensorBoardTracker,
    "wandb": WandbTracker,
    "trackio": TrackioTracker,
    "mlflow": MlflowTracker,
    "swanlab": SwanLabTracker,
    "comet": CometTracker,
}
