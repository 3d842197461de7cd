"""The resolved run file, which goes into the run folder and reproduces the run."""

from __future__ import annotations

import io
from typing import Any, cast

from pydantic import BaseModel
from ruamel.yaml import YAML

from burnish.config.document import Plain
from burnish.config.places import redact
from burnish.config.run import RunConfig


def dump_run(config: RunConfig) -> str:
    """The run as YAML, with every setting spelled out, defaults too, so that a later version's defaults change nothing.

    Local paths are absolute. What came from the environment stays `${NAME}`, and passwords and tokens in URLs are left out.
    """
    stream = io.StringIO()
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # pyright: ignore[reportAttributeAccessIssue]  # untyped
    yaml.width = 4096
    yaml.dump(resolved(config), stream)  # pyright: ignore[reportUnknownMemberType]  # untyped
    return stream.getvalue()


def resolved(config: RunConfig) -> dict[str, Plain]:
    """The run as plain values that JSON and YAML can hold."""
    plain = _plain(config)
    for key, (written, value) in config.environment.items():
        _replace(plain, key.split("."), value, written)
    return {key: _redacted(value) for key, value in plain.items()}


def _plain(section: BaseModel) -> dict[str, Plain]:
    values = section.model_dump(mode="json")
    fields = type(section).model_fields
    shown: dict[str, Plain] = {}
    for key, value in values.items():
        attribute = getattr(section, key)
        if value is None and key in fields and fields[key].default is None:
            continue
        if isinstance(attribute, BaseModel):
            value = _plain(attribute)
        elif isinstance(attribute, list):
            items = cast(list[Any], attribute)
            value = [_plain(item) if isinstance(item, BaseModel) else item for item in items]
        shown[key] = value
    return shown


def _replace(plain: Plain, path: list[str], value: str, written: str) -> None:
    for part in path[:-1]:
        if isinstance(plain, list):
            plain = plain[int(part)] if int(part) < len(plain) else None
        else:
            plain = plain.get(part) if isinstance(plain, dict) else None
    # A config that was changed after loading keeps its new value.
    if isinstance(plain, dict) and plain.get(path[-1]) == value:
        plain[path[-1]] = written


def _redacted(value: Plain) -> Plain:
    if isinstance(value, dict):
        return {key: _redacted(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_redacted(item) for item in value]
    return redact(value) if isinstance(value, str) else value
