"""What the functions for JAX take: checked while tracing, and as the core has it within a callback."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from transducer_loss import checks
from transducer_loss.arrays import as_numpy
from transducer_loss.band import Band, expect_band
from transducer_loss.classes import Classes, expect_classes
from transducer_loss.edit_distance import EditDistance
from transducer_loss.paths import Occupancy
from transducer_loss.processors import Host

jax.tree_util.register_dataclass(Band, ["first", "end", "frames", "labels", "mass"], ["width", "s_range"])
jax.tree_util.register_dataclass(Classes, ["ids", "probability"], ["vocab_size", "blank", "correction"])
jax.tree_util.register_dataclass(Occupancy, ["blank", "label", "loss"], [])
jax.tree_util.register_dataclass(EditDistance, ["total", "insertions", "deletions", "substitutions"], [])


def array_of(value: Any, name: str) -> jax.Array:
    """A JAX array of anything that is one."""
    try:
        return jnp.asarray(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name}: expected an array, got {type(value).__name__}: {error}") from error


def integers_of(value: Any, name: str) -> Any:
    """An array of integers: JAX's own, or a NumPy array, whose numbers are checked before JAX makes 32 bits of 64."""
    if isinstance(value, (list, tuple)) and any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(value)):
        value = jnp.asarray(value)
    if not isinstance(value, jax.Array):
        value = checks.integers(value, name)
    if not jnp.issubdtype(value.dtype, jnp.integer):
        raise TypeError(f"{name}: expected integers, got dtype {value.dtype.name}")
    return value


