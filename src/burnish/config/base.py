"""The bricks of the run file: strict models, durations that carry their unit, and marks that say how a value may be written.

A mark stands in a field's annotation, `Annotated[str, Location("model")]`. The loader, the JSON schema and the messages all read it
there, so that what a key admits is said once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, GetCoreSchemaHandler, GetJsonSchemaHandler, WithJsonSchema
from pydantic_core import core_schema

from burnish.core import plugins
from burnish.core.errors import did_you_mean

Unit = Literal["ep", "st", "tok"]
_SCALE = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}
_DURATION = re.compile(r"^\s*(?P<value>\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)\s*(?P<scale>[kKMBT]?)(?P<unit>ep|st|tok)\s*$")
_SECONDS = re.compile(r"^\s*(?P<value>\d+(?:\.\d+)?)\s*(?P<unit>s|m|h)\s*$")
_AMOUNT = re.compile(r"^\s*(?P<value>\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)\s*(?P<scale>[kKMBT]?)(?:tok)?\s*$")


class Strict(BaseModel):
    """A section: unknown keys are errors, values are never coerced from another type, instances are frozen.

    The docstring under each field is its documentation: it goes into the JSON schema and the commented template.
    """

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )


@dataclass(frozen=True, slots=True)
class Duration:
    """An amount of training with its unit: `0.5ep` (epochs), `500st` (optimiser steps), `1.5Btok` (tokens).

    A bare whole number means steps.
    """

    value: float
    unit: Unit

    @classmethod
    def parse(cls, text: object) -> Duration:
        """Reads a duration.

        Raises:
            ValueError: when the text is no duration; the message says what one looks like.
        """
        if isinstance(text, Duration):
            return text
        if isinstance(text, int) and not isinstance(text, bool):
            if text <= 0:
                raise ValueError(f"a duration must be positive, found {text}")
            return cls(float(text), "st")
        match = _DURATION.match(text) if isinstance(text, str) else None
        if match is None:
            raise ValueError(f"expected a duration like '2ep', '500st' or '1.5Btok', found {text!r}")
        value = float(match["value"]) * _SCALE[match["scale"]]
        if value <= 0 or not math.isfinite(value):
            raise ValueError(f"a duration must be positive, found {text!r}")
        return cls(value, match["unit"])  # pyright: ignore[reportArgumentType]  # the pattern admits these units only

    def steps(self, *, steps_per_epoch: float, tokens_per_step: float) -> int:
        """The number of optimiser steps, at least 1, given how long an epoch and how big a step is."""
        if self.unit == "st":
            return max(1, round(self.value))
        if self.unit == "ep":
            return max(1, round(self.value * steps_per_epoch))
        return max(1, math.ceil(self.value / tokens_per_step))

    def __str__(self) -> str:
        return f"{self.value:.15g}{self.unit}"

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(cls.parse, serialization=core_schema.plain_serializer_function_ser_schema(str))

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"anyOf": [{"type": "integer", "minimum": 1}, {"type": "string", "pattern": _bare(_DURATION)}], "examples": ["2ep", "500st"]}


def read_tokens(value: object) -> object:
    """Turns `1.5B` and `1.5e9` into 1500000000; other values pass, for the field's own checks."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if not isinstance(value, str):
        return value
    match = _AMOUNT.match(value)
    if match is None:
        raise ValueError(f"expected a number of tokens like 250000000 or '1.5B', found {value!r}")
    return round(float(match["value"]) * _SCALE[match["scale"]])


def read_seconds(value: object) -> object:
    """Turns `90s`, `30m` and `2h` into seconds; a bare number is seconds already.

    Raises:
        ValueError: it is none of them.
    """
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    match = _SECONDS.match(value) if isinstance(value, str) else None
    if match is None:
        raise ValueError(f"expected a time like '90s', '30m' or '2h', found {value!r}")
    return float(match["value"]) * {"s": 1, "m": 60, "h": 3600}[match["unit"]]


def written_seconds(value: float) -> str | float:
    """The shortest way of writing a time that `read_seconds` reads as the same one: `30m`; seconds with a fraction stay a number."""
    if not value.is_integer():
        return value
    scale, unit = next((scale, unit) for scale, unit in ((3600, "h"), (60, "m"), (1, "s")) if value % scale == 0)
    return f"{int(value) // scale}{unit}"


