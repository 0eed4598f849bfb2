"""What README and docs show can be copied: examples are run, and files that are pointed to exist."""

from __future__ import annotations

import doctest
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow as tf
import torch

import transducer_loss as tl
from transducer_loss.adapters.torch import TiedReducedDecoder

TREE = Path(__file__).resolve().parents[1]
PAGES = [TREE / "README.md", *sorted((TREE / "docs").rglob("*.md"))]
B, T, U, V, H = 2, 12, 5, 20, 6


def _arrays() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    shapes = {
        "encoder": (B, T, H), "predictor": (B, U + 1, H), "weight": (V, H), "bias": (V,), "logits": (B, T, U + 1, V),
        "am": (B, T, V), "lm": (B, U + 1, V),
    }  # fmt: skip
    return {name: rng.normal(size=shape).astype("f") for name, shape in shapes.items()} | {
        "targets": rng.integers(1, V, (B, U)), "frames": np.array([12, 9]), "labels": np.array([5, 3]),
    }  # fmt: skip


def _for_torch() -> dict[str, Any]:
    arrays = {name: torch.from_numpy(array) for name, array in _arrays().items()}
    for name in ("encoder", "predictor", "am", "lm"):
        arrays[name].requires_grad_()
    output = torch.nn.Linear(H, V)
    joiner = torch.nn.Sequential(torch.nn.Tanh(), output)
    return {
        **arrays, "torch": torch, "output": output, "V": V, "features": H, "classes": V, "ctc_output": torch.nn.Linear(H, V),
        "joiner": lambda encoder, predictor: joiner(encoder + predictor),
        "decoder": TiedReducedDecoder(H, V, weight=output.weight), "arbitrator": torch.nn.Linear(H, 2),
        "dense": torch.nn.Linear(H, H), "cheap": torch.nn.Linear(H, H),
    }  # fmt: skip


def _for_tensorflow() -> dict[str, Any]:
    arrays = {name: tf.constant(array) for name, array in _arrays().items()}
    variables = {name: tf.Variable(arrays[name]) for name in ("weight", "bias")}
    # Labels of the longest alone: Keras is told no lengths.
    padded = np.where(np.arange(U) < _arrays()["labels"][:, None], _arrays()["targets"], -1)
    return {**arrays, **variables, "tf": tf, "V": V, "targets": tf.constant(padded)}


def _for_jax() -> dict[str, Any]:
    arrays = {name: jnp.asarray(array) for name, array in _arrays().items()}
    return {**arrays, "jax": jax, "layer": {"kernel": arrays["weight"].T, "bias": arrays["bias"]}}


NAMESPACES: dict[str, Callable[[], dict[str, Any]]] = {
    "adapters.torch": _for_torch,
    "adapters.compat": _for_torch,
    "adapters.tensorflow": _for_tensorflow,
    "adapters.keras": _for_tensorflow,
    "adapters.jax": _for_jax,
}

IMPORTS = re.compile(r"^(?:from|import) transducer_loss\b", re.MULTILINE)


def _examples(page: Path) -> list[str]:
    """Blocks of a page; one that imports nothing of the library goes on where the one before it ended."""
    examples: list[str] = []
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        if ">>>" in block:
            continue
        if IMPORTS.search(block) or not examples:
            examples.append(block)
        else:
            examples[-1] += block
    return examples


EXAMPLES = [pytest.param(text, id=f"{page.stem}-{i}") for page in PAGES for i, text in enumerate(_examples(page))]


@pytest.mark.parametrize("example", EXAMPLES)
def test_example_runs(example: str) -> None:
    exec(example, next((make for name, make in NAMESPACES.items() if name in example), _arrays)())


def test_kernels_shown_are_kernels() -> None:
    blocks = [block for page in PAGES for block in re.findall(r"```cpp\n(.*?)```", page.read_text(), re.DOTALL)]
    sources = "".join(path.read_text() for path in (TREE / "kernels").glob("*.cu"))
    assert blocks and all(block in sources for block in blocks)


def test_every_public_name_has_an_entry() -> None:
    entries = re.findall(r"^::: transducer_loss\.(?:\w+\.)?(\w+)$", (TREE / "docs/api/core.md").read_text(), re.MULTILINE)
    assert set(tl.__all__) <= set(entries)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_doctests(page: Path) -> None:
    assert doctest.testfile(str(page), module_relative=False).failed == 0


def test_there_are_examples_and_doctests() -> None:
    assert len(EXAMPLES) >= 16
    finder = doctest.DocTestParser()
    assert sum(len(finder.get_examples(page.read_text())) for page in PAGES) >= 20


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#]+)", page.read_text()):
        assert link.startswith("http") or (page.parent / link).exists(), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_exist(page: Path) -> None:
    """`tl.name`, and modules that are named."""
    text = page.read_text()
    for name in re.findall(r"\btl\.(\w+)", text):
        assert hasattr(tl, name), name
    for module in set(re.findall(r"transducer_loss\.adapters\.((?:compat\.)?\w+)", text)):
        assert (TREE / "adapters" / f"{module.replace('.', '/')}.py").exists() or (TREE / "adapters" / module.replace(".", "/")).is_dir(), module
