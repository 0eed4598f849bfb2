"""Data-parallel workers that sample classes of their own; in a module that their processes can import."""

import dataclasses
import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from naive_torch import Case, case
from transducer_loss.adapters.torch import JointRNNTLoss, sample_classes

V = 40


def shard(rank: int) -> Case:
    """Half of a batch."""
    of, half = case(classes=V), slice(2 * rank, 2 * rank + 2)
    return dataclasses.replace(
        of, joint=(of.joint[0][half], of.joint[1][half], *of.joint[2:]), targets=of.targets[half],
        frames=of.frames[half], labels=of.labels[half],
    )  # fmt: skip


def loss_of(module: Any, rank: int) -> Tensor:
    """A worker's loss, of its own half and its own classes."""
    of = shard(rank)
    classes = sample_classes(of.targets, of.labels, vocab_size=V, num_samples=2, correction=True, seed=100 + rank)
    loss: Tensor = module(*of.joint[:2], *of.integers, classes=classes)
    return loss


def begin(rank: int, port: int) -> None:
    """Join the group of two."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)


def leave(rank: int, folder: str, results: Any) -> None:
    """Leave results in a folder, and the process once the other has done so, too.

    Without taking the group apart: destructors wait for gloo's thread, which may wait for Python's lock that they hold.
    """
    torch.save(results, f"{folder}/{rank}.partial")
    os.rename(f"{folder}/{rank}.partial", f"{folder}/{rank}.pt")
    while not all(Path(folder, f"{each}.pt").exists() for each in (0, 1)):
        time.sleep(0.01)
    os._exit(0)


def worker(rank: int, port: int, folder: str) -> None:
    """Leave the gradients of one of two workers in a folder."""
    begin(rank, port)
    torch.manual_seed(0)
    module = torch.nn.parallel.DistributedDataParallel(JointRNNTLoss(6, V).double())
    loss_of(module, rank).backward()
    leave(rank, folder, [parameter.grad for parameter in module.parameters()])
