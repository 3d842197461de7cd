"""How fast a training step could be: FLOPs and bytes for each token, counted, and the time that they need on one GPU.

    python -m benchmarks.roofline                                        1B, 3B and 8B on an H200
    python -m benchmarks.roofline --gpu h100 --trained 0.5 --sequence 4096

Nothing here is measured. It is the derivation that stands in for a measurement until a GPU has seen the code, and the yardstick for one
that has: benchmarks/gpu_sft.py takes its MFU from `useful_flops`. Every pass over memory and every product is taken one after the other,
each at the rate that such an operation reaches on the card, so overlap is not counted on, and launch gaps and the host are left out.

FLOPs for a token of a causal sequence of S tokens, N the matrix parameters that are multiplied with (embedding look-ups are free):

    LoRA      4 N + 6 P              forward 2 N, the inputs' gradients 2 N, none for frozen weights; P the adapter's parameters
    full      6 N
    attention 2 S d_q L forward, 2.5 times that backward (its scores are computed again)
    recompute 2 N_layers + attention forward, once more

Bytes are those of everything between the products, in bf16; what each line counts stands beside it.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """A Llama-shaped model."""

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool

    @property
    def linears(self) -> list[tuple[int, int]]:
        """(in, out) of q, k, v, o, gate, up, down."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        d, m = self.hidden, self.inner
        return [(d, q), (d, kv), (d, kv), (q, d), (d, m), (d, m), (m, d)]

    @property
    def layer_parameters(self) -> int:
        return self.layers * sum(i * o for i, o in self.linears)

    @property
    def head_parameters(self) -> int:
        return self.hidden * self.vocabulary

    def adapter_parameters(self, rank: int) -> int:
        return self.layers * rank * sum(i + o for i, o in self.linears)

    def attention_flops(self, sequence: int) -> float:
        """Forward, for one token."""
        return 2.0 * sequence * self.heads * self.head_dim * self.layers


SHAPES = {
    "1b": Shape(2048, 8192, 16, 32, 8, 64, 128256, tied=True),
    "3b": Shape(3072, 8192, 28, 24, 8, 128, 128256, tied=True),
    "8b": Shape(4096, 14336, 32, 32, 8, 128, 128256, tied=False),
    "tiny": Shape(64, 128, 2, 4, 2, 16, 512, tied=True),
}


@dataclass(frozen=True)
class Card:
    """What a GPU reaches, not what its data sheet says; `peak` is the data sheet's dense bf16, to which MFU refers."""

    products: float  # FLOP/s of large bf16 products
    bandwidth: float  # bytes/s
    peak: float = 989e12
    # Flash attention forward and backward at 2k tokens, for head sizes 64 and 128 (published curves of its second version on an H100).
    attention: tuple[tuple[float, float], tuple[float, float]] = ((262e12, 210e12), (320e12, 260e12))


CARDS = {"h200": Card(790e12, 4.3e12), "h100": Card(780e12, 3.0e12)}

HALF = 2  # bytes


@dataclass(frozen=True)
class Case:
    """What is between the products, in bytes for a token; the rest is the same for everyone."""

    name: str
    norm: int  # for an element of a layer's input, both norms and residual sums, forward and backward
    rope: int  # for an element of q and k
    gate: int  # for an element of the MLP's inner width
    adapter: str  # "plain", "twice" or "once": see `adapter_bytes`
    logits: int  # for an element of the logits


# Each step of transformers' modules reads and writes its tensor: in the norm a cast to fp32, a square, a mean, a product, a
# cast back, the weight, and then the residual; backward about as many again. Logits: bf16, an fp32 copy, log-softmax, its gradient, a cast.
PLAIN = Case("plain transformers + PEFT", norm=2 * (36 + 60 + 12), rope=20 + 28, gate=10 + 18, adapter="plain", logits=20)
# Fused: x, residual, sum, y; dy, dsum, sum, dx. q and k in place. gate, up, h; dh, gate, up, dgate, dup, h again. Logits written, read for
# the statistics, turned into their gradient in place, read by the last product.
FUSED = Case("burnish kernels", norm=2 * 8 * HALF, rope=4 * HALF, gate=9 * HALF, adapter="twice", logits=5 * HALF)
CASES = (PLAIN, FUSED)


