"""`burnish recipes`: commented run files to start from."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from burnish.cli.output import write_new
from burnish.cli.reference import reference
from burnish.core.errors import BurnishError, ConfigError, did_you_mean

REFERENCE = "reference"
_FOLDER = files("burnish.cli") / "recipes"


def main(action: str, name: str | None, output: Path | None) -> None:
    """Lists the recipes, or writes one.

    Raises:
        BurnishError: no such action or recipe, or the file to write exists.
    """
    if action == "list":
        print("\n".join(f"  {recipe:<11}{purpose(recipe)}" for recipe in names()))
        print("\nburnish recipes new NAME -o run.yaml writes one, burnish train run.yaml runs it.")
    elif action == "new":
        _new(name, output)
    else:
        raise BurnishError(f"unknown action '{action}'; {did_you_mean(action, ('list', 'new'))}", hint="burnish recipes list | new NAME")


def names() -> list[str]:
    """The recipes, in alphabetical order."""
    return sorted([REFERENCE, *(entry.name.removesuffix(".yaml") for entry in _FOLDER.iterdir() if entry.name.endswith(".yaml"))])


def text_of(name: str) -> str:
    """The commented run file of a recipe.

    Raises:
        ConfigError: there is no such recipe.
    """
    if name not in names():
        raise ConfigError(f"no recipe '{name}'; {did_you_mean(name, names())}")
    return reference() if name == REFERENCE else (_FOLDER / f"{name}.yaml").read_text(encoding="utf-8")


def purpose(name: str) -> str:
    """What a recipe is for: its first line."""
    return text_of(name).partition("\n")[0].removeprefix("# ")


def _new(name: str | None, output: Path | None) -> None:
    if name is None:
        raise BurnishError(f"recipes new needs a name: {', '.join(names())}")
    text = text_of(name)
    if output is None:
        print(text, end="")
        return
    write_new(output, text)
    print(f"wrote {output}: edit it, then burnish check {output} and burnish train {output}")
