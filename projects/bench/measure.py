"""
How the benchmarks measure: two sides that take turns, medians, spreads, the limits of the machine, peak memory.
"""

import json
import logging
import resource
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from mingpt.utils import CfgNode as CN

logger = logging.getLogger("mingpt.bench")

Run = Callable[[], object]  # what is timed; it may return {part: seconds}, "" being all of it, to have its parts reported


@dataclass
class Case:
    """Work that can be done here and elsewhere. Each side is a function that prepares it and returns what is timed."""

    work: str
    unit: str
    amount: float  # of units in one run
    ours: Callable[[], Run]
    peer: str
    theirs: Callable[[], Run]
    limit: tuple[str, Callable[[], float]] | None = None  # its name, and how many units per second it allows
    slow: bool = False  # not for --quick
    memory: bool = True  # worth measuring


@dataclass
class Row:
    """One line of the table: units per second of both sides, our share of the limit, and peak memory in MB."""

    work: str
    unit: str
    peer: str
    ours: float
    theirs: float | None
    ratio: float | None
    spread: float  # of our times: (slowest - fastest) / median
    limit: str = ""
    ours_mb: float | None = None
    theirs_mb: float | None = None


def clock(run: Run) -> dict[str, float]:
    """What run() took, in seconds, and its parts, if it tells."""
    start = time.perf_counter()
    parts = run()
    return parts if isinstance(parts, dict) else {"": time.perf_counter() - start}


def compare(case: Case, repeat: int) -> list[Row]:
    """Run both sides in turns, `repeat` times after one that warms up; a row for each part."""
    sides = [case.ours()]
    try:
        sides.append(case.theirs())
    except ImportError as error:
        logger.warning("%s: left out, since %s", case.peer, error)
    times = [defaultdict(list) for _ in sides]
    for i in range(repeat + 1):
        for side, run in zip(times, sides):
            for part, seconds in clock(run).items():
                if i > 0:
                    side[part].append(seconds)
    return [row(case, part, *(side[part] for side in times)) for part in times[0]]


def row(case: Case, part: str, ours: list[float], theirs: list[float] | None = None) -> Row:
    """The row of one part of a case, from the seconds of each run."""
    rate = case.amount / statistics.median(ours)
    other = case.amount / statistics.median(theirs) if theirs else None
    share = f"{rate / case.limit[1]():.0%} of the {case.limit[0]}" if case.limit else ""
    result = Row(f"{case.work}: {part}" if part else case.work, case.unit, case.peer if theirs else f"{case.peer}: not installed", rate,
                 other, rate / other if other else None, (max(ours) - min(ours)) / statistics.median(ours), share)
    logger.info("%s: %.4g %s/s, %s %s, ratio %s  %s", result.work, rate, case.unit, result.peer, f"{other:.4g}" if other else "-",
                f"{result.ratio:.2f}" if other else "-", share)
    return result


# -- memory: a process of its own for each side, so that neither counts what the other holds --------------------------------


def peak_megabytes(benchmark: str, number: int, side: str, C: CN) -> float | None:
    """The peak memory of a process that does nothing but one side of a case, twice; None where that failed."""
    options = [f"--{name}={value}" for name, value in C.leaves() if name not in ("only", "memory")]
    child = subprocess.run([sys.executable, str(Path(__file__).with_name("bench.py")), *options, f"--memory={benchmark} {number} {side}"],
                           capture_output=True, text=True)
    return json.loads(child.stdout.splitlines()[-1]) if child.returncode == 0 else None


def measure_memory(case: Case, side: str) -> float:
    """What that process does: the most memory it has held, in MB, as the operating system counts it."""
    run = case.ours() if side == "ours" else case.theirs()
    for _ in range(2):
        run()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


# -- limits -----------------------------------------------------------------------------------------------------------


def seconds(run: Callable, repeat: int) -> float:
    """The median duration of run() after a warm-up."""
    return statistics.median([clock(run)[""] for _ in range(repeat + 1)][1:])


def matrix_product_rate() -> float:
    """FLOP per second of the product that GPT-2's MLP consists of, 512 rows at a time."""
    x, w = torch.randn(512, 768), torch.randn(3072, 768)
    return 2 * 512 * 768 * 3072 / seconds(lambda: x @ w.t(), 50)


def memory_bandwidth() -> float:
    """Bytes per second of reading half a gigabyte, GPT-2's size, once through."""
    x = torch.ones(2**27)
    return x.numel() * 4 / seconds(x.sum, 10)
