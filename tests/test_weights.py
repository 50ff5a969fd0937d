"""Weights in and out against transformers, downloads from a server that misbehaves, and files that must not be loaded."""

import hashlib
import json
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import torch
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Model

from mingpt.model import GPT, PRESETS
from mingpt.rlhf import RewardModel, ValueModel
from mingpt.config import CfgNode as CN
from mingpt.download import download
from tests.common import Server, TempDirTestCase, tiny_gpt

BODY = bytes(range(256)) * 4096
SHA256 = hashlib.sha256(BODY).hexdigest()


def hugging_face(seed=0, **options):
    """A random GPT2LMHeadModel without dropout, its weights large enough for its logits to differ."""
    torch.manual_seed(seed)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 11, "n_positions": 12, "bos_token_id": None, "eos_token_id": None}
    model = GPT2LMHeadModel(GPT2Config(**{**sizes, **options}, embd_pdrop=0, resid_pdrop=0, attn_pdrop=0, initializer_range=0.1))
    for name, p in model.named_parameters():
        if name.endswith(".bias"):
            torch.nn.init.normal_(p, std=0.1)
    return model.eval()


def logits_of(model, idx):
    with torch.no_grad():
        return model(idx)[0] if isinstance(model, GPT) else model(idx).logits


def assert_loads(expected, path, **options):
    """from_pretrained(path) gives a model with the logits of the expected one."""
    idx = torch.randint(11, (2, 12))
    torch.testing.assert_close(logits_of(GPT.from_pretrained(path, **options), idx), logits_of(expected, idx))


class TestAgainstTransformers(TempDirTestCase):
    def test_every_preset_there_and_back(self):
        for name, (n_layer, n_head, n_embd) in PRESETS.items():
            theirs = hugging_face(n_layer=min(n_layer, 3), n_head=n_head, n_embd=n_embd, vocab_size=400, n_positions=64)
            theirs.save_pretrained(self.folder / name)
            ours = GPT.from_pretrained(self.folder / name)
            self.assertFalse(ours.training)
            idx = torch.randint(400, (2, 64))
            prompts = {"inputs": idx[:, :4], "attention_mask": torch.ones_like(idx[:, :4])}
            ours.save_pretrained(self.folder / name / "back")
            for other in (theirs, GPT2LMHeadModel.from_pretrained(self.folder / name / "back").eval()):
                with self.subTest(name, back=other is not theirs):
                    torch.testing.assert_close(logits_of(ours, idx), logits_of(other, idx), atol=1e-4, rtol=0)
                    expected = other.generate(**prompts, max_new_tokens=50, do_sample=False)
                    self.assertEqual(ours.generate(idx[:, :4], 50).tolist(), expected.tolist())

    def test_loss_and_every_gradient(self):
        theirs = hugging_face().train()
        theirs.save_pretrained(self.folder)
        ours = GPT.from_pretrained(self.folder).train()
        idx = torch.randint(11, (3, 12))
        expected = theirs(idx, labels=idx).loss
        _, loss = ours(idx[:, :-1], idx[:, 1:])
        torch.testing.assert_close(loss, expected)
        expected.backward()
        loss.backward()
        matrix = lambda name, p: name.split(".")[-2] in ("c_attn", "c_proj", "c_fc") and p.dim() == 2
        expected = {name: p.grad.t() if matrix(name, p) else p.grad for name, p in theirs.named_parameters()}
        torch.testing.assert_close({name: p.grad for name, p in ours.named_parameters()}, expected, atol=1e-5, rtol=1e-4)

    def test_untied_sharded_bin_half_and_bare_trunk(self):
        untied, theirs = hugging_face(tie_word_embeddings=False), hugging_face()
        self.assertIsInstance(theirs.transformer, GPT2Model)  # its names have no transformer. in front
        for name, saved, model, options in (("untied", untied, untied, {}), ("sharded", theirs, theirs, {"max_shard_size": "10KB"}),
                                            ("trunk", theirs.transformer, theirs, {})):
            saved.save_pretrained(self.folder / name, **options)
            assert_loads(model, self.folder / name)
        self.assertTrue((self.folder / "sharded" / "model.safetensors.index.json").exists())
        theirs.config.save_pretrained(self.folder / "bin")
        masks = {"transformer.h.0.attn.bias": torch.ones(1, 1, 12, 12), "transformer.h.0.attn.masked_bias": torch.tensor(-1e4)}
        torch.save({**theirs.state_dict(), **masks}, self.folder / "bin" / "pytorch_model.bin")  # as on the hub until 2023
        assert_loads(theirs, self.folder / "bin")
        theirs.bfloat16().save_pretrained(self.folder / "half")
        self.assertEqual(GPT.from_pretrained(self.folder / "half").lm_head.weight.dtype, torch.float32)
        assert_loads(theirs.float(), self.folder / "half")


