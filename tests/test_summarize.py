"""
summarize_rlhf: its texts (TL;DR's from a server on 127.0.0.1), its figures, and all its stages in
miniature.
"""

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path
from unittest import mock

import torch
from hypothesis import given, strategies as st

from mingpt import evaluation
from mingpt.bpe import BPETokenizer
from mingpt.rlhf import RewardModel
from mingpt.run_folder import read_metrics
from tests.common import (
    NO_POINTS,
    ROOT,
    Server,
    TempDirTestCase,
    printed,
    readme_examples,
    tiny_gpt,
)

PROJECT = ROOT / "projects" / "summarize_rlhf"

# The project's modules import each other by their bare names. happy_gpt has a report.py, too. So
# that name is freed before these imports and again after them, and the folder then comes last.
sys.path.insert(0, str(PROJECT))
sys.modules.pop("report", None)

import corpus  # noqa: E402  (like those below, it can be found only after the lines above)
import docstrings  # noqa: E402
import pipeline  # noqa: E402
import report  # noqa: E402
import reward  # noqa: E402
import tldr  # noqa: E402

sys.modules.pop("report")
sys.path.append(sys.path.pop(0))  # not removed: worker processes look there for docstrings.py


def write_jsonl(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows))


def read_rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# --------------------------------------------------------------------------------------------------
# docstrings


DETAILS = (
    "Some details of it that go on\n"
    "    for a while, and then a little further.\n"
    "\n"
    "    Notes\n"
    "    -----\n"
    "    More of them."
)


class TestSplitDocstring(unittest.TestCase):
    def test_a_summary_an_empty_line_and_details(self):
        found = docstrings.split_docstring(f"Does what it is for.\n\n    {DETAILS}\n    ")
        body = (
            "Some details of it that go on\n"
            "for a while, and then a little further.\n"
            "Notes\n"
            "More of them."
        )
        self.assertEqual(found, {"summary": "Does what it is for.", "body": body})

    def test_other_docstrings_are_left_out(self):
        unsuitable = {
            "no details": "Does what it is for.",
            "too few details": "Does what it is for.\n\nToo short.",
            "no capital letter": f"does what it is for.\n\n{DETAILS}",
            "no full stop": f"Does what it is for\n\n{DETAILS}",
            "no empty line": f"Does what it is for.\n{DETAILS}",
            "not ASCII": f"Does what it is für.\n\n{DETAILS}",
        }
        for name, text in unsuitable.items():
            with self.subTest(name):
                self.assertIsNone(docstrings.split_docstring(text))


class TestReadDocstrings(TempDirTestCase):
    def setUp(self):
        super().setUp()
        docstring = '"""Does what it is for.\n\n' + "Some word of detail. " * 6 + '"""\n'
        # the same once more, but for a space, on a function of the same module
        copy = "def f():\n    " + docstring.replace("word of", "word  of")
        another = docstring.replace("Does", "Makes").replace("Some", "Another")
        third = docstring.replace("Does", "Knows").replace("Some", "Third")
        files = {
            "p/a.py": docstring + "raise SystemExit\n" + copy,
            "p/sub/b.py": another,
            "p/tests/c.py": docstring,
            "p/broken.py": "def (",
            "p/latin.py": b"# \xff\n",
            "q/d.py": third,
        }
        for name, content in files.items():
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        paths = dict.fromkeys(("purelib", "platlib", "stdlib"), str(self.folder))
        self.enterContext(mock.patch("sysconfig.get_paths", return_value=paths))

    def modules(self, packages=""):
        return [row["module"] for row in docstrings.read_docstrings(packages)]

    def test_files_are_parsed_and_not_run_and_copies_left_out(self):
        self.assertEqual(self.modules(), ["p.a", "p.sub.b", "q.d"])

    def test_of_one_package(self):
        self.assertEqual(self.modules("q"), ["q.d"])

    def test_a_package_that_is_not_installed_is_refused(self):
        with self.assertRaisesRegex(ValueError, "none is not installed"):
            self.modules("q,none")


# --------------------------------------------------------------------------------------------------
# the corpus


