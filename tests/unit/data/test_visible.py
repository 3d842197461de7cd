from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from burnish.data.visible import plain, visible


def test_white_space_and_control_characters_are_to_be_seen() -> None:
    assert visible(["a b", "  c", "\n", "\td "]) == ["a b", "··c", "⏎\n", "⇥d·"]
    assert visible(["\x1b[31m", "\x07", "\u202e", "\x9b"]) == ["␛[31m", "␇", "‹U+202E›", "‹U+009B›"]


@given(st.lists(st.text("ab \n\t", max_size=5), max_size=5))
def test_every_token_keeps_its_place_and_its_letters(tokens: list[str]) -> None:
    drawn = visible(tokens)
    assert len(drawn) == len(tokens)
    back = [text.replace("⏎", "").replace("⇥", "\t").replace("·", " ") for text in drawn]
    assert back == tokens


def test_plain_text_is_one_line() -> None:
    assert plain("a  b\nc\x1b[2J\tz") == "a  b⏎c␛[2J␉z"
