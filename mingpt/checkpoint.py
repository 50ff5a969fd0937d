"""
What lets a run be stopped at any moment and go on as if nothing had happened.

Files that are whole or not there at all, interrupts that wait for the end of an iteration, and the state of every random
generator.
"""

import contextlib
import os
import random
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch


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
def deferred_interrupt() -> Iterator[threading.Event]:
    """Within, the first Ctrl-C only sets the event that is yielded, so that an iteration can end; the second one raises."""
    interrupted = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield interrupted  # signals reach the main thread only
        return
    previous = signal.getsignal(signal.SIGINT)

    def handle(signum, frame):
        if interrupted.is_set():
            raise KeyboardInterrupt
        interrupted.set()

    signal.signal(signal.SIGINT, handle)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, previous)


def get_rng_state() -> dict:
    """The state of all the generators that `set_seed` seeds, in types that load with weights_only=True."""
    name, keys, *rest = np.random.get_state()
    return {"python": random.getstate(), "numpy": (name, keys.tolist(), *rest), "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all(),  # one for each card: none without
            "mps": torch.mps.get_rng_state() if torch.backends.mps.is_available() else None}


def set_rng_state(state: dict) -> None:
    """Put back what `get_rng_state` returned, on as many of its devices as there are here."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    torch.cuda.set_rng_state_all(state["cuda"][:torch.cuda.device_count()])
    if state["mps"] is not None and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"])
