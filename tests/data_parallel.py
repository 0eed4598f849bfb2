"""Data-parallel workers that sample classes of their own; in a module that their processes can import."""

import dataclasses
import os
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


def worker(rank: int, port: int, folder: str) -> None:
    """Leave the gradients of one of two workers in a folder."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    torch.manual_seed(0)
    module = torch.nn.parallel.DistributedDataParallel(JointRNNTLoss(6, V).double())
    loss_of(module, rank).backward()
    torch.save([parameter.grad for parameter in module.parameters()], f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()
