"""Options: the tree, the command line, and the checks of numbers."""

import contextlib
import copy
import io
import math
import unittest

import numpy as np

from mingpt.config import CfgNode, check_numbers, documented, parse_args
from mingpt.model import GPT
from mingpt.rlhf import PPOTrainer
from mingpt.trainer import Trainer


def example():
    return CfgNode(
        seed=1,
        name="x",
        rate=0.5,
        flag=False,
        betas=(0.9, 0.95),
        free=None,
        model={"n_layer": 2},
    )


@documented
def make_config():
    """Options of an example."""
    C = CfgNode()
    C.seed = 1            # of all random
                          # numbers
    C.silent = True
    # How fast it learns.
    # In two lines.
    C.rate = C.other = 0.5  # per step

    C.model = CfgNode(
        n_layer=2,  # blocks
        n_head=3,
    )
    C.model.size = 4      # in metres
    C.trainer = Trainer.get_default_config()
    C.trainer.max_iters = 7
    C.trainer.batch_size = 3  # of ours
    del C.silent
    return C


class TestMeanings(unittest.TestCase):
    """The comments beside the defaults say what options mean."""

    def setUp(self):
        self.lines = str(make_config()).splitlines()

    def line(self, start):
        [line] = [line for line in self.lines if line.startswith(start)]
        return line

    def assert_meaning(self, option, meaning):
        self.assertRegex(self.line(option), f"  # {meaning}$")

    def test_a_comment_may_continue_below_itself(self):
        self.assert_meaning("seed = 1", "of all random numbers")
        self.assertNotIn("# numbers", self.lines)

    def test_a_comment_behind_two_defaults(self):
        self.assert_meaning("rate = 0.5", "per step")
        self.assert_meaning("other = 0.5", "per step")

    def test_a_comment_in_a_section(self):
        self.assert_meaning("model.size = 4", "in metres")

    def test_a_comment_behind_an_argument(self):
        [line] = [x for x in str(GPT.get_default_config()).splitlines() if x.startswith("n_layer")]
        self.assertRegex(line, "  # number of blocks$")

    def test_an_option_without_a_comment_has_no_meaning(self):
        self.assertEqual(self.line("model.n_head"), "model.n_head = 3")

    def test_comment_lines_above_are_a_heading(self):
        heading = self.lines.index("# How fast it learns. In two lines.")
        self.assertTrue(self.lines[heading + 1].startswith("rate = 0.5"))

    def test_a_section_keeps_the_meanings_of_the_function_that_made_it(self):
        self.assert_meaning("trainer.max_iters = 7", "stop after this many iterations")

    def test_a_comment_of_the_script_comes_before_that_of_the_section(self):
        self.assert_meaning("trainer.batch_size = 3", "of ours")

    def test_copies_keep_them_and_they_are_no_options(self):
        config = make_config()
        self.assertEqual(str(copy.deepcopy(config)), str(config))
        self.assertEqual(list(config.to_dict()), ["seed", "rate", "other", "model", "trainer"])

    def test_every_option_of_the_library_has_one(self):
        for source in (GPT, Trainer, PPOTrainer):
            for line in str(source.get_default_config()).splitlines():
                self.assertRegex(line, "# .+")

    def test_help_shows_them(self):
        self.assertIn("max_new_tokens = 64", PPOTrainer.get_default_config.__doc__)
        self.assertIn("# tokens in a completion", PPOTrainer.get_default_config.__doc__)
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), self.assertRaises(SystemExit):
            parse_args(make_config(), ["--help"], "about")
        self.assertRegex(printed.getvalue(), r"\n  --seed=1 +# of all random numbers\n")


class TestTree(unittest.TestCase):
    def setUp(self):
        self.config = example()

    def test_a_dict_becomes_a_subtree(self):
        self.assertEqual(self.config.model.n_layer, 2)

    def test_as_a_dict_and_back(self):
        self.assertEqual(self.config, CfgNode(**self.config.to_dict()))

    def test_as_text(self):
        self.assertIn("model.n_layer = 2", str(self.config))

    def test_merging_a_dict_adds_new_options(self):
        self.config.merge_from_dict({"new": 3})
        self.assertEqual(self.config.new, 3)


