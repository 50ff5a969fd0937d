"""
The texts, whatever they are, in one form: rows of a prompt (the text and "TL;DR:") and a completion (its summary).

They are written once into the run's folder, with the vocabulary, so that the run goes on with the same ones when packages are
installed or removed in between.
"""

import hashlib
import json
import logging
import re
from bisect import bisect_left
from dataclasses import dataclass

import docstrings
import tldr
from mingpt.bpe import BPETokenizer
from mingpt.checkpoint import write_text
from mingpt.datasets import read_jsonl

logger = logging.getLogger("mingpt.summarize_rlhf")
SPLITS = ("train", "valid", "test")


@dataclass
class Corpus:
    """rows: {split: dicts of prompt, completion, text to pre-train on, and part}. comparisons: {split: dicts of prompt, chosen, rejected,
    kinds and part} of people, or None. part: whose training the row is for, that of the sft model, the reward model or the judge."""
    tokenizer: BPETokenizer
    rows: dict
    comparisons: dict | None

    @property
    def tokenizer_checksum(self):
        """To tell one vocabulary from another."""
        return hashlib.sha256(json.dumps(self.tokenizer.vocab).encode()).hexdigest()[:16]


def load(config, folder):
    """The corpus in the folder, made at the first call."""
    if not (folder / "finished").exists():
        make(config, folder)
    tokenizer = BPETokenizer() if config.model.name else BPETokenizer.from_pretrained(folder)
    read = lambda kind: {split: read_jsonl(folder / f"{kind}_{split}.jsonl", "prompt") for split in SPLITS}
    found = Corpus(tokenizer, read("rows"), read("comparisons") if (folder / "comparisons_train.jsonl").exists() else None)
    logger.info("texts: %s", ", ".join(f"{len(rows)} {split}" for split, rows in found.rows.items()))
    return found


def make(config, folder):
    """Read the texts, train a vocabulary where none is given, cut the texts to size, and write all of it into the folder."""
    if config.data.path:
        rows, comparisons = own(config.data.path)
    elif config.data.name == "tldr":
        rows, comparisons = tldr.load()
    else:
        rows, comparisons = from_docstrings(config.data.packages), {}
    tokenizer = BPETokenizer() if config.model.name else train_vocabulary(rows["train"], config.data.vocab_size, folder)
    for kind, parts in (("rows", rows), ("comparisons", comparisons)):
        for split, part in parts.items():
            fitting = [row for row in (fitted(row, tokenizer, config.data) for row in part) if row]
            logger.info("%s, %s: %d, of which %d fit", kind, split, len(part), len(fitting))
            if not fitting:
                raise ValueError(f"{len(part)} {kind} are too few for {split}: give a few hundred texts, with summaries of fewer than "
                                 f"--data.summary_tokens={config.data.summary_tokens} tokens")
            write_text(folder / f"{kind}_{split}.jsonl", "".join(json.dumps(row) + "\n" for row in fitting))
    write_text(folder / "finished", "")


def train_vocabulary(rows, size, folder):
    logger.info("training a vocabulary of %d tokens", size)
    tokenizer = BPETokenizer.train([whole(row) for row in rows], size)
    tokenizer.save_pretrained(folder)
    return tokenizer


def from_docstrings(packages):
    """{split: rows} of the docstrings."""
    rows = {split: [] for split in SPLITS}
    for pair in docstrings.read_docstrings(packages):
        rows[docstrings.split_of(pair["module"])].append({
            "head": "", "body": pair["body"], "marker": "\nTL;DR:", "completion": " " + pair["summary"]})
    return rows


def own(path):
    """({split: rows}, {split: comparisons}) of a user's JSON lines; 90% train, 5% valid, 5% test, by a hash of the prompt."""
    lines = read_jsonl(path, "prompt")
    compared = any("chosen" in line for line in lines)
    lines = read_jsonl(path, *(("prompt", "chosen", "rejected") if compared else ("prompt", "completion")))
    rows, comparisons = ({split: [] for split in SPLITS} for _ in range(2))
    for line in lines:
        split = {0: "test", 1: "valid"}.get(digest(line["prompt"]) % 20, "train")
        prompt = {"head": "", "body": line["prompt"], "marker": ""}
        rows[split].append(prompt | {"completion": line["chosen" if compared else "completion"]})
        comparisons[split].append(prompt | {"kind": "people's", **line})
    return rows, comparisons if compared else {}


def digest(text):
    """A number that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def whole(row):
    """The text and its summary, uncut."""
    return row["head"] + row["body"] + row["marker"] + row.get("completion", "")


def fitted(row, tokenizer, sizes):
    """A row as it is written into the folder, its body cut to what body_tokens leave beside the head; None where a summary is too long.

    A summary belongs to one part: a reward model whose trunk has seen the authors' lines before knows them by heart, and learns little else.
    """
    count = lambda text: len(tokenizer.encode(text))
    summaries = {name: row[name] for name in ("completion", "chosen", "rejected") if name in row}
    body = shorten(row["body"], lambda text: count(row["head"] + text) <= sizes.body_tokens)
    if not body.strip() or any(count(summary) >= sizes.summary_tokens for summary in summaries.values()):
        return None
    parts = ("reward", "judge") if "chosen" in row else ("sft", "reward", "reward", "judge")
    part = parts[digest("part of " + row["body"]) % len(parts)]
    extra = {"text": whole(row) if part == "sft" else row["head"] + row["body"]}
    if "chosen" in row:
        extra = {"kinds": [row["kind"]]} | ({"ended": row["ended"]} if "ended" in row else {})
    return {"prompt": row["head"] + body + row["marker"], **summaries, **extra, "part": part}


def shorten(text, fits):
    """The longest beginning of text that fits and ends before a newline (as Stiennon et al. 2020 do); if none, before a space."""
    if fits(text):
        return text
    for gap in (r"\n", r"\s"):
        ends = [match.start() for match in re.finditer(gap, text) if match.start()]
        if last := bisect_left(ends, True, key=lambda end: not fits(text[:end])):
            return text[:ends[last - 1]]
    return ""
