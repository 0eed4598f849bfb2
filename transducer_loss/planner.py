"""What a transducer loss takes of memory and work, strategy by strategy, before anything is allocated."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from transducer_loss.arrays import FLOATS
from transducer_loss.checks import choice, whole_number
from transducer_loss.costs import Costs, Strategy
from transducer_loss.joint_loss import workspace_bytes
from transducer_loss.processors import Host, OnCuda, default_threads
from transducer_loss.table import aligned

_PROCESSORS: dict[str, type[Host | OnCuda]] = {"cuda": OnCuda, "cpu": Host}
DEVICES = tuple(_PROCESSORS)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Strategies for a batch of these sizes; ``print`` shows a table of them.

    Attributes
    ----------
    B, T, U, V, H : int
        Utterances, frames, labels, classes, features of the joint.
    dtype, device : str
    device_memory : int or None
        Bytes.
    strategies : tuple of Strategy
        Exact ones first.
    """

    B: int
    T: int
    U: int
    V: int
    H: int
    dtype: str
    device: str
    device_memory: int | None
    strategies: tuple[Strategy, ...]

    @property
    def cheapest(self) -> Strategy | None:
        """Of those that fit, the one of the least work, and among equals of the least memory; None where none fits."""
        return _cheapest(self.strategies)

    @property
    def cheapest_exact(self) -> Strategy | None:
        """Likewise, among those that do not approximate."""
        return _cheapest(strategy for strategy in self.strategies if strategy.exact)

    @property
    def title(self) -> str:
        """The sizes, in one line."""
        memory = "" if self.device_memory is None else f" of {readable(self.device_memory)}"
        return f"B={self.B} T={self.T} U={self.U} V={self.V} H={self.H} {self.dtype}, {self.device}{memory}"

    @property
    def table(self) -> tuple[list[str], list[list[str]]]:
        """Columns, and a row for each strategy."""
        columns = ["strategy", "loss", "work", "workspace", "memory", "inputs", "gradients", "temporary", "fits"]
        return columns, [
            [
                each.name, "exact" if each.exact else "approximate", _scaled(each.flops, 1000, _FLOPS),
                "" if each.workspace is None else readable(each.workspace),
                *map(readable, (each.bytes, each.inputs, each.gradients, each.temporary)),
                "" if each.fits is None else "yes" if each.fits else "no",
            ]
            for each in self.strategies
        ]  # fmt: skip

    @property
    def advice(self) -> str:
        """The cheapest strategy and the cheapest exact one, with the lines to copy."""
        if self.cheapest is None:
            return "Nothing fits."
        found = {"Cheapest exact": self.cheapest_exact} | ({} if self.cheapest.exact else {"Cheapest": self.cheapest})
        lines = ["none fits" if each is None else f"{each.name}\n{each.call}" for each in found.values()]
        return "\n\n".join(f"{which}: {what}" for which, what in zip(found, lines, strict=True))

    def __str__(self) -> str:
        return f"{self.title}\n\n{aligned(*self.table)}\n\n{self.advice}"


def _cheapest(strategies: Iterable[Strategy]) -> Strategy | None:
    fitting = (strategy for strategy in strategies if strategy.fits is not False)
    return min(fitting, key=lambda strategy: (strategy.flops, strategy.bytes), default=None)


_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
_FLOPS = ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP", "ZFLOP")


def readable(count: int) -> str:
    """Bytes for people, as 1.5 GiB."""
    return _scaled(count, 1024, _UNITS)


def _scaled(count: int, step: int, units: tuple[str, ...]) -> str:
    """A count in the largest unit that it has one of."""
    value, unit = float(count), 0
    while value >= step and unit < len(units) - 1:
        value, unit = value / step, unit + 1
    return f"{value:.0f} {units[unit]}" if unit == 0 or value >= 100 else f"{value:.3g} {units[unit]}"


