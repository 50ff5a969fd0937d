"""The training loop: batches, the optimizer's step, the schedule, resuming, stopping, refusing."""

import itertools
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import unittest
from pathlib import Path
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
    """The options of a short run on the CPU."""
    C = Trainer.get_default_config()
    C.merge_from_dict(
        {
            "device": "cpu",
            "batch_size": 4,
            "max_iters": 6,
            "learning_rate": 1e-2,
            "log_every": 1,
            **options,
        }
    )
    return C


def tokens(n=10):
    """n random examples of 5 tokens and their targets, the same ones each time."""
    x = torch.randint(11, (n, 6), generator=torch.Generator().manual_seed(7))
    return TensorDataset(x[:, :-1], x[:, 1:])


def train(model=None, data=None, valid=None, weight_fn=None, **options):
    """A trainer that has run, and the loss of each of its iterations."""
    trainer = Trainer(
        config(**options),
        model or tiny_gpt(),
        data or tokens(),
        valid,
        weight_fn=weight_fn,
    )
    losses = []
    trainer.add_callback("on_batch_end", lambda t: losses.append(t.loss.item()))
    trainer.run()
    return trainer, losses


def weights(model):
    """All weights of a model, in one vector."""
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def load_checkpoint(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def count_targets(batch):
    return int((batch[1] != -1).sum())


# --------------------------------------------------------------------------------------------------
# What the loop does


class TestBatches(unittest.TestCase):
    def batches(self, seed, start, n):
        """The dataset indices of n batches of 4, from number `start` on, of 10 examples."""
        trainer = Trainer(config(), tiny_gpt(seed), tokens(10))
        trainer.iter_num = start
        return list(itertools.islice(trainer.batch_indices(), n))

    def examples(self):
        """The indices of the first 15 batches, that is of 6 passes, one after the other."""
        return list(itertools.chain(*self.batches(1, 0, 15)))

    def test_every_batch_is_full(self):
        self.assertEqual({len(batch) for batch in self.batches(1, 0, 15)}, {4})

    def test_every_pass_sees_each_example_once(self):
        examples = self.examples()
        self.assertEqual(len(examples), 60)
        for start in range(0, 60, 10):
            self.assertEqual(sorted(examples[start : start + 10]), list(range(10)))

    def test_every_pass_has_an_order_of_its_own(self):
        examples = self.examples()
        self.assertNotEqual(examples[:10], examples[10:20])

    def test_a_batch_depends_on_the_seed_and_its_number_alone(self):
        self.assertEqual(self.batches(1, 7, 3), self.batches(1, 0, 15)[7:10])

    def test_another_seed_gives_other_batches(self):
        self.assertNotEqual(self.batches(2, 0, 15), self.batches(1, 0, 15))


class TestStep(unittest.TestCase):
    """A run of the trainer beside a bare loop that clips and calls AdamW itself."""

    @classmethod
    def setUpClass(cls):
        options = {"grad_norm_clip": 0.5, "weight_decay": 0.3, "eps": 1e-3}
        cls.trainer, cls.trainer_losses = train(**options)
        cls.model, cls.losses = cls.bare_loop()

    @staticmethod
    def bare_loop():
        model = tiny_gpt()
        groups = []
        for name, p in model.named_parameters():
            is_matrix = p.dim() == 2 and ".h." in name
            groups.append({"params": [p], "weight_decay": 0.3 if is_matrix else 0.0})
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
        return model, losses

    def test_the_weights_are_those_of_a_bare_loop(self):
        ours = weights(self.trainer.model)
        torch.testing.assert_close(ours, weights(self.model), atol=1e-5, rtol=0)

    def test_the_losses_are_those_of_a_bare_loop(self):
        ours = torch.tensor(self.trainer_losses)
        torch.testing.assert_close(ours, torch.tensor(self.losses), atol=5e-5, rtol=0)

    def test_the_loss_falls(self):
        self.assertLess(self.losses[-1], self.losses[0])


class TestMicroBatches(unittest.TestCase):
    """All examples form one batch of 8, which is split into micro-batches of different sizes."""

    def data_with_gaps(self):
        """Examples with unlike numbers of targets, so that a mean over tokens weighs them."""
        x, y = tokens(8).tensors
        y = y.clone()
        y[::2, 1:] = -1
        y[3] = -1  # nothing to learn here: in a micro-batch of its own, its mean loss is NaN
        return TensorDataset(x, y)

    def train(self, data, weight_fn, micro_batch_size):
        options = {"batch_size": 8, "max_iters": 3, "eps": 1e-3}
        return train(
            None, data, data, weight_fn, micro_batch_size=micro_batch_size, **options
        )[0]

    def check_same_weights(self, data, weight_fn):
        undivided = weights(self.train(data, weight_fn, None).model)
        for size in (3, 1):
            with self.subTest(micro_batch_size=size):
                divided = weights(self.train(data, weight_fn, size).model)
                torch.testing.assert_close(divided, undivided, atol=1e-5, rtol=0)

    def check_same_evaluation(self, data, weight_fn):
        for size in (None, 3, 1):
            with self.subTest(micro_batch_size=size):
                trainer = self.train(data, weight_fn, size)
                expected = trainer.model(*data.tensors)[1].item()
                self.assertAlmostEqual(trainer.evaluate(), expected, places=5)

    def test_they_add_up_to_the_batch_where_the_loss_is_a_mean_over_examples(self):
        self.check_same_weights(tokens(8), None)

    def test_they_add_up_to_the_batch_where_the_loss_is_a_mean_over_tokens(self):
        self.check_same_weights(self.data_with_gaps(), count_targets)

    def test_they_do_not_change_an_evaluation_where_the_loss_is_a_mean_over_examples(self):
        self.check_same_evaluation(tokens(8), None)

    def test_they_do_not_change_an_evaluation_where_the_loss_is_a_mean_over_tokens(self):
        self.check_same_evaluation(self.data_with_gaps(), count_targets)


class TestSchedule(unittest.TestCase):
    def test_schedules(self):
        # The learning rate in the iterations 0 and 9 of the warmup, and 35, 60 and 110 after it,
        # as a fraction of the highest. It is never 0: a step that changes nothing is no step.
        quarter_of_cosine = 0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2
        expected = {
            "constant": (0.1, 1.0, 1.0, 1.0, 1.0),
            "linear": (0.1, 1.0, 0.775, 0.55, 0.1),
            "cosine": (0.1, 1.0, quarter_of_cosine, 0.55, 0.1),
        }
        options = {"warmup_iters": 10, "max_iters": 110, "lr_final_fraction": 0.1}
        for schedule, fractions in expected.items():
            trainer = Trainer(config(lr_schedule=schedule, **options), tiny_gpt(), tokens())
            for iteration, fraction in zip((0, 9, 35, 60, 110), fractions, strict=True):
                with self.subTest(schedule, iteration=iteration):
                    trainer.iter_num = iteration
                    self.assertAlmostEqual(trainer.learning_rate() / 1e-2, fraction)


class TestEnd(unittest.TestCase):
    def iterations(self, **options):
        trainer, _ = train(data=tokens(10), **options)
        return trainer.iter_num

    def test_it_ends_after_max_iters(self):
        self.assertEqual(self.iterations(max_iters=3, epochs=None), 3)

    def test_it_ends_with_the_batch_in_which_the_last_epoch_ends(self):
        self.assertEqual(self.iterations(max_iters=None, epochs=3), 8)  # 30 examples, 4 a batch

    def test_with_both_it_ends_where_the_first_of_them_does(self):
        self.assertEqual(self.iterations(max_iters=4, epochs=9), 4)


class TestCallbacks(unittest.TestCase):
    def trainer(self):
        return Trainer(config(max_iters=2), tiny_gpt(), tokens())

    def test_they_see_the_number_of_the_current_iteration(self):
        trainer = self.trainer()
        seen = []
        trainer.add_callback("on_batch_end", lambda t: seen.append(t.iter_num))
        trainer.run()
        self.assertEqual(seen, [0, 1])

    def test_set_callback_takes_the_place_of_all_earlier_ones(self):
        trainer = self.trainer()
        seen = []
        trainer.add_callback("on_train_end", lambda t: seen.append("first"))
        trainer.add_callback("on_train_end", lambda t: seen.append("second"))
        trainer.set_callback("on_train_end", lambda t: seen.append("third"))
        trainer.run()
        self.assertEqual(seen, ["third"])

    def test_add_callback_refuses_an_unknown_event(self):
        with self.assertRaisesRegex(ValueError, "'on_step' is no event: use one of on_train_begin"):
            self.trainer().add_callback("on_step", print)

    def test_set_callback_refuses_an_unknown_event(self):
        with self.assertRaisesRegex(ValueError, "'on_step' is no event: use one of on_train_begin"):
            self.trainer().set_callback("on_step", print)


class TestMetrics(unittest.TestCase):
    """A run of 6 iterations, logged each time and evaluated every second time."""

    @classmethod
    def setUpClass(cls):
        cls.folder = Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
        cls.model = tiny_gpt()
        cls.valid = tokens(7)
        cls.trainer = Trainer(
            config(work_dir=str(cls.folder), eval_every=2),
            cls.model,
            tokens(),
            cls.valid,
            loss_fn=cls.loss_and_its_double,
        )
        cls.seen = []
        cls.trainer.add_callback(
            "on_batch_end", lambda t: cls.seen.append((t.iter_num, t.loss.item()))
        )
        cls.trainer.run()
        cls.rows = read_metrics(cls.folder / "metrics.jsonl")
        cls.evaluated = {row["iter"]: row for row in cls.rows if "valid_loss" in row}

    @staticmethod
    def loss_and_its_double(model, batch):
        _, loss = model(*batch)
        return loss, {"twice": 2 * loss.detach()}

    def test_callbacks_see_every_iteration(self):
        self.assertEqual([iteration for iteration, _ in self.seen], list(range(6)))

    def test_every_iteration_is_logged(self):
        self.assertEqual([row["iter"] for row in self.rows], list(range(1, 7)))

    def test_the_loss_is_logged(self):
        for (_, loss), row in zip(self.seen, self.rows, strict=True):
            self.assertAlmostEqual(row["loss"], loss)

    def test_the_metrics_of_the_loss_fn_are_logged(self):
        for (_, loss), row in zip(self.seen, self.rows, strict=True):
            self.assertAlmostEqual(row["twice"], 2 * loss, places=5)

    def test_learning_rate_gradient_norm_and_time_are_logged(self):
        for row in self.rows:
            self.assertLessEqual({"lr", "grad_norm", "seconds"}, row.keys())

    def test_it_is_evaluated_every_so_many_iterations(self):
        self.assertEqual(list(self.evaluated), [2, 4, 6])

    def test_valid_loss_is_the_mean_over_the_validation_examples(self):
        losses = [self.model(x[None], y[None])[1].item() for x, y in self.valid]
        self.assertAlmostEqual(self.trainer.valid_loss, sum(losses) / 7, places=5)

    def test_the_metrics_of_the_loss_fn_are_evaluated_and_logged_too(self):
        for row in self.evaluated.values():
            self.assertAlmostEqual(row["valid_twice"], 2 * row["valid_loss"], places=5)

    def test_best_valid_loss_is_the_lowest(self):
        lowest = min(row["valid_loss"] for row in self.evaluated.values())
        self.assertEqual(self.trainer.best_valid_loss, lowest)

    def test_the_best_weights_are_kept(self):
        self.assertTrue((self.folder / "best.pt").exists())


class TestEvaluation(TempDirTestCase):
    """An evaluation of 3 examples with 1, 2 and 5 targets, in batches of 2 and 1."""

    def setUp(self):
        super().setUp()
        x, y = tokens(3).tensors
        self.x, self.y = x, y.clone()
        self.y[0, 1:] = -1
        self.y[1, 2:] = -1

    @staticmethod
    def loss_and_accuracy(model, batch):
        logits, loss = model(*batch)
        targets = batch[1]
        is_target = targets != -1
        is_right = logits.argmax(-1) == targets
        return loss, {"accuracy": is_right[is_target].float().mean()}

    def trainer(self, x, y, **options):
        return Trainer(
            config(micro_batch_size=2, **options),
            tiny_gpt(),
            tokens(),
            TensorDataset(x, y),
            loss_fn=self.loss_and_accuracy,
            weight_fn=count_targets,
        )

    def test_metrics_are_averaged_by_weight(self):
        trainer = self.trainer(self.x, self.y)
        # Make the first example all right and the last one all wrong, so that the weights matter.
        predictions = trainer.model(self.x)[0].argmax(-1)
        y = torch.where(self.y == -1, -1, predictions)
        y[2] = (y[2] + 1) % 11
        trainer = self.trainer(self.x, y)
        trainer.evaluate()
        self.assertAlmostEqual(trainer.metrics["valid_accuracy"], 3 / 8, places=6)

    def test_the_averaged_metrics_are_those_of_all_targets_at_once(self):
        trainer = self.trainer(self.x, self.y)
        trainer.evaluate()
        loss, extra = self.loss_and_accuracy(trainer.model, (self.x, self.y))
        expected = {"valid_loss": loss.item(), "valid_accuracy": extra["accuracy"].item()}
        self.assertEqual(trainer.metrics.keys(), expected.keys())
        for name, value in expected.items():
            self.assertAlmostEqual(trainer.metrics[name], value, places=5)

    def test_a_batch_without_weight_does_not_count(self):
        self.y[2] = -1  # alone in its batch: both means are over nothing, so NaN
        trainer = self.trainer(self.x, self.y)
        trainer.evaluate()
        expected = trainer.model(self.x, self.y)[1].item()
        self.assertAlmostEqual(trainer.valid_loss, expected, places=5)
        self.assertTrue(math.isfinite(trainer.metrics["valid_accuracy"]))

    def test_metrics_are_logged(self):
        trainer = self.trainer(self.x, self.y, work_dir=str(self.folder), max_iters=1, eval_every=1)
        trainer.run()
        [row] = read_metrics(self.folder / "metrics.jsonl")
        self.assertEqual(row["valid_accuracy"], trainer.metrics["valid_accuracy"])


class TestPrecision(unittest.TestCase):
    def losses(self, precision):
        _, losses = train(precision=precision)
        return torch.tensor(losses)

    def test_mixed_precision_is_near_fp32_and_not_the_same(self):
        exact = self.losses("fp32")
        for precision in ("bf16", "fp16"):
            with self.subTest(precision):
                losses = self.losses(precision)
                self.assertFalse(torch.equal(losses, exact))
                torch.testing.assert_close(losses, exact, atol=0.05, rtol=0)

    def test_auto_is_fp32_on_a_cpu(self):
        self.assertTrue(torch.equal(self.losses("auto"), self.losses("fp32")))


class TestOverflow(unittest.TestCase):
    """Three iterations in fp16, the second of which has a gradient that overflows."""

    @classmethod
    def setUpClass(cls):
        model = tiny_gpt()

        def huge_in_iteration_1(model, batch):
            loss = model(*batch)[1]
            return loss * (1e38 if trainer.iter_num == 1 else 1.0)

        cls.weights = []
        cls.scales = []

        def note(trainer):
            cls.weights.append(weights(model))
            cls.scales.append(trainer.scaler.get_scale())

        options = config(precision="fp16", max_iters=3)
        trainer = Trainer(options, model, tokens(), loss_fn=huge_in_iteration_1)
        trainer.add_callback("on_batch_end", note)
        trainer.run()

    def test_the_step_is_skipped(self):
        self.assertTrue(torch.equal(self.weights[0], self.weights[1]))

    def test_the_scale_is_lowered(self):
        self.assertEqual(self.scales[1], self.scales[0] / 2)

    def test_the_next_step_is_taken(self):
        self.assertFalse(torch.equal(self.weights[1], self.weights[2]))


class TestCompile(unittest.TestCase):
    """A run with torch.compile beside one without."""

    @classmethod
    def setUpClass(cls):
        cls.trainer, cls.losses = train(valid=tokens(3))
        cls.compiled_trainer, cls.compiled_losses = train(valid=tokens(3), compile=True)

    def test_the_losses_are_the_same(self):
        compiled = torch.tensor([*self.compiled_losses, self.compiled_trainer.evaluate()])
        expected = torch.tensor([*self.losses, self.trainer.evaluate()])
        torch.testing.assert_close(compiled, expected, atol=1e-4, rtol=0)

    def test_the_names_of_the_weights_stay(self):
        names = set(tiny_gpt().state_dict())
        self.assertEqual(set(self.trainer.model.state_dict()), names)
        self.assertEqual(set(self.compiled_trainer.model.state_dict()), names)


class TestTensorBoard(TempDirTestCase):
    """What TensorBoard reads back of a run that was resumed after 4 of its 6 iterations."""

    def setUp(self):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        super().setUp()
        for iterations in (4, 6):
            train(work_dir=str(self.folder), max_iters=iterations, tensorboard=True)
        self.events = EventAccumulator(str(self.folder))
        self.events.Reload()

    def test_every_iteration_is_there_once(self):
        for name in ("loss", "lr", "grad_norm"):
            with self.subTest(name):
                steps = [event.step for event in self.events.Scalars(name)]
                self.assertEqual(steps, [1, 2, 3, 4, 5, 6])

    def test_the_values_are_those_of_metrics_jsonl(self):
        rows = read_metrics(self.folder / "metrics.jsonl")
        for name in ("loss", "lr", "grad_norm"):
            with self.subTest(name):
                logged = {row["iter"]: row[name] for row in rows}
                shown = {event.step: event.value for event in self.events.Scalars(name)}
                torch.testing.assert_close(shown, logged, atol=1e-6, rtol=1e-6)


class TestMinGPT(TempDirTestCase):
    """The interface that minGPT's own adder and chargpt use."""

    def setUp(self):
        super().setUp()
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
        with mock.patch("mingpt.utils.log_to_console"):  # not for the other tests as well
            setup_logging(C)
        set_seed(C.system.seed)
        model = GPT(C.model)
        trainer = Trainer(C.trainer, model, tokens())
        self.seen = []
        self.generated = []

        def batch_end_callback(trainer):
            self.seen.append((trainer.iter_num, trainer.iter_dt > 0, trainer.loss.item() > 0))
            model.eval()
            x = torch.tensor([[1, 2]]).to(trainer.device)
            self.generated.append(model.generate(x, 6, do_sample=True, top_k=10))
            model.train()

        trainer.set_callback("on_batch_end", batch_end_callback)
        trainer.run()

    def test_the_options_are_kept(self):
        options = json.loads((self.folder / "out" / "config.json").read_text())
        self.assertEqual(options["trainer"]["max_iters"], 3)

    def test_a_callback_finds_number_time_and_loss_on_the_trainer(self):
        self.assertEqual(self.seen, [(i, True, True) for i in range(3)])

    def test_a_callback_can_sample_past_block_size(self):
        self.assertEqual([tuple(idx.shape) for idx in self.generated], [(1, 8)] * 3)


# --------------------------------------------------------------------------------------------------
# Stopping and resuming


class TestResume(TempDirTestCase):
    def train(self, name, max_iters, **options):
        """Train in a folder of that name. Returns the weights and the metrics."""
        # With dropout, so that the random states matter.
        model = tiny_gpt(3, embd_pdrop=0.2, resid_pdrop=0.2, attn_pdrop=0.2)
        folder = self.folder / name
        options = {"work_dir": str(folder), "max_iters": max_iters, "eval_every": 3, **options}
        train(model, valid=tokens(5), **options)
        return weights(model), timeless(folder)

    def test_an_interrupted_run_ends_as_an_uninterrupted_one(self):
        for until in (3, 6, 12):
            resumed, resumed_rows = self.train("resumed", until)
        expected, expected_rows = self.train("uninterrupted", 12)
        self.assertTrue(torch.equal(resumed, expected))
        self.assertEqual(resumed_rows, expected_rows)

    def test_a_finished_run_is_left_as_it_is(self):
        expected, expected_rows = self.train("run", 3)
        again, rows = self.train("run", 3)
        self.assertTrue(torch.equal(again, expected))
        self.assertEqual(rows, expected_rows)

    def test_rows_of_a_run_that_died_before_its_first_checkpoint_go(self):
        folder = self.folder / "died"
        folder.mkdir()
        rows_left = '{"iter": 1, "loss": 9.0}\n{"iter": 2, "lo'
        (folder / "metrics.jsonl").write_text(rows_left)
        _, rows = self.train("died", 3)
        _, expected_rows = self.train("uninterrupted", 3)
        self.assertEqual(rows, expected_rows)

    def test_other_options_are_refused(self):
        self.train("run", 3)
        with self.assertRaisesRegex(ValueError, "learning_rate was 0.01, is 0.5"):
            self.train("run", 6, learning_rate=0.5)

    def test_another_end_is_refused_where_the_schedule_depends_on_it(self):
        self.train("run", 4, lr_schedule="linear")
        with self.assertRaisesRegex(ValueError, "max_iters was 4, is 8"):
            self.train("run", 8, lr_schedule="linear")


class TestWhatItSays(TempDirTestCase):
    def said(self, first_iterations):
        """What a run logs that continues after so many iterations."""
        options = {"work_dir": str(self.folder)}
        first_options = config(**options, max_iters=max(1, first_iterations))
        trainer = Trainer(first_options, tiny_gpt(), tokens())
        if first_iterations:
            trainer.run()
        else:
            trainer.save_checkpoint()
        with self.assertLogs("mingpt", "INFO") as logs:
            Trainer(config(**options), tiny_gpt(), tokens()).run()
        return "\n".join(logs.output)

    def test_that_it_continues_and_from_where(self):
        self.assertIn("checkpoint.pt, after iteration 3", self.said(3))

    def test_from_before_the_first_iteration_it_begins(self):
        self.assertNotIn("continues", self.said(0))


class TestOlderCheckpoint(TempDirTestCase):
    """A checkpoint from before warmup_iters was an option of the Trainer."""

    def setUp(self):
        super().setUp()
        train(work_dir=str(self.folder), max_iters=3)
        state = load_checkpoint(self.folder)
        del state["config"]["warmup_iters"]
        torch.save(state, self.folder / "checkpoint.pt")

    def test_it_resumes_with_the_default_of_the_new_option(self):
        trainer, losses = train(work_dir=str(self.folder), max_iters=6)
        uninterrupted, all_losses = train(max_iters=6)
        self.assertEqual(losses, all_losses[3:])
        self.assertTrue(torch.equal(weights(trainer.model), weights(uninterrupted.model)))

    def test_another_value_of_the_new_option_is_refused(self):
        with self.assertRaisesRegex(ValueError, "warmup_iters was 0, is 2"):
            train(work_dir=str(self.folder), max_iters=6, warmup_iters=2)

    def test_effective_options_fills_in_what_is_missing_and_keeps_the_rest(self):
        options = Trainer.effective_options({"batch_size": 3})
        expected = Trainer.get_default_config().to_dict() | {"batch_size": 3}
        self.assertEqual(options, expected)


class TestKilled(TempDirTestCase):
    # A process that has done nothing but import forks the runs: twenty starts at the price of one.
    SCRIPT = textwrap.dedent("""
        import multiprocessing
        import random
        import sys
        import time
        from pathlib import Path

        from tests.test_trainer import Trainer, config, tiny_gpt, tokens


        def train(folder):
            C = config(work_dir=str(folder), max_iters=400, checkpoint_every=1, eval_every=3)
            Trainer(C, tiny_gpt(3, resid_pdrop=0.2), tokens(), tokens(5)).run()


        def start(folder):
            process = multiprocessing.get_context("fork").Process(target=train, args=(folder,))
            process.start()
            return process


        def version(path):
            # each checkpoint is a new file
            return path.stat().st_ino if path.exists() else None


        folder = Path(sys.argv[1])
        start(folder / "uninterrupted").join()

        checkpoint = folder / "killed" / "checkpoint.pt"
        moment = random.Random(7)
        kills = 0
        for _ in range(20):
            before = version(checkpoint)
            deadline = time.time() + 20
            process = start(folder / "killed")
            # Wait for a new checkpoint, and then for some random moment after it.
            while process.is_alive() and time.time() < deadline and version(checkpoint) == before:
                pass
            time.sleep(moment.uniform(0, 0.05))
            process.kill()
            process.join()
            if process.exitcode == -9:
                kills += 1
        start(folder / "killed").join()
        print(kills)
    """)

    def test_killed_at_any_moment_it_ends_as_an_uninterrupted_run(self):
        run = subprocess.run(
            [sys.executable, "-c", self.SCRIPT, str(self.folder)],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        self.assertEqual(run.stdout.split()[-1:], ["20"], run.stderr)
        killed = self.folder / "killed"
        uninterrupted = self.folder / "uninterrupted"
        torch.testing.assert_close(
            load_checkpoint(killed)["model"],
            load_checkpoint(uninterrupted)["model"],
            atol=0,
            rtol=0,
        )
        self.assertEqual(timeless(killed), timeless(uninterrupted))


class TestSignals(TempDirTestCase):
    def check_that_it_finishes_the_iteration_and_saves(self, number, error):
        """Send the signal in iteration 4. Returns the error that it ended with."""
        model = tiny_gpt()
        trainer = Trainer(config(work_dir=str(self.folder), max_iters=50), model, tokens())

        def send_signal(trainer):
            if trainer.iter_num == 4:
                os.kill(os.getpid(), number)

        trainer.add_callback("on_batch_end", send_signal)
        with self.assertRaises(error) as raised:
            trainer.run()
        state = load_checkpoint(self.folder)
        self.assertEqual(state["iter_num"], 5)
        self.assertTrue(torch.equal(state["model"]["lm_head.weight"], model.lm_head.weight))
        return raised.exception

    def test_ctrl_c_finishes_the_iteration_and_saves(self):
        self.check_that_it_finishes_the_iteration_and_saves(signal.SIGINT, KeyboardInterrupt)

    def test_sigterm_finishes_the_iteration_saves_and_exits_with_143(self):
        error = self.check_that_it_finishes_the_iteration_and_saves(signal.SIGTERM, SystemExit)
        self.assertEqual(error.code, 143)


class TestCtrlC(TempDirTestCase):
    """A user's script, in a process of its own, that presses Ctrl-C in its fifth iteration."""

    SCRIPT = """
import logging
import signal
import sys
from tests.test_trainer import Trainer, config, tiny_gpt, tokens

logging.getLogger("mingpt").handlers.clear()  # the tests' own
presses, work_dir = int(sys.argv[1]), sys.argv[2] or None
trainer = Trainer(config(work_dir=work_dir, max_iters=100), tiny_gpt(), tokens())

def press(trainer):
    if trainer.iter_num == 4:
        for _ in range(presses):
            signal.raise_signal(signal.SIGINT)

trainer.add_callback("on_batch_end", press)
"""

    def run_script(self, presses=1, work_dir="", end="trainer.run()"):
        """What a script that ends with these lines writes to the console; its exit status."""
        run = subprocess.run(
            [sys.executable, "-c", self.SCRIPT + end, str(presses), work_dir],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        return run.stderr, run.returncode

    def test_it_says_where_the_run_is_saved_and_shows_no_traceback(self):
        console, status = self.run_script(work_dir=str(self.folder))
        name = self.folder.name
        self.assertEqual(
            console.splitlines()[1:],
            [
                "Ctrl-C: stops after this iteration (press it again to stop at once)",
                f"{name}: stopped after iteration 5, saved in {self.folder}: the same command "
                "continues from there",
            ],
        )
        # As a shell sees it, 130: ended by SIGINT, so that a loop of the shell ends, too.
        self.assertEqual(status, -signal.SIGINT)
        self.assertEqual(load_checkpoint(self.folder)["iter_num"], 5)

    def test_without_a_work_dir_it_says_that_nothing_is_kept(self):
        console, status = self.run_script()
        words = "training: stopped after iteration 5, nothing is kept: no work_dir"
        self.assertEqual(console.splitlines()[-1], words)
        self.assertEqual(status, -signal.SIGINT)

    def test_pressed_twice_it_ends_in_the_middle_of_an_iteration(self):
        console, status = self.run_script(presses=2, work_dir=str(self.folder))
        self.assertEqual(console.splitlines()[-1], "stopped in the middle of an iteration")
        self.assertEqual(status, -signal.SIGINT)
        self.assertFalse((self.folder / "checkpoint.pt").exists())

    def test_a_script_may_catch_it_and_a_later_error_has_its_traceback(self):
        end = """
try:
    trainer.run()
except KeyboardInterrupt:
    raise KeyboardInterrupt("of the script's own") from None
"""
        console, status = self.run_script(end=end)
        self.assertIn("Traceback", console)
        self.assertIn("KeyboardInterrupt: of the script's own", console)
        self.assertEqual(status, -signal.SIGINT)


class TestFailure(TempDirTestCase):
    def test_nan_loss_stops_before_the_weights_are_touched(self):
        model = tiny_gpt()

        def nan_in_iteration_4(model, batch):
            loss = model(*batch)[1]
            return loss * (math.nan if trainer.iter_num == 4 else 1.0)

        good = []
        options = config(work_dir=str(self.folder), checkpoint_every=2)
        trainer = Trainer(options, model, tokens(), loss_fn=nan_in_iteration_4)
        trainer.add_callback("on_batch_end", lambda t: good.append(weights(model).clone()))
        message = "iteration 4: loss nan, gradient norm nan, learning rate 0.01"
        with self.assertRaisesRegex(FloatingPointError, message):
            trainer.run()
        self.assertTrue(torch.equal(weights(model), good[-1]))
        self.assertEqual(load_checkpoint(self.folder)["iter_num"], 4)

    def test_a_failed_write_leaves_the_old_checkpoint_and_nothing_else(self):
        trainer, _ = train(work_dir=str(self.folder), max_iters=2)
        before = trainer.folder.checkpoint.read_bytes()
        # A function inside a function cannot be pickled: the write breaks off in the middle.
        state = {**trainer.state_dict(), "not to be pickled": lambda: None}
        with (
            mock.patch.object(trainer, "state_dict", return_value=state),
            self.assertRaisesRegex(Exception, "pickle"),
        ):
            trainer.save_checkpoint()
        self.assertEqual(trainer.folder.checkpoint.read_bytes(), before)
        names = sorted(path.name for path in self.folder.iterdir())
        self.assertEqual(names, ["checkpoint.pt", "metrics.jsonl"])


# --------------------------------------------------------------------------------------------------
# Refusing


class TestOptions(unittest.TestCase):
    def test_a_value_that_is_not_allowed_is_named(self):
        values = {
            "batch_size": 0,
            "max_iters": 1.5,
            "lr_schedule": "step",
            "precision": "int8",
            "grad_norm_clip": -1,
            "warmup_iters": None,
        }
        for name, value in values.items():
            with self.subTest(name), self.assertRaisesRegex(ValueError, f"{name}={value!r}"):
                train(**{name: value})

    def test_an_unknown_option_is_named(self):
        with self.assertRaisesRegex(ValueError, r"Trainer has no options \['max_iter'\]"):
            train(max_iter=3)

    def test_missing_options_are_named(self):
        C = config()
        del C.eps
        del C.tensorboard
        with self.assertRaisesRegex(ValueError, r"lacks the options \['eps', 'tensorboard'\]"):
            Trainer(C, tiny_gpt(), tokens())

    def test_tensorboard_needs_a_work_dir(self):
        with self.assertRaisesRegex(ValueError, "tensorboard=True needs a work_dir"):
            train(tensorboard=True)

    def test_a_decay_needs_an_end(self):
        with self.assertRaisesRegex(ValueError, "lr_schedule='cosine' needs an end"):
            train(lr_schedule="cosine", max_iters=None)


class TestCheckConfig(unittest.TestCase):
    """The options can be checked without a trainer."""

    def test_good_options_pass(self):
        self.assertIsNone(Trainer.check_config(config(), world_size=2))

    def test_a_value_that_is_not_allowed_is_refused(self):
        with self.assertRaisesRegex(ValueError, "batch_size=0 must be a whole number"):
            Trainer.check_config(config(batch_size=0))

    def test_a_batch_that_the_processes_cannot_divide_is_refused(self):
        message = "batch_size=5 cannot be divided equally among 2 processes: choose a multiple"
        with self.assertRaisesRegex(ValueError, message):
            Trainer.check_config(config(batch_size=5), world_size=2)

    def test_a_single_process_takes_any_batch_size(self):
        self.assertIsNone(Trainer.check_config(config(batch_size=5)))


class TestData(unittest.TestCase):
    def test_an_empty_train_dataset_is_refused(self):
        with self.assertRaisesRegex(ValueError, "train_dataset is empty or has no length"):
            Trainer(config(), tiny_gpt(), [])

    def test_a_train_dataset_without_length_is_refused(self):
        with self.assertRaisesRegex(ValueError, "train_dataset is empty or has no length"):
            Trainer(config(), tiny_gpt(), None)

    def test_an_empty_valid_dataset_is_refused(self):
        with self.assertRaisesRegex(ValueError, "valid_dataset is empty or has no length"):
            Trainer(config(), tiny_gpt(), tokens(), [])

    def test_fewer_examples_than_batch_size_are_refused(self):
        message = "train_dataset has 3 examples, fewer than batch_size=4"
        with self.assertRaisesRegex(ValueError, message):
            Trainer(config(), tiny_gpt(), tokens(3))

    def test_a_batch_that_is_no_tuple_is_refused(self):
        with self.assertRaisesRegex(TypeError, "equally long tensors, not dict: pass a collate_fn"):
            train(data=[{"x": torch.ones(3)}] * 4)

    def test_a_batch_that_holds_more_than_tensors_is_refused(self):
        message = r"equally long tensors, not list of \[\(4, 3\), 'tuple'\]: pass a collate_fn"
        with self.assertRaisesRegex(TypeError, message):
            train(data=[(torch.ones(3), "a text")] * 4)

    def test_a_batch_of_unequally_long_tensors_is_refused(self):
        def unequal(items):
            return torch.ones(4), torch.ones(3)

        trainer = Trainer(config(), tiny_gpt(), tokens(), collate_fn=unequal)
        message = r"equally long tensors, not tuple of \[\(4,\), \(3,\)\]: pass a collate_fn"
        with self.assertRaisesRegex(TypeError, message):
            trainer.run()
