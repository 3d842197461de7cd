"""The documentation is run: every Python block of docs/python.md, in one folder, from top to bottom."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_args

from tests.faults.suite.__main__ import FAULTS, tries

from burnish.config.objectives import CPO, DPO, DPOLoss

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"^```python(?: file=(?P<file>\S+))?\n(?P<code>.*?)^```", re.MULTILINE | re.DOTALL)


def test_every_block_of_the_python_page_runs(tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "model")
    rows = [{"prompt": f"the user asks {i}", "completion": f"the assistant answers {i}"} for i in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "run.yaml").write_text(
        "model: ./model\nadapter: {kind: lora, rank: 4}\ndata: {train: rows.jsonl, eval: 0.2, max_length: 64, cache: ./cache}\n"
        "train: {batch_size: 4, precision: float32}\noutput: runs/first\n"
    )
    blocks = list(BLOCK.finditer((ROOT / "docs/python.md").read_text()))
    assert len(blocks) >= 8
    script = ""
    for block in blocks:
        if block["file"]:
            (tmp_path / block["file"]).write_text(block["code"])
        else:
            script += block["code"] + "\n"
    (tmp_path / "page.py").write_text(script)
    done = subprocess.run([sys.executable, "page.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert {"first", "by-hand", "focal-file", "callback", "trainer"} <= {folder.name for folder in (tmp_path / "runs").iterdir()}
    assert (tmp_path / "runs/by-hand/model/adapter_model.safetensors").exists()


def test_the_readme_names_the_two_commands_and_stays_short() -> None:
    text = (ROOT / "README.md").read_text()
    assert "make quickstart" in text and "make test" in text
    assert len(text.splitlines()) <= 120


def test_every_loss_over_pairs_is_explained() -> None:
    """The tables of losses and divergences name what the settings allow, and nothing else."""
    page = (ROOT / "docs/preference.md").read_text()
    dpo, cpo = (
        page.split("## `objective: dpo`")[1].split("## `objective: simpo`")[0],
        page.split("## `objective: cpo`")[1].split("\n## ")[0],
    )
    rows = re.findall(r"^\| `(\w+)` \|", dpo, re.M)
    assert sorted(rows) == sorted([*get_args(DPOLoss), *get_args(DPO.model_fields["divergence"].annotation)])
    assert re.findall(r"^\| `(\w+)` \|", cpo, re.M) == list(get_args(CPO.model_fields["loss"].annotation))


def test_every_promise_names_a_test_that_there_is() -> None:
    """The tables of promises point at files, at tests in them, and at rows of the fault suite that have tries."""
    named: dict[str, set[str]] = {}
    for page in ("reliability.md", "architecture.md"):
        text = (ROOT / "docs" / page).read_text()
        named[page] = set(re.findall(r"`(tests/[\w/.:]*)`", text))
        for place in named[page]:
            file, _, test = place.partition("::")
            assert (ROOT / file).exists(), f"docs/{page} names {file}"
            if test:
                assert f"def {test.split('::')[-1]}(" in (ROOT / file).read_text(), f"docs/{page} names {place}"
    assert min(len(places) for places in named.values()) > 5
    rows = [line for line in (ROOT / "docs/reliability.md").read_text().splitlines() if line.startswith("| ")]
    told = {fault for line in rows for fault in re.findall(r"\bF\d+\b", line)}
    assert told == set(FAULTS) == {one.fault for one in tries(0)}


def test_every_promise_of_reliability_has_a_test() -> None:
    """No row of the second table is without one."""
    table = (ROOT / "docs/reliability.md").read_text().split("| promise | held by |")[1].split("\n\n")[0]
    rows = table.splitlines()[2:]
    assert len(rows) > 20
    assert all(re.search(r"\bF\d+\b|`tests/", row.split("|")[2]) for row in rows)
