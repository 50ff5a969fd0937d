"""stages.py: what is checked, locked, left behind and taken from another run."""

import json
import signal
import unittest
from unittest import mock

import torch
from torch.utils.data import TensorDataset

from mingpt.chars import CharTokenizer
from mingpt.config import CfgNode
from mingpt.model import GPT
from mingpt.rlhf import PPOTrainer, RewardModel
from mingpt.stages import Stages
from mingpt.trainer import Trainer
from mingpt.utils import set_seed
from tests.common import TempDirTestCase, tiny_gpt

TOKENIZER = CharTokenizer("abcdefghij")  # the end of a text is 10


def get_config():
    """A script's config: three stages, and options that they share."""
    config = CfgNode()
    config.system = CfgNode(seed=1, work_dir="out")
    config.report = CfgNode(samples=10)
    config.data = CfgNode(path="texts")
    for stage in ("pretrain", "sft", "rl"):
        trainer_class = PPOTrainer if stage == "rl" else Trainer
        section = trainer_class.get_default_config()
        del section.work_dir
        section.merge_from_dict({"max_iters": 2, "batch_size": 4, "device": "cpu"})
        setattr(config, stage, section)
    config.rl.max_new_tokens = 4
    config.rl.reward = "length"  # the script's own option, none of PPOTrainer's
    return config


ORDER = {"pretrain": Trainer, "sft": Trainer, "rl": PPOTrainer}


def length_of(idx, attention_mask, completion_mask):
    """A reward function: the number of tokens written."""
    return completion_mask.sum(1).float()


class StagesTestCase(TempDirTestCase):
    def make(self, folder="run", order=ORDER, base=None, **options):
        """The Stages of a config with some options changed: sft_max_iters=3 is sft.max_iters."""
        config = get_config()
        for name, value in options.items():
            section, _, option = name.partition("_")
            setattr(getattr(config, section), option, value)
        return Stages(
            config,
            self.folder / folder,
            order,
            base and self.folder / base,
            extras={"rl": ["reward"]},
            free=["system.work_dir", "report.*"],
            tokenizer=TOKENIZER,
        )

    def make_trainer(self, stages, name):
        """A function that makes the trainer of a stage, which starts from the stage before."""

        def make():
            set_seed(1)
            if name == "rl":
                policy = stages.load("sft", device="cpu")
                config = stages.trainer_config("rl")
                return PPOTrainer(config, policy, length_of, [[10]], tokenizer=TOKENIZER)
            model = tiny_gpt() if name == "pretrain" else stages.load("pretrain", device="cpu")
            ids = torch.arange(96).view(8, 12)
            return Trainer(stages.trainer_config(name), model, TensorDataset(ids % 11, ids % 7))

        return make

    def run_stages(self, stages, *names):
        """Run these stages; {name: what run() returned}."""
        return {name: stages.run(name, self.make_trainer(stages, name)) for name in names}

    def weights(self, stages, name):
        return stages.load(name, device="cpu").state_dict()


