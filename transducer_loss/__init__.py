"""Losses for training neural transducers (RNN-T), without the (B, T, U, V) logits tensor.

``rnnt_loss`` takes logits, ``joint_rnnt_loss`` the encoder, the predictor and the output layer. Both return the loss and its
gradient, as NumPy or CuPy arrays; `transducer_loss.adapters` serves the frameworks.
"""

from transducer_loss.amortized import amortized_backlog, amortized_cost, gumbel_gate, gumbel_gate_backward
from transducer_loss.band import Band
from transducer_loss.classes import Classes
from transducer_loss.costs import Strategy
from transducer_loss.edit_distance import EditDistance, edit_distance
from transducer_loss.embr import EmbrGrads, embr_loss
from transducer_loss.explain import Explanation, explain
from transducer_loss.joint_loss import Grads, Rows, joint_rnnt_loss
from transducer_loss.logits_loss import rnnt_loss
from transducer_loss.monitor import Monitor, Statistics
from transducer_loss.output_layer import labels_in
from transducer_loss.paths import Alignment, Occupancy, align, occupancy
from transducer_loss.planner import Plan, plan
from transducer_loss.pruning import gather_predictor, gather_predictor_backward, prune
from transducer_loss.reduced_predictor import ReducedPredictorGrads, reduced_predictor, reduced_predictor_backward
from transducer_loss.sampling import sample_classes
from transducer_loss.shard import Shard
from transducer_loss.simple_loss import SimpleGrads, simple_rnnt_loss

__version__ = "0.1.0"

__all__ = [
    "Alignment",
    "Band",
    "Classes",
    "EditDistance",
    "EmbrGrads",
    "Explanation",
    "Grads",
    "Monitor",
    "Occupancy",
    "Plan",
    "ReducedPredictorGrads",
    "Rows",
    "Shard",
    "SimpleGrads",
    "Statistics",
    "Strategy",
    "align",
    "amortized_backlog",
    "amortized_cost",
    "edit_distance",
    "embr_loss",
    "explain",
    "gather_predictor",
    "gather_predictor_backward",
    "gumbel_gate",
    "gumbel_gate_backward",
    "joint_rnnt_loss",
    "labels_in",
    "occupancy",
    "plan",
    "prune",
    "reduced_predictor",
    "reduced_predictor_backward",
    "rnnt_loss",
    "sample_classes",
    "simple_rnnt_loss",
]
