"""The defects that `test_emulation.py` is there to see: each is planted into a copy of the kernels, and seen."""

import contextlib
import dataclasses
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from emulation import Builds, Driver, Emulated, KernelFault, sources
from emulation_cases import CASES as LOSSES
from emulation_cases import Case, expect_equal
from emulation_system_cases import CASES as SYSTEMS
from transducer_loss.arrays import FLOATS

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sanitizers' options and libraries are those of Linux")


@dataclasses.dataclass(frozen=True)
class Defect:
    """What replaces what in a file, and how it shows."""

    name: str
    sanitizer: str
    file: str
    old: str
    new: str
    seen: str
    """Pattern of the report."""
    case: str = "joint-float32"
    kernels: str = ""
    """The file of the kernels that show it, where the defect is in a header."""


RACE = "ThreadSanitizer: data race"
DIFFERENT = "Not equal to tolerance"
SCANNED = "    results[threadIdx.x] = value;\n"
BARRIER = "    __syncthreads();\n"

DEFECTS = [
    Defect(
        "step-without-barrier", "thread", "lattice.cu",
        "            __syncthreads();\n            now = next;", "            now = next;", RACE,
    ),
    Defect("scan-without-barrier", "thread", "processor.cuh", SCANNED + BARRIER, SCANNED, RACE, kernels="compact.cu"),
    Defect(
        "next-reduction-without-barrier", "thread", "processor.cuh",
        "__syncthreads();  // of_warp belongs", "// of_warp belongs", RACE, kernels="compact.cu",
    ),
    Defect(
        "shuffle-as-barrier", "thread", "processor.cuh",
        "__syncthreads();  // a shuffle alone", "// a shuffle alone", RACE, "joint-wide", "softmax.cu",
    ),
    Defect(
        "in-place-without-barrier", "thread", "softmax.cu",
        "__syncthreads();  // in and out may be", "// in and out may be", RACE, "logits-inplace",
    ),
    Defect(
        "packet-off-its-boundary", "address", "rows.cuh",
        "smaller((N - past_boundary<N>(out.start)) % N, classes)", "0", "misaligned address", "logits-1101-classes-float32-padded",
        "softmax.cu",
    ),
    Defect(
        "packet-beyond-the-row", "address", "rows.cuh",
        "(classes - head) / N", "(classes - head + N - 1) / N", DIFFERENT, "logits-1101-classes-float32-padded",
        "softmax.cu",
    ),
    Defect(
        "last-batch-for-all", "address", "softmax.cu",
        "if (!held.one_batch()) load_logits();", "", DIFFERENT, "logits-1101-classes-float32-padded",
    ),
    Defect(
        "packet-of-another-place", "address", "rows.cuh", "store_packet(out.at(v), packet);",
        "store_packet(out.at(v >= 2 * N ? v - N : v), packet);", DIFFERENT, "logits-1101-classes-bfloat16-packed", "softmax.cu",
    ),
    Defect(
        "row-without-its-edges", "address", "softmax.cu",
        "block_sum(sum + at_edge)", "block_sum(sum)", DIFFERENT, "logits-1101-classes-float32-padded",
    ),
    Defect(
        "index-one-too-far", "address", "compact.cu",
        "positions[first_cell + of.width] =", "positions[first_cell + of.width + 1] =", "heap-buffer-overflow",
    ),
    Defect(
        "index-one-too-low", "address", "compact.cu",
        "before_row[row]", "before_row[row - 1]", "AddressSanitizer: (heap-buffer-overflow|use-after-poison)",
    ),
    Defect(
        "shared-array-too-short", "address", "processor.cuh",
        "SHARED(T, results, 1024)", "SHARED(T, results, 63)", "index 63 out of bounds|heap-buffer-overflow", kernels="compact.cu",
    ),
    Defect(
        "signed-overflow", "address", "compact.cu", "        long long kept = 0;\n",
        "        int area = (int)row + 65536;\n        area *= area;\n        long long kept = area == 7;\n",
        "signed integer overflow",
    ),
    Defect(
        "not-a-number-to-integer", "address", "compact.cu",
        "counts[row] = kept", "counts[row] = kept + 0 * (int)nan_value<float>()", "nan is outside the range",
    ),
    Defect(
        "barrier-for-some-threads", "address", "processor.cuh", SCANNED + BARRIER,
        f"{SCANNED}    if (threadIdx.x < 40)\n    {BARRIER}", "barrier divergence: .* wait at .*processor.cuh:",
        kernels="compact.cu",
    ),
    Defect(
        "thread-leaves", "address", "compact.cu", "        for (long long start = 0; start <= n;",
        "        if (threadIdx.x == 40) return;\n        for (long long start = 0; start <= n;",
        "barrier divergence: .*the end of the kernel",
    ),
    Defect(
        "lane-without-barrier", "address", "processor.cuh", "    if (warps > 1) {\n",
        "    if (lane == 3) return value;\n    if (warps > 1) {\n", "barrier (divergence|hang): ", kernels="compact.cu",
    ),
    Defect(
        "endless-loop", "address", "processor.cuh", SCANNED,
        f"    for (volatile int spins = threadIdx.x == 40; spins;) {{}}\n{SCANNED}",
        "barrier hang: .*\n  63 of 64 threads of the block wait at .*processor.cuh:", kernels="compact.cu",
    ),
    Defect(
        "unwritten-cell", "address", "lattice.cu", "            label_occupancy[cell] = label;\n",
        "            if (u < of.labels) label_occupancy[cell] = label;\n", DIFFERENT, "logits-float32",
    ),
    Defect(
        "shared-memory-unwritten", "address", "processor.cuh",
        SCANNED, f"    if (value != 0)\n    {SCANNED}", DIFFERENT, kernels="compact.cu",
    ),
    Defect(
        "block-ends-with-its-first-item", "address", "softmax.cu",
        "            continue;\n", "            return;\n", DIFFERENT, "logits-band-regular",
    ),
    Defect(
        "rows-without-barrier", "thread", "band.cu", "                chosen[start + p] = (int)from;\n            }\n            __syncthreads();\n",
        "                chosen[start + p] = (int)from;\n            }\n", RACE, "prune-float32",
    ),
    Defect(
        "arcs-without-barrier", "thread", "simple_joint.cu", "        __syncthreads();\n        PARALLEL(u, of.labels + 1) {\n",
        "        PARALLEL(u, of.labels + 1) {\n", RACE, "simple-far-apart-float32",
    ),
    Defect(
        "join-one-too-far", "address", "softmax.cu", "own = log_sum[cell];", "own = log_sum[cell + 1];",
        "heap-buffer-overflow|Not equal to tolerance", "joint-shard-float32",
    ),
    Defect(
        "gather-one-too-far", "address", "band.cu", "smaller((long long)end[b * padded_frames + t], labels)", "labels + 1",
        "heap-buffer-overflow|Not equal to tolerance", "gather-unordered",
    ),
    Defect(
        "cleared-marks-without-barrier", "thread", "sampling.cu", "marks[v] = LEFT_OUT;\n        __syncthreads();\n",
        "marks[v] = LEFT_OUT;\n", RACE, "sample-uniform-all",
    ),
    Defect(
        "picked-marks-without-barrier", "thread", "sampling.cu",
        "        __syncthreads();\n        long long mine = 0;\n", "        long long mine = 0;\n", RACE, "sample-uniform-block-128",
    ),
    Defect(
        "marks-of-a-repeated-label", "thread", "processor.cuh", "__atomic_store_n(p, value, __ATOMIC_RELAXED);", "*p = value;",
        RACE, "sample-uniform-batch", "sampling.cu",
    ),
    Defect(
        "scan-of-one-thread", "address", "sampling.cu", "before = block_scan<Sum>(mine) - mine;", "before = 0;",
        DIFFERENT, "sample-uniform-batch",
    ),
    Defect(
        "gathered-row-that-is-not-there", "address", "output_layer.cu", "const bool there = ordered && v >= 0 && v < classes;",
        "const bool there = true;", "AddressSanitizer", "joint-classes-unchecked",
    ),
    Defect(
        "scattered-row-that-is-not-there", "address", "output_layer.cu", "if (v < 0 || v >= classes) continue;",
        "if (classes == 0) continue;", "AddressSanitizer", "joint-classes-unchecked",
    ),
    Defect(
        "diagonals-without-barrier", "thread", "edit_distance.cu", "            __syncthreads();\n            long long* const oldest",
        "            long long* const oldest", RACE, "edit-longer-than-a-block",
    ),
    Defect(
        "reference-one-too-far", "address", "edit_distance.cu", "reference[i - 1] ==", "reference[i] ==",
        "heap-buffer-overflow", "edit-alike",
    ),
    Defect(
        "label-past-the-last", "address", "edit_distance.cu", "label = i >= real ? 0 : wide", "label = wide",
        "heap-buffer-overflow", "edit-int32",
    ),
    Defect(
        "probabilities-in-place", "thread", "embr.cu", "const double p = live", "const double p = weight_of[i] = live", RACE,
        "embr-float32",
    ),
    Defect(
        "hypothesis-one-too-long", "address", "embr.cu", "while (same < count &&", "while (same <= count &&",
        "heap-buffer-overflow|Not equal to tolerance", "embr-many-alike",
    ),
    Defect(
        "backlog-without-barrier", "thread", "amortized.cu",
        "            __syncthreads();\n            carried = handed_over[0];  // overwritten",
        "            carried = handed_over[0];  // overwritten", RACE, "backlog-block-32-97",
    ),
    Defect(
        "backlog-gradient-without-barrier", "thread", "amortized.cu",
        "            __syncthreads();\n            carried = handed_over[0];\n", "            carried = handed_over[0];\n", RACE,
        "backlog-block-32-97",
    ),
    Defect(
        "frames-past-the-last", "address", "amortized.cu", "PARALLEL(t, frames) sum +=", "PARALLEL(t, padded) sum +=",
        DIFFERENT, "cost-float32",
    ),
    Defect(
        "gates-past-the-last", "address", "amortized.cu", "store(out + k, length > 0 && of.live() ? gate",
        "store(out + k + 1, length > 0 && of.live() ? gate", "heap-buffer-overflow", "gate-no-lengths",
    ),
    Defect(
        "products-without-barrier", "thread", "reduced_predictor.cu",
        "            if (threadIdx.x == 0) products[r * reach + n] = product;\n        }\n        __syncthreads();\n",
        "            if (threadIdx.x == 0) products[r * reach + n] = product;\n        }\n", RACE, "reduced-backward-float32",
    ),
    Defect(
        "label-that-no-class-has", "address", "reduced_predictor.cu",
        "labels[item] >= 0 && labels[item] < classes ? labels[item] : -1", "labels[item]", "AddressSanitizer", "reduced-unchecked",
    ),
    Defect(
        "cells-of-the-next-frame", "address", "joint.cu", "if (j0 + c >= end) continue;", "",
        "heap-buffer-overflow|Not equal to tolerance", "joint-300-features-float32",
    ),
    Defect(
        "frames-that-an-encoder-has-not", "address", "joint.cu", "if (t >= of.frames || (i > 0", "if ((i > 0",
        "heap-buffer-overflow|Not equal to tolerance", "shared-float32",
    ),
]  # fmt: skip


