"""Weights in and out against transformers, files that must not be loaded, and the hub.

The hub is a server on this machine that can misbehave.
"""

import hashlib
import json
import os
import pickle
from unittest import mock

import torch
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Model

from mingpt.config import CfgNode as CN
from mingpt.heads import ActorCritic, RewardModel, ValueModel
from mingpt.hub import ABSENT
from mingpt.model import GPT, PRESETS
from mingpt.weights import find_pretrained
from tests.common import Server, TempDirTestCase, tiny_gpt


def hugging_face(seed=0, **options):
    """A random GPT2LMHeadModel without dropout, with weights so large that its logits differ."""
    torch.manual_seed(seed)
    sizes = {
        "n_layer": 2,
        "n_head": 2,
        "n_embd": 16,
        "vocab_size": 11,
        "n_positions": 12,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    no_dropout = {"embd_pdrop": 0, "resid_pdrop": 0, "attn_pdrop": 0}
    config = GPT2Config(**{**sizes, **options}, **no_dropout, initializer_range=0.1)
    model = GPT2LMHeadModel(config)
    for name, p in model.named_parameters():
        if name.endswith(".bias"):
            torch.nn.init.normal_(p, std=0.1)
    return model.eval()


def causal_masks(n_layer):
    """The masks that minGPT keeps among its weights, as transformers did until 2023."""
    return {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 12, 12) for i in range(n_layer)}


def logits_of(model, idx):
    with torch.no_grad():
        return model(idx)[0] if isinstance(model, GPT) else model(idx).logits


def assert_loads(expected, path, **options):
    """from_pretrained(path) gives a model with the logits of the expected one."""
    idx = torch.randint(11, (2, 12))
    loaded = GPT.from_pretrained(path, **options)
    torch.testing.assert_close(logits_of(loaded, idx), logits_of(expected, idx))


class TestAgainstTransformers(TempDirTestCase):
    def test_every_preset_there_and_back(self):
        for name, (n_layer, n_head, n_embd) in PRESETS.items():
            theirs = hugging_face(
                n_layer=min(n_layer, 3),
                n_head=n_head,
                n_embd=n_embd,
                vocab_size=400,
                n_positions=64,
            )
            theirs.save_pretrained(self.folder / name)
            ours = GPT.from_pretrained(self.folder / name)
            with self.subTest(name, direction="there"):
                self.assert_same_model(ours, theirs)

            ours.save_pretrained(self.folder / name / "back")
            back = GPT2LMHeadModel.from_pretrained(self.folder / name / "back").eval()
            with self.subTest(name, direction="back"):
                self.assert_same_model(ours, back)

    def assert_same_model(self, ours, theirs):
        """The same logits, and the same greedy continuations."""
        self.assertFalse(ours.training)
        idx = torch.randint(400, (2, 64))
        torch.testing.assert_close(logits_of(ours, idx), logits_of(theirs, idx), atol=1e-4, rtol=0)
        prompts = idx[:, :4]
        expected = theirs.generate(
            inputs=prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=50,
            do_sample=False,
        )
        self.assertEqual(ours.generate(prompts, 50).tolist(), expected.tolist())

    def test_loss_and_every_gradient(self):
        theirs = hugging_face().train()
        theirs.save_pretrained(self.folder)
        ours = GPT.from_pretrained(self.folder).train()
        idx = torch.randint(11, (3, 12))
        expected_loss = theirs(idx, labels=idx).loss
        _, loss = ours(idx[:, :-1], idx[:, 1:])
        torch.testing.assert_close(loss, expected_loss)

        expected_loss.backward()
        loss.backward()
        expected = {}
        for name, p in theirs.named_parameters():
            is_conv1d = name.split(".")[-2] in ("c_attn", "c_proj", "c_fc") and p.dim() == 2
            expected[name] = p.grad.t() if is_conv1d else p.grad
        gradients = {name: p.grad for name, p in ours.named_parameters()}
        torch.testing.assert_close(gradients, expected, atol=1e-5, rtol=1e-4)

    def test_untied_head(self):
        theirs = hugging_face(tie_word_embeddings=False)
        theirs.save_pretrained(self.folder)
        assert_loads(theirs, self.folder)

    def test_sharded(self):
        theirs = hugging_face()
        theirs.save_pretrained(self.folder, max_shard_size="10KB")
        self.assertTrue((self.folder / "model.safetensors.index.json").exists())
        assert_loads(theirs, self.folder)

    def test_bare_trunk(self):
        theirs = hugging_face()
        self.assertIsInstance(theirs.transformer, GPT2Model)  # its names lack "transformer."
        theirs.transformer.save_pretrained(self.folder)
        assert_loads(theirs, self.folder)

    def test_pytorch_model_bin_with_masks(self):
        theirs = hugging_face()
        theirs.config.save_pretrained(self.folder)
        masks = {**causal_masks(1), "transformer.h.0.attn.masked_bias": torch.tensor(-1e4)}
        state = {**theirs.state_dict(), **masks}
        torch.save(state, self.folder / "pytorch_model.bin")  # as on the hub until 2023
        assert_loads(theirs, self.folder)

    def test_half_precision_becomes_fp32(self):
        theirs = hugging_face().bfloat16()
        theirs.save_pretrained(self.folder)
        self.assertEqual(GPT.from_pretrained(self.folder).lm_head.weight.dtype, torch.float32)
        assert_loads(theirs.float(), self.folder)


