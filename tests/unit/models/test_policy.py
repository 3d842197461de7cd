"""The policy's own duties: reference, noise, modes, odd heads, odd batches. That the numbers are right stands in tests/parity."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn

from burnish.core.errors import ModelError
from burnish.data.collate import collate
from burnish.data.types import Batch, Example
from burnish.models.policy import Policy

SMALL = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}


def llama(**changes):
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SMALL, **changes}))


def lora(model):
    adapter = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.5))
    for name, parameter in adapter.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return adapter


def batch(lengths=(6, 4), seed=0) -> Batch:
    rng = np.random.default_rng(seed)
    return collate([Example(rng.integers(0, 61, n).astype(np.int32), np.ones(n, np.float32)) for n in lengths], step_weight=1.0)


def tree() -> Batch:
    """A prompt of 5 tokens with two continuations of 3 and 2; everything after the prompt's last token is predicted."""
    ids = torch.randint(61, (10,), generator=torch.Generator().manual_seed(3))
    return Batch(
        input_ids=ids,
        positions=torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 5, 6]),
        doc_ends=(5, 8, 10),
        parents=(-1, 0, 0),
        rows=torch.tensor([4, 5, 6, 4, 8]),
        targets=ids[[5, 6, 7, 8, 9]],
        token_weights=torch.ones(5),
        weight=5.0,
        step_weight=5.0,
    )


def test_a_shared_prompt_equals_two_copies():
    policy, shared = Policy(llama()), tree()
    stats = policy.token_stats(shared)
    ids = shared.input_ids
    for child, predictions in (([*range(5), 5, 6, 7], [0, 1, 2]), ([*range(5), 8, 9], [3, 4])):
        alone = collate([Example(ids[child].numpy().astype(np.int32), np.array([0.0] * 5 + [1.0] * (len(child) - 5)))], step_weight=1.0)
        torch.testing.assert_close(stats.logprobs[predictions], policy.token_stats(alone).logprobs)
    unpacked = Policy(transformers.BloomForCausalLM(transformers.BloomConfig(vocab_size=61, hidden_size=16, n_layer=1, n_head=2)))
    assert not unpacked.anatomy.packed
    assert unpacked.token_stats(shared).logprobs.shape == (5,)


def test_nothing_to_predict():
    policy = Policy(llama())
    empty = collate([], step_weight=1.0)
    stats = policy.token_stats(empty, want=frozenset({"correct"}))
    assert stats.logprobs.shape == (0,)
    stats.logprobs.sum().backward()
    assert policy.model.model.layers[0].mlp.up_proj.weight.grad.abs().sum() == 0


def test_the_reference_is_the_model_without_its_adapter():
    base = llama()
    plain = Policy(copy.deepcopy(base)).eval().token_stats(batch()).logprobs
    policy = Policy(lora(base)).train()
    with policy.reference():
        inside = policy.token_stats(batch()).logprobs
        assert not policy.model.training
    torch.testing.assert_close(inside, plain)
    assert not inside.requires_grad
    assert policy.model.training
    assert not torch.allclose(policy.eval().token_stats(batch()).logprobs, plain)


def test_the_reference_of_a_whole_model_is_a_frozen_copy():
    model = llama()
    policy = Policy(model, reference=copy.deepcopy(model)).train()
    before = policy.token_stats(batch()).logprobs.detach()
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    with policy.reference():
        torch.testing.assert_close(policy.token_stats(batch()).logprobs, before)
        reference_hidden = policy.hidden(batch())
    torch.testing.assert_close(policy.hidden(batch()), reference_hidden)
    assert not torch.allclose(policy.token_stats(batch()).logprobs, before)


def test_no_reference_is_an_error():
    with pytest.raises(ModelError, match="reference model is needed"), Policy(llama()).reference():
        pass


def test_trainable_names_what_is_trained():
    assert set(Policy(llama(tie_word_embeddings=True)).trainable()) == {
        name for name, _ in llama(tie_word_embeddings=True).named_parameters()
    }
    names = set(Policy(lora(llama())).trainable())
    assert names
    assert all("lora_" in name for name in names)


