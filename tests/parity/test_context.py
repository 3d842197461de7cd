"""Ranks that share the tokens of a micro-batch are one: loss and every gradient, whole models of every family, in float64.

The ranks are threads with a copy of the model each; `test_sharded.py` has whole runs of real processes.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from burnish.config.objectives import DPO, KTO, Distill
from burnish.core.errors import ConfigError
from burnish.data.collate import collate
from burnish.data.tree import grow
from burnish.data.types import Example
from burnish.kernels.attention import Forest
from burnish.models.context import Context
from burnish.models.offload import storages
from burnish.models.policy import Policy
from burnish.models.score import attach_score
from burnish.objectives.distill import DistillObjective
from burnish.objectives.dpo import DPOObjective
from burnish.objectives.kto import KTOObjective

from .families import DEVICE, FAMILIES, SEGMENT_BY_SEGMENT, build
from .test_pairs import cut, lora, pairs, sides
from .test_pairs import train_once as train_pairs
from .test_whole_model import FAST, assert_same, batches, examples, train_once
from .threads import together

# The backward passes of all threads share one thread for each GPU, where they cannot wait for each other.
pytestmark = pytest.mark.skipif(DEVICE.type != "cpu", reason="ranks are threads")


def averaged(results):
    """The loss, which all ranks agree on, and the mean of their gradients."""
    losses = [loss for loss, _ in results]
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-12)
    names = {name for _, gradients in results for name in gradients}
    return losses[0], {name: sum(gradients[name] for _, gradients in results if name in gradients) / len(results) for name in sorted(names)}


def shared(make, size, step):
    """One step of policies on `size` ranks that share its micro-batches; `make` gives a fresh one each time."""
    policies = [make() for _ in range(size)]

    def one(group):
        policy = policies[group.rank]
        policy.share_context(group)
        return step(policy)

    return averaged(together(size, one))


def policy_of(model, **options):
    return Policy(copy.deepcopy(model), **options)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(name, size, capsys):
    model = build(name)
    rows = examples((9, 5, 12, 1))  # 27 tokens: not a multiple of 2 or 4

    def step(policy):
        return train_once(policy, [*batches(rows, 3), collate([], step_weight=1.0).to(DEVICE)])

    alone = step(policy_of(model, kernels=False))
    assert_same(shared(lambda: policy_of(model, kernels=False), size, step), alone, 1e-6)


@pytest.mark.parametrize("name", ["llama-tied", "qwen3", "gemma2", "gemma3", "granite", "olmo2", "phi3", "qwen3-moe", "gpt-oss"])
def test_fast_modules_and_recomputation(name, capsys):
    model, rows = build(name), examples()

    def make():
        policy = policy_of(model)
        policy.checkpoint_activations(tile=None if name == "gpt-oss" else 5)  # whose feed-forward gives more than one tensor
        return policy

    alone = train_once(policy_of(model), batches(rows, 2))
    assert_same(shared(make, 2, lambda policy: train_once(policy, batches(rows, 2))), alone, FAST)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt-oss"])
@pytest.mark.parametrize("size", [2, 4])
def test_shared_prompts(name, size, capsys):
    model = lora(name) if name == "llama" else build(name)

    def make():
        policy = policy_of(model, kernels=False)
        if name != "llama":
            policy.keep_reference()
            with torch.no_grad():
                for parameter in policy.trainable().values():
                    parameter.mul_(1.02)
        return policy

    def step(policy):
        return train_pairs(policy, cut(pairs(), 20), DPOObjective(DPO(loss=["aot"])))

    assert_same(shared(make, size, step), step(make()), 1e-6)


def test_kto_asks_for_other_answers_and_gets_them_once(capsys):
    model = lora("llama-tied")
    answers = [grow([side], values=(float(place),), weight=1.0) for both in sides() for place, side in enumerate(both)]

    def step(policy):
        return train_pairs(policy, cut(answers, 25, mismatched=True), KTOObjective(KTO()))

    assert_same(shared(lambda: policy_of(model, kernels=False), 2, step), step(policy_of(model, kernels=False)), 1e-6)


@pytest.mark.parametrize("trained", [None, 1])
def test_distillation_takes_the_head_apart(trained, capsys):
    """Also where there are fewer predictions than ranks."""
    model, teacher, rows = build("llama-tied"), build("qwen2"), examples()
    if trained is not None:
        rows = [Example(rows[0].input_ids, (np.arange(len(rows[0].input_ids)) == 3).astype(np.float32))]

    def one(group=None):
        student, other = policy_of(model, kernels=False), policy_of(teacher, kernels=False)
        for policy in (student, other) if group is not None else ():
            policy.share_context(group)
        objective = DistillObjective(Distill(teacher="other", sft_weight=0.3), teacher=other)
        return train_once(student, batches(rows, 2), objective)

    assert_same(averaged(together(2, one)), one(), 1e-6)


@pytest.mark.parametrize("want", [frozenset(), frozenset({"logsumexp", "mean_logit", "entropy", "correct", "log_sum_sq"})])
def test_every_rank_has_the_statistics_of_all(want, capsys):
    model, (batch,) = build("llama"), batches(examples(), 3)
    alone = policy_of(model).token_stats(batch, want=want)

    def one(group):
        policy = policy_of(model)
        policy.share_context(group)
        assert policy.hidden(batch).shape == (len(batch.input_ids), 32)
        return policy.token_stats(batch, want=want)

    for stats in together(4, one):
        for name in ("logprobs", *sorted(want)):
            mine, truth = getattr(stats, name), getattr(alone, name)
            assert mine.dtype == truth.dtype
            torch.testing.assert_close(mine, truth, rtol=1e-6, atol=1e-6)
        assert stats.entropy is None or want


@pytest.mark.parametrize("size", [2, 4])
def test_what_is_kept_for_the_backward_pass_is_shared(size, capsys):
    model, (batch,) = build("qwen3", max_position_embeddings=512), batches(examples((400,)), 1)

    def kept(policy):
        weights, found = storages(policy.model), {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                found[storage.data_ptr()] = (storage.nbytes(), tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            policy.hidden(batch)
        return sum(size for size, _ in found.values())

    def one(group):
        policy = policy_of(model)
        policy.share_context(group)
        return kept(policy)

    alone = kept(policy_of(model))
    assert all(found < 1.15 * alone / size for found in together(size, one))


def test_scores_and_the_gradient_of_their_head(capsys):
    model = build("qwen2")
    attach_score(model, "answers")

    def step(policy):
        policy.model.zero_grad()
        (batch,) = cut(pairs())
        loss = policy.scores(batch).square().sum()
        loss.backward()
        return loss.item(), {name: p.grad.clone() for name, p in policy.trainable().items() if p.grad is not None}

    assert_same(shared(lambda: policy_of(model, kernels=False), 2, step), step(policy_of(model, kernels=False)), 1e-6)


def test_fewer_tokens_than_ranks(capsys):
    model, rows = build("qwen3"), examples((2,))
    rows = [Example(rows[0].input_ids, rows[0].weights * 0 + 1)]
    assert_same(
        shared(lambda: policy_of(model, kernels=False), 4, lambda policy: train_once(policy, batches(rows, 1))),
        train_once(policy_of(model, kernels=False), batches(rows, 1)),
        1e-6,
    )


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rotations_that_ask_for_the_longest_sequence(kind, capsys):
    """The rank with the first tokens must rotate as if it saw the last."""
    rope = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [2.0, 3.0, 4.0, 5.0], "original_max_position_embeddings": 8}
    changes = {"rope_parameters": rope, "max_position_embeddings": 8 if kind == "dynamic" else 32}
    name = "llama" if kind == "dynamic" else "phi3"
    model, rows = build(name, **changes), examples((20,))

    def step(policy):
        return train_once(policy, batches(rows, 1))

    alone, found = step(policy_of(model, kernels=False)), shared(lambda: policy_of(model, kernels=False), 2, step)
    assert_same(found, alone, 1e-6)


def test_noise_is_sized_by_the_whole_segment(capsys):
    model, (batch,) = build("llama"), batches(examples((40, 2)), 2)

    def one(group):
        policy = policy_of(model, kernels=False)
        policy.share_context(group)
        policy.noise(5.0)
        embedding, plain = policy.model.get_input_embeddings(), []
        embedding.register_forward_hook(lambda module, inputs, output: plain.append((inputs[0], output)))
        with torch.no_grad():
            policy.hidden(batch)
        ids, noisy = plain[-1]
        return (noisy - embedding.weight[ids]).abs()[0]

    seen = torch.cat(together(2, one))
    sizes = 5.0 / (torch.tensor([40.0] * 40 + [2.0] * 2, dtype=torch.float64) * 32).sqrt()
    assert (seen.amax(dim=1) <= sizes + 1e-12).all()
    assert (seen.amax(dim=1) > 0.6 * sizes).all()


@pytest.mark.parametrize("name", SEGMENT_BY_SEGMENT)
def test_models_that_mix_tokens_elsewhere_are_refused(name, capsys):
    model = build(name)
    with pytest.raises(ConfigError, match="cannot be shared") as caught:
        together(2, lambda group: policy_of(model, kernels=False).share_context(group))
    assert caught.value.where is not None and caught.value.where.field == "parallel.context"


def test_heads_that_cannot_be_shared_are_named(capsys):
    model = build("llama")
    with pytest.raises(ConfigError, match="4 attention heads, which 3 devices cannot share") as caught:
        together(3, lambda group: policy_of(model, kernels=False).share_context(group))
    assert caught.value.hint == "take one of 2, 4"


def test_a_model_whose_shares_are_not_its_whole_is_refused(capsys):
    """Something that looks at a token's neighbours within the share only."""

    model = build("llama")

    def one(group):
        policy = policy_of(model, kernels=False)
        layer = policy.anatomy.backbone.layers[0].mlp
        layer.register_forward_hook(lambda module, inputs, output: output + output.mean(dim=1, keepdim=True))
        policy.share_context(group)

    with pytest.raises(ConfigError, match="differ from those on one"):
        together(2, one)


