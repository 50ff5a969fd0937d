"""The training loop: batches, the optimizer's step, the schedule, resuming, stopping, refusals."""

import itertools
import json
import math
import os
import pickle
import signal
import subprocess
import sys
import textwrap
from unittest import mock

import torch
from torch.utils.data import TensorDataset

from mingpt.config import CfgNode as CN
from mingpt.model import GPT
from mingpt.run_folder import read_metrics
from mingpt.trainer import Trainer
from mingpt.utils import set_seed, setup_logging
from tests.common import ROOT, TempDirTestCase, timeless, tiny_gpt


def config(**options):
    """A few short iterations on the CPU."""
    defaults = Trainer.get_default_config()
    base = {"device": "cpu", "batch_size": 4, "max_iters": 6, "learning_rate": 1e-2, "log_every": 1}
    defaults.merge_from_dict({**base, **options})
    return defaults


def tokens(n=10):
    """n examples (x, y) of five tokens."""
    x = torch.randint(11, (n, 6), generator=torch.Generator().manual_seed(7))
    return TensorDataset(x[:, :-1], x[:, 1:])


def train(model=None, data=None, valid=None, weight_fn=None, **options):
    """A trainer that has run, and the loss of each of its iterations."""
    losses = []
    trainer = Trainer(
        config(**options), model or tiny_gpt(), data or tokens(), valid, weight_fn=weight_fn
    )
    trainer.add_callback("on_batch_end", lambda trainer: losses.append(trainer.loss.item()))
    trainer.run()
    return trainer, losses


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


class TestBatches(TempDirTestCase):
    def batches(self, seed, start, n):
        """n lists of indices from batch number start on."""
        trainer = Trainer(config(), tiny_gpt(seed), tokens(10))
        trainer.iter_num = start
        return list(itertools.islice(trainer.batch_indices(), n))

    def test_every_pass_sees_each_example_once(self):
        batches = self.batches(seed=1, start=0, n=15)
        self.assertEqual({len(batch) for batch in batches}, {4})
        examples = list(itertools.chain(*batches))
        for start in range(0, 60, 10):
            self.assertEqual(sorted(examples[start : start + 10]), list(range(10)))
        self.assertNotEqual(examples[:10], examples[10:20])

    def test_a_batch_depends_on_seed_and_number_alone(self):
        batches = self.batches(seed=1, start=0, n=15)
        self.assertEqual(self.batches(seed=1, start=7, n=3), batches[7:10])
        self.assertNotEqual(self.batches(seed=2, start=0, n=15), batches)

    def test_a_batch_must_be_a_tuple_of_tensors(self):
        dicts = [{"x": torch.ones(3)}] * 4
        self.assertRaisesRegex(TypeError, "equally long tensors, not dict", train, None, dicts)

    def test_its_tensors_must_be_equally_long(self):
        trainer = Trainer(
            config(), tiny_gpt(), tokens(), collate_fn=lambda items: (torch.ones(4), torch.ones(3))
        )
        self.assertRaisesRegex(TypeError, r"not of \[\(4,\), \(3,\)\]", trainer.run)


