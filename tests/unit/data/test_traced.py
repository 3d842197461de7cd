"""A traced string is the very string, and knows where each of its characters came from."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from burnish.data.traced import Origin, Span, Traced, concat, join, mark, origins, single_origin, spans_of, trace

HERE, THERE = Origin(0, "content"), Origin(1, "content")
TEXT = st.text(alphabet="ab \n\t</", max_size=12)

SAME_CHARACTERS: dict[str, Callable[[str], object]] = {
    "strip": lambda s: s.strip(),
    "strip chars": lambda s: s.strip("a<"),
    "lstrip": lambda s: s.lstrip("\n"),
    "rstrip": lambda s: s.rstrip(),
    "slice": lambda s: s[1:5],
    "tail": lambda s: s[-3:],
    "head": lambda s: s[:-1],
    "backwards": lambda s: s[::-1],
    "split": lambda s: s.split(),
    "split at": lambda s: s.split("a"),
    "split once": lambda s: s.split("a", 1),
    "rsplit": lambda s: s.rsplit("b", 1),
    "rsplit space": lambda s: s.rsplit(None, 1),
    "splitlines": lambda s: s.splitlines(),
    "splitlines keepends": lambda s: s.splitlines(True),
    "partition": lambda s: s.partition("a"),
    "rpartition": lambda s: s.rpartition("</"),
    "removeprefix": lambda s: s.removeprefix("a"),
    "removesuffix": lambda s: s.removesuffix("b"),
    "add": lambda s: "<" + s + ">",
    "join": lambda s: s.join(["x", "y"]),
    "replace": lambda s: s.replace("a", "xyz"),
    "replace once": lambda s: s.replace("ab", "", 1),
    "replace nothing": lambda s: s.replace("", "-"),
    "upper": lambda s: s.upper(),
    "lower": lambda s: s.lower(),
    "title": lambda s: s.title(),
    "capitalize": lambda s: s.capitalize(),
    "swapcase": lambda s: s.swapcase(),
    "casefold": lambda s: s.casefold(),
    "expandtabs": lambda s: s.expandtabs(3),
    "str": lambda s: str(s),
    "test": lambda s: (s == "ab", "a" in s, s.startswith("a"), len(s), hash(s)),
}


def cases() -> st.SearchStrategy[tuple[str, str]]:
    return st.tuples(st.sampled_from(sorted(SAME_CHARACTERS)), TEXT)


@given(cases())
def test_every_operation_gives_what_str_gives(case: tuple[str, str]) -> None:
    name, text = case
    operation = SAME_CHARACTERS[name]
    assert operation(trace(text, HERE)) == operation(text)


@given(TEXT, TEXT, st.integers(-14, 14), st.integers(-14, 14))
def test_cuts_keep_the_origin_of_every_character(left: str, right: str, start: int, end: int) -> None:
    both = concat([trace(left, HERE), "|", trace(right, THERE)])
    whole = "".join("0" * len(left) + "|" + "1" * len(right))
    cut = both[start:end]
    letters = ["|"] * len(cut)
    for low, high, origin in spans_of(cut):
        letters[low:high] = [str(origin.message)] * (high - low)
    assert "".join(letters) == whole[start:end]


@given(TEXT)
def test_pieces_of_a_split_lie_where_they_say(text: str) -> None:
    traced = trace(text, HERE)
    for piece in [*traced.split(), *traced.split("a"), *traced.splitlines(), *traced.partition("<")]:
        assert all(high <= len(piece) for _, high, _ in spans_of(piece))
        assert sum(high - low for low, high, _ in spans_of(piece)) == len(piece)


def test_replaced_text_lies_between_its_neighbours() -> None:
    assert spans_of(trace("xay", HERE).replace("a", "--")) == (Span(0, 1, HERE), Span(3, 4, HERE))


def test_text_stripped_to_nothing_keeps_its_place() -> None:
    assert spans_of(trace("  ", HERE).strip()) == (Span(0, 0, HERE),)


def test_marks_survive_joining_and_cutting() -> None:
    text = concat(["ab", mark(THERE), trace("cd", HERE)])
    assert text == "abcd"
    assert spans_of(text[1:]) == (Span(1, 1, THERE), Span(1, 3, HERE))


def test_plain_text_stays_plain() -> None:
    assert type(concat(["a", "b"])) is str
    assert spans_of("a") == ()
    assert type(join(", ", ["a", "b"])) is str


def test_join_weaves_the_separator() -> None:
    joined = join(", ", [trace("a", HERE), trace("b", THERE)])
    assert joined == "a, b"
    assert spans_of(joined) == (Span(0, 1, HERE), Span(3, 4, THERE))


def test_nested_values_are_traced_and_found() -> None:
    value = trace({"key": ["a", 1, {"b": None}], "n": 2.5}, HERE)
    assert value == {"key": ["a", 1, {"b": None}], "n": 2.5}
    assert set(origins(value)) == {HERE}
    assert single_origin([value, trace("x", THERE)]) is None
    assert single_origin(3) is None


def test_a_longer_change_of_case_covers_all() -> None:
    assert spans_of(trace("straße", HERE).upper()) == (Span(0, 7, HERE),)


def test_adding_no_text_is_refused() -> None:
    with pytest.raises(TypeError):
        trace("a", HERE) + 1  # type: ignore[operator]


def test_indexing_counts_from_both_ends() -> None:
    assert isinstance(trace("abc", HERE)[-1], Traced)
    assert trace("abc", HERE)[-1] == "c"
    with pytest.raises(IndexError):
        trace("abc", HERE)[3]
