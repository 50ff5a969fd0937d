"""Random calls over the whole API: see tests/fuzz.py."""

import contextlib
import io
import random
import unittest

import numpy as np
import torch

from tests import fuzz
from tests.fuzz import Plan, fuzz_one

CALLS = 1500  # by hand: python -m tests.fuzz --calls 10000 --seed 1
SEED = 20


def close_to_three(result):
    assert result == 3


class TestFuzz(unittest.TestCase):
    def setUp(self):
        # The calls seed all generators.
        states = random.getstate(), np.random.get_state(), torch.get_rng_state()
        self.addCleanup(random.setstate, states[0])
        self.addCleanup(np.random.set_state, states[1])
        self.addCleanup(torch.set_rng_state, states[2])

    def test_every_answer_is_right_and_every_error_is_documented(self):
        outcomes = list(fuzz.fuzz(CALLS, SEED))
        failures = [fuzz.show_failure(x) for x in outcomes if x.outcome in fuzz.FAILURES]
        self.assertEqual("\n".join(failures), "")
        # It has both asked and refused, in all parts of the library.
        self.assertGreater(sum(x.outcome == "right" for x in outcomes), CALLS // 3)
        self.assertGreater(sum(x.outcome == "documented" for x in outcomes), CALLS // 4)
        self.assertGreater(len({x.function for x in outcomes}), 80)

    def test_a_call_is_made_again_by_its_number(self):
        [third] = fuzz.fuzz(1, SEED, first=2)
        self.assertEqual(third.lines, list(fuzz.fuzz(3, SEED))[2].lines)

    def test_the_fuzzer_sees_what_is_wrong(self):
        """Each kind of failure, from functions that have it."""
        kinds = {
            "right": ("(lambda x: x + 1)", {}),
            "wrong": ("(lambda x: x + 2)", {}),
            "refused": ("(lambda x: [][x])", {}),
            "silent": ("(lambda x: 3)", {"_1x": ["9"]}),
            "undocumented": ("(lambda x: [][x])", {"_1x": ["9"]}),
            "mute": ("(lambda x: int('?'))", {"_1x": ["98765"]}),
            "documented": ("(lambda x: int(f'{x}?'))", {"_1x": ["98765"]}),
        }
        for outcome, (function, wrong) in kinds.items():
            plan = Plan(function, {"_1x": "2"}, lambda result, x: close_to_three(result), wrong)
            with self.subTest(outcome):
                self.assertEqual(self.outcome_of(plan, spoil=bool(wrong)), outcome)

    def test_an_argument_that_changes_is_seen(self):
        plan = Plan("(lambda x: x.zero_())", {"_1x": "torch.ones(2)"}, lambda result, x: None)
        self.assertEqual(self.outcome_of(plan, spoil=False), "wrong")

    def outcome_of(self, plan, spoil):
        """What becomes of a plan, tried until it is spoilt or not."""
        name = "a plan of this test"
        fuzz.GENERATORS[name] = (lambda draw: plan, 0.0)
        self.addCleanup(fuzz.GENERATORS.pop, name, None)
        for number in range(50):
            result = fuzz_one(name, SEED, number)
            if ("9" in result.lines[-1]) == spoil:
                return result.outcome
        return None

    def test_the_command_line_prints_counts_and_failures(self):
        with contextlib.redirect_stdout(io.StringIO()) as console:
            self.assertEqual(fuzz.main(["--calls", "5", "--seed", "3", "--only", "masked"]), 0)
        self.assertIn("0 failures in 5 calls", console.getvalue())
        self.assertIn("| **all** | **5** |", console.getvalue())


if __name__ == "__main__":
    unittest.main()
