"""What a GPU does while something runs on it: its clock and power, and where it waits."""

from __future__ import annotations

import importlib
import importlib.util
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


class Card:
    """The card's clock and power while something runs: at its power limit it lowers the clock, and two runs may not be alike."""

    def __init__(self) -> None:
        self._samples: list[tuple[float, int, int, int]] = []
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Card:
        if torch.cuda.is_available() and importlib.util.find_spec("pynvml"):
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        if self._thread.ident:
            self._thread.join()

    def _watch(self) -> None:
        nvml: Any = importlib.import_module("pynvml")
        nvml.nvmlInit()
        card = nvml.nvmlDeviceGetHandleByIndex(torch.cuda.current_device())
        while not self._done.wait(0.05):
            clock = nvml.nvmlDeviceGetClockInfo(card, nvml.NVML_CLOCK_SM)
            power, reasons = nvml.nvmlDeviceGetPowerUsage(card), nvml.nvmlDeviceGetCurrentClocksThrottleReasons(card)
            self._samples.append((time.perf_counter(), clock, power, reasons))

    def summary(self, seconds: float) -> dict[str, float]:
        """Medians over the last `seconds`: MHz, W, and the share of samples in which power held the clock down."""
        last = [sample for sample in self._samples if sample[0] > self._samples[-1][0] - seconds]
        if not last:
            return {}
        capped = sum(bool(reasons & 0x4) for *_, reasons in last) / len(last)  # nvmlClocksThrottleReasonSwPowerCap
        return {"mhz": statistics.median(s[1] for s in last), "watt": statistics.median(s[2] for s in last) / 1e3, "power capped": capped}


def profile(file: Path, device: torch.device, step: Callable[[], float | torch.Tensor]) -> None:
    """Writes where the time of two steps goes, kernel by kernel, and where the device waits."""
    kinds = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with torch.profiler.profile(activities=kinds) as seen:
        for _ in range(2):
            float(step())
    table = seen.key_averages().table(sort_by=f"self_{device.type}_time_total", row_limit=60, max_name_column_width=90)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"{table}\n{idleness(seen)}\n")


def idleness(seen: torch.profiler.profile) -> str:
    """How long the device was busy, and the longest times that it waited, between what."""
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        seen.export_chrome_trace(str(trace))
        events = [e for e in json.loads(trace.read_text())["traceEvents"] if str(e.get("cat")) in ("kernel", "gpu_memcpy", "gpu_memset")]
    events.sort(key=lambda event: event["ts"])
    if not events:
        return "nothing ran on a GPU"
    end, waits = events[0]["ts"], list[tuple[float, str]]()
    for before, event in zip([events[0], *events], events, strict=False):
        if event["ts"] > end:
            waits.append((event["ts"] - end, f"{before['name'][:50]} -> {event['name'][:50]}"))
        end = max(end, event["ts"] + event["dur"])
    span, idle = end - events[0]["ts"], sum(wait for wait, _ in waits)
    longest = "\n".join(f"{wait / 1e3:10.3f} ms  {what}" for wait, what in sorted(waits, reverse=True)[:25])
    return f"{span / 1e3:.1f} ms, of which idle {idle / 1e3:.1f} ms in {len(waits)} waits; the longest:\n{longest}"
