"""
Which is which? The model before and after teaching, side by side and blind.

    python projects/chat/compare.py                                 smollm2 against out/chat/taught
    python projects/chat/compare.py --after=out/chat/dpo/rl/model   another one
    python projects/chat/compare.py --labeller=short                a rule judges in your place

Both models answer the same fresh prompts, on which nothing was trained. Which answer stands on
which side is random, and the page does not know it. The keys are those of label.py: ← and → for
the better answer, ↓ for alike, s to skip, u to undo. The same command goes on where you stopped.
At the end, and whenever you stop with Ctrl-C, it says how often the taught model was preferred.
"""

import logging
import random
from pathlib import Path

import answers
import labellers
from answers import ChatModel
from mingpt import evaluation
from mingpt.checkpoint import run_script
from mingpt.config import CfgNode, check_booleans, check_numbers, documented, parse_args
from mingpt.evaluation import WinRate
from mingpt.utils import import_extra, log_to_console
from store import Answer, Label, Pair, Store, this_person

logger = logging.getLogger("mingpt.chat")

BATCH = 25  # prompts that are answered at once for a labeller that is a program


@documented
def get_config() -> CfgNode:
    """Every option and its default."""
    C = CfgNode()
    C.before = "smollm2"             # a model, as in talk.py
    C.after = "out/chat/taught/rl/model"  # the other one, which has been taught
    C.work_dir = "out/chat"          # the comparison is kept there, in a file for each two models
    C.prompts = ""                   # a text file, one prompt a line; empty: the project's own 100
    C.number = 100                   # of comparisons
    C.who = ""                       # is kept with each decision; empty: your name on this computer
    C.labeller = ""                  # a rule that decides: short, warm or simple; empty: you do
    C.seed = 7                       # of the answers, and of which side they stand on
    C.device = "auto"

    C.ask = answers.get_ask_config()

    # The page.
    C.port = 0                       # of 127.0.0.1; 0: the one of last time, or a free one
    C.open = True                    # open the page in the browser
    return C


def check_config(config: CfgNode) -> None:
    """ValueError for options that cannot be, before anything is loaded."""
    answers.check_ask(config.ask)
    check_numbers(config, "number", low=1, whole=True)
    check_numbers(config, "seed", whole=True)
    check_numbers(config, "port", high=65535, whole=True)
    check_booleans(config, "open")
    if config.labeller:
        labellers.get_rule(config.labeller)


# --------------------------------------------------------------------------------------------------
# Pairs of two models


class Duel:
    """Two models that answer the same prompts."""

    def __init__(self, config: CfgNode):
        self.config = config
        self.prompts = answers.read_prompts(config.prompts or str(answers.FRESH))
        self.before = ChatModel.load(config.before, config.device)
        self.after = ChatModel.load(config.after, config.device)
        for model in (self.before, self.after):
            model.check_prompts(config.ask, self.prompts)
        if self.before.hash == self.after.hash:
            raise ValueError(
                f"--before={config.before} and --after={config.after} are the same model: there "
                "is nothing to compare"
            )

    def open_store(self) -> Store:
        """Where the decisions on these two models are kept."""
        judge = self.config.labeller or "by-hand"
        name = f"compare-{self.before.hash[:8]}-{self.after.hash[:8]}-{judge}.db"
        return Store(Path(self.config.work_dir) / name)

    def pairs(self, first: int, n: int) -> list[Pair]:
        """Pairs number first, first + 1, ... (n of them), in random order of the two models."""
        ask = self.config.ask
        prompts = [
            answers.prompt_number(self.prompts, i, self.config.seed)
            for i in range(first, first + n)
        ]
        seed = self.config.seed + first
        both = zip(
            prompts,
            self.before.answers(ask, prompts, 1, seed),
            self.after.answers(ask, prompts, 1, seed),
            strict=True,
        )
        return [
            self.pair(first + i, prompt, before, after)
            for i, (prompt, [before], [after]) in enumerate(both)
        ]

    def pair(self, number: int, prompt: str, before: Answer, after: Answer) -> Pair:
        """The two answers, on random sides."""
        sides = [before, after]
        random.Random(f"sides {self.config.seed} {number}").shuffle(sides)
        return Pair(
            prompt=prompt,
            messages=answers.messages_for(self.config.ask, prompt),
            left=sides[0],
            right=sides[1],
            sampling={**self.config.ask.to_dict(), "seed": self.config.seed},
        )


# --------------------------------------------------------------------------------------------------
# Who decides


def by_hand(config: CfgNode, store: Store, duel: Duel) -> None:
    """Serve the page until Ctrl-C."""
    import_extra("uvicorn", "chat")
    import_extra("starlette", "chat")
    import desk

    def make_pair(typed: str | None, id: str | None) -> Pair | None:
        number = store.count_pairs()
        if number >= config.number:
            return None
        [pair] = duel.pairs(number, 1)
        return pair

    try:
        desk.run_desk(
            store,
            make_pair,
            who=config.who or this_person(),
            goal=config.number,
            port=config.port,
            open_browser=config.open,
            may_write=False,
        )
    except KeyboardInterrupt:
        print()  # the result follows


def by_rule(config: CfgNode, store: Store, duel: Duel) -> None:
    """Let a rule decide all pairs. Where it finds both equal, they are alike."""
    rule = labellers.get_rule(config.labeller)
    who = f"the rule {config.labeller}"
    while store.count_pairs() < config.number:
        first = store.count_pairs()
        store.add_pairs(duel.pairs(first, min(BATCH, config.number - first)))
        logger.info("%d of %d pairs", store.count_pairs(), config.number)
    for pair in store.open_pairs(limit=-1):
        choice = labellers.decide(rule, pair)
        choice = "alike" if choice == "skip" else choice
        store.press(f"{config.labeller} {pair.id:08}", pair.id, choice, who)


# --------------------------------------------------------------------------------------------------
# The result


def points(labels: list[Label], after: str) -> list[float]:
    """What the taught model, by its hash, gets for each decision: 1, or 1/2 for alike, or 0."""
    result = []
    for label in labels:
        if label.choice == "alike":
            result.append(0.5)
        elif label.choice in ("left", "right"):
            chosen = label.pair.left if label.choice == "left" else label.pair.right
            result.append(float(chosen.model == after))
    return result


def win_rate(points: list[float]) -> WinRate:
    """The share that prefers the taught model, ties counted half, with its 95% interval."""
    return evaluation.win_rate(points, [1 - point for point in points])


def in_words(points: list[float]) -> str:
    """The result for a person."""
    if not points:
        return "nothing has been compared yet"
    rate = win_rate(points)
    return (
        f"The taught model is preferred in {rate.rate:.0%} of {rate.n} comparisons (95% interval: "
        f"{rate.low:.0%} to {rate.high:.0%}): {points.count(1.0)} times, against "
        f"{points.count(0.0)} times the one before. {points.count(0.5)} were alike, and count half."
    )


def main(args: list[str]) -> None:
    config = get_config()
    parse_args(config, args, __doc__)
    check_config(config)
    log_to_console()
    duel = Duel(config)
    store = duel.open_store()
    if config.labeller:
        by_rule(config, store, duel)
    else:
        by_hand(config, store, duel)
    print(in_words(points(store.labels(), duel.after.hash)))


if __name__ == "__main__":
    run_script(main)
