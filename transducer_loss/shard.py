"""A vocabulary in several processes, each of which holds some rows of the output layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from transducer_loss.checks import whole_number


@dataclasses.dataclass(frozen=True)
class Shard:
    """A process's part of an output layer whose rows lie in several processes (vocabulary-parallel).

    `joint_rnnt_loss` takes it as ``shard=``: its weight and bias are this part alone, everything else is the same in every
    process, and so are the loss and the gradients of encoder and predictor.

    Attributes
    ----------
    all_reduce : callable
        ``all_reduce(array, operation)`` combines the processes' arrays in place, by "max" or "sum": a NumPy array, or on CUDA
        a CuPy array on its current stream. Called equally often, in the same order and with the same shapes, by each process;
        so where one of them raises, as for a weight of a wrong shape, the others wait.
    sizes : sequence of int
        Classes of every process, in their order.
    rank : int
        Which of them is this process.

    Examples
    --------
    Of a single process, whose part is all of it:

    >>> import numpy as np, transducer_loss as tl
    >>> shard = tl.Shard(lambda array, operation: None, sizes=[5], rank=0)
    >>> encoder, predictor, weight = np.ones((1, 4, 3)), np.ones((1, 3, 3)), np.ones((5, 3))
    >>> loss, grads = tl.joint_rnnt_loss(encoder, predictor, weight, None, [[1, 2]], [4], [2], shard=shard)
    >>> loss
    array([7.35404238])
    """

    all_reduce: Callable[[Any, str], None]
    sizes: Sequence[int]
    rank: int

    def __post_init__(self) -> None:
        if not callable(self.all_reduce):
            raise TypeError(f"all_reduce: expected a callable, got {type(self.all_reduce).__name__}")
        if not isinstance(self.sizes, Sequence):
            raise TypeError(f"sizes: expected the classes of every process, got {type(self.sizes).__name__}")
        sizes = tuple(whole_number(size, "sizes", 1) for size in self.sizes)
        if whole_number(self.rank, "rank", 0) >= len(sizes):
            raise ValueError(f"rank: expected one of {len(sizes)} processes, got {self.rank}")
        object.__setattr__(self, "sizes", sizes)

    @property
    def first(self) -> int:
        """First class of this process."""
        return sum(self.sizes[: self.rank])

    @property
    def classes(self) -> int:
        """Number of classes of this process."""
        return self.sizes[self.rank]

    @property
    def vocab_size(self) -> int:
        """V, of all processes."""
        return sum(self.sizes)


def expect_shard(shard: Any) -> None:
    """Raise unless `shard` is one."""
    if not isinstance(shard, Shard):
        raise TypeError(f"shard: expected a Shard, got {type(shard).__name__}")
