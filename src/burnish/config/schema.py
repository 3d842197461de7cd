"""The JSON schema of run files, for editors: completion, enums, and each key's description as you type."""

from __future__ import annotations

from typing import Any

from pydantic.json_schema import GenerateJsonSchema

from burnish.config.run import EXCLUSIVE, RunConfig


class _Untitled(GenerateJsonSchema):
    """Leaves out titles that only repeat the key."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def run_schema() -> dict[str, Any]:
    """The schema of a run file. Short forms are in it: `model` may be a path or a section."""
    schema = RunConfig.model_json_schema(schema_generator=_Untitled)
    definitions = {name: _tidy(part) for name, part in schema.pop("$defs").items()}
    for section, groups in EXCLUSIVE.items():
        pairs = [[one, other] for group in groups for number, one in enumerate(group) for other in group[number + 1 :]]
        name = schema["properties"][section]["$ref"].rpartition("/")[2]
        definitions[name]["allOf"] = [{"not": {"required": pair}} for pair in pairs]
    extends = {
        "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
        "description": "A run file, or several, whose values hold where this one gives none. Relative to this file.",
    }
    root = _tidy(schema | {"properties": {"extends": extends, **schema["properties"]}})
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "burnish run file", **root, "$defs": definitions}


def _tidy(section: dict[str, Any]) -> dict[str, Any]:
    """Without what a reader does not need: the class's name as title, whole sections as defaults."""
    properties: dict[str, Any] = {
        key: {word: value for word, value in field.items() if word != "default" or not isinstance(value, dict) or not value}
        for key, field in section.get("properties", {}).items()
    }
    return {key: value for key, value in section.items() if key != "title"} | {"properties": properties}
