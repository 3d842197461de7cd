"""Runs a chat template once and tells where every message landed in its output.

Two devices, neither of which changes one character of the output (see `traced.py`):

- The messages that the template is given are made of `Traced` strings, so their text is recognised wherever it comes out.
- The compiled template is instrumented: whenever a loop takes up a message, an empty mark is put into the output. So the output falls
  into segments, one for each message, and a message that the template renders without any text of its own still has its place.

The Jinja environment has the settings that `transformers.apply_chat_template` has: sandbox, block trimming, loop controls, the
`{% generation %}` tag, JSON without escapes, `raise_exception` and `strftime_now`.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from burnish.core.errors import RowError, TemplateError
from burnish.data.traced import Origin, Traced, concat, join, mark, percent, single_origin, trace
from burnish.data.types import Message, ToolCall

TURN = "turn"
"""Field of the marks that stand where the template takes up a message."""
TOOLS = "tools"
OUTSIDE = -1
"""Message number of what belongs to no message: tools, text outside of loops."""

_ENTER, _TURN, _ASSIGNED, _LEAVE = "_burnish_enter", "_burnish_turn", "_burnish_assigned", "_burnish_leave"
_CONCAT, _PERCENT = "_burnish_concat", "_burnish_percent"


def as_chat(message: Message, *, arguments_as_text: bool = False) -> dict[str, Any]:
    """A message as `apply_chat_template` takes it; fields that are not there are left out."""
    chat: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.reasoning is not None:
        chat["reasoning_content"] = message.reasoning
    if message.tool_calls:
        chat["tool_calls"] = [_as_call(call, arguments_as_text) for call in message.tool_calls]
    if message.tool_call_id is not None:
        chat["tool_call_id"] = message.tool_call_id
    if message.name is not None:
        chat["name"] = message.name
    return chat


def _as_call(call: ToolCall, arguments_as_text: bool) -> dict[str, Any]:
    arguments = json.dumps(call.arguments, ensure_ascii=False) if arguments_as_text else dict(call.arguments)
    identity = {"id": call.id} if call.id is not None else {}
    return {**identity, "type": "function", "function": {"name": call.name, "arguments": arguments}}


class ChatTemplate:
    """A compiled chat template.

    Args:
        source: The Jinja text.
        variables: What the template sees beside the messages: `bos_token` and the like.
        today: The day that `strftime_now` tells, so that one run sees one day.

    Raises:
        TemplateError: The Jinja text has a syntax error.
    """

    def __init__(self, source: str, variables: Mapping[str, Any], today: datetime.date) -> None:
        self.source = source
        self._variables = dict(variables)
        environment = _Environment(today)
        try:
            tree = environment.parse(source)
            code = environment.compile(_Instrument(environment).visit(tree))
        except jinja2.TemplateSyntaxError as error:
            raise TemplateError(f"the chat template has a syntax error in line {error.lineno}: {error.message}") from None
        self._arguments_as_text = False
        self._template = jinja2.Template.from_code(environment, code, environment.make_globals(None))

    def render(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = (), *, add_generation_prompt: bool = False
    ) -> Traced:
        """The text of a conversation, with spans for every field of every message and marks where messages begin.

        Raises:
            RowError: The template refuses the conversation (`raise_exception`) or fails on it; its message is passed on.
        """
        try:
            return self._run(messages, tools, add_generation_prompt)
        except jinja2.TemplateError as error:
            raise RowError(f"the chat template refuses this conversation: {error}") from None
        except TypeError as error:
            # Some templates (DeepSeek) put a call's arguments into the text as they are, so they need them as JSON text.
            if self._arguments_as_text or not any(message.tool_calls for message in messages):
                raise RowError(f"the chat template fails on this conversation: {error}") from None
            self._arguments_as_text = True
            try:
                return self.render(messages, tools, add_generation_prompt=add_generation_prompt)
            except RowError:
                self._arguments_as_text = False
                raise
        except (ValueError, AttributeError, ArithmeticError, LookupError, RecursionError) as error:
            raise RowError(f"the chat template fails on this conversation: {error}") from None

    def _run(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> Traced:
        turns = _Turns()
        context = self._template.new_context(
            {
                **self._variables,
                "messages": [_traced_message(number, message, self._arguments_as_text) for number, message in enumerate(messages)],
                "tools": trace(list(tools), Origin(OUTSIDE, TOOLS)) if tools else None,
                "documents": None,
                "add_generation_prompt": add_generation_prompt,
                _ENTER: turns.enter,
                _TURN: turns.turn,
                _ASSIGNED: turns.assigned,
                _LEAVE: turns.leave,
                _CONCAT: _concat,
                _PERCENT: _percent,
            }
        )
        text = concat(self._template.root_render_func(context))
        return text if isinstance(text, Traced) else Traced(text)


def _traced_message(number: int, message: Message, arguments_as_text: bool) -> dict[str, Any]:
    chat = as_chat(message, arguments_as_text=arguments_as_text)
    traced = {field: trace(value, Origin(number, field)) for field, value in chat.items() if field != "tool_calls"}
    if "reasoning_content" in traced:  # gpt-oss reads `thinking`; transformers offers both names, in this order
        traced = {"thinking": traced["reasoning_content"], **traced}
    origin = Origin(number, "tool_calls")
    if message.tool_calls:  # the values alone: a template looks the keys up
        traced["tool_calls"] = [
            call | {"function": {key: trace(value, origin) for key, value in call["function"].items()}} for call in chat["tool_calls"]
        ]
    return traced


class _Turns:
    """Follows which message the template works on while it runs. Each method gives what is put into the output."""

    def __init__(self) -> None:
        self._current = OUTSIDE
        self._loops: list[tuple[int, bool]] = []  # for each open loop: the message before it, and whether this round has its message

    def enter(self) -> str:
        """A loop begins."""
        self._loops.append((self._current, False))
        return ""

    def turn(self, *targets: Any) -> str:
        """A round of a loop begins with these values."""
        before, _ = self._loops[-1]
        message = next((number for number in map(_message_number, targets) if number is not None), None)
        self._loops[-1] = (before, message is not None)
        return self._move(message)

    def assigned(self, value: Any) -> str:
        """A variable is set. In a loop over numbers, the first message looked up is the one worked on."""
        message = _message_number(value)
        if message is None or not self._loops or self._loops[-1][1]:
            return ""
        self._loops[-1] = (self._loops[-1][0], True)
        return self._move(message)

    def leave(self) -> str:
        """A loop ends: the message before it is worked on again."""
        return self._move(self._loops.pop()[0])

    def _move(self, message: int | None) -> str:
        if message is None or message == self._current:
            return ""
        self._current = message
        return mark(Origin(message, TURN))


def _message_number(value: Any) -> int | None:
    """Which message a value is, if it is one (or a rewritten copy of one)."""
    if not isinstance(value, Mapping) or "role" not in value:
        return None
    message = cast("Mapping[str, Any]", value)
    origin = single_origin(message["role"]) or single_origin(message.get("content"))
    return origin.message if origin and origin.message != OUTSIDE else None


class _Instrument(NodeTransformer):
    """Puts the calls of `_Turns` into a parsed template, and makes `~` keep spans."""

    def __init__(self, environment: jinja2.Environment) -> None:
        self._environment = environment

    def _call(self, name: str, arguments: list[nodes.Expr], line: int) -> nodes.Call:
        call = nodes.Call(nodes.Name(name, "load"), arguments, [], None, None)
        call.set_lineno(line, override=True)
        call.set_environment(self._environment)
        return call

    def _emit(self, name: str, variables: Iterable[str], line: int) -> nodes.Output:
        arguments: list[nodes.Expr] = [nodes.Name(variable, "load") for variable in variables]
        output = nodes.Output([self._call(name, arguments, line)])
        output.set_lineno(line)
        return output

    def visit_For(self, node: nodes.For) -> list[nodes.Node]:
        self.generic_visit(node)
        targets = [node.target] if isinstance(node.target, nodes.Name) else list(node.target.find_all(nodes.Name))
        node.body.insert(0, self._emit(_TURN, [target.name for target in targets], node.lineno))
        return [self._emit(_ENTER, (), node.lineno), node, self._emit(_LEAVE, (), node.lineno)]

    def visit_Assign(self, node: nodes.Assign) -> list[nodes.Node]:
        self.generic_visit(node)
        if not (isinstance(node.target, nodes.Name) and isinstance(node.node, nodes.Getitem)):
            return [node]
        return [node, self._emit(_ASSIGNED, [node.target.name], node.lineno)]

    def visit_Mod(self, node: nodes.Mod) -> nodes.Node:
        self.generic_visit(node)
        return self._call(_PERCENT, [node.left, node.right], node.lineno)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return self._call(_CONCAT, node.nodes, node.lineno)


def _concat(*values: Any) -> str:
    return concat(map(str, values))


def _percent(left: Any, right: Any) -> Any:
    return percent(left, right) if isinstance(left, str) else left % right


def _format(value: str, *args: Any, **kwargs: Any) -> str:
    return percent(str(value), args) if args and not kwargs else str(value) % (kwargs or args)


class _GenerationTag(jinja2.ext.Extension):
    """Reads `{% generation %}`, which some templates carry, as the plain block that it is for the output."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own protocol)

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja as transformers sets it up, with `concat`, `join` and `tojson` that keep spans."""

    concat = staticmethod(concat)

    def __init__(self, today: datetime.date) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols])
        filters = cast("dict[str, Any]", cast("Any", self).filters)  # Jinja leaves the types of its tables open
        filters |= {"tojson": _tojson, "format": _format, "join": _keep_join(filters["join"])}
        names = cast("dict[str, Any]", cast("Any", self).globals)
        names |= {"raise_exception": _raise_exception, "strftime_now": _strftime(today)}

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        if getattr(obj, "__name__", None) == "join" and type(getattr(obj, "__self__", None)) is str:
            obj = Traced(obj.__self__).join
        return super().call(context, obj, *args, **kwargs)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime(today: datetime.date) -> Callable[[str], str]:
    moment = datetime.datetime.combine(today, datetime.datetime.now().time())

    def strftime_now(format: str) -> str:
        return moment.strftime(format)

    return strftime_now


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False) -> str:
    text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    origin = single_origin(value)
    return trace(text, origin) if origin else text


def _keep_join(plain: Callable[..., str]) -> Callable[..., str]:
    @jinja2.pass_eval_context
    def keep_join(eval_context: Any, value: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
        if attribute is not None or eval_context.autoescape:
            return plain(eval_context, value, d, attribute)
        return join(str(d), map(str, value))

    return keep_join
