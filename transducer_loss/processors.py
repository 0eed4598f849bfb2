"""The two processors: launch a kernel, multiply matrices, make arrays. No maths of the losses."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import itertools
import os
import queue
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import threadpoolctl

from transducer_loss.arrays import as_array, numpy_dtype

Allocate = Callable[[tuple[int, ...], str], Any]
"""Makes an uninitialised array of a shape and dtype name: the caller's framework's own, where it has one."""

ALIGNMENT = 64


def aligned_empty(shape: tuple[int, ...], dtype: str) -> np.ndarray[Any, Any]:
    """Uninitialised NumPy array whose memory begins at a multiple of 64 bytes, as every framework wants it."""
    kind = numpy_dtype(dtype)
    size = int(np.prod(shape, dtype=np.int64)) * kind.itemsize
    raw = np.empty(size + ALIGNMENT, np.uint8)
    start = -address_of(raw) % ALIGNMENT
    return raw[start : start + size].view(kind).reshape(shape)


def address_of(array: Any) -> int:
    """The address of an array's first element."""
    if isinstance(array, np.ndarray):
        return int(array.__array_interface__["data"][0])
    return int(array.data.ptr)


def _slots(arguments: Sequence[Any]) -> Any:
    """Kernel arguments as 8-byte slots: addresses of arrays, integers, floats; None is a null pointer."""
    values = [
        argument if isinstance(argument, (int, float)) else 0 if argument is None else address_of(argument)
        for argument in arguments
    ]
    layout = "".join("d" if isinstance(value, float) else "q" for value in values)
    return (ctypes.c_int64 * len(values)).from_buffer_copy(struct.pack("=" + layout, *values))


class Library:
    """The kernels compiled for the host: instances by name, as ``softmax_forward<float32>``."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._library = ctypes.CDLL(path)
        self._library.kernel_count.restype = ctypes.c_int64
        self._library.kernel_name.restype = ctypes.c_char_p
        self._library.kernel_name.argtypes = [ctypes.c_int64]
        names = [self._library.kernel_name(i).decode() for i in range(self._library.kernel_count())]
        self.index = {name: i for i, name in enumerate(names)}
        if hasattr(self._library, "run_blocks"):
            self.run_blocks = self._library.run_blocks
            self.run_blocks.restype = None
            self.run_blocks.argtypes = [ctypes.c_int64] * 3 + [ctypes.c_void_p]


LEVELS = ("v4", "v3", "v2")
"""Instruction sets that the host library is built for, best first (x86-64 microarchitecture levels)."""

_FEATURES = {
    "v4": {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"},
    "v3": {"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"},
    "v2": set(),
}


def _processor_flags() -> set[str]:
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as lines:
        for line in lines:
            if line.startswith("flags"):
                return set(line.split(":", 1)[1].split())
    return set()


@functools.cache
def host_library() -> Library:
    """The best build of the kernels that this machine can run."""
    flags = _processor_flags()
    for level in (*LEVELS, "native"):
        needed = _FEATURES["v3"] | _FEATURES["v4"] if level == "v4" else _FEATURES.get(level, set())
        spec = importlib.util.find_spec(f"transducer_loss._host_{level}")
        if needed <= flags and spec is not None and spec.origin is not None:
            return Library(spec.origin)
    raise RuntimeError("transducer_loss was installed without its host library: reinstall it with a C++ compiler")


class _OneBlasThread:
    """Holds BLAS at one thread while any call of ours runs, and restores it after the last of them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._limits: Any = None
        self._controller: Any = None

    def __enter__(self) -> None:
        with self._lock:
            if self._users == 0:
                if self._controller is None:
                    self._controller = threadpoolctl.ThreadpoolController().select(user_api="blas")
                self._limits = self._controller.limit(limits=1)
                self._limits.__enter__()
            self._users += 1

    def __exit__(self, *details: object) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0:
                self._limits.__exit__(None, None, None)


_one_blas_thread = _OneBlasThread()


def _renew_after_fork() -> None:
    # A lock or a count held by another thread of the parent would never be released in the child.
    global _one_blas_thread
    _one_blas_thread = _OneBlasThread()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_after_fork)


def default_threads() -> int:
    """``OMP_NUM_THREADS`` where it is set, else the processors this process may run on."""
    asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    if asked.isdigit() and int(asked) > 0:
        return int(asked)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Processor:
    """What the losses need of a processor."""

    host: bool
    strips: int
    """Parts of a group's second pass that may run side by side; a constant, so that sums have one order."""
    tile_bytes: int
    """Logits of a tile: what stays in the cache between the matrix products and the kernels around them."""
    tile_cells: int
    """Cells of a tile beyond which its matrix products gain nothing."""
    group_cells: int
    """Cells of a group beyond which more utterances in it gain nothing."""
    default_workspace: int
    reserved: int
    """Bytes that its library for matrix products takes for itself."""

    def __init__(self, allocate: Allocate) -> None:
        self._allocate = allocate
        # An allocator may have a place of its own for what the caller is given.
        self._result: Allocate = getattr(allocate, "result", allocate)

    def output(self, shape: tuple[int, ...], dtype: str, zero: bool = False) -> tuple[Any, Any]:
        """An array of the caller's framework, and the NumPy or CuPy view of it that kernels write."""
        native = self._result(shape, dtype)
        view = as_array(native, "output")
        if zero:
            self.zero(view)
        return native, view

    @property
    def device(self) -> str:
        """Where its arrays are, as `arrays.device_name` says it."""
        return "cpu"

    def zero(self, array: Any) -> None:
        """Fill with zeros."""
        raise NotImplementedError

    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        """Uninitialised temporary array, from the caller's framework's memory."""
        return as_array(self._allocate(shape, dtype), "scratch")


