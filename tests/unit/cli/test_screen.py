"""The screen: answers laid out in a terminal, and left alone in a file."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence

import pytest

from burnish.cli.screen import Screen


class Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(stream: io.StringIO, pieces: Sequence[str], *, label: str | None = "base") -> str:
    screen = Screen(stream)
    if label is not None:
        screen.label(label, 5)
    for piece in pieces:
        screen.write(piece)
    screen.end()
    return stream.getvalue()


@pytest.fixture(autouse=True)
def plain_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr("shutil.get_terminal_size", lambda *_: os.terminal_size((60, 20)))


def test_a_file_gets_the_text_as_it_is() -> None:
    text = "a line much longer than any terminal is wide, " * 4 + "\x1b[31mred\n\nend"
    assert shown(io.StringIO(), [text], label=None) == text + "\n"


def test_a_label_keeps_its_column_free() -> None:
    assert shown(io.StringIO(), ["one\ntw", "o"]) == "  base   one\n         two\n"


def test_empty_lines_stay_empty_and_indented_lines_indented() -> None:
    for stream in (io.StringIO(), Tty()):
        assert shown(stream, ["list:\n", "\n", "  - one\n  - two"]) == "  base   list:\n\n           - one\n           - two\n"


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_a_terminal_wraps_between_words_whatever_the_pieces(size: int) -> None:
    text = "The service desk is open Monday to Friday, 7:30 to 18:00.\nCall us, or open a ticket in the portal, at any time you like."
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    lines = shown(Tty(), pieces).splitlines()
    assert lines[0].startswith("  base   The service")
    assert all(len(line.rstrip()) <= 60 for line in lines)
    assert all(line.startswith(" " * 9) and not line.startswith(" " * 10) for line in lines[1:])
    assert " ".join(line[9:].strip() for line in lines) == text.replace("\n", " ")
    assert len(lines) == 4


def test_a_word_longer_than_the_line_is_not_cut() -> None:
    assert "x" * 200 in shown(Tty(), ["see " + "x" * 200 + " there"])


def test_wide_characters_count_as_two_columns() -> None:
    lines = shown(Tty(), ["漢字 " * 20]).splitlines()
    assert max(len(line.rstrip()) for line in lines) <= 9 + 35


def test_control_characters_do_not_reach_a_terminal() -> None:
    assert shown(Tty(), ["a\x1b[2Jb\rc\td"], label=None) == "a\ufffd[2Jb\ufffdc\td\n"
