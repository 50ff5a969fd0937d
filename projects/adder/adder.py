"""
A GPT learns to add two numbers, from examples alone.

    python projects/adder/adder.py                  train, then test; a minute on two CPU cores
    python projects/adder/adder.py --ask "85+50"    ask the trained model

A problem is a row of digits without any signs: the two numbers, then their sum. The sum is
written backwards, because that is how one adds by hand: the last digit first, then the carry.

    85 + 50 = 135    becomes    8 5 5 0 5 3 1

The model reads the first four digits and learns to predict the last three. Some problems are
held out from training. The result is the share of those that the model solves; an answer counts
as solved only if every digit is right.

Read this file from top to bottom: config, data, model, report, and in `main` all of them together
with the training. Running the script again continues an interrupted run.
"""

import re
import time
from pathlib import Path

import torch
from torch.utils.data import TensorDataset

from mingpt.checkpoint import run_script, to_json, write_text
from mingpt.config import CfgNode, check_numbers, documented, parse_args
from mingpt.model import GPT
from mingpt.run_folder import RunFolder
from mingpt.trainer import FREE_TO_CHANGE, Trainer
from mingpt.utils import log_to_console, set_seed

# -- config ----------------------------------------------------------------------------------------


@documented
def get_config() -> CfgNode:
    """Every option and its default."""
    C = CfgNode()
    C.ask = ""                 # a sum like 85+50: do not train, print the trained model's answer

    C.system = CfgNode()
    C.system.seed = 3407       # fixes the held-out problems, the initial weights and the batches
    C.system.work_dir = "out/adder"  # the folder for the model, its metrics and checkpoints

    C.data = CfgNode()
    C.data.digits = 2          # of each of the two numbers
    C.data.held_out = 500      # problems to test on: of 10,000 with 2 digits, a million with 3

    C.model = CfgNode()
    C.model.n_layer = 3        # transformer blocks
    C.model.n_head = 4         # attention heads in each block
    C.model.n_embd = 64        # channels

    C.trainer = Trainer.get_default_config()
    C.trainer.max_iters = 2000
    C.trainer.batch_size = 256
    C.trainer.learning_rate = 3e-3
    C.trainer.lr_schedule = "cosine"
    C.trainer.warmup_iters = 100
    C.trainer.log_every = 100
    del C.trainer.work_dir     # it is system.work_dir
    return C


# -- data ------------------------------------------------------------------------------------------


