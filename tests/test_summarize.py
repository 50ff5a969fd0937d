"""summarize_rlhf: docstrings, TL;DR from a server on 127.0.0.1, comparisons against loops, and all three stages in miniature."""

import json
import math
import os
import subprocess
import sys
from unittest import mock

import torch
from hypothesis import given, strategies as st

from mingpt.bpe import BPETokenizer
from mingpt.rlhf import RewardModel
from mingpt.run_folder import read_metrics
from tests.common import ROOT, Server, TempDirTestCase, tiny_gpt

sys.path.insert(0, str(PROJECT := ROOT / "projects" / "summarize_rlhf"))
import corpus  # noqa: E402
import docstrings  # noqa: E402
import evaluation  # noqa: E402
import pipeline  # noqa: E402
import reward  # noqa: E402
import tldr  # noqa: E402

POST = {"id": "t3_1", "subreddit": "tifu", "title": "I fell", "post": "First line.\nSecond line.", "summary": "I fell down the stairs."}
PAIR = {"info": POST, "split": "valid1", "choice": 1, "worker": "w", "batch": "b", "extra": {},
        "summaries": [{"text": " bad", "policy": "sup2", "note": None}, {"text": " good", "policy": "ref", "note": None}]}
SMALL = ["--data.packages=asyncio,email,http,json,logging,unittest", "--data.vocab_size=400", "--data.body_tokens=48", "--data.summary_tokens=32",
         "--model.n_layer=1", "--model.n_head=2", "--model.n_embd=32", "--pretrain.max_iters=6", "--sft.epochs=None", "--sft.max_iters=6",
         "--reward.epochs=None", "--reward.max_iters=6", "--ppo.max_iters=3", "--ppo.batch_size=8", "--ppo.minibatch_size=4", "--ppo.group_size=2",
         "--report.samples=12", "--report.every=1", "--report.looked_at=4"]


class TestDocstrings(TempDirTestCase):
    def test_a_summary_an_empty_line_and_details(self):
        body = "Some details of it that go on\n    for a while, and then a little further.\n\n    Notes\n    -----\n    More of them."
        found = docstrings.split_docstring(f"Does what it is for.\n\n    {body}\n    ")
        self.assertEqual(found, {"summary": "Does what it is for.",
                                 "body": "Some details of it that go on\nfor a while, and then a little further.\nNotes\nMore of them."})
        for bad in ("Does what it is for.", "Does what it is for.\n\nToo short.", f"does what it is for.\n\n{body}", f"Does what it is for\n\n{body}",
                    f"Does what it is for.\n{body}", f"Does what it is für.\n\n{body}"):
            self.assertIsNone(docstrings.split_docstring(bad), bad)

    def test_files_are_parsed_and_not_run_and_copies_left_out(self):
        text = '"""Does what it is for.\n\n' + "Some word of detail. " * 6 + '"""\nraise SystemExit\n'
        copies = text + text.replace('"""Does', 'def f():\n    """Does').replace("raise SystemExit", "").replace("word of", "word  of")
        files = {"p/a.py": copies, "p/sub/b.py": text.replace("Does", "Makes").replace("Some", "Another"), "p/tests/c.py": text,
                 "p/broken.py": "def (", "p/latin.py": b"# \xff\n", "q/d.py": text.replace("Does", "Knows").replace("Some", "Third")}
        for name, content in files.items():
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
        with mock.patch("sysconfig.get_paths", return_value=dict.fromkeys(("purelib", "platlib", "stdlib"), str(self.folder))):
            self.assertEqual([row["module"] for row in docstrings.read_docstrings()], ["p.a", "p.sub.b", "q.d"])
            self.assertEqual([row["module"] for row in docstrings.read_docstrings("q")], ["q.d"])
            self.assertRaisesRegex(ValueError, "none is not installed", docstrings.read_docstrings, "q,none")
        splits = [docstrings.split_of(f"package.module{i}") for i in range(2000)]
        self.assertTrue(all(70 < splits.count(split) < 130 for split in ("valid", "test")), "about 5% each")


