"""Devices, precisions, memory, and optional dependencies."""

import os
import subprocess
import sys
import textwrap
import unittest

import torch

from mingpt import utils
from tests.common import ROOT


class TestDevices(unittest.TestCase):
    def test_a_device_by_name(self):
        self.assertEqual(utils.pick_device("cpu").type, "cpu")

    def test_on_a_cpu_the_precision_is_fp32(self):
        self.assertEqual(utils.pick_precision("auto", torch.device("cpu")), "fp32")

    def test_an_unknown_precision(self):
        with self.assertRaisesRegex(ValueError, "precision='int4'"):
            utils.pick_precision("int4", torch.device("cpu"))


class TestExtras(unittest.TestCase):
    def test_a_missing_extra(self):
        message = (
            r"no_such_module is not installed; it comes with: pip install -e '\.\[projects\]'"
        )
        with self.assertRaisesRegex(ImportError, message):
            utils.import_extra("no_such_module", "projects")


class TestMemory(unittest.TestCase):
    def test_the_peak_rises_with_what_is_allocated_and_does_not_fall(self):
        # in a process of its own: the peak of this one may be far above what it holds now
        script = textwrap.dedent("""
            from mingpt.utils import peak_memory_mb

            before = peak_memory_mb()
            block = b"x" * (200 * 2**20)
            during = peak_memory_mb()
            del block
            print(during - before, peak_memory_mb() - before)
        """)
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        run = subprocess.run(
            [sys.executable, "-c", script],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        during, after = map(float, run.stdout.split())
        self.assertAlmostEqual(during, 200, delta=20)
        self.assertAlmostEqual(after, 200, delta=20)


class TestMinGPTsNames(unittest.TestCase):
    def test_its_scripts_import_these_from_here(self):
        for name in ("set_seed", "setup_logging", "CfgNode"):
            self.assertTrue(hasattr(utils, name), name)
