"""The kernels' machine code: compiled by NVRTC where no file holds it yet, and kept in a folder for the processes to come.

CuPy's own cache does not serve: CuPy 13 writes instances of templates to it but never reads them, and fails where it cannot
write; neither CuPy 13 nor 14 fills it for a GPU that is not there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import logging
import os
import re
import secrets
import time
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from transducer_loss.arrays import COMPUTE, FLOATS
from transducer_loss.processors import host_library

LOGGER = logging.getLogger("transducer_loss")

OPTIONS = ("-std=c++17", "-ftz=true")

# Of the files' layout: a change of it makes files of before unknown.
_LAYOUT = "1"

# One INFO for a process; next() of it is atomic.
_levels = itertools.chain([logging.INFO], itertools.repeat(logging.DEBUG))


class Code(NamedTuple):
    """A compiled kernel."""

    symbol: str
    """Its mangled name."""
    image: bytes
    """A module that the driver loads."""


@functools.cache
def source_of(file: str) -> str:
    """A kernel file with its headers spliced in: the text that a file of the cache stands for."""
    seen: set[str] = set()

    def spliced(name: str) -> str:
        if name in seen:
            return ""
        seen.add(name)
        text = (resources.files("transducer_loss.kernels") / name).read_text("utf-8")
        text = text.replace("#pragma once\n", "")
        return re.sub(r'#include "(\w+\.cuh)"\n', lambda match: spliced(match[1]), text)

    return spliced(file)


@functools.cache
def file_of(kernel: str) -> str:
    """The file of a kernel: its name begins with the file's."""
    files = [file.name for file in resources.files("transducer_loss.kernels").iterdir() if file.name.endswith(".cu")]
    return max((file for file in files if kernel.startswith(file.removesuffix(".cu") + "_")), key=len)


def directory() -> Path:
    """The folder of compiled kernels.

    Returns
    -------
    pathlib.Path
        ``TRANSDUCER_LOSS_CACHE_DIR`` of the environment where it is set, else the folder ``transducer_loss`` in CuPy's own,
        ``CUPY_CACHE_DIR`` or ``~/.cupy/kernel_cache``.

    Examples
    --------
    >>> import os
    >>> os.environ["TRANSDUCER_LOSS_CACHE_DIR"] = "/opt/kernels"
    >>> directory().as_posix()
    '/opt/kernels'
    >>> del os.environ["TRANSDUCER_LOSS_CACHE_DIR"]
    """
    own = os.environ.get("TRANSDUCER_LOSS_CACHE_DIR")
    if own:
        return Path(own)
    return Path(os.environ.get("CUPY_CACHE_DIR") or os.path.expanduser("~/.cupy/kernel_cache")) / "transducer_loss"


def _nvrtc() -> Any:
    """NVRTC; by way of CuPy, which finds its library."""
    from cupy.cuda import nvrtc

    return nvrtc


def target_of(architecture: int) -> str:
    """What NVRTC compiles for: machine code, as ``sm_90``, or for a GPU newer than NVRTC PTX, which the driver translates.

    A driver knows its GPU, so it is then newer than NVRTC and reads its PTX.
    """
    known = _nvrtc().getSupportedArchs()
    if architecture in known:
        return f"sm_{architecture}"
    older = [each for each in known if each < architecture]
    if not older:
        major, minor = _nvrtc().getVersion()
        raise RuntimeError(
            f"NVRTC {major}.{minor} compiles for GPUs of compute capability {known[0] / 10} and later, and this one is of "
            f"{architecture / 10}: install CuPy for an earlier CUDA"
        )
    return f"compute_{max(older)}"


@functools.cache
def _compiler() -> str:
    """NVRTC's version to the build, which it writes at the head of PTX alone."""
    nvrtc = _nvrtc()
    program = nvrtc.createProgram("", "empty.cu", (), ())
    try:
        nvrtc.compileProgram(program, [f"-arch=compute_{nvrtc.getSupportedArchs()[0]}"])
        lines = nvrtc.getPTX(program).decode().splitlines()
    finally:
        nvrtc.destroyProgram(program)
    return "\n".join(line for line in (str(nvrtc.getVersion()), *lines) if not line.startswith("."))


def path_of(name: str, source: str, target: str) -> Path:
    """The file of a kernel: its name says by a hash all that the code depends on, so a file is never out of date."""
    key = "\0".join((_LAYOUT, name, target, _compiler(), *OPTIONS, source))
    words = "-".join(re.findall(r"\w+", name))
    return directory() / f"{words}.{target}.{hashlib.sha256(key.encode()).hexdigest()}"


def _checksum(path: Path, content: bytes) -> bytes:
    """With the name, so that a file under another's name is no whole file either."""
    return hashlib.sha256(path.name.encode() + b"\0" + content).digest()


