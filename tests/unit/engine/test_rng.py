"""Random states in and out."""

import json
import random

import numpy as np
import torch

from burnish.engine import rng
from burnish.engine.checkpoint import flatten, unflatten


def draw() -> tuple[float, float, float, float]:
    return random.gauss(0, 1), float(np.random.normal()), torch.rand(()).item(), random.random()


def test_states_survive_json_and_come_back():
    draw()  # an odd number of normal draws leaves one in reserve, which is part of the state
    state = rng.capture()
    first = draw()
    structure, tensors = flatten(state)
    rng.restore(unflatten(json.loads(json.dumps(structure)), tensors))
    assert draw() == first


def test_untouched():
    rng.restore(rng.capture())
    state = rng.capture()
    expected = draw()
    rng.restore(state)
    with rng.untouched():
        draw()
    assert draw() == expected
