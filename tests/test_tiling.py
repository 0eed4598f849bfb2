"""How the fused loss is cut: a function of shapes, lengths and workspace, and never more memory than the workspace."""

import math
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import Counting, numpy_dtype
from transducer_loss import joint_loss, joint_rnnt_loss, tiling

Shape = dict[str, Any]


def problem(shape: Shape, workspace: int, seed: int = 0, **options: Any) -> tiling.Problem:
    rng = np.random.default_rng(seed)
    frames, labels, kind = shape["frames"], shape["labels"], numpy_dtype(shape["dtype"])
    encoder, predictor, weight, bias = (
        rng.normal(size=size).astype(kind)
        for size in (
            (len(frames), max(frames), shape["features"]), (len(frames), max(labels) + 1, shape["features"]),
            (shape["classes"], shape["features"]), (shape["classes"],),
        )
    )  # fmt: skip
    targets = rng.integers(0, shape["classes"], (len(frames), max(labels)))
    return joint_loss.problem(
        encoder, predictor, weight, bias, targets, frames, labels, workspace=workspace, blank=0, topology="regular",
        fastemit_lambda=0.0, delay_penalty=0.0, hat=False, infeasible="inf", **options,
    )  # fmt: skip


def least(shape: Shape) -> int:
    """The smallest workspace, as the error for a smaller one states it."""
    with pytest.raises(ValueError, match="workspace: expected at least") as raised:
        tiling.plan(problem(shape, 1))
    found = re.search(r"at least (\d+) bytes for one tile and the longest utterance, got 1$", str(raised.value))
    assert found is not None
    return int(found[1])


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    batch = draw(st.integers(1, 6))
    return {
        "frames": draw(st.lists(st.integers(1, 40), min_size=batch, max_size=batch)),
        "labels": draw(st.lists(st.integers(0, 12), min_size=batch, max_size=batch)),
        "classes": draw(st.integers(1, 80)),
        "features": draw(st.integers(1, 20)),
        "dtype": draw(st.sampled_from(["float16", "float32", "float64"])),
    }


@settings(max_examples=150)
@given(shapes(), st.sampled_from([1.0, 1.1, 1.3, 1.6, 2.0, 3.0, 5.0, 10.0, 100.0]), st.sampled_from([0.0, 1e-6]))
def test_allocations_stay_within_the_workspace(shape: Shape, more: float, floor: float) -> None:
    workspace = math.ceil(more * least(shape))
    counting = Counting()
    of = problem(shape, workspace, occupancy_floor=floor, allocate=counting)
    done = joint_loss.forward(of)
    assert done.gradients is not None
    outputs = sum(array.nbytes for array in (done.native, *done.gradients.native))
    # What a half type is widened to counts as well, but is no allocation of the framework's.
    widened = of.weight.size * 4 if of.operand != of.joint.encoder.dtype.name else 0
    assert 0 < counting.most + widened - outputs <= workspace


@settings(max_examples=150)
@given(shapes(), st.floats(1.0, 20.0))
def test_plan_is_a_function_of_shapes_and_workspace(shape: Shape, more: float) -> None:
    workspace = math.ceil(more * least(shape))
    plan = tiling.plan(problem(shape, workspace))
    assert plan == tiling.plan(problem(shape, workspace, seed=1, threads=7))
    begins, ends = zip(*plan.groups, strict=True)
    assert begins == (0, *ends[:-1])
    assert ends[-1] == len(shape["frames"])
    assert all(begin < end for begin, end in plan.groups)
    assert len(plan.retained) == len(plan.groups)
    assert plan.tile >= 1


@settings(max_examples=50)
@given(shapes())
def test_the_least_workspace_is_the_least(shape: Shape) -> None:
    smallest = least(shape)
    plan = tiling.plan(problem(shape, smallest))
    assert plan.strips == 1
    assert plan.tile <= 8
    with pytest.raises(ValueError, match=f"workspace: expected at least {smallest} bytes .* got {smallest - 1}$"):
        tiling.plan(problem(shape, smallest - 1))


@settings(max_examples=50)
@given(shapes())
def test_room_is_used(shape: Shape) -> None:
    """With plenty of room one group keeps all logits, and all strips are there."""
    plan = tiling.plan(problem(shape, 1 << 30))
    assert plan.retained == (True,)
    assert plan.strips == 8


def test_a_batch_is_cut_into_groups() -> None:
    shape = {"frames": [30, 7, 40, 1, 22, 40], "labels": [9, 2, 12, 0, 5, 1], "classes": 50, "features": 8, "dtype": "float32"}
    smallest = least(shape)
    plans = [tiling.plan(problem(shape, int(more * smallest))) for more in (1, 3, 100)]
    # The longest utterance is alone and goes without its logits, then some keep theirs, at last all.
    assert (2, 3) in plans[0].groups
    assert not plans[0].retained[plans[0].groups.index((2, 3))]
    assert len(set(plans[1].retained)) == 2
    assert plans[2].groups == ((0, 6),)
    assert plans[2].retained == (True,)


def test_copies_of_the_inputs_count() -> None:
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=size) for size in ((2, 9, 8), (2, 4, 8), (20, 8), (20,))]
    others = rng.integers(0, 20, (2, 3)), [9, 7], [3, 2]
    smallest = []
    for copies in ((), (0,), (1,), (2,), (3,), (0, 1, 2, 3)):
        inputs = [np.repeat(array, 2, axis=-1)[..., ::2] if i in copies else array for i, array in enumerate(arrays)]
        with pytest.raises(ValueError, match="workspace: expected at least") as raised:
            joint_rnnt_loss(*inputs, *others, workspace=1)
        smallest.append(int(re.findall(r"\d+", str(raised.value))[0]))
    sizes = [array.nbytes for array in arrays]
    assert [count - smallest[0] for count in smallest[1:]] == [*sizes, sum(sizes)]
