"""JAX: pruned RNN-T (arXiv 2206.13236): the simple loss, the band, and the predictor's rows in it."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from transducer_loss import checks, pruning, simple_loss
from transducer_loss.adapters.jax.callback import Memory, Options, alike, call, compute_dtype, device_bytes
from transducer_loss.adapters.jax.given import Given, array_of, as_callbacks, blanked, given, integers_of, shape_of, traced
from transducer_loss.band import Band, expect_band
from transducer_loss.paths import Occupancy
from transducer_loss.processors import processor_for

Pair = tuple[jax.Array, jax.Array]


def _simple(
    memory: Memory, options: dict[str, Any], outputs: list[Any], am: Any, lm: Any, batch: Given
) -> None:
    batch, bad = batch.mended(am.shape[1], lm.shape[1] - 1, options["validate"])
    of = simple_loss.problem(am, lm, *batch.positional, allocate=memory, **options)
    weights = None if not bad.any() else of.processor.to_device((~bad).astype(of.dtype))
    simple_loss.forward(of, weights, gradient=len(outputs) > 3)
    for output, value in zip(outputs[-3:], (np.nan, 0, 0), strict=True):
        output[...] = blanked(of.processor, output, bad, value)


def _simple_results(am: jax.Array, lm: jax.Array) -> Any:
    kind = compute_dtype(am)
    return (am.shape[:1], kind), *[((*am.shape[:2], lm.shape[1]), kind)] * 2


def _simple_scratch(am: jax.Array, lm: jax.Array) -> int:
    kind, (batch, frames, classes), rows = compute_dtype(am), am.shape, am.shape[1] + lm.shape[1]
    task = simple_loss.utterances_of_a_task(False, batch, rows, classes) * rows * classes
    return device_bytes(kind, batch * frames * lm.shape[1], batch * frames, task * np.dtype(kind).itemsize)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _simple_loss(options: Options, am: jax.Array, lm: jax.Array, batch: Given) -> tuple[jax.Array, Pair]:
    loss, blank, label = call(_simple, options, _simple_results(am, lm), am, lm, batch, scratch=_simple_scratch(am, lm))
    return loss, (blank, label)


def _simple_loss_fwd(options: Options, am: jax.Array, lm: jax.Array, batch: Given) -> tuple[tuple[jax.Array, Pair], Any]:
    kind, (losses, *occupancy) = compute_dtype(am), _simple_results(am, lm)
    # In the order of the core.
    results = ((am.shape, kind), (lm.shape, kind), losses, *occupancy)
    by_am, by_lm, loss, blank, label = call(
        _simple, options, results, am, lm, batch, scratch=_simple_scratch(am, lm)
    )
    return (loss, (blank, label)), (by_am, by_lm, jnp.zeros((), am.dtype))


def _simple_loss_bwd(options: Options, kept: Any, upstream: Any) -> tuple[jax.Array, jax.Array, None]:
    *sums, like = kept
    weights = upstream[0][:, None, None]
    # An utterance that is not finite has gradient 0, whatever comes back to it.
    am, lm = (jnp.where(each == 0, 0, each * weights).astype(like.dtype) for each in sums)
    return am, lm, None


_simple_loss.defvjp(_simple_loss_fwd, _simple_loss_bwd)


def simple_rnnt_loss(
    am: Any,
    lm: Any,
    targets: Any,
    am_lengths: Any,
    target_lengths: Any,
    *,
    lm_only_scale: float = 0.0,
    am_only_scale: float = 0.0,
    blank: int = 0,
    topology: str = "regular",
    fastemit_lambda: float = 0.0,
    delay_penalty: float = 0.0,
    infeasible: str = "inf",
    validate: bool = False,
) -> tuple[jax.Array, Occupancy]:
    """Transducer loss of a joiner that only adds, smoothed, with gradients; and the occupancies to prune by.

    Parameters
    ----------
    am : (B, T, V) array
    lm : (B, U+1, V) array
    targets, am_lengths, target_lengths
        As of `rnnt_loss`.
    lm_only_scale, am_only_scale, blank, topology, fastemit_lambda, delay_penalty, infeasible, validate
        As of `transducer_loss.simple_rnnt_loss`. They are not traced.

    Returns
    -------
    loss : (B,) array
    occupancy : Occupancy
        For `prune`; a pytree, without gradient.

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> from transducer_loss.adapters.jax import prune, simple_rnnt_loss
    >>> loss, occupancy = simple_rnnt_loss(jnp.zeros((1, 9, 5)), jnp.zeros((1, 7, 5)), [[1, 2, 3, 4, 1, 2]], [9], [6])
    >>> prune(occupancy, [9], [6], s_range=3).first.shape
    (1, 9)
    """
    options: dict[str, Any] = {
        "lm_only_scale": lm_only_scale, "am_only_scale": am_only_scale, "blank": blank, "topology": topology,
        "fastemit_lambda": fastemit_lambda, "delay_penalty": delay_penalty, "infeasible": infeasible, "validate": validate,
    }  # fmt: skip
    am, lm = array_of(am, "am"), array_of(lm, "lm")
    batch = given(targets, am_lengths, target_lengths, ("am_lengths", "target_lengths"))
    simple_loss.problem(shape_of(am), shape_of(lm), *batch.known().positional, **options)
    loss, occupancy = _simple_loss(as_callbacks(options), *alike(am, lm, batch.on_device()))
    blank_occupancy, label_occupancy = map(jax.lax.stop_gradient, occupancy)
    return loss, Occupancy(blank_occupancy, label_occupancy, jax.lax.stop_gradient(loss))


def _prune(
    memory: Memory, options: dict[str, Any], outputs: list[Any], occupancy: Occupancy, batch: Given
) -> None:
    width = options.pop("width")
    batch, bad = batch.mended(occupancy.blank.shape[1], occupancy.blank.shape[2] - 1, None)
    _, frames, labels = batch.positional
    each = zip(frames[:, None], labels[:, None], strict=True)
    narrow = np.array([pruning.least_width(*lengths, options["topology"]) > width for lengths in each])
    found = pruning.pruned(occupancy, *batch.without(narrow).positional[1:], allocate=memory, **options)
    for output, array in zip(outputs, (found.first, found.end, found.mass), strict=True):
        output[...] = array
    if bad.any() or narrow.any():
        processor = processor_for(found.first)
        outputs[1][...] = np.where(processor.to_device(narrow[:, None]), np.int32(width), outputs[1])
        outputs[2][...] = blanked(processor, blanked(processor, outputs[2], narrow, 0), bad, np.nan)


def prune(
    occupancy: Occupancy, am_lengths: Any, target_lengths: Any, *, s_range: int = 5, strategy: str = "local",
    topology: str = "regular",
) -> Band:  # fmt: skip
    """Band of the labels that matter in each frame, a pytree.

    Parameters
    ----------
    occupancy : Occupancy
        As `simple_rnnt_loss` returns it.
    am_lengths, target_lengths : (B,) array or list of int
    s_range : int
        S. Where the lengths are known it is raised and lowered as by `transducer_loss.prune`. Where they are traced the
        `width` is ``min(s_range, U + 1)`` of the padded U, and an utterance that needs more, ``1 + ceil(U_b / T_b)`` for
        "regular", has a band without a path: mass 0, and the loss of an utterance without one (see `infeasible`).
    strategy, topology
        As of `transducer_loss.prune`.

    Returns
    -------
    Band
        For ``band=`` of the losses, and for `gather_predictor`. `width` and `s_range` are static, all else are arrays.

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> from transducer_loss.adapters.jax import prune, rnnt_loss, simple_rnnt_loss
    >>> @jax.jit
    ... def loss(am, lm, logits, targets, frames, labels):
    ...     simple, occupancy = simple_rnnt_loss(am, lm, targets, frames, labels)
    ...     band = prune(occupancy, frames, labels, s_range=3)
    ...     return simple, rnnt_loss(logits, targets, frames, labels, band=band)
    >>> am, lm, logits = jnp.zeros((1, 9, 5)), jnp.zeros((1, 7, 5)), jnp.zeros((1, 9, 3, 5))
    >>> simple, pruned = loss(am, lm, logits, jnp.array([[1, 2, 3, 4, 1, 2]]), jnp.array([9]), jnp.array([6]))
    >>> bool(pruned[0] > simple[0])
    True
    """
    for name in ("blank", "label"):
        if not hasattr(occupancy, name):
            raise TypeError(f"occupancy: expected an Occupancy, got {type(occupancy).__name__}")
    blank, label = (array_of(getattr(occupancy, name), f"occupancy.{name}") for name in ("blank", "label"))
    checks.float_array(shape_of(blank), "occupancy.blank", "B T U+1")
    checks.expect_shape(label, "occupancy.label", "(B, T, U+1)", tuple(blank.shape))
    asked = checks.whole_number(s_range, "s_range", 1)
    checks.choice(strategy, pruning.STRATEGIES, "strategy")
    checks.choice(topology, checks.TOPOLOGIES, "topology")
    rows, most, columns = blank.shape
    batch = given(None, am_lengths, target_lengths, ("am_lengths", "target_lengths"))
    known = batch.known()
    frames = checks.lengths(known.frames, "am_lengths", rows, 1, most, "T")
    labels = checks.lengths(known.labels, "target_lengths", rows, 0, columns - 1, "U")
    if traced(batch):
        width = min(asked, columns)
    else:
        width = min(max(asked, pruning.least_width(frames, labels, topology)), int(labels.max()) + 1)
    batch = batch.on_device()
    options = (("s_range", asked), ("strategy", strategy), ("topology", topology), ("width", width))
    found = Occupancy(jax.lax.stop_gradient(blank), jax.lax.stop_gradient(label), None)
    results = (((rows, most), "int32"), ((rows, most), "int32"), ((rows,), compute_dtype(blank)))
    first, end, mass = call(
        _prune, options, results, found, batch, scratch=device_bytes(compute_dtype(blank), blank.size, rows * most)
    )
    return Band(first, end, width, batch.frames, batch.labels, asked, mass)


def _gather(memory: Memory, options: dict[str, Any], outputs: list[Any], predictor: Any, batch: Given) -> None:
    pruning.gathered(predictor, _band_of(batch, predictor.shape[1]), allocate=memory)


def _band_of(batch: Any, columns: int) -> Any:
    return batch.mended(batch.band.first.shape[1], columns - 1, None)[0].band


def _gather_backward(memory: Memory, options: dict[str, Any], outputs: list[Any], upstream: Any, batch: Given) -> None:
    pruning.gathered_backward(upstream, _band_of(batch, options["labels"]), allocate=memory, **options)


@jax.custom_vjp
def _gathered(predictor: jax.Array, batch: Any) -> jax.Array:
    band = batch.band
    shape = (*band.first.shape, band.width, predictor.shape[2])
    (rows,) = call(_gather, (), ((shape, predictor.dtype.name),), predictor, batch, scratch=1 << 20)
    return rows


def _gathered_fwd(predictor: jax.Array, batch: Given) -> tuple[jax.Array, Any]:
    return _gathered(predictor, batch), (batch, jnp.zeros((predictor.shape[1], 0)))


def _gathered_bwd(kept: Any, upstream: jax.Array) -> tuple[jax.Array, None]:
    batch, like = kept
    shape = (upstream.shape[0], like.shape[0], upstream.shape[3])
    options = (("labels", like.shape[0]),)
    (gradient,) = call(
        _gather_backward, options, ((shape, upstream.dtype.name),), upstream, batch, scratch=1 << 20
    )
    return gradient, None


_gathered.defvjp(_gathered_fwd, _gathered_bwd)


def gather_predictor(predictor: Any, band: Band) -> jax.Array:
    """The predictor's rows of a band's cells, with a gradient, for a joiner of one's own.

    Parameters
    ----------
    predictor : (B, U+1, H) array
    band : Band

    Returns
    -------
    (B, T, S, H) array
        To be joined with ``encoder[:, :, None]``; the logits of it go to ``rnnt_loss(..., band=band)``.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> from transducer_loss.adapters.jax import Band, gather_predictor
    >>> band = Band.from_ranges([[[0, 1], [1, 2]]], [2], [2])
    >>> gather_predictor(jnp.arange(3.0)[None, :, None], band)[0, :, :, 0].tolist()
    [[0.0, 1.0], [1.0, 2.0]]
    """
    expect_band(band)
    rows = array_of(predictor, "predictor")
    checks.float_array(shape_of(rows), "predictor", "B U+1 H")
    frames, labels = (integers_of(each, "band") for each in (band.frames, band.labels))
    if frames.shape != rows.shape[:1] or band.first.shape[:1] != rows.shape[:1]:
        raise ValueError(f"band: expected one of {rows.shape[0]} utterances, got {tuple(band.first.shape[:1])}")
    batch = Given(None, frames, labels, dataclasses.replace(band, frames=frames, labels=labels))
    known = batch.known()
    if int(known.labels.max()) >= rows.shape[1]:
        raise ValueError(
            f"band: expected utterances of less than {rows.shape[1]} labels, got target lengths {known.labels.tolist()}"
        )
    return _gathered(*alike(rows, batch.on_device()))