class TestRun(StagesTestCase):
    def test_a_finished_stage_is_skipped(self):
        stages = self.make()
        self.assertIsInstance(self.run_stages(stages, "pretrain")["pretrain"], Trainer)
        forbidden = mock.Mock(side_effect=AssertionError("it is finished"))
        self.assertIsNone(stages.run("pretrain", forbidden))
        self.assertIsNone(self.make().run("pretrain", forbidden))

    def test_each_stage_begins_with_the_model_of_the_one_before(self):
        stages = self.make()
        trainers = self.run_stages(stages, "pretrain", "sft", "rl")
        self.assertTrue(stages.finished("rl"))
        pretrained = trainers["pretrain"].model.state_dict()
        torch.testing.assert_close(self.weights(stages, "pretrain"), pretrained, atol=0, rtol=0)
        policy = trainers["rl"].model.policy.state_dict()
        torch.testing.assert_close(self.weights(stages, "rl"), policy, atol=0, rtol=0)
        reference = trainers["rl"].ref_policy.state_dict()
        torch.testing.assert_close(self.weights(stages, "sft"), reference, atol=0, rtol=0)

    def test_the_model_folder_is_read_by_from_pretrained_and_has_the_tokenizer(self):
        stages = self.make()
        self.run_stages(stages, "pretrain")
        folder = stages.model_folder("pretrain")
        self.assertEqual(folder, self.folder / "run" / "pretrain" / "model")
        self.assertEqual(GPT.from_pretrained(folder).config.n_embd, 16)
        self.assertEqual(CharTokenizer.from_pretrained(folder).chars, TOKENIZER.chars)

    def test_a_stage_may_have_a_tokenizer_of_its_own(self):
        stages = self.make()
        other = CharTokenizer("xyz")
        stages.run("pretrain", self.make_trainer(stages, "pretrain"), tokenizer=other)
        found = CharTokenizer.from_pretrained(stages.model_folder("pretrain"))
        self.assertEqual(found.chars, other.chars)

    def test_a_loaded_model_is_made_as_a_fresh_one(self):
        stages = self.make()
        self.run_stages(stages, "pretrain")
        set_seed(5)
        loaded = stages.load("pretrain", device="cpu")
        state = torch.get_rng_state()
        set_seed(5)
        fresh = GPT(loaded.config)
        self.assertTrue(torch.equal(torch.get_rng_state(), state))  # the same random numbers taken
        self.assertFalse(loaded.training)
        for a, b in zip(loaded.parameters(), fresh.parameters(), strict=True):
            self.assertEqual(a.stride(), b.stride())

    def test_a_reward_model(self):
        def make():
            config = stages.trainer_config("pretrain")
            data = TensorDataset(torch.zeros(4, 3, dtype=torch.long))
            model = RewardModel.from_gpt(tiny_gpt())
            return Trainer(config, model, data, loss_fn=lambda m, batch: m(*batch).mean())

        stages = self.make()
        trainer = stages.run("pretrain", make)
        loaded = stages.load("pretrain", RewardModel, device="cpu")
        found, expected = loaded.state_dict(), trainer.model.state_dict()
        torch.testing.assert_close(found, expected, atol=0, rtol=0)

    def test_a_model_that_cannot_be_saved_is_refused_before_training(self):
        def make():
            data = TensorDataset(torch.zeros(4, 2))
            return Trainer(stages.trainer_config("pretrain"), torch.nn.Linear(2, 1), data)

        stages = self.make()
        self.assertRaisesRegex(TypeError, "Linear cannot be left", stages.run, "pretrain", make)
        self.assertFalse((self.folder / "run" / "pretrain" / "checkpoint.pt").exists())

    def test_an_interrupted_stage_continues(self):
        stages = self.make()
        self.run_stages(stages, "pretrain")
        expected = self.weights(stages, "pretrain")

        def interrupted():
            trainer = self.make_trainer(stages, "pretrain")()
            trainer.add_callback("on_batch_end", lambda trainer: signal.raise_signal(signal.SIGINT))
            return trainer

        stages = self.make("interrupted")
        with self.assertRaises(KeyboardInterrupt):
            stages.run("pretrain", interrupted)  # after one iteration
        self.assertFalse(stages.finished("pretrain"))
        stages = self.make("interrupted")
        trainer = self.run_stages(stages, "pretrain")["pretrain"]
        self.assertEqual(trainer.iter_num, 2)
        torch.testing.assert_close(self.weights(stages, "pretrain"), expected, atol=0, rtol=0)

    def test_a_crash_before_the_model_is_saved_costs_no_training(self):
        stages = self.make()
        self.run_stages(stages, "pretrain")
        expected = self.weights(stages, "pretrain")
        (self.folder / "run" / "pretrain" / "finished.json").unlink()
        (self.folder / "run" / "pretrain" / "model" / "model.safetensors").unlink()
        stages = self.make()
        with mock.patch.object(Trainer, "train_step", side_effect=AssertionError("all is done")):
            self.run_stages(stages, "pretrain")
        torch.testing.assert_close(self.weights(stages, "pretrain"), expected, atol=0, rtol=0)

    def test_a_run_from_before_there_were_model_folders(self):
        stages = self.make()
        self.run_stages(stages, "pretrain", "sft")
        expected = self.weights(stages, "sft")
        for name in ("pretrain", "sft"):  # as they were left then: a checkpoint and no more
            folder = self.folder / "run" / name
            for path in [*folder.glob("*.json"), *folder.glob("model/*")]:
                path.unlink()
        options = json.dumps(dict(get_config().leaves()))
        (self.folder / "run" / "config.json").write_text(options, encoding="utf-8")
        with self.assertRaisesRegex(ValueError, "pretrain.learning_rate was 0.0003, is 0.1"):
            self.make(pretrain_learning_rate=0.1)
        stages = self.make()
        with mock.patch.object(Trainer, "train_step", side_effect=AssertionError("all is done")):
            self.run_stages(stages, "pretrain", "sft")
        torch.testing.assert_close(self.weights(stages, "sft"), expected, atol=0, rtol=0)

    def test_a_run_from_before_an_option_existed(self):
        stages = self.make()
        self.run_stages(stages, "pretrain", "sft", "rl")
        path = self.folder / "run" / "rl" / "options.json"
        options = json.loads(path.read_text())
        for name in ("advantage", "loss_mean", "kl_penalty"):
            del options[f"rl.{name}"]
        options["rl.clip_range"] = 0.2  # where None now stands for that
        path.write_text(json.dumps(options))
        self.assertTrue(self.make().finished("rl"))
        words = "rl.advantage was 'gae', is 'return'"
        with self.assertRaisesRegex(ValueError, words):
            self.make(rl_advantage="return")

    def test_seconds_are_those_of_all_finished_stages(self):
        stages = self.make()
        self.assertEqual(stages.seconds(), 0.0)
        trainers = self.run_stages(stages, "pretrain", "sft")
        expected = trainers["pretrain"].seconds + trainers["sft"].seconds
        self.assertAlmostEqual(stages.seconds(), expected)
        self.assertAlmostEqual(self.make().seconds(), expected)

    def test_an_unfinished_stage_has_no_model(self):
        words = "the stage sft is not finished in .*run: run it first, with the same options"
        stages = self.make()
        for method in (stages.model_folder, stages.load, stages.stage_folder):
            self.assertRaisesRegex(ValueError, words, method, "sft")

    def test_only_the_first_process_writes(self):
        trainer = mock.Mock(model=tiny_gpt())
        with mock.patch("mingpt.distributed.rank", return_value=1):
            self.make().run("pretrain", lambda: trainer)
        trainer.run.assert_called_once()
        self.assertFalse((self.folder / "run").exists())


