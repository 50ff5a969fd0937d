"""HappyGPT: its data, its figures, and the whole script in miniature, run as a user would."""

import itertools
import json
import math
import os
import random
import signal
import statistics
import subprocess
import sys
import tarfile
import time
import unittest
from unittest import mock

import numpy as np
import torch

from mingpt import evaluation
from mingpt.chars import CharTokenizer
from mingpt.datasets import split_rows
from mingpt.run_folder import read_metrics
from tests.common import NO_POINTS, ROOT, TempDirTestCase, load_script, tiny_gpt

sys.path.insert(0, str(ROOT / "projects" / "happy_gpt"))
import average
import data
import preferences
import report
import spent

PROJECT = ROOT / "projects" / "happy_gpt"
compare = load_script(PROJECT / "compare.py")  # another project has a module of this name
SMALL = [
    "--model.model_type=gpt-nano",
    "--pretrain.max_iters=24",
    "--pretrain.batch_size=4",
    "--pretrain.log_every=1",
    "--pretrain.eval_every=4",
    "--pretrain.checkpoint_every=2",
    "--sft.max_iters=4",
    "--sft.batch_size=4",
    "--sft.eval_every=4",
    "--rl.max_iters=3",
    "--rl.batch_size=8",
    "--rl.checkpoint_every=1",
    "--report.samples=16",
    "--report.frontier_samples=32",
    "--report.every=2",
]


def write_corpora(path):
    """An archive in the layout of the real one, with two rated texts a source."""
    corpora = path.parent / "hutto_ICWSM_2014"
    corpora.mkdir()
    for name in data.SOURCES.values():
        texts = f"1\t0.5\tI &lt;3  {name} &amp; you\n2\t-1.0\tcaf\u00e9, no\n"
        ratings = "\ufeff1\t0.5\t0.1\t[2, 3, -1]\n2\t-1.0\t0.1\t[-1, -1, -3, \n"
        (corpora / f"{name}_GroundTruth.txt").write_text(texts, encoding="utf-8")
        (corpora / f"{name}_anonDataRatings.txt").write_text(ratings, encoding="utf-8")
    with tarfile.open(path, "w:gz") as tar:
        tar.add(corpora, corpora.name)


class TestCorpora(TempDirTestCase):
    def test_reads_the_corpora(self):
        path = self.folder / "corpora.tar.gz"
        write_corpora(path)
        rows = data.load_icwsm(path)
        self.assertEqual(len(rows), 8)
        self.assertEqual(rows[0]["text"], "I <3 tweets & you")
        self.assertEqual(rows[1]["text"], "café, no")
        self.assertEqual(rows[1]["ratings"], [-1, -1, -3])  # the list is cut off in the file
        self.assertAlmostEqual(rows[1]["rating"], -5 / 3)
        self.assertEqual({row["source"] for row in rows}, set(data.SOURCES))

    def test_without_a_network_the_error_says_what_to_do(self):
        environment = {
            "MINGPT_HOME": str(self.folder),
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": "",
            "PIP_CONFIG_FILE": os.devnull,
        }
        self.enterContext(mock.patch.dict(os.environ, environment))
        words = "(?s)python -m pip download .*and put .* into .*vaderSentiment-3.3.2; or .*--data"
        self.assertRaisesRegex(ConnectionError, words, data.fetch)


class TestOwnTexts(TempDirTestCase):
    def setUp(self):
        super().setUp()
        self.path = self.folder / "texts.jsonl"

    def test_rating_and_label(self):
        lines = [
            '{"text": "so  happy"}',
            "",
            '{"text": "sad", "label": -1}',
            '{"text": "ok", "rating": 0.5}',
        ]
        self.path.write_text("\n".join(lines), encoding="utf-8")
        found = [(row["text"], row["rating"]) for row in data.load_jsonl(self.path)]
        self.assertEqual(found, [("so happy", None), ("sad", -1), ("ok", 0.5)])

    def test_a_line_separator_in_a_text_ends_no_line(self):
        self.path.write_text('{"text": "one\u2028line"}\n', encoding="utf-8")
        self.assertEqual(len(data.load_jsonl(self.path)), 1)

    def test_bad_lines(self):
        words = "texts.jsonl(, line 2: must be|: the rating of 'a' is 'good')"
        bad_lines = (
            "{",
            '{"txt": "a"}',
            '{"text": 3}',
            '["text"]',
            '{"text": "a", "rating": "good"}',
        )
        for line in bad_lines:
            with self.subTest(line):
                self.path.write_text('{"text": "fine"}\n' + line, encoding="utf-8")
                self.assertRaisesRegex(ValueError, words, data.load_jsonl, self.path)

    def test_no_such_file(self):
        missing = self.folder / "none.jsonl"
        self.assertRaisesRegex(ValueError, "no such file", data.load_jsonl, missing)


