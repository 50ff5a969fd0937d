"""What README.md and RLHF.md tell the reader is so: code runs, names and paths exist."""

import re
import tempfile
import unittest
from pathlib import Path
from unittest import mock

import torch

from mingpt.rlhf import ALGORITHMS, PPOTrainer, clip_bounds
from mingpt.utils import set_seed
from tests.common import ROOT, tiny_gpt
from tests.test_ppo import ppo_trainer
from tests.tiny_chat import write_tiny_chat


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


class TestReadme(unittest.TestCase):
    def run_example(self, word):
        """Run the README's one example that contains the word; returns its variables."""
        set_seed(0)
        examples = re.findall(r"```python\n(.*?)```", read("README.md"), re.DOTALL)
        [code] = [example for example in examples if word in example]
        names = {"print": lambda *things, **options: None}
        exec(code, names)
        return names

    def test_library_example(self):
        names = self.run_example("sevens")
        prompts = torch.tensor([[5]] * 100)
        written = names["model"].generate(prompts, 8, do_sample=True)
        # PPO has taught it to walk to the sevens: a free walk from 5 spends 0.11 of its time there.
        self.assertGreater((written == 7).float().mean().item(), 0.3)
        # And it still walks: up or down by one, modulo 10.
        steps = (written[:, 1:] - written[:, :-1]) % 10
        is_step = (steps == 1) | (steps == 9)
        self.assertGreater(is_step.float().mean().item(), 0.9)

    def test_grpo_with_checked_answers(self):
        names = self.run_example("grpo")
        trainer = names["trainer"]
        self.assertEqual(trainer.iter_num, 2)
        [sample] = trainer.samples(1)
        self.assertIn(sample["prompt"], {row["prompt"] for row in names["prompts"]})

    def test_comparisons_and_demonstrations(self):
        names = self.run_example("demonstrations")
        chosen, rejected = (names["tokenizer"](f"Say hi:{answer}") for answer in (" hi!", " no."))
        log_probs = [names["model"].log_probs(idx).sum().item() for idx in (chosen, rejected)]
        self.assertGreater(log_probs[0], log_probs[1])

    def test_conversations(self):
        names = self.run_example("CHATML")
        self.assertEqual(names["learned"], "42, I think.<|im_end|>")
        self.assertTrue(names["chat"].decode(names["prompt"]).endswith("<|im_start|>assistant\n"))
        self.assertEqual(len(names["data"]), 1)

    def test_a_real_model(self):
        # A tiny random model stands for the one that pip would fetch.
        folder = Path(self.enterContext(tempfile.TemporaryDirectory()))
        model = Path(write_tiny_chat(folder))
        with mock.patch("mingpt.gguf.smollm2", return_value=model):
            names = self.run_example("capital of France")
        prompt = names["chat"].decode(names["idx"][0])
        self.assertIn("What is the capital of France?<|im_end|>", prompt)
        self.assertEqual(names["token"].shape, (1, 1))

    def test_paths_exist(self):
        for readme in (ROOT / "README.md", ROOT / "RLHF.md", *ROOT.glob("projects/*/readme.md")):
            text = readme.read_text(encoding="utf-8")
            for path in re.findall(r"\]\((?!http)([^)#]+)\)", text):
                self.assertTrue((readme.parent / path).exists(), f"{readme}: {path}")


class TestDetailsOfRLHF(unittest.TestCase):
    """RLHF.md: a table of details, a section on the family, and a glossary of the metrics."""

    def setUp(self):
        self.text = read("RLHF.md")

    def test_the_tests_that_it_names_exist(self):
        tests = "".join(path.read_text("utf-8") for path in (ROOT / "tests").glob("test_*.py"))
        named = set(re.findall(r"`(test_\w+)`", self.text))
        self.assertEqual(named - set(re.findall(r"def (test_\w+)", tests)), set())

    def test_the_defaults_that_it_names_are_right(self):
        details = self.text.split("## The family")[0]
        defaults = dict(PPOTrainer.get_default_config().leaves())
        for name, value in re.findall(r"`(\w+)=([\w.]+)`", details):
            if name in defaults:
                self.assertEqual(str(defaults[name]), value.replace("_", ""), name)

    def test_the_glossary_explains_every_metric_and_no_other(self):
        logged = set()
        for options in ({}, {"algorithm": "dapo", "group_size": 2}):
            trainer = ppo_trainer(
                tiny_gpt(), batch_size=2, max_new_tokens=4, max_iters=1, **options
            )
            trainer.run()
            logged |= trainer.metrics.keys()
        glossary = self.text.split("## Glossary")[1]
        explained = []
        for first_column in re.findall(r"^\| (`[^|]+) \|", glossary, re.MULTILINE):
            explained += re.findall("`([^`]+)`", first_column)
        # The last is logged with several reward functions, which test_ppo tests.
        self.assertEqual(sorted(explained), sorted({*logged, "reward/<name>"}))

    def test_the_table_of_the_family_is_the_one_in_the_code(self):
        family = self.text.split("## The family")[1].split("## Glossary")[0]
        rows = re.findall(r"^\| `(\w+)` \(.*?\) \| (.*) \|$", family, re.MULTILINE)
        self.assertEqual([name for name, _ in rows], list(ALGORITHMS))
        for name, columns in rows:
            row = ALGORITHMS[name]
            advantage, penalty, loss_mean, ratio, clip_range, epochs = columns.split(" | ")
            self.assertTrue(advantage.startswith(row.advantage))
            self.assertEqual("whitened" in advantage, row.whiten_advantages)
            self.assertEqual("skipped" in advantage, row.skip_equal_groups)
            if row.kl_penalty == "none":
                self.assertEqual(penalty, "none")
            else:
                self.assertIn(f"{row.kl_estimator} in the {row.kl_penalty}", penalty)
            self.assertEqual((loss_mean, ratio), (row.loss_mean, row.ratio))
            bounds = {float(bound) for bound in clip_range.split(", ")}
            self.assertEqual(bounds, set(clip_bounds(row.clip_range)))
            self.assertEqual(int(epochs), row.ppo_epochs)