class TestMinGPT(TempDirTestCase):
    def setUp(self):
        super().setUp()
        self.model = tiny_gpt(tie_weights=False, n_layer=3, n_head=3, n_embd=48)  # gpt-nano
        self.path = self.folder / "mingpt.pt"
        torch.save({**self.model.state_dict(), **causal_masks(3)}, self.path)

    def test_state_dict(self):
        assert_loads(self.model, self.path, n_head=3)

    def test_a_state_dict_does_not_tell_its_heads_even_if_its_sizes_are_those_of_a_preset(self):
        with self.assertRaisesRegex(ValueError, "how many heads share its 48 channels"):
            GPT.from_pretrained(self.path)

    def test_state_dict_beside_the_config_of_its_scripts(self):
        options = {"model_type": "gpt-nano", "n_layer": None, "n_head": None, "attn_pdrop": 0.2}
        config = {"system": {"seed": 1}, "model": options}
        (self.folder / "config.json").write_text(json.dumps(config))
        assert_loads(self.model, self.path)


class TestNanoGPT(TempDirTestCase):
    """Compiled, without biases, and with a number of heads that the shapes do not tell."""

    def setUp(self):
        super().setUp()
        self.model = tiny_gpt(n_layer=3, n_head=6, n_embd=48)
        for name, p in self.model.named_parameters():
            if name.endswith(".bias"):
                p.data.zero_()
        self.state = {
            f"_orig_mod.{name}": p
            for name, p in self.model.state_dict().items()
            if not name.endswith(".bias")
        }

    def checkpoint(self):
        checkpoint = {
            "model": self.state,
            "model_args": {"n_head": 6, "bias": False},
            "iter_num": 3,
            "config": {"dtype": "bfloat16"},
        }
        torch.save(checkpoint, self.folder / "nanogpt.pt")
        return self.folder / "nanogpt.pt"

    def test_checkpoint(self):
        assert_loads(self.model, self.checkpoint(), activation_function="gelu_new")

    def test_it_does_not_tell_its_gelu(self):
        path = self.checkpoint()
        with self.assertRaisesRegex(ValueError, "does not tell which GELU"):
            GPT.from_pretrained(path)
        with self.assertRaisesRegex(ValueError, "activation_function='gelu'; our GPT-2 needs"):
            GPT.from_pretrained(path, activation_function="gelu")

    def test_bare_state_dict_as_before_pytorch_1_6(self):
        path = self.folder / "bare.pt"
        torch.save(self.state, path, _use_new_zipfile_serialization=False)
        assert_loads(self.model, path, n_head=6, activation_function="gelu_new")
        # only nanoGPT has models without biases
        with self.assertRaisesRegex(ValueError, "does not tell which GELU"):
            GPT.from_pretrained(path, n_head=6)


