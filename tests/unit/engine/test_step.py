"""One optimiser step: exact however it is cut, clipped as torch clips, and never taken on a gradient that is not finite."""

import copy
import math
import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.engine.conftest import TinyExamples, TinyObjective, TinyPolicy

from burnish.config.sections import Recovery, Train
from burnish.core.errors import TrainingError
from burnish.data.collate import collate
from burnish.data.types import Batch, Example
from burnish.engine.backend import Backend, LossScale
from burnish.engine.flat import FlatAdamW
from burnish.engine.optim import build_optimizer
from burnish.engine.step import Stepper, begin_step, is_out_of_memory
from burnish.objectives.base import Loss

EXAMPLES = TinyExamples(8)


def batches(cuts: list[int]) -> list[Batch]:
    """The eight examples in micro-batches of the given sizes."""
    weight = float(EXAMPLES.weights.sum())
    found, start = [], 0
    for size in cuts:
        found.append(collate([EXAMPLES[i] for i in range(start, start + size)], step_weight=weight, last=start + size == 8))
        start += size
    return found


def stepper(policy: TinyPolicy, backend: Backend | None = None, **options: object) -> Stepper:
    backend = backend or Backend(precision="float32", cpu=True)
    optimizer = build_optimizer(policy.trainable(), Train(learning_rate=0.1, optimizer="sgd"))
    return Stepper(backend, optimizer, policy.trainable(), learning_rate=0.1, **options)  # pyright: ignore[reportArgumentType]


def gradients_of(cuts: list[int]) -> tuple[dict[str, torch.Tensor], float]:
    policy = TinyPolicy()
    steps = stepper(policy, clip=None)
    for batch in batches(cuts):
        steps.accumulate(TinyObjective()(policy, batch), batch)
    found = {name: p.grad.clone() for name, p in policy.trainable().items() if p.grad is not None}
    return found, steps.update().loss


@given(st.permutations([1, 1, 2, 4]) | st.sampled_from([[1] * 8, [4, 4], [7, 1], [2, 2, 2, 2]]))
@settings(max_examples=15, deadline=None)
def test_the_cut_into_micro_batches_changes_nothing(cuts: list[int]):
    whole, loss = gradients_of([8])
    parts, other_loss = gradients_of(list(cuts))
    assert other_loss == pytest.approx(loss, rel=1e-6)
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=1e-6, atol=1e-6 * gradient.abs().max().item())


def test_the_loss_is_the_mean_over_the_whole_steps_weight():
    policy = TinyPolicy()
    total = sum(TinyObjective()(policy, batch).sum.item() for batch in batches([8]))
    assert gradients_of([1] * 8)[1] == pytest.approx(total / float(EXAMPLES.weights.sum()), rel=1e-6)


