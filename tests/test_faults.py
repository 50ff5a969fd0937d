"""Faults that were found once, by kind: what must not be something else without a word."""

import math
import pickle
import subprocess
import sys
import unittest
import zipfile
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import numpy as np
import torch
from torch.utils.data import TensorDataset

from mingpt import rlhf
from mingpt.bpe import BPETokenizer, WordCache
from mingpt.chars import CharTokenizer
from mingpt.checkpoint import atomic_write, load_torch, save_torch, write_text
from mingpt.datasets import Comparisons
from mingpt.heads import RewardModel, ValueHead, ValueModel
from mingpt.model import GPT
from mingpt.rlhf import ActorCritic, DPOLoss, PPOTrainer, comparison_loss
from mingpt.trainer import Trainer
from mingpt.utils import pick_device, set_seed
from tests.common import ROOT, TempDirTestCase, tiny_gpt

TOKENIZER = CharTokenizer("abcdefghij")  # its end of text is id 10
PAIRS = [{"prompt": "ab", "chosen": "cd", "rejected": "ef"}] * 8


def ppo_config(**options):
    config = PPOTrainer.get_default_config()
    base = {"device": "cpu", "batch_size": 16, "max_new_tokens": 4, "max_iters": 1}
    config.merge_from_dict({**base, **options})
    return config


def count_threes(idx, attention_mask, completion_mask):
    return ((idx == 3) & completion_mask).sum(1).float()


class TestOptions(unittest.TestCase):
    def refuses(self, words, **options):
        config = GPT.get_default_config()
        sizes = {"n_layer": 1, "n_head": 1, "n_embd": 4, "vocab_size": 5, "block_size": 6}
        config.merge_from_dict({**sizes, **options})
        self.assertRaisesRegex(ValueError, words, GPT, config)

    def test_a_model_option_that_does_not_exist(self):
        self.refuses(r"no options \['dropout'\]", dropout=0.0)
        self.refuses(r"no options \['n_layers'\]", n_layers=2)

    def test_text_in_the_place_of_a_boolean(self):
        self.refuses("tie_weights='False' must be True or False", tie_weights="False")
        for name in ("compile", "tensorboard"):
            config = Trainer.get_default_config()
            config.merge_from_dict({name: "no"})
            self.assertRaisesRegex(ValueError, f"{name}='no'", Trainer.check_config, config)
        for name in ("whiten_rewards", "shared_trunk"):
            config = ppo_config(**{name: 1})
            self.assertRaisesRegex(ValueError, f"{name}=1", PPOTrainer.check_config, config)

    def test_a_device_that_is_not_there(self):
        for device in ("cuda", "gpu", "cuda:99"):
            if device == "cuda" and torch.cuda.is_available():
                continue
            self.assertRaisesRegex(ValueError, f"device='{device}'", pick_device, device)


class TestTexts(unittest.TestCase):
    def test_one_text_is_not_many(self):
        self.assertRaisesRegex(TypeError, r"pass \[text\]", BPETokenizer.train, "text", 260)

    def test_a_lone_surrogate_is_the_replacement_character(self):
        tokenizer = BPETokenizer.train(["some text"], 257)
        self.assertEqual(tokenizer.encode("a\ud800b"), tokenizer.encode("a\ufffdb"))
        self.assertEqual(tokenizer.encode("\ud83d\ude00"), tokenizer.encode("\U0001f600"))

    def test_what_is_no_text(self):
        tokenizer = BPETokenizer.train(["some text"], 257)
        self.assertRaisesRegex(TypeError, "got bytes", tokenizer.encode, b"text")

    def test_an_unknown_id(self):
        for ids in ([0, 1, -1], [11], ["a"], [[0]]):
            self.assertRaisesRegex(ValueError, "no id of this vocabulary", TOKENIZER.decode, ids)

    def test_the_cache_of_words_is_bounded_by_their_length(self):
        cache = WordCache(lambda word: (len(word),), limit=1000)
        for i in range(100):
            self.assertEqual(cache[f"{i:0300}"], (300,))
        self.assertLessEqual(sum(map(len, cache)), 1300)