class TestWrappedModels(TempDirTestCase):
    def test_the_policy_of_a_ppo_checkpoint(self):
        policy = tiny_gpt()
        both = ActorCritic(policy, ValueModel.from_gpt(tiny_gpt(seed=1)))
        torch.save({"model": both.state_dict(), "iter_num": 3}, self.folder / "checkpoint.pt")
        assert_loads(policy, self.folder / "checkpoint.pt", n_head=2)

    def test_prefixes_in_any_order(self):
        model = tiny_gpt()
        for prefix in ("module.", "_orig_mod.module.", "module._orig_mod."):
            with self.subTest(prefix):
                state = {f"{prefix}{name}": p for name, p in model.state_dict().items()}
                torch.save(state, self.folder / "wrapped.pt")
                assert_loads(model, self.folder / "wrapped.pt", n_head=2)


class TestScalarModels(TempDirTestCase):
    def setUp(self):
        super().setUp()
        self.gpt = tiny_gpt()

    def test_reward_and_value_models_there_and_back(self):
        idx = torch.randint(11, (2, 8))
        for cls in (RewardModel, ValueModel):
            with self.subTest(cls.__name__):
                model = cls.from_gpt(self.gpt)
                torch.nn.init.normal_(model.head.weight)
                model.save_pretrained(self.folder / cls.__name__)
                loaded = cls.from_pretrained(self.folder / cls.__name__)
                torch.testing.assert_close(loaded(idx), model(idx))

    def test_a_language_model_has_no_head_for_them(self):
        self.gpt.save_pretrained(self.folder)
        for cls in (RewardModel, ValueModel):
            with self.subTest(cls.__name__):
                message = r"missing \['head.bias', 'head.weight'\].* use from_gpt"
                self.assertRaisesRegex(ValueError, message, cls.from_pretrained, self.folder)


class TestTrainingWhatWasLoaded(TempDirTestCase):
    """Its blocks' matrices lie transposed, and its memory is the file's."""

    OPTIONS = CN(learning_rate=1e-2, betas=(0.9, 0.95), weight_decay=0.1, eps=1e-3)

    def setUp(self):
        super().setUp()
        tiny_gpt().save_pretrained(self.folder)
        self.file = self.folder / "model.safetensors"
        self.loaded = GPT.from_pretrained(self.folder).train()
        self.idx = torch.randint(11, (2, 12))

    def step(self, model, optimizer):
        optimizer.zero_grad()
        _, loss = model(self.idx, self.idx)
        loss.backward()
        optimizer.step()

    def test_an_optimizer_state_fits_either_way_round(self):
        other = tiny_gpt()
        other_optimizer = other.configure_optimizers(self.OPTIONS)
        optimizer = self.loaded.configure_optimizers(self.OPTIONS)
        # a step of the other; the loaded one continues from there, and so does the other
        self.step(other, other_optimizer)
        self.loaded.load_state_dict(other.state_dict())
        state = pickle.loads(pickle.dumps(other_optimizer.state_dict()))
        optimizer.load_state_dict(state)
        self.step(self.loaded, optimizer)
        self.step(other, other_optimizer)
        torch.testing.assert_close(
            dict(self.loaded.named_parameters()),
            dict(other.named_parameters()),
            atol=1e-6,
            rtol=1e-5,
        )

    def test_the_file_stays_as_it_was(self):
        before = self.file.read_bytes()
        optimizer = self.loaded.configure_optimizers(self.OPTIONS)
        self.step(self.loaded, optimizer)
        self.loaded.load_state_dict(tiny_gpt(seed=1).state_dict())
        self.step(self.loaded, optimizer)
        self.assertEqual(self.file.read_bytes(), before)

    def test_it_can_be_saved_over_its_own_file(self):
        optimizer = self.loaded.configure_optimizers(self.OPTIONS)
        self.step(self.loaded, optimizer)
        self.loaded.save_pretrained(self.folder)
        assert_loads(self.loaded, self.folder)

    def test_a_tied_head_can_be_untied(self):
        path = self.folder / "tied.pt"
        torch.save(self.loaded.state_dict(), path)  # head and embedding are one in this file
        untied = GPT.from_pretrained(path, tie_weights=False)
        head, embedding = untied.lm_head.weight, untied.transformer.wte.weight
        self.assertNotEqual(head.data_ptr(), embedding.data_ptr())


