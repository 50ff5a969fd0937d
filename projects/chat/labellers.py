"""
Labellers that are programs: each prefers one of two answers by a rule, in the place of a person.

With such a rule the whole project can be measured, because the rule can judge thousands of answers
and never gets tired. What learns from the labels never sees the rule, only which answer was chosen.

    short     ended by itself, and then fewer tokens
    warm      happier, by VADER (Hutto & Gilbert 2014)
    simple    shorter words, on average

A rule gives each answer a score. Where both scores are equal, it has no preference.
"""

import random
import re
from collections.abc import Callable
from typing import Any

from mingpt.utils import import_extra
from store import Answer, Pair, Store

Rule = Callable[[Answer], Any]


def get_rule(name: str) -> Rule:
    """The rule of this name. ValueError for a name that does not exist."""
    if name not in RULES:
        raise ValueError(f"--labeller={name} must be one of {', '.join(RULES)}")
    return RULES[name]()


def short() -> Rule:
    """Answers that ended by themselves, and then short ones."""
    return lambda answer: (answer.ended, -length_of(answer))


def warm() -> Rule:
    """Happy answers: VADER's compound score, from -1 to 1."""
    module = import_extra("vaderSentiment.vaderSentiment", "projects")
    analyzer = module.SentimentIntensityAnalyzer()
    return lambda answer: analyzer.polarity_scores(answer.text)["compound"]


def simple() -> Rule:
    """Short words. An answer without words is worse than all others."""
    return lambda answer: -mean_word_length(answer.text)


RULES: dict[str, Callable[[], Rule]] = {"short": short, "warm": warm, "simple": simple}


def length_of(answer: Answer) -> int:
    """The length in tokens, or in words where they are not known."""
    return len(answer.text.split() if answer.ids is None else answer.ids)


def mean_word_length(text: str) -> float:
    """Letters in a word, on average."""
    words = re.findall(r"[^\W\d_]+", text)
    if not words:
        return float("inf")
    return sum(map(len, words)) / len(words)


def decide(rule: Rule, pair: Pair) -> str:
    """What the rule presses: left, right, or skip where both are equal."""
    left, right = rule(pair.left), rule(pair.right)
    if left == right:
        return "skip"
    return "left" if left > right else "right"


def flipped(choice: str, chance: float, seed: int, number: int) -> str:
    """The choice, or with this probability the other one: people make mistakes, too.

    The same for the same seed and number of the pair.
    """
    if choice == "skip" or random.Random(f"flip {seed} {number}").random() >= chance:
        return choice
    return "right" if choice == "left" else "left"


def label_open_pairs(
    store: Store, name: str, rule: Rule, chance: float, seed: int, number: int
) -> None:
    """Decide the pairs that are open, until there are `number` labels that choose an answer.

    Killed in between, it goes on with the next pair.
    """
    for pair in store.open_pairs(limit=-1):
        if store.count_comparisons() >= number:
            return
        assert pair.id is not None
        choice = flipped(decide(rule, pair), chance, seed, pair.id)
        store.press(f"{name} {seed} {pair.id:08}", pair.id, choice, who=f"the rule {name}")
