"""What the functions for TensorFlow share: the core called eagerly or from a graph, and rules of gradients."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.python.ops import control_flow_util

from transducer_loss.arrays import FLOATS, on_host
from transducer_loss.checks import Options
from transducer_loss.processors import ALIGNMENT, address_of

Function = Callable[..., list[Any]]

_XLA = (
    "transducer losses cannot be compiled by XLA: expected a tf.function without jit_compile=True, and in Keras "
    "compile(..., jit_compile=False); what the network does may be a tf.function with jit_compile=True of its own"
)


@contextlib.contextmanager
def core_arguments(tensor: Any) -> Iterator[dict[str, Any]]:
    """Arguments that the core takes from the framework: its number of threads and, on CUDA, its memory."""
    threads = {"threads": tf.config.threading.get_intra_op_parallelism_threads() or None}
    kind, index = (int(part) for part in tensor.__dlpack_device__())
    if kind == 1:
        yield threads
        return
    import cupy

    # TensorFlow does not tell its stream: it waits for that one when it exports a tensor, and we for ours before it goes on.
    # Until then temporary memory is held, as other kernels would be given it as soon as it is let go.
    held = []

    def allocate(shape: tuple[int, ...], dtype: str) -> Any:
        with tf.device(tensor.device):
            held.append(tf.raw_ops.Empty(shape=shape, dtype=dtype))
        return held[-1]

    with cupy.cuda.Device(index):
        try:
            yield {**threads, "allocate": allocate}
        finally:
            cupy.cuda.get_current_stream().synchronize()


def tensor_of(array: Any) -> Any:
    """One of the core's arrays as a tensor, over the same memory wherever TensorFlow can read it there."""
    if isinstance(array, tf.Tensor):
        return array
    if on_host(array):
        if address_of(array) % ALIGNMENT or not array.flags.c_contiguous:  # the process would be aborted
            with tf.device("CPU:0"):
                return tf.constant(array)
        if array.dtype.name == "bfloat16":  # which NumPy does not export
            return tf.bitcast(tensor_of(array.view(np.uint16)), tf.bfloat16)
    return tf.experimental.dlpack.from_dlpack(array.__dlpack__())


def _expect_dense(value: Any, name: str) -> None:
    if isinstance(value, (tf.RaggedTensor, tf.SparseTensor)):
        raise TypeError(f"{name}: expected a dense tensor, as of its to_tensor(), got a {type(value).__name__}")


def floats(value: Any, name: str, dims: str) -> Any:
    """Floats as a tensor, of dimensions that are named by `dims`."""
    _expect_dense(value, name)
    tensor = tf.convert_to_tensor(value)
    if tensor.dtype.name not in FLOATS:
        raise TypeError(f"{name}: expected dtype {', '.join(FLOATS)}, got {tensor.dtype.name}")
    names = dims.split()
    if tensor.shape.rank not in (None, len(names)):
        raise ValueError(f"{name}: expected {len(names)} dimensions ({', '.join(names)}), got shape {tensor.shape}")
    return tensor


def _given(value: Any, name: str, what: str) -> Any:
    """A tensor; of lists and NumPy arrays on the host, where it costs no synchronisation to read them."""
    _expect_dense(value, name)
    if tf.is_tensor(value) or isinstance(value, tf.Variable):
        return tf.convert_to_tensor(value)
    try:
        array = np.asarray(value)
    except ValueError:
        raise ValueError(f"{name}: expected {what}, in rows of one length, got {value}") from None
    with tf.device("CPU:0"):
        return tf.constant(array if array.size else array.astype(np.int64))


def integers(value: Any, name: str) -> Any:
    """Integers as a tensor."""
    tensor = _given(value, name, "integers")
    if not tensor.dtype.is_integer:
        raise TypeError(f"{name}: expected integers, got dtype {tensor.dtype.name}")
    return tensor