class TestOptions(TempDirTestCase):
    def setUp(self):
        super().setUp()
        tiny_gpt(attn_pdrop=0.3).save_pretrained(self.folder)

    def test_they_replace_those_of_the_config(self):
        config = GPT.from_pretrained(self.folder, embd_pdrop=0.5).config
        self.assertEqual(config.embd_pdrop, 0.5)
        self.assertEqual(config.attn_pdrop, 0.3)
        self.assertEqual(config.block_size, 12)

    def test_a_width_inside_the_mlp_that_transformers_names_is_the_usual_one(self):
        path = self.folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "n_inner": 64}))
        self.assertIsNone(GPT.from_pretrained(self.folder).config.n_inner)  # a Llama's option

    def test_another_architecture_is_refused(self):
        with self.assertRaisesRegex(ValueError, "architecture='llama' was asked for"):
            GPT.from_pretrained(self.folder, architecture="llama")
        self.assertEqual(GPT.from_pretrained(self.folder, architecture="gpt2").config.n_embd, 16)

    def test_unknown_ones_are_refused(self):
        with self.assertRaisesRegex(ValueError, "no options .'n_heads'"):
            GPT.from_pretrained(self.folder, n_heads=2)

    def test_loading_draws_no_random_numbers(self):
        before = torch.get_rng_state()
        GPT.from_pretrained(self.folder, embd_pdrop=0.5)
        self.assertTrue(torch.equal(before, torch.get_rng_state()))


class RefusalTestCase(TempDirTestCase):
    """Begins with a model in self.folder, and spoils it."""

    def setUp(self):
        super().setUp()
        self.model = tiny_gpt()
        self.model.save_pretrained(self.folder)
        self.config_path = self.folder / "config.json"
        self.weights_path = self.folder / "model.safetensors"

    def assert_refused(self, message, path=None, **options):
        path = self.folder if path is None else path
        self.assertRaisesRegex(ValueError, message, GPT.from_pretrained, path, **options)


class TestNothingToLoad(RefusalTestCase):
    def test_folder_without_weights(self):
        self.weights_path.unlink()
        self.assert_refused("contains no weights")

    def test_no_folder_and_no_name_on_the_hub(self):
        self.assert_refused("expected an existing file or folder", "./no/such/folder")


class TestWrongConfig(RefusalTestCase):
    def assert_config_refused(self, message, **options):
        config = json.loads(self.config_path.read_text())
        self.config_path.write_text(json.dumps({**config, **options}))
        self.assert_refused(message)

    def test_another_width(self):
        self.assert_config_refused("has .'n_embd': 32. in its config", n_embd=32)

    def test_another_block_size(self):
        self.assert_config_refused("'block_size': 10{15}", n_positions=10**15)

    def test_another_depth(self):
        self.assert_config_refused("'n_layer': 3", n_layer=3)

    def test_another_architecture(self):
        words = "model_type='mixtral'; ours are gpt2, llama"
        self.assert_config_refused(words, model_type="mixtral")

    def test_another_activation(self):
        self.assert_config_refused("activation_function='relu'", activation_function="relu")

    def test_heads_that_do_not_divide_the_channels(self):
        self.assert_config_refused("not divisible", n_head=3)

    def test_damaged(self):
        for text in ("{", "3", "[" * 100_000):
            with self.subTest(text[:10]):
                self.config_path.write_text(text)
                self.assert_refused("config.json is damaged")

    def test_missing_where_the_shapes_do_not_tell_the_heads(self):
        self.config_path.unlink()
        self.assert_refused("pass n_head")


class TestWrongTensors(RefusalTestCase):
    def assert_tensor_refused(self, name, tensor, message):
        state = {**self.model.state_dict(), f"transformer.{name}": tensor}
        self.assert_state_refused(state, message)

    def assert_state_refused(self, state, message):
        self.config_path.unlink()
        path = self.folder / "wrong.pt"
        torch.save(state, path)
        self.assert_refused(message, path, n_head=2)

    def test_no_embedding(self):
        state = self.model.state_dict()
        del state["transformer.wte.weight"]
        self.assert_state_refused(state, "is not a GPT-2, which has matrices wte.weight")

    def test_missing(self):
        state = self.model.state_dict()
        del state["transformer.h.1.ln_1.bias"]
        self.assert_state_refused(state, "missing .'transformer.h.1.ln_1.bias'")

    def test_integers(self):
        ones = torch.ones(16, dtype=torch.int8)
        self.assert_tensor_refused("ln_f.weight", ones, "ln_f.weight as torch.int8")

    def test_wrong_shape(self):
        message = r"as torch.float32 \(17,\); expected floats of shape \(16,\)"
        self.assert_tensor_refused("ln_f.weight", torch.ones(17), message)

    def test_a_number_in_the_place_of_a_matrix(self):
        message = r"c_attn.weight as torch.float32 \(\)"
        self.assert_tensor_refused("h.0.attn.c_attn.weight", torch.tensor(1.0), message)

    def test_text(self):
        self.assert_tensor_refused("ln_f.weight", "text", "are not tensors")

    def test_sparse(self):
        self.assert_tensor_refused("ln_f.weight", torch.ones(16).to_sparse(), "not dense")


