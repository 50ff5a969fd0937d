"""
A page in the browser on which you say which of two answers of a chat model is better.

    python projects/chat/label.py                                   smollm2; opens the page
    python projects/chat/label.py --prompts=FILE                    your own prompts, one a line
    python projects/chat/label.py --export=labels.jsonl             for trl, or for another machine
    python projects/chat/label.py --import=labels.jsonl
    python projects/chat/label.py --labeller=short --number=200     a rule labels in your place

← and → choose an answer, ↓ says that they are alike, ↑ lets you write a better one, s skips, and u
takes the last key back. Everything goes into one file, out/chat/labels.db; see readme.md for what
it holds. You can stop at any time, in any way: what you have seen counted is on the disk.
"""

import hashlib
import logging
from pathlib import Path

import answers
import exchange
import labellers
from answers import ChatModel
from mingpt.checkpoint import run_script
from mingpt.config import CfgNode, attach, check_booleans, check_numbers, documented, parse_args
from mingpt.utils import import_extra, log_to_console
from store import Pair, Store, this_person

logger = logging.getLogger("mingpt.chat")

BATCH = 16  # prompts that are answered at once for a labeller that is a program
PATIENCE = 20  # batches without a single decision, after which a rule is given up


@documented
def get_config() -> CfgNode:
    """Every option and its default."""
    C = CfgNode()
    C.work_dir = "out/chat"          # everything that is written goes there
    C.model = "smollm2"              # or a hub name, a folder, a .gguf file, an adapter of teach.py
    C.prompts = ""                   # a text file, one prompt a line; empty: the project's own 300
    C.who = ""                       # is kept with each label; empty: your name on this computer
    C.goal = 200                     # how many labels you want to give, for the progress bar
    C.seed = 3407                    # of the order of the prompts, and of the samples
    C.device = "auto"

    C.ask = answers.get_ask_config()

    # The page.
    C.port = 0                       # of 127.0.0.1; 0: the one of last time, or a free one
    C.open = True                    # open the page in the browser

    # Instead of the page.
    C.export = ""                    # write the labels to this file of JSON lines
    setattr(C, "import", "")         # the name is a word of Python's own
    C.labeller = ""                  # a rule that labels: short, warm or simple
    C.number = 200                   # ... until there are so many labels
    C.flip = 0.1                     # ... of which this share is the wrong way round
    attach(C, "import", "read labels from this file of JSON lines", heading=False)
    return C


def check_config(config: CfgNode) -> None:
    """ValueError for options that cannot be, before anything is loaded."""
    answers.check_ask(config.ask)
    check_numbers(config, "goal", "number", low=1, whole=True)
    check_numbers(config, "seed", whole=True)
    check_numbers(config, "port", high=65535, whole=True)
    check_numbers(config, "flip", high=1)
    check_booleans(config, "open")


def seed_of(config: CfgNode, number: int) -> int:
    """The seed of pair number `number`: another one for each seed and pair."""
    digest = hashlib.sha256(f"pair {config.seed} {number}".encode()).digest()
    return int.from_bytes(digest[:6], "big")


# --------------------------------------------------------------------------------------------------
# A person labels


def label_by_hand(config: CfgNode, store: Store, prompts: list[str]) -> None:
    """Serve the page until Ctrl-C."""
    import_extra("uvicorn", "chat")
    import_extra("starlette", "chat")
    import desk

    model = ChatModel.load(config.model, config.device)
    model.check_prompts(config.ask, prompts)

    def make_pair(typed: str | None, id: str | None) -> Pair:
        prompt = typed
        if prompt is None:
            prompt = answers.prompt_number(prompts, store.count_from_list(), config.seed)
        seed = seed_of(config, store.count_pairs())
        return answers.sample_pair(model, config.ask, prompt, seed, typed=id)

    desk.run_desk(
        store,
        make_pair,
        who=config.who or this_person(),
        goal=config.goal,
        port=config.port,
        open_browser=config.open,
    )


# --------------------------------------------------------------------------------------------------
# A rule labels


def label_by_rule(config: CfgNode, store: Store, prompts: list[str]) -> None:
    """Label until there are `number` labels. Stopped in between, it goes on from there."""
    rule = labellers.get_rule(config.labeller)
    model = ChatModel.load(config.model, config.device)
    model.check_prompts(config.ask, prompts)
    batches = 0
    while True:
        # First what an earlier run has left open.
        before = store.count_comparisons()
        labellers.label_open_pairs(
            store, config.labeller, rule, config.flip, config.seed, config.number
        )
        decided = store.count_comparisons()
        equal = store.count_labels()["skip"]
        logger.info("%d of %d labels; %d pairs were equal", decided, config.number, equal)
        if decided >= config.number:
            return
        batches = 0 if decided > before else batches + 1
        if batches > PATIENCE:
            raise ValueError(
                f"the rule {config.labeller} found all of the last {PATIENCE * BATCH} pairs equal: "
                "choose another rule, or ask the model for more than --ask.max_new_tokens="
                f"{config.ask.max_new_tokens}"
            )
        store.add_pairs(make_pairs(config, store, model, prompts))


def make_pairs(
    config: CfgNode, store: Store, model: ChatModel, prompts: list[str]
) -> list[Pair]:
    """The next BATCH pairs, which are sampled together because that is faster."""
    first = store.count_from_list()
    batch = [answers.prompt_number(prompts, first + i, config.seed) for i in range(BATCH)]
    seed = seed_of(config, store.count_pairs())
    return [
        Pair(
            prompt=prompt,
            messages=answers.messages_for(config.ask, prompt),
            left=left,
            right=right,
            sampling={**config.ask.to_dict(), "model": model.name, "seed": seed},
        )
        for prompt, (left, right) in zip(
            batch, model.answers(config.ask, batch, 2, seed), strict=True
        )
    ]


# --------------------------------------------------------------------------------------------------
# All together


def main(args: list[str]) -> None:
    config = get_config()
    parse_args(config, args, __doc__)
    log_to_console()
    check_config(config)
    prompts = answers.read_prompts(config.prompts)
    if config.labeller:
        labellers.get_rule(config.labeller)  # a wrong name is found before a model is loaded
    store = Store(Path(config.work_dir) / "labels.db")
    who = config.who or this_person()
    import_from = getattr(config, "import")
    if import_from:
        added, total = exchange.import_labels(store, import_from, who)
        print(f"{added} of the {total} labels in {import_from} are new")
    if config.export:
        print(f"{exchange.export_labels(store, config.export)} comparisons are in {config.export}")
    if import_from or config.export:
        return
    if config.labeller:
        label_by_rule(config, store, prompts)
    else:
        label_by_hand(config, store, prompts)


if __name__ == "__main__":
    run_script(main)
