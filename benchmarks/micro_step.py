"""One micro-step (forward and backward) of a LoRA on a model of SmolLM2-135M's shape, on this CPU, as ratios to fp32.

    OMP_NUM_THREADS=1 python -m benchmarks.micro_step --tokens 512,1024,2048 --keep-memory

Processor time is measured, so a busy machine disturbs little; use one thread for that, since waiting threads spin.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from burnish.config.objectives import SFT
from burnish.data.collate import collate
from burnish.data.types import Batch, Example
from burnish.kernels.allocator import keep_freed_memory
from burnish.models.policy import Policy
from burnish.objectives.sft import SFTObjective

VARIANTS = {  # (type of the frozen weights, autocast to bf16)
    "fp32": (torch.float32, False),
    "bf16 products": (torch.float32, True),
    "bf16 products and weights": (torch.bfloat16, True),
}


def build(layers: int, dtype: torch.dtype) -> Policy:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    model = get_peft_model(LlamaForCausalLM(config).to(dtype), LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return Policy(model, verify=False).train()


def conversations(tokens: int) -> Batch:
    """Examples of 60 to 260 tokens, the second half of each trained."""
    rng, examples, left = np.random.default_rng(0), [], tokens
    while left > 0:
        length = min(int(rng.integers(60, 260)), left)
        weights = (np.arange(length) >= length // 2).astype(np.float32)
        examples.append(Example(rng.integers(0, 49152, length).astype(np.int32), weights))
        left -= length
    return collate(examples, step_weight=float(tokens))


def seconds(policy: Policy, batch: Batch, autocast: bool, repeats: int) -> float:
    objective, best = SFTObjective(SFT()), float("inf")
    for _ in range(repeats + 1):  # the first one warms up
        start = time.process_time()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = objective(policy, batch)
        (loss.sum / batch.step_weight).backward()
        best = min(best, time.process_time() - start)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--tokens", default="1024")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--keep-memory", action="store_true", help="tell malloc to keep freed pages")
    options = parser.parse_args()
    if options.keep_memory:
        print("malloc keeps freed pages:", keep_freed_memory())
    sizes = [int(size) for size in options.tokens.split(",")]
    plain: dict[int, float] = {}
    for name, (dtype, autocast) in VARIANTS.items():
        policy = build(options.layers, dtype)
        for size in sizes:
            rate = size / seconds(policy, conversations(size), autocast, options.repeats)
            print(f"{name:28} {size:6} tokens: {rate:7.0f} tokens per processor second, {rate / plain.setdefault(size, rate):.2f} x fp32")


if __name__ == "__main__":
    main()
