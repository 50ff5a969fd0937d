"""HappyGPT: its data, its yardstick, and the whole script in miniature, run as a user would."""

import io
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

SMALL = ["--pretrain.max_iters=24", "--pretrain.log_every=1", "--sft.max_iters=4", "--rl.max_iters=3", "--rl.batch_size=8", "--pretrain.batch_size=4",
         "--sft.batch_size=4", "--pretrain.eval_every=4", "--sft.eval_every=4", "--report.samples=16",
         "--report.frontier_samples=32", "--report.every=2", "--pretrain.log_every=1",
         "--pretrain.checkpoint_every=2", "--rl.checkpoint_every=1", "--model.model_type=gpt-nano"]


def sdist(path, damage=None):
    """A source distribution in the layout of the real one, with two rated texts a source."""
    inner, outer = io.BytesIO(), io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as tar:
        for name in data.SOURCES.values():
            for kind, content in (("GroundTruth", f"1\t0.5\tI &lt;3  {name} &amp; you\n2\t-1.0\tcaf\u00e9, no\n"),
                                  ("anonDataRatings", "\ufeff1\t0.5\t0.1\t[2, 3, -1]\n2\t-1.0\t0.1\t[-1, -1, -3, \n")):
                info = tarfile.TarInfo(f"hutto_ICWSM_2014/{name}_{kind}.txt")
                info.size = len(content.encode())
                tar.addfile(info, io.BytesIO(content.encode()))
    with tarfile.open(fileobj=outer, mode="w:gz") as tar:
        info = tarfile.TarInfo("vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz")
        info.size = len(inner.getvalue())
        tar.addfile(info, io.BytesIO(inner.getvalue()))
    path.write_bytes(outer.getvalue())


class TestData(TempDirTestCase):

    def test_reads_the_corpora(self):
        sdist(self.folder / data.SDIST)
        rows = data.load_icwsm(self.folder / data.SDIST)
        self.assertEqual(len(rows), 8)
        self.assertEqual(rows[0]["text"], "I <3 tweets & you")
        self.assertEqual(rows[1]["text"], "café, no")
        self.assertEqual(rows[1]["ratings"], [-1, -1, -3])  # the list is cut off in the file
        self.assertAlmostEqual(rows[1]["rating"], -5 / 3)
        self.assertEqual({row["source"] for row in rows}, set(data.SOURCES))

    def test_no_network_no_cache_and_a_corrupt_cache(self):
        offline = {"MINGPT_HOME": str(self.folder), "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", "PIP_CONFIG_FILE": os.devnull}
        with mock.patch.dict(os.environ, offline):
            for content in (None, b"not what it should be"):
                if content:
                    (self.folder / "icwsm2014" / data.SDIST).write_bytes(content)
                self.assertRaisesRegex(data.FetchError, "(?s)python -m pip download .*and put .* into .*icwsm2014; or .*--data.path", data.fetch)

    def test_a_cached_file_is_used_without_pip(self):
        path = self.folder / "icwsm2014" / data.SDIST
        path.parent.mkdir()
        sdist(path)
        with mock.patch.dict(os.environ, {"MINGPT_HOME": str(self.folder)}), mock.patch.object(data, "SHA256", data.sha256(path)), \
                mock.patch.object(data.subprocess, "run", side_effect=AssertionError("no need to download")):
            self.assertEqual(data.fetch(), path)

    def test_own_texts(self):
        path = self.folder / "texts.jsonl"
        path.write_text('{"text": "so  happy"}\n\n{"text": "sad", "label": -1}\n{"text": "ok", "rating": 0.5}\n')
        self.assertEqual([(row["text"], row["rating"]) for row in data.load_jsonl(path)],
                         [("so happy", None), ("sad", -1), ("ok", 0.5)])
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
        for a, b in itertools.combinations(texts.values(), 2):
            self.assertFalse(a & b)
        self.assertEqual(sum(map(len, splits.values())), 1000)
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
        x, y = windows[0]
        self.assertEqual((x.tolist(), y.tolist()), ([8, 0, 1, 2, 8, 8, 8, 8], [0, 1, 2, 8, -1, -1, -1, -1]))

        random_windows, starts = data.Windows(texts, tokenizer, 8), set()
        self.assertEqual(len(random_windows), len(windows))
        whole = [8, *tokenizer.encode(texts[2]), 8]
        for _ in range(200):
            x, y = random_windows[len(windows) - 1]
            start = next(s for s in range(len(whole) - 8) if whole[s:s + 8] == x.tolist() and whole[s + 1:s + 9] == y.tolist())
            starts.add(start)
        self.assertEqual(starts, set(range(len(whole) - 8)))


