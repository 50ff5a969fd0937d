"""chargpt: its corpora, from a server that misbehaves, its data, and a short run of the script."""

import hashlib
import io
import json
import math
import os
import string
import zipfile
from unittest import TestCase, mock

import torch

from mingpt.chars import CharTokenizer
from mingpt.model import GPT
from tests.common import (
    NO_POINTS,
    ROOT,
    Server,
    TempDirTestCase,
    load_script,
    printed,
    readme_examples,
)

chargpt = load_script(ROOT / "projects" / "chargpt" / "chargpt.py")


class TestCorpora(TempDirTestCase):
    def test_they_are_fetched_checked_and_unpacked(self):
        shakespeare = b"First Citizen:\n"
        wikipedia = bytes(range(256)) * 40
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("enwik8", wikipedia)
        files = {"/input.txt": shakespeare, "/enwik8.zip": packed.getvalue()}
        server = self.enterContext(Server(files))
        server.moods = ["cut", 500]

        corpora = {}
        for name, path in (("tinyshakespeare", "/input.txt"), ("enwik8", "/enwik8.zip")):
            corpora[name] = (server.url + path, hashlib.sha256(files[path]).hexdigest())
        self.enterContext(mock.patch.dict(chargpt.CORPORA, corpora))
        self.enterContext(mock.patch.dict(os.environ, {"MINGPT_HOME": str(self.folder)}))
        self.enterContext(mock.patch("time.sleep"))

        self.assertEqual(chargpt.load_text("tinyshakespeare"), shakespeare.decode())
        self.assertEqual(chargpt.load_text("enwik8").encode("latin-1"), wikipedia)
        requests = len(server.seen)
        self.assertEqual(requests, 4)  # each file twice, since the first two answers were spoiled
        self.assertEqual(chargpt.load_text("enwik8").encode("latin-1"), wikipedia)
        self.assertEqual(len(server.seen), requests)  # this time it came from the cache

    def test_what_is_neither_a_corpus_nor_a_file_is_refused(self):
        words = "--data.path: nowhere.txt.*or one of tinyshakespeare, text8, enwik8"
        with self.assertRaisesRegex(ValueError, words):
            chargpt.main(["--data.path=nowhere.txt"])

    def test_text_that_is_not_utf8_is_refused(self):
        (self.folder / "bytes.txt").write_bytes(b"abc\xff")
        with self.assertRaisesRegex(ValueError, "bytes.txt is not UTF-8 text"):
            chargpt.load_text(str(self.folder / "bytes.txt"))


class TestSplit(TestCase):
    def setUp(self):
        self.text = (string.ascii_lowercase * 40)[:1000]

    def test_text8_is_cut_in_three(self):
        splits = chargpt.split("text8", self.text)
        self.assertEqual([len(part) for part in splits.values()], [900, 50, 50])
        self.assertEqual(list(splits), ["train", "valid", "test"])
        self.assertEqual("".join(splits.values()), self.text)

    def test_any_other_text_is_cut_in_two(self):
        splits = chargpt.split("book.txt", self.text)
        self.assertEqual([len(part) for part in splits.values()], [900, 100])
        self.assertEqual(list(splits), ["train", "valid"])
        self.assertEqual("".join(splits.values()), self.text)


class TestEncode(TestCase):
    def test_it_gives_the_ids_of_the_tokenizer(self):
        tokenizer = CharTokenizer.train(["so schön 🙂\n"])
        text = "schön? 🙂🙃\n"  # with characters that the tokenizer does not know
        self.assertEqual(chargpt.encode(text, tokenizer).tolist(), tokenizer.encode(text))


class TestWindows(TestCase):
    def setUp(self):
        self.ids = torch.arange(23, dtype=torch.int32).numpy()

    def test_consecutive_ones_show_each_character_once(self):
        windows = list(chargpt.Windows(self.ids, 5, consecutive=True))
        seen = torch.cat([x for x, _ in windows])
        self.assertEqual(seen.tolist(), list(range(20)))  # the last three do not fill a window
        for x, y in windows:
            self.assertTrue(torch.equal(x + 1, y))

    def test_there_are_at_most_limit_of_them(self):
        self.assertEqual(len(chargpt.Windows(self.ids, 5, consecutive=True, limit=3)), 3)

    def test_those_for_training_start_at_every_place(self):
        torch.manual_seed(0)
        windows = chargpt.Windows(self.ids, 5)
        starts = set()
        for _ in range(100):
            starts |= {int(x[0]) for x, _ in windows}
        self.assertEqual(starts, set(range(18)))


class TestScript(TempDirTestCase):
    def setUp(self):
        super().setUp()
        self.out = self.folder / "out"
        (self.folder / "abc.txt").write_text("abcdefghij" * 200, encoding="utf-8")
        self.options = [
            f"--data.path={self.folder / 'abc.txt'}",
            f"--system.work_dir={self.out}",
            "--trainer.max_iters=60",
            "--trainer.eval_every=20",
            "--model.model_type=gpt-nano",
            "--model.block_size=16",
        ]

    def test_from_text_to_samples(self):
        with self.assertLogs("mingpt", "INFO") as logs:
            result = printed(chargpt.main, self.options)
        self.assertNotIn(NO_POINTS, "\n".join(logs.output))
        self.assertIn("2000 characters, 10 different ones: 1800 train, 200 valid", logs.output[0])

        summary = json.loads((self.out / "summary.json").read_text(encoding="utf-8"))
        self.assertIn(f"valid loss {summary['valid_loss']:.4f}", result)
        bits = summary["valid_loss"] / math.log(2)
        self.assertAlmostEqual(summary["valid_bits_per_character"], bits)
        self.assertEqual(summary["characters_seen"], 60 * 6 * 16)
        self.assertTrue((self.out / "losses.png").stat().st_size > 0)

        model = GPT.from_pretrained(self.out / "model")
        tokenizer = CharTokenizer.from_pretrained(self.out / "model")
        ids = chargpt.encode("abcdefghij" * 20, tokenizer)
        losses = []
        for x, y in chargpt.Windows(ids, 16, consecutive=True):
            _, loss = model(x[None], y[None])
            losses.append(loss.item())
        self.assertAlmostEqual(summary["valid_loss"], sum(losses) / len(losses), places=5)

        work_dir = f"--system.work_dir={self.out}"
        samples = printed(chargpt.main, [work_dir, "--sample", "abcdef"])
        self.assertEqual(samples[:12], "abcdefghijab")
        with self.assertRaisesRegex(ValueError, "the model has never seen: x y z"):
            chargpt.main([work_dir, "--sample=xyz"])
        with self.assertRaisesRegex(ValueError, "system.seed was 3407, is 1"):
            chargpt.main([*self.options, "--system.seed=1"])

    def test_a_sample_needs_a_model(self):
        with self.assertRaisesRegex(ValueError, "run this script without --sample first"):
            chargpt.main([f"--system.work_dir={self.out}", "--sample=abc"])

    def test_the_readme_shows_how_to_use_the_result(self):
        result = printed(chargpt.main, [*self.options, "--trainer.max_iters=2"])
        (example,) = readme_examples("chargpt", self.out)
        self.assertIn(example, result)
        self.assertRegex(printed(exec, example, {}), r"(?s)^.{204,}\n$")  # "the " and 200 more

    def test_best_pt_holds_the_weights_of_the_model(self):
        printed(chargpt.main, [*self.options, "--trainer.max_iters=2"])
        best = GPT.from_pretrained(self.out / "best.pt").state_dict()
        model = GPT.from_pretrained(self.out / "model").state_dict()
        torch.testing.assert_close(best, model, rtol=0, atol=0)