def test_probe_leaves_modes_gradients_and_random_state_alone():
    model = lora(llama()).train()
    model.base_model.model.model.norm.eval()
    state = torch.get_rng_state()
    Policy(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert not model.base_model.model.model.norm.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_noise_has_the_size_of_the_paper_and_acts_in_training_only():
    policy = Policy(llama())
    embedding = policy.model.get_input_embeddings()
    seen: list[torch.Tensor] = []
    policy.noise(5.0)
    embedding.register_forward_hook(lambda _module, _inputs, output: seen.append(output.detach()))
    one = batch((16, 4))
    clean = embedding.weight[one.input_ids].detach()
    policy.train().hidden(one)
    noise = (seen[-1][0] - clean).abs()
    for part, length in ((slice(0, 16), 16), (slice(16, 20), 4)):
        bound = 5.0 / (length * 16) ** 0.5
        assert 0.8 * bound < noise[part].max() <= bound
    policy.eval().hidden(one)
    assert torch.equal(seen[-1][0], clean)
    policy.noise(0.0)
    policy.train().hidden(one)
    assert torch.equal(seen[-1][0], clean)


def test_noise_follows_segments_that_are_computed_alone():
    policy = Policy(transformers.BloomForCausalLM(transformers.BloomConfig(vocab_size=61, hidden_size=16, n_layer=1, n_head=2))).train()
    policy.noise(5.0)
    seen: list[torch.Tensor] = []
    embedding = policy.model.get_input_embeddings()
    embedding.register_forward_hook(lambda _module, _inputs, output: seen.append(output.detach()))
    policy.hidden(one := batch((16, 4)))
    clean = embedding.weight[one.input_ids].detach()
    assert [part.shape[1] for part in seen] == [16, 4]
    assert 0.8 < (seen[1][0] - clean[16:]).abs().max() / (5.0 / 8.0) <= 1


def test_a_head_that_is_not_a_plain_linear_layer():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = llama()
    head = Doubled(16, 61, bias=False)
    head.weight = model.lm_head.weight
    model.lm_head = head
    policy = Policy(model)
    assert policy.anatomy.head is not None
    logits = model(input_ids=batch((6,)).input_ids[None]).logits[0]
    expected = torch.log_softmax(logits[:-1], -1).gather(1, batch((6,)).targets[:, None])[:, 0]
    torch.testing.assert_close(policy.token_stats(batch((6,))).logprobs, expected)


@pytest.mark.parametrize("alone", [False, True])
def test_logits_that_are_not_the_heads_are_taken_from_the_model(alone, capfd):
    class Squared(transformers.LlamaForCausalLM):
        def forward(self, **inputs):
            output = super().forward(**inputs)
            output.logits = output.logits**2 * 100
            return output

    torch.manual_seed(0)
    policy = Policy(Squared(transformers.LlamaConfig(**SMALL)))
    assert policy.anatomy.head is None
    if alone:
        policy.anatomy = dataclasses.replace(policy.anatomy, packed=False)
    one = batch()
    logits = policy.model(input_ids=one.input_ids[6:][None]).logits[0]
    expected = torch.log_softmax(logits[:-1], -1).gather(1, one.targets[5:, None])[:, 0]
    torch.testing.assert_close(policy.token_stats(one).logprobs[5:], expected)
    assert "own full logits" in capfd.readouterr().err


def test_generation_still_works_with_and_without_padding():
    model = llama().eval()
    ids = batch((6,)).input_ids[None]
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    before = model.generate(ids, **options)
    Policy(model)
    assert torch.equal(model.generate(ids, **options), before)
    padded = torch.cat((torch.zeros(1, 2, dtype=ids.dtype), ids), 1)
    mask = torch.tensor([[0, 0, *[1] * 6]])
    assert torch.equal(model.generate(padded, attention_mask=mask, **options)[:, 8:], before[:, 6:])


def test_soft_capped_generation_still_works():
    torch.manual_seed(0)
    config = transformers.Gemma2Config(**SMALL, head_dim=8, attn_logit_softcapping=1.0, sliding_window=4)
    model = transformers.Gemma2ForCausalLM(config).eval()
    ids = batch((6,)).input_ids[None]
    before = model(ids).logits
    Policy(model)
    torch.testing.assert_close(model(ids).logits, before)


def test_saved_config_does_not_mention_us(tmp_path):
    model = llama()
    Policy(model)
    model.save_pretrained(tmp_path)
    assert "burnish" not in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_pass_the_probe(dtype):
    assert Policy(llama().to(dtype)).anatomy.packed
    mixed = lora(llama().to(dtype))
    for name, parameter in mixed.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    assert Policy(mixed).anatomy.packed


def test_autocast_gives_fp32_statistics_and_gradients_close_to_fp32():
    policy = Policy(llama())
    exact = policy.token_stats(batch()).logprobs
    with torch.autocast("cpu", torch.bfloat16):
        rounded = policy.token_stats(batch()).logprobs
    assert rounded.dtype is torch.float32
    torch.testing.assert_close(rounded, exact, rtol=0.02, atol=0.02)


def test_checkpointing_where_the_model_has_none():
    policy = Policy(llama())
    policy.anatomy.whole.supports_gradient_checkpointing = False
    with pytest.raises(ModelError, match="cannot be checkpointed"):
        policy.checkpoint_activations()


def test_something_else_is_refused():
    with pytest.raises(ModelError, match="expected a transformers causal language model, found Linear"):
        Policy(nn.Linear(2, 2))


def test_without_a_probe_the_model_is_taken_on_trust():
    torch.testing.assert_close(Policy(llama(), verify=False).token_stats(batch()).logprobs, Policy(llama()).token_stats(batch()).logprobs)


def test_router_loss_is_announced_as_absent(capfd):
    config = transformers.MixtralConfig(**SMALL, num_local_experts=2, output_router_logits=True)
    Policy(transformers.MixtralForCausalLM(config))
    assert "auxiliary loss" in capfd.readouterr().err


def test_an_attention_that_cannot_do_the_model_is_refused():
    config = transformers.Gemma2Config(**SMALL, head_dim=8)
    with pytest.raises(ModelError, match="does not know soft caps"):
        Policy(transformers.Gemma2ForCausalLM(config), attention="sdpa")
