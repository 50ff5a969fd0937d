"""
Benchmarks of byte-pair encoding: against tiktoken, and in training a vocabulary against tokenizers. Each on one thread.
"""

import ast
import json
import random
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from measure import Case
from mingpt import bpe
from mingpt.checkpoint import write_text
from mingpt.config import CfgNode as CN
from mingpt.utils import import_extra

# Cyrillic, Greek, Hebrew, Arabic, Chinese, Japanese, Korean, Hindi, accented Latin, emoji
ALPHABETS = [range(a, b) for a, b in ((0x430, 0x450), (0x3B1, 0x3CA), (0x5D0, 0x5EB), (0x627, 0x64B), (0x4E00, 0x9FA5), (0x3041, 0x3097),
                                      (0xAC00, 0xD7A4), (0x905, 0x93A), (0xE0, 0x100), (0x1F600, 0x1F650))]


def texts(C: CN) -> dict[str, str]:
    """Texts of so many megabytes each, kept in a file, since every side of every row reads them."""
    megabytes = 1 if C.quick else C.bpe_megabytes
    path = Path(C.work_dir) / f"texts-{megabytes}.json"
    if not path.exists():
        write_text(path, json.dumps(make_texts(megabytes)))
    return json.loads(path.read_text(encoding="utf-8"))


def make_texts(megabytes: int) -> dict[str, str]:
    """English (the docstrings of the installed packages, each once), Python source, and English mixed with ten scripts."""
    docstrings, source, size, rng = {}, [], 0, random.Random(0)
    for path in sorted(Path(sysconfig.get_paths()["purelib"]).rglob("*.py")):
        code = path.read_text(encoding="utf-8", errors="ignore")
        source.append(code)
        size += len(code)
        try:
            nodes = ast.walk(ast.parse(code))
        except (SyntaxError, ValueError):
            continue
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        docstrings |= {ast.get_docstring(node): None for node in nodes if isinstance(node, kinds)}
        if size > 12 * megabytes * 10**6:
            break
    english = "\n\n".join(filter(None, docstrings))
    foreign = ["".join(map(chr, rng.choices(alphabet, k=rng.randint(1, 7)))) for alphabet in ALPHABETS for _ in range(3000)]
    mixed = " ".join(word for pair in zip(english.split(" "), rng.choices(foreign, k=english.count(" ") + 1)) for word in pair)
    cut = lambda text: text.encode()[:megabytes * 10**6].decode(errors="ignore")
    return {"English docstrings": cut(english.encode("ascii", "ignore").decode()), "Python source": cut("".join(source)), "mixed scripts": cut(mixed)}


def tiktoken_gpt2():
    """tiktoken's encoder on the same two files."""
    tiktoken, load = import_extra("tiktoken", "bench"), import_extra("tiktoken.load", "bench")
    ranks = load.data_gym_to_mergeable_bpe_ranks(*(str(bpe.gpt2_folder() / file) for file in ("vocab.bpe", "encoder.json")))
    return tiktoken.Encoding("gpt2", pat_str=bpe.SPLIT.pattern, mergeable_ranks=ranks, special_tokens={})


def forgetful(text: str):
    """Encoding with all that was learned from earlier runs forgotten."""
    tokenizer = bpe.BPETokenizer()

    def run():
        tokenizer.words.clear()
        tokenizer.encode(text)
    return run


def encoding(C: CN) -> Iterator[Case]:
    """From text to ids, new words and known ones, and back."""
    for name, text in texts(C).items():
        size = len(text.encode()) / 1e6
        theirs = lambda text=text: lambda encode=tiktoken_gpt2().encode_ordinary: encode(text)
        yield Case(f"BPE encoding, {size:.0f} MB of {name}, no word known", "MB", size, lambda text=text: forgetful(text), "tiktoken", theirs,
                   slow=name != "English docstrings")
        yield Case(f"BPE encoding, {size:.0f} MB of {name}, words known", "MB", size,
                   lambda text=text: lambda encode=bpe.BPETokenizer().encode: encode(text), "tiktoken", theirs, slow=True)
        ids = cache(lambda text=text: bpe.BPETokenizer().encode(text))
        yield Case(f"BPE decoding, {size:.0f} MB of {name}", "MB", size,
                   lambda ids=ids: lambda decode=bpe.BPETokenizer().decode, ids=ids(): decode(ids), "tiktoken",
                   lambda ids=ids: lambda decode=tiktoken_gpt2().decode, ids=ids(): decode(ids), slow=name != "English docstrings")


def vocabulary(C: CN) -> Iterator[Case]:
    """Training a vocabulary of 4,096 tokens."""
    text = texts(C)["Python source"]
    pieces = text.split("\n\n\n")

    def theirs():
        tokenizers = import_extra("tokenizers", "bench")

        def run():
            tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
            tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
            tokenizer.train_from_iterator(pieces, tokenizers.trainers.BpeTrainer(
                vocab_size=4095, show_progress=False, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
        return run

    yield Case(f"BPE training, 4,096 tokens from {len(text) / 1e6:.0f} MB of Python source", "vocabularies", 1,
               lambda: lambda: bpe.BPETokenizer.train(pieces, 4096), "tokenizers (all threads)", theirs)
