"""Runs of two processes: losses as of one, one writer, exact resume, no survivor that hangs.

Starting processes takes most of the time here, so tests that look at the same runs share them.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import textwrap
import unittest
from pathlib import Path

import torch

from mingpt.run_folder import read_metrics
from tests.common import ROOT
from tests.test_family import HandMade

# What each process runs: a short training, and then a file with what this process has seen.
SCRIPT = textwrap.dedent("""
    import json
    import os
    import sys
    from pathlib import Path

    import torch
    from torch.utils.data import TensorDataset

    from mingpt.rlhf import PPOTrainer
    from mingpt.trainer import Trainer
    from tests.common import tiny_gpt
    from tests.test_family import HandMade
    from tests.test_trainer import config, tokens


    def ppo_trainer(options):
        C = PPOTrainer.get_default_config()
        C.merge_from_dict(
            {
                "device": "cpu",
                "batch_size": 8,
                "group_size": 2,
                "max_new_tokens": 6,
                "stop_token": 0,
                "max_iters": 3,
                "work_dir": folder,
                "kl_target": 1.0,
            }
        )
        C.merge_from_args(options)

        def threes(idx, attention_mask, completion_mask):
            return (idx == 3).sum(1).float()

        return PPOTrainer(C, tiny_gpt(), threes, [[1], [2], [1, 2]])


    def lm_trainer(dropout, options):
        C = config(work_dir=folder, micro_batch_size=1, eval_every=2, max_iters=6)
        C.merge_from_args(options)
        x, y = (part.clone() for part in tokens(20).tensors)
        y[::3, :3] = -1  # the examples of a batch have unlike numbers of targets

        def count_targets(batch):
            return int((batch[1] != -1).sum())

        data = TensorDataset(x, y)
        model = tiny_gpt(resid_pdrop=dropout)
        return Trainer(C, model, data, tokens(5), weight_fn=count_targets)


    def whiten_across_processes(trainer):
        # rank 0 has the numbers 1, 2, 4, and rank 1 has 2, 4, 8, 16
        numbers = torch.tensor([[1.0, 2.0], [4.0, 8.0]]) * (1 + trainer.rank)
        mask = torch.tensor([[True, True], [True, trainer.rank == 1]])
        return trainer.whiten(numbers, mask)[mask].tolist()


    def step_on_unlike_episodes(trainer):
        # a step on eight episodes of unlike lengths, of which each process has four
        rollout = HandMade(scores=HandMade.SCORES[:8]).rollout(trainer)
        first = 4 * trainer.rank
        return trainer.minibatch_step(rollout.select(slice(first, first + 4)))


    def die_in_the_middle(trainer):
        if trainer.rank == 1 and trainer.iter_num == 3:
            os._exit(9)


    kind, folder, *options = sys.argv[1:]
    seen = {}
    if kind == "ppo":
        trainer = ppo_trainer(options)
        seen["white"] = whiten_across_processes(trainer)
        seen["step"] = step_on_unlike_episodes(trainer)
    else:
        trainer = lm_trainer(0.2 if kind == "dropout" else 0.0, options)
    if kind == "dies":
        trainer.add_callback("on_batch_end", die_in_the_middle)
    trainer.run()
    weights = [p.detach().double().abs().sum().item() for p in trainer.model.parameters()]
    seen["weights"] = sum(weights)
    Path(f"{folder}.rank{trainer.rank}.json").write_text(json.dumps(seen))
