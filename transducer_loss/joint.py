"""Launches of `kernels/joint.cu`: encoder and predictor to hidden features, and the gradient back."""

from __future__ import annotations

import dataclasses
from typing import Any

from transducer_loss.arrays import element_strides
from transducer_loss.cells import Group

_FEATURES_OF_BLOCK = 128

ACTIVATIONS = ("tanh", "relu", "leaky_relu", "sigmoid", "gelu", "gelu_tanh", "silu", "identity")


@dataclasses.dataclass(frozen=True)
class Joint:
    """The joint network up to its output layer."""

    encoder: Any
    """(B, T, H), features dense."""
    predictor: Any
    """(B, U+1, H), features dense."""
    activation: int
    dropout: float
    seed: int

    @property
    def features(self) -> int:
        """H."""
        return int(self.encoder.shape[-1])

    @property
    def inputs(self) -> tuple[Any, ...]:
        """As every joint kernel takes them."""
        return (
            self.encoder, *element_strides(self.encoder)[:2], self.predictor, *element_strides(self.predictor)[:2],
            self.features, self.activation, self.dropout, self.seed,
        )  # fmt: skip


def forward(
    processor: Any, group: Group, joint: Joint, kept: Any, begin: int, hidden: Any, loss: Any = None, alone: bool = True
) -> None:
    """Hidden features of the items begin.. of the list `kept` (None: of the group's cells), a row of `hidden` each."""
    processor.launch(
        f"joint_forward<{joint.encoder.dtype.name},{hidden.dtype.name}>", len(hidden), joint.features,
        len(hidden), begin, kept, group.table, group.count, group.spans, *joint.inputs, loss, hidden, alone=alone,
    )  # fmt: skip


def backward(
    processor: Any, group: Group, joint: Joint, kept: Any, positions: Any, begin: int, utterances: tuple[int, int],
    loss: Any, hidden: Any, hidden_gradient: Any, encoder_gradient: Any, predictor_gradient: Any, carried: int, carry: Any,
) -> None:  # fmt: skip
    """Add a tile's gradient to those of encoder and predictor; `hidden_gradient` is worked on in place.

    Only the group's `utterances` [begin, end) have cells in the tile. The predictor's gradient of utterance `carried` of the
    group goes to `carry`. An encoder gradient of two dimensions is of the group's rows, for `backward_shared`.
    """
    table, count = group.select(*utterances)
    source = joint.encoder.dtype.name
    # On CUDA a tile has too few frames for all multiprocessors.
    width = joint.features if processor.host else _FEATURES_OF_BLOCK
    processor.launch(
        f"joint_backward_encoder<{source},{hidden.dtype.name}>", len(hidden) * -(-joint.features // width), width,
        len(hidden), begin, kept, table, count, group.spans, *joint.inputs, loss, hidden, hidden_gradient,
        encoder_gradient, 0 if encoder_gradient.ndim == 2 else encoder_gradient.shape[1], width, per_thread=1, alone=True,
    )  # fmt: skip
    processor.launch(
        f"joint_backward_predictor<{hidden_gradient.dtype.name}>", count * group.columns, joint.features,
        group.columns, len(hidden), begin, kept, positions, table, count, group.spans, joint.features, hidden_gradient,
        predictor_gradient, predictor_gradient.shape[1], carried - utterances[0], carry, per_thread=1, alone=True,
    )  # fmt: skip


def backward_shared(processor: Any, group: Group, rows: Any, encoder_gradient: Any) -> None:
    """Add gradients of a group's rows to those of the encoders that its utterances share."""
    _, most_frames, features = encoder_gradient.shape
    processor.launch(
        f"joint_backward_shared<{rows.dtype.name}>", group.count * most_frames, features,
        group.count, most_frames, group.table, group.by_encoder, features, rows, encoder_gradient, most_frames,
    )  # fmt: skip
