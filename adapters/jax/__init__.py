"""JAX: the losses and small layers as functions with gradients, under jit, vmap, scan, checkpoint and shard_map."""

from transducer_loss.adapters.jax.amortized import amortized_backlog, amortized_cost, gumbel_gate
from transducer_loss.adapters.jax.embr import edit_distance, embr_loss
from transducer_loss.adapters.jax.joint import joint_rnnt_loss
from transducer_loss.adapters.jax.logits import rnnt_loss
from transducer_loss.adapters.jax.pruned import gather_predictor, prune, simple_rnnt_loss
from transducer_loss.adapters.jax.sampled import labels_in, sample_classes
from transducer_loss.adapters.jax.samplewise import samplewise_rnnt_loss
from transducer_loss.adapters.jax.tied_reduced import reduced_predictor
from transducer_loss.band import Band
from transducer_loss.classes import Classes
from transducer_loss.edit_distance import EditDistance

__all__ = [
    "Band",
    "Classes",
    "EditDistance",
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
