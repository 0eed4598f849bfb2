"""Compiles kernels for GPUs that are not there: NVRTC needs no driver."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from cupy_backends.cuda.libs import nvrtc

from transducer_loss import kernel_cache

ARCHITECTURES = (75, 80, 90, 100, 120)

# With -v ptxas reports into NVRTC's log.
OPTIONS = (*kernel_cache.OPTIONS, "--ptxas-options=-v")


class CompileError(Exception):
    """NVRTC's messages."""


@dataclasses.dataclass(frozen=True)
class Usage:
    """What a kernel takes of a multiprocessor."""

    registers: int
    stack: int
    """Bytes of a thread's local memory, for arrays that registers cannot hold."""
    spilled: int
    """Bytes written to and read from there because registers ran out."""


_ENTRY = re.compile(
    r"Compiling entry function '(?P<kernel>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers",
    re.DOTALL,
)


def compiled(source: str, names: Sequence[str], architecture: int, *options: str) -> dict[str, Usage]:
    """Compile instances of kernels, by name, into machine code of an architecture: 90 is sm_90."""
    program = nvrtc.createProgram(source, "kernels.cu", (), ())
    try:
        for name in names:
            nvrtc.addNameExpression(program, name)
        try:
            nvrtc.compileProgram(program, [*OPTIONS, *options, f"-arch=sm_{architecture}"])
        except nvrtc.NVRTCError as error:
            raise CompileError(nvrtc.getProgramLog(program)) from error
        entries = {entry["kernel"]: entry for entry in _ENTRY.finditer(nvrtc.getProgramLog(program))}
        code = nvrtc.getCUBIN(program)
        lowered = {name: nvrtc.getLoweredName(program, name) for name in names}
    finally:
        nvrtc.destroyProgram(program)
    absent = [name for name in names if lowered[name].encode() not in code or lowered[name] not in entries]
    if absent:
        raise CompileError(f"no machine code, or no report of ptxas, for {absent}")
    return {name: _usage(entries[lowered[name]]) for name in names}


def _usage(entry: re.Match[str]) -> Usage:
    return Usage(int(entry["registers"]), int(entry["stack"]), int(entry["stores"]) + int(entry["loads"]))
