"""
What lets a run be stopped at any moment, and continued as if nothing had happened.

Four things make that possible: files that are either complete or not there at all, also where
several belong together, JSON that any program can read back, signals that wait until an iteration
is finished, and the state of every random generator. The trainer puts them together; RunFolder
says what is kept where.
"""

import contextlib
import io
import json
import logging
import math
import multiprocessing
import os
import pickle
import platform
import random
import re
import shutil
import signal
import sys
import textwrap
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NoReturn

import numpy as np
import torch

from mingpt import distributed

logger = logging.getLogger("mingpt")

# -- files -----------------------------------------------------------------------------------------

# The temporary files and folders that this process is filling right now.
in_progress: set[Path] = set()

# Where files wait that are complete, and take their places together: see `write_together`.
COMPLETE = ".complete"

# The note on a KeyboardInterrupt that is no surprise: see `interrupt_without_traceback`.
EXPECTED = "stopped by Ctrl-C"


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[BinaryIO]:
    """`with atomic_write(path) as f`: a binary file that takes its name only when it is complete.

    By then it is on the disk, too. Whatever fails before that, a full disk included, leaves an
    older file of that name as it was. Missing folders are made, and what killed processes left
    behind in the folder is removed. OSError for a disk that is full says how much is free.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent)
    with full_disk_explained(path), temporary_name(path) as temporary:
        with temporary.open("wb") as f:
            yield f
            # Without fsync a power failure could leave the new name on an empty file.
            f.flush()
            os.fsync(f.fileno())
        temporary.replace(path)


@contextlib.contextmanager
def write_together(folder: str | Path) -> Iterator[Path]:
    """`with write_together(folder) as new`: the files written into `new` all get into the folder.

    Or none of them does. A process that is killed leaves either the old files or the new ones, and
    other files of the folder stay as they are. For a moment the first of them by name is missing
    (a model's config.json), so that no program takes some of the old files with some of the new.
    If the process is killed in that moment, the files are complete, and `finish_write` ends it.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    with temporary_name(folder / "files") as new:
        new.mkdir()
        yield new
        with one_writer(folder):
            move_complete(folder)  # of an earlier process
            new.rename(folder / COMPLETE)  # from here on the new files count
            move_complete(folder)


def finish_write(folder: str | Path) -> None:
    """Move files to their places that a process had written together before it was killed.

    To be called before such files are read.
    """
    folder = Path(folder)
    if os.path.isdir(folder / COMPLETE):  # Path.is_dir raises for a name that is too long
        with one_writer(folder):
            move_complete(folder)


def move_complete(folder: Path) -> None:
    """Move the complete files of `write_together` to their places, the first by name last."""
    complete = folder / COMPLETE
    if not complete.is_dir():
        return
    names = sorted(path.name for path in complete.iterdir())
    if names:
        (folder / names[0]).unlink(missing_ok=True)
    for name in reversed(names):
        (complete / name).replace(folder / name)
    complete.rmdir()


@contextlib.contextmanager
def one_writer(folder: Path) -> Iterator[None]:
    """Within, no other process moves files in the folder. Only on Unix, and where it has locks."""
    try:
        import fcntl
    except ImportError:
        yield  # Windows cannot lock a folder
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network drives have no locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def temporary_name(path: Path) -> Iterator[Path]:
    """A hidden name beside path that no other process or thread uses. Nothing is left of it."""
    own = f"{platform.node()}.{os.getpid()}.{threading.get_ident()}"
    temporary = path.with_name(f".{path.name}.{own}")
    in_progress.add(temporary)
    try:
        yield temporary
    finally:
        remove(temporary)  # unless it has its final name by now
        in_progress.discard(temporary)


def remove(path: Path) -> None:
    """Remove a file, or a folder with all that is in it, if it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)  # another process may be doing the same
    else:
        path.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files in the folder of processes that were killed while they wrote."""
    # Of other machines we know nothing: what they left stays.
    pattern = re.compile(rf"\..+\.{re.escape(platform.node())}\.(\d+)\.\d+")
    for name in os.listdir(folder):
        match = pattern.fullmatch(name)
        if match and not is_in_progress(folder / name, int(match[1])):
            # Windows refuses while the file is open, and so its writer lives.
            with contextlib.suppress(PermissionError):
                remove(folder / name)


def is_in_progress(temporary: Path, pid: int) -> bool:
    """Whether the process of number pid on this machine may still be writing the file."""
    if pid == os.getpid():
        # In a container every process may have the same number, and so had the one before this.
        return temporary in in_progress
    if os.name != "posix":
        # Elsewhere, to ask would be to end it. A file that is open cannot be removed there, and
        # a folder stays, since nobody can tell.
        return temporary.is_dir()
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # it is somebody else's
    return True


@contextlib.contextmanager
def full_disk_explained(path: Path) -> Iterator[None]:
    """Within, a write that fails raises an OSError that names the file and the free space."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        # torch.save raises a RuntimeError of its own, and only its context tells the reason.
        reason = error.__context__ if isinstance(error.__context__, OSError) else error
        of_torch = "inline_container" in str(error) or "PytorchStreamWriter" in str(error)
        # Those of a file that cannot be opened, and those of networks, say it by themselves.
        of_a_write = type(error) is OSError and error.filename is None
        if not of_torch and not of_a_write:
            raise
        free = shutil.disk_usage(path.parent).free / 2**20
        message = (
            f"{path} cannot be written ({str(reason).splitlines()[0]}); {free:,.1f} MB are free in "
            f"{path.parent}: make room. What was there before is kept"
        )
        number = getattr(reason, "errno", None)
        raise (OSError(number, message) if number else OSError(message)) from error


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 text file atomically. TypeError for anything but text."""
    if not isinstance(text, str):
        raise TypeError(f"got {type(text).__name__} {text!r:.60}; expected a text")
    with atomic_write(path) as f:
        f.write(text.encode("utf-8"))


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file. ValueError that names it if there is none, or if it is no text.

    A FIFO or a device in its place would block for ever, or never end.
    """
    path = Path(path)
    if not os.path.isfile(path):  # Path.is_file raises for a name that is too long
        raise ValueError(f"{path} is no file that could be read")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}): put a good copy in place") from None


def save_torch(path: str | Path, obj: Any) -> None:
    """torch.save, atomically. Load with `load_torch`. OSError where the disk is full."""
    with atomic_write(path) as f:
        torch.save(obj, f)


def load_torch(path: str | Path) -> dict[str, Any]:
    """The dict that `save_torch` has written, on the CPU.

    Raises ValueError for a file that is damaged, or holds something else. No code in it is run.
    """
    try:
        loaded = read_torch(Path(path))
    except Exception as error:  # damaged bytes can make it raise anything
        reason = str(error).partition("\n")[0] or "it is empty"
        raise ValueError(
            f"{path} cannot be loaded ({reason}): it is damaged, or no file of ours. Put a good "
            "copy in its place, or remove it"
        ) from None
    if not isinstance(loaded, dict):
        raise ValueError(f"{path} holds a {type(loaded).__name__}, not the dict that we save")
    return loaded


# -- what torch.save wrote -------------------------------------------------------------------------

# So many times its size may a compressed file unpack to, and anything up to so many bytes. Weights
# hardly get smaller by compression: a file of zeros that would fill the memory is no model.
LARGEST_RATIO = 20
SMALL = 2**28


def read_torch(path: Path, mmap: bool = False) -> Any:
    """What torch.save has written to a file, on the CPU: tensors and plain data, and no code.

    mmap: where it can be, the file is mapped into memory instead of read. Raises all sorts of
    exceptions for a damaged file, ValueError if the numbers of a tensor are cut off among them.
    """
    if not os.path.isfile(path):
        raise ValueError("it is no file that could be read")
    sizes: dict[str, int] = {}
    if zipfile.is_zipfile(path):  # since 2020; before, it was a pickle with the numbers behind it
        with zipfile.ZipFile(path) as file:
            mmap = mmap and all(x.compress_type == zipfile.ZIP_STORED for x in file.infolist())
            sizes = record_sizes(file)
        unpacked = sum(sizes.values())
        if unpacked > max(SMALL, LARGEST_RATIO * path.stat().st_size):
            raise ValueError(f"it would unpack to {unpacked / 2**20:,.0f} MB")
    else:
        mmap = False
    loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    if sizes:
        check_records(path, sizes)
    return loaded


def record_sizes(file: zipfile.ZipFile) -> dict[str, int]:
    """{name: bytes} of the records of a zip file, without the name of the folder that all are in.

    Of several records of one name the smallest counts, for PyTorch may take any of them.
    """
    sizes: dict[str, int] = {}
    for record in file.infolist():
        name = record.filename.partition("/")[2].lower()  # PyTorch's reader ignores the case
        size = record.file_size
        if record.compress_type == zipfile.ZIP_STORED:
            size = min(size, record.compress_size)
        sizes[name] = min(size, sizes.get(name, size))
    return sizes


def check_records(path: Path, sizes: dict[str, int]) -> None:
    """ValueError for a record of the file that is shorter than the tensor that lies in it.

    Older versions of PyTorch do not look, and no version does where a file is mapped: the tensor
    takes the bytes that come next.
    """
    with zipfile.ZipFile(path) as file:
        [name] = {x.filename for x in file.infolist() if x.filename.endswith("/data.pkl")}
        outline = Outline(io.BytesIO(file.read(name)))
    outline.load()
    for key, needed in outline.needed.items():
        size = sizes[f"data/{key}".lower()]
        if size < needed:
            raise ValueError(f"record {key} has {size} bytes, and its tensor needs {needed}")


class Inert:
    """Stands for any object of a pickle. Whatever is done with it, nothing happens."""

    def __init__(self, *args: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass


class Outline(pickle._Unpickler):  # the one in Python: a huge number in a file takes no memory
    """Reads from a pickle of torch.save's which records it needs, {key: bytes}, and builds nothing.

    A tensor's numbers are not in the pickle, which names them: ("storage", their type, key of the
    record, device, how many). torch.load must have accepted the pickle before.
    """

    def __init__(self, file: BinaryIO):
        super().__init__(file)
        self.needed: dict[str, int] = {}

    def find_class(self, module: str, name: str) -> Any:
        """A class that does nothing, in the place of any that the pickle names."""
        return type(name, (Inert,), {})

    def persistent_load(self, saved_id: Any) -> Any:
        """Note how many bytes a record must have."""
        _, kind, key, _, count = saved_id
        if kind.__name__ == "UntypedStorage":
            item_size = 1
        else:
            item_size = getattr(torch, kind.__name__)._dtype.itemsize
        self.needed[key] = max(count * item_size, self.needed.get(key, 0))
        return Inert()


# -- JSON ------------------------------------------------------------------------------------------


def to_json(value: Any, indent: int | None = None) -> str:
    """`value` as strict JSON, in ASCII.

    JSON has no NaN and no infinity, and many programs refuse a file in which Python wrote one all
    the same. Such a float becomes null.
    """
    return json.dumps(replace_non_finite(value), indent=indent, allow_nan=False)


def read_json(path: str | Path, kind: type[dict] | type[list] = dict) -> Any:
    """What a JSON file holds: a dict, or what `kind` says. ValueError that names it for others."""
    text = read_text(path)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged; expected JSON: {error}") from None
    if not isinstance(value, kind):
        noun = "object" if kind is dict else "array"
        raise ValueError(f"{path} is damaged; expected a JSON {noun}, and it holds {text[:30]!r}")
    return value


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
            logger.info("stopped in the middle of an iteration")
            raise KeyboardInterrupt
        if number == signal.SIGINT:
            logger.info("Ctrl-C: stops after this iteration (press it again to stop at once)")

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


@contextlib.contextmanager
def interrupt_without_traceback() -> Iterator[None]:
    """Within, a KeyboardInterrupt that nobody catches ends the program without a traceback.

    It stays a KeyboardInterrupt: a program can catch it, and where none does, the exit status is
    that of Ctrl-C, 130 in a shell.
    """
    try:
        yield
    except KeyboardInterrupt as interrupt:
        interrupt.add_note(EXPECTED)
        show_traceback = sys.excepthook

        def show_unless_expected(
            kind: type[BaseException], error: BaseException, traceback: TracebackType | None
        ) -> None:
            if EXPECTED not in getattr(error, "__notes__", []):
                show_traceback(kind, error, traceback)

        sys.excepthook = show_unless_expected
        raise


def follow_the_parent(worker: int) -> None:
    """Have a process that loads data live as long as its parent, the training process, and no more.

    For DataLoader's worker_init_fn. It ignores Ctrl-C, which a terminal sends to it too: the parent
    decides when it ends. But a parent that is killed decides nothing more. DataLoader's own check
    comes between two batches only, and loading a batch may take minutes.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_the_parent, daemon=True).start()