def split(config: CfgNode) -> tuple[torch.Tensor, torch.Tensor]:
    """All pairs of numbers in a random order: (those to train on, those held out), each (N, 2)."""
    n = 10**config.data.digits
    generator = torch.Generator().manual_seed(config.system.seed)
    order = torch.randperm(n * n, generator=generator)
    pairs = torch.stack([order // n, order % n], dim=1)  # the number a·n + b stands for (a, b)
    return pairs[config.data.held_out:], pairs[:config.data.held_out]


def digits_of(numbers: torch.Tensor, n: int) -> torch.Tensor:
    """The last n digits of numbers (N,), from the last digit to the first: (N, n)."""
    powers_of_ten = 10 ** torch.arange(n)
    return numbers[:, None] // powers_of_ten % 10


def question(problems: torch.Tensor, n: int) -> torch.Tensor:
    """What the model reads of problems (N, 2): both numbers as we write them, (N, 2n)."""
    first, second = problems.unbind(dim=1)
    return torch.cat([digits_of(first, n).flip(1), digits_of(second, n).flip(1)], dim=1)


def examples(problems: torch.Tensor, n: int) -> TensorDataset:
    """Training examples (x, y) of 3n tokens each, for problems (N, 2).

    At every position, y is the token that follows in x. The loss ignores y where it is -1: the
    digits of the question are not for the model to predict.
    """
    answer = digits_of(problems.sum(dim=1), n + 1)                # (N, n + 1), last digit first
    tokens = torch.cat([question(problems, n), answer], dim=1)    # (N, 3n + 1)
    x = tokens[:, :-1]
    y = tokens[:, 1:].clone()
    y[:, :2 * n - 1] = -1  # the last digit of the question already predicts the answer's first
    return TensorDataset(x, y)


# -- model -----------------------------------------------------------------------------------------


def new_model(config: CfgNode) -> GPT:
    """A GPT with random weights, whose vocabulary is the ten digits."""
    gpt_config = GPT.get_default_config()
    gpt_config.merge_from_dict(config.model.to_dict())
    gpt_config.vocab_size = 10
    gpt_config.block_size = 3 * config.data.digits
    gpt_config.embd_pdrop = 0.0   # no dropout: neither of embeddings,
    gpt_config.resid_pdrop = 0.0  # nor of what a block adds to its input,
    gpt_config.attn_pdrop = 0.0   # nor of attention weights
    return GPT(gpt_config)


def solve(model: GPT, problems: torch.Tensor, n: int) -> torch.Tensor:
    """The sums that the model gives for problems (N, 2): (N,)."""
    device = next(model.parameters()).device
    tokens = model.generate(question(problems, n).to(device), n + 1)   # (N, 3n + 1)
    answers = tokens[:, 2 * n:].cpu()                                  # (N, n + 1)
    return (answers * 10 ** torch.arange(n + 1)).sum(dim=1)


def ask(text: str, work_dir: Path) -> str:
    """The trained model's answer to a sum like '85+50', as a sentence."""
    match = re.fullmatch(r"\s*(\d+)\s*\+\s*(\d+)\s*", text)
    if not match:
        raise ValueError(f"got --ask={text!r}; expected a sum like 85+50")
    if not (work_dir / "model").exists():
        raise ValueError(f"{work_dir} has no trained model: run this script without --ask first")
    model = GPT.from_pretrained(work_dir / "model")
    digits = model.config.block_size // 3
    a, b = int(match[1]), int(match[2])
    if max(a, b) >= 10**digits:
        raise ValueError(f"got --ask={text}; the model in {work_dir} adds numbers of up to "
                         f"{digits} digits")
    answer = int(solve(model, torch.tensor([[a, b]]), digits))
    return describe(a, b, answer)


# -- report ----------------------------------------------------------------------------------------

HOW_TO_USE_IT = """
To use the model from Python:

import torch
from mingpt.model import GPT

model = GPT.from_pretrained("{folder}")
digits = model.generate(torch.tensor({question}), {answer_length})[0].tolist()
print(digits)  # both numbers, then their sum from its last digit to its first"""


def describe(a: int, b: int, answer: int) -> str:
    """A problem and its solution, and what the model says where that is something else."""
    sentence = f"{a} + {b} = {a + b}"
    if answer != a + b:
        sentence += f", but the model says {answer}"
    return sentence


def report(config: CfgNode, model: GPT, problems: torch.Tensor, seconds: float) -> None:
    """Test the model on held-out problems (N, 2), save both, and print the result."""
    work_dir, n = Path(config.system.work_dir), config.data.digits
    answers = solve(model, problems, n)
    correct = answers == problems.sum(dim=1)
    accuracy = correct.double().mean().item()

    model.save_pretrained(work_dir / "model")
    summary = {
        "digits": n,
        "accuracy": accuracy,
        "held_out": len(problems),
        "seconds": round(seconds, 1),
    }
    write_text(work_dir / "summary.json", to_json(summary, indent=2) + "\n")

    print_mistakes(problems[~correct], answers[~correct])
    print(f"The model solves {100 * accuracy:.1f}% of {len(problems)} held-out problems.")
    print(f"This took {seconds:.0f} s. The model is in {work_dir / 'model'}.")
    example = torch.tensor([[85, 50]]) % 10**n  # a model of one digit is asked 5 + 0
    print(HOW_TO_USE_IT.format(
        folder=(work_dir / "model").as_posix(),
        question=question(example, n).tolist(),
        answer_length=n + 1,
    ))


def print_mistakes(problems: torch.Tensor, answers: torch.Tensor, most: int = 10) -> None:
    """Print the first few of the problems (N, 2) that got these wrong answers (N,)."""
    for (a, b), answer in zip(problems[:most].tolist(), answers[:most].tolist(), strict=True):
        print(describe(a, b, answer))
    if len(problems) > most:
        print(f"... and {len(problems) - most} more")


# -- all together ----------------------------------------------------------------------------------


def main(args: list[str]) -> None:
    config = get_config()
    parse_args(config, args, __doc__)
    work_dir = Path(config.system.work_dir)
    if config.ask:
        print(ask(config.ask, work_dir))
        return

    check_numbers(config.data, "digits", "held_out", low=1, whole=True)
    log_to_console()
    start = time.time()
    set_seed(config.system.seed)
    # A folder holds one run. To continue it, all options must be the same, except these.
    free = {"ask", "system.work_dir", *(f"trainer.{name}" for name in FREE_TO_CHANGE)}
    RunFolder(work_dir).claim(dict(config.leaves()), free)

    # Data: which problems are trained on, and which are held out.
    train_problems, test_problems = split(config)
    # Model: it starts from random weights.
    model = new_model(config)
    # Train: minimize the cross-entropy of the answers' digits.
    config.trainer.work_dir = str(work_dir)
    trainer = Trainer(config.trainer, model, examples(train_problems, config.data.digits))
    trainer.run()
    # Report: only the first process does, if torchrun has started many.
    if trainer.rank == 0:
        seconds = time.time() - start + trainer.resumed_seconds
        report(config, trainer.model.eval(), test_problems, seconds)


if __name__ == "__main__":
    run_script(main)