class Exploit:
    def __reduce__(self):
        return os.mkdir, ("exploited",)


class TestOtherFiles(TempDirTestCase):
    def test_min_gpt_and_nano_gpt(self):
        sizes = {"n_layer": 3, "n_head": 3, "n_embd": 48}  # gpt-nano
        model = tiny_gpt(tie_weights=False, **sizes)
        masks = {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 12, 12) for i in range(3)}
        torch.save({**model.state_dict(), **masks}, self.folder / "mingpt.pt")
        assert_loads(model, self.folder / "mingpt.pt")
        config = {"system": {"seed": 1}, "model": {"model_type": "gpt-nano", "n_layer": None, "n_head": None, "attn_pdrop": 0.2}}
        (self.folder / "config.json").write_text(json.dumps(config))  # its scripts write one beside
        assert_loads(model, self.folder / "mingpt.pt")
        (self.folder / "config.json").unlink()
        model = tiny_gpt(**{**sizes, "n_head": 6})  # a number of heads that shapes do not tell
        for name, p in model.named_parameters():
            p.data.zero_() if name.endswith(".bias") else None
        state = {f"_orig_mod.{name}": p for name, p in model.state_dict().items() if not name.endswith(".bias")}
        torch.save({"model": state, "model_args": {"n_head": 6, "bias": False}, "iter_num": 3, "config": {"dtype": "bfloat16"}},
                   self.folder / "nanogpt.pt")
        assert_loads(model, self.folder / "nanogpt.pt")
        torch.save(state, self.folder / "bare.pt", _use_new_zipfile_serialization=False)  # as before PyTorch 1.6
        assert_loads(model, self.folder / "bare.pt", n_head=6)

    def test_reward_and_value_models(self):
        gpt, idx = tiny_gpt(), torch.randint(11, (2, 8))
        gpt.save_pretrained(self.folder / "gpt")
        for cls in (RewardModel, ValueModel):
            model = cls.from_gpt(gpt)
            torch.nn.init.normal_(model.head.weight)
            model.save_pretrained(self.folder / cls.__name__)
            torch.testing.assert_close(cls.from_pretrained(self.folder / cls.__name__)(idx), model(idx))
            self.assertRaisesRegex(ValueError, "use from_gpt", cls.from_pretrained, self.folder / "gpt")

    def test_training_what_was_loaded_changes_no_file_and_it_can_be_saved_over_it(self):
        tiny_gpt().save_pretrained(self.folder)
        before, model = (self.folder / "model.safetensors").read_bytes(), GPT.from_pretrained(self.folder)
        models = [tiny_gpt(), model.train()]  # the matrices of the second lie transposed, and an optimizer's state must not care
        options, idx = CN(learning_rate=1e-2, betas=(0.9, 0.95), weight_decay=0.1, eps=1e-3), torch.randint(11, (2, 12))
        optimizers = [model.configure_optimizers(options) for model in models]
        for number in (0, 1, 0):  # a step of the first; the second goes on from there, and so does the first
            if number == 1:
                models[1].load_state_dict(models[0].state_dict())
                optimizers[1].load_state_dict(pickle.loads(pickle.dumps(optimizers[0].state_dict())))
            optimizers[number].zero_grad()
            models[number](idx, idx)[1].backward()
            optimizers[number].step()
        torch.testing.assert_close(*(dict(model.named_parameters()) for model in models), atol=1e-6, rtol=1e-5)
        self.assertEqual((self.folder / "model.safetensors").read_bytes(), before)
        model.save_pretrained(self.folder)
        assert_loads(model, self.folder)
        torch.save(model.state_dict(), self.folder / "tied.pt")  # head and embedding are one in this file
        untied = GPT.from_pretrained(self.folder / "tied.pt", tie_weights=False)
        self.assertNotEqual(untied.lm_head.weight.data_ptr(), untied.transformer.wte.weight.data_ptr())

    def test_options_and_randomness(self):
        tiny_gpt(attn_pdrop=0.3).save_pretrained(self.folder)
        before = torch.get_rng_state()
        config = GPT.from_pretrained(self.folder, embd_pdrop=0.5).config
        self.assertEqual((config.embd_pdrop, config.attn_pdrop, config.block_size), (0.5, 0.3, 12))
        self.assertTrue(torch.equal(before, torch.get_rng_state()))
        self.assertRaisesRegex(ValueError, "no options .'n_heads'", GPT.from_pretrained, self.folder, n_heads=2)

    def refuses(self, words, path=None, **options):
        self.assertRaisesRegex(ValueError, words, GPT.from_pretrained, path or self.folder, **options)

    def test_no_weights_or_wrong_ones(self):
        self.refuses("holds no weights")
        self.refuses("neither a file or folder here", "./no/such/folder")
        model = tiny_gpt()
        model.save_pretrained(self.folder)
        state, config = model.state_dict(), json.loads((self.folder / "config.json").read_text())
        for options, words in (({"n_embd": 32}, "says .'n_embd': 32. of itself"), ({"n_positions": 10**15}, "'block_size': 10{15}"),
                               ({"n_layer": 3}, "'n_layer': 3"), ({"model_type": "llama"}, "model_type='llama'"),
                               ({"activation_function": "relu"}, "activation_function='relu'"), ({"n_head": 3}, "not divisible")):
            (self.folder / "config.json").write_text(json.dumps({**config, **options}))
            self.refuses(words)
        for damaged in ("{", "3", "[" * 100_000):
            (self.folder / "config.json").write_text(damaged)
            self.refuses("config.json is damaged")
        (self.folder / "config.json").unlink()
        self.refuses("pass n_head")
        for name, wrong, words in (("wte.weight", None, "holds no GPT-2"), ("h.1.ln_1.bias", None, "lacks .'transformer.h.1.ln_1.bias'"),
                                   ("ln_f.weight", torch.ones(16, dtype=torch.int8), "ln_f.weight as torch.int8"),
                                   ("ln_f.weight", torch.ones(17), "as torch.float32 \\(17,\\), must be float \\(16,\\)"),
                                   ("ln_f.weight", "text", "are no tensors"), ("ln_f.weight", torch.ones(16).to_sparse(), "not dense"),
                                   ("h.0.attn.c_attn.weight", torch.tensor(1.0), "c_attn.weight as torch.float32 \\(\\)")):
            torch.save({k: v for k, v in {**state, "transformer." + name: wrong}.items() if v is not None}, self.folder / "wrong.pt")
            self.refuses(words, self.folder / "wrong.pt", n_head=2)

    def test_damaged_and_hostile_files(self):
        tiny_gpt().save_pretrained(self.folder)
        path = self.folder / "model.safetensors"
        whole = path.read_bytes()
        header = json.dumps({"transformer.wte.weight": {"dtype": "F32", "shape": [11, 16], "data_offsets": [0, 10**12]}}).encode()
        for data in (whole[:-100], whole[:50], b"", (2**63 - 1).to_bytes(8, "little") + whole[8:],
                     len(header).to_bytes(8, "little") + header, b"\x80\x04" + whole):
            path.write_bytes(data)
            self.refuses("no file of weights that can be loaded")
        path.unlink()
        for save in (lambda x, path: path.write_bytes(pickle.dumps(x)), torch.save):
            save({"transformer.wte.weight": Exploit()}, self.folder / "pytorch_model.bin")
            self.refuses("could run foreign code")
        self.assertFalse(os.path.exists("exploited"))
        for weight_map in ({"a": "../../etc/passwd"}, 3):
            (self.folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
            self.refuses("in the same folder")


@mock.patch("time.sleep", mock.Mock())  # between tries
class TestDownload(TempDirTestCase):
    def setUp(self):
        super().setUp()
        self.path = self.folder / "deep" / "file.bin"
        self.server = self.enterContext(Server({"/file.bin": BODY}))

    def download(self, moods=(), **options):
        self.server.moods = list(moods)
        return download(self.server.url + "/file.bin", self.path, **{"sha256": SHA256, "timeout": 0.5, **options})

    def test_trouble_on_the_way_and_once_is_enough(self):
        half, more = (f"bytes={int(share * len(BODY))}-" for share in (0.5, 0.75))
        for moods, ranges in (([], [None]), (["slow"], [None]), ([500, 503, 429], [None] * 4), (["cut"], [None, half]),
                              (["stall"], [None, half]), (["cut", "no range"], [None, half]), (["cut", "wrong range"], [None, half, None]),
                              (["cut", "corrupt"], [None, half, None]), (["cut", "short range"], [None, half, more])):
            with self.subTest(moods):
                self.server.seen.clear()
                self.path.unlink(missing_ok=True)
                for _ in range(2):  # the second time, the file is there
                    self.assertEqual(self.download(moods).read_bytes(), BODY)
                self.assertEqual([headers.get("Range") for _, headers in self.server.seen], ranges)
                self.assertEqual(os.listdir(self.path.parent), ["file.bin"])

    def test_what_is_left_of_a_download(self):
        self.assertRaisesRegex(ConnectionError, "failed 2 times, at last with", self.download, ["cut", "cut"], tries=2)
        self.assertEqual(os.listdir(self.path.parent), ["file.bin.part"])
        self.assertEqual(self.download().read_bytes(), BODY)
        self.assertEqual(self.server.seen[-1][1].get("Range"), f"bytes={len(BODY) // 2 + len(BODY) // 4}-")
        for n in (10, len(BODY), len(BODY) + 1):  # of another file
            self.path.rename(self.path.parent / "file.bin.part").write_bytes(b"x" * n)
            self.assertEqual(self.download().read_bytes(), BODY)

    def test_many_at_once(self):
        self.server.moods = ["slow"] * 8
        with ThreadPoolExecutor(4) as pool:
            for path in pool.map(lambda _: download(self.server.url + "/file.bin", self.path, SHA256, len(BODY)), range(4)):
                self.assertEqual(path.read_bytes(), BODY)
        self.assertEqual(os.listdir(self.path.parent), ["file.bin"])

    def test_what_is_final(self):
        for moods, options, words in (([404], {}, "answers Not Found \\(404\\)"), ([401], {}, "may you read it"),
                                      (["corrupt"], {}, "SHA-256 .*, not"), ([], {"size": 10}, f"{len(BODY)} bytes, not 10")):
            with self.subTest(words), self.assertRaisesRegex(ValueError, words):
                self.download(moods, **options)
            self.assertEqual(os.listdir(self.path.parent), [])
        self.assertRaisesRegex(ConnectionError, "failed 2 times", download, "http://127.0.0.1:9/nobody", self.path, tries=2)


class TestHub(TempDirTestCase):
    def setUp(self):
        super().setUp()
        self.theirs = hugging_face()
        self.theirs.save_pretrained(self.folder / "one")
        self.theirs.save_pretrained(self.folder / "many", max_shard_size="10KB")
        self.server = self.enterContext(Server({}))
        hub = {"HF_ENDPOINT": self.server.url, "HF_TOKEN": "secret", "MINGPT_HOME": str(self.folder / "home")}
        self.enterContext(mock.patch.dict(os.environ, hub))

    def serve(self, folder, name, revision="main"):
        for path in (self.folder / folder).iterdir():
            url = f"/{name}/resolve/{revision}/{path.name}"
            self.server.files[url] = path.read_bytes()
            if path.suffix == ".safetensors":
                self.server.headers[url] = {"X-Linked-Etag": f'"{hashlib.sha256(path.read_bytes()).hexdigest()}"'}

    def test_names_revisions_shards_and_the_cache(self):
        for folder, name, options in (("one", "gpt2", {}), ("many", "user/repo", {}), ("one", "user/repo", {"revision": "refs/pr/1"})):
            self.serve(folder, name, options.get("revision", "main").replace("/", "%2F"))
            for _ in range(2):
                assert_loads(self.theirs, name, **options)
                self.server.files.clear()  # the second time, all is there
        self.assertEqual({headers["Authorization"] for _, headers in self.server.seen}, {"Bearer secret"})
        self.server.files["/user/empty/resolve/main/config.json"] = b"{}"
        for name, words in (("nobody/nothing", "Not Found"), ("user/empty", "has no weights at")):
            self.assertRaisesRegex(ValueError, words, GPT.from_pretrained, name)

    def test_a_torn_or_corrupt_file_is_never_loaded(self):
        self.serve("one", "gpt2")
        self.server.moods = [None, "corrupt"]
        self.assertRaisesRegex(ValueError, "SHA-256", GPT.from_pretrained, "gpt2")
        self.server.moods = ["cut"]
        with mock.patch("time.sleep"):
            assert_loads(self.theirs, "gpt2")
