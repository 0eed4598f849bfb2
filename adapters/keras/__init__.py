"""Keras 3 on its TensorFlow backend: the losses as a loss for ``compile`` and as layers.

Losses cannot be compiled by XLA: `RNNTJoint` tells Keras so, and a model without one takes ``compile(..., jit_compile=False)``
where there is a GPU.
"""

from transducer_loss.adapters.keras.amortized import GumbelGate
from transducer_loss.adapters.keras.monitor import TransducerMonitor
from transducer_loss.adapters.keras.rnnt import RNNTJoint, RNNTLoss
from transducer_loss.adapters.keras.tied_reduced import TiedReducedDecoder

__all__ = ["GumbelGate", "RNNTJoint", "RNNTLoss", "TiedReducedDecoder", "TransducerMonitor"]
