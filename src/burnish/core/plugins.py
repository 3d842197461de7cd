"""Finding parts by name: a built-in kind is the name of its file, a part of your own is `./file.py:Name` or an entry point.

This is the only place where a lower layer reaches a higher one, and it does so by name, never by import statement. Listing names reads
folders and installed metadata only; code runs first when a part is loaded.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.metadata
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from burnish.core.errors import ConfigError, Where, did_you_mean

_PACKAGE = Path(__file__).parent.parent
_NOT_A_KIND = frozenset({"__init__", "base"})


def is_reference(text: str) -> bool:
    """Whether a kind names a Python file of the user's: `./my_loss.py:MyLoss`."""
    return ".py:" in text


def split_reference(reference: str, base: Path) -> tuple[Path, str]:
    """Splits `./file.py:Name` into the absolute file and the name; a relative file is looked for in the working directory, then in `base`.

    Raises:
        ConfigError: the text has not this shape, or there is no such file.
    """
    file, _, name = reference.rpartition(":")
    if not file.endswith(".py") or not name.isidentifier():
        raise ConfigError(f"expected './file.py:Name', found '{reference}'")
    places = dict.fromkeys((folder / Path(file).expanduser()).resolve() for folder in (Path.cwd(), base))
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise ConfigError(f"no Python file at {' or '.join(map(str, places))}")
    return found, name


def check_object(reference: str, base: Path) -> str:
    """Looks whether `./file.py:Name` can be loaded, without running the file, and returns it with an absolute path.

    Raises:
        ConfigError: no such file, it is no valid Python, or it defines no such name.
    """
    file, name = split_reference(reference, base)
    try:
        defined = _defined_names(ast.parse(file.read_bytes(), filename=str(file)))
    except (SyntaxError, ValueError) as error:
        raise _not_python(file, error) from None
    if defined is not None and name not in defined:
        raise ConfigError(f"defines no '{name}'; {did_you_mean(name, defined) if defined else 'it is empty'}", where=Where(str(file)))
    return f"{file}:{name}"


def load_object(reference: str, base: Path) -> object:
    """Loads `Name` from the local file of `./file.py:Name`. The file's code runs: it is a file that the user named on purpose.

    The module stays in `sys.modules` under a name made from its path, so that a second load returns the same object, and its classes can be
    pickled within the process.

    Args:
        reference: `./file.py:Name`; the file is looked for in the working directory, then in `base`.
        base: Usually the folder of the run file.

    Raises:
        ConfigError: no such file, it cannot be imported, or it defines no such name.
    """
    file, name = split_reference(reference, base)
    module = _import_file(file)
    if not hasattr(module, name):
        known = [key for key in vars(module) if not key.startswith("_")]
        raise ConfigError(f"defines no '{name}'; {did_you_mean(name, known) if known else 'it is empty'}", where=Where(str(file)))
    return getattr(module, name)


def names(group: str, suffix: str = ".py") -> tuple[str, ...]:
    """The built-in kinds of a group, e.g. `names("objectives")`, or its files of another kind: `names("data.templates", ".jinja")`."""
    folder = _PACKAGE.joinpath(*group.split("."))
    found = (file.stem for file in folder.glob(f"*{suffix}"))
    return tuple(sorted(name for name in found if name not in _NOT_A_KIND and not name.startswith("_")))


def installed(group: str) -> dict[str, importlib.metadata.EntryPoint]:
    """The parts that other installed packages offer under the entry point group `burnish.GROUP`."""
    return {entry.name: entry for entry in importlib.metadata.entry_points(group=f"burnish.{group}")}


def built_in(group: str, kind: str) -> ModuleType:
    """The module of a built-in kind: `built_in("objectives", "sft")` is `burnish.objectives.sft`.

    Raises:
        ConfigError: there is no such file; the message names the nearest kind.
    """
    known = names(group)
    if kind not in known:
        raise ConfigError(f"unknown kind '{kind}' of {group}; {did_you_mean(kind, known)}")
    return importlib.import_module(f"burnish.{group}.{kind}")


def load(group: str, kind: str, base: Path) -> object:
    """A built-in kind's module, else an installed package's entry point, else the object in a file of the user's.

    Raises:
        ConfigError: nothing goes by that name.
    """
    if is_reference(kind):
        return load_object(kind, base)
    entry = None if kind in names(group) else installed(group).get(kind)
    return built_in(group, kind) if entry is None else entry.load()


def _import_file(file: Path) -> ModuleType:
    unique = f"burnish_plugin_{file.stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:12]}"
    if unique in sys.modules:
        return sys.modules[unique]
    spec = importlib.util.spec_from_file_location(unique, file)
    if spec is None or spec.loader is None:
        raise ConfigError("cannot be imported as a Python file", where=Where(str(file)))
    module = importlib.util.module_from_spec(spec)
    sys.modules[unique] = module
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        del sys.modules[unique]
        raise _not_python(file, error) from None
    except Exception as error:
        del sys.modules[unique]
        line = _line_in(file, error)
        raise ConfigError(f"cannot be imported: {type(error).__name__}: {error}", where=Where(str(file), line)) from error
    return module


def _not_python(file: Path, error: SyntaxError | ValueError) -> ConfigError:
    line, text = (error.lineno, error.msg) if isinstance(error, SyntaxError) else (None, str(error))
    return ConfigError(f"is not valid Python: {text}", where=Where(str(file), line))


def _line_in(file: Path, error: Exception) -> int | None:
    # The deepest frame inside the user's own file, which is where an editor should go.
    line, trace = None, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == str(file):
            line = trace.tb_lineno
        trace = trace.tb_next
    return line


def _defined_names(tree: ast.Module) -> set[str] | None:
    """Names bound anywhere outside functions and classes, or None where only running the file could tell (`import *`, `__getattr__`)."""
    defined: set[str] = set()
    pending: list[ast.AST] = list(tree.body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            defined.add(node.name)
            continue
        if isinstance(node, ast.alias):
            defined.add((node.asname or node.name).partition(".")[0])
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            defined.add(node.id)
        pending.extend(ast.iter_child_nodes(node))
    return None if {"*", "__getattr__"} & defined else defined
