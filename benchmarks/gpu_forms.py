"""Forms of what a LoRA step on a GPU consists of: which tile, which order, one product or two.

    python -m benchmarks.gpu_forms                    all parts, in the shapes of Llama 1B
    python -m benchmarks.gpu_forms --part gated       the gated unit with thin products, tile by tile, each checked first
    python -m benchmarks.gpu_forms --part order       where an adapter's part is added: after its base product, before it, or within it

`order`: `after` is x W^T, then += (x A^T) B^T; `before` the thin product first; `bordered` is one product [x, x A^T] [W, B]^T with the
weight bordered by B, x lying beside x A^T already. Tiles are compiled by many processes at once, then timed alone, interleaved.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.roofline import SHAPES

ROOT = Path(__file__).resolve().parents[1]
RANK = 16
FORWARD = [(16, 128, 4), (32, 128, 4), (32, 64, 4), (64, 64, 4), (32, 128, 8), (64, 128, 8), (16, 256, 4)]
BACKWARD = [(16, 64, 4, stages) for stages in (2, 3, 4, 5)] + [
    (32, 64, 4, 2),
    (16, 128, 4, 3),
    (16, 32, 4, 4),
    (16, 32, 2, 4),
    (16, 64, 2, 3),
    (16, 64, 2, 4),
]
"""Rows, columns, warps (backward: and how many tiles are under way)."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", default="gated,order")
    parser.add_argument("--size", default="1b", choices=list(SHAPES))
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--compile", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.compile:
        problem = gated_problem(256, 512)
        for name, tile in json.loads(options.compile):
            attempt(gated_call(name, problem), tuple(tile))
        return 0
    found: dict[str, Any] = {}
    for part in options.part.split(","):
        for title, times in {"gated": gated, "order": order}[part](options):
            found[title] = times
            print(title, flush=True)
            for form, spread in sorted(times.items(), key=lambda item: item[1][0]):
                print(f"    {form:44}{spread[0]:9.4f} ms  ({spread[1]:.4f}–{spread[2]:.4f})", flush=True)
        if options.json:
            options.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


def timed(forms: dict[str, Callable[[], object]], turns: int) -> dict[str, tuple[float, float, float]]:
    """Milliseconds of each form: median, least, most. In every turn each runs four times in a row."""
    seen: dict[str, list[float]] = {name: [] for name in forms}
    for turn in range(turns + 2):
        for name, run in forms.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(4):
                run()
            end.record()
            end.synchronize()
            if turn > 1:
                seen[name].append(start.elapsed_time(end) / 4)
    return {name: (statistics.median(times), min(times), max(times)) for name, times in seen.items()}


# The gated unit with thin products


def gated_problem(tokens: int, inner: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Any]:
    """(dh, gate, up, thin)."""
    from burnish.kernels.glu import Thin

    def make(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, device="cuda") * scale).bfloat16()

    thin = [Thin(make(tokens, RANK), make(inner, RANK, scale=0.1)) for _ in range(2)]
    thin.append(Thin(make(tokens, RANK), make(RANK, inner, scale=0.1).t()))
    return make(tokens, inner), make(tokens, inner), make(tokens, inner), tuple(thin)


def gated_call(name: str, problem: tuple[torch.Tensor, torch.Tensor, torch.Tensor, Any]) -> Callable[[tuple[int, ...]], Any]:
    from burnish.kernels.gpu import glu_thin

    dh, gate, up, thin = problem

    def call(tile: tuple[int, ...]) -> Any:
        if name == "forward":
            glu_thin._FORWARD = tile
            return glu_thin.thin_forward(gate, up, "silu", thin[:2])
        glu_thin._BACKWARD = tile
        return glu_thin.thin_backward(dh, gate, up, "silu", False, thin)

    return call


def attempt(call: Callable[[tuple[int, ...]], Any], tile: tuple[int, ...]) -> Any:
    """What a tile gives; None where it needs more of a multiprocessor than there is."""
    try:
        return call(tile)
    except Exception as error:  # Triton's errors have no common type
        print(f"    {tile}: {type(error).__name__}: {str(error).splitlines()[0]}", flush=True)
        return None