class TestStep(TempDirTestCase):
    def test_the_step_is_that_of_a_bare_loop(self):
        trainer, seen = train(grad_norm_clip=0.5, weight_decay=0.3, eps=1e-3)
        model = tiny_gpt()
        groups = []
        for name, p in model.named_parameters():
            decays = p.dim() == 2 and ".h." in name
            groups.append({"params": [p], "weight_decay": 0.3 if decays else 0.0})
        optimizer = torch.optim.AdamW(groups, 1e-2, (0.9, 0.95), eps=1e-3)
        losses = []
        batches = Trainer(config(), tiny_gpt(), tokens()).batches()
        for batch in itertools.islice(batches, 6):
            loss = model(*batch)[1]
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
            for p, gradient in zip(model.parameters(), gradients, strict=True):
                p.grad = gradient * min(1.0, 0.5 / (norm + 1e-6))
            optimizer.step()
            losses.append(loss.item())
        torch.testing.assert_close(weights(trainer.model), weights(model), atol=1e-5, rtol=0)
        torch.testing.assert_close(torch.tensor(seen), torch.tensor(losses), atol=5e-5, rtol=0)
        self.assertLess(losses[-1], losses[0])

    def check_micro_batches(self, x, targets, weight_fn=None):
        """The size of the micro-batches changes neither the weights nor the evaluation."""
        data = TensorDataset(x, targets)
        options = {"batch_size": 8, "max_iters": 3, "eps": 1e-3}
        whole, _ = train(None, data, data, weight_fn, **options)
        for size in (3, 1):
            trainer, _ = train(None, data, data, weight_fn, micro_batch_size=size, **options)
            expected = weights(whole.model)
            torch.testing.assert_close(weights(trainer.model), expected, atol=1e-5, rtol=0)
        for size in (None, 3, 1):
            trainer, _ = train(None, data, data, weight_fn, micro_batch_size=size, **options)
            loss = trainer.model(x, targets)[1].item()
            self.assertAlmostEqual(trainer.evaluate(), loss, places=5)

    def test_micro_batches_add_up_to_the_batch(self):
        self.check_micro_batches(*tokens(8).tensors)

    def test_micro_batches_add_up_by_what_the_loss_is_a_mean_over(self):
        x, y = tokens(8).tensors
        y = y.clone()
        y[::2, 1:] = -1
        y[3] = -1  # nothing to learn here: alone in its micro-batch, its mean is NaN
        self.check_micro_batches(x, y, lambda batch: int((batch[1] != -1).sum()))

    def test_a_gradient_that_overflows_in_fp16_skips_the_step_and_lowers_the_scale(self):
        model, seen = tiny_gpt(), []

        def loss_fn(model, batch):
            overflows = trainer.iter_num == 1
            return model(*batch)[1] * (1e38 if overflows else 1.0)

        trainer = Trainer(
            config(precision="fp16", max_iters=3), model, tokens(), loss_fn=loss_fn
        )
        trainer.add_callback(
            "on_batch_end", lambda t: seen.append((weights(model), trainer.scaler.get_scale()))
        )
        trainer.run()
        (first, scale), (second, lowered), (third, _) = seen
        self.assertTrue(torch.equal(first, second))
        self.assertEqual(lowered, scale / 2)
        self.assertFalse(torch.equal(second, third))

    def test_mixed_precision_is_nearly_the_same_run(self):
        _, exact = train(precision="fp32")
        for precision in ("bf16", "fp16"):
            _, losses = train(precision=precision)
            self.assertNotEqual(losses, exact)
            torch.testing.assert_close(
                torch.tensor(losses), torch.tensor(exact), atol=0.05, rtol=0
            )

    def test_auto_is_never_bf16_on_a_cpu(self):
        self.assertEqual(train(precision="auto")[1], train(precision="fp32")[1])

    def test_compiled_it_is_the_same_run(self):
        outcomes = []
        for compile in (False, True):
            trainer, losses = train(valid=tokens(3), compile=compile)
            outcomes.append(torch.tensor([*losses, trainer.evaluate()]))
            self.assertEqual(set(trainer.model.state_dict()), set(tiny_gpt().state_dict()))
        torch.testing.assert_close(*outcomes, atol=1e-4, rtol=0)


class TestSchedule(TempDirTestCase):
    def test_schedules(self):
        quarter = 0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2  # of a cosine's way down
        rates = {
            "constant": (0.1, 1.0, 1.0, 1.0, 1.0),
            "linear": (0.1, 1.0, 0.775, 0.55, 0.1),
            "cosine": (0.1, 1.0, quarter, 0.55, 0.1),
        }
        for schedule, expected in rates.items():
            options = {"warmup_iters": 10, "max_iters": 110, "lr_final_fraction": 0.1}
            trainer = Trainer(config(lr_schedule=schedule, **options), tiny_gpt(), tokens())
            # The first rate is not 0: a step that does nothing is no step.
            for i, rate in zip((0, 9, 35, 60, 110), expected, strict=True):
                trainer.iter_num = i
                self.assertAlmostEqual(trainer.learning_rate() / 1e-2, rate)

    def test_stop_rules(self):
        for max_iters, epochs, iterations in ((3, None, 3), (None, 3, 8), (4, 9, 4)):
            trainer, _ = train(data=tokens(10), max_iters=max_iters, epochs=epochs)
            self.assertEqual(trainer.iter_num, iterations)


