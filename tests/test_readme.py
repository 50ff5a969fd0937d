"""What README.md tells the reader to run does run."""

import re
import unittest

import torch

from mingpt.rlhf import PPOTrainer
from mingpt.utils import set_seed
from tests.common import ROOT, tiny_gpt
from tests.test_rlhf import ppo_trainer


class TestReadme(unittest.TestCase):
    def test_library_example(self):
        set_seed(0)
        code, = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
        names = {"print": lambda idx: None}
        exec(code, names)
        written = names["model"].generate(torch.tensor([[5]] * 100), 8, do_sample=True)
        self.assertGreater((written == 7).float().mean().item(), 0.3)  # a free walk from 5 spends 0.11 of its time there
        steps = (written[:, 1:] - written[:, :-1]) % 10
        self.assertGreater(((steps == 1) | (steps == 9)).float().mean().item(), 0.9)  # and it still walks

    def test_the_details_of_rlhf_name_tests_options_and_metrics_that_exist(self):
        text = (ROOT / "RLHF.md").read_text(encoding="utf-8")
        tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))
        self.assertEqual(set(re.findall(r"`(test_\w+)`", text)) - set(re.findall(r"def (test_\w+)", tests)), set())
        defaults = dict(PPOTrainer.get_default_config().leaves())
        for name, value in re.findall(r"`(\w+)=([\w.]+)`", text.split("## The family")[0]):
            if name in defaults:
                self.assertEqual(str(defaults[name]), value.replace("_", ""), name)
        trainer = ppo_trainer(tiny_gpt(), batch_size=2, max_new_tokens=4, max_iters=1)
        trainer.run()
        explained = [name for row in re.findall(r"^\| (`[^|]+) \|", text.split("## Glossary")[1], re.MULTILINE) for name in re.findall("`([^`]+)`", row)]
        self.assertEqual(sorted(explained), sorted(trainer.metrics))

    def test_paths_exist(self):
        for readme in (ROOT / "README.md", ROOT / "RLHF.md", *ROOT.glob("projects/*/readme.md")):
            for path in re.findall(r"\]\((?!http)([^)#]+)\)", readme.read_text(encoding="utf-8")):
                self.assertTrue((readme.parent / path).exists(), f"{readme}: {path}")
