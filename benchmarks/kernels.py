"""Each kernel on its own: milliseconds for forward and backward by every implementation, and how far that is from the machine's limits.

    python -m benchmarks.kernels                                     this machine, shapes of real models
    python -m benchmarks.kernels --dtype bfloat16 --tokens 16384 --only rms_norm,lora --json kernels.json
    python -m benchmarks.kernels --tiny                              the kernels' own small cases, to see that all of it runs

The limit of a kernel is the larger of bytes / bandwidth and FLOPs / rate, with both peaks measured in the same run: the bandwidth of a
copy, the rate of a large square matrix product. Bytes and FLOPs are the least that its inputs and outputs allow (benchmarks/problems.py, or
`cost(case)` of the kernel's module). On a CPU small shapes live in its caches, where a kernel can beat the "limit" of the memory.
"""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import burnish.kernels
from benchmarks.problems import KERNELS, Case, Cost, Kernel, Problem, leaves


@dataclass(frozen=True)
class Peaks:
    """What this machine can do."""

    bandwidth: float  # bytes a second
    rate: float  # FLOPs a second

    def seconds(self, cost: Cost) -> float:
        """The least time for moving and computing that much."""
        return max(cost[0] / self.bandwidth, cost[1] / self.rate)


class Clock:
    """Times a function: the median over repeats, each with cold caches on a GPU."""

    def __init__(self, device: torch.device, budget: float) -> None:
        self.device, self.budget = device, budget
        self.flush = torch.empty(1 << 28, dtype=torch.int8, device=device) if device.type == "cuda" else None

    def seconds(self, function: Callable[[], Any]) -> float:
        once = self._once(function)  # compiles, allocates
        once = min(once, self._once(function))
        return statistics.median(self._once(function) for _ in range(max(3, min(100, int(self.budget / max(once, 1e-6))))))

    def _once(self, function: Callable[[], Any]) -> float:
        if self.flush is None:
            start = time.perf_counter()
            function()
            return time.perf_counter() - start
        self.flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000


def measure_peaks(clock: Clock, dtype: torch.dtype, *, tiny: bool) -> Peaks:
    device = clock.device
    gpu = device.type == "cuda"
    source = torch.ones((1 << 30 if gpu else 1 << 28) >> (6 if tiny else 0), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    size = (8192 if gpu else 1536) >> (2 if tiny else 0)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    copying = clock.seconds(lambda: target.copy_(source))
    return Peaks(2 * source.numel() / copying, 2 * size**3 / clock.seconds(lambda: a @ b))


def main() -> None:
    options = parse()
    device = torch.device(options.device)
    dtype = getattr(torch, options.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    clock = Clock(device, 0.02 if options.tiny else options.budget)
    peaks = measure_peaks(clock, dtype, tiny=options.tiny)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(
        f"{name}, torch {torch.__version__}, {dtype}: copies {peaks.bandwidth / 1e9:.0f} GB/s, multiplies {peaks.rate / 1e12:.2f} TFLOP/s"
    )
    print(f"{'':34}{'impl':>10}{'ms':>10}{'GB/s':>8}{'TFLOP/s':>9}{'of limit':>10}{'of plain':>10}")
    lines: list[dict[str, Any]] = []
    for kernel in KERNELS:
        if options.only and kernel.name not in options.only.split(","):
            continue
        if kernel.module() is None:
            print(f"{kernel.name}: not there")
            continue
        cases = kernel.cases() if options.tiny else kernel.sizes(device.type, options.tokens or (16384 if device.type == "cuda" else 1024))
        refused: set[str] = set()
        for title, case in cases:
            lines += time_case(kernel, title, case, dtype, clock, peaks, refused)
    for other in strangers():
        print(f"{other}: has CASES, but benchmarks/problems.py does not know it")
    if options.json:
        head = {"device": name, "torch": torch.__version__, "dtype": str(dtype), "bandwidth": peaks.bandwidth, "rate": peaks.rate}
        options.json.write_text(json.dumps(head | {"kernels": lines}, indent=1) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: bfloat16 on a GPU, float32 elsewhere")
    parser.add_argument("--tokens", type=int, help="default: 16384 on a GPU, 1024 elsewhere")
    parser.add_argument("--only", help="kernels, with commas")
    parser.add_argument("--budget", type=float, default=0.5, help="seconds for each measurement")
    parser.add_argument("--tiny", action="store_true", help="the kernels' own small cases")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def strangers() -> list[str]:
    known = {kernel.name for kernel in KERNELS}
    names = [module.name for module in pkgutil.iter_modules(burnish.kernels.__path__) if not module.ispkg and module.name not in known]
    return [name for name in names if hasattr(importlib.import_module(f"burnish.kernels.{name}"), "CASES")]


def time_case(
    kernel: Kernel, title: str, case: Case, dtype: torch.dtype, clock: Clock, peaks: Peaks, refused: set[str]
) -> list[dict[str, Any]]:
    """Prints and returns a line for each implementation; `refused` collects the reasons of those that are not there, each said once."""
    problem = kernel.problem(case, dtype, clock.device)
    cost_of = getattr(kernel.module(), "cost", None)
    cost: Cost = cost_of(case) if cost_of is not None else problem.cost
    lines: list[dict[str, Any]] = []
    plain = 0.0
    for impl in ("plain", *kernel.impls):
        try:
            seconds = time_impl(problem, impl, clock)
        except Exception as error:
            if impl in ("plain", "torch", "auto") and not isinstance(error, torch.OutOfMemoryError):
                raise
            # Kernels say in their own ways that a device, a type or a shape is not for them.
            reason = f"    {kernel.name}, {impl}: {(str(error).strip().splitlines() or [type(error).__name__])[0][:110]}"
            if reason not in refused:
                print(reason)
                refused.add(reason)
            continue
        plain = plain or seconds
        share = peaks.seconds(cost) / seconds
        lines.append(
            {"kernel": kernel.name, "case": title, "impl": impl, "seconds": seconds, "bytes": cost[0], "flops": cost[1], "share": share}
        )
        rates = f"{seconds * 1e3:>10.3f}{cost[0] / seconds / 1e9:>8.0f}{cost[1] / seconds / 1e12:>9.3f}"
        print(f"{kernel.name + '  ' + title:34}{impl:>10}{rates}{share:>10.0%}{plain / seconds:>9.2f}x")
    return lines


def time_impl(problem: Problem, impl: str, clock: Clock) -> float:
    """Seconds for forward and backward."""
    given = leaves(problem)
    trained = [given[name] for name in problem.trained]
    upstream: list[torch.Tensor] = []

    def once() -> None:
        outputs = problem.plain(given) if impl == "plain" else problem.run(given, impl)
        if not trained:
            return
        if not upstream:
            upstream.extend(torch.randn_like(output) for output in outputs)
        torch.autograd.grad(outputs, trained, upstream)

    return clock.seconds(once)


if __name__ == "__main__":
    main()
