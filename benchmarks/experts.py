"""Experts of a mixture with adapters, forward and backward: PEFT around transformers' module against one node.

    OMP_NUM_THREADS=1 python -m benchmarks.experts
    python -m benchmarks.experts --device cuda --experts 128 --hidden 2048 --inner 768 --top 8 --tokens 16384      Qwen3-30B-A3B

PEFT adds s B A to the weights of all experts in each forward pass, and has gradients as large as all weights; the node multiplies by A and
B one after the other. What is kept for the backward pass is counted too, weights and adapters not. Times are processor time on a CPU.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from burnish.kernels.experts import expert_mlp
from burnish.models.adapters import experts_of

Step = Callable[[], torch.Tensor]


def adapted(options: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> Any:
    """Transformers' experts with an adapter on both weights, in fp32 as in training."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        hidden_size=options.hidden, num_experts=options.experts, moe_intermediate_size=options.inner, num_experts_per_tok=options.top
    )
    config._experts_implementation = options.implementation
    with device:
        module: Any = nn.ModuleDict({"experts": Qwen3MoeExperts(config).to(dtype)})
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.02)
    names = ["experts.gate_up_proj", "experts.down_proj"]
    module = inject_adapter_in_model(LoraConfig(r=options.rank, target_modules=[], target_parameters=names), module)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter.data) * 0.02
            parameter.data = parameter.data.float()
    return module["experts"]


def kept(step: Step, known: set[int]) -> float:
    """MiB that autograd keeps beside the tensors that are there anyway."""
    sizes: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(sizes.values()) / 2**20


def seconds(step: Step, direction: torch.Tensor, repeats: int) -> tuple[float, float]:
    """The best time of the forward pass, and of both."""
    best = [float("inf"), float("inf")]
    for _ in range(repeats + 1):
        start = _now(direction.device)
        out = step()
        between = _now(direction.device)
        out.backward(direction)
        best = [min(best[0], between - start), min(best[1], _now(direction.device) - start)]
    return best[0], best[1]


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--implementation", default="grouped_mm", help="of transformers' module")
    for name, value in {"tokens": 512, "experts": 32, "top": 4, "hidden": 512, "inner": 256, "rank": 16, "repeats": 5}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    module = adapted(options, device, dtype)
    x = torch.randn(options.tokens, options.hidden, device=device).to(dtype).requires_grad_()
    scores = torch.randn(options.tokens, options.experts, device=device).softmax(dim=-1)
    weights, index = scores.topk(options.top, dim=-1)
    weights = weights.to(dtype).requires_grad_()

    def ours() -> torch.Tensor:
        parts = experts_of(module)
        assert parts is not None
        return expert_mlp(x, index, weights, parts.gate_up, parts.down, "silu", parts.lora_gate_up, parts.lora_down)

    steps: dict[str, Step] = {"PEFT": lambda: module(x, index, weights), "node": ours}
    known = {t.untyped_storage().data_ptr() for t in [x, index, weights, *module.parameters()]}
    direction = torch.randn_like(x)
    print(f"{'':8}{'forward ms':>14}{'both ms':>14}{'kept MiB':>14}{'peak MiB':>14}")
    for name, step in steps.items():
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        forward, both = seconds(step, direction, options.repeats)
        peak = torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else float("nan")
        print(f"{name:8}{1e3 * forward:>14.1f}{1e3 * both:>14.1f}{kept(step, known):>14.1f}{peak:>14.1f}")


if __name__ == "__main__":
    main()
