"""The invariants of training on whole models, for every parameter: packed == padded == one by one, no leaks, cuts do not matter."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model

from burnish.config.objectives import SFT
from burnish.data.collate import collate
from burnish.data.types import Example
from burnish.kernels import attention, dispatch, native
from burnish.models.policy import Policy
from burnish.objectives.sft import SFTObjective

from .families import DEVICE, EXPERTS, FAMILIES, SEGMENT_BY_SEGMENT, VOCABULARY, build

LENGTHS = (9, 5, 12)


def examples(lengths=LENGTHS, seed=0):
    """Random tokens; about half of them trained, with different weights."""
    rng = np.random.default_rng(seed)
    return [
        Example(
            rng.integers(3, VOCABULARY, n).astype(np.int32),
            (rng.integers(0, 2, n) * rng.choice([0.5, 1.0, 2.0], n)).astype(np.float32),
        )
        for n in lengths
    ]


def batches(rows, size):
    """Micro-batches of `size` examples that belong to one step."""
    total = sum(float(example.weights[1:].sum()) for example in rows)
    return [collate(rows[i : i + size], step_weight=total).to(DEVICE) for i in range(0, len(rows), size)]


def train_once(policy, micro_batches, objective=None):
    """Loss and gradients of one step, as the engine divides them."""
    objective = objective or SFTObjective(SFT())
    policy.model.zero_grad()
    total = 0.0
    for batch in micro_batches:
        loss = objective(policy, batch).sum / batch.step_weight
        loss.backward()
        total += loss.item()
    return total, {name: p.grad.clone() for name, p in policy.trainable().items() if p.grad is not None}


def padded(model, rows):
    """The same through the plain model: a padded batch, its attention mask, and torch's cross-entropy."""
    longest = max(len(example.input_ids) for example in rows)
    ids, mask, weights = (np.zeros((len(rows), longest), kind) for kind in (np.int64, np.int64, np.float32))
    for i, example in enumerate(rows):
        n = len(example.input_ids)
        ids[i, :n], mask[i, :n], weights[i, 1:n] = example.input_ids, 1, example.weights[1:]
    if model.config.model_type == "gemma2":
        # transformers' soft-capped attention turns padding into NaN in fp64; right padding is harmless to causal attention anyway.
        mask[:] = 1
    ids, mask, weights = (torch.tensor(x, device=DEVICE) for x in (ids, mask, weights))
    model.zero_grad()
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    loss = (losses * weights[:, 1:]).sum() / weights.sum()
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def distances(found, expected):
    """How far each gradient is off, relative to its size.

    One that cancels to (almost) nothing, such as a key bias's, has no relative error: it is measured against the rest.
    """
    truths = expected[1]
    scale = max(gradient.norm() for gradient in truths.values())
    mine = {name: found[1].get(name, torch.zeros_like(truth)) for name, truth in truths.items()}
    return {name: float((mine[name] - truth).norm() / max(truth.norm(), 1e-3 * scale)) for name, truth in truths.items()}


def assert_same(found, expected, tolerance=1e-6):
    loss, gradients = found
    true_loss, true_gradients = expected
    assert loss == pytest.approx(true_loss, rel=tolerance)
    for name, error in distances(found, expected).items():
        assert error <= tolerance, f"{name}: {error:.1e}, expected {tolerance:.0e}"
    assert set(gradients) <= set(true_gradients)


FAST = 1e-5
"""How near fast modules are to the plain model as a whole: as near as its rounding, which depth and these large weights multiply. (Its
norms compute in fp32 even in an fp64 model.) What does not depend on the model's own rounding is held to 1e-6 throughout."""


EXACT = 1e-6 if DEVICE.type == "cpu" else FAST
"""The same without fast modules: on a GPU fused attention and the plain model's differ by the rounding of fp32, too."""


@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("name", [*FAMILIES, *SEGMENT_BY_SEGMENT])
def test_packed_padded_and_one_by_one_are_the_same(name, kernels, capsys):
    model = build(name)
    plain, rows = copy.deepcopy(model), examples()
    policy = Policy(model, kernels=kernels)
    assert policy.anatomy.packed == (name in FAMILIES)
    assert policy.anatomy.head is not None
    packed, truth = train_once(policy, batches(rows, 3)), padded(plain, rows)
    assert_same(packed, truth, FAST if kernels else EXACT)
    assert_same(train_once(policy, batches(rows, 1)), packed)


def test_soft_caps_are_kept_where_transformers_would_drop_them():
    model = build("gemma2")
    plain = copy.deepcopy(model)
    model.config._attn_implementation = "sdpa"  # what some releases load Gemma 2 with, and others refuse to set
    policy = Policy(model)
    assert policy.anatomy.packed
    assert_same(train_once(policy, batches(examples(), 3)), padded(plain, examples()), FAST)


