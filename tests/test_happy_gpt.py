"""HappyGPT: its data, its yardstick, and the whole script in miniature, run as a user would."""

import itertools
import json
import math
import os
import random
import shutil
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

from mingpt.chars import CharTokenizer
from mingpt.run_folder import read_metrics
from tests.common import ROOT, TempDirTestCase, tiny_gpt

sys.path.insert(0, str(ROOT / "projects" / "happy_gpt"))
import data  # noqa: E402
import preferences  # noqa: E402
import report  # noqa: E402

SMALL = ["--pretrain.max_iters=24", "--pretrain.batch_size=4", "--pretrain.log_every=1", "--pretrain.eval_every=4", "--pretrain.checkpoint_every=2",
         "--sft.max_iters=4", "--sft.batch_size=4", "--sft.eval_every=4", "--rl.max_iters=3", "--rl.batch_size=8", "--rl.checkpoint_every=1",
         "--report.samples=16", "--report.frontier_samples=32", "--report.every=2", "--model.model_type=gpt-nano"]


def sdist(path):
    """A source distribution in the layout of the real one, with two rated texts a source."""
    corpora, inner = path.parent / "hutto_ICWSM_2014", path.parent / "hutto_ICWSM_2014.tar.gz"
    corpora.mkdir()
    for name in data.SOURCES.values():
        for kind, content in (("GroundTruth", f"1\t0.5\tI &lt;3  {name} &amp; you\n2\t-1.0\tcaf\u00e9, no\n"),
                              ("anonDataRatings", "\ufeff1\t0.5\t0.1\t[2, 3, -1]\n2\t-1.0\t0.1\t[-1, -1, -3, \n")):
            (corpora / f"{name}_{kind}.txt").write_text(content, encoding="utf-8")
    for archive, content, folder in ((inner, corpora, ""), (path, inner, "vaderSentiment-3.3.2/additional_resources/")):
        with tarfile.open(archive, "w:gz") as tar:
            tar.add(content, folder + content.name)


class TestData(TempDirTestCase):
    def test_reads_the_corpora(self):
        sdist(self.folder / data.SDIST)
        rows = data.load_icwsm(self.folder / data.SDIST)
        self.assertEqual((len(rows), rows[0]["text"], rows[1]["text"]), (8, "I <3 tweets & you", "café, no"))
        self.assertEqual(rows[1]["ratings"], [-1, -1, -3])  # the list is cut off in the file
        self.assertAlmostEqual(rows[1]["rating"], -5 / 3)
        self.assertEqual({row["source"] for row in rows}, set(data.SOURCES))

    def test_no_network_no_cache_a_corrupt_cache_and_a_good_one(self):
        self.enterContext(mock.patch.dict(os.environ, MINGPT_HOME=str(self.folder), PIP_NO_INDEX="1", PIP_FIND_LINKS="", PIP_CONFIG_FILE=os.devnull))
        path = self.folder / "icwsm2014" / data.SDIST
        for _ in range(2):
            self.assertRaisesRegex(data.FetchError, "(?s)python -m pip download .*and put .* into .*icwsm2014; or .*--data.path", data.fetch)
            path.write_bytes(b"not what it should be")
        sdist(path)
        with mock.patch.object(data, "SHA256", data.sha256(path)), mock.patch("subprocess.run", side_effect=AssertionError("no need to download")):
            self.assertEqual(data.fetch(), path)

    def test_own_texts(self):
        path = self.folder / "texts.jsonl"
        path.write_text('{"text": "so  happy"}\n\n{"text": "sad", "label": -1}\n{"text": "ok", "rating": 0.5}\n')
        self.assertEqual([(row["text"], row["rating"]) for row in data.load_jsonl(path)], [("so happy", None), ("sad", -1), ("ok", 0.5)])
        path.write_text('{"text": "one\u2028line"}\n', encoding="utf-8")
        self.assertEqual(len(data.load_jsonl(path)), 1)
        for line in ("{", '{"txt": "a"}', '{"text": 3}', '["text"]', '{"text": "a", "rating": "good"}'):
            path.write_text('{"text": "fine"}\n' + line)
            self.assertRaisesRegex(ValueError, "texts.jsonl(, line 2: must be|: the rating of 'a' is 'good')", data.load_jsonl, path)
        self.assertRaisesRegex(ValueError, "no such file", data.load_jsonl, self.folder / "none.jsonl")

    def test_no_text_is_in_two_splits(self):
        rows = [{"text": f"text {i % 700}"} for i in range(1000)]
        splits = data.split(rows)
        texts = {name: {row["text"] for row in part} for name, part in splits.items()}
        self.assertEqual((sum(map(len, texts.values())), sum(map(len, splits.values()))), (len(set.union(*texts.values())), 1000))
        for name, share in (("train", 0.9), ("valid", 0.05), ("test", 0.05)):
            self.assertAlmostEqual(len(texts[name]) / 700, share, delta=0.03)
        self.assertEqual(splits, data.split(rows))

    def test_windows(self):
        texts = ["abc", "abcdefgh", "abbcccddddeeeeefabc"]  # no two windows of the last one are alike
        tokenizer = CharTokenizer("abcdefgh")  # end of text: 8
        windows = data.Windows(texts, tokenizer, 8, consecutive=True)
        targets = [y[y >= 0].tolist() for _, y in (windows[i] for i in range(len(windows)))]
        # every character and every end is predicted exactly once
        self.assertEqual(sum(targets, []), sum(([*tokenizer.encode(t), 8] for t in texts), []))
        self.assertEqual([part.tolist() for part in windows[0]], [[8, 0, 1, 2, 8, 8, 8, 8], [0, 1, 2, 8, -1, -1, -1, -1]])
        random_windows, whole = data.Windows(texts, tokenizer, 8), [8, *tokenizer.encode(texts[2]), 8]
        self.assertEqual(len(random_windows), len(windows))
        found = {(tuple(x.tolist()), tuple(y.tolist())) for x, y in (random_windows[len(windows) - 1] for _ in range(200))}
        self.assertEqual(found, {(tuple(whole[s:s + 8]), tuple(whole[s + 1:s + 9])) for s in range(len(whole) - 8)})