class TestSplits(unittest.TestCase):
    def test_no_text_is_in_two_splits(self):
        rows = [{"text": f"text {i % 700}"} for i in range(1000)]
        splits = split_rows(rows, "text")
        texts = {name: {row["text"] for row in split} for name, split in splits.items()}
        self.assertEqual(sum(map(len, splits.values())), 1000)
        self.assertEqual(sum(map(len, texts.values())), len(set.union(*texts.values())))
        for name, share in (("train", 0.9), ("valid", 0.05), ("test", 0.05)):
            self.assertAlmostEqual(len(texts[name]) / 700, share, delta=0.03)
        self.assertEqual(splits, split_rows(rows, "text"))


class TestWindows(unittest.TestCase):
    texts = ("abc", "abcdefgh", "abbcccddddeeeeefabc")  # no two windows of the last one are alike
    tokenizer = CharTokenizer("abcdefgh")  # the end of a text is 8

    def test_consecutive_windows_predict_every_character_and_every_end_once(self):
        windows = data.Windows(self.texts, self.tokenizer, 8, consecutive=True)
        targets = []
        for i in range(len(windows)):
            _, y = windows[i]
            targets += y[y >= 0].tolist()
        expected = []
        for text in self.texts:
            expected += [*self.tokenizer.encode(text), 8]
        self.assertEqual(targets, expected)

    def test_a_short_text_is_padded(self):
        x, y = data.Windows(self.texts, self.tokenizer, 8, consecutive=True)[0]
        self.assertEqual(x.tolist(), [8, 0, 1, 2, 8, 8, 8, 8])
        self.assertEqual(y.tolist(), [0, 1, 2, 8, -1, -1, -1, -1])

    def test_random_windows_come_from_all_places(self):
        windows = data.Windows(self.texts, self.tokenizer, 8)
        in_order = data.Windows(self.texts, self.tokenizer, 8, consecutive=True)
        self.assertEqual(len(windows), len(in_order))
        last = len(windows) - 1
        found = set()
        for _ in range(200):
            x, y = windows[last]
            found.add((tuple(x.tolist()), tuple(y.tolist())))
        ids = [8, *self.tokenizer.encode(self.texts[2]), 8]
        starts = range(len(ids) - 8)
        expected = {(tuple(ids[s : s + 8]), tuple(ids[s + 1 : s + 9])) for s in starts}
        self.assertEqual(found, expected)


class TestReport(unittest.TestCase):
    tokenizer = CharTokenizer("abcdefghij")  # the end of a text is 10

    def test_a_prompt_is_continued(self):
        tweets = report.sample_tweets(tiny_gpt(1), self.tokenizer, 10, seed=4, prompt="abc")
        self.assertEqual(tweets.prompts, ["abc"] * 10)
        self.assertEqual(tweets.idx[:, :4].tolist(), [[10, 0, 1, 2]] * 10)
        self.assertEqual(tweets.idx.size(1), 13)  # block_size, and one more that is never read

    def test_kl_of_tweets_token_by_token(self):
        policy, reference = tiny_gpt(1), tiny_gpt(2)
        tweets = report.sample_tweets(policy, self.tokenizer, 50, seed=4)
        log_ratios = evaluation.log_ratios(tweets, reference)
        total = 0.0
        for row in range(50):
            ids = tweets.idx[row][tweets.attention_mask[row]].tolist()
            for t in range(1, len(ids)):
                p, q = (self.log_prob(model, ids[:t], ids[t]) for model in (policy, reference))
                self.assertAlmostEqual(log_ratios[row, t - 1].item(), p - q, places=3)
                total += p - q
        self.assertAlmostEqual(report.kl_to(reference, tweets), total / 50, places=3)

    def test_held_out_loss_character_by_character(self):
        policy = tiny_gpt(1)
        losses, texts = [], ["abcabcabcabcabcabc", "jj"]
        for text in texts:
            ids = [10, *self.tokenizer.encode(text), 10]
            for t in range(1, len(ids)):
                start = (t - 1) // 12 * 12  # of the window of block_size = 12 that t is in
                losses.append(-self.log_prob(policy, ids[start:t], ids[t]))
        found = report.held_out_loss(policy, texts, self.tokenizer)
        self.assertAlmostEqual(found, np.mean(losses), places=4)

    def log_prob(self, model, context, token):
        logits, _ = model(torch.tensor([context]))
        return logits[0, -1].log_softmax(0)[token].item()

    def test_the_readme_shows_how_to_use_the_result(self):
        readme = (PROJECT / "readme.md").read_text(encoding="utf-8")
        for line in report.HOW_TO_USE_IT.format(folder="out/happy_gpt/rl/model").splitlines()[2:]:
            self.assertIn(line, readme)

    def test_the_table_of_samples_escapes_what_markdown_reads(self):
        tweets = report.sample_tweets(tiny_gpt(1), self.tokenizer, 2, 4, lambda i, a, m: m.sum(1))
        tweets.texts[0] = "a|b"
        lines = report.side_by_side({"sft": tweets}, 2).splitlines()
        self.assertEqual(lines[:2], ["| sft |", "| --- |"])
        self.assertEqual(lines[2], f"| `` a¦b `` {tweets.rewards[0]:+.2f} |")
        self.assertEqual(len(lines), 4)