class Exploit:
    """Unpickled without care, it makes a folder."""

    def __reduce__(self):
        return os.mkdir, ("exploited",)


class TestDamagedAndHostileFiles(RefusalTestCase):
    def test_damaged_safetensors(self):
        good = self.weights_path.read_bytes()
        outside = {"dtype": "F32", "shape": [11, 16], "data_offsets": [0, 10**12]}
        header = json.dumps({"transformer.wte.weight": outside}).encode()
        files = {
            "cut off in the tensors": good[:-100],
            "cut off in the header": good[:50],
            "empty": b"",
            "an endless header": (2**63 - 1).to_bytes(8, "little") + good[8:],
            "a tensor outside the file": len(header).to_bytes(8, "little") + header,
            "a pickle": b"\x80\x04" + good,
        }
        for name, data in files.items():
            with self.subTest(name):
                self.weights_path.write_bytes(data)
                self.assert_refused("cannot be loaded: it is missing or damaged")

    def test_a_pickle_that_runs_code(self):
        self.weights_path.unlink()
        path = self.folder / "pytorch_model.bin"
        state = {"transformer.wte.weight": Exploit()}
        with self.subTest("a bare pickle"):
            path.write_bytes(pickle.dumps(state))
            self.assert_refused("could run foreign code")
        with self.subTest("torch.save"):
            torch.save(state, path)
            self.assert_refused("could run foreign code")
        self.assertFalse(os.path.exists("exploited"))

    def test_an_index_that_names_files_elsewhere(self):
        self.weights_path.unlink()
        for weight_map in ({"a": "../../etc/passwd"}, 3):
            with self.subTest(weight_map=weight_map):
                index = self.folder / "model.safetensors.index.json"
                index.write_text(json.dumps({"weight_map": weight_map}))
                self.assert_refused("expected names of files in the same folder")


