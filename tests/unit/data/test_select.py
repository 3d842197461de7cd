"""A batch cut to some branches is the batch that would have been built without the others."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers

from burnish.data.select import keep_branches
from burnish.data.types import Batch
from burnish.models.policy import Policy


def two_trees() -> Batch:
    """A prompt of 3 tokens with answers of 2 and 3, a prompt of 2 with answers of 1, 2 and 2. Prompts' last tokens predict first ones."""
    ids = torch.randint(61, (15,), generator=torch.Generator().manual_seed(3))
    return Batch(
        input_ids=ids,
        positions=torch.tensor([0, 1, 2, 3, 4, 3, 4, 5, 0, 1, 2, 2, 3, 2, 3]),
        doc_ends=(3, 5, 8, 10, 11, 13, 15),
        parents=(-1, 0, 0, -1, 3, 3, 3),
        rows=torch.tensor([2, 3, 2, 5, 6, 9, 9, 11, 9, 13]),
        targets=ids[[3, 4, 5, 6, 7, 10, 11, 12, 13, 14]],
        token_weights=torch.arange(1.0, 11.0),
        weight=2.0,
        step_weight=7.0,
        examples=2,
        branches=(2, 3, 1, 2, 2),
        branch_segments=(1, 2, 4, 5, 6),
        extras={
            "lengths": torch.tensor([2, 3, 1, 2, 2]),
            "ends": torch.tensor([4, 7, 10, 12, 14]),
            "values": torch.tensor([1.0, 0.0]),
            "weights": torch.tensor([0.5, 1.5]),
            "reference": torch.arange(10.0),
        },
    )


def test_every_index_by_hand():
    batch = two_trees()
    kept = keep_branches(batch, (False, True, True, False, True))
    ids = batch.input_ids
    assert kept.input_ids.tolist() == ids[[0, 1, 2, 5, 6, 7, 8, 9, 10, 13, 14]].tolist()
    assert kept.positions.tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2, 2, 3]
    assert kept.doc_ends == (6, 8, 9, 11)  # the first prompt and its only answer are one document now
    assert kept.parents == (-1, -1, 1, 1)
    assert kept.rows.tolist() == [2, 3, 4, 7, 7, 9]
    assert kept.targets.tolist() == ids[[5, 6, 7, 10, 13, 14]].tolist()
    assert kept.token_weights.tolist() == [3, 4, 5, 6, 9, 10]
    assert (kept.branches, kept.branch_segments) == ((3, 1, 2), (0, 2, 3))
    assert {name: value.tolist() for name, value in kept.extras.items()} == {
        "lengths": [3, 1, 2],
        "ends": [5, 8, 10],
        "values": [1.0, 0.0],
        "weights": [0.5, 1.5],
        "reference": [2, 3, 4, 5, 8, 9],
    }
    assert (kept.weight, kept.step_weight, kept.examples) == (2.0, 7.0, 2)
    assert batch.doc_ends == two_trees().doc_ends
    assert batch.extras["lengths"].tolist() == [2, 3, 1, 2, 2]


def test_all_or_nothing():
    batch = two_trees()
    same = keep_branches(batch, (True,) * 5)
    assert (same.doc_ends, same.parents, same.branch_segments) == (batch.doc_ends, batch.parents, batch.branch_segments)
    assert torch.equal(same.rows, batch.rows)
    prompts = keep_branches(batch, (False,) * 5)
    assert (prompts.doc_ends, prompts.parents, prompts.branches) == ((3, 5), (-1, -1), ())
    assert prompts.targets.shape == (0,)
    assert prompts.extras["ends"].dtype == torch.int64


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("keep", [(True, False, False, True, False), (False, True, True, False, True), (True, True, False, False, True)])
def test_the_model_says_the_same_of_what_is_kept(keep, packed):
    torch.manual_seed(0)
    if packed:
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=61, max_position_embeddings=64, **sizes))
    else:
        model = transformers.BloomForCausalLM(transformers.BloomConfig(vocab_size=61, hidden_size=16, n_layer=1, n_head=2))
    policy, batch = Policy(model), two_trees()
    chosen = torch.repeat_interleave(torch.tensor(keep), torch.tensor(batch.branches))

    def run(batch, weights):
        policy.model.zero_grad()
        logprobs = policy.token_stats(batch).logprobs
        (weights * logprobs).sum().backward()
        return logprobs.detach(), {name: parameter.grad.clone() for name, parameter in policy.model.named_parameters()}

    kept = keep_branches(batch, keep)
    whole, expected = run(batch, batch.token_weights * chosen)
    found, gradients = run(kept, kept.token_weights)
    torch.testing.assert_close(found, whole[chosen])
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, atol=1e-5, rtol=1e-4)


def test_roots_are_branches_too():
    batch = Batch(
        input_ids=torch.arange(5),
        positions=torch.tensor([0, 1, 0, 1, 2]),
        doc_ends=(2, 5),
        parents=(-1, -1),
        rows=torch.tensor([0, 2, 3]),
        targets=torch.tensor([1, 3, 4]),
        token_weights=torch.ones(3),
        weight=1.0,
        step_weight=1.0,
        examples=1,
        branches=(1, 2),
        branch_segments=(0, 1),
    )
    kept = keep_branches(batch, (False, True))
    assert (kept.doc_ends, kept.parents, kept.rows.tolist(), kept.branch_segments) == ((3,), (-1,), [0, 1], (0,))
    with pytest.raises(ValueError, match="no segment is left"):
        keep_branches(batch, (False, False))
    with pytest.raises(ValueError, match="segment 1 is kept and continues segment 0"):
        keep_branches(replace(batch, parents=(-1, 0)), (False, True))


def test_what_does_not_fit_is_refused():
    batch = two_trees()
    with pytest.raises(ValueError, match="2 decisions for 5 branches"):
        keep_branches(batch, (True, False))
    with pytest.raises(ValueError, match="segments of 0 branches, expected those of 5"):
        keep_branches(replace(batch, branch_segments=()), (True,) * 5)
    with pytest.raises(ValueError, match="9 predictions, the batch has 10"):
        keep_branches(replace(batch, branches=(1, 3, 1, 2, 2)), (True,) * 5)
    with pytest.raises(ValueError, match="covers 4 predictions, expected all 10"):
        keep_branches(replace(batch, extras={"reference": torch.zeros(4)}), (True,) * 5)