class TestSpent(unittest.TestCase):
    def test_the_words_of_tweets_and_what_they_cost(self):
        text = "so happy, :) no"
        costs = torch.arange(20.0)[None]
        tweets = mock.Mock(texts=[text])
        words = list(spent.words_of(tweets, costs))
        starts, scores, happy, nats = zip(*words, strict=True)
        self.assertEqual(starts, (0, 3, 10, 13))
        self.assertEqual(happy, (False, True, True, False))
        self.assertEqual(nats, (0 + 1 + 2, sum(range(3, 10)), 10 + 11 + 12, 13 + 14))
        vader = preferences.vader()
        before = vader(["", "so ", "so happy, ", "so happy, :) "], prompts=[])
        self.assertEqual(list(scores), before)

    def test_the_nats_of_all_characters_are_the_kl(self):
        policy, reference = tiny_gpt(1), tiny_gpt(2)
        tweets = report.sample_tweets(policy, TestReport.tokenizer, 50, seed=4)
        total = evaluation.log_ratios(tweets, reference).sum().item()
        self.assertAlmostEqual(total / 50, report.kl_to(reference, tweets), places=4)


class TestPreferences(unittest.TestCase):
    def test_accuracies_are_those_of_a_loop_over_all_pairs(self):
        generator = random.Random(0)
        ratings = generator.choices([-1.0, -0.4, 0.0, 0.4, 2.0], k=40)
        scores = generator.choices([0.0, 1.0, 2.0], k=40)
        rows = [
            {"source": generator.choice(["tweets", "news"]), "rating": rating} for rating in ratings
        ]
        right = {"tweets": [], "news": []}
        for a, b in itertools.product(range(40), repeat=2):
            same_source = rows[a]["source"] == rows[b]["source"]
            if same_source and rows[a]["rating"] - rows[b]["rating"] > 0.5:
                is_right = 0.5 if scores[a] == scores[b] else float(scores[a] > scores[b])
                right[rows[a]["source"]].append(is_right)
        found = preferences.accuracies(scores, rows)
        for source, expected in {**right, "all but tweets": right["news"]}.items():
            self.assertAlmostEqual(found[source], np.mean(expected))

    def test_every_rater_against_every_rater(self):
        all_ratings = ([0, 1, 4], [-1, 0, 1, 2], [-3], [1.4, 1.4])
        rows = [
            {"rating": statistics.mean(ratings), "ratings": ratings} for ratings in all_ratings
        ]
        scores = [0.5, 0.1, 0.7, -1.0]
        labels, losses = np.full((4, 4), np.nan), []
        for i, j in itertools.permutations(range(4), 2):
            if rows[i]["rating"] - rows[j]["rating"] > 0.5:
                votes = itertools.product(rows[i]["ratings"], rows[j]["ratings"])
                p = statistics.mean((a > b) + (a == b) / 2 for a, b in votes)
                labels[i, j] = p
                losses.append(
                    p * math.log(1 + math.exp(scores[j] - scores[i]))
                    + (1 - p) * math.log(1 + math.exp(scores[i] - scores[j]))
                )
        agreement = preferences.agreement(rows)
        np.testing.assert_allclose(agreement, labels, atol=1e-6)
        batch = (None, None, agreement)
        loss, _ = preferences.group_loss(lambda idx, mask: torch.tensor(scores), batch)
        self.assertAlmostEqual(loss.item(), statistics.mean(losses), places=5)

    def test_every_text_is_in_one_group(self):
        rows = [
            {"source": f"s{i % 3}", "text": "ab" * (1 + i % 7), "rating": float(i)}
            for i in range(50)
        ]
        groups = preferences.Groups(rows, CharTokenizer("ab"), 8, by_source=True)
        lengths = []
        for _, attention_mask, _ in groups:
            lengths += attention_mask.sum(1).tolist()
        self.assertEqual(sorted(lengths), sorted(2 + len(row["text"]) for row in rows))

    def test_the_halves_are_about_equal(self):
        halves = [preferences.half(f"text {i}") for i in range(1000)]
        self.assertAlmostEqual(halves.count("judge") / 1000, 0.5, delta=0.06)

    def test_pairs_put_the_better_tweet_first(self):
        def count_d(idx, attention_mask, completion_mask):
            return (completion_mask & (idx == 3)).sum(1).float()

        tweets = report.sample_tweets(tiny_gpt(), CharTokenizer("abcdefghij"), 40, 4, count_d)
        pairs = preferences.pairs(tweets)
        seen = 0
        for first in range(0, 40, 2):
            second = first + 1
            if tweets.rewards[first] == tweets.rewards[second]:
                continue
            order = sorted((first, second), key=lambda row: -tweets.rewards[row])
            idx, attention_mask, completion_mask = pairs[seen]
            self.assertTrue(torch.equal(idx, tweets.idx[order]))
            self.assertTrue(torch.equal(completion_mask, tweets.completion_mask[order]))
            self.assertFalse(completion_mask[:, 0].any())
            self.assertTrue(attention_mask[:, 0].all())
            self.assertTrue(torch.equal(attention_mask[:, 1:], completion_mask[:, 1:]))
            seen += 1
        self.assertEqual(len(pairs), seen)
        self.assertGreater(seen, 5)