def case_of(name: str) -> Case:
    return next(case for case in [*LOSSES, *SYSTEMS] if case.name == name)


def with_defect(defect: Defect, launched: set[str], folder: Path) -> Path:
    """A copy of the kernels with the defect, and of the file that shows it what is launched: all would take long to compile."""
    for file in sources():
        shutil.copy(file, folder)
    broken = folder / defect.file
    text = broken.read_text()
    assert text.count(defect.old) == 1
    broken.write_text(text.replace(defect.old, defect.new))

    def those_launched(found: re.Match[str]) -> str:
        name, *types = found[2].split(", ")
        instances = [[kind] for kind in FLOATS] if found[1] else [types]
        wanted = [each for each in instances if (f"{name}<{','.join(each)}>" if each else name) in launched]
        return "".join(f"EXPORT({', '.join([name, *each])})\n" for each in wanted)

    kernels = folder / (defect.kernels or defect.file)
    kernels.write_text(re.sub(r"^EXPORT(_FLOATS)?\((.*)\)\n", those_launched, kernels.read_text(), flags=re.MULTILINE))
    host = folder / "host.cpp"
    host.write_text(re.sub(r'#include "(\w+\.cu)"\n', lambda found: found[0] if found[1] == kernels.name else "", host.read_text()))
    return folder


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.name)
def test_defect_is_seen(defect: Defect, builds: Builds, tmp_path: Path) -> None:
    case = case_of(defect.case)
    plain = case.plain()
    expected = case.on(plain)
    program = builds.start(defect.sanitizer, with_defect(defect, plain.launched, tmp_path))()
    patience = {"EMULATOR_PATIENCE": "1"} if "hang" in defect.seen else None
    with contextlib.closing(Driver(program, patience)) as driver, pytest.raises(AssertionError) as fault:
        # A race is seen where its two threads come close enough, which on a busy machine they may not at once.
        for _ in range(5 if defect.seen == RACE else 1):
            expect_equal(case.on(case.emulated(driver)), expected, case)
    assert re.search(defect.seen, str(fault.value))


