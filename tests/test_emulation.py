"""Every kernel with real blocks of threads, under AddressSanitizer with UndefinedBehaviorSanitizer and under ThreadSanitizer.

The results are compared with those of the same kernels as the host runs them. What the gates catch is shown in
`test_emulation_gates.py`.
"""

import contextlib
import re
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import transducer_loss as tl
from emulation import (
    SANITIZERS,
    Builds,
    Driver,
)
from emulation_cases import CASES as LOSSES
from emulation_cases import (
    Case,
    arrays_of,
    expect_equal,
    gather_case,
    joint_case,
    logits_case,
    prune_case,
    sample_case,
    simple_case,
    some_band,
    some_classes,
    within,
)
from emulation_system_cases import CASES as SYSTEMS
from emulation_system_cases import edit_case, embr_case, frames_case, gate_case, reduced_case, shared_case
from transducer_loss import engine, tiling
from transducer_loss.arrays import FLOATS
from transducer_loss.joint import ACTIVATIONS
from transducer_loss.processors import host_library
from transducer_loss.pruning import STRATEGIES
from transducer_loss.sampling import PROPOSALS, SCOPES

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sanitizers' options and libraries are those of Linux")


CASES = [*LOSSES, *SYSTEMS]


def check(case: Case, driver: Driver) -> None:
    found = case.on(case.emulated(driver))
    expect_equal(found, case.on(case.plain()), case)
    if case.wanted is not None:
        expect_equal(found, arrays_of(case.wanted()), case)


# Blocks of hundreds of threads, and many tiles: five to fifteen seconds each where every access is watched.
LONG = re.compile("block-1024|wide|made-again|groups|strips|reduced-backward-alike|many-rows")


def _runs() -> list[Any]:
    return [
        pytest.param(
            sanitizer, case, id=f"{sanitizer}-{case.name}",
            marks=pytest.mark.slow if LONG.search(case.name) else [],
        )
        for sanitizer in SANITIZERS
        for case in CASES
    ]  # fmt: skip


@pytest.fixture(scope="module", params=SANITIZERS)
def driver(request: pytest.FixtureRequest, builds: Builds) -> Iterator[Driver]:
    begun = {sanitizer: builds.start(sanitizer) for sanitizer in SANITIZERS}
    with contextlib.closing(Driver(begun[request.param]())) as process:
        yield process


@pytest.mark.parametrize(("driver", "case"), _runs(), indirect=["driver"])
def test_equals_the_host(driver: Driver, case: Case) -> None:
    check(case, driver)


def test_driver_has_every_kernel(driver: Driver) -> None:
    assert set(driver.index) == set(host_library().index)


def test_cases_launch_every_kernel() -> None:
    launched = set()
    for case in CASES:
        processor = case.plain()
        case.on(processor)
        launched |= processor.launched
    assert launched == set(host_library().index)


