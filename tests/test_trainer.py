"""The training loop: what a batch is, the optimizer's step, the schedule, resuming, stopping, refusing."""

import itertools
import json
import math
import os
import signal
import subprocess
import sys
import textwrap
from unittest import mock

import torch
from torch.utils.data import TensorDataset

from mingpt.model import GPT
from mingpt.run_folder import read_metrics
from mingpt.trainer import Trainer
from mingpt.config import CfgNode as CN
from mingpt.utils import set_seed, setup_logging
from tests.common import ROOT, TempDirTestCase, timeless, tiny_gpt


def config(**options):
    C = Trainer.get_default_config()
    C.merge_from_dict({"device": "cpu", "batch_size": 4, "max_iters": 6, "learning_rate": 1e-2, "log_every": 1, **options})
    return C


def tokens(n=10):
    x = torch.randint(11, (n, 6), generator=torch.Generator().manual_seed(7))
    return TensorDataset(x[:, :-1], x[:, 1:])


def train(model=None, data=None, valid=None, weight_fn=None, **options):
    """A trainer that has run, and the loss of each of its iterations."""
    trainer, losses = Trainer(config(**options), model or tiny_gpt(), data or tokens(), valid, weight_fn=weight_fn), []
    trainer.add_callback("on_batch_end", lambda t: losses.append(t.loss.item()))
    trainer.run()
    return trainer, losses


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