def traced(*trees: Any) -> bool:
    """Whether some of the numbers are not known yet."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(trees))


def shape_of(array: Any) -> Any:
    """A NumPy array of the shape, dtype and dense strides of an array, for the core's checks of these.

    There is no memory behind it: none of its numbers may be read.
    """
    kind = np.dtype(array.dtype)
    strides = np.cumprod([kind.itemsize, *array.shape[:0:-1]])[::-1] if array.ndim else ()
    return np.lib.stride_tricks.as_strided(np.zeros(1, kind), array.shape, tuple(map(int, strides)), writeable=False)


@dataclasses.dataclass(frozen=True)
class Given:
    """Targets and lengths, and what belongs to a batch beside them."""

    targets: Any
    frames: Any
    labels: Any
    band: Band | None = None
    classes: Classes | None = None
    index: Any = None
    """Whose encoder each utterance has, where they share them: `frames` are those of the encoders, then."""

    @property
    def positional(self) -> tuple[Any, Any, Any]:
        """As the core takes them."""
        return self.targets, self.frames, self.labels

    def on_host(self) -> Given:
        """With lengths and band as the core has them."""
        band = self.band
        if band is not None:
            frames, labels = (as_numpy(each).astype(np.int64) for each in (band.frames, band.labels))
            band = dataclasses.replace(band, frames=frames, labels=labels)
        frames, labels = (as_numpy(each).astype(np.int64) for each in (self.frames, self.labels))
        index = None if self.index is None else as_numpy(self.index).astype(np.int64)
        return dataclasses.replace(self, frames=frames, labels=labels, band=band, index=index)

    def mended(self, frames: int, labels: int, validate: bool | None) -> tuple[Given, Any]:
        """As `on_host`, with one frame and no label where lengths do not fit arrays of so many; and where that is.

        What does not fit is an error only with `validate`: while one device raises the others may wait for it, for ever.
        """
        batch = self.on_host()
        if validate:
            return batch, np.zeros(batch.labels.shape, bool)
        most = labels if self.targets is None else min(labels, self.targets.shape[1])
        fit = (batch.frames >= 1) & (batch.frames <= frames)
        if batch.index is not None:
            # Encoders are mended by themselves: others may share one with an utterance that is not.
            inside = (batch.index >= 0) & (batch.index < len(fit))
            index = np.where(inside, batch.index, 0)
            batch, fit = dataclasses.replace(batch, frames=np.where(fit, batch.frames, 1), index=index), inside & fit[index]
        bad = ~fit | (batch.labels < 0) | (batch.labels > most)
        if batch.band is not None:
            each = batch.frames if batch.index is None else batch.frames[batch.index]
            bad |= (batch.band.frames != each) | (batch.band.labels != batch.labels)
        return batch.without(bad), bad

    def without(self, these: Any) -> Given:
        """With no label for some of the utterances, and one frame for those whose encoder is their own."""
        if not these.any():
            return self
        frames = self.frames if self.index is not None else np.where(these, 1, self.frames)
        return self._of_lengths(frames, np.where(these, 0, self.labels))

    def _of_lengths(self, frames: Any, labels: Any) -> Given:
        each = frames if self.index is None else frames[self.index]
        band = None if self.band is None else dataclasses.replace(self.band, frames=each, labels=labels)
        return dataclasses.replace(self, frames=frames, labels=labels, band=band)

    def mended_packed(self, cells: int, validate: bool | None) -> tuple[Given, Any]:
        """As `mended` for packed cells, of which every utterance's lie elsewhere where one length is wrong."""
        batch, bad = self.mended(cells, cells, validate)
        width = batch.labels + 1 if batch.band is None else np.minimum(batch.band.width, batch.labels + 1)
        if not validate and (bad.any() or int((batch.frames * width).sum()) != cells):
            bad[...] = True
            batch = batch._of_lengths(_filling(len(bad), cells), np.zeros_like(batch.labels))
        return batch, bad

    def known(self, packed: int | None = None) -> Given:
        """What the core checks while tracing: the numbers, or where they are traced arrays of the same shapes.

        Those are of utterances of one frame and no label; the last of `packed` cells has what is left of these.
        """
        if not traced(self):
            return jax.tree.map(np.asarray, self).on_host()  # type: ignore[no-any-return]
        targets, frames, labels = jax.tree.map(lambda each: np.zeros(each.shape, each.dtype), self.positional)
        frames[...] = 1
        if packed is not None and frames.ndim == 1 and len(frames):
            frames = _filling(len(frames), packed)
        index = None if self.index is None else np.zeros(self.index.shape, self.index.dtype)
        band = self.band
        if band is not None:
            first, end = (np.zeros(each.shape, each.dtype) for each in (band.first, band.end))
            each = frames if index is None else np.ones_like(labels)
            band = dataclasses.replace(band, first=first, end=end, frames=each, labels=labels, mass=None)
        classes = self.classes
        if classes is not None:
            ids, probability = (np.zeros(each.shape, each.dtype) for each in (classes.ids, classes.probability))
            classes = dataclasses.replace(classes, ids=ids, probability=probability)
        return Given(targets, frames, labels, band, classes, index)

    def on_device(self) -> Given:
        """As JAX takes them."""
        return jax.tree.map(as_jax, self)  # type: ignore[no-any-return]


jax.tree_util.register_dataclass(Given, ["targets", "frames", "labels", "band", "classes", "index"], [])


def as_jax(array: Any) -> jax.Array:
    """As JAX takes an array: of integers, what its bits do not hold stays out of range."""
    if not jnp.issubdtype(array.dtype, jnp.integer):
        return jnp.asarray(array)
    kind = _integer(array.dtype)
    if isinstance(array, np.ndarray) and array.dtype != kind:
        array = np.clip(array, np.iinfo(kind).min, np.iinfo(kind).max)
    return jnp.asarray(array).astype(kind)


def _integer(dtype: Any) -> Any:
    """The integers of JAX that stand for those of a dtype; a callback takes those of 16 bits for bfloat16."""
    return dtype if dtype == np.uint32 else jax.dtypes.canonicalize_dtype(np.int64 if dtype.itemsize == 8 else np.int32)


def _filling(count: int, cells: int) -> Any:
    """Frames of utterances without labels that are so many cells together, if these are enough for one each."""
    frames = np.ones(count, np.int64)
    frames[-1] = max(1, cells - count + 1)
    return frames


