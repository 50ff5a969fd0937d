"""
What the other files share: configuration, seeding, devices, the optimizer's groups, downloads, metrics and their plots.
"""

import ast
import ctypes
import difflib
import hashlib
import importlib
import json
import logging
import math
import numbers
import os
import random
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from mingpt import distributed
from mingpt.checkpoint import atomic_write, write_text

logger = logging.getLogger("mingpt")

# -- configuration ----------------------------------------------------------------------------------------------------


class CfgNode:
    """A tree of options with attribute access: `config.trainer.max_iters`. Leaves are plain Python values.

    `merge_from_args(["--trainer.max_iters=10"])` overrides from the command line; what does not exist or fit raises ValueError.
    """

    def __init__(self, **options):
        for name, value in options.items():
            setattr(self, name, CfgNode(**value) if isinstance(value, dict) else value)

    def __str__(self):
        return "\n".join(f"{name} = {value!r}" for name, value in self.leaves())

    def __eq__(self, other):
        return isinstance(other, CfgNode) and self.to_dict() == other.to_dict()

    def leaves(self, prefix: str = "") -> Iterator[tuple[str, Any]]:
        """Every option as (dotted name, value), in the order of definition."""
        for name, value in vars(self).items():
            if isinstance(value, CfgNode):
                yield from value.leaves(f"{prefix}{name}.")
            else:
                yield prefix + name, value

    def to_dict(self) -> dict:
        """The tree as nested dicts, ready for JSON."""
        return {k: v.to_dict() if isinstance(v, CfgNode) else v for k, v in vars(self).items()}

    def merge_from_dict(self, options: dict) -> None:
        """Set top-level attributes, new ones included."""
        vars(self).update(options)

    def merge_from_args(self, args: list[str]) -> None:
        """Override options: `--section.key=value` or `--section.key value`, with Python literals or else strings; `--flag` is True."""
        args, known = list(args), dict(self.leaves())
        while args:
            arg = args.pop(0)
            name, equals, text = arg.removeprefix("--").partition("=")
            if not equals:
                text = "True" if isinstance(known.get(name), bool) else args.pop(0) if args else None
            if not arg.startswith("--") or text is None:
                raise ValueError(f"argument {arg!r} is not of the form --option=value")
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
                hint = f"; did you mean --{near[0]}?" if near else ""
                raise ValueError(f"unknown option --{name}{hint} (--help lists all)")
            *path, leaf = name.split(".")
            node = self
            for part in path:
                node = getattr(node, part)
            setattr(node, leaf, parse_option(name, text, known[name]))


def parse_option(name: str, text: str, default: Any) -> Any:
    """The value that `text` means for an option with this default: same type, but int -> float, and None takes anything."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    if isinstance(default, str):
        return text
    if default is None or value is None or type(value) is type(default):
        return value
    if isinstance(default, float) and type(value) is int:
        return float(value)
    if isinstance(default, (tuple, list)) and isinstance(value, (tuple, list)):
        return type(default)(value)
    raise ValueError(f"--{name}={text} must be of type {type(default).__name__}, like its default {default!r}")


def check_numbers(config: CfgNode, names: str, low=0, high=float("inf"), whole=False, optional=False) -> None:
    """ValueError for the first of the options, names separated by spaces, that is not in [low, high] (optional: or None)."""
    kind = numbers.Integral if whole else numbers.Real
    for name in names.split():
        value = getattr(config, name)
        fits = isinstance(value, kind) and not isinstance(value, bool) and low <= value <= high and value != math.inf
        if not fits and not (optional and value is None):
            raise ValueError(f"{name}={value!r} must be a {'whole ' * whole}number in [{low}, {high}]{' or None' * optional}")


def parse_args(config: CfgNode, args: list[str], about: str) -> None:
    """Merge a script's command line into config; `--help` prints `about` and every option, and exits."""
    if "--help" in args or "-h" in args:
        options = "\n".join(f"  --{name}={value}" for name, value in config.leaves())
        sys.stdout.write(f"{about.strip()}\n\nOptions and their defaults:\n{options}\n")
        sys.exit(0)
    config.merge_from_args(args)


# -- seeds, devices, the optimizer ------------------------------------------------------------------------------------


def set_seed(seed: int) -> None:
    """Seed Python's, NumPy's and PyTorch's generators, those of every device included."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def pick_device(device: str = "auto") -> torch.device:
    """'auto' -> cuda, else mps, else cpu; anything else is taken by its word."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    return torch.device(device)


