"""Chat templates by name, for base models that have none and for data written in one of these formats.

Each is a `.jinja` file in this folder, written for burnish after the published format. What a model's own tokenizer brings is always
the better choice: these are for tokenizers that bring nothing.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from burnish.core.errors import TemplateError, nearest

_FOLDER = files(__name__)
_SUFFIX = ".jinja"


def names() -> list[str]:
    """The built-in templates, in alphabetical order."""
    return sorted(entry.name.removesuffix(_SUFFIX) for entry in _FOLDER.iterdir() if entry.name.endswith(_SUFFIX))


def resolve(name_or_path: str) -> str:
    """The Jinja text of a built-in template or of a file.

    Raises:
        TemplateError: Neither a built-in name nor a readable file.
    """
    known = names()
    if name_or_path in known:
        return _FOLDER.joinpath(name_or_path + _SUFFIX).read_text(encoding="utf-8")
    path = Path(name_or_path)
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise TemplateError(f"the chat template file '{name_or_path}' is not UTF-8 text") from None
    except OSError as error:
        if path.suffix:
            raise TemplateError(f"the chat template file '{name_or_path}' cannot be read: {error.strerror}") from None
    match = nearest(name_or_path, known)
    question = f"did you mean '{match}'?" if match else f"known: {', '.join(known)}"
    raise TemplateError(f"'{name_or_path}' is neither a built-in chat template nor a file; {question}")
