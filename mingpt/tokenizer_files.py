"""
Vocabularies of other people's tokenizers: out of tokenizer.json and GGUF files, and back.

`BPETokenizer.from_pretrained` calls `read_tokenizer_json` or `from_gguf`. What they return is a
`Vocabulary`: the tokens and merges of byte-level BPE, the rule that cuts a text into words, and the
added tokens, which stand outside of BPE. These come first here, since they have rules of their own.

Byte-level BPE is what GPT-2, SmolLM, Llama 3 and Qwen2 have. Every other kind of tokenizer is
refused, and so is every setting that would change the tokens and that we do not compute.

Source: the package `tokenizers` for the format and for what its settings mean.
"""

import json
import re
import unicodedata
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import regex

from mingpt.checkpoint import read_json
from mingpt.words import GPT2, LLAMA3, QWEN2, SMOLLM, WORD_RULES, WordRule, byte_level_step

# What to do about a tokenizer that is not read here.
WAY_OUT = (
    "Use transformers' own instead: AutoTokenizer.from_pretrained(folder). "
    "Any tokenizer with encode and decode works everywhere in this library"
)

# --------------------------------------------------------------------------------------------------
# Added tokens


@dataclass(frozen=True)
class AddedToken:
    """A token that is found in the text before BPE sees it, "<|im_end|>" for instance.

    content: how it stands in the text. special: it steers the model, so it must not be found in the
    text of a user. lstrip, rstrip: it swallows the whitespace before or behind it. single_word: it
    does not count as a part of a longer word. normalized: it is looked for in the text after its
    normalisation, and not before.
    """

    content: str
    id: int
    special: bool = True
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False


class AddedTokens:
    """Cuts a text at the added tokens. normalize: whether the text is brought to Unicode's NFC."""

    def __init__(self, tokens: Iterable[AddedToken], normalize: bool = False):
        self.tokens = tuple(tokens)
        self.normalize = normalize
        self.has_ordinary = any(not token.special for token in self.tokens)
        self.raw = Finder(token for token in self.tokens if not token.normalized)
        self.normalized = Finder(
            (token for token in self.tokens if token.normalized),
            nfc if normalize else str,
        )

    def split(self, text: str, allowed: Collection[str]) -> list[str | int]:
        """The ids of the added tokens in a text, and what is between them, normalised.

        Of the special ones, only those in `allowed` are found.
        """
        pieces: list[str | int] = []
        for piece in self.raw.split(text, allowed):
            if isinstance(piece, int):
                pieces.append(piece)
                continue
            if self.normalize:
                piece = nfc(piece)
            pieces += self.normalized.split(piece, allowed)
        return pieces


class Finder:
    """Finds some added tokens in a text, the way that the package `tokenizers` does.

    From left to right, and of several that begin at the same place the longest. A token that is
    found and does not count (a special one that is not allowed, or a part of a longer word) still
    hides those inside it.
    """

    def __init__(self, tokens: Iterable[AddedToken], normalize: Any = str):
        self.by_content = {normalize(token.content): token for token in tokens if token.content}
        longest_first = sorted(self.by_content, key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, longest_first)))

    def split(self, text: str, allowed: Collection[str]) -> list[str | int]:
        """The ids of the tokens in a text, and the texts between them."""
        if not self.by_content:
            return [text] if text else []
        pieces: list[str | int] = []
        done = 0  # text[:done] is in pieces
        for match in self.pattern.finditer(text):
            token = self.by_content[match.group()]
            start, end = match.span()
            if token.special and token.content not in allowed:
                continue
            if token.single_word and is_inside_word(text, start, end):
                continue
            if token.lstrip:
                while start > done and SPACE.match(text, start - 1):
                    start -= 1
            if token.rstrip:
                while SPACE.match(text, end):
                    end += 1
            if done < start:
                pieces.append(text[done:start])
            pieces.append(token.id)
            done = end
        if done < len(text):
            pieces.append(text[done:])
        return pieces


