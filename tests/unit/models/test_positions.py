from __future__ import annotations

from typing import Any

import pytest
from transformers import OPTConfig, OPTForCausalLM

from burnish.config.sections import Adapter
from burnish.models.adapters import attach
from burnish.models.positions import reach

from .conftest import build


@pytest.mark.parametrize(("family", "table"), [("llama", False), ("llama-tied", False), ("gemma3", False), ("gpt2", True)])
def test_positions_of_a_family(family: str, table: bool) -> None:
    assert reach(build(family)) == (64, table)
    assert reach(attach(build(family), Adapter(rank=2))) == (64, table)


def test_a_table_with_spare_rows() -> None:
    sizes: dict[str, Any] = {"hidden_size": 16, "ffn_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "word_embed_proj_dim": 16}
    assert reach(OPTForCausalLM(OPTConfig(vocab_size=100, max_position_embeddings=32, **sizes))) == (32, True)
