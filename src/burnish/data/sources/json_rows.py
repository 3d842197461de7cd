"""Rows of JSON and JSON Lines files, one by one, with the memory of one row.

What the content is decides, not the suffix, since the two are often swapped:

    one object a line                     JSON Lines
    [{...}, {...}]                        an array of rows
    {"data": [{...}, {...}]}              the same in a wrapper (data, rows, examples, instances, records)
    {"prompt": [...], "completion": [...]}  columns: lists of equal length, or {"0": ..., "1": ...} as pandas writes them (read whole)
    {...} {...}                           objects one after another, however they are broken into lines
    {...}                                 a single row
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, cast

from burnish.core.errors import RowError, SourceError, Where
from burnish.data.sources import streams
from burnish.data.sources.file import File
from burnish.data.sources.row import Row

WRAPPERS = ("data", "rows", "examples", "instances", "records")
_HEAD = 1 << 20
_SPACE = re.compile(r"[ \t\n\r]*")
_ARRAY_OF_OBJECTS = re.compile(r"\[[ \t\n\r]*\{")
_NAMES: dict[type, str] = {
    dict: "an object",
    list: "a list",
    str: "a string",
    bool: "a boolean",
    int: "a number",
    float: "a number",
    type(None): "null",
}


def read_json(file: File) -> Iterator[Row]:
    """The rows of a .json or .jsonl file.

    Raises:
        SourceError: when the text is no JSON, with line and column. In JSON Lines a broken line harms only its own row, see `Row.fault`.
    """
    head = file.head(_HEAD)
    streams.check_head(head, file.shown)
    return _lines(file) if _is_lines(head, file.kind == "jsonl") else _document(file)


def _is_lines(head: bytes, by_suffix: bool) -> bool:
    """Whether the content is JSON Lines, as far as its first megabyte tells; the suffix decides where that leaves it open."""
    first, _, rest = head.removeprefix(b"\xef\xbb\xbf").lstrip().partition(b"\n")
    if first.startswith(b"["):
        return False
    following = rest.lstrip()
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        # Broken or longer than the head. In a .json file it is a document; in a .jsonl file it is one if the next line goes on with it.
        return by_suffix and (not following or following.startswith(b"{"))
    return bool(following)


def _lines(file: File) -> Iterator[Row]:
    number = 0
    with file.open() as stream:
        for line, offset, raw in streams.lines(stream):
            if not raw.strip():
                continue
            number += 1
            yield _line(Row(file.shown, number, {}, line), raw, offset)


def _line(row: Row, raw: bytes, offset: int) -> Row:
    try:
        value = json.loads(streams.decode(raw.rstrip(b"\r\n"), offset, row.where()))
    except SourceError as error:
        row.fault = RowError(error.message, where=row.where(), hint=error.hint)
    except json.JSONDecodeError as error:
        broken_off = error.msg.startswith("Unterminated string") or not error.doc[error.pos :].strip()
        reason = "the JSON breaks off within the line" if broken_off else f"invalid JSON at column {error.pos + 1}: {_reason(error)}"
        row.fault = RowError(reason, where=row.where())
    except (ValueError, RecursionError) as error:
        row.fault = RowError(f"invalid JSON: {_limit(error)}", where=row.where())
    else:
        return _filled(row, value)
    return row


def _filled(row: Row, value: object) -> Row:
    if isinstance(value, dict):
        row.fields = cast("dict[str, Any]", value)
    else:
        row.fault = RowError(
            f"expected an object with the row's fields, found {_NAMES.get(type(value), 'something else')}", where=row.where()
        )
    return row


def _reason(error: json.JSONDecodeError) -> str:
    reason = error.msg[:1].lower() + error.msg[1:]
    return {"invalid control character at": "a line break or control character inside a string"}.get(reason, reason)


def _limit(error: Exception) -> str:
    """What the decoder cannot take though it is JSON."""
    return "nested too deeply" if isinstance(error, RecursionError) else str(error).partition(";")[0]


def _document(file: File) -> Iterator[Row]:
    with file.open() as stream:
        window = _Window(streams.decoded(stream, file.shown), file.shown)
        for number, (line, value) in enumerate(_values(window), start=1):
            yield _filled(Row(file.shown, number, {}, line), value)


def _values(window: _Window) -> Iterator[tuple[int | None, object]]:
    """(line, value) of every row of a document."""
    match window.peek():
        case "":
            return
        case "[":
            yield from _elements(window)
            window.expect_end("the array")
        case "{":
            yield from _objects(window)
        case other:
            raise window.fault(f"expected '[' or '{{' at the start of the rows, found {other!r}")


def _elements(window: _Window) -> Iterator[tuple[int, object]]:
    window.take("[")
    if window.take_if("]"):
        return
    while True:
        window.row += 1
        window.peek()
        line = window.line
        yield line, window.value()
        if window.take_if("]"):
            return
        window.take(",")


def _objects(window: _Window) -> Iterator[tuple[int | None, object]]:
    window.peek()
    line = window.line
    members: dict[str, object] = {}
    wrapped = False
    for key in _keys(window):
        if key in WRAPPERS and window.looking_at(_ARRAY_OF_OBJECTS):
            wrapped = True
            yield from _elements(window)
        else:
            members[key] = window.value()
    if wrapped:
        window.expect_end("the object")
    elif window.peek():
        window.row = 1
        yield line, members
        while window.peek():
            window.row += 1
            line = window.line
            yield line, window.value()
    else:
        yield from _single(members, line, window.shown)


def _keys(window: _Window) -> Iterator[str]:
    """The keys of an object; whoever asks for the next one has taken the value."""
    window.take("{")
    if window.take_if("}"):
        return
    while True:
        if window.peek() != '"':
            raise window.fault("expected a key in double quotes")
        yield cast(str, window.key())
        if window.take_if("}"):
            return
        window.take(",")


def _single(members: Mapping[str, object], line: int, shown: str) -> Iterator[tuple[int | None, object]]:
    """A document that is one object: columns, or else a row."""
    columns = {key: column for key, value in members.items() if (column := _column(value)) is not None}
    only_numbers = all(isinstance(cell, int) for column in columns.values() for cell in column[:1])
    if len(columns) < len(members) or only_numbers:  # lists of token ids are the fields of one row
        yield line, members
        return
    sizes = {key: len(column) for key, column in columns.items()}
    if len(set(sizes.values())) > 1:
        raise SourceError(
            f"the columns differ in length: {', '.join(f'{key} has {size}' for key, size in sizes.items())}", where=Where(shown)
        )
    for cells in zip(*columns.values(), strict=True):
        yield None, dict(zip(columns, cells, strict=True))


def _column(value: object) -> list[object] | None:
    """The cells of a column, None for what is a field of a single row instead."""
    if isinstance(value, dict) and value and all(str(key).isdecimal() for key in cast("dict[object, object]", value)):
        return list(cast("dict[str, object]", value).values())  # pandas' default, {"0": ..., "1": ...}
    if not isinstance(value, list):
        return None
    cells = cast("list[object]", value)
    return None if cells and isinstance(cells[0], dict) else cells  # messages


class _Window:
    """A window that slides over the text of a file: it holds what is not decoded yet, and knows line and column.

    Python's own decoder works on whole strings. So a value is decoded from the text at hand; where that ends too early, the window
    grows (doubling, so the work stays linear in the file) and the value is decoded again.
    """

    _TAIL = 16  # an error closer to the end of the window than this may only mean that a token is cut in two

    def __init__(self, pieces: Iterator[str], shown: str) -> None:
        self.shown = shown
        self.line = 1
        self.row = 0
        self._pieces = pieces
        self._text = ""
        self._pos = 0
        self._line_start: int = 0  # of the current line, relative to the window
        self._ended = False
        self._decoder = json.JSONDecoder()

    def peek(self) -> str:
        """The next character that is no white space, `""` at the end."""
        while True:
            self._advance(cast("re.Match[str]", _SPACE.match(self._text, self._pos)).end())
            if self._pos < len(self._text):
                return self._text[self._pos]
            if self._ended:
                return ""
            self._grow()

    def looking_at(self, pattern: re.Pattern[str]) -> bool:
        """Whether the text goes on like this."""
        self.peek()
        while len(self._text) - self._pos < 1 << 12 and not self._ended:
            self._grow()
        return pattern.match(self._text, self._pos) is not None

    def take_if(self, character: str) -> bool:
        """Takes the next character if it is this one."""
        found = self.peek() == character
        if found:
            self._advance(self._pos + 1)
        return found

    def take(self, character: str) -> None:
        """Takes the next character, which must be this one."""
        if not self.take_if(character):
            raise self.fault(f"expected '{character}'")

    def expect_end(self, what: str) -> None:
        """Nothing may follow."""
        if self.peek():
            raise self.fault(f"there is more text after the end of {what}")

    def key(self) -> object:
        """Takes a key and its colon."""
        key = self.value()
        self.take(":")
        return key

    def value(self) -> object:
        """Takes the next value.

        Raises:
            SourceError: when it is no JSON.
        """
        self.peek()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._pos)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string") or error.pos >= len(self._text) - self._TAIL
                if not cut or self._ended:
                    raise self._undecodable(error) from None
            except (ValueError, RecursionError) as error:
                raise self.fault(_limit(error)) from None
            else:
                if end < len(self._text) or self._ended:  # else a number may go on
                    self._advance(end)
                    return value
            self._grow()

    def fault(self, message: str) -> SourceError:
        """The error for the current place."""
        where = Where(self.shown, line=self.line, row=self.row or None)
        if self._ended and self._pos >= len(self._text):
            return SourceError(f"the JSON breaks off on line {self.line}: {message}, found the end of the file", where=where)
        found = f", found {self._text[self._pos]!r}" if message.startswith("expected") and "found" not in message else ""
        return SourceError(f"invalid JSON at column {self._pos - self._line_start + 1}: {message}{found}", where=where)

    def _undecodable(self, error: json.JSONDecodeError) -> SourceError:
        begun = self.line
        self._advance(min(error.pos, len(self._text)))
        rest = self._text[self._pos :]
        if error.msg.startswith("Unterminated string") or not rest.strip():
            row = f"row {self.row}, which begins on line {begun}" if self.row else f"the value that begins on line {begun}"
            return SourceError(f"the JSON breaks off within {row}", where=Where(self.shown, line=self.line, row=self.row or None))
        return self.fault(_reason(error))

    def _advance(self, to: int) -> None:
        if newlines := self._text.count("\n", self._pos, to):
            self.line += newlines
            self._line_start = self._text.rfind("\n", self._pos, to) + 1
        self._pos = to

    def _grow(self) -> None:
        """Drops what is decoded and doubles the rest, or notes the end."""
        kept = self._text[self._pos :]
        pieces, size = [kept], 0
        while size <= len(kept):
            piece = next(self._pieces, None)
            if piece is None:
                self._ended = True
                break
            pieces.append(piece)
            size += len(piece)
        self._text, self._line_start, self._pos = "".join(pieces), self._line_start - self._pos, 0
