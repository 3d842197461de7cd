"""Forms of an adapted linear layer on this CPU: the frozen product, ways to add the adapter, and the whole node, in processor time.

    OMP_NUM_THREADS=1 python -m benchmarks.lora_forms --part products
    OMP_NUM_THREADS=1 python -m benchmarks.lora_forms --part adapter
    OMP_NUM_THREADS=1 python -m benchmarks.lora_forms --part nodes

`products`: forward x W^T and backward dy W, by call, by the weight's orientation, packed or not.
`adapter`: base and adapter as two products (addmm), or as one with the weight bordered by the adapter: [x, s x A^T] [W, B]^T and
    [dy, s dy B] [W; A], with and without the copy that puts x beside x A^T.
`nodes`: forward and backward of `lora_stack` against the same arithmetic by autograd.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from burnish.kernels.lora import CASES, LoraWeights, Projection, lora_reference, lora_stack
from burnish.kernels.matmul import add_mm_, mm

SHAPES = [(576, 576), (192, 576), (1536, 576), (576, 1536)]  # (out, in) of SmolLM2-135M
RANK = 16


def fastest(variants: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Milliseconds of each, the best of several rounds in which each runs once: what disturbs one disturbs all."""
    best = dict.fromkeys(variants, float("inf"))
    for turn in range(repeats + 1):  # the first one warms up
        for name, run in variants.items():
            start = time.process_time()
            run()
            if turn:
                best[name] = min(best[name], 1e3 * (time.process_time() - start))
    return best


def show(title: str, times: dict[str, float], baseline: str) -> None:
    print(title)
    for name, milliseconds in times.items():
        print(f"    {name:44} {milliseconds:8.3f} ms   {times[baseline] / milliseconds:5.2f} x")


def products(tokens: int, dtype: torch.dtype, repeats: int) -> None:
    onednn, pack = torch.ops.mkldnn._linear_pointwise, torch.ops.mkldnn._reorder_linear_weight
    for out, width in SHAPES:
        x, dy, w = torch.randn(tokens, width).to(dtype), torch.randn(tokens, out).to(dtype), torch.randn(out, width).to(dtype)
        turned, y, dx = w.t().contiguous(), torch.empty(tokens, out, dtype=dtype), torch.empty(tokens, width, dtype=dtype)
        packed, packed_turned = pack(w, tokens), pack(turned, tokens)
        forward = {
            "F.linear": lambda x=x, w=w: F.linear(x, w),
            "mm, W.t()": lambda x=x, w=w: torch.mm(x, w.t()),
            "mm, W^T stored": lambda x=x, w=turned: torch.mm(x, w),
            "mm into given memory": lambda x=x, w=w, y=y: torch.mm(x, w.t(), out=y),
            "addmm_": lambda x=x, w=w, y=y: y.addmm_(x, w.t()),
            "oneDNN, plain weight": lambda x=x, w=w: onednn(x, w, None, "none", [], ""),
            "oneDNN, packed weight": lambda x=x, w=packed: onednn(x, w, None, "none", [], ""),
        }
        backward = {
            "mm, W": lambda dy=dy, w=w: torch.mm(dy, w),
            "mm, W^T stored": lambda dy=dy, w=turned: torch.mm(dy, w.t()),
            "addmm_": lambda dy=dy, w=w, dx=dx: dx.addmm_(dy, w),
            "oneDNN, plain weight": lambda dy=dy, w=w: onednn(dy, w.t(), None, "none", [], ""),
            "oneDNN, packed weight": lambda dy=dy, w=packed_turned: onednn(dy, w, None, "none", [], ""),
        }
        show(f"{dtype} x W^T, W [{out}, {width}]", fastest(forward, repeats), "F.linear")
        show(f"{dtype} dy W, W [{out}, {width}]", fastest(backward, repeats), "mm, W")


def adapter(tokens: int, dtype: torch.dtype, repeats: int) -> None:
    for out, width in SHAPES:
        x, dy, w = torch.randn(tokens, width).to(dtype), torch.randn(tokens, out).to(dtype), torch.randn(out, width).to(dtype)
        a, b = torch.randn(RANK, width).to(dtype), torch.randn(out, RANK).to(dtype)
        bordered, beside_x = torch.randn(out + RANK, width + RANK).to(dtype), torch.empty(tokens, width + RANK, dtype=dtype)
        beside_dy = torch.empty(tokens, out + RANK, dtype=dtype)

        def border(source, small, buffer, weight, *, copy):
            columns = source.shape[1]
            if copy:
                buffer[:, :columns] = source
            buffer[:, columns:] = mm(source, small)
            return mm(buffer, weight)

        forward, backward = (x, a.t(), beside_x, bordered[:out].t()), (dy, b, beside_dy, bordered[:, :width])
        variants = {
            "frozen alone": lambda x=x, dy=dy, w=w: (mm(x, w.t()), mm(dy, w)),
            "addmm": lambda x=x, dy=dy, w=w, a=a, b=b: (
                add_mm_(mm(x, w.t()), mm(x, a.t()), b.t()),
                add_mm_(mm(dy, w), mm(dy, b), a),
            ),
            "bordered, x and dy copied": lambda f=forward, b=backward, go=border: (go(*f, copy=True), go(*b, copy=True)),
            "bordered, x and dy in place": lambda f=forward, b=backward, go=border: (go(*f, copy=False), go(*b, copy=False)),
        }
        show(f"{dtype} forward and dx, W [{out}, {width}]", fastest(variants, repeats), "addmm")


def nodes(tokens: int, dtype: torch.dtype, repeats: int) -> None:
    for name, shape in CASES:
        width = shape["inputs"]
        found = [Projection(torch.randn(out, width).to(dtype), None, LoraWeights(*adapter_of(out, width), 2.0)) for out in shape["outputs"]]
        x = torch.randn(tokens, width).to(dtype).requires_grad_()
        upstream = [torch.randn(tokens, out).to(dtype) for out in shape["outputs"]]

        def run(function, x=x, found=found, upstream=upstream):
            torch.autograd.backward(function(x, found), upstream)

        variants = {"autograd": lambda run=run: run(lora_reference), "lora_stack": lambda run=run: run(lora_stack)}
        show(f"{dtype} {name}, forward and backward", fastest(variants, repeats), "autograd")


def adapter_of(out: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(RANK, width, requires_grad=True), torch.randn(out, RANK, requires_grad=True)


PARTS = {"products": products, "adapter": adapter, "nodes": nodes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, default="nodes")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    for dtype in (torch.bfloat16, torch.float32):
        PARTS[options.part](options.tokens, dtype, options.repeats)


if __name__ == "__main__":
    main()