SPACE = regex.compile(r"\s")  # of `regex`, since that of `re` also matches \x1c to \x1f
WORD_CHARACTER = regex.compile(r"\w")


def is_inside_word(text: str, start: int, end: int) -> bool:
    """Whether a letter, digit or underscore touches text[start:end]."""
    neighbours = text[max(0, start - 1):start] + text[end:end + 1]
    return WORD_CHARACTER.search(neighbours) is not None


def nfc(text: str) -> str:
    """The text in Unicode's normal form C: "e" and an accent become "é"."""
    return text if text.isascii() else unicodedata.normalize("NFC", text)


# --------------------------------------------------------------------------------------------------
# A vocabulary, and the files that hold one


@dataclass(frozen=True)
class Vocabulary:
    """All that byte-level BPE needs to know.

    vocab: {token: id}, added tokens included. merges: [(left, right), ...] in the order of
    learning. token_names: the tokens with a part to play, by transformers' names:
    {"eos_token": "<|im_end|>", ...}.
    """

    vocab: dict[str, int]
    merges: list[tuple[str, str]]
    added_tokens: tuple[AddedToken, ...] = ()
    words: WordRule = GPT2
    # The token that takes the place of a byte which has none; without it, such bytes are left out.
    unknown: str | None = None
    # Whether a text is first brought to Unicode's normal form C.
    normalize: bool = False
    # Whether a word that is itself a token becomes that token, whatever the merges say.
    ignore_merges: bool = False
    token_names: dict[str, str] = field(default_factory=dict)


TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")


def read_tokenizer_json(path: Path) -> Vocabulary:
    """The vocabulary in a tokenizer.json and in the tokenizer_config.json beside it.

    Raises ValueError for damaged files, and for any tokenizer that is not a byte-level BPE or has
    a setting that we do not compute.
    """
    content = read_json(path)
    try:
        return vocabulary_of(path, content)
    except (TypeError, AttributeError, KeyError, RecursionError) as error:
        # Something in it is no dict or no list where the format has one.
        raise ValueError(f"{path} is damaged; expected a tokenizer ({error})") from None


def vocabulary_of(path: Path, content: dict[str, Any]) -> Vocabulary:
    """The vocabulary in the content of a tokenizer.json, at this path."""
    model = content["model"]
    check_model(path, model)
    words = rule_of(path, flat_steps(content.get("pre_tokenizer"), "pretokenizers"))
    normalizers = flat_steps(content.get("normalizer"), "normalizers")
    for step in [*normalizers, *flat_steps(content.get("decoder"), "decoders")]:
        if step.get("type") not in ("NFC", "ByteLevel"):
            raise refusal(path, step)
    added_tokens = tuple(read_added_token(path, entry) for entry in content.get("added_tokens", []))
    vocab = dict(model["vocab"].items()) | {token.content: token.id for token in added_tokens}
    if not all(type(i) is int and i >= 0 for i in vocab.values()):
        raise ValueError(f"{path} is no vocabulary; expected whole numbers as ids")
    return Vocabulary(
        vocab=vocab,
        merges=[read_merge(path, merge) for merge in model["merges"]],
        added_tokens=added_tokens,
        words=words,
        unknown=model.get("unk_token"),
        normalize=bool(normalizers),
        ignore_merges=bool(model.get("ignore_merges")),
        token_names=read_token_names(path.parent / "tokenizer_config.json"),
    )


def refusal(path: Path | str, setting: Any) -> ValueError:
    """The error for a tokenizer that has a setting which we do not compute."""
    text = json.dumps(setting, ensure_ascii=False)
    shown = text if len(text) <= 300 else text[:297] + "..."
    return ValueError(
        f"{path} has {shown}, and only byte-level BPE with the rules of GPT-2, SmolLM, Llama 3 or "
        f"Qwen2 is computed here. {WAY_OUT}"
    )