class TestShorten(unittest.TestCase):
    @given(st.text("ab \n", max_size=40), st.integers(0, 40))
    def test_shorten(self, text, n):
        def fits(beginning):
            return len(beginning) <= n

        def ends_at(gaps):
            return [i for i, character in enumerate(text) if character in gaps and 0 < i <= n]

        if fits(text):
            expected = text
        elif ends_at("\n"):
            expected = text[: max(ends_at("\n"))]
        elif ends_at(" \n"):
            expected = text[: max(ends_at(" \n"))]
        else:
            expected = ""
        self.assertEqual(corpus.shorten(text, fits), expected)


class TestDocstringsCorpus(unittest.TestCase):
    def test_about_a_twentieth_of_the_modules_is_in_each_held_out_split(self):
        pairs = [
            {"module": f"package.module{i}", "body": "Body.", "summary": "Summary."}
            for i in range(2000)
        ]
        with mock.patch.object(docstrings, "read_docstrings", return_value=pairs):
            splits = corpus.from_docstrings("")
        self.assertEqual(sum(len(rows) for rows in splits.values()), 2000)
        for split in ("valid", "test"):
            self.assertTrue(70 < len(splits[split]) < 130, f"{split}: {len(splits[split])}")


class TestOwnLines(TempDirTestCase):
    """A user's JSON lines, with --data.path."""

    def setUp(self):
        super().setUp()
        self.path = self.folder / "own.jsonl"
        self.config = pipeline.get_config()
        self.config.data.path = str(self.path)
        self.config.data.vocab_size = 300
        lines = [
            {"prompt": f"text {i}, and more of it: ", "chosen": f"good {i}", "rejected": "bad"}
            for i in range(300)
        ]
        write_jsonl(self.path, lines)

    def load(self):
        return corpus.load(self.config, self.folder / "data")

    def test_every_line_is_in_one_split(self):
        rows = [row for rows in self.load().rows.values() for row in rows]
        self.assertEqual(len(rows), 300)
        self.assertEqual(len({row["prompt"] for row in rows}), 300)

    def test_the_chosen_completions_are_the_demonstrations(self):
        loaded = self.load()
        for split, comparisons in loaded.comparisons.items():
            chosen = [(row["prompt"], row["chosen"]) for row in comparisons]
            demonstrations = [(row["prompt"], row["completion"]) for row in loaded.rows[split]]
            self.assertEqual(chosen, demonstrations)

    def test_comparisons_are_divided_between_reward_model_and_judge(self):
        for rows in self.load().comparisons.values():
            self.assertEqual({row["part"] for row in rows}, {"reward", "judge"})

    def test_the_corpus_is_kept_in_the_folder(self):
        first = self.load()
        self.path.unlink()
        self.assertEqual(self.load().rows, first.rows)

    def test_a_line_without_a_completion_is_refused(self):
        write_jsonl(self.path, [{"prompt": "a"}])
        with self.assertRaisesRegex(ValueError, "line 1: must be JSON like"):
            self.load()

    def test_too_few_lines_are_refused(self):
        write_jsonl(self.path, [{"prompt": "a", "completion": "b"}])
        self.config.data.vocab_size = 258
        with self.assertRaisesRegex(ValueError, "too few for"):
            self.load()


# --------------------------------------------------------------------------------------------------
# TL;DR


POST = {
    "id": "t3_1",
    "subreddit": "tifu",
    "title": "I fell",
    "post": "First line.\nSecond line.",
    "summary": "I fell down the stairs.",
}
PAIR = {
    "info": POST,
    "split": "valid1",
    "choice": 1,
    "worker": "w",
    "batch": "b",
    "extra": {},
    "summaries": [
        {"text": " bad", "policy": "sup2", "note": None},
        {"text": " good", "policy": "ref", "note": None},
    ],
}
NEWS_PAIR = {**PAIR, "info": {"article": "Long ago.", "title": "News"}}
POST_OF_SPLIT = {
    "train": POST["post"],
    "valid": "word " * 600,
    "test": "A line. " * 40 + "\n" + "More. " * 400,
}


