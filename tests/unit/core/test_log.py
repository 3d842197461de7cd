from __future__ import annotations

from collections.abc import Iterator

import pytest

from burnish.core import log
from burnish.core.errors import BurnishError


@pytest.fixture(autouse=True)
def _first_rank() -> Iterator[None]:
    yield
    log.set_rank(0)


def test_everything_goes_to_stderr_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    log.info("epoch [bold]1[/bold] :smile:")
    log.warn("slow")
    log.print_error(BurnishError("wrong [x]", hint="do [this]"))
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == "epoch [bold]1[/bold] :smile:\nwarning: slow\nerror: wrong [x]\nhint: do [this]\n"


def test_long_lines_are_not_broken(capsys: pytest.CaptureFixture[str]) -> None:
    log.info("word " * 100)
    assert capsys.readouterr().err.count("\n") == 1


def test_other_ranks_are_silent_but_for_errors(capsys: pytest.CaptureFixture[str]) -> None:
    log.set_rank(3)
    log.info("hello")
    log.warn("hello")
    log.console.print("hello")
    log.print_error(BurnishError("rank 3 broke"))
    log.info("hello")
    assert capsys.readouterr().err == "[rank 3] error: rank 3 broke\n"