class ScriptTestCase(TempDirTestCase):
    """Runs happy_gpt.py on a few hundred texts of nine words."""

    def setUp(self):
        super().setUp()
        words = ["good", "bad", "happy", "sad", "love", "hate", "the", "movie", ":)"]
        generator = random.Random(0)
        rows = []
        for _ in range(300):
            text = " ".join(generator.choices(words, k=generator.randint(2, 20)))
            rows.append({"text": text, "rating": text.count("love") - text.count("hate")})
        path = self.folder / "texts.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        self.options = [f"--data.path={path}", *SMALL]

    def start(self, script, *args):
        return subprocess.Popen(
            [sys.executable, str(PROJECT / script), *args],
            cwd=self.folder,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def start_in(self, name, *args):
        """Start happy_gpt.py with this work_dir."""
        work_dir = f"--system.work_dir={self.folder / name}"
        return self.start("happy_gpt.py", work_dir, *self.options, *args)

    def run_script(self, *args, name="out", code=0):
        """(stdout, stderr) of happy_gpt.py, which must end with this exit status."""
        process = self.start_in(name, *args)
        printed = process.communicate()
        self.assertEqual(process.returncode, code, printed)
        self.assertNotIn(NO_POINTS, printed[1])
        return printed

    def summary(self, name):
        return json.loads((self.folder / name / "summary.json").read_text(encoding="utf-8"))

    def assert_all_finite(self, summary):
        self.assertTrue(all(math.isfinite(value) for value in summary.values()), summary)


class TestWholeJob(ScriptTestCase):
    def test_the_whole_job_interrupted_and_continued(self):
        printed, _ = self.run_script(name="whole")
        self.check_files(self.folder / "whole")
        self.check_usage(printed)
        # One stage at a time, stopped in the first one in three ways.
        for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)):
            self.stop_in_pretrain(number, code)
        for stages in ("pretrain", "sft,rl"):
            self.run_script(f"--stages={stages}", name="parts")
        for stage in ("pretrain", "sft", "rl"):
            whole, parts = (
                torch.load(self.folder / name / stage / "checkpoint.pt", weights_only=True)
                for name in ("whole", "parts")
            )
            torch.testing.assert_close(whole["model"], parts["model"], atol=0, rtol=0)
        not_compared = {"seconds": 0, "peak_rss_mb": 0}
        self.assertEqual(self.summary("parts") | not_compared, self.summary("whole") | not_compared)

        self.check_second_run()
        self.check_where_the_kl_is_spent()

    def check_files(self, folder):
        """What a run leaves in its folder."""
        summary = self.summary(folder.name)
        keys = {
            *("val_loss_pretrain", "reward_pretrain", "reward_sft", "reward_rl"),
            *("kl_rl", "kl_optimal", "unique_rl", "length_sft", "length_rl"),
            *("seconds", "peak_rss_mb", "seed"),
        }
        self.assertEqual(set(summary), keys)
        self.assert_all_finite(summary)
        plots = ("losses.png", "reward_and_kl.png", "ppo.png", "frontier.png")
        for name in (*plots, "samples.md", "samples/rl_0002.txt"):
            self.assertGreater((folder / name).stat().st_size, 0, name)
        stages = {row["stage"] for row in read_metrics(folder / "metrics.jsonl")}
        self.assertEqual(stages, {"pretrain", "sft", "rl"})
        rows = read_metrics(folder / "rl" / "metrics.jsonl")
        self.assertTrue(all(row["log_prob_error"] < 1e-4 for row in rows))
        self.assertLess(abs(rows[0]["objective/kl"]), 1e-4)

    def check_usage(self, printed):
        """The lines that are printed at the end load the result and use it."""
        _, _, code = printed.partition("To use the model from Python:")
        self.assertIn("rl/model", code)
        result = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assertEqual(len(result.stdout.splitlines()), 10)

    def stop_in_pretrain(self, number, code):
        """Send a signal to a run once it has logged something new."""
        metrics = self.folder / "parts" / "pretrain" / "metrics.jsonl"
        seen = len(read_metrics(metrics))
        process = self.start_in("parts", "--stages=pretrain")
        while process.poll() is None and len(read_metrics(metrics)) <= seen:
            time.sleep(0.001)
        process.send_signal(number)
        stderr = process.communicate()[1]
        self.assertEqual(process.returncode, code)
        says_so = "the same command goes on from here" in stderr
        self.assertEqual(says_so, number != signal.SIGKILL)

    def check_second_run(self):
        """Finished stages are skipped, prompts continued, other options not mixed in."""
        self.run_script(name="whole")
        samples, _ = self.run_script("--prompt=love the", name="whole")
        self.assertEqual([line[:8] for line in samples.splitlines()], ["love the"] * 10)
        # The model is the one that was trained, whatever else is asked for.
        samples, _ = self.run_script("--prompt=the", "--model.model_type=gpt2", name="whole")
        self.assertEqual(len(samples.splitlines()), 10)
        for option, words in (
            ("--prompt=12", "never seen: 1 2"),
            ("--system.seed=1", "system.seed was 3407, is 1"),
        ):
            _, complaint = self.run_script(option, name="whole", code=1)
            self.assertIn(words, complaint)

    def check_where_the_kl_is_spent(self):
        process = self.start("spent.py", f"--work_dir={self.folder / 'whole'}", "--samples=64")
        printed, _ = process.communicate()
        self.assertEqual(process.returncode, 0)
        self.assertEqual(printed.count("| VADER's score so far |"), len(spent.HALVES) - 1)
        self.assertIn("| -1 to 0.2 |", printed)


