"""
A GPT learns to add, from examples alone.

    python projects/adder/adder.py                                          2 digits, under a minute on two CPU cores
    python projects/adder/adder.py --data.digits=3 --trainer.max_iters=4000 --system.work_dir=out/adder3     3 digits
    python projects/adder/adder.py --ask "85+50"                            asks the trained model

A problem is written without signs, and the digits of the result from the last to the first, as one adds by hand: 85 + 50 = 135
becomes 8 5 5 0 5 3 1. The model reads the first four and is trained on the others only. Of all pairs of numbers, some are held out; what
counts is the share of those for which every digit is right. Running again continues, or asks the model that is there.
"""

import json
import logging
import re
import sys
import time
from pathlib import Path

import torch
from torch.utils.data import TensorDataset

from mingpt.checkpoint import run_script, write_text
from mingpt.model import GPT
from mingpt.run_folder import RunFolder
from mingpt.trainer import FREE_TO_CHANGE, Trainer
from mingpt.config import CfgNode as CN, parse_args
from mingpt.utils import log_to_console, set_seed

logger = logging.getLogger("mingpt.adder")


def get_config() -> CN:
    """Every option and its default."""
    C = CN()
    C.ask = ""                 # a sum, like 85+50: no training, just the answer

    C.system = CN()
    C.system.seed = 3407
    C.system.work_dir = "out/adder"

    C.data = CN()
    C.data.digits = 2          # of each of the two numbers
    C.data.held_out = 500      # problems for testing; of 2 digits there are 10,000, of 3 a million

    C.model = CN()
    C.model.n_layer = 3
    C.model.n_head = 4
    C.model.n_embd = 64

    C.trainer = Trainer.get_default_config()
    C.trainer.max_iters = 2000
    C.trainer.batch_size = 256
    C.trainer.learning_rate = 3e-3
    C.trainer.lr_schedule = "cosine"
    C.trainer.warmup_iters = 100
    C.trainer.log_every = 100
    del C.trainer.work_dir     # it is system.work_dir
    return C


def split(C: CN) -> tuple[torch.Tensor, torch.Tensor]:
    """All pairs of numbers in a random order that the seed fixes: (those to train on, those held out), (N, 2) each."""
    n = 10 ** C.data.digits
    order = torch.randperm(n * n, generator=torch.Generator().manual_seed(C.system.seed))
    pairs = torch.stack([order // n, order % n], dim=1)
    return pairs[C.data.held_out:], pairs[:C.data.held_out]


def digits_of(numbers: torch.Tensor, n: int) -> torch.Tensor:
    """The last n digits of numbers (N,), the last one first: (N, n)."""
    return numbers[:, None] // 10 ** torch.arange(n) % 10


def question(problems: torch.Tensor, n: int) -> torch.Tensor:
    """What the model reads of problems (N, 2): both numbers as they are written, (N, 2n)."""
    return torch.cat([digits_of(numbers, n).flip(1) for numbers in problems.unbind(1)], dim=1)


def examples(problems: torch.Tensor, n: int) -> TensorDataset:
    """(x, y) of 3n tokens each: question and answer, and the next token at every place, -1 where that is the question's."""
    tokens = torch.cat([question(problems, n), digits_of(problems.sum(1), n + 1)], dim=1)
    y = tokens[:, 1:].clone()
    y[:, :2 * n - 1] = -1
    return TensorDataset(tokens[:, :-1], y)


def solve(model: GPT, problems: torch.Tensor, n: int) -> torch.Tensor:
    """The model's sums for problems (N, 2) -> (N,)."""
    x = question(problems, n).to(next(model.parameters()).device)
    answers = model.generate(x, n + 1)[:, 2 * n:].cpu()
    return (answers * 10 ** torch.arange(n + 1)).sum(1)


def new_model(C: CN) -> GPT:
    config = GPT.get_default_config()
    config.merge_from_dict({**C.model.to_dict(), "vocab_size": 10, "block_size": 3 * C.data.digits,
                            "embd_pdrop": 0.0, "resid_pdrop": 0.0, "attn_pdrop": 0.0})
    return GPT(config)


def ask(text: str, folder: Path) -> None:
    """Print the trained model's answer to a sum."""
    if not (numbers := re.fullmatch(r"\s*(\d+)\s*\+\s*(\d+)\s*", text)):
        raise ValueError(f"--ask={text!r} is no sum like 85+50")
    if not (folder / "model").exists():
        raise ValueError(f"{folder} has no trained model: run without --ask first")
    model = GPT.from_pretrained(folder / "model")
    digits, (a, b) = model.config.block_size // 3, map(int, numbers.groups())
    if max(a, b) >= 10 ** digits:
        raise ValueError(f"the model of {folder} adds numbers of up to {digits} digits, not {text}")
    answer = int(solve(model, torch.tensor([[a, b]]), digits))
    sys.stdout.write(f"{a} + {b} = {answer}" + (f", it says; it is {a + b}" if answer != a + b else "") + "\n")


def main(args: list[str]) -> None:
    C = get_config()
    parse_args(C, args, __doc__)
    work_dir = Path(C.system.work_dir)
    if C.ask:
        return ask(C.ask, work_dir)
    log_to_console()
    start = time.time()
    set_seed(C.system.seed)
    train, test = split(C)
    RunFolder(work_dir).claim(dict(C.leaves()), free={"ask", "system.work_dir", *(f"trainer.{name}" for name in FREE_TO_CHANGE)})
    C.trainer.work_dir = str(work_dir)
    trainer = Trainer(C.trainer, new_model(C), examples(train, C.data.digits))
    trainer.run()
    if trainer.rank > 0:
        return
    model = trainer.model.eval()
    answers = solve(model, test, C.data.digits)
    for (a, b), answer in zip(test.tolist(), answers.tolist()):
        if answer != a + b:
            logger.info("%d + %d = %d, it says; it is %d", a, b, answer, a + b)
    accuracy = (answers == test.sum(1)).double().mean().item()
    model.save_pretrained(work_dir / "model")
    summary = {"digits": C.data.digits, "accuracy": accuracy, "held_out": len(test), "seconds": round(time.time() - start + trainer.resumed_seconds, 1)}
    write_text(work_dir / "summary.json", json.dumps(summary, indent=2) + "\n")
    logger.info("%.1f%% of %d problems never seen, in %.0f s; the model is in %s", 100 * accuracy, len(test), summary["seconds"], work_dir)


if __name__ == "__main__":
    run_script(main)
