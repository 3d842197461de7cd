"""What burnish says to people: one console on stderr, so that stdout stays free for answers and JSON.

Under several processes only rank 0 speaks. An error of another rank is still printed, with its rank, because it may be the only one.
"""

from __future__ import annotations

from typing import Final

from rich.console import Console
from rich.text import Text

from burnish.core.errors import BurnishError


class RankConsole(Console):
    """A rich console that knows the rank of its process; it is silent on all but rank 0."""

    rank: int = 0


console: Final = RankConsole(stderr=True, highlight=False, soft_wrap=True)


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


def print_error(error: BurnishError) -> None:
    """Prints an error's message, then its hint on a line of its own. No traceback: such an error is the input's fault."""
    prefix = f"[rank {console.rank}] error: " if console.rank else "error: "
    silent, console.quiet = console.quiet, False
    try:
        console.print(Text.assemble((prefix, "bold red"), str(error)))
        if error.hint:
            console.print(Text.assemble(("hint: ", "cyan"), error.hint))
    finally:
        console.quiet = silent