def check_model(path: Path, model: dict[str, Any]) -> None:
    """ValueError for a model that is not a plain BPE."""
    # Files of before 2021 do not say what their model is.
    if model.get("type", "BPE") != "BPE":
        raise refusal(path, {"model": {"type": model["type"]}})
    settings = (
        "dropout",
        "continuing_subword_prefix",
        "end_of_word_suffix",
        "byte_fallback",
    )
    for name in settings:
        if model.get(name):
            raise refusal(path, {name: model[name]})
    if model.get("unk_token") and model.get("fuse_unk"):
        raise refusal(path, {"fuse_unk": True})


def flat_steps(step: Any, name: str) -> list[dict[str, Any]]:
    """The steps of a part of tokenizer.json: null, one step, or a sequence under this name."""
    if step is None:
        return []
    if step.get("type") != "Sequence":
        return [step]
    return [inner for outer in step.get(name, []) for inner in flat_steps(outer, name)]


def rule_of(path: Path | str, steps: list[dict[str, Any]]) -> WordRule:
    """The rule that these steps of a pre-tokenizer follow."""
    cuts = [cut for step in steps for cut in cuts_of(path, step)]
    for rule in WORD_RULES:
        if cuts == [cut for step in rule.steps for cut in cuts_of(rule.name, step)]:
            return rule
    raise refusal(path, {"pre_tokenizer": steps})


def cuts_of(path: Path | str, step: dict[str, Any]) -> list[str]:
    """Where a step cuts: expressions whose matches come to stand alone; "bytes" is no cut."""
    kind = step.get("type")
    if kind == "Digits":
        return [r"\p{N}" if step.get("individual_digits") else r"\p{N}+"]
    if kind == "Split":
        pattern = step.get("pattern", {}).get("Regex")
        # What is between the matches stands alone, too; ours leave nothing between them. So to
        # remove that (cl100k's files say it like this) is the same.
        form = (step.get("behavior"), bool(step.get("invert")))
        if isinstance(pattern, str) and form in (("Isolated", False), ("Removed", True)):
            return [pattern]
    # By default, tokenizers' ByteLevel adds a space and cuts by GPT-2's rule.
    if kind == "ByteLevel" and not step.get("add_prefix_space", True):
        return [GPT2.expression, "bytes"] if step.get("use_regex", True) else ["bytes"]
    raise refusal(path, step)


def read_added_token(path: Path, entry: Any) -> AddedToken:
    """An entry of the list added_tokens."""
    flags = ("special", "lstrip", "rstrip", "single_word", "normalized")
    try:
        token = AddedToken(
            content=entry["content"],
            id=entry["id"],
            **{flag: entry.get(flag, False) for flag in flags},
        )
    except (TypeError, KeyError, AttributeError):
        raise ValueError(f"{path} has {entry!r:.80} among its added tokens") from None
    if not isinstance(token.content, str) or type(token.id) is not int:
        raise ValueError(f"{path} has {entry!r:.80} among its added tokens")
    return token


def read_merge(path: Path, merge: Any) -> tuple[str, str]:
    """A merge: "left right" until 2024, ["left", "right"] since."""
    pair = merge.split(" ") if isinstance(merge, str) else merge
    if not isinstance(pair, list) or [type(token) for token in pair] != [str, str]:
        raise ValueError(f"{path} has the merge {merge!r:.60}; expected two tokens")
    return pair[0], pair[1]


def read_token_names(path: Path) -> dict[str, str]:
    """The tokens with a part to play, out of tokenizer_config.json; {} where there is none."""
    if not path.exists():
        return {}
    config = read_json(path)
    names = {}
    for name in TOKEN_NAMES:
        token = config.get(name)
        if isinstance(token, dict):  # an added token, with its rules
            token = token.get("content")
        if isinstance(token, str):
            names[name] = token
    return names


