"""The CUDA processor: kernels of the cache or NVRTC, matrix products of cuBLAS, both through CuPy."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import cupy
import numpy as np

from transducer_loss.arrays import numpy_dtype
from transducer_loss.kernel_cache import code_of, file_of, source_of
from transducer_loss.processors import Allocate, OnCuda, address_of

# cudaDataType_t, in which cuBLAS names its operands.
_DATA_TYPE = {"float32": 0, "float64": 1, "float16": 2, "bfloat16": 14}

# Tables of utterances, which a captured CUDA graph reads from the host at every replay: who captures it does not say for how
# long, so they stay.
_OF_GRAPHS: list[np.ndarray[Any, Any]] = []

# Kernels are compiled for up to as many threads (see KERNEL in processor.cuh).
_MOST_THREADS = 512


@functools.cache
def _kernel(name: str, device: int) -> Any:
    """The instance `name`, say ``softmax_forward<float32>``, in the context of the current device, which is `device`."""
    code = code_of(name, source_of(file_of(name)), int(cupy.cuda.Device(device).compute_capability))
    module = cupy.cuda.Module()
    module.load(code.image)
    return module.get_function(code.symbol)


class Cuda(OnCuda):
    """The kernels on a CUDA device, on CuPy's current stream. Use as a context."""

    def __init__(self, device: int, allocate: Allocate | None = None) -> None:
        super().__init__(allocate or (lambda shape, dtype: cupy.empty(shape, numpy_dtype(dtype))))
        self._device = cupy.cuda.Device(device)
        # Logits of a tile and what is made of them stay in the L2 cache.
        self.tile_bytes = int(self._device.attributes["L2CacheSize"]) * 2 // 3

    @property
    def device(self) -> str:
        """As "cuda:0"."""
        return f"cuda:{self._device.id}"

    def __enter__(self) -> Cuda:
        self._device.__enter__()
        return self

    def __exit__(self, *details: object) -> None:
        self._device.__exit__(*details)

    def launch(
        self, name: str, blocks: int, columns: int, *arguments: Any, steps: int = 1, per_thread: int = 4, alone: bool = False
    ) -> None:
        """Run `blocks` blocks of kernel `name`, with a thread for every `per_thread` of the columns."""
        threads = min(_MOST_THREADS, -(-columns // (32 * per_thread)) * 32)
        values = tuple(
            np.float64(argument) if isinstance(argument, float)
            else np.int64(argument if isinstance(argument, int) else 0 if argument is None else address_of(argument))
            for argument in arguments
        )  # fmt: skip
        _kernel(name, self._device.id)((min(blocks, 2**31 - 1),), (max(threads, 32),), values)

    def run(self, tasks: Sequence[Callable[[], None]]) -> None:
        """Launch one task after the other."""
        for task in tasks:
            task()

    def gemm(self, a: Any, b: Any, out: Any, add: bool = False, scratch: Any = None) -> None:
        """out = a @ b, or out += a @ b; accumulated in the type of `out`, in float32 without TF32."""
        from cupy_backends.cuda.libs import cublas

        rows, columns = out.shape
        scalar = np.float64 if out.dtype == np.float64 else np.float32
        one, beta = scalar(1), scalar(add)
        leading = max(out.strides[0] // out.itemsize, columns)
        constants = np.array([one, beta])
        # cuBLAS is column-major: the transposed product, with each operand as it lies.
        b_op, b_leading = _operand(b)
        a_op, a_leading = _operand(a)
        compute = cublas.CUBLAS_COMPUTE_64F if out.dtype == np.float64 else cublas.CUBLAS_COMPUTE_32F
        cublas.gemmEx(
            cupy.cuda.device.get_cublas_handle(), b_op, a_op, columns, rows, a.shape[1],
            constants.ctypes.data, b.data.ptr, _DATA_TYPE[b.dtype.name], b_leading, a.data.ptr, _DATA_TYPE[a.dtype.name],
            a_leading, constants.ctypes.data + constants.itemsize, out.data.ptr, _DATA_TYPE[out.dtype.name], leading,
            compute, cublas.CUBLAS_GEMM_DEFAULT,
        )  # fmt: skip

    def zero(self, array: Any) -> None:
        """Fill with zeros."""
        array.data.memset_async(0, array.nbytes)

    def to_device(self, array: np.ndarray[Any, Any]) -> Any:
        """Copy a host array to the device; CuPy's stream orders it before the kernels."""
        if array.dtype.name == "bfloat16":
            return self.to_device(array.view(np.uint16)).view(array.dtype)
        stream = cupy.cuda.get_current_stream()
        if not stream.is_capturing():
            return cupy.asarray(array)
        source = np.ascontiguousarray(array)
        _OF_GRAPHS.append(source)
        copy = cupy.empty(source.shape, source.dtype)
        copy.data.copy_from_host_async(source.ctypes.data, source.nbytes, stream)
        return copy

    def to_host(self, array: Any) -> np.ndarray[Any, Any]:
        """Copy a device array to the host, which synchronises."""
        return np.asarray(array.get())

    def dense(self, array: Any, dtype: str) -> Any:
        """A device array in order of its elements, of a dtype; itself where it is so already."""
        return cupy.ascontiguousarray(array, numpy_dtype(dtype))

    def power_of_two_above(self, weights: Any) -> tuple[Any, Any]:
        """2^n and 2^-n as device scalars, 2^n max |weights| being about 1000; without a read-back."""
        _, exponent = cupy.frexp(cupy.abs(weights).max())
        return cupy.ldexp(weights.dtype.type(1), 10 - exponent), cupy.ldexp(weights.dtype.type(1), exponent - 10)


def _operand(matrix: Any) -> tuple[int, int]:
    """How cuBLAS reads a row-major matrix as a column-major one: 0 as its transpose, 1 as itself; and the leading dimension."""
    by_row, by_column = (stride // matrix.itemsize for stride in matrix.strides)
    if by_column == 1 or matrix.shape[1] == 1:
        return 0, max(by_row, matrix.shape[1])
    return 1, max(by_column, matrix.shape[0])
