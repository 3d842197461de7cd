"""The honest opponent: LoRA fine-tuning of a Llama-shaped model in plain torch, as a good engineer would write it in a day.

Flat tokens and no padding, one scaled_dot_product_attention per row, logits at trained positions only, an autograd node of its own for
linear + LoRA, frozen weights in the compute type, adapter and AdamW in fp32. No burnish, no PEFT; transformers loads the weights, renders
the chat and makes the rotary table. benchmarks/sft.py measures it beside the tools; by itself it prints the loss and speed of each step:

    python -m benchmarks.reference_loop MODEL_FOLDER ROWS.json [--precision bfloat16] [--steps 20] [--packed]
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

Tokens = tuple[list[int], int]
"""The ids of a row, and how many of them are the prompt."""


class LoRALinear(torch.autograd.Function):
    """y = x W^T + s (x A^T) B^T for flat x, with W frozen and A, B in fp32."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, w: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
        a, b = a.to(x.dtype), b.to(x.dtype)
        u = x @ a.t()
        ctx.save_for_backward(x, w, a, b, u)
        ctx.scale = scale
        return torch.mm(x, w.t()).addmm_(u, b.t(), alpha=scale)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, w, a, b, u = ctx.saved_tensors
        du = (dy @ b).mul_(ctx.scale)
        dx = torch.mm(dy, w).addmm_(du, a)
        return dx, None, (du.t() @ x).float(), (dy.t() @ u).mul_(ctx.scale).float(), None


class Linear:
    """One frozen matrix with its adapter."""

    def __init__(self, weight: torch.Tensor, rank: int, alpha: float) -> None:
        self.weight, self.scale = weight, alpha / rank
        bound = weight.shape[1] ** -0.5  # PEFT's start: A as kaiming_uniform with a = sqrt(5), B zero
        self.a = torch.empty(rank, weight.shape[1], device=weight.device).uniform_(-bound, bound).requires_grad_()
        self.b = torch.zeros(weight.shape[0], rank, device=weight.device).requires_grad_()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return LoRALinear.apply(x, self.weight, self.a, self.b, self.scale)


class Layer:
    def __init__(self, layer: Any, rank: int, alpha: float) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        modules = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj)
        self.q, self.k, self.v, self.o, self.gate, self.up, self.down = self.linears = [Linear(m.weight, rank, alpha) for m in modules]
        self.norms = layer.input_layernorm.weight, layer.post_attention_layernorm.weight


