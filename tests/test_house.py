"""The laws of the house: who may import whom, what imports no torch, and what no shipped file may hold."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("launch", "distrib", "models", "data")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
MOST_LINES = 450

# What each package may import of the others.
MAY_IMPORT = {
    "launch": {"launch", "distrib", "models", "data"},
    "distrib": {"distrib"},
    "models": {"models"},
    "data": {"data"},
}
WITHOUT_TORCH = (
    "launch.auditing",
    "launch.cli",
    "launch.commands",
    "launch.config",
    "launch.data_commands",
    "launch.data_order",
    "launch.debug_command",
    "launch.debug_recipe",
    "launch.doctor",
    "launch.goodput",
    "launch.jobs",
    "launch.recipe",
    "launch.resume",
    "launch.run_directory",
    "launch.stopping",
    "launch.submit",
    "launch.supervisor",
    "launch.train",
    "data.prepare",
    "distrib.capabilities",
    "distrib.engine_table",
    "distrib.launchers",
    "distrib.manifest",
    "distrib.ports",
)
CONFIGS = (
    "data.config",
    "distrib.config",
    "models.config",
    "launch.config",
    "launch.health_config",
    "launch.tracking.config",
)
# Heavy libraries that reading a recipe must not wait for.
HEAVY = ("torch", "numpy", "pyarrow", "datasets", "tokenizers", "transformers", "wandb", "PIL")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imported_packages(path: Path) -> set[str]:
    """First parts of everything that a file imports, inside functions too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}:{node.lineno}: imports by absolute names only"
            found.add((node.module or "").split(".")[0])
    return found


def loaded_after_import(*modules: str) -> set[str]:
    """Top-level names in `sys.modules` of a fresh process after importing `modules`."""
    code = f"import sys, {', '.join(modules)}; print(' '.join({{name.split('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_the_packages_hold_files() -> None:
    assert len(FILES) > 40
    assert {path.relative_to(ROOT).parts[0] for path in FILES} == set(PACKAGES)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_rooms_import_only_whom_they_may(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    assert imported_packages(path) & set(PACKAGES) <= MAY_IMPORT[package]


def test_package_initialisers_are_empty() -> None:
    assert [name_of(path) for path in FILES if path.name == "__init__.py" and path.read_text()] == []


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_what_answers_at_once_imports_no_torch(module: str) -> None:
    assert "torch" not in loaded_after_import(module)


def test_configurations_import_nothing_heavy() -> None:
    assert loaded_after_import(*CONFIGS).isdisjoint(HEAVY)


def test_the_check_for_torch_can_fail() -> None:
    assert "torch" in loaded_after_import("launch.training")


def test_no_file_is_too_long() -> None:
    lines = {name_of(path): len(path.read_text().splitlines()) for path in FILES}
    assert {name: count for name, count in lines.items() if count >= MOST_LINES} == {}


def unsafe_calls(source: str) -> list[str]:
    """Calls that could run code from a file, or a shell, as `line: what`."""
    found: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            found += [f"{node.lineno}: imports {name}" for name in names if name.split(".")[0] in UNSAFE_MODULES]
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if called == "torch.load" and keywords.get("weights_only") != "True":
            found.append(f"{node.lineno}: torch.load without weights_only=True")
        if called in ("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "eval", "exec", "os.system"):
            found.append(f"{node.lineno}: {called}")
        if keywords.get("shell") == "True":
            found.append(f"{node.lineno}: shell=True")
        if keywords.get("allow_pickle") == "True" or keywords.get("trust_remote_code") == "True":
            found.append(f"{node.lineno}: {called} runs code from a file")
    return found


UNSAFE_MODULES = ("pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib")


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_nothing_runs_code_from_a_file(path: Path) -> None:
    assert unsafe_calls(path.read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "yaml.load(text, Loader=yaml.Loader)",
        "subprocess.run('ls', shell=True)",
        "np.load(path, allow_pickle=True)",
    ],
)
def test_the_check_for_unsafe_calls_can_fail(source: str) -> None:
    assert unsafe_calls(source)


def test_no_silent_except() -> None:
    """A handler of everything must do something with what it caught."""
    silent = []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ExceptHandler) and isinstance(node.body[0], ast.Pass):
                silent.append(f"{name_of(path)}:{node.lineno}")
    assert silent == []


FAULT_TABLE = ROOT / "tests" / "chaos" / "FAULTS.md"


def fault_rows() -> list[list[str]]:
    """The cells of each row: number, fault, what must come of it, shown by."""
    lines = [line for line in FAULT_TABLE.read_text().splitlines() if re.match(r"\| \d+ \|", line)]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def test_every_fault_has_its_row_and_no_cell_is_empty() -> None:
    rows = fault_rows()
    assert [int(row[0]) for row in rows] == list(range(1, 26))
    assert [row[0] for row in rows if len(row) != 4 or not all(row)] == []


def test_the_tests_that_the_fault_table_names_exist() -> None:
    named = [name for row in fault_rows() for name in re.findall(r"`(tests/[\w/.]+)::(\w+)`", row[3])]
    assert len(named) > 40
    missing = [f"{file}::{test}" for file, test in named if f"def {test}(" not in (ROOT / file).read_text()]
    assert missing == []
