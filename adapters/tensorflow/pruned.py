"""TensorFlow: pruned RNN-T (arXiv 2206.13236): the simple loss, the band, and the predictor's rows in it."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from transducer_loss import band as core
from transducer_loss import paths, pruning, simple_loss
from transducer_loss.adapters.tensorflow.graph import (
    check_options,
    core_arguments,
    differentiable,
    floats,
    integers,
    run,
    tensor_of,
)
from transducer_loss.arrays import COMPUTE, as_array
from transducer_loss.checks import TOPOLOGIES, choice, whole_number


class Occupancy(NamedTuple):
    """Posterior probability of every arc, (B, T, U+1); and the loss (B,). `transducer_loss.Occupancy` as tensors."""

    blank: Any
    label: Any
    loss: Any


class Band(NamedTuple):
    """`transducer_loss.Band` as tensors, which a tf.function, a data set or a strategy may pass on.

    Attributes
    ----------
    first, end : (B, T) tensor of int32
    width, s_range : scalar tensor of int64
    frames, labels : (B,) tensor of int64
    mass : (B,) tensor, or None for a band that is not pruned
    """

    first: Any
    end: Any
    width: Any
    frames: Any
    labels: Any
    s_range: Any
    mass: Any = None


def band_tensors(band: Any) -> Band | None:
    """A band of either kind, as tensors."""
    if band is None or isinstance(band, Band):
        return band
    core.expect_band(band)
    mass = None if band.mass is None else tensor_of(band.mass)
    width, frames, labels, s_range = (
        tf.constant(each, tf.int64) for each in (band.width, band.frames, band.labels, band.s_range)
    )
    return Band(tensor_of(band.first), tensor_of(band.end), width, frames, labels, s_range, mass)


def core_band(band: Band | None) -> Any:
    """The core's band of eager tensors."""
    if band is None:
        return None
    first, end = as_array(band.first, "band.first"), as_array(band.end, "band.end")
    frames, labels = (np.asarray(each, np.int64) for each in (band.frames, band.labels))
    return core.Band(first, end, int(band.width), frames, labels, int(band.s_range))


@tf.autograph.experimental.do_not_convert
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
) -> tuple[Any, Occupancy]:
    """Transducer losses of a joiner that only adds, smoothed, with a gradient; and the occupancies to prune by.

    Parameters
    ----------
    am : (B, T, V) tensor
    lm : (B, U+1, V) tensor
    targets, am_lengths, target_lengths
        As of `rnnt_loss`.
    lm_only_scale, am_only_scale, blank, topology, fastemit_lambda, delay_penalty, infeasible, validate
        As of `transducer_loss.simple_rnnt_loss`.

    Returns
    -------
    loss : (B,) tensor
        float32, or float64 for float64 inputs. Its gradients are made with it, as they cost little more than keeping what
        they are made of.
    occupancy : Occupancy
        For `prune`; without gradient.

    Examples
    --------
    >>> import tensorflow as tf
    >>> from transducer_loss.adapters.tensorflow import prune, simple_rnnt_loss
    >>> loss, occupancy = simple_rnnt_loss(tf.zeros((1, 4, 5)), tf.zeros((1, 3, 5)), [[1, 2]], [4], [2])
    >>> print(f"{float(loss[0]):.4f}")
    7.3540
    >>> prune(occupancy, [4], [2], s_range=2).first.shape
    TensorShape([1, 4])
    """
    options: dict[str, Any] = {
        "lm_only_scale": lm_only_scale, "am_only_scale": am_only_scale, "blank": blank, "topology": topology,
        "fastemit_lambda": fastemit_lambda, "delay_penalty": delay_penalty, "infeasible": infeasible, "validate": validate,
    }  # fmt: skip
    am, lm = floats(am, "am", "B T V"), floats(lm, "lm", "B U+1 V")
    others = (integers(targets, "targets"), integers(am_lengths, "am_lengths"), integers(target_lengths, "target_lengths"))
    check_options(
        am.shape[-1], blank=blank, topology=topology, fastemit_lambda=fastemit_lambda, delay_penalty=delay_penalty,
        infeasible=infeasible,
    )  # fmt: skip

    def forward(arguments: Any) -> list[Any]:
        (am, lm), others = arguments
        with core_arguments(am) as given:
            of = simple_loss.problem(am, lm, *others, **options, **given)
            done = simple_loss.forward(of)
            return [tensor_of(each) for each in (done.loss, *done.occupancy, *(done.gradients or ()))]

    real = COMPUTE[am.dtype.name]
    cells = tf.TensorShape([am.shape[0], am.shape[1], lm.shape[1]])
    specs = [tf.TensorSpec(shape, real) for shape in (am.shape[:1], cells, cells, am.shape, lm.shape)]
    loss, (of_blank, of_label, *_) = differentiable(forward, _scaled, (am, lm), others, specs)
    return loss, Occupancy(of_blank, of_label, tf.stop_gradient(loss))


