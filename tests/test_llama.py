"""The Llama family against transformers: the same numbers, the same files, both ways."""

import json
import subprocess
import sys
import unittest

import torch
import transformers
from safetensors.torch import load_file as load_safetensors, save_file

from mingpt.chars import CharTokenizer
from mingpt.datasets import Comparisons, Completions, pad_and_mask
from mingpt.heads import ActorCritic, RewardModel, ValueModel
from mingpt.llama import rotate, rotation_angles
from mingpt.model import GPT
from mingpt.rlhf import DPOLoss, PPOTrainer, comparison_loss
from mingpt.trainer import Trainer
from tests.common import ROOT, TempDirTestCase, timeless, tiny_gpt

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

# What the models of the family are made of: (transformers' config, its options).
FAMILY = {
    "llama": (transformers.LlamaConfig, {}),
    "llama, scaled positions": (
        transformers.LlamaConfig,
        {"rope_parameters": {**LLAMA3, "rope_theta": 1000.0}, "tie_word_embeddings": True},
    ),
    "llama, linear positions and biases": (
        transformers.LlamaConfig,
        {
            "rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 500.0},
            "attention_bias": True,
            "num_key_value_heads": 4,
        },
    ),
    "llama, heads of another size": (transformers.LlamaConfig, {"head_dim": 10}),
    "mistral": (transformers.MistralConfig, {"sliding_window": 7}),
    "mistral without a window": (transformers.MistralConfig, {"sliding_window": None}),
    "qwen2": (transformers.Qwen2Config, {"tie_word_embeddings": True, "rms_norm_eps": 1e-5}),
    "qwen2 with a window": (
        transformers.Qwen2Config,
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 0},
    ),
    "qwen3": (transformers.Qwen3Config, {"head_dim": 16}),
    "qwen3 with biases": (transformers.Qwen3Config, {"head_dim": 6, "attention_bias": True}),
}


transformers.utils.logging.disable_progress_bar()


def hugging_face(name="llama", auto=transformers.AutoModelForCausalLM, **options):
    """A random model of transformers', with weights so large that its logits differ."""
    torch.manual_seed(0)
    config_class, own = FAMILY[name]
    config = config_class(**{**SIZES, **own, "initializer_range": 0.2, **options})
    model = auto.from_config(config)
    for parameter_name, p in model.named_parameters():
        if p.dim() == 1:  # norms around 1, biases around 0
            torch.nn.init.normal_(p, mean=float("norm" in parameter_name), std=0.2)
    return model.eval()


def tiny_llama(**options):
    """A tiny Llama of ours, made as tiny_gpt."""
    return tiny_gpt(**{"architecture": "llama", "n_kv_head": 1, "block_size": 16, **options})


