"""Each kernel as a problem: inputs of a case, the kernel and its plain twin as functions of them, and what must be moved and computed.

benchmarks/kernels.py times them, tests/gpu/test_kernels.py checks them on a real GPU. Cases are the kernels' own (`CASES` in
burnish.kernels.NAME); `sizes` adds those of real models, with the same keys. A kernel that is not there is simply no problem.

Costs are for forward and backward together and count every tensor once each time it has to pass through memory: what the best possible
kernel would need.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

Case = dict[str, Any]
Inputs = dict[str, torch.Tensor]
Outputs = tuple[torch.Tensor, ...]
Cost = tuple[float, float]
"""(bytes, FLOPs)."""

EPS = 1e-6


@dataclass(frozen=True)
class Problem:
    """One case of one kernel. `run` and `plain` never change their inputs."""

    inputs: Inputs
    run: Callable[[Inputs, str], Outputs]
    plain: Callable[[Inputs], Outputs]
    trained: tuple[str, ...]  # inputs whose gradients are wanted
    cost: Cost


@dataclass(frozen=True)
class Kernel:
    """How to make problems of a kernel. `impls` are the values of its `impl` argument that are worth trying."""

    name: str
    build: Callable[[ModuleType, Case, torch.dtype, torch.device], Problem]
    sizes: Callable[[str, int], list[tuple[str, Case]]]  # of (device type, tokens)
    impls: tuple[str, ...] = ("torch", "native", "triton")

    def module(self) -> ModuleType | None:
        """burnish.kernels.NAME, where it exists."""
        try:
            return importlib.import_module(f"burnish.kernels.{self.name}")
        except ModuleNotFoundError as error:
            if error.name == f"burnish.kernels.{self.name}":
                return None
            raise

    def cases(self) -> list[tuple[str, Case]]:
        """The kernel's own cases."""
        return list(getattr(self.module(), "CASES", []))

    def problem(self, case: Case, dtype: torch.dtype, device: torch.device) -> Problem:
        """A case with random inputs, the same for everyone who asks.

        Raises:
            ValueError: the kernel does not exist.
        """
        module = self.module()
        if module is None:
            raise ValueError(f"there is no kernel '{self.name}'")
        torch.manual_seed(0)
        return self.build(module, case, dtype, device)


def leaves(problem: Problem, dtype: torch.dtype | None = None) -> Inputs:
    """Fresh copies of the inputs, those of them that are trained as leaves; floating-point ones in `dtype` where it is given.

    A copy has the strides of the original: kernels are to be seen reading what models hand them.
    """
    copies: Inputs = {}
    for name, value in problem.inputs.items():
        wanted = dtype if dtype is not None and value.is_floating_point() else value.dtype
        copy = torch.empty_strided(value.shape, value.stride(), dtype=wanted, device=value.device)
        copies[name] = copy.copy_(value).requires_grad_(name in problem.trained)
    return copies


def normal(*shape: int, dtype: torch.dtype, device: torch.device, scale: float = 1.0) -> torch.Tensor:
    # Drawn on the CPU, so that every device gets the same numbers.
    return (torch.randn(*shape) * scale).to(device, dtype)


def as_tuple(value: Any) -> Outputs:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


# RMSNorm


def rms_norm(module: ModuleType, case: Case, dtype: torch.dtype, device: torch.device) -> Problem:
    rows, size = case["rows"], case["size"]
    options = {name: case[name] for name in ("gemma", "offset", "through") if name in case}
    inputs = {"x": normal(rows, size, dtype=dtype, device=device), "weight": normal(size, dtype=dtype, device=device, scale=0.5)}
    if case.get("residual"):
        inputs["residual"] = normal(rows, size, dtype=dtype, device=device)

    def call(function: Callable[..., Any], given: Inputs, **more: Any) -> Outputs:
        return as_tuple(function(given["x"], given["weight"], EPS, residual=given.get("residual"), **options, **more))

    passes = 8 if case.get("residual") else 6 if case.get("through") else 5  # x, y; x, dy, dx; what is added or returned, its gradient
    return Problem(
        inputs,
        lambda given, impl: call(module.rms_norm, given, impl=impl),
        lambda given: call(module.rms_norm_reference, given),
        tuple(inputs),
        (passes * rows * size * dtype.itemsize, 12.0 * rows * size),
    )


