"""What ranks send each other in one optimiser step, by strategy: counted at the collectives themselves, beside what arithmetic says.

    torchrun --standalone --nproc-per-node 4 -m benchmarks.communication --shape smollm2-135m --micro-batches 2
    torchrun --standalone --nproc-per-node 4 -m benchmarks.communication --context 2 --tokens 512
    torchrun --standalone --nproc-per-node 4 -m benchmarks.communication --tensor 2 --tokens 512

What weights cost does not depend on the tokens of a micro-batch, so a few are enough, and weights are random. `sent` is what one rank sends
where the collectives go round a ring: (n - 1) / n of what is gathered, scattered or exchanged, twice that of what is reduced for all.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import math
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from burnish.core.log import console
from burnish.run import Run

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2},
    "smollm2-135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
}
VOCABULARY = {"tiny": 512, "smollm2-135m": 49152}
STRATEGIES: list[tuple[str, dict[str, Any]]] = [
    ("ddp", {"strategy": "ddp"}),
    ("fsdp", {"strategy": "fsdp"}),
    ("fsdp, reshard: false", {"strategy": "fsdp", "reshard": False}),
    ("zero2", {"strategy": "zero2"}),
    ("zero1", {"strategy": "zero1"}),
    ("hsdp, shards: 2", {"strategy": "hsdp", "shards": 2}),
]


def strategies(context: int, tensor: int) -> list[tuple[str, dict[str, Any]]]:
    """What is counted: every strategy, or those that tokens or layers are shared under."""
    if tensor > 1:
        return [(f"ddp, tensor: {tensor}", {"strategy": "ddp", "tensor": tensor})]
    if context == 1:
        return STRATEGIES
    return [(f"{name}, context: {context}", {"strategy": name, "context": context}) for name in ("ddp", "fsdp")]


class Counted(TorchDispatchMode):
    """Adds up the bytes of every collective: what is gathered, scattered or reduced, and what a rank sends for it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.sent = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self._note(func._opname, args)
        return func(*args, **(kwargs or {}))

    def _note(self, name: str, args: Any) -> None:
        kinds = {"_allgather_base_": ("all_gather", 1), "_reduce_scatter_base_": ("reduce_scatter", 1), "allreduce_": ("all_reduce", 2)}
        kinds |= {"all_gather_single": kinds["_allgather_base_"], "reduce_scatter_single": kinds["_reduce_scatter_base_"]}
        kinds |= {"alltoall_base_": ("all_to_all", 1), "all_to_all_single": ("all_to_all", 1)}
        kind, times = kinds.get(name, ("other", 1))
        tensors = [x for arg in args for x in (arg if isinstance(arg, list) else [arg]) if isinstance(x, torch.Tensor)]
        size = max((tensor.nbytes for tensor in tensors), default=0)  # the side that is whole
        group = next((dist.ProcessGroup.unbox(arg) for arg in args if isinstance(arg, torch.ScriptObject) and _is_group(arg)), None)
        ranks = group.size() if group is not None else dist.get_world_size()
        self.calls[kind] += 1
        self.bytes[kind] += size
        if kind != "other":
            self.sent += times * size * (ranks - 1) / ranks


def _is_group(value: torch.ScriptObject) -> bool:
    return "ProcessGroup" in value._type().qualified_name()