def random_idx(B=3, T=40):
    return torch.randint(61, (B, T), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits_of(model, idx):
    return model(idx)[0] if isinstance(model, GPT) else model(idx).logits


class TestAgainstTransformers(TempDirTestCase):
    def check_all(self, check):
        """check(ours, theirs) of every model: transformers', and ours from its files."""
        for name in FAMILY:
            with self.subTest(name):
                theirs = hugging_face(name)
                theirs.save_pretrained(self.folder)
                check(GPT.from_pretrained(self.folder), theirs)

    def check_logits(self, ours, theirs):
        logits = logits_of(theirs, random_idx())
        self.assertGreater(logits.std(), 0.1)
        torch.testing.assert_close(logits_of(ours, random_idx()), logits, atol=1e-4, rtol=0)

    def check_greedy_tokens(self, ours, theirs):
        prompts = random_idx(T=5)
        expected = theirs.generate(
            inputs=prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=50,
            do_sample=False,
        )
        self.assertEqual(expected.shape, (3, 55))
        self.assertEqual(ours.generate(prompts, 50).tolist(), expected.tolist())

    def check_gradients(self, ours, theirs):
        idx = random_idx()
        expected_loss = theirs(idx, labels=idx).loss
        _, loss = ours(idx[:, :-1], idx[:, 1:])
        torch.testing.assert_close(loss, expected_loss)
        expected_loss.backward()
        loss.backward()
        expected = {
            name.replace("model.", "transformer.", 1): p.grad
            for name, p in theirs.named_parameters()
        }
        gradients = {name: p.grad for name, p in ours.named_parameters()}
        torch.testing.assert_close(gradients, expected, atol=1e-5, rtol=1e-3)

    def check_the_way_back(self, ours, theirs):
        ours.save_pretrained(self.folder)
        back = transformers.AutoModelForCausalLM.from_pretrained(self.folder).eval()
        self.check_logits(ours, back)
        expected = theirs.config.model_type
        if expected == "mistral" and theirs.config.sliding_window is None:
            expected = "llama"  # it has nothing that a Llama has not
        self.assertEqual(back.config.model_type, expected)

    def check_our_way_back(self, ours, theirs):
        ours.save_pretrained(self.folder)
        again = GPT.from_pretrained(self.folder)
        self.assertEqual(again.config.to_dict(), ours.config.to_dict())
        torch.testing.assert_close(again.state_dict(), ours.state_dict(), atol=0, rtol=0)

    def test_logits(self):
        self.check_all(self.check_logits)

    def test_greedy_tokens(self):
        self.check_all(self.check_greedy_tokens)

    def test_loss_and_every_gradient(self):
        self.check_all(self.check_gradients)

    def test_the_way_back(self):
        self.check_all(self.check_the_way_back)

    def test_what_was_saved_is_the_same_model(self):
        self.check_all(self.check_our_way_back)


class TestRotaryPositions(unittest.TestCase):
    def test_a_score_depends_on_the_distance_only(self):
        config = tiny_llama(head_size=8).config
        q, k = torch.randn(2, 8)
        scores = []
        for start in (0, 5, 100):
            rotation = rotation_angles(config, torch.tensor([start, start + 3]))
            turned_q = rotate(q.expand(1, 1, 2, 8), rotation)[0, 0, 1]
            turned_k = rotate(k.expand(1, 1, 2, 8), rotation)[0, 0, 0]
            scores.append(turned_q @ turned_k)
        torch.testing.assert_close(scores[1:], [scores[0]] * 2, atol=1e-4, rtol=0)
        self.assertGreater((scores[0] - q @ k).abs(), 1e-3)

    def test_angles_keep_their_precision_in_half_precision(self):
        model = tiny_llama(block_size=70_000).bfloat16()
        idx = torch.randint(11, (1, 4))
        # 65,000 tokens of padding take no position; the real ones begin at 0
        cos, _ = rotation_angles(model.config, torch.tensor([65_000, 65_001]))
        self.assertEqual(cos.dtype, torch.float32)
        self.assertGreater((cos[0, 0] - cos[1, 0]).abs(), 0.1)
        self.assertEqual(model(idx)[0].dtype, torch.bfloat16)

    def test_generate_does_not_slide(self):
        model = tiny_llama(block_size=12)
        idx = torch.ones(1, 4, dtype=torch.long)
        self.assertEqual(model.generate(idx, 9).shape, (1, 13))  # the last one is not read
        for mask in (None, torch.ones_like(idx)):
            with self.assertRaisesRegex(ValueError, "4 tokens and 10 new ones do not fit into"):
                model.generate(idx, 10, attention_mask=mask)


class TestOptions(unittest.TestCase):
    def test_defaults_are_those_of_the_first_llama(self):
        config = tiny_gpt(architecture="llama").config
        self.assertEqual(config.n_kv_head, 2)
        self.assertEqual(config.n_inner, 48)  # 8/3 of 16 is 43
        self.assertEqual(config.head_size, 8)
        self.assertEqual(config.rope_theta, 10000.0)
        self.assertEqual(config.norm_eps, 1e-5)
        self.assertFalse(config.attention_bias or config.output_bias or config.query_key_norm)

    def test_wrong_ones_are_refused(self):
        for options, words in (
            ({"n_kv_head": 3}, "n_head=2 is not divisible by n_kv_head=3"),
            ({"n_kv_head": 0}, "n_kv_head=0"),
            ({"head_size": 7}, "head_size=7 is odd"),
            ({"n_embd": 15}, "n_embd=15 is not divisible by n_head=2"),
            ({"sliding_window": 0}, "sliding_window=0"),
            ({"rope_theta": -1.0}, "rope_theta=-1.0"),
            ({"norm_eps": 2}, "norm_eps=2"),
            ({"attention_bias": "False"}, "attention_bias='False' must be True or False"),
            ({"output_bias": True}, "no model of the family has attention_bias=False, output_bias"),
            ({"attention_bias": True, "query_key_norm": True}, "leave out one of them"),
            ({"rope_scaling": 2.0}, "rope_scaling=2.0 must be a dict"),
            ({"rope_scaling": {"rope_type": "yarn"}}, "rope_type='yarn'; ours are default"),
            ({"rope_scaling": {"type": "linear"}}, r"lacks \['factor'\]"),
            ({"rope_scaling": {"type": "linear", "factor": -1}}, "factor=-1"),
            (
                {"rope_scaling": {**LLAMA3, "high_freq_factor": 1.0}},
                "must have low_freq_factor < high_freq_factor",
            ),
            ({"architecture": "gpt2"}, "n_kv_head=1 is an option of architecture='llama'"),
            ({"architecture": "bert"}, "architecture='bert' is unknown; choose from gpt2, llama"),
        ):
            with self.subTest(options), self.assertRaisesRegex(ValueError, words):
                tiny_llama(**options)

    def test_a_config_without_them_is_of_a_gpt2(self):
        """One that was saved before there were architectures."""
        model = tiny_gpt()
        old = model.config.to_dict()
        del old["architecture"], old["n_kv_head"]
        config = GPT.get_default_config()
        for name in ("architecture", "n_kv_head"):
            delattr(config, name)
        config.merge_from_dict(old)
        self.assertEqual(GPT(config).config.architecture, "gpt2")


class TestFiles(TempDirTestCase):
    def setUp(self):
        super().setUp()
        self.theirs = hugging_face()
        self.theirs.save_pretrained(self.folder)
        self.config_path = self.folder / "config.json"

    def assert_loads(self, path=None, expected=None, **options):
        ours = GPT.from_pretrained(self.folder if path is None else path, **options)
        logits = logits_of(self.theirs if expected is None else expected, random_idx())
        torch.testing.assert_close(logits_of(ours, random_idx()), logits, atol=1e-4, rtol=0)

    def change_config(self, **options):
        config = json.loads(self.config_path.read_text())
        config = {name: value for name, value in {**config, **options}.items() if value != "gone"}
        self.config_path.write_text(json.dumps(config))

    def test_shards(self):
        self.theirs.save_pretrained(self.folder / "shards", max_shard_size="20KB")
        self.assertTrue((self.folder / "shards" / "model.safetensors.index.json").exists())
        self.assert_loads(self.folder / "shards")

    def test_a_bare_trunk_with_a_tied_head(self):
        theirs = hugging_face(tie_word_embeddings=True)
        theirs.model.save_pretrained(self.folder)
        self.assert_loads(expected=theirs)

    def test_half_precision_becomes_fp32_or_is_kept(self):
        for dtype in (torch.bfloat16, torch.float16):
            theirs = hugging_face().to(dtype)
            theirs.save_pretrained(self.folder)
            rounded = hugging_face()  # not theirs.float(): its positions stay rounded as well
            rounded.load_state_dict(theirs.state_dict())
            with self.subTest(dtype):
                self.assert_loads(expected=rounded)
                kept = GPT.from_pretrained(self.folder, dtype=dtype)
                self.assertEqual({p.dtype for p in kept.parameters()}, {dtype})
                converted = GPT.from_pretrained(self.folder)
                state = {name: p.to(dtype) for name, p in converted.state_dict().items()}
                torch.testing.assert_close(kept.state_dict(), state, atol=0, rtol=0)

    def test_a_model_in_half_precision_generates(self):
        model = GPT.from_pretrained(self.folder, dtype=torch.bfloat16)
        idx, log_probs = model.generate(random_idx(2, 4), 6, return_log_probs=True)
        expected = model.log_probs(idx)[:, 3:]
        self.assertLess((log_probs - expected).abs().max(), 0.1)

    def test_dtype_must_be_a_type_of_floats(self):
        for dtype in (torch.int8, "bf16", None):
            with self.subTest(dtype), self.assertRaisesRegex(ValueError, "dtype=.* type of floats"):
                GPT.from_pretrained(self.folder, dtype=dtype)

    def test_what_was_saved_in_half_precision_stays_so(self):
        GPT.from_pretrained(self.folder, dtype=torch.bfloat16).save_pretrained(self.folder / "bf16")
        tensors = load_safetensors(self.folder / "bf16" / "model.safetensors")
        self.assertEqual({tensor.dtype for tensor in tensors.values()}, {torch.bfloat16})

    def test_frequencies_among_the_weights_are_skipped(self):
        tensors = load_safetensors(self.folder / "model.safetensors")
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        save_file(tensors, self.folder / "model.safetensors")
        self.assert_loads()

    def test_positions_as_configs_had_them_until_2025(self):
        theirs = hugging_face(rope_parameters={**LLAMA3, "rope_theta": 500.0})
        theirs.save_pretrained(self.folder)
        self.change_config(rope_parameters="gone", rope_scaling=LLAMA3, rope_theta=500.0)
        self.assert_loads(expected=theirs)
        self.assertEqual(GPT.from_pretrained(self.folder).config.rope_scaling, LLAMA3)

    def test_heads_and_positions_that_a_config_leaves_out(self):
        self.change_config(
            head_dim="gone", rope_parameters="gone", rms_norm_eps="gone", hidden_act="gone"
        )
        self.assert_loads()

    def test_options_of_the_caller_come_first(self):
        config = GPT.from_pretrained(self.folder, attn_pdrop=0.25, block_size=48).config
        self.assertEqual((config.attn_pdrop, config.block_size, config.resid_pdrop), (0.25, 48, 0))

    def test_a_checkpoint_of_a_trainer(self):
        ours = GPT.from_pretrained(self.folder)
        config = Trainer.get_default_config()
        work_dir = self.folder / "run"
        config.merge_from_dict({"max_iters": 1, "work_dir": str(work_dir), "device": "cpu"})
        rows = list(zip(random_idx(64, 8), random_idx(64, 8), strict=True))
        Trainer(config, ours, rows).run()
        self.assert_loads(work_dir / "checkpoint.pt", expected=ours.eval())

    def test_bare_weights_do_not_tell_the_options(self):
        ours = GPT.from_pretrained(self.folder)
        path = self.folder / "bare.pt"
        torch.save(ours.state_dict(), path)
        self.config_path.unlink()
        words = r"pass \['n_head', 'block_size', 'rope_theta', 'norm_eps'\]"
        self.assertRaisesRegex(ValueError, words, GPT.from_pretrained, path)
        options = {"n_head": 4, "n_kv_head": 2, "block_size": 64}
        self.assert_loads(path, rope_theta=10000.0, norm_eps=1e-6, **options)

    def test_loading_takes_the_memory_of_the_model_and_one_tensor(self):
        program = """
import sys, torch
from mingpt.model import GPT
from mingpt.utils import peak_memory_mb
GPT.from_pretrained(sys.argv[2])
before = peak_memory_mb()
model = GPT.from_pretrained(sys.argv[1])
sizes = [p.nbytes / 2**20 for p in model.parameters()]
print(peak_memory_mb() - before, sum(sizes), max(sizes))
"""
        options = {"n_embd": 512, "n_layer": 6, "vocab_size": 20_000, "n_head": 8}
        tiny_llama(**options).bfloat16().save_pretrained(self.folder / "large")
        command = [sys.executable, "-c", program, self.folder / "large", self.folder]
        out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
        peak, model, largest = map(float, out.split())
        self.assertGreater(model, 100)
        self.assertLess(peak, model + largest)


class TestSpecialTokens(TempDirTestCase):
    def files(self, **tokens):
        theirs = hugging_face()
        theirs.save_pretrained(self.folder)
        for file, ids in tokens.items():
            path = self.folder / f"{file}.json"
            path.write_text(json.dumps({**json.loads(path.read_text()), **ids}))
        return GPT.from_pretrained(self.folder)

    def test_a_model_that_was_not_loaded_has_none(self):
        self.assertEqual(tiny_llama().stop_tokens, [])

    def test_generation_config_comes_before_config(self):
        chat = {"eos_token_id": [5, 9], "pad_token_id": 7}
        model = self.files(config={"eos_token_id": 5, "bos_token_id": 1}, generation_config=chat)
        self.assertEqual(model.stop_tokens, [5, 9])
        expected = {"bos_token_id": 1, "eos_token_id": [5, 9], "pad_token_id": 7}
        self.assertEqual(model.special_tokens, expected)

    def test_config_alone(self):
        self.assertEqual(self.files(config={"eos_token_id": 5}).stop_tokens, [5])

    def test_ids_that_the_vocabulary_lacks_are_none(self):
        model = self.files(config={"eos_token_id": [5, 61], "pad_token_id": -1})
        self.assertEqual(model.special_tokens, {"eos_token_id": [5]})

    def test_they_are_saved_for_both_libraries(self):
        model = self.files(config={"eos_token_id": [5, 9], "bos_token_id": 1, "pad_token_id": 7})
        model.save_pretrained(self.folder / "again")
        again = GPT.from_pretrained(self.folder / "again")
        self.assertEqual(again.special_tokens, model.special_tokens)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(self.folder / "again")
        self.assertEqual(theirs.generation_config.eos_token_id, [5, 9])
        self.assertEqual(theirs.generation_config.pad_token_id, 7)
        self.assertEqual(theirs.config.bos_token_id, 1)

    def test_without_any_transformers_gets_none(self):
        tiny_llama().save_pretrained(self.folder)
        config = transformers.AutoConfig.from_pretrained(self.folder)
        self.assertIsNone(config.eos_token_id)
        self.assertIsNone(config.bos_token_id)

    def test_a_pad_token_that_ends_a_text_is_not_saved(self):
        model = self.files(config={"eos_token_id": 5, "pad_token_id": 5})
        model.save_pretrained(self.folder / "again")
        config = json.loads((self.folder / "again" / "config.json").read_text())
        self.assertIsNone(config.get("pad_token_id"))

    def test_those_of_an_older_model_in_the_folder_go(self):
        self.files(generation_config={"eos_token_id": [5, 9]})
        tiny_llama().save_pretrained(self.folder)
        self.assertEqual(GPT.from_pretrained(self.folder).stop_tokens, [])

    def test_the_models_made_from_it_have_them_too(self):
        model = self.files(config={"eos_token_id": [5, 9], "pad_token_id": 7})
        self.assertEqual(RewardModel.from_gpt(model).special_tokens, model.special_tokens)


class TestRefusals(TempDirTestCase):
    """A config that says something that we do not do is refused, with its name."""

    def setUp(self):
        super().setUp()
        hugging_face().save_pretrained(self.folder)

    def assert_refused(self, words, **options):
        path = self.folder / "config.json"
        before = path.read_text()
        path.write_text(json.dumps({**json.loads(before), **options}))
        with self.subTest(options), self.assertRaisesRegex(ValueError, words):
            GPT.from_pretrained(self.folder)
        path.write_text(before)

    def test_other_architectures(self):
        for model_type in ("mixtral", "qwen3_moe", "gemma2", "phi3", 3):
            self.assert_refused(f"model_type={model_type!r}; ours are", model_type=model_type)

    def test_what_the_trunk_does_not_do(self):
        self.assert_refused("hidden_act='gelu'; our Llama needs 'silu'", hidden_act="gelu")
        self.assert_refused("mlp_bias=True", mlp_bias=True)
        self.assert_refused("num_local_experts=8", num_local_experts=8)
        self.assert_refused("quantization_config={'bits': 4}", quantization_config={"bits": 4})
        self.assert_refused("partial_rotary_factor=0.5", partial_rotary_factor=0.5)

    def test_unknown_positions(self):
        for kind in ("yarn", "longrope", "dynamic", None):
            rope = {"rope_type": kind, "factor": 2.0, "rope_theta": 10000.0}
            self.assert_refused(f"rope_type={kind!r}; ours are default", rope_parameters=rope)
        self.assert_refused("expected a JSON object", rope_parameters=[1])
        partial = {"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 0.25}
        self.assert_refused("partial_rotary_factor=0.25", rope_parameters=partial)

    def test_layers_that_differ(self):
        hugging_face("qwen2").save_pretrained(self.folder)
        kinds = ["full_attention", "sliding_attention"]
        window = {"use_sliding_window": True, "sliding_window": 4}
        words = r"layers of the kinds \['full_attention', 'sliding_attention'\]"
        self.assert_refused(words, layer_types=kinds, **window)
        self.assert_refused(words, layer_types=None, max_window_layers=1, **window)

    def test_sizes_that_the_tensors_do_not_have(self):
        self.assert_refused("{'n_layer': 3} in its config", num_hidden_layers=3)
        self.assert_refused("{'n_inner': 41} in its config", intermediate_size=41)
        self.assert_refused("q_proj.weight as .*expected floats of shape", head_dim=16)
        self.assert_refused("num_attention_heads|n_head='4'", num_attention_heads="4")

    def test_what_no_machine_could_build(self):
        for name in ("num_attention_heads", "num_key_value_heads", "head_dim"):
            self.assert_refused("and its queries have 32 rows", **{name: 10**30})

    def test_layers_that_are_none(self):
        hugging_face("qwen2").save_pretrained(self.folder)
        window = {"use_sliding_window": True, "sliding_window": 4}
        for kinds in (3, True, [[]], [3]):
            self.assert_refused("expected a list of names", layer_types=kinds, **window)
        words = "max_window_layers='a'"
        self.assert_refused(words, layer_types=None, max_window_layers="a", **window)

    def test_damaged_options(self):
        self.assert_refused("rope_theta='a'", rope_parameters={"rope_theta": "a"})
        self.assert_refused("norm_eps=-1", rms_norm_eps=-1)
        self.assert_refused("tie_weights=2", tie_word_embeddings=2)

    def test_another_model_than_the_config_says(self):
        tiny_gpt().save_pretrained(self.folder / "gpt2")
        config = (self.folder / "config.json").read_text()
        (self.folder / "gpt2" / "config.json").write_text(config)
        with self.assertRaisesRegex(ValueError, "is not a Llama, which has matrices embed_tokens"):
            GPT.from_pretrained(self.folder / "gpt2")

    def test_tensors_that_are_missing_or_too_many(self):
        path = self.folder / "model.safetensors"
        tensors = load_safetensors(path)
        bias = {"model.layers.0.mlp.up_proj.bias": torch.zeros(40)}
        save_file({**tensors, **bias}, path)
        with self.assertRaisesRegex(ValueError, "unexpected .'transformer.layers.0.mlp.up_proj.b"):
            GPT.from_pretrained(self.folder)
        del tensors["model.norm.weight"]
        save_file(tensors, path)
        with self.assertRaisesRegex(ValueError, "missing .'transformer.norm.weight'"):
            GPT.from_pretrained(self.folder)

    def test_many_layers_that_are_nearly_empty(self):
        path = self.folder / "model.safetensors"
        tensors = load_safetensors(path)
        for i in range(2, 3000):
            tensors[f"model.layers.{i}.input_layernorm.weight"] = torch.ones(32)
        save_file(tensors, path)
        with self.assertRaisesRegex(ValueError, "names 3000 layers and holds only"):
            GPT.from_pretrained(self.folder)


class TestScalarModels(TempDirTestCase):
    """Reward models as transformers' sequence classifiers, value models as its token classifiers.
    """

    def setUp(self):
        super().setUp()
        self.idx, self.mask = pad_and_mask([torch.randint(1, 11, (n,)) for n in (9, 4, 6)])
        self.idx[~self.mask] = 0

    def check_all(self, cls, check):
        """check(model) of each architecture, with a random head and 0 as pad token, saved before.
        """
        for gpt in (tiny_gpt(), tiny_llama(), tiny_llama(query_key_norm=True, tie_weights=False)):
            with self.subTest(gpt.config.architecture, norm=gpt.config.query_key_norm):
                model = cls.from_gpt(gpt)
                torch.nn.init.normal_(model.head.weight)
                torch.nn.init.constant_(model.head.bias, 0.7)
                model.special_tokens = {"eos_token_id": 3, "pad_token_id": 0}
                model.save_pretrained(self.folder)
                check(model)

    def theirs(self, auto):
        """The saved model as transformers loads it, with every weight found."""
        model, info = auto.from_pretrained(self.folder, output_loading_info=True)
        self.assertFalse(info["missing_keys"] or info["unexpected_keys"])
        return model.eval()

    def test_a_reward_model_is_a_sequence_classifier_up_to_its_bias(self):
        def check(model):
            theirs = self.theirs(transformers.AutoModelForSequenceClassification)
            scores = theirs(self.idx, attention_mask=self.mask.long()).logits[:, 0]
            expected = model(self.idx, self.mask)
            torch.testing.assert_close(scores + 0.7, expected, atol=1e-5, rtol=1e-5)

        self.check_all(RewardModel, check)

    def test_a_value_model_is_a_token_classifier(self):
        def check(model):
            theirs = self.theirs(transformers.AutoModelForTokenClassification)
            values = theirs(self.idx, attention_mask=self.mask.long()).logits[:, :, 0]
            expected = model(self.idx, self.mask)[self.mask]
            torch.testing.assert_close(values[self.mask], expected, atol=1e-5, rtol=1e-5)

        self.check_all(ValueModel, check)

    def test_there_and_back(self):
        def check(model):
            loaded = type(model).from_pretrained(self.folder)
            torch.testing.assert_close(loaded.state_dict(), model.state_dict(), atol=0, rtol=0)
            self.assertEqual(loaded.special_tokens, model.special_tokens)

        for cls in (RewardModel, ValueModel):
            self.check_all(cls, check)

    def test_a_value_function_may_start_as_a_saved_reward_model(self):
        def check(model):
            values = ValueModel.from_pretrained(self.folder)(self.idx[:1])
            torch.testing.assert_close(values[:, -1], model(self.idx[:1]))

        self.check_all(RewardModel, check)

    def test_reward_models_of_transformers_and_trl(self):
        auto = transformers.AutoModelForSequenceClassification
        for name in ("llama", "qwen3"):
            theirs = hugging_face(name, auto, num_labels=1, pad_token_id=0)
            theirs.save_pretrained(self.folder)
            ours = RewardModel.from_pretrained(self.folder)
            scores = theirs(self.idx, attention_mask=self.mask.long()).logits[:, 0]
            with self.subTest(name):
                self.assertGreater(scores.std(), 0.1)
                torch.testing.assert_close(ours(self.idx, self.mask), scores, atol=1e-4, rtol=0)

    def test_a_classifier_of_several_labels_is_refused(self):
        auto = transformers.AutoModelForSequenceClassification
        hugging_face("llama", auto, num_labels=3).save_pretrained(self.folder)
        with self.assertRaisesRegex(ValueError, r"head.weight as .* \(3, 32\)"):
            RewardModel.from_pretrained(self.folder)

    def test_a_damaged_head_bias_is_refused(self):
        RewardModel.from_gpt(tiny_llama()).save_pretrained(self.folder)
        path = self.folder / "config.json"
        config = json.loads(path.read_text())
        for bias in ("0", None, True):
            path.write_text(json.dumps({**config, "head_bias": bias}))
            with self.subTest(bias), self.assertRaisesRegex(ValueError, "head_bias=.*not a number"):
                RewardModel.from_pretrained(self.folder)

    def test_folders_that_were_written_before(self):
        """With head.weight and head.bias, and no class of transformers'."""
        for cls in (RewardModel, ValueModel):
            model = cls.from_gpt(tiny_gpt())
            torch.nn.init.normal_(model.head.bias)
            model.save_pretrained(self.folder)
            config = json.loads((self.folder / "config.json").read_text())
            for new in ("head_bias", "id2label", "label2id"):
                config.pop(new, None)
            config["architectures"] = [cls.__name__]
            (self.folder / "config.json").write_text(json.dumps(config))
            state = {
                name: p.t().contiguous() if ".c_" in name and p.dim() == 2 else p
                for name, p in model.state_dict().items()
            }
            save_file(state, self.folder / "model.safetensors")
            with self.subTest(cls.__name__):
                loaded = cls.from_pretrained(self.folder).state_dict()
                torch.testing.assert_close(loaded, model.state_dict(), atol=0, rtol=0)

    def test_a_language_model_has_no_head_for_them(self):
        tiny_llama().save_pretrained(self.folder)
        with self.assertRaisesRegex(ValueError, "missing .*head.weight.* use from_gpt"):
            RewardModel.from_pretrained(self.folder)


class TestTraining(TempDirTestCase):
    """SFT, reward model, DPO and PPO of a tiny Llama."""

    TOKENIZER = CharTokenizer("abcdefghij")

    def train(self, model, data, loss_fn=None):
        config = Trainer.get_default_config()
        config.merge_from_dict(
            {"max_iters": 20, "batch_size": 8, "learning_rate": 1e-2, "device": "cpu"}
        )
        losses = []
        trainer = Trainer(config, model, data, loss_fn=loss_fn, collate_fn=data.collate)
        trainer.add_callback("on_batch_end", lambda trainer: losses.append(trainer.loss.item()))
        trainer.run()
        self.assertLess(losses[-1], 0.7 * losses[0])

    def test_sft(self):
        rows = [{"prompt": "ab", "completion": "cde"}] * 32
        self.train(tiny_llama(), Completions(rows, self.TOKENIZER, 16))

    def test_comparisons(self):
        rows = [{"prompt": "ab", "chosen": "cde", "rejected": "fg"}] * 32
        data = Comparisons(rows, self.TOKENIZER, 16)
        self.train(RewardModel.from_gpt(tiny_llama()), data, comparison_loss)
        policy = tiny_llama()
        self.train(ActorCritic(policy), data, DPOLoss(policy))

    def ppo(self, folder, max_iters, **options):
        config = PPOTrainer.get_default_config()
        config.merge_from_dict(
            {
                "device": "cpu",
                "batch_size": 8,
                "max_new_tokens": 6,
                "group_size": 2,
                "stop_token": 0,
                "max_iters": max_iters,
                "learning_rate": 3e-3,
                "work_dir": str(folder),
                **options,
            }
        )
        policy = tiny_llama(embd_pdrop=0.3, resid_pdrop=0.3, attn_pdrop=0.3)
        reward = RewardModel.from_gpt(tiny_llama(seed=1, query_key_norm=True)).eval()
        trainer = PPOTrainer(config, policy, reward, [[1], [4, 2, 5]])
        trainer.run()
        return trainer.model.state_dict(), timeless(folder)

    def test_ppo_starts_at_ratio_one_and_resumes_exactly(self):
        weights, rows = self.ppo(self.folder / "uninterrupted", 3)
        self.ppo(self.folder / "resumed", 1)
        resumed = self.ppo(self.folder / "resumed", 3)
        torch.testing.assert_close(resumed[0], weights, atol=0, rtol=0)
        self.assertEqual(resumed[1], rows)
        self.assertTrue(all(row["log_prob_error"] < 1e-4 for row in rows))
        self.assertLess(abs(rows[0]["objective/kl"]), 1e-4)
        self.assertGreater(abs(rows[-1]["objective/kl"]), 1e-4)  # and it did learn