class TestCorpus(TempDirTestCase):
    @given(st.text("ab \n", max_size=40), st.integers(0, 40))
    def test_shorten(self, text, n):
        fits = lambda part: len(part) <= n
        ends = {gap: [i for i, c in enumerate(text) if c in gap and i <= n and text[:i]] for gap in ("\n", " \n")}
        best = ends["\n"] or ends[" \n"] or [0]
        self.assertEqual(corpus.shorten(text, fits), text if fits(text) else text[:max(best)])

    def test_a_users_own_lines(self):
        C = pipeline.get_config()
        C.data.merge_from_dict({"path": str(self.folder / "own.jsonl"), "vocab_size": 300})
        lines = [{"prompt": f"text {i}, and more of it: ", "chosen": f"good {i}", "rejected": "bad"} for i in range(300)]
        (self.folder / "own.jsonl").write_text("\n".join(map(json.dumps, lines)))
        found = corpus.load(C, self.folder / "data")
        self.assertEqual(sum(map(len, found.rows.values())), 300)
        self.assertEqual(len({row["prompt"] for rows in found.rows.values() for row in rows}), 300)  # none in two splits
        for split, rows in found.comparisons.items():
            self.assertEqual([(row["prompt"], row["chosen"]) for row in rows], [(row["prompt"], row["completion"]) for row in found.rows[split]])
            self.assertEqual({row["part"] for row in rows}, {"reward", "judge"})
        (self.folder / "own.jsonl").unlink()
        self.assertEqual(corpus.load(C, self.folder / "data").rows, found.rows)  # kept
        C.data.vocab_size = 258
        for text, words in (('{"prompt": "a"}', "line 1: must be JSON like"), ('{"prompt": "a", "completion": "b"}', "too few for")):
            (self.folder / "own.jsonl").write_text(text)
            self.assertRaisesRegex(ValueError, words, corpus.load, C, self.folder / words[:4])

    def test_tldr(self):
        def jsonl(*rows):
            return "\n".join(map(json.dumps, rows)).encode()
        news = {**PAIR, "info": {"article": "Long ago.", "title": "News"}}
        files = {f"/dataset/comparisons/batch{n}.json": jsonl(PAIR, news) for n in tldr.BATCHES}
        files["/dataset/comparisons/batch22.json"] = jsonl({**PAIR, "split": "train"}, {**PAIR, "split": "valid2", "choice": 0})
        files |= {f"/datasets/tldr_3_filtered/{split}.jsonl": jsonl({**POST, "title": split, "post": post})
                  for split, post in (("train", POST["post"]), ("valid", "word " * 600), ("test", "A line. " * 40 + "\n" + "More. " * 400))}
        with Server(files) as server, mock.patch.multiple(tldr, BUCKET=server.url), mock.patch("time.sleep"), \
                mock.patch.dict(os.environ, MINGPT_HOME=str(self.folder)):
            server.moods = [500, "cut", "slow"]  # and each time it goes on
            found = corpus.load(pipeline.get_config("tldr"), self.folder / "data")
            asked = len(server.seen)
            tldr.load()
            self.assertEqual(len(server.seen), asked)  # all cached
            path = self.folder / "summarize-from-feedback" / "dataset" / "comparisons" / "batch3.json"
            path.write_text(path.read_text()[:-9])
            self.assertRaisesRegex(ValueError, "batch3.json was damaged .* run the same command again", tldr.load)
            self.assertEqual(len(tldr.load()[1]["valid"]), 18)
            path.unlink()
            server.moods = [404]
            self.assertRaisesRegex(ValueError, "Not Found", tldr.load)
            os.environ["MINGPT_HOME"] = str(self.folder / "new")
            with mock.patch.multiple(tldr, BUCKET="http://127.0.0.1:9"):  # no network
                self.assertRaisesRegex(ConnectionError, "train.jsonl failed 5 times", tldr.load)
        self.assertEqual(found.rows["train"][0]["prompt"], f"SUBREDDIT: r/tifu\n\nTITLE: train\n\nPOST: {POST['post']}\n\nTL;DR:")
        self.assertEqual(found.rows["train"][0]["completion"], " I fell down the stairs.")
        tokens = len(BPETokenizer().encode(found.rows["valid"][0]["prompt"].removesuffix("\n\nTL;DR:")))
        self.assertTrue(found.rows["valid"][0]["prompt"].endswith("word\n\nTL;DR:") and 511 <= tokens <= 512)
        self.assertTrue(found.rows["test"][0]["prompt"].endswith("A line. \n\nTL;DR:"))  # cut at the last newline
        self.assertEqual({split: len(rows) for split, rows in found.comparisons.items()}, {"train": 1, "valid": 18, "test": 1})
        self.assertEqual([rows[0]["chosen"] for rows in found.comparisons.values()], [" good", " good", " bad"])


class TestParts(TempDirTestCase):
    def test_summaries_are_what_the_model_says_of_them(self):
        tokenizer = BPETokenizer.train(["a bc a bc"], 258)
        model, reference = tiny_gpt(0, vocab_size=258, block_size=20), tiny_gpt(1, vocab_size=258, block_size=20)
        C = pipeline.get_config()
        C.data.summary_tokens = 6
        prompts = ["a", "bc a bc", "bc"] * 4
        written = pipeline.summarize(C, model, tokenizer, prompts, seed=1, batch_size=5)
        self.assertEqual(written.texts, pipeline.summarize(C, model, tokenizer, prompts, seed=1, batch_size=5).texts)
        scorer, by_hand = RewardModel.from_gpt(reference), []
        for i, prompt in enumerate(prompts):
            ids, mask = written.idx[i][written.attention_mask[i]][None], written.completion_mask[i][1:]
            start = len(tokenizer.encode(prompt))
            self.assertEqual(ids[0, :start].tolist(), tokenizer.encode(prompt))
            log_probs = [m.log_probs(ids)[0, start - 1:] for m in (model, reference)]
            torch.testing.assert_close(written.log_probs[i][mask], log_probs[0], rtol=0, atol=1e-4)
            self.assertEqual(written.ended[i].item(), tokenizer.eot_token in ids[0, start:])
            self.assertEqual(written.lengths()[i], ids.size(1) - start)
            by_hand.append((log_probs[0] - log_probs[1]).sum().item())
            self.assertAlmostEqual(pipeline.judged(scorer, written)[i].item(), scorer(ids).item(), places=4)
        self.assertAlmostEqual(pipeline.kl_to(reference, written, 1.0), sum(by_hand) / len(prompts), places=3)

    def test_calibration_and_rouge(self):
        sure, right = reward.calibration(torch.tensor([0.1, -0.2, 1.0, 2.0, -3.0, 4.0]), bins=3)
        self.assertEqual(right, [0.5, 1.0, 0.5])
        self.assertAlmostEqual(sure[0], (1 / (1 + math.exp(-0.1)) + 1 / (1 + math.exp(-0.2))) / 2, places=6)
        # the longest common subsequence of "a b c d" and "b d x" is "b d": recall 2/4, precision 2/3, F 4/7
        self.assertAlmostEqual(evaluation.rouge_l(["w1 w2 w3 w4", "w5"], ["w2 w4 x1", "w5"]), (4 / 7 + 1) / 2)


