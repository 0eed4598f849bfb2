"""The cache of compiled kernels: what is in it is whole and up to date, or it is as if it were not there."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from helpers import run_python
from transducer_loss import check, kernel_cache
from transducer_loss.__main__ import main
from transducer_loss.arrays import FLOATS
from transducer_loss.kernel_cache import Code, code_of, compiled, directory, fill, instances, path_of, read, target_of, write
from transducer_loss.processors import Host, host_library

SOURCE = """
template <typename T> __global__ void scaled_copy(const T* from, T* to, long long n) {
    for (long long i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) to[i] = 2 * from[i];
}
"""
KERNEL = "scaled_copy<float>"
CODE = Code("_Z6kernelPf", bytes(range(256)) * 20)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the cache is, which nobody has made yet."""
    monkeypatch.setenv("TRANSDUCER_LOSS_CACHE_DIR", str(tmp_path / "made" / "by" / "need"))
    return tmp_path / "made" / "by" / "need"


@pytest.fixture
def unwritable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that cannot be made, whoever runs the tests: where it should be, there is a file."""
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("TRANSDUCER_LOSS_CACHE_DIR", str(tmp_path / "file"))
    return tmp_path / "file"


@pytest.fixture
def nvrtc() -> Any:
    return pytest.importorskip("cupy", reason="CuPy brings NVRTC").cuda.nvrtc


@pytest.fixture
def not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> Code:
        raise AssertionError("compiled")

    monkeypatch.setattr(kernel_cache, "compiled", refuse)


def test_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert directory() == tmp_path / "made" / "by" / "need"
    monkeypatch.delenv("TRANSDUCER_LOSS_CACHE_DIR")
    monkeypatch.setenv("CUPY_CACHE_DIR", "/of/cupy")
    assert directory() == Path("/of/cupy/transducer_loss")
    monkeypatch.delenv("CUPY_CACHE_DIR")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert directory() == Path("/home/somebody/.cupy/kernel_cache/transducer_loss")
    monkeypatch.setenv("TRANSDUCER_LOSS_CACHE_DIR", "")
    monkeypatch.setenv("CUPY_CACHE_DIR", "")
    assert directory() == Path("/home/somebody/.cupy/kernel_cache/transducer_loss")


def test_what_is_written_is_read(folder: Path) -> None:
    assert read(folder / "kernel") is None
    write(folder / "kernel", CODE)
    assert read(folder / "kernel") == CODE
    write(folder / "kernel", CODE._replace(image=b"\0other\0"))
    assert read(folder / "kernel") == CODE._replace(image=b"\0other\0")
    assert [file.name for file in folder.iterdir()] == ["kernel"]


def test_a_file_that_is_not_whole_is_none(folder: Path) -> None:
    path = folder / "kernel"
    write(path, CODE)
    whole = path.read_bytes()
    for size in (*range(0, 80), len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert read(path) is None, size
    for place in (0, 31, 32, 40, 44, 45, 46, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert read(path) is None, place
    for other in (whole + b"\0", bytes(len(whole)), b"\x7fELF" + whole):
        path.write_bytes(other)
        assert read(path) is None
    path.write_bytes(whole)
    assert read(path) == CODE


def test_a_file_under_another_name_is_none(folder: Path) -> None:
    write(folder / "kernel.sm_90.0", CODE)
    os.rename(folder / "kernel.sm_90.0", folder / "kernel.sm_80.0")
    assert read(folder / "kernel.sm_80.0") is None


def test_a_file_that_cannot_be_read_is_none(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "kernel").mkdir(parents=True)
    assert read(folder / "kernel") is None
    assert read(folder / "kernel" / "below") is None
    write(folder / "other", CODE)

    def denied(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", denied)
    assert read(folder / "other") is None


def test_others_may_read_as_the_umask_says(folder: Path) -> None:
    """An image is built by root and run by somebody else."""
    for umask, mode in ((0o022, 0o644), (0o077, 0o600)):
        before = os.umask(umask)
        try:
            write(folder / "kernel", CODE)
        finally:
            os.umask(before)
        assert (folder / "kernel").stat().st_mode & 0o777 == mode


def test_a_write_that_fails_leaves_what_was_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(folder / "kernel", CODE)
    (folder / "taken").mkdir()
    with pytest.raises(OSError):
        write(folder / "taken", CODE)

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        write(folder / "kernel", CODE._replace(symbol="other"))
    assert sorted(file.name for file in folder.iterdir()) == ["kernel", "taken"]
    assert read(folder / "kernel") == CODE


def _codes(number: int) -> Code:
    return Code(f"kernel{number}", bytes([number]) * 300_000)


WRITER = """
import sys
from pathlib import Path
from transducer_loss.kernel_cache import Code, write

