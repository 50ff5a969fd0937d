"""finetune on tiny random models: what it learns and writes, and that transformers can load it."""

import json
import os
import tempfile
import unittest
from pathlib import Path
from unittest import mock

import tokenizers
import torch
import transformers

from mingpt.bpe import END_OF_TEXT, BPETokenizer
from mingpt.model import GPT
from tests.common import (
    ROOT,
    Server,
    TempDirTestCase,
    load_script,
    printed,
    readme_examples,
    tiny_gpt,
)

finetune = load_script(ROOT / "projects" / "finetune" / "finetune.py")


def write_song_and_model(folder):
    """A text to learn and a tiny model with its own vocabulary; returns the options to use them."""
    verses = [f"{i % 7} green bottles hanging on the wall{END_OF_TEXT}" for i in range(400)]
    song = "".join(verses)
    (folder / "song.txt").write_text(song, encoding="utf-8")
    tokenizer = BPETokenizer.train([song.replace(END_OF_TEXT, "\n")], 280)
    tokenizer.save_pretrained(folder / "tiny")
    tiny_gpt(vocab_size=280, block_size=32).save_pretrained(folder / "tiny")
    return [
        f"--data.path={folder / 'song.txt'}",
        f"--model.name={folder / 'tiny'}",
        f"--system.work_dir={folder / 'out'}",
        "--data.block_size=16",
        "--model.dropout=0.0",
        "--trainer.max_iters=200",
        "--trainer.learning_rate=1e-2",
        "--trainer.eval_every=50",
        "--samples.prompt=3 green",
        "--samples.length=20",
    ]


class TestResult(unittest.TestCase):
    """What one run of the script leaves in its folder."""

    @classmethod
    def setUpClass(cls):
        folder = Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
        cls.options = write_song_and_model(folder)
        cls.tiny = folder / "tiny"
        cls.out = folder / "out"
        cls.result = printed(finetune.main, cls.options)

    def summary(self):
        return json.loads((self.out / "summary.json").read_text(encoding="utf-8"))

    def test_the_loss_falls(self):
        summary = self.summary()
        self.assertLess(summary["valid_loss"], summary["valid_loss_before"] / 2)
        before, after = summary["valid_loss_before"], summary["valid_loss"]
        self.assertIn(f"validation loss {before:.3f} before, {after:.3f} after", self.result)

    def test_the_samples_show_what_it_has_learned(self):
        before, after = (self.out / "samples.md").read_text(encoding="utf-8").split("# After")
        self.assertIn("3 green bottles hanging", after)
        self.assertNotIn("3 green bottles hanging", before)

    def test_transformers_loads_the_model_and_its_tokenizer(self):
        ours = GPT.from_pretrained(self.out / "model")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(self.out / "model")
        idx = BPETokenizer.from_pretrained(self.out / "model")("6 green bottles")
        their_tokenizer = transformers.AutoTokenizer.from_pretrained(self.out / "model")
        self.assertEqual(their_tokenizer("6 green bottles").input_ids, idx[0].tolist())
        with torch.no_grad():
            torch.testing.assert_close(ours(idx)[0], theirs(idx).logits, atol=1e-4, rtol=0)

    def test_best_pt_holds_the_weights_of_the_model(self):
        best = GPT.from_pretrained(self.out / "best.pt", n_head=2).state_dict()
        model = GPT.from_pretrained(self.out / "model").state_dict()
        torch.testing.assert_close(best, model, rtol=0, atol=0)

    def test_running_it_again_changes_nothing(self):
        first = self.summary()
        printed(finetune.main, self.options)
        self.assertEqual({**self.summary(), "seconds": 0}, {**first, "seconds": 0})

    def test_the_readme_shows_how_to_use_the_result(self):
        ours, theirs = readme_examples("finetune", self.out)
        self.assertIn(ours, self.result)
        self.assertRegex(printed(exec, ours, {}), r"(?s)^The.{20}")
        names = {}
        exec(theirs, names)
        self.assertEqual(names["model"].config.vocab_size, 280)


class TestData(TempDirTestCase):
    def test_the_end_of_a_document_is_one_token(self):
        config = finetune.get_config()
        config.merge_from_args(write_song_and_model(self.folder))
        tokenizer = BPETokenizer.from_pretrained(self.folder / "tiny")
        text = finetune.load_text(config.data.path)
        train, _ = finetune.load_windows(config, text, tokenizer)
        self.assertEqual(tokenizer.eot_token, 279)
        self.assertIn(279, train.tensors[0])


