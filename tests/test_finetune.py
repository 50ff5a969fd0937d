"""finetune on a tiny random GPT-2: what it learns, what it writes, and what transformers makes of that."""

import json

import torch
import transformers

from mingpt.bpe import BPETokenizer
from mingpt.model import GPT
from tests.common import ROOT, TempDirTestCase, load_script, tiny_gpt

finetune = load_script(ROOT / "projects" / "finetune" / "finetune.py")


class TestFinetune(TempDirTestCase):
    def setUp(self):
        super().setUp()
        text = "".join(f"{i % 7} green bottles hanging on the wall<|endoftext|>" for i in range(400))
        (self.folder / "song.txt").write_text(text)
        BPETokenizer.train([text.replace("<|endoftext|>", "\n")], 280).save_pretrained(self.folder / "tiny")
        tiny_gpt(vocab_size=280, block_size=32).save_pretrained(self.folder / "tiny")
        self.options = [f"--data.path={self.folder / 'song.txt'}", f"--model.name={self.folder / 'tiny'}", "--data.block_size=16",
                        f"--system.work_dir={self.folder / 'out'}", "--trainer.learning_rate=1e-2", "--trainer.eval_every=50",
                        "--samples.prompt=3 green", "--samples.length=20", "--model.dropout=0.0", "--trainer.max_iters=200"]

    def test_from_a_folder_to_a_folder_that_transformers_loads(self):
        finetune.main(self.options)
        out = self.folder / "out"
        summary = json.loads((out / "summary.json").read_text())
        self.assertLess(summary["valid_loss"], summary["valid_loss_before"] / 2)
        before, after = (out / "samples.md").read_text().split("# After")
        self.assertIn("3 green bottles hanging", after)
        self.assertNotIn("3 green bottles hanging", before)
        ours, theirs = (cls.from_pretrained(out / "model") for cls in (GPT, transformers.AutoModelForCausalLM))
        idx = BPETokenizer.from_pretrained(out / "model")("6 green bottles")
        self.assertEqual(transformers.AutoTokenizer.from_pretrained(out / "model")("6 green bottles").input_ids, idx[0].tolist())
        with torch.no_grad():
            torch.testing.assert_close(ours(idx)[0], theirs(idx).logits, atol=1e-4, rtol=0)
        C = finetune.get_config()
        C.merge_from_args(self.options)
        self.assertIn(279, finetune.load_windows(C, BPETokenizer.from_pretrained(self.folder / "tiny"))[0].tensors[0])
        finetune.main(self.options)  # again: all is done, and nothing changes
        self.assertEqual({**json.loads((out / "summary.json").read_text()), "seconds": 0}, {**summary, "seconds": 0})

    def test_mistakes(self):
        (self.folder / "short.txt").write_text("too short")
        (self.folder / "bytes.txt").write_bytes(b"\xff\xfe\x00")
        for arg, words in (("--data.path=", "which text"), ("--data.block_size=64", "more than the 32 tokens"),
                           (f"--data.path={self.folder / 'short.txt'}", "must fill a window"),
                           (f"--data.path={self.folder / 'bytes.txt'}", "not UTF-8"), ("--trainer.eval_every=None", "eval_every=None")):
            with self.subTest(arg), self.assertRaisesRegex(ValueError, words):
                finetune.main([*self.options, arg])
        C = finetune.get_config()
        C.merge_from_args([*self.options, "--model.name=someone/gpt2-german"])
        self.assertRaisesRegex(ValueError, "which vocabulary", finetune.load_tokenizer, C, 50257)
        for file in ("vocab.json", "merges.txt"):
            (self.folder / "tiny" / file).unlink()
        self.assertRaisesRegex(ValueError, "name the vocab.json", finetune.main, self.options)
