"""
One training run on many devices, or on many machines: what the trainer needs of torch.distributed.

    torchrun --nproc_per_node=2 projects/chargpt/chargpt.py

starts the script twice, as the processes of rank 0 and rank 1. Each of them computes the
gradient on its own part of every batch. DistributedDataParallel (Li et al. 2020) averages
the gradients, so that all processes take the same step and hold the same weights. Only rank
0 writes files, logs and draws. Without torchrun there is one process, of rank 0, and these
functions have nothing to do.
"""

import atexit
import os
import time
from typing import Any

import torch
import torch.distributed as dist


def join(device: torch.device) -> torch.device:
    """Join the processes that torchrun has started, if it started this one. Returns its own device.

    Raises ValueError where there is no device for this process.
    """
    launched = is_launched()
    if launched and device.type == "cuda":
        device = own_gpu()
    if launched and device.type not in ("cuda", "cpu"):
        raise ValueError(
            f"many processes cannot share device={device}: set device=cpu, or run without torchrun"
        )
    if device.type == "cuda" and device.index is not None:
        # Checkpoints hold the random state of the current GPU: make that the one we train on.
        torch.cuda.set_device(device)
    if launched and not dist.is_initialized():
        # gloo exchanges what is on the CPU, nccl what is on the GPUs
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        atexit.register(leave)
    return device


def is_launched() -> bool:
    """Whether torchrun started this process. Some builds of PyTorch lack torch.distributed."""
    return dist.is_available() and dist.is_torchelastic_launched()


def own_gpu() -> torch.device:
    """The GPU of this process: the nth process of a machine takes the nth GPU.

    Raises ValueError where the machine has no such GPU.
    """
    number = int(os.environ["LOCAL_RANK"])
    available = torch.cuda.device_count()
    if number >= available:
        raise ValueError(
            f"process {number} finds only {available} GPUs on its machine: lower --nproc_per_node"
        )
    return torch.device("cuda", number)


def leave() -> None:
    """Leave the group at exit, and give gloo's threads time to release their last tensors.

    A thread that does so while the interpreter is shutting down aborts the process
    (pytorch/pytorch#179291).
    """
    dist.destroy_process_group()
    time.sleep(0.5)


def rank() -> int:
    """The number of this process, counted from 0. Known before it has joined the others."""
    return int(os.environ["RANK"]) if is_launched() else 0


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def total(numbers: list[float]) -> list[float]:
    """The sum of each of the numbers over all processes: the same list in each of them."""
    if world_size() == 1:
        return numbers
    sums = torch.tensor(numbers, dtype=torch.float64)  # on the CPU, so that no GPU must synchronise
    dist.all_reduce(sums)
    return sums.tolist()


def mean(metrics: dict[str, float]) -> dict[str, float]:
    """The mean of each of the metrics over all processes."""
    sums = total(list(metrics.values()))
    return {name: value / world_size() for name, value in zip(metrics, sums, strict=True)}


def gather(value: Any) -> list[Any]:
    """The values of all processes, in the order of their ranks."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values
