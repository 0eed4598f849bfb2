"""warp-transducer's binding for TensorFlow by its own name, which TensorFlowASR looks for.

A recipe changes the import::

    -from warprnnt_tensorflow import rnnt_loss
    +from transducer_loss.adapters.compat.warprnnt_tensorflow import rnnt_loss

Habits of warp-transducer, kept:

- costs come as (B,), not reduced; labels are padded with anything, and those past a length are not read;
- with FastEmit, which a fork takes as the sixth argument, the cost stays the negative log-likelihood, and only the gradient of
  label arcs is scaled.

What differs:

- The log-softmax. The peer takes logits on CUDA, where it is part of the loss, and log-probabilities on the CPU, where the
  caller makes it: TensorFlowASR asks whether there is a GPU. Here it is part of the loss on every device: right for logits, and
  the same for log-probabilities, as the log-softmax of log-probabilities is themselves. The cost is the same then, and so is
  the gradient by what the caller's ``tf.nn.log_softmax`` was made of; by the log-probabilities themselves the peer's gradient
  is minus the occupancies, this one their part that sums to 0 over the classes.
- Gradients are made when they are asked for, not with the costs.
- Labels and lengths may be int64 or lists, acts of any float dtype, where the peer takes int32 and float32 alone (TensorFlowASR
  casts to these, which it need not); a target equal to blank gets the right gradient.
"""

from __future__ import annotations

from typing import Any

from transducer_loss.adapters import tensorflow as losses
from transducer_loss.adapters.compat.shared import named

__all__ = ["rnnt_loss"]


@named(
    logits="acts", targets="labels", logit_lengths="input_lengths", target_lengths="label_lengths", blank="blank_label"
)  # fmt: skip
def rnnt_loss(
    acts: Any, labels: Any, input_lengths: Any, label_lengths: Any, blank_label: int = 0, fastemit_lambda: float = 0.0
) -> Any:
    """Transducer losses, as ``warprnnt_tensorflow.rnnt_loss``.

    Parameters
    ----------
    acts : (B, T, U+1, V) tensor
        Logits, or log-probabilities.
    labels : (B, U) tensor of int
    input_lengths, label_lengths : (B,) tensor of int
    blank_label : int
    fastemit_lambda : float
        FastEmit (arXiv 2010.11148).

    Returns
    -------
    (B,) tensor

    Examples
    --------
    >>> import tensorflow as tf
    >>> from transducer_loss.adapters.compat.warprnnt_tensorflow import rnnt_loss
    >>> print(f"{float(rnnt_loss(tf.zeros((1, 4, 3, 5)), [[1, 2]], [4], [2])[0]):.4f}")
    7.3540
    """
    return losses.rnnt_loss(
        acts, labels, input_lengths, label_lengths, blank=blank_label, fastemit_lambda=fastemit_lambda
    )