def read_warmup(value: object) -> object:
    """Tells the three ways of writing a warm-up apart: a share below 1, a number of steps, a duration.

    Raises:
        ValueError: it is none of them.
    """
    if isinstance(value, str | Duration):
        return Duration.parse(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"expected a share of the steps like 0.03, a number of steps, or a duration like '0.1ep', found {value!r}")
    if value < 0 or (isinstance(value, float) and value >= 1):
        raise ValueError(f"expected a share of the steps below 1, a number of steps, or a duration like '0.1ep', found {value}")
    return value


def _bare(pattern: re.Pattern[str]) -> str:
    # JSON schema patterns are ECMA regular expressions, which have no named groups of this spelling.
    return re.sub(r"\?P<\w+>", "", pattern.pattern)


Tokens = Annotated[
    int,
    Field(ge=1),
    BeforeValidator(read_tokens),
    WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 1}, {"type": "string", "pattern": _bare(_AMOUNT)}], "examples": ["1.5B"]}),
]
"""A number of tokens, which may be written with a scale: `1.5B`."""


Seconds = Annotated[
    float,
    Field(gt=0),
    BeforeValidator(read_seconds),
    WithJsonSchema(
        {"anyOf": [{"type": "number", "exclusiveMinimum": 0}, {"type": "string", "pattern": _bare(_SECONDS)}], "examples": ["90s", "30m"]}
    ),
]
"""A time in seconds, which may be written with its unit: `30m`."""


@dataclass(frozen=True, slots=True)
class LongForm:
    """Lets a section be given by its main key alone: `optimizer: lion` for `optimizer: {kind: lion}`."""

    key: str

    def expand(self, value: Any) -> Any:
        """The long form of a value."""
        return {self.key: value} if isinstance(value, str) else value

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_before_validator_function(self.expand, handler(source))

    def __get_pydantic_json_schema__(self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        section = handler(schema)
        branches = section.get("oneOf", [section])
        short = [handler.resolve_ref_schema(branch)["properties"][self.key] for branch in branches]
        shown = [{key: value for key, value in field.items() if key not in ("default", "description")} for field in short]
        return {"anyOf": [*shown, *branches]}


@dataclass(frozen=True, slots=True)
class OneOrMany:
    """Lets a list of one item be given as the item."""

    def expand(self, value: Any) -> Any:
        """The list."""
        return [value] if isinstance(value, str | Mapping | BaseModel) else value

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_before_validator_function(self.expand, handler(source))

    def __get_pydantic_json_schema__(self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        many = handler(schema)
        item = many["items"]
        return {"anyOf": [*item.get("anyOf", [item]), many]}


@dataclass(frozen=True, slots=True)
class Location:
    """Marks text that says where something is. Such a value may hold `${NAME}`, and is made absolute where it is a local path.

    Attributes:
        kind: What stands there: a `model`, an `adapter`, a `data` set, a chat `template`, or a `folder` that need not exist yet.
    """

    kind: Literal["model", "adapter", "data", "template", "folder"]


@dataclass(frozen=True, slots=True)
class FreeText:
    """Marks text in which `${NAME}` means itself, such as a system prompt."""


@dataclass(frozen=True, slots=True)
class Kind:
    """Marks a name out of a table, or one's own `./file.py:Name`.

    Attributes:
        known: The built-in names.
        group: The entry point group in which installed packages offer more.
        listed: False where the built-in names belong to another branch of a union, and this one is for all others.
    """

    known: Callable[[], tuple[str, ...]]
    group: str
    listed: bool = True

    def check(self, kind: str) -> str:
        """Returns the kind.

        Raises:
            ValueError: nothing goes by that name.
        """
        known = self.known()
        if plugins.is_reference(kind) or kind in known or kind in (found := plugins.installed(self.group)):
            return kind
        raise ValueError(f"unknown name '{kind}'; {did_you_mean(kind, [*known, *found])} (one of your own is './file.py:Name')")

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_after_validator_function(self.check, handler(source))

    def __get_pydantic_json_schema__(self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        if not self.listed:
            return {"type": "string", "not": {"enum": list(self.known())}, "examples": ["./my_file.py:MyClass"]}
        return {"anyOf": [{"type": "string", "enum": list(self.known())}, {"type": "string", "pattern": r"\.py:\w+$"}]}


_FLOATS = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def _float_type(value: object) -> object:
    return _FLOATS.get(value, value) if isinstance(value, str) else value


FloatType = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    BeforeValidator(_float_type),
    WithJsonSchema({"enum": ["auto", *_FLOATS.values(), *_FLOATS], "type": "string"}),
]
"""A floating point type; the short names bf16, fp16 and fp32 are understood."""
