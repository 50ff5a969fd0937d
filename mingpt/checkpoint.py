"""
What lets a run be stopped at any moment, and continued as if nothing had happened.

Four things make that possible: files that are either complete or not there at all, JSON that any
program can read back, signals that wait until an iteration is finished, and the state of every
random generator. The trainer puts them together; RunFolder says what is kept where.
"""

import contextlib
import glob
import io
import json
import math
import os
import platform
import random
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np
import torch

from mingpt import distributed

# -- files -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[BinaryIO]:
    """`with atomic_write(path) as f`: a binary file that takes its name only when it is complete.

    By then it is on the disk, too. Whatever fails before that, a full disk included, leaves an
    older file of that name as it was. Missing folders are made.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path)
    # a name that no other process or thread writes to
    own = f"{platform.node()}.{os.getpid()}.{threading.get_ident()}"
    temporary = path.with_name(f".{path.name}.{own}")
    try:
        with temporary.open("wb") as f:
            yield f
            # Without fsync a power failure could leave the new name on an empty file.
            f.flush()
            os.fsync(f.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def remove_leftovers(path: Path) -> None:
    """Remove what processes that were killed while they wrote `path` have left behind."""
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*"):
        *node, pid, thread = leftover.name.removeprefix(f".{path.name}.").split(".")
        if not (node and pid.isdecimal() and thread.isdecimal()):
            continue  # somebody else's file
        is_ours = ".".join(node) == platform.node()  # of another machine we know nothing
        if is_ours and not is_alive(int(pid)):
            leftover.unlink(missing_ok=True)


def is_alive(pid: int) -> bool:
    """Whether a process of this number runs on this machine. True where that cannot be known."""
    if os.name != "posix":
        return True  # elsewhere, to ask would be to end it
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # somebody else's
    return True


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    with atomic_write(path) as f:
        f.write(text.encode("utf-8"))


def save_torch(path: str | Path, obj: Any) -> None:
    """torch.save, atomically. Load with `load_torch`. OSError where the disk is full."""
    try:
        with atomic_write(path) as f:
            torch.save(obj, f)
    except RuntimeError as error:  # this is how torch.save speaks of a failed write
        if "file" not in str(error) and "write" not in str(error):
            raise
        folder = Path(path).parent
        free = shutil.disk_usage(folder).free / 2**20
        raise OSError(
            f"{path} cannot be written ({str(error).splitlines()[0]}); {free:,.0f} MB are free in "
            f"{folder}. An older file of that name is still there"
        ) from error


def load_torch(path: str | Path) -> dict[str, Any]:
    """The dict that `save_torch` has written, on the CPU.

    Raises ValueError for a file that is damaged, or holds something else. No code in it is run.
    """
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes can make it raise anything
        reason = str(error).partition("\n")[0] or "it is empty"
        raise ValueError(
            f"{path} cannot be loaded ({reason}): it is damaged, or no file of ours. Put a good "
            "copy in its place, or remove it"
        ) from None
    if not isinstance(loaded, dict):
        raise ValueError(f"{path} holds a {type(loaded).__name__}, not the dict that we save")
    return loaded


def to_json(value: Any, indent: int | None = None) -> str:
    """`value` as strict JSON, in ASCII.

    JSON has no NaN and no infinity, and many programs refuse a file in which Python wrote one all
    the same. Such a float becomes null.
    """
    return json.dumps(replace_non_finite(value), indent=indent, allow_nan=False)


def replace_non_finite(value: Any) -> Any:
    """A copy of nested dicts, lists and tuples in which NaN and infinite floats are None."""
    if isinstance(value, dict):
        return {key: replace_non_finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [replace_non_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


# -- signals ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def deferred_signals() -> Iterator[list[int]]:
    """`with deferred_signals() as received`: Ctrl-C and SIGTERM only add their number to a list.

    So an iteration can end before the program acts on them. A second Ctrl-C raises
    KeyboardInterrupt, for whoever cannot wait. A second SIGTERM does nothing: torchrun sends one,
    and whoever stops all processes at once sends another.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received  # Python handles signals in the main thread only
        return

    def handle(number: int, frame: Any) -> None:
        received.append(number)
        if received.count(signal.SIGINT) > 1:
            raise KeyboardInterrupt

    previous = {
        number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def raise_signal(number: int) -> NoReturn:
    """Stop as the signal asks: SIGINT raises KeyboardInterrupt, SIGTERM SystemExit(143).

    143 is 128 + 15, the exit code by which shells know a process that SIGTERM ended.
    """
    if number == signal.SIGTERM:
        raise SystemExit(128 + number)
    raise KeyboardInterrupt


def leave_ctrl_c_to_the_parent(worker: int) -> None:
    """Have a process that loads data ignore Ctrl-C, which a terminal sends to it too.

    For DataLoader's worker_init_fn. The training process decides when its workers end.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def replace_what_cannot_be_printed() -> None:
    """Have standard output print "?" where its encoding lacks a character.

    Windows encodes what goes into a file or a pipe in its code page, which has no Greek letters and
    no emoji. By default printing one raises UnicodeEncodeError, after all the work was done.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def run_script(main: Callable[[list[str]], None]) -> NoReturn:
    """Run main(command line) for a script, and exit.

    Errors that the user can mend end in one line instead of a traceback, and so do Ctrl-C and
    SIGTERM. A character that the console cannot show is printed as a question mark.
    """
    replace_what_cannot_be_printed()
    interrupted = 128 + signal.SIGINT
    terminated = 128 + signal.SIGTERM
    signal.signal(signal.SIGTERM, lambda number, frame: raise_signal(number))
    exit_code: int | str | None = None
    try:
        main(sys.argv[1:])
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        exit_code = interrupted
    except SystemExit as stop:
        exit_code = stop.code
    if exit_code in (interrupted, terminated) and distributed.rank() == 0:
        sys.stderr.write("\nstopped; the same command goes on from here\n")
    sys.exit(exit_code)


# -- random generators -----------------------------------------------------------------------------


def get_rng_state() -> dict[str, Any]:
    """The state of all the generators that `set_seed` seeds.

    Only in types that load with weights_only=True. None stands for a device that is not here.
    """
    numpy_state = np.random.get_state(legacy=False)
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (
            numpy_state["bit_generator"],
            numpy_state["state"]["key"].tolist(),
            numpy_state["state"]["pos"],
            numpy_state["has_gauss"],
            numpy_state["gauss"],
        ),
        "torch": torch.get_rng_state(),
        "cuda": None,
        "mps": None,
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()  # of this process's own GPU
    if torch.backends.mps.is_available():
        state["mps"] = torch.mps.get_rng_state()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Put back what `get_rng_state` returned, for those devices that are here now."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    if state["mps"] is not None and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"])