def make_model(folder: Path, shape: str, tokens: int) -> None:
    raw = Tokenizer(models.WordLevel({"<end>": 0, "<unknown>": 1, **{f"w{n}": n + 2 for n in range(100)}}, unk_token="<unknown>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>").save_pretrained(folder)
    config = LlamaConfig(vocab_size=VOCABULARY[shape], tie_word_embeddings=True, eos_token_id=0, bos_token_id=None, **SHAPES[shape])
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    rows = [{"text": " ".join(f"w{(n + k) % 100}" for k in range(tokens - 1))} for n in range(64)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def count(
    place: Path, parallel: dict[str, Any], adapter: dict[str, Any] | None, micro_batches: int, tokens: int
) -> tuple[Counted, dict[str, float]]:
    """The second step of a run, and what arithmetic says of it."""
    ranks = dist.get_world_size() // (parallel.get("context", 1) * parallel.get("tensor", 1))
    run = Run.from_config(
        {
            "model": str(place),
            "adapter": adapter,
            "data": {"train": str(place / "rows.jsonl"), "max_length": tokens, "cache": str(place / "cache"), "workers": 1},
            "train": {"steps": 2, "batch_size": ranks * micro_batches, "micro_batch_tokens": tokens, "precision": "float32"},
            "parallel": parallel,
            "output": str(place / "run"),
        }
    )
    counted = Counted()
    for batch in run.batches():
        if run.stepper.step == 0:
            run.step(run.loss(batch))
            continue
        with counted:
            run.step(run.loss(batch))
    expected = arithmetic(run, parallel, micro_batches)
    for kind, size in exchanged(run, micro_batches, tokens).items():
        expected[kind] = expected.get(kind, 0) + size
    return counted, expected


def arithmetic(run: Run, parallel: dict[str, Any], micro_batches: int) -> dict[str, float]:
    """Bytes of a step by formula: W of layers and of the rest, G of gradients, each unit rounded up to equal shards."""
    model, layers, backend = run.policy.model, run.policy.layers, run.backend

    def of(modules: list[torch.nn.Module], trained: bool, shards: int) -> int:
        seen = {id(p): p for module in modules for p in module.parameters() if p.requires_grad or not trained}
        return sum(-(-p.shape[0] // shards) * shards * (p.numel() // p.shape[0]) * p.element_size() for p in seen.values())

    if backend.grid.tensor > 1:
        parts = [p.nbytes for name, p in model.named_parameters() if p.requires_grad and name in backend.layout]
        # Gradients of parts meet where several ranks have the same ones.
        return {"all_reduce": of([model], True, 1) - (sum(parts) if backend.data_world_size == 1 else 0)}
    if not backend.sharded:
        return {"all_reduce": of([model], True, 1)}
    shards = backend.shards
    in_layers, everything, gradients = of(layers, False, shards), of([model], False, shards), of([model], True, shards)
    if backend.strategy in ("zero1", "zero2"):
        return {"all_gather": everything, "reduce_scatter": gradients * (1 if backend.strategy == "zero1" else micro_batches)}
    again = in_layers if parallel.get("reshard", True) else 0
    found = {"all_gather": micro_batches * (everything + again), "reduce_scatter": micro_batches * gradients}
    return found | ({"all_reduce": gradients / shards} if shards < backend.world_size else {})


def exchanged(run: Run, micro_batches: int, tokens: int) -> dict[str, float]:
    """What ranks that share T tokens exchange, by formula: each layer's queries, keys, values and outputs, forward and backward, of T / N
    tokens; the last hidden states of all T, gathered, and their gradients; the statistics of each prediction, and their gradients.

    Those that share layers: the output of each of a layer's two blocks, and the gradient of its input, once as N pieces that are added and
    once as N sums that are gathered. The first block's input has no gradient where the embeddings are frozen.
    """
    size, grid = run.backend.grid.context, run.backend.grid
    config: Any = run.policy.anatomy.whole.config
    if grid.tensor > 1:
        frozen = 0 if run.config.adapter is None else 1
        added = 4 * micro_batches * (4 * config.num_hidden_layers - frozen) * tokens * config.hidden_size
        return {"all_to_all": added, "all_gather": added}
    if size == 1:
        return {}
    width, predictions = config.hidden_size // config.num_attention_heads, -(-(tokens - 1) // size) * size
    keys = math.lcm(config.num_key_value_heads, size)
    layer = tokens // size * width * (2 * config.num_attention_heads + 2 * keys)
    gathered = tokens * config.hidden_size + 2 * predictions  # SFT's: the log-probability, and whether it is the first choice
    return {"all_to_all": 4 * micro_batches * (2 * config.num_hidden_layers * layer + gathered), "all_gather": 4 * micro_batches * gathered}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--micro-batches", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=32, help="of a micro-batch")
    parser.add_argument("--context", type=int, default=1, help="ranks that share the tokens of a micro-batch")
    parser.add_argument("--tensor", type=int, default=1, help="ranks that share the weights of each layer")
    options = parser.parse_args()
    dist.init_process_group("gloo")
    logging.disable(logging.WARNING)
    console.quiet = True
    with tempfile.TemporaryDirectory() as made:
        box = [made]
        dist.broadcast_object_list(box)
        place = Path(box[0])
        if dist.get_rank() == 0:
            make_model(place, options.shape, options.tokens)
            size = f"{options.micro_batches} micro-batches of {options.tokens} tokens a step"
            print(f"{options.shape}, {dist.get_world_size()} ranks, {size}, MB (10^6 bytes)")
            print("trained | strategy | all_gather | reduce_scatter | all_reduce | all_to_all | sent by a rank | other | by arithmetic")
        dist.barrier()
        for trained, adapter in (("whole model", None), ("LoRA, rank 16", {"rank": 16})):
            for name, parallel in strategies(options.context, options.tensor):
                if dist.get_world_size() % parallel.get("shards", 1) or parallel.get("shards") == dist.get_world_size():
                    continue
                counted, expected = count(place, parallel, adapter, options.micro_batches, options.tokens)
                gc.collect()
                if dist.get_rank() == 0:
                    kinds = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all")
                    # A few numbers go along: losses, the norm, the guard's look.
                    agrees = all(0 <= counted.bytes[kind] - expected.get(kind, 0) < 2_000 for kind in kinds)
                    numbers = " | ".join(f"{counted.bytes[kind] / 1e6:.3f}" for kind in kinds)
                    rest = f"{counted.sent / 1e6:.3f} | {counted.bytes['other'] / 1e6:.3f} | {'equal' if agrees else f'NOT: {expected}'}"
                    print(f"{trained} | {name} | {numbers} | {rest}", flush=True)
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
