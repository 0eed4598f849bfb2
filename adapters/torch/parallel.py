"""PyTorch: an output layer whose rows lie in several processes (vocabulary-parallel)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from transducer_loss.adapters.torch.operators import tensor_of
from transducer_loss.shard import Shard


def shard_of(process_group: Any, rows: int, seed: Tensor, device: torch.device) -> tuple[Shard, Tensor]:
    """Part of the output layer that is this process's, and the seed of the group's first process: found by one exchange."""
    if isinstance(process_group, Shard):
        return process_group, seed
    distributed = torch.distributed
    if not isinstance(process_group, distributed.ProcessGroup):
        raise TypeError(
            f"process_group: expected a torch.distributed.ProcessGroup or a Shard, got {type(process_group).__name__}"
        )
    operations = {"max": distributed.ReduceOp.MAX, "sum": distributed.ReduceOp.SUM}

    def all_reduce(array: Any, operation: str) -> None:
        distributed.all_reduce(tensor_of(array), operations[operation], process_group)

    mine = torch.stack([torch.tensor(rows, device="cpu"), seed.cpu()]).to(device)
    found = [torch.empty_like(mine) for _ in range(distributed.get_world_size(process_group))]
    distributed.all_gather(found, mine, process_group)
    each = [process.tolist() for process in found]
    shard = Shard(all_reduce, [size for size, _ in each], distributed.get_rank(process_group))
    return shard, torch.tensor(each[0][1], device="cpu")
