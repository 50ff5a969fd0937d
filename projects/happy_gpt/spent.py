"""
Where the KL of a finished run is spent: on happy words, and in which tweets.

    python projects/happy_gpt/spent.py                      the run in out/happy_gpt
    python projects/happy_gpt/spent.py --work_dir=FOLDER    another one

The best policy would write happy words where a tweet is not happy yet, and leave a happy tweet
alone. This table says what a policy does. It goes through the words of fresh tweets, sorted by what
VADER says of the tweet before the word: how many of these words are happy ones, in tweets of the
sft model and in those of the policy, and how many nats the policy has paid for a word.
"""

import itertools
import re
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

import preferences
import report
from mingpt import evaluation
from mingpt.chars import CharTokenizer
from mingpt.checkpoint import run_script
from mingpt.config import CfgNode as CN, check_numbers, parse_args
from mingpt.evaluation import Samples
from mingpt.model import GPT

SCORES = (-1.0, 0.2, 0.6, 0.75, 0.85, 1.0)  # bounds of the rows
HALVES = (0, 32, 64)  # characters: the tables of the first and of the second half of the tweets


def main(args):
    config = CN(work_dir="out/happy_gpt", samples=2048, seed=0)
    parse_args(config, args, __doc__)
    check_numbers(config, "samples", low=1, whole=True)
    work_dir = Path(config.work_dir)
    for stage in ("sft", "rl"):
        if not (work_dir / stage / "model").exists():
            raise ValueError(f"{work_dir} holds no model of {stage}: run happy_gpt.py first")
    tokenizer = CharTokenizer.from_pretrained(work_dir / "sft" / "model")
    models = {stage: GPT.from_pretrained(work_dir / stage / "model") for stage in ("sft", "rl")}
    words = {}
    for stage, model in models.items():
        tweets = report.sample_tweets(model, tokenizer, config.samples, config.seed)
        nats = evaluation.log_ratios(tweets, models["sft"], batch_size=report.BATCH_SIZE)
        words[stage] = list(words_of(tweets, nats))
    for first, end in itertools.pairwise(HALVES):
        print(f"\nwords that begin at the characters {first} to {end - 1}\n")
        print(table(words, range(first, end), config.samples))


def words_of(tweets: Samples, nats: Tensor) -> Iterator[tuple[int, float, bool, float]]:
    """For each word: (where it begins, the score before it, whether it is happy, its nats)."""
    analyzer = preferences.vader_analyzer()
    for text, costs in zip(tweets.texts, nats, strict=True):
        for word in re.finditer(r"\S+ ?", text):
            before = analyzer.polarity_scores(text[: word.start()])["compound"]
            # The lexicon holds smileys as they are, and words without punctuation around them.
            as_it_is = word[0].strip().lower()
            bare = as_it_is.strip(".,!?\"'()")
            happy = max(analyzer.lexicon.get(form, 0) for form in (as_it_is, bare)) > 0
            # Character k is the action k: the prompt is a single token.
            yield word.start(), before, happy, costs[word.start() : word.end()].sum().item()


def table(words: dict[str, list], places: range, samples: int) -> str:
    """A row for each range of scores, in Markdown."""
    lines = [
        "| VADER's score so far | words a tweet | happy, sft | happy, rl | nats a word |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for low, high in itertools.pairwise(SCORES):
        rows = {
            stage: [word for word in found if word[0] in places and low <= word[1] < high]
            for stage, found in words.items()
        }
        if not rows["sft"] or not rows["rl"]:
            continue
        happy_sft, happy_rl = (
            sum(word[2] for word in rows[stage]) / len(rows[stage]) for stage in ("sft", "rl")
        )
        cost = sum(word[3] for word in rows["rl"]) / len(rows["rl"])
        lines.append(
            f"| {low:g} to {high:g} | {len(rows['rl']) / samples:.2f} | {happy_sft:.0%} | "
            f"{happy_rl:.0%} | {cost:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    run_script(main)
