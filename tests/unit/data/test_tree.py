from __future__ import annotations

import numpy as np
import pytest

from burnish.data.collate import collate
from burnish.data.loader import Listed, Step
from burnish.data.tree import chain, cut, grow, leading_weight, loss_weight, paths, segments_of, trained_counts, usable, with_mismatched
from burnish.data.types import Example


def side(prompt: list[int], answer: list[int], *, untrained: int = 0) -> Example:
    weights = [0.0] * (len(prompt) + untrained) + [1.0] * (len(answer) - untrained)
    return Example(np.array(prompt + answer, np.int32), np.array(weights, np.float32))


def pair(prompt: list[int], chosen: list[int], rejected: list[int], **options: object) -> Example:
    return grow([side(prompt, chosen), side(prompt, rejected)], values=(0.5,), weight=1.0, **options)  # type: ignore[arg-type]


def parts(example: Example) -> list[list[int]]:
    return [example.input_ids[start:end].tolist() for start, end, _ in segments_of(example)]


def test_the_prompt_of_a_pair_is_there_once() -> None:
    made = pair([1, 2, 3], [4, 5], [6, 7, 8])
    assert parts(made) == [[1, 2, 3], [4, 5], [6, 7, 8]]
    assert made.parents == (-1, 0, 0)
    assert made.values == (0.5,)
    assert paths(made) == [3, 5, 6]
    assert trained_counts(made) == [0, 2, 3]
    assert (loss_weight(made), leading_weight(made)) == (1.0, 2.0)


def test_answers_that_begin_alike_share_nothing_that_is_trained() -> None:
    assert parts(pair([1, 2], [9, 5], [9, 7])) == [[1, 2], [9, 5], [9, 7]]


def test_only_what_both_sides_begin_with_is_shared() -> None:
    made = grow([side([1, 2, 3], [4]), side([1, 9, 3], [5])], values=(0.0,), weight=1.0)
    assert parts(made) == [[1], [2, 3, 4], [9, 3, 5]]
    assert trained_counts(made) == [0, 1, 1]


def test_an_answer_that_begins_with_context_keeps_it() -> None:
    made = grow([side([1, 2], [3, 4, 5], untrained=2), side([1, 2], [3, 6])], values=(0.0,), weight=1.0)
    assert parts(made) == [[1, 2], [3, 4, 5], [3, 6]]
    assert trained_counts(made) == [0, 1, 2]


@pytest.mark.parametrize("options", [{"share": False}, {}])
def test_sides_without_a_common_prompt_are_roots_whose_first_token_nobody_predicts(options: dict[str, bool]) -> None:
    made = pair([1, 2], [4], [5, 6], **options) if options else pair([], [4, 3], [5, 6, 7])
    assert made.parents == (-1, -1)
    assert trained_counts(made) == [1, 2]


def test_equal_answers_still_have_branches_of_their_own() -> None:
    assert trained_counts(pair([1, 2], [3], [3])) == [0, 1, 1]


def test_a_side_with_nothing_trained_makes_the_pair_useless() -> None:
    made = grow([side([1, 2], [3]), side([1, 2, 4], [])], values=(0.0,), weight=1.0)
    assert not usable(made)
    assert usable(pair([1], [2], [3]))


@pytest.mark.parametrize(
    ("limit", "expected", "good"),
    [
        (6, [[1, 2, 3], [4, 5], [6, 7, 8]], True),
        (5, [[1, 2, 3], [4, 5], [6, 7]], True),
        (4, [[1, 2, 3], [4], [6]], True),
        (3, [[1, 2, 3]], False),
        (2, [[1, 2]], False),
    ],
)
def test_every_path_is_cut_at_the_limit(limit: int, expected: list[list[int]], good: bool) -> None:
    made = cut(pair([1, 2, 3], [4, 5], [6, 7, 8]), limit)
    assert parts(made) == expected
    assert usable(made) is good
    assert made.values == (0.5,)


def test_a_step_is_kept_whole_or_not_at_all() -> None:
    solution = chain([np.array([1, 2]), np.array([3, 4]), np.array([5, 6])], trained=[False, True, True], values=(1.0, 0.0), weight=2.0)
    assert solution.parents == (-1, 0, 1)
    assert paths(solution) == [2, 4, 6]
    made = cut(solution, 5, whole=True)
    assert parts(made) == [[1, 2], [3, 4]]
    assert (made.values, made.weight) == ((1.0,), 1.0)
    assert usable(made)
    assert not usable(cut(solution, 3, whole=True))


def test_a_solution_without_a_prompt_begins_with_its_first_step() -> None:
    solution = chain([np.array([], int), np.array([3, 4]), np.array([5])], trained=[False, True, True], values=(1.0, 1.0), weight=2.0)
    assert solution.parents == (-1, 0)
    assert trained_counts(solution) == [1, 1]