number = int(sys.argv[2])
for _ in range(60):
    write(Path(sys.argv[1]), Code(f"kernel{number}", bytes([number]) * 300_000))
"""


def test_ranks_that_write_at_the_same_moment(folder: Path) -> None:
    """A reader beside them sees one whole file or another."""
    path, known = folder / "kernel", {_codes(number) for number in range(3)}
    write(path, _codes(0))
    ranks = [subprocess.Popen([sys.executable, "-c", WRITER, path, str(number)]) for number in range(3)]
    seen = 0
    while any(rank.poll() is None for rank in ranks):
        assert read(path) in known
        seen += 1
    assert [rank.returncode for rank in ranks] == [0, 0, 0]
    assert seen > 1
    assert read(path) in known
    assert [file.name for file in folder.iterdir()] == ["kernel"]


def test_threads_that_write_at_the_same_moment(folder: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: write(folder / "kernel", _codes(number)), range(8)))
    assert read(folder / "kernel") in {_codes(number) for number in range(8)}
    assert [file.name for file in folder.iterdir()] == ["kernel"]


def test_the_name_says_all_that_the_code_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_cache, "_compiler", lambda: "13.5")
    names = [path_of(KERNEL, SOURCE, "sm_90").name]
    assert path_of(KERNEL, SOURCE, "sm_90").name == names[0]
    assert re.fullmatch(r"scaled_copy-float\.sm_90\.[0-9a-f]{64}", names[0])
    names += [
        path_of("scaled_copy<double>", SOURCE, "sm_90").name, path_of(KERNEL, SOURCE + " ", "sm_90").name,
        path_of(KERNEL, SOURCE, "sm_80").name, path_of(KERNEL, SOURCE, "compute_90").name,
    ]  # fmt: skip
    monkeypatch.setattr(kernel_cache, "_compiler", lambda: "13.6")
    names.append(path_of(KERNEL, SOURCE, "sm_90").name)
    monkeypatch.setattr(kernel_cache, "OPTIONS", ("-std=c++17",))
    names.append(path_of(KERNEL, SOURCE, "sm_90").name)
    assert len({name.rpartition(".")[2] for name in names}) == len(names) == 7


def test_every_instance_has_a_file_of_its_own(nvrtc: Any) -> None:
    every = [path_of(name, kernel_cache.source_of(kernel_cache.file_of(name)), "sm_90").name for name in instances()]
    assert len(set(every)) == len(every) == len(host_library().index)
    assert max(map(len, every)) < 200  # of the 255 that file systems allow, with room for the name of an unfinished one


def test_the_compiler_is_told_apart_by_its_build(nvrtc: Any) -> None:
    found = kernel_cache._compiler()
    assert str(nvrtc.getVersion()) in found
    assert re.search(r"V\d+\.\d+\.\d+", found)


@pytest.mark.parametrize("target", ["sm_75", "sm_90", "sm_120"])
def test_machine_code(target: str, nvrtc: Any) -> None:
    code = compiled(KERNEL, SOURCE, target)
    assert code.image.startswith(b"\x7fELF")
    assert code.symbol.encode() in code.image
    assert code == compiled(KERNEL, SOURCE, target)


def test_a_gpu_that_nvrtc_does_not_know(nvrtc: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A newer one gets PTX, which its driver translates; an older one cannot be served."""
    known = nvrtc.getSupportedArchs()
    assert [target_of(each) for each in known] == [f"sm_{each}" for each in known]
    assert target_of(999) == f"compute_{known[-1]}"
    assert target_of(91) == "compute_90"
    code = compiled(KERNEL, SOURCE, target_of(91))
    assert b".target sm_90" in code.image
    assert code.symbol.encode() in code.image
    with pytest.raises(RuntimeError, match=rf"capability {known[0] / 10} and later, and this one is of 3\.5: install CuPy for an"):
        code_of(KERNEL, SOURCE, 35)


