"""projects/chat/judge.py: against transformers' hidden states, and against Newton's method."""

import math
import sys
import tempfile
import unittest

import torch
import transformers

from mingpt import lora
from mingpt.datasets import Comparisons
from mingpt.model_files import load_file
from mingpt.trainer import Trainer
from tests import tiny_chat
from tests.common import ROOT, TempDirTestCase, tiny_gpt

sys.path.insert(0, str(ROOT / "projects" / "chat"))
import answers
import teach
from judge import FILE, FOLDS, Judge

# Two texts: the first with padding on both sides, the second with none.
IDX = torch.tensor([[0, 0, 5, 6, 7, 8, 9, 0], [1, 2, 3, 4, 5, 6, 7, 8]])
REAL = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1, 1, 1]]).bool()
WRITTEN = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0, 1, 1]]).bool()


class FeatureTests(unittest.TestCase):
    def check_features(self, model):
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
        features = Judge(model).features(IDX, REAL, WRITTEN).unflatten(1, (-1, 2, 12))
        norm = model.transformer.norm if hasattr(model.transformer, "norm") else (
            model.transformer.ln_f
        )
        for row in range(2):
            text = IDX[row][REAL[row]][None]
            written = WRITTEN[row][REAL[row]]
            with torch.no_grad():
                states = theirs(text, output_hidden_states=True).hidden_states
            self.assertEqual(len(states), features.size(1))
            for layer, state in enumerate(states[:-1]):
                answer = state[0][written]
                torch.testing.assert_close(features[row, layer, 0], answer.mean(0))
                torch.testing.assert_close(features[row, layer, 1], answer[-1])
            # The last of theirs is behind the norm. A mean of norms is no norm of a mean, so only
            # the last token can be compared.
            last = states[-1][0][written][-1]
            torch.testing.assert_close(norm(features[row, -1, 1]).detach(), last)

    def test_a_llamas_are_transformers_hidden_states(self):
        self.check_features(tiny_gpt(architecture="llama", n_embd=12, n_head=2, n_kv_head=1))

    def test_a_gpt2s_are_transformers_hidden_states(self):
        self.check_features(tiny_gpt(n_embd=12, n_head=2))

    def test_they_do_not_depend_on_the_adapter_that_is_being_trained(self):
        model = tiny_gpt()
        before = Judge(model).features(IDX, REAL, WRITTEN)
        lora.add(model)
        with torch.no_grad():
            for p in lora.adapter_on(model.transformer).parameters():
                p.normal_()
        self.assertFalse(torch.equal(model(IDX)[0], self.base_logits(model)))
        self.assertTrue(torch.equal(Judge(model).features(IDX, REAL, WRITTEN), before))

    @staticmethod
    def base_logits(model):
        with lora.disabled(model):
            return model(IDX)[0]


def made_up(n=40):
    """Features of n labels, and the part that each belongs to."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(n, 2, Judge(tiny_gpt()).weight.size(1), generator=generator)
    features *= torch.rand(features.size(2), generator=generator) * 10  # of different sizes
    return features, [i % FOLDS for i in range(n)]


def learned(features, folds, prior, folder):
    """Judges at the optimum, trained as teach.py does."""
    defaults = teach.get_config().reward
    judge = Judge(tiny_gpt())
    judge.study(features, folds, prior)
    config = Trainer.get_default_config()
    config.merge_from_dict({
        "max_iters": defaults.max_iters,
        "batch_size": len(features),
        "learning_rate": defaults.learning_rate,
        "lr_schedule": defaults.lr_schedule,
        "weight_decay": 0.0,
        "device": "cpu",
        "work_dir": str(folder),
        "log_every": 1000,
    })
    labels = torch.utils.data.TensorDataset(torch.arange(len(features)))
    Trainer(config, judge, labels, loss_fn=lambda judge, batch: judge.loss(*batch)).run()
    return judge


def newton(x, prior):
    """The w with the highest posterior, for differences x (n, F), found by Newton's method."""
    x = x.double()
    w = torch.zeros(x.size(1), dtype=torch.float64)
    for _ in range(30):
        p = torch.sigmoid(-(x @ w))
        gradient = -(x.T @ p) + w / prior**2
        hessian = (x * (p * (1 - p))[:, None]).T @ x + torch.eye(len(w)) / prior**2
        w = w - torch.linalg.solve(hessian, gradient)
    return w.float()


