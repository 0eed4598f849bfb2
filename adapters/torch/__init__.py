"""PyTorch: the losses as functions and modules with autograd, on every device, dtype and stream.

Under ``torch.compile`` each of them is an operator of the graph: no break, and no new compilation for other lengths or labels.
Lengths in tensors, on the host or a device, take one graph; lists of int take two, the first of which serves one step alone.
`Band` and `Classes` may be made inside or outside; those made inside have tensors for attributes. Saved arrays are as large as
padded lattices there. These break a graph, and with ``fullgraph=True`` raise: ``inplace=True``, ``sparse=True``,
``process_group=``, `samplewise_rnnt_loss`, `gather_predictor` of a band made in the same region, `greedy` and `beam_search`. An
option that is a float is part of the graph: one that changes from step to step, as a schedule of ``fastemit_lambda``, compiles
for each of its values, but for the ``temperature`` of `gumbel_gate`.

No loss can be differentiated twice, and trying to raises. Of a graph of ``torch.compile`` it is torch that refuses, and only
``backward()`` surely does: like ``log_softmax`` there, ``autograd.grad`` of a penalty on the gradient leaves the penalty out.

A CUDA graph can be captured of a loss with ``occupancy_floor=0`` and lengths on the host, which are then those of every replay;
labels on the device are read at each, the seed of a dropout or a gate is the captured one. Call the step a few times before, on
the stream of the capture, so that kernels are compiled.
"""

from transducer_loss.adapters.torch.amortized import amortized_backlog, amortized_cost, gumbel_gate
from transducer_loss.adapters.torch.band import gather_predictor, prune
from transducer_loss.adapters.torch.decoding import GreedyPath, NBest, beam_search, greedy
from transducer_loss.adapters.torch.embr import EMBRLoss, edit_distance, embr_loss
from transducer_loss.adapters.torch.joint import JointRNNTLoss, joint_rnnt_loss
from transducer_loss.adapters.torch.logits import RNNTLoss, rnnt_loss
from transducer_loss.adapters.torch.pruned import PrunedLosses, PrunedRNNTLoss, simple_rnnt_loss
from transducer_loss.adapters.torch.sampled import labels_in, sample_classes
from transducer_loss.adapters.torch.samplewise import SamplewiseRNNTLoss, samplewise_rnnt_loss
from transducer_loss.adapters.torch.tied_reduced import TiedReducedDecoder, reduced_predictor
from transducer_loss.adapters.torch.workspace import auto_workspace, reset_auto_workspace
from transducer_loss.band import Band
from transducer_loss.classes import Classes
from transducer_loss.edit_distance import EditDistance

__all__ = [
    "Band",
    "Classes",
    "EMBRLoss",
    "EditDistance",
    "GreedyPath",
    "JointRNNTLoss",
    "NBest",
    "PrunedLosses",
    "PrunedRNNTLoss",
    "RNNTLoss",
    "SamplewiseRNNTLoss",
    "TiedReducedDecoder",
    "amortized_backlog",
    "amortized_cost",
    "auto_workspace",
    "beam_search",
    "edit_distance",
    "embr_loss",
    "gather_predictor",
    "greedy",
    "gumbel_gate",
    "joint_rnnt_loss",
    "labels_in",
    "prune",
    "reduced_predictor",
    "reset_auto_workspace",
    "rnnt_loss",
    "sample_classes",
    "samplewise_rnnt_loss",
    "simple_rnnt_loss",
]