@pytest.mark.parametrize(("heads", "keys", "size"), [(4, 2, 2), (4, 2, 4), (12, 6, 4), (6, 3, 2), (4, 4, 4), (4, 1, 2)])
def test_each_rank_gets_the_keys_of_its_queries(heads, keys, size):
    tokens, generator = 8, torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, n, tokens, width, generator=generator) for n, width in ((heads, 3), (keys, 3), (keys, 5)))
    sinks = torch.arange(float(heads))

    def one(group):
        context = Context(group)
        share = context.share(Forest((3, tokens), (-1, 0)))
        found = context.heads(*(x[:, :, share.start : share.stop] for x in (q, k, v)), sinks)
        output = found[2].repeat_interleave(found[0].shape[1] // found[2].shape[1], dim=1)
        return *found, context.tokens(output)

    each, groups = heads // size, heads // keys
    for rank, (query, key, value, sink, back) in enumerate(together(size, one)):
        mine = range(rank * each, (rank + 1) * each)
        repeated = each // key.shape[1]
        assert torch.equal(query, q[:, list(mine)])
        assert torch.equal(key.repeat_interleave(repeated, dim=1), k[:, [head // groups for head in mine]])
        assert torch.equal(value.repeat_interleave(repeated, dim=1), v[:, [head // groups for head in mine]])
        assert sink.tolist() == list(mine)
        part = slice(rank * tokens // size, (rank + 1) * tokens // size)
        assert torch.equal(back, v.repeat_interleave(groups, dim=1)[:, :, part].transpose(1, 2))
