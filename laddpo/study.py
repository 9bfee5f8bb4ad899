"""A study: one factor at a time around a default, every arm over several seeds, with intervals and the control.

    python -m laddpo.study study=nano                                    all arms of conf/study/nano.yaml
    python -m laddpo.study study=nano study.only=[default,naive]         some of them
    python -m laddpo.study study=nano output_dir=outputs/study/a resume=true      what is missing

Every arm and seed is an ordinary run of train or sft in a process and a folder of its own. Writes study.md, study.json,
study.png; they can be read while it goes on.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from laddpo.app import run_stage
from laddpo.datachecks import reader_row
from laddpo.errors import EXIT_DONE, EXIT_STOPPED, RunFault, Stopped, UserError
from laddpo.settings import RunConfig
from laddpo.stagesettings import StudyArm

OWN = ("study", "output_dir", "resume", "seed", "experiment")


def main(config: RunConfig, run_folder: Path) -> None:
    """Run what is missing, arm by arm within each seed, and write the page after each."""
    from laddpo import runs
    from laddpo.compose import write_config

    arms = wanted_arms(config)
    folder = study_folder(config, run_folder)
    with runs.locked(folder, wait=False):
        write_config(config, folder)
        jobs = [(arm, seed) for seed in config.study.seeds for arm in arms]
        print(f"study {config.study.name}: {len(arms)} arms x {len(config.study.seeds)} seeds in {folder}", flush=True)
        failed = run_jobs(config, folder, jobs)
        content = write_page(config, folder)
    asked = {arm.name for arm in arms}
    print("\n".join(claim["text"] for claim in content["claims"] if claim["arm"] in asked))
    print(folder)
    if failed:
        raise RunFault(
            f"{folder}: {len(failed)} of {len(jobs)} runs failed: {', '.join(failed)}; each has its log.txt. Mend what "
            "they name, then run the same command with resume=true."
        )


def wanted_arms(config: RunConfig) -> list[StudyArm]:
    """The arms of the study, or those that study.only names."""
    study = config.study
    if not study.arms:
        raise UserError("study has no arms; name a study of conf/study/, as study=nano.")
    names = [arm.name for arm in study.arms]
    unknown = [name for name in study.only if name not in names]
    if unknown:
        raise UserError(f"study.only names {', '.join(unknown)}; the arms are: {', '.join(names)}.")
    return [arm for arm in study.arms if not study.only or arm.name in study.only]


def study_folder(config: RunConfig, run_folder: Path) -> Path:
    """The study's folder; resume=true goes on with output_dir, or resume with the folder that it names."""
    if config.resume == "true" and config.output_dir is None:
        raise UserError("resume is true and output_dir is not set; expected the study's folder: output_dir=<folder>.")
    return run_folder if config.resume in ("true", "false") else Path(config.resume)


def run_jobs(config: RunConfig, folder: Path, jobs: list[tuple[StudyArm, int]]) -> list[str]:
    """Run each job that is not finished; the names of those that failed. Raises `Stopped` after a signal."""
    from laddpo import runs
    from laddpo.sweep import Sweep, child_command, forward_signals, run_child

    failed = []
    with forward_signals(folder) as is_stopping:
        for number, (arm, seed) in enumerate(jobs, 1):
            place = folder / f"{arm.name}-{seed}"
            if (place / runs.MANIFEST).exists():
                continue
            print(f"{number} of {len(jobs)}: {place.name}", flush=True)
            sweep = Sweep(arm.stage, "config", None, [], folder, is_resumed=True)
            overrides = [*shared_overrides(config, arm), *arm.overrides, f"seed={seed}"]
            code = run_child(child_command(sweep, overrides, place), place, log=place / "log.txt")
            if code == EXIT_STOPPED or is_stopping():
                raise Stopped(f"{folder}: stopped.", f"Run the same command with resume=true output_dir={folder}.")
            if code != EXIT_DONE:
                print(f"  failed with exit code {code}: {place / 'log.txt'}", flush=True)
                failed.append(place.name)
            write_page(config, folder)
    return failed


def shared_overrides(config: RunConfig, arm: StudyArm | None = None) -> list[str]:
    """What every run gets: the study's settings, then what this command line says beside the study.

    An arm that names data of its own goes without what only the study's source would read.
    """
    from laddpo.app import given_overrides

    given = [text for text in given_overrides.get() if text.lstrip("+~").split("=")[0].split(".")[0] not in OWN]
    shared = [*config.study.settings, *given]
    has_own_data = arm is not None and any(text.startswith("data=") for text in arm.overrides)
    return [text for text in shared if not (has_own_data and reader_row(text.partition("=")[0]))]


def asked_of(config: RunConfig) -> list[str]:
    """The arguments that make this study again, wherever its folder is and whatever was already there."""
    from laddpo.app import given_overrides

    other = ("study", "study.only", "output_dir", "resume")
    given = [text for text in given_overrides.get() if text.split("=")[0] not in other]
    return [f"study={config.study.name}", *given]


def write_page(config: RunConfig, folder: Path) -> dict:
    """study.json, study.md and study.png of what is finished, asked for this time or before."""
    from laddpo import runs
    from laddpo.evaluation import studies

    study = config.study
    read = []
    for arm in study.arms:
        found = [studies.read_outcome(folder / f"{arm.name}-{seed}", seed) for seed in study.seeds]
        outcomes = [outcome for outcome in found if outcome is not None]
        read.append(studies.Arm(arm.name, arm.factor, arm.stage, arm.overrides, arm.against, outcomes))
    content = studies.study_json(read, [studies.Claim(c.arm, c.against, c.margin) for c in study.claims])
    content["settings"] = shared_overrides(config)
    title, command = f"Study {study.name}", shlex.join(["python", "-m", "laddpo.study", *asked_of(config)])
    runs.write_json(folder / "study.json", content)
    runs.write_text(folder / "study.md", studies.study_markdown(content, title, command))
    if content["arms"]:
        studies.study_plot(content, folder / "study.png", title)
    return content


if __name__ == "__main__":
    run_stage("study", main)
