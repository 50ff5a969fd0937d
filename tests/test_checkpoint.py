"""Files that are complete or not there, strict JSON, and the states of random generators."""

import json
import math
import os
import random
import subprocess
import sys
import textwrap
import time
import unittest

import numpy as np
import psutil
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
from tests.common import ROOT, TempDirTestCase


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


class TestWorkers(TempDirTestCase):
    SCRIPT = """
        import os, time
        from pathlib import Path
        from torch.utils.data import DataLoader
        from mingpt.checkpoint import follow_the_parent

        class Slow:
            def __len__(self):
                return 8
            def __getitem__(self, i):
                Path(f"{os.getpid()}.worker").touch()
                time.sleep(600)

        if __name__ == "__main__":
            next(iter(DataLoader(Slow(), num_workers=2, worker_init_fn=follow_the_parent)))
        """

    def test_workers_end_with_a_parent_that_is_killed(self):
        script = self.folder / "script.py"
        script.write_text(textwrap.dedent(self.SCRIPT))
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        parent = subprocess.Popen([sys.executable, script], cwd=self.folder, env=environment)
        self.addCleanup(parent.kill)
        # Both workers are in the middle of an example that takes ten minutes.
        self.wait_until(lambda: len(list(self.folder.glob("*.worker"))) == 2)
        workers = [int(path.stem) for path in self.folder.glob("*.worker")]
        self.assertTrue(all(map(is_alive, workers)))
        parent.kill()
        parent.wait()
        self.wait_until(lambda: not any(map(is_alive, workers)))

    def wait_until(self, condition):
        """Wait up to two minutes, on a machine that may be busy."""
        for _ in range(1200):
            if condition():
                return
            time.sleep(0.1)
        self.fail("it never happened")


def is_alive(pid):
    """Whether a process runs. (One that has ended may still wait for somebody to ask how.)"""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