class TestTLDR(TempDirTestCase):
    """The bucket is a server on 127.0.0.1, with a few posts and comparisons in its layout."""

    def setUp(self):
        super().setUp()
        batches = {number: [PAIR, NEWS_PAIR] for number in tldr.BATCHES}
        batches[22] = [
            {**PAIR, "split": "train"},
            {**PAIR, "split": "valid2", "choice": 0},
        ]
        files = {}
        for number, rows in batches.items():
            files[f"/dataset/comparisons/batch{number}.json"] = rows
        for split, post in POST_OF_SPLIT.items():
            row = {**POST, "title": split, "post": post}
            files[f"/datasets/tldr_3_filtered/{split}.jsonl"] = [row]
        contents = {
            path: "\n".join(json.dumps(row) for row in rows).encode()
            for path, rows in files.items()
        }
        self.server = self.enterContext(Server(contents))
        self.enterContext(mock.patch.object(tldr, "BUCKET", self.server.url))
        self.enterContext(mock.patch.dict(os.environ, MINGPT_HOME=str(self.folder)))
        self.enterContext(mock.patch("time.sleep"))  # between attempts to download

    def cached(self, number):
        """Where a batch of comparisons is cached."""
        folder = self.folder / "summarize-from-feedback" / "dataset" / "comparisons"
        return folder / f"batch{number}.json"

    def load_corpus(self):
        return corpus.load(pipeline.get_config("tldr"), self.folder / "data")

    def test_a_post_is_a_prompt_in_the_papers_format(self):
        row = self.load_corpus().rows["train"][0]
        prompt = f"SUBREDDIT: r/tifu\n\nTITLE: train\n\nPOST: {POST['post']}\n\nTL;DR:"
        self.assertEqual(row["prompt"], prompt)
        self.assertEqual(row["completion"], " I fell down the stairs.")

    def test_a_long_post_is_cut_to_512_tokens(self):
        prompt = self.load_corpus().rows["valid"][0]["prompt"]
        self.assertTrue(prompt.endswith("word\n\nTL;DR:"))
        tokens = len(BPETokenizer().encode(prompt.removesuffix("\n\nTL;DR:")))
        self.assertTrue(511 <= tokens <= 512, tokens)

    def test_a_long_post_is_cut_at_the_last_newline(self):
        prompt = self.load_corpus().rows["test"][0]["prompt"]
        self.assertTrue(prompt.endswith("A line. \n\nTL;DR:"))

    def test_comparisons_of_posts_are_sorted_by_split_and_those_of_news_left_out(self):
        comparisons = self.load_corpus().comparisons
        sizes = {split: len(rows) for split, rows in comparisons.items()}
        self.assertEqual(sizes, {"train": 1, "valid": 18, "test": 1})
        chosen = [rows[0]["chosen"] for rows in comparisons.values()]
        self.assertEqual(chosen, [" good", " good", " bad"])

    def test_a_download_goes_on_after_failures(self):
        self.server.moods = [500, "cut", "slow"]
        self.assertEqual(len(self.load_corpus().rows["train"]), 1)
        self.assertEqual(self.server.moods, [])  # all of them have happened

    def test_what_was_downloaded_is_cached(self):
        tldr.load()
        n_requests = len(self.server.seen)
        tldr.load()
        self.assertEqual(len(self.server.seen), n_requests)

    def test_a_damaged_file_is_removed_and_downloaded_by_the_next_run(self):
        tldr.load()
        path = self.cached(3)
        path.write_text(path.read_text()[:-9])
        words = "batch3.json was damaged .* run the same command again"
        with self.assertRaisesRegex(ValueError, words):
            tldr.load()
        self.assertEqual(len(tldr.load()[1]["valid"]), 18)

    def test_a_file_that_the_server_lacks(self):
        tldr.load()
        self.cached(3).unlink()
        self.server.moods = [404]
        with self.assertRaisesRegex(ValueError, "Not Found"):
            tldr.load()

    def test_without_a_network(self):
        with (
            mock.patch.object(tldr, "BUCKET", "http://127.0.0.1:9"),
            self.assertRaisesRegex(ConnectionError, "train.jsonl failed 5 times"),
        ):
            tldr.load()


# --------------------------------------------------------------------------------------------------
# samples and figures


