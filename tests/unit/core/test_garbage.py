from __future__ import annotations

import gc
import subprocess
import sys
import weakref

import pytest

from burnish.core.garbage import paused


class Thing:
    """Refers to itself, so that only a collection takes it away."""

    def __init__(self) -> None:
        self.me = self


@pytest.fixture(autouse=True)
def _collecting() -> None:
    assert gc.isenabled()


def test_nothing_is_collected_inside_and_everything_after() -> None:
    with paused():
        seen = weakref.ref(Thing())
        more = [[] for _ in range(100_000)]  # would set off a collection
        assert not gc.isenabled()
        assert seen() is not None
    assert gc.isenabled()
    del more
    gc.collect()
    assert seen() is None


def test_a_process_that_collects_nothing_still_does_not_after() -> None:
    gc.disable()
    try:
        with paused():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_it_goes_on_collecting_after_an_error() -> None:
    with pytest.raises(ValueError, match="no"), paused():
        raise ValueError("no")
    assert gc.isenabled()


def test_what_is_kept_is_not_looked_through_until_the_end_of_the_process() -> None:
    code = (
        "import atexit, gc\n"
        "atexit.register(lambda: print('left at the end:', gc.get_freeze_count()))\n"
        "from burnish.core.garbage import paused\n"
        "with paused(keep=True):\n"
        "    import burnish.run\n"
        "print('kept:', gc.get_freeze_count() > 100_000, 'collecting:', gc.isenabled())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "kept: True collecting: True\nleft at the end: 0\n"
    assert "leaked" not in done.stderr


def test_the_package_pauses_while_it_imports_and_leaves_a_users_process_as_it_was() -> None:
    code = "import gc, burnish\nburnish.Run\nprint(gc.isenabled(), gc.get_freeze_count())\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "True 0\n"
