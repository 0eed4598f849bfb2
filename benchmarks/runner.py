"""Every scenario of a suite by everyone who can compute it, each in a fresh process, in turns."""

from __future__ import annotations

import datetime
import importlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from transducer_loss.benchmarks import implementations
from transducer_loss.benchmarks.scenarios import SUITES, Scenario

NAMES = implementations.NAMES
ROUNDS = 3
SECONDS = 900  # for one process
SLOW = 10.0  # seconds of a step that is measured in one round alone

# Relative errors beyond which results count as wrong: rounding of a sum over thousands of cells, and of products.
MOST_ERROR = {"float64": (1e-9, 1e-7), "float32": (1e-4, 1e-3), "float16": (1e-2, 2e-2), "bfloat16": (2e-2, 6e-2)}

PACKAGES = ("transducer_loss", "numpy", "torch", "torchaudio", "fast_rnnt", "optimized_transducer", "k2", "numba")


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    found: dict[str, Any] = {
        "date": datetime.date.today().isoformat(), "platform": platform.platform(), "python": platform.python_version(),
        "processors": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "processor": platform.processor(), "load": os.getloadavg() if hasattr(os, "getloadavg") else None,
        "environment": {name: os.environ[name] for name in ("OMP_NUM_THREADS", "GOMP_SPINCOUNT") if name in os.environ},
    }  # fmt: skip
    information = Path("/proc/cpuinfo")
    if information.exists():
        lines = information.read_text().splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        found["processor"] = names[0] if names else found["processor"]
    installed = {each.metadata["Name"].lower(): each.version for each in importlib.metadata.distributions()}
    found["versions"] = {
        name: version for name, version in installed.items() if name in PACKAGES or name.startswith("cupy")
    }
    return found


def present(names: Sequence[str] = NAMES) -> tuple[dict[str, Any], dict[str, str]]:
    """Import the implementations: those that can be, and why the others cannot."""
    found, absent = {}, {}
    for name in names:
        try:
            found[name] = implementations.load(name)
        except Exception as error:  # a peer built for another torch may fail in any way
            absent[name] = _first_line(f"{type(error).__name__}: {error}")
    return found, absent


def _first_line(message: str) -> str:
    """Of an error, without the folders of this machine."""
    return re.sub(r"(?<!\S)/\S*/", "", message.splitlines()[0])[:300]


def measured(what: str, suite: str, scenario: Scenario, implementation: str, device: str) -> dict[str, Any]:
    """Run one process; its error where it has none but that to say."""
    command = [sys.executable, "-m", "transducer_loss.benchmarks.measuring", what, suite, scenario.name, implementation, device]
    environment = dict(os.environ)
    if what == "check":
        environment["MALLOC_MMAP_THRESHOLD_"] = str(1 << 16)  # what is freed leaves the process, so that its peak is the call's
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False, env=environment)
    except subprocess.TimeoutExpired:
        return {"failed": f"not done in {SECONDS} s"}
    if done.returncode:
        # PyTorch writes below the error where in C++ it was raised.
        said = [line for line in done.stderr.splitlines() if re.match(r"[\w.]*(Error|Exception):", line)]
        return {"failed": _first_line(said[-1]) if said else f"exit status {done.returncode}"}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def run(
    suite: str, device: str, *, scenarios: Sequence[str] = (), peers: Sequence[str] = NAMES, rounds: int = ROUNDS,
    advance: Callable[[str, int], None] = lambda what, total: None, output: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Run a suite.

    Parameters
    ----------
    suite : str
        One of `SUITES`.
    device : {"cpu", "cuda"}
    scenarios : sequence of str
        Those whose names begin so; all by default.
    peers : sequence of str
        Files of `implementations`.
    rounds : int
        Processes that time an implementation, between those of the others.
    advance : callable
        Told what comes next, and how many processes there are in all.
    output : Path, optional
        File that gets the results, after every scenario those so far: a run that is killed leaves them.

    Returns
    -------
    dict
        ``machine``, ``absent`` and ``rows``. A row has the scenario, its name, and seconds (median, 10th and 90th percentile),
        ``floor`` in seconds, bytes beyond the inputs at the peak, and errors; ``failed`` in place of a time where it has none.
    """
    found, absent = present(peers)
    wanted = [each for each in SUITES[suite] if not scenarios or each.name.startswith(tuple(scenarios))]
    pairs = [(each, name) for each in wanted for name, module in found.items() if each.task in module.TASKS]
    total = len(pairs) * (1 + rounds)
    results: dict[str, Any] = {"suite": suite, "device": device, "machine": machine(), "absent": absent, "rows": []}
    for scenario in wanted:
        names = [name for each, name in pairs if each is scenario]
        checks, times = {}, dict[str, list[dict[str, Any]]]({name: [] for name in names})
        for name in names:
            advance(f"{scenario.name}: {found[name].NAME}, check", total)
            checks[name] = measured("check", suite, scenario, name, device)
        for round_ in range(rounds):
            for name in names:
                advance(f"{scenario.name}: {found[name].NAME}, time", total)
                failed = failure(scenario, checks[name]) is not None
                if not failed and (round_ == 0 or checks[name]["took"] < SLOW):
                    times[name].append(measured("time", suite, scenario, name, device))
        results["rows"] += [row(scenario, found[name].NAME, checks[name], times[name]) for name in names]
        if output is not None:
            part = output.with_name(output.name + ".part")
            part.write_text(json.dumps(results, indent=1))
            part.replace(output)
    return results


def failure(scenario: Scenario, check: dict[str, Any]) -> str | None:
    """Why a run may not show a time."""
    if "failed" in check:
        return str(check["failed"])
    for what, most in zip(("loss_error", "gradient_error"), MOST_ERROR[scenario.dtype], strict=True):
        if not check[what] <= most:
            return f"{what.replace('_', ' ')} {check[what]:.1e}, more than {most:g}"
    return None


def row(scenario: Scenario, name: str, check: dict[str, Any], times: list[dict[str, Any]]) -> dict[str, Any]:
    """One line of the results."""
    shown: dict[str, Any] = {
        "scenario": scenario.name, "task": scenario.task, "B T U V H": scenario.shape, "cells": scenario.cells,
        "dtype": scenario.dtype, "implementation": name, **check,
    }  # fmt: skip
    failed = failure(scenario, check) or next((each["failed"] for each in times if "failed" in each), None)
    if failed:
        return {**shown, "failed": failed}
    samples = [second for each in times for second in each["seconds"]]
    low, median, high = np.percentile(samples, [10, 50, 90]).tolist()
    for rate in ("floor", "bytes_per_second", "flops"):
        each = [one[rate] for one in times]
        shown[rate] = None if None in each else float(np.median(each))
    return {**shown, "median": median, "p10": low, "p90": high, "runs": len(samples)}