class TestMasks(unittest.TestCase):
    def test_a_mask_of_another_shape(self):
        x = torch.randn(3, 4)
        for mask in (torch.ones(4), torch.ones(3, 1), torch.ones(4, 3)):
            self.assertRaisesRegex(ValueError, "must be equal", rlhf.masked_mean, x, mask)
            self.assertRaisesRegex(ValueError, "must be equal", rlhf.gae, x, x, mask)

    def test_a_mask_that_is_neither_0_nor_1(self):
        x = torch.randn(3, 4)
        for value in (0.5, 2.0, -1.0):
            mask = torch.full((3, 4), value)
            self.assertRaisesRegex(ValueError, "must hold 1", rlhf.masked_mean, x, mask)
            self.assertRaisesRegex(ValueError, "must hold 1", rlhf.masked_whiten, x, mask)

    def test_an_attention_mask_that_is_neither_0_nor_1(self):
        idx = torch.randint(11, (2, 5))
        for value in (0.5, 2, -1):
            mask = torch.full((2, 5), value)
            self.assertRaisesRegex(ValueError, "must hold 1", tiny_gpt(), idx, None, mask)
            self.assertRaisesRegex(
                ValueError, "must hold 1", tiny_gpt().generate, idx, 2, attention_mask=mask
            )

    def test_numbers_and_booleans_mean_the_same(self):
        idx, mask = torch.randint(11, (2, 5)), torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 1, 1]])
        expected, _ = tiny_gpt()(idx, attention_mask=mask.bool())
        for dtype in (torch.long, torch.float32, torch.uint8):
            logits, _ = tiny_gpt()(idx, attention_mask=mask.to(dtype))
            torch.testing.assert_close(logits, expected, atol=0, rtol=0)


class TestShapesAndIds(unittest.TestCase):
    def test_pairs_that_would_be_compared_crosswise(self):
        a, b = torch.randn(4), torch.randn(4, 1)
        self.assertRaisesRegex(ValueError, r"\(4,\) and rejected \(4, 1\)", rlhf.reward_loss, a, b)
        self.assertRaisesRegex(ValueError, "must be", rlhf.dpo_loss, a, b, a, b)
        self.assertRaisesRegex(ValueError, "must be", rlhf.ipo_loss, a, b, a, b)

    def test_an_id_that_cross_entropy_ignores_by_default(self):
        idx = torch.tensor([[1, 2, -100]])
        self.assertRaisesRegex(ValueError, "ids from -100", tiny_gpt().log_probs, idx)

    def test_targets_out_of_range(self):
        idx = torch.tensor([[1, 2, 3]])
        for target in (11, -2, -100):
            targets = torch.full_like(idx, target)
            self.assertRaisesRegex(ValueError, "targets hold ids", tiny_gpt(), idx, targets)
        self.assertRaisesRegex(ValueError, "LongTensor", tiny_gpt(), idx, idx.float())

    def test_a_value_model_that_gives_one_value_a_row(self):
        class OneValue(torch.nn.Module):
            def forward(self, idx, attention_mask):
                return torch.zeros(len(idx), 1)

        idx, mask = torch.randint(11, (2, 5)), torch.ones(2, 5, dtype=torch.bool)
        model = ActorCritic(tiny_gpt(), OneValue())
        self.assertRaisesRegex(ValueError, r"returned shape \(2, 1\)", model, idx, mask)

    def test_models_with_other_vocabularies(self):
        other = tiny_gpt(vocab_size=13)
        for words, options in (
            ("ref_policy one of 13", {"ref_policy": other}),
            ("value_model one of 13", {"value_model": ValueModel.from_gpt(other)}),
        ):
            with self.assertRaisesRegex(ValueError, words):
                PPOTrainer(ppo_config(), tiny_gpt(), count_threes, [[1]], **options)
        with self.assertRaisesRegex(ValueError, "reward_fn one of 13"):
            PPOTrainer(ppo_config(), tiny_gpt(), RewardModel.from_gpt(other), [[1]])

    def test_a_metric_of_the_loss_fn_called_loss(self):
        config = Trainer.get_default_config()
        config.merge_from_dict({"device": "cpu", "max_iters": 1, "batch_size": 2})
        x = torch.randint(11, (4, 5))

        def loss_fn(model, batch):
            return model(*batch)[1], {"loss": 0.0}

        trainer = Trainer(config, tiny_gpt(), TensorDataset(x, x), loss_fn=loss_fn)
        self.assertRaisesRegex(ValueError, r"metrics called \['loss'\]", trainer.run)


