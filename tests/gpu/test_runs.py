"""Whole runs on a GPU, through the command line: every way to train, and going on after an interruption."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
DEVICE = "cuda" if torch.cuda.is_available() else os.environ.get("BURNISH_GPU_TESTS_ON", "")
pytestmark = pytest.mark.skipif(not DEVICE, reason="needs a CUDA device")

LORA = "adapter={kind: lora, rank: 8}"
WAYS = {
    "lora": [LORA],
    "lora-float16": [LORA, "train.precision=float16"],
    "lora-float32": [LORA, "train.precision=float32"],
    "lora-packed": [LORA, "train.batch_tokens=2048"],
    "lora-8-bit": [LORA, "train.optimizer=adamw_8bit"],
    "dora": ["adapter={kind: lora, rank: 8, dora: true}"],
    "dropout": ["adapter={kind: lora, rank: 8, dropout: 0.1}"],
    "fp8": [LORA, "model.quantize=fp8"],
    "nf4": [LORA, "model.quantize=nf4"],
    "full": [],
    "full-in-backward": ["train.optimizer={kind: adamw, in_backward: true}", "train.clip=null"],
    "recomputed": [LORA, "train.checkpoint_activations=on"],
    "offloaded": [LORA, "train.checkpoint_activations=on", "train.offload_activations=true"],
    "tiled": [LORA, "train.mlp_tile=64"],
    "compiled": [LORA, "train.compile=auto"],
    "without-kernels": [LORA, "model.kernels=off"],
}


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "burnish", *words]


def burnish(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command(*words), cwd=folder, capture_output=True, text=True, timeout=150, check=False)
    print(done.stderr)
    return done


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With a run file in it. What fast modules are is decided as a user's process decides it."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    (tmp_path / "run.yaml").write_text(
        f"model: {tiny_model}\ndata: {{train: {ROOT}/recipes/data/service_desk.jsonl, max_length: 1024, cache: ./cache, workers: 1}}\n"
        "train: {steps: 20, learning_rate: 0.01}\noutput: run\n"
    )
    return tmp_path


def losses(run: Path) -> list[float]:
    file = run / "metrics.jsonl"
    return [json.loads(line)["loss"] for line in file.read_text().splitlines()] if file.exists() else []


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_train_lowers_the_loss(way: str, folder: Path) -> None:
    if way == "nf4" and importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("needs bitsandbytes")
    size = [] if way == "lora-packed" else ["train.batch_size=8"]
    done = burnish(folder, "train", "run.yaml", *WAYS[way], *size)
    assert done.returncode == 0
    assert f" on {DEVICE}" in done.stderr
    found = losses(folder / "run")
    assert len(found) == 20 and found[-1] < found[0] - 0.03


def interrupt(folder: Path, words: list[str], steps: int) -> None:
    """Ctrl-C once the run has logged a few steps."""
    with subprocess.Popen(command(*words), cwd=folder, stderr=subprocess.DEVNULL) as process:
        until = time.monotonic() + 120
        while len(losses(folder / "run")) < 5 and time.monotonic() < until:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 3
    assert len(losses(folder / "run")) < steps


def test_a_run_goes_on_where_it_was_and_answers(folder: Path) -> None:
    words = ["train", "run.yaml", LORA, "train.steps=300", "train.learning_rate=1e-3"]
    assert burnish(folder, *words, "output=whole").returncode == 0
    interrupt(folder, words, 300)
    assert burnish(folder, *words).returncode == 0
    assert losses(folder / "run") == pytest.approx(losses(folder / "whole"), rel=1e-2)
    assert burnish(folder, "chat", "run", "--prompt", "Who are you?").returncode == 0


@pytest.mark.parametrize("way", ["dropout", "full"])
def test_a_deterministic_run_goes_on_bit_for_bit(way: str, folder: Path) -> None:
    words = ["train", "run.yaml", *WAYS[way], "train.steps=200", "train.batch_size=2", "train.learning_rate=1e-3"]
    words.append("train.deterministic=true")
    assert burnish(folder, *words, "output=whole").returncode == 0
    interrupt(folder, words, 200)
    assert burnish(folder, *words).returncode == 0
    assert losses(folder / "run") == losses(folder / "whole")
    for file in (folder / "whole" / "model").glob("*.safetensors"):
        assert file.read_bytes() == (folder / "run" / "model" / file.name).read_bytes()
