"""Every kernel compiles for every GPU architecture, without a GPU, and spills no register."""

import pytest

from transducer_loss.processors import host_library

pytest.importorskip("cupy", reason="CuPy brings NVRTC")

from nvrtc import ARCHITECTURES, CompileError, compiled
from transducer_loss.cuda import file_of, source_of

INSTANCES = sorted(host_library().index)
FILES = sorted({file_of(name) for name in INSTANCES})


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("file", FILES)
def test_compiles_without_spills(file: str, architecture: int) -> None:
    names = [name for name in INSTANCES if file == file_of(name)]
    usage = compiled(source_of(file), names, architecture)
    assert list(usage) == names
    assert {name: of for name, of in usage.items() if of.spilled or of.stack} == {}


def test_sources_include_nothing() -> None:
    # The cache's key is made of the source alone, so headers must be in it.
    for file in FILES:
        assert '.cuh"' not in source_of(file)


FINE = """
extern "C" __global__ void kernel(float* x) {
    float values[64];
    for (int i = 0; i < 64; ++i) values[i] = x[i * 97 + threadIdx.x];
    __syncthreads();
    for (int i = 0; i < 64; ++i) x[i * 97 + threadIdx.x] = values[i] - values[63 - i] * values[63 - i];
}
"""


def test_kernel_that_fits_its_registers_is_fine() -> None:
    usage = compiled(FINE, ["kernel"], 90)["kernel"]
    assert usage.spilled == usage.stack == 0
    assert usage.registers >= 64


def test_spill_is_seen() -> None:
    assert compiled(FINE, ["kernel"], 90, "-maxrregcount=24")["kernel"].spilled > 0


def test_array_that_registers_cannot_hold_is_seen() -> None:
    indexed = FINE.replace("- values[63 - i]", "- values[(int)x[i] & 63]")
    assert compiled(indexed, ["kernel"], 90)["kernel"].stack >= 256


@pytest.mark.parametrize(
    ("defect", "message"),
    [
        ("x[0] = 1.0f", 'expected a ";"'),
        ("x[0] = __builtin_logf(x[1]);", "undefined"),
        ("#include <cmath>\n", "could not open source file"),
        ("x[0] = std::sqrt(x[1]);", "std"),
    ],
)
def test_what_a_gpu_cannot_run_is_seen(defect: str, message: str) -> None:
    with pytest.raises(CompileError, match=message):
        compiled(FINE.replace("    __syncthreads();\n", f"    __syncthreads();\n{defect}\n"), ["kernel"], 80)


def test_instance_that_is_not_there_is_seen() -> None:
    with pytest.raises(CompileError, match="absent"):
        compiled(FINE, ["absent<float>"], 80)
