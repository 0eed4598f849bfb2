"""The arguments of a loss as somebody has called it, in any framework: what `explain` looks at."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np

from transducer_loss.arrays import FLOATS, as_array, as_numpy, numpy_dtype
from transducer_loss.band import Band
from transducer_loss.cells import Ints
from transducer_loss.checks import choice, integers
from transducer_loss.classes import Classes
from transducer_loss.faults import Finding, place


def plain(value: Any) -> Any:
    """A framework's tensor without its history, and the value of its variable: DLPack exports nothing else."""
    for method in ("detach", "read_value"):
        if callable(getattr(value, method, None)):
            return getattr(value, method)()
    if not hasattr(value, "__dlpack__") and hasattr(value, "value"):  # of Keras or Flax, and maybe TensorFlow's inside
        return plain(value.value)
    return value


def bound(function: Any, inputs: tuple[Any, ...], options: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a loss by name, its defaults among them, as the core has them."""
    options = {name: value for name, value in options.items() if name != "reduction"}
    if options.get("seed", 0) is None and not options.get("dropout"):  # PyTorch's default: drawn where it is needed
        del options["seed"]
    call = inspect.signature(function).bind(*inputs, **options)
    call.apply_defaults()
    given = {name: plain(value) for name, value in call.arguments.items() if name not in ("inplace", "validate")}
    if given["band"] is not None and hasattr(given["band"], "first"):
        band = given["band"]
        first, end = (None if each is None else as_array(plain(each), "band") for each in (band.first, band.end))
        frames, labels = (host_integers(each, "band") for each in (band.frames, band.labels))
        given["band"] = Band(first, end, int(band.width), frames, labels, int(band.s_range))
    if given.get("classes") is not None and hasattr(given["classes"], "ids"):
        kept = given["classes"]
        ids, probability = (as_array(plain(each), "classes") for each in (kept.ids, kept.probability))
        given["classes"] = Classes(ids, probability, int(kept.vocab_size), int(kept.blank), bool(kept.correction))
    return given


def in_one_dtype(given: dict[str, Any], names: tuple[str, ...], dtype: str | None) -> None:
    """The float inputs as arrays, copied where they are of another dtype than was asked for."""
    for name in names:
        if given[name] is not None:
            given[name] = as_array(given[name], name)
    if dtype is not None:
        kind = numpy_dtype(FLOATS[choice(dtype, FLOATS, "dtype")])
        with np.errstate(over="ignore"):  # what becomes infinite is found
            given.update({name: given[name].astype(kind) for name in names if given[name] is not None})
        return
    several = sorted({given[name].dtype.name for name in names if given[name] is not None})
    if len(several) > 1:
        raise TypeError(
            f"dtype: expected the one that the loss runs in, as autocast's, for inputs of {', '.join(several)}, got None"
        )


def host_integers(value: Any, name: str) -> Ints:
    """Integers on the host."""
    return np.asarray(as_numpy(integers(plain(value), name)), np.int64)


def mend_lengths(given: dict[str, Any], told: dict[str, Ints]) -> dict[int, list[Finding]]:
    """Findings by utterance for lengths out of range, which become 1 and 0: the other utterances can be looked at, then.

    Where others depend on them, as with packed logits and bands, they are left to raise.
    """
    inputs = (given["encoder"], given["predictor"]) if "encoder" in given else (given["logits"],) * 2
    if given["band"] is not None or any(each.ndim != (3 if "encoder" in given else 4) for each in inputs):
        return {}
    most = int(inputs[0].shape[1]), int(inputs[1].shape[1 if "encoder" in given else 2]) - 1
    index = host_integers(given["encoder_index"], "encoder_index") if given.get("encoder_index") is not None else None
    found: dict[int, list[Finding]] = {}
    for (name, lengths), low, high, dim in zip(told.items(), (1, 0), most, ("T", "U"), strict=True):
        wrong = (lengths < low) | (lengths > high)
        if lengths.ndim != 1 or not wrong.any():
            continue
        given[name] = np.where(wrong, low, lengths)
        rows = np.arange(len(lengths)) if index is None or dim == "U" else index
        for b, row in enumerate(rows):
            if 0 <= row < len(lengths) and wrong[row]:
                text = f"{place(name, (int(row),))} is {lengths[row]}, not in [{low}, {dim} = {high}]"
                found.setdefault(b, []).append(Finding("length", name, (int(row),), None, None, text))
    return found
