"""The arms of a study: their settings, their jobs and the page that compares them."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path

from hydra.core.hydra_config import HydraConfig

from laddpo.errors import EXIT_DONE, Stopped, UserError, nearest
from laddpo.jobs import runner
from laddpo.jobs.starts import StudyJob, start_problems, started_from, with_folders, with_starts
from laddpo.results.of_jobs import JOB_FILE, JOB_KEYS, job_state
from laddpo.settings.compose import open_hydra, read_config
from laddpo.settings.data_checks import reader_row
from laddpo.settings.of_a_run import override_key, read_command
from laddpo.settings.read_settings import given_overrides, stage_reads
from laddpo.settings.stage_schema import StudyRun, StudySettings
from laddpo.storage import atomic, manifests
from laddpo.storage.seals import damages, read_checked, write_checked

OWN = ("study", "output_dir", "resume")
OF_THE_MACHINE = (*runner.CHANGE_NO_RESULT, "hardware")


def settings_of_study(asked: StudySettings, folder: Path) -> StudySettings:
    """The settings of a resumed study: those that it was begun with, unless this command line names others.
    Finished arms are compared with them."""
    if not (folder / "config.yaml").exists():
        return asked
    given = given_overrides.get()
    named = {override_key(text) for text in given}
    kept = read_command(folder).get("overrides", ())
    begun = {override_key(text): text for text in kept if override_key(text) not in (*named, "study.only")}
    given_overrides.set((*begun.values(), *given))
    stored = read_config(folder).study
    study, source, names = (asked, stored, begun) if "study" in named else (stored, asked, named)
    taken = [key.partition(".")[2] for key in names if key.startswith("study.")]
    return dataclasses.replace(study, **{name: getattr(source, name) for name in taken} | {"only": asked.only})


def wanted_runs(study: StudySettings) -> list[StudyJob]:
    """The arms of the study, or those that study.only names, and the runs that they start from. `UserError` with all
    that is wrong with the study."""
    if not study.arms:
        raise UserError("study has no arms; name a study of conf/study/, as study=nano.")
    if problems := [*_seeds_elsewhere(study), *_name_problems(study)]:
        raise UserError(*problems)
    asked = [arm for arm in study.arms if not study.only or arm.name in study.only]
    return with_starts(study, asked, lambda run: run_overrides(study, run))


def check_runs(study: StudySettings, asked: list[StudyJob], folder: Path) -> None:
    """Refuse the study before its first run when settings of a run that is asked for are wrong, or when no arm of the
    study reads one of them."""
    seed = study.seeds[0]
    name, config_dir = root_config()
    with open_hydra("laddpo.study", config_dir) as hydra:
        found = {
            run.name: runner.wrong_settings(
                hydra, name, run.stage, with_folders(arm_overrides(study, run, seed), folder, seed)
            )
            for run in asked
        }
    unread = [
        f"{text}: no arm of this study reads it; leave it out."
        for text in shared_overrides(study)
        if not any(stage_reads(arm.stage, text) for arm in study.arms)
    ]
    runner.refuse_jobs(found, f"of {len(asked)} {'runs a seed' if study.first else 'arms'}", unread)


def _seeds_elsewhere(study: StudySettings) -> list[str]:
    """A seed outside of study.seeds would be dropped: every arm runs with each of those."""
    places = {
        "the command line": given_overrides.get(),
        "study.settings": study.settings,
        **{f"study.first, {run.name}": run.overrides for run in study.first},
        **{f"study.arms, {arm.name}": arm.overrides for arm in study.arms},
    }
    return [
        f"{text} ({place}): the seeds of a study are study.seeds={study.seeds}; set study.seeds=[…] instead."
        for place, texts in places.items()
        for text in texts
        if text.lstrip("+~").split("=")[0] == "seed"
    ]


def _name_problems(study: StudySettings) -> list[str]:
    """Arms with equal names, arms that cannot run, and names of arms that do not exist."""
    from laddpo.results.studies import BASE

    names, every = [arm.name for arm in study.arms], [*study.first, *study.arms]
    all_names = [run.name for run in every]
    problems = [
        f"study.arms: {all_names.count(n)} are named {n!r}; name each once."
        for n in sorted(set(all_names))
        if all_names.count(n) > 1
    ]
    if BASE in names:
        problems.append(f"study.arms: one is named {BASE!r}, the model before training; give it another name.")
    problems += [
        f"study.{'first' if run in study.first else 'arms'}, {run.name}: stage is {run.stage!r}; expected train or sft."
        for run in every
        if run.stage not in ("train", "sft")
    ]
    problems += start_problems(study, lambda run: run_overrides(study, run))
    referred = [("study.only", name, names) for name in study.only]
    referred += [(f"study.arms, {arm.name}: against", arm.against, [*names, BASE]) for arm in study.arms]
    for claim in study.claims:
        referred += [("study.claims: arm", claim.arm, names), ("study.claims: against", claim.against, [*names, BASE])]
    for where, name, known in referred:
        if name not in known:
            guess = nearest(name, known)
            hint = f"; did you mean {guess}?" if guess else "."
            problems.append(f"{where} is {name!r}; the arms are: {', '.join(known)}{hint}")
    return list(dict.fromkeys(problems))


def refuse_other_arms(study: StudySettings, folder: Path) -> None:
    """Refuse to resume when finished arms, asked for or not, have other settings than the page would say."""
    found = {}
    for arm, seed in all_jobs(study):
        place = folder / f"{arm.name}-{seed}"
        if (place / manifests.MANIFEST).exists():
            parts = (place, *sorted(place.glob("round_*")))
            found[place.name] = [problem for part in parts for problem in damages(part)]
            found[place.name] += runner.begun_otherwise(place, arm_overrides(study, arm, seed))
            if not (job := place / JOB_FILE).exists():  # written before the arm's run starts
                found[place.name].append(
                    f"{job}: is gone, so the arm's settings are not known. Restore it, or remove {place}."
                )
    runner.refuse_jobs(found, f"of {len(found)} finished")


def all_jobs(study: StudySettings) -> list[tuple[StudyJob, int]]:
    """Every run with every seed, asked for or not."""
    return [(run, seed) for run in (*study.first, *study.arms) for seed in study.seeds]


def arm_overrides(study: StudySettings, run: StudyJob, seed: int) -> list[str]:
    """All that the command line of a run sets, with the names of the runs that it starts from."""
    return [*run_overrides(study, run), f"seed={seed}"]


def run_overrides(study: StudySettings, run: StudyJob) -> list[str]:
    """All that is set alike for every seed."""
    return [*shared_overrides(study, run), *run.overrides]


def run_jobs(study: StudySettings, folder: Path, jobs: list[tuple[StudyJob, int]]) -> list[str]:
    """Run each job that is not finished; the names of those that failed. Raises `Stopped` after a signal."""
    failed = []
    common = runner.Jobs(folder, *root_config(), is_resumed=True)
    with runner.forward_signals(folder):
        for number, (arm, seed) in enumerate(jobs, 1):
            place = folder / f"{arm.name}-{seed}"
            if (place / manifests.MANIFEST).exists():
                continue
            print(f"{number} of {len(jobs)}: {place.name}")
            overrides = arm_overrides(study, arm, seed)
            starts = [f"{name}-{seed}" for name in started_from(overrides)]
            if missing := [name for name in starts if not (folder / name / manifests.MANIFEST).exists()]:
                print(f"  not started: it starts from {', '.join(missing)}, which failed")
                failed.append(place.name)
                continue
            write_checked(place / JOB_FILE, {"overrides": overrides})
            asked = with_folders(overrides, folder, seed)
            code = runner.run_job(common, arm.stage, asked, place, log=place / "log.txt")
            write_checked(place / JOB_FILE, {"overrides": overrides, "exit_code": code})
            if runner.stop_requested.is_set():
                raise Stopped(f"{folder}: stopped.", f"Run the same command with resume=true output_dir={folder}.")

            if code != EXIT_DONE:
                print(f"  failed with exit code {code}: {place / 'log.txt'}")
                failed.append(place.name)
            write_page(study, folder)
    return failed


def shared_overrides(study: StudySettings, arm: StudyJob | None = None) -> list[str]:
    """What every run gets: the study's settings, then what this command line says beside the study.

    An arm does not get what its stage does not read, and one that names data of its own without what only the study's
    source would read. A run of study.first gets from the command line what changes no result, and nothing else.
    """
    given = [text for text in given_overrides.get() if text.lstrip("+~").split("=")[0].split(".")[0] not in OWN]
    if isinstance(arm, StudyRun):
        return [text for text in given if text.lstrip("+").startswith(OF_THE_MACHINE)]
    shared = [*study.settings, *given]
    has_own_data = arm is not None and any(text.startswith("data=") for text in arm.overrides)
    return [
        text
        for text in shared
        if not (has_own_data and reader_row(text.partition("=")[0])) and (arm is None or stage_reads(arm.stage, text))
    ]


def root_config() -> tuple[str, str | None]:
    """--config-name and --config-dir of this command line, as Hydra knows them."""
    hydra = HydraConfig.get()
    added = [source.path for source in hydra.runtime.config_sources if source.provider == "command-line"]
    return hydra.job.config_name, added[0] if added else None


def asked_of() -> list[str]:
    """The arguments that make this study again, wherever its folder is and whatever was already there."""
    name, folder = root_config()
    flags = [] if name == "config" else ["--config-name", name]
    if folder is not None:
        place, here = Path(folder), Path.cwd()
        flags += ["--config-dir", str(place.relative_to(here) if place.is_relative_to(here) else place)]
    other = ("study.only", "output_dir", "resume")
    given = [text for text in given_overrides.get() if text.split("=")[0] not in other]
    return [*flags, *given]


def run_state(place: Path) -> str:
    """How a run that is in no number of the page ended."""
    if (place / manifests.MANIFEST).exists():
        return "finished, without answers of both models to the same problems"
    job = place / JOB_FILE
    code = read_checked(job, JOB_KEYS).get("exit_code") if job.exists() else None
    return job_state(code, has_begun=job.exists())


def write_page(study: StudySettings, folder: Path) -> dict:
    """study.json, study.md and study.png of what is finished, asked for this time or before."""
    from laddpo.results import mended, studies
    from laddpo.results.study_page import study_markdown, study_plot

    read, unfinished = [], []
    for arm in study.arms:
        found = [studies.read_outcome(folder / f"{arm.name}-{seed}", seed) for seed in study.seeds]
        outcomes = [outcome for outcome in found if outcome is not None]
        for seed, outcome in zip(study.seeds, found, strict=True):
            if outcome is None:
                name = f"{arm.name}-{seed}"
                unfinished.append({"run": name, "state": run_state(folder / name)})
        read.append(studies.Arm(arm.name, arm.factor, arm.stage, arm.overrides, arm.against, outcomes))
    claims = [studies.Claim(c.arm, c.against, c.margin) for c in study.claims]
    content = studies.study_json(read, claims)
    content["unfinished"] = unfinished
    content["settings"] = shared_overrides(study)
    content["first"] = [{"name": run.name, "stage": run.stage, "overrides": list(run.overrides)} for run in study.first]
    content |= mended.more_json(folder, read, claims)
    title, command = f"Study {study.name}", shlex.join(["python", "-m", "laddpo.study", *asked_of()])
    atomic.write_json(folder / "study.json", content)
    page = [study_markdown(content, title, command).rstrip("\n"), *mended.more_blocks(content)]
    atomic.write_text(folder / "study.md", "\n\n".join(page) + "\n")
    if content["arms"]:
        study_plot(content, folder / "study.png", title)
    for said, found in content["also"].items():
        if found["arms"]:
            study_plot(found, folder / f"study{said.replace(' ', '_')}.png", title + said)
    return content