def kind_without_c(*given, **needs):
    """What `attention_kind` says where there is no compiler."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(dispatch, "available", lambda _: False)
        return dispatch.attention_kind(*given, **needs)


# The gradient of OPT's key bias is zero by mathematics (softmax ignores it): in fp32 only rounding is left to compare.
@pytest.mark.parametrize("name", sorted(set(FAMILIES) - {"opt"}))
@pytest.mark.parametrize("kernels", [False, True])
def test_the_same_in_fp32(name, kernels, monkeypatch):
    if not kernels:  # attention in C rounds at other places than the plain model's: see the next test
        monkeypatch.setattr(attention, "attention_kind", kind_without_c)
    model = build(name, torch.float32)
    plain, rows = copy.deepcopy(model), examples()
    policy = Policy(model, kernels=kernels)
    truth = padded(plain, rows)
    for size in (3, 1):
        assert_same(train_once(policy, batches(rows, size)), truth, FAST if kernels else EXACT)


@pytest.mark.skipif(DEVICE.type != "cpu" or not native.ready(), reason="no attention in C here")
@pytest.mark.parametrize("name", sorted(set(FAMILIES) - {"opt"}))
def test_attention_in_c_is_as_near_to_the_truth_as_the_plain_model(name):
    model, rows = build(name, torch.float32), examples()
    plain, truth = padded(copy.deepcopy(model), rows), padded(copy.deepcopy(model).double(), rows)
    found = train_once(Policy(model, kernels=False), batches(rows, 1))
    allowed = 1.5 * max(distances(plain, truth).values())  # the worst of all gradients: a matter of single roundings
    for parameter, distance in distances(found, truth).items():
        assert distance <= allowed, parameter


@pytest.mark.parametrize("name", [*FAMILIES, *SEGMENT_BY_SEGMENT])
def test_segments_do_not_leak(name):
    policy = Policy(build(name, torch.float32)).eval()
    rows = examples()
    changed = [Example(rows[0].input_ids[::-1].copy(), rows[0].weights), *rows[1:]]
    with torch.no_grad():
        before, after = (policy.hidden(collate(x, step_weight=1.0).to(DEVICE))[LENGTHS[0] :] for x in (rows, changed))
    if name in EXPERTS:  # other tokens at an expert change the shape of its product, and so its rounding
        torch.testing.assert_close(before, after, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(before, after)


@pytest.mark.parametrize("name", ["llama-tied", "gemma3", "qwen3-moe"])
def test_accumulation_does_not_matter(name):
    policy, rows = Policy(build(name)), examples((4, 9, 6, 3, 7, 5, 2, 8))
    whole = train_once(policy, batches(rows, 8))
    assert_same(train_once(policy, batches(rows, 1)), whole)
    assert_same(train_once(policy, batches(rows, 3)), whole)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "mixtral"])
def test_checkpointed_activations_change_nothing(name):
    policy, step = Policy(build(name)), batches(examples(), 3)
    stored = train_once(policy, step)
    policy.checkpoint_activations()
    assert_same(train_once(policy, step), stored, 1e-12)
    policy.checkpoint_activations(False)
    assert_same(train_once(policy, step), stored, 1e-12)


def with_adapter(model, **settings):
    adapter = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0, **settings))
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator(DEVICE).manual_seed(1))
    return adapter


@pytest.mark.parametrize("name", ["llama-tied", "qwen3", "gemma2", "phi3"])
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("kernels", [False, True])
def test_adapters(name, checkpointed, kernels):
    model = with_adapter(build(name)).double().train()
    plain, rows = copy.deepcopy(model), examples()
    policy = Policy(model, kernels=kernels)
    assert policy.anatomy.packed
    policy.checkpoint_activations(checkpointed)
    truth = padded(plain, rows)
    assert set(truth[1]) == set(policy.trainable())
    packed = train_once(policy, batches(rows, 3))
    assert_same(packed, truth, FAST if kernels else EXACT)
    assert_same(train_once(policy, batches(rows, 1)), packed)


@pytest.mark.parametrize("settings", [{"modules_to_save": ["lm_head"]}, {"use_dora": True}, {"trainable_token_indices": [5, 6]}])
def test_adapters_that_touch_the_head(settings):
    model = with_adapter(build("llama"), **settings).double().train()
    plain, rows = copy.deepcopy(model), examples()
    truth = padded(plain, rows)
    assert_same(train_once(Policy(model), batches(rows, 3)), truth)


@pytest.mark.parametrize("config", [SFT(label_smoothing=0.1), SFT(z_loss=1e-2), SFT(label_smoothing=0.2, z_loss=1e-2)])
def test_smoothed_losses_do_not_depend_on_the_cut(config):
    policy, rows, objective = Policy(build("gemma2")), examples(), SFTObjective(config, entropy=True)
    assert_same(train_once(policy, batches(rows, 3), objective), train_once(policy, batches(rows, 1), objective))
