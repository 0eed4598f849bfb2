"""What is installed and usable, found out without importing a framework."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import platform
import re
from typing import Any

import numpy as np
import threadpoolctl

import transducer_loss
from transducer_loss import processors

FRAMEWORKS = ("torch", "tensorflow", "keras", "jax")


def host() -> dict[str, Any]:
    """Describe the host processor: its library, threads and BLAS.

    Returns
    -------
    dict
        ``library``, the level of the host library (None without one, with the ``reason``); ``better``, the higher levels with
        the reason why each is not in use; ``threads``; ``numpy``; ``blas``, a list of name, version and threads.

    Examples
    --------
    >>> host()["threads"] >= 1
    True
    """
    level, reason = None, ""
    try:
        found = re.search(r"_host_([a-z0-9]+)\.", processors.host_library().path)
        level = found[1] if found else "unknown"
    except (RuntimeError, OSError) as error:
        reason = str(error)
    blas = [
        {"name": library["internal_api"], "version": library["version"], "threads": library["num_threads"]}
        for library in threadpoolctl.threadpool_info() if library["user_api"] == "blas"
    ]  # fmt: skip
    return {
        "library": level, "reason": reason, "better": _better_than(level), "threads": processors.default_threads(),
        "numpy": np.__version__, "blas": blas,
    }  # fmt: skip


def _better_than(level: str | None) -> dict[str, str]:
    """Why each level above the one in use is not in use."""
    flags, reasons = processors._processor_flags(), {}
    for better in processors.LEVELS:
        if level in (better, "native"):
            break
        lower = processors.LEVELS[processors.LEVELS.index(better) :]
        missing = sorted(set().union(*(processors._FEATURES[name] for name in lower)) - flags)
        built = importlib.util.find_spec(f"transducer_loss._host_{better}") is not None
        reasons[better] = f"this processor has no {', '.join(missing)}" if missing else "not loaded" if built else "not built"
    return reasons


def cuda() -> dict[str, Any]:
    """Describe CUDA as CuPy sees it. Imports CuPy.

    Returns
    -------
    dict
        ``usable``, and the ``reason`` where it is not; versions of ``cupy``, of the ``runtime``, of the compiler ``nvrtc`` and
        of the newest CUDA that the ``driver`` supports (None where unknown); ``devices``, a list of index, name, memory in
        bytes and compute_capability.

    Examples
    --------
    >>> found = cuda()
    >>> found["usable"] == (not found["reason"])
    True
    """
    found: dict[str, Any] = {
        "usable": False, "reason": "", "cupy": None, "runtime": None, "nvrtc": None, "driver": None, "devices": [],
    }  # fmt: skip
    try:
        import cupy
    except ModuleNotFoundError as error:
        found["reason"] = (
            "CuPy is not installed; the extras cuda12 and cuda13 bring it." if error.name == "cupy"
            else f"CuPy lacks the module {error.name}."
        )  # fmt: skip
        return found
    except Exception as error:  # CuPy's import loads CUDA's libraries, and fails in as many ways as they do
        found["reason"] = f"CuPy cannot be imported: {_sentence(error)}"
        return found
    try:
        found["cupy"], runtime = cupy.__version__, cupy.cuda.runtime
        found["runtime"] = _dotted(runtime.runtimeGetVersion())
        driver = runtime.driverGetVersion()  # 0 without a driver
        if not driver:
            found["reason"] = "There is no NVIDIA driver."
            return found
        found["driver"] = _dotted(driver)
        found["devices"] = [_device(index, runtime.getDeviceProperties(index)) for index in range(runtime.getDeviceCount())]
        found["nvrtc"] = ".".join(map(str, cupy.cuda.nvrtc.getVersion()))
    except Exception as error:  # a missing library raises RuntimeError, a runtime call CuPy's own error
        found["reason"] = _sentence(error)
        return found
    found["usable"] = bool(found["devices"])
    if not found["usable"]:
        found["reason"] = "There is no CUDA device."
    return found


def _dotted(version: int) -> str:
    """CUDA counts 12040 for 12.4."""
    return f"{version // 1000}.{version % 1000 // 10}"


def _sentence(error: Exception) -> str:
    lines = [line.strip(" =*-") for line in str(error).splitlines()]
    first = next((line for line in lines if line), type(error).__name__)
    return first if first.endswith(".") else first + "."


def _device(index: int, properties: dict[str, Any]) -> dict[str, Any]:
    name = properties["name"]
    return {
        "index": index,
        "name": name.decode() if isinstance(name, bytes) else str(name),
        "memory": int(properties["totalGlobalMem"]),
        "compute_capability": f"{properties['major']}.{properties['minor']}",
    }


@functools.cache
def _distributions() -> dict[str, list[str]]:
    return dict(importlib.metadata.packages_distributions())


def frameworks() -> dict[str, str | None]:
    """Find installed frameworks without importing them, which would take seconds and memory of the GPU.

    Returns
    -------
    dict
        Version by name, None for what is not installed.

    Examples
    --------
    >>> sorted(frameworks())
    ['jax', 'keras', 'tensorflow', 'torch']
    """
    versions: dict[str, str | None] = {}
    for name in FRAMEWORKS:
        versions[name] = None
        if importlib.util.find_spec(name) is not None:
            # The distribution may have another name, as tensorflow-cpu.
            known = _distributions().get(name)
            versions[name] = importlib.metadata.version(known[0]) if known else "unknown"
    return versions


def describe() -> dict[str, Any]:
    """Describe everything that `python -m transducer_loss info` shows.

    Returns
    -------
    dict
        ``transducer_loss`` and ``python``, versions; ``platform``; ``host``, ``cuda`` and ``frameworks``, as of the functions
        of those names.

    Examples
    --------
    >>> list(describe())
    ['transducer_loss', 'python', 'platform', 'host', 'cuda', 'frameworks']
    """
    return {
        "transducer_loss": transducer_loss.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": host(),
        "cuda": cuda(),
        "frameworks": frameworks(),
    }
