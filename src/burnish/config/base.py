"""The bricks of the run file: strict models, and durations that carry their unit."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import core_schema

Unit = Literal["ep", "st", "tok"]
_DURATION = re.compile(r"^\s*(?P<value>\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)\s*(?P<scale>[kKMBT]?)(?P<unit>ep|st|tok)\s*$")
_SCALE = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


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
        return core_schema.no_info_plain_validator_function(
            cls.parse, serialization=core_schema.plain_serializer_function_ser_schema(str)
        )

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {
            "anyOf": [{"type": "integer", "minimum": 1}, {"type": "string", "pattern": _DURATION.pattern}],
            "examples": ["2ep", "500st", "1.5Btok"],
        }
