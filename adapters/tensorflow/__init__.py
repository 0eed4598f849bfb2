"""TensorFlow: functions with gradients, eager and in a tf.function, of every float dtype; losses return (B,).

In the graph of a ``tf.function`` they are a ``tf.py_function``, with shapes as far as they are known. Two things follow. XLA
cannot compile them: inside of ``jit_compile=True`` they raise, or, where they were traced before, TensorFlow says ``Detected
unsupported operations ... EagerPyFunc``; call the loss outside of what is compiled. And a ``SavedModel`` is to be exported from
a function that does not call the loss.
"""

from transducer_loss.adapters.tensorflow.amortized import amortized_backlog, amortized_cost, gumbel_gate
from transducer_loss.adapters.tensorflow.embr import EditDistance, edit_distance, embr_loss
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
from transducer_loss.adapters.tensorflow.tied_reduced import reduced_predictor

__all__ = [
    "Band",
    "Classes",
    "EditDistance",
    "Occupancy",
    "amortized_backlog",
    "amortized_cost",
    "edit_distance",
    "embr_loss",
    "gather_predictor",
    "gumbel_gate",
    "joint_rnnt_loss",
    "labels_in",
    "prune",
    "reduced_predictor",
    "rnnt_loss",
    "sample_classes",
    "samplewise_rnnt_loss",
    "simple_rnnt_loss",
]
