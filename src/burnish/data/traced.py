"""Text that remembers where it came from.

A chat template is a program: it trims, splits, joins and drops what it is given, and nobody can tell from its source where a message
will land in its output. So the template is given `Traced` strings. A `Traced` is a `str` with the very same text, plus a list of spans
(start, end, origin): which characters came from which field of which message. Its operations compute the text exactly as `str` does and
only carry the spans along, so the output of the template is character for character what it would be with plain strings.

An operation that is not followed (rare: `str.format`, `Markup`) gives a plain `str`: the spans are lost, never wrong.
"""

# ruff: noqa: D102 (the methods are those of `str`)
from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, SupportsIndex, cast

_PERCENT = re.compile(r"(%.)")


class Origin(NamedTuple):
    """Where a piece of text came from."""

    message: int
    field: str


class Span(NamedTuple):
    """Characters start..end of a text came from `origin`. An empty span is a mark at one place."""

    start: int
    end: int
    origin: Origin


class Traced(str):
    """A `str` that knows the origin of its characters; see the module's text."""

    __slots__ = ("_spans",)  # an underscore, so that the sandbox keeps templates away from it
    _spans: tuple[Span, ...]

    def __new__(cls, text: str, spans: Iterable[Span] = ()) -> Traced:
        """The text `text` with `spans` in the order of their places."""
        traced = super().__new__(cls, text)
        traced._spans = tuple(spans)
        return traced

    def __str__(self) -> str:
        return self

    # -- cutting ----------------------------------------------------------------------------------------------------------------

    def _cut(self, start: int, end: int) -> Traced:
        """Characters start..end. Spans are clipped; one that held text and holds none afterwards is dropped."""
        spans = [
            Span(max(s, start) - start, min(e, end) - start, origin)
            for s, e, origin in self._spans
            if (s < end and e > start) or (s == e and start <= s <= end) or (s <= start == end <= e)
        ]
        return Traced(str.__getitem__(self, slice(start, end)), spans)

    def __getitem__(self, key: SupportsIndex | slice) -> str:
        if not isinstance(key, slice):
            at = range(len(self))[key]
            return self._cut(at, at + 1)
        start, stop, step = key.indices(len(self))
        return self._cut(start, max(start, stop)) if step == 1 else str.__getitem__(self, key)

    def strip(self, chars: str | None = None, /) -> str:
        end = len(str.rstrip(self, chars))
        start = min(len(self) - len(str.lstrip(self, chars)), end)
        return self._cut(start, end)

    def lstrip(self, chars: str | None = None, /) -> str:
        return self._cut(len(self) - len(str.lstrip(self, chars)), len(self))

    def rstrip(self, chars: str | None = None, /) -> str:
        return self._cut(0, len(str.rstrip(self, chars)))

    def removeprefix(self, prefix: str, /) -> str:
        return self._cut(len(prefix), len(self)) if self.startswith(prefix) else self

    def removesuffix(self, suffix: str, /) -> str:
        return self._cut(0, len(self) - len(suffix)) if suffix and self.endswith(suffix) else self

    def _pieces(self, pieces: Iterable[str]) -> list[str]:
        """Pieces that follow each other in this text, with separators between them, as cuts of it."""
        cuts: list[str] = []
        at = 0
        for piece in pieces:
            at = str.find(self, piece, at)
            cuts.append(self._cut(at, at + len(piece)))
            at += len(piece)
        return cuts

    def _separated(self, pieces: Iterable[str], separator: str) -> list[str]:
        """The same where the separator is known, so that empty pieces have one place only."""
        cuts: list[str] = []
        at = 0
        for piece in pieces:
            cuts.append(self._cut(at, at + len(piece)))
            at += len(piece) + len(separator)
        return cuts

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        pieces = str.split(self, sep, maxsplit)
        return self._pieces(pieces) if sep is None else self._separated(pieces, sep)

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        pieces = str.rsplit(self, sep, maxsplit)
        return self._pieces(pieces) if sep is None else self._separated(pieces, sep)

    def splitlines(self, keepends: bool = False) -> list[str]:
        cuts: list[str] = []
        at = 0
        for whole, line in zip(str.splitlines(self, keepends=True), str.splitlines(self, keepends=keepends), strict=True):
            cuts.append(self._cut(at, at + len(line)))
            at += len(whole)
        return cuts

    def partition(self, sep: str, /) -> tuple[str, str, str]:
        first, second, third = self._separated(str.partition(self, sep), "")
        return first, second, third

    def rpartition(self, sep: str, /) -> tuple[str, str, str]:
        first, second, third = self._separated(str.rpartition(self, sep), "")
        return first, second, third

    # -- joining ----------------------------------------------------------------------------------------------------------------

    def __add__(self, other: str, /) -> str:
        return concat((self, other)) if isinstance(other, str) else NotImplemented  # pyright: ignore[reportUnnecessaryIsInstance]

    def __radd__(self, other: str, /) -> str:
        return concat((other, self)) if isinstance(other, str) else NotImplemented  # pyright: ignore[reportUnnecessaryIsInstance]

    def join(self, parts: Iterable[str], /) -> str:
        return join(self, parts)

    def replace(self, old: str, new: str, count: SupportsIndex = -1, /) -> str:
        if not old:
            return self._changed(str.replace(self, old, new, count))
        return join(new, self.split(old, count))

    # -- changing the characters ------------------------------------------------------------------------------------------------

    def _changed(self, text: str) -> Traced:
        """The outcome of an operation that changes characters: the spans stay where the length stays, else one span covers all."""
        if len(text) == len(self):
            return Traced(text, self._spans)
        origin = single_origin(self)
        return Traced(text, (Span(0, len(text), origin),) if origin else ())

    def upper(self) -> str:
        return self._changed(str.upper(self))

    def lower(self) -> str:
        return self._changed(str.lower(self))

    def title(self) -> str:
        return self._changed(str.title(self))

    def capitalize(self) -> str:
        return self._changed(str.capitalize(self))

    def swapcase(self) -> str:
        return self._changed(str.swapcase(self))

    def casefold(self) -> str:
        return self._changed(str.casefold(self))

    def expandtabs(self, tabsize: SupportsIndex = 8) -> str:
        return self._changed(str.expandtabs(self, tabsize))