class TestCallbacksAndMetrics(TempDirTestCase):
    def setUp(self):
        super().setUp()

        def loss_fn(model, batch):
            loss = model(*batch)[1]
            return loss, {"twice": 2 * loss.detach()}

        self.valid = tokens(7)
        self.model = tiny_gpt()
        self.seen = []
        options = {"work_dir": str(self.folder), "eval_every": 2}
        self.trainer = Trainer(
            config(**options), self.model, tokens(), self.valid, loss_fn=loss_fn
        )
        self.trainer.add_callback(
            "on_batch_end", lambda t: self.seen.append((t.iter_num, t.loss.item()))
        )
        self.trainer.run()
        self.rows = read_metrics(self.folder / "metrics.jsonl")

    def test_callbacks_see_the_number_of_the_iteration(self):
        self.assertEqual([i for i, _ in self.seen], list(range(6)))

    def test_a_row_for_each_iteration(self):
        self.assertEqual([row["iter"] for row in self.rows], list(range(1, 7)))
        for (_, loss), row in zip(self.seen, self.rows, strict=True):
            self.assertAlmostEqual(row["loss"], loss)
            self.assertAlmostEqual(row["twice"], 2 * loss, places=5)
            self.assertLessEqual({"lr", "grad_norm", "seconds"}, row.keys())

    def test_the_validation_loss_is_the_mean_over_the_examples(self):
        losses = [self.model(x[None], y[None])[1].item() for x, y in self.valid]
        self.assertAlmostEqual(self.trainer.valid_loss, sum(losses) / 7, places=5)

    def test_evaluations_are_logged_and_the_best_weights_kept(self):
        evaluated = {row["iter"]: row["valid_loss"] for row in self.rows if "valid_loss" in row}
        self.assertEqual(list(evaluated), [2, 4, 6])
        self.assertEqual(self.trainer.best_valid_loss, min(evaluated.values()))
        self.assertTrue((self.folder / "best.pt").exists())

    def test_metrics_of_the_loss_fn_are_evaluated_too(self):
        for row in self.rows:
            self.assertEqual("valid_loss" in row, "valid_twice" in row)
            if "valid_loss" in row:
                self.assertAlmostEqual(row["valid_twice"], 2 * row["valid_loss"], places=5)

    def test_an_event_that_never_happens_is_refused(self):
        for add in (self.trainer.add_callback, self.trainer.set_callback):
            self.assertRaisesRegex(ValueError, "on_step_end", add, "on_step_end", print)

    def test_set_callback_takes_the_place_of_all_others(self):
        calls = []
        trainer = Trainer(config(max_iters=1), tiny_gpt(), tokens())
        trainer.add_callback("on_batch_end", lambda trainer: calls.append("first"))
        trainer.set_callback("on_batch_end", lambda trainer: calls.append("second"))
        trainer.run()
        self.assertEqual(calls, ["second"])


class TestOutput(TempDirTestCase):
    def test_tensorboard_holds_the_same_rows_and_survives_a_resume(self):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        for iterations in (4, 6):
            train(work_dir=str(self.folder), max_iters=iterations, tensorboard=True)
        events = EventAccumulator(str(self.folder))
        events.Reload()
        for name in ("loss", "lr", "grad_norm"):
            rows = read_metrics(self.folder / "metrics.jsonl")
            expected = {row["iter"]: row[name] for row in rows}
            found = {event.step: event.value for event in events.Scalars(name)}
            self.assertEqual(
                [event.step for event in events.Scalars(name)], [1, 2, 3, 4, 5, 6]
            )
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)

    def test_the_interface_that_adder_and_chargpt_use(self):
        C = CN()
        C.system = CN(seed=3407, work_dir=str(self.folder / "out"))
        C.model = GPT.get_default_config()
        C.model.model_type = "gpt-nano"
        C.model.vocab_size = 11
        C.model.block_size = 5
        C.trainer = Trainer.get_default_config()
        C.trainer.learning_rate = 5e-4
        C.merge_from_args(
            ["--trainer.max_iters=3", "--trainer.batch_size=4", "--trainer.device=cpu"]
        )
        with mock.patch("mingpt.utils.log_to_console"):  # or all other tests would log as well
            setup_logging(C)
        set_seed(C.system.seed)
        saved = json.loads((self.folder / "out" / "config.json").read_text(encoding="utf-8"))
        self.assertEqual(saved["trainer"]["max_iters"], 3)

        model, seen = GPT(C.model), []
        trainer = Trainer(C.trainer, model, tokens())

        def batch_end_callback(trainer):
            model.eval()
            x = torch.tensor([[1, 2]]).to(trainer.device)
            y = model.generate(x, 6, do_sample=True, top_k=10)  # past block_size, too
            seen.append((trainer.iter_num, trainer.iter_dt, trainer.loss.item(), y))
            model.train()

        trainer.set_callback("on_batch_end", batch_end_callback)
        trainer.run()
        self.assertEqual([i for i, *_ in seen], [0, 1, 2])
        for _, seconds, loss, y in seen:
            self.assertGreater(seconds, 0)
            self.assertGreater(loss, 0)
            self.assertEqual(y.shape, (1, 8))


