"""
What lets a run be stopped at any moment and go on as if nothing had happened.

Files that are whole or not there at all, interrupts that wait for the end of an iteration, and the state of every random
generator.
"""

import contextlib
import os
import random
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np
import torch

from mingpt import distributed


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[BinaryIO]:
    """`with atomic_write(path) as f`: a binary file that takes its name only when it is complete and on the disk.

    Whatever fails on the way, a full disk included, leaves the old file as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")  # a name that nobody else writes to
    try:
        with temporary.open("wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: str | Path, text: str) -> None:
    """Write a whole UTF-8 text file atomically."""
    with atomic_write(path) as f:
        f.write(text.encode("utf-8"))


def save_torch(path: str | Path, obj: Any) -> None:
    """torch.save, atomically. Load with `torch.load(path, weights_only=True)`."""
    with atomic_write(path) as f:
        torch.save(obj, f)


@contextlib.contextmanager
def deferred_signals() -> Iterator[list[int]]:
    """Within, Ctrl-C and SIGTERM only add themselves to the list that is yielded, so that an iteration can end.

    A second Ctrl-C raises KeyboardInterrupt; SIGTERM may come twice, from torchrun and from whoever ends all processes.
    """
    received = []
    if threading.current_thread() is not threading.main_thread():
        yield received  # signals reach the main thread only
        return

    def handle(number, frame):
        received.append(number)
        if received.count(signal.SIGINT) > 1:
            raise KeyboardInterrupt

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def raise_signal(number: int) -> NoReturn:
    """SIGTERM ends the process with exit code 143, as shells count it; SIGINT is a KeyboardInterrupt."""
    raise SystemExit(128 + number) if number == signal.SIGTERM else KeyboardInterrupt


def leave_ctrl_c_to_the_parent(worker: int) -> None:
    """For processes that load data: a terminal sends Ctrl-C to them, too."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def run_script(main: Callable[[list[str]], None]) -> NoReturn:
    """main(command line), for scripts: errors that the user can mend end in one line, and so do Ctrl-C and SIGTERM."""
    signal.signal(signal.SIGTERM, lambda number, frame: raise_signal(number))
    try:
        sys.exit(main(sys.argv[1:]))
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
    except (KeyboardInterrupt, SystemExit) as stop:
        code = 128 + signal.SIGINT if isinstance(stop, KeyboardInterrupt) else stop.code
        if code in (128 + signal.SIGINT, 128 + signal.SIGTERM) and distributed.rank() == 0:
            sys.stderr.write("\nstopped; the same command goes on from here\n")
        sys.exit(code)


def get_rng_state() -> dict:
    """The state of all the generators that `set_seed` seeds, in types that load with weights_only=True."""
    name, keys, *rest = np.random.get_state()
    return {"python": random.getstate(), "numpy": (name, keys.tolist(), *rest), "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,  # of this process's card
            "mps": torch.mps.get_rng_state() if torch.backends.mps.is_available() else None}


def set_rng_state(state: dict) -> None:
    """Put back what `get_rng_state` returned, as far as its devices are here."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    if state["mps"] is not None and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"])