class TestSummarize(unittest.TestCase):
    """What is known of a model's summaries is what the models say of each of them by itself."""

    PROMPTS = ("a", "bc a bc", "bc") * 4

    def setUp(self):
        self.tokenizer = BPETokenizer.train(["a bc a bc"], 258)
        self.model = tiny_gpt(0, vocab_size=258, block_size=20)
        self.reference = tiny_gpt(1, vocab_size=258, block_size=20)
        self.config = pipeline.get_config()
        self.config.data.summary_tokens = 6
        self.samples = self.summarize()

    def summarize(self):
        return pipeline.summarize(
            self.config,
            self.model,
            self.tokenizer,
            self.PROMPTS,
            seed=1,
            batch_size=5,
        )

    def rows(self):
        """Of each sample: its number, its ids (1, T) without padding, its prompt's length."""
        for i, prompt in enumerate(self.PROMPTS):
            ids = self.samples.idx[i][self.samples.attention_mask[i]]
            yield i, ids[None], len(self.tokenizer.encode(prompt))

    def test_the_same_seed_gives_the_same_texts(self):
        self.assertEqual(self.samples.texts, self.summarize().texts)

    def test_each_begins_with_its_prompt(self):
        for i, ids, start in self.rows():
            self.assertEqual(ids[0, :start].tolist(), self.tokenizer.encode(self.PROMPTS[i]))

    def test_log_probs(self):
        for i, ids, start in self.rows():
            written = self.samples.completion_mask[i][1:]
            expected = self.model.log_probs(ids)[0, start - 1 :]
            actual = self.samples.log_probs[i][written]
            torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)

    def test_which_have_ended(self):
        for i, ids, start in self.rows():
            has_end = self.tokenizer.eot_token in ids[0, start:]
            self.assertEqual(self.samples.ended[i].item(), has_end)

    def test_lengths(self):
        for i, ids, start in self.rows():
            self.assertEqual(self.samples.lengths[i], ids.size(1) - start)

    def test_scores(self):
        scorer = RewardModel.from_gpt(self.reference)
        scores = evaluation.score(self.samples, scorer)
        for i, ids, _ in self.rows():
            self.assertAlmostEqual(scores[i].item(), scorer(ids).item(), places=4)

    def test_kl(self):
        kls = []
        for _, ids, start in self.rows():
            log_ratio = self.model.log_probs(ids) - self.reference.log_probs(ids)
            kls.append(log_ratio[0, start - 1 :].sum().item())
        kl = evaluation.kl(self.samples, self.reference)
        self.assertAlmostEqual(kl, sum(kls) / len(kls), places=3)


class TestFigures(unittest.TestCase):
    def test_calibration(self):
        margins = torch.tensor([0.1, -0.2, 1.0, 2.0, -3.0, 4.0])
        sure, right = reward.calibration(margins, n_bins=3)
        self.assertEqual(right, [0.5, 1.0, 0.5])
        by_hand = (1 / (1 + math.exp(-0.1)) + 1 / (1 + math.exp(-0.2))) / 2
        self.assertAlmostEqual(sure[0], by_hand, places=6)

    def test_rouge_l(self):
        # The longest common subsequence of "w1 w2 w3 w4" and "w2 w4 x1" is "w2 w4": its recall is
        # 2/4, its precision 2/3, its F-measure 4/7. The second pair is equal: 1.
        f_measure = report.rouge_l(["w1 w2 w3 w4", "w5"], ["w2 w4 x1", "w5"])
        self.assertAlmostEqual(f_measure, (4 / 7 + 1) / 2)


# --------------------------------------------------------------------------------------------------
# the scripts, as a user runs them

SMALL = [
    "--data.packages=asyncio,email,http,json,logging,unittest",
    "--data.vocab_size=400",
    "--data.body_tokens=48",
    "--data.summary_tokens=32",
    "--model.n_layer=1",
    "--model.n_head=2",
    "--model.n_embd=32",
    "--pretrain.max_iters=6",
    "--sft.epochs=None",
    "--sft.max_iters=6",
    "--reward.epochs=None",
    "--reward.max_iters=6",
    "--ppo.max_iters=3",
    "--ppo.batch_size=8",
    "--ppo.minibatch_size=4",
    "--ppo.group_size=2",
    "--report.samples=12",
    "--report.every=1",
    "--report.looked_at=4",
]
STAGES = ("pretrain", "sft", "reward", "judge", "ppo")


