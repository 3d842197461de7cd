"""How the ranks of a run are laid out.

    rank = (data_rank x context + context_rank) x tensor + tensor_rank

`context x tensor` neighbours are a *model group*: they work on the same micro-batches, each on its share. What hands out examples, or
counts them, goes by data ranks and sees each group once. What differs between devices (random states, files) goes by ranks.

Each rank of a group computes the loss of the whole micro-batch. Collectives within the group are differentiated as what they are (the
gradient of a gather is the sum of all ranks' gradients), so a rank ends up with its part of the gradient of the *sum* of the group's
`context` equal losses. The mean over all ranks, which is what every strategy reduces by, is then the mean over data ranks of the gradient
of one loss, and a step is divided as in a run of `data_world_size` processes. Ranks that share weights each compute the gradient of one
loss, for the weights that they have (`engine.backend_tensor`).
"""

from __future__ import annotations

from dataclasses import dataclass

from burnish.core.errors import ConfigError, Where, divisors, one_of

__all__ = ["Grid"]


@dataclass(frozen=True, slots=True)
class Grid:
    """Where one rank stands.

    Attributes:
        rank: This process.
        world_size: All processes.
        context: Ranks that share the tokens of a micro-batch.
        tensor: Ranks that share the weights of a layer.

    Raises:
        ConfigError: the processes cannot be cut into groups of that size.
    """

    rank: int = 0
    world_size: int = 1
    context: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        if self.world_size % self.model_ranks:
            key = "parallel.context" if self.context > 1 else "parallel.tensor"
            known = divisors(self.world_size)
            choice = f"{one_of(known)}, or " if known else ""
            raise ConfigError(
                f"{_count(self.world_size)} cannot be cut into groups of {self.model_ranks} that share micro-batches",
                where=Where(field=key),
                hint=f"take {choice}a multiple of {self.model_ranks} for the number of processes",
            )

    @property
    def model_ranks(self) -> int:
        """Ranks that work on the same micro-batches."""
        return self.context * self.tensor

    @property
    def data_rank(self) -> int:
        """Which micro-batches are this rank's."""
        return self.rank // self.model_ranks

    @property
    def data_world_size(self) -> int:
        """How many ranks, or groups of them, have micro-batches of their own."""
        return self.world_size // self.model_ranks

    @property
    def context_rank(self) -> int:
        """Which share of a micro-batch's tokens is this rank's."""
        return self.rank // self.tensor % self.context

    @property
    def tensor_rank(self) -> int:
        """Which part of a layer's weights is this rank's."""
        return self.rank % self.tensor

    @property
    def context_groups(self) -> list[list[int]]:
        """The ranks that share tokens, group by group, each in the order of the tokens."""
        return [
            [data * self.model_ranks + place * self.tensor + tensor for place in range(self.context)]
            for data in range(self.data_world_size)
            for tensor in range(self.tensor)
        ]

    @property
    def tensor_groups(self) -> list[list[int]]:
        """The ranks that share weights, group by group, each in the order of their parts."""
        return [list(range(first, first + self.tensor)) for first in range(0, self.world_size, self.tensor)]

    @property
    def equal_groups(self) -> list[list[int]]:
        """The ranks that have the same parts of the weights."""
        return [list(range(place, self.world_size, self.tensor)) for place in range(self.tensor)]


def _count(processes: int) -> str:
    return "one process" if processes == 1 else f"{processes} processes"
