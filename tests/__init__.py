"""A package, so that `python -m unittest tests.test_x` finds its modules.

A Trainer shows its progress on the console of a program that has not set up logging. The tests'
output stays readable with a handler that drops the lines.
"""

import logging

logging.getLogger("mingpt").addHandler(logging.NullHandler())
