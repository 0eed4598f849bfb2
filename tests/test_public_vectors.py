"""The inputs and expected values that other transducer losses publish in their tests.

`vectors.json` holds them, numbers only, with the place each comes from in `source`. Fields: `logits`
(B, T, U + 1, V), not normalised; `T_len`, `U_len`, `targets`, `blank`; `expected_cost` (B,); `expected_grads`
of the shape of the logits, by what `grad_wrt` says: `logits`, or `log_probs`, the output of a log_softmax.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import transducer_loss
from transducer_loss import reference

F8 = npt.NDArray[np.float64]
Loss = Callable[..., tuple[Any, Any]]

# Absolute tolerance of costs and of gradients: one unit of the last decimal that was published (some are cut
# there, not rounded), or where more decimals were printed than the float32 behind them has, its rounding.
# An occupancy is exp(alpha + weight + beta + loss), so the rounding of the cost is that of the gradients too.
FLOAT64 = 1e-12  # published or computed in float64, sums of some dozens of terms
PRECISION: dict[str, tuple[float, float]] = {
    "wt_small": (1e-6, 2.5e-7),  # cost to 6 decimals; gradients to 8, of a float32: two units at 1
    "wt_big": (FLOAT64, 2.5e-7),  # cost to 15 decimals; gradients in float32
    "wt_tf_batches": (1e-6, 1e-6),  # the logits of wt_big rounded to 6 decimals, its cost; gradients to 6
    "wt_cpp_options": (1e-6, 1e-6),  # as the one above
    "torchaudio_B1_T2_U3_D5": (5e-7, 5e-7),  # printed from float32, whose unit is 4.8e-7 at 5
    "warp_rnnt_one_to_many": (FLOAT64, FLOAT64),
    "warp_rnnt_one_to_empty": (FLOAT64, FLOAT64),
    "warp_rnnt_forward_single": (1e-6, FLOAT64),  # cost to 6 decimals
    "warp_rnnt_forward_batch": (FLOAT64, 1e-8),  # gradients of the second utterance to 8 decimals
    "nemo_k2_blank_last": (5e-7, 5e-7),  # printed from float32, as torchaudio's
    "nemo_clamp_0.1": (1e-6, 5e-8),  # cost to 6 decimals; gradients, all below 0.1, to 8 of a float32
    "nemo_fastemit_1.0": (2e-6, 0.0),  # (1 + lambda) times a cost to 6 decimals; no gradients published
    "nemo_fastemit_0.01": (1.01e-6, 0.0),
    "nemo_fastemit_1e-05": (1.00001e-6, 0.0),
    "k2_basic": (FLOAT64, FLOAT64),
    "nemo_small_random": (FLOAT64, FLOAT64),
    "nemo_large_random": (FLOAT64, FLOAT64),
}

VECTORS = Path(__file__).parent / "vectors.json"
ALL: list[dict[str, Any]] = json.loads(VECTORS.read_text(encoding="utf-8"))["tests"]
# A token-and-duration transducer skips frames by a second softmax over durations: a lattice we do not offer.
CASES = [case for case in ALL if case["kind"] != "tdt"]
WITH_GRADIENT = [case for case in CASES if case["expected_grads"] is not None]
BY_LOG_PROBS = [case for case in WITH_GRADIENT if case["grad_wrt"] == "log_probs"]

every_implementation = pytest.mark.parametrize(
    "loss", [pytest.param(reference.rnnt_loss, id="reference"), pytest.param(transducer_loss.rnnt_loss, id="transducer_loss")])


def cases(chosen: list[dict[str, Any]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", [pytest.param(case, id=case["id"]) for case in chosen])


def log_softmax(x: F8) -> F8:
    return np.asarray(x - np.logaddexp.reduce(x, axis=-1, keepdims=True))


def run(loss: Loss, case: dict[str, Any], *, normalized: bool = False) -> tuple[F8, F8]:
    """Loss and gradient by the logits, or by log-probabilities if `normalized`."""
    logits = np.array(case["logits"], dtype=np.float64)
    value, grad = loss(
        log_softmax(logits) if normalized else logits,
        np.array(case["targets"], dtype=np.int64).reshape(len(logits), -1),
        np.array(case["T_len"], dtype=np.int64),
        np.array(case["U_len"], dtype=np.int64),
        blank=case["blank"],
        normalized=normalized,
        fastemit_lambda=case.get("fastemit_lambda", 0.0),
    )
    assert value.dtype == grad.dtype == np.float64
    return value, grad


def test_every_vector_is_used_or_left_out_for_a_reason() -> None:
    assert {case["kind"] for case in ALL} == {"rnnt", "clamp", "fastemit", "tdt"}
    assert len(CASES) == len(PRECISION) == 17
    assert {case["id"] for case in CASES} == set(PRECISION)
    assert {case["id"] for case in CASES} - {case["id"] for case in WITH_GRADIENT} == {
        case["id"] for case in CASES if case["kind"] == "fastemit"}


@every_implementation
@cases(CASES)
def test_cost(case: dict[str, Any], loss: Loss) -> None:
    value, _ = run(loss, case)
    # Others report (1 + lambda) times the likelihood with FastEmit; our loss stays the likelihood.
    scale = 1.0 + case.get("fastemit_lambda", 0.0)
    np.testing.assert_allclose(scale * value, case["expected_cost"], rtol=0, atol=PRECISION[case["id"]][0])


@every_implementation
@cases(WITH_GRADIENT)
def test_gradient(case: dict[str, Any], loss: Loss) -> None:
    _, grad = run(loss, case, normalized=case["grad_wrt"] == "log_probs")
    if case["kind"] == "clamp":  # warp-transducer clamps each utterance's gradient before any scaling
        assert np.abs(grad).max() > case["clamp"]
        grad = np.clip(grad, -case["clamp"], case["clamp"])
    np.testing.assert_allclose(grad, case["expected_grads"], rtol=0, atol=PRECISION[case["id"]][1])


@every_implementation
@cases(BY_LOG_PROBS)
def test_gradient_through_log_softmax(case: dict[str, Any], loss: Loss) -> None:
    _, grad = run(loss, case)
    published = np.array(case["expected_grads"])
    logp = log_softmax(np.array(case["logits"], dtype=np.float64))
    expected = published - np.exp(logp) * published.sum(axis=-1, keepdims=True)
    # An entry of the sum and the entry itself both carry the error that was published.
    np.testing.assert_allclose(grad, expected, rtol=0, atol=2 * PRECISION[case["id"]][1])