class TestYardstick(unittest.TestCase):
    def test_tilted_frontier_and_best_of_n_of_known_distributions(self):
        # rewards 0 and 1, half each: tilting gives p = e^(1/β) / (1 + e^(1/β)) and KL = log 2 - H(p)
        rewards = np.array([0.0, 1.0] * 50)
        for beta in (0.2, 0.5, 1.0, 3.0):
            p = 1 / (1 + math.exp(-1 / beta))
            kl = math.log(2) + p * math.log(p) + (1 - p) * math.log(1 - p)
            np.testing.assert_allclose(report.tilted(rewards, beta), (p, kl), atol=5e-8, rtol=0)
            self.assertAlmostEqual(report.kl_optimal(rewards, p), kl, places=6)
        self.assertEqual(report.kl_optimal(rewards, 0.4), 0.0)
        self.assertIsNone(report.kl_optimal(rewards, 1.0))
        rewards = np.array([0.3, -0.5, 0.9, 0.1])
        for n in (1, 2, 3):
            expected = np.mean([max(draw) for draw in itertools.product(rewards, repeat=n)])  # the expected maximum
            np.testing.assert_allclose(report.best_of_n(rewards, n), (expected, math.log(n) - (n - 1) / n), atol=5e-8, rtol=0)

    def test_samples_kl_and_loss(self):
        tokenizer, policy, reference = CharTokenizer("abcdefghij"), tiny_gpt(1), tiny_gpt(2)
        tweets = report.sample(policy, tokenizer, lambda idx, attention_mask, mask: mask.sum(1).float(), n=50, seed=4)
        self.assertEqual(tweets.texts, report.sample(policy, tokenizer, None, n=50, seed=4).texts)
        total = 0.0
        for text, row, length in zip(tweets.texts, tweets.idx.tolist(), tweets.rewards.tolist()):
            ids = row[:1 + int(length)]
            self.assertEqual(tokenizer.decode([i for i in ids if i != 10]), text)
            for t in range(1, len(ids)):
                p, q = (m(torch.tensor([ids[:t]]))[0][0, -1].log_softmax(0)[ids[t]].item() for m in (policy, reference))
                total += p - q
        self.assertAlmostEqual(report.kl_to(reference, tweets), total / 50, places=3)
        self.assertEqual(report.best_of_each(tweets, 5).rewards.tolist(), [max(tweets.rewards[i:i + 5].tolist()) for i in range(0, 50, 5)])
        losses, texts = [], ["abcabcabcabcabcabc", "jj"]
        for ids in ([10, *tokenizer.encode(text), 10] for text in texts):
            for t in range(1, len(ids)):
                context = ids[(t - 1) // 12 * 12:t]  # windows of block_size = 12, from its own beginning
                losses.append(-policy(torch.tensor([context]))[0][0, -1].log_softmax(0)[ids[t]].item())
        self.assertAlmostEqual(report.held_out_loss(policy, texts, tokenizer), np.mean(losses), places=4)


class TestPreferences(unittest.TestCase):
    def test_accuracies_are_those_of_a_loop_over_all_pairs(self):
        generator = random.Random(0)
        ratings, scores = (generator.choices(values, k=40) for values in ([-1.0, -0.4, 0.0, 0.4, 2.0], [0.0, 1.0, 2.0]))
        rows = [{"source": generator.choice(["tweets", "news"]), "rating": rating} for rating in ratings]
        right = {"tweets": [], "news": []}
        for a, b in itertools.product(range(40), repeat=2):
            if rows[a]["source"] == rows[b]["source"] and rows[a]["rating"] - rows[b]["rating"] > 0.5:
                right[rows[a]["source"]].append(1.0 if scores[a] > scores[b] else 0.5 if scores[a] == scores[b] else 0.0)
        found = preferences.accuracies(scores, rows)
        for source, expected in {**right, "all but tweets": right["news"]}.items():
            self.assertAlmostEqual(found[source], np.mean(expected))

    def test_every_rater_against_every_rater(self):
        rows = [{"rating": statistics.mean(ratings), "ratings": ratings} for ratings in ([0, 1, 4], [-1, 0, 1, 2], [-3], [1.4, 1.4])]
        share, scores = preferences.agreement(rows), [0.5, 0.1, 0.7, -1.0]
        expected, loss = np.full((4, 4), np.nan), []
        for i, j in itertools.permutations(range(4), 2):
            if rows[i]["rating"] - rows[j]["rating"] > 0.5:
                expected[i, j] = p = statistics.mean((a > b) + (a == b) / 2 for a in rows[i]["ratings"] for b in rows[j]["ratings"])
                loss.append(p * math.log(1 + math.exp(scores[j] - scores[i])) + (1 - p) * math.log(1 + math.exp(scores[i] - scores[j])))
        np.testing.assert_allclose(share, expected, atol=1e-6)
        found, _ = preferences.group_loss(lambda idx, attention_mask: torch.tensor(scores), (None, None, share))
        self.assertAlmostEqual(found.item(), statistics.mean(loss), places=5)

    def test_groups_and_halves(self):
        rows = [{"source": f"s{i % 3}", "text": "ab" * (1 + i % 7), "rating": float(i)} for i in range(50)]
        groups = preferences.Groups(rows, CharTokenizer("ab"), 8, apart=True)
        self.assertEqual(sorted(n for group in groups for n in group[1].sum(1).tolist()), sorted(2 + len(row["text"]) for row in rows))
        self.assertAlmostEqual([preferences.half(f"text {i}") for i in range(1000)].count("judge") / 1000, 0.5, delta=0.06)

    def test_pairs_put_the_better_tweet_first(self):
        reward = lambda idx, attention_mask, mask: (mask & (idx == 3)).sum(1).float()
        tweets = report.sample(tiny_gpt(), CharTokenizer("abcdefghij"), reward, n=40, seed=4)
        data, seen = preferences.pairs(tweets), 0
        for first, second in zip(range(0, 40, 2), range(1, 40, 2)):
            if tweets.rewards[first] != tweets.rewards[second]:
                order, (idx, attention_mask, mask) = sorted((first, second), key=lambda i: -tweets.rewards[i]), data[seen]
                self.assertTrue(torch.equal(idx, tweets.idx[order]) and torch.equal(mask[:, 1:], tweets.mask[order]))
                self.assertTrue(attention_mask[:, 0].all() and torch.equal(attention_mask[:, 1:], mask[:, 1:]) and not mask[:, 0].any())
                seen += 1
        self.assertTrue(len(data) == seen > 5)


class TestScript(TempDirTestCase):
    def setUp(self):
        super().setUp()
        words, generator = ["good", "bad", "happy", "sad", "love", "hate", "the", "movie", ":)"], random.Random(0)
        texts = [" ".join(generator.choices(words, k=generator.randint(2, 20))) for _ in range(300)]
        rows = [{"text": text, "rating": text.count("love") - text.count("hate")} for text in texts]
        (self.folder / "texts.jsonl").write_text("\n".join(map(json.dumps, rows)))
        self.options = [f"--data.path={self.folder / 'texts.jsonl'}", *SMALL]

    def start(self, script, *args):
        return subprocess.Popen([sys.executable, str(ROOT / "projects" / "happy_gpt" / script), *args], cwd=self.folder, text=True,
                                env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def run_script(self, *args, name="out", code=0):
        """What happy_gpt.py printed, (stdout, stderr), before it ended with this exit status."""
        process = self.start("happy_gpt.py", f"--system.work_dir={self.folder / name}", *self.options, *args)
        printed = process.communicate()
        self.assertEqual(process.returncode, code, printed)
        return printed

    def test_the_whole_job_interrupted_and_continued(self):
        self.run_script(name="whole")
        summary = json.loads((self.folder / "whole" / "summary.json").read_text())
        self.assertEqual(set(summary), {"seconds", "peak_rss_mb", "val_loss_pretrain", "reward_pretrain", "reward_sft", "reward_rl",
                                        "kl_rl", "kl_optimal", "unique_rl", "length_sft", "length_rl", "seed"})
        self.assertTrue(all(math.isfinite(value) for value in summary.values()), summary)
        for name in ("losses.png", "reward_and_kl.png", "ppo.png", "frontier.png", "samples.md", "samples/rl_0002.txt"):
            self.assertTrue((self.folder / "whole" / name).stat().st_size > 0, name)
        self.assertEqual({row["stage"] for row in read_metrics(self.folder / "whole" / "metrics.jsonl")}, {"pretrain", "sft", "rl"})
        rows = read_metrics(self.folder / "whole" / "rl" / "metrics.jsonl")
        self.assertTrue(all(row["log_prob_error"] < 1e-4 for row in rows) and abs(rows[0]["objective/kl"]) < 1e-4)
        # one stage at a time, stopped in the first one in three ways
        metrics = self.folder / "parts" / "pretrain" / "metrics.jsonl"
        for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)):
            seen = len(read_metrics(metrics))
            process = self.start("happy_gpt.py", f"--system.work_dir={self.folder / 'parts'}", *self.options, "--stages=pretrain")
            while process.poll() is None and len(read_metrics(metrics)) <= seen:
                time.sleep(0.001)
            process.send_signal(number)
            stderr = process.communicate()[1]
            self.assertEqual(process.returncode, code)
            self.assertEqual("the same command goes on from here" in stderr, number != signal.SIGKILL)
        for stages in ("pretrain", "sft,rl"):
            self.run_script(f"--stages={stages}", name="parts")
        for stage in ("pretrain", "sft", "rl"):
            a, b = (torch.load(self.folder / name / stage / "checkpoint.pt", weights_only=True)["model"] for name in ("whole", "parts"))
            torch.testing.assert_close(a, b, atol=0, rtol=0)
        again = json.loads((self.folder / "parts" / "summary.json").read_text())
        self.assertEqual({**again, "seconds": 0, "peak_rss_mb": 0}, {**summary, "seconds": 0, "peak_rss_mb": 0})
        # what is finished is skipped, samples follow a prompt, and other options are not mixed in
        self.run_script(name="whole")
        samples, _ = self.run_script("--prompt=love the", name="whole")
        self.assertEqual([line[:8] for line in samples.splitlines()], ["love the"] * 10)
        self.assertEqual(len(self.run_script("--prompt=the", "--model.model_type=gpt2", name="whole")[0].splitlines()), 10)
        for option, words in (("--prompt=12", "never seen: 1 2"), ("--system.seed=1", "system.seed was 3407, is 1")):
            self.assertIn(words, self.run_script(option, name="whole", code=1)[1])

    def test_the_family_and_half_a_stage(self):
        self.run_script("--stages=pretrain", "--data.path=nowhere.jsonl", code=1)  # leaves nothing behind
        self.run_script("--rl.algorithm=reinforce")
        rows = read_metrics(self.folder / "out" / "rl" / "metrics.jsonl")
        self.assertTrue(all(row["val/ratio"] == 1 and row["policy/clipfrac"] == 0 for row in rows))
        for name, options, kl in (("dpo", ["--rl.algorithm=dpo", "--dpo.max_iters=10", "--dpo.batch_size=2", "--dpo.pairs=60"], None),
                                  ("best_of_n", ["--rl.algorithm=best_of_n", "--rl.group_size=4"], math.log(4) - 3 / 4),
                                  ("human", ["--rl.reward=human", "--trunk.max_iters=2", "--trunk.vocab_size=270",
                                             "--reward.epochs=None", "--reward.max_iters=2"], None)):
            for stage in ("pretrain", "sft"):
                shutil.copytree(self.folder / "out" / stage, self.folder / name / stage)
            self.run_script(*options, name=name)
            summary = json.loads((self.folder / name / "summary.json").read_text())
            self.assertTrue(all(math.isfinite(value) for value in summary.values()), summary)
            if kl:
                self.assertAlmostEqual(summary["kl_rl"], kl)
                self.assertGreater(summary["reward_rl"], summary["reward_sft"])
        self.assertLess({"judge_rl", "vader_rl", "judge_sft"}, set(summary))  # human's
        self.assertEqual(set(json.loads((self.folder / "human" / "reward" / "accuracy.json").read_text())), {"reward", "vader"})
        looks = [row for row in read_metrics(self.folder / "human" / "rl" / "metrics.jsonl") if "eval/judge" in row]
        self.assertTrue(looks and all(math.isfinite(row[name]) for row in looks for name in ("eval/kl", "eval/scores", "eval/vader")))
        printed, _ = self.start("compare.py", "family", f"--base={self.folder / 'out'}", f"--out={self.folder}",
                                "--only=reinforce,best of 16", f"--flags={' '.join(self.options)}").communicate()
        self.assertRegex(printed, r"\| reinforce \| 0\.\d+ .*\n\| best of 16 \| 0\.\d+ \| ≤ 1\.84 ")
        self.assertTrue((self.folder / "family.png").stat().st_size > 0)
        path = self.folder / "out" / "pretrain" / "checkpoint.pt"
        state = torch.load(path, weights_only=True)
        torch.save({**state, "iter_num": 4, "finished": False}, path)
        for stage in ("sft", "rl"):  # as after Ctrl-C in pretrain: neither has begun
            (self.folder / "out" / stage / "checkpoint.pt").unlink()
        self.assertIn("the stage pretrain is not finished", self.run_script("--rl.algorithm=reinforce", "--stages=rl,sft", code=1)[1])

    def test_a_stage_may_end_by_epochs(self):
        for stage in ("pretrain", "sft"):
            printed, _ = self.run_script(f"--stages={stage}", "--pretrain.max_iters=None", "--pretrain.epochs=0.1")
        self.assertIn("sft", printed)

    def test_help_and_mistakes_of_one_line(self):
        printed, _ = self.run_script("--help")
        for option in ("--rl.algorithm=ppo", "--model.block_size=64", "--data.path=", "--pretrain.learning_rate="):
            self.assertIn(option, printed)
        for args, words in ((["--rl.kl_coeff=1"], "did you mean --rl.kl_coef?"), (["--stages=sft"], "the stage pretrain is not finished"),
                            (["--stages=sft,ppo"], "ppo is none of pretrain,sft,trunk,reward,judge,rl"),
                            (["--data.path=none.jsonl"], "no such file"), (["--data.positive=99"], "lower it"),
                            (["--prompt=a", "--system.work_dir=nowhere"], "run this script without --prompt first")):
            with self.subTest(args):
                _, complaint = self.run_script(*args, name=words[:5].strip(), code=1)
                self.assertIn(words, complaint)
                self.assertNotIn("Traceback", complaint)
