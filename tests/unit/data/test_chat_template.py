"""One run of a template: the very text that transformers renders, with the place of every message in it."""

from __future__ import annotations

import datetime

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from burnish.core.errors import RowError, TemplateError
from burnish.data.chat_template import OUTSIDE, TURN, ChatTemplate, as_chat
from burnish.data.traced import Span, spans_of
from burnish.data.types import Message, ToolCall

TALK = (
    Message("system", " S "),
    Message("user", "Ünïcode 😀 <b>&amp;'\"</b>"),
    Message("assistant", "", reasoning="because", tool_calls=(ToolCall("f", {"x": "é", "y": [1, None, True]}, id="1"),)),
    Message("tool", "42", tool_call_id="1", name="f"),
    Message("assistant", "A"),
)
TOOLS = ({"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"x": {"type": "string"}}}}},)
VARIABLES = {"bos_token": "<s>", "eos_token": "</s>"}

FEATURES = {
    "json": "{% for m in messages %}{{ m | tojson }}{{ m.tool_calls | tojson(indent=2) if m.tool_calls }}{% endfor %}{{ tools | tojson }}",
    "sorted json": "{% for m in messages %}{{ m | tojson(sort_keys=true, separators=(',', ':')) }}{% endfor %}",
    "block trimming": "{% for m in messages %}\n    {% if m.content %}\n  {{ m.content }}\n    {% endif %}\n{% endfor %}\n",
    "loop controls": "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{{ m.role }}{% break %}{% endfor %}",
    "filters": "{% for m in messages %}{{ m.content | trim | upper | replace('A', 'B') | indent(2) | default('x') | string }}{% endfor %}",
    "more filters": "{{ messages | map(attribute='role') | join(', ') }}{{ messages | map(attribute='content') | first | capitalize }}",
    "selecting": (
        "{{ (messages | selectattr('role', 'equalto', 'tool') | list)[0].content }}"
        "{{ messages | rejectattr('role', 'in', ['tool']) | list | length }}"
    ),
    "methods": "{% for m in messages %}{{ m.content.strip().split(' ')[-1] ~ m.get('name', 'none') ~ m.content.find('4') }}{% endfor %}",
    "items": "{% for m in messages %}{% for k, v in m.items() %}{{ k }}={{ v }};{% endfor %}{% endfor %}",
    "markup": "{% for m in messages %}{{ '<i>' + (m.content | safe) }}{{ m.content | e }}{% endfor %}",
    "call block": (
        "{% macro box(n) %}[{{ caller() }}:{{ n }}]{% endmacro %}"
        "{% for m in messages %}{% call box(1) %}{{ m.content }}{% endcall %}{% endfor %}"
    ),
    "filter block": "{% for m in messages %}{% filter upper %}{{ m.content }}!{% endfilter %}{% endfor %}",
    "set block": "{% for m in messages %}{% set x %}({{ m.content }}){% endset %}{{ x | trim('()') }}{% endfor %}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + m.content | length %}{% endfor %}{{ ns.n }}",
    "recursion": "{% for m in messages recursive %}{{ m.role }}{% endfor %}",
    "else": "{% for m in messages if m.role == 'none' %}x{% else %}nobody{% endfor %}",
    "arithmetic": "{% for m in messages %}{{ loop.index0 % 2 }}{{ '%s|%d|%%' % (m.role, 3) }}{{ '%5s' | format(m.role) }}{% endfor %}",
    "format method": "{% for m in messages %}{{ '{} {n}'.format(m.role, n=1) }}{{ '-'.join([m.role, m.content]) }}{% endfor %}",
    "tests": "{% for m in messages %}{{ m.content is string }}{{ m.x is defined }}{{ m is mapping }}{{ 'S' in m.content }}{% endfor %}",
    "tokens": "{{ bos_token + messages[0].content + eos_token }}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "reasoning": "{% for m in messages %}{{ m.reasoning_content or '-' }}{{ m.thinking or '-' }}{% endfor %}",
}


def plain(source: str, ask: bool) -> str:
    chats = [[as_chat(message) for message in TALK]]
    return render_jinja_template(chats, tools=list(TOOLS), chat_template=source, add_generation_prompt=ask, **VARIABLES)[0][0]


@pytest.mark.parametrize("feature", sorted(FEATURES))
def test_the_text_is_what_transformers_renders(feature: str) -> None:
    source = FEATURES[feature] + "{{ 'ask' if add_generation_prompt }}"
    template = ChatTemplate(source, VARIABLES, datetime.date.today())
    for ask in (False, True):
        assert str.__str__(template.render(TALK, TOOLS, add_generation_prompt=ask)) == plain(source, ask)


def test_the_date_is_as_transformers_tells_it() -> None:
    source = "{{ strftime_now('%d %B %Y %A') }}"
    template = ChatTemplate(source, VARIABLES, datetime.date.today())
    assert template.render(TALK) == plain(source, ask=False)


def test_fields_and_turns_are_where_they_stand() -> None:
    template = ChatTemplate("{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}{% endfor %}", VARIABLES, datetime.date.today())
    text = template.render((Message("user", " a "), Message("assistant", "b")))
    assert text == "<user>a<assistant>b"
    assert spans_of(text) == (
        Span(0, 0, (0, TURN)),  # type: ignore[arg-type]
        Span(1, 5, (0, "role")),  # type: ignore[arg-type]
        Span(6, 7, (0, "content")),  # type: ignore[arg-type]
        Span(7, 7, (1, TURN)),  # type: ignore[arg-type]
        Span(8, 17, (1, "role")),  # type: ignore[arg-type]
        Span(18, 19, (1, "content")),  # type: ignore[arg-type]
        Span(19, 19, (OUTSIDE, TURN)),  # type: ignore[arg-type]
    )


def test_an_inner_loop_hands_the_turn_back() -> None:
    source = "{% for m in messages %}{% for n in messages %}{% endfor %}{{ m.content }}{% endfor %}"
    text = ChatTemplate(source, VARIABLES, datetime.date.today()).render((Message("user", "a"), Message("assistant", "b")))
    turns = [span for span in spans_of(text) if span.origin.field == TURN]
    before_b = [span.origin.message for span in turns if span.start <= 1]
    assert before_b[-1] == 1
    assert [span.origin.message for span in turns if span.start == 0][-1] in (0, 1)


def test_arguments_are_json_text_for_templates_that_add_them_up() -> None:
    source = "{% for m in messages %}{% for c in m.tool_calls or [] %}{{ c.function.name + c.function.arguments }}{% endfor %}{% endfor %}"
    text = ChatTemplate(source, VARIABLES, datetime.date.today()).render(TALK)
    assert text == 'f{"x": "é", "y": [1, null, true]}'


def test_a_type_error_without_tool_calls_is_the_templates_own() -> None:
    template = ChatTemplate("{% for m in messages %}{{ m.content + 1 }}{% endfor %}", VARIABLES, datetime.date.today())
    with pytest.raises(RowError, match="fails on this conversation"):
        template.render(TALK[:2])
    with pytest.raises(RowError, match="fails on this conversation"):
        template.render(TALK)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception('no') }}",
        "{% for i in range(10 ** 9) %}x{% endfor %}",
    ],
)
def test_the_sandbox_holds(source: str) -> None:
    with pytest.raises(RowError, match=r"refuses|fails"):
        ChatTemplate(source, VARIABLES, datetime.date.today()).render(TALK)


def test_the_spans_are_hidden_from_templates() -> None:
    assert ChatTemplate("{{ messages[0].content._spans }}", VARIABLES, datetime.date.today()).render(TALK) == ""


def test_a_syntax_error_names_its_line() -> None:
    with pytest.raises(TemplateError, match="line 2"):
        ChatTemplate("\n{% for %}", VARIABLES, datetime.date.today())


def test_messages_are_as_apply_chat_template_takes_them() -> None:
    assert as_chat(TALK[2]) == {
        "role": "assistant",
        "content": "",
        "reasoning_content": "because",
        "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": {"x": "é", "y": [1, None, True]}}}],
    }
    assert as_chat(TALK[3]) == {"role": "tool", "content": "42", "tool_call_id": "1", "name": "f"}
    assert as_chat(Message("user", "Q")) == {"role": "user", "content": "Q"}
