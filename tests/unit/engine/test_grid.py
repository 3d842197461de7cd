from __future__ import annotations

import pytest

from burnish.core.errors import ConfigError
from burnish.engine.grid import Grid


def grids(world_size: int, **sizes: int) -> list[Grid]:
    return [Grid(rank, world_size, **sizes) for rank in range(world_size)]


def test_alone_a_rank_is_its_own_group() -> None:
    assert [(grid.data_rank, grid.context_rank) for grid in grids(3)] == [(0, 0), (1, 0), (2, 0)]
    assert (Grid().data_world_size, Grid().model_ranks, Grid().context_groups) == (1, 1, [[0]])


def test_neighbours_share_micro_batches() -> None:
    ranks = grids(6, context=3)
    assert [grid.data_rank for grid in ranks] == [0, 0, 0, 1, 1, 1]
    assert [grid.context_rank for grid in ranks] == [0, 1, 2, 0, 1, 2]
    assert {grid.data_world_size for grid in ranks} == {2}
    assert ranks[0].context_groups == [[0, 1, 2], [3, 4, 5]]


def test_shares_of_tokens_and_of_weights_make_one_group() -> None:
    ranks = grids(8, context=2, tensor=2)
    assert [grid.data_rank for grid in ranks] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert [grid.context_rank for grid in ranks] == [0, 0, 1, 1, 0, 0, 1, 1]
    assert ranks[0].context_groups == [[0, 2], [1, 3], [4, 6], [5, 7]]
    for grid in ranks:
        (mine,) = [members for members in grid.context_groups if grid.rank in members]
        assert mine[grid.context_rank] == grid.rank


def test_shares_of_weights_are_neighbours() -> None:
    ranks = grids(6, tensor=3)
    assert [(grid.data_rank, grid.tensor_rank) for grid in ranks] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    assert ranks[0].tensor_groups == [[0, 1, 2], [3, 4, 5]]
    assert ranks[0].equal_groups == [[0, 3], [1, 4], [2, 5]]


@pytest.mark.parametrize(("processes", "said"), [(1, "one process cannot"), (4, "4 processes cannot")])
def test_what_does_not_divide_is_refused(processes: int, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        Grid(0, processes, context=3)
    assert caught.value.where is not None and caught.value.where.field == "parallel.context"
