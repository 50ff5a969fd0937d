"""
One training run on many devices, or many machines: what the trainer needs of torch.distributed.

    torchrun --nproc_per_node=2 projects/chargpt/chargpt.py

starts the script twice, as processes of rank 0 and 1. Each works on its share of every batch, DistributedDataParallel (Li et al.
2020) averages their gradients, and so all take the same step. Only rank 0 writes files, logs and draws. Without torchrun
there is one process, of rank 0, and nothing here has anything to do.
"""

import atexit
import os
import time
from typing import Any

import torch
import torch.distributed as dist


def join(device: torch.device) -> torch.device:
    """Join the processes that torchrun has started beside this one, if it did; returns this one's own device.

    ValueError where there is no device for it.
    """
    launched = dist.is_torchelastic_launched()
    if launched and device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        if device.index >= torch.cuda.device_count():
            raise ValueError(f"process {device.index} finds {torch.cuda.device_count()} GPUs here: lower --nproc_per_node")
    if launched and device.type not in ("cuda", "cpu"):
        raise ValueError(f"many processes cannot share device={device}: set device=cpu, or run without torchrun")
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # whose random state is the one to keep
    if not launched:
        return device
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        atexit.register(leave)
    return device


def leave() -> None:
    """At exit: leave the group, and give gloo's threads the time to let go of the tensors of the last exchange.

    One that does so when the interpreter is already shutting down aborts the process (pytorch/pytorch#179291).
    """
    dist.destroy_process_group()
    time.sleep(0.5)


def rank() -> int:
    """The number of this process, also before it has joined the others."""
    return int(os.environ["RANK"]) if dist.is_torchelastic_launched() else 0


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def total(numbers: list[float]) -> list[float]:
    """Each of the numbers, summed over all processes: the same list in each of them."""
    if world_size() == 1:
        return numbers
    sums = torch.tensor(numbers, dtype=torch.float64)  # on the CPU, so that no GPU is waited for
    dist.all_reduce(sums)
    return sums.tolist()


def mean(metrics: dict[str, float]) -> dict[str, float]:
    """Each of the metrics, averaged over all processes."""
    return {name: x / world_size() for name, x in zip(metrics, total(list(metrics.values())))}


def gather(thing: Any) -> list:
    """What each process has, in the order of their ranks."""
    things = [thing] * world_size()
    if world_size() > 1:
        dist.all_gather_object(things, thing)
    return things
