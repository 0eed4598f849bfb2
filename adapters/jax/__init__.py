"""JAX: the losses as functions with gradients, under jit, vmap, scan, checkpoint and shard_map."""

from transducer_loss.adapters.jax.joint import joint_rnnt_loss
from transducer_loss.adapters.jax.logits import rnnt_loss
from transducer_loss.adapters.jax.pruned import gather_predictor, prune, simple_rnnt_loss
from transducer_loss.adapters.jax.sampled import labels_in, sample_classes
from transducer_loss.adapters.jax.samplewise import samplewise_rnnt_loss
from transducer_loss.band import Band
from transducer_loss.classes import Classes

__all__ = [
    "Band",
    "Classes",
    "gather_predictor",
    "joint_rnnt_loss",
    "labels_in",
    "prune",
    "rnnt_loss",
    "sample_classes",
    "samplewise_rnnt_loss",
    "simple_rnnt_loss",
]
