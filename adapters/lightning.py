"""Lightning (``lightning`` or ``pytorch_lightning``): a callback that logs what the losses of a step tell of themselves."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from transducer_loss.monitor import Steps

if TYPE_CHECKING:
    from lightning.pytorch import Callback
else:
    try:
        Callback = importlib.import_module("lightning.pytorch").Callback
    except ModuleNotFoundError:
        Callback = importlib.import_module("pytorch_lightning").Callback


class TransducerMonitor(Callback):
    """Logs kept mass, dropped share and mean emission delay of training batches, those that the losses of the batch have.

    What they are is said at `transducer_loss.Statistics`. They go where ``LightningModule.log`` sends them, each of this
    process's batches.

    Parameters
    ----------
    every_n_batches : int
        Log of the first batch of an epoch and of every so manieth after it: reading the numbers synchronises with the device.
    prefix : str
        Of their names.

    Raises
    ------
    ValueError, TypeError
        For an `every_n_batches` below 1.

    Examples
    --------
    >>> from lightning.pytorch import Trainer
    >>> from transducer_loss.adapters.lightning import TransducerMonitor
    >>> trainer = Trainer(callbacks=[TransducerMonitor(every_n_batches=50)], logger=False, accelerator="cpu")
    """

    def __init__(self, *, every_n_batches: int = 1, prefix: str = "transducer/") -> None:
        super().__init__()
        self.prefix, self._steps = prefix, Steps(every_n_batches)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Begin to listen."""
        self._steps.begin(batch_idx)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log what was heard."""
        heard = self._steps.end()
        if heard is not None:
            pl_module.log_dict(heard.known(self.prefix), on_step=True, on_epoch=False)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """End to listen to a batch that the module broke off."""
        self._steps.end()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """End to listen."""
        self._steps.end()
