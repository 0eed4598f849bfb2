"""Runs the losses on kernels whose blocks are real threads, under the compiler's sanitizers.

The kernels run in a process of their own (`emulation.cpp`), which a sanitizer ends at the first fault; everything else, the
launch code included, is the library's own and runs here.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import shutil
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from transducer_loss import joint_loss, logits_loss
from transducer_loss.processors import ALIGNMENT, Allocate, Host, _slots, address_of, aligned_empty

SANITIZERS = {
    "address": ["-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all"],
    "thread": ["-fsanitize=thread"],
}
FLAGS = ["-std=c++20", "-DEMULATED", "-O1", "-g1", "-fno-omit-frame-pointer", "-pthread"]
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1",
    "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1:exitcode=66",
}
KERNELS = Path(str(resources.files("transducer_loss.kernels")))


class KernelFault(AssertionError):
    """A sanitizer or the emulator ended the kernels; its report is the message."""


def sources(kernels: Path = KERNELS) -> list[Path]:
    """The files that a driver is made of."""
    return sorted(file for file in kernels.iterdir() if file.suffix in {".cu", ".cuh", ".cpp", ".h"})


class Builds:
    """Drivers, compiled once for each state of their sources and flags."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.compiler = os.environ.get("CXX", "g++")
        self._begun: dict[Path, Callable[[], Path]] = {}

    def start(self, sanitizer: str, kernels: Path = KERNELS) -> Callable[[], Path]:
        """Begin to compile; call the result to wait for the program."""
        driver = Path(__file__).with_suffix(".cpp")
        command = [self.compiler, *FLAGS, *SANITIZERS[sanitizer]]
        version = subprocess.run([self.compiler, "--version"], capture_output=True, check=True).stdout
        digest = hashlib.sha256(version + " ".join(command).encode())
        for file in [driver, *sources(kernels)]:
            digest.update(file.name.encode() + file.read_bytes())
        program = self.folder / f"{sanitizer}-{digest.hexdigest()[:20]}"
        if program in self._begun:
            return self._begun[program]
        if program.exists():
            os.utime(program)
            return lambda: program
        self._forget()
        part = program.with_suffix(f".{os.getpid()}")
        compiling = subprocess.Popen(
            [*command, f"-I{kernels}", str(driver), "-o", str(part)], stderr=subprocess.PIPE, text=True
        )  # fmt: skip

        def finish() -> Path:
            if not program.exists():
                _, errors = compiling.communicate()
                if compiling.returncode != 0:
                    raise RuntimeError(f"{' '.join(command)}:\n{errors}")
                part.replace(program)
            return program

        self._begun[program] = functools.cache(finish)
        return self._begun[program]

    def _forget(self) -> None:
        week = time.time() - 7 * 24 * 3600
        for program in self.folder.iterdir():
            if program.stat().st_mtime < week:
                program.unlink(missing_ok=True)


@functools.cache
def _fixed_addresses() -> list[str]:
    # ThreadSanitizer of older compilers ends at once where the system places memory too randomly.
    command = [shutil.which("setarch") or "setarch", "--addr-no-randomize"]
    with contextlib.suppress(OSError):
        if subprocess.run([*command, "true"], capture_output=True, check=False).returncode == 0:
            return command
    return []


