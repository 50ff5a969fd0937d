"""
Benchmarks of byte-pair encoding against tiktoken (GPT-2's) and tokenizers (Llama 3's rules), and
of training a vocabulary against tokenizers.

Encoding and decoding run on one thread on both sides.
"""

import ast
import json
import random
import sysconfig
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from measure import Case, Run
from mingpt import bpe, tokenizer_files, words
from mingpt.checkpoint import write_text
from mingpt.config import CfgNode
from mingpt.utils import import_extra

# ----------------------------------------------------------------------------------------------
# encoding and decoding


def encoding(config: CfgNode) -> Iterator[Case]:
    """From text to ids, with words that are new to the tokenizer and with known ones; and back."""
    for name, text in load_texts(config).items():
        megabytes = len(text.encode()) / 1e6
        is_english = name == "English docstrings"
        yield Case(
            work=f"BPE encoding, {megabytes:.0f} MB of {name}, no word known",
            unit="MB",
            amount=megabytes,
            ours=partial(our_encoding_of_new_words, text),
            peer="tiktoken",
            theirs=partial(their_encoding, text),
            slow=not is_english,
        )
        yield Case(
            work=f"BPE encoding, {megabytes:.0f} MB of {name}, words known",
            unit="MB",
            amount=megabytes,
            ours=partial(our_encoding, text),
            peer="tiktoken",
            theirs=partial(their_encoding, text),
            slow=True,
        )
        if is_english:
            yield Case(
                work=f"BPE encoding by Llama 3's rules, {megabytes:.0f} MB of {name}, words known",
                unit="MB",
                amount=megabytes,
                ours=partial(our_encoding_by_llama3s_rules, text),
                peer="tokenizers",
                theirs=partial(their_encoding_by_llama3s_rules, text),
                slow=True,
            )
        yield Case(
            work=f"BPE decoding, {megabytes:.0f} MB of {name}",
            unit="MB",
            amount=megabytes,
            ours=partial(our_decoding, text),
            peer="tiktoken",
            theirs=partial(their_decoding, text),
            slow=not is_english,
        )


def our_encoding_of_new_words(text: str) -> Run:
    """Encode with an empty cache of words: each word is merged when it is first met."""
    tokenizer = bpe.BPETokenizer()

    def run() -> None:
        tokenizer.words.clear()
        tokenizer.encode(text)

    return run


def our_encoding(text: str) -> Run:
    """Encode with the cache of words as the run before left it; the warm-up run fills it."""
    tokenizer = bpe.BPETokenizer()
    return lambda: tokenizer.encode(text)


def our_encoding_by_llama3s_rules(text: str) -> Run:
    """GPT-2's tokens, words cut as in Llama 3, known from the warm-up run."""
    tokenizer = llama3_tokenizer()
    return lambda: tokenizer.encode(text)


def their_encoding_by_llama3s_rules(text: str) -> Run:
    """The same tokenizer, made from the tokenizer.json that ours writes."""
    tokenizers = import_extra("tokenizers", "bench")
    content = tokenizer_files.to_tokenizer_json(llama3_tokenizer().vocabulary)
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(content))
    return lambda: tokenizer.encode(text)


def llama3_tokenizer() -> bpe.BPETokenizer:
    gpt2 = bpe.BPETokenizer()
    return bpe.BPETokenizer(gpt2.vocab, gpt2.merge_list, words=words.LLAMA3, ignore_merges=True)


def our_decoding(text: str) -> Run:
    """Decode what the same tokenizer has encoded, as a program does.

    With the ids of another one it would take a fifth longer: a dict finds a number faster by being
    the very same object than by being equal.
    """
    tokenizer = bpe.BPETokenizer()
    ids = tokenizer.encode(text)
    return lambda: tokenizer.decode(ids)


def their_encoding(text: str) -> Run:
    tokenizer = tiktoken_gpt2()
    return lambda: tokenizer.encode_ordinary(text)


def their_decoding(text: str) -> Run:
    tokenizer = tiktoken_gpt2()
    ids = bpe.BPETokenizer().encode(text)
    return lambda: tokenizer.decode(ids)


def tiktoken_gpt2():
    """tiktoken's encoder, made from the two files that our tokenizer reads."""
    tiktoken = import_extra("tiktoken", "bench")
    loader = import_extra("tiktoken.load", "bench")
    folder = bpe.gpt2_folder()
    ranks = loader.data_gym_to_mergeable_bpe_ranks(
        str(folder / "vocab.bpe"),
        str(folder / "encoder.json"),
    )
    return tiktoken.Encoding(
        "gpt2",
        pat_str=words.GPT2.expression,
        mergeable_ranks=ranks,
        special_tokens={},
    )