class TestWrongKinds(unittest.TestCase):
    """Things of another kind than is meant: the error says what came and what is meant."""

    def test_a_text_or_a_list_in_the_place_of_a_tensor(self):
        for prompt in ("hello", [[1, 2]], None):
            self.assertRaisesRegex(TypeError, "LongTensor", tiny_gpt().generate, prompt, 2)
            self.assertRaisesRegex(TypeError, "LongTensor", tiny_gpt(), prompt)

    def test_ids_that_are_no_integers(self):
        self.assertRaisesRegex(ValueError, "LongTensor", tiny_gpt(), torch.zeros(1, 3))

    def test_betas(self):
        for betas in ((0.9,), 0.9, (0.9, 1.0), (0.9, "0.95"), None):
            config = Trainer.get_default_config()
            config.betas = betas
            self.assertRaisesRegex(ValueError, "must be two numbers", Trainer.check_config, config)

    def test_a_policy_that_cannot_write(self):
        with self.assertRaisesRegex(TypeError, "Linear has no log_probs and no generate"):
            PPOTrainer(ppo_config(algorithm="rloo"), torch.nn.Linear(1, 1), count_threes, [[1]])

    def test_a_vocabulary_with_tokens_that_are_no_bytes(self):
        vocab = BPETokenizer.train(["some text"], 257).vocab
        with self.assertRaisesRegex(ValueError, r"not written in bytes \(\['<im start>'\]\)"):
            BPETokenizer({**vocab, "<im start>": 257}, [])


class TestDropoutInComparisons(unittest.TestCase):
    def setUp(self):
        self.policy = tiny_gpt(embd_pdrop=0.3, resid_pdrop=0.3, attn_pdrop=0.3).train()
        data = Comparisons(PAIRS, TOKENIZER, 12)
        self.batch = data.collate(list(data))
        same = Comparisons([{**PAIRS[0], "rejected": "cd"}] * 4, TOKENIZER, 12)
        self.same = same.collate(list(same))

    def test_dpo_begins_at_log_2(self):
        loss, _ = DPOLoss(self.policy)(ActorCritic(self.policy), self.batch)
        self.assertAlmostEqual(loss.item(), math.log(2), places=6)

    def test_dpo_with_dropout_does_not(self):
        loss, _ = DPOLoss(self.policy, dropout=True)(ActorCritic(self.policy), self.batch)
        self.assertGreater(abs(loss.item() - math.log(2)), 1e-4)

    def test_a_reward_model_sees_no_difference_between_equal_texts(self):
        model = RewardModel.from_gpt(self.policy).train()
        loss, _ = comparison_loss(model, self.same)
        self.assertAlmostEqual(loss.item(), math.log(2), places=6)
        loss.backward()
        self.assertLess(model.head.weight.grad.abs().max().item(), 1e-6)
        loss, _ = comparison_loss(model, self.same, dropout=True)
        self.assertGreater(abs(loss.item() - math.log(2)), 1e-4)

    def test_the_model_is_in_training_mode_afterwards(self):
        comparison_loss(model := RewardModel.from_gpt(self.policy).train(), self.batch)
        self.assertTrue(all(module.training for module in model.modules()))


class TestEveryPromptIsSeen(unittest.TestCase):
    def test_in_a_pass_of_groups(self):
        seen = []

        def reward(idx, attention_mask, completion_mask):
            seen.extend(idx[:, 0].tolist())
            return torch.rand(len(idx))

        config = ppo_config(algorithm="grpo", group_size=4, max_iters=None, epochs=1)
        prompts = [[i, 1] for i in range(8)]
        trainer = PPOTrainer(config, tiny_gpt(), reward, prompts)
        trainer.run()
        self.assertEqual(trainer.iter_num, 2)  # 8 prompts, 4 episodes each, in batches of 16
        self.assertEqual(sorted(seen), sorted(list(range(8)) * 4))


class TestHalfPrecision(unittest.TestCase):
    def test_close_rewards_are_no_ties(self):
        """64 pairs at a mean of 8: in bf16 numbers there are 1/32 apart, and half of them tie."""
        set_seed(0)
        model = RewardModel.from_gpt(tiny_gpt())
        model.head.bias.data.fill_(8.0)
        model.head.weight.data.mul_(0.01)
        idx = torch.randint(11, (128, 8))
        with torch.autocast("cpu", torch.bfloat16):
            scores = model(idx)
        self.assertEqual(scores.dtype, torch.float32)
        self.assertFalse((scores[:64] == scores[64:]).any())

    def test_values_and_log_probs_are_fp32(self):
        policy, idx = tiny_gpt(), torch.randint(11, (2, 6))
        mask = torch.ones_like(idx, dtype=torch.bool)
        for critic in (ValueHead(16), ValueModel.from_gpt(policy)):
            with torch.autocast("cpu", torch.bfloat16):
                log_probs, values = ActorCritic(policy, critic)(idx, mask)
            self.assertEqual((log_probs.dtype, values.dtype), (torch.float32, torch.float32))

    def test_a_policy_in_bf16_starts_at_ratio_one(self):
        policy = tiny_gpt(1).bfloat16()
        config = ppo_config(algorithm="rloo", learning_rate=0.0, max_iters=2)
        trainer = PPOTrainer(config, policy, count_threes, [[1], [2]])
        trainer.run()
        self.assertLess(trainer.metrics["log_prob_error"], 1e-5)
        self.assertAlmostEqual(trainer.metrics["val/ratio"], 1.0, places=6)
        self.assertAlmostEqual(trainer.metrics["objective/kl"], 0.0, places=6)


