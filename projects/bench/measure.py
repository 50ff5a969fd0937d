"""
What is measured and how: cases, the clock, the rows of the table, the limits of the machine.

On a CUDA card the clock waits until the card has finished, both sides compute the matrix products
of training and decoding in bf16, and memory is the card's.
"""

import logging
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from mingpt.utils import peak_memory_mb

logger = logging.getLogger("mingpt.bench")

# To measure the CPU of a machine that has a card, set CUDA_VISIBLE_DEVICES= in the environment.
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32  # of matrix products

# What is timed: a function that does a piece of work once. Its result is ignored, unless it is a
# dict: a run may time itself and return {part: seconds}, where the part "" is the run as a whole.
Run = Callable[[], object]


@dataclass
class Limit:
    """What the machine allows at most."""

    name: str
    rate: Callable[[], float]  # measures it: units of work per second


@dataclass
class Case:
    """A piece of work that both this library and a peer can do.

    Each side is a function that prepares the work (untimed) and returns what is timed.
    """

    work: str  # what is done, in words
    unit: str  # what the work is counted in, tokens for instance
    amount: float  # how many units one run does
    ours: Callable[[], Run]
    peer: str  # the name of the other side
    theirs: Callable[[], Run]
    limit: Limit | None = None
    memory_only: bool = False  # the sides do different things, of which the memory is compared
    slow: bool = False  # left out by --quick


@dataclass
class Row:
    """One line of the table: a case as a whole, or one part of it."""

    work: str
    unit: str
    peer: str
    ours: float  # units per second
    theirs: float | None  # the same for the peer; None if it is not installed
    ratio: float | None  # ours / theirs
    spread: float  # of our times: (slowest - fastest) / median
    limit: str = ""  # our rate as a share of the limit, in words
    ours_mb: float | None = None  # peak memory of our process
    theirs_mb: float | None = None
    benchmark: str = ""  # the name that --only knows
    part: str = ""  # "" for the case as a whole


def make_row(
    case: Case,
    part: str,
    our_seconds: list[float],
    their_seconds: list[float] | None = None,
    benchmark: str = "",
) -> Row:
    """The row of one part of a case, from the seconds of each run. Speeds come from medians."""
    our_median = statistics.median(our_seconds)
    our_rate = case.amount / our_median

    peer = f"{case.peer}: not installed"
    their_rate = None
    ratio = None
    if their_seconds:
        peer = case.peer
        their_rate = case.amount / statistics.median(their_seconds)
        if not case.memory_only:
            ratio = our_rate / their_rate

    limit = ""
    if case.limit:
        limit = f"{our_rate / case.limit.rate():.0%} of the {case.limit.name}"
    return Row(
        work=f"{case.work}: {part}" if part else case.work,
        unit=case.unit,
        peer=peer,
        ours=our_rate,
        theirs=their_rate,
        ratio=ratio,
        spread=(max(our_seconds) - min(our_seconds)) / our_median,
        limit=limit,
        benchmark=benchmark,
        part=part,
    )


# ----------------------------------------------------------------------------------------------
# time and memory


def now() -> float:
    """The time in seconds, once the device has finished all that was queued on it."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def clock(run: Run) -> dict[str, float]:
    """Run once. {part: seconds}, where the part "" is the run as a whole."""
    start = now()
    result = run()
    # Not isinstance: a model's output in transformers is a dict, too, of a class derived from it.
    if type(result) is dict:
        return result
    return {"": now() - start}


def median_seconds(run: Run, repeat: int) -> float:
    """The median time of `repeat` runs, after one warm-up run that does not count."""
    clock(run)
    return statistics.median([clock(run)[""] for _ in range(repeat)])


def autocast() -> torch.autocast:
    """The context in which a training step computes its matrix products in DTYPE."""
    return torch.autocast(DEVICE.type, DTYPE, enabled=DTYPE is not torch.float32)


def peak_megabytes() -> float | None:
    """The most memory that this process has held, in MB: on the card if it used one, else in RAM.

    None where the operating system does not count it.
    """
    if DEVICE.type == "cuda":
        card_bytes = torch.cuda.max_memory_allocated()
        if card_bytes > 0:  # zero if all the work was done on the CPU
            return card_bytes / 2**20
    return peak_memory_mb()


# ----------------------------------------------------------------------------------------------
# limits of the machine


def matrix_product_rate() -> float:
    """FLOP per second of the first matrix product in GPT-2's MLP: (rows, 768) times (768, 3072)."""
    rows = 512
    products = 1
    if DEVICE.type == "cuda":
        rows = 16384  # enough to fill a card
        products = 50  # timed together, since launching and waiting take as long as one of them
    x = torch.randn(rows, 768, device=DEVICE, dtype=DTYPE)
    w = torch.randn(3072, 768, device=DEVICE, dtype=DTYPE)

    def run() -> list[torch.Tensor]:
        return [x @ w.t() for _ in range(products)]

    flop = 2 * rows * 768 * 3072  # a multiplication and an addition per element of w and row of x
    return products * flop / median_seconds(run, repeat=50)


def memory_bandwidth() -> float:
    """Bytes per second of reading 512 MB once through. GPT-2 in fp32 is about as large."""
    sums = 20 if DEVICE.type == "cuda" else 1
    x = torch.ones(2**27, device=DEVICE)  # fp32: 4 bytes each

    def run() -> list[torch.Tensor]:
        return [x.sum() for _ in range(sums)]

    return sums * x.numel() * 4 / median_seconds(run, repeat=10)
