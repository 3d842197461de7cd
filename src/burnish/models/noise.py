"""NEFTune's noise on embeddings (2310.05914)."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from burnish.kernels.attention import Forest


class EmbeddingNoise:
    """Uniform noise on the output of one embedding module, sized by the segment that each token belongs to."""

    def __init__(self) -> None:
        self._alpha = 0.0
        self._handle: Any = None
        self._lengths: torch.Tensor | None = None  # float [T]: length of each flat token's segment
        self._now: torch.Tensor | None = None  # the same for the tokens of the call under way

    def attach(self, embedding: nn.Module, alpha: float) -> None:
        """Puts the hook on, or takes it off."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        self._alpha = alpha
        if alpha > 0:
            self._handle = embedding.register_forward_hook(self._add)

    @contextmanager
    def over(self, forest: Forest, device: torch.device) -> Generator[None]:
        """While this batch is computed."""
        if self._handle is not None:
            lengths = torch.tensor(forest.lengths, device=device)
            self._lengths = self._now = lengths.repeat_interleave(lengths).float()
        try:
            yield
        finally:
            self._lengths = self._now = None

    def only(self, parts: list[slice]) -> None:
        """The next call sees these flat tokens only."""
        if self._lengths is not None:
            self._now = torch.cat([self._lengths[part] for part in parts])

    def _add(self, module: nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        if self._now is None or not module.training:
            return output
        size = self._alpha / (self._now * output.shape[-1]).sqrt()
        return output + torch.empty_like(output).uniform_(-1, 1) * size[None, :, None].to(output.dtype)
