"""The adder's examples against Python's own sums, and short runs of the script."""

import json

import torch

from mingpt.model import GPT
from tests.common import ROOT, TempDirTestCase, load_script, printed, readme_examples

adder = load_script(ROOT / "projects" / "adder" / "adder.py")


class TestExamples(TempDirTestCase):
    def test_they_are_written_as_the_docstring_says(self):
        problems = torch.tensor([[85, 50], [0, 7], [99, 99]])
        examples = adder.examples(problems, 2)
        self.assertEqual(len(examples), 3)
        for (a, b), (x, y) in zip(problems.tolist(), examples, strict=True):
            backwards = f"{a + b:03}"[::-1]
            text = f"{a:02}{b:02}{backwards}"
            self.assertEqual("".join(map(str, x.tolist())), text[:-1])
            self.assertEqual(y.tolist(), [-1] * 3 + [int(digit) for digit in backwards])

    def test_no_problem_is_both_trained_on_and_held_out(self):
        train, test = adder.split(adder.get_config())
        every_problem = {tuple(problem) for problem in [*train.tolist(), *test.tolist()]}
        self.assertEqual(len(every_problem), 10_000)
        self.assertEqual(len(train) + len(test), 10_000)
        self.assertEqual(len(test), 500)


class TestMistakes(TempDirTestCase):
    def test_a_mistake_is_a_sentence(self):
        self.assertEqual(adder.describe(52, 12, 65), "52 + 12 = 64, but the model says 65")

    def test_a_right_answer_is_not_called_a_mistake(self):
        self.assertEqual(adder.describe(52, 12, 64), "52 + 12 = 64")

    def test_ten_are_printed_and_the_others_counted(self):
        problems = torch.tensor([[i, i] for i in range(25)])
        lines = printed(adder.print_mistakes, problems, torch.zeros(25, dtype=torch.long))
        self.assertEqual(len(lines.splitlines()), 11)
        self.assertIn("9 + 9 = 18, but the model says 0\n... and 15 more\n", lines)

    def test_of_ten_none_is_left_to_count(self):
        problems = torch.tensor([[i, i] for i in range(10)])
        lines = printed(adder.print_mistakes, problems, torch.zeros(10, dtype=torch.long))
        self.assertEqual(len(lines.splitlines()), 10)
        self.assertNotIn("more", lines)


class TestScript(TempDirTestCase):
    def test_a_short_run_learns_and_answers_a_question(self):
        options = [
            "--data.digits=1",
            "--data.held_out=10",
            "--trainer.batch_size=64",
            "--trainer.max_iters=300",
            f"--system.work_dir={self.folder}",
        ]
        result = printed(adder.main, options)
        summary = json.loads((self.folder / "summary.json").read_text(encoding="utf-8"))
        self.assertEqual(summary["held_out"], 10)
        self.assertIn(f"solves {100 * summary['accuracy']:.1f}% of 10 held-out problems", result)

        digits = torch.arange(10)
        problems = torch.cartesian_prod(digits, digits)  # 90 of these 100 were trained on
        model = GPT.from_pretrained(self.folder / "model")
        right = adder.solve(model, problems, 1) == problems.sum(1)
        self.assertGreater(right.double().mean().item(), 0.8)

        answer = printed(adder.main, [*options, "--ask", "2 + 5"])
        self.assertRegex(answer, r"^2 \+ 5 = 7(, but the model says \d+)?\n$")
        with self.assertRaisesRegex(ValueError, "got --ask='2-5'; expected a sum"):
            adder.main([*options, "--ask=2-5"])
        with self.assertRaisesRegex(ValueError, "adds numbers of up to 1 digits"):
            adder.main([*options, "--ask=20+5"])

    def test_a_question_needs_a_trained_model(self):
        with self.assertRaisesRegex(ValueError, "has no trained model: run this script"):
            adder.main([f"--system.work_dir={self.folder}", "--ask=1+1"])

    def test_some_problems_must_be_held_out(self):
        with self.assertRaisesRegex(ValueError, "held_out=0 must be a whole number"):
            adder.main([f"--system.work_dir={self.folder}", "--data.held_out=0"])

    def test_the_readme_shows_how_to_use_the_result(self):
        options = ["--trainer.max_iters=2", f"--system.work_dir={self.folder}"]
        result = printed(adder.main, options)
        (example,) = readme_examples("adder", self.folder)
        self.assertIn(example, result)
        self.assertRegex(printed(exec, example, {}), r"^\[8, 5, 5, 0, \d, \d, \d\]\n$")
