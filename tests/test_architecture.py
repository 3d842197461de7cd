"""The walls of the house, checked: one door per outside library, light commands, files and functions that can be read."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import burnish

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "src/burnish").rglob("*.py"))

DOORS = {
    "accelerate": {"engine/backend.py", "engine/backend_trackers.py"},
    "torch.distributed": {"engine/rendezvous.py", "engine/backend.py"}
    | {f"engine/backend_{part}.py" for part in ("collectives", "fsdp", "tensor", "weights")},
    "peft": {"models/adapters.py"},
    "bitsandbytes": {"models/load.py", "engine/optim.py"},
    "schedulefree": {"engine/optim.py"},
    "gguf": {"models/gguf.py"},
    "triton": {"kernels"},
}
TORCH_FREE = [
    "burnish.cli.main",
    "burnish.config.run",
    "burnish.config.load",
    "burnish.data.sources",
    "burnish.data.formats",
    "burnish.data.types",
]


def name(path: Path) -> str:
    return str(path.relative_to(ROOT / "src/burnish"))


def imports(path: Path) -> set[str]:
    """Every module that the file imports, with the packages around it, wherever the statement stands."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {".".join(name.split(".")[:parts]) for name in found for parts in range(1, name.count(".") + 2)}


@pytest.mark.parametrize("library", DOORS)
def test_an_outside_library_has_one_door(library: str) -> None:
    users = {name(path) for path in SOURCES if library in imports(path)}
    strangers = {user for user in users if not any(user == door or user.startswith(door + "/") for door in DOORS[library])}
    assert not strangers, f"{library} is imported in {sorted(strangers)}, its door is {sorted(DOORS[library])}"


def test_processes_speak_to_each_other_through_two_doors() -> None:
    """Collectives in the backend, notes in the rendezvous."""
    users = {name(path) for path in SOURCES if "torch.distributed" in path.read_text()}
    assert {user for user in users if not user.startswith(("engine/backend", "engine/rendezvous"))} == set()


@pytest.mark.parametrize("module", TORCH_FREE)
def test_light_modules_stay_light(module: str) -> None:
    code = f"import sys, {module}; print([m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_functions_and_files_stay_readable() -> None:
    long_files = {name(path): len(path.read_text().splitlines()) for path in SOURCES if len(path.read_text().splitlines()) > 500}
    assert not long_files
    long_functions = {
        f"{name(path)}:{node.name}": size
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (size := (node.end_lineno or 0) - node.lineno + 1) > 80
    }
    assert not long_functions


def test_nothing_dangerous_is_called() -> None:
    """No eval or exec, no unguarded torch.load, no global statement; pickle only between a process and its own workers, through a pipe."""
    found: list[str] = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            loads_pickle = called == "torch.load" and "weights_only=True" not in ast.unparse(node)
            loads_pickle |= called in ("pickle.load", "pickle.loads") and name(path) != "data/workers.py"
            if called in ("eval", "exec", "os.system") or loads_pickle or isinstance(node, ast.Global):
                found.append(f"{name(path)}:{getattr(node, 'lineno', 0)} {ast.unparse(node)[:60]}")
    assert not found


def test_the_public_namespace_is_what_it_says() -> None:
    public = {key for key in dir(burnish) if not key.startswith("_")}
    modules = {key for key in public if str(type(getattr(burnish, key))) == "<class 'module'>"}
    assert set(burnish.__all__) == public - modules