def _scaled(arguments: Any) -> list[Any]:
    inputs, _, (_, _, *made), upstream = arguments
    # An utterance that is not finite has gradient 0, whatever comes back to it.
    return [
        tf.cast(tf.where(each == 0, tf.zeros_like(each), each * upstream[:, None, None]), tensor.dtype)
        for tensor, each in zip(inputs, made, strict=True)
    ]


@tf.autograph.experimental.do_not_convert
def prune(
    occupancy: Any, am_lengths: Any, target_lengths: Any, *, s_range: int = 5, strategy: str = "local",
    topology: str = "regular",
) -> Band:  # fmt: skip
    """Band of the labels that matter in each frame: `transducer_loss.prune`, as tensors.

    Parameters
    ----------
    occupancy : Occupancy
        As `simple_rnnt_loss` returns it.
    am_lengths, target_lengths : (B,) tensor or list of int
    s_range, strategy, topology
        As of `transducer_loss.prune`.

    Returns
    -------
    Band
        In a tf.function its `width` is a tensor, too, for it depends on the lengths.
    """
    whole_number(s_range, "s_range", 1)
    choice(strategy, pruning.STRATEGIES, "strategy")
    choice(topology, TOPOLOGIES, "topology")
    if not (hasattr(occupancy, "blank") and hasattr(occupancy, "label")):
        raise TypeError(f"occupancy: expected an Occupancy, got {type(occupancy).__name__}")
    blank, label = (floats(getattr(occupancy, name), f"occupancy.{name}", "B T U+1") for name in ("blank", "label"))

    def made(arguments: Any) -> list[Any]:
        blank, label, *lengths = arguments
        with core_arguments(blank) as given:
            band = pruning.pruned(
                paths.Occupancy(blank, label, None), *lengths, s_range=s_range, strategy=strategy, topology=topology, **given
            )
            return list(band_tensors(band) or ())

    batch, rows = blank.shape[:1], blank.shape[:2]
    specs = [tf.TensorSpec(rows, tf.int32)] * 2
    specs += [tf.TensorSpec(shape, tf.int64) for shape in ((), batch, batch, ())]
    lengths = (integers(am_lengths, "am_lengths"), integers(target_lengths, "target_lengths"))
    return Band(*run(made, (blank, label, *lengths), [*specs, tf.TensorSpec(batch, COMPUTE[blank.dtype.name])]))


@tf.autograph.experimental.do_not_convert
def gather_predictor(predictor: Any, band: Any) -> Any:
    """The predictor's rows of a band's cells, with a gradient, for a joiner of one's own.

    Parameters
    ----------
    predictor : (B, U+1, H) tensor
    band : Band

    Returns
    -------
    (B, T, S, H) tensor
        To be joined with ``encoder[:, :, None]``; the logits of it go to ``rnnt_loss(..., band=band)``.
    """
    predictor, band = floats(predictor, "predictor", "B U+1 H"), band_tensors(band)

    def forward(arguments: Any) -> list[Any]:
        (predictor,), band = arguments
        with core_arguments(predictor) as given:
            return [tensor_of(pruning.gathered(predictor, core_band(band), **given))]

    def backward(arguments: Any) -> list[Any]:
        (predictor,), band, _, upstream = arguments
        with core_arguments(upstream) as given:
            return [tensor_of(pruning.gathered_backward(upstream, core_band(band), int(predictor.shape[1]), **given))]

    width = tf.get_static_value(band.width)
    shape = tf.TensorShape([*band.first.shape, None if width is None else int(width), predictor.shape[-1]])
    return differentiable(forward, backward, (predictor,), band, [tf.TensorSpec(shape, predictor.dtype)])[0]
