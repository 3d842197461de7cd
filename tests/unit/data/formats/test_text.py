from __future__ import annotations

import pytest

from burnish.data.types import Text

from .converting import convert, malformed


@pytest.mark.parametrize("column", ["text", "content"])
def test_the_text_stays_as_it_is(column: str) -> None:
    assert convert({column: " a\n\nb ", "url": "x"}, "auto") == Text(" a\n\nb ")


@pytest.mark.parametrize("text", ["", " \n\t"])
def test_blank_rows_are_empty(text: str) -> None:
    assert convert({"text": text}, "text") is None


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (None, "null"),
        (float("nan"), "NaN, a missing value"),
        (7, "the number 7"),
        (["a"], "a list"),
        ({}, "an object"),
        (b"a", "a value of type bytes"),
    ],
)
def test_what_is_no_text(value: object, found: str) -> None:
    assert malformed({"text": value}, "text") == f"field 'text': expected text, found {found}"


def test_half_a_surrogate_pair() -> None:
    assert malformed({"text": "é\udc00"}, "text") == "field 'text': the text holds \\udc00, half of a surrogate pair, at character 2"
