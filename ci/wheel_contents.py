#!/usr/bin/env python3
"""Whether wheels hold what they should, and nothing else: ``wheel_contents.py TREE WHEEL...``."""

from __future__ import annotations

import io
import re
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

from elftools.elf.dynamic import DynamicSection
from elftools.elf.elffile import ELFFile

PACKAGES = {
    "transducer_loss": "transducer_loss",
    "kernels": "transducer_loss/kernels",
    "adapters": "transducer_loss/adapters",
    "benchmarks": "transducer_loss/benchmarks",
}
NEEDED = {".py", ".cu", ".cuh", ".cpp", ".h", ".typed"}
LEVELS = {"x86_64": ("v2", "v3", "v4"), "aarch64": ("native",)}
MACHINES = {"x86_64": "EM_X86_64", "aarch64": "EM_AARCH64"}
EXPORTED = {"kernel_count", "kernel_name", "run_blocks"}
# C++, mathematics and C, which PyTorch and NumPy want too.
LIBRARIES = {"libstdc++.so.6", "libm.so.6", "libc.so.6", "libgcc_s.so.1", "ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"}
# That of NumPy 1.26's wheels, the oldest NumPy that will do.
GLIBC_MINOR = 17
# A wheel has some 1.4 MB, a library some 0.75: twice that is a mistake.
WHEEL_BYTES, LIBRARY_BYTES = 3_000_000, 1_500_000


def sources(tree: Path) -> dict[str, bytes]:
    """The tree's files by their places in a wheel."""
    return {
        f"{place}/{file.relative_to(tree / folder)}": file.read_bytes()
        for folder, place in PACKAGES.items()
        for file in (tree / folder).rglob("*")
        if file.is_file()
    }


def library_problems(name: str, content: bytes, machine: str) -> Iterator[str]:
    """What is wrong with a host library."""
    elf = ELFFile(io.BytesIO(content))
    if elf["e_machine"] != MACHINES[machine]:
        yield f"{name}: built for {elf['e_machine']}"
    if len(content) > LIBRARY_BYTES:
        yield f"{name}: {len(content):,} bytes, expected at most {LIBRARY_BYTES:,}"
    for section in elf.iter_sections():
        if section.name == ".symtab" or section.name.startswith((".debug", ".zdebug")):
            yield f"{name}: expected to be stripped, has {section.name}"
        if isinstance(section, DynamicSection):
            for tag in section.iter_tags():
                if tag.entry.d_tag in ("DT_RPATH", "DT_RUNPATH"):
                    yield f"{name}: looks for libraries in a folder of the machine that built it"
                if tag.entry.d_tag == "DT_NEEDED" and tag.needed not in LIBRARIES:
                    yield f"{name}: needs {tag.needed}"
    symbols = list(elf.get_section_by_name(".dynsym").iter_symbols())
    seen = [s for s in symbols if s["st_shndx"] != "SHN_UNDEF" and s["st_other"]["visibility"] == "STV_DEFAULT"]
    exported = {s.name for s in seen} - {""}
    if exported != EXPORTED:
        yield f"{name}: expected to export {sorted(EXPORTED)}, exports {sorted(exported)}"
    # One wheel serves every Python for as long as its libraries call none.
    if of_python := sorted(s.name for s in symbols if s.name.lstrip("_").startswith("Py")):
        yield f"{name}: uses Python's {of_python}"


def problems(wheel: Path, tree: Path) -> Iterator[str]:
    """What is wrong with a wheel."""
    name, _, python, abi, platform = wheel.stem.split("-")
    machine = next(one for one in LEVELS if platform.endswith(one))
    glibc = [int(minor) for minor in re.findall(rf"manylinux_2_(\d+)_{machine}", platform)]
    if (name, python, abi) != ("transducer_loss", "cp310", "abi3") or min(glibc, default=99) > GLIBC_MINOR:
        yield f"expected transducer_loss-VERSION-cp310-abi3-manylinux_2_{GLIBC_MINOR}_MACHINE.whl or older, got {wheel.name}"
    if wheel.stat().st_size > WHEEL_BYTES:
        yield f"{wheel.stat().st_size:,} bytes, expected at most {WHEEL_BYTES:,}"
    with zipfile.ZipFile(wheel) as opened:
        held = {info.filename: opened.read(info) for info in opened.infolist() if not info.is_dir()}
    libraries = {f"transducer_loss/_host_{level}.abi3.so" for level in LEVELS[machine]}
    wanted = sources(tree)
    about = {file for file in held if file.split("/")[0].endswith(".dist-info")}
    yield from (f"{file}: missing" for file in sorted(libraries - set(held)))
    yield from (f"{file}: missing" for file in sorted(set(wanted) - set(held)) if Path(file).suffix in NEEDED)
    yield from (f"{file}: not the tree's" for file in sorted(set(wanted) & set(held)) if wanted[file] != held[file])
    yield from (f"{file}: unexpected" for file in sorted(set(held) - set(wanted) - libraries - about))
    licence = (tree / "LICENSE").read_bytes()
    if not any(file.endswith("/licenses/LICENSE") and held[file] == licence for file in about):
        yield "LICENSE: missing"
    for file in sorted(libraries & set(held)):
        yield from library_problems(file, held[file], machine)


def main() -> int:
    """Look into all wheels that are named."""
    tree, *wheels = map(Path, sys.argv[1:])
    wrong = 0
    for wheel in wheels:
        found = list(problems(wheel, tree))
        wrong += len(found)
        print(f"{wheel.name}: {wheel.stat().st_size:,} bytes,", "\n  ".join(found) or "holds what it should, and nothing else")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