def to_tokenizer_json(vocabulary: Vocabulary) -> dict[str, Any]:
    """The tokenizer.json of a vocabulary, which `tokenizers` and transformers read as well."""
    steps = list(vocabulary.words.steps)
    pre_tokenizer = steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": steps}
    added = {token.content: vars(token) for token in vocabulary.added_tokens}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": sorted(added.values(), key=lambda token: token["id"]),
        "normalizer": {"type": "NFC"} if vocabulary.normalize else None,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": byte_level_step(use_regex=True),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": vocabulary.unknown,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": vocabulary.ignore_merges,
            "vocab": model_vocab(vocabulary),
            "merges": [list(pair) for pair in vocabulary.merges],
        },
    }


def model_vocab(vocabulary: Vocabulary) -> dict[str, int]:
    """The tokens that BPE itself knows: without the added tokens behind all others.

    `tokenizers` gives those the next ids, in their order. Added tokens elsewhere must stand in the
    vocabulary, or they would get other ids.
    """
    vocab = vocabulary.vocab
    added = {token.content for token in vocabulary.added_tokens}
    size = 1 + max((i for token, i in vocab.items() if token not in added), default=-1)
    behind = sorted(i for i in vocab.values() if i >= size)
    if behind != list(range(size, size + len(behind))) or len(vocab) != size + len(behind):
        return vocab
    return {token: i for token, i in vocab.items() if i < size}


def to_tokenizer_config(vocabulary: Vocabulary) -> dict[str, Any]:
    """The tokenizer_config.json beside it."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **vocabulary.token_names,
    }


# --------------------------------------------------------------------------------------------------
# GGUF

# {what a GGUF calls its rule for words: that rule}. llama.cpp has further names for the same rules.
GGUF_RULES = {
    "gpt-2": GPT2,
    "smollm": SMOLLM,
    "starcoder": SMOLLM,
    "llama-bpe": LLAMA3,
    "llama3": LLAMA3,
    "llama-v3": LLAMA3,
    "qwen2": QWEN2,
    "deepseek-r1-qwen": QWEN2,
}

# The types of tokens that stand outside of BPE, as llama.cpp numbers them. (1 is an ordinary token,
# 2 the unknown one, 5 a number without a token, and 6 a byte.)
CONTROL = 3
USER_DEFINED = 4

# {transformers' name of a token with a part to play: the GGUF's}
GGUF_NAMES = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}


def from_gguf(path: Path | str, vocabulary: dict[str, Any] | None) -> Vocabulary:
    """The vocabulary of a GGUF, as `gguf.read` returns it: its tokens, merges, types and `pre`.

    Raises ValueError for one that is no byte-level BPE, or whose `pre` is unknown here.
    """
    kind = (vocabulary or {}).get("model", "gpt2")  # GGUF's name for byte-level BPE
    if not vocabulary or not vocabulary.get("merges") or kind != "gpt2":
        raise ValueError(
            f"{path} has no vocabulary of byte-level BPE, but one of the kind {kind!r}. {WAY_OUT}"
        )
    pre = vocabulary.get("pre")
    if pre not in GGUF_RULES:
        raise ValueError(
            f"{path} cuts texts into words by the rule {pre!r}; "
            f"those of {', '.join(GGUF_RULES)} are known here. {WAY_OUT}"
        )
    words = GGUF_RULES[pre]
    tokens = vocabulary["tokens"]
    types = vocabulary.get("types") or [1] * len(tokens)
    added_tokens = tuple(
        AddedToken(content=token, id=i, special=kind == CONTROL)
        for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (CONTROL, USER_DEFINED)
    )
    names = {}
    for name, gguf_name in GGUF_NAMES.items():
        i = vocabulary.get(gguf_name)
        if i is not None and 0 <= i < len(tokens):
            names[name] = tokens[i]
    return Vocabulary(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=[read_merge(Path(path), merge) for merge in vocabulary["merges"]],
        added_tokens=added_tokens,
        words=words,
        # Two settings that a GGUF does not write down: they belong to the family.
        normalize=words is QWEN2,
        ignore_merges=words is LLAMA3,
        token_names=names,
    )