@pytest.fixture(scope="module")
def compact(builds: Builds, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Emulated]:
    """One file of the kernels as it is."""
    untouched = Defect("none", "address", "processor.cuh", SCANNED, SCANNED, "", kernels="compact.cu")
    kernels = with_defect(untouched, {"compact_scan"}, tmp_path_factory.mktemp("kernels"))
    with contextlib.closing(Driver(builds.start("address", kernels)())) as driver:
        yield Emulated(driver, 64)


def test_launch_without_defect(compact: Emulated) -> None:
    given = np.array([3, 0, 2, 1, -1])
    compact.launch("compact_scan", 1, 5, 4, given)
    assert given.tolist() == [0, 3, 3, 5, 6]


def test_argument_too_few_is_seen(compact: Emulated) -> None:
    with pytest.raises(KernelFault, match="heap-buffer-overflow"):
        compact.launch("compact_scan", 1, 5, 4)


def test_array_too_short_is_seen(compact: Emulated) -> None:
    with pytest.raises(KernelFault, match="heap-buffer-overflow"):
        compact.launch("compact_scan", 1, 5, 4, np.arange(4))


def test_misaligned_array_is_seen(compact: Emulated) -> None:
    shifted = np.zeros(48, np.uint8)[4:44].view(np.int64)
    with pytest.raises(KernelFault, match="misaligned address"):
        compact.launch("compact_scan", 1, 5, 4, shifted)


def test_write_to_an_input_is_seen(compact: Emulated) -> None:
    given = np.arange(5)
    given.flags.writeable = False
    with pytest.raises(KernelFault, match="read-only"):
        compact.launch("compact_scan", 1, 5, 4, given)
    assert given.tolist() == [0, 1, 2, 3, 4]


def test_block_that_is_no_whole_warp_is_seen(compact: Emulated) -> None:
    with pytest.raises(KernelFault, match="expected whole warps"):
        Emulated(compact.driver, 33).launch("compact_scan", 1, 5, 4, np.arange(5))