def spans_of(text: str) -> tuple[Span, ...]:
    """The spans of a text; none for a plain `str`."""
    return text._spans if isinstance(text, Traced) else ()  # pyright: ignore[reportPrivateUsage]


def concat(parts: Iterable[str]) -> str:
    """`"".join(parts)` that keeps the spans."""
    texts = list(parts)
    spans: list[Span] = []
    at = 0
    for text in texts:
        spans += [Span(start + at, end + at, origin) for start, end, origin in spans_of(text)]
        at += len(text)
    joined = "".join(texts)
    return Traced(joined, spans) if spans else joined


def join(separator: str, parts: Iterable[str]) -> str:
    """`separator.join(parts)` that keeps the spans."""
    texts = list(parts)
    woven = [piece for text in texts for piece in (separator, text)]
    return concat(woven[1:])


def percent(template: str, values: Any) -> str:
    """`template % values` that keeps the spans of what goes into plain `%s`."""
    text = template % values
    places = iter(cast("tuple[Any, ...]", values) if isinstance(values, tuple) else (values,))
    parts: list[str] = []
    for place in _PERCENT.split(template):
        if place == "%s":
            parts.append(str(next(places, "")))
        elif place.startswith("%"):
            return text  # anything more than `%s` is not followed
        else:
            parts.append(place)
    followed = concat(parts)
    return followed if followed == text else text


def trace(value: Any, origin: Origin) -> Any:
    """The same JSON-like value with every string in it (keys too) traced to `origin`. A fresh copy of dicts and lists."""
    if isinstance(value, str):
        return Traced(value, (Span(0, len(value), origin),))
    if isinstance(value, Mapping):
        pairs = cast("Mapping[Any, Any]", value)
        return {trace(key, origin): trace(item, origin) for key, item in pairs.items()}
    if isinstance(value, list | tuple):
        return [trace(item, origin) for item in cast("Sequence[Any]", value)]
    return value


def mark(origin: Origin) -> Traced:
    """An empty text that marks its place."""
    return Traced("", (Span(0, 0, origin),))


def origins(value: Any) -> Iterator[Origin]:
    """The origins of all strings in a JSON-like value."""
    if isinstance(value, str):
        for span in spans_of(value):
            yield span.origin
    elif isinstance(value, Mapping):
        for pair in cast("Mapping[Any, Any]", value).items():
            yield from origins(pair)
    elif isinstance(value, list | tuple):
        for item in cast("Sequence[Any]", value):
            yield from origins(item)


def single_origin(value: Any) -> Origin | None:
    """The origin of a value that comes from one message alone."""
    found = set(origins(value))
    return min(found) if len({origin.message for origin in found}) == 1 else None
