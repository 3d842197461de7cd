from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from burnish.cli.reference import reference
from burnish.config.load import load_run, parse_run
from burnish.config.run import RunConfig
from burnish.config.sections import Adapter
from burnish.config.shape import keys_below


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    return reference()


def test_it_means_what_the_shortest_run_file_means(text: str) -> None:
    Path("run.yaml").write_text(text)
    shortest = parse_run({"model": "HuggingFaceTB/SmolLM2-135M-Instruct", "data": {"train": "HuggingFaceTB/smoltalk"}})
    assert load_run("run.yaml").config == shortest.config


def test_the_adapter_can_be_switched_on(text: str) -> None:
    lines = text.splitlines()
    start = lines.index("adapter: null")
    stop = lines.index("", start)
    lines[start:stop] = [line.removeprefix("# ") for line in lines[start + 1 : stop]]
    Path("run.yaml").write_text("\n".join(lines))
    assert load_run("run.yaml").config.adapter == Adapter()


def test_every_key_is_in_it_under_its_description(text: str) -> None:
    lines = [line.strip().removeprefix("# ").strip() for line in text.splitlines()]
    missing = [
        key
        for key in keys_below(RunConfig)
        if not key.startswith(("data.eval.", "train.rates.")) and not any(line.startswith(f"{key.rpartition('.')[2]}:") for line in lines)
    ]
    assert missing == []
    bare = [line for before, line in itertools.pairwise(lines) if line.endswith(": null") and before == ""]
    assert bare == []
    assert max(map(len, text.splitlines())) <= 122


def test_times_have_their_unit(text: str) -> None:
    assert "  timeout: 30m" in text.splitlines()