class TestAverage(TempDirTestCase):
    def test_the_mean_of_some_policies_and_its_distance_from_the_reference(self):
        reference, *policies = (tiny_gpt(seed=seed) for seed in range(4))
        for scale in (0.0, 1.0, 1.1):
            result = dict(average.average(reference, policies, scale).named_parameters())
            for name, start in reference.named_parameters():
                ends = [dict(policy.named_parameters())[name] for policy in policies]
                distances = [(end - start).detach().double().numpy() for end in ends]
                expected = start.detach().double().numpy() + scale * np.mean(distances, axis=0)
                np.testing.assert_allclose(result[name].detach().numpy(), expected, atol=1e-6)

    def test_the_mean_of_one_policy_is_that_policy(self):
        reference, policy = tiny_gpt(seed=0), tiny_gpt(seed=1)
        idx = torch.tensor([[1, 2, 3]])
        logits = average.average(reference, [policy])(idx)[0]
        torch.testing.assert_close(logits, policy.eval()(idx)[0], rtol=0, atol=1e-5)

    def test_what_has_no_mean_is_refused(self):
        with self.assertRaisesRegex(ValueError, "the runs' models differ in transformer.wte"):
            average.average(tiny_gpt(), [tiny_gpt(vocab_size=7)])
        with self.assertRaisesRegex(ValueError, "--runs is empty"):
            average.main([])
        with self.assertRaisesRegex(ValueError, "there is no .*it comes with a finished run"):
            average.main([f"--runs={self.folder}", f"--reference={self.folder}"])


