"""The training loop: what a batch is, the optimizer's step, the schedule, resuming, stopping, refusing."""

import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import unittest
from unittest import mock

import torch
from torch.utils.data import TensorDataset

from mingpt.model import GPT
from mingpt.run_folder import read_metrics
from mingpt.trainer import Trainer
from mingpt.utils import CfgNode as CN
from mingpt.utils import set_seed, setup_logging
from tests.common import ROOT, TempDirTestCase, tiny_gpt


def config(**options):
    C = Trainer.get_default_config()
    C.merge_from_dict({"device": "cpu", "batch_size": 4, "max_iters": 6, "learning_rate": 1e-2, "log_every": 1, **options})
    return C


def tokens(n=10):
    generator = torch.Generator().manual_seed(7)
    x = torch.randint(11, (n, 6), generator=generator)
    return TensorDataset(x[:, :-1], x[:, 1:])


def timeless(rows):
    """Metrics without what differs from run to run."""
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


class TestLoop(TempDirTestCase):

    def test_every_pass_sees_each_example_once_and_batches_depend_on_seed_and_number_alone(self):
        def batches(seed, start, n):
            set_seed(seed)
            trainer = Trainer(config(), tiny_gpt(seed), tokens(10))
            trainer.iter_num = start
            indices = trainer.batch_indices()
            return [next(indices) for _ in range(n)]

        all_of_them = batches(1, 0, 15)
        self.assertTrue(all(len(batch) == 4 for batch in all_of_them))
        flat = sum(all_of_them, [])
        for start in range(0, 60, 10):
            self.assertEqual(sorted(flat[start:start + 10]), list(range(10)))
        self.assertNotEqual(flat[:10], flat[10:20])
        self.assertEqual(batches(1, 7, 3), all_of_them[7:10])
        self.assertNotEqual(batches(2, 0, 15), all_of_them)

    def test_the_step_is_that_of_a_bare_loop(self):
        trained = tiny_gpt()
        trainer = Trainer(config(grad_norm_clip=0.5, weight_decay=0.3, eps=1e-3), trained, tokens())
        trainer.run()

        model, losses = tiny_gpt(), []
        matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and ".h." in n]
        others = [p for n, p in model.named_parameters() if not (p.dim() == 2 and ".h." in n)]
        optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.3}, {"params": others, "weight_decay": 0.0}],
                                      lr=1e-2, betas=(0.9, 0.95), eps=1e-3)
        again = Trainer(config(), tiny_gpt(), tokens())
        for _, batch in zip(range(6), again.batches()):
            loss = model(*batch)[1]
            optimizer.zero_grad()
            loss.backward()
            norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
            for p in model.parameters():
                p.grad *= min(1.0, 0.5 / (norm + 1e-6))
            optimizer.step()
            losses.append(loss.item())
        torch.testing.assert_close(weights(trained), weights(model), atol=1e-5, rtol=0)
        self.assertAlmostEqual(trainer.loss.item(), losses[-1], places=4)
        self.assertLess(losses[-1], losses[0])

    def test_micro_batches_add_up_to_the_batch(self):
        outcome = []
        for size in (None, 3, 1):
            model = tiny_gpt()
            Trainer(config(micro_batch_size=size, eps=1e-3), model, tokens()).run()
            outcome.append(weights(model))
        torch.testing.assert_close(outcome[1], outcome[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(outcome[2], outcome[0], atol=1e-5, rtol=0)

    def test_schedules(self):
        for schedule, at_half, at_end in (("constant", 1.0, 1.0), ("linear", 0.55, 0.1), ("cosine", 0.55, 0.1)):
            trainer = Trainer(config(lr_schedule=schedule, warmup_iters=10, max_iters=110, lr_final_fraction=0.1), tiny_gpt(), tokens())

            def rate(i):
                trainer.iter_num = i
                return trainer.learning_rate() / 1e-2

            self.assertAlmostEqual(rate(0), 0.1)  # never 0: a step that does nothing is no step
            self.assertAlmostEqual(rate(9), 1.0)
            self.assertAlmostEqual(rate(60), at_half)
            self.assertAlmostEqual(rate(110), at_end)
        self.assertAlmostEqual(rate(35), 0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)

    def test_stop_rules(self):
        for options, iterations in (({"max_iters": 3}, 3), ({"max_iters": None, "epochs": 2}, 5), ({"max_iters": 4, "epochs": 9}, 4)):
            trainer = Trainer(config(**options), tiny_gpt(), tokens(10))
            trainer.run()
            self.assertEqual(trainer.iter_num, iterations)

    def test_callbacks_loss_fn_and_evaluation(self):
        def loss_fn(model, batch):
            loss = model(*batch)[1]
            return loss, {"twice": 2 * loss.detach()}

        seen, model, valid = [], tiny_gpt(), tokens(7)
        trainer = Trainer(config(work_dir=str(self.folder), eval_every=2), model, tokens(), valid, loss_fn=loss_fn)
        trainer.add_callback("on_batch_end", lambda t: seen.append((t.iter_num, t.loss.item())))
        trainer.run()
        rows = read_metrics(self.folder / "metrics.jsonl")
        self.assertEqual([i for i, _ in seen], list(range(6)))
        self.assertEqual([row["iter"] for row in rows], list(range(1, 7)))
        for (_, loss), row in zip(seen, rows):
            self.assertAlmostEqual(row["loss"], loss)
            self.assertAlmostEqual(row["twice"], 2 * loss, places=5)
        self.assertEqual([row["iter"] for row in rows if "valid_loss" in row], [2, 4, 6])
        with torch.no_grad():
            expected = sum(model(x[None], y[None])[1].item() for x, y in valid) / 7
        self.assertAlmostEqual(trainer.valid_loss, expected, places=5)
        best = min(row["valid_loss"] for row in rows if "valid_loss" in row)
        self.assertEqual(trainer.best_valid_loss, best)
        self.assertTrue((self.folder / "best.pt").exists())


    def test_weights_are_what_the_loss_is_a_mean_over(self):
        x, y = (part.clone() for part in tokens(8).tensors)
        y[::2, 1:] = -1
        y[3] = -1  # nothing to learn here: alone in its part, its mean is NaN
        outcomes = []
        for size in (None, 3, 1):  # of the parts that a batch is split into
            model = tiny_gpt()
            trainer = Trainer(config(batch_size=8, micro_batch_size=size, max_iters=3, eps=1e-3), model, TensorDataset(x, y), TensorDataset(x, y),
                              weight_fn=lambda batch: int((batch[1] != -1).sum()))
            trainer.run()
            outcomes.append((weights(model), trainer.evaluate(), model(x, y)[1].item()))
        for w, loss, expected in outcomes:
            torch.testing.assert_close(w, outcomes[0][0], atol=1e-5, rtol=0)
            self.assertAlmostEqual(loss, expected, places=5)

    def test_mixed_precision(self):
        def losses(precision):
            seen = []
            trainer = Trainer(config(precision=precision), tiny_gpt(), tokens())
            trainer.add_callback("on_batch_end", lambda t: seen.append(t.loss.item()))
            trainer.run()
            return torch.tensor(seen)

        exact = losses("fp32")
        for precision in ("bf16", "fp16"):
            self.assertFalse(torch.equal(losses(precision), exact))
            torch.testing.assert_close(losses(precision), exact, atol=0.05, rtol=0)
        self.assertTrue(torch.equal(losses("auto"), exact))  # never bf16 on a CPU by itself

    def test_a_gradient_that_overflows_in_fp16_skips_the_step_and_lowers_the_scale(self):
        model, seen = tiny_gpt(), []
        trainer = Trainer(config(precision="fp16", max_iters=3), model, tokens(),
                          loss_fn=lambda model, batch: model(*batch)[1] * (1e38 if trainer.iter_num == 1 else 1.0))
        trainer.add_callback("on_batch_end", lambda t: seen.append((weights(model), trainer.scaler.get_scale())))
        trainer.run()
        (first, scale), (second, lowered), (third, _) = seen
        self.assertTrue(torch.equal(first, second))
        self.assertEqual(lowered, scale / 2)
        self.assertFalse(torch.equal(second, third))

    def test_compiled_it_is_the_same_run(self):
        losses = []
        for compile in (False, True):
            model, seen = tiny_gpt(), []
            trainer = Trainer(config(compile=compile), model, tokens(), tokens(3))
            trainer.add_callback("on_batch_end", lambda t: seen.append(t.loss.item()))
            trainer.run()
            losses.append([*seen, trainer.evaluate()])
            self.assertEqual(set(model.state_dict()), set(tiny_gpt().state_dict()))
        torch.testing.assert_close(*map(torch.tensor, losses), atol=1e-4, rtol=0)

    def test_tensorboard_holds_the_same_rows_and_survives_a_resume(self):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
        for iterations in (4, 6):
            trainer = Trainer(config(work_dir=str(self.folder), max_iters=iterations, tensorboard=True), tiny_gpt(), tokens())
            trainer.run()
        events = EventAccumulator(str(self.folder))
        events.Reload()
        for name in ("loss", "lr", "grad_norm"):
            rows = [(row["iter"], row[name]) for row in read_metrics(self.folder / "metrics.jsonl")]
            logged = [(event.step, event.value) for event in events.Scalars(name)]
            self.assertEqual([step for step, _ in logged], [1, 2, 3, 4, 5, 6])
            torch.testing.assert_close(torch.tensor(logged), torch.tensor(rows), atol=1e-6, rtol=1e-6)


class TestMinGPTScripts(TempDirTestCase):

    def test_the_interface_that_adder_and_chargpt_use(self):
        C = CN()
        C.system = CN(seed=3407, work_dir=str(self.folder / "out"))
        C.model = GPT.get_default_config()
        C.model.model_type = "gpt-nano"
        C.trainer = Trainer.get_default_config()
        C.trainer.learning_rate = 5e-4
        C.merge_from_args(["--trainer.max_iters=3", "--trainer.batch_size=4", "--trainer.device=cpu"])
        with mock.patch("mingpt.utils.log_to_console"):  # not for the other tests as well
            setup_logging(C)
        set_seed(C.system.seed)
        self.assertEqual(json.loads((self.folder / "out" / "config.json").read_text())["trainer"]["max_iters"], 3)
        C.model.vocab_size, C.model.block_size = 11, 5
        model, seen = GPT(C.model), []
        trainer = Trainer(C.trainer, model, tokens())

        def batch_end_callback(trainer):
            model.eval()
            x = torch.tensor([[1, 2]]).to(trainer.device)
            seen.append((trainer.iter_num, trainer.iter_dt > 0, trainer.loss.item() > 0, model.generate(x, 6, do_sample=True, top_k=10)))
            model.train()

        trainer.set_callback("on_batch_end", batch_end_callback)
        trainer.run()
        self.assertEqual([row[:3] for row in seen], [(i, True, True) for i in range(3)])
        self.assertTrue(all(row[3].shape == (1, 8) for row in seen))  # past block_size, too


class TestResume(TempDirTestCase):

    def train(self, name, max_iters, **options):
        model = tiny_gpt(3, embd_pdrop=0.2, resid_pdrop=0.2, attn_pdrop=0.2)  # dropout: random states matter
        trainer = Trainer(config(work_dir=str(self.folder / name), max_iters=max_iters, eval_every=3, lr_schedule="constant",
                                 **options), model, tokens(), tokens(5))
        trainer.run()
        return weights(model), timeless(read_metrics(self.folder / name / "metrics.jsonl"))

    def test_an_interrupted_run_ends_as_one_that_was_left_alone(self):
        whole, rows = self.train("whole", 12)
        for until in (3, 6, 12):
            parts, rows_of_parts = self.train("parts", until)
        self.assertTrue(torch.equal(whole, parts))
        self.assertEqual(rows, rows_of_parts)

    def test_rows_of_a_run_that_died_before_its_first_checkpoint_are_dropped(self):
        (self.folder / "run").mkdir()
        (self.folder / "run" / "metrics.jsonl").write_text('{"iter": 1, "loss": 9.0}\n{"iter": 2, "lo')
        _, rows = self.train("run", 6)
        self.assertEqual([row["iter"] for row in rows], [1, 2, 3, 4, 5, 6])
        self.assertLess(rows[0]["loss"], 9.0)

    def test_the_end_is_free_to_change_only_without_a_schedule(self):
        train = lambda **options: Trainer(config(work_dir=str(self.folder), lr_schedule="linear", **options), tiny_gpt(), tokens()).run()
        train(max_iters=4)
        with self.assertRaisesRegex(ValueError, "max_iters was 4, is 8"):
            train(max_iters=8)

    def test_a_finished_run_is_left_as_it_is(self):
        first, rows = self.train("run", 6)
        again, rows_again = self.train("run", 6)
        self.assertTrue(torch.equal(first, again))
        self.assertEqual(rows, rows_again)

    def test_other_options_are_refused(self):
        self.train("run", 3)
        with self.assertRaisesRegex(ValueError, "learning_rate was 0.01, is 0.5"):
            self.train("run", 6, learning_rate=0.5)

    def test_killed_at_any_moment(self):
        # a process that has done nothing but import forks the runs: twenty starts at the price of one
        script = textwrap.dedent("""
            import multiprocessing, pathlib, random, sys, time
            from tests.test_trainer import config, tokens, Trainer, tiny_gpt

            def train(folder):
                C = config(work_dir=str(folder), max_iters=400, checkpoint_every=1, eval_every=3)
                Trainer(C, tiny_gpt(3, resid_pdrop=0.2), tokens(), tokens(5)).run()

            def start(folder):
                process = multiprocessing.get_context("fork").Process(target=train, args=(folder,))
                process.start()
                return process

            folder = pathlib.Path(sys.argv[1])
            start(folder / "whole").join()
            checkpoint, moment, kills = folder / "parts" / "checkpoint.pt", random.Random(7), 0
            for _ in range(20):
                process = start(folder / "parts")
                before, deadline = checkpoint.stat().st_ino if checkpoint.exists() else 0, time.time() + 20
                while process.is_alive() and time.time() < deadline:  # until it has written something new
                    if checkpoint.exists() and checkpoint.stat().st_ino != before:
                        break
                time.sleep(moment.uniform(0, 0.05))
                process.kill()
                process.join()
                kills += process.exitcode == -9
            start(folder / "parts").join()
            print(kills)
        """)
        run = subprocess.run([sys.executable, "-c", script, str(self.folder)], cwd=ROOT, capture_output=True, text=True)
        self.assertEqual(run.stdout.split()[-1:], ["20"], run.stderr)
        states = [torch.load(self.folder / name / "checkpoint.pt", weights_only=True) for name in ("whole", "parts")]
        for name, p in states[0]["model"].items():
            self.assertTrue(torch.equal(p, states[1]["model"][name]), name)
        rows = [timeless(read_metrics(self.folder / name / "metrics.jsonl")) for name in ("whole", "parts")]
        self.assertEqual(rows[0], rows[1])

    def test_ctrl_c_and_sigterm_finish_the_iteration_and_save(self):
        for number, error in ((signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)):
            model, folder = tiny_gpt(), self.folder / number.name
            trainer = Trainer(config(work_dir=str(folder), max_iters=50), model, tokens())
            trainer.add_callback("on_batch_end", lambda t: t.iter_num == 4 and os.kill(os.getpid(), number))
            with self.assertRaises(error) as raised:
                trainer.run()
            self.assertEqual(getattr(raised.exception, "code", 143), 143)
            state = torch.load(folder / "checkpoint.pt", weights_only=True)
            self.assertEqual(state["iter_num"], 5)
            self.assertTrue(torch.equal(state["model"]["lm_head.weight"], model.lm_head.weight))


class TestRefusals(TempDirTestCase):

    def test_nan_loss_stops_before_the_weights_are_touched(self):
        model, good = tiny_gpt(), {}

        def loss_fn(model, batch):
            loss = model(*batch)[1]
            return loss * math.nan if trainer.iter_num == 4 else loss

        trainer = Trainer(config(work_dir=str(self.folder), checkpoint_every=2), model, tokens(), loss_fn=loss_fn)
        trainer.add_callback("on_batch_end", lambda t: good.update(weights=weights(model).clone()))
        with self.assertRaisesRegex(FloatingPointError, "iteration 4: loss nan, gradient norm nan, learning rate 0.01"):
            trainer.run()
        self.assertTrue(torch.equal(weights(model), good["weights"]))
        self.assertEqual(torch.load(self.folder / "checkpoint.pt", weights_only=True)["iter_num"], 4)

    def test_a_failed_write_leaves_the_old_checkpoint(self):
        trainer = Trainer(config(work_dir=str(self.folder), max_iters=2), tiny_gpt(), tokens())
        trainer.run()
        before = trainer.folder.checkpoint.read_bytes()
        trainer.state_dict = lambda: {"model": lambda: None}  # cannot be pickled: breaks off in mid-file
        with self.assertRaises(Exception):
            trainer.save_checkpoint()
        self.assertEqual(trainer.folder.checkpoint.read_bytes(), before)
        self.assertEqual(sorted(p.name for p in self.folder.iterdir()), ["checkpoint.pt", "metrics.jsonl"])

    def test_options_and_data(self):
        for words, options in (("batch_size=0", {"batch_size": 0}), ("max_iters=1.5", {"max_iters": 1.5}),
                               ("lr_schedule='step'", {"lr_schedule": "step"}), ("precision='int8'", {"precision": "int8"}),
                               ("grad_norm_clip=-1", {"grad_norm_clip": -1}), ("warmup_iters=None", {"warmup_iters": None}),
                               ("no options \\['max_iter'\\]", {"max_iter": 3}),
                               ("needs an end", {"lr_schedule": "cosine", "max_iters": None})):
            with self.subTest(words), self.assertRaisesRegex(ValueError, words):
                Trainer(config(**options), tiny_gpt(), tokens())
        with self.assertRaisesRegex(ValueError, "empty"):
            Trainer(config(), tiny_gpt(), [])
        with self.assertRaisesRegex(ValueError, "empty"):
            Trainer(config(), tiny_gpt(), tokens(), [])
        with self.assertRaisesRegex(TypeError, "tuple of tensors, not dict"):
            Trainer(config(), tiny_gpt(), [{"x": torch.ones(3)}] * 4).run()
        with self.assertRaisesRegex(ValueError, "has 3 examples, fewer than batch_size=4"):
            Trainer(config(), tiny_gpt(), tokens(3))
        with self.assertRaisesRegex(ValueError, "tensorboard=True needs a work_dir"):
            Trainer(config(tensorboard=True), tiny_gpt(), tokens())

    def test_metrics_are_json(self):
        Trainer(config(work_dir=str(self.folder), max_iters=2), tiny_gpt(), tokens()).run()
        for line in (self.folder / "metrics.jsonl").read_text().splitlines():
            self.assertLessEqual({"iter", "loss", "lr", "grad_norm", "seconds"}, json.loads(line).keys())


if __name__ == "__main__":
    unittest.main()
