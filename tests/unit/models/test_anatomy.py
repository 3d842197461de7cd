"""What the probe finds out: heads, scales, and every reason not to pack."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from burnish.models.anatomy import dissect, probe
from burnish.models.forest import NAME

SMALL = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}


def llama():
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL))


@pytest.mark.parametrize(
    ("config", "scale", "softcap"),
    [
        (transformers.LlamaConfig(**SMALL), 1.0, None),
        (transformers.GraniteConfig(**SMALL, logits_scaling=8.0), 0.125, None),
        (transformers.CohereConfig(**SMALL, logit_scale=0.5), 0.5, None),
        (transformers.Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=7.0), 1.0, 7.0),
    ],
    ids=["llama", "granite", "cohere", "gemma2"],
)
def test_what_happens_after_the_head_is_read_and_proven(config, scale, softcap):
    anatomy = probe(dissect(transformers.AutoModelForCausalLM.from_config(config)))
    assert (anatomy.scale, anatomy.softcap) == (scale, softcap)
    assert anatomy.head is not None
    assert anatomy.packed
    assert anatomy.doubts == ()


def test_a_scale_that_the_config_does_not_tell_is_noticed():
    class Scaled(transformers.LlamaForCausalLM):
        def forward(self, **inputs):
            output = super().forward(**inputs)
            output.logits = output.logits * 1.5
            return output

    anatomy = probe(dissect(Scaled(transformers.LlamaConfig(**SMALL))))
    assert anatomy.head is None
    assert anatomy.packed


class Neighbour(nn.Module):
    """An MLP that peeks at the token before: what convolutions and recurrent layers do to packed segments."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) + 0.1 * torch.cat((torch.zeros_like(x[:, :1]), x[:, :-1]), dim=1)


class Deaf(nn.Module):
    """A layer that drops the arguments it does not know."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden_states, position_embeddings=None, **_others):
        return self.inner(hidden_states, attention_mask=None, position_embeddings=position_embeddings)


class Breaking(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden_states, position_embeddings=None, forest=None, **_others):
        if forest is not None:
            raise RuntimeError("what is a forest?")
        return self.inner(hidden_states, attention_mask=None, position_embeddings=position_embeddings)


def doubt(change) -> str:
    model = llama()
    own = model.config._attn_implementation
    change(model.model.layers)
    anatomy = probe(dissect(model))
    assert not anatomy.packed
    assert model.config._attn_implementation == own != NAME
    assert anatomy.head is not None
    return anatomy.doubts[-1]


def test_layers_that_mix_tokens_are_caught():
    def change(layers):
        layers[1].mlp = Neighbour(layers[1].mlp)

    assert "differ from each one alone" in doubt(change)


def test_layers_that_drop_the_structure_are_caught():
    def one(layers):
        layers[1] = Deaf(layers[1])

    def both(layers):
        layers[0], layers[1] = Deaf(layers[0]), Deaf(layers[1])

    assert "as its config says" in doubt(one)
    assert "not told about the segments" in doubt(both)


def test_layers_that_break_on_it_are_caught():
    def change(layers):
        layers[0] = Breaking(layers[0])

    assert "what is a forest?" in doubt(change)


def test_packing_installs_our_attention():
    model = llama()
    assert probe(dissect(model)).packed
    assert model.config._attn_implementation == NAME
