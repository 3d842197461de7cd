"""Adapted linear layers: the node against plain torch, against PEFT, and against the truth in float64."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from burnish.kernels.lora import CASES, LoraWeights, Projection, lora_reference, lora_stack

FIELDS = ("weight", "bias", "a", "b", "magnitude")


def projections(outputs, inputs=5, rank=3, *, dtype=torch.float64, adapter=None, train=("a", "b"), bias=True, adapters=None, seed=0):
    """Random projections of one input; `train` names what gets gradients, `adapters` which of them have one."""
    generator = torch.Generator().manual_seed(seed)
    options = {"scaling": 0.7, "dropout": 0.0, "dora": False, **(adapter or {})}

    def tensor(name, *shape, kind=dtype):
        x = torch.randn(*shape, generator=generator, dtype=torch.float64).to(kind)
        return x.requires_grad_(name in train)

    found = []
    wide = torch.promote_types(dtype, torch.float32)  # adapters are never narrower than fp32
    for i, out in enumerate(outputs):
        weight, offset = tensor("weight", out, inputs), tensor("bias", out)
        a, b, magnitude = tensor("a", rank, inputs, kind=wide), tensor("b", out, rank, kind=wide), tensor("magnitude", out, kind=wide)
        lora = LoraWeights(a, b, options["scaling"], options["dropout"], magnitude if options["dora"] else None)
        found.append(Projection(weight, offset if bias else None, lora if adapters is None or i in adapters else None))
    return found


def tensors(found):
    """Everything in the projections that gets a gradient, by name."""
    named = {}
    for i, p in enumerate(found):
        parts = {"weight": p.weight, "bias": p.bias}
        if p.lora is not None:
            parts |= {"a": p.lora.a, "b": p.lora.b, "magnitude": p.lora.magnitude}
        named |= {f"{name}{i}": x for name, x in parts.items() if isinstance(x, torch.Tensor) and x.requires_grad}
    return named


def gradients(function, x, found, seed=3):
    """Outputs, and every gradient of a random weighting of them; the same dropout masks for the same seed."""
    inputs = {"x": x, **tensors(found)} if x.requires_grad else tensors(found)
    torch.manual_seed(seed)
    outputs = function(x, found)
    generator = torch.Generator().manual_seed(seed)
    total = sum((y.double() * torch.randn(y.shape, generator=generator, dtype=torch.float64)).sum() for y in outputs)
    return outputs, dict(zip(inputs, torch.autograd.grad(total, list(inputs.values())), strict=True))


def rows(t, width, dtype=torch.float64, train=True, seed=9):
    x = torch.randn(t, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.to(dtype).requires_grad_(train)


def assert_same(x, found):
    ours, mine = gradients(lora_stack, x, found)
    plain, theirs = gradients(lora_reference, x, found)
    for y, expected in zip(ours, plain, strict=True):
        torch.testing.assert_close(y, expected)
    assert mine.keys() == theirs.keys()
    for name, expected in theirs.items():
        torch.testing.assert_close(mine[name], expected, msg=lambda text, name=name: f"{name}: {text}")
        assert mine[name].dtype is expected.dtype


ADAPTERS = [{}, {"dropout": 0.4}, {"dora": True}, {"dora": True, "dropout": 0.3}]
TRAIN = [("a", "b", "magnitude"), ("a",), ("b",), ("bias", "b"), ("weight", "bias", "a", "b", "magnitude")]


@pytest.mark.parametrize(("adapter", "train", "x_trained"), product(ADAPTERS, TRAIN, [True, False]))
def test_outputs_and_gradients_equal_plain_torch(adapter, train, x_trained):
    assert_same(rows(7, 5, train=x_trained), projections((4, 2, 6), adapter=adapter, train=train))


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("adapters", [(), (0,), (1, 2), (0, 2)])
def test_a_projection_may_lack_an_adapter(adapter, adapters):
    assert_same(rows(7, 5), projections((4, 2, 6), adapter=adapter, train=FIELDS[1:], adapters=adapters))


def test_each_projection_has_its_own_settings():
    plain, dropped, dora = (projections((4,), adapter=options, seed=i)[0] for i, options in enumerate(ADAPTERS[:3]))
    larger = projections((6,), rank=5, adapter={"scaling": 2.0}, seed=8)[0]
    assert_same(rows(7, 5), [plain, dropped, Projection(torch.randn(3, 5, dtype=torch.float64)), dora, larger])


@pytest.mark.parametrize(("adapter", "train"), product(ADAPTERS, [("a", "b", "magnitude"), FIELDS]))
def test_gradcheck(adapter, train):
    found = projections((3, 2), inputs=4, rank=2, adapter=adapter, train=train)
    x = rows(3, 4)
    # DoRA's norm is outside the gradient by definition, so what it depends on is held still here.
    still = ("weight", "a", "b") if adapter.get("dora") else ()
    named = {name: tensor for name, tensor in tensors(found).items() if not name.startswith(still)}

    def function(*_):
        torch.manual_seed(0)
        return lora_stack(x, found)

    assert torch.autograd.gradcheck(function, [x, *named.values()])


@settings(max_examples=25, deadline=None)
@given(t=st.integers(0, 9), width=st.integers(1, 9), out=st.integers(1, 9), rank=st.integers(1, 11), adapter=st.sampled_from(ADAPTERS))
def test_any_shape(t, width, out, rank, adapter):
    assert_same(rows(t, width), projections((out, 2), width, rank, adapter=adapter, train=FIELDS[1:]))


@pytest.mark.parametrize("layout", ["columns", "rows", "transposed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_x_need_not_be_contiguous(layout, dtype):
    # 96 tokens: large enough for the processor's fast products where they are used.
    base = rows(96, 128, dtype, train=False)
    x = {"columns": base[:, ::2], "rows": base[::2, :64], "transposed": base[:, :64].t().contiguous().t()}[layout]
    found = projections((200, 72), 64, 8, dtype=dtype, train=FIELDS[1:])
    assert not x.is_contiguous()
    ours, mine = gradients(lora_stack, x.detach().requires_grad_(), found)
    plain, theirs = gradients(lora_stack, x.contiguous().requires_grad_(), found)
    tolerance = {"atol": 1e-3, "rtol": 1e-4} if dtype is torch.float32 else {}
    for y, expected in zip([*ours, *mine.values()], [*plain, *theirs.values()], strict=True):
        torch.testing.assert_close(y, expected, **tolerance)


def test_an_upstream_gradient_may_be_missing_or_expanded():
    x, found = rows(7, 5), projections((4, 2, 6))
    ours = torch.autograd.grad(lora_stack(x, found)[1].sum(), [x, found[1].lora.a])
    plain = torch.autograd.grad(lora_reference(x, found)[1].sum(), [x, found[1].lora.a])
    for mine, expected in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine, expected)
    assert torch.autograd.grad(lora_stack(x, found)[1].sum(), [found[0].lora.a], allow_unused=True) == (None,)


def test_the_same_input_twice_and_the_graph_twice():
    x, found = rows(7, 5), projections((4,), adapter={"dropout": 0.5})

    def twice(run, x, found):
        return [y + 2 * run(x, found)[0] for y in run(x, found)]

    ours, mine = gradients(lambda x, found: twice(lora_stack, x, found), x, found)
    plain, theirs = gradients(lambda x, found: twice(lora_reference, x, found), x, found)
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(mine, theirs)
    y = lora_stack(x, found)[0].sum()
    first = torch.autograd.grad(y, [x], retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(y, [x]), first)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_recomputed_in_the_backward_pass(adapter):
    x, found = rows(7, 5), projections((4, 2), adapter=adapter, train=FIELDS[2:])
    ours, mine = gradients(lambda x, found: checkpoint(lora_stack, x, found, use_reentrant=False), x, found)
    plain, theirs = gradients(lora_stack, x, found)
    assert all(torch.equal(y, expected) for y, expected in zip(ours, plain, strict=True))
    assert all(torch.equal(mine[name], expected) for name, expected in theirs.items())


def peft_forward(layer):
    return lambda x, _: [layer(x)]


def peft_layer(dtype, *, seed=5, inputs=24, outputs=40, rank=4, bias=True, dora=False, rslora=False, dropout=0.0):
    torch.manual_seed(seed)
    base = nn.Linear(inputs, outputs, bias=bias).to(dtype)
    config = LoraConfig(r=rank, lora_alpha=8, use_dora=dora, use_rslora=rslora, lora_dropout=dropout)
    layer = PeftLinear(base, "default", config, r=rank, lora_alpha=8)
    wide = torch.promote_types(dtype, torch.float32)
    for name, parameter in layer.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(wide)
            if "magnitude" not in name:
                parameter.data.normal_(std=0.3)
        else:
            parameter.requires_grad_(False)
    layer.lora_A["default"].weight.data.mul_(0.5)
    return layer.train()


def as_projection(layer):
    base = layer.get_base_layer()
    magnitude = layer.lora_magnitude_vector["default"].weight if layer.lora_magnitude_vector else None
    dropout = getattr(layer.lora_dropout["default"], "p", 0.0)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return Projection(base.weight, base.bias, LoraWeights(a, b, layer.scaling["default"], dropout, magnitude))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    "options", [{}, {"bias": False}, {"rslora": True}, {"dropout": 0.4}, {"dora": True}, {"dora": True, "dropout": 0.4}]
)
def test_equals_peft(options, dtype):
    layer = peft_layer(dtype, **options)
    x, p = rows(11, 24, dtype), as_projection(layer)
    ours, mine = gradients(lora_stack, x, [p])
    plain, theirs = gradients(peft_forward(layer), x, [p])
    assert len(mine) == 4 if options.get("dora") else 3
    torch.testing.assert_close(ours[0], plain[0])
    for name, expected in theirs.items():
        torch.testing.assert_close(mine[name], expected, msg=lambda text, name=name: f"{name}: {text}")


def errors(kind, options, seed):
    """(largest, norm) of the error against float64, ours and PEFT's, for the output and every gradient."""
    base = torch.bfloat16 if kind == "bf16 weights" else torch.float32
    layer = peft_layer(torch.float32, inputs=96, outputs=160, rank=8, seed=seed, **options)
    layer.base_layer.to(base)
    true_layer = peft_layer(torch.float64, inputs=96, outputs=160, rank=8, seed=seed, **options)
    true_layer.load_state_dict({name: value.double() for name, value in layer.state_dict().items()})
    x = rows(257, 96, base, seed=seed)
    right, expected = gradients(peft_forward(true_layer), x.detach().double().requires_grad_(), [as_projection(true_layer)])
    with torch.autocast("cpu", torch.bfloat16, enabled=kind != "fp32"):
        ours, mine = gradients(lora_stack, x, [as_projection(layer)])
        plain, theirs = gradients(peft_forward(layer), x, [as_projection(layer)])
    found = {"y": (ours[0], plain[0], right[0]), **{name: (mine[name], theirs[name], expected[name]) for name in mine}}
    assert all(value.dtype is other.dtype for value, other, _ in found.values())
    return {name: (*worst(value, truth), *worst(other, truth), truth.abs().max().item()) for name, (value, other, truth) in found.items()}


