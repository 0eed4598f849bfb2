"""TensorFlow: the losses as functions with gradients that return (B,), eager and in a tf.function, of every float dtype.

In the graph of a ``tf.function`` they are a ``tf.py_function``, with shapes as far as they are known. Two things follow. XLA
cannot compile them: inside of ``jit_compile=True`` they raise, or, where they were traced before, TensorFlow says ``Detected
unsupported operations ... EagerPyFunc``; call the loss outside of what is compiled. And a ``SavedModel`` is to be exported from
a function that does not call the loss.
"""

from transducer_loss.adapters.tensorflow.joint import joint_rnnt_loss
from transducer_loss.adapters.tensorflow.logits import rnnt_loss
from transducer_loss.adapters.tensorflow.packs import samplewise_rnnt_loss
from transducer_loss.adapters.tensorflow.pruned import (
    Band,
    Occupancy,
    gather_predictor,
    prune,
    simple_rnnt_loss,
)
from transducer_loss.adapters.tensorflow.sampled import Classes, labels_in, sample_classes

__all__ = [
    "Band",
    "Classes",
    "Occupancy",
    "gather_predictor",
    "joint_rnnt_loss",
    "labels_in",
    "prune",
    "rnnt_loss",
    "sample_classes",
    "samplewise_rnnt_loss",
    "simple_rnnt_loss",
]
