"""Losses for training neural transducers (RNN-T), without the (B, T, U, V) logits tensor.

``rnnt_loss`` takes logits, ``joint_rnnt_loss`` the encoder, the predictor and the output layer. Both return the loss and its
gradient, as NumPy or CuPy arrays; `transducer_loss.adapters` serves the frameworks.
"""

from transducer_loss.joint_loss import Grads, joint_rnnt_loss
from transducer_loss.logits_loss import rnnt_loss
from transducer_loss.paths import Alignment, Occupancy, align, occupancy

__version__ = "0.1.0"

__all__ = [
    "Alignment",
    "Grads",
    "Occupancy",
    "align",
    "joint_rnnt_loss",
    "occupancy",
    "rnnt_loss",
]
