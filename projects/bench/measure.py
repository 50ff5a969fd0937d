"""
How the benchmarks measure: two sides that take turns, medians, spreads, the limits of the machine, peak memory.

On a CUDA card the clock waits until its work is done, the matrix products of training and decoding are in bf16, and memory is the card's.
"""

import json
import logging
import os
import re
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from mingpt.config import CfgNode as CN

logger = logging.getLogger("mingpt.bench")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # CUDA_VISIBLE_DEVICES= in the environment hides a card
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32  # of matrix products, on both sides
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
    start = now()
    parts = run()
    return parts if type(parts) is dict else {"": now() - start}


def now() -> float:
    """The time, once the device has done all that it was told to."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def autocast() -> torch.autocast:
    """The context in which a training step has its matrix products in DTYPE; in fp32 it changes nothing."""
    return torch.autocast(DEVICE.type, DTYPE, enabled=DTYPE != torch.float32)


# -- two processes that take turns: neither counts the memory of the other, nor has the other's settings ------------------


class SideFailed(RuntimeError):
    """A side's process has ended before its time; the message holds its last words."""


class Side:
    """One side of a case, in a process of its own that works when it is told to."""

    def __init__(self, benchmark: str, number: int, side: str, C: CN):
        options = [f"--{name}={value}" for name, value in C.leaves() if name not in ("only", "side")]
        self.errors = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("bench.py")), *options, f"--side={benchmark} {number} {side}"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True)

    def ready(self) -> bool:
        """Wait until it is prepared; False, and a line that says so, where its peer is not installed."""
        if missing := self.read():
            logger.warning("left out, since %s", missing)
        return not missing

    def read(self):
        if line := self.process.stdout.readline():
            return json.loads(line)
        self.errors.seek(0)
        raise SideFailed(f"this fails: {shlex.join(self.process.args)}: {self.errors.read().strip().rpartition(chr(10))[2]}")

    def run(self) -> dict[str, float]:
        """The seconds of one more run."""
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.read()

    def end(self) -> float:
        """The most memory the process has held, in MB."""
        return json.loads(self.process.communicate()[0])


def serve(case: Case, side: str) -> None:
    """What such a process does: prepare, say so, and run once for every line that comes."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed goes where errors go

    def say(what):
        answers.write(json.dumps(what) + "\n")
        answers.flush()

    try:
        run = case.ours() if side == "ours" else case.theirs()
    except ImportError as error:
        return say(str(error))
    say("")
    for _ in sys.stdin:
        say(clock(run))
    say(peak_megabytes())


def peak_megabytes() -> float:
    """The most memory this process has held on the card, or else as the operating system counts it.

    On Linux getrusage counts what the parent held when it forked this process, and VmHWM does not.
    """
    if DEVICE.type == "cuda" and (held := torch.cuda.max_memory_allocated()):  # none where the work is the processor's
        return held / 2**20
    if sys.platform == "linux":
        return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text()).group(1)) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def compare(benchmark: str, number: int, case: Case, C: CN) -> list[Row]:
    """Run both sides in turns, C.repeat times after one that warms up; a row for each part."""
    sides = [side for side in [Side(benchmark, number, name, C) for name in ("ours", "theirs")] if side.ready()]
    times = [defaultdict(list) for _ in sides]
    for i in range(1 + (2 if C.quick else C.repeat)):
        for side, seconds in zip(sides, times):
            for part, t in side.run().items():
                if i > 0:
                    seconds[part].append(t)
    rows = [row(case, part, *(side[part] for side in times)) for part in times[0]]
    rows[0].ours_mb, rows[0].theirs_mb = [*(side.end() for side in sides), None][:2]
    return rows


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


# -- limits -----------------------------------------------------------------------------------------------------------


def seconds(run: Callable, repeat: int) -> float:
    """The median duration of run() after a warm-up."""
    return statistics.median([clock(run)[""] for _ in range(repeat + 1)][1:])


def matrix_product_rate() -> float:
    """FLOP per second of the product that GPT-2's MLP consists of, 512 rows at a time, or on a card as many as fill it."""
    rows, times = (16384, 50) if DEVICE.type == "cuda" else (512, 1)  # a launch and a wait take as long as a card's product
    x, w = torch.randn(rows, 768, device=DEVICE, dtype=DTYPE), torch.randn(3072, 768, device=DEVICE, dtype=DTYPE)
    return times * 2 * rows * 768 * 3072 / seconds(lambda: [x @ w.t() for _ in range(times)], 50)


def memory_bandwidth() -> float:
    """Bytes per second of reading half a gigabyte, GPT-2's size, once through."""
    x, times = torch.ones(2**27, device=DEVICE), 20 if DEVICE.type == "cuda" else 1
    return times * x.numel() * 4 / seconds(lambda: [x.sum() for _ in range(times)], 10)
