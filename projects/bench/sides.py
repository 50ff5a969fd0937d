"""
Two processes that take turns: one for each side of a case.

With a process each, neither side's memory counts for the other, and neither side's settings change
the other. A process is `bench.py --side="decode 0 ours"`. It prepares its work and then answers its
parent in lines of JSON, each behind the word in ANSWER:

    parent                          side
                                    "" when it is ready, or a message if a package is missing
    an empty line: run once         {part: seconds}
    ...                             ...
    the end of the input            its peak memory in MB
"""

import contextlib
import json
import logging
import shlex
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from measure import Case, Row, clock, make_row, peak_megabytes
from mingpt.config import CfgNode

logger = logging.getLogger("mingpt.bench")

ANSWER = "answer: "  # how the side's answers begin; other lines are what some library prints


# ----------------------------------------------------------------------------------------------
# the parent: start both sides and let them take turns


def compare(benchmark: str, number: int, case: Case, config: CfgNode) -> list[Row]:
    """Time both sides of case `number` of a benchmark. One row for each part of the case.

    The first row is that of the case as a whole. Raises SideFailed if a process dies.
    """
    timed_runs = 2 if config.quick else config.repeat
    with (
        start_side(benchmark, number, "ours", config) as ours,
        start_side(benchmark, number, "theirs", config) as theirs,
    ):
        # Both prepare at the same time, but from then on only one of them works at a time.
        sides = [side for side in (ours, theirs) if side.ready()]
        if ours not in sides:
            return []
        for side in sides:
            side.run()  # a warm-up, which does not count
        for _ in range(timed_runs):
            for side in sides:
                side.run_and_record()

        rows = []
        for part, seconds in ours.seconds.items():
            row = make_row(case, part, seconds, theirs.seconds.get(part), benchmark)
            log_row(row)
            rows.append(row)
        rows[0].ours_mb = ours.end()
        if theirs in sides:
            rows[0].theirs_mb = theirs.end()
    return rows


def log_row(row: Row) -> None:
    theirs = "-"
    ratio = "-"
    if row.theirs is not None:
        theirs = f"{row.theirs:.4g}"
    if row.ratio is not None:
        ratio = f"{row.ratio:.2f}"
    logger.info(
        "%s: %.4g %s/s, %s %s, ratio %s  %s",
        row.work,
        row.ours,
        row.unit,
        row.peer,
        theirs,
        ratio,
        row.limit,
    )


class SideFailed(RuntimeError):
    """The process of a side ended too early; the message holds the last line of its errors."""


@contextlib.contextmanager
def start_side(benchmark: str, number: int, name: str, config: CfgNode) -> Iterator["Side"]:
    """`with start_side("decode", 0, "ours", config) as side`: the process ends with the block."""
    command = [sys.executable, str(Path(__file__).with_name("bench.py"))]
    for option, value in config.leaves():
        if option not in ("only", "side"):
            command.append(f"--{option}={value}")
    command.append(f"--side={benchmark} {number} {name}")
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors,
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            encoding="utf-8",
            errors="replace",
        ) as process,
    ):
        yield Side(process, errors)


class Side:
    """One side as its parent sees it: tells the process to run, records how long that took."""

    def __init__(self, process: subprocess.Popen[str], errors: TextIO):
        self.process = process
        self.errors = errors  # what the process writes to stderr
        self.seconds: dict[str, list[float]] = defaultdict(list)  # for each part, of each run

    def ready(self) -> bool:
        """Wait until the process is ready. False, with a warning, if its package is missing."""
        missing = self.read_answer()
        if missing:
            logger.warning("a side is left out: %s", missing)
        return not missing

    def run(self) -> dict[str, float]:
        """Have the process run once. {part: seconds}."""
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.read_answer()

    def run_and_record(self) -> None:
        for part, seconds in self.run().items():
            self.seconds[part].append(seconds)

    def end(self) -> float | None:
        """End the process. Its peak memory in MB, or None where that is not known."""
        self.process.stdin.close()
        return self.read_answer()

    def read_answer(self) -> Any:
        for line in self.process.stdout:
            if line.startswith(ANSWER):
                return json.loads(line.removeprefix(ANSWER))
        # No such line means that the process is dead.
        self.errors.seek(0)
        last_line = self.errors.read().strip().rpartition("\n")[2]
        raise SideFailed(f"{shlex.join(self.process.args)} failed with: {last_line}")


# ----------------------------------------------------------------------------------------------
# the side: work on demand


def serve(case: Case, side: str) -> None:
    """Be one side of a case: prepare the work, then run it once for every line of the input."""

    def answer(value: object) -> None:
        sys.stdout.write(f"\n{ANSWER}{json.dumps(value)}\n")
        sys.stdout.flush()

    prepare = case.ours if side == "ours" else case.theirs
    try:
        run = prepare()
    except ImportError as error:
        answer(str(error))
        return
    answer("")
    for _ in sys.stdin:
        answer(clock(run))
    answer(peak_megabytes())
