"""Each recipe of RECIPES.md runs as it stands, in an empty folder, and prints what it says."""

import contextlib
import functools
import io
import os
import re
import subprocess
import sys
import unittest
from pathlib import Path

import torch

from mingpt.bpe import BPETokenizer
from mingpt.model import GPT
from mingpt.rlhf import RewardModel
from tests.common import ROOT, TempDirTestCase

NUMBER = r"-?\d+(?:\.\d+)?"


@functools.cache
def section(number):
    """The text of one recipe, without its title."""
    page = (ROOT / "RECIPES.md").read_text(encoding="utf-8")
    [found] = re.findall(rf"^## {number}\. .*?\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
    return found


def block(number, language):
    """The one block of a recipe in this language."""
    [found] = re.findall(rf"^```{language}\n(.*?)^```", section(number), re.MULTILINE | re.DOTALL)
    return found


def numbers(text):
    """All numbers in a text."""
    return [float(number) for number in re.findall(NUMBER, text)]


def without_numbers(text):
    return re.sub(NUMBER, "0", text)


class RecipeTestCase(TempDirTestCase):
    """Runs recipes in a folder of their own."""

    def setUp(self):
        super().setUp()
        self.enterContext(contextlib.chdir(self.folder))

    def run_recipe(self, number):
        """Run a recipe's block; returns (its variables, what it printed)."""
        # Compiled like a module of its own: it must not inherit what this file imports.
        code = compile(block(number, "python"), f"recipe {number}", "exec", dont_inherit=True)
        names = {"__name__": "__main__"}
        with (
            contextlib.redirect_stdout(io.StringIO()) as console,
            contextlib.redirect_stderr(io.StringIO()),
        ):
            exec(code, names)
        return names, console.getvalue()

    def check_words(self, number, printed):
        """What was printed is what the page says, but for the numbers, which may differ."""
        self.assertEqual(without_numbers(printed), without_numbers(block(number, "text")))


class TestRecipes(RecipeTestCase):
    def test_1_from_a_tokenizer_of_your_own_to_transformers(self):
        names, printed = self.run_recipe(1)
        self.check_words(1, printed)
        # What was read back at the end is a model and a tokenizer of this library, and they fit.
        self.assertIsInstance(names["model"], GPT)
        self.assertIsInstance(names["tokenizer"], BPETokenizer)
        self.assertEqual(names["tokenizer"].decode(names["ids"]), names["text"])

    def test_2_fine_tuning_on_json_lines(self):
        _, printed = self.run_recipe(2)
        self.check_words(2, printed)
        right, of_all = numbers(printed.splitlines()[-1])
        self.assertGreater(right, 0.9 * of_all)

    def test_3_a_reward_model_and_its_held_out_accuracy(self):
        names, printed = self.run_recipe(3)
        self.check_words(3, printed)
        accuracies = [numbers(line)[1] for line in printed.splitlines()]
        # One comparison in ten is wrong, so that no model gets all of them.
        self.assertGreater(accuracies[-1], 0.75)
        reloaded = RewardModel.from_pretrained("reward_model").state_dict()
        trained = {name: x.cpu() for name, x in names["reward_model"].state_dict().items()}
        torch.testing.assert_close(reloaded, trained, rtol=0, atol=0)

    def test_4_ppo_with_a_gold_answer(self):
        _, printed = self.run_recipe(4)
        self.check_words(4, printed)
        before, after = numbers(printed)
        self.assertLess(before, 0.4)  # one token of six is right
        self.assertGreater(after, 0.8)

    def test_5_grpo_with_two_rewards(self):
        _, printed = self.run_recipe(5)
        self.check_words(5, printed)
        first, last = (numbers(line) for line in printed.splitlines())
        for _, correct, brief, reward in (first, last):
            # The weights are 1 and 0.1; the numbers on the page have two decimals.
            self.assertAlmostEqual(reward, correct + 0.1 * brief, delta=0.011)
        self.assertGreater(last[1], 0.8)
        self.assertGreater(last[3], first[3] + 0.3)

    def test_6_a_policy_of_your_own(self):
        names, printed = self.run_recipe(6)
        self.check_words(6, printed)
        before, after = numbers(printed)
        self.assertLess(before, 0.3)
        self.assertGreater(after, 0.6)
        # Its log_probs and its generate agree, or the update would have started somewhere else.
        self.assertLess(names["trainer"].metrics["log_prob_error"], 1e-4)

    def test_7_streaming(self):
        names, printed = self.run_recipe(7)
        written, count = printed.splitlines()
        self.assertEqual(written, block(7, "text").splitlines()[0])
        tokens, pieces = numbers(count)
        self.assertEqual(tokens, len(names["ids"]))
        self.assertLess(pieces, tokens)  # some characters are several tokens

    def test_8_tensorboard_or_any_other_tracker(self):
        names, printed = self.run_recipe(8)
        self.check_words(8, printed)
        names["trainer"].folder.writer.close()
        losses = [numbers(line)[1] for line in printed.splitlines()[:-1]]
        self.assertLess(losses[-1], losses[0] / 2)

    def test_9_two_processes(self):
        Path("train.py").write_text(block(9, "python"), encoding="utf-8")
        # The page's command, with the Python that runs this test.
        program, *arguments = block(9, "bash").split()
        self.assertEqual(program, "torchrun")
        result = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", *arguments],
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=300,
        )
        self.assertEqual(result.returncode, 0, result.stderr)
        self.check_words(9, result.stdout)
        processes, loss = numbers(result.stdout)
        self.assertEqual(processes, 2)
        self.assertLess(loss, 0.5)
        GPT.from_pretrained("model")

    def test_10_what_the_last_rollout_said(self):
        names, printed = self.run_recipe(10)
        *shown, count = printed.splitlines()
        self.assertEqual(len(shown), 3)
        for line, expected in zip(shown, block(10, "text").splitlines(), strict=False):
            # The completion is what was sampled, and is left out of the comparison.
            bare, expected = (re.sub("'.*?'", "''", text) for text in (line, expected))
            self.assertEqual(without_numbers(bare), without_numbers(expected))
        self.assertEqual(numbers(count), [6, 30])
        # The file's last rows are the first samples of the last rollout.
        last_samples = [{"iter": 30, **row} for row in names["trainer"].samples(2)]
        self.assertEqual(names["rows"][-2:], last_samples)

    def test_11_how_good_is_a_policy(self):
        names, printed = self.run_recipe(11)
        lines = printed.splitlines()
        expected = block(11, "text").splitlines()
        self.assertEqual(len(lines), len(expected))
        for line, said in zip(lines[1:], expected[1:], strict=True):
            self.assertEqual(without_numbers(line), without_numbers(said))
        # Cut before the stop string.
        self.assertNotIn(".", "".join(names["ours"].texts))
        ours, theirs = numbers(lines[1])
        self.assertGreater(ours, theirs + 0.5)
        # As expected, best-of-n lies between the reference and the highest reward there is.
        best, played, _ = numbers(lines[4])[1:]
        self.assertGreater(best, theirs)
        self.assertAlmostEqual(best, played, delta=0.4)

    def test_12_conversations_of_several_turns(self):
        names, printed = self.run_recipe(12)
        # The last answer is only right for a model that has read the first turn.
        self.assertEqual(printed, block(12, "text"))
        # The loss is on the assistant's turns and their ends.
        _, targets = names["data"][0]
        learned = names["chat"].decode([i for i in targets.tolist() if i >= 0])
        self.assertEqual(learned, "Me too!<|endoftext|>You like cats.<|endoftext|>")

    def test_13_pre_training_on_a_text(self):
        names, printed = self.run_recipe(13)
        losses = numbers(printed.splitlines()[0])
        self.assertEqual(losses, sorted(losses, reverse=True))
        self.assertLess(losses[-1], 2.6)
        # The targets are the text itself, one token ahead.
        x, y = names["train_data"][3]
        self.assertEqual(names["tokenizer"].decode(y), names["text"][97:129])
        self.assertEqual(x[1:].tolist(), y[:-1].tolist())


class TestPage(unittest.TestCase):
    def test_every_recipe_has_its_test(self):
        page = (ROOT / "RECIPES.md").read_text(encoding="utf-8")
        recipes = re.findall(r"^## (\d+)\.", page, re.MULTILINE)
        tests = [name for name in dir(TestRecipes) if re.match(r"test_\d+_", name)]
        tested = [re.match(r"test_(\d+)_", name)[1] for name in tests]
        self.assertEqual(sorted(recipes, key=int), sorted(tested, key=int))

    def test_the_table_links_to_every_recipe(self):
        page = (ROOT / "RECIPES.md").read_text(encoding="utf-8")
        anchors = []
        for title in re.findall(r"^## (.*)$", page, re.MULTILINE):
            anchors.append(re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-"))
        self.assertEqual(re.findall(r"\]\(#(.*?)\)", page), anchors)

    def test_lines_are_no_longer_than_100_columns(self):
        page = (ROOT / "RECIPES.md").read_text(encoding="utf-8")
        self.assertEqual([line for line in page.splitlines() if len(line) > 100], [])
