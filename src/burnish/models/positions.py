"""How long an example a model can take."""

# transformers is only partly typed.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from typing import Any

from torch import nn

_SPARE = 2
"""Rows that some models (OPT) have in their table of positions beside the positions themselves."""


def reach(model: Any) -> tuple[int | None, bool]:
    """The positions that a transformers model knows, and whether they are rows of a table, beyond which there is nothing.

    Rotated positions go on for ever, but a model has not seen those beyond `max_position_embeddings`, and answers weakly there.
    """
    config = model.config.get_text_config(decoder=True)
    positions: int | None = getattr(config, "max_position_embeddings", None)
    if positions is None:
        return None, False
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding) and module is not model.get_input_embeddings()]
    return positions, any(positions <= table.num_embeddings <= positions + _SPARE for table in tables)
