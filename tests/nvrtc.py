"""Compiles kernels for GPUs that are not there: NVRTC needs no driver."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from cupy_backends.cuda.libs import nvrtc

# CuPy adds -ftz=true by itself. What ptxas says of a kernel comes through NVRTC's log.
OPTIONS = ("-std=c++17", "-ftz=true", "--ptxas-options=-v")

ARCHITECTURES = (75, 80, 90, 100, 120)


@dataclasses.dataclass(frozen=True)
class Usage:
    """What a kernel takes of a multiprocessor."""

    registers: int
    shared: int
    """Bytes."""
    stack: int
    """Bytes of a thread's local memory, where arrays lie that registers cannot hold."""
    spilled: int
    """Bytes written to and read from there because registers ran out."""


_ENTRY = re.compile(
    r"Compiling entry function '(?P<kernel>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?:.*?(?P<shared>\d+) bytes smem)?",
    re.DOTALL,
)


def compiled(source: str, names: Sequence[str], architecture: int, options: Sequence[str] = ()) -> dict[str, Usage]:
    """Compile instances of kernels into machine code of an architecture, such as 90.

    Raises
    ------
    nvrtc.NVRTCError
        With the compiler's messages as its notes.
    """
    program = nvrtc.createProgram(source, "kernels.cu", (), ())
    try:
        for name in names:
            nvrtc.addNameExpression(program, name)
        try:
            nvrtc.compileProgram(program, [*OPTIONS, *options, f"-arch=sm_{architecture}"])
        except nvrtc.NVRTCError as error:
            raise RuntimeError(nvrtc.getProgramLog(program)) from error
        assert nvrtc.getCUBIN(program)
        log = nvrtc.getProgramLog(program)
        entries = {}
        for part in log.split("ptxas info    : ")[1:]:
            pass
        found = {match["kernel"]: match for match in _ENTRY.finditer(log)}
        return {name: _usage(found[nvrtc.getLoweredName(program, name)]) for name in names}
    finally:
        nvrtc.destroyProgram(program)


def _usage(entry: re.Match[str]) -> Usage:
    return Usage(int(entry["registers"]), int(entry["shared"] or 0), int(entry["stack"]), int(entry["stores"]) + int(entry["loads"]))