class TestStages(TempDirTestCase):
    def run_script(self, *args, script="summarize_rlhf", name="out"):
        return subprocess.run([sys.executable, str(PROJECT / f"{script}.py"), *SMALL, f"--system.work_dir={self.folder / name}", *args],
                              capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})

    def test_all_three_in_miniature(self):
        for script, error in (("reward", "the stage sft is not finished in .*: run sft.py first"), ("sft", "^$"),
                              ("ppo", "the stage reward is not finished in .*: run reward.py first")):
            result = self.run_script(script=script)
            self.assertRegex(result.stderr.splitlines()[-1] if result.returncode else "", error)
        whole = self.run_script()
        self.assertEqual(whole.returncode, 0, whole.stderr)
        self.assertRegex(whole.stdout, r"the judge prefers PPO's summary for \d+")
        out = self.folder / "out"
        summary = json.loads((out / "summary.json").read_text())
        for stage in ("reward", "judge"):
            self.assertEqual(set(summary["accuracy"][stage]), {"author against a sample", "author against another's", "all"})
        self.assertTrue(all(math.isfinite(value) for value in summary.values() if not isinstance(value, dict)))
        self.assertEqual((out / "samples.md").read_text().count("\n"), 6 + summary["texts"])
        self.assertEqual({path.name for path in (out / "plots").iterdir()}, {"calibration.png", "training.png", "ppo.png"})
        texts = "".join((out / "data" / f"rows_{split}.jsonl").read_text() for split in corpus.SPLITS)
        parts = {(row["prompt"], row["completion"]): row["part"] for row in map(json.loads, texts.splitlines())}
        completions = {completion for _, completion in parts}
        for row in map(json.loads, (out / "comparisons.jsonl").read_text().splitlines()):
            self.assertTrue(len(row["rejected"]) == len(row["kinds"]) and row["rejected"][-1] in completions)
            self.assertFalse(row["split"] == "train" and parts[row["prompt"], row["chosen"]] == "sft")
        self.assertTrue(all({"eval/reward", "eval/judge", "eval/kl"} <= set(row) for row in read_metrics(out / "ppo" / "metrics.jsonl")))
        weights = [(out / stage / "checkpoint.pt").stat().st_mtime_ns for stage in pipeline.STAGES]
        self.assertEqual(self.run_script().stdout, whole.stdout)
        self.assertEqual(weights, [(out / stage / "checkpoint.pt").stat().st_mtime_ns for stage in pipeline.STAGES])
        for options, words in ((["--system.seed=1"], "system.seed was 3407, is 1"), (["--data=reddit"], "--data=reddit must be docstrings or tldr"),
                               (["--ppo.kl_coeff=1"], "did you mean --ppo.kl_coef?"), (["--data.packages=none"], "data.packages was")):
            refused = self.run_script(*options)
            self.assertEqual((refused.returncode, "Traceback" in refused.stderr), (1, False), refused.stderr)
            self.assertIn(words, refused.stderr.splitlines()[-1])
        BPETokenizer.train(["another vocabulary"], 260).save_pretrained(out / "data")
        self.assertIn("vocabulary was", self.run_script().stderr)
        (out / "config.json").unlink()
        self.assertIn("has a vocabulary of 400 tokens, the tokenizer in", self.run_script(script="ppo").stderr)

    def test_weights_of_others(self):
        tiny_gpt(vocab_size=50257, block_size=64).save_pretrained(self.folder / "tiny")
        rows = [{"prompt": f"text {i}: ", "chosen": f"good {i}", "rejected": "bad"} for i in range(200)]
        (self.folder / "own.jsonl").write_text("\n".join(map(json.dumps, rows)))
        result = self.run_script(f"--data.path={self.folder / 'own.jsonl'}", f"--model.name={self.folder / 'tiny'}", "--model.block_size=64")
        self.assertEqual(result.returncode, 0, result.stderr)
