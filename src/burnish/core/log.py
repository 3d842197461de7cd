"""What burnish says to people: one console on stderr, so that stdout stays free for answers and JSON.

Under several processes only rank 0 speaks. An error of another rank is still printed, with its rank, because it may be the only one; but
what is wrong with the run file or the installation is the same for all processes of a machine, and the first of them says it for all.
Under burnish's own launcher every rank says all, and the launcher shows what is needed.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager
from typing import Final

from rich.console import Console
from rich.text import Text

from burnish.core.errors import BurnishError, ConfigError, DependencyError, Elsewhere, Interrupted


class RankConsole(Console):
    """A rich console that knows the rank of its process; it is silent on all but rank 0."""

    rank: int = 0


console: Final = RankConsole(stderr=True, highlight=False, soft_wrap=True)

LAUNCHER: Final = "BURNISH_LAUNCHER"
"""The variable by which a rank knows burnish's own launcher: the pipe that ends with it."""

_SAME_FOR_ALL = (ConfigError, DependencyError)


def set_rank(rank: int) -> None:
    """Tells the console which of several processes this is."""
    console.rank = rank
    console.quiet = rank != 0


def info(text: str) -> None:
    """Prints a line. The text is printed as it is: square brackets are not markup."""
    console.print(Text(text))


def warn(text: str) -> None:
    """Prints a line that a user should not miss."""
    console.print(Text.assemble(("warning: ", "yellow"), text))


def counted(number: int, noun: str) -> str:
    """`1 row`, `2,000 rows`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


@contextmanager
def busy(text: str, *, spinner: bool = True) -> Generator[None]:
    """Says what takes a moment: a spinner that vanishes when it is done on a terminal, a line elsewhere.

    Args:
        text: What is being done.
        spinner: False where something inside draws on the terminal itself, such as the bar of a download.
    """
    if spinner and console.is_terminal and not console.quiet:
        with console.status(Text(text)):
            yield
    else:
        info(text)
        yield


def print_error(error: BurnishError) -> None:
    """Prints an error's message, then its hint on a line of its own. No traceback: such an error is the input's fault."""
    if isinstance(error, Elsewhere) or (isinstance(error, _SAME_FOR_ALL) and not _heard()):
        return
    kind = "" if isinstance(error, Interrupted) else "error: "  # who asks for the end has it
    prefix = f"[rank {console.rank}] {kind}" if console.rank else kind
    with _aloud():
        console.print(Text.assemble((prefix, "bold red"), str(error)))
        if error.hint:
            console.print(Text.assemble(("hint: ", "cyan"), error.hint))


def notice(text: str) -> None:
    """Prints a line of whichever rank this is."""
    with _aloud():
        info(text)


@contextmanager
def _aloud() -> Generator[None]:
    silent, console.quiet = console.quiet, False
    try:
        yield
    finally:
        console.quiet = silent


def _heard() -> bool:
    """Whether this process is the first of its machine, or speaks to burnish's own launcher, which listens to all."""
    return LAUNCHER in os.environ or os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")) == "0"


if os.environ.get("WORLD_SIZE", "1") != "1":  # the launcher's word, until the processes have found each other
    set_rank(int(os.environ.get("RANK", "0")))