class TestFamily(ScriptTestCase):
    def test_other_algorithms_and_rewards_from_the_stages_of_one_run(self):
        self.run_script("--stages=pretrain", "--data.path=nowhere.jsonl", code=1)
        self.run_script("--rl.algorithm=reinforce")  # the run before left nothing behind
        rows = read_metrics(self.folder / "out" / "rl" / "metrics.jsonl")
        self.assertTrue(all(row["val/ratio"] == 1 for row in rows))
        self.assertTrue(all(row["policy/clipfrac"] == 0 for row in rows))
        self.check_dpo()
        self.check_best_of_n()
        self.check_human()
        self.check_compare()
        self.check_average()
        self.check_half_a_stage()

    def run_from_base(self, name, *options):
        """Run what comes after sft, from the run in out."""
        self.run_script(f"--base={self.folder / 'out'}", *options, name=name)
        self.assertFalse((self.folder / name / "sft").exists())  # it was not trained again
        summary = self.summary(name)
        self.assert_all_finite(summary)
        return summary

    def check_dpo(self):
        self.run_from_base(
            "dpo",
            "--rl.algorithm=dpo",
            "--dpo.max_iters=10",
            "--dpo.batch_size=2",
            "--dpo.pairs=60",
        )

    def check_best_of_n(self):
        options = ["--rl.algorithm=best_of_n", "--rl.group_size=4"]
        summary = self.run_from_base("best_of_n", *options)
        self.assertAlmostEqual(summary["kl_rl"], math.log(4) - 3 / 4)
        self.assertGreater(summary["reward_rl"], summary["reward_sft"])

    def check_human(self):
        summary = self.run_from_base(
            "human",
            "--rl.reward=human",
            "--trunk.max_iters=2",
            "--trunk.vocab_size=270",
            "--reward.epochs=None",
            "--reward.max_iters=2",
        )
        self.assertLess({"judge_rl", "vader_rl", "judge_sft"}, set(summary))
        path = self.folder / "human" / "reward" / "accuracy.json"
        accuracy = json.loads(path.read_text(encoding="utf-8"))
        self.assertEqual(set(accuracy), {"reward", "vader"})
        rows = read_metrics(self.folder / "human" / "rl" / "metrics.jsonl")
        looks = [row for row in rows if "eval/judge" in row]
        self.assertTrue(looks)
        for row in looks:
            for name in ("eval/kl", "eval/scores", "eval/vader"):
                self.assertTrue(math.isfinite(row[name]))
        # compare.py draws such runs. This one stands for that without a penalty.
        with self.assertNoLogs("mingpt", "WARNING"):
            compare.plot("human", {"kl_coef 0": self.folder / "human"}, self.folder / "human.png")
        self.assertGreater((self.folder / "human.png").stat().st_size, 0)

    def check_compare(self):
        process = self.start(
            "compare.py",
            "family",
            f"--base={self.folder / 'out'}",
            f"--out={self.folder}",
            "--only=reinforce,best of 16",
            f"--flags={' '.join(self.options)}",
        )
        printed, complaint = process.communicate()
        self.assertEqual(process.returncode, 0, complaint)
        self.assertNotIn(NO_POINTS, complaint)
        rows = r"\| reinforce \| -?0\.\d+ .*\n\| best of 16 \| 0\.\d+ \| ≤ 1\.84 "
        self.assertRegex(printed, rows)
        self.assertGreater((self.folder / "family.png").stat().st_size, 0)

    def check_average(self):
        out = self.folder / "out"
        process = self.start(
            "average.py",
            f"--runs={out},{self.folder / 'dpo'}",
            f"--reference={out / 'sft' / 'model'}",
            f"--out={self.folder / 'average'}",
            "--samples=16",
        )
        printed, complaint = process.communicate()
        self.assertEqual(process.returncode, 0, complaint)
        self.assertRegex(printed, r"reward -?0\.\d+ at -?\d+\.\d+ nats, ")
        self.assertTrue((self.folder / "average" / "chars.json").exists())

    def check_half_a_stage(self):
        out = self.folder / "out"
        for path in (
            out / "pretrain" / "finished.json",  # as after Ctrl-C in pretrain:
            out / "sft" / "finished.json",
            out / "sft" / "checkpoint.pt",  # ... neither of these two has begun
            out / "rl" / "finished.json",
            out / "rl" / "checkpoint.pt",
        ):
            path.unlink()
        options = ["--rl.algorithm=reinforce", "--stages=rl,sft"]
        _, complaint = self.run_script(*options, code=1)
        self.assertIn("the stage pretrain is not finished", complaint)