def write_qwen(folder, text):
    """A tiny random model with the files that Qwen2.5 has on the hub, by its own libraries."""
    # Its tokenizer: NFC, a pattern that takes digits one by one, bytes, and tokens for turns.
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.normalizer = tokenizers.normalizers.NFC()
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(QWEN_PATTERN), "isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=290, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([text], trainer)
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokens = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **tokens
    ).save_pretrained(folder)

    # And its model.
    config = transformers.Qwen2Config(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    transformers.Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class TestHub(TempDirTestCase):
    def test_a_llama_of_the_hub_learns_too(self):
        options = write_song_and_model(self.folder)
        write_qwen(self.folder / "qwen", (self.folder / "song.txt").read_text(encoding="utf-8"))
        name = "Qwen/Qwen2.5-0.5B"
        files = {
            f"/{name}/resolve/main/{path.name}": path.read_bytes()
            for path in (self.folder / "qwen").iterdir()
        }
        server = self.enterContext(Server(files))
        hub = {"HF_ENDPOINT": server.url, "MINGPT_HOME": str(self.folder / "home")}
        self.enterContext(mock.patch.dict(os.environ, hub))

        printed(finetune.main, [*options, f"--model.name={name}", "--trainer.max_iters=100"])
        summary = json.loads((self.folder / "out" / "summary.json").read_text(encoding="utf-8"))
        self.assertLess(summary["valid_loss"], summary["valid_loss_before"] / 2)

        # transformers reads the result: the same tokens, the same logits.
        model = self.folder / "out" / "model"
        theirs = transformers.AutoModelForCausalLM.from_pretrained(model)
        self.assertIsInstance(theirs, transformers.Qwen2ForCausalLM)
        tokenizer = BPETokenizer.from_pretrained(model)
        idx = tokenizer("6 green bottles hanging on 12 walls")
        their_tokenizer = transformers.AutoTokenizer.from_pretrained(model)
        their_ids = their_tokenizer("6 green bottles hanging on 12 walls").input_ids
        self.assertEqual(their_ids, idx[0].tolist())
        self.assertEqual(their_tokenizer.eos_token_id, tokenizer.eot_token)
        with torch.no_grad():
            ours = GPT.from_pretrained(model)(idx)[0]
            torch.testing.assert_close(ours, theirs(idx).logits, atol=1e-4, rtol=0)


class TestMistakes(TempDirTestCase):
    def setUp(self):
        super().setUp()
        self.options = write_song_and_model(self.folder)

    def refuses(self, words, *options):
        with self.assertRaisesRegex(ValueError, words):
            finetune.main([*self.options, *options])

    def test_no_text(self):
        self.refuses("--data.path is empty: which text", "--data.path=")

    def test_a_missing_text(self):
        self.refuses("--data.path: nowhere.txt: there is no such file", "--data.path=nowhere.txt")

    def test_a_text_that_is_not_utf8(self):
        path = self.folder / "bytes.txt"
        path.write_bytes(b"\xff\xfe\x00")
        self.refuses("--data.path: .*bytes.txt is not UTF-8", f"--data.path={path}")

    def test_a_text_that_is_too_short(self):
        path = self.folder / "short.txt"
        path.write_text("too short", encoding="utf-8")
        self.refuses("must fill a window of --data.block_size=16", f"--data.path={path}")

    def test_a_wrong_path_is_noticed_before_weights_are_downloaded(self):
        hub = ["--model.name=gpt2", "--data.path=nowhere.txt"]
        with mock.patch.object(GPT, "from_pretrained", side_effect=AssertionError):
            self.refuses("there is no such file", *hub)

    def test_windows_longer_than_the_context(self):
        self.refuses("more than the 32 tokens", "--data.block_size=64")

    def test_no_evaluations(self):
        self.refuses("eval_every=None", "--trainer.eval_every=None")

    def test_a_model_without_its_vocabulary(self):
        (self.folder / "tiny" / "vocab.json").unlink()
        (self.folder / "tiny" / "merges.txt").unlink()
        self.refuses("a folder with the tokenizer.json, or vocab.json")