def end_with_the_parent() -> None:
    """Wait until the process that started this one is gone, then end this one at once."""
    parent = multiprocessing.parent_process()
    assert parent is not None  # only a process that multiprocessing has started gets here
    parent.join()
    os._exit(1)


def replace_what_cannot_be_printed() -> None:
    """Have standard output print "?" where its encoding lacks a character.

    Windows encodes what goes into a file or a pipe in its code page, which has no Greek letters and
    no emoji. By default printing one raises UnicodeEncodeError, after all the work was done.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def wrapped(text: str) -> str:
    """The text for standard error: on a terminal, lines end between words."""
    if not sys.stderr.isatty():
        return text
    columns = shutil.get_terminal_size().columns
    lines = [
        textwrap.fill(line, columns, break_long_words=False, break_on_hyphens=False)
        for line in text.splitlines()
    ]
    return "\n".join(lines)


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
        sys.exit(wrapped(f"error: {error}"))
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


def check_rng_state(state: Any, path: Path | None = None) -> None:
    """ValueError for what `get_rng_state` cannot have returned. path: the file that it is from."""
    try:
        random.Random().setstate(state["python"])
        np.random.RandomState().set_state(state["numpy"])
        torch.Generator().set_state(state["torch"])
        if {"cuda", "mps"} - state.keys():
            raise KeyError("cuda")
    except Exception as error:  # the generators raise anything
        source = path or "the state"
        raise ValueError(
            f"{source} is damaged: it holds no state of the random generators ({error!r:.100})"
        ) from None


def set_rng_state(state: dict[str, Any]) -> None:
    """Put back what `get_rng_state` returned, for those devices that are here now."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    if state["mps"] is not None and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"])