def pick_precision(precision: str, device: torch.device) -> str:
    """'auto' -> bf16 on a CUDA card that has it, else fp32, since on most CPUs bf16 is far slower. ValueError for unknown names."""
    if precision == "auto":
        return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
    if precision not in ("fp32", "bf16", "fp16"):
        raise ValueError(f"precision={precision!r} must be one of auto, fp32, bf16, fp16")
    return precision


def adamw(module: torch.nn.Module, train_config: CfgNode) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019) over module. It decays the weights of matrix products, but not biases, LayerNorms and
    embeddings (nor a head tied to one). Reads learning_rate, betas, eps, weight_decay.
    """
    embeddings = {id(m.weight) for m in module.modules() if isinstance(m, torch.nn.Embedding)}
    decay, rest = [], []
    for p in module.parameters():
        p.data = p.data.contiguous()  # loaded weights may lie transposed, which a checkpoint's moments do not know of
        if p.requires_grad:
            (decay if p.dim() >= 2 and id(p) not in embeddings else rest).append(p)
    groups = [{"params": decay, "weight_decay": train_config.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    fused = all(p.device.type in ("cpu", "cuda", "mps") and p.is_floating_point() for p in decay + rest)
    return torch.optim.AdamW(groups, lr=train_config.learning_rate, betas=tuple(train_config.betas),
                             eps=getattr(train_config, "eps", 1e-8), fused=fused)


def keep_freed_memory() -> None:
    """Have glibc keep the memory that is freed: by default it gives large blocks back, to fetch them anew, zeroed page by page.

    On two CPU cores a training step of gpt-micro is then 1.1 times as fast, one of GPT-2 1.2 times, for up to 15% more memory.
    """
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None:
        mallopt(-4, 0)          # M_MMAP_MAX: no large block is a mapping of its own
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the end of the heap stays


# -- downloads --------------------------------------------------------------------------------------------------------


def home() -> Path:
    """Where downloads are kept: $MINGPT_HOME, by default ~/.cache/mingpt."""
    return Path(os.environ.get("MINGPT_HOME") or Path.home() / ".cache" / "mingpt")


class NotFound(ValueError):
    """The server has no such file (404)."""


def download(url: str, path: str | Path, sha256: str | None = None, size: int | None = None, headers: dict | None = None,
             tries: int = 5, timeout: float = 30.0) -> Path:
    """Fetch url into the file `path`, unless it is there already; an interrupted download goes on where it stopped.

    The file takes its name only when its size (bytes) and SHA-256 are right: the given ones, else those that the server names. After
    trouble it tries again, in 1, 2, 4 ... seconds. Raises ValueError where the server refuses (404 ...) or sends something
    else than expected, ConnectionError where every try fails; the next call goes on with what has come.
    """
    import requests  # here, since it takes as long as all the rest of this library, and few programs download
    (path := Path(path)).parent.mkdir(parents=True, exist_ok=True)
    attempt = 0
    while not path.exists():
        try:
            fetch(url, Path(f"{path}.part"), sha256, size, headers, timeout).rename(path)
        except (requests.RequestException, FileNotFoundError) as error:  # not found: another process has renamed the part
            response = getattr(error, "response", None)
            status = 500 if response is None else response.status_code
            if status < 500 and status not in (408, 429):
                raise (NotFound if status == 404 else ValueError)(
                    f"{url} answers {response.reason} ({status}): is the name right, and may you read it?") from None
            if (attempt := attempt + 1) == tries and not path.exists():
                raise ConnectionError(f"{url} failed {tries} times, at last with: {error}") from error
            time.sleep(2 ** (attempt - 1))
    return path


def fetch(url: str, part: Path, sha256: str | None, size: int | None, headers: dict | None, timeout: float) -> Path:
    """One try of `download`: add to part what it lacks, and check it. Raises requests' errors where another try may help."""
    import requests
    done = part.stat().st_size if part.exists() else 0
    ask = {"Accept-Encoding": "identity", **(headers or {}), **({"Range": f"bytes={done}-"} if done else {})}
    with requests.get(url, headers=ask, stream=True, timeout=timeout) as answer:
        goes_on = answer.headers.get("Content-Range", "").startswith(f"bytes {done}-")
        if answer.status_code == 416 or answer.status_code == 206 and not goes_on:  # our part is another file's, then
            part.unlink(missing_ok=True)
            raise requests.ConnectionError(f"cannot go on from byte {done}")
        if answer.status_code not in (200, 206):
            raise requests.HTTPError(f"it answers {answer.status_code}", response=answer)
        done = done if answer.status_code == 206 else 0  # 200 brings the whole file, whatever we asked for
        hub = requests.structures.CaseInsensitiveDict(header for a in (*answer.history, answer) for header in a.headers.items())  # it redirects
        total = answer.headers.get("Content-Range", answer.headers.get("Content-Length", "") * (done == 0)).rpartition("/")[2]
        if answer.headers.get("Content-Encoding", "identity") == "identity" and total.isdecimal():  # else it speaks of a zip
            size = size or int(hub.get("X-Linked-Size", total))
        linked = hub.get("X-Linked-Etag", "").strip('"')  # a large file's SHA-256
        sha256 = sha256 or (linked if re.fullmatch("[0-9a-f]{64}", linked) else None)
        # two processes that fetch the same file do no harm: they write the same bytes to the same places
        with part.open("r+b" if part.exists() else "wb") as f, \
                tqdm(desc=part.stem, total=size or None, initial=done, unit="B", unit_scale=True, disable=None) as bar:
            f.seek(done)
            for chunk in answer.iter_content(2 ** 16):
                bar.update(f.write(chunk))
            got = f.tell()
            if not size or got >= size:  # whole: what follows is of another version
                f.truncate()
            f.flush()
            os.fsync(f.fileno())
    if size and got < size:
        raise requests.ConnectionError(f"the connection ended after {got} of {size} bytes")
    with part.open("rb") as f:
        wrong = f"{got} bytes, not {size}" if size and got > size else None
        if sha256 and (actual := hashlib.file_digest(f, "sha256").hexdigest()) != sha256:
            wrong = f"a file of SHA-256 {actual}, not {sha256}"
    if wrong:
        part.unlink()  # of a part that was there before, another try is worth it
        raise (requests.ConnectionError if done else ValueError)(f"{url} sends {wrong}")
    return part


