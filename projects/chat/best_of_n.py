"""
Best of n: comparisons that the reward model makes, for a policy to learn from.

A person compares two answers 200 times. The reward model that has learned it never gets tired: it
reads n answers to each of many prompts, and says which one it likes best, and which one least. Such
a pair teaches more than two random answers, because they differ far more. (West-of-N, Pace et al.
2024, arXiv:2401.12086, trains reward models on such pairs.) All of them are answers to the
question, as the model gives them anyway: whoever always takes the best of n is at most
log n - (n - 1)/n nats away from the model (Beirami et al. 2024, arXiv:2401.01879), 1.2 for n = 8.

Sampling takes minutes. So the pairs are kept in a file, and an interrupted run goes on from there.
"""

import logging
from pathlib import Path
from typing import Any

import answers
import lessons
from answers import BATCH, ChatModel
from judge import Judge
from mingpt.checkpoint import write_text
from mingpt.config import CfgNode
from mingpt.datasets import read_jsonl
from mingpt.run_folder import to_lines

logger = logging.getLogger("mingpt.chat")


def find_pairs(
    config: CfgNode, folder: Path, judge: Judge, model: ChatModel, prompts: list[str]
) -> list[dict[str, Any]]:
    """For each prompt the best and the worst of n answers, as `Comparisons` takes them.

    Prompts whose best answer says the same as the worst are left out. folder: where the pairs are
    kept. What is there already is not sampled again. ValueError if no prompt is left.
    """
    model.check_prompts(config.ask, prompts)  # now, and not after minutes
    n = config.best_of_n.n
    file = pairs_file(config, folder, judge, model, prompts)
    pairs = read_jsonl(file) if file.exists() else []
    step = BATCH // n  # prompts
    for first in range(len(pairs), len(prompts), step):
        some = prompts[first : first + step]
        samples = model.sample(config.ask, some, n, config.system.seed + first, BATCH)
        masks = (samples.attention_mask, samples.completion_mask)
        rewards = judge.reward(samples.idx, *masks, rows_per_prompt=n).view(-1, n)
        for i, prompt in enumerate(some):
            best, worst = (
                answers.as_answer(samples, n * i + int(place), model.hash)
                for place in (rewards[i].argmax(), rewards[i].argmin())
            )
            pairs.append(lessons.as_row(answers.messages_for(config.ask, prompt), best, worst))
        write_text(file, to_lines(pairs))
        logger.info("the best and the worst answer to %d of %d prompts", len(pairs), len(prompts))
    usable = [pair for pair in pairs if lessons.is_usable(pair)]
    if not usable:
        raise ValueError(
            f"all {n} answers to a prompt say the same, for each of {len(prompts)} prompts: raise "
            f"--ask.temperature={config.ask.temperature} or --best_of_n.n={n}"
        )
    return usable


def pairs_file(
    config: CfgNode, folder: Path, judge: Judge, model: ChatModel, prompts: list[str]
) -> Path:
    """The file of the pairs. Its name says how they were found: others are in another file."""
    options = {"ask": config.ask.to_dict(), "n": config.best_of_n.n, "seed": config.system.seed}
    hashes = [answers.hash_of(judge), answers.hash_of(model.model)]
    return folder / f"pairs_{lessons.digest([options, hashes, prompts])}.jsonl"