def adapter_bytes(shape: Shape, kind: str) -> float:
    """For a token through all layers.

    plain: each module by itself, 10 bytes for each number that goes in or comes out (the update is scaled, then added; backward the same
    again). twice: inputs that several projections share are read once for all, x and dy each once more than the large products read them,
    y and dx written by those products. once: dy read once for both of its products.
    """
    both = sum(i + o for i, o in shape.linears)
    outputs = sum(o for _, o in shape.linears)
    inputs = 2 * shape.hidden + shape.heads * shape.head_dim + shape.inner  # q, k, v share one; gate and up another
    numbers = {"plain": 5 * both, "twice": 2 * inputs + 2 * outputs, "once": 2 * inputs + outputs}[kind]
    return float(shape.layers * numbers * HALF)


def elementwise_bytes(shape: Shape, case: Case) -> float:
    """Norms, residuals, rotary embedding and gates of all layers, for a token."""
    rotated = (shape.heads + shape.kv_heads) * shape.head_dim
    return float(shape.layers * (shape.hidden * case.norm + rotated * case.rope + shape.inner * case.gate))


def product_flops(shape: Shape, *, full: bool, rank: int, trained: float) -> float:
    """Of all matrix products, for a token of which the share `trained` goes through the head."""
    factor = 6.0 if full else 4.0
    adapter = 0.0 if full else 6.0 * shape.adapter_parameters(rank)
    return factor * (shape.layer_parameters + trained * shape.head_parameters) + adapter


def useful_flops(shape: Shape, sequence: int, *, full: bool) -> float:
    """What MFU counts for a token: 4 N or 6 N and three times the forward attention, whatever is skipped or computed twice."""
    return (6.0 if full else 4.0) * (shape.layer_parameters + shape.head_parameters) + 3.0 * shape.attention_flops(sequence)


@dataclass(frozen=True)
class Estimate:
    """For a token."""

    flops: float
    moved: float
    seconds: float


def estimate(
    shape: Shape,
    case: Case,
    card: Card,
    *,
    sequence: int = 2048,
    full: bool = False,
    recompute: bool = False,
    rank: int = 16,
    trained: float = 1.0,
) -> Estimate:
    """The time of a token's share of a step, without the optimiser's."""
    products = product_flops(shape, full=full, rank=rank, trained=trained)
    forward_attention = shape.attention_flops(sequence)
    forward, backward = card.attention[0 if shape.head_dim <= 64 else 1]
    between = elementwise_bytes(shape, case) + trained * shape.vocabulary * case.logits
    if not full:
        between += adapter_bytes(shape, case.adapter)
    passes = 1
    if recompute:
        products += 2.0 * shape.layer_parameters
        between *= 4 / 3  # the forward third once more
        passes = 2
    attention = forward_attention * (passes / forward + 2.5 / backward)
    seconds = products / card.products + attention + between / card.bandwidth
    return Estimate(products + forward_attention * (passes + 2.5), between, seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", choices=CARDS, default="h200")
    parser.add_argument("--sequence", type=int, default=2048)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--trained", type=float, default=1.0, help="share of the tokens that have a loss")
    options = parser.parse_args()
    card = CARDS[options.gpu]
    print(f"{options.gpu}: {card.products / 1e12:.0f} TFLOP/s, {card.bandwidth / 1e12:.1f} TB/s; MFU of {card.peak / 1e12:.0f} TFLOP/s")
    print(f"{'':54}{'GFLOP':>9}{'MB':>9}{'tokens/s':>11}{'MFU':>8}")
    for name, shape in ((name, shape) for name, shape in SHAPES.items() if name != "tiny"):
        for full in (False, True):
            useful = useful_flops(shape, options.sequence, full=full)
            ideal = card.products / useful
            title = f"{name} {'full' if full else f'LoRA r{options.rank}'}"
            print(f"{title + ', products alone':54}{useful / 1e9:>9.2f}{0:>9.2f}{ideal:>11,.0f}{useful * ideal / card.peak:>8.1%}")
            for case in CASES:
                for recompute in (False, True):
                    found = estimate(
                        shape,
                        case,
                        card,
                        sequence=options.sequence,
                        full=full,
                        recompute=recompute,
                        rank=options.rank,
                        trained=options.trained,
                    )
                    rate = 1 / found.seconds
                    label = f"{title}, {case.name}{', recompute' if recompute else ''}"
                    numbers = f"{found.flops / 1e9:>9.2f}{found.moved / 1e6:>9.2f}{rate:>11,.0f}{useful * rate / card.peak:>8.1%}"
                    print(f"{label:54}{numbers}")


if __name__ == "__main__":
    main()
