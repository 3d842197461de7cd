from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from burnish.kernels.attention import Forest, forest_attention
from burnish.models.forest import Packed, attend, last_hidden, windows_as_configured

FULL, SLIDING = "full_attention", "sliding_attention"


@pytest.mark.parametrize(
    ("layer_types", "window", "seen", "expected"),
    [
        (None, None, [None, None], True),
        (None, 0, [None, None], True),
        (None, 8, [8, 8], True),
        (None, 8, [None, None], False),
        (None, None, [None], False),
        ([FULL, SLIDING], 8, [None, 8], True),
        ([FULL, SLIDING], 8, [None, None], False),
        ([FULL, FULL], 8, [None, None], True),
        (["linear_attention", FULL], None, [None, None], False),
        (["chunked_attention", FULL], None, [None, None], False),
    ],
)
def test_windows_are_compared_with_the_config(layer_types, window, seen, expected):
    config = SimpleNamespace(num_hidden_layers=2, sliding_window=window)
    if layer_types is not None:
        config.layer_types = layer_types
    assert windows_as_configured(config, seen) is expected


def qkv():
    torch.manual_seed(0)
    return torch.randn(1, 4, 6, 8), torch.randn(1, 2, 6, 8), torch.randn(1, 2, 6, 8)


def test_attention_obeys_the_structure_it_is_given():
    q, k, v = qkv()
    forest, windows = Forest((2, 6), (-1, -1)), []
    output, weights = attend(nn.Identity(), q, k, v, None, scaling=0.3, sliding_window=2, forest=Packed(forest, "auto", windows))
    assert weights is None
    assert windows == [2]
    torch.testing.assert_close(output, forest_attention(q, k, v, forest, scaling=0.3, window=2, kind="eager").transpose(1, 2))


@pytest.mark.parametrize("special", [{}, {"softcap": 2.0}, {"s_aux": torch.tensor([0.0, 1.0, 2.0, 3.0])}])
def test_without_structure_it_is_ordinary_causal_attention(special):
    q, k, v = qkv()
    module = nn.Identity()
    module.num_key_value_groups = 2
    output, _ = attend(module, q, k, v, None, **special)
    options = {"softcap": special.get("softcap"), "sinks": special.get("s_aux")}
    torch.testing.assert_close(output, forest_attention(q, k, v, Forest((6,), (-1,)), kind="eager", **options).transpose(1, 2))


def test_a_position_bias_is_refused():
    q, k, v = qkv()
    with pytest.raises(NotImplementedError, match="position bias"):
        attend(nn.Identity(), q, k, v, None, forest=Packed(Forest((6,), (-1,))), position_bias=torch.zeros(1))


def test_hidden_states_of_a_tuple_or_an_output():
    states = torch.zeros(1, 3, 2)
    assert last_hidden((states,)).shape == (3, 2)
    assert last_hidden(SimpleNamespace(last_hidden_state=states)).shape == (3, 2)