@pytest.mark.parametrize("clip", [None, 0.05, 100.0])
def test_clipping_equals_torch(clip: float | None):
    policy, twin = TinyPolicy(), TinyPolicy()
    steps = stepper(policy, clip=clip)
    (batch,) = batches([8])
    steps.accumulate(TinyObjective()(policy, batch), batch)
    result = steps.update()

    (TinyObjective()(twin, batch).sum / batch.step_weight).backward()
    norm = torch.nn.utils.clip_grad_norm_(twin.trainable().values(), clip or math.inf)
    torch.optim.SGD(twin.trainable().values(), lr=0.1, momentum=0.9).step()
    assert result.grad_norm == pytest.approx(norm.item(), rel=1e-6)
    for name, parameter in twin.trainable().items():
        torch.testing.assert_close(policy.trainable()[name], parameter, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("clip", [None, 0.05])
def test_flat_gradients_are_clipped_the_same(clip: float | None):
    """Clipping, loss scale and update in one pass: the result is that of three."""
    policy, twin = TinyPolicy(), TinyPolicy()
    backend = Backend(precision="float32", cpu=True)
    backend.loss_scale = LossScale(1024.0)
    optimizer = FlatAdamW(policy.trainable().values(), lr=0.1, weight_decay=0.01)
    for group in optimizer.param_groups:
        group["peak_lr"] = 0.1
    steps = Stepper(backend, optimizer, policy.trainable(), learning_rate=0.1, clip=clip)
    torchs = torch.optim.AdamW(twin.trainable().values(), lr=0.1, weight_decay=0.01)
    for _ in range(3):
        for batch in batches([3, 5]):
            steps.accumulate(TinyObjective()(policy, batch), batch)
            (TinyObjective()(twin, batch).sum / batch.step_weight).backward()
        result = steps.update()
        norm = torch.nn.utils.clip_grad_norm_(twin.trainable().values(), clip or math.inf)
        torchs.step()
        torchs.zero_grad()
        assert result.grad_norm == pytest.approx(norm.item(), rel=1e-5)
    for name, parameter in twin.trainable().items():
        torch.testing.assert_close(policy.trainable()[name], parameter, rtol=1e-4, atol=1e-4)


def test_flat_gradients_that_are_not_finite_never_reach_the_optimizer():
    policy = TinyPolicy()
    optimizer = FlatAdamW([{"params": list(policy.trainable().values()), "peak_lr": 0.01}])
    steps, objective = Stepper(Backend(precision="float32", cpu=True), optimizer, policy.trainable(), learning_rate=0.01), Poison({1})
    (batch,) = batches([8])
    before: dict[str, torch.Tensor] = {}
    for number in range(3):
        steps.accumulate(objective(policy, batch), batch)
        assert steps.update().skipped == (number == 1)
        after = {name: p.detach().clone() for name, p in policy.trainable().items()}
        assert number == 0 or all(torch.equal(after[name], before[name]) == (number == 1) for name in after)
        before = after
    assert {int(state["step"]) for state in optimizer.state.values()} == {2}


def test_a_step_reports_what_it_did():
    policy = TinyPolicy()
    steps = stepper(policy, multiplier=lambda step: 1 / (step + 2))
    for batch in batches([3, 5]):
        steps.accumulate(TinyObjective()(policy, batch), batch)
    result = steps.update()
    assert (result.step, result.skipped, result.examples) == (1, False, 8)
    assert result.tokens == int(EXAMPLES.lengths.sum())
    assert result.trained_tokens == int(EXAMPLES.trained.sum())
    assert result.learning_rate == pytest.approx(0.05)
    assert result.metrics["nll"] == pytest.approx(result.loss, rel=1e-6)
    assert set(result.metrics) == {"nll", "sure"}
    assert all(p.grad is None for p in policy.trainable().values())


class Poison(TinyObjective):
    """Losses that are not finite at the given steps."""

    def __init__(self, steps: set[int]) -> None:
        self.steps, self.calls = steps, 0

    def __call__(self, policy: TinyPolicy, batch: Batch) -> Loss:
        loss = super().__call__(policy, batch)
        if self.calls in self.steps:
            loss.sum = loss.sum * math.inf
        self.calls += 1
        return loss


def test_a_gradient_that_is_not_finite_never_reaches_the_optimizer():
    policy = TinyPolicy()
    steps, objective = stepper(policy), Poison({1})
    (batch,) = batches([8])
    results, before = [], None
    for number in range(3):
        if number == 1:
            before = copy.deepcopy((policy.trainable(), steps.optimizer.state_dict()))
        steps.accumulate(objective(policy, batch), batch)
        results.append(steps.update())
        if number == 1:
            assert before is not None
            assert all(torch.equal(p, before[0][name]) for name, p in policy.trainable().items())
            assert str(before[1]) == str(steps.optimizer.state_dict())
    assert [result.skipped for result in results] == [False, True, False]
    assert steps.skipped == 1
    assert math.isfinite(results[2].loss)


def test_too_many_in_a_row_end_the_run():
    policy = TinyPolicy()
    steps, objective = stepper(policy, recovery=Recovery(patience=3)), Poison({0, 2, 3, 4})
    (batch,) = batches([8])
    for _ in range(4):
        steps.accumulate(objective(policy, batch), batch)
        steps.update()
    steps.accumulate(objective(policy, batch), batch)
    with pytest.raises(TrainingError, match=r"not finite for 3 steps in a row \(step 5: loss inf.*weights are those of step 2"):
        steps.update()


def test_overflow_in_float16_lowers_the_scale_and_does_not_count_against_the_run():
    policy, backend = TinyPolicy(), Backend(precision="float16", cpu=True)
    backend.loss_scale = LossScale(2.0**60)  # overflows until it has halved often enough
    steps = stepper(policy, backend, recovery=Recovery(patience=2))
    (batch,) = batches([8])
    results = []
    for _ in range(60):
        with backend.autocast():
            loss = TinyObjective()(policy, batch)
        steps.accumulate(loss, batch)
        results.append(steps.update())
        if not results[-1].skipped:
            break
    assert len(results) > 10
    plain, _ = gradients_of([8])
    norm = math.sqrt(sum(gradient.square().sum().item() for gradient in plain.values()))
    assert results[-1].grad_norm == pytest.approx(norm, rel=1e-2)  # the scale is out of it again


def test_the_scale_grows_after_many_good_steps():
    scale = LossScale(4.0, growth_interval=2)
    for finite in (True, True, True, False, True, True):
        scale.update(finite=finite)
    assert scale.scale == 4.0 * 2 / 2 * 2


def test_forgotten_micro_batches_are_noticed():
    policy = TinyPolicy()
    steps = stepper(policy)
    first, _ = batches([3, 5])
    steps.accumulate(TinyObjective()(policy, first), first)
    with pytest.raises(TrainingError, match=r"weigh .* together, expected the announced"):
        steps.update()


def test_an_update_of_nothing_is_an_error():
    with pytest.raises(TrainingError, match="weigh 0 together"):
        stepper(TinyPolicy()).update()


def test_a_step_must_train_something():
    policy = TinyPolicy()
    masked = Example(EXAMPLES[0].input_ids, EXAMPLES[0].weights * 0)
    batch = collate([masked], step_weight=0.0)
    with pytest.raises(TrainingError, match=r"total weight of 0\.0"):
        stepper(policy).accumulate(TinyObjective()(policy, batch), batch)


def test_a_loss_that_depends_on_nothing_trained_is_an_error():
    policy = TinyPolicy()
    (batch,) = batches([8])
    with pytest.raises(TrainingError, match="depends on no trained parameter"):
        stepper(policy).accumulate(Loss(torch.tensor(1.0)), batch)


def test_a_placeholder_adds_nothing():
    policy = TinyPolicy()
    steps = stepper(policy)
    (batch,) = batches([8])
    empty = collate([], step_weight=batch.step_weight)
    steps.accumulate(Loss(torch.tensor(0.0)), empty)
    steps.accumulate(TinyObjective()(policy, batch), batch)
    result = steps.update()
    assert result.loss == pytest.approx(gradients_of([8])[1])
    assert result.tokens == len(batch.input_ids) and result.examples == batch.examples


def test_state_goes_in_and_out():
    backend = Backend(precision="float16", cpu=True)
    steps = stepper(TinyPolicy(), backend)
    state = {"step": 7, "skipped": 2, "skipped_in_a_row": 1, "loss_scale": [8.0, 5]}
    steps.restore(state)
    assert steps.state() == state


class Meeting:
    """Collectives of ranks that are threads. They must come in the same order on all."""

    def __init__(self, world: int) -> None:
        self.barrier = threading.Barrier(world, timeout=20)
        self.said: list[tuple[str, Any]] = [("", None)] * world


class Rank:
    """What `begin_step` asks of a backend."""

    device = torch.device("cpu")
    coupled = False

    def __init__(self, meeting: Meeting, rank: int, world: int) -> None:
        self.meeting, self.rank, self.world_size = meeting, rank, world

    def autocast(self) -> nullcontext[None]:
        return nullcontext()

    def compute(self, call: Callable[[], Any]) -> Any:
        return call()

    def meet(self, what: str, value: Any) -> list[Any]:
        self.meeting.said[self.rank] = (what, value)
        self.meeting.barrier.wait()
        said = list(self.meeting.said)
        self.meeting.barrier.wait()
        assert {name for name, _ in said} == {what}
        return [value for _, value in said]

    def any(self, flag: bool) -> bool:
        return any(self.meet("any", flag))

    def sums(self, values: dict[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
        return {key: (sum(one[key][0] for one in self.meet("sums", values)), 0.0) for key in ("kl",)}


class Sums:
    """An objective with two sums over the ranks, of which one rank has no memory before the sum `place`, or before none."""

    needs_reference = False

    def __init__(self, place: int | None) -> None:
        self.place = place

    def begin_step(self, policy: Any, batches: Any, totals: Any) -> None:
        for number in range(3):
            if number == self.place:
                raise torch.OutOfMemoryError("CUDA out of memory")
            if number < 2:
                assert totals({"kl": (1.0, 1.0)})["kl"][0] == 3.0

    def __call__(self, policy: Any, batch: Any) -> Loss:
        raise AssertionError


@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_memory_that_runs_out_before_the_losses_of_a_step_has_run_out_on_all_ranks(place: int):
    """A rank that gave up between two sums would leave the others in the next one."""
    meeting, ended = Meeting(3), ["" for _ in range(3)]

    def work(rank: int) -> None:
        try:
            begin_step([], Sums(place if rank == 1 else None), None, Rank(meeting, rank, 3))  # pyright: ignore[reportArgumentType]
            ended[rank] = "went well"
        except Exception as error:
            ended[rank] = "no memory" if is_out_of_memory(error) else repr(error)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert ended == ["went well" if place == 3 else "no memory"] * 3
