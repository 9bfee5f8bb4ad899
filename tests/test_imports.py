"""Imports point down: core never learns of models or settings, and reading a configuration never loads torch."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import laddpo

PACKAGE = Path(laddpo.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))

# The lower the floor, the less a module may know. A folder's floor holds for its modules unless one is named.
FLOORS = {
    "errors": 0,
    "models.foreign_logs": 0,
    "storage.manifests": 0,
    "storage.seals": 0,
    "settings.redaction": 0,
    "processes.signals": 0,
    "models.linears": 0,
    "storage.temporaries": 0,
    "storage.locks": 0,
    "storage.folders": 0,
    "settings.path_checks": 0,
    "visible": 0,
    "settings.schema": 0,
    "settings.stage_schema": 0,
    "settings.ranges": 0,
    "settings.mistakes": 0,
    "settings.checks": 0,
    "settings.hardware_checks": 0,
    "settings.data_checks": 0,
    "settings.decoding_checks": 0,
    "settings.read_settings": 0,
    "settings.compose": 0,
    "preference.reading.pairs": 0,
    "preference.reading.splits": 0,
    "core.noise": 1,
    "core.losses": 1,
    "core.metrics": 1,
    "hardware.memory": 1,
    "core.optim": 1,
    "processes.ranks": 1,
    "storage.run_outputs": 1,
    "core.elbo": 2,
    "storage.checkpoint": 2,
    "core": 3,
    "core.loop": 4,
    "core.tasks": 4,
    "preference": 3,
    "models": 3,
    "evaluation": 4,
    "storage.atomic": 0,
    "storage.json_lines": 0,
    "storage.reference_store": 3,
    "settings.advice": 0,
    "settings.of_a_run": 0,
    "preference.encoding": 3,
    "preference.reading": 3,
    "preference.embedded": 3,
    "hardware.speed": 3,
    "hardware.measuring": 3,
    "core.draws": 2,
    "estimator_study": 4,
    "results": 4,
    "results.run_pages": 5,
    "results.model_card": 5,
    "results.exporting": 5,
    "results.of_jobs": 5,
    "inputs.margins": 4,
    "": 5,
}
HEAVY = {"torch", "transformers", "datasets", "peft", "bitsandbytes", "pyarrow", "matplotlib", "wandb", "accelerate"}
ONLY_STAGES_KNOW = {
    "settings.schema",
    "settings.stage_schema",
    "settings.checks",
    "settings.compose",
    "cli.app",
    "settings.mistakes",
    "settings.ranges",
}

PLAIN = ("processes.", "storage.", "preference.", "core.", "models.", "estimator_study.")


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def floor_of(name: str) -> int:
    if name in FLOORS:
        return FLOORS[name]
    return FLOORS.get(name.rpartition(".")[0], FLOORS[""])


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


def own_modules(path: Path) -> set[str]:
    known = {name_of(module) for module in MODULES} - {""}
    names = {name.removeprefix("laddpo.") for name in imports(path) if name.startswith("laddpo.")}
    return names & known


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_point_down(path):
    name = name_of(path)
    folder = name.rpartition(".")[0]
    for imported in own_modules(path):
        same_folder = folder and imported.startswith(folder)
        assert same_folder or floor_of(imported) <= floor_of(name), f"{name} imports {imported}, which is above it"


def test_no_modules_import_one_another_not_even_inside_functions():
    graph = {name_of(path): own_modules(path) for path in MODULES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"imports in a circle: {' <- '.join(error.args[1])}; pass a function down, or move it lower")


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_below_the_stages_functions_take_plain_values(path):
    name = name_of(path)
    if name.startswith(PLAIN):
        assert not own_modules(path) & ONLY_STAGES_KNOW
    if name.startswith("core."):
        assert not [module for module in own_modules(path) if module.startswith(("models", "preference.sources"))]


def loaded_at_import(name: str, seen: set[str]) -> set[str]:
    """Everything that importing a module of ours loads, through other modules of ours."""
    path = PACKAGE.joinpath(*name.split(".")).with_suffix(".py")
    if name in seen or not path.exists():
        return set()
    seen.add(name)
    found = set(imports(path, top_only=True))
    for inner in [other.removeprefix("laddpo.") for other in found if other.startswith("laddpo.")]:
        found |= loaded_at_import(inner, seen)
    return found


STAGES = [
    name_of(path) for path in MODULES if "run_stage(" in path.read_text(encoding="utf-8") and name_of(path) != "cli.app"
]


@pytest.mark.parametrize(
    "name", sorted({name for name, floor in FLOORS.items() if floor == 0} | {"cli.app", "jobs.sweep", *STAGES})
)
def test_settings_and_stages_load_nothing_heavy_at_import(name):
    heavy = {module.split(".")[0] for module in loaded_at_import(name, set())} & HEAVY
    assert not heavy, f"importing laddpo.{name} loads {heavy}"
