"""The `burnish` command, also as `python -m burnish`.

The command line takes a moment to be imported, and Python would answer Ctrl-C in that moment with a traceback.
"""

from __future__ import annotations

import os
import signal
from types import FrameType


def main() -> None:
    """Imports the command line and runs it. Ctrl-C before that ends with exit code 130, at once and in silence."""
    waiting = signal.getsignal(signal.SIGINT)
    ours = waiting is signal.default_int_handler  # else it is ignored, or in somebody's care
    if ours:
        signal.signal(signal.SIGINT, _leave)
    from burnish.cli.main import main as command

    if ours:
        signal.signal(signal.SIGINT, waiting)
    command()


def _leave(number: int, frame: FrameType | None) -> None:
    os._exit(128 + number)


if __name__ == "__main__":
    main()
