"""
Random calls over the whole public API: right answers where the input is right, else a clear error.

    python -m tests.fuzz --calls 10000 --seed 1          prints counts by function, and each failure
    python -m tests.fuzz --calls 500 --only masked_mean  calls of one function (a part of its name)
    python -m tests.fuzz --first 4711 --calls 1          one call again, by its number

A generator makes up the arguments of one function, as source code. Half of the calls get right
arguments, and the result is compared with an independent answer: a loop in float64, PyTorch's own
functions, tiktoken, transformers, or a property that must hold. In the others one argument is
replaced by a wrong one. Then the function must raise ValueError, TypeError, or what its docstring
names, with a message that says which argument is wrong or what it was. What can happen instead:

    wrong          right input, and another result than the independent one
    refused        right input, and an exception
    silent         wrong input, and no exception
    undocumented   wrong input, and an exception that is neither ValueError nor TypeError, nor named
                   in the docstring
    mute           the right exception, with a message that does not say what came

Each call is a function of the seed and its number. A failure is printed as the lines that reproduce
it, to be run after `from tests.fuzz_names import *`. The generators are in tests/fuzz_calls.
"""

import argparse
import contextlib
import inspect
import io
import logging
import random
import re
import signal
import socket
import sys
import time
import traceback
import unittest.mock
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from tests import fuzz_names
from tests.fuzz_names import clear_folder

SECONDS = 60  # a call that takes longer hangs
OUTCOMES = ("right", "documented", "wrong", "refused", "silent", "undocumented", "mute")
FAILURES = OUTCOMES[2:]


class Draw(random.Random):
    """Random choices, and random tensors as the source code that makes them."""

    def number(self) -> int:
        """A seed."""
        return self.randrange(10**6)

    def floats(self, *shape: int, scale: float = 1.0) -> str:
        """A tensor of normal numbers."""
        return f"floats({self.number()}, {shape}, {scale})"

    def ids(self, *shape: int, vocab: int = 11) -> str:
        """A LongTensor below vocab."""
        return f"ids({self.number()}, {shape}, {vocab})"

    def mask(self, *shape: int) -> str:
        """A mask, as bools or numbers."""
        kind = self.choice(["torch.bool", "torch.long", "torch.float32"])
        return f"bits({self.number()}, {shape}, {kind})"

    def likely(self, probability: float) -> bool:
        """True with that probability."""
        return self.random() < probability


@dataclass
class Plan:
    """A call that a generator proposes, and what may be spoilt in it."""

    # What is called: source code, for instance "masked_mean" or "model.generate".
    function: str
    # {name: source}. Names that begin with "_1", "_2", ... are given by position.
    arguments: dict[str, str]
    # right(result, **arguments): raises AssertionError where the result of right input is wrong.
    right: Callable[..., Any]
    # {argument: [source of a wrong value]}.
    wrong: dict[str, list[str]] = field(default_factory=dict)
    # Statements that come first.
    setup: list[str] = field(default_factory=list)
    # What an error about each argument may say instead of its name.
    alias: dict[str, str] = field(default_factory=dict)
    # Exceptions that the documentation of this function names, beside those in its docstring.
    raises: tuple[str, ...] = ()


@dataclass
class Outcome:
    """What became of a call."""

    function: str
    outcome: str
    lines: list[str]
    reason: str = ""


GENERATORS: dict[str, tuple[Callable[[Draw], Plan], float]] = {}


def generator(name: str, weight: float = 1.0) -> Callable:
    """Decorator for a generator: the name of its function in the counts, and how often it comes."""

    def register(function: Callable[[Draw], Plan]) -> Callable[[Draw], Plan]:
        assert name not in GENERATORS, name
        GENERATORS[name] = (function, weight)
        return function

    return register


# --------------------------------------------------------------------------------------------------
# One call