class LearningTests(TempDirTestCase):
    def test_every_judge_finds_the_most_probable_weights(self):
        features, folds = made_up()
        for prior in (0.5, 2.0):
            with self.subTest(prior=prior):
                judge = learned(features, folds, prior, self.folder / str(prior))
                x = (features[:, 0] - features[:, 1]) / judge.scale
                for number in range(1 + FOLDS):
                    kept = torch.tensor([number != fold + 1 for fold in folds])
                    expected = newton(x[kept], prior)
                    error = (judge.weight[number].detach() - expected).norm() / expected.norm()
                    self.assertLess(error, 0.01)

    def test_before_any_label_two_rewards_differ_by_the_prior(self):
        features, folds = made_up(400)
        judge = Judge(tiny_gpt())
        judge.study(features, folds)
        torch.manual_seed(0)
        with torch.no_grad():
            judge.weight.normal_()
        self.assertAlmostEqual(judge.margins(features).square().mean().item(), 1.0, delta=0.3)

    def test_a_label_is_tested_by_a_judge_that_has_never_seen_it(self):
        features, folds = made_up()
        first = learned(features, folds, 1.0, self.folder / "first")
        # Whatever the labels of one part say, it does not change what that part's judge thinks.
        part = torch.tensor(folds) == 2
        turned = torch.where(part[:, None, None], features.flip(1), features)
        second = learned(turned, folds, 1.0, self.folder / "second")
        torch.testing.assert_close(first.weight[3], second.weight[3], rtol=0, atol=1e-3)
        self.assertGreater((first.weight[0] - second.weight[0]).abs().max(), 1e-2)
        first.save_pretrained(self.folder)
        margins = load_file(self.folder / FILE)[0]["held_out_margins"]
        expected = first.margins(features)[torch.arange(40), torch.tensor(folds) + 1].detach()
        torch.testing.assert_close(margins, expected)

    def test_a_judge_of_noise_agrees_with_half_of_the_held_out_labels(self):
        features, folds = made_up(400)
        judge = learned(features, folds, 1.0, self.folder)
        _, metrics = judge.loss(torch.arange(400))
        self.assertGreater(metrics["accuracy"], 0.65)
        self.assertAlmostEqual(metrics["held_out_accuracy"].item(), 0.5, delta=0.1)

    def test_a_constant_feature_does_no_harm(self):
        features, folds = made_up()
        features[:, :, 3] = 7.0
        judge = learned(features, folds, 1.0, self.folder)
        self.assertTrue(torch.isfinite(judge.weight).all())
        self.assertFalse(judge.weight[:, 3].any())


class JudgeTests(TempDirTestCase):
    def setUp(self):
        super().setUp()
        self.model = answers.ChatModel.load(tiny_chat.write_tiny_chat(self.folder / "tiny"), "cpu")
        rows = [
            {
                "prompt": [{"role": "user", "content": f"What is {n}?"}],
                "chosen": "A number" + (7 * n) % 5 * "!",
                "rejected": "I do not know it.",
                "ended": [True, n % 2 == 0],
            }
            for n in range(10)
        ]
        self.labels = Comparisons(rows, self.model.chat, 256)

    def test_in_whatever_batches_labels_are_read(self):
        judge = Judge(self.model.model)
        one_by_one = judge.read(self.labels, 1)
        self.assertEqual(one_by_one.shape[:2], (10, 2))
        torch.testing.assert_close(judge.read(self.labels, 4), one_by_one)
        for label, features in zip(self.labels, one_by_one, strict=True):
            batch = [x.flatten(0, 1) for x in Comparisons.collate([label])]
            torch.testing.assert_close(judge.features(*batch), features)

    def test_the_reward_is_the_probability_to_be_chosen_over_the_others(self):
        judge = Judge(self.model.model)
        features = judge.read(self.labels, 8)
        judge.study(features, [n % FOLDS for n in range(10)])
        torch.manual_seed(0)
        with torch.no_grad():
            judge.weight.normal_()
        batch = [x.flatten(0, 1) for x in Comparisons.collate(list(self.labels))]
        with self.assertRaisesRegex(ValueError, "nothing to compare with"):
            judge(*batch)
        raw = judge.reward(*batch)
        judge.compare_with(raw)
        rewards = judge(*batch).tolist()
        one_by_one = [judge(*(x[row : row + 1] for x in batch)).item() for row in range(20)]
        torch.testing.assert_close(rewards, one_by_one, atol=1e-5, rtol=0)
        two_by_two = judge(*batch, rows_per_prompt=2).tolist()
        torch.testing.assert_close(rewards, two_by_two, atol=1e-5, rtol=0)
        for r, reward in zip(raw.tolist(), rewards, strict=True):
            chances = [1 / (1 + math.exp(other - r)) for other in raw.tolist()]
            self.assertAlmostEqual(reward, sum(chances) / len(chances), places=5)
        # Of two answers one is chosen: on those that it is compared with, the mean is 1/2.
        self.assertAlmostEqual(sum(rewards) / len(rewards), 0.5, places=5)

    def test_a_saved_judge_says_the_same(self):
        judge = Judge(self.model.model)
        judge.study(judge.read(self.labels, 8), [n % FOLDS for n in range(10)])
        with torch.no_grad():
            judge.weight.normal_()
        judge.save_pretrained(self.folder)
        loaded, margins = Judge.load(self.folder, self.model.model)
        batch = [x.flatten(0, 1) for x in Comparisons.collate([self.labels[0], self.labels[1]])]
        torch.testing.assert_close(loaded.reward(*batch), judge.reward(*batch))
        self.assertEqual(margins.shape, (10,))
        with self.assertRaisesRegex(ValueError, "the judge of another model"):
            Judge.load(self.folder, tiny_gpt(n_layer=3))

    def test_its_reward_of_a_text_is_that_of_its_features(self):
        judge = Judge(self.model.model)
        with torch.no_grad():
            judge.weight.normal_()
        [features] = judge.read(self.labels, 1)[:1]
        batch = [x.flatten(0, 1) for x in Comparisons.collate([self.labels[0]])]
        expected = (features @ judge.weight[0]).detach()
        torch.testing.assert_close(judge.reward(*batch), expected)


if __name__ == "__main__":
    unittest.main()
