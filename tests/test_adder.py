"""The adder's examples against Python's own sums, and a short run of the script."""

import contextlib
import io
import json

import torch

from mingpt.model import GPT
from tests.common import ROOT, TempDirTestCase, load_script

adder = load_script(ROOT / "projects" / "adder" / "adder.py")


class TestAdder(TempDirTestCase):
    def test_examples_are_written_as_the_docstring_says_and_no_problem_is_in_both_splits(self):
        problems = torch.tensor([[85, 50], [0, 7], [99, 99]])
        for (a, b), (x, y) in zip(problems.tolist(), adder.examples(problems, 2)):
            text = f"{a:02}{b:02}" + f"{a + b:03}"[::-1]
            self.assertEqual("".join(map(str, x.tolist())), text[:-1])
            self.assertEqual(y.tolist(), [-1] * 3 + [int(digit) for digit in text[4:]])
        train, test = adder.split(adder.get_config())
        self.assertEqual(len({tuple(p) for p in train.tolist()} | {tuple(p) for p in test.tolist()}), 10_000)
        self.assertEqual(len(test), 500)

    def test_a_short_run_and_a_question(self):
        options = ["--data.digits=1", "--data.held_out=10", "--trainer.batch_size=64", "--trainer.max_iters=300", f"--system.work_dir={self.folder}"]
        adder.main(options)
        self.assertEqual(json.loads((self.folder / "summary.json").read_text())["held_out"], 10)
        seen = torch.cartesian_prod(torch.arange(10), torch.arange(10))  # 90 of these 100 were in the training split
        right = adder.solve(GPT.from_pretrained(self.folder / "model"), seen, 1) == seen.sum(1)
        self.assertGreater(right.double().mean().item(), 0.8)
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            adder.main([*options, "--ask", "2 + 5"])
        self.assertRegex(printed.getvalue(), r"^2 \+ 5 = \d+")
        for words, *args in (("is no sum", "--ask=2-5"), ("numbers of up to 1 digits", "--ask=20+5"),
                             ("has no trained model", "--ask=1+1", f"--system.work_dir={self.folder / 'none'}")):
            self.assertRaisesRegex(ValueError, words, adder.main, [*options, *args])