def fuzz_one(name: str, seed: int, number: int) -> Outcome:
    """Make call number `number` of a run with this seed, of the function `name`."""
    draw = Draw(f"{seed} {number}")
    plan = GENERATORS[name][0](draw)
    spoilt = choose_spoilt(draw, plan)
    sources = plan.arguments | spoilt
    lines = [*plan.setup, call_line(plan.function, sources)]
    names = dict(vars(fuzz_names))
    clear_folder()
    torch.manual_seed(number)
    np.random.seed(number)
    random.seed(number)
    values: dict[str, Any] = {}
    with quiet(), limited(SECONDS):
        # The arguments are made outside of the try: they are ours.
        for line in plan.setup:
            exec(line, names)
        for argument, source in sources.items():
            values[argument] = eval(source, names)
        function = eval(plan.function, names)
        before = snapshot(values)
        try:
            result = function(*positional(values), **by_keyword(values))
            if inspect.isgenerator(result):
                result = list(result)
        except Exception as error:
            return judge_error(name, plan, spoilt, values, function, error, lines)
        if spoilt:
            text = f"{describe(spoilt)} accepted, and gave {result!r:.200}"
            return Outcome(name, "silent", lines, text)
        try:
            assert snapshot(values) == before, "an argument has changed"
            plan.right(result, **{name_of(key): value for key, value in values.items()})
        except Exception as error:
            return Outcome(name, "wrong", lines, f"{reason_of(error)}; the result {result!r:.200}")
    return Outcome(name, "right", lines)


def choose_spoilt(draw: Draw, plan: Plan) -> dict[str, str]:
    """{argument: wrong source}, for half of all calls: one argument, now and then two."""
    if not plan.wrong or draw.likely(0.5):
        return {}
    count = 2 if len(plan.wrong) > 1 and draw.likely(0.1) else 1
    arguments = draw.sample(sorted(plan.wrong), count)
    return {argument: draw.choice(plan.wrong[argument]) for argument in arguments}


def judge_error(
    name: str,
    plan: Plan,
    spoilt: dict[str, str],
    values: dict[str, Any],
    function: Any,
    error: Exception,
    lines: list[str],
) -> Outcome:
    """The outcome of a call that raised."""
    if not spoilt:
        return Outcome(name, "refused", lines, reason_of(error))
    kinds = [kind.__name__ for kind in type(error).__mro__]
    documentation = " ".join(filter(None, (inspect.getdoc(function), *plan.raises)))
    documented = {"ValueError", "TypeError"} | set(re.findall(r"\b[A-Z]\w+", documentation))
    generic = {"Exception", "BaseException", "object"}
    if not documented - generic & set(kinds) - generic:
        return Outcome(name, "undocumented", lines, reason_of(error))
    if not any(says(str(error), plan, argument, values[argument]) for argument in spoilt):
        return Outcome(name, "mute", lines, reason_of(error))
    return Outcome(name, "documented", lines)


def says(message: str, plan: Plan, argument: str, value: Any) -> bool:
    """Whether an error message names the argument or what came."""
    type_name = re.escape(type(value).__name__)
    clues = [re.escape(name_of(argument)), rf"\b{type_name}\b(?!\()"]
    if argument in plan.alias:
        clues.append(plan.alias[argument])
    if torch.is_tensor(value) or isinstance(value, np.ndarray):
        clues.append(re.escape(str(tuple(value.shape))))
        clues.append(re.escape(str(value.dtype)))
    elif isinstance(value, (str, int, float, list, tuple, bytes, type(None))):
        clues.append(re.escape(repr(value)[:20]))
        if isinstance(value, str):
            clues.append(re.escape(value[:20]))
    return any(clue and re.search(clue, message) for clue in clues)


def call_line(function: str, sources: dict[str, str]) -> str:
    """The source of the call."""
    parts = [s if is_positional(name) else f"{name}={s}" for name, s in sources.items()]
    return f"{function}({', '.join(parts)})"


def is_positional(name: str) -> bool:
    """Whether an argument is given by position."""
    return name.startswith("_")


def name_of(argument: str) -> str:
    """The name of an argument without the mark of those that are given by position."""
    return argument.lstrip("_0123456789") if is_positional(argument) else argument


def positional(values: dict[str, Any]) -> list[Any]:
    """The arguments that are given by position."""
    return [value for name, value in values.items() if is_positional(name)]


def by_keyword(values: dict[str, Any]) -> dict[str, Any]:
    """The arguments that are given by name."""
    return {name: value for name, value in values.items() if not is_positional(name)}


