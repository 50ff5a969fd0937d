r"""
Where a text is cut into words before byte-pair encoding, which never merges across such a border.

Without words "dog", "dog." and "dog!" would each become a token. Each family of models has rules of
its own, and its tokens are only right with them. They differ in the space before a word, in digits,
in line ends, and in capitals ("I'M"):

    gpt2      I|'m| here|.\n|\n|It|'|S| 2024|\n      a space goes with the word behind it
    smollm    I|'m| here|.\n|\n|It|'|S| |2|0|2|4|\n  gpt2's, and each digit stands alone
    llama3    I|'m| here|.\n\n|It|'S| |202|4|\n      digits in threes; line ends go with what ends
    qwen2     I|'m| here|.\n\n|It|'S| |2|0|2|4|\n    llama3's, and each digit stands alone

One rule is a regular expression that matches a word. It is written twice: for any text in the
package `regex`, which knows what is a letter (\p{L}) or a number (\p{N}) in every script, and for
ASCII text in the standard library's `re`, which is several times faster. Both cut ASCII text alike.

Sources: Radford et al. 2019 (GPT-2) for the first rule; the files tokenizer.json of SmolLM, Llama 3
and Qwen2 for the others, as the package `tokenizers` applies them.
"""

import re
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

import regex

# Where a text can be cut without cutting a word: after a newline between two non-blank characters.
# In none of the rules below does a word go on behind such a newline, or look back past it.
LINE_START = re.compile(r"(?<=\S\n)(?=\S)")


@dataclass(frozen=True)
class WordRule:
    """How one family of tokenizers cuts a text into words.

    expression: matches a word of any text. ascii_expression: matches a word of an ASCII text.
    steps: the same rule as tokenizer.json writes it, a list of steps.
    """

    name: str
    expression: str
    ascii_expression: str
    steps: tuple[dict[str, Any], ...]

    # Compiled when they are first needed: a program seldom needs them all.
    @cached_property
    def pattern(self) -> regex.Pattern[str]:
        """The expression, compiled."""
        return regex.compile(self.expression)

    @cached_property
    def ascii_pattern(self) -> re.Pattern[str]:
        """The ASCII expression, compiled."""
        # re.ASCII because the \s of `re` otherwise matches \x1c to \x1f, which Unicode does not
        # count as whitespace.
        return re.compile(self.ascii_expression, re.ASCII)

    def split(self, text: str) -> list[str]:
        """The words of a text, which joined give it back."""
        if text.isascii():
            return self.ascii_pattern.findall(text)
        # Most lines of most texts are ASCII: split those fast, and only the others with `regex`.
        words = []
        for is_ascii, lines in groupby(LINE_START.split(text), str.isascii):
            pattern = self.ascii_pattern if is_ascii else self.pattern
            words += pattern.findall("".join(lines))
        return words


def split_step(pattern: str) -> dict[str, Any]:
    """How tokenizer.json writes the step "cut the text so that each match stands alone"."""
    return {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }


def byte_level_step(use_regex: bool) -> dict[str, Any]:
    """How it writes the step to bytes. use_regex: cut the text by GPT-2's rule before that."""
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,  # concerns only what `tokenizers` says about places in the text
        "use_regex": use_regex,
    }


# What counts as a letter or a number follows the Unicode version of the installed `regex`. The
# peers have versions of their own: on characters newer than that, the two can differ.
#
# In the ASCII expressions, letters come first because they are the most frequent. That changes no
# match.

GPT2 = WordRule(
    name="gpt2",
    expression="|".join(
        [
            r"'s|'t|'re|'ve|'m|'ll|'d",  # the ends of contractions: "I'm" is "I" and "'m"
            r" ?\p{L}+",  # letters
            r" ?\p{N}+",  # digits and other numbers
            r" ?[^\s\p{L}\p{N}]+",  # all other signs
            r"\s+(?!\S)",  # whitespace; before a word, all of it but the last character
            r"\s+",  # that character, if it is no space to go with the word: "\n" in "a\nb"
        ]
    ),
    ascii_expression=(
        r" ?[A-Za-z]+|'(?:[stmd]|re|ve|ll)| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+"
    ),
    steps=(byte_level_step(use_regex=True),),
)

# tokenizer.json has two steps here: numbers apart, one by one, and then GPT-2's rule for what is
# between them. So whitespace before a number is whitespace at the end of a text: all of it is one
# word. This is one expression with the same result.
SMOLLM = WordRule(
    name="smollm",
    expression="|".join(
        [
            r"\p{N}",
            r"'s|'t|'re|'ve|'m|'ll|'d",
            r" ?\p{L}+",
            r" ?[^\s\p{L}\p{N}]+",
            r"\s+(?![^\s\p{N}])",  # behind it: the end, a number (or more whitespace)
            r"\s+",
        ]
    ),
    ascii_expression=(
        r" ?[A-Za-z]+|'(?:[stmd]|re|ve|ll)|[0-9]| ?[^\sA-Za-z0-9]+|\s+(?![^\s0-9])|\s+"
    ),
    steps=({"type": "Digits", "individual_digits": True}, byte_level_step(use_regex=True)),
)


def llama3_rule(name: str, numbers: str) -> WordRule:
    """The rule that Llama 3 and Qwen2 share. numbers: how many of them
    make one word, in the language of regular expressions."""
    expression = "|".join(
        [
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",  # in capitals, too
            r"[^\r\n\p{L}\p{N}]?\p{L}+",  # letters, and one other character before them
            rf"\p{{N}}{numbers}",
            r" ?[^\s\p{L}\p{N}]+[\r\n]*",  # other signs, and the line ends behind them
            r"\s*[\r\n]+",  # whitespace up to its last line end
            r"\s+(?!\S)",
            r"\s+",
        ]
    )
    # Letters first again: an apostrophe in front of them must first be tried as a contraction.
    ascii_expression = "|".join(
        [
            r"[^\r\nA-Za-z0-9']?[A-Za-z]+",
            r"'(?i:[stmd]|re|ve|ll)",
            r"'[A-Za-z]+",
            rf"[0-9]{numbers}",
            r" ?[^\sA-Za-z0-9]+[\r\n]*",
            r"\s*[\r\n]+",
            r"\s+(?!\S)",
            r"\s+",
        ]
    )
    return WordRule(
        name=name,
        expression=expression,
        ascii_expression=ascii_expression,
        steps=(split_step(expression), byte_level_step(use_regex=False)),
    )


LLAMA3 = llama3_rule("llama3", numbers="{1,3}")
QWEN2 = llama3_rule("qwen2", numbers="")

WORD_RULES = (GPT2, SMOLLM, LLAMA3, QWEN2)