def test_what_does_not_compile_says_why(nvrtc: Any, folder: Path) -> None:
    with pytest.raises(RuntimeError, match=r'(?s)NVRTC cannot compile scaled_copy<float> for sm_90: .*scaled_copy<float>\.cu.*"unknown"'):
        code_of(KERNEL, SOURCE.replace("2 *", "unknown *"), 90)
    assert not folder.exists()


def test_it_compiles_where_there_is_nothing_and_then_no_more(nvrtc: Any, folder: Path, request: pytest.FixtureRequest) -> None:
    code = code_of(KERNEL, SOURCE, 90)
    (file,) = folder.iterdir()
    assert read(file) == code
    request.getfixturevalue("not_compiled")
    assert code_of(KERNEL, SOURCE, 90) == code
    for other in ((KERNEL, SOURCE, 80), ("scaled_copy<double>", SOURCE, 90), (KERNEL, SOURCE + "\n", 90)):
        with pytest.raises(AssertionError, match="compiled"):
            code_of(*other)


def test_another_process_reads_it(nvrtc: Any, folder: Path) -> None:
    code = code_of(KERNEL, SOURCE, 90)
    found = run_python(f"""
        import json
        from transducer_loss import kernel_cache
        kernel_cache.compiled = None
        code = kernel_cache.code_of({KERNEL!r}, {SOURCE!r}, 90)
        print(json.dumps([code.symbol, code.image.hex()]))
    """)
    assert found == [code.symbol, code.image.hex()]


@pytest.mark.parametrize("damage", [b"", b"\x7fELF", bytes(20_000)])
def test_a_damaged_file_is_made_anew(damage: bytes, nvrtc: Any, folder: Path) -> None:
    code = code_of(KERNEL, SOURCE, 90)
    (file,) = folder.iterdir()
    file.write_bytes(damage)
    assert code_of(KERNEL, SOURCE, 90) == code
    assert read(file) == code