def numbers(value: Any, name: str) -> Any:
    """Integers or floats as a tensor; the floats of lists in float64."""
    tensor = _given(value, name, "numbers")
    if not tensor.dtype.is_integer and tensor.dtype.name not in FLOATS:
        raise TypeError(f"{name}: expected integers or dtype {', '.join(FLOATS)}, got {tensor.dtype.name}")
    return tensor


def run(function: Function, arguments: Any, specs: Sequence[tf.TensorSpec]) -> list[Any]:
    """Tensors of `specs` that a function makes of a nest of eager tensors: at once, or when the graph is run."""
    if tf.executing_eagerly():
        return function(arguments)
    if control_flow_util.GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph()):
        raise ValueError(_XLA)
    flat = tf.nest.flatten(arguments)
    # TensorFlow holds the operation's function as long as the process lives: it must not hold the graph.
    there = [each is not None for each in flat]
    nest = tf.nest.map_structure(lambda each: None, arguments)

    def operation(*tensors: Any) -> list[Any]:
        rest = iter(tensors)
        return function(tf.nest.pack_sequence_as(nest, [next(rest) if each else None for each in there]))

    results: list[Any] = tf.py_function(operation, [each for each in flat if each is not None], [spec.dtype for spec in specs])
    for result, spec in zip(results, specs, strict=True):
        result.set_shape(spec.shape)
    return results


def like(*tensors: Any) -> list[tf.TensorSpec]:
    """What gradients by tensors look like."""
    return [tf.TensorSpec(each.shape, each.dtype) for each in tensors]


def _twice(upstream: Any) -> list[Any]:
    # In a graph only when it is run: under two tapes TensorFlow draws graphs of second order that nobody has asked for.
    raise RuntimeError("transducer losses cannot be differentiated twice, nor in forward mode: their gradient has no gradient")


def differentiable(
    forward: Function, backward: Function, inputs: Sequence[Any], others: Any, specs: Sequence[tf.TensorSpec],
    gradients: Sequence[tf.TensorSpec] | None = None, finish: Callable[..., Any] = lambda *each: each,
) -> tuple[Any, list[Any]]:  # fmt: skip
    """A loss with a gradient, and the other results of the forward pass, without one.

    Parameters
    ----------
    forward : callable
        ``forward((inputs, others)) -> [loss, *saved]``, with eager tensors.
    backward : callable
        ``backward((inputs, others, saved, upstream)) -> gradients`` by those inputs that are not None.
    inputs : sequence of tensors or None
    others : nest of tensors or None
        What has no gradient.
    specs, gradients : sequence of TensorSpec
        Of what the two return; gradients are shaped as their inputs, by default.
    finish : callable
        What to make of the gradients in the graph itself.
    """
    there = [each is not None for each in inputs]
    found: list[Any] = []

    def all_of(tensors: Any) -> list[Any]:
        rest = iter(tensors)
        return [next(rest) if each else None for each in there]

    @tf.custom_gradient
    def loss_of(*tensors: Any) -> tuple[Any, Callable[[Any], Any]]:
        # Without the stop, gradients of a tf.function would be looked for through the operation, which records a tape then.
        loss, *saved = (tf.stop_gradient(each) for each in run(forward, (all_of(tensors), others), specs))
        found.extend(saved)

        @tf.custom_gradient
        def once(upstream: Any, *tensors: Any) -> tuple[Any, Callable[..., Any]]:
            def twice(*upstreams: Any) -> list[Any]:
                return run(_twice, upstreams[0], like(upstream, *tensors))

            return run(backward, (all_of(tensors), others, saved, upstream), gradients or like(*tensors)), twice

        def gradient(upstream: Any) -> Any:
            return finish(*once(tf.convert_to_tensor(upstream), *tensors))

        return loss, gradient

    return loss_of(*(each for each in inputs if each is not None)), found


def check_options(classes: int | None, **options: Any) -> None:
    """Raise for what is no option, where it is known how many classes there are: the words of the graph come late."""
    if classes is not None:
        Options.checked(classes, **{"normalized": False, "hat": False, **options})
