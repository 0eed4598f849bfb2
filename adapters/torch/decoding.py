"""PyTorch: greedy decoding and time-synchronous beam search, of any predictor and joint that are callables.

All utterances and prefixes are decoded together. The predictor is run once on every new prefix, and the joint once on every
prefix of a frame: on the rows that need it, gathered from wherever they are. Nothing here is compiled or differentiated; how
many rows there are is read back from a device several times a frame.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from transducer_loss.adapters.torch.operators import compute_dtype, uncompiled
from transducer_loss.adapters.torch.prefixes import Prefixes, advance, largest
from transducer_loss.adapters.torch.search import Joint, Predictor, Search
from transducer_loss.checks import whole_number

_interpreted = functools.partial(uncompiled, reason="numbers decide how decoding goes on: call it outside of torch.compile")


@dataclasses.dataclass(frozen=True)
class GreedyPath:
    """A path through the lattice of each utterance."""

    labels: Tensor
    """(B, L) int64, -1 past the lengths."""
    lengths: Tensor
    """(B,) int64."""
    frames: Tensor
    """(B, L) int64: when each label was emitted, -1 past the lengths."""
    scores: Tensor
    """(B,) float32, or float64 for float64 logits: log-probability of the path, its blanks included. NaN where logits were."""


@dataclasses.dataclass(frozen=True)
class NBest:
    """The N best prefixes of each utterance, best first; those that do not exist have length -1 and score -inf."""

    hypotheses: Tensor
    """(B, N, L) int64, -1 past the lengths."""
    lengths: Tensor
    """(B, N) int64."""
    scores: Tensor
    """(B, N) float32, or float64 for float64 logits: log-probability of all paths of a hypothesis that the search has seen."""


@_interpreted
@torch.no_grad()
def greedy(
    encoder: Tensor,
    encoder_lengths: Any,
    predictor: Predictor,
    joint: Joint,
    *,
    blank: int = 0,
    max_symbols: int = 10,
    topology: str = "regular",
    normalized: bool = False,
    hat: bool = False,
) -> GreedyPath:
    """Decode by the likeliest class of every cell.

    Parameters
    ----------
    encoder, encoder_lengths, predictor, joint, blank, max_symbols, topology, normalized, hat
        As of `beam_search`. A frame that has emitted `max_symbols` labels is left by its blank, however unlikely that is.

    Returns
    -------
    GreedyPath
        Of equal classes the lowest is taken; a cell with NaN logits emits nothing.

    Examples
    --------
    >>> import torch
    >>> from transducer_loss.adapters.torch import greedy
    >>> embedding, output = torch.nn.Embedding(5, 8), torch.nn.Linear(8, 5)
    >>> def predictor(labels, state):
    ...     return embedding(labels), None
    >>> path = greedy(torch.randn(2, 6, 8), [6, 4], predictor, lambda e, p: output(torch.tanh(e + p)))
    >>> texts = [labels[:length].tolist() for labels, length in zip(path.labels, path.lengths)]
    """
    search = Search(encoder, encoder_lengths, predictor, joint, blank, max_symbols, topology, normalized, hat)
    batch = encoder.shape[0]
    rows, count = search.lengths.new_zeros(2, batch)
    scores = encoder.new_zeros(batch, dtype=compute_dtype(encoder))
    emitted = [rows.new_zeros(4, 0)]  # utterance, position, label, frame
    for frame in range(search.frames):
        at = (search.lengths > frame).nonzero()[:, 0]
        for symbol in range(search.max_symbols + 1):
            log_probs = search.log_probs(frame, at, rows[at])
            unknown = ~(log_probs < math.inf).all(1)
            best = log_probs.argmax(1).masked_fill(unknown, search.blank)
            if symbol == search.max_symbols and not search.modified:
                best[:] = search.blank
            taken = log_probs.gather(1, best[:, None])[:, 0].masked_fill(unknown, math.nan)
            scores = scores.to(taken.dtype).index_add(0, at, taken)
            emits = best != search.blank
            at, label = at[emits], best[emits]
            if not len(at):
                break
            rows[at] = search.extend(rows[at], label)
            emitted.append(torch.stack([at, count[at], label, torch.full_like(at, frame)]))
            count[at] += 1
            if search.modified:
                break
        rows = search.keep(rows)
    utterance, position, label, frames = torch.cat(emitted, 1)
    padded = rows.new_full((2, batch, int(count.max())), -1)
    padded[:, utterance, position] = torch.stack([label, frames])
    return GreedyPath(padded[0], count, padded[1], scores)


@_interpreted
@torch.no_grad()
def beam_search(
    encoder: Tensor,
    encoder_lengths: Any,
    predictor: Predictor,
    joint: Joint,
    *,
    beam: int = 4,
    nbest: int | None = None,
    blank: int = 0,
    max_symbols: int = 10,
    topology: str = "regular",
    normalized: bool = False,
    hat: bool = False,
) -> NBest:
    """Decode the N best label sequences, frame by frame, adding up the paths of equal prefixes.

    In each frame, prefixes take a label at a time, up to `max_symbols` times. What arrives at a prefix that is already there is
    added to it; of the new prefixes those are followed that are among the `beam` likeliest, and no less likely than the last of
    the `beam` prefixes that leave the frame so far. With a beam that holds every prefix, and enough `max_symbols`, nothing is
    left out: a score is then the negative `rnnt_loss` of its hypothesis. Otherwise it is at most that, but for rounding.

    Parameters
    ----------
    encoder : (B, T, H) tensor
        Any device. Frames past an utterance's length are not read.
    encoder_lengths : (B,) tensor, array or list of int
        From 0 to T.
    predictor : callable
        ``predictor(labels, state) -> (features, state)``: the next of M prefixes, labels (M,) int64 to features (M, ...). The
        first call has the blank for its one label, and state None. The state is a tensor, None, or tuples, lists and dicts
        of such; its tensors have M rows, too, which lets prefixes go separate ways: transpose an LSTM's (layers, M, H).
    joint : callable
        ``joint(encoder, features) -> logits``: (M, H) and (M, ...) to (M, V), where a temperature would
        divide.
    beam : int
        How many prefixes of an utterance leave a frame.
    nbest : int, optional
        N, at most `beam`, which is the default.
    blank : int
        Negative, it counts from the end: one more call of predictor and joint then finds out V.
    max_symbols : int
        Labels a frame at most; the other topologies than "regular" have one.
    topology, normalized, hat
        As of `rnnt_loss`: the lattice that the model was trained on, and how logits become probabilities.

    Returns
    -------
    NBest
        Scores are accumulated in float32, or float64 for float64 logits. Of equal scores the prefix comes first that was found
        first, or by the lower label: the same every time. An utterance with NaN logits on its way has no hypotheses, and the
        scores NaN.

    Raises
    ------
    TypeError, ValueError
        For an argument, or a result of `predictor` or `joint`, that is not as above.

    Notes
    -----
    Modules are called as they are: put them into evaluation mode, or dropout acts. A hypothesis's frames are those of
    `transducer_loss.align`. Time-synchronous search is of Saon, Tueske and Audhkhasi (ICASSP 2020); that arrivals are merged
    before they are ranked, and the rule of which are followed, are this project's.

    Examples
    --------
    >>> import torch
    >>> from transducer_loss.adapters.torch import beam_search
    >>> embedding, cell, output = torch.nn.Embedding(5, 8), torch.nn.GRUCell(8, 8), torch.nn.Linear(8, 5)
    >>> def predictor(labels, state):
    ...     state = cell(embedding(labels), state)
    ...     return state, state
    >>> found = beam_search(torch.randn(2, 6, 8), [6, 4], predictor, lambda e, p: output(torch.tanh(e + p)), beam=3)
    >>> found.hypotheses.shape[:2]
    torch.Size([2, 3])
    """
    width = whole_number(beam, "beam", 1)
    count = width if nbest is None else whole_number(nbest, "nbest", 1)
    if count > width:
        raise ValueError(f"nbest: expected at most beam = {width}, got {nbest}")
    search = Search(encoder, encoder_lengths, predictor, joint, blank, max_symbols, topology, normalized, hat)
    batch = encoder.shape[0]
    zeros = search.lengths.new_zeros(batch, 1)
    prefixes = Prefixes(torch.full_like(zeros, -1)[..., None], zeros, zeros, zeros, zeros, zeros.to(compute_dtype(encoder)))
    for frame in range(search.frames):
        prefixes = advance(search, prefixes, frame, width)
        prefixes = prefixes._replace(rows=search.keep(prefixes.rows))
    prefixes = prefixes.taken(largest(prefixes.scores, count)[1])
    missing = count - prefixes.scores.shape[1]
    scores = pad(prefixes.scores, (0, missing), value=-math.inf).masked_fill(search.broken[:, None], math.nan)
    there = scores > -math.inf
    found = pad(prefixes.lengths, (0, missing)).masked_fill(~there, -1)
    labels = pad(prefixes.labels, (0, 0, 0, missing)).masked_fill(~there[..., None], -1)
    return NBest(labels[..., : max(0, int(found.max()))], found, scores)
