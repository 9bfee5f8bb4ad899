"""What doctor looks at: one function for each part of the machine, whose findings are lines of one table."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from laddpo.models.bitsandbytes_import import import_bitsandbytes
from laddpo.processes.terminal import hanging
from laddpo.settings.loggers import install_command, is_installed, wanted_trackers
from laddpo.settings.ranges import CONF_DIR
from laddpo.settings.redaction import redact
from laddpo.settings.schema import (
    HardwareSettings,
    LoggerSettings,
    ModelSettings,
    PathSettings,
    QuantizationSettings,
)
from laddpo.training.trackers import has_wandb_key

OK, WARN, FAIL = "ok", "warn", "fail"


@dataclass(frozen=True)
class Finding:
    """One line of the table. `fix` says what to do unless the status is ok."""

    what: str
    status: str
    found: str
    fix: str = ""


def examine(
    hardware: HardwareSettings,
    quantization: QuantizationSettings,
    model: ModelSettings,
    paths: PathSettings,
    logger: LoggerSettings,
) -> list[Finding]:
    """All findings; a check that itself breaks becomes a finding too."""
    checks = {
        "python": check_python(),
        "packages": check_packages(),
        "gpu": check_gpu(hardware),
        "quantization": check_quantization(quantization),
        "model": check_model(model),
        "folders": check_folders(paths, model),
        "loggers": check_loggers(logger),
        "start": check_start(),
    }
    findings: list[Finding] = []
    for name, check in checks.items():
        try:
            findings += check
        except Exception as error:  # whatever is broken on this machine, the other lines are still wanted
            findings.append(Finding(name, FAIL, redact(f"{type(error).__name__}: {error}"), "see the message"))
    return findings


def table(findings: list[Finding]) -> str:
    """Aligned lines: status, what, found; the fix on a line of its own below."""
    width = max(len(finding.what) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(hanging(f"{finding.status:<4}  {finding.what:<{width}}  ", finding.found))
        if finding.fix and finding.status != OK:
            lines.append(hanging(f"{'':<4}  {'':<{width}}  -> ", finding.fix))
    counts = {status: sum(finding.status == status for finding in findings) for status in (OK, WARN, FAIL)}
    lines.append(", ".join(f"{count} {status}" for status, count in counts.items()))
    return "\n".join(lines)


def check_python() -> Iterator[Finding]:
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    if "microsoft" in platform.release().lower():
        found += " (WSL)"
    is_known = (3, 10) <= sys.version_info[:2] <= (3, 13)
    yield Finding("python", OK if is_known else FAIL, found, "use Python 3.10 to 3.13")


def check_packages() -> Iterator[Finding]:
    wrong, shown = [], []
    for requirement in _requirements():
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(version.split("+")[0], prereleases=True):
            wrong.append(f"{requirement.name} {version}, wanted {requirement.specifier}")
        if requirement.name in SHOWN_PACKAGES:
            shown.append(f"{requirement.name} {version}")
    yield Finding("packages", FAIL if wrong else OK, "; ".join(wrong) or ", ".join(shown), "pip install -e . again")


def _requirements() -> list:
    """What this package declares to need, extras left out; empty where it is run without being installed."""
    from packaging.requirements import Requirement

    try:
        declared = metadata.requires("laddpo") or []
    except metadata.PackageNotFoundError:
        return [Requirement(name) for name in SHOWN_PACKAGES]
    parsed = [Requirement(text) for text in declared]
    return [
        requirement
        for requirement in parsed
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    ]


def check_gpu(hardware: HardwareSettings) -> Iterator[Finding]:
    torch = importlib.import_module("torch")
    driver = _driver_version()
    has_cuda = torch.cuda.is_available()
    build = f"torch {torch.__version__}, CUDA {torch.version.cuda or 'none'}"
    is_wanted = hardware.device == "cuda"
    if not has_cuda:
        if driver and torch.version.cuda is None:
            fix = "torch is a CPU build; install the CUDA build (see pytorch.org) to use the GPU"
        elif driver:
            fix = f"driver {driver} does not serve CUDA {torch.version.cuda}; update it, or install an older torch"
        else:
            fix = "install an NVIDIA driver, or use hardware=cpu (llada_nano runs there)"
        status = FAIL if is_wanted else WARN if driver else OK
        yield Finding("gpu", status, f"no CUDA device; {build}, {torch.get_num_threads()} CPU threads", fix)
        return
    for index in range(torch.cuda.device_count()):
        free, total = (x / 2**30 for x in torch.cuda.mem_get_info(index))
        major, minor = torch.cuda.get_device_capability(index)
        name = torch.cuda.get_device_name(index)
        found = f"{name}, {free:.1f} of {total:.1f} GiB free, capability {major}.{minor}, driver {driver}; {build}"
        wanted = hardware.vram_gib
        if wanted is not None and free < wanted:
            yield Finding("gpu", WARN, found, f"hardware.vram_gib is {wanted:g}; close other programs, or set it lower")
        elif major < 8:
            yield Finding("gpu", WARN, found, "no bf16 before capability 8.0; use hardware.precision=fp16")
        else:
            yield Finding("gpu", OK, found)


def _driver_version() -> str:
    """The NVIDIA driver's version, or nothing."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ""
    command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    return shown.stdout.splitlines()[0].strip() if shown.returncode == 0 and shown.stdout.strip() else ""


