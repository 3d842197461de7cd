"""Two heads compared in chunks: against the plain formula, autograd, float64, and TRL's numbers."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from burnish.kernels.divergence import CASES, HeadInputs, divergence_rows, weighted_divergence, weighted_divergence_reference

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "trl_distill.json").read_text())
KINDS = ("forward_kl", "reverse_kl", "js")


def heads(k=7, h=5, teacher_h=6, v=11, dtype=torch.float64, bias=True, train=("hidden", "weight", "bias"), seed=0, **shape):
    """A student whose parts named in `train` get gradients, a teacher, targets and row weights."""
    generator = torch.Generator().manual_seed(seed)

    def made(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)

    parts = {"hidden": made(k, h), "weight": made(v, h), "bias": made(v) if bias else None}
    parts = {name: x.requires_grad_(name in train) if x is not None else None for name, x in parts.items()}
    student = HeadInputs(vocabulary=v, **parts, **shape)
    teacher = HeadInputs(made(k, teacher_h), v, made(v, teacher_h), made(v))
    return student, teacher, torch.randint(v, (k,), generator=generator), torch.rand(k, generator=generator, dtype=torch.float64).to(dtype)


def fresh(student):
    parts = {name: getattr(student, name) for name in ("hidden", "weight", "bias")}
    return replace(student, **{n: x.detach().clone().requires_grad_(x.requires_grad) for n, x in parts.items() if x is not None})


def run(function, student, *others, **options):
    student = fresh(student)
    total, stats = function(student, *others, **options)
    (1.7 * total).backward()
    return total, stats, {name: x.grad for name in ("hidden", "weight", "bias") if (x := getattr(student, name)) is not None}


def assert_same(ours, plain, **tolerance):
    torch.testing.assert_close(ours[0], plain[0], **tolerance)
    for name in ("divergence", "logprobs", "correct", "agree"):
        value = getattr(ours[1], name)
        assert not value.requires_grad
        torch.testing.assert_close(value, getattr(plain[1], name), **tolerance)
    for name, expected in plain[2].items():
        torch.testing.assert_close(ours[2][name], expected, **tolerance)


def test_a_row_by_hand():
    student, teacher = torch.tensor([[0.0, 0.0]], dtype=torch.float64), torch.tensor([[3.0, 1.0]], dtype=torch.float64).log()
    p, q = torch.tensor([0.75, 0.25], dtype=torch.float64), torch.tensor([0.5, 0.5], dtype=torch.float64)
    m = 0.2 * p + 0.8 * q
    forward, reverse = (p * (p / q).log()).sum(), (q * (q / p).log()).sum()
    js = 0.2 * (p * (p / m).log()).sum() + 0.8 * (q * (q / m).log()).sum()
    for kind, expected in zip(KINDS, (forward, reverse, js), strict=True):
        found = divergence_rows(student, teacher, kind=kind, mix=0.2)
        torch.testing.assert_close(found, expected[None])


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: "-".join(map(str, case["settings"].values())))
def test_numbers_are_trls(case):
    hidden, weight, teacher_hidden, teacher_weight = (torch.tensor(GOLDEN["parts"][n], dtype=torch.float64) for n in GOLDEN["parts"])
    student = HeadInputs(hidden.requires_grad_(), 9, weight.requires_grad_())
    options = {"kind" if name == "divergence" else name: value for name, value in case["settings"].items()}
    teacher, ones = HeadInputs(teacher_hidden, 9, teacher_weight), torch.ones(5, dtype=torch.float64)
    total, stats = weighted_divergence(student, teacher, torch.zeros(5, dtype=torch.int64), ones, chunk=2, **options)
    total.backward()
    for found, name in ((stats.divergence, "rows"), (hidden.grad, "hidden"), (weight.grad, "weight")):
        torch.testing.assert_close(found, torch.tensor(case[name], dtype=torch.float64), atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize(("kind", "train"), product(KINDS, [("hidden",), ("hidden", "weight", "bias"), ("weight",)]))
@pytest.mark.parametrize("shape", [{}, {"softcap": 3.0, "scale": 0.5}])
@pytest.mark.parametrize("options", [{}, {"temperature": 1.7}, {"sft_weight": 0.3}, {"sft_weight": 0.6, "temperature": 0.6, "mix": 0.2}])
def test_values_and_gradients_equal_the_plain_formula(kind, train, shape, options):
    inputs = heads(train=train, **shape)
    ours = run(weighted_divergence, *inputs, kind=kind, chunk=3, **options)
    assert_same(ours, run(weighted_divergence_reference, *inputs, kind=kind, **options))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 1.4])
def test_gradcheck(kind, temperature):
    student, *others = heads(k=4, h=3, v=6, softcap=4.0, scale=0.7)

    def function(hidden, weight, bias):
        given_student = replace(student, hidden=hidden, weight=weight, bias=bias)
        return weighted_divergence(given_student, *others, kind=kind, mix=0.3, temperature=temperature, sft_weight=0.4, chunk=3)[0]

    assert torch.autograd.gradcheck(function, [student.hidden, student.weight, student.bias])


@settings(max_examples=30, deadline=None)
@given(k=st.integers(0, 9), h=st.integers(1, 5), v=st.integers(1, 17), chunk=st.integers(1, 12), kind=st.sampled_from(KINDS))
def test_any_shape_and_chunk(k, h, v, chunk, kind):
    inputs = heads(k, h, v=v)
    ours = run(weighted_divergence, *inputs, kind=kind, chunk=chunk, sft_weight=0.5)
    assert_same(ours, run(weighted_divergence_reference, *inputs, kind=kind, sft_weight=0.5))


@pytest.mark.parametrize("kind", KINDS)
def test_heads_of_any_kind(kind):
    student, teacher, targets, weights = heads(softcap=5.0, scale=0.8)
    plain = run(weighted_divergence_reference, student, teacher, targets, weights, kind=kind, sft_weight=0.2)
    bare_teacher = HeadInputs(teacher.hidden @ teacher.weight.T + teacher.bias, 11)  # its finished logits
    assert_same(run(weighted_divergence, student, bare_teacher, targets, weights, kind=kind, sft_weight=0.2, chunk=2), plain)
    layer = nn.Linear(5, 11, dtype=torch.float64)
    layer.weight, layer.bias = nn.Parameter(student.weight.detach().clone()), nn.Parameter(student.bias.detach().clone())
    hidden = student.hidden.detach().clone().requires_grad_()
    odd = HeadInputs(hidden, 11, module=layer, softcap=5.0, scale=0.8)
    total, stats = weighted_divergence(odd, teacher, targets, weights, kind=kind, sft_weight=0.2, chunk=3)
    (1.7 * total).backward()
    assert_same((total, stats, {"hidden": hidden.grad, "weight": layer.weight.grad, "bias": layer.bias.grad}), plain)


def test_a_model_learns_nothing_from_itself():
    student, *_ = heads()
    for kind in KINDS:
        total, stats, gradients = run(weighted_divergence, student, student, torch.zeros(7, dtype=torch.int64), torch.ones(7), kind=kind)
        assert total.item() == pytest.approx(0, abs=1e-12)
        assert stats.agree.all()
        assert gradients["hidden"].abs().max() < 1e-12


def test_only_the_shared_part_of_the_vocabulary_counts():
    student, teacher, targets, weights = heads()
    cut = replace(
        student, weight=student.weight[:8].detach().requires_grad_(), bias=student.bias[:8].detach().requires_grad_(), vocabulary=8
    )
    cut_teacher = replace(teacher, weight=teacher.weight[:8], bias=teacher.bias[:8], vocabulary=8)
    plain = run(weighted_divergence_reference, cut, cut_teacher, targets % 8, weights)
    ours = run(weighted_divergence, student, teacher, targets % 8, weights, vocabulary=8, chunk=4)
    assert ours[2]["weight"].shape == (11, 5)
    assert ours[2]["weight"][8:].abs().sum() == 0
    ours[2]["weight"], ours[2]["bias"] = ours[2]["weight"][:8], ours[2]["bias"][:8]
    assert_same(ours, plain)


def test_the_teacher_gets_no_gradient_and_evaluation_makes_none():
    student, teacher, targets, weights = heads()
    teacher = replace(teacher, hidden=teacher.hidden.requires_grad_(), weight=teacher.weight.requires_grad_())
    weighted_divergence(student, teacher, targets, weights)[0].backward()
    assert teacher.hidden.grad is None
    assert teacher.weight.grad is None
    with torch.no_grad():
        total, _ = weighted_divergence(student, teacher, targets, weights)
    assert not total.requires_grad


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_error_against_truth_is_not_above_the_plain_one(kind, dtype):
    inputs = heads(k=9, h=24, teacher_h=32, v=4096, dtype=dtype)
    student, teacher, targets, weights = inputs
    wide_teacher = HeadInputs(teacher.hidden.double(), teacher.vocabulary, teacher.weight.double(), teacher.bias.double())
    wide_student = replace(student, **{n: getattr(student, n).detach().double().requires_grad_() for n in ("hidden", "weight", "bias")})
    truth = run(weighted_divergence_reference, wide_student, wide_teacher, targets, weights.double(), kind=kind)
    ours = run(weighted_divergence, *inputs, kind=kind, chunk=4)
    plain = run(weighted_divergence_reference, *inputs, kind=kind)

    def worst(found, expected):
        return (found.double() - expected).abs().max().item()

    for mine, theirs, expected in (
        (ours[1].divergence, plain[1].divergence, truth[1].divergence),
        *((ours[2][n], plain[2][n], truth[2][n]) for n in truth[2]),
    ):
        slack = max(torch.finfo(dtype).eps, 8 * torch.finfo(torch.float32).eps) * expected.abs().max().item()
        assert worst(mine, expected) <= 1.1 * worst(theirs, expected) + slack


def test_autocast_decides_the_type_of_the_products():
    inputs = heads(k=5, h=16, v=33, dtype=torch.float32)
    plain = run(weighted_divergence, *inputs)
    with torch.autocast("cpu", torch.bfloat16):
        ours = run(weighted_divergence, *inputs, chunk=2)
    assert ours[1].divergence.dtype is torch.float32
    assert not torch.equal(ours[1].divergence, plain[1].divergence)
    torch.testing.assert_close(ours[1].divergence, plain[1].divergence, atol=0.2, rtol=0.05)
    assert ours[2]["weight"].dtype is torch.float32


def test_what_does_not_fit_is_refused():
    student, teacher, targets, weights = heads()
    with pytest.raises(ValueError, match="11 logits and the teacher 12"):
        weighted_divergence(student, replace(teacher, vocabulary=12), targets, weights)
    with pytest.raises(ValueError, match="`vocabulary` is 12, expected 1 to 11"):
        weighted_divergence(student, teacher, targets, weights, vocabulary=12)
    with pytest.raises(ValueError, match="unknown divergence 'kl'"):
        weighted_divergence(student, teacher, targets, weights, kind="kl")
    with pytest.raises(ValueError, match="temperature > 0"):
        weighted_divergence(student, teacher, targets, weights, temperature=0.0)


def test_cases_are_named_shapes():
    assert len({name for name, _ in CASES}) == len(CASES)
    assert all({"k", "h", "teacher_h", "v"} <= set(shape) for _, shape in CASES)