class OnCuda(Processor):
    """What of a CUDA device is known without one."""

    host = False
    strips = 1
    threads = 1
    # Two thirds of the 50 MiB of L2 cache of an H100 or H200; a device at hand says its own.
    tile_bytes = (50 << 20) * 2 // 3
    tile_cells = 1 << 62
    group_cells = 1 << 62
    default_workspace = 1 << 30
    # What cuBLAS takes for itself on the newest architectures, at most.
    reserved = 32 << 20


class Host(Processor):
    """The kernels on the host: blocks over Python's own threads, matrices by NumPy's BLAS.

    Use as a context: ``with Host(threads) as processor``.
    """

    host = True
    strips = 8
    tile_bytes = 6 << 20
    tile_cells = 1024
    group_cells = 16_384
    default_workspace = 256 << 20
    reserved = 0

    def __init__(self, threads: int | None = None, allocate: Allocate | None = None) -> None:
        super().__init__(allocate or aligned_empty)
        self.threads = threads or default_threads()
        self._library = host_library()
        self._pool: ThreadPoolExecutor | None = None

    def __enter__(self) -> Host:
        self._blas = _one_blas_thread
        self._blas.__enter__()
        return self

    def __exit__(self, *details: object) -> None:
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None
        self._blas.__exit__()

    def launch(
        self, name: str, blocks: int, columns: int, *arguments: Any, steps: int = 1, per_thread: int = 4, alone: bool = False
    ) -> None:
        """Run `blocks` blocks of kernel `name`, each of `steps` steps over `columns` columns.

        `alone` keeps them in the calling thread: for those that are one of several tasks already. `per_thread` is for
        processors whose blocks have threads.
        """
        index = self._library.index[name]
        slots = _slots(arguments)
        # Below some 100,000 columns handing work to another thread takes longer than doing it.
        parts = 1 if alone else min(4 * self.threads, blocks, 1 + blocks * columns * steps // 100_000)
        if parts <= 1 or self.threads == 1:
            self._library.run_blocks(index, 0, blocks, slots)
            return
        bounds = [blocks * part // parts for part in range(parts + 1)]
        self.run([
            functools.partial(self._library.run_blocks, index, begin, end, slots)
            for begin, end in itertools.pairwise(bounds)
        ])

    def run(self, tasks: Sequence[Callable[[], None]]) -> None:
        """Run independent tasks, each in one thread."""
        if self.threads == 1 or len(tasks) == 1:
            for task in tasks:
                task()
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self.threads, "transducer_loss")
        for done in [self._pool.submit(task) for task in tasks]:
            done.result()

    def gemm(self, a: Any, b: Any, out: Any, add: bool = False, scratch: Any = None) -> None:
        """out = a @ b, or out += a @ b by way of `scratch`, of the shape of `out`."""
        if add:
            np.matmul(a, b, out=scratch)
            out += scratch
        else:
            np.matmul(a, b, out=out)

    def zero(self, array: Any) -> None:
        """Fill with zeros."""
        array[...] = 0

    def to_device(self, array: np.ndarray[Any, Any]) -> Any:
        """A host array where kernels can read it."""
        return array

    def to_host(self, array: Any) -> np.ndarray[Any, Any]:
        """An array where Python can read it; synchronises on CUDA."""
        return np.asarray(array)

    def dense(self, array: Any, dtype: str) -> Any:
        """An array in order of its elements, of a dtype; itself where it is so already."""
        return np.ascontiguousarray(array, numpy_dtype(dtype))


class Workers:
    """Scratch of tasks that run side by side: as many sets as there are at most tasks at a time."""

    def __init__(self, make: Callable[[], Any], number: int) -> None:
        self._free: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for _ in range(number):
            self._free.put(make())

    @contextlib.contextmanager
    def one(self) -> Iterator[Any]:
        """One set, for the time of a task."""
        scratch = self._free.get()
        try:
            yield scratch
        finally:
            self._free.put(scratch)


def processor_for(array: Any, threads: int | None = None, allocate: Allocate | None = None) -> Any:
    """The processor that `array` lives on, on its device and the current stream of it."""
    if isinstance(array, np.ndarray):
        return Host(threads, allocate)
    from transducer_loss.cuda import Cuda

    return Cuda(array.device.id, allocate)