def test_cases_cut_their_work_in_every_way(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[tiling.Plan] = set()

    def noted(of: tiling.Problem) -> tiling.Plan:
        plan = tiling.plan(of)
        seen.add(plan)
        return plan

    monkeypatch.setattr(engine, "plan", noted)
    for case in CASES:
        case.on(case.plain())
    for kept in (False, True):
        plans = [plan for plan in seen if kept in plan.retained]
        assert {plan.strips > 1 for plan in plans} == {False, True}
        assert any(len(plan.groups) > 1 for plan in plans)
    assert max(plan.strips for plan in seen) == 8


def test_cases_drop_cells() -> None:
    dropping = next(case for case in CASES if case.name == "joint-regular")
    _, grads = dropping.run()
    assert 0 < grads.dropped < 1


@st.composite
def cases(draw: st.DrawFn) -> Case:
    batch = draw(st.integers(1, 3))
    shape = {
        "frames": draw(st.lists(st.integers(1, 6), min_size=batch, max_size=batch)),
        "lengths": draw(st.lists(st.integers(0, 5), min_size=batch, max_size=batch)),
        "classes": draw(st.integers(2, 70)),
        "dtype": draw(st.sampled_from(FLOATS)),
        "seed": draw(st.integers(0, 1000)),
    }
    options = {
        "topology": draw(st.sampled_from(["regular", "modified", "constrained"])),
        "blank": draw(st.sampled_from([0, -1])),
        "infeasible": draw(st.sampled_from(["inf", "zero"])),
        "fastemit_lambda": draw(st.sampled_from([0.0, 0.5])),
        "delay_penalty": draw(st.sampled_from([0.0, -0.3])),
        "weights": draw(st.none() | st.lists(st.sampled_from([0.0, 1.0, -2.0]), min_size=batch, max_size=batch)),
    }
    block = draw(st.sampled_from([32, 64, 96]))
    kind = draw(st.sampled_from(["logits", "joint", "simple", "prune", "gather", "sample"]))
    lattice = {name: shape[name] for name in ("frames", "lengths", "seed")}
    band = None
    if draw(st.booleans()) and kind in ("logits", "joint"):
        band = some_band(shape["frames"], shape["lengths"], draw(st.integers(1, 6)), options["topology"], shape["seed"])
    if kind == "simple":
        lm_only = draw(st.sampled_from([0.0, 0.25, 1.0]))
        am_only = draw(st.sampled_from([0.0, 0.25])) if lm_only < 1 else 0.0
        smoothed = {**options, "lm_only_scale": lm_only, "am_only_scale": am_only}
        scale = draw(st.sampled_from([1.0, 60.0]))
        return simple_case("fuzz", block=block, cuda=draw(st.booleans()), scale=scale, options=smoothed, **shape)
    if kind == "sample":
        count = draw(st.sampled_from(["float64", "float32", "int32"]))
        of_sample = {
            "scope": draw(st.sampled_from(SCOPES)), "samples": draw(st.integers(0, 80)), "correction": draw(st.booleans()),
            "some": draw(st.booleans()), "at_once": draw(st.sampled_from([1, 1200, 16 << 20])), "count": count,
            "part": draw(st.sampled_from([7, 2048])),
        }  # fmt: skip
        return sample_case("fuzz", draw(st.sampled_from(PROPOSALS)), block=block, **of_sample, **shape)
    if kind == "prune":
        strategy, s_range = draw(st.sampled_from(STRATEGIES)), draw(st.integers(1, 6))
        return prune_case("fuzz", strategy, options["topology"], block=block, dtype=shape["dtype"], s_range=s_range, **lattice)
    if kind == "gather":
        features, s_range = draw(st.integers(1, 70)), draw(st.integers(1, 6))
        of_gather = {"block": block, "dtype": shape["dtype"], "features": features, "s_range": s_range}
        return gather_case("fuzz", draw(st.booleans()), **of_gather, **lattice)
    if kind == "logits":
        if band is not None:
            call = within(band, tl.rnnt_loss, draw(st.booleans()))
            return logits_case("fuzz", block=block, call=call, options=options, **shape)
        layout = draw(st.sampled_from(["padded", "packed", "strided"]))
        return logits_case("fuzz", block=block, options=options, layout=layout, **shape)
    options |= {
        "activation": draw(st.sampled_from(ACTIVATIONS)),
        "dropout": draw(st.sampled_from([0.0, 0.4])),
        "occupancy_floor": draw(st.sampled_from([0.0, 1e-6])),
        "band": band,
    }
    shape |= {"features": draw(st.integers(1, 70)), "bias": draw(st.booleans())}
    if draw(st.booleans()):
        of_classes = draw(st.sampled_from(SCOPES)), draw(st.booleans()), options["blank"]
        options |= {"classes": some_classes(*of_classes, **shape), "sparse": draw(st.booleans())}
    cuda = draw(st.booleans())
    processor = {"tile_bytes": draw(st.sampled_from([1, 1 << 20])), "strips": 1 if cuda else draw(st.sampled_from([1, 8]))}
    return joint_case("fuzz", block=block, cuda=cuda, options=options, processor=processor, **shape)


@st.composite
def system_cases(draw: st.DrawFn) -> Case:
    """Of EMBR, the reduced decoder and Amortized Networks."""

    def some(low: int, high: int, least: int = 1, most: int = 3) -> Any:
        return draw(st.lists(st.integers(low, high), min_size=least, max_size=most))

    shape: dict[str, Any] = {"block": draw(st.sampled_from([32, 64, 96])), "seed": draw(st.integers(0, 1000))}
    dtype = draw(st.sampled_from(FLOATS))
    kind = draw(st.sampled_from(["edit", "embr", "cost", "backlog", "gate", "reduced", "shared"]))
    if kind == "edit":
        references = some(-1, 40)
        members = draw(st.integers(1, 4))
        hypotheses = np.reshape(some(-1, 70, len(references) * members, len(references) * members), (len(references), members))
        return edit_case(
            "fuzz", hypotheses.tolist(), references, classes=draw(st.integers(1, 4)), blank=draw(st.sampled_from([None, 0, 1])),
            dtype=draw(st.sampled_from(["int32", "int64"])), strided=draw(st.booleans()), **shape,
        )  # fmt: skip
    if kind == "embr":
        return embr_case(
            "fuzz", dtype=dtype, batch=draw(st.integers(1, 4)), members=draw(st.integers(1, 70)), labels=draw(st.booleans()),
            lengths=draw(st.booleans()), columns=draw(st.integers(1, 6)), blank=draw(st.sampled_from([None, 0])),
            reference_nll=draw(st.sampled_from([None, 1.0, np.inf])), temperature=draw(st.sampled_from([0.5, 1.0, 3.0])), **shape,
        )  # fmt: skip
    if kind in ("cost", "backlog", "gate"):
        frames = draw(st.integers(1, 130))
        shape |= {
            "dtype": dtype, "frames": frames, "lengths": some(0, frames + 1), "branches": draw(st.integers(1, 9)),
            "strided": draw(st.booleans()),
        }  # fmt: skip
        if kind == "gate":
            return gate_case("fuzz", backward=draw(st.booleans()), temperature=draw(st.sampled_from([0.3, 1.0])), **shape)
        statistic = {"statistic": draw(st.sampled_from(["mean", "last"]))} if kind == "backlog" else {}
        return frames_case("fuzz", kind, **shape, **statistic)
    if kind == "reduced":
        columns = draw(st.integers(0, 8))
        return reduced_case(
            "fuzz", backward=draw(st.booleans()), last=draw(st.booleans()), dtype=dtype, columns=columns,
            lengths=some(-1, columns + 1), classes=draw(st.integers(1, 9)), features=draw(st.integers(1, 130)),
            heads=draw(st.integers(1, 3)), reach=draw(st.integers(1, 5)), strided=draw(st.booleans()), **shape,
        )  # fmt: skip
    frames = some(1, 6)
    index = some(0, len(frames) - 1, most=5)
    labels = some(0, 4, len(index), len(index))
    options = {"occupancy_floor": 0.0, "topology": "regular"}
    cuda = draw(st.booleans())
    return shared_case(
        "fuzz", index, frames, labels, dtype=dtype, options=options, cuda=cuda, block=shape["block"],
        features=draw(st.integers(1, 70)), processor={"tile_bytes": draw(st.sampled_from([1, 1 << 20]))},
    )  # fmt: skip


@given(case=cases())
@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])
def test_fuzz(driver: Driver, case: Case) -> None:
    check(case, driver)


@given(case=system_cases())
@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])
def test_fuzz_of_the_other_systems(driver: Driver, case: Case) -> None:
    check(case, driver)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@given(case=cases() | system_cases())
@settings(max_examples=500, suppress_health_check=[HealthCheck.too_slow])
def test_fuzz_for_long(driver: Driver, case: Case) -> None:
    check(case, driver)
