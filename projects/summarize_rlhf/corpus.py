"""
The texts of a run, in one form wherever they come from: rows of a prompt and a completion,
which is the summary.

A source (docstrings.py, tldr.py, or JSON lines of your own) gives rows with these fields:

    head          the beginning of the prompt (a title, say), which is never cut
    body          the text to summarize, which is cut to --data.body_tokens, head included
    marker        the end of the prompt, which asks for the summary ("TL;DR:")
    completion    the author's summary; a comparison has chosen, rejected and kind instead

`fit_row` makes of each the row that the stages read:

    prompt        head, body and marker
    completion    as above; a comparison has chosen, rejected and kinds instead
    text          what to pre-train on (not in comparisons)
    part          whose training the row is for: the sft model's, the reward model's or the judge's

The rows and the vocabulary are written into the run's folder once. A resumed run reads them there,
so it sees the same texts even when packages were installed or removed in between.
"""

import hashlib
import json
import logging
import re
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import docstrings
import tldr
from mingpt.bpe import BPETokenizer
from mingpt.checkpoint import write_text
from mingpt.config import CfgNode as CN
from mingpt.datasets import read_jsonl, split_rows
from mingpt.run_folder import to_lines

logger = logging.getLogger("mingpt.summarize_rlhf")

SPLITS = ("train", "valid", "test")
Splits = dict[str, list[dict]]  # {split: rows}

# Each text belongs to one part of the data. A reward model whose trunk was fine-tuned on the
# authors' lines would know them by heart and learn little else, and a judge must learn from other
# texts than the reward model does. People's comparisons are divided between these two. Where we
# make the comparisons ourselves, the sft model needs a part of the texts, too.
PARTS_OF_COMPARISONS = ("reward", "judge")
PARTS_OF_ROWS = ("sft", "reward", "reward", "judge")


@dataclass
class Corpus:
    """The texts of a run and their vocabulary."""

    tokenizer: BPETokenizer
    rows: Splits  # prompt, completion, text and part
    comparisons: Splits | None  # people's, if any: prompt, chosen, rejected, kinds and part

    @property
    def tokenizer_checksum(self) -> str:
        """A short hash that tells one vocabulary from another."""
        return hashlib.sha256(json.dumps(self.tokenizer.vocab).encode()).hexdigest()[:16]


def load(config: CN, folder: Path) -> Corpus:
    """The corpus in the folder. The first call makes it."""
    if not is_made(folder):
        make(config, folder)
    tokenizer = BPETokenizer() if config.model.name else BPETokenizer.from_pretrained(folder)
    comparisons = None
    if (folder / "comparisons_train.jsonl").exists():
        comparisons = read_splits(folder, "comparisons")
    corpus = Corpus(tokenizer, read_splits(folder, "rows"), comparisons)
    sizes = [f"{len(rows)} {split}" for split, rows in corpus.rows.items()]
    logger.info("texts: %s", ", ".join(sizes))
    return corpus


def is_made(folder: Path) -> bool:
    """Whether `make` has written everything into the folder."""
    return (folder / "finished").exists()


def read_splits(folder: Path, kind: str) -> Splits:
    """What `make` wrote; kind is rows or comparisons."""
    return {split: read_jsonl(folder / f"{kind}_{split}.jsonl", "prompt") for split in SPLITS}


def make(config: CN, folder: Path) -> None:
    """Read the texts, train a vocabulary, cut the texts to size, and write it all to the folder.

    A model that starts from other people's weights (GPT-2's, say) has GPT-2's vocabulary.
    """
    rows, comparisons = read_source(config)
    if config.model.name:
        tokenizer = BPETokenizer()
    else:
        logger.info("training a vocabulary of %d tokens", config.data.vocab_size)
        texts = [full_text(row) for row in rows["train"]]
        try:
            tokenizer = BPETokenizer.train(texts, config.data.vocab_size)
        except ValueError as error:
            raise ValueError(f"--data.vocab_size={config.data.vocab_size}: {error}") from None
        tokenizer.save_pretrained(folder)
    write_splits(folder, "rows", rows, tokenizer, config)
    write_splits(folder, "comparisons", comparisons, tokenizer, config)
    write_text(folder / "finished", "")  # an empty file that says: all the others are there


def write_splits(
    folder: Path,
    kind: str,
    splits: Splits,
    tokenizer: BPETokenizer,
    config: CN,
) -> None:
    """Cut the rows to size and write a file for each split; ValueError for one where none fits."""
    for split, rows in splits.items():
        candidates = [fit_row(row, tokenizer, config.data) for row in rows]
        fitting = [row for row in candidates if row is not None]
        logger.info("%s, %s: %d, of which %d fit", kind, split, len(rows), len(fitting))
        if not fitting:
            raise ValueError(
                f"{len(rows)} {kind} are too few for {split}: give a few hundred texts, with "
                f"summaries of fewer than --data.summary_tokens={config.data.summary_tokens} tokens"
            )
        write_text(folder / f"{kind}_{split}.jsonl", to_lines(fitting))