# -- logging, metrics, plots ------------------------------------------------------------------------------------------


def log_to_console() -> None:
    """For scripts: show what this library logs, and of other libraries only the warnings; under torchrun, in the first process."""
    logging.basicConfig(format="%(message)s")
    logger.setLevel(logging.INFO if distributed.rank() == 0 else logging.WARNING)


def setup_logging(config: CfgNode) -> None:
    """For scripts: log to the console, and keep the command line and the config in config.system.work_dir."""
    log_to_console()
    for name, text in (("args.txt", " ".join(sys.argv)), ("config.json", json.dumps(config.to_dict(), indent=4))):
        write_text(Path(config.system.work_dir) / name, text)


def plot_metrics(path: str | Path, panels: dict, title: str | None = None, xlabel: str = "iteration") -> None:
    """Draw curves side by side into the PNG file `path`; needs matplotlib (extra `projects`).

    panels: {panel title: {label: (xs, ys)}}. Points that are None or NaN are left out.
    """
    plt = import_extra("matplotlib.pyplot", "projects")
    plt.switch_backend("Agg")  # no window, no display needed
    width = 5 * len(panels) + 3 * (max(map(len, panels.values())) > 5)  # a long legend stands beside
    figure, axes = plt.subplots(1, len(panels), figsize=(width, 3.6), squeeze=False, layout="tight")
    for axis, (name, curves) in zip(axes[0], panels.items()):
        for label, (xs, ys) in curves.items():
            points = [(x, y) for x, y in zip(xs, ys) if y is not None and y == y]
            axis.plot(*zip(*points) if points else ([], []), label=label, lw=1.5)
        axis.set(title=name, xlabel=xlabel)
        axis.grid(alpha=0.3)
        axis.legend(frameon=False, **({"loc": "upper left", "bbox_to_anchor": (1, 1)} if len(curves) > 5 else {}))
    figure.suptitle(title)
    with atomic_write(path) as f:
        figure.savefig(f, dpi=110, format="png")
    plt.close(figure)


def import_extra(module: str, extra: str) -> ModuleType:
    """Import an optional dependency; where it is missing, say in one line which extra brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{module.split('.')[0]} is not installed; it comes with: pip install -e '.[{extra}]'") from error