class TestYardstick(unittest.TestCase):

    def test_tilted_frontier_of_a_known_distribution(self):
        # rewards 0 and 1, half each: tilting gives p = e^(1/β) / (1 + e^(1/β)) and KL = log 2 - H(p)
        rewards = np.array([0.0, 1.0] * 50)
        for beta in (0.2, 0.5, 1.0, 3.0):
            p = 1 / (1 + math.exp(-1 / beta))
            kl = math.log(2) + p * math.log(p) + (1 - p) * math.log(1 - p)
            reward, found = report.tilted(rewards, beta)
            self.assertAlmostEqual(reward, p)
            self.assertAlmostEqual(found, kl)
            self.assertAlmostEqual(report.kl_optimal(rewards, p), kl, places=6)
        self.assertEqual(report.kl_optimal(rewards, 0.4), 0.0)
        self.assertIsNone(report.kl_optimal(rewards, 1.0))

    def test_best_of_n_is_the_expected_maximum(self):
        rewards = np.array([0.3, -0.5, 0.9, 0.1])
        for n in (1, 2, 3):
            expected = np.mean([max(draw) for draw in itertools.product(rewards, repeat=n)])
            reward, kl = report.best_of_n(rewards, n)
            self.assertAlmostEqual(reward, expected)
            self.assertAlmostEqual(kl, math.log(n) - (n - 1) / n)

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

        losses = []
        for text in ("abcabcabcabcabcabc", "jj"):
            ids = [10, *tokenizer.encode(text), 10]
            for t in range(1, len(ids)):
                context = ids[(t - 1) // 12 * 12:t]  # windows of block_size = 12, from its own beginning
                losses.append(-policy(torch.tensor([context]))[0][0, -1].log_softmax(0)[ids[t]].item())
        self.assertAlmostEqual(report.held_out_loss(policy, ["abcabcabcabcabcabc", "jj"], tokenizer), np.mean(losses), places=4)


class TestPreferences(unittest.TestCase):

    def test_accuracies_are_those_of_a_loop_over_all_pairs(self):
        generator = random.Random(0)
        rows = [{"source": generator.choice(["tweets", "news"]), "rating": generator.choice([-1.0, -0.4, 0.0, 0.4, 2.0])} for _ in range(40)]
        scores = [generator.choice([0.0, 1.0, 2.0]) for _ in rows]
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
        halves = [preferences.half(f"text {i}") for i in range(1000)]
        self.assertAlmostEqual(halves.count("judge") / 1000, 0.5, delta=0.06)

    def test_pairs_put_the_better_tweet_first(self):
        tweets = report.sample(tiny_gpt(), CharTokenizer("abcdefghij"), lambda idx, attention_mask, mask: (mask & (idx == 3)).sum(1).float(), n=40, seed=4)
        data, seen = preferences.pairs(tweets), 0
        for first, second in zip(range(0, 40, 2), range(1, 40, 2)):
            if tweets.rewards[first] != tweets.rewards[second]:
                order = sorted((first, second), key=lambda i: -tweets.rewards[i])
                idx, attention_mask, mask = data[seen]
                self.assertTrue(torch.equal(idx, tweets.idx[order]) and torch.equal(mask[:, 1:], tweets.mask[order]))
                self.assertTrue(attention_mask[:, 0].all() and torch.equal(attention_mask[:, 1:], mask[:, 1:]) and not mask[:, 0].any())
                seen += 1
        self.assertTrue(len(data) == seen > 5)

    def test_best_of_each(self):
        tweets = report.sample(tiny_gpt(), CharTokenizer("abcdefghij"), lambda idx, attention_mask, mask: mask.sum(1).float(), n=12, seed=4)
        self.assertEqual(report.best_of_each(tweets, 3).rewards.tolist(), [max(tweets.rewards[i:i + 3].tolist()) for i in range(0, 12, 3)])


class TestScript(TempDirTestCase):

    def setUp(self):
        super().setUp()
        words, generator = ["good", "bad", "happy", "sad", "love", "hate", "the", "movie", ":)"], random.Random(0)
        with (self.folder / "texts.jsonl").open("w") as f:
            for _ in range(300):
                text = " ".join(generator.choices(words, k=generator.randint(2, 20)))
                f.write(json.dumps({"text": text, "rating": text.count("love") - text.count("hate")}) + "\n")

    def script(self, *args, name="out"):
        return [sys.executable, str(ROOT / "projects/happy_gpt/happy_gpt.py"), f"--system.work_dir={self.folder / name}",
                f"--data.path={self.folder / 'texts.jsonl'}", *SMALL, *args]

    def run_script(self, *args, name="out"):
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.run(self.script(*args, name=name), capture_output=True, text=True, env=environment, cwd=self.folder)

    def test_the_whole_job_interrupted_and_continued(self):
        whole = self.run_script(name="whole")
        self.assertEqual(whole.returncode, 0, whole.stderr)
        summary = json.loads((self.folder / "whole" / "summary.json").read_text())
        self.assertEqual(set(summary), {"seconds", "peak_rss_mb", "val_loss_pretrain", "reward_pretrain", "reward_sft", "reward_rl", "kl_rl",
                                        "kl_optimal", "unique_rl", "length_sft", "length_rl", "seed"})
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
            process = subprocess.Popen(self.script("--stages=pretrain", name="parts"), env={**os.environ, "PYTHONPATH": str(ROOT)},
                                       stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            while process.poll() is None and len(read_metrics(metrics)) <= seen:
                time.sleep(0.001)
            process.send_signal(number)
            stderr = process.communicate()[1]
            self.assertEqual(process.returncode, code)
            self.assertEqual("the same command goes on from here" in stderr, number != signal.SIGKILL)
        for stages in ("pretrain", "sft,rl"):
            self.assertEqual(self.run_script(f"--stages={stages}", name="parts").returncode, 0)
        for stage in ("pretrain", "sft", "rl"):
            a, b = (torch.load(self.folder / name / stage / "checkpoint.pt", weights_only=True)["model"] for name in ("whole", "parts"))
            self.assertTrue(all(torch.equal(a[key], b[key]) for key in a), stage)
        again = json.loads((self.folder / "parts" / "summary.json").read_text())
        for key in set(summary) - {"seconds", "peak_rss_mb"}:
            self.assertEqual(summary[key], again[key], key)

        # what is finished is skipped, samples follow a prompt, and other options are not mixed in
        self.assertEqual(self.run_script(name="whole").returncode, 0)
        samples = self.run_script("--prompt=love the", name="whole").stdout.splitlines()
        self.assertEqual([line[:8] for line in samples], ["love the"] * 10)
        self.assertEqual(len(self.run_script("--prompt=the", "--model.model_type=gpt2", name="whole").stdout.splitlines()), 10)
        self.assertIn("never seen: 1 2", self.run_script("--prompt=12", name="whole").stderr)
        self.assertIn("system.seed was 3407, is 1", self.run_script("--system.seed=1", name="whole").stderr)

    def test_the_family_and_half_a_stage(self):
        self.assertNotEqual(self.run_script("--stages=pretrain", "--data.path=nowhere.jsonl").returncode, 0)  # leaves nothing behind
        result = self.run_script("--rl.algorithm=reinforce")
        self.assertEqual(result.returncode, 0, result.stderr)
        rows = read_metrics(self.folder / "out" / "rl" / "metrics.jsonl")
        self.assertTrue(all(row["val/ratio"] == 1 and row["policy/clipfrac"] == 0 for row in rows))

        for name, options, kl in (("dpo", ["--rl.algorithm=dpo", "--dpo.max_iters=10", "--dpo.batch_size=2", "--dpo.pairs=60"], None),
                                  ("best_of_n", ["--rl.algorithm=best_of_n", "--rl.group_size=4"], math.log(4) - 3 / 4),
                                  ("human", ["--rl.reward=human", "--trunk.max_iters=2", "--trunk.vocab_size=270",
                                             "--reward.epochs=None", "--reward.max_iters=2"], None)):
            for stage in ("pretrain", "sft"):
                shutil.copytree(self.folder / "out" / stage, self.folder / name / stage)
            result = self.run_script(*options, name=name)
            self.assertEqual(result.returncode, 0, result.stderr)
            summary = json.loads((self.folder / name / "summary.json").read_text())
            self.assertTrue(all(math.isfinite(value) for value in summary.values()), summary)
            if kl:
                self.assertAlmostEqual(summary["kl_rl"], kl)
                self.assertGreater(summary["reward_rl"], summary["reward_sft"])
        self.assertLess({"judge_rl", "vader_rl", "judge_sft"}, set(summary))  # human's
        self.assertEqual(set(json.loads((self.folder / "human" / "reward" / "accuracy.json").read_text())), {"reward", "vader"})
        looks = [row for row in read_metrics(self.folder / "human" / "rl" / "metrics.jsonl") if "eval/judge" in row]
        self.assertTrue(looks and all(math.isfinite(row[name]) for row in looks for name in ("eval/kl", "eval/scores", "eval/vader")))

        flags = " ".join([f"--data.path={self.folder / 'texts.jsonl'}", *SMALL])
        command = [sys.executable, str(ROOT / "projects/happy_gpt/compare.py"), "family", f"--base={self.folder / 'out'}",
                   f"--out={self.folder}", "--only=reinforce,best of 16", f"--flags={flags}"]
        printed = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}).stdout
        self.assertRegex(printed, r"\| reinforce \| 0\.\d+ .*\n\| best of 16 \| 0\.\d+ \| ≤ 1\.84 ")
        self.assertTrue((self.folder / "family.png").stat().st_size > 0)

        path = self.folder / "out" / "pretrain" / "checkpoint.pt"
        state = torch.load(path, weights_only=True)
        torch.save({**state, "iter_num": 4, "finished": False}, path)
        for stage in ("sft", "rl"):  # as after Ctrl-C in pretrain: neither has begun
            (self.folder / "out" / stage / "checkpoint.pt").unlink()
        half = self.run_script("--rl.algorithm=reinforce", "--stages=rl,sft")
        self.assertIn("the stage pretrain is not finished", half.stderr)

    def test_a_stage_may_end_by_epochs(self):
        self.assertEqual(self.run_script("--stages=pretrain", "--pretrain.max_iters=None", "--pretrain.epochs=0.1").returncode, 0)
        result = self.run_script("--stages=sft", "--pretrain.max_iters=None", "--pretrain.epochs=0.1")
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assertIn("sft", result.stdout)

    def test_mistakes_are_one_line(self):
        for args, words in ((["--rl.kl_coeff=1"], "did you mean --rl.kl_coef?"), (["--stages=sft,ppo"], "ppo is none of pretrain,sft,trunk,reward,judge,rl"),
                            (["--stages=sft"], "the stage pretrain is not finished"),
                            (["--data.path=none.jsonl"], "no such file"), (["--data.positive=99"], "lower it"),
                            (["--prompt=a", "--system.work_dir=nowhere"], "run this script without --prompt first")):
            result = self.run_script(*args, name=words[:5].strip())
            with self.subTest(args):
                self.assertEqual(result.returncode, 1)
                self.assertIn(words, result.stderr)
                self.assertNotIn("Traceback", result.stderr)

    def test_help(self):
        result = self.run_script("--help")
        for option in ("--rl.algorithm=ppo", "--model.block_size=64", "--data.path=", "--pretrain.learning_rate="):
            self.assertIn(option, result.stdout)