class TestHub(TempDirTestCase):
    def setUp(self):
        super().setUp()
        self.theirs = hugging_face()
        self.theirs.save_pretrained(self.folder / "one")
        self.theirs.save_pretrained(self.folder / "many", max_shard_size="10KB")
        self.server = self.enterContext(Server({}))
        hub = {
            "HF_ENDPOINT": self.server.url,
            "HF_TOKEN": "secret",
            "MINGPT_HOME": str(self.folder / "home"),
        }
        self.enterContext(mock.patch.dict(os.environ, hub))

    def serve(self, folder, name, revision="main"):
        for path in (self.folder / folder).iterdir():
            url = f"/{name}/resolve/{revision}/{path.name}"
            self.server.files[url] = path.read_bytes()
            if path.suffix == ".safetensors":
                sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
                self.server.headers[url] = {"X-Linked-Etag": f'"{sha256}"'}

    def assert_loads_twice(self, name, **options):
        """From the hub, and then from the cache, with the hub gone."""
        assert_loads(self.theirs, name, **options)
        self.server.files.clear()
        assert_loads(self.theirs, name, **options)

    def test_a_name_without_a_user(self):
        self.serve("one", "gpt2")
        self.assert_loads_twice("gpt2")

    def test_shards(self):
        self.serve("many", "user/repo")
        self.assert_loads_twice("user/repo")

    def test_revisions_are_kept_apart(self):
        self.serve("many", "user/repo")
        self.assert_loads_twice("user/repo")
        self.serve("one", "user/repo", "refs%2Fpr%2F1")
        self.assert_loads_twice("user/repo", revision="refs/pr/1")

    def test_every_request_has_the_token(self):
        self.serve("many", "user/repo")
        assert_loads(self.theirs, "user/repo")
        tokens = {headers["Authorization"] for _, headers in self.server.seen}
        self.assertEqual(tokens, {"Bearer secret"})

    def test_a_token_that_was_read_with_its_line_end(self):
        self.serve("one", "gpt2")
        with mock.patch.dict(os.environ, HF_TOKEN=" secret\n"):
            assert_loads(self.theirs, "gpt2")
        tokens = {headers["Authorization"] for _, headers in self.server.seen}
        self.assertEqual(tokens, {"Bearer secret"})

    def test_what_is_no_token_is_refused_and_not_shown(self):
        with (
            mock.patch.dict(os.environ, HF_TOKEN="sec ret\nX: y"),
            self.assertRaisesRegex(ValueError, "HF_TOKEN holds") as raised,
        ):
            GPT.from_pretrained("gpt2")
        self.assertNotIn("ret", str(raised.exception))

    def test_it_says_that_it_asks_the_hub(self):
        self.serve("one", "t2/modle")
        with self.assertLogs("mingpt", "WARNING") as logs:
            assert_loads(self.theirs, "t2/modle")
        self.assertIn("'t2/modle' is no file or folder here: asking 127.0.0.1", logs.output[0])

    def test_no_such_model(self):
        with self.assertRaisesRegex(ValueError, "Not Found"):
            GPT.from_pretrained("nobody/nothing")

    def test_a_name_that_may_be_a_mistyped_folder(self):
        words = "There is no file or folder 't2/modle' here.*pass the folder that holds them"
        with self.assertRaisesRegex(ValueError, words):
            GPT.from_pretrained("t2/modle")

    def test_a_model_without_weights(self):
        self.server.files["/user/empty/resolve/main/config.json"] = b"{}"
        with self.assertRaisesRegex(ValueError, "has no weights at"):
            GPT.from_pretrained("user/empty")

    def test_a_corrupt_file_is_never_loaded(self):
        self.serve("one", "gpt2")
        self.server.moods = [None, "corrupt"]
        self.assertRaisesRegex(ValueError, "SHA-256", GPT.from_pretrained, "gpt2")
        assert_loads(self.theirs, "gpt2")  # the next try begins anew

    def test_a_torn_file_is_never_loaded(self):
        self.serve("one", "gpt2")
        self.server.moods = [None, "cut"]
        with mock.patch("time.sleep"):
            assert_loads(self.theirs, "gpt2")

    def test_what_else_a_model_has_comes_with_it(self):
        for name in ("tokenizer.json", "chat_template.jinja"):
            (self.folder / "one" / name).write_text(f"the {name}")
        self.serve("one", "user/repo")
        folder = find_pretrained("user/repo")
        self.assertEqual((folder / "tokenizer.json").read_text(), "the tokenizer.json")
        self.assertEqual((folder / "chat_template.jinja").read_text(), "the chat_template.jinja")
        self.assertFalse((folder / "merges.txt").exists())

    def test_what_a_model_lacks_is_asked_for_once(self):
        self.serve("one", "user/repo")
        find_pretrained("user/repo")
        self.server.seen.clear()
        find_pretrained("user/repo")
        self.assertEqual(self.server.seen, [])

    def test_a_tokenizer_comes_without_the_weights(self):
        (self.folder / "one" / "tokenizer.json").write_text("{}")
        self.serve("one", "user/repo")
        folder = find_pretrained("user/repo", weights=False)
        self.assertTrue((folder / "tokenizer.json").exists())
        self.assertFalse((folder / "model.safetensors").exists())
        assert_loads(self.theirs, "user/repo")  # they come when they are wanted

    def test_a_cache_of_weights_needs_no_network(self):
        """One that an older version filled does not say what the hub lacks."""
        self.serve("one", "user/repo")
        (find_pretrained("user/repo") / ABSENT).unlink()
        offline = {"HF_ENDPOINT": "http://127.0.0.1:9"}
        with (
            mock.patch.dict(os.environ, offline),
            self.assertLogs("mingpt", "WARNING") as logs,
        ):
            assert_loads(self.theirs, "user/repo")
        self.assertIn("going on without", logs.output[0])

    def test_a_path_is_its_own_place(self):
        self.assertEqual(find_pretrained(self.folder / "one"), self.folder / "one")
        file = self.folder / "one" / "model.safetensors"
        self.assertEqual(find_pretrained(str(file)), file)
