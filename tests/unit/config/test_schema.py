from __future__ import annotations

from typing import Any

import jsonschema
import pytest
from ruamel.yaml import YAML

from burnish.config.schema import run_schema

SCHEMA = run_schema()
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)
GOOD = "model: org/model\ndata: {train: rows.jsonl}\n"


def valid(text: str) -> bool:
    return VALIDATOR.is_valid(YAML(typ="safe", pure=True).load(text))


def test_it_is_a_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


def test_every_key_is_described() -> None:
    def bare(name: str, section: dict[str, Any]) -> list[str]:
        return [f"{name}.{key}" for key, field in section.get("properties", {}).items() if "description" not in field]

    silent = [key for name, section in SCHEMA["$defs"].items() for key in bare(name, section)]
    assert silent == []
    assert [key for key in bare("", SCHEMA) if "$ref" not in SCHEMA["properties"][key.strip(".")]] == []


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        GOOD + "extends: base.yaml",
        GOOD + "adapter: lora",
        GOOD + "adapter: null",
        GOOD + "adapter: {rank: 8, targets: [q_proj]}",
        GOOD + "objective: sft",
        GOOD + "objective: {kind: sft, z_loss: 1e-4}",
        GOOD + "objective: {kind: './mine.py:Loss', anything: 3}",
        GOOD + "train: {optimizer: lion, schedule: wsd, tokens: 1.5B, precision: bf16}",
        GOOD + "train: {optimizer: {betas: [0.9, 0.95]}, schedule: {warmup: 0.1ep}}",
        GOOD + "save: {every: 500st}\nevaluation: {every: null}",
        "model: {path: x, quantize: nf4}\ndata: {train: [a, {path: b, format: './mine.py:convert'}], eval: 0.1, train_on: [user]}",
        "model: x\ndata: {train: {path: a, format: alpaca}, eval: {path: b}}",
    ],
)
def test_good_files_pass(text: str) -> None:
    assert valid(text)


@pytest.mark.parametrize(
    "text",
    [
        "model: x",
        GOOD + "trian: {}",
        GOOD + "adapter: lroa",
        GOOD + "adapter: {rank: 0}",
        GOOD + "objective: {kind: sft, z_lss: 1}",
        GOOD + "train: {optimizer: adam}",
        GOOD + "train: {epochs: 1, steps: 2}",
        GOOD + "train: {batch_size: 1, batch_tokens: 4096}",
        GOOD + "train: {tokens: 1.5G}",
        GOOD + "save: {every: 1 epoch}",
        "model: x\ndata: {train: []}",
        "model: x\ndata: {train: {path: a, format: alpca}}",
    ],
)
def test_bad_files_do_not(text: str) -> None:
    assert not valid(text)
