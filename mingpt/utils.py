"""
What is left: seeds, devices, the optimizer's groups, memory, what scripts log. It also hands on minGPT's names.
"""

import ctypes
import importlib
import json
import logging
import random
import re
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

from mingpt import distributed
from mingpt.checkpoint import write_text
from mingpt.config import CfgNode

logger = logging.getLogger("mingpt")

__all__ = ["CfgNode", "adamw", "import_extra", "keep_freed_memory", "log_to_console", "pick_device", "pick_precision", "set_seed", "setup_logging"]



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


def peak_memory_mb() -> float | None:
    """The most memory that this process has held so far, in MB (2^20 bytes); None where the system does not count it."""
    try:
        import resource  # on Unix only
    except ImportError:
        return None
    if sys.platform == "linux":  # there getrusage counts what the parent held when it forked this process, too; VmHWM does not
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10  # macOS counts bytes, others kilobytes


def log_to_console() -> None:
    """For scripts: show what this library logs, and of other libraries only the warnings; under torchrun, in the first process."""
    logging.basicConfig(format="%(message)s")
    logger.setLevel(logging.INFO if distributed.rank() == 0 else logging.WARNING)


def setup_logging(config: CfgNode) -> None:
    """For scripts: log to the console, and keep the command line and the config in config.system.work_dir."""
    log_to_console()
    for name, text in (("args.txt", " ".join(sys.argv)), ("config.json", json.dumps(config.to_dict(), indent=4))):
        write_text(Path(config.system.work_dir) / name, text)


def import_extra(module: str, extra: str) -> ModuleType:
    """Import an optional dependency; where it is missing, say in one line which extra brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{module.split('.')[0]} is not installed; it comes with: pip install -e '.[{extra}]'") from error
