"""What the losses of a training step tell of themselves beside their values."""

from __future__ import annotations

import dataclasses
import threading
from typing import Any

import numpy as np

from transducer_loss.cells import Cells, Group
from transducer_loss.checks import whole_number

Array = np.ndarray[Any, Any]


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Means of a step; None where no loss had anything to say of it.

    Attributes
    ----------
    kept_mass : float or None
        Of the bands that `prune` made: the probability, by the simple loss, that a path stays in the band; a mean over
        utterances, of which one without any path, or with a NaN, counts as 0.
    dropped_share : float or None
        Of the cells of `joint_rnnt_loss`: the share that needed no gradient (`occupancy_floor`). Of an utterance without a
        path, with a NaN or with weight 0 it is all of them.
    emission_delay : float or None
        Of `rnnt_loss` and `joint_rnnt_loss`, in frames: how much later than in the middle of its utterance, (T_b - 1) / 2, a
        label is emitted; a mean over the labels of all paths, weighted by their probability. A model that spreads its labels
        evenly is at 0. It is the delay that `delay_penalty` (arXiv 2211.00490) pushes down; for delays against known times see
        `transducer_loss.plot.emission_delays`.
    """

    kept_mass: float | None
    dropped_share: float | None
    emission_delay: float | None

    def known(self, prefix: str = "") -> dict[str, float]:
        """Those that are not None, by their names with a prefix, as loggers take them."""
        return {prefix + name: value for name, value in dataclasses.asdict(self).items() if value is not None}


class Monitor:
    """Collects statistics of the losses, of all threads, that are computed inside a ``with``.

    It hears losses that make a gradient (TensorFlow's always prepare one) and every `prune`, but nothing of a CUDA graph that
    is captured: no replay could bring its numbers up to date. On CUDA nothing waits for the device until `statistics` is
    called; a loss launches a few small kernels for each utterance more. JAX runs on by itself: call ``block_until_ready`` on
    the loss inside the ``with``.

    Examples
    --------
    >>> import numpy as np, transducer_loss as tl
    >>> rng = np.random.default_rng(0)
    >>> with tl.Monitor() as monitor:
    ...     loss, grad = tl.rnnt_loss(rng.normal(size=(2, 9, 4, 6)), [[1, 2, 3], [4, 5, 0]], [9, 7], [3, 2])
    >>> sorted(monitor.statistics().known("train/"))
    ['train/emission_delay']
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sums: dict[str, Array] = {}
        self._pending: list[tuple[str, _Later]] = []

    def __enter__(self) -> Monitor:
        global _active
        with _change:
            _active = (*_active, self)
        return self

    def __exit__(self, *details: object) -> None:
        global _active
        with _change:
            others = list(_active)
            others.remove(self)  # once: it may have been entered twice
            _active = tuple(others)

    def statistics(self) -> Statistics:
        """Of all losses so far; waits for those on CUDA."""
        with self._lock:
            self._add_up(wait=True)
            means = {name: float(total / number) for name, (total, number) in self._sums.items() if number > 0}
        return Statistics(means.get("kept_mass"), means.get("dropped_share"), means.get("emission_delay"))

    def _tell(self, name: str, fraction: _Later) -> None:
        with self._lock:
            self._pending.append((name, fraction))
            self._add_up(wait=False)

    def _add_up(self, wait: bool) -> None:
        later = []
        for name, fraction in self._pending:
            if wait or fraction.is_here():
                self._sums[name] = self._sums.get(name, np.zeros(2)) + fraction.read()
            else:
                later.append((name, fraction))
        self._pending = later


_active: tuple[Monitor, ...] = ()
_change = threading.Lock()


class _Later:
    """A numerator and its denominator, on their way from a device."""

    def __init__(self, both: Any) -> None:
        self._numbers, self._event = both, None
        if not isinstance(both, np.ndarray):
            import cupy
            import cupyx

            # At once, as the memory may be lent for this call alone.
            self._numbers, stream = cupyx.empty_pinned(both.shape, both.dtype), cupy.cuda.get_current_stream()
            both.data.copy_to_host_async(self._numbers.ctypes.data, both.nbytes, stream)
            self._event = stream.record()

    def is_here(self) -> bool:
        return self._event is None or bool(self._event.done)

    def read(self) -> Array:
        if self._event is not None:
            self._event.synchronize()
        return np.asarray(self._numbers, np.float64)


def _listening(array: Any) -> bool:
    """Whether anyone listens to what a loss on the device of `array` has to say."""
    if not _active or isinstance(array, np.ndarray):
        return bool(_active)
    import cupy

    return not cupy.cuda.get_current_stream().is_capturing()


def _tell(name: str, both: Any) -> None:
    fraction = _Later(both)
    for monitor in _active:
        monitor._tell(name, fraction)


def kept_mass(mass: Any) -> None:
    """Tell of the mass (B,) that bands keep."""
    if _listening(mass):
        _tell("kept_mass", np.stack([mass.sum(), np.ones_like(mass).sum()]))


def dropped_share(dropped: int, cells: int) -> None:
    """Tell how many cells needed no gradient."""
    if _active:
        _tell("dropped_share", np.array([dropped, cells]))


def emission_delay(cells: Cells, group: Group, label_occupancy: Any, fastemit_lambda: float) -> None:
    """Tell when labels are emitted, by the effective occupancies of a group's cells."""
    if not _listening(label_occupancy):
        return
    delay = labels = 0.0
    for i, start in enumerate(group.offsets[:-1]):
        frames, width = int(cells.frames[group.begin + i]), int(cells.width[group.begin + i])
        by_frame = label_occupancy[start : start + frames * width].reshape(frames, width).sum(1)
        later = np.arange(frames, like=by_frame) - (frames - 1) / 2
        delay, labels = delay + (by_frame * later).sum(), labels + by_frame.sum()
    _tell("emission_delay", np.stack([delay, labels]) / (1 + fastemit_lambda))


class Steps:
    """A monitor of one training step after the other, as callbacks of a trainer need it.

    Parameters
    ----------
    every : int
        Listen to the first step and to every so manieth after it.
    """

    def __init__(self, every: int) -> None:
        self.every = whole_number(every, "every_n_batches", 1)
        self._monitor: Monitor | None = None

    def begin(self, step: int) -> None:
        """Begin to listen, if it is this step's turn."""
        self.end()  # of a step that was broken off
        if step % self.every == 0:
            self._monitor = Monitor().__enter__()

    def end(self) -> Statistics | None:
        """End to listen; what was heard, if it was this step's turn."""
        monitor, self._monitor = self._monitor, None
        if monitor is None:
            return None
        monitor.__exit__()
        return monitor.statistics()
