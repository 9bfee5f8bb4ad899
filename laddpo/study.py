"""A study: one factor at a time around a default, every arm over several seeds, with intervals and the control.

    python -m laddpo.study study=nano                                    all arms of conf/study/nano.yaml
    python -m laddpo.study study=nano study.only=[default,naive]         some of them
    python -m laddpo.study study=nano output_dir=outputs/study/a resume=true      what is missing

Every arm and seed is an ordinary run of train or sft in a process and a folder of its own. Writes study.md, study.json,
study.png; they can be read while it runs.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from laddpo.cli.app import run_stage
from laddpo.errors import RunFault, UserError
from laddpo.jobs.arms import check_runs, refuse_other_arms, run_jobs, settings_of_study, wanted_runs, write_page
from laddpo.settings.read_settings import given_overrides
from laddpo.settings.schema import RunConfig


def main(config: RunConfig, run_folder: Path) -> None:
    """Run what is missing, arm by arm within each seed, and write the page after each."""
    from laddpo.settings.compose import write_config
    from laddpo.settings.of_a_run import write_command
    from laddpo.storage.folders import owned

    folder = study_folder(config, run_folder)
    is_resumed = config.resume != "false"
    if is_resumed:
        config = dataclasses.replace(config, study=settings_of_study(config.study, folder))
    study = config.study
    runs = wanted_runs(study)
    check_runs(study, runs, folder)
    with owned(folder, "study", is_resumed):
        refuse_other_arms(study, folder)
        write_command(folder, given_overrides.get(), stage="study")
        write_config(config, folder)
        jobs = [(run, seed) for seed in study.seeds for run in runs]
        print(f"study {study.name}: {len(runs)} runs x {len(study.seeds)} seeds in {folder}")
        failed = run_jobs(study, folder, jobs)
        content = write_page(study, folder)
    asked = {run.name for run in runs}
    print("\n".join(claim["text"] for claim in content["claims"] if claim["arm"] in asked))
    print(folder)
    if failed:
        raise RunFault(
            f"{folder}: {len(failed)} of {len(jobs)} runs failed: {', '.join(failed)}; each has its log.txt. Mend what "
            f"they name, then run the same command with resume=true output_dir={folder}."
        )


def study_folder(config: RunConfig, run_folder: Path) -> Path:
    """The study's folder: resume=true continues output_dir; resume=<folder> continues that folder."""
    if config.resume == "true" and config.output_dir is None:
        raise UserError("resume is true and output_dir is not set; expected the study's folder: output_dir=<folder>.")
    return run_folder if config.resume in ("true", "false") else Path(config.resume)


if __name__ == "__main__":
    run_stage("study", main)