# --------------------------------------------------------------------------------------------------
# the three sources


def read_source(config: CN) -> tuple[Splits, Splits]:
    """(rows, comparisons) of the source that the options name; the latter may be empty."""
    if config.data.path:
        return from_file(config.data.path)
    if config.data.name == "tldr":
        return tldr.load()
    return from_docstrings(config.data.packages), {}


def from_docstrings(packages: str) -> Splits:
    """The docstrings of the installed packages. All of a module's are alike: they share a split."""
    splits = split_rows(docstrings.read_docstrings(packages), "module")
    return {split: [docstring_row(pair) for pair in pairs] for split, pairs in splits.items()}


def docstring_row(pair: dict) -> dict:
    return {
        "head": "",
        "body": pair["body"],
        "marker": "\nTL;DR:",
        "completion": " " + pair["summary"],
    }


def from_file(path: str) -> tuple[Splits, Splits]:
    """(rows, comparisons) of a user's JSON lines, split by a hash of the prompt.

    In a file of comparisons, the chosen completions are also the demonstrations to fine-tune on.
    """
    has_comparisons = any("chosen" in line for line in read_jsonl(path, "prompt"))
    fields = ("prompt", "chosen", "rejected") if has_comparisons else ("prompt", "completion")
    lines = read_jsonl(path, *fields)  # once more, since now it is known what each line must have
    rows = {split: [] for split in SPLITS}
    comparisons = {split: [] for split in SPLITS} if has_comparisons else {}
    for split, lines_of_split in split_rows(lines, "prompt").items():
        for line in lines_of_split:
            query = {"head": "", "body": line["prompt"], "marker": ""}
            if has_comparisons:
                comparisons[split].append({"kind": "people's", **line, **query})
                rows[split].append({**query, "completion": line["chosen"]})
            else:
                rows[split].append({**query, "completion": line["completion"]})
    return rows, comparisons


# --------------------------------------------------------------------------------------------------
# cutting texts to size


def full_text(row: dict) -> str:
    """The text and its summary, uncut."""
    return row["head"] + row["body"] + row["marker"] + row["completion"]


def fit_row(row: dict, tokenizer: BPETokenizer, sizes: CN) -> dict | None:
    """The row that the stages read, its body cut to size; None if that is empty or a summary long.

    sizes: the options body_tokens (of head and body) and summary_tokens (end-of-text included).
    """

    def count_tokens(text: str) -> int:
        return len(tokenizer.encode(text))

    def fits(body: str) -> bool:
        return count_tokens(row["head"] + body) <= sizes.body_tokens

    body = shorten(row["body"], fits)
    if not body.strip():
        return None
    summaries = {name: row[name] for name in ("completion", "chosen", "rejected") if name in row}
    # `>=` and not `>`: the end-of-text token needs a place as well
    if any(count_tokens(summary) >= sizes.summary_tokens for summary in summaries.values()):
        return None
    fitted = {"prompt": row["head"] + body + row["marker"], **summaries}
    if "chosen" in row:
        fitted["kinds"] = [row["kind"]]
        if "ended" in row:
            fitted["ended"] = row["ended"]
        return {**fitted, "part": part_of(row, PARTS_OF_COMPARISONS)}
    part = part_of(row, PARTS_OF_ROWS)
    # pre-training reads the whole body, but the summaries of the sft model's part only
    text = full_text(row) if part == "sft" else row["head"] + row["body"]
    return {**fitted, "text": text, "part": part}


def part_of(row: dict, parts: tuple[str, ...]) -> str:
    """One of the parts, by a hash of the body: all rows of one text are in the same part."""
    digest = hashlib.sha256(("part of " + row["body"]).encode()).digest()
    return parts[int.from_bytes(digest[:8], "big") % len(parts)]


def shorten(text: str, fits: Callable[[str], bool]) -> str:
    """The longest beginning of text that fits and ends before a newline; if none, before a space.

    Cutting at a newline is what Stiennon et al. 2020 do. Empty if nothing fits.
    """

    def too_long(end: int) -> bool:
        return not fits(text[:end])

    if fits(text):
        return text
    for gap in (r"\n", r"\s"):
        ends = [match.start() for match in re.finditer(gap, text) if match.start() > 0]
        # A longer beginning has more tokens, so the ends that fit come first: bisect to count them.
        n_fitting = bisect_left(ends, True, key=too_long)
        if n_fitting > 0:
            return text[:ends[n_fitting - 1]]
    return ""
