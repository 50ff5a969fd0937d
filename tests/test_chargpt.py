"""chargpt: its corpora from a server that misbehaves, its splits and windows, and a short run from text to samples."""

import contextlib
import hashlib
import io
import json
import math
import os
import zipfile
from unittest import mock

import torch

from mingpt.chars import CharTokenizer
from mingpt.model import GPT
from tests.common import ROOT, Server, TempDirTestCase, load_script

chargpt = load_script(ROOT / "projects" / "chargpt" / "chargpt.py")


class TestData(TempDirTestCase):
    def test_corpora_are_fetched_checked_and_unpacked(self):
        plain, wiki = b"First Citizen:\n", bytes(range(256)) * 40
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("enwik8", wiki)
        server = self.enterContext(Server({"/tinyshakespeare.txt": plain, "/enwik8.zip": packed.getvalue()}))
        corpora = {path[1:-4]: (server.url + path, hashlib.sha256(body).hexdigest()) for path, body in server.files.items()}
        server.moods = ["cut", 500]
        with mock.patch.dict(chargpt.CORPORA, corpora), mock.patch("time.sleep"), mock.patch.dict(os.environ, {"MINGPT_HOME": str(self.folder)}):
            self.assertEqual(chargpt.load_text("tinyshakespeare"), plain.decode())
            for _ in range(2):  # the second time from the cache
                self.assertEqual(chargpt.load_text("enwik8").encode("latin-1"), wiki)
        self.assertEqual(len(server.seen), 4)

    def test_splits_and_ids(self):
        text = "".join(chr(97 + i % 26) for i in range(1000))
        parts = chargpt.split("text8", text)
        self.assertEqual([len(part) for part in parts.values()], [900, 50, 50])
        self.assertEqual("".join(parts.values()), text)
        self.assertEqual({name: len(part) for name, part in chargpt.split("book.txt", text).items()}, {"train": 900, "valid": 100})
        tokenizer, text = CharTokenizer.train(["so schön 🙂\n"]), "schön? 🙂🙃\n"
        self.assertEqual(chargpt.encode(text, tokenizer).tolist(), tokenizer.encode(text))

    def test_windows(self):
        ids = torch.arange(23, dtype=torch.int32).numpy()
        x, y = zip(*chargpt.Windows(ids, 5, consecutive=True))
        self.assertEqual(torch.cat(x).tolist(), list(range(20)))  # each character once, as far as whole windows go
        self.assertTrue(all(torch.equal(a + 1, b) for a, b in zip(x, y)))
        torch.manual_seed(0)
        training = chargpt.Windows(ids, 5)
        self.assertEqual({int(training[i][0][0]) for i in range(len(training)) for _ in range(100)}, set(range(18)))  # every place there is


class TestScript(TempDirTestCase):
    def test_from_text_to_samples(self):
        (self.folder / "abc.txt").write_text("abcdefghij" * 200)
        out = f"--system.work_dir={self.folder / 'out'}"
        options = [f"--data.path={self.folder / 'abc.txt'}", out, "--trainer.max_iters=60", "--trainer.eval_every=20",
                   "--model.model_type=gpt-nano", "--model.block_size=16"]
        self.assertRaisesRegex(ValueError, "run this script without --sample first", chargpt.main, [out, "--sample=abc"])
        chargpt.main(options)
        summary = json.loads((self.folder / "out" / "summary.json").read_text())
        self.assertAlmostEqual(summary["valid_bits_per_character"], summary["valid_loss"] / math.log(2))
        self.assertEqual(summary["characters_seen"], 60 * 6 * 16)
        self.assertTrue((self.folder / "out" / "losses.png").stat().st_size > 0)
        model = GPT.from_pretrained(self.folder / "out" / "model")
        ids = chargpt.encode("abcdefghij" * 20, CharTokenizer.from_pretrained(self.folder / "out" / "model"))
        losses = [model(x[None], y[None])[1].item() for x, y in chargpt.Windows(ids, 16, consecutive=True)]
        self.assertAlmostEqual(summary["valid_loss"], sum(losses) / len(losses), places=5)
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            chargpt.main([out, "--sample", "abcdef"])
        self.assertEqual(printed.getvalue()[:12], "abcdefghijab")
        for args, words in (([*options, "--system.seed=1"], "system.seed was 3407, is 1"), ([out, "--sample=xyz"], "never seen: x y z"),
                            (["--data.path=nowhere.txt"], "none of tinyshakespeare, text8, enwik8")):
            self.assertRaisesRegex(ValueError, words, chargpt.main, args)