class TestResume(TempDirTestCase):
    def train(self, name, max_iters, **options):
        """Train with dropout, so that the random states matter."""
        model = tiny_gpt(3, embd_pdrop=0.2, resid_pdrop=0.2, attn_pdrop=0.2)
        folder = self.folder / name
        options = {"work_dir": str(folder), "max_iters": max_iters, "eval_every": 3, **options}
        train(model, valid=tokens(5), **options)
        return weights(model), timeless(folder)

    def test_an_interrupted_run_ends_as_one_that_was_left_alone(self):
        # The folder of a run that died before its first checkpoint.
        (self.folder / "parts").mkdir()
        leftovers = '{"iter": 1, "loss": 9.0}\n{"iter": 2, "lo'
        (self.folder / "parts" / "metrics.jsonl").write_text(leftovers, encoding="utf-8")
        for until in (3, 6, 12, 12):  # the last time it is finished already, and left as it is
            parts, rows_of_parts = self.train("parts", until)
        whole, rows = self.train("whole", 12)
        self.assertTrue(torch.equal(whole, parts))
        self.assertEqual(rows, rows_of_parts)

    def test_other_options_are_refused(self):
        self.train("constant", 3)
        message = "learning_rate was 0.01, is 0.5"
        with self.assertRaisesRegex(ValueError, message):
            self.train("constant", 6, learning_rate=0.5)

    def test_another_end_is_refused_where_the_schedule_depends_on_it(self):
        self.train("linear", 4, lr_schedule="linear")
        with self.assertRaisesRegex(ValueError, "max_iters was 4, is 8"):
            self.train("linear", 8, lr_schedule="linear")

    def test_an_option_that_the_checkpoint_lacks_counts_as_its_default(self):
        self.train("old", 3)
        path = self.folder / "old" / "checkpoint.pt"
        state = torch.load(path, weights_only=True)
        del state["config"]["weight_decay"], state["config"]["compile"]
        torch.save(state, path)
        resumed, _ = self.train("old", 6)
        whole, _ = self.train("whole", 6)
        self.assertTrue(torch.equal(resumed, whole))

    def test_killed_at_any_moment(self):
        # A process that has done nothing but import forks the runs: twenty starts cost like one.
        script = textwrap.dedent("""
            import multiprocessing, pathlib, random, sys, time
            from tests.test_trainer import config, tokens, Trainer, tiny_gpt

            def train(folder):
                options = {"work_dir": str(folder), "max_iters": 400}
                often = {"checkpoint_every": 1, "eval_every": 3}
                model = tiny_gpt(3, resid_pdrop=0.2)
                Trainer(config(**options, **often), model, tokens(), tokens(5)).run()

            def start(folder):
                context = multiprocessing.get_context("fork")
                process = context.Process(target=train, args=(folder,))
                process.start()
                return process

            def written():
                return checkpoint.exists() and checkpoint.stat().st_ino

            folder = pathlib.Path(sys.argv[1])
            start(folder / "whole").join()
            checkpoint = folder / "parts" / "checkpoint.pt"
            moment = random.Random(7)
            kills = 0
            for _ in range(20):
                before = written()
                deadline = time.time() + 20
                process = start(folder / "parts")
                # Wait until it has written something new, and then a random moment more.
                while process.is_alive() and time.time() < deadline and written() == before:
                    pass
                time.sleep(moment.uniform(0, 0.05))
                process.kill()
                process.join()
                kills += process.exitcode == -9
            start(folder / "parts").join()
            print(kills)
        """)
        command = [sys.executable, "-c", script, str(self.folder)]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        self.assertEqual(run.stdout.split()[-1:], ["20"], run.stderr)
        parts, whole = self.folder / "parts", self.folder / "whole"
        torch.testing.assert_close(
            torch.load(parts / "checkpoint.pt", weights_only=True)["model"],
            torch.load(whole / "checkpoint.pt", weights_only=True)["model"],
            atol=0,
            rtol=0,
        )
        self.assertEqual(timeless(parts), timeless(whole))


