"""What README.md tells the reader to run does run."""

import re
import unittest

import torch

from mingpt.utils import set_seed
from tests.common import ROOT


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

    def test_paths_exist(self):
        for readme in (ROOT / "README.md", *ROOT.glob("projects/*/readme.md")):
            for path in re.findall(r"\]\((?!http)([^)#]+)\)", readme.read_text(encoding="utf-8")):
                self.assertTrue((readme.parent / path).exists(), f"{readme}: {path}")


if __name__ == "__main__":
    unittest.main()
