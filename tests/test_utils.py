"""Configuration, seeds, files and the character tokenizer."""

import os
import random
import unittest
from unittest import mock

import numpy as np
import torch

from mingpt import checkpoint, download, plots, utils
from mingpt.chars import UNKNOWN, CharTokenizer
from mingpt.run_folder import read_metrics
from mingpt.config import CfgNode
from tests.common import TempDirTestCase


class TestCfgNode(unittest.TestCase):
    def setUp(self):
        self.C = CfgNode(seed=1, name="x", rate=0.5, flag=False, betas=(0.9, 0.95), free=None, model={"n_layer": 2})

    def test_command_line(self):
        self.C.merge_from_args([*"--seed=7 --name=12 --rate=1 --flag=True --free=out/a=b --model.n_layer=3".split(), "--betas=(0.5, 0.6)"])
        self.assertEqual(self.C, CfgNode(seed=7, name="12", rate=1.0, flag=True, betas=(0.5, 0.6), free="out/a=b", model={"n_layer": 3}))
        self.assertIsInstance(self.C.rate, float)
        self.C.merge_from_dict({"seed": 1, "flag": False})
        self.C.merge_from_args(["--seed", "7", "--flag", "--free", "85+50"])  # values behind a space, and a bare flag
        self.assertEqual((self.C.seed, self.C.flag, self.C.free), (7, True, "85+50"))

    def test_mistakes_are_named(self):
        for arg, words in (("--sed=1", "unknown option --sed; did you mean --seed\\?"), ("--model.n_layers=1", "did you mean --model.n_layer\\?"),
                           ("--zzzzzz=1", "--help lists all"), ("seed=1", "not of the form --option=value"), ("--seed", "not of the form"),
                           ("--seed=1.5", "must be of type int"), ("--flag=1", "must be of type bool"),
                           ("--seed=True", "must be of type int"), ("--rate=fast", "must be of type float")):
            with self.subTest(arg), self.assertRaisesRegex(ValueError, words):
                self.C.merge_from_args([arg])

    def test_tree(self):
        self.assertEqual(self.C.model.n_layer, 2)
        self.assertEqual(self.C, CfgNode(**self.C.to_dict()))
        self.assertIn("model.n_layer = 2", str(self.C))
        self.C.merge_from_dict({"new": 3})
        self.assertEqual(self.C.new, 3)


class TestHelpers(TempDirTestCase):
    def test_state_of_all_generators_comes_back(self):
        draw = lambda: (random.random(), np.random.rand(), torch.rand(()).item())
        utils.set_seed(3)
        first, state, second = draw(), checkpoint.get_rng_state(), draw()
        checkpoint.set_rng_state(state)
        self.assertEqual(draw(), second)
        utils.set_seed(3)
        self.assertEqual(draw(), first)

    def test_precision_device_home_and_a_missing_extra(self):
        self.assertEqual(utils.pick_precision("auto", torch.device("cpu")), "fp32")
        self.assertEqual(utils.pick_device("cpu").type, "cpu")
        self.assertRaisesRegex(ValueError, "precision='int4'", utils.pick_precision, "int4", torch.device("cpu"))
        with mock.patch.dict(os.environ, {"MINGPT_HOME": str(self.folder)}):
            self.assertEqual(download.home(), self.folder)
        words = r"no_such_module is not installed; it comes with: pip install -e '.\[projects\]'"
        self.assertRaisesRegex(ImportError, words, utils.import_extra, "no_such_module", "projects")

    def test_a_write_is_whole_or_not_at_all(self):
        path = self.folder / "deep" / "file"
        checkpoint.write_text(path, "old")
        with self.assertRaises(OSError), checkpoint.atomic_write(path) as f:
            f.write(b"half of the ne")
            raise OSError("no space left on device")
        self.assertEqual(path.read_text(), "old")
        self.assertEqual(os.listdir(path.parent), ["file"])

    def test_metrics_with_a_torn_last_line_and_their_plot(self):
        path = self.folder / "metrics.jsonl"
        path.write_text('{"iter": 1}\n{"iter": 2}\n{"iter": 3, "lo')
        self.assertEqual(read_metrics(path), [{"iter": 1}, {"iter": 2}])
        self.assertEqual(read_metrics(self.folder / "none"), [])
        path = self.folder / "plot.png"
        plots.plot_metrics(path, {"a": {"x": ([1, 2, 3], [0.5, None, 0.1]), "empty": ([], [])}, "b": {"y": ([1], [2])}})
        self.assertEqual(path.read_bytes()[:8], b"\x89PNG\r\n\x1a\n")

    def test_characters_there_and_back(self):
        texts = ["hello wörld", "¡hola! 😀", "e\u0301"]
        tokenizer = CharTokenizer.train(texts)
        for text in texts:
            self.assertEqual(tokenizer.decode(tokenizer.encode(text)), text)
            self.assertEqual(tokenizer(text).shape, (1, len(text)))
        self.assertEqual(tokenizer.decode(torch.tensor([tokenizer.eot_token])), "<|endoftext|>")
        self.assertEqual(tokenizer.vocab_size, len(set("".join(texts))) + 2)  # unknown, end of text
        tokenizer.save_pretrained(self.folder)
        self.assertEqual(CharTokenizer.from_pretrained(self.folder).chars, tokenizer.chars)

    def test_rare_and_unknown_characters(self):
        tokenizer = CharTokenizer.train(["aaab"], min_count=2)
        self.assertEqual(tokenizer.decode(tokenizer.encode("abz")), "a" + 2 * UNKNOWN)
        self.assertRaisesRegex(ValueError, r"characters \['z'\] are not in the vocabulary", CharTokenizer("ab").encode, "az")
        self.assertRaisesRegex(ValueError, "distinct", CharTokenizer, "aa")