def norm_sizes(device: str, tokens: int) -> list[tuple[str, Case]]:
    widths = {"1b": 2048, "3b": 3072, "8b": 4096} if device == "cuda" else {"smollm2": 576}
    plain = [(name, {"rows": tokens, "size": size}) for name, size in widths.items()]
    return [*plain, *((f"{name} residual", {**case, "residual": True}) for name, case in plain)]


# RoPE


def rope(module: ModuleType, case: Case, dtype: torch.dtype, device: torch.device) -> Problem:
    batch, tokens, size = case["batch"], case["tokens"], case["size"]
    rotary, tables = case.get("rotary", case["size"]), case.get("tables", 1)
    kinds = {"dtype": dtype, "device": device}
    # As a projection leaves them: [B, T, H, D] seen through a transpose.
    q, k = (normal(batch, tokens, heads, size, **kinds).transpose(1, 2) for heads in (case["heads"], case["kv_heads"]))
    angles = torch.rand(tables, tokens, rotary // 2).mul(6.28).repeat(1, 1, 2)
    inputs = {"q": q, "k": k, "cos": angles.cos().to(device, dtype), "sin": angles.sin().to(device, dtype)}
    elements = q.numel() + k.numel()
    return Problem(
        inputs,
        lambda given, impl: as_tuple(module.rope(*given.values(), impl=impl)),
        lambda given: as_tuple(module.rope_reference(*given.values())),
        ("q", "k"),
        (4.0 * elements * dtype.itemsize, 6.0 * elements),
    )


def rope_sizes(device: str, tokens: int) -> list[tuple[str, Case]]:
    heads = {"1b": (32, 8, 64), "3b": (24, 8, 128), "8b": (32, 8, 128)} if device == "cuda" else {"smollm2": (9, 3, 64)}
    return [(name, {"batch": 1, "heads": q, "kv_heads": kv, "tokens": tokens, "size": d}) for name, (q, kv, d) in heads.items()]


# Gated linear units


def glu(module: ModuleType, case: Case, dtype: torch.dtype, device: torch.device) -> Problem:
    rows, size, kind = case["rows"], case["size"], case.get("kind", "silu")
    both = normal(rows, 2 * size, dtype=dtype, device=device)
    gate, up = (both[:, :size], both[:, size:]) if case.get("halves") else (both[:, :size].contiguous(), both[:, size:].contiguous())
    return Problem(
        {"gate": gate, "up": up},
        lambda given, impl: as_tuple(module.glu(given["gate"], given["up"], kind, impl=impl)),
        lambda given: as_tuple(module.glu_reference(given["gate"], given["up"], kind)),
        ("gate", "up"),
        (8.0 * rows * size * dtype.itemsize, 20.0 * rows * size),
    )


def glu_sizes(device: str, tokens: int) -> list[tuple[str, Case]]:
    sizes = {"1b, 3b": 8192, "8b": 14336} if device == "cuda" else {"smollm2": 1536}
    return [(name, {"rows": tokens, "size": size}) for name, size in sizes.items()]


# LoRA


def lora(module: ModuleType, case: Case, dtype: torch.dtype, device: torch.device) -> Problem:
    tokens, width, outputs, rank = case["tokens"], case["inputs"], case["outputs"], case["rank"]
    inputs = {"x": normal(tokens, width, dtype=dtype, device=device)}
    for i, out in enumerate(outputs):
        inputs[f"weight{i}"] = normal(out, width, dtype=dtype, device=device, scale=width**-0.5)
        # The adapter is kept in fp32 beside weights of any type.
        inputs[f"a{i}"] = normal(rank, width, dtype=torch.float32, device=device, scale=width**-0.5)
        inputs[f"b{i}"] = normal(out, rank, dtype=torch.float32, device=device, scale=rank**-0.5)

    def projections(given: Inputs) -> list[Any]:
        return [
            module.Projection(given[f"weight{i}"], None, module.LoraWeights(given[f"a{i}"], given[f"b{i}"], 2.0))
            for i in range(len(outputs))
        ]

    flops = sum(4.0 * tokens * width * out + 6.0 * tokens * rank * (width + out) for out in outputs)
    # x and dx, y and dy, each matrix in both directions; x and dy once more for the adapter's gradients.
    moved = 3.0 * tokens * width + sum(3.0 * tokens * out + 2.0 * width * out for out in outputs)
    return Problem(
        inputs,
        lambda given, impl: as_tuple(module.lora_stack(given["x"], projections(given), impl=impl)),
        lambda given: as_tuple(module.lora_reference(given["x"], projections(given))),
        tuple(name for name in inputs if not name.startswith("weight")),
        (moved * dtype.itemsize, flops),
    )


def lora_sizes(device: str, tokens: int) -> list[tuple[str, Case]]:
    # name: hidden size, width of k and v, width of the MLP
    models = {"1b": (2048, 512, 8192), "8b": (4096, 1024, 14336)} if device == "cuda" else {"smollm2": (576, 192, 1536)}
    cases: list[tuple[str, Case]] = []
    for name, (hidden, kv, inner) in models.items():
        shapes = {
            "qkv": (hidden, (hidden, kv, kv)),
            "o": (hidden, (hidden,)),
            "gate_up": (hidden, (inner, inner)),
            "down": (inner, (hidden,)),
        }
        cases += [(f"{name} {key}", {"tokens": tokens, "inputs": i, "outputs": o, "rank": 16}) for key, (i, o) in shapes.items()]
    return cases


def lora_mlp(module: ModuleType, case: Case, dtype: torch.dtype, device: torch.device) -> Problem:
    single: Any = importlib.import_module("burnish.kernels.lora")
    tokens, hidden, inner, rank, kind = case["tokens"], case["hidden"], case["inner"], case["rank"], case.get("kind", "silu")
    shapes = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
    inputs = {"x": normal(tokens, hidden, dtype=dtype, device=device)}
    for name, (out, width) in shapes.items():
        inputs[f"weight {name}"] = normal(out, width, dtype=dtype, device=device, scale=width**-0.5)
        inputs[f"a {name}"] = normal(rank, width, dtype=torch.float32, device=device, scale=width**-0.5)
        inputs[f"b {name}"] = normal(out, rank, dtype=torch.float32, device=device, scale=rank**-0.5)

    def call(function: Callable[..., torch.Tensor], given: Inputs, **more: Any) -> Outputs:
        parts = [
            single.Projection(given[f"weight {name}"], None, single.LoraWeights(given[f"a {name}"], given[f"b {name}"], 2.0))
            for name in shapes
        ]
        return (function(given["x"], *parts, kind, **more),)

    flops = 12.0 * tokens * hidden * inner + 18.0 * tokens * rank * (hidden + inner)
    # x, y and their gradients; gate and up made, read twice; h made and read; dh, dgate and dup made and read; each matrix twice.
    moved = 5.0 * tokens * hidden + 14.0 * tokens * inner + 6.0 * hidden * inner
    return Problem(
        inputs,
        lambda given, impl: call(module.lora_mlp, given, impl=impl),
        lambda given: call(module.lora_mlp_reference, given),
        tuple(name for name in inputs if not name.startswith("weight")),
        (moved * dtype.itemsize, flops),
    )


def mlp_sizes(device: str, tokens: int) -> list[tuple[str, Case]]:
    models = {"1b": (2048, 8192), "8b": (4096, 14336)} if device == "cuda" else {"smollm2": (576, 1536)}
    return [(name, {"tokens": tokens, "hidden": hidden, "inner": inner, "rank": 16}) for name, (hidden, inner) in models.items()]


# The head


def linear_ce(module: ModuleType, case: Case, dtype: torch.dtype, device: torch.device) -> Problem:
    rows, width, vocabulary = case["k"], case["h"], case["v"]
    options = {name: case[name] for name in ("softcap", "scale", "temperature", "want") if name in case}
    inputs = {
        "hidden": normal(rows, width, dtype=dtype, device=device),
        "weight": normal(vocabulary, width, dtype=dtype, device=device, scale=width**-0.5),
        "targets": torch.randint(vocabulary, (rows,)).to(device),
    }

    knows_impl = "impl" in inspect.signature(module.head_stats).parameters

    def run(given: Inputs, impl: str) -> Outputs:
        if not knows_impl and impl != "torch":
            raise ValueError("only in torch")
        chosen = {"impl": impl} if knows_impl else {}
        return (module.head_stats(*given.values(), **options, **chosen).logprobs,)

    products = 4.0 * rows * width * vocabulary * (1.5 if case.get("trained") else 1.0)
    moved = (2.0 * vocabulary * width + 3.0 * rows * width) * dtype.itemsize
    return Problem(
        inputs,
        run,
        lambda given: (module.head_stats_reference(*given.values(), **options).logprobs,),
        ("hidden", "weight") if case.get("trained") else ("hidden",),
        (moved, products),
    )


def head_sizes(device: str, tokens: int) -> list[tuple[str, Case]]:
    heads = {"1b": (2048, 128256), "8b": (4096, 128256)} if device == "cuda" else {"smollm2": (576, 49152)}
    return [(name, {"k": tokens // 2, "h": width, "v": vocabulary}) for name, (width, vocabulary) in heads.items()]


def divergence(module: ModuleType, case: Case, dtype: torch.dtype, device: torch.device) -> Problem:
    rows, width, other, vocabulary = case["k"], case["h"], case["teacher_h"], case["v"]
    inputs = {
        "hidden": normal(rows, width, dtype=dtype, device=device),
        "weight": normal(vocabulary, width, dtype=dtype, device=device, scale=width**-0.5),
        "teacher_hidden": normal(rows, other, dtype=dtype, device=device),
        "teacher_weight": normal(vocabulary, other, dtype=dtype, device=device, scale=other**-0.5),
    }
    targets, weights = torch.randint(vocabulary, (rows,)).to(device), torch.rand(rows).to(device)

    def call(function: Callable[..., Any], given: Inputs) -> Outputs:
        student = module.HeadInputs(given["hidden"], vocabulary, given["weight"])
        teacher = module.HeadInputs(given["teacher_hidden"], vocabulary, given["teacher_weight"])
        return (function(student, teacher, targets, weights, kind=case.get("kind", "forward_kl"))[0],)

    products = 2.0 * rows * vocabulary * (width * (3 if case.get("trained") else 2) + other)
    moved = (2.0 * vocabulary * width + vocabulary * other + rows * (3.0 * width + other)) * dtype.itemsize
    trained = ("hidden", "weight") if case.get("trained") else ("hidden",)
    run, plain = module.weighted_divergence, module.weighted_divergence_reference
    return Problem(inputs, lambda given, _: call(run, given), lambda given: call(plain, given), trained, (moved, products))


def divergence_sizes(device: str, tokens: int) -> list[tuple[str, Case]]:
    heads = {"8b to 1b": (2048, 4096, 128256)} if device == "cuda" else {"smollm2": (576, 960, 49152)}
    return [(name, {"k": tokens // 2, "h": h, "teacher_h": other, "v": v}) for name, (h, other, v) in heads.items()]


DIVERGENCE_CASES: list[tuple[str, Case]] = [
    (f"{kind}{', trained' if trained else ''}", {"k": 131, "h": 64, "teacher_h": 96, "v": 2011, "kind": kind, "trained": trained})
    for kind in ("forward_kl", "reverse_kl", "js")
    for trained in (False, True)
]


# AdamW


def adamw(module: ModuleType, case: Case, dtype: torch.dtype, device: torch.device) -> Problem:
    dtype = torch.float32  # its state, whatever the model's type is
    segments, at = [], 0
    for i, size in enumerate(case["sizes"]):
        decay = case.get("weight_decay", 0.1)
        segments.append(module.Segment(at, at + size, lr=0.01 * (i + 1), weight_decay=decay, step=3 + i))
        at += size + case.get("gap", 0)
    kinds = {"dtype": dtype, "device": device}
    inputs = {"param": normal(at, **kinds), "grad": normal(at, **kinds, scale=0.1), "exp_avg": normal(at, **kinds, scale=0.05)}
    inputs["exp_avg_sq"] = normal(at, **kinds, scale=0.1).square()
    scale = case.get("grad_scale", 1.0)

    def step(function: Callable[..., None], given: Inputs, **more: Any) -> Outputs:
        buffers = {name: value.clone() for name, value in given.items()}
        function(*buffers.values(), segments, grad_scale=scale, **more)
        return tuple(value for name, value in buffers.items() if name != "grad")

    return Problem(
        inputs,
        lambda given, impl: step(module.adamw, given, impl=impl),
        lambda given: step(module.adamw_reference, given),
        (),
        (7.0 * at * dtype.itemsize, 15.0 * at),
    )


def adamw_sizes(device: str, tokens: int) -> list[tuple[str, Case]]:
    adapter = {"lora 1b": 11_272_192, "lora 8b": 41_943_040} if device == "cuda" else {"lora smollm2": 4_884_480}
    return [(name, {"sizes": [size]}) for name, size in adapter.items()]


# Attention over segments


def attention(module: ModuleType, case: Case, dtype: torch.dtype, device: torch.device) -> Problem:
    lengths: Sequence[int] = case["lengths"]
    heads, kv_heads, size = case["heads"], case["kv_heads"], case["size"]
    ends = torch.tensor(lengths).cumsum(0).tolist()
    forest = _forest_class()(tuple(ends), tuple(case.get("parents", (-1,) * len(lengths))))
    kinds = {"dtype": dtype, "device": device}
    inputs = {
        name: normal(1, ends[-1], n, size, **kinds).transpose(1, 2) for name, n in zip("qkv", (heads, kv_heads, kv_heads), strict=True)
    }

    def plain(given: Inputs) -> Outputs:
        return (module.eager_attention(*given.values(), forest.visible(None, device)),)

    # A segment sees half of itself and its whole chain; two products forward, five backward.
    seen = sum(n * (n / 2 + sum(lengths[j] for j in forest.chain(i)[:-1])) for i, n in enumerate(lengths))
    elements = sum(value.numel() for value in inputs.values()) + inputs["q"].numel()
    return Problem(
        inputs,
        lambda given, impl: (module.forest_attention(*given.values(), forest, kind=impl),),
        plain,
        ("q", "k", "v"),
        (3.0 * elements * dtype.itemsize, 14.0 * heads * size * seen),
    )


# Experts of a mixture


def experts(module: ModuleType, case: Case, dtype: torch.dtype, device: torch.device) -> Problem:
    tokens, count, top, hidden, inner, rank = (case[name] for name in ("tokens", "experts", "top", "hidden", "inner", "rank"))

    def tensor(*shape: int, dtype: torch.dtype = dtype, scale: float = 1.0) -> torch.Tensor:
        made = normal(*shape, dtype=dtype, device=device, scale=scale)
        return made.movedim(-1, 0).contiguous().movedim(0, -1) if case.get("strided") else made

    free = torch.rand(tokens, count).topk(top, dim=-1).indices if tokens else torch.zeros(0, top, dtype=torch.long)
    inputs = {
        "x": tensor(tokens, hidden),
        "index": (torch.zeros_like(free) if case.get("routing") == "one" else free).to(device),
        "weights": tensor(tokens, top).float().softmax(dim=-1).to(dtype),
        "gate_up": tensor(count, 2 * inner, hidden, scale=hidden**-0.5),
        "down": tensor(count, hidden, inner, scale=inner**-0.5),
        "a": tensor(count, rank, hidden, dtype=torch.float32, scale=hidden**-0.5),
        "b": tensor(count, 2 * inner, rank, dtype=torch.float32, scale=rank**-0.5),
        "c": tensor(count, rank, inner, dtype=torch.float32, scale=inner**-0.5),
        "d": tensor(count, hidden, rank, dtype=torch.float32, scale=rank**-0.5),
    }

    def call(function: Callable[..., torch.Tensor], given: Inputs, **more: Any) -> Outputs:
        *tensors, a, b, c, d = given.values()
        return (function(*tensors, "silu", module.ExpertLora(a, b, 0.5), module.ExpertLora(c, d, 0.5), **more),)

    rows = tokens * top
    weights = 3.0 * min(count, rows) * hidden * inner
    flops = 4.0 * rows * 3 * hidden * inner + 6.0 * rows * rank * (2 * hidden + 3 * inner)
    moved = 2.0 * weights + 4.0 * tokens * hidden + rows * (4.0 * hidden + 14.0 * inner)
    return Problem(
        inputs,
        lambda given, impl: call(module.expert_mlp, given, impl=impl),
        lambda given: call(module.expert_mlp_reference, given),
        ("x", "weights", "a", "b", "c", "d"),
        (moved * dtype.itemsize, flops),
    )


def expert_sizes(device: str, tokens: int) -> list[tuple[str, Case]]:
    qwen = (
        {"experts": 128, "top": 8, "hidden": 2048, "inner": 768}
        if device == "cuda"
        else {"experts": 32, "top": 4, "hidden": 512, "inner": 256}
    )
    return [("qwen3-30b-a3b" if device == "cuda" else "small", {"tokens": tokens, "rank": 16, **qwen})]


def _forest_class() -> Any:
    """Where it stands: a module of its own, or the attention's."""
    try:
        return importlib.import_module("burnish.kernels.forest").Forest
    except ModuleNotFoundError:
        return importlib.import_module("burnish.kernels.attention").Forest


ATTENTION_CASES: list[tuple[str, Case]] = [
    ("roots", {"heads": 4, "kv_heads": 2, "size": 64, "lengths": (5, 1, 37, 128)}),
    ("one", {"heads": 2, "kv_heads": 2, "size": 32, "lengths": (70,)}),
    ("pair", {"heads": 4, "kv_heads": 1, "size": 64, "lengths": (33, 20, 9), "parents": (-1, 0, 0)}),
    ("tree", {"heads": 4, "kv_heads": 4, "size": 128, "lengths": (40, 7, 16, 3, 25), "parents": (-1, 0, 1, 0, -1)}),
]


def attention_sizes(device: str, tokens: int) -> list[tuple[str, Case]]:
    shapes = {"1b": (32, 8, 64), "8b": (32, 8, 128)} if device == "cuda" else {"smollm2": (9, 3, 64)}
    length = min(2048, tokens) if device == "cuda" else min(256, tokens)
    rows = max(tokens // length, 1)
    return [(name, {"heads": q, "kv_heads": kv, "size": d, "lengths": (length,) * rows}) for name, (q, kv, d) in shapes.items()]


HEAD_CASES: list[tuple[str, Case]] = [
    ("odd", {"k": 37, "h": 48, "v": 1003}),
    ("one row", {"k": 1, "h": 64, "v": 515}),
    ("no row", {"k": 0, "h": 64, "v": 515}),
    ("soft cap", {"k": 65, "h": 80, "v": 2049, "softcap": 5.0, "scale": 1.5}),
    ("trained", {"k": 130, "h": 64, "v": 1999, "trained": True}),
    ("llama vocabulary", {"k": 19, "h": 128, "v": 128256}),
    ("gemma vocabulary", {"k": 9, "h": 64, "v": 262144, "softcap": 30.0}),
]


MLP_CASES: list[tuple[str, Case]] = [
    ("odd", {"tokens": 77, "hidden": 48, "inner": 200, "rank": 16}),
    ("few tokens", {"tokens": 9, "hidden": 64, "inner": 130, "rank": 5, "kind": "gelu"}),
    ("wide rank", {"tokens": 150, "hidden": 64, "inner": 96, "rank": 64, "kind": "gelu_tanh"}),
    ("many rows", {"tokens": 1000, "hidden": 32, "inner": 65, "rank": 8}),
    ("no tokens", {"tokens": 0, "hidden": 16, "inner": 32, "rank": 4}),
]


@dataclass(frozen=True)
class Listed(Kernel):
    """A kernel whose small cases stand here: its module has none, or only those of real models."""

    listed: tuple[tuple[str, Case], ...] = ()

    def cases(self) -> list[tuple[str, Case]]:
        return list(self.listed)


KERNELS: tuple[Kernel, ...] = (
    Kernel("rms_norm", rms_norm, norm_sizes),
    Kernel("rope", rope, rope_sizes),
    Kernel("glu", glu, glu_sizes),
    Kernel("lora", lora, lora_sizes),
    Listed("lora_mlp", lora_mlp, mlp_sizes, listed=tuple(MLP_CASES)),
    Listed("linear_ce", linear_ce, head_sizes, listed=tuple(HEAD_CASES)),
    Listed("divergence", divergence, divergence_sizes, ("torch",), tuple(DIVERGENCE_CASES)),
    Kernel("experts", experts, expert_sizes),
    Kernel("adamw", adamw, adamw_sizes),
    Listed("attention", attention, attention_sizes, ("auto", "sdpa", "varlen", "native", "gemm"), tuple(ATTENTION_CASES)),
)