""")


class TwoProcessesTestCase(unittest.TestCase):
    """Gives each class of tests a folder of its own, with the script that its processes run."""

    @classmethod
    def setUpClass(cls):
        cls.folder = Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
        (cls.folder / "script.py").write_text(SCRIPT)

    @classmethod
    def start(cls, processes, kind, name, *options):
        """Run the script in so many processes, with the work_dir `name`."""
        command = [sys.executable]
        if processes > 1:
            command += ["-m", "torch.distributed.run", "--standalone"]
            command += [f"--nproc_per_node={processes}"]
        command += [str(cls.folder / "script.py"), kind, str(cls.folder / name), *options]
        return subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=120,
        )

    @classmethod
    def train(cls, processes, kind, name, *options):
        """The same, for a run that must succeed. Returns what each process has seen, by rank."""
        run = cls.start(processes, kind, name, *options)
        if run.returncode != 0:
            raise AssertionError(run.stderr)
        paths = [cls.folder / f"{name}.rank{rank}.json" for rank in range(processes)]
        return [json.loads(path.read_text()) for path in paths]

    def metrics(self, name):
        return read_metrics(self.folder / name / "metrics.jsonl")


class TestTraining(TwoProcessesTestCase):
    """One run of a single process, and one of two that is stopped after 4 of its 6 iterations."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.train(1, "train", "one")
        cls.train(2, "train", "two", "--max_iters=4")
        cls.ends = cls.train(2, "train", "two")

    def test_both_processes_have_the_same_weights(self):
        self.assertEqual(self.ends[0]["weights"], self.ends[1]["weights"])

    def test_one_of_them_writes(self):
        self.assertEqual([row["iter"] for row in self.metrics("two")], [1, 2, 3, 4, 5, 6])

    def test_the_losses_are_those_of_one_process(self):
        for one, two in zip(self.metrics("one"), self.metrics("two"), strict=True):
            for name in ("loss", "grad_norm", "valid_loss"):
                self.assertAlmostEqual(one.get(name, 0), two.get(name, 0), delta=1e-5)

    def test_another_number_of_processes_is_refused(self):
        run = self.start(1, "train", "two")
        self.assertIn("the number of processes was 2, is 1", run.stderr)


class TestDropout(TwoProcessesTestCase):
    """A run of two processes with dropout, and the same run stopped in the middle and resumed."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.train(2, "dropout", "uninterrupted", "--max_iters=6")
        cls.train(2, "dropout", "resumed", "--max_iters=3")
        cls.train(2, "dropout", "resumed", "--max_iters=6")

    def checkpoint(self, name):
        return torch.load(self.folder / name / "checkpoint.pt", weights_only=True)

    def test_each_process_draws_its_own(self):
        first, second = self.checkpoint("uninterrupted")["rng"]
        self.assertFalse(torch.equal(first["torch"], second["torch"]))

    def test_each_process_resumes_its_own(self):
        resumed = self.checkpoint("resumed")["model"]
        expected = self.checkpoint("uninterrupted")["model"]
        torch.testing.assert_close(resumed, expected, atol=0, rtol=0)


class TestPPO(TwoProcessesTestCase):
    """A short run of PPO, and one of GRPO."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.ends = {
            algorithm: cls.train(2, "ppo", algorithm, f"--algorithm={algorithm}")
            for algorithm in ("ppo", "grpo")
        }

    def test_both_processes_have_the_same_weights(self):
        for algorithm, (first, second) in self.ends.items():
            with self.subTest(algorithm):
                self.assertEqual(first["weights"], second["weights"])

    def test_the_ratio_starts_at_one(self):
        for algorithm in self.ends:
            with self.subTest(algorithm):
                rows = self.metrics(algorithm)
                self.assertTrue(rows)
                self.assertTrue(all(row["log_prob_error"] < 1e-4 for row in rows))

    def test_a_step_on_completions_of_unlike_lengths_is_that_of_one_process(self):
        # PPO's loss is a mean over tokens, and GRPO's over completions.
        for algorithm, ends in self.ends.items():
            hand_made = HandMade(scores=HandMade.SCORES[:8])
            trainer = hand_made.trainer(algorithm, group_size=2)
            expected = trainer.minibatch_step(hand_made.rollout(trainer))
            for rank, end in enumerate(ends):
                for name in ("loss", "grad_norm", "loss/policy", "policy/approxkl", "val/ratio"):
                    with self.subTest(algorithm, rank=rank, name=name):
                        found = end["step"][name]
                        self.assertAlmostEqual(found / expected[name], 1.0, delta=1e-5)

    def test_whitening_is_over_the_numbers_of_both_processes(self):
        numbers = [1.0, 2.0, 4.0, 2.0, 4.0, 8.0, 16.0]  # of rank 0, then of rank 1
        mean, deviation = statistics.mean(numbers), statistics.pstdev(numbers)
        for algorithm, (first, second) in self.ends.items():
            with self.subTest(algorithm):
                white = first["white"] + second["white"]
                self.assertEqual(len(first["white"]), 3)
                for x, whitened in zip(numbers, white, strict=True):
                    self.assertAlmostEqual(whitened, (x - mean) / deviation, places=5)


class TestFailure(TwoProcessesTestCase):
    def test_when_one_dies_the_others_stop(self):
        run = self.start(2, "dies", "run")  # raises TimeoutExpired if the other one hangs
        self.assertNotEqual(run.returncode, 0)
        self.assertEqual(list(self.folder.glob("run.rank*.json")), [])
        self.assertRegex(run.stderr, r"exitcode *: 9")