def worst(found, truth):
    error = found.double() - truth
    return error.abs().max().item(), error.square().mean().sqrt().item()


@pytest.mark.parametrize("options", [{}, {"dropout": 0.25}, {"dora": True}, {"dora": True, "dropout": 0.25}])
@pytest.mark.parametrize("kind", ["fp32", "bf16 weights", "autocast"])
def test_error_against_truth_is_not_above_pefts(options, kind):
    """The adapter in fp32, the base in fp32 or bf16: no output and no gradient is farther from float64 than PEFT's.

    Errors are roundings, so one draw proves little: four are pooled.
    """
    pooled = [errors(kind, options, seed) for seed in range(4)]
    for name in pooled[0]:
        largest, mean, largest_of_peft, mean_of_peft, scale = (sum(column) for column in zip(*(draw[name] for draw in pooled), strict=True))
        slack = torch.finfo(torch.float32).eps * scale
        assert mean <= 1.05 * mean_of_peft + 0.5 * slack, name
        assert largest <= 1.5 * largest_of_peft + 2 * slack, name


@pytest.mark.parametrize("name", [name for name, _ in CASES])
def test_real_shapes(name):
    shape = dict(CASES)[name]
    found = projections(shape["outputs"], shape["inputs"], shape["rank"], dtype=torch.float32, bias=False)
    x = rows(67, shape["inputs"], torch.float32)
    doubled = [Projection(p.weight.double(), None, LoraWeights(p.lora.a.double(), p.lora.b.double(), 0.7)) for p in found]
    ours, mine = gradients(lora_stack, x, found)
    plain, theirs = gradients(lora_reference, x, found)
    for p in doubled:
        p.lora.a.detach_().requires_grad_()
        p.lora.b.detach_().requires_grad_()
    right, expected = gradients(lora_reference, x.detach().double().requires_grad_(), doubled)
    values = [*zip(ours, plain, right, strict=True), *((mine[n], theirs[n], expected[n]) for n in mine)]
    for found_value, other, truth_value in values:
        slack = 8 * torch.finfo(torch.float32).eps * truth_value.abs().max().item()
        assert worst(found_value, truth_value)[0] <= 1.05 * worst(other, truth_value)[0] + slack


