"""The frameworks beside the library: it imports none of them by itself, and shares a process with all, loaded in any order."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from helpers import run_python

FRAMEWORKS = ("torch", "tensorflow", "keras", "jax", "cupy", "matplotlib")

LOADED = f"""
    import json, sys
    print(json.dumps([name for name in {FRAMEWORKS} if name in sys.modules]))
"""

EVERY_LOSS = """
    import numpy as np, transducer_loss as tl
    from transducer_loss import plot
    rng = np.random.default_rng(0)
    encoder, predictor, weight = (rng.normal(size=shape).astype("f") for shape in ((2, 6, 4), (2, 4, 4), (9, 4)))
    integers = rng.integers(1, 9, (2, 3)), [6, 5], [3, 2]
    _, _, occupancy = tl.simple_rnnt_loss(encoder @ weight.T, predictor @ weight.T, *integers)
    band = tl.prune(occupancy, *integers[1:], s_range=2)
    classes = tl.sample_classes(integers[0], integers[2], vocab_size=9, num_samples=2)
    tl.joint_rnnt_loss(encoder, predictor, weight, None, *integers, band=band, classes=classes)
    tl.rnnt_loss(rng.normal(size=(2, 6, 4, 9)), *integers)
    tl.plan(B=2, T=6, U=3, V=9, H=4)
"""


def loaded_by(code: str) -> list[str]:
    """Which frameworks a program has imported by its end."""
    loaded: list[str] = run_python(f"{code}\n{LOADED}")
    return loaded


@pytest.mark.parametrize("code", ["    import transducer_loss", EVERY_LOSS], ids=["import", "use"])
def test_numpy_needs_no_framework(code: str) -> None:
    assert loaded_by(code) == []


@pytest.mark.parametrize("name", ["torch", "cupy"])
def test_an_import_would_be_seen(name: str) -> None:
    """By the test above, which else could not fail."""
    assert name in loaded_by(f"{EVERY_LOSS}\n    import {name}")


@pytest.mark.parametrize("name", ["torch", "tensorflow", "keras", "jax", "lightning"])
def test_an_adapter_imports_no_other_framework(name: str) -> None:
    """But for those that its own does: TensorFlow, for one, looks for JAX."""
    wanted = {"keras": "tensorflow, keras", "lightning": "lightning.pytorch"}.get(name, name)
    assert loaded_by(f"    import transducer_loss.adapters.{name}") == loaded_by(f"    import {wanted}")


# Each uses a framework's own threads, then the loss by way of its adapter.
USES = {
    "torch": """
        import torch
        from transducer_loss.adapters.torch import rnnt_loss
        x = torch.randn(300, 300)
        (x @ x).sum().item()
        logits = torch.randn(2, 5, 3, 7, requires_grad=True)
        rnnt_loss(logits, torch.tensor([[1, 2], [3, 4]]), [5, 4], [2, 1]).backward()
        assert logits.grad.isfinite().all()
    """,
    "tensorflow": """
        import tensorflow as tf
        from transducer_loss.adapters.tensorflow import rnnt_loss
        x = tf.random.normal((300, 300))
        tf.reduce_sum(x @ x).numpy()
        logits = tf.Variable(tf.random.normal((2, 5, 3, 7)))
        with tf.GradientTape() as tape:
            loss = rnnt_loss(logits, tf.constant([[1, 2], [3, 4]]), [5, 4], [2, 1])
        assert tf.reduce_all(tf.math.is_finite(tape.gradient(loss, logits)))
    """,
    "jax": """
        import jax, jax.numpy as jnp
        from transducer_loss.adapters.jax import rnnt_loss
        x = jnp.ones((300, 300))
        (x @ x).block_until_ready()
        logits = jax.random.normal(jax.random.key(0), (2, 5, 3, 7))
        targets, frames, labels = jnp.array([[1, 2], [3, 4]]), jnp.array([5, 4]), jnp.array([2, 1])
        gradient = jax.jit(jax.grad(lambda logits: rnnt_loss(logits, targets, frames, labels).sum()))(logits)
        assert jnp.isfinite(gradient).all()
    """,
    "transducer_loss": "        import transducer_loss as tl",
}

SPEED = """
        import json, time
        import numpy as np, transducer_loss as tl

        rng = np.random.default_rng(0)
        encoder, predictor, weight = (rng.normal(size=shape).astype("f") for shape in ((4, 60, 64), (4, 16, 64), (200, 64)))
        arguments = encoder, predictor, weight, None, rng.integers(1, 200, (4, 15)), [60] * 4, [15] * 4
        times = []
        while len(times) < 60:
            begun = time.perf_counter()
            tl.joint_rnnt_loss(*arguments)
            times.append(time.perf_counter() - begun)
        print(json.dumps(min(times)))
"""


def seconds_of_a_loss(order: tuple[str, ...]) -> float:
    """The fastest of many calls, in a process that has loaded and used the libraries in that order."""
    seconds: float = run_python("\n".join(USES[name] for name in order) + SPEED)
    return seconds


ORDER = tuple(USES)
ORDERS: list[Any] = [
    pytest.param(order, id=" ".join(order), marks=[] if order in (ORDER, ORDER[::-1]) else pytest.mark.slow)
    for order in itertools.permutations(ORDER)
]


@pytest.mark.parametrize("order", ORDERS)
def test_one_process_in_any_order(order: tuple[str, ...]) -> None:
    """No crash, and no OpenMP runtime or pool of threads that takes more than a sixth of the loss's time away."""
    ratios = []
    while len(ratios) < 5 and not any(ratio <= 1.2 for ratio in ratios):  # a machine that is busy has moments that are not
        together = seconds_of_a_loss(order)
        ratios.append(together / seconds_of_a_loss(("transducer_loss",)))
    assert min(ratios) <= 1.2
