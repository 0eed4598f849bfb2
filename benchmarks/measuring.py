"""One scenario by one implementation, in a process of its own.

``python -m transducer_loss.benchmarks.measuring time|check SUITE SCENARIO IMPLEMENTATION DEVICE`` prints a JSON object.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from transducer_loss.benchmarks import floors
from transducer_loss.benchmarks.implementations import Case, Result, load
from transducer_loss.benchmarks.scenarios import Scenario, named

REPEATS, SECONDS = 7, 6.0
# Beyond so many operations float64 would take minutes even on a GPU: results are compared with float32's.
MOST_OPERATIONS = 10**15


def seconds(run: Callable[[], Any], device: str) -> float:
    """Time one run: by events on a GPU."""
    if device == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun


def timed(scenario: Scenario, step: Callable[[], Result], device: str) -> dict[str, Any]:
    """Seconds of every run, in turns with what the machine can do at that moment, and the floor that follows."""
    work = floors.work(scenario)
    rates: dict[str, tuple[Callable[[], None], int]] = {"copy": floors.copying(device)}
    if work.operations:
        rates["products"] = floors.products(scenario, work.classes, device)
    times: dict[str, list[float]] = {"step": [], **{name: [] for name in rates}}
    begun = time.perf_counter()
    while not times["step"] or (len(times["step"]) < REPEATS and time.perf_counter() - begun < SECONDS):
        # Each is run once before the run that counts: threads of the one before spin for a while after their work.
        for name, run in {"step": step, **{name: run for name, (run, _) in rates.items()}}.items():
            run()
            times[name].append(seconds(run, device))
    rate = {name: amount / sorted(times[name])[len(times[name]) // 2] for name, (_, amount) in rates.items()}
    floor = max(work.bytes / rate["copy"], work.operations / rate.get("products", 1.0))
    return {"seconds": times["step"], "floor": floor, "bytes_per_second": rate["copy"], "flops": rate.get("products")}


class Peak:
    """Bytes at the peak of a call beyond what was there before: of the allocator on a GPU, of the process on the host."""

    def __init__(self, device: str) -> None:
        self.on_gpu = device == "cuda"
        self.bytes = 0

    def __enter__(self) -> Peak:
        gc.collect()
        if self.on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is resident now
            self.before = _kilobytes("VmRSS") << 10
        return self

    def __exit__(self, *details: object) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() if self.on_gpu else _kilobytes("VmHWM") << 10
        self.bytes = peak - self.before


def _kilobytes(field: str) -> int:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[field].split()[0])


def relative(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """Norm of the difference by that of what is wanted."""
    wanted = wanted.double()
    return float((got.double() - wanted).norm() / wanted.norm().clamp_min(1e-300))


def checked(case: Case, step: Callable[[], Result], device: str) -> dict[str, Any]:
    """Peak memory of a step, its results included, and how far these are from those in a wider dtype."""
    step()
    begun = time.perf_counter()
    with Peak(device) as peak:
        loss, gradients = step()
    took = time.perf_counter() - begun
    task = "joint" if case.scenario.task == "samplewise" else case.scenario.task
    exact = load("fused" if task == "logits" else "every_cell")
    dtype = torch.float64 if floors.work(case.scenario).operations <= MOST_OPERATIONS else torch.float32
    wanted, wanted_gradients = exact.TASKS[task](case.exact(dtype))()
    return {
        "compared_with": str(dtype).removeprefix("torch."),
        "took": took,
        "peak": peak.bytes,
        "results": sum(each.numel() * each.element_size() for each in gradients.values()),
        "loss_error": relative(loss, wanted),
        "gradient_error": max(relative(gradients[name].to_dense(), each.to_dense()) for name, each in wanted_gradients.items()),
    }


def main(arguments: list[str]) -> None:
    """Measure what the arguments say."""
    what, suite, name, implementation, device = arguments
    torch.backends.cuda.matmul.allow_tf32 = False
    case = Case.of(named(suite, name), device)
    step = load(implementation).TASKS[case.scenario.task](case)
    print(json.dumps(timed(case.scenario, step, device) if what == "time" else checked(case, step, device)))


if __name__ == "__main__":
    main(sys.argv[1:])