def test_a_cache_that_can_be_read_alone_is_enough(nvrtc: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = code_of(KERNEL, SOURCE, 90)

    def denied(*arguments: Any) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(kernel_cache, "write", denied)
    assert code_of(KERNEL, SOURCE, 90) == code
    assert code_of("scaled_copy<double>", SOURCE, 90) == compiled("scaled_copy<double>", SOURCE, "sm_90")


def test_the_first_compile_of_a_process_is_said_once(nvrtc: Any, folder: Path) -> None:
    records = run_python(f"""
        import json, logging
        from transducer_loss import kernel_cache
        records = []
        handler = logging.Handler()
        handler.emit = records.append
        logging.getLogger("transducer_loss").addHandler(handler)
        logging.getLogger("transducer_loss").setLevel(logging.DEBUG)
        for name in ({KERNEL!r}, {KERNEL!r}, "scaled_copy<double>", "scaled_copy<int>"):
            kernel_cache.code_of(name, {SOURCE!r}, 90)
        print(json.dumps([[record.name, record.levelno, record.getMessage()] for record in records]))
    """)
    assert [record[:2] for record in records] == [["transducer_loss", level] for level in (logging.INFO, logging.DEBUG, logging.DEBUG)]
    first, second, _ = (message for *_, message in records)
    pattern = r"compiled CUDA kernel %s for sm_90 in \d+\.\d\d s, kept in " + re.escape(str(folder))
    assert re.fullmatch(pattern % KERNEL + r"; others follow at their first use.*`python -m transducer_loss compile --arch 90`.*", first)
    assert re.fullmatch(pattern % "scaled_copy<double>", second)


def test_what_cannot_be_kept_is_said(nvrtc: Any, unwritable: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "transducer_loss"):
        assert code_of(KERNEL, SOURCE, 90) == code_of(KERNEL, SOURCE, 90)
    for record in caplog.records:
        assert f"not kept, as {unwritable} cannot be written: File exists" in record.getMessage()
    assert len(caplog.records) == 2
    assert unwritable.read_bytes() == b""


def test_nothing_is_printed(nvrtc: Any) -> None:
    """Also where the program has said nothing about logging, and Python would print what is a warning."""
    for place in ("/proc/nowhere", os.environ["TRANSDUCER_LOSS_CACHE_DIR"]):
        done = subprocess.run(
            [sys.executable, "-c", f"from transducer_loss import kernel_cache; kernel_cache.code_of({KERNEL!r}, {SOURCE!r}, 90)"],
            capture_output=True, text=True, check=True, env={**os.environ, "TRANSDUCER_LOSS_CACHE_DIR": place},
        )  # fmt: skip
        assert (done.stdout, done.stderr) == ("", "")


class Module:
    """CuPy's, without a driver."""

    def load(self, image: bytes) -> None:
        self.image = image

    def get_function(self, symbol: str) -> tuple[str, bytes]:
        return symbol, self.image


def test_the_processor_loads_what_the_cache_gives(nvrtc: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The code of the kernel that is launched, for the device that it is launched on."""
    from transducer_loss import cuda

    capabilities = ["80", "90", "120"]
    stand_in = SimpleNamespace(Device=lambda index: SimpleNamespace(compute_capability=capabilities[index]), Module=Module)
    monkeypatch.setattr(cuda, "cupy", SimpleNamespace(cuda=stand_in))
    cuda._kernel.cache_clear()
    try:
        for name in ("compact_scan", "compact_count<float64>"):
            for device, capability in enumerate(capabilities):
                made = compiled(name, kernel_cache.source_of("compact.cu"), f"sm_{capability}")
                assert cuda._kernel(name, device) == (made.symbol, made.image)
    finally:
        cuda._kernel.cache_clear()


def test_instances_of_a_dtype() -> None:
    every = list(host_library().index)
    assert instances() == instances(FLOATS) == every
    for dtype in FLOATS:
        assert 0 < len(instances([dtype])) < len(every)
    assert set().union(*(instances([dtype]) for dtype in FLOATS)) == set(every)
    assert {re.sub("bfloat16", "float16", name) for name in instances(["bfloat16"])} == set(instances(["float16"]))
    assert not any("float64" in name or "bfloat16" in name for name in instances(["float16"]))


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_losses_of_a_dtype_launch_no_other(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    launched: set[str] = set()
    check.check("cpu", functions=["joint_rnnt_loss"], dtypes=[dtype])  # which makes the references in float64, and keeps them

    def noted(self: Host, name: str, *arguments: Any, **options: Any) -> None:
        launched.add(name)
        launch(self, name, *arguments, **options)

    launch = Host.launch
    monkeypatch.setattr(Host, "launch", noted)
    assert all(row.passed for row in check.check("cpu", dtypes=[dtype]))
    assert launched <= set(instances([dtype]))
    assert len(launched) > 40


FEW = ["compact_count<float32>", "compact_scan", "softmax_share<float32>"]


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch, nvrtc: Any) -> None:
    monkeypatch.setattr(kernel_cache, "instances", lambda dtypes: [name for name in FEW if dtypes == FLOATS or dtypes[0] in name])


@pytest.mark.usefixtures("few")
def test_fill(folder: Path, request: pytest.FixtureRequest) -> None:
    progress: list[str] = []
    first = fill([80, 90, 80], progress=progress.append)
    assert [(of.architecture, of.kernels, of.compiled) for of in first] == [(80, 3, 3), (90, 3, 3)]
    assert [f"{file} for sm_{arch}" for arch in (80, 90) for file in ("compact.cu", "softmax.cu")] == progress
    files = sorted(folder.iterdir())
    assert sum(of.bytes for of in first) == sum(file.stat().st_size for file in files)
    assert len(files) == 6
    for file in files[1], files[4]:
        file.write_bytes(file.read_bytes()[:-1])
    again = fill([90, 80])
    assert [(of.architecture, of.kernels) for of in again] == [(90, 3), (80, 3)]
    assert sum(of.compiled for of in again) == 2
    assert {of.architecture: of.bytes for of in again} == {of.architecture: of.bytes for of in first}
    request.getfixturevalue("not_compiled")
    assert [of.compiled for of in fill([80, 90])] == [0, 0]
    for name in FEW:  # what the processor looks for is there
        code_of(name, kernel_cache.source_of(kernel_cache.file_of(name)), 90)


@pytest.mark.usefixtures("few")
def test_fill_for_a_dtype(folder: Path) -> None:
    (of,) = fill([90], ["float32"])
    assert (of.kernels, of.compiled, len(list(folder.iterdir()))) == (2, 2, 2)


@pytest.mark.usefixtures("few")
def test_fill_raises(folder: Path, request: pytest.FixtureRequest) -> None:
    for wrong in (35, 91, 9, -90):
        with pytest.raises(ValueError, match=rf"arch: expected one of .*75, .*90.*, which this NVRTC knows, got {wrong}$"):
            fill([90, wrong])
    assert not folder.exists()  # nothing was compiled in vain
    request.getfixturevalue("unwritable")
    with pytest.raises(OSError):
        fill([90])


@pytest.mark.usefixtures("few")
def test_command(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["compile", "--arch", "80", "90", "--arch", "120", "--json"]) == 0
    out, err = capfd.readouterr()
    found = json.loads(out)
    assert found["directory"] == str(folder)
    assert [(of["architecture"], of["kernels"], of["compiled"]) for of in found["architectures"]] == [(80, 3, 3), (90, 3, 3), (120, 3, 3)]
    assert err.splitlines()[:2] == ["compiling compact.cu for sm_80", "compiling softmax.cu for sm_80"]
    assert len(err.splitlines()) == 6
    assert main(["compile", "--arch", "90", "--dtype", "float32"]) == 0
    out, err = capfd.readouterr()
    assert re.search(r"sm_90\W+2\W+0\W+0\.0 MiB", out)
    assert out.splitlines()[-1] == f"in {folder}"


@pytest.mark.usefixtures("few")
def test_command_takes_the_gpus_that_are_here(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    devices = [{"compute_capability": each} for each in ("9.0", "12.0", "9.0")]
    monkeypatch.setattr("transducer_loss.info.cuda", lambda: {"devices": devices})
    assert main(["compile", "--json"]) == 0
    assert [of["architecture"] for of in json.loads(capfd.readouterr().out)["architectures"]] == [90, 120]


@pytest.mark.usefixtures("few")
def test_command_says_what_it_cannot_do(capfd: pytest.CaptureFixture[str], request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    def said(*words: str) -> str:
        assert main(["compile", *words]) == 2
        out, err = capfd.readouterr()
        assert out == ""
        return err.splitlines()[-1]

    assert re.match("python -m transducer_loss compile: arch: expected one of .*75, .* got 35", said("--arch", "90", "35"))
    monkeypatch.setattr("transducer_loss.info.cuda", lambda: {"devices": [], "reason": "CuPy is not installed."})
    assert said() == "python -m transducer_loss compile: arch: expected one, as --arch 90, on a machine without a GPU, got none"
    with monkeypatch.context() as without:
        for name in ("cupy", "cupy.cuda"):
            without.setitem(sys.modules, name, None)
        assert said("--arch", "90") == "python -m transducer_loss compile: CuPy is not installed."
    request.getfixturevalue("unwritable")
    assert "File exists" in said("--arch", "90")


def _devices() -> int:
    try:
        import cupy

        return int(cupy.cuda.runtime.getDeviceCount())
    except Exception:  # without CuPy, a driver or a device: each raises something else
        return 0


@pytest.mark.gpu
@pytest.mark.skipif(not _devices(), reason="no CUDA device")
def test_on_a_gpu_a_filled_cache_is_enough() -> None:
    """Nothing is compiled after `compile`, by the check of all losses, and the cache is as it was."""
    command = [sys.executable, "-m", "transducer_loss", "compile", "--json", "--dtype", "float32"]
    filled = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert sum(of["compiled"] for of in filled["architectures"]) >= len(instances(["float32"]))
    assert run_python("""
        import json
        from transducer_loss import check, kernel_cache
        kernel_cache.compiled = None
        rows = check.check("cuda", dtypes=["float32"])
        print(json.dumps([row.passed for row in rows].count(False)))
    """) == 0  # fmt: skip
    again = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert [of["compiled"] for of in again["architectures"]] == [0] * len(again["architectures"])


@pytest.mark.gpu
@pytest.mark.skipif(not _devices(), reason="no CUDA device")
def test_on_a_gpu_ptx_is_translated(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU newer than NVRTC gets."""
    import cupy

    architecture = int(cupy.cuda.Device().compute_capability)
    code = compiled(KERNEL, SOURCE, f"compute_{architecture}")
    module = cupy.cuda.Module()
    module.load(code.image)
    numbers, twice = cupy.arange(100, dtype="f"), cupy.empty(100, "f")
    module.get_function(code.symbol)((1,), (32,), (numbers, twice, 100))
    assert (twice == 2 * numbers).all()