def plan(
    B: int,
    T: int,
    U: int,
    V: int,
    H: int,
    dtype: str = "float32",
    *,
    device: str = "cuda",
    device_memory: int | str | None = None,
    s_range: int = 5,
    num_samples: int = 1000,
    threads: int | None = None,
) -> Plan:
    """Memory and work of every way to compute the loss, which of them fit, and the call to copy. Nothing is allocated.

    Parameters
    ----------
    B, T, U, V, H : int
        Utterances, frames, labels (0 or more), classes with the blank, features of the joint. All utterances count as T frames
        and U labels; a ragged batch takes less.
    dtype : {"float32", "float16", "bfloat16", "float64"}
        Of the inputs.
    device : {"cuda", "cpu"}
        Where it will run: by default on a GPU, which this machine need not have.
    device_memory : int or str, optional
        What your model leaves to the loss, in bytes or as "16GiB".
    s_range : int
        Labels per frame of the pruned strategies. Raised, as `prune` does, where no path would fit.
    num_samples : int
        Negatives of the sampled strategies; no more than V.
    threads : int, optional
        Of the CPU; each has tiles of its own. By default ``OMP_NUM_THREADS``, else the processors available.

    Returns
    -------
    Plan
        With the strategies

        - "logits": hidden features and logits of all cells, by a framework's autograd, and `rnnt_loss`;
        - "logits, in place": likewise, with the gradient written over the logits;
        - "exact joint": `joint_rnnt_loss`;
        - "pruned": `simple_rnnt_loss`, `prune`, and `joint_rnnt_loss` in the band; listed where the band leaves out labels;
        - "sampled": `sample_classes` for the batch, and `joint_rnnt_loss` over them; listed where they leave out classes;
        - "pruned and sampled": both.

        A joint has the default workspace; or, where the device's memory is too short for it, the largest power of two that
        fits (the least that works, if none fits); or, where the default is too small for one tile, the least power of two that
        works. Where it has to make logits twice, "..., logits kept" has the least power of two as workspace that keeps them.

    Raises
    ------
    ValueError, TypeError
        Naming the argument, what was expected and what came.

    Notes
    -----
    With N = B T (U + 1) cells, or N = B T S in a band of S labels, and K = V classes, or K = min(V, 1 + min(B U, V - 1) +
    num_samples) of a sample, a matrix product is ``2 N K H`` FLOP. There are three of them: logits, and gradients of hidden
    features and of the weight; and a fourth for cells whose logits are made twice. All cells count, though `occupancy_floor`
    drops those that no path uses. The simple loss adds ``6 B T (U + 1) K``, and the projections that make its inputs am
    (B, T, K) and lm (B, U+1, K) of H features add ``6 B (T + U + 1) K H``.

    Memory is of the lines in `call`, with all gradients, and for logits of the framework's backward pass. Inputs are encoder,
    predictor, weight, bias, targets and lengths, and for the pruned strategies am and lm. Temporary arrays are, with s bytes
    an element:

    - logits: ``s N (2 V + 2 H)`` for logits, hidden features and the gradients of both; in place ``s N (V + 2 H)``; or, if
      that is more, ``s N (V + 3 H)``, or 36 bytes a cell (72 for float64) beside hidden features and logits;
    - joints: tiles, and the arrays of a group's cells, as `transducer_loss.tiling` makes them, all of it within the workspace;
    - pruned: occupancies, 8 bytes a cell of the lattice (16 for float64), as long as the code holds them; within the simple
      loss 32 more (64), and per thread (T + U + 1) K sums (on CUDA at most 64 MiB of those, or one utterance's);
    - sampled: 8 bytes a class, as long as the code holds them;
    - half types: sums of the gradients in float32; and on the CPU the weight, too;
    - on CUDA, 32 MiB for cuBLAS.

    On the CPU these are what is allocated, within some percent. Tiles on CUDA depend on the size of the L2 cache, which is
    taken to be 50 MiB, and the framework's own allocator takes more than it is asked for.

    Examples
    --------
    >>> import transducer_loss as tl
    >>> plan = tl.plan(B=32, T=1000, U=200, V=1024, H=512, dtype="float16", device_memory="16GiB")
    >>> [(strategy.name, strategy.fits) for strategy in plan.strategies][:3]
    [('logits', False), ('logits, in place', False), ('exact joint', True)]
    >>> print(plan.cheapest_exact.call)
    loss, grads = tl.joint_rnnt_loss(encoder, predictor, weight, bias, targets, frames, labels, workspace="2GiB")
    """
    counts = (("B", B, 1), ("T", T, 1), ("U", U, 0), ("V", V, 1), ("H", H, 1))
    B, T, U, V, H = (whole_number(value, name, low) for name, value, low in counts)
    # Beyond, bytes of cells no longer are 64-bit integers.
    if B * T * (U + 1) * max(V, H) >= 1 << 58:
        raise ValueError(f"B: expected sizes of fewer than 2^58 logits, got B={B} T={T} U={U} V={V} H={H}")
    choice(dtype, FLOATS, "dtype")
    processor = _PROCESSORS[DEVICES[choice(device, DEVICES, "device")]]
    memory = None if device_memory is None else workspace_bytes(device_memory, 0, "device_memory")
    side_by_side = default_threads() if threads is None else whole_number(threads, "threads", 1)
    width, samples = whole_number(s_range, "s_range", 1), whole_number(num_samples, "num_samples", 0)
    costs = Costs(B, T, U, V, H, dtype, processor, side_by_side if processor.host else 1, memory)
    return Plan(B, T, U, V, H, dtype, device, memory, tuple(costs.strategies(width, samples)))