class Kept:
    """Numbers kept for the backward pass that are not inputs."""

    def __init__(self, *inputs):
        self.inputs, self.elements = {x.untyped_storage().data_ptr() for x in inputs}, 0

    def __enter__(self):
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda x: x)
        self.hooks.__enter__()
        return self

    def __exit__(self, *details):
        self.hooks.__exit__(*details)

    def pack(self, x):
        if x.untyped_storage().data_ptr() not in self.inputs:
            self.inputs.add(x.untyped_storage().data_ptr())
            self.elements += x.numel()
        return x


def test_nothing_large_is_kept():
    t, width, rank = 50, 40, 2
    found = projections((30, 20, 10), width, rank, dtype=torch.float32, bias=False)
    x = rows(t, width, torch.float32)
    with Kept(x, *(p.weight for p in found)) as kept:
        lora_stack(x, found)
    adapters = sum(p.lora.a.numel() + p.lora.b.numel() for p in found)
    assert 0 < kept.elements <= 3 * rank * t + adapters
    frozen = [Projection(p.weight) for p in found]
    with Kept(*(p.weight for p in found)) as kept:
        y = lora_stack(x, frozen)[0]
    assert kept.elements == 0
    assert y.requires_grad


class Products(TorchDispatchMode):
    """Counts matrix products."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func._schema.name in ("aten::mm", "aten::addmm", "aten::addmm_", "mkldnn::_linear_pointwise")
        return func(*args, **(kwargs or {}))


def test_adapters_of_one_input_are_stacked():
    x, found = rows(7, 5), projections((4, 2, 6), bias=False)
    with Products() as forward:
        outputs = lora_stack(x, found)
    assert forward.count == 1 + 3 * 2  # x A^T of all; W and B of each
    with Products() as backward:
        sum(y.sum() for y in outputs).backward()
    assert backward.count == 3 * 3 + 2  # dy B, dB and dy W of each; g A and dA of all


def test_no_graph_where_nothing_needs_one():
    found = projections((4, 2), train=())
    assert not any(y.requires_grad for y in lora_stack(rows(7, 5, train=False), found))
    with torch.no_grad():
        assert not lora_stack(rows(7, 5), projections((4,)))[0].requires_grad


def test_one_layer():
    x, (p,) = rows(7, 5), projections((4,), adapter={"dora": True})
    torch.testing.assert_close(lora_stack(x, [p])[0], lora_reference(x, [p])[0])


def test_wrong_shapes_are_refused():
    (p,) = projections((4,))
    with pytest.raises(ValueError, match=r"\[T, in\]"):
        lora_stack(torch.zeros(2, 3, 5, dtype=torch.float64), [p])
    with pytest.raises(ValueError, match="x is 6, expected 5"):
        lora_stack(rows(7, 6), [p])
    with pytest.raises(ValueError, match="bias is"):
        lora_stack(rows(7, 5), [Projection(p.weight, torch.zeros(1, dtype=torch.float64))])
    for a, b, name in [(p.lora.b, p.lora.b, "a"), (p.lora.a, p.lora.a, "b")]:
        with pytest.raises(ValueError, match=f"{name} is"):
            lora_stack(rows(7, 5), [Projection(p.weight, None, LoraWeights(a, b, 1.0))])
    with pytest.raises(ValueError, match="dropout"):
        lora_stack(rows(7, 5), [Projection(p.weight, None, LoraWeights(p.lora.a, p.lora.b, 1.0, dropout=1.0))])
    with pytest.raises(ValueError, match="native"):
        lora_stack(rows(7, 5), [p], impl="native")
