"""Every loss in plain float64 loops: the definition that the tests and the `check` command compare with.

The lattice of one utterance has the cells (t, u), 0 <= t < T and 0 <= u <= U: u labels have been emitted.
A blank arc of weight lb(t, u) leaves each cell for (t + 1, u), a label arc emits label u + 1:

=============  ======================  =======================  ======================================
topology       label arc leads to      it weighs                the path ends with
=============  ======================  =======================  ======================================
`regular`      (t, u + 1)              le(t, u)                 the blank out of (T - 1, U)
`modified`     (t + 1, u + 1)          le(t, u)                 the blank or label that reaches (T, U)
`constrained`  (t + 1, u + 1)          le(t, u) + lb(t, u + 1)  the blank or label that reaches (T, U)
=============  ======================  =======================  ======================================

A band keeps of each row t the cells first[t] <= u < end[t], where end[t] is first[t] + W unless it is given and
less. It is the full lattice with weight -inf in all other cells: a path that enters such a cell has to leave it,
and so has probability zero. (T, U), which a path only reaches, is no cell and belongs to no row.
"""

from transducer_loss.reference.amortized import (
    amortized_backlog,
    amortized_cost,
    gumbel_gate,
    gumbel_gate_backward,
)
from transducer_loss.reference.band import band_of_alignment, kept_mass, prune
from transducer_loss.reference.edit_distance import edit_distance
from transducer_loss.reference.embr import embr_loss
from transducer_loss.reference.joint import joint_rnnt_loss
from transducer_loss.reference.lattice import effective_occupancy, lattice_loss
from transducer_loss.reference.losses import align, occupancy, rnnt_loss
from transducer_loss.reference.reduced_predictor import reduced_predictor, reduced_predictor_backward
from transducer_loss.reference.sampling import inclusion_probabilities, sample_classes
from transducer_loss.reference.simple import simple_rnnt_loss
from transducer_loss.reference.softmax import log_probs

__all__ = [
    "align",
    "amortized_backlog",
    "amortized_cost",
    "band_of_alignment",
    "edit_distance",
    "effective_occupancy",
    "embr_loss",
    "gumbel_gate",
    "gumbel_gate_backward",
    "inclusion_probabilities",
    "joint_rnnt_loss",
    "kept_mass",
    "lattice_loss",
    "log_probs",
    "occupancy",
    "prune",
    "reduced_predictor",
    "reduced_predictor_backward",
    "rnnt_loss",
    "sample_classes",
    "simple_rnnt_loss",
]