def given(
    targets: Any, frames: Any, labels: Any, names: tuple[str, str], band: Band | None = None, classes: Classes | None = None,
    index: Any = None,
) -> Given:  # fmt: skip
    """Arguments of a loss that have no gradient; `names` of the lengths."""
    if band is not None:
        expect_band(band)
    if classes is not None:
        expect_classes(classes)
    lengths = (integers_of(each, name) for each, name in zip((frames, labels), names, strict=True))
    labelled = None if targets is None else integers_of(targets, "targets")
    shared = None if index is None else integers_of(index, "encoder_index")
    return Given(labelled, next(lengths), next(lengths), band, classes, shared)


def lengths_of(value: Any, name: str, shape: tuple[int, ...], low: int, high: int, dims: str) -> jax.Array:
    """Lengths for kernels that look at them themselves, checked here where they are known; `dims` as of `checks.lengths_on`."""
    array = integers_of(value, name)
    unknown = traced(array)
    numbers = np.zeros(array.shape, np.int64) if unknown else np.asarray(array)
    checks.lengths_on(Host(), numbers, name, shape, low, high, dims, None if unknown else False)
    return jax.lax.stop_gradient(as_jax(array))


def labels_of(array: Any, name: str, lengths: Any) -> jax.Array:
    """Labels that are compared with others: of those before `lengths`, no two may become one in JAX's integers."""
    if isinstance(array, np.ndarray):
        kind = _integer(array.dtype)
        bounds = np.iinfo(kind)
        outside = (array < bounds.min) | (array > bounds.max)
        if not traced(lengths):
            outside &= np.arange(array.shape[-1]) < np.asarray(lengths)[..., None]
        if outside.any():
            got = array[outside][0]
            raise ValueError(f"{name}: expected labels of {kind.name}, as JAX has them (see jax_enable_x64), got {got}")
    return jax.lax.stop_gradient(as_jax(array))


def numbers_of(value: Any, name: str, dims: str, shape: tuple[int, ...], dtype: str) -> Any:
    """Numbers that have no gradient: JAX's own array, or of anything else a NumPy array of a dtype."""
    if isinstance(value, (list, tuple)) and any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(value)):
        value = jnp.asarray(value)
    own = isinstance(value, jax.Array)
    numbers = checks.numbers_for(np.zeros(value.shape, value.dtype) if own else value, Host(), name, dims, shape, dtype)
    return jax.lax.stop_gradient(as_jax(value)) if own else numbers


def as_callbacks(options: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    """Keywords of the core within a callback, which looks at labels with ``validate=True`` alone, on the host, too."""
    return tuple({**options, "validate": True if options["validate"] else None}.items())


def blanked(processor: Any, array: Any, bad: Any, value: float) -> Any:
    """An array whose `bad` rows are a value."""
    if not bad.any():
        return array
    rows = processor.to_device(bad.reshape(-1, *[1] * (array.ndim - 1)))
    return np.where(rows, array.dtype.type(value), array)


def number_of(words: Any) -> int:
    """The number of a seed or a step."""
    known = as_numpy(words)
    return sum(int(word) << 32 * i for i, word in enumerate(known)) if known.ndim else int(known)


def words_of(value: Any, name: str, bits: int = 63) -> Any:
    """A seed or a step, of so many bits: Python's number as two words of 32, as JAX's keys are; an array as it is."""
    if not isinstance(value, jax.Array):
        number = checks.whole_number(value, name) & (1 << bits) - 1
        return np.array([number & 0xFFFFFFFF, number >> 32], np.uint32)
    if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        value = jax.random.key_data(value)
    if not jnp.issubdtype(value.dtype, jnp.integer) or value.ndim > 1:
        raise TypeError(f"{name}: expected an int, a scalar of them or a PRNG key, got {value.dtype.name} of {value.shape}")
    return as_jax(value)
