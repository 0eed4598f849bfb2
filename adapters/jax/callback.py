"""What the functions for JAX share: the core called on XLA's buffers."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.buffer_callback import buffer_callback

from transducer_loss.arrays import COMPUTE, numpy_dtype
from transducer_loss.lattice import scaled_bytes
from transducer_loss.processors import aligned_empty

Options = tuple[tuple[str, Any], ...]
"""Keywords of a loss, as jit compares them."""

Shapes = tuple[tuple[tuple[int, ...], str], ...]
"""Shape and dtype of every output of a callback."""


class Memory:
    """The core's allocator: results lie in XLA's outputs, in the order in which the core makes them."""

    def __init__(self, outputs: Sequence[Any], empty: Callable[[tuple[int, ...], str], Any]) -> None:
        self._results, self._empty = iter(outputs), empty

    def __call__(self, shape: tuple[int, ...], dtype: str) -> Any:
        """Temporary memory."""
        return self._empty(shape, dtype)

    def result(self, shape: tuple[int, ...], dtype: str) -> Any:
        """The next of the outputs."""
        output = next(self._results)
        if (tuple(output.shape), output.dtype.name) != (tuple(shape), dtype):
            raise RuntimeError(f"output: expected {output.dtype.name} of shape {output.shape}, got {dtype} of shape {shape}")
        return output


Body = Callable[..., None]
"""``body(memory, options, outputs, *arguments)``: writes the outputs, of which the core takes the first as its results."""


@dataclasses.dataclass(frozen=True)
class _Callback:
    """Equal to another of the same body and options, so that neither jit nor an eager call compiles twice."""

    body: Body
    options: Options
    scratch: bool

    def __call__(self, context: Any, outputs: Sequence[Any], *arguments: Any) -> None:
        buffers = list(outputs)
        with _place(context, buffers.pop() if self.scratch else None, buffers[0]) as (view, empty):
            given = jax.tree.map(lambda buffer: _floats(view(buffer)), arguments)
            made = [_floats(view(buffer)) for buffer in buffers]
            self.body(Memory(made, empty), dict(self.options), made, *given)


@contextlib.contextmanager
def _place(context: Any, scratch: Any, buffer: Any) -> Iterator[tuple[Any, Any]]:
    """How buffers are viewed and memory is made where XLA has called: on the host, or on a device and its stream."""
    kind, index = buffer.__dlpack_device__()
    if kind == 1:  # DLPack's number of the host
        yield np.asarray, aligned_empty
        return
    import cupy

    with cupy.cuda.Device(index), cupy.cuda.ExternalStream(context.stream):
        allocator = cupy.get_default_memory_pool().malloc
        if scratch is not None:
            room = cupy.asarray(scratch)
            rooms, more = [room.data], allocator  # the room is handed out once, as the pool may ask for as much again
            pool = cupy.cuda.MemoryPool(lambda size: rooms.pop() if rooms else more(size))
            pool.malloc(room.nbytes)  # at once free again: the one piece that all others are cut from
            allocator = pool.malloc
        with cupy.cuda.using_allocator(allocator):
            yield cupy.asarray, lambda shape, dtype: cupy.empty(shape, numpy_dtype(dtype))


def _floats(array: Any) -> Any:
    return array.view(numpy_dtype("bfloat16")) if array.dtype == np.uint16 else array


def _bits(array: Any) -> Any:
    return jax.lax.bitcast_convert_type(array, jnp.uint16) if array.dtype == jnp.bfloat16 else array


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _launch(callback: _Callback, results: Shapes, scratch: int, arguments: tuple[Any, ...]) -> list[jax.Array]:
    shapes = [jax.ShapeDtypeStruct(shape, numpy_dtype(dtype)) for shape, dtype in results]
    halves = on_device()  # none of whose bfloat16 buffers can be exported
    if halves:
        arguments = jax.tree.map(_bits, arguments)
    outputs = [
        jax.ShapeDtypeStruct(each.shape, jnp.uint16) if halves and each.dtype == jnp.bfloat16 else each for each in shapes
    ]
    if scratch:
        outputs.append(jax.ShapeDtypeStruct((scratch,), jnp.uint8))
    made = buffer_callback(callback, outputs, vmap_method="sequential")(*arguments)
    return [
        each if each.dtype == shape.dtype else jax.lax.bitcast_convert_type(each, shape.dtype)
        for each, shape in zip(made, shapes, strict=False)
    ]


@_launch.defjvp
def _launch_jvp(*_: Any) -> NoReturn:
    raise NotImplementedError("transducer losses cannot be differentiated twice: their gradient has no gradient")


def on_device() -> bool:
    """Whether arrays are on a device, unless told otherwise."""
    return bool(jax.default_backend() != "cpu")


def call(body: Body, options: Options, results: Shapes, *arguments: Any, scratch: int = 0) -> list[jax.Array]:
    """What a body writes, under any of JAX's transformations; `scratch`: bytes of a device that it may need."""
    room = -(-scratch // 512) * 512 if on_device() else 0  # CuPy's pool cuts memory into such pieces
    made = _launch(_Callback(body, options, room > 0), results, room, arguments)
    # XLA knows nothing of what a callback does: that its outputs differ from shard to shard, as its inputs do.
    outputs: list[jax.Array] = _cast(made, _axes(arguments))
    return outputs


def _axes(tree: Any) -> tuple[Any, ...]:
    """Axes of a mesh that some of the arrays vary over, within shard_map."""
    found: dict[Any, None] = {}
    for leaf in jax.tree.leaves(tree):
        found |= dict.fromkeys(sorted(_varying(leaf)))
    return tuple(found)


def _varying(leaf: Any) -> Any:
    kind = jax.typeof(leaf)
    return kind.manual_axis_type.varying if hasattr(kind, "manual_axis_type") else getattr(kind, "vma", frozenset())


def _cast(tree: Any, axes: tuple[Any, ...]) -> Any:
    def cast(leaf: Any) -> Any:
        missing = tuple(axis for axis in axes if axis not in _varying(leaf))
        return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(cast, tree)


def alike(*trees: Any) -> Any:
    """Arrays that vary over the same axes within shard_map: the gradient of a replicated one is then summed over its shards."""
    return _cast(trees, _axes(trees))


def compute_dtype(array: Any) -> str:
    """Of losses and occupancies."""
    return COMPUTE[array.dtype.name]


def store(outputs: Sequence[Any], arrays: Sequence[Any]) -> None:
    """Copy arrays into the outputs, whose rest is 0."""
    for output, array in zip(outputs, arrays, strict=True):
        output[: len(array)] = array
        output[len(array) :] = 0



def device_bytes(dtype: str, cells: int, rows: int = 0, more: int = 0) -> int:
    """Bytes of a device that a loss needs beside its results, about: what is missing comes from CuPy's own pool."""
    size = numpy_dtype(dtype).itemsize
    return (8 * size + 2 * scaled_bytes(dtype)) * cells + 96 * rows + more + (1 << 20)