# ----------------------------------------------------------------------------------------------
# training a vocabulary


def vocabulary(config: CfgNode) -> Iterator[Case]:
    """Train a vocabulary of 4,096 tokens on Python source."""
    text = load_texts(config)["Python source"]
    pieces = text.split("\n\n\n")
    yield Case(
        work=f"BPE training, 4,096 tokens from {len(text) / 1e6:.0f} MB of Python source",
        unit="vocabularies",
        amount=1,
        ours=partial(our_vocabulary, pieces),
        peer="tokenizers (all threads)",
        theirs=partial(their_vocabulary, pieces),
    )


def our_vocabulary(pieces: list[str]) -> Run:
    return lambda: bpe.BPETokenizer.train(pieces, 4096)


def their_vocabulary(pieces: list[str]) -> Run:
    tokenizers = import_extra("tokenizers", "bench")
    byte_level = tokenizers.pre_tokenizers.ByteLevel

    def run() -> None:
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
        tokenizer.pre_tokenizer = byte_level(add_prefix_space=False)
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=4095,  # ours has the end-of-text token, too
            show_progress=False,
            initial_alphabet=byte_level.alphabet(),
        )
        tokenizer.train_from_iterator(pieces, trainer)

    return run


# ----------------------------------------------------------------------------------------------
# the texts

# First and last code point of ten scripts.
ALPHABETS = {
    "Cyrillic": (0x430, 0x44F),
    "Greek": (0x3B1, 0x3C9),
    "Hebrew": (0x5D0, 0x5EA),
    "Arabic": (0x627, 0x64A),
    "Chinese": (0x4E00, 0x9FA4),
    "Japanese": (0x3041, 0x3096),
    "Korean": (0xAC00, 0xD7A3),
    "Hindi": (0x905, 0x939),
    "accented Latin": (0xE0, 0xFF),
    "emoji": (0x1F600, 0x1F64F),
}


def load_texts(config: CfgNode) -> dict[str, str]:
    """{name: text}. Kept in a file, because each side of each case needs the same texts."""
    megabytes = 1 if config.quick else config.bpe_megabytes
    path = Path(config.work_dir) / f"texts-{megabytes}.json"
    if not path.exists():
        write_text(path, json.dumps(make_texts(megabytes)))
    return json.loads(path.read_text(encoding="utf-8"))


def make_texts(megabytes: int) -> dict[str, str]:
    """Three texts of so many megabytes: English, Python, and English mixed with ten scripts."""
    # Docstrings are a small part of the source, so read more source than will be kept.
    english, source = read_installed_packages(12 * megabytes * 10**6)
    texts = {
        "English docstrings": english.encode("ascii", "ignore").decode(),
        "Python source": source,
        "mixed scripts": mix_with_foreign_words(english),
    }
    return {name: first_bytes(text, megabytes * 10**6) for name, text in texts.items()}


def first_bytes(text: str, size: int) -> str:
    """The start of a text, as many whole characters as fit into so many bytes of UTF-8."""
    return text.encode()[:size].decode(errors="ignore")


def read_installed_packages(characters: int) -> tuple[str, str]:
    """The docstrings (each once) and the source of installed packages, up to so much source."""
    docstrings: dict[str, None] = {}  # not a set, which forgets the order
    source = []
    size = 0
    for path in sorted(Path(sysconfig.get_paths()["purelib"]).rglob("*.py")):
        code = path.read_text(encoding="utf-8", errors="ignore")
        source.append(code)
        docstrings.update(dict.fromkeys(find_docstrings(code)))
        size += len(code)
        if size > characters:
            break
    return "\n\n".join(docstrings), "".join(source)


def find_docstrings(code: str) -> list[str]:
    """All docstrings of a module, in the order of ast.walk; none if the code does not parse."""
    try:
        tree = ast.parse(code)
    except (SyntaxError, ValueError):
        return []
    docstrings = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            docstring = ast.get_docstring(node)
            if docstring:
                docstrings.append(docstring)
    return docstrings


def mix_with_foreign_words(english: str) -> str:
    """Put a made-up word of one of the ten scripts behind each English word."""
    rng = random.Random(0)
    foreign = []
    for first, last in ALPHABETS.values():
        alphabet = [chr(code_point) for code_point in range(first, last + 1)]
        for _ in range(3000):
            length = rng.randint(1, 7)
            foreign.append("".join(rng.choices(alphabet, k=length)))

    words = english.split(" ")
    pairs = zip(words, rng.choices(foreign, k=len(words)), strict=True)
    return " ".join(f"{word} {foreign_word}" for word, foreign_word in pairs)