class TestMistakes(ScriptTestCase):
    def test_a_stage_may_end_by_epochs(self):
        options = ["--pretrain.max_iters=None", "--pretrain.epochs=0.1"]
        self.run_script("--stages=pretrain", *options)
        printed, _ = self.run_script("--stages=sft", *options)
        self.assertIn("sft", printed)

    def test_help_lists_the_options(self):
        printed, _ = self.run_script("--help")
        options = ("rl.algorithm=ppo", "model.block_size=64", "data.path=", "sft.learning_rate=")
        for option in options:
            self.assertIn(f"--{option}", printed)

    def test_mistakes_of_one_line(self):
        for args, words in (
            (["--rl.kl_coeff=1"], "did you mean --rl.kl_coef?"),
            (["--stages=sft"], "the stage pretrain is not finished"),
            (["--stages=sft,ppo"], "--stages has ppo, which does not exist"),
            (["--data.path=none.jsonl"], "no such file"),
            (["--data.positive=99"], "lower it"),
            (
                ["--prompt=a", "--system.work_dir=nowhere"],
                "run this script without --prompt first",
            ),
        ):
            with self.subTest(args):
                _, complaint = self.run_script(*args, name=words[:5].strip(), code=1)
                self.assertIn(words, complaint)
                self.assertNotIn("Traceback", complaint)

    def test_what_does_not_go_together(self):
        script = load_script(PROJECT / "happy_gpt.py")
        work_dir = f"--system.work_dir={self.folder / 'out'}"
        for option, words in (
            ("--stages=trunk", "trunk has nothing to do with --rl.reward=vader"),
            ("--rl.algorithm=gppo", "--rl.algorithm has gppo, .* choose from ppo, reinforce,"),
            ("--base=nowhere", "no stage of --base=nowhere can be used"),
            ("--rl.minibatch_size=100", r"the stage rl cannot run \(--rl.\*\): minibatch_size"),
        ):
            with self.subTest(option):
                args = [work_dir, *self.options, option]
                self.assertRaisesRegex(ValueError, words, script.main, args)
        self.assertFalse((self.folder / "out" / "pretrain").exists())

    def test_each_algorithm_takes_this_scripts_defaults_or_leaves_them(self):
        script = load_script(PROJECT / "happy_gpt.py")
        for algorithm in script.ALGORITHMS:
            with self.subTest(algorithm):
                config = script.get_config()
                config.rl.algorithm = algorithm
                config.system.work_dir = str(self.folder)
                script.make_stages(config, CharTokenizer("ab"))  # which checks all options
        for algorithm, reward, is_shaped in (
            ("ppo", "vader", True),
            ("ppo", "human", False),  # each character of a tweet would be a text to judge
            ("rloo", "vader", False),
            ("reinforce", "vader", False),
        ):
            config.rl.merge_from_dict({"algorithm": algorithm, "reward": reward})
            options = script.make_stages(config, CharTokenizer("ab")).trainer_config("rl")
            self.assertEqual(options.shaping, is_shaped)
        config.rl.merge_from_dict({"algorithm": "dapo", "kl_coef": 0.3})  # the user's own choice
        with self.assertRaisesRegex(ValueError, "kl_coef=0.3 has no effect"):
            script.make_stages(config, CharTokenizer("ab"))


if __name__ == "__main__":
    unittest.main()