class TestLoop(TempDirTestCase):
    def test_every_pass_sees_each_example_once_and_batches_depend_on_seed_and_number_alone(self):
        def batches(seed, start, n):
            trainer = Trainer(config(), tiny_gpt(seed), tokens(10))
            trainer.iter_num = start
            return list(itertools.islice(trainer.batch_indices(), n))

        all_of_them = batches(1, 0, 15)
        self.assertEqual({len(batch) for batch in all_of_them}, {4})
        flat = sum(all_of_them, [])
        for start in range(0, 60, 10):
            self.assertEqual(sorted(flat[start:start + 10]), list(range(10)))
        self.assertNotEqual(flat[:10], flat[10:20])
        self.assertEqual(batches(1, 7, 3), all_of_them[7:10])
        self.assertNotEqual(batches(2, 0, 15), all_of_them)

    def test_the_step_is_that_of_a_bare_loop(self):
        (trainer, seen), model, losses = train(grad_norm_clip=0.5, weight_decay=0.3, eps=1e-3), tiny_gpt(), []
        groups = [{"params": [p], "weight_decay": 0.3 * (p.dim() == 2 and ".h." in name)} for name, p in model.named_parameters()]
        optimizer = torch.optim.AdamW(groups, 1e-2, (0.9, 0.95), eps=1e-3)
        for _, batch in zip(range(6), Trainer(config(), tiny_gpt(), tokens()).batches()):
            loss = model(*batch)[1]
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
            for p, gradient in zip(model.parameters(), gradients):
                p.grad = gradient * min(1.0, 0.5 / (norm + 1e-6))
            optimizer.step()
            losses.append(loss.item())
        torch.testing.assert_close(weights(trainer.model), weights(model), atol=1e-5, rtol=0)
        torch.testing.assert_close(torch.tensor(seen), torch.tensor(losses), atol=5e-5, rtol=0)
        self.assertLess(losses[-1], losses[0])

    def test_micro_batches_add_up_to_the_batch_by_what_the_loss_is_a_mean_over(self):
        x, y = tokens(8).tensors
        gaps = y.clone()
        gaps[::2, 1:] = -1
        gaps[3] = -1  # nothing to learn here: alone in its part, its mean is NaN
        for targets, weight_fn in ((y, None), (gaps, lambda batch: int((batch[1] != -1).sum()))):
            data, whole = TensorDataset(x, targets), None
            for size in (None, 3, 1):  # of the parts that a batch is split into
                trainer, _ = train(None, data, data, weight_fn, batch_size=8, micro_batch_size=size, max_iters=3, eps=1e-3)
                whole = weights(trainer.model) if size is None else whole
                torch.testing.assert_close(weights(trainer.model), whole, atol=1e-5, rtol=0)
                self.assertAlmostEqual(trainer.evaluate(), trainer.model(x, targets)[1].item(), places=5)

    def test_schedules(self):
        quarter = 0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2
        for schedule, rates in (("constant", (1.0, 1.0, 1.0)), ("linear", (0.775, 0.55, 0.1)), ("cosine", (quarter, 0.55, 0.1))):
            trainer = Trainer(config(lr_schedule=schedule, warmup_iters=10, max_iters=110, lr_final_fraction=0.1), tiny_gpt(), tokens())
            for i, rate in zip((0, 9, 35, 60, 110), (0.1, 1.0, *rates)):  # never 0: a step that does nothing is no step
                trainer.iter_num = i
                self.assertAlmostEqual(trainer.learning_rate() / 1e-2, rate)

    def test_stop_rules(self):
        for max_iters, epochs, iterations in ((3, None, 3), (None, 3, 8), (4, 9, 4)):
            self.assertEqual(train(data=tokens(10), max_iters=max_iters, epochs=epochs)[0].iter_num, iterations)

    def test_callbacks_loss_fn_and_evaluation(self):
        loss_fn = lambda model, batch: (model(*batch)[1], {"twice": 2 * model(*batch)[1].detach()})
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
            self.assertLessEqual({"lr", "grad_norm", "seconds"}, row.keys())
        evaluated = {row["iter"]: row["valid_loss"] for row in rows if "valid_loss" in row}
        self.assertEqual(list(evaluated), [2, 4, 6])
        self.assertAlmostEqual(trainer.valid_loss, sum(model(x[None], y[None])[1].item() for x, y in valid) / 7, places=5)
        self.assertEqual(trainer.best_valid_loss, min(evaluated.values()))
        self.assertTrue((self.folder / "best.pt").exists())

    def test_mixed_precision(self):
        losses = {precision: torch.tensor(train(precision=precision)[1]) for precision in ("fp32", "bf16", "fp16", "auto")}
        for precision in ("bf16", "fp16"):
            self.assertFalse(torch.equal(losses[precision], losses["fp32"]))
            torch.testing.assert_close(losses[precision], losses["fp32"], atol=0.05, rtol=0)
        self.assertTrue(torch.equal(losses["auto"], losses["fp32"]))  # never bf16 on a CPU by itself

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
        outcomes = []
        for compile in (False, True):
            trainer, losses = train(valid=tokens(3), compile=compile)
            outcomes.append(torch.tensor([*losses, trainer.evaluate()]))
            self.assertEqual(set(trainer.model.state_dict()), set(tiny_gpt().state_dict()))
        torch.testing.assert_close(*outcomes, atol=1e-4, rtol=0)

    def test_tensorboard_holds_the_same_rows_and_survives_a_resume(self):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
        for iterations in (4, 6):
            train(work_dir=str(self.folder), max_iters=iterations, tensorboard=True)
        events = EventAccumulator(str(self.folder))
        events.Reload()
        for name in ("loss", "lr", "grad_norm"):
            rows = {row["iter"]: row[name] for row in read_metrics(self.folder / "metrics.jsonl")}
            self.assertEqual([event.step for event in events.Scalars(name)], [1, 2, 3, 4, 5, 6])
            torch.testing.assert_close({event.step: event.value for event in events.Scalars(name)}, rows, atol=1e-6, rtol=1e-6)

    def test_the_interface_that_adder_and_chargpt_use(self):
        C = CN()
        C.system = CN(seed=3407, work_dir=str(self.folder / "out"))
        C.model, C.trainer = GPT.get_default_config(), Trainer.get_default_config()
        C.model.model_type, C.model.vocab_size, C.model.block_size = "gpt-nano", 11, 5
        C.trainer.learning_rate = 5e-4
        C.merge_from_args(["--trainer.max_iters=3", "--trainer.batch_size=4", "--trainer.device=cpu"])
        with mock.patch("mingpt.utils.log_to_console"):  # not for the other tests as well
            setup_logging(C)
        set_seed(C.system.seed)
        self.assertEqual(json.loads((self.folder / "out" / "config.json").read_text())["trainer"]["max_iters"], 3)
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
        train(model, valid=tokens(5), work_dir=str(self.folder / name), max_iters=max_iters, eval_every=3, **options)
        return weights(model), timeless(self.folder / name)

    def test_an_interrupted_run_ends_as_one_that_was_left_alone(self):
        (self.folder / "parts").mkdir()  # of a run that died before its first checkpoint
        (self.folder / "parts" / "metrics.jsonl").write_text('{"iter": 1, "loss": 9.0}\n{"iter": 2, "lo')
        for until in (3, 6, 12, 12):  # the last time it is finished already, and left as it is
            parts, rows_of_parts = self.train("parts", until)
        whole, rows = self.train("whole", 12)
        self.assertTrue(torch.equal(whole, parts))
        self.assertEqual(rows, rows_of_parts)

    def test_other_options_are_refused_and_another_end_where_the_schedule_hangs_on_it(self):
        self.train("constant", 3)
        self.assertRaisesRegex(ValueError, "learning_rate was 0.01, is 0.5", self.train, "constant", 6, learning_rate=0.5)
        self.train("linear", 4, lr_schedule="linear")
        self.assertRaisesRegex(ValueError, "max_iters was 4, is 8", self.train, "linear", 8, lr_schedule="linear")

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
            written = lambda: checkpoint.exists() and checkpoint.stat().st_ino
            for _ in range(20):
                before, deadline, process = written(), time.time() + 20, start(folder / "parts")
                while process.is_alive() and time.time() < deadline and written() == before:  # until it has written something new
                    pass
                time.sleep(moment.uniform(0, 0.05))
                process.kill()
                process.join()
                kills += process.exitcode == -9
            start(folder / "parts").join()
            print(kills)
        """)
        run = subprocess.run([sys.executable, "-c", script, str(self.folder)], cwd=ROOT, capture_output=True, text=True)
        self.assertEqual(run.stdout.split()[-1:], ["20"], run.stderr)
        runs = self.folder / "parts", self.folder / "whole"
        torch.testing.assert_close(*(torch.load(run / "checkpoint.pt", weights_only=True)["model"] for run in runs), atol=0, rtol=0)
        self.assertEqual(*map(timeless, runs))

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
        trainer = Trainer(config(work_dir=str(self.folder), checkpoint_every=2), model, tokens(),
                          loss_fn=lambda model, batch: model(*batch)[1] * (math.nan if trainer.iter_num == 4 else 1.0))
        trainer.add_callback("on_batch_end", lambda t: good.update(weights=weights(model).clone()))
        self.assertRaisesRegex(FloatingPointError, "iteration 4: loss nan, gradient norm nan, learning rate 0.01", trainer.run)
        self.assertTrue(torch.equal(weights(model), good["weights"]))
        self.assertEqual(torch.load(self.folder / "checkpoint.pt", weights_only=True)["iter_num"], 4)

    def test_a_failed_write_leaves_the_old_checkpoint(self):
        trainer, _ = train(work_dir=str(self.folder), max_iters=2)
        before = trainer.folder.checkpoint.read_bytes()
        trainer.state_dict = lambda: {"model": lambda: None}  # cannot be pickled: breaks off in mid-file
        self.assertRaises(Exception, trainer.save_checkpoint)
        self.assertEqual(trainer.folder.checkpoint.read_bytes(), before)
        self.assertEqual(sorted(p.name for p in self.folder.iterdir()), ["checkpoint.pt", "metrics.jsonl"])

    def test_options_and_data(self):
        for name, value in (("batch_size", 0), ("max_iters", 1.5), ("lr_schedule", "step"), ("precision", "int8"),
                            ("grad_norm_clip", -1), ("warmup_iters", None)):
            self.assertRaisesRegex(ValueError, f"{name}={value!r}", train, **{name: value})
        for words, options in (("no options \\['max_iter'\\]", {"max_iter": 3}), ("needs a work_dir", {"tensorboard": True}),
                               ("needs an end", {"lr_schedule": "cosine", "max_iters": None})):
            self.assertRaisesRegex(ValueError, words, train, **options)
        for words, data in (("empty", ([],)), ("empty", (tokens(), [])), ("has 3 examples, fewer than batch_size=4", (tokens(3),))):
            self.assertRaisesRegex(ValueError, words, Trainer, config(), tiny_gpt(), *data)
        self.assertRaisesRegex(TypeError, "equally long tensors, not dict", train, None, [{"x": torch.ones(3)}] * 4)