class Driver:
    """The process that runs kernels; a new one after each fault."""

    def __init__(self, program: Path, environment: Mapping[str, str] | None = None) -> None:
        self.program = program
        self.environment = {**os.environ, **OPTIONS, **(environment or {})}
        self._process: subprocess.Popen[bytes] | None = None
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (as long as the driver)
        self.index: dict[str, int] = {}
        self._begin()

    def _begin(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            self._errors.seek(0)
            self._errors.truncate()
            self._process = subprocess.Popen(
                [*_fixed_addresses(), str(self.program)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=self._errors, env=self.environment,
            )  # fmt: skip
            (length,) = struct.unpack("q", self._read(8))
            self.index = {name: i for i, name in enumerate(self._read(length).decode().split())}
        return self._process

    def _read(self, count: int) -> bytes:
        assert self._process is not None
        assert self._process.stdout is not None
        read = self._process.stdout.read(count)
        if len(read) != count:
            raise EOFError
        return read

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None
        self._errors.close()

    def run(
        self, name: str, blocks: int, threads: int, arrays: list[tuple[int, bytes]], arguments: list[tuple[int, int]]
    ) -> list[bytes]:
        """Run a launch; returns what the arrays then hold.

        Parameters
        ----------
        name : str
            Of the kernel.
        blocks, threads : int
            How many, and how many in each.
        arrays : list of (int, bytes)
            Address and content.
        arguments : list of (int, int)
            Array and offset in it; or -1 and the argument's 8 bytes.
        """
        process = self._begin()
        assert process.stdin is not None
        message = [struct.pack("5q", self.index[name], blocks, threads, len(arrays), len(arguments))]
        for address, content in arrays:
            message += [struct.pack("2q", len(content), address % ALIGNMENT), content]
        message += [struct.pack("2q", *argument) for argument in arguments]
        try:
            process.stdin.write(b"".join(message))
            process.stdin.flush()
            self._read(8)
            return [self._read(len(content)) for _, content in arrays]
        except (EOFError, BrokenPipeError):
            process.communicate()
            self._process = None
            self._errors.seek(0)
            report = self._errors.read().decode(errors="replace")
            status = f"exit status {process.returncode}"
            raise KernelFault(f"{name}, {blocks} blocks of {threads} threads, {status}:\n{report}") from None


def extent(array: np.ndarray[Any, Any]) -> tuple[int, int]:
    """First address of an array's elements and the one past their last."""
    start = address_of(array)
    if array.size == 0:
        return start, start
    reach = [(size - 1) * stride for size, stride in zip(array.shape, array.strides, strict=True)]
    return start + sum(step for step in reach if step < 0), start + sum(step for step in reach if step > 0) + array.itemsize


def _distinct(extents: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Extents with those that overlap made one."""
    merged: list[tuple[int, int]] = []
    for low, high in sorted(set(extents)):
        if merged and low < merged[-1][1]:
            merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
        else:
            merged.append((low, high))
    return merged


def filled(byte: int) -> Allocate:
    """Allocates memory that is full of one byte: 0xff is NaN in every type of float, and -1."""

    def allocate(shape: tuple[int, ...], dtype: str) -> np.ndarray[Any, Any]:
        array = aligned_empty(shape, dtype)
        ctypes.memset(address_of(array), byte, array.nbytes)
        return array

    return allocate


class Plain(Host):
    """The host processor in one thread, which notes the names of the kernels it launches."""

    def __init__(self) -> None:
        super().__init__(threads=1, allocate=filled(0))
        self.launched: set[str] = set()

    def launch(self, name: str, blocks: int, columns: int, *arguments: Any, **hints: Any) -> None:
        self.launched.add(name)
        super().launch(name, blocks, columns, *arguments, **hints)


class Emulated(Host):
    """A host processor whose blocks are threads in a driver's process; kernels that it has not are run as on the host."""

    def __init__(self, driver: Driver, block: int) -> None:
        super().__init__(threads=1, allocate=filled(0xFF))
        self.driver, self.block = driver, block

    def launch(self, name: str, blocks: int, columns: int, *arguments: Any, **hints: Any) -> None:
        if name not in self.driver.index:
            super().launch(name, blocks, columns, *arguments, **hints)
            return
        slots = _slots(arguments)
        arrays = [argument for argument in arguments if isinstance(argument, np.ndarray)]
        memory = _distinct([extent(array) for array in arrays])
        before = [(low, ctypes.string_at(low, high - low)) for low, high in memory]
        places = []
        for argument, slot in zip(arguments, slots, strict=True):
            if isinstance(argument, np.ndarray):
                low, high = extent(argument)
                owner = next(i for i, (begin, end) in enumerate(memory) if begin <= low and high <= end)
                places.append((owner, slot - memory[owner][0]))
            else:
                places.append((-1, slot))
        after = self.driver.run(name, blocks, self.block, before, places)
        for (low, old), new in zip(before, after, strict=True):
            if new != old:
                inside = [array for array in arrays if low <= address_of(array) < low + len(old)]
                if not any(array.flags.writeable for array in inside):
                    raise KernelFault(f"{name} wrote into a read-only array of shape {inside[0].shape}")
                ctypes.memmove(low, new, len(new))


class AsOnCuda:
    """Mixed into a host processor: takes the ways of the losses that are for CUDA, as half types in matrix products."""

    host = False
    strips = 1
    group_cells = 1 << 62

    def gemm(self, a: Any, b: Any, out: Any, add: bool = False, scratch: Any = None) -> None:
        product = a.astype(out.dtype) @ b.astype(out.dtype)
        out[...] = out + product if add else product

    def power_of_two_above(self, weights: Any) -> tuple[Any, Any]:
        exponent = 10 - int(np.frexp(np.abs(weights).max())[1])
        return weights.dtype.type(2.0**exponent), weights.dtype.type(2.0**-exponent)


class PlainAsOnCuda(AsOnCuda, Plain):
    """The ways of CUDA on the host's kernels."""


class EmulatedAsOnCuda(AsOnCuda, Emulated):
    """The ways of CUDA on emulated kernels."""


@contextlib.contextmanager
def running_on(processor: Host) -> Iterator[None]:
    """Every loss inside runs on `processor`."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (logits_loss, joint_loss):
            patch.setattr(module, "processor_for", lambda *_: processor)
        yield
