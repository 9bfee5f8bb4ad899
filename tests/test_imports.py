"""Imports point down: from the doors to errors, folder by folder, and inside core/ file by file."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import laddpo

PACKAGE = Path(laddpo.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))

# A module imports modules of its own folder, and of folders that stand on an earlier line than its own.
FOLDERS = [
    {"errors"},
    {"processes"},
    {"storage"},
    {"preference"},
    {"problems"},
    {"core"},
    {"judging"},
    {"models"},
    {"settings"},
    {"hardware"},
    {"inputs"},
    {"results"},
    {"evaluation", "estimator_study", "jobs"},
    {"training", "benchmarking"},
    {"cli"},
    {"the doors", "api"},  # which calls what doors call, and none of them
]
# Inside core/ a module imports those that stand before it.
CORE = [
    *("noise", "losses", "budget", "sequences", "draws", "elbo", "gradient", "objectives", "metrics", "sharing"),
    "completions",
    *("muon", "optim", "tasks", "surprise", "loop"),
]
# Functions of these folders take plain values and never see the settings.
PLAIN = {"errors", "processes", "storage", "preference", "problems", "core", "judging", "models", "estimator_study"}
# Whoever composes a run or asks for help waits for these: they load nothing heavy.
LIGHT = {"errors", "problems", "settings", "jobs", "cli", "the doors", "api"}
LIGHT_MODULES = {
    *("processes.signals", "preference.reading.pairs", "preference.reading.splits", "models.linears"),
    # tables of options, which settings read
    *(
        "core.losses",
        "core.noise",
        "core.sequences",
        "core.draws",
        "core.optim",
        "judging.judges",
        "preference.sources",
        "preference.reading.rows",
    ),
}
LOADS_LATER = {"storage.reference_store", "storage.checkpoint", "storage.run_outputs"}  # of light folders
HEAVY = {"torch", "transformers", "datasets", "peft", "bitsandbytes", "pyarrow", "matplotlib", "wandb", "accelerate"}


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


NAMES = [name_of(path) for path in MODULES if path.name != "__init__.py"]


def room_of(name: str) -> str:
    first, _, rest = name.partition(".")
    return first if rest or first in ("errors", "api") else "the doors"


def floor_of(name: str) -> int:
    return next(floor for floor, rooms in enumerate(FOLDERS) if room_of(name) in rooms)


def path_of(name: str) -> Path:
    return PACKAGE.joinpath(*name.split(".")).with_suffix(".py")


def imports(path: Path, top_only: bool = False) -> Iterator[str]:
    """Dotted names that a module imports; what stands under `if TYPE_CHECKING` does not count."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    if top_only:
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
        skipped |= {inner for function in functions for inner in ast.walk(function)}
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_modules(name: str) -> set[str]:
    found = {text.removeprefix("laddpo.") for text in imports(path_of(name)) if text.startswith("laddpo.")}
    return found & set(NAMES)


def test_every_folder_has_its_line_and_none_is_empty():
    lines = [room for rooms in FOLDERS for room in rooms]
    assert sorted(lines) == sorted({room_of(name) for name in NAMES})
    assert sorted(CORE) == sorted(name.removeprefix("core.") for name in NAMES if name.startswith("core."))


@pytest.mark.parametrize("name", NAMES)
def test_imports_point_down(name):
    for imported in own_modules(name):
        is_near = room_of(imported) == room_of(name) != "the doors"
        assert is_near or floor_of(imported) < floor_of(name), f"{name} imports {imported}, which is not below it"
        if name.startswith("core.") and imported.startswith("core."):
            above, below = (CORE.index(module.removeprefix("core.")) for module in (name, imported))
            assert below < above, f"{name} imports {imported}, which stands after it in CORE"


def test_no_modules_import_one_another_not_even_inside_functions():
    try:
        TopologicalSorter({name: own_modules(name) for name in NAMES}).prepare()
    except CycleError as error:
        pytest.fail(f"imports in a circle: {' <- '.join(error.args[1])}; pass a function down, or move it lower")


@pytest.mark.parametrize("name", [name for name in NAMES if room_of(name) in PLAIN])
def test_below_the_settings_functions_take_plain_values(name):
    assert "RunConfig" not in path_of(name).read_text(encoding="utf-8")


def loaded_at_import(name: str, seen: set[str]) -> set[str]:
    """Everything that importing a module of ours loads, through other modules of ours."""
    if name in seen or name not in NAMES:
        return set()
    seen.add(name)
    found = set(imports(path_of(name), top_only=True))
    for inner in [other.removeprefix("laddpo.") for other in found if other.startswith("laddpo.")]:
        found |= loaded_at_import(inner, seen)
    return found


@pytest.mark.parametrize(
    "name",
    [name for name in NAMES if room_of(name) in LIGHT or name in LIGHT_MODULES]
    + [name for name in NAMES if room_of(name) == "storage" and name not in LOADS_LATER],
)
def test_settings_and_stages_load_nothing_heavy_at_import(name):
    heavy = {module.split(".")[0] for module in loaded_at_import(name, set())} & HEAVY
    assert not heavy, f"importing laddpo.{name} loads {heavy}"
