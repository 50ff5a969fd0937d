"""Runs of two processes: the same losses as one, one writer, exact resume, and no survivor that hangs."""

import os
import re
import statistics
import subprocess
import sys
import textwrap

import torch

from mingpt.run_folder import read_metrics
from tests.common import ROOT, TempDirTestCase

SCRIPT = textwrap.dedent("""
    import os, sys
    import torch
    from torch.utils.data import TensorDataset
    from mingpt.rlhf import PPOTrainer
    from tests.test_trainer import Trainer, config, tiny_gpt, tokens

    kind, folder, *options = sys.argv[1:]
    if kind == "ppo":
        C = PPOTrainer.get_default_config()
        C.merge_from_dict({"device": "cpu", "batch_size": 8, "group_size": 2, "max_new_tokens": 6, "max_iters": 3, "work_dir": folder, "kl_target": 1.0})
        C.merge_from_args(options)
        trainer = PPOTrainer(C, tiny_gpt(), lambda idx, mask, completion: (idx == 3).sum(1).float(), [[1], [2], [1, 2]])
        mask = torch.tensor([[True, True], [True, trainer.rank == 1]])  # unlike numbers of tokens
        print("white", trainer.rank, *trainer.whiten(torch.tensor([[1.0, 2.0], [4.0, 8.0]]) * (1 + trainer.rank), mask)[mask].tolist(), ";")
    else:
        C = config(work_dir=folder, micro_batch_size=1, eval_every=2, max_iters=6)
        C.merge_from_args(options)
        weight = lambda batch: int((batch[1] != -1).sum())
        x, y = (part.clone() for part in tokens(20).tensors)
        y[::3, :3] = -1  # so that the parts of a batch weigh differently
        trainer = Trainer(C, tiny_gpt(resid_pdrop=0.2 * (kind == "dropout")), TensorDataset(x, y), tokens(5), weight_fn=weight)
    if kind == "dies":
        trainer.add_callback("on_batch_end", lambda t: t.rank == 1 and t.iter_num == 3 and os._exit(9))
    trainer.run()
    print(f"end {trainer.rank} {sum(p.detach().double().abs().sum().item() for p in trainer.model.parameters())};")
""")


class TestTwoProcesses(TempDirTestCase):
    def start(self, n, kind, name, *options):
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}"] if n > 1 else []
        (self.folder / "script.py").write_text(SCRIPT)
        return subprocess.run([sys.executable, *launcher, str(self.folder / "script.py"), kind, str(self.folder / name), *options],
                              cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120)

    def ends(self, run):
        """The weights' sums that the processes printed, in the order of their ranks."""
        ends = sorted(re.findall(r"end (\d) ([\d.]+);", run.stdout))  # their lines may mix
        self.assertEqual([rank for rank, _ in ends], ["0", "1"], run.stderr)
        return [weights for _, weights in ends]

    def test_the_losses_are_those_of_one_process_and_a_run_resumes(self):
        self.assertIn("end 0", self.start(1, "train", "one").stdout)
        first = self.start(2, "train", "two", "--max_iters=4")
        self.assertEqual(first.returncode, 0, first.stderr)
        self.assertEqual(*self.ends(self.start(2, "train", "two")))  # both have the same weights
        one, two = (read_metrics(self.folder / name / "metrics.jsonl") for name in ("one", "two"))
        self.assertEqual([row["iter"] for row in two], [1, 2, 3, 4, 5, 6])  # one writer
        for a, b in zip(one, two):
            for name in ("loss", "grad_norm", "valid_loss"):
                self.assertAlmostEqual(a.get(name, 0), b.get(name, 0), delta=1e-5)
        self.assertIn("the number of processes was 2, is 1", self.start(1, "train", "two").stderr)

    def test_with_dropout_each_process_draws_its_own_and_resumes_it(self):
        for name, stop in (("whole", 6), ("parts", 3), ("parts", 6)):
            self.start(2, "dropout", name, f"--max_iters={stop}")
        states = [torch.load(self.folder / name / "checkpoint.pt", weights_only=True) for name in ("whole", "parts")]
        self.assertFalse(torch.equal(*(rng["torch"] for rng in states[0]["rng"])))
        torch.testing.assert_close(*(state["model"] for state in states), atol=0, rtol=0)

    def test_ppo(self):
        for algorithm in ("ppo", "grpo"):
            with self.subTest(algorithm):
                run = self.start(2, "ppo", algorithm, f"--algorithm={algorithm}")
                self.assertEqual(*self.ends(run))
                self.assertTrue(all(row["log_prob_error"] < 1e-4 for row in read_metrics(self.folder / algorithm / "metrics.jsonl")))
                whole = [1.0, 2.0, 4.0, 2.0, 4.0, 8.0, 16.0]  # of both processes
                for rank, numbers in sorted(re.findall(r"white (\d) ([^;]+) ;", run.stdout)):
                    for x, white in zip(whole[:3] if rank == "0" else whole[3:], map(float, numbers.split()), strict=True):
                        self.assertAlmostEqual(white, (x - statistics.mean(whole)) / statistics.pstdev(whole), places=5)

    def test_when_one_dies_the_others_stop(self):
        run = self.start(2, "dies", "run")  # subprocess.run would raise TimeoutExpired
        self.assertNotEqual(run.returncode, 0)
        self.assertNotIn("end", run.stdout)
        self.assertRegex(run.stderr, r"exitcode *: 9")
