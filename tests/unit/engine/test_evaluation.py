"""What follows from an eval loss. (How it is computed is in test_loop.py, on whole runs.)"""

import math

import pytest
from tests.unit.engine.conftest import TinyExamples, TinyObjective, TinyPolicy

from burnish.config.sections import Evaluation, Train
from burnish.data.loader import eval_batches
from burnish.engine.backend import Backend
from burnish.engine.evaluation import evaluate, judge
from burnish.engine.events import State
from burnish.engine.optim import build_optimizer


def told(losses: list[float], **settings: object) -> State:
    state = State(total=100)
    for state.step, loss in enumerate(losses, start=1):
        judge(state, loss, Evaluation.model_validate(settings))
        if state.stop:
            break
    return state


def test_the_lowest_is_the_best():
    state = told([3.0, 2.0, 2.5])
    assert (state.best_step, state.best_loss, state.stop) == (2, 2.0, None)


def test_patience():
    assert told([3.0, 3.1, 3.2, 2.0], patience=2).step == 3
    assert told([3.0, 3.1, 2.9, 3.2], patience=2).stop is None


def test_a_small_improvement_is_the_best_but_does_not_renew_the_patience():
    state = told([3.0, 2.95, 2.91], patience=2, min_delta=0.1)
    assert (state.best_step, state.step) == (3, 3)
    assert state.stop is not None


def test_small_improvements_that_add_up_do():
    assert told([3.0, 2.95, 2.89, 2.85], patience=2, min_delta=0.1).stop is None


@pytest.mark.parametrize("micro_batch_tokens", [12, 30, 1000])
def test_the_cut_into_batches_changes_nothing(micro_batch_tokens: int):
    policy = TinyPolicy(dropout=0.5)
    backend = Backend(precision="float32", cpu=True)
    optimizer = build_optimizer(policy.trainable(), Train())
    batches = eval_batches(TinyExamples(9), micro_batch_tokens)
    found = evaluate(policy, TinyObjective(), batches, backend=backend, optimizer=optimizer)
    assert found is not None
    assert found["eval_loss"] == pytest.approx(3.6058964, rel=1e-6)
    assert found["eval_perplexity"] == pytest.approx(math.exp(found["eval_loss"]))
    assert policy.model.training  # back in training mode


def test_a_cancelled_evaluation_says_nothing():
    policy = TinyPolicy()
    backend = Backend(precision="float32", cpu=True)
    optimizer = build_optimizer(policy.trainable(), Train())
    asked = iter([False, True])
    batches = eval_batches(TinyExamples(9), 12)
    assert evaluate(policy, TinyObjective(), batches, backend=backend, optimizer=optimizer, cancelled=lambda: next(asked)) is None
    assert policy.model.training