def gated(options: argparse.Namespace) -> list[tuple[str, dict[str, Any]]]:
    from burnish.kernels.glu import glu_backward, glu_forward

    tasks = [("forward", tile) for tile in FORWARD] + [("backward", tile) for tile in BACKWARD]
    lanes = max(1, (os.cpu_count() or 1) - 1)
    command = [sys.executable, "-m", "benchmarks.gpu_forms", "--compile"]
    for process in [subprocess.Popen([*command, json.dumps(tasks[lane::lanes])], cwd=ROOT) for lane in range(lanes)]:
        process.wait()
    problem = gated_problem(options.tokens, SHAPES[options.size].inner)
    dh, gate, up, thin = problem
    a, b, g = (x.float() + t.left.float() @ t.right.float().t() for x, t in zip((gate, up, dh), thin, strict=True))
    h = glu_forward(a, b, "silu")
    dgate, dup, _ = glu_backward(g, a, b, "silu", False)
    truth = {
        "dgate": dgate,
        "dup": dup,
        "db": dup.t() @ thin[1].left.float(),
        "da": thin[2].left.float().t() @ h,
    }
    results: list[tuple[str, dict[str, Any]]] = []
    for name in ("forward", "backward"):
        call = gated_call(name, problem)
        forms: dict[str, Callable[[], object]] = {}
        for task, tile in tasks:
            made = attempt(call, tile) if task == name else None
            if made is None:
                continue
            pairs = (
                {"h": (made, h)}
                if name == "forward"
                else {
                    "dgate": (made.dgate, truth["dgate"]),
                    "dup": (made.dup, truth["dup"]),
                    "db": (made.up_db, truth["db"]),
                    "da": (made.down_da, truth["da"]),
                }
            )
            off = {what: ((mine.float() - true).norm() / true.norm()).item() for what, (mine, true) in pairs.items()}
            if max(off.values()) < 1e-2:
                forms[str(tile)] = lambda call=call, tile=tile: call(tile)
            else:
                print(f"    {name} {tile} is wrong: {off}", flush=True)
        results.append((f"gated, {name}, [{options.tokens}, {gate.shape[1]}]", timed(forms, options.turns)))
    return results


# Where an adapter's part is added


def order(options: argparse.Namespace) -> list[tuple[str, dict[str, Any]]]:
    shape = SHAPES[options.size]
    keys = shape.kv_heads * shape.head_dim
    layers = {"q or o": (shape.hidden, shape.hidden), "k or v": (shape.hidden, keys), "down": (shape.inner, shape.hidden)}
    results = [(f"{name}, {inputs} to {outputs}", one_layer(options, inputs, outputs)) for name, (inputs, outputs) in layers.items()]
    outputs = [shape.heads * shape.head_dim, keys, keys]
    return [*results, (f"dx of q, k, v, {outputs} to {shape.hidden}", one_gradient(options, shape.hidden, outputs))]


def half(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda").bfloat16()


def one_layer(options: argparse.Namespace, inputs: int, outputs: int) -> dict[str, Any]:
    border = 64
    x, w, xa, b = half(options.tokens, inputs), half(outputs, inputs), half(options.tokens, RANK), half(outputs, RANK)
    wide_x, wide_w = half(options.tokens, inputs + border), half(outputs, inputs + border)
    exact_x, exact_w = half(options.tokens, inputs + RANK), half(outputs, inputs + RANK)
    forms: dict[str, Callable[[], object]] = {
        "base alone": lambda: torch.mm(x, w.t()),
        "after": lambda: torch.mm(x, w.t()).addmm_(xa, b.t()),
        "before": lambda: torch.mm(xa, b.t()).addmm_(x, w.t()),
        f"bordered by {border}": lambda: torch.mm(wide_x, wide_w.t()),
        f"bordered by {RANK}": lambda: torch.mm(exact_x, exact_w.t()),
    }
    return timed(forms, options.turns)


def one_gradient(options: argparse.Namespace, hidden: int, outputs: list[int]) -> dict[str, Any]:
    dys, ws = [half(options.tokens, out) for out in outputs], [half(out, hidden) for out in outputs]
    g, a = half(options.tokens, RANK * len(outputs)), half(RANK * len(outputs), hidden)
    dy, w = half(options.tokens, sum(outputs)), half(sum(outputs), hidden)

    def after() -> torch.Tensor:
        dx = torch.mm(dys[0], ws[0])
        for one, weight in zip(dys[1:], ws[1:], strict=True):
            dx.addmm_(one, weight)
        return dx.addmm_(g, a)

    def before() -> torch.Tensor:
        dx = torch.mm(g, a)
        for one, weight in zip(dys, ws, strict=True):
            dx.addmm_(one, weight)
        return dx

    forms: dict[str, Callable[[], object]] = {
        "after": after,
        "before": before,
        "side by side, one product, then the adapters": lambda: torch.mm(dy, w).addmm_(g, a),
        "side by side, the adapters first": lambda: torch.mm(g, a).addmm_(dy, w),
    }
    return timed(forms, options.turns)


if __name__ == "__main__":
    sys.exit(main())