def snapshot(values: dict[str, Any]) -> list[tuple]:
    """The numbers of the tensors among the arguments, which no function may change."""
    tensors = [value for value in values.values() if torch.is_tensor(value)]
    return [(tuple(x.shape), x.detach().to(torch.float64).nan_to_num().tolist()) for x in tensors]


def describe(sources: dict[str, str]) -> str:
    """The spoilt arguments, for people."""
    return ", ".join(f"{name}={source}" for name, source in sources.items())


def reason_of(error: BaseException) -> str:
    """An exception and where it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    last = frames[-1] if frames else None
    place = f" [{last.filename.rsplit('/', 1)[-1]}:{last.lineno}]" if last else ""
    return f"{type(error).__name__}: {error!s:.300}{place}"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Within, nothing is printed or logged."""
    logger = logging.getLogger("mingpt")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Within, a call that takes longer raises TimeoutError. Only in the main thread, on Unix."""
    if not hasattr(signal, "setitimer"):
        yield
        return

    def stop(number: int, frame: Any) -> None:
        raise TimeoutError(f"no answer after {seconds} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


# --------------------------------------------------------------------------------------------------
# Many calls


def fuzz(calls: int, seed: int, first: int = 0, only: str = "") -> Iterator[Outcome]:
    """Make so many random calls."""
    import tests.fuzz_calls  # noqa: F401  # registers the generators

    names = [name for name in GENERATORS if only in name]
    weights = [GENERATORS[name][1] for name in names]
    if not names:
        raise ValueError(f"only={only!r}: no generator has it in its name")
    with no_network():
        for number in range(first, first + calls):
            [name] = random.Random(f"{seed} {number} which").choices(names, weights)
            yield fuzz_one(name, seed, number)


@contextlib.contextmanager
def no_network() -> Iterator[None]:
    """Within, nobody gets a connection."""
    refuse = unittest.mock.Mock(side_effect=ConnectionRefusedError("no network in a fuzzer"))
    with unittest.mock.patch.object(socket.socket, "connect", refuse):
        yield


def table(outcomes: list[Outcome]) -> str:
    """The counts by function, as text."""
    counts = Counter((outcome.function, outcome.outcome) for outcome in outcomes)
    lines = ["| function | calls | " + " | ".join(OUTCOMES) + " |", "|---|" + "--:|" * 8]
    names = sorted({outcome.function for outcome in outcomes})
    for name in names:
        numbers = [counts[name, outcome] for outcome in OUTCOMES]
        cells = [str(n) if n else "" for n in numbers]
        lines.append(f"| {name} | {sum(numbers)} | " + " | ".join(cells) + " |")
    totals = [sum(counts[name, outcome] for name in names) for outcome in OUTCOMES]
    cells = [f"**{n}**" for n in totals]
    lines.append(f"| **all** | **{sum(totals)}** | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def show_failure(outcome: Outcome) -> str:
    """A failure, with the lines that reproduce it."""
    lines = "\n".join(f"    {line}" for line in outcome.lines)
    return f"{outcome.outcome}: {outcome.function}: {outcome.reason}\n{lines}\n"


def main(args: list[str]) -> int:
    """The command line. Returns 1 where there were failures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--calls", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--only", default="")
    parser.add_argument("--slow", action="store_true", help="print the seconds of each function")
    options = parser.parse_args(args)
    torch.set_num_threads(1)
    outcomes = []
    seconds: Counter[str] = Counter()
    failures = 0
    start = last = time.monotonic()
    for outcome in fuzz(options.calls, options.seed, options.first, options.only):
        outcomes.append(outcome)
        now = time.monotonic()
        seconds[outcome.function] += now - last
        last = now
        if outcome.outcome in FAILURES:
            failures += 1
            print(f"{options.first + len(outcomes) - 1}: {show_failure(outcome)}", flush=True)
    print(table(outcomes))
    print(f"{failures} failures in {len(outcomes)} calls, {time.monotonic() - start:.1f} s")
    if options.slow:
        print(*seconds.most_common(25), sep="\n")
    return 1 if failures else 0


if __name__ == "__main__":
    # Run the module under its real name: the generators register themselves there.
    from tests.fuzz import main as real_main

    sys.exit(real_main(sys.argv[1:]))
