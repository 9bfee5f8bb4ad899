"""What the sources may not contain: files written past the atomic helpers, pickles, remote code, code in yaml."""

import ast
import re
from pathlib import Path

import pytest

import laddpo

PACKAGE = Path(laddpo.__file__).parent
REPOSITORY = PACKAGE.parent
MODULES = sorted(PACKAGE.rglob("*.py"))
YAMLS = sorted((REPOSITORY / "conf").rglob("*.yaml"))
WRITERS = {"storage/atomic.py", "storage/json_lines.py"}  # the modules that may write files

BANNED_CALLS = {
    "torch.load": "reads pickles",
    "torch.save": "writes pickles",
    "pickle.load": "runs code",
    "pickle.loads": "runs code",
    "joblib.load": "runs code",
    "numpy.load": "may run code",
    "np.load": "may run code",
    "eval": "runs code",
    "exec": "runs code",
    "os.system": "runs a shell",
    "yaml.load": "may run code",
    "hydra.utils.instantiate": "runs code named by settings",
    "instantiate": "runs code named by settings",
}


def calls(path: Path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield node, ast.unparse(node.func)


def name_of(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_files_are_written_through_the_atomic_helpers_alone(path):
    if path.relative_to(PACKAGE).as_posix() in WRITERS:
        return
    for node, function in calls(path):
        where = f"{name_of(path)}:{node.lineno}: {ast.unparse(node)[:80]}"
        method = function.rpartition(".")[2]
        assert method not in ("write_text", "write_bytes") or "." not in function or function.startswith("atomic."), (
            where
        )
        is_nothing = bool(node.args) and ast.unparse(node.args[0]) == "os.devnull"
        if method == "open" and function not in ("os.open", "zipfile.open", "gzip.open") and not is_nothing:
            arguments = [*node.args, *(keyword.value for keyword in node.keywords if keyword.arg == "mode")]
            modes = [argument.value for argument in arguments if isinstance(argument, ast.Constant)]
            assert not any(isinstance(mode, str) and re.fullmatch(r"[rbt]*[wax+][rbt+]*", mode) for mode in modes), (
                where
            )


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_nothing_is_unpickled_and_no_code_is_named_by_data(path):
    for node, function in calls(path):
        assert function not in BANNED_CALLS, f"{name_of(path)}:{node.lineno}: {function} {BANNED_CALLS[function]}"
        for keyword in node.keywords:
            is_true = isinstance(keyword.value, ast.Constant) and keyword.value.value is True
            assert not (keyword.arg in ("trust_remote_code", "allow_pickle") and is_true), (
                f"{name_of(path)}:{node.lineno}"
            )
            assert not (keyword.arg == "shell" and is_true), f"{name_of(path)}:{node.lineno}"
    source = path.read_text(encoding="utf-8")
    assert not re.search(r"^\s*(import pickle|from pickle|import joblib|from joblib|import dill)", source, re.MULTILINE)


@pytest.mark.parametrize("path", YAMLS, ids=name_of)
def test_yaml_holds_values_only(path):
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"_(target|partial|args|recursive|convert)_", text)
    assert not re.search(r"!!python|\$\{(eval:|oc\.)", text)
    assert not re.search(r"(^|[\s:'\"])/(home|root|work|tmp|mnt|data)/", text), "a private location"


@pytest.mark.parametrize("path", [*MODULES, *YAMLS], ids=name_of)
def test_sources_name_no_private_location(path):
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"['\"\s(]/(home|root|work)/", text)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_module_opens_with_what_it_is_for(path):
    if path.name == "__init__.py":
        return
    document = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert document, f"{name_of(path)} has no docstring"
    assert path.stem not in ("utils", "common", "helpers", "manager", "misc")


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_module_can_be_read_in_one_sitting(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= 420, f"{name_of(path)} has {lines} lines; it is asking to be two"
