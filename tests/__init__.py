"""A package, so that `python -m unittest tests.test_x` finds its modules.

A Trainer shows its progress on the console of a program that has not set up logging. The tests'
output stays readable with a handler that drops the lines.

Most models here are tiny, and a product of small matrices takes longer on several threads than on
one. So the tests use one, and so do the scripts that they start.
"""

import logging
import os

import torch

logging.getLogger("mingpt").addHandler(logging.NullHandler())

os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)
