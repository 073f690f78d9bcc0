"""Random numbers depend on seed, step and micro-step, and on nothing else."""

import json
import random

import numpy as np
import torch

from halfbyte.train.rng import generator_states, restore_generators, seed_micro_step


def draw(*place):
    seed_micro_step(*place)
    return random.random(), np.random.rand(), torch.rand(1).item()


def test_same_place_same_numbers_whatever_was_drawn_before():
    first = draw(42, 3, 1)
    torch.rand(100), random.random(), np.random.rand(7)
    assert draw(42, 3, 1) == first


def test_every_place_has_numbers_of_its_own():
    places = [
        (seed, step, micro) for seed in (0, 1, 42) for step in range(20) for micro in range(4)
    ]
    for position in range(3):
        assert len({draw(*place)[position] for place in places}) == len(places)


def test_numbers_stay_the_same_between_versions():
    """A checkpoint of today must resume with the same dropout masks."""
    assert draw(42, 3, 1) == (0.3294007356161681, 0.8310262491558609, 0.7427210807800293)


def test_saved_generators_go_on_where_they_were():
    seed_micro_step(1, 2, 3)
    random.gauss(0, 1)  # leaves a second value for later
    states = json.loads(json.dumps(generator_states()))

    def go_on():
        return random.gauss(0, 1), np.random.normal(), torch.rand(3).tolist()

    expected = go_on()
    go_on()
    restore_generators(states)
    assert go_on() == expected