class TestWeights(unittest.TestCase):
    def test_by_default_a_micro_batch_counts_by_its_targets(self):
        x = torch.randint(11, (8, 6), generator=torch.Generator().manual_seed(1))
        y = x.roll(-1, 1)
        y[:4, 1:] = -1  # the first examples have one target each, the others six
        weights = []
        for micro_batch_size in (None, 1, 3):
            config = Trainer.get_default_config()
            options = {"device": "cpu", "max_iters": 2, "batch_size": 8, "learning_rate": 1e-2}
            config.merge_from_dict({**options, "micro_batch_size": micro_batch_size, "eps": 1e-3})
            model = tiny_gpt()
            Trainer(config, model, TensorDataset(x, y)).run()
            weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        torch.testing.assert_close(weights[1], weights[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(weights[2], weights[0], atol=1e-5, rtol=0)


class TestFiles(TempDirTestCase):
    """What is written is always readable, and what is read is what was written."""

    def config(self, **options):
        config = Trainer.get_default_config()
        base = {"device": "cpu", "batch_size": 4, "max_iters": 2, "log_every": 1}
        config.merge_from_dict({**base, "work_dir": self.folder, **options})
        return config

    def trainer(self, model=None, examples=8, **options):
        x = torch.randint(11, (examples, 6), generator=torch.Generator().manual_seed(1))
        data = TensorDataset(x[:, :-1], x[:, 1:])
        return Trainer(self.config(**options), model or tiny_gpt(), data, data)

    def test_a_path_and_numpys_numbers_in_a_config(self):
        rate, size, flag = np.float64(1e-3), np.int64(4), np.bool_(False)
        options = {"learning_rate": rate, "batch_size": size, "compile": flag}
        tensor = {"weight_decay": torch.tensor(0.5)}
        self.trainer(**options, **tensor).run()
        state = torch.load(self.folder / "checkpoint.pt", weights_only=True)
        for name, value in state["config"].items():
            self.assertIn(type(value), (int, float, bool, str, tuple, type(None)), name)
        self.assertEqual(state["config"]["work_dir"], str(self.folder))
        resumed = self.trainer(max_iters=3, **options, **tensor)
        resumed.run()
        self.assertEqual(resumed.iter_num, 3)

    def test_our_own_files_say_what_they_are(self):
        model = tiny_gpt(n_head=4, resid_pdrop=0.3)
        trainer = self.trainer(model, eval_every=1, learning_rate=0.0)
        trainer.run()
        idx = torch.randint(11, (1, 5))
        expected, _ = model.eval()(idx)
        for name in ("best.pt", "checkpoint.pt"):
            loaded = GPT.from_pretrained(self.folder / name)
            self.assertEqual(loaded.config, model.config)
            torch.testing.assert_close(loaded(idx)[0], expected)

    def test_best_is_a_plain_state_dict(self):
        self.trainer(eval_every=1).run()
        tiny_gpt().load_state_dict(torch.load(self.folder / "best.pt", weights_only=True))

    def test_nanogpts_dropout(self):
        model = tiny_gpt()
        sizes = {name: getattr(model.config, name) for name in ("n_layer", "n_head", "n_embd")}
        args = {**sizes, "block_size": 12, "vocab_size": 11, "dropout": 0.0, "bias": True}
        state = {"model": model.state_dict(), "model_args": args}
        torch.save(state, self.folder / "ckpt.pt")
        with self.assertLogs("mingpt", "WARNING") as logs:
            loaded = GPT.from_pretrained(self.folder / "ckpt.pt")
        self.assertEqual(loaded.config.resid_pdrop, 0.0)
        self.assertIn("exact GELU", logs.output[0])

    def test_a_compressed_file_is_read_and_not_mapped(self):
        model = tiny_gpt(n_head=4)
        torch.save({"model": model.state_dict()}, self.folder / "stored.pt")
        with (
            zipfile.ZipFile(self.folder / "stored.pt") as stored,
            zipfile.ZipFile(self.folder / "deflated.pt", "w", zipfile.ZIP_DEFLATED) as deflated,
        ):
            for record in stored.infolist():
                deflated.writestr(record.filename, stored.read(record))
        loaded = GPT.from_pretrained(self.folder / "deflated.pt", n_head=4)
        for name, weight in model.state_dict().items():
            self.assertTrue(torch.equal(loaded.state_dict()[name], weight), name)

    def test_a_small_file_that_asks_for_much_memory(self):
        state = tiny_gpt().state_dict()
        state["transformer.wpe.weight"] = torch.zeros(1).expand(10**6, 16)
        torch.save(state, self.folder / "huge.pt")
        with self.assertRaisesRegex(ValueError, "larger than what the file holds"):
            GPT.from_pretrained(self.folder / "huge.pt", n_head=2)

    def test_a_file_that_names_many_blocks(self):
        state = tiny_gpt().state_dict()
        for i in range(2, 8000):
            state[f"transformer.h.{i}.ln_1.weight"] = torch.zeros(16)
        torch.save(state, self.folder / "deep.pt")
        with self.assertRaisesRegex(ValueError, "names 8000 blocks and holds only"):
            GPT.from_pretrained(self.folder / "deep.pt", n_head=2)

    def test_a_damaged_checkpoint(self):
        self.trainer().run()
        path = self.folder / "checkpoint.pt"
        whole = path.read_bytes()
        for content in (b"", whole[: len(whole) // 2], b"text", pickle.dumps([1])):
            path.write_bytes(content)
            message = "checkpoint.pt (cannot be loaded|holds a list)"
            with self.assertRaisesRegex(ValueError, message):
                self.trainer(max_iters=3).run()

    def test_a_checkpoint_that_is_something_else(self):
        torch.save(tiny_gpt().state_dict(), self.folder / "checkpoint.pt")
        self.assertRaisesRegex(ValueError, "no checkpoint of a Trainer", self.trainer().run)

    def test_a_run_of_another_model(self):
        self.trainer().run()
        larger = self.trainer(tiny_gpt(n_embd=32), max_iters=3)
        before = [p.clone() for p in larger.model.parameters()]
        self.assertRaisesRegex(ValueError, r"of another model \(transformer.wte.weight", larger.run)
        pairs = zip(before, larger.model.parameters(), strict=True)
        self.assertTrue(all(torch.equal(a, b) for a, b in pairs))

    def test_a_run_on_more_data(self):
        self.trainer().run()
        more = self.trainer(examples=10, max_iters=3)
        self.assertRaisesRegex(ValueError, "a run on 8 examples, .* has 10", more.run)

    def test_weights_that_are_not_finite_are_not_saved(self):
        trainer = self.trainer(checkpoint_every=1, max_iters=4)

        def spoil(trainer):
            if trainer.iter_num == 2:
                trainer.model.lm_head.weight.data[0] = math.nan

        trainer.add_callback("on_batch_end", spoil)
        self.assertRaisesRegex(FloatingPointError, "are not finite", trainer.run)
        state = torch.load(self.folder / "checkpoint.pt", weights_only=True)
        self.assertEqual(state["iter_num"], 2)

    def test_a_full_disk_keeps_the_old_file_and_says_so(self):
        path = self.folder / "x.pt"
        save_torch(path, {"a": torch.ones(2)})
        error = RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos: file")
        with (
            mock.patch("torch.save", side_effect=error),
            self.assertRaisesRegex(OSError, "x.pt cannot be written .* MB are free"),
        ):
            save_torch(path, {"a": torch.zeros(2)})
        self.assertTrue(torch.equal(load_torch(path)["a"], torch.ones(2)))
        self.assertEqual([p.name for p in self.folder.iterdir()], ["x.pt"])

    def test_what_a_killed_process_left_behind_goes_with_the_next_write(self):
        script = (
            "import os, signal, sys; from mingpt.checkpoint import atomic_write\n"
            "with atomic_write(sys.argv[1]) as f:\n"
            "    f.write(bytes(1000)); f.flush(); os.kill(os.getpid(), signal.SIGKILL)"
        )
        path = self.folder / "x.bin"
        subprocess.run([sys.executable, "-c", script, str(path)], cwd=ROOT)
        [leftover] = self.folder.iterdir()
        self.assertTrue(leftover.name.startswith(".x.bin."))
        with atomic_write(self.folder / "other.bin") as f:
            f.write(b"it is not the other file's")
        self.assertTrue(leftover.exists())
        with atomic_write(path) as f, ThreadPoolExecutor(1) as pool:
            f.write(b"the last to finish")
            pool.submit(write_text, path, "of another thread, while the first is alive").result()
        self.assertEqual({p.name for p in self.folder.iterdir()}, {"x.bin", "other.bin"})
        self.assertEqual(path.read_bytes(), b"the last to finish")
