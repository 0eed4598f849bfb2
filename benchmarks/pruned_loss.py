"""Time and memory of pruned RNN-T on the host (simple loss, band, pruned loss) beside the exact loss, and fast_rnnt.

``python -m transducer_loss.benchmarks.pruned_loss`` prints a JSON object per case. fast_rnnt, with a joiner in PyTorch, takes
part where both are importable.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import platform
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np

import transducer_loss
from transducer_loss.benchmarks.joint_loss import CASES, medians, random_case

S_RANGE = 5


def pruned(arguments: tuple[Any, ...], am: Any, lm: Any) -> tuple[Any, ...]:
    """Both losses with their gradients, as one step of training needs them."""
    *_, targets, frames, labels = arguments
    simple, simple_grads, occupancy = transducer_loss.simple_rnnt_loss(am, lm, targets, frames, labels, lm_only_scale=0.25)
    band = transducer_loss.prune(occupancy, frames, labels, s_range=S_RANGE)
    loss, grads = transducer_loss.joint_rnnt_loss(*arguments, band=band, occupancy_floor=0.0)
    return simple, simple_grads, loss, grads


def extra_megabytes(work: Callable[[], Any], returned: int) -> float:
    """Peak of what a call allocates beyond the arrays that it returns, of so many bytes."""
    work()
    tracemalloc.start()
    try:
        kept = work()
        peak = tracemalloc.get_traced_memory()[1]
        del kept
    finally:
        tracemalloc.stop()
    return (peak - returned) / 1e6


def with_fast_rnnt(arguments: tuple[Any, ...], am: Any, lm: Any) -> Callable[[], None] | None:
    """The same step by fast_rnnt and a joiner in PyTorch; None where they are not installed."""
    if importlib.util.find_spec("fast_rnnt") is None or importlib.util.find_spec("torch") is None:
        return None
    import fast_rnnt
    import torch

    *floats, targets, frames, labels = arguments
    encoder, predictor, weight, bias, am, lm = (torch.from_numpy(x).requires_grad_() for x in (*floats, am, lm))
    symbols = torch.from_numpy(targets)
    boundary = torch.tensor([[0, 0, u, t] for t, u in zip(frames, labels, strict=True)])

    def run() -> None:
        simple, (px, py) = fast_rnnt.rnnt_loss_smoothed(
            lm=lm, am=am, symbols=symbols, termination_symbol=0, lm_only_scale=0.25, am_only_scale=0.0, boundary=boundary,
            reduction="sum", return_grad=True,
        )  # fmt: skip
        ranges = fast_rnnt.get_rnnt_prune_ranges(px_grad=px, py_grad=py, boundary=boundary, s_range=S_RANGE)
        one, other = fast_rnnt.do_rnnt_pruning(am=encoder, lm=predictor, ranges=ranges)
        logits = torch.nn.functional.linear(torch.tanh(one + other), weight, bias)
        loss = fast_rnnt.rnnt_loss_pruned(
            logits=logits, symbols=symbols, ranges=ranges, termination_symbol=0, boundary=boundary, reduction="sum"
        )
        (simple + loss).backward()

    return run


def main() -> None:
    """Run all cases."""
    for name, shape in CASES.items():
        batch, frames, labels, classes, _ = shape
        arguments = random_case(*shape)
        rng = np.random.default_rng(2)
        am, lm = (rng.normal(size=(batch, rows, classes)).astype(np.float32) for rows in (frames, labels + 1))
        ours = functools.partial(pruned, arguments, am, lm)
        exact = functools.partial(transducer_loss.joint_rnnt_loss, *arguments, occupancy_floor=0.0)
        simple = functools.partial(transducer_loss.simple_rnnt_loss, am, lm, *arguments[4:], lm_only_scale=0.25)
        peer = with_fast_rnnt(arguments, am, lm)
        seconds = medians(ours, simple, exact, *([peer] if peer else []))
        outputs = sum(x.nbytes for x in arguments[:4]) + am.nbytes + lm.nbytes
        print(json.dumps({
            "case": name, "B T U V H": shape, "S": S_RANGE, "simple and pruned, s": round(seconds[0], 4),
            "of it simple, s": round(seconds[1], 4), "exact, s": round(seconds[2], 4),
            "pruned to exact": round(seconds[0] / seconds[2], 3),
            "fast_rnnt, s": round(seconds[3], 4) if peer else None,
            "pruned to fast_rnnt": round(seconds[0] / seconds[3], 3) if peer else None,
            "extra MB, simple": round(extra_megabytes(simple, am.nbytes + lm.nbytes), 1),
            "extra MB, simple and pruned": round(extra_megabytes(ours, outputs), 1),
            "MB of logits (B, T, U+1, V)": round(4e-6 * batch * frames * (labels + 1) * classes, 1),
            "machine": platform.machine(), "numpy": np.__version__,
        }))  # fmt: skip


if __name__ == "__main__":
    main()
