"""Every level of the host library that this machine can run: by itself the library only ever loads the best of them."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from helpers import run_python
from transducer_loss.processors import _FEATURES, LEVELS, Library, _processor_flags

NEEDED = {"v2": _FEATURES["v2"], "v3": _FEATURES["v3"], "v4": _FEATURES["v3"] | _FEATURES["v4"]}

CHECK = """
    import json
    from transducer_loss import check, processors
    processors._processor_flags = lambda: set({needed!r})
    failed = [str(row) for row in check.check("cpu", dtypes=["bfloat16", "float32"]) if not row.passed]
    print(json.dumps({{"path": processors.host_library().path, "failed": failed}}))
"""


def library(level: str) -> str:
    """Where a level of the library is, or a skipped test."""
    spec = importlib.util.find_spec(f"transducer_loss._host_{level}")
    if spec is None or spec.origin is None:
        pytest.skip("not built for this processor")
    if missing := NEEDED[level] - _processor_flags():
        pytest.skip(f"this processor has no {', '.join(sorted(missing))}")
    return spec.origin


@pytest.mark.parametrize("level", LEVELS)
def test_every_level_passes_the_check(level: str) -> None:
    path = library(level)
    found: dict[str, Any] = run_python(CHECK.format(needed=sorted(NEEDED[level])))
    assert found == {"path": path, "failed": []}


@pytest.mark.parametrize("level", LEVELS[:-1])
def test_every_level_has_the_same_kernels(level: str) -> None:
    assert Library(library(level)).index == Library(library(LEVELS[-1])).index