def judged(prompt: list[int], answer: list[int], label: bool) -> Example:
    return grow([side(prompt, answer)], values=(float(label),), weight=1.0)


def test_each_judged_answer_gets_that_of_the_one_before() -> None:
    one, two, three = with_mismatched([judged([1], [2, 3], True), judged([4], [5], False), judged([8, 8], [6, 7], True)])
    assert parts(one) == [[1], [2, 3], [6, 7]]
    assert parts(two) == [[4], [5], [2, 3]]
    assert parts(three) == [[8, 8], [6, 7], [5]]
    assert [made.parents for made in (one, two, three)] == [(-1, 0, 0)] * 3
    assert trained_counts(one) == [0, 2, 2]
    assert len(with_mismatched([one])) == 1


def test_a_forest_of_pairs_side_by_side() -> None:
    batch = collate([pair([1, 2, 3], [4, 5], [6]), pair([7], [8], [9, 10])], step_weight=2.0, step_tokens=3.0)
    assert batch.input_ids.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    assert batch.positions.tolist() == [0, 1, 2, 3, 4, 3, 0, 1, 1, 2]
    assert batch.doc_ends == (3, 5, 6, 7, 8, 10)
    assert batch.parents == (-1, 0, 0, -1, 3, 3)
    assert batch.rows.tolist() == [2, 3, 2, 6, 6, 8]  # the prompt's last token predicts the first of both answers
    assert batch.targets.tolist() == [4, 5, 6, 8, 9, 10]
    assert batch.branches == (2, 1, 1, 2)
    assert batch.branch_segments == (1, 2, 4, 5)
    assert batch.extras["lengths"].tolist() == [2, 1, 1, 2]
    assert batch.extras["ends"].tolist() == [4, 5, 7, 9]
    assert batch.extras["values"].tolist() == [0.5, 0.5]
    assert batch.extras["weights"].tolist() == [1.0, 1.0]
    assert (batch.weight, batch.step_weight, batch.step_tokens, batch.examples) == (2.0, 2.0, 3.0, 2)
    assert "reference" not in batch.extras


def test_a_chain_is_one_segment_to_attention() -> None:
    solution = chain([np.array([1, 2]), np.array([3, 4]), np.array([5])], trained=[False, True, True], values=(1.0, 0.0), weight=2.0)
    batch = collate([solution, judged([6], [7, 8], True)], step_weight=3.0)
    assert batch.doc_ends == (5, 8)
    assert batch.parents == (-1, -1)
    assert batch.positions.tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
    assert batch.branches == (2, 1, 2)
    assert batch.branch_segments == (0, 0, 1)
    assert batch.extras["ends"].tolist() == [3, 4, 7]
    assert batch.extras["values"].tolist() == [1.0, 0.0, 1.0]
    assert batch.rows.tolist() == [1, 2, 3, 5, 6]


def test_what_the_reference_says_goes_along() -> None:
    from dataclasses import replace

    one = replace(pair([1], [2], [3, 4]), reference=np.array([-1, -2, -3], np.float32))
    two = replace(pair([1], [2], [3]), reference=np.array([-4, -5], np.float32))
    assert collate([one, two], step_weight=2.0).extras["reference"].tolist() == [-1, -2, -3, -4, -5]


def test_a_rank_without_examples_has_empty_branches() -> None:
    batch = collate([], step_weight=2.0)
    assert (batch.branches, batch.weight, batch.examples) == ((), 0.0, 0)
    assert all(len(value) == 0 for value in batch.extras.values())


def test_a_step_knows_what_it_weighs_however_it_is_cut() -> None:
    examples = Listed([pair([1] * n, [2] * (n + 1), [3]) for n in range(1, 6)])
    step = Step(examples, np.array([4, 0, 2]))
    batches = list(step.batches(8, 0, 1, packing=True))
    assert len(batches) == 3
    assert {batch.step_weight for batch in batches} == {3.0}
    assert {batch.step_tokens for batch in batches} == {6.0 + 2.0 + 4.0}
    assert sum(batch.weight for batch in batches) == 3.0
    assert step.info.trained == sum(len(batch.targets) for batch in batches) == 15


def test_mismatched_answers_go_round_within_the_step() -> None:
    examples = Listed([judged([n], [10 * n, 10 * n + 1], True) for n in range(1, 6)])
    (batch,) = Step(examples, np.array([3, 1, 0]), mismatched=True).batches(100, 0, 1, packing=True)
    assert batch.input_ids.tolist() == [4, 40, 41, 10, 11, 2, 20, 21, 40, 41, 1, 10, 11, 20, 21]
    assert batch.branches == (2,) * 6
    assert batch.weight == batch.step_weight == 3.0
