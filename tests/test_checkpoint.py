"""Files that are complete or not there, strict JSON, and the states of random generators."""

import json
import math
import os
import random
import unittest

import numpy as np
import torch

from mingpt.checkpoint import (
    atomic_write,
    get_rng_state,
    save_torch,
    set_rng_state,
    to_json,
    write_text,
)
from mingpt.utils import set_seed
from tests.common import TempDirTestCase


class TestFiles(TempDirTestCase):
    def test_a_write_is_whole_or_not_at_all(self):
        path = self.folder / "deep" / "file"
        write_text(path, "old")
        with self.assertRaises(OSError), atomic_write(path) as f:
            f.write(b"half of the ne")
            raise OSError("no space left on device")
        self.assertEqual(path.read_text(), "old")
        self.assertEqual(os.listdir(path.parent), ["file"])


class TestJson(unittest.TestCase):
    def test_what_json_can_hold_comes_back(self):
        value = {"text": "ü \u2028 😀", "numbers": [1, 2.5, True, None], "nested": {"a": (1, 2)}}
        self.assertEqual(json.loads(to_json(value)), {**value, "nested": {"a": [1, 2]}})

    def test_nan_and_infinity_become_null(self):
        value = {"loss": math.nan, "rows": [{"kl": math.inf}, (-math.inf, np.float64("nan"))]}
        self.assertEqual(to_json(value), '{"loss": null, "rows": [{"kl": null}, [null, null]]}')


def draw():
    """A number of each generator that set_seed seeds."""
    return random.random(), np.random.rand(), torch.rand(()).item()


class TestRandomStates(TempDirTestCase):
    def test_a_seed_gives_the_same_numbers(self):
        set_seed(3)
        first = draw()
        set_seed(3)
        self.assertEqual(draw(), first)

    def test_state_of_all_generators_comes_back(self):
        set_seed(3)
        draw()
        state = get_rng_state()
        expected = draw()
        set_rng_state(state)
        self.assertEqual(draw(), expected)

    def test_the_state_loads_safely_from_a_file(self):
        set_seed(3)
        np.random.randn()  # NumPy draws two of these at once and keeps the second in its state
        save_torch(self.folder / "state.pt", get_rng_state())
        expected = np.random.randn(), draw()
        set_rng_state(torch.load(self.folder / "state.pt", weights_only=True))
        self.assertEqual((np.random.randn(), draw()), expected)
