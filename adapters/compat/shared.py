"""What the drop-in modules share: errors that name a toolkit's own arguments, and its clamp."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from transducer_loss.checks import finite

Function = TypeVar("Function", bound=Callable[..., Any])


def named(**names: str) -> Callable[[Function], Function]:
    """A function whose errors call the arguments `names` as the toolkit does.

    Examples
    --------
    >>> from transducer_loss.adapters.compat.shared import named
    >>> from transducer_loss.checks import finite
    >>> named(clamp="bound")(finite)("1", "clamp")
    Traceback (most recent call last):
    TypeError: bound: expected a number, got str
    """

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def renamed(*arguments: Any, **options: Any) -> Any:
            try:
                return function(*arguments, **options)
            except (TypeError, ValueError) as error:
                name, colon, rest = str(error).partition(":")
                if name in names:
                    error.args = (names[name] + colon + rest,)
                raise

        return renamed  # type: ignore[return-value]

    return decorate


def bound_of(clamp: Any) -> float:
    """The clamp of toolkits, whose values below 0 mean none, as `transducer_loss.rnnt_loss` takes it."""
    return max(finite(clamp, "clamp"), 0.0)
