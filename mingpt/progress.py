"""
What a person sees of a run: a bar on a terminal, a line now and then in a file.

A run must never look dead. On a terminal a bar shows how far it is, how long it will take, and the
few metrics that tell whether it goes well. Where the output goes into a file, the same stands in a
line that is logged every half minute.
"""

import contextlib
import logging
import sys
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Self

from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

logger = logging.getLogger("mingpt")

SECONDS_BETWEEN_LINES = 30.0
BAR = "{desc} {n_fmt}/{total_fmt} {bar:8} {remaining} left{postfix}"  # fits into 80 columns


class Progress:
    """`with Progress("ppo", total=200) as progress`, then `progress.update({"reward": 0.5})`.

    description: the name of the run. total: how many iterations it has in all, None if it has no
    end. initial: how many are done. silent: show nothing, as in all processes but the first.
    """

    def __init__(
        self, description: str, total: int | None, initial: int = 0, silent: bool = False
    ):
        self.description = description
        self.total = total
        self.initial = initial
        self.done = initial
        self.silent = silent
        self.started = time.monotonic()
        self.last_line = self.started
        on_terminal = sys.stderr is not None and sys.stderr.isatty()
        self.bar = tqdm(
            total=total,
            initial=initial,
            desc=description,
            disable=silent or not on_terminal,
            dynamic_ncols=True,
            smoothing=0,  # the time left by the mean speed: an evaluation must not double it
            bar_format=BAR if total is not None else None,
        )
        self.logs_lines = not silent and not on_terminal
        self.stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        # Lines that the program logs meanwhile must not tear the bar apart. (Where it has no
        # handlers, there is nothing to redirect, and tqdm would add a handler of its own.)
        if logging.getLogger().handlers:
            self.stack.enter_context(logging_redirect_tqdm())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.bar.close()
        self.stack.close()

    def update(self, metrics: dict[str, float]) -> None:
        """One more iteration is done, and these metrics are what a person watches."""
        self.done += 1
        self.bar.set_postfix_str(in_words(metrics), refresh=False)
        self.bar.update()
        now = time.monotonic()
        if self.logs_lines and now - self.last_line >= SECONDS_BETWEEN_LINES:
            self.last_line = now
            logger.info(self.line(metrics, now - self.started))

    def line(self, metrics: dict[str, float], seconds: float) -> str:
        """How far the run is after so many seconds, in one line."""
        if self.total is None:
            return f"{self.description}: iteration {self.done}, {in_words(metrics)}"
        seconds_left = seconds / (self.done - self.initial) * (self.total - self.done)
        return (
            f"{self.description}: iteration {self.done} of {self.total}, {in_words(metrics)}, "
            f"{tqdm.format_interval(seconds_left)} left"
        )


def in_words(metrics: dict[str, float]) -> str:
    """The metrics as they are shown: "reward 0.512, kl 3.1"."""
    return ", ".join(f"{name} {value:.3g}" for name, value in metrics.items())


class ConsoleHandler(logging.Handler):
    """Writes log lines to the console, above a progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line."""
        tqdm.write(self.format(record), file=sys.stderr)


@contextlib.contextmanager
def console(silent: bool = False) -> Iterator[None]:
    """Within, what the library logs is shown, in a program that has not set up logging itself.

    A program that has a handler for the logger "mingpt", or one for all loggers, has decided for
    itself what is shown. silent: show nothing in any case.
    """
    if silent or logger.hasHandlers():
        yield
        return
    handler = ConsoleHandler()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