class TestTrainerConfig(StagesTestCase):
    def test_extras_are_left_out_and_overrides_put_in(self):
        config = get_config()
        del config.rl.max_new_tokens
        stages = Stages(
            config,
            self.folder,
            ORDER,
            extras={"rl": ["reward"]},
            overrides={"rl": {"max_new_tokens": 7}},
        )
        found = stages.trainer_config("rl")
        self.assertEqual(vars(found).keys(), vars(PPOTrainer.get_default_config()).keys())
        self.assertEqual((found.max_new_tokens, found.batch_size), (7, 4))
        self.assertEqual(found.work_dir, str(self.folder / "rl"))

    def test_the_first_of_its_sections_is_the_trainers(self):
        stages = Stages(
            get_config(),
            self.folder,
            {"pretrain": Trainer, "judge": Trainer},
            sections={"judge": ["sft", "rl"]},
        )
        self.assertEqual(stages.trainer_config("judge").work_dir, str(self.folder / "judge"))
        self.assertIn("rl.gamma", stages.options_of("judge"))
        self.assertNotIn("rl.gamma", stages.options_of("pretrain"))


class TestChecks(StagesTestCase):
    def test_a_bad_option_of_the_last_stage_is_noticed_before_the_first_begins(self):
        words = r"the stage rl cannot run \(--rl.\*\): minibatch_size=8 must be"
        with self.assertRaisesRegex(ValueError, words):
            self.make(rl_minibatch_size=8)

    def test_an_option_that_its_trainer_does_not_have(self):
        with self.assertRaisesRegex(ValueError, "the stage rl cannot run .*'reward'"):
            Stages(get_config(), self.folder, ORDER)

    def test_a_stage_that_does_not_take_place_is_not_checked(self):
        self.make(order=ORDER | {"rl": None}, rl_minibatch_size=8)

    def test_names_that_are_no_stages(self):
        for option in ("sections", "extras", "overrides"):
            with self.assertRaisesRegex(ValueError, rf"{option} names \['ppo'\]"):
                Stages(get_config(), self.folder, {"sft": Trainer}, **{option: {"ppo": {}}})


