"""
Small helpers: seeds, devices, AdamW's parameter groups, memory, and what scripts log.

minGPT's scripts import set_seed, setup_logging and CfgNode from here, and still can.
"""

import contextlib
import ctypes
import importlib
import logging
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from mingpt import distributed
from mingpt.checkpoint import to_json, write_text
from mingpt.config import CfgNode, check_is_config, check_numbers, check_present

logger = logging.getLogger("mingpt")


def set_seed(seed: int) -> None:
    """Seed the generators of Python, NumPy and PyTorch, those of every device included.

    ValueError for anything but a whole number of 64 bits.
    """
    check_numbers(CfgNode(seed=seed), "seed", low=-(2**63), high=2**64 - 1, whole=True)
    seed = int(seed)  # it may be one of NumPy's
    random.seed(seed)
    np.random.seed(seed % 2**32)  # NumPy takes 32 bits
    torch.manual_seed(seed)


def pick_device(device: str = "auto") -> torch.device:
    """The device of that name; 'auto' is cuda where there is one, else mps, else cpu.

    ValueError for a name that PyTorch does not know, or a device that this machine does not have.
    """
    if not isinstance(device, (str, torch.device)) or "meta" in str(device):  # no numbers are there
        raise ValueError(f"device={device!r} must be the name of a device: cpu, cuda, mps or auto")
    if device != "auto":
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            raise ValueError(
                f"device={device!r} cannot be used here ({str(error).splitlines()[0]}): choose "
                "cpu, or auto for the best that there is"
            ) from None
        return torch.device(device)
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def pick_precision(precision: str, device: torch.device) -> str:
    """One of fp32, bf16 and fp16; 'auto' is bf16 on a CUDA card that has it, else fp32.

    It is never bf16 on a CPU, where that is usually far slower. Raises ValueError for another name.
    """
    if precision == "auto":
        has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
        return "bf16" if has_bf16 else "fp32"
    if precision not in ("fp32", "bf16", "fp16"):
        raise ValueError(f"precision={precision!r} must be one of auto, fp32, bf16, fp16")
    return precision


def adamw(module: torch.nn.Module, train_config: CfgNode) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019) over all parameters of module that require gradients.

    Weight decay applies to the weights of matrix products, but not to biases, LayerNorms and
    embeddings, nor to a head that is tied to an embedding. Reads learning_rate, betas, eps and
    weight_decay from train_config. ValueError for one that is missing or out of range.
    """
    check_optimizer_options(train_config)
    embeddings = {
        id(layer.weight) for layer in module.modules() if isinstance(layer, torch.nn.Embedding)
    }
    with_decay: list[torch.nn.Parameter] = []
    without_decay: list[torch.nn.Parameter] = []
    for p in module.parameters():
        # Loaded weights may be transposed views, while AdamW's moments from a checkpoint are not.
        # The fused step needs both in the same layout, so make all weights contiguous.
        p.data = p.data.contiguous()
        if not p.requires_grad:
            continue
        if p.dim() >= 2 and id(p) not in embeddings:
            with_decay.append(p)
        else:
            without_decay.append(p)

    beta_1, beta_2 = train_config.betas
    # The fused step updates all parameters at once. Apple's GPUs have it on new systems only.
    fused = all(
        p.device.type in ("cpu", "cuda") and p.is_floating_point()
        for p in with_decay + without_decay
    )
    return torch.optim.AdamW(
        [
            {"params": with_decay, "weight_decay": train_config.weight_decay},
            {"params": without_decay, "weight_decay": 0.0},
        ],
        lr=train_config.learning_rate,
        betas=(float(beta_1), float(beta_2)),
        eps=getattr(train_config, "eps", 1e-8),  # minGPT's trainer config has none
        fused=fused,
    )


def check_optimizer_options(config: CfgNode) -> None:
    """ValueError for an option of AdamW that is missing or out of range."""
    check_is_config(config, "Trainer")
    check_numbers(config, "learning_rate", "weight_decay")
    check_present(config, ["betas"])
    check_betas(config.betas)
    if hasattr(config, "eps"):  # minGPT's trainer config has none
        check_numbers(config, "eps")


def check_betas(betas: Any) -> None:
    """ValueError for anything but two numbers in [0, 1)."""
    numbers = list(betas) if isinstance(betas, (tuple, list)) else []
    if len(numbers) != 2 or not all(isinstance(x, (int, float)) and 0 <= x < 1 for x in numbers):
        raise ValueError(f"betas={betas!r} must be two numbers from 0 to below 1")


def keep_freed_memory() -> None:
    """Have glibc keep freed memory, instead of giving large blocks back to the system.

    Memory that was given back must be fetched again, and the system zeroes it page by page. On two
    CPU cores, keeping it makes a training step of gpt-micro 1.1 times as fast and one of GPT-2 1.2
    times, for up to 15% more memory. On systems without glibc this does nothing.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(-4, 0)  # M_MMAP_MAX: no block becomes a mapping of its own
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the end of the heap stays


def check_tensors(**values: Any) -> None:
    """TypeError for the first of the named values that is no tensor: a list, say, or None."""
    for name, value in values.items():
        if not torch.is_tensor(value):
            raise TypeError(f"{name} is {type(value).__name__} {value!r:.60}; it must be a tensor")


def check_equal_shapes(**tensors: Any) -> None:
    """ValueError unless the named tensors have one shape. TypeError for what is no tensor.

    PyTorch would broadcast many other shapes, and compute something else without a word.
    """
    check_tensors(**tensors)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if len(set(shapes.values())) > 1:
        described = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"got tensors of the shapes {described}: they must be equal")


@contextlib.contextmanager
def evaluation_mode(module: object) -> Iterator[None]:
    """Within, a module is in evaluation mode, without dropout. Other things are left as they are.
    """
    if not isinstance(module, torch.nn.Module):
        yield
        return
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)


def peak_memory_mb() -> float | None:
    """The most memory that this process has held so far, in MB (2^20 bytes).

    None where the system does not count it.
    """
    try:
        import resource  # on Unix only
    except ImportError:
        return None
    if sys.platform == "linux":
        # For a forked process getrusage also counts what its parent held; VmHWM does not.
        with contextlib.suppress(OSError):  # some sandboxes have no /proc
            status = Path("/proc/self/status").read_text(encoding="utf-8")
            peak_kb = re.search(r"VmHWM:\s+(\d+) kB", status)
            if peak_kb:
                return int(peak_kb[1]) / 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10  # macOS counts bytes, not kB


def log_to_console() -> None:
    """For scripts: show what this library logs, and only the warnings of other libraries.

    Under torchrun the processes other than the first only show warnings.
    """
    logging.basicConfig(format="%(message)s")
    logger.setLevel(logging.INFO if distributed.rank() == 0 else logging.WARNING)


def setup_logging(config: CfgNode) -> None:
    """For scripts: log to the console, and keep the options in config.system.work_dir.

    args.txt gets the command line, config.json the whole config. ValueError for a config without
    that option.
    """
    check_present(config, ["system"])
    check_present(config.system, ["work_dir"])
    log_to_console()
    work_dir = Path(config.system.work_dir)
    write_text(work_dir / "args.txt", " ".join(sys.argv))
    write_text(work_dir / "config.json", to_json(config.to_dict(), indent=4))


def import_extra(module: str, extra: str) -> ModuleType:
    """Import an optional dependency.

    Where it is missing, raises ImportError with one line that says which extra brings it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        raise ImportError(
            f"{package} is not installed; it comes with: pip install -e '.[{extra}]'"
        ) from error