def check_quantization(quantization: QuantizationSettings) -> Iterator[Finding]:
    """Store a small matrix in 4 bits, multiply with it, compare."""
    is_needed = quantization.load_in_4bit or quantization.load_in_8bit
    try:
        torch = importlib.import_module("torch")
        import_bitsandbytes()
        functional = importlib.import_module("bitsandbytes.functional")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        weights = torch.linspace(-1, 1, 64 * 64, device=device).reshape(64, 64).bfloat16()
        packed, state = functional.quantize_4bit(weights, quant_type="nf4")
        error = (functional.dequantize_4bit(packed, state) - weights).abs().max().item()
    except Exception as problem:  # import errors, missing kernels, symbol mismatches: any kind
        status = FAIL if is_needed else WARN
        reason = redact(f"bitsandbytes: {type(problem).__name__}: {problem}".splitlines()[0])
        yield Finding("quantization", status, reason, "pip install -U bitsandbytes, or use quantization=none")
        return
    found = f"bitsandbytes {metadata.version('bitsandbytes')}: nf4 on {device} within {error:.2f}"
    yield Finding("quantization", OK if error < 0.2 else FAIL, found, "pip install -U bitsandbytes")


def check_model(model: ModelSettings) -> Iterator[Finding]:
    """Is the chosen model here, or is there a way to get it?"""
    name = model.model_name_or_path
    for folder in (Path(name).expanduser(), CONF_DIR.parent / name):
        if folder.is_dir():
            has_weights = any(folder.glob("*.safetensors"))
            yield Finding(
                "model", OK if has_weights else FAIL, f"{name}: local folder", "it holds no .safetensors files"
            )
            return
    constants = importlib.import_module("huggingface_hub.constants")
    cache = Path(constants.HF_HUB_CACHE)
    copies = [path for path in cache.glob(f"models--{name.replace('/', '--')}/snapshots/*") if path.is_dir()]
    offline = " (HF_HUB_OFFLINE is set)" if constants.HF_HUB_OFFLINE else ""
    if any(any(copy.glob("*.safetensors")) for copy in copies):
        yield Finding("model", OK, f"{name}: in the hub cache{offline}")
    elif offline:
        fix = "unset HF_HUB_OFFLINE, or set model.model_name_or_path to a local folder"
        yield Finding("model", FAIL, f"{name}: not in the hub cache{offline}", fix)
    else:
        fix = "it is downloaded at the first use; or set model.model_name_or_path to a local folder"
        yield Finding("model", WARN, f"{name}: not in the hub cache {cache}", fix)


def check_folders(paths: PathSettings, model: ModelSettings) -> Iterator[Finding]:
    """Can each folder be written to, and how much room is there?"""
    constants = importlib.import_module("huggingface_hub.constants")
    name = model.model_name_or_path
    is_local = Path(name).expanduser().is_dir() or (CONF_DIR.parent / name).is_dir()
    folders = {
        "data": Path(paths.data_dir),
        "outputs": Path(paths.outputs_dir),
        "hub cache": Path(constants.HF_HUB_CACHE),
    }
    for what, folder in folders.items():
        existing = folder
        while not existing.exists() and existing != existing.parent:
            existing = existing.parent
        free = shutil.disk_usage(existing).free / 2**30
        try:
            with tempfile.TemporaryFile(dir=existing) as probe:
                probe.write(b"laddpo")
        except OSError as error:
            yield Finding(f"{what} folder", FAIL, f"{folder}: {error.strerror}", "choose a folder you may write to")
            continue
        needed = MODEL_GIB if what == "hub cache" and not is_local else 1
        fix = f"free {needed} GiB there, or choose another disk"
        yield Finding(f"{what} folder", OK if free >= needed else WARN, f"{folder}: {free:.1f} GiB free", fix)


def check_start() -> Iterator[Finding]:
    """How long an error in the settings takes to answer: over two seconds feels broken, and points to a slow disk."""
    started, cpu = time.perf_counter(), sum(os.times()[2:4])
    command = [sys.executable, "-m", "laddpo.plan", "--help"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path])}
    done = subprocess.run(command, capture_output=True, env=environment, timeout=60, check=False)
    seconds, cpu = time.perf_counter() - started, sum(os.times()[2:4]) - cpu
    load, count = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0, os.cpu_count() or 1
    found = f"--help in {seconds:.1f} s, {cpu:.1f} s of them computing"
    if is_busy := load > count:
        found += f"; machine is busy: {load:.0f} processes want {count} CPUs"
    status = FAIL if done.returncode else WARN if seconds > SLOW_START_S and not is_busy else OK
    yield Finding("start", status, found, START_FIXES[done.returncode != 0])


def check_loggers(logger: LoggerSettings) -> Iterator[Finding]:
    for name in wanted_trackers(logger):
        if not is_installed(name):
            yield Finding(name, FAIL, "its package is not installed", install_command(name))
    if "wandb" not in wanted_trackers(logger) or not is_installed("wandb"):
        return
    has_key = has_wandb_key()
    found = "a key is set" if has_key else f"no key; wandb_mode is {logger.wandb_mode}"
    status = OK if has_key or logger.wandb_mode != "online" else WARN
    yield Finding("wandb", status, found, "wandb login, or logger.wandb_mode=offline")


SLOW_START_S = 2.0
START_FIXES = {False: "the disk is slow: install laddpo on a local one", True: "pip install -e . again"}
MODEL_GIB = 17  # LLaDA-8B in bf16
SHOWN_PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "bitsandbytes",
    "accelerate",
    "datasets",
    "hydra-core",
    "safetensors",
)