def read(path: Path) -> Code | None:
    """The kernel in a file; None where there is no file, or one that cannot be read or is not whole."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    content = data[32:]
    if data[:32] != _checksum(path, content):
        return None
    symbol, _, image = content.partition(b"\0")
    return Code(symbol.decode(), image)


def write(path: Path, code: Code) -> None:
    """Keep a kernel in a file, whole or not at all, whoever else writes or reads it. OSError where that cannot be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = code.symbol.encode() + b"\0" + code.image
    beside = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        # Unlike the files of `tempfile`, it is read by whomever the umask lets: an image is built and run by different users.
        with open(beside, "xb") as file:
            file.write(_checksum(path, content) + content)
        os.replace(beside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise


def compiled(name: str, source: str, target: str) -> Code:
    """Compile an instance of a kernel."""
    nvrtc = _nvrtc()
    program = nvrtc.createProgram(source, f"{name}.cu", (), ())
    try:
        nvrtc.addNameExpression(program, name)
        try:
            nvrtc.compileProgram(program, [*OPTIONS, f"-arch={target}"])
        except nvrtc.NVRTCError as error:
            raise RuntimeError(f"NVRTC cannot compile {name} for {target}: {nvrtc.getProgramLog(program)}") from error
        image = nvrtc.getCUBIN(program) if target.startswith("sm_") else nvrtc.getPTX(program)
        return Code(nvrtc.getLoweredName(program, name), image)
    finally:
        nvrtc.destroyProgram(program)


def code_of(name: str, source: str, architecture: int) -> Code:
    """A kernel for GPUs of an architecture, as 90 for compute capability 9.0: of the cache, or else compiled now and kept."""
    target = target_of(architecture)
    path = path_of(name, source, target)
    found = read(path)
    if found is not None:
        return found
    begun = time.perf_counter()
    code = compiled(name, source, target)
    seconds = time.perf_counter() - begun
    try:
        write(path, code)
        kept = f"kept in {path.parent}"
    except OSError as error:
        kept = f"not kept, as {path.parent} cannot be written: {error.strerror}"
    level, others = next(_levels), ""
    if level == logging.INFO:
        others = (
            "; others follow at their first use, each with a message of level DEBUG "
            f"(`python -m transducer_loss compile --arch {architecture}` compiles all of them beforehand)"
        )
    LOGGER.log(level, "compiled CUDA kernel %s for %s in %.2f s, %s%s", name, target, seconds, kept, others)
    return code


def instances(dtypes: Sequence[str] = FLOATS) -> list[str]:
    """The kernels that losses launch whose inputs are of these dtypes.

    Examples
    --------
    >>> [name for name in instances(["float64"]) if name.startswith("compact")]
    ['compact_count<float64>', 'compact_scan', 'compact_write<float64>']
    """
    of = {each for dtype in dtypes for each in (dtype, COMPUTE[dtype])}
    return [name for name in host_library().index if of.issuperset(re.findall(r"\w+", name.partition("<")[2]))]


@dataclasses.dataclass(frozen=True)
class Filled:
    """What `fill` found and made for one architecture."""

    architecture: int
    kernels: int
    compiled: int
    """Of them, those that the cache did not hold."""
    bytes: int
    """Of all their files."""
    seconds: float


def fill(
    architectures: Sequence[int], dtypes: Sequence[str] = FLOATS, progress: Callable[[str], None] | None = None
) -> list[Filled]:
    """Compile the kernels for GPUs that need not be here, and keep them in `directory()`.

    Parameters
    ----------
    architectures : sequence of int
        As 90 for compute capability 9.0. A GPU uses the files of exactly its own.
    dtypes : sequence of {"float16", "bfloat16", "float32", "float64"}
        Of the losses' inputs; all by default.
    progress : callable, optional
        Called with what is about to be compiled.

    Returns
    -------
    list of Filled
        One of each architecture.

    Raises
    ------
    ImportError
        Without CuPy.
    OSError
        Where the folder cannot be written.
    ValueError
        For an architecture that NVRTC does not make machine code for.
    """
    known = _nvrtc().getSupportedArchs()
    for architecture in architectures:
        if architecture not in known:
            raise ValueError(f"arch: expected one of {', '.join(map(str, known))}, which this NVRTC knows, got {architecture}")
    filled = []
    for architecture in dict.fromkeys(architectures):
        begun, made, size = time.perf_counter(), 0, 0
        names = instances(dtypes)
        for file, of_file in itertools.groupby(names, file_of):
            if progress is not None:
                progress(f"{file} for sm_{architecture}")
            for name in of_file:
                path = path_of(name, source_of(file), target_of(architecture))
                if read(path) is None:
                    write(path, compiled(name, source_of(file), target_of(architecture)))
                    made += 1
                size += path.stat().st_size
        filled.append(Filled(architecture, len(names), made, size, time.perf_counter() - begun))
    return filled
