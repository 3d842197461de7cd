"""Headers, end tokens and the regions between them, learned from templates alone."""

from __future__ import annotations

import datetime

import pytest

from burnish.core.errors import TemplateError
from burnish.data.chat_template import ChatTemplate
from burnish.data.traced import Origin, Traced, concat, mark, trace
from burnish.data.turns import Turn, TurnShape, lay_out
from burnish.data.types import Message

TALK = (Message("user", "Q"), Message("assistant", "A"))


def shape(source: str, *special: str) -> TurnShape:
    template = ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"}, datetime.date.today())
    return TurnShape(template, ["<s>", "</s>", *special], ["<s>", "</s>", *special])


def written(source: str, *special: str, talk: tuple[Message, ...] = TALK) -> list[str]:
    learned = shape(source, *special)
    layout = lay_out(learned.template.render(talk))
    numbers = [number for number, message in enumerate(talk) if message.role == "assistant"]
    return [layout.text[start:end] for number in numbers for start, end in learned.regions(layout, talk, number)]


def turn(message: int) -> Traced:
    return mark(Origin(message, "turn"))


def said(message: int, text: str) -> Traced:
    return trace(text, Origin(message, "content"))


def laid(*parts: str) -> dict[int, list[Turn]]:
    text = concat(parts)
    assert isinstance(text, Traced)
    return lay_out(text).turns


LOOP = "{% for m in messages %}"


def test_a_thinking_prompt_may_be_longer_than_the_header_of_past_turns() -> None:
    source = LOOP + "{{ '<U>' if m.role == 'user' else '<A>' }}{{ m.content }}{{ '</s>' if m.role != 'user' }}{% endfor %}"
    source += "{{ '<A><think>' if add_generation_prompt }}"
    assert shape(source, "<U>", "<A>")._headers["user"] == ("<A><think>", "<A>")
    assert written(source, "<U>", "<A>") == ["A</s>"]


def test_the_header_may_stand_in_the_question() -> None:
    assert written(LOOP + "{{ '[I]' + m.content + '[/I]' if m.role == 'user' else ' ' + m.content + '</s>' }}{% endfor %}") == [" A</s>"]


def test_without_a_generation_prompt_the_text_before_the_answer_is_the_header() -> None:
    assert written(LOOP + "{{ m.role + ': ' + m.content + '</s>\n' }}{% endfor %}") == ["A</s>"]


def test_the_header_after_a_tool_is_learned_apart() -> None:
    source = LOOP + (
        "{% if m.role == 'user' %}{{ '<U>' + m.content + '<A>' }}{% elif m.role == 'tool' %}{{ '<T>' + m.content }}{% else %}"
        "{{ ('</T>' if loop.previtem.role == 'tool') ~ m.content ~ '</s>' }}{% endif %}{% endfor %}"
        "{{ '</T>' if add_generation_prompt and messages[-1].role == 'tool' }}"
    )
    talk = (*TALK, Message("tool", "t"), Message("assistant", "B"))
    assert written(source, "<U>", "<A>", "<T>", "</T>", talk=talk) == ["A</s>", "B</s>"]


def test_end_tokens_of_past_and_last_turns_may_differ() -> None:
    source = LOOP + "{{ m.role + ':' + m.content + ('<end>' if not loop.last else '<stop>') }}{% endfor %}"
    assert shape(source, "<end>", "<stop>").ends == ("<end>", "<stop>")
    assert written(source, "<end>", "<stop>", talk=TALK * 2) == ["A<end>", "A<stop>"]


def test_text_after_the_last_turn_is_not_part_of_it() -> None:
    source = LOOP + "{{ m.role + ':' + m.content + '<end>\n' }}{% endfor %}{{ eos_token }}"
    assert written(source, "<end>") == ["A<end>"]


def test_an_end_token_after_the_loop_ends_the_last_turn() -> None:
    source = LOOP + "{{ '</s>' if m.role == 'user' and not loop.first }}{{ m.role + ':' + m.content }}{% endfor %}{{ '</s>' }}"
    assert written(source) == ["A</s>"]


def test_several_closing_tokens_belong_to_the_turn() -> None:
    source = LOOP + "{{ m.role + ':<r>' + m.content + '</r><end>' }}{% endfor %}{{ 'assistant:' if add_generation_prompt }}"
    assert written(source, "<r>", "</r>", "<end>") == ["<r>A</r><end>"]


def test_a_turn_that_never_ends_is_refused() -> None:
    source = LOOP + "{{ m.role + ':' + m.content + ('</s>' if loop.last or m.content == 'Good day.' else '') }}{% endfor %}"
    with pytest.raises(TemplateError, match="no end-of-turn token after message 2"):
        written(source, talk=TALK * 2)


def test_a_template_without_any_end_token_is_refused() -> None:
    with pytest.raises(TemplateError, match=r"ends the assistant's turn with '\\n'"):
        shape(LOOP + "{{ m.role + ': ' + m.content + '\n' }}{% endfor %}")


def test_segments_run_from_mark_to_mark() -> None:
    turns = laid(turn(0), "<u>", said(0, "Q"), turn(1), "<a>", said(1, "A"), "</s>", turn(-1), "end")
    assert turns == {0: [Turn(0, 4, 4, 3, 4)], 1: [Turn(4, 12, 15, 7, 8)]}


def test_marks_without_text_between_leave_one_segment() -> None:
    turns = laid(turn(0), turn(1), turn(0), "<", turn(1), turn(0), said(0, "Q"), ">")
    assert turns == {0: [Turn(0, 3, 3, 1, 2)]}


def test_a_message_named_in_anothers_turn_has_no_turn_there() -> None:
    turns = laid(turn(0), said(0, "call"), turn(1), said(0, "call"), said(1, "found"))
    assert turns[0] == [Turn(0, 4, 4, 0, 4)]
    assert turns[1] == [Turn(4, 13, 13, 8, 13)]


def test_text_without_marks_is_found_by_its_anchors() -> None:
    turns = laid("<u>", said(0, "Q"), "<a>", said(1, "A"), "</s>")
    assert turns == {0: [Turn(0, 4, 7, 3, 4)], 1: [Turn(4, 8, 12, 7, 8)]}


def test_silent_turns_keep_their_place() -> None:
    assert laid(turn(0), said(0, "Q"), turn(1), "<a></s>") == {0: [Turn(0, 1, 1, 0, 1)], 1: [Turn(1, 8, 8)]}