class TestSignals(TempDirTestCase):
    def interrupt(self, number, error):
        """A run that gets a signal in its fifth iteration: the model, and what was raised."""
        model = tiny_gpt()
        trainer = Trainer(config(work_dir=str(self.folder), max_iters=50), model, tokens())

        def send(trainer):
            if trainer.iter_num == 4:
                os.kill(os.getpid(), number)

        trainer.add_callback("on_batch_end", send)
        with self.assertRaises(error) as raised:
            trainer.run()
        return model, raised.exception

    def assert_saved(self, model):
        state = torch.load(self.folder / "checkpoint.pt", weights_only=True)
        self.assertEqual(state["iter_num"], 5)
        self.assertTrue(torch.equal(state["model"]["lm_head.weight"], model.lm_head.weight))

    def test_ctrl_c_finishes_the_iteration_and_saves(self):
        model, _ = self.interrupt(signal.SIGINT, KeyboardInterrupt)
        self.assert_saved(model)

    def test_sigterm_finishes_the_iteration_and_saves(self):
        model, stop = self.interrupt(signal.SIGTERM, SystemExit)
        self.assertEqual(stop.code, 143)
        self.assert_saved(model)


class TestFailures(TempDirTestCase):
    def test_nan_loss_stops_before_the_weights_are_touched(self):
        model, good = tiny_gpt(), {}

        def loss_fn(model, batch):
            return model(*batch)[1] * (math.nan if trainer.iter_num == 4 else 1.0)

        options = {"work_dir": str(self.folder), "checkpoint_every": 2}
        trainer = Trainer(config(**options), model, tokens(), loss_fn=loss_fn)
        trainer.add_callback("on_batch_end", lambda t: good.update(weights=weights(model).clone()))
        message = "iteration 4: loss nan, gradient norm nan, learning rate 0.01"
        self.assertRaisesRegex(FloatingPointError, message, trainer.run)
        self.assertTrue(torch.equal(weights(model), good["weights"]))
        state = torch.load(self.folder / "checkpoint.pt", weights_only=True)
        self.assertEqual(state["iter_num"], 4)

    def test_a_failed_write_leaves_the_old_checkpoint(self):
        trainer, _ = train(work_dir=str(self.folder), max_iters=2)
        before = trainer.folder.checkpoint.read_bytes()
        # A function inside a function cannot be pickled: the write breaks off in mid-file.
        trainer.state_dict = lambda: {"model": lambda: None}
        self.assertRaises((pickle.PicklingError, AttributeError), trainer.save_checkpoint)
        self.assertEqual(trainer.folder.checkpoint.read_bytes(), before)
        files = sorted(path.name for path in self.folder.iterdir())
        self.assertEqual(files, ["checkpoint.pt", "metrics.jsonl"])


class TestRefusals(TempDirTestCase):
    def refuses(self, message, **options):
        self.assertRaisesRegex(ValueError, message, train, **options)

    def test_values_out_of_range(self):
        for name, value in (
            ("batch_size", 0),
            ("max_iters", 1.5),
            ("lr_schedule", "step"),
            ("precision", "int8"),
            ("grad_norm_clip", -1),
            ("warmup_iters", None),
        ):
            self.refuses(f"{name}={value!r}", **{name: value})

    def test_an_option_that_does_not_exist(self):
        self.refuses(r"no options \['max_iter'\]", max_iter=3)

    def test_a_config_that_lacks_options(self):
        incomplete = CN(batch_size=4, max_iters=1, device="cpu", work_dir=None)
        with self.assertRaisesRegex(ValueError, r"lacks the options \['betas', .* of Trainer"):
            Trainer(incomplete, tiny_gpt(), tokens())

    def test_tensorboard_without_a_folder(self):
        self.refuses("needs a work_dir", tensorboard=True)

    def test_a_decay_without_an_end(self):
        self.refuses("needs an end", lr_schedule="cosine", max_iters=None)

    def test_a_batch_that_the_processes_cannot_share(self):
        Trainer.check_config(config(), world_size=2)  # works without a trainer
        with self.assertRaisesRegex(ValueError, "batch_size=4 cannot be divided .* 3 processes"):
            Trainer.check_config(config(), world_size=3)

    def test_data(self):
        for message, data in (
            ("empty", ([],)),
            ("empty", (tokens(), [])),
            ("has 3 examples, fewer than batch_size=4", (tokens(3),)),
        ):
            self.assertRaisesRegex(ValueError, message, Trainer, config(), tiny_gpt(), *data)