class Model:
    """The frozen model, flat, with adapters."""

    def __init__(self, folder: str, dtype: torch.dtype, rank: int = 16, alpha: float = 32, device: str = "cpu") -> None:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).requires_grad_(False)
        self.config, self.device = model.config, torch.device(device)
        self.embedding, self.head = model.model.embed_tokens.weight, model.lm_head.weight
        self.rotary, self.norm = model.model.rotary_emb, model.model.norm.weight
        self.layers = [Layer(layer, rank, alpha) for layer in model.model.layers]
        self.head_dim = getattr(self.config, "head_dim", None) or self.config.hidden_size // self.config.num_attention_heads

    def parameters(self) -> list[torch.Tensor]:
        return [matrix for layer in self.layers for linear in layer.linears for matrix in (linear.a, linear.b)]

    def loss(self, batch: Batch) -> torch.Tensor:
        """The mean loss over the trained tokens."""
        eps, width = self.config.rms_norm_eps, (self.embedding.shape[1],)
        x = F.embedding(batch.ids, self.embedding)
        cos, sin = (table[0] for table in self.rotary(x[None], batch.positions[None]))
        for layer in self.layers:
            x = x + self._attention(layer, F.rms_norm(x, width, layer.norms[0], eps), cos, sin, batch.lengths)
            h = F.rms_norm(x, width, layer.norms[1], eps)
            x = x + layer.down(F.silu(layer.gate(h)) * layer.up(h))
        hidden = F.rms_norm(x[batch.rows], width, self.norm, eps)
        return F.cross_entropy((hidden @ self.head.t()).float(), batch.targets)

    def _attention(self, layer: Layer, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, lengths: list[int]) -> torch.Tensor:
        q, k, v = (linear(x).view(len(x), -1, self.head_dim).transpose(0, 1) for linear in (layer.q, layer.k, layer.v))
        q, k = (z * cos + torch.cat((-z[..., self.head_dim // 2 :], z[..., : self.head_dim // 2]), -1) * sin for z in (q, k))
        k, v = (z.repeat_interleave(q.shape[0] // z.shape[0], 0) for z in (k, v))
        parts = zip(*(z.split(lengths, 1) for z in (q, k, v)), strict=True)
        out = [F.scaled_dot_product_attention(*(z[None] for z in part), is_causal=True)[0] for part in parts]
        return layer.o(torch.cat(out, 1).transpose(0, 1).reshape(len(x), -1))


@dataclass
class Batch:
    ids: torch.Tensor
    positions: torch.Tensor
    rows: torch.Tensor  # where a trained token is predicted
    targets: torch.Tensor
    lengths: list[int]


def tokenise(folder: str, rows: list[dict[str, str]], max_length: int) -> list[Tokens]:
    """The chat of each row, cut at `max_length`; the answer and its end token are trained."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    questions = [tokenizer.apply_chat_template(_user(row), add_generation_prompt=True, tokenize=False) for row in rows]
    prompts = tokenizer(questions, add_special_tokens=False)["input_ids"]
    answers = tokenizer([row["output"] for row in rows], add_special_tokens=False)["input_ids"]
    return [((p + a + [tokenizer.eos_token_id])[:max_length], len(p)) for p, a in zip(prompts, answers, strict=True)]


def _user(row: dict[str, str]) -> list[dict[str, str]]:
    return [{"role": "user", "content": "\n".join(filter(None, (row["instruction"], row.get("input"))))}]


def batches(rows: list[Tokens], size: int, max_tokens: int | None, device: torch.device) -> Iterator[Batch]:
    """Batches without end: `size` rows each, or as many whole rows as `max_tokens` has room for."""
    group: list[Tokens] = []
    for row in itertools.cycle(row for row in rows if row[1] < len(row[0])):
        full = len(group) == size if max_tokens is None else sum(len(ids) for ids, _ in group) + len(row[0]) > max_tokens
        if group and full:
            yield flat(group, device)
            group = []
        group.append(row)


def flat(group: list[Tokens], device: torch.device) -> Batch:
    lengths = [len(ids) for ids, _ in group]
    starts = [end - length for end, length in zip(itertools.accumulate(lengths), lengths, strict=True)]
    ids = torch.tensor([i for row, _ in group for i in row])
    trained = torch.tensor([s + i for s, (row, prompt) in zip(starts, group, strict=True) for i in range(prompt, len(row))])
    positions = torch.cat([torch.arange(length) for length in lengths])
    return Batch(ids.to(device), positions.to(device), (trained - 1).to(device), ids[trained].to(device), lengths)


def train(model: Model, source: Iterator[Batch], steps: int, learning_rate: float, done: Callable[[Batch, float], None]) -> None:
    parameters = model.parameters()
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0, fused=True)
    for batch in itertools.islice(source, steps):
        loss = model.loss(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad()
        done(batch, loss.item())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("rows", type=Path)
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--packed", action="store_true", help="fill each step with batch size x max length tokens")
    options = parser.parse_args()
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = Model(options.model, getattr(torch, options.precision), device=device)
    rows = tokenise(options.model, json.loads(options.rows.read_text()), options.max_length)
    budget = options.batch_size * options.max_length if options.packed else None
    last = [time.perf_counter()]

    def show(batch: Batch, loss: float) -> None:
        last.append(time.perf_counter())
        print(f"step {len(last) - 1}  loss {loss:.4f}  {len(batch.ids) / (last[-1] - last[-2]):.0f} tokens/s", flush=True)

    train(model, batches(rows, options.batch_size, budget, model.device), options.steps, 2e-4, show)


if __name__ == "__main__":
    main()
