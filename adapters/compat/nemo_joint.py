"""NeMo's joint fused with the loss; `transducer_loss.adapters.compat.nemo` exports it and says how to use it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from transducer_loss.adapters import torch as losses
from transducer_loss.adapters.compat.shared import named

__all__ = ["FusedJoint"]

# By exact name: what is derived from them, as GraphWTransducerLoss, HATJoint and SampledRNNTJoint are, has another loss.
_LOSSES = ("RNNTLossNumba", "RNNTLossPytorch", "RNNTLoss", "GraphRnntLoss")
_ACTIVATIONS = {torch.nn.ReLU: "relu", torch.nn.Sigmoid: "sigmoid", torch.nn.Tanh: "tanh"}


def reported(loss: Tensor, fastemit_lambda: float) -> Tensor:
    """What NeMo reports for FastEmit, (1 + lambda) times the loss; the gradient stays that of the loss."""
    return loss + fastemit_lambda * loss.detach() if fastemit_lambda else loss


class FusedJoint(torch.nn.Module):
    """In place of a NeMo ``RNNTJoint``: its fused step with `joint_rnnt_loss`, so that no logits are made for the loss.

    Projections, activation, dropout and output layer are the joint's own, under the same names of parameters: checkpoints stay
    as they are. Everything else (decoding, the word error rate, export) is the joint's, which stays reachable as `peer`: its
    attributes are read from here, but set there, as in ``fused.peer.temperature = 2``.

    Parameters
    ----------
    joint : nemo.collections.asr.modules.RNNTJoint
    loss, wer : optional
        Of the model, for a joint that was made without ``fuse_loss_wer``: ``FusedJoint(model.joint, model.loss, model.wer)``.
    **options
        Keywords of `joint_rnnt_loss` that the joint and its loss do not say: `workspace`, `occupancy_floor` and so on.

    Raises
    ------
    ValueError
        For what the fused loss cannot do: other joints than ``RNNTJoint`` itself (sampled, HAT), other layers than activation,
        dropout and Linear, adapters, a `temperature`, `masking_prob`, other losses than plain RNN-T (TDT, multi-blank,
        W-transducer) and their extra outputs, a `clamp` of the gradient by logits, which do not exist.

    Examples
    --------
    ::

        model = nemo_asr.models.EncDecRNNTBPEModel(cfg=cfg.model, trainer=trainer)    # joint.fuse_loss_wer: true
        model.joint = FusedJoint(model.joint, workspace="512MiB")
    """

    def __init__(self, joint: Any, loss: Any = None, wer: Any = None, **options: Any) -> None:
        super().__init__()
        if isinstance(joint, FusedJoint):
            joint = joint.peer
        if type(joint).__name__ != "RNNTJoint":
            raise ValueError(f"joint: expected NeMo's RNNTJoint itself, got {type(joint).__name__}")
        layers = list(joint.joint_net)
        if type(layers[0]) not in _ACTIVATIONS or any(type(layer) is not torch.nn.Dropout for layer in layers[1:-1]):
            raise ValueError(f"joint: expected joint_net of activation, dropout and Linear, got {joint.joint_net}")
        if getattr(joint, "num_extra_outputs", 0) or getattr(joint, "masking_prob", -1.0) > 0:
            raise ValueError("joint: expected no extra outputs and no masking_prob")
        self.__dict__["peer"] = joint  # not a submodule: parameters keep their names
        self.enc, self.pred, self.joint_net, self.options = joint.enc, joint.pred, joint.joint_net, options
        if loss is not None:
            joint.set_fuse_loss_wer(True, loss, wer)
            # NeMo's property of that name says whether loss and joint are fused.
            joint.set_fused_batch_size(joint._fused_batch_size or 1 << 30)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["peer"], name)

    def train(self, mode: bool = True) -> FusedJoint:
        """Also of the joint itself."""
        self.peer.train(mode)
        return super().train(mode)

    @named(encoder="encoder_outputs", predictor="decoder_outputs", targets="transcripts", target_lengths="transcript_lengths")
    def _losses(self, encoder: Tensor, predictor: Tensor, encoder_lengths: Any, targets: Any, target_lengths: Any) -> Tensor:
        """Losses (B,) of encoder (B, T, D) and predictor outputs (B, U+1, D)."""
        of = self.peer.loss._loss
        kind = type(of).__name__
        if kind not in _LOSSES:
            raise ValueError(f"loss: expected NeMo's plain RNN-T loss, one of {', '.join(_LOSSES)}, got {kind}")
        if getattr(self.peer, "temperature", 1.0) != 1.0:
            raise ValueError(f"joint: expected a temperature of 1, got {self.peer.temperature}")
        if getattr(of, "clamp", 0.0) > 0 or (hasattr(self.peer, "is_adapter_available") and self.peer.is_adapter_available()):
            raise ValueError("joint: expected neither adapters nor a loss with clamp")
        fastemit, rates = getattr(of, "fastemit_lambda", 0.0), [layer.p for layer in self.joint_net[1:-1]]
        output = self.joint_net[-1]
        loss = losses.joint_rnnt_loss(
            self.enc(encoder), self.pred(predictor), output.weight, output.bias, targets, encoder_lengths, target_lengths,
            activation=_ACTIVATIONS[type(self.joint_net[0])], dropout=rates[0] if rates and self.training else 0.0,
            blank=of.blank, fastemit_lambda=fastemit, reduction="none", **self.options,
        )  # fmt: skip
        return reported(loss, fastemit) if kind == "RNNTLossNumba" else loss  # only that one reports so

    def forward(
        self, encoder_outputs: Tensor, decoder_outputs: Tensor | None, encoder_lengths: Any = None, transcripts: Any = None,
        transcript_lengths: Any = None, compute_wer: bool = False, **options: Any,
    ) -> Any:  # fmt: skip
        """As the joint's: encoder outputs (B, D, T), decoder outputs (B, D, U+1); loss, wer, its numerator and denominator."""
        if not self.peer.fuse_loss_wer:
            return self.peer(encoder_outputs=encoder_outputs, decoder_outputs=decoder_outputs)
        if self.peer.loss is None:
            raise ValueError("loss: expected one, as of FusedJoint(model.joint, model.loss, model.wer), got None")
        needed = {
            "encoder_lengths": encoder_lengths, "transcripts": transcripts, "transcript_lengths": transcript_lengths,
        }  # fmt: skip
        for name, value in needed.items():
            if value is None:
                raise ValueError(f"{name}: expected integers, as fuse_loss_wer is set, got None")
        loss, wer = None, (None, None, None)
        if decoder_outputs is not None:
            each = self._losses(
                encoder_outputs.transpose(1, 2), decoder_outputs.transpose(1, 2), encoder_lengths, transcripts,
                transcript_lengths,
            )  # fmt: skip
            loss = self.peer.loss.reduce([each], [transcript_lengths])
        if compute_wer:  # without decoder outputs the joint makes no loss of its own
            _, *wer = self.peer(
                encoder_outputs=encoder_outputs, decoder_outputs=None, encoder_lengths=encoder_lengths,
                transcripts=transcripts, transcript_lengths=transcript_lengths, compute_wer=True, **options,
            )  # fmt: skip
        return (loss, *wer)