class TestLocks(StagesTestCase):
    def test_later_stages_stay_free_until_they_begin(self):
        self.run_stages(self.make(), "pretrain")
        self.run_stages(self.make(sft_learning_rate=0.1), "sft")
        self.make(sft_learning_rate=0.1, rl_learning_rate=0.1)
        with self.assertRaisesRegex(ValueError, "sft.learning_rate was 0.1, is 0.0003"):
            self.make()

    def test_shared_options_are_locked_by_the_first_stage(self):
        self.run_stages(self.make(), "pretrain")
        words = "the stage pretrain in .* has begun with other options .*system.seed was 1, is 2"
        with self.assertRaisesRegex(ValueError, words):
            self.make(system_seed=2)

    def test_the_refusal_says_what_to_do(self):
        self.run_stages(self.make(), "pretrain", "sft")
        words = r"put them back, or choose another work_dir, where --base=.*run .*\(pretrain\)$"
        with self.assertRaisesRegex(ValueError, words):
            self.make(sft_learning_rate=0.1)
        with self.assertRaisesRegex(ValueError, "put them back, or choose another work_dir$"):
            self.make(data_path="others")

    def test_facts_are_locked_as_options_are(self):
        def make(vocabulary):
            return Stages(
                get_config(),
                self.folder / "run",
                {"pretrain": Trainer},
                facts={"vocabulary": vocabulary},
            )

        self.run_stages(make("abc"), "pretrain")
        with self.assertRaisesRegex(ValueError, "vocabulary was 'abc', is 'xyz'"):
            make("xyz")

    def test_some_options_are_always_free(self):
        self.run_stages(self.make(), "pretrain")
        self.make(report_samples=20, system_work_dir="elsewhere", pretrain_log_every=1)

    def test_as_long_as_nothing_is_saved_everything_may_change(self):
        stages = self.make()

        def fail(trainer):
            raise ZeroDivisionError

        def make():
            trainer = self.make_trainer(stages, "pretrain")()
            trainer.add_callback("on_train_begin", fail)
            return trainer

        self.assertRaises(ZeroDivisionError, stages.run, "pretrain", make)
        self.make(system_seed=2)

    def test_tuples_are_compared_as_lists(self):
        self.run_stages(self.make(), "pretrain")
        self.make(pretrain_betas=(0.9, 0.95))

    def test_an_option_that_did_not_exist_then_counts_as_its_default(self):
        self.run_stages(self.make(), "pretrain")
        path = self.folder / "run" / "pretrain" / "options.json"
        options = json.loads(path.read_text(encoding="utf-8"))
        del options["pretrain.weight_decay"]
        path.write_text(json.dumps(options), encoding="utf-8")
        self.make()
        with self.assertRaisesRegex(ValueError, "pretrain.weight_decay was 0.1, is 0.2"):
            self.make(pretrain_weight_decay=0.2)

    def test_a_stage_that_now_does_not_take_place_is_locked_too(self):
        self.run_stages(self.make(), "pretrain", "sft", "rl")
        with self.assertRaisesRegex(ValueError, "rl.reward was 'length', is 'none'"):
            self.make(order=ORDER | {"rl": None}, rl_reward="none")