def run_script(work_dir, *args, script="summarize_rlhf"):
    """A script of the project in miniature, in a process of its own."""
    command = [sys.executable, PROJECT / f"{script}.py", *SMALL, f"--system.work_dir={work_dir}"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run([*command, *args], capture_output=True, text=True, env=env)


class TestStages(unittest.TestCase):
    """One run in miniature, begun stage by stage; each test looks at something else in it."""

    @classmethod
    def setUpClass(cls):
        cls.folder = Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
        cls.out = cls.folder / "out"
        cls.reward_first = run_script(cls.out, script="reward")
        cls.sft = run_script(cls.out, script="sft")
        cls.ppo_without_reward = run_script(cls.out, script="ppo")
        cls.whole = run_script(cls.out)

    def assert_refused(self, result, pattern):
        """The script ended with one line that says why."""
        self.assertEqual(result.returncode, 1, result.stderr)
        self.assertNotIn("Traceback", result.stderr)
        self.assertRegex(result.stderr.splitlines()[-1], pattern)

    def copy_of_run(self):
        return shutil.copytree(self.out, Path(tempfile.mkdtemp(dir=self.folder)) / "out")

    def checkpoint_times(self):
        return [(self.out / stage / "checkpoint.pt").stat().st_mtime_ns for stage in STAGES]

    def read_json(self, name):
        return json.loads((self.out / name).read_text())

    def test_the_reward_stage_needs_the_sft_model(self):
        pattern = "the stage sft is not finished in .*: run sft.py first"
        self.assert_refused(self.reward_first, pattern)

    def test_a_stage_runs_by_itself(self):
        self.assertEqual(self.sft.returncode, 0, self.sft.stderr)

    def test_the_ppo_stage_needs_the_reward_model(self):
        pattern = "the stage reward is not finished in .*: run reward.py first"
        self.assert_refused(self.ppo_without_reward, pattern)

    def test_all_three_in_miniature(self):
        self.assertEqual(self.whole.returncode, 0, self.whole.stderr)
        self.assertRegex(self.whole.stdout, r"the judge prefers PPO's summary for \d+")

    def test_accuracies_by_kind(self):
        accuracies = self.read_json("summary.json")["accuracy"]
        for stage in ("reward", "judge"):
            kinds = {"author against a sample", "author against another's", "all"}
            self.assertEqual(set(accuracies[stage]), kinds)

    def test_the_figures_are_finite(self):
        for name, value in self.read_json("summary.json").items():
            if not isinstance(value, dict):
                self.assertTrue(math.isfinite(value), f"{name}: {value}")

    def test_a_line_of_samples_for_each_text(self):
        n_lines = (self.out / "samples.md").read_text().count("\n")
        self.assertEqual(n_lines, 6 + self.read_json("summary.json")["texts"])

    def test_plots(self):
        names = {path.name for path in (self.out / "plots").iterdir()}
        self.assertEqual(names, {"calibration.png", "training.png", "ppo.png"})
        self.assertNotIn(NO_POINTS, self.whole.stderr)

    def test_the_lines_that_use_the_result_are_printed_and_work(self):
        [example] = readme_examples("summarize_rlhf", self.out)
        self.assertIn(example, self.whole.stdout)
        self.assertNotIn("<|endoftext|>", printed(exec, example, {}))

    def test_comparisons(self):
        rows = []
        for split in corpus.SPLITS:
            rows += read_rows(self.out / "data" / f"rows_{split}.jsonl")
        completions = {row["completion"] for row in rows}
        for comparison in read_rows(self.out / "comparisons.jsonl"):
            self.assertEqual(len(comparison["rejected"]), len(comparison["kinds"]))
            self.assertIn(comparison["rejected"][-1], completions)

    def test_training_comparisons_leave_out_what_the_sft_model_has_learned(self):
        part_of = {}
        for split in corpus.SPLITS:
            for row in read_rows(self.out / "data" / f"rows_{split}.jsonl"):
                part_of[row["prompt"], row["completion"]] = row["part"]
        for comparison in read_rows(self.out / "comparisons.jsonl"):
            if comparison["split"] == "train":
                part = part_of[comparison["prompt"], comparison["chosen"]]
                self.assertNotEqual(part, "sft")

    def test_looks_at_held_out_texts(self):
        for row in read_metrics(self.out / "ppo" / "metrics.jsonl"):
            self.assertLessEqual({"eval/reward", "eval/judge", "eval/kl"}, set(row))

    def test_the_same_command_again_trains_nothing(self):
        before = self.checkpoint_times()
        self.assertEqual(run_script(self.out).stdout, self.whole.stdout)
        self.assertEqual(self.checkpoint_times(), before)

    def test_another_seed_is_refused(self):
        result = run_script(self.out, "--system.seed=1")
        self.assert_refused(result, "system.seed was 3407, is 1")

    def test_other_packages_are_refused(self):
        result = run_script(self.out, "--data.packages=none")
        self.assert_refused(result, "data.packages was")

    def test_unknown_data_is_refused(self):
        result = run_script(self.out, "--data=reddit")
        self.assert_refused(result, "--data=reddit must be docstrings or tldr")

    def test_a_typo_is_refused_with_a_suggestion(self):
        result = run_script(self.out, "--ppo.kl_coeff=1")
        self.assert_refused(result, r"did you mean --ppo\.kl_coef\?")

    def test_another_vocabulary_is_refused(self):
        copy = self.copy_of_run()
        BPETokenizer.train(["another vocabulary"], 260).save_pretrained(copy / "data")
        self.assert_refused(run_script(copy), "vocabulary was")

    def test_another_vocabulary_than_a_models_is_refused(self):
        copy = self.copy_of_run()
        BPETokenizer.train(["another vocabulary"], 260).save_pretrained(copy / "data")
        for path in copy.glob("*/options.json"):  # so that nobody knows the one before
            path.unlink()
        pattern = "has a vocabulary of 400 tokens, the tokenizer in .* one of 260"
        self.assert_refused(run_script(copy, script="ppo"), pattern)

    def test_a_run_on_the_base_of_another(self):
        new = self.folder / "on_base"
        result = run_script(new, f"--base={self.out}", "--ppo.kl_coef=0.1")
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assertNotIn(NO_POINTS, result.stderr)
        self.assertEqual([stage for stage in STAGES if (new / stage).exists()], ["ppo"])
        for name in ("data", "comparisons.jsonl"):
            self.assertFalse((new / name).exists(), name)
        accuracy = json.loads((new / "accuracy.json").read_text())
        self.assertEqual(accuracy, self.read_json("accuracy.json"))
        summary = json.loads((new / "summary.json").read_text())
        self.assertEqual(set(summary["seconds"]), set(STAGES))
        self.assertEqual(summary["reward_sft"], self.read_json("summary.json")["reward_sft"])

    def test_a_base_with_other_options_is_refused(self):
        result = run_script(self.folder / "refused", f"--base={self.out}", "--system.seed=1")
        self.assert_refused(result, "no stage of --base=.*system.seed was 3407, is 1")


class TestBeginnings(TempDirTestCase):
    def test_the_options_of_all_stages_are_checked_before_the_first_begins(self):
        out = self.folder / "out"
        result = run_script(out, "--ppo.gamma=2")
        self.assertEqual(result.returncode, 1)
        self.assertRegex(result.stderr.splitlines()[-1], r"the stage ppo cannot run .*gamma=2")
        self.assertFalse((out / "pretrain").exists())

    def test_weights_of_others(self):
        tiny = self.folder / "tiny"
        tiny_gpt(vocab_size=50257, block_size=64).save_pretrained(tiny)
        path = self.folder / "own.jsonl"
        rows = [
            {"prompt": f"text {i}: ", "chosen": f"good {i}", "rejected": "bad"} for i in range(200)
        ]
        write_jsonl(path, rows)
        result = run_script(
            self.folder / "out",
            f"--data.path={path}",
            f"--model.name={tiny}",
            "--model.block_size=64",
        )
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assertNotIn(NO_POINTS, result.stderr)
