"""`python -m transducer_loss`: what it prints, that its check can fail, and that nothing imports a framework."""

import dataclasses
import functools
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import transducer_loss
from transducer_loss import check, check_cases, check_systems, info, processors

MAIN = "import sys; from transducer_loss.__main__ import main; sys.exit(main(sys.argv[1:]))"

# As if neither were installed: a finder in front of all others.
WITHOUT_RICH_AND_CUPY = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("rich", "cupy", "cupy_backends"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
""" + MAIN

QUICK = ("--function", "rnnt_loss", "--dtype", "float32")


def python(code: str, *arguments: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = dict(os.environ)
    if path is not None:
        environment["PYTHONPATH"] = os.pathsep.join([str(path), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=300, env=environment, check=False
    )


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "transducer_loss", *arguments], capture_output=True, text=True, timeout=300, check=False
    )


def test_info_as_json_is_one_object_and_nothing_else() -> None:
    done = command("info", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["transducer_loss"] == transducer_loss.__version__
    assert found["host"]["library"] in (*processors.LEVELS, "native")
    assert found["host"]["threads"] == processors.default_threads()
    assert [blas["threads"] for blas in found["host"]["blas"]]
    assert found["cuda"]["usable"] == bool(found["cuda"]["devices"])
    assert found["cuda"]["usable"] == (found["cuda"]["reason"] == "")
    assert set(found["frameworks"]) == set(info.FRAMEWORKS)
    if importlib.util.find_spec("torch"):
        assert found["frameworks"]["torch"] == importlib.metadata.version("torch")


def test_info_as_a_table() -> None:
    done = command("info")
    assert done.returncode == 0, done.stderr
    for word in ("transducer_loss", transducer_loss.__version__, "host library", "CUDA", "torch"):
        assert word in done.stdout


def test_check_as_json_is_one_object_and_nothing_else() -> None:
    done = command("check", "--device", "cpu", "--json")
    assert done.returncode == 0, done.stdout
    found = json.loads(done.stdout)
    assert (found["device"], found["passed"], found["failed"]) == ("cpu", True, 0)
    called = {(row["function"], row["topology"], row["dtype"], row["variant"]) for row in found["rows"]}
    lattices = 3 * (7 + 8 + 4)  # topologies, variants of each loss
    assert len(called) == len(found["rows"]) == 4 * (lattices + 2 + 3 + 2 + 1 + 2 + 3)  # dtypes, variants of the others
    # An error of exactly zero everywhere would mean that the reference was compared with itself. Some backlogs are exact.
    exact = {("edit_distance", name) for name in ("plain", "blank")} | {("amortized_backlog", "last")}
    for row in found["rows"]:
        assert row["gradient_error"] <= row["gradient_budget"]
        if row["dtype"] != "float64" or row["topology"]:
            assert (row["gradient_error"] == 0) == ((row["function"], row["variant"]) in exact)
    assert "checking joint_rnnt_loss constrained hat" in done.stderr


@pytest.mark.parametrize("arguments", [[], ["chekc"], ["check", "--dtype", "int8"], ["check", "--device", "gpu"]])
def test_what_it_does_not_know_is_status_2_and_leaves_stdout_empty(arguments: list[str]) -> None:
    done = command(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert "python -m transducer_loss" in done.stderr


def test_works_without_rich_and_cupy() -> None:
    done = python(WITHOUT_RICH_AND_CUPY, "info")
    assert done.returncode == 0, done.stderr
    lines = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert lines["CUDA"] == "CuPy is not installed; the extras cuda12 and cuda13 bring it."
    assert done.stdout.isascii()  # rich would draw a box

    done = python(WITHOUT_RICH_AND_CUPY, "check", *QUICK)
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii()
    assert done.stdout.splitlines()[-1] == "cpu: 21 of 21 passed"

    done = python(WITHOUT_RICH_AND_CUPY, "check", "--device", "cuda:0", "--json", *QUICK)
    assert (done.returncode, done.stdout) == (2, "")
    assert "device: expected a usable CUDA device, got 'cuda:0': CuPy is not installed" in done.stderr


@pytest.fixture
def traps(tmp_path: Path) -> Path:
    """A folder of packages that leave a mark when they are imported, and of their metadata."""
    for name in ("torch", "tensorflow", "keras", "jax", "cupy"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'a').write('{name} ')\n")
        metadata = tmp_path / f"{name}-0.12.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.12\n")
        (metadata / "top_level.txt").write_text(f"{name}\n")
    return tmp_path


def test_the_traps_spring(traps: Path) -> None:
    assert python("import jax, cupy, tensorflow", path=traps).returncode == 0
    assert (traps / "mark").read_text() == "jax cupy tensorflow "


USE = """
import numpy, transducer_loss
logits = numpy.zeros((1, 4, 3, 5), numpy.float32)
transducer_loss.rnnt_loss(logits, [[1, 2]], [4], [2])
transducer_loss.joint_rnnt_loss(logits[:, :, 0], logits[:, 0], numpy.ones((7, 5), "f4"), None, [[1, 2]], [4], [2])
transducer_loss.occupancy(logits, [[1, 2]], [4], [2])
transducer_loss.align(logits, [[1, 2]], [4], [2])
"""


@pytest.mark.parametrize("code", ["import transducer_loss", USE])
def test_import_and_use_with_numpy_import_no_framework(code: str, traps: Path) -> None:
    done = python(code, path=traps)
    assert done.returncode == 0, done.stderr
    assert not (traps / "mark").exists()


def test_info_and_check_import_no_framework_but_cupy(traps: Path) -> None:
    done = python(MAIN, "info", "--json", path=traps)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["frameworks"] == {name: "0.12" for name in info.FRAMEWORKS}
    assert (traps / "mark").read_text() == "cupy "

    (traps / "mark").unlink()
    done = python(MAIN, "check", "--device", "cpu", *QUICK, path=traps)
    assert done.returncode == 0, done.stderr
    assert not (traps / "mark").exists()


Wrong = Callable[..., tuple[Any, Any]]


def wrong(of: str, spoil: Callable[..., Any]) -> Wrong:
    """A loss whose results go through ``spoil(loss, gradient, keywords)``, which returns both."""
    right = getattr(transducer_loss, of)

    @functools.wraps(right)
    def loss(*inputs: Any, **options: Any) -> Any:
        return spoil(*right(*inputs, **options), options)

    return loss


def failing(function: str, dtype: str = "float32") -> list[check.Row]:
    return [row for row in check.check("cpu", functions=[function], dtypes=[dtype]) if not row.passed]


def with_nan(array: Any) -> Any:
    array = array.copy()
    array.flat[-1] = np.nan  # the last cell of a padded batch, or the last feature of padded rows
    return array


def one_more_frame(array: Any) -> Any:
    return np.concatenate([array, array[:, :1] * 0], axis=1)


def raises(*_: Any) -> Any:
    raise RuntimeError("no such kernel")


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda loss, grad, _: (loss * np.float32(1 + 4e-6), grad), id="loss"),
        pytest.param(lambda loss, grad, _: (loss, grad * np.float32(1 + 1e-5)), id="gradient"),
        pytest.param(lambda loss, grad, _: (loss, with_nan(grad)), id="nan"),
        pytest.param(lambda loss, grad, _: (loss, one_more_frame(grad)), id="shape"),
        pytest.param(lambda loss, grad, _: (loss[:1], grad), id="loss shape"),
        pytest.param(raises, id="raises"),
    ],
)
def test_a_slightly_wrong_loss_fails_every_row(spoil: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert not failing("rnnt_loss")
    monkeypatch.setattr(transducer_loss, "rnnt_loss", wrong("rnnt_loss", spoil))
    assert len(failing("rnnt_loss")) == 3 * len(check_cases.VARIANTS_OF["rnnt_loss"])


@pytest.mark.parametrize(
    ("gradient", "dtype", "factor"),
    [
        ("encoder", "float16", 1.002),
        ("predictor", "bfloat16", 1.016),
        ("weight", "float32", 1 + 1e-5),
        ("bias", "float64", 1 + 1e-12),
    ],
)
def test_every_gradient_of_the_joint_is_compared(
    gradient: str, dtype: str, factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(loss: Any, grads: Any, _: Any) -> Any:
        array = getattr(grads, gradient)
        changed = {name: getattr(grads, name) for name in ("encoder", "predictor", "weight", "bias")}
        changed[gradient] = (array.astype(np.float64) * factor).astype(array.dtype)
        return loss, SimpleNamespace(**changed)

    monkeypatch.setattr(transducer_loss, "joint_rnnt_loss", wrong("joint_rnnt_loss", spoil))
    assert len(failing("joint_rnnt_loss", dtype)) == 3 * len(check_cases.VARIANTS_OF["joint_rnnt_loss"])


@pytest.mark.parametrize(
    ("option", "value", "rows"),
    [("fastemit_lambda", 0.0, {"fastemit"}), ("delay_penalty", 0.0, {"delay penalty"}), ("hat", False, {"hat"})],
)
def test_a_loss_that_ignores_an_option_fails_its_rows_alone(
    option: str, value: Any, rows: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = transducer_loss.rnnt_loss
    monkeypatch.setattr(transducer_loss, "rnnt_loss", lambda *inputs, **options: right(*inputs, **{**options, option: value}))
    assert {row.variant for row in failing("rnnt_loss")} == rows


@pytest.mark.parametrize(
    ("option", "rows"), [("band", {"band", "band and classes"}), ("classes", {"classes", "band and classes"})]
)
def test_a_joint_that_ignores_its_band_or_classes_fails_their_rows_alone(
    option: str, rows: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = transducer_loss.joint_rnnt_loss
    monkeypatch.setattr(
        transducer_loss, "joint_rnnt_loss", lambda *inputs, **options: right(*inputs, **{**options, option: None})
    )
    found = failing("joint_rnnt_loss")
    assert {row.variant for row in found} == rows
    assert len(found) == 3 * len(rows)


def test_a_joint_that_takes_each_utterances_own_encoder_fails_its_rows_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    right = transducer_loss.joint_rnnt_loss

    def own(encoder: Any, *inputs: Any, encoder_index: Any = None, **options: Any) -> Any:
        order = None if encoder_index is None else sorted(encoder_index)
        return right(encoder, *inputs, encoder_index=order, **options)

    monkeypatch.setattr(transducer_loss, "joint_rnnt_loss", own)
    found = failing("joint_rnnt_loss")
    assert {row.variant for row in found} == {"shared encoders"}


@pytest.mark.parametrize(
    ("function", "option", "rows"),
    [
        ("edit_distance", "blank", {"blank"}),
        ("embr_loss", "temperature", {"repeated hypotheses"}),
        ("embr_loss", "hypotheses", {"repeated hypotheses"}),
        ("embr_loss", "interpolation", {"reference"}),
        ("embr_loss", "weights", {"plain", "repeated hypotheses", "reference"}),
        ("amortized_cost", "weights", {"plain"}),
        ("amortized_backlog", "frame_period", {"mean", "last"}),
        ("amortized_backlog", "statistic", {"last"}),
        ("gumbel_gate", "seed", {"soft", "hard"}),
        ("gumbel_gate", "hard", {"hard"}),
        ("gumbel_gate_backward", "temperature", {"without noise"}),
        ("gumbel_gate_backward", "seed", {"soft", "hard"}),
    ],
)
def test_one_that_ignores_an_option_fails_its_rows_alone(
    function: str, option: str, rows: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = getattr(transducer_loss, function)

    def wrong(*inputs: Any, **options: Any) -> Any:
        return right(*inputs, **{key: value for key, value in options.items() if key != option})

    assert not failing(of := function.removesuffix("_backward"))
    monkeypatch.setattr(transducer_loss, function, wrong)
    assert {row.variant for row in failing(of)} == rows


@pytest.mark.parametrize(
    ("function", "results"),
    [
        ("edit_distance", 1), ("embr_loss", 2), ("reduced_predictor", 3), ("amortized_cost", 2), ("amortized_backlog", 2),
        ("gumbel_gate", 2),
    ],
)  # fmt: skip
def test_every_result_of_the_others_is_compared(function: str, results: int, monkeypatch: pytest.MonkeyPatch) -> None:
    right = check_cases.Case.system
    for which in range(results):

        def spoiled(self: Any, function: str, variant: str, which: int = which) -> check_systems.System:
            of = right(self, function, variant)

            def run(*arguments: Any) -> Any:
                value, gradients = of.run(*arguments)
                every = [value, *gradients]
                array = every[which].copy()
                array[-1] += 1 if array.dtype.kind == "i" else 1e-4 * abs(array[-1])
                every[which] = array
                return every[0], tuple(every[1:])

            return dataclasses.replace(of, run=run)

        monkeypatch.setattr(check_cases.Case, "system", spoiled)
        assert len(failing(function)) == len(check_cases.VARIANTS_OF[function])


@pytest.mark.parametrize("other", [{"seed": 1}, {"correction": False}])
def test_other_classes_or_no_correction_fail_their_rows_alone(other: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert not failing("joint_rnnt_loss")  # what is expected is known, and kept, from here on
    right = check_cases.sample_classes
    monkeypatch.setattr(check_cases, "sample_classes", lambda *inputs, **options: right(*inputs, **{**options, **other}))
    assert {row.variant for row in failing("joint_rnnt_loss")} == {"classes", "band and classes"}


@pytest.mark.parametrize("small", [True, False])
def test_both_ways_of_the_joint_are_compared(small: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(loss: Any, grads: Any, options: Any) -> Any:
        return (loss * 1.001 if (options["workspace"] is not None) == small else loss), grads

    monkeypatch.setattr(transducer_loss, "joint_rnnt_loss", wrong("joint_rnnt_loss", spoil))
    assert len(failing("joint_rnnt_loss")) == 3 * len(check_cases.VARIANTS_OF["joint_rnnt_loss"])


def test_a_failing_check_is_status_1() -> None:
    code = """
import sys, transducer_loss
from transducer_loss.__main__ import main
right = transducer_loss.rnnt_loss
def wrong(*inputs, topology, **options):
    if topology == "modified":
        raise RuntimeError("no such kernel")
    loss, gradient = right(*inputs, topology=topology, **options)
    return loss, gradient * 1.001 if topology == "constrained" else gradient
transducer_loss.rnnt_loss = wrong
sys.exit(main(sys.argv[1:]))
"""
    done = python(code, "check", "--device", "cpu", *QUICK, "--json")
    assert done.returncode == 1, done.stderr
    found = json.loads(done.stdout)
    assert (found["passed"], found["failed"]) == (False, 14)
    verdicts = {(row["topology"], row["passed"], row["problem"], row["loss_error"] is None) for row in found["rows"]}
    assert verdicts == {
        ("regular", True, "", False),
        ("modified", False, "RuntimeError: no such kernel", True),
        ("constrained", False, "", False),
    }

    done = python(code, "check", "--device", "cpu", *QUICK)
    assert done.returncode == 1
    assert "FAILED" in done.stdout
    assert done.stdout.splitlines()[-1] == "cpu: 7 of 21 passed"


def test_every_function_is_checked() -> None:
    public = {name for name in transducer_loss.__all__ if name.islower()}
    with_them = {"gumbel_gate_backward", "reduced_predictor_backward", "sample_classes"}  # as parts of rows of others
    of_lattices = {"align", "explain", "gather_predictor", "gather_predictor_backward", "labels_in", "occupancy", "plan", "prune"}
    assert set(check.FUNCTIONS) == public - with_them - of_lattices


@pytest.mark.parametrize("arguments", [{"functions": ["ctc_loss"]}, {"dtypes": ["int8"]}, {"device": "cuda:x"}])
def test_arguments_of_check_are_named_in_errors(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(arguments))}: expected .*, got '"):
        check.check(**arguments)


class FakeRuntimeError(Exception):
    pass


def fake_cupy(**changes: Any) -> SimpleNamespace:
    properties = {"name": b"A GPU", "totalGlobalMem": 8 << 30, "major": 8, "minor": 6}
    runtime = {
        "runtimeGetVersion": lambda: 12040,
        "driverGetVersion": lambda: 13000,
        "getDeviceCount": lambda: 1,
        "getDeviceProperties": lambda index: properties,
    }
    nvrtc = SimpleNamespace(getVersion=changes.pop("nvrtc", lambda: (12, 4)))
    return SimpleNamespace(
        __version__="14.2.0", cuda=SimpleNamespace(runtime=SimpleNamespace(**{**runtime, **changes}), nvrtc=nvrtc)
    )


def fails(message: str) -> Callable[[], int]:
    def function() -> int:
        raise FakeRuntimeError(message)

    return function


def test_a_usable_gpu_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy())
    assert info.cuda() == {
        "usable": True,
        "reason": "",
        "cupy": "14.2.0",
        "runtime": "12.4",
        "nvrtc": "12.4",
        "driver": "13.0",
        "devices": [{"index": 0, "name": "A GPU", "memory": 8 << 30, "compute_capability": "8.6"}],
    }


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"driverGetVersion": lambda: 0}, "There is no NVIDIA driver."),
        ({"getDeviceCount": lambda: 0}, "There is no CUDA device."),
        ({"getDeviceCount": fails("cudaErrorNoDevice: no CUDA-capable device is detected")},
         "cudaErrorNoDevice: no CUDA-capable device is detected."),
        ({"nvrtc": fails("\n====\nlibnvrtc is missing\ndetails")}, "libnvrtc is missing."),
    ],
)  # fmt: skip
def test_an_unusable_gpu_has_a_reason_in_one_sentence(
    changes: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy(**changes))
    found = info.cuda()
    assert (found["usable"], found["reason"]) == (False, reason)


def test_a_cupy_that_cannot_be_imported_has_a_reason(tmp_path: Path) -> None:
    (tmp_path / "cupy.py").write_text("raise ImportError('\\n=====\\nCuPy is not correctly installed\\n\\nlong story')")
    done = python(MAIN, "info", "--json", path=tmp_path)
    assert json.loads(done.stdout)["cuda"]["reason"] == "CuPy cannot be imported: CuPy is not correctly installed."


@pytest.mark.parametrize(
    ("flags", "level", "better"),
    [
        ("v3 v4", "v4", {}),
        ("v3", "v3", {"v4": "this processor has no avx512bw, avx512cd, avx512dq, avx512f, avx512vl"}),
        ("v3 v4", "v3", {"v4": "not built"}),
    ],
)
def test_a_lower_level_of_the_host_library_has_a_reason(
    flags: str, level: str, better: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    known = set().union(*(processors._FEATURES[name] for name in flags.split()))
    monkeypatch.setattr(processors, "_processor_flags", lambda: known)
    monkeypatch.setattr(processors, "host_library", lambda: SimpleNamespace(path=f"/x/_host_{level}.abi3.so"))
    if "not built" in better.values():
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    found = info.host()
    assert (found["library"], found["better"]) == (level, better)


def test_a_missing_host_library_has_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processors, "host_library", fails_to_load)
    found = info.host()
    assert (found["library"], found["reason"]) == (None, "no library")


def fails_to_load() -> None:
    raise RuntimeError("no library")
