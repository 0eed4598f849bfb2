"""Keras 3: a callback that logs what the losses of a step tell of themselves."""

from __future__ import annotations

from typing import Any

import keras

from transducer_loss.monitor import Steps


class TransducerMonitor(keras.callbacks.Callback):
    """Adds kept mass, dropped share and mean emission delay of training batches to the logs, those that the losses have.

    What they are is said at `transducer_loss.Statistics`. At the end of a batch the logs have the batch's own, at the end of an
    epoch the means over its batches, which the history has and TensorBoard and CSV files are given. Callbacks that come after
    this one in the list see them, and those that Keras adds itself.

    Parameters
    ----------
    every_n_batches : int
        Listen to the first batch of an epoch and to every so manieth after it, or execution where ``steps_per_execution`` is
        more than 1: reading the numbers synchronises with the device.
    prefix : str
        Of their names.

    Raises
    ------
    ValueError, TypeError
        For an `every_n_batches` below 1.

    Examples
    --------
    >>> from transducer_loss.adapters.keras import TransducerMonitor
    >>> callbacks = [TransducerMonitor(every_n_batches=50)]  # of model.fit
    """

    def __init__(self, *, every_n_batches: int = 1, prefix: str = "transducer_") -> None:
        super().__init__()
        self.prefix, self._steps = prefix, Steps(every_n_batches)
        self._batches, self._seen = 0, dict[str, list[float]]()

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Begin new means."""
        self._batches, self._seen = 0, {}

    def on_train_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Begin to listen."""
        self._steps.begin(self._batches)  # not `batch`, which goes on by `steps_per_execution`
        self._batches += 1

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Add what was heard to the logs."""
        heard = self._steps.end()
        if heard is not None:
            values = heard.known(self.prefix)
            for name, value in values.items():
                self._seen.setdefault(name, []).append(value)
            if logs is not None:
                logs.update(values)

    def on_test_begin(self, logs: dict[str, Any] | None = None) -> None:
        """End to listen: where the data have come to their end, Keras has begun a batch that there is not."""
        self._steps.end()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Add the means to the logs."""
        self._steps.end()
        if logs is not None:
            logs.update({name: sum(values) / len(values) for name, values in self._seen.items()})
