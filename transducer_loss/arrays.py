"""DLPack in: any framework's array as a NumPy or CuPy array over the same memory, without a copy."""

from __future__ import annotations

import ctypes
import sys
from typing import Any

import ml_dtypes
import numpy as np

FLOATS = ("float16", "bfloat16", "float32", "float64")

# The type a dtype is computed and accumulated in; the lattice, losses and gradients sums are of it.
COMPUTE = {"float16": "float32", "bfloat16": "float32", "float32": "float32", "float64": "float64"}


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The NumPy dtype of a dtype's name, bfloat16 included."""
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)


class _DLTensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


# DLPack's type codes: 0 signed, 1 unsigned, 2 IEEE float, 4 bfloat, 6 bool.
_NAMES = {0: "int", 1: "uint", 2: "float", 4: "bfloat"}
_CPU, _CUDA, _CUDA_HOST, _CUDA_MANAGED = 1, 2, 3, 13

_pointer_of_capsule = ctypes.pythonapi.PyCapsule_GetPointer
_pointer_of_capsule.restype = ctypes.c_void_p
_pointer_of_capsule.argtypes = [ctypes.py_object, ctypes.c_char_p]


def as_array(value: Any, name: str) -> Any:
    """View an array of any framework as a NumPy (host) or CuPy (CUDA) array.

    NumPy itself reads neither bfloat16 nor read-only arrays through DLPack, so the capsule is read here.

    Parameters
    ----------
    value : array
        A NumPy array, or anything with ``__dlpack__`` on the host or a CUDA device.
    name : str
        The argument's name, for errors.

    Returns
    -------
    numpy.ndarray or cupy.ndarray
        Over the same memory, which it keeps alive.

    Raises
    ------
    TypeError
        If `value` is no array, or of a dtype or device that no kernel reads.
    ValueError
        If its elements do not lie at multiples of their size.
    """
    if isinstance(value, np.ndarray):
        if not value.dtype.isnative:
            raise TypeError(f"{name}: expected native byte order, got dtype {value.dtype.str!r}")
        return _aligned(value, name)
    cupy = sys.modules.get("cupy")
    if cupy is not None and isinstance(value, cupy.ndarray):
        return value
    if not hasattr(value, "__dlpack__"):
        raise TypeError(f"{name}: expected an array with __dlpack__, got {type(value).__name__}")
    try:
        kind, index = (int(part) for part in value.__dlpack_device__())
        capsule = value.__dlpack__() if kind in (_CPU, _CUDA_HOST) else None
    except (BufferError, RuntimeError, ValueError) as error:  # as of a tensor that requires a gradient
        raise TypeError(f"{name}: expected an array that DLPack exports, got {type(value).__name__}: {error}") from error
    if kind in (_CPU, _CUDA_HOST):
        return _aligned(_host_view(capsule, name), name)
    if kind in (_CUDA, _CUDA_MANAGED):
        return _cuda_view(value, index, name)
    raise TypeError(f"{name}: expected an array on the host or on a CUDA device, got DLPack device type {kind}")


def _aligned(array: np.ndarray[Any, Any], name: str) -> np.ndarray[Any, Any]:
    # As the field of a packed record may not be: its stride is no number of elements.
    if not array.flags.aligned:
        raise ValueError(
            f"{name}: expected elements at multiples of their {array.itemsize} bytes, got an array that is to be copied first"
        )
    return array


def _described(capsule: Any, name: str) -> tuple[int, tuple[int, ...], tuple[int, ...], np.dtype[Any]]:
    """Address, shape, strides in bytes and dtype of the tensor in a capsule."""
    tensor = _DLTensor.from_address(_pointer_of_capsule(capsule, b"dltensor"))
    shape = tuple(tensor.shape[i] for i in range(tensor.ndim))
    if tensor.code == 6:
        dtype = np.dtype(bool)
    elif tensor.code in _NAMES and tensor.lanes == 1:
        dtype = numpy_dtype(f"{_NAMES[tensor.code]}{tensor.bits}")
    else:
        raise TypeError(f"{name}: expected real numbers, got DLPack type code {tensor.code} x {tensor.lanes}")
    if tensor.strides:
        strides = tuple(tensor.strides[i] * dtype.itemsize for i in range(tensor.ndim))
    else:
        strides = _dense(shape, dtype.itemsize)
    return (tensor.data or 0) + tensor.byte_offset, shape, strides, dtype


def _dense(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    strides = []
    for size in reversed(shape):
        strides.append(itemsize)
        itemsize *= size
    return tuple(reversed(strides))


def _extent(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> tuple[int, int]:
    """Where an array's memory begins, relative to its first element, and how many bytes it spans."""
    reach = [(size - 1) * stride for size, stride in zip(shape, strides, strict=True)]
    low = sum(min(0, step) for step in reach)
    return low, sum(max(0, step) for step in reach) - low + itemsize


def _host_view(capsule: Any, name: str) -> np.ndarray[Any, Any]:
    address, shape, strides, dtype = _described(capsule, name)
    if 0 in shape:
        return np.empty(shape, dtype)
    low, extent = _extent(shape, strides, dtype.itemsize)
    buffer: Any = (ctypes.c_char * extent).from_address(address + low)
    buffer._owner = capsule  # the memory lives as long as the capsule, which lives as long as the view's buffer
    view: np.ndarray[Any, Any] = np.ndarray(shape, dtype, buffer, -low, strides)
    return view


def _cuda_view(value: Any, index: int, name: str) -> Any:
    import cupy

    with cupy.cuda.Device(index):
        stream = cupy.cuda.get_current_stream()
        try:
            capsule = value.__dlpack__(stream=stream.ptr or 1)
        except RuntimeError:  # TensorFlow takes no stream: it waits itself; whoever does not is ready on the legacy stream
            capsule = value.__dlpack__()
            stream.wait_event(cupy.cuda.Stream.null.record())
        address, shape, strides, dtype = _described(capsule, name)
        low, extent = (0, 0) if 0 in shape else _extent(shape, strides, dtype.itemsize)
        memory = cupy.cuda.UnownedMemory(address + low, extent, capsule, index)
        return cupy.ndarray(shape, dtype, cupy.cuda.MemoryPointer(memory, -low), strides)


def element_strides(array: Any) -> tuple[int, ...]:
    """Strides of `array` in elements."""
    return tuple(stride // array.itemsize for stride in array.strides)


def on_host(array: Any) -> bool:
    """Whether `array` is a NumPy array."""
    return isinstance(array, np.ndarray)


def as_numpy(array: Any) -> np.ndarray[Any, Any]:
    """A NumPy array of an array's numbers: itself on the host, a copy that synchronises from a device."""
    return np.asarray(array if on_host(array) else array.get())


def device_name(array: Any) -> str:
    """``"cpu"`` or ``"cuda:0"``, for errors."""
    return "cpu" if on_host(array) else f"cuda:{array.device.id}"