class TestCommandLine(unittest.TestCase):
    def setUp(self):
        self.config = example()

    def test_command_line(self):
        self.config.merge_from_args(
            [
                "--seed=7",
                "--name=12",
                "--rate=1",
                "--flag=True",
                "--free=out/a=b",
                "--model.n_layer=3",
                "--betas=(0.5, 0.6)",
            ]
        )
        expected = CfgNode(
            seed=7,
            name="12",
            rate=1.0,
            flag=True,
            betas=(0.5, 0.6),
            free="out/a=b",
            model={"n_layer": 3},
        )
        self.assertEqual(self.config, expected)
        self.assertIsInstance(self.config.rate, float)

    def test_values_after_a_space_and_a_bare_flag(self):
        self.config.merge_from_args(["--seed", "7", "--flag", "--free", "85+50"])
        self.assertEqual(self.config.seed, 7)
        self.assertIs(self.config.flag, True)
        self.assertEqual(self.config.free, "85+50")

    def test_mistakes_are_named(self):
        for arg, message in (
            ("--sed=1", r"unknown option --sed; did you mean --seed\?"),
            ("--model.n_layers=1", r"did you mean --model\.n_layer\?"),
            ("--zzzzzz=1", "--help lists all"),
            ("seed=1", "not of the form --option=value"),
            ("--seed", "not of the form"),
            ("--seed=1.5", "must be of type int"),
            ("--flag=1", "must be of type bool"),
            ("--seed=True", "must be of type int"),
            ("--rate=fast", "must be of type float"),
        ):
            with self.subTest(arg), self.assertRaisesRegex(ValueError, message):
                self.config.merge_from_args([arg])

    def test_help_prints_every_option_and_exits(self):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), self.assertRaises(SystemExit) as stop:
            parse_args(self.config, ["--seed=7", "--help"], about="What this script does.")
        self.assertEqual(stop.exception.code, 0)
        self.assertIn("What this script does.", printed.getvalue())
        for name, value in example().leaves():
            self.assertIn(f"--{name}={value}\n", printed.getvalue())


class TestCheckNumbers(unittest.TestCase):
    def refuses(self, message, value, **limits):
        with self.assertRaisesRegex(ValueError, message):
            check_numbers(CfgNode(rate=value), "rate", **limits)

    def test_numbers_of_any_kind_in_the_range(self):
        for value in (0, 1, 0.5, np.float32(0.5), np.int64(1)):
            check_numbers(CfgNode(rate=value), "rate", low=0, high=1)

    def test_numbers_outside_the_range(self):
        self.refuses(r"rate=-1 must be a number in \[0, 1\]", -1, high=1)
        self.refuses(r"rate=1\.5 must be a number in \[0, 1\]", 1.5, high=1)

    def test_no_infinity_and_no_nan(self):
        for value in (math.inf, -math.inf, math.nan):
            self.refuses(f"rate={value!r}", value, low=-math.inf)

    def test_no_text_and_no_truth_values(self):
        for value in ("1", True, None):
            self.refuses(f"rate={value!r}", value)

    def test_whole_numbers(self):
        check_numbers(CfgNode(rate=np.int64(3)), "rate", whole=True)
        self.refuses("rate=3.0 must be a whole number", 3.0, whole=True)

    def test_optional_numbers(self):
        check_numbers(CfgNode(rate=None), "rate", optional=True)
        self.refuses("rate='1' must be a number .* or None", "1", optional=True)

    def test_the_first_wrong_option_is_named(self):
        with self.assertRaisesRegex(ValueError, "b=-1"):
            check_numbers(CfgNode(a=1, b=-1, c=-2), "a", "b", "c")