class TestLonger(StagesTestCase):
    def test_a_finished_stage_may_go_on(self):
        self.run_stages(self.make(), "pretrain")
        stages = self.make(pretrain_max_iters=5)
        self.assertFalse(stages.finished("pretrain"))
        trainer = self.run_stages(stages, "pretrain")["pretrain"]
        self.assertEqual((trainer.iter_num, stages.finished("pretrain")), (5, True))
        at_once = self.make("at_once", pretrain_max_iters=5)
        self.run_stages(at_once, "pretrain")
        found, expected = (self.weights(run, "pretrain") for run in (stages, at_once))
        torch.testing.assert_close(found, expected, atol=0, rtol=0)

    def test_not_where_the_learning_rate_hangs_on_the_end(self):
        self.run_stages(self.make(pretrain_lr_schedule="linear"), "pretrain")
        with self.assertRaisesRegex(ValueError, "pretrain.max_iters was 2, is 5"):
            self.make(pretrain_lr_schedule="linear", pretrain_max_iters=5)

    def test_not_shorter(self):
        self.run_stages(self.make(), "pretrain")
        with self.assertRaisesRegex(ValueError, "pretrain.max_iters was 2, is 1"):
            self.make(pretrain_max_iters=1)

    def test_not_once_a_later_stage_has_begun_with_its_model(self):
        self.run_stages(self.make(), "pretrain", "sft")
        with self.assertRaisesRegex(ValueError, "the stage sft .*pretrain.max_iters was 2, is 5"):
            self.make(pretrain_max_iters=5)


class TestBase(StagesTestCase):
    def setUp(self):
        super().setUp()
        self.run_stages(self.make(), "pretrain", "sft", "rl")

    def test_a_later_stages_option_is_tried_on_the_finished_stages(self):
        stages = self.make("other", base="run", rl_learning_rate=0.1)
        with self.assertLogs("mingpt") as logs:
            self.make("other", base="run", rl_learning_rate=0.1)
        self.assertRegex(logs.output[0], "pretrain, sft; its stage rl had other options .*0.1")
        self.assertEqual([stages.finished(name) for name in ORDER], [True, True, False])
        self.assertEqual(stages.model_folder("sft"), self.folder / "run" / "sft" / "model")
        trainers = self.run_stages(stages, "pretrain", "sft", "rl")
        self.assertIsNone(trainers["sft"])
        self.assertEqual(stages.model_folder("rl"), self.folder / "other" / "rl" / "model")
        self.assertFalse((self.folder / "other" / "sft").exists())  # it was not copied

    def test_a_middle_stages_option_leaves_what_is_before_it(self):
        stages = self.make("other", base="run", sft_learning_rate=0.1)
        self.assertEqual([stages.finished(name) for name in ORDER], [True, False, False])

    def test_refused_where_the_first_stage_had_other_options(self):
        words = "no stage of --base=.*run can be used: its stage pretrain had other options .*seed"
        with self.assertRaisesRegex(ValueError, words):
            self.make("other", base="run", system_seed=2)

    def test_refused_where_nothing_is_finished(self):
        words = "no stage of --base=.*nowhere can be used: the stage pretrain is not finished there"
        with self.assertRaisesRegex(ValueError, words):
            self.make("other", base="nowhere")

    def test_a_longer_stage_is_not_that_of_the_base(self):
        with self.assertRaisesRegex(ValueError, "pretrain.max_iters was 2, is 5"):
            self.make("other", base="run", pretrain_max_iters=5)

    def test_what_has_begun_in_the_folder_comes_first(self):
        self.run_stages(self.make("other"), "pretrain")
        stages = self.make("other", base="run", rl_learning_rate=0.1)
        self.assertEqual(stages.stage_folder("pretrain"), self.folder / "other" / "pretrain")
        self.assertEqual(stages.stage_folder("sft"), self.folder / "run" / "sft")

    def test_without_an_option_of_the_stage_everything_is_taken(self):
        stages = self.make("other", base="run")
        self.assertTrue(all(stages.finished(name) for name in ORDER))
        self.assertGreater(stages.seconds(), 0)


if __name__ == "__main__":
    unittest.main()
